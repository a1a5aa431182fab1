"""Shapes of heads by a tiny 2D generator."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from datamodules.mannequins.scene import POSED_DIM
from models import artifact
from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.index import Entry, subject_index
from models.heads.subjects import Subjects
from models.image import read_image, write_image
from models.metrics.records import read_records
from models.relief.shape import Shape
from models.relief.shapes import ReliefShapes
from models.rendering.relief import Relief, sphere_cap
from stages import cli
from stages.shape import ShapeStage
from tests.models.generators.protocol import awaken
from tests.stages import small
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill

SIDE = 16


class Difference(nn.Module):
    """Between pictures, mean square."""

    def forward(self, a, b):
        return (a - b).square().mean((1, 2, 3))


class Corners(nn.Module):
    """An embedding: mean colours of four parts."""

    dim = 12

    def forward(self, image):
        return nn.functional.adaptive_avg_pool2d(image.float(), 2).flatten(1)


class Middle(nn.Module):
    """Finds a face in the middle of each picture."""

    segments = ("background", "skin")

    def forward(self, image):
        logits = torch.zeros(len(image), 2, *image.shape[2:])
        logits[:, 1, 4:12, 5:11] = 1.0
        return logits


class Nowhere(Middle):
    """Finds none."""

    def forward(self, image):
        return -super().forward(image)


class Turned(nn.Module):
    """Sees each picture from where its brightness says."""

    def forward(self, image):
        return 0.2 * image.mean((2, 3))[:, :2]


def inputs(folder, count=0):
    torch.manual_seed(0)
    generator = awaken(StyleGAN2Generator(channels=[6, 6, 4], style_dim=6, z_dim=POSED_DIM, mapping_layers=1)).eval()
    generator.update_mean()
    critic = StyleGAN2Discriminator(channels=[4, 6, 6], minibatch_group=1)
    style = copy.deepcopy(generator)
    with torch.no_grad():
        style.backbone.blocks[0].const.add_(0.3)
    photos = artifact.save(folder / "heads2d", stage="prior", modules={"generator": generator, "discriminator": critic})
    artifact.save(folder / "cartoon2d", stage="finetune", modules={"generator": style}, parents={"prior": photos})


def network(kind):
    return {"class_path": f"tests.stages.test_shape.{kind}"}


RECIPE = {
    "cycles": 2, "prior": 2, "first": [2, 2, 3], "later": [1, 1, 2], "batch": 2, "samples": 3, "learning_rate": 1e-3,
    "known": False,
    "rates": {"D": 5e-4, "A": 5e-4}, "smooth": 0.1,
}  # fmt: skip
NETWORKS = {"width": 4, "encoder_width": 4, "code": 8, "group": 2, "offset_width": 4, "free_maps": False}
MODEL = {
    "encoder": None,
    "cap": {"face": None},
    "sampling": {"yaw_std_deg": None, "pitch_std_deg": None},
    "perceptual": network("Difference"),
    "identity": network("Corners"),
    "parser": network("Middle"),
    "pose": network("Turned"),
    "networks": NETWORKS,
    "group_size": 2,
    "save_every": 3,
}
DATA = {
    "class_path": "datamodules.mannequin_heads.MannequinHeads",
    "init_args": {"subjects": 3, "size": SIDE, "supersample": 1},
}


def line(folder, recipe=None, name="shape", **model):
    prior = str(folder / "heads2d")
    given = {
        "prior": {"path": prior, "module": "generator"},
        "discriminator": {"path": prior, "module": "discriminator"},
        **MODEL,
        "recipe": {**RECIPE, **(recipe or {})},
        **model,
    }
    file = small.write(folder / f"{name}.yaml", {"model": given, "data": DATA})
    return ["shape", "fit", f"--config={file}", *small.TRAINER]


CASE = StageCase(
    line,
    inputs,
    commands={"fit": Command()},
    kills=[Kill("group.safetensors", 4), Kill("cycle1.safetensors"), Kill("artifact")],
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    inputs(folder)
    return folder


def run(words, out, *more):
    cli.run("shape", ShapeStage, [*words[1:], f"--out={out}", *more])
    return artifact.load(out)


@pytest.fixture(scope="module")
def found(work, tmp_path_factory):
    return run(line(work), tmp_path_factory.mktemp("found"))


def alike(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_what_is_handed_on(found):
    """The first guess, the shapes after each cycle, pictures and sheets."""
    assert sorted(found.manifest["modules"]) == ["cycle0", "cycle1", "heads", "shapes"]
    first, last = found.module("cycle0"), found.module("shapes")
    assert isinstance(last, ReliefShapes) and len(last) == 3 and last.size == SIDE
    for name, value in first.state_dict().items():
        assert bool(value.isfinite().all()) and not torch.equal(value, last.state_dict()[name]), name
    assert last.masked and 0.2 < float((last.mask > 0.5).float().mean()) < 0.8
    assert all(found.media(name).exists() for name in ("sheet_01.png", "picture_head-1000000.png"))


def test_the_first_guess_is_a_cap(work, tmp_path):
    """D learns it where the parser finds the face."""
    recipe = {"cycles": 1, "prior": 400, "first": [0, 0, 1], "samples": 0, "learning_rate": 3e-3, "weight_decay": 0.0}
    shapes = run(line(work, recipe, group_size=3), tmp_path).module("cycle0")
    mask = Middle()(torch.zeros(1, 3, SIDE, SIDE)).argmax(1, keepdim=True).float()
    cap = sphere_cap(mask)[..., 2:-2]  # the border lies back
    error = (shapes.depth[..., 2:-2] - cap).square().mean((1, 2, 3)).sqrt()
    assert float(error.max()) < 0.25 * float(cap.std())


def test_a_head_hangs_on_itself_alone(work, found, tmp_path):
    """Whatever group it is in: to roundings of a batch."""
    alone = run(line(work, group_size=1), tmp_path).module("shapes")
    for name, value in found.module("shapes").state_dict().items():
        torch.testing.assert_close(alone.state_dict()[name], value, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        ({"paper_only": True}, {}),  # the equations alone
        ({"mirror_in": "first", "identity": 0.0}, {"identity": None}),  # GAN2Shape
        ({"cycles": 1, "prior": 0, "first": [0, 0, 4], "samples": 0, "identity": 0.0},
         {"shared": True, "networks": NETWORKS, "parser": None, "pose": None, "discriminator": None}),  # Unsup3D
        ({"known": True, "project": False, "first": [1, 0, 2]}, {}),
        ({"rates": {"D": 4e-3, "A": 5e-2}}, {"networks": {**NETWORKS, "free_maps": True}}),
        ({"perceptual": 0.0}, {"shared": True, "networks": NETWORKS, "perceptual": None, "discriminator": None}),
    ],
    ids=["paper", "gan2shape", "unsup3d", "known", "free", "shared"],
)  # fmt: skip
def test_configurations_of_it(work, tmp_path, recipe, model):
    shapes = run(line(work, recipe, **model), tmp_path).module("shapes")
    assert all(bool(value.isfinite().all()) for value in shapes.state_dict().values())


def test_who_it_is_may_be_the_photos(work, tmp_path):
    """The cartoon's shape, and the photograph that its identity is compared with."""
    photo = {"path": str(work / "heads2d"), "module": "generator"}
    style = {"path": str(work / "cartoon2d"), "module": "generator"}
    both = [
        run(line(work, {"identity": 1.0}, prior=style, **more), tmp_path / name).module("shapes")
        for name, more in {"direct": {}, "photo": {"photo": photo, "id_on": "photo_render"}}.items()
    ]
    assert not alike(*both)


