"""Every stage on generators of every family, imported from official files: 2D and 3D, one group of codes and two, with
expressions and without."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from PIL import Image

from models import artifact
from models.encoders.pyramid import GradualStyleEncoder
from models.errors import UserError
from models.generators.eg3d import EG3DGenerator
from models.generators.gram import GRAMGenerator
from models.generators.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from models.generators.stylesdf import StyleSDF, VolumeDiscriminator
from models.heads.subjects import Subjects
from models.image import read_image, resized, write_image
from models.zoo import family
from stages.__main__ import dispatch
from stages.commands.view import Pose, Settings, render
from tests.models.generators.protocol import awaken
from tests.models.generators.test_anifacegan import make as animated
from tests.models.zoo.pickling import dumps, network
from tests.stages.small import TRAINER, options

YAW = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """A family's small network.

    Attributes:
        make: its modules.
        settings: what their official files do not tell.
        said: on its page.
    """

    make: object
    settings: dict = dataclasses.field(default_factory=dict)
    said: str = "This generator has no expressions."


def stylegan2():
    generator = awaken(StyleGAN2Generator(channels=(6, 5, 4), style_dim=7, mapping_layers=3))
    generator.update_mean(64)
    return {"generator": generator, "discriminator": awaken(StyleGAN2Discriminator((4, 5, 6)))}


def eg3d():
    sizes = {
        "z_dim": 8, "w_dim": 8, "channels": (6, 4), "plane_features": 4, "decoder": {"hidden": 6}, "coarse": 8,
        "fine": 8, "render_resolution": 16, "superresolution": {"channels": (128, 64), "resolution": 128},
    }  # fmt: skip
    generator = awaken(EG3DGenerator(**sizes)).eval()
    generator.update_mean(64)
    return {"generator": generator}


def stylesdf():
    decoder = {"channels": (8, 4), "w_dim": 10, "mapping_layers": 2}
    sizes = {"z_dim": 6, "width": 8, "depth": 2, "mapping_layers": 3, "raw_resolution": 8}
    generator = awaken(StyleSDF(decoder=decoder, **sizes)).eval()
    generator.update_mean()
    return {"generator": generator, "discriminator": awaken(VolumeDiscriminator((5, 4, 3)))}


def gram():
    sizes = {"z_dim": 8, "width": 16, "layers": 4, "mapping_width": 16, "predictor_width": 32}
    generator = GRAMGenerator(**sizes).eval()
    generator.update_mean(64)
    return {"generator": generator}


def anifacegan():
    generator = animated(box=0.24, expression=3)
    generator.update_mean(64)
    return {"generator": generator}


CASES = {
    "stylegan2": Case(stylegan2, said="This generator is 2D: it has no camera"),
    "eg3d": Case(eg3d),
    "stylesdf": Case(stylesdf),
    "gram": Case(gram, {"preset": "ffhq", "img_size": 16, "num_samples": 24, "num_manifolds": 6}),
    "anifacegan": Case(
        anifacegan,
        {"img_size": 16, "num_steps": 12, "levels_start": 200, "levels_end": 60, "center": [0, 0, -12.5]},
        said="Of 3 expressions the first 2 are shown.",
    ),
}
SMALL = {
    "anchor": {"steps": 4, "search.candidates": 4, "search.restarts": 2},
    "stylize": {"recipe.steps": 2, "recipe.pool": 2},
    "present": {
        "samples": 1, "frames": 2, "scale": 2, "video_size": 32, "tile": 32, "mesh_size": 32, "expressions": 2,
    },
}  # fmt: skip


def files(name, folder):
    """A small network in files as its owners publish them."""
    torch.manual_seed(0)
    content = family(name).export(CASES[name].make())
    if name == "eg3d":
        state, kept = content.pop("G_ema"), content
        attributes = {key: value for key, value in kept.items() if key != "init_kwargs"}
        (folder / "eg3d.pkl").write_bytes(
            dumps({"G_ema": network("TriPlaneGenerator", state, kept["init_kwargs"], attributes)}, 4)
        )
        return [folder / "eg3d.pkl"]
    if name != "anifacegan":
        torch.save(content, folder / f"{name}.pt")
        return [folder / f"{name}.pt"]
    for part, state in content.items():
        (folder / part).parent.mkdir(exist_ok=True)
        torch.save(state, folder / f"{part}.pth")
    return [folder / f"{part}.pth" for part in content]


def imported(name, folder):
    """The artifact, through the command line."""
    settings = [f"{key}={json.dumps(value)}" for key, value in CASES[name].settings.items()]
    chosen = ["--set", *settings] if settings else []
    dispatch(["zoo", "import", name, *map(str, files(name, folder)), "--out", str(folder / "prior"), *chosen])
    return artifact.load(folder / "prior")


def stage(name, command, out, **inputs):
    """A stage through the command line."""
    given = {key.replace("__", "."): value for key, value in inputs.items()}
    small = {f"model.{key}": value for key, value in SMALL[name].items()}
    dispatch([name, command, f"--out={out}", *options({**small, **given}), *TRAINER])
    return artifact.load(out)


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With an artwork: a face of sorts, so that embeddings have something to say."""
    folder = tmp_path_factory.mktemp("zoo")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 48), indexing="ij")
    head = ((x / 0.6) ** 2 + (y / 0.8) ** 2 < 1).float()
    art = torch.stack([0.9 * head, 0.5 * head, 1 - head], -1)
    Image.fromarray((255 * art).byte().numpy()).save(folder / "art.png")
    return folder


