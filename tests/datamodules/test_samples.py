"""Samples of a frozen generator: draws, points on the surface, masks, pairs of views, and their truth."""

import math
from itertools import islice

import pytest
import pytorch_lightning as pl
import torch
from torch.testing import assert_close
from torch.utils.data import default_collate

from datamodules.samples import (
    PointRecipe,
    SampleDataModule,
    SampleItems,
    check_samples,
    pixel_points,
    scaled_poses,
    scene,
)
from datamodules.seeds import index_generator, index_seed
from datamodules.truth import KnowsViewTruth
from models import artifact
from models.batches import some_views, subject
from models.camera import Camera, Rig
from models.errors import UserError
from models.generators.geometry import field_geometry
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.volume import TriPlaneVolumeGenerator
from models.latents import Latents
from models.rendering.output import Rendering
from tests.models.generators.protocol import awaken
from tests.models.generators.test_geometry import PAINTED
from tests.models.generators.test_stylesdf import DECODER, RADIUS, ball, small
from tests.stages import tiny


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of a generator of every form."""
    folder = tmp_path_factory.mktemp("work")
    tiny.prior(folder / "tiny")
    torch.manual_seed(0)
    sdf = awaken(small(decoder=DECODER, samples=48)).eval()
    sdf.load_state_dict(ball(), strict=False)
    artifact.save(folder / "sdf", stage="prior", modules={"balls": sdf})
    volume = awaken(TriPlaneVolumeGenerator(**PAINTED, field={"features": 6, "hidden": 8})).eval()
    artifact.save(folder / "volume", stage="prior", modules={"generator": volume})
    flat = StyleGAN2Generator(channels=(6, 5, 4, 4), style_dim=7, mapping_layers=2)
    artifact.save(folder / "flat", stage="prior", modules={"generator": flat.eval()})
    return folder


def data(folder, kind="sdf", **options):
    module = "balls" if kind == "sdf" else "generator"
    made = SampleDataModule(str(folder / kind), module, **{"train_samples": 12, "val_samples": 5, **options})
    made.setup("fit")
    return made


def batch(made, split="train", rows=(0, 1, 2), **options):
    return made.render(default_collate([made.datasets[split][row] for row in rows]), **options)


def test_items_are_their_own():
    """Whatever was asked before, in every split others, and other views are further draws."""
    items = SampleItems("train", 5, 2, 4, Rig(), 0)
    first = items[3]
    assert all(torch.equal(items[3][name], first[name]) for name in ("z", "label", "draws"))
    others = [items[2], SampleItems("val", 5, 2, 4, Rig(), 0, 5)[3], SampleItems("train", 5, 2, 4, Rig(), 1)[3]]
    for other in others:
        assert all(not torch.equal(other[name], first[name]) for name in ("z", "label", "draws"))
    assert first["name"] == "train0000003" and not torch.equal(first["label"][0], first["label"][1])
    one = SampleItems("train", 5, 1, 4, Rig(), 0)[3]
    assert torch.equal(one["z"], first["z"])
    with pytest.raises(IndexError):
        items[5]


def test_no_draw_comes_twice(work):
    """As torch's generators see seeds, by 32 bits: of all sets neither codes, nor poses, nor points of a view."""
    made = data(work, train_samples=1_200_000, val_samples=256, test_samples=256, views=2)
    sets = made.datasets.values()
    numbers = [items.first + index for items in sets for index in range(items.count)]
    assert numbers == list(range(1_200_512)) and [len(items) for items in sets] == [1_200_000, 256, 256]
    for purpose in ("sample's code", "sample's poses", "sample's points 0", "sample's points 1"):
        assert len({index_seed(0, number, purpose) % 2**32 for number in numbers}) == 1_200_512
    last = made.datasets["test"][255]
    assert torch.equal(last["z"], torch.randn(6, generator=index_generator(0, 1_200_511, "sample's code")))
    assert last["draws"].tolist() == [index_seed(0, 1_200_511, f"sample's points {view}") for view in (0, 1)]