def test_errors_against_the_truth(work, found, tmp_path):
    words = ["shape", "test", *line(work)[2:]]
    cli.run("shape", ShapeStage, [*words[1:], f"--model.tested.path={found.path}", f"--out={tmp_path}"])
    records = read_records(tmp_path)
    variants = {"flat", "shape", "shape, first guess", "shape, 1 of the cycles"}
    assert {record.variant for record in records} == variants and len({record.item for record in records}) == 3
    metrics = {"side", "mad", "side_face", "mad_face", "albedo", "light"}
    assert {record.metric for record in records} == metrics and {record.split for record in records} == {"val"}


def test_they_turn_and_are_lit(work, found, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.shape.FRAMES", 3)
    words = ["shape", "predict", *line(work)[2:]]
    shown = run(words, tmp_path, f"--model.tested.path={found.path}")
    for kind in (
        "sheet_head-1000001.png",
        "turning_head-1000001.mp4",
        "light_head-1000001.mp4",
        "mesh_head-1000001.glb",
        "mesh_head-1000001.ply",
    ):
        assert shown.media(kind).exists()


FOUND = ("ann", "ann-smile-more", "bob")


@pytest.fixture(scope="module")
def photos(work, tmp_path_factory):
    """Heads of photos, one of them moved, and the pictures of these."""
    prior = artifact.load(work / "heads2d")
    generator = prior.module("generator")
    draws = torch.Generator().manual_seed(5)
    codes = {i: HeadCode(generator.mapping(generator.sample_z(1, draws)), None, torch.zeros(1, 0), None) for i in FOUND}
    folder = tmp_path_factory.mktemp("photos")
    write_image(folder / "photo.png", torch.zeros(3, SIDE, SIDE))
    entries = [Entry(i, "heads", artwork=None if "-" in i else f"{i}.png") for i in FOUND]
    media = {f"{i}.png": folder / "photo.png" for i in FOUND if "-" not in i}
    modules = {"generator": generator, "heads": HeadCodes.pack(codes, generator)}
    extra = subject_index(entries)
    parents = {"prior": prior}
    artifact.save(folder / "heads", stage="directions", modules=modules, parents=parents, media=media, extra=extra)
    return folder / "heads"


def of_photos(folder, leave=()):
    return [
        "--data.class_path=datamodules.heads.FoundHeads", f"--data.init_args.path={folder}",
        "--data.init_args.module=heads", f"--data.init_args.leave={json.dumps(list(leave))}",
    ]  # fmt: skip


def test_a_photo_and_its_twin_in_3d(work, photos, tmp_path):
    """Moved heads are expressions; the photos' shapes are the original that the cartoons' are shown beside."""
    words = line(work, {"cycles": 1}, group_size=3)
    photo = run(words, tmp_path / "photo", *of_photos(photos))
    style = {"path": str(work / "cartoon2d"), "module": "generator"}
    words = line(work, {"cycles": 1}, group_size=3, prior=style, beside={"path": str(photo.path)}, name="twin")
    twin = run(words, tmp_path / "twin", *of_photos(photos))
    subjects = Subjects(twin)
    assert subjects.ids == ("ann", "bob") and subjects.generator.is_3d
    ann, bob = subjects["ann"], subjects["bob"]
    assert ann.generator.expressions == ("smile",) and ann.left_out == {} and list(bob.left_out) == ["smile"]
    assert ann.blends and alike(ann.original, photo.module("shapes")) and not alike(ann.original, ann.generator)
    assert ann.artwork.shape == (3, SIDE, SIDE) and ann.camera is not None
    assert list(ann.pictures) == ["as a photo, in 2D", "in 2D"]
    torch.testing.assert_close(ann.pictures["in 2D"], read_image(twin.media("picture_ann.png"))[0])
    torch.testing.assert_close(ann.pictures["as a photo, in 2D"], read_image(photo.media("picture_ann.png"))[0])
    smiling = ann.generator.shape(ann.latents, torch.ones(1, 1))
    torch.testing.assert_close(smiling.depth, ann.generator["ann-smile-more"].depth)
    with pytest.raises(UserError, match=r"beside holds shapes of ann, ann-smile-more, bob, these heads are ann, bob"):
        run(words, tmp_path / "other", *of_photos(photos, ["*-more"]))
    with pytest.raises(UserError, match=r"of its 3 heads data\.init_args\.leave leaves none"):
        run(words, tmp_path / "none", *of_photos(photos, ["*"]))


def test_what_does_not_fit(work, found, tmp_path):
    tested = {"path": str(found.path)}
    other = {"class_path": "datamodules.heads.DrawnHeads", "init_args": {"heads": 1}}
    cases = {
        "no face was found in the picture of head-1000000": {"parser": network("Nowhere")},
        r"set --model\.perceptual": {"perceptual": None},
        r"set --model\.parser": {"parser": None},
        r"leave networks\.free_maps false": {"shared": True, "networks": {**NETWORKS, "free_maps": True}},
        r"model\.photo\.path is the generator of id_on: photo_render": {"id_on": "photo_render"},
        r"leave --model\.tested out": {"tested": tested},
        r"fit needs --model\.prior\.path": {"prior": None},
    }
    for number, (said, model) in enumerate(cases.items()):
        with pytest.raises(UserError, match=said):
            run(line(work, name=f"bad{number}", **model), tmp_path)
    for verb, said in {"test": "nobody knows the surfaces", "predict": "has no shape of 00000000"}.items():
        words = ["shape", verb, *line(work, tested=tested, name="other")[2:]]
        with pytest.raises(UserError, match=said):
            run(words, tmp_path, f"--data.class_path={other['class_path']}", "--data.init_args.heads=1")


def test_the_mirror_is_of_the_canonical_face(work):
    """Eq. 12: a symmetric face loses nothing by it, from whatever side it is seen."""
    depth = sphere_cap(torch.ones(1, 1, SIDE, SIDE))
    relief = Relief()
    light = torch.tensor([[0.5, 0.5, 0.6, 0.2]])
    one = Shape(depth, torch.zeros(1, 3, SIDE, SIDE), torch.tensor([[0.1, 0.4, 0.0, 0.0, 0.0, 0.0]]), light)
    turned = replace(one, depth=depth.flip(-1), albedo=one.albedo.flip(-1))
    torch.testing.assert_close(one.seen(relief).image, turned.seen(relief).image, atol=1e-5, rtol=0)