@pytest.fixture(scope="module")
def prior(case, folder):
    (folder / case).mkdir()
    return imported(case, folder / case)


@pytest.fixture(scope="module")
def anchor(prior, folder, case):
    return stage(
        "anchor", "fit", folder / case / "anchor", model__prior__path=prior.path,
        data__init_args__path=folder / "art.png", data__init_args__yaw_deg=YAW,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stylised(anchor, folder, case):
    path = anchor.path
    return stage("stylize", "fit", folder / case / "stylize", model__anchor__path=path, data__init_args__path=path)


@pytest.fixture(scope="module")
def shown(stylised, folder, case):
    return stage("present", "predict", folder / case / "present", model__result__path=stylised.path)


def test_anchor(anchor, prior):
    generator, found = prior.module("generator"), anchor.module("anchors")["art"]
    (summary,) = anchor.extra["items"]
    assert math.isfinite(summary["perceptual"]) and math.isfinite(summary["pixel"])
    shapes = {name: t.shape for name, t in found.latents.groups.items()}
    assert shapes == {name: t.shape for name, t in generator.mean_latents.groups.items()}
    assert found.z.shape == (1, generator.z_dim) and found.expression.shape == (1, len(generator.expressions))
    if not generator.is_3d:
        assert found.camera is None and summary["pose"] == "none" and summary["yaw_deg"] is None
        return
    assert torch.equal(found.label, generator.rig.camera(math.radians(YAW)).label())
    assert summary["pose"] == "given" and summary["yaw_deg"] == pytest.approx(YAW, abs=1e-3)


def test_stylize(stylised, prior):
    before, after = stylised.module("generator").state_dict(), stylised.module("stylised.art").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())
    assert stylised.manifest["licences"] == prior.manifest["licences"]


def test_present(shown, prior, case):
    generator = prior.module("generator")
    page = shown.media("index.html").read_text("utf-8")
    assert CASES[case].said in page and ("in three dimensions" in page) == generator.is_3d
    names = {path.name for path in shown.media("index.html").parent.iterdir()}
    assert {"views_art.png", "strength_art.png", "poster_art.png", "reference_art.png"} <= names
    assert ("turntable_art.mp4" in names) == generator.is_3d == ("pose_art.png" in names)
    assert "mesh_art.glb" in names or "no mesh" in page
    assert ("expressions_art.png" in names) == bool(generator.expressions)


def test_samples_are_shown(prior, folder, case):
    shown = stage(
        "present", "predict", folder / case / "samples", model__result__path=prior.path, model__mesh_size=0
    )  # fmt: skip
    assert shown.media("views_subject-1.png").exists() and shown.media("poster_subject-1.png").exists()


def test_view(stylised):
    subjects = Subjects(stylised)
    subject, rig = subjects["art"], subjects.generator.rig
    if not subject.generator.is_3d:
        with pytest.raises(UserError, match="is a 2D generator, which cannot be turned: galatea present") as caught:
            dispatch(["view", str(stylised.path)])
        assert "\n" not in str(caught.value)
        return
    pose = Pose(tuple(rig.camera(0.2).position[0].tolist()), rig.pivot, 2 * math.atan(0.5 / rig.focal), 1.0)
    settings = Settings(subject, 0.5, (0.0,) * len(subject.generator.expressions), 64, False)
    image, words = render(settings, pose, 2 * subject.generator.resolution)
    assert image.dtype.name == "uint8" and image.shape == (384, 384, 3)
    assert words.startswith("yaw +11°, pitch +0°")