@pytest.mark.parametrize("count", [None, 100])
def test_points_and_codes_are_drawn_apart(work, count):
    """Neither the offsets of a view nor of the other begin with the code."""
    made = data(work, views=2, points=PointRecipe(count))
    item = made.datasets["train"][0]
    chosen, near, anywhere = made.points.draw(256, item["draws"].tolist())
    size = len(item["z"])
    normal = [item["z"], *(offsets.flatten()[:size] for offsets in near)]
    for one in range(3):
        for other in range(one):
            assert (normal[one] - normal[other]).abs().min() > 0
    assert not torch.equal(near[0], near[1]) and not torch.equal(anywhere[0], anywhere[1])
    assert torch.equal(chosen[0], chosen[1]) is (count is None)
    found = batch(made, rows=(0,))
    offsets = (found["space"] - found["surface"].repeat(1, 1, 2, 1)[:, :, : found["space"].shape[2]])[0]
    assert_close(offsets[:, : near.shape[1]], 0.03 * near, atol=1e-6, rtol=0)


def test_draws_are_spread_as_they_should(work):
    made = data(work, train_samples=600, yaw_std=0.2)
    items = [made.datasets["train"][i] for i in range(600)]
    z = torch.stack([item["z"] for item in items])
    assert z.mean().abs() < 0.05 and abs(z.std() - 1) < 0.05
    yaw, pitch = made.rig.angles(Camera.from_label(torch.cat([item["label"] for item in items])))
    assert yaw.std() == pytest.approx(0.2, abs=0.02) and pitch.std() == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("kind", ["sdf", "tiny", "volume"])
def test_a_batch_is_whole(work, kind):
    """Shapes, ranges, and the field of the very codes at the very points."""
    made = data(work, kind, views=2, points=PointRecipe(40))
    found = batch(made)
    generator = made.generator("cpu")
    size, h = generator.resolution, found["depth"].shape[-1]
    shapes = {
        "image": (3, 2, 3, size, size), "label": (3, 2, 25), "depth": (3, 2, 1, h, h), "mask": (3, 2, 1, h, h),
        "normals": (3, 2, 3, h, h), "surface": (3, 2, 40, 3), "surface_mask": (3, 2, 40, 1),
        "surface_value": (3, 2, 40, 1), "surface_normals": (3, 2, 40, 3), "space": (3, 2, 60, 3),
        "space_mask": (3, 2, 60, 1), "space_value": (3, 2, 60, 1), "draws": (3, 2), "z": (3, generator.z_dim),
    }  # fmt: skip
    if kind == "sdf":
        shapes["raw"] = (3, 2, 3, h, h)
        assert h == 16 and size == 32
    assert {name: value.shape for name, value in found.items() if isinstance(value, torch.Tensor)} == shapes
    assert found["name"] == [f"train{i:07d}" for i in range(3)]
    assert found["image"].abs().max() <= 1 and found["image"].std() > 0
    ws, expected = Latents(found["ws"]), generator.mapping(found["z"])
    for name, codes in expected.groups.items():
        assert_close(ws.groups[name], codes)
    rendering = generator.synthesis(ws, Camera.from_label(found["label"].flatten(0, 1)))
    assert_close(found["image"].flatten(0, 1), rendering.image.clamp(-1, 1))
    assert_close(found["depth"].flatten(0, 1), rendering.depth)
    for name in ("surface", "space"):
        field = field_geometry(generator, ws.repeat_interleave(2), found[name].flatten(0, 1))
        assert_close(found[f"{name}_value"].flatten(0, 1), field.value, atol=1e-5, rtol=1e-4)
    few = some_views(found, slice(1))
    assert torch.equal(few["draws"], found["draws"][:, :1])
    assert few["surface"].shape == (3, 1, 40, 3) and few["ws"] is found["ws"]
    assert {name: codes.shape for name, codes in subject(found, 1)["ws"].items()} == {
        name: codes.shape[1:] for name, codes in found["ws"].items()
    }


