"""The detail stage on a tiny prior and its own samples, redder than the prior can make them."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks.artifact import ExportArtifact
from datamodules.artworks import ArtworkDataModule
from datamodules.resumable import ResumableLoader
from models import artifact
from models.camera import Camera
from models.encoders.detail import DetailReconstructor
from models.encoders.pyramid import Encoder4Editing
from models.errors import UserError
from models.generators.manifold import ManifoldGenerator
from models.generators.views import render_views
from models.heads.detailed import DetailedGenerator
from models.heads.photos import PhotoSet
from models.heads.subjects import Subjects
from models.image import read_image, write_image
from models.metrics.distribution import EmbeddedDistribution
from models.metrics.inversion import InversionProtocol
from models.metrics.records import read_records
from stages.base.inversion import RateSchedule
from stages.base.stage import ArtifactRef
from stages.detail import DetailStage, Regularisation, depth_change
from tests.stages import inversions, tiny
from tests.stages.cases import Command, StageCase
from tests.stages.processes import InStep

CASE = StageCase(
    inversions.detail,
    inversions.prepare,
    needs="tune",
    commands={
        "fit": Command(batch=6, options={**inversions.FIFTHS, "model.marks": 0.5}, tolerance=1e-4),
        "predict": Command(options=inversions.FIFTHS),
    },
)

SIDE = tiny.OPTIONS["resolution"]
DETAIL = {
    "features": 4, "resolution": SIDE, "voxel": [4, 16, 16], "voxel_features": 4, "widths": [8, 8], "unet": [4, 6],
    "blocks": 1, "atlas": 8, "upsampler": [6, 6],
}  # fmt: skip


@pytest.fixture(scope="module")
def inverter(tmp_path_factory):
    """A prior, and an encoder that says nothing yet: its answer is near the mean code."""
    folder = tmp_path_factory.mktemp("inverter")
    generator = tiny.prior(folder / "prior").module("generator")
    torch.manual_seed(0)
    encoder = Encoder4Editing(
        generator.num_ws, generator.w_dim, SIDE, widths=[4, 6, 8, 10], depths=[1, 1, 1, 1], reduction=1,
        expressions=len(generator.expressions), style_width=8,
    ).eval()  # fmt: skip
    encoder.mean_latents = generator.mean_latents
    artifact.save(folder / "tune", stage="tune", modules={"generator": generator, "encoder": encoder})
    return folder / "tune"


@pytest.fixture(scope="module")
def before_a_plane(tmp_path_factory):
    """The same with a generator that has a plane behind its head."""
    folder = tmp_path_factory.mktemp("plane")
    shared = {
        "field": "triplane", "background": "shared", "flattening": "frontal",
        "triplane": {"features": 4, "hidden": 8, "extent": 0.9},
    }  # fmt: skip
    torch.manual_seed(0)
    generator = ManifoldGenerator(**tiny.OPTIONS | shared).eval()
    generator.update_mean(64)
    encoder = Encoder4Editing(
        generator.num_ws, generator.w_dim, SIDE, widths=[4, 6, 8, 10], depths=[1, 1, 1, 1], reduction=1,
        expressions=len(generator.expressions), style_width=8,
    ).eval()  # fmt: skip
    encoder.mean_latents = generator.mean_latents
    artifact.save(folder / "tune", stage="tune", modules={"generator": generator, "encoder": encoder})
    return folder / "tune"


class Reds(pl.LightningDataModule):
    """Six pictures of the prior's samples with a red band, in batches of two."""

    def __init__(self, path, workers=0):
        super().__init__()
        generator = artifact.load(path).module("generator")
        camera = generator.rig.camera(torch.linspace(-0.4, 0.4, 6))
        z = generator.sample_z(6, torch.Generator().manual_seed(3))
        with torch.no_grad():
            image = generator.synthesis(generator.mapping(z), camera).image
        image[:, :, SIDE // 2 : SIDE // 2 + 4] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
        label = camera.label()
        self.samples = [{"image": image[i : i + 1], "label": label[i : i + 1], "name": f"r{i}.png"} for i in range(6)]

    def train_dataloader(self):
        return ResumableLoader(self.samples, 2, seed=0, trainer=self.trainer)

    def test_dataloader(self):
        return DataLoader(self.samples, batch_size=2)

    val_dataloader = predict_dataloader = test_dataloader


def stage(inverter, detail=None, **options):
    torch.manual_seed(0)
    return DetailStage(
        inverter=ArtifactRef(str(inverter)),
        detail=DetailReconstructor(**DETAIL | (detail or {})),
        perceptual=tiny.network("perceptual"),
        identity=tiny.network("identity"),
        pose=tiny.network("pose"),
        **{"schedule": RateSchedule(5e-3, 5e-3)} | options,
    )


def fit(module, data, out, steps=4, **options):
    torch.set_num_threads(1)
    options = {"max_epochs": -1, "max_steps": steps, "limit_val_batches": 0, **options}
    return tiny.fit(module, data, out, **options)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.detail.parameters()])


