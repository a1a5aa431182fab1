"""What suits a generator is chosen by its kind, lies below what the user sets, and says what is missing."""

import os
import shlex

import pytest
import torch

from models import artifact
from models.errors import UserError
from models.files import ROOT
from models.generators.eg3d import EG3DGenerator
from models.generators.manifold import ManifoldGenerator
from stages.anchor import AnchorSearch
from stages.base.foreign import TOLD
from stages.configs import read_config
from stages.pipeline import presets, steps
from stages.pipeline.hashing import GIVEN, step_hash
from stages.pipeline.run import main, read_pipeline
from tests.benchmarks.gpu.networks import FAMILIES, small_eg3d
from tests.configs.resolved import resolved
from tests.stages import tiny

PIPELINE = ROOT / "configs" / "pipelines" / "artform.yaml"
KINDS = sorted(
    folder.name for folder in (ROOT / presets.PRESETS).iterdir() if folder.is_dir() and folder.name != "embedded"
)
SMALL = {type(made).__module__.rpartition(".")[2]: made for made in (family.small() for family in FAMILIES.values())}


@pytest.fixture
def eg3d(tmp_path, monkeypatch):
    """A small EG3D, on a machine without any weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return artifact.save(tmp_path / "eg3d", stage="prior", modules={"generator": small_eg3d()}).path


@pytest.fixture
def plan(tmp_path, capsys):
    """A dry run; its commands by step, and what it said before."""

    def ask(model, *options):
        main([str(PIPELINE), "--model", str(model), "--image", str(ROOT / "assets/artworks"), "--dry_run", *options,
              "--out", str(tmp_path / "out")])  # fmt: skip
        said = capsys.readouterr().out.splitlines()
        found = {
            line.split()[1].rstrip(":"): shlex.split(line.partition("would run: ")[2])
            for line in said
            if "would run" in line
        }
        return found, "\n".join(line for line in said if "would run" not in line)

    return ask


def configs(command):
    return [word.removeprefix("--config=") for word in command if word.startswith("--config=")]


def test_the_kind_is_the_file_of_the_class(tmp_path, eg3d):
    assert presets.kind(str(eg3d)) == "eg3d"
    (tmp_path / "run").mkdir()
    eg3d.rename(tmp_path / "run" / "artifact")
    assert presets.kind(str(tmp_path / "run")) == "eg3d"
    assert presets.kind(str(ROOT / "assets" / "prior")) is None
    with pytest.raises(UserError, match="there is no artifact in"):
        presets.kind(str(tmp_path))


def test_the_embedded_prior_takes_the_stages_as_they_are(plan):
    commands, said = plan("assets/prior")
    assert not said and not any(configs(command) for command in commands.values())


def test_the_generator_chooses_and_the_plan_shows_it(eg3d, plan):
    commands, said = plan(eg3d)
    assert "a generator of the kind eg3d" in said
    assert configs(commands["anchor"]) == [
        "configs/presets/eg3d/anchor.yaml",
        "configs/presets/embedded/perceptual.yaml",
    ]
    assert configs(commands["stylize"])[0] == "configs/presets/stylize.yaml"
    assert configs(commands["present"]) == ["configs/presets/present.yaml"]


def test_missing_weights_are_told_once_each_and_the_embedded_network_stands_in(eg3d, plan, tmp_path):
    commands, said = plan(eg3d)
    vgg, clip = said.splitlines()[1:]
    assert vgg.startswith("warning: LPIPS(vgg) has no weights on this machine: an embedded network stands in for it")
    assert f"get {tmp_path / 'torch'}/hub/checkpoints/vgg16-397923af.pth from torchvision's model zoo" in vgg
    assert "--set anchor.model.perceptual.init_args.weights=FILE and --set stylize.model.perceptual." in vgg
    assert clip.startswith("warning: CLIPEmbedding(ViT-B-32)") and "from the open_clip project page" in clip
    found = resolved(*commands["stylize"][3:])["model"]
    assert found["perceptual"]["class_path"] == "models.features.embedded.EmbeddedLPIPS"
    assert found["style"]["class_path"] == "models.features.embedded.EmbeddedStyle"


def test_steps_know_what_has_been_told(eg3d, plan):
    commands, _ = plan(eg3d, "--set", "anchor.model.pose.class_path=models.features.embedded.EmbeddedPose")
    assert {name: presets.told(command) for name, command in commands.items()} == {
        "anchor": ["EmbeddedLPIPS"], "stylize": ["EmbeddedLPIPS", "EmbeddedStyle"], "present": [],
    }  # fmt: skip


def test_a_step_s_process_is_given_it(tmp_path, monkeypatch):
    class StartedError(Exception):
        pass

    def start(command, output, unread, lock, **variables):
        os.close(output)
        raise StartedError(variables)

    monkeypatch.setattr(steps, "start", start)
    with pytest.raises(StartedError) as started:
        steps._stream(["anchor", "fit", f"--config={presets.STAND_INS}/style.yaml"], tmp_path / "log", -1, "hash")
    assert started.value.args == ({GIVEN: "hash", TOLD: "EmbeddedStyle"},)


def test_weights_that_are_there_are_taken(eg3d, plan, tmp_path):
    file = tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    file.parent.mkdir(parents=True)
    torch.save({}, file)
    commands, said = plan(eg3d)
    assert "LPIPS" not in said and "CLIP" in said
    assert configs(commands["anchor"]) == ["configs/presets/eg3d/anchor.yaml"]


def test_what_the_user_sets_wins(eg3d, plan):
    options = {
        "anchor.model.search.learning_rate": "0.1",
        "anchor.model.perceptual.init_args.weights": "vgg.pth",
        "stylize.model.style": "null",
    }
    commands, said = plan(eg3d, "--size", "256", *(word for o in options.items() for word in ("--set", "=".join(o))))
    assert "anchor.model.perceptual" not in said and "CLIP" not in said and "stylize.model.perceptual" in said
    anchor = resolved(*commands["anchor"][3:])
    assert anchor["data"]["init_args"]["size"] == 256 and anchor["model"]["search"]["learning_rate"] == 0.1
    assert anchor["model"]["search"]["space"] == "w"  # of the preset
    assert anchor["model"]["perceptual"]["class_path"] == "models.features.perceptual.LPIPS"
    assert anchor["model"]["perceptual"]["init_args"] == {"net": "vgg", "weights": "vgg.pth", "size": 256}
    assert resolved(*commands["stylize"][3:])["model"]["style"] is None


def test_a_preset_counts_in_the_hash(eg3d, plan):
    command = plan(eg3d)[0]["anchor"][3:]
    without = [word for word in command if "presets/eg3d" not in word]
    assert step_hash("anchor", "fit", resolved(*command)) != step_hash("anchor", "fit", resolved(*without))


@pytest.mark.parametrize(
    "file", sorted((ROOT / presets.PRESETS).rglob("*.yaml")), ids=lambda f: f"{f.parent.name}-{f.stem}"
)
def test_only_stand_ins_are_of_the_embedded_world(file):
    stage = "stylize" if file.parent.name == "embedded" else file.stem
    named = file.read_text() if file.parent.name == "embedded" else str(read_config(stage, [file]))
    assert ("models.features.embedded." in named) == (file.parent.name == "embedded")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_generator_and_can_be_searched_so(kind):
    assert (ROOT / "models" / "generators" / f"{kind}.py").exists()
    config = read_config("anchor", presets.configs(kind, "anchor"))
    AnchorSearch(**config["model"]["search"]).check(SMALL[kind])


def test_sizes_are_those_of_the_official_generators():
    def size(kind):
        return read_config("anchor", presets.configs(kind, "anchor"))["data"]["init_args"]["size"]

    assert {kind: size(kind) for kind in KINDS} == {
        "anifacegan": 256, "eg3d": EG3DGenerator().resolution, "gram": 256, "manifold": 256, "stylegan2": 1024,
        "stylesdf": 1024,
    }  # fmt: skip


def test_a_preset_must_be_of_a_path(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "preset: size\nparams: {size: {type: int, sets: [one.data.size]}}\n"
        "steps: [{name: one, stage: anchor, command: fit}]\n"
    )
    with pytest.raises(UserError, match="preset is 'size', which is not a parameter of the type path"):
        read_pipeline(tmp_path / "p.yaml")


def test_our_own_generator_counts_where_its_cameras_are_others(tmp_path):
    assert presets.kind(str(tiny.prior(tmp_path / "tiny").path)) is None
    generator = ManifoldGenerator(**{**tiny.OPTIONS, "rig": {"radius": 2.7, "near": 2.2, "far": 3.3}})  # type: ignore[arg-type]
    made = artifact.save(tmp_path / "own", stage="prior", modules={"generator": generator})
    assert presets.kind(str(made.path)) == "manifold"