def test_cameras_that_the_generator_cannot_have_are_refused(prior, folder, case):
    rig, is_3d = prior.module("generator").rig, prior.module("generator").is_3d
    given = {"model__prior__path": prior.path, "data__init_args__path": folder / "art.png"}
    if math.degrees(rig.yaw_max) < 55:
        with pytest.raises(
            UserError, match=r"art: yaw 55 and pitch 0 degrees are beyond .* 51\.57 and 0 are the nearest"
        ):
            stage("anchor", "fit", folder / "refused", data__init_args__yaw_deg=55, **given)
    labelled = folder / case / "labelled"
    labelled.mkdir()
    shutil.copy(folder / "art.png", labelled)
    label = rig.replace(radius=9 * rig.radius).camera(0.1).label()[0].tolist()
    (labelled / "dataset.json").write_text(json.dumps({"labels": [["art.png", label]]}))
    given["data__init_args__path"] = labelled
    if is_3d:
        with pytest.raises(UserError, match=r"art: its camera is .* from the head, where the generator") as caught:
            stage("anchor", "fit", folder / "refused", **given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "option", "match"),
    [
        ("gram", {"model__search__space": "w"}, "search.space: .* has no w that serves all layers; use z or w"),
        ("stylegan2", {"model__search__optimize_pose": "true"}, "optimize_pose: .* is a 2D generator, which has no"),
    ],
)
def test_searches_that_a_generator_cannot_do_are_refused(name, option, match, tmp_path, folder):
    given = {"model__prior__path": imported(name, tmp_path).path, "data__init_args__path": folder / "art.png"}
    with pytest.raises(UserError, match=match):
        stage("anchor", "fit", tmp_path / "anchor", **given, **option)


@torch.no_grad()
def test_a_large_photo_in_the_style_of_official_files(tmp_path):
    """pSp and a StyleGAN2, each from a file of its own: what they show of the photo as the encoder reads it."""
    torch.manual_seed(0)
    generator = awaken(StyleGAN2Generator(channels=(6, 5, 4, 4, 4), style_dim=6, mapping_layers=2)).eval()
    generator.update_mean(64)
    encoder = GradualStyleEncoder(10, 6, 32, widths=(4, 6, 8, 10), depths=(1, 1, 1, 1), reduction=1).eval()
    torch.nn.init.normal_(encoder.latent_avg)
    for name, module in (("stylegan2", {"generator": generator}), ("psp", {"encoder": encoder})):
        torch.save(family(name).export(module), tmp_path / f"{name}.pt")
        dispatch(["zoo", "import", name, str(tmp_path / f"{name}.pt"), "--out", str(tmp_path / name)])
    y, x = torch.meshgrid(*[torch.linspace(0, 1, 1024)] * 2, indexing="ij")
    photo = torch.stack([x, y, (12 * x).sin() / 2 + 0.5])
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "me.png", 2 * photo[None] - 1)
    words = options({
        "model.style.path": tmp_path / "stylegan2", "model.encoder.path": tmp_path / "psp", "model.samples": 1,
        "model.mix_from": "[3]", "model.tile": 32, "data.init_args.path": tmp_path / "photos",
        "data.init_args.crop": "none",
        "data.init_args.size": 32, "data.init_args.workers": 0,
    })  # fmt: skip
    dispatch(["restyle", "predict", f"--out={tmp_path / 'out'}", *words, *TRAINER])
    seen = resized(read_image(tmp_path / "photos" / "me.png"), 32)
    expected = generator.synthesis(encoder.codes(seen)).image.clamp(-1, 1)
    found = read_image(tmp_path / "out" / "items" / "me" / "general.png")
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert (tmp_path / "out" / "items" / "me" / "sample1_from3.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stylegan2", "eg3d"])
def test_the_pipeline_runs_to_its_end(name, tmp_path, folder):
    prior = imported(name, tmp_path).path
    steps = [
        f"{step}.model.{key}={value}"
        for step, values in SMALL.items()
        for key, value in values.items()
        if key not in ("mesh_size", "samples")
    ]
    chosen = [word for step in [*steps, "present.model.mesh_size=0"] for word in ("--set", step)]
    dispatch([
        "run", "configs/pipelines/artform.yaml", "--model", str(prior), "--image", str(folder / "art.png"),
        "--size=32", "--yaw_deg=0", "--pitch_deg=0", "--out", str(tmp_path / "out"), *chosen,
    ])  # fmt: skip
    page = artifact.load(tmp_path / "out" / "present").media("index.html").read_text("utf-8")
    assert CASES[name].said in page