def terms(module, data, rows=2):
    """The losses of the first pictures."""
    module.configure_model()
    module.trainer = tiny.trainer("/nonexistent", callbacks=[])
    return terms_again(module, data, rows)


def terms_again(module, data, rows=2):
    image = torch.cat([sample["image"] for sample in data.samples[:rows]])
    camera = Camera.from_label(torch.cat([sample["label"] for sample in data.samples[:rows]]))
    return module.losses(image, camera, {"image": image[:, None]})


def test_details_on_the_plane_learn_from_all_terms(before_a_plane, inverter):
    """Sec. 3.3 and Eq. 10: the plane is the last surface, in front of which details far from z_surf are pulled to 0."""
    data, paper = Reds(before_a_plane), Regularisation(novel=0.0, plane=True, depth=1.0)
    module = stage(before_a_plane, {"background": True, "project": False}, regularisation=paper)
    found = terms(module, data)
    assert float(found["depth"].sum()) == 0, "details start at 0"
    with torch.no_grad():
        for parameter in module.detail.upsampler.parameters():
            parameter.add_(0.05)
    moved = terms_again(module, data)
    assert (moved["depth"] > 0).all()
    module.regularisation = dataclasses.replace(paper, plane=False)
    other = terms_again(module, data)
    assert not torch.allclose(other["depth"], moved["depth"])
    torch.testing.assert_close(other["perceptual"], moved["perceptual"])
    moved["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.detail.parameters())
    head = module.reconstruct(data.samples[0]["image"], Camera.from_label(data.samples[0]["label"]))
    assert head(module.generator.rig.camera(0.3)).image.isfinite().all()
    bare = stage(inverter, regularisation=paper)
    with pytest.raises(UserError, match=r"regularisation\.plane: the generator of .* has no plane"):
        bare.configure_model()


def test_details_improve_on_the_coarse_heads(tmp_path, inverter):
    data, module = (
        Reds(inverter),
        stage(inverter, schedule=RateSchedule(1e-2, 1e-2), regularisation=Regularisation(novel=0.5)),
    )
    made = fit(module, data, tmp_path, 30)
    assert set(made.manifest["modules"]) == {"generator", "encoder", "detail"}
    assert made.manifest["parents"]["inverter"]["stage"] == "tune"
    tested = stage(inverter, tested=ArtifactRef(str(tmp_path)))
    tested.configure_model()
    image = torch.cat([sample["image"] for sample in data.samples])
    camera = Camera.from_label(torch.cat([sample["label"] for sample in data.samples]))
    with torch.no_grad():
        ws, expression = tested.invert(image)
        coarse = tested.generator.synthesis(ws, camera, expression=expression).image
        final = tested.reconstruct(image, camera)(camera).image
    assert tiny.psnr(final, image) > tiny.psnr(coarse, image) + 0.5


def test_interrupted_training_continues_exactly(tmp_path, inverter):
    whole = stage(inverter)
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
    fit(whole, Reds(inverter), tmp_path / "whole", 5, callbacks=[keep, ExportArtifact()], enable_checkpointing=True)
    (checkpoint,) = (tmp_path / "kept").glob("*step=2.ckpt")  # within an epoch of three batches
    resumed = stage(inverter)
    options = {"max_epochs": -1, "max_steps": 5, "limit_val_batches": 0}
    tiny.trainer(tmp_path / "rest", **options).fit(
        resumed, datamodule=Reds(inverter), ckpt_path=checkpoint, weights_only=True
    )
    assert torch.equal(weights(resumed), weights(whole))
    assert artifact.load(tmp_path / "rest").id == artifact.load(tmp_path / "whole").id


def test_two_ranks_stay_equal(tmp_path, inverter):
    data, module = Reds(inverter), stage(inverter)

    def rank(index):
        fit(
            module,
            data,
            tmp_path,
            3,
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            callbacks=[InStep(), ExportArtifact()],
        )

    tiny.ranks(rank, 2)
    assert "detail" in artifact.load(tmp_path).manifest["modules"]


def test_half_precision(tmp_path, inverter):
    module = stage(inverter)
    before = weights(module)
    fit(module, Reds(inverter), tmp_path, 3, precision="bf16-mixed")
    after = weights(module)
    assert after.isfinite().all() and not torch.equal(before, after)


@pytest.mark.parametrize(
    ("detail", "regularisation", "missing"),
    [
        ({}, {}, set()),
        ({"space": "world"}, {"normals": "depth"}, set()),
        ({"super_resolution": False}, {"mask": "visible"}, set()),
        ({}, {"mask": "none"}, set()),
        ({}, {"novel": 0.0}, {"novel"}),
        ({}, {"depth": 0.0}, {"depth"}),
    ],
)
def test_ablations(inverter, detail, regularisation, missing):
    """Table 3: each is one setting."""
    module = stage(inverter, detail, regularisation=Regularisation(**regularisation))
    found = terms(module, Reds(inverter))
    assert (
        set(found)
        == {"pixel", "perceptual", "identity", "reconstruction", "novel", "depth", "depth_change", "loss"} - missing
    )
    settings = module.regularisation
    expected = found["reconstruction"]
    for name in {"novel", "depth"} - missing:
        expected = expected + getattr(settings, name) * found[name]
    torch.testing.assert_close(found["loss"], expected)
    assert not found["depth_change"].any(), "details begin at nothing"
    found["loss"].mean().backward()
    learning = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert learning and all(name.startswith("detail.") for name in learning)


def test_masks_of_a_novel_view(inverter):
    """Hidden parts are only ever added, and both kinds of normals see some of the head."""
    masks = {}
    for name, options in {
        "opacity": {}, "depth": {"normals": "depth"}, "visible": {"normals": "depth", "mask": "visible"},
        "none": {"mask": "none"},
    }.items():  # fmt: skip
        module = stage(inverter, regularisation=Regularisation(**options))
        data = Reds(inverter)
        terms(module, data, 1)
        image, camera = data.samples[0]["image"], Camera.from_label(data.samples[0]["label"])
        with torch.no_grad():
            coarse = module._coarse(image, camera, module.generator.rig.random(1, module.draws()))
        masks[name] = module._mask(coarse)
    assert masks["none"].all()
    assert (masks["visible"] >= masks["depth"]).all()
    for name in ("opacity", "depth"):
        assert 0.02 < masks[name].mean() < 0.98 and set(masks[name].unique().tolist()) == {0.0, 1.0}


def test_painted_marks_are_part_of_what_is_recovered(inverter):
    data = Reds(inverter)
    plain, never = (terms(stage(inverter, **options), data)["pixel"] for options in ({}, {"marks": 0.0}))
    painted = terms(stage(inverter, marks=1.0), data)["pixel"]
    assert torch.equal(plain, never) and not (plain == painted).any()


def test_depth_change_is_measured_where_both_are_solid():
    from models.rendering.output import Rendering

    shape = (2, 1, 2, 2)
    alpha = torch.tensor([1.0, 1.0, 0.2, 1.0]).reshape(1, 1, 2, 2).expand(shape)
    coarse = Rendering(torch.zeros(2, 3, 2, 2), depth=torch.full(shape, 7.0), alpha=torch.ones(shape))
    final = coarse.replace(depth=torch.tensor([7.3, 7.0, 9.0, 7.0]).reshape(1, 1, 2, 2).expand(shape), alpha=alpha)
    torch.testing.assert_close(depth_change(final, coarse), torch.full((2,), 0.1))
    assert not depth_change(final.replace(alpha=torch.zeros(shape)), coarse).any()


def test_scores_of_every_subject(tmp_path, inverter):
    module = stage(inverter)
    fit(module, Reds(inverter), tmp_path / "fit", 1)
    protocol = InversionProtocol(
        tiny.network("perceptual"), tiny.network("identity"), EmbeddedDistribution(weights=None), surfaces=0
    )
    tested = DetailStage(
        perceptual=tiny.network("perceptual"),
        identity=tiny.network("identity"),
        tested=ArtifactRef(str(tmp_path / "fit")),
        protocol=protocol,
    )
    tiny.trainer(tmp_path / "test").test(tested, datamodule=Reds(inverter), verbose=False)
    records = read_records(tmp_path / "test" / "metrics.csv")
    assert sum(record.metric == "psnr" for record in records) == 6
    assert {record.variant for record in records} == {"detail"}


def test_training_needs_what_it_trains_and_what_for(inverter):
    for missing in ({"inverter": ArtifactRef(str(inverter))}, {"detail": DetailReconstructor(**DETAIL)}):
        with pytest.raises(UserError, match=r"detail trains --model\.detail for the result --model\.inverter"):
            DetailStage(perceptual=tiny.network("perceptual"), **missing).configure_model()


def test_training_starts_from_an_earlier_result(inverter, trained):
    module = stage(inverter, start=ArtifactRef(str(trained)))
    fresh = weights(module)
    module.configure_model()
    kept = artifact.load(trained).module("detail")
    assert torch.equal(weights(module), torch.cat([p.flatten() for p in kept.parameters()]))
    assert not torch.equal(weights(module), fresh)
    with pytest.raises(UserError, match=r"model\.detail is not of the sizes of"):
        stage(inverter, {"atlas": 8, "upsampler": [5]}, start=ArtifactRef(str(trained))).configure_model()


# -- photos ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(inverter, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    fit(stage(inverter), Reds(inverter), out, 3)
    return out


@pytest.fixture
def folder(tmp_path, inverter):
    """Three photos: one with its camera, one with angles, and one of which nothing is known."""
    data = Reds(inverter)
    for name, sample in zip(("a", "b", "c"), data.samples, strict=False):
        write_image(tmp_path / "photos" / f"{name}.png", sample["image"])
    items = [
        {"file": "a.png", "yaw_deg": -20.0},
        {"file": "b.png", "yaw_deg": 5.0, "pitch_deg": 2.0},
        {"file": "c.png"},
    ]
    (tmp_path / "photos" / "artworks.json").write_text(json.dumps({"items": items}))
    return tmp_path / "photos"


def predict(inverter, trained, photos, out, **options):
    torch.set_num_threads(1)
    module = stage(inverter, tested=ArtifactRef(str(trained)))
    tiny.trainer(out, **options).predict(module, datamodule=ArtworkDataModule(str(photos), size=SIDE))
    return module


def test_a_folder_of_photos(tmp_path, inverter, trained, folder):
    predict(inverter, trained, folder, tmp_path / "out")
    made = artifact.load(tmp_path / "out")
    subjects = Subjects(made)
    assert subjects.ids == ("a", "b", "c")
    assert isinstance(made.module("anchors"), PhotoSet)
    for kind in ("reference", "coarse", "detailed", "views", "camera"):
        assert made.media(f"{kind}_b.png").exists()
    subject = subjects["b"]
    assert isinstance(subject.generator, DetailedGenerator) and subject.original is None
    assert torch.rad2deg(subject.camera.yaw) == pytest.approx(5, abs=1e-3)
    seen = render_views(subject.generator, subject.latents, subject.camera, subject.expression).image
    shown = read_image(made.media("detailed_b.png"))
    assert (seen.clamp(-1, 1) - shown).abs().max() < 0.02  # 8 bits, and half precision in the file
    assert subject.artwork is not None


def test_ranks_share_the_photos(tmp_path, inverter, trained, folder):
    predict(inverter, trained, folder, tmp_path / "one")

    def rank(index):
        predict(inverter, trained, folder, tmp_path / "two", devices=2, strategy="ddp")

    tiny.ranks(rank, 2)
    assert artifact.load(tmp_path / "two").id == artifact.load(tmp_path / "one").id


def test_predict_takes_batches_of_pictures_too(tmp_path, inverter, trained):
    module = stage(inverter, tested=ArtifactRef(str(trained)))
    tiny.trainer(tmp_path).predict(module, datamodule=Reds(inverter))
    assert Subjects(artifact.load(tmp_path)).ids == tuple(f"r{i}" for i in range(6))


def test_killed_in_the_middle_of_export(tmp_path, inverter, trained, folder):
    """Nothing half-written is taken for a result."""

    def rank(index):
        module = stage(inverter, tested=ArtifactRef(str(trained)))
        module.export_heads = lambda: os.kill(os.getpid(), signal.SIGKILL)
        tiny.trainer(tmp_path / "out").predict(module, datamodule=ArtworkDataModule(str(folder), size=SIDE))

    tiny.ranks(rank, 1, kill=True)
    assert not (tmp_path / "out" / "artifact").exists()
    predict(inverter, trained, folder, tmp_path / "out")
    assert artifact.load(tmp_path / "out").stage == "detail"


# -- refusals ----------------------------------------------------------------------------------------------------


def test_refusals(tmp_path, inverter, trained, folder):
    with pytest.raises(UserError, match=r"detail\.features is 7, the generator's field has 4 channels"):
        stage(inverter, {"features": 7}).configure_model()
    with pytest.raises(UserError, match="has no module 'encoder'"):
        stage(inverter.parent / "prior").configure_model()
    with pytest.raises(UserError, match="has no module 'detail'"):
        stage(inverter, tested=ArtifactRef(str(inverter))).configure_model()
    module = stage(inverter, tested=ArtifactRef(str(trained)))
    module.pose = None
    with pytest.raises(UserError, match="c has no camera"):
        tiny.trainer(tmp_path).predict(module, datamodule=ArtworkDataModule(str(folder), size=SIDE))
    assert not (tmp_path / "artifact").exists()


def test_a_foreign_camera_is_refused_before_any_work(tmp_path, inverter, trained, folder):
    (folder / "artworks.json").unlink()
    generator = artifact.load(inverter).module("generator")
    far = dataclasses.replace(generator.rig, radius=2.7, near=2.25, far=3.3)
    labels = [[f"{name}.png", far.camera(0.1).label()[0].tolist()] for name in "abc"]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(UserError, match=r"a: its camera is 2\.7 from the head"):
        predict(inverter, trained, folder, tmp_path / "out")
    assert not Path(tmp_path / "out" / "pictures").exists()


def test_a_damaged_photo_is_named(tmp_path, inverter, trained, folder):
    Image.new("RGB", (4, 4)).save(folder / "b.png")
    with pytest.raises(UserError, match=r"b\.png"):
        predict(inverter, trained, folder, tmp_path / "out")