def test_points_lie_where_they_should(work):
    """Of balls: on the surface where the subject is, of which nothing else is the mask; P_F around and anywhere."""
    made = data(work, train_samples=4)
    found = batch(made, rows=range(4))
    rays = math.prod(found["depth"].shape[-2:])
    assert found["surface"].shape[2] == rays and found["space"].shape[2] == 1.5 * rays
    seen = found["surface_mask"][:, 0, :, 0].bool()
    assert 0.2 < seen.float().mean() < 0.8
    radii = found["surface"][:, 0].norm(dim=-1)
    inner = found["mask"].flatten(2)[:, 0] > 0.999
    assert inner.any() and (radii[inner] - RADIUS).abs().max() < 0.04 and (seen | ~inner).all()
    assert found["surface_value"][:, 0, :, 0][inner].abs().max() < 0.03
    outward = torch.nn.functional.normalize(found["surface"][:, 0], dim=-1)
    assert ((found["surface_normals"][:, 0] * outward).sum(-1)[inner] > 0.7).all()
    # StyleSDF's numbers: sd .03 of the near ones, and half as many in a cube of half side .12.
    offset = found["space"][:, 0, :rays] - found["surface"][:, 0]
    assert float(offset.std()) == pytest.approx(0.03, rel=0.05) and abs(float(offset.mean())) < 0.002
    anywhere = found["space"][:, 0, rays:]
    assert anywhere.abs().max() <= 0.12 and float(anywhere.std()) == pytest.approx(0.24 / math.sqrt(12), rel=0.05)
    assert torch.equal(found["space_mask"][..., 0], (found["space"].abs() <= 0.12).all(-1).float())
    assert 0 < found["space_mask"][:, 0, :rays].mean() < 1 and found["space_mask"][:, 0, rays:].all()


def test_the_foreground_is_counted_with_the_far_end():
    """Ray by ray: alpha * depth + (1 - alpha) * far < 1.08, StyleSDF's."""
    rig = small().rig
    depth = torch.tensor([0.95, 1.0, 1.0, 1.07, 0.9]).reshape(1, 1, 1, 5)
    alpha = torch.tensor([1.0, 0.4, 0.3, 1.0, 0.0]).reshape(1, 1, 1, 5)
    rendering = Rendering(torch.zeros(1, 3, 1, 5), depth=depth, alpha=alpha)
    camera = rig.camera(0.3, 0.1)
    points, shows = pixel_points(rendering, camera, rig, PointRecipe().foreground)
    assert shows.flatten().tolist() == [True, True, False, True, False]  # 1.072 and 1.084
    _, depths = camera.project(points)
    assert_close(depths.flatten(), torch.tensor([0.95, 1.0, 0.3 + 0.7 * 1.12, 1.07, 1.12]))


def test_some_pixels_are_chosen_once(work):
    made = data(work, points=PointRecipe(100, near_std=0, uniform=0))
    every, some = batch(data(work)), batch(made)
    assert torch.equal(some["space"], some["surface"])
    for row in range(3):
        distance = (some["surface"][row, 0][:, None] - every["surface"][row, 0]).norm(dim=-1)
        assert distance.min(1).values.max() < 1e-6 and len(set(distance.argmin(1).tolist())) == 100


def loaded(made, split, ranks, batch_size):
    """All items of a split by name, dealt out to ranks."""
    found = {}
    made.batch_size = batch_size
    for rank in range(ranks):
        made.trainer = type("Trainer", (), {"world_size": ranks, "global_rank": rank, "training": split == "train"})()
        for items in getattr(made, f"{split}_dataloader")():
            rendered = made.on_after_batch_transfer(items, 0)
            for row, name in enumerate(rendered["name"]):
                assert name not in found
                found[name] = subject(rendered, row)
    return found


@pytest.mark.parametrize("split", ["train", "val"])
def test_any_number_of_ranks_sees_the_same(work, split):
    """Those of validation to the last bit."""
    made = data(work, views=2, points=PointRecipe(20))
    alone, both = loaded(made, split, 1, 4), loaded(made, split, 2, 2)
    assert alone.keys() == both.keys() and len(alone) == {"train": 12, "val": 5}[split]
    for name, sample in alone.items():
        for key, value in sample.items():
            if isinstance(value, torch.Tensor):
                if split == "val" or not value.is_floating_point():
                    assert torch.equal(both[name][key], value), key
                else:  # a normal across its ray may be turned either way
                    wrong = (both[name][key] - value).abs() > 1e-3
                    assert wrong.double().mean() < 0.01, key


def test_trainings_that_go_on_begin_with_other_samples(work):
    """The same set in another order, which views and batches do not change; validation is as it was."""
    seen = {}
    for order in (0, 1):
        made = data(work, train_samples=1000, batch_size=4, order=order)
        made.trainer = None
        names = [name for part in islice(made.train_dataloader(), 5) for name in part["name"]]
        seen[order] = names, [name for part in made.val_dataloader() for name in part["name"]]
    assert len(set(seen[0][0]) | set(seen[1][0])) == 40
    assert seen[0][1] == seen[1][1]


def test_easier_poses():
    rig = Rig(yaw_mean=0.1, pitch_mean=-0.05)
    camera = rig.random(6, torch.Generator().manual_seed(0))
    yaw, pitch = rig.angles(camera)

    def angles(**scales):
        found = rig.angles(scaled_poses(camera, rig, 2, **scales))
        return torch.stack(found, -1).double()

    mean, drawn = torch.tensor([0.1, -0.05]).double(), torch.stack([yaw, pitch], -1).double()
    assert scaled_poses(camera, rig, 2) is camera
    assert_close(angles(pose_sd=0.5), mean + (drawn - mean) / 2, atol=1e-5, rtol=0)
    assert_close(angles(pose_sd=0), mean.expand(6, 2), atol=1e-5, rtol=0)
    first, second = drawn[::2], drawn[1::2]
    for gap in (0, 0.25):
        found = angles(view_gap=gap)
        assert_close(found[::2], first, atol=1e-5, rtol=0)
        assert_close(found[1::2], first + gap * (second - first), atol=1e-5, rtol=0)


def test_a_stage_sets_how_easy(work):
    made = data(work, "tiny", views=2, points=PointRecipe(10))
    made.scale_view_gap = 0.0
    found = batch(made)
    assert_close(found["image"][:, 0], found["image"][:, 1], atol=1e-3, rtol=0)
    assert_close(found["label"][:, 0], found["label"][:, 1], atol=1e-5, rtol=0)
    plain = data(work, "tiny", views=2, points=PointRecipe(10))
    for split in ("train", "val"):
        found, expected = (batch(one, split, training=False) for one in (made, plain))
        assert torch.equal(found["label"], expected["label"]) and torch.equal(found["image"], expected["image"])
    made.scale_pose_sd = 0.0
    yaw, _ = made.rig.angles(Camera.from_label(batch(made)["label"].flatten(0, 1)))
    assert_close(yaw, torch.zeros(6), atol=1e-5, rtol=0)


def test_easier_poses_are_of_training_alone(work):
    """As a trainer asks for batches, whatever a stage has set last."""
    made = data(work, "tiny", test_samples=3, points=PointRecipe(10))
    plain = {split: loaded(made, split, 1, 4) for split in ("train", "val", "test")}
    made.scale_pose_sd = 0.0
    for split, expected in plain.items():
        found = loaded(made, split, 1, 4)
        for name, sample in found.items():
            assert torch.equal(sample["label"], expected[name]["label"]) is (split != "train")


def test_normals_are_asked_for_on_the_surface_alone(work, monkeypatch):
    """Values in space need no gradient."""
    asked = []

    def geometry(generator, ws, points, **options):
        asked.append(points)
        return field_geometry(generator, ws, points, **options)

    monkeypatch.setattr("datamodules.samples.field_geometry", geometry)
    found = batch(data(work, points=PointRecipe(40)))
    assert len(asked) == 1 and torch.equal(asked[0], found["surface"].flatten(0, 1))


@pytest.mark.parametrize("kind", ["sdf", "tiny"])
def test_the_truth_of_views(work, kind):
    """From the sample's own camera what the sample shows; depth, mask and normals as large as the picture."""
    made = data(work, kind, points=PointRecipe(10))
    assert isinstance(made, KnowsViewTruth)
    found = batch(made)
    camera = Camera.from_label(found["label"].flatten(0, 1))
    seen = made.view_truth(subject(found, 2), Camera.cat([camera[2], camera[0]])).to(torch.device("cpu"))
    assert_close(seen.image[:1], found["image"][2], atol=1e-4, rtol=1e-3)
    assert (seen.image[1] - found["image"][2, 0]).abs().max() > 1e-2
    side = seen.image.shape[-1]
    factor = side // found["depth"].shape[-1]
    for name in ("depth", "mask", "normals"):
        value = getattr(seen, name)
        assert value.shape[-2:] == (side, side)
        small_one = value[:1, :, ::factor, ::factor]
        assert_close(small_one, found[name][2], atol=1e-3, rtol=1e-3)
    assert not seen.segmentation.any()


def test_truncation(work):
    made = data(work, truncation=0.0, points=PointRecipe(10))
    ws = Latents(batch(made)["ws"])
    for name, mean in made.generator("cpu").mean_latents.groups.items():
        assert_close(ws.groups[name], mean.expand_as(ws.groups[name]))


def test_what_cannot_be_is_said(work):
    with pytest.raises(UserError, match="views is 0"):
        data(work, views=0)
    with pytest.raises(UserError, match="truncation is -1"):
        data(work, truncation=-1)
    for name in ("val_samples", "test_samples", "workers"):
        with pytest.raises(UserError, match=f"{name} is -1: it must be a number and must not be negative"):
            data(work, **{name: -1})
    with pytest.raises(UserError, match="4294967301 samples in all: at most 4294967296"):
        data(work, train_samples=2**32, test_samples=0)
    with pytest.raises(UserError, match=r"points\.count is 0"):
        PointRecipe(0)
    with pytest.raises(UserError, match="a StyleGAN2Generator, which has no radiance field"):
        data(work, "flat")
    with pytest.raises(UserError, match=r"points\.count is 257: a rendered picture has 256 pixels"):
        batch(data(work, points=PointRecipe(257)))
    with pytest.raises(UserError, match="test_samples is 0"):
        SampleDataModule(str(work / "tiny"), test_samples=0).setup("test")
    twice = data(work, test_samples=0, val_samples=0)
    for stage, split in {"validate": "val", "test": "test", "predict": "test"}.items():
        with pytest.raises(UserError, match=f"{split}_samples is 0: there is nothing to {stage}"):
            twice.setup(stage)
    with pytest.raises(UserError, match="has no module 'balls'"):
        SampleDataModule(str(work / "tiny"), "balls").setup("fit")


def test_samples_are_of_the_stages_generator(work, tmp_path):
    made = data(work)
    source = artifact.load(work / "sdf")
    check_samples(made, (source, "balls"))
    handed = artifact.save(
        tmp_path / "on", stage="x", modules={"generator": source.module("balls")},
        delta_of={"generator": (source, "balls")},
    )  # fmt: skip
    check_samples(made, (handed, "generator"))
    with pytest.raises(UserError, match="what learns is trained for another generator"):
        check_samples(made, (artifact.load(work / "tiny"), "generator"))
    with pytest.raises(UserError, match="does not know the codes behind its pictures"):
        check_samples(pl.LightningDataModule(), (source, "balls"))


def test_the_scene_is_around_the_cameras_centre():
    assert scene(small().rig) == ((0, 0, 0), pytest.approx(0.12))
    assert scene(Rig(centre=(1, 2, 3)))[0] == (1, 2, 3)
