"""What users get wrong, through the real command line: one sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import artifact
from stages import __main__
from stages.present import texts
from tests.stages import cases, heads

for _name in ("features", "prior", "anchor", "stylize", "present", "pipeline.run"):
    importlib.import_module(f"stages.{_name}")  # once here, and not in every process that a test forks


# -- a command line in a process of its own ------------------------------------------------------------------------


def galatea(folder: Path, *arguments: object, limit: int | None = None) -> tuple[int | None, str]:
    """Run ``galatea ARGUMENTS`` in ``folder``; with ``limit``, no file may grow beyond that many bytes.

    Returns:
        the exit code and what went to stderr.
    """
    reading, writing = os.pipe()

    def child() -> None:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = ["galatea", *map(str, arguments)]
        sys.exit(__main__.main())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(writing)
    with open(reading) as stream:
        text = stream.read()
    process.join()
    return process.exitcode, text


def refusal(folder: Path, *arguments: object, limit: int | None = None) -> str:
    """The sentence with which ``galatea ARGUMENTS`` refuses; there must be one, and whole files only."""
    code, text = galatea(folder, *arguments, limit=limit)
    sentences = [line for line in text.splitlines() if line.startswith("galatea: error: ")]
    assert code == 2 and len(sentences) == 1 and text.splitlines()[-1] == sentences[0], f"exit code {code}\n{text}"
    assert "Traceback" not in text
    left = [path for path in folder.rglob("*") if ".tmp" in path.name or path.name == artifact.MANIFEST]
    assert left == [], "half-written, or a result in spite of it"
    return sentences[0].removeprefix("galatea: error: ")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Artifacts that are as they should be: a prior and a stylised head with its anchors."""
    folder = tmp_path_factory.mktemp("inputs")
    heads.stylised(folder, ids=("ann",))
    return folder


@pytest.fixture
def here(tmp_path):
    """The empty folder in which the command runs."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


TRAINER = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_model_summary=false", "--out=out")


def anchor(inputs, image: object, *options):
    steps = ("--model.steps=1", "--model.search.candidates=2", "--model.search.restarts=1")
    source = (f"--model.prior.path={inputs / 'prior'}", f"--data.path={image}", "--data.size=32")
    return ("anchor", "fit", *source, *steps, *TRAINER, *options)


def stylize(inputs, *options):
    source = (f"--model.anchor.path={inputs / 'stylize'}", f"--data.path={inputs / 'stylize'}")
    return ("stylize", "fit", *source, "--model.recipe.steps=1", "--model.recipe.pool=1", *TRAINER, *options)


def present(inputs, *options):
    small = ("--model.frames=2", "--model.scale=1", "--model.video_size=32", "--model.tile=32", "--model.mesh_size=0")
    return ("present", "predict", f"--model.result.path={inputs / 'stylize'}", *small, *TRAINER, *options)


def prior(_inputs, *options):
    data = ("--data.train_subjects=2", "--data.val_subjects=2", "--data.test_subjects=2", "--data.size=16")
    return ("prior", "fit", *data, *TRAINER, *options)


def features(_inputs, *options):
    data = ("--data.train_subjects=2", "--data.val_subjects=2", "--data.test_subjects=2", "--data.cache=cache")
    return ("features", "fit", *data, *TRAINER, *options)


STAGES = {
    "anchor": lambda inputs, *options: anchor(inputs, picture(inputs / "good.png"), *options),
    "stylize": stylize,
    "present": present,
    "prior": prior,
    "features": features,
}


# -- pictures ------------------------------------------------------------------------------------------------------


def pixels(side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)


def picture(path: Path) -> Path:
    Image.fromarray(pixels()).save(path)
    return path


def truncated(path: Path) -> None:
    picture(path)
    path.write_bytes(path.read_bytes()[:500])


def claiming(width: int, height: int) -> bytes:
    """The beginning of a PNG that says it has this many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


BAD_PICTURES = {
    "missing": (lambda path: None, "x.png does not exist"),
    "a folder without images": (lambda path: path.mkdir(), "x.png"),
    "zero bytes": (lambda path: path.touch(), "x.png is empty (0 bytes)"),
    "corrupt": (truncated, "x.png is damaged or cannot be read"),
    "text": (lambda path: path.write_text("not a picture"), "x.png is not an image file that can be read"),
    "one pixel": (lambda path: Image.new("RGB", (1, 1)).save(path), "x.png is too small: 1 x 1"),
    "huge": (lambda path: path.write_bytes(claiming(100_000, 100_000)), "x.png is too large"),
    "a bomb": (lambda path: path.write_bytes(claiming(8_000, 8_000)), "x.png is too large: 8000 x 8000"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures(inputs, here, kind):
    make, message = BAD_PICTURES[kind]
    make(here / "x.png")
    assert message in refusal(here, *anchor(inputs, here / "x.png"))
    assert not (here / "out" / "items").exists()


GOOD_PICTURES = {
    "16-bit": Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257),
    "CMYK": Image.fromarray(pixels()).convert("CMYK"),
    "RGBA": Image.fromarray(np.dstack([pixels(), pixels()[..., :1]])),
}


@pytest.mark.parametrize("kind", GOOD_PICTURES)
def test_unusual_pictures_work(inputs, here, kind):
    file = here / ("x.tif" if kind == "CMYK" else "x.png")
    GOOD_PICTURES[kind].save(file)
    code, text = galatea(here, *anchor(inputs, file, "--data.yaw_deg=0"))
    assert code == 0, text
    assert [item["id"] for item in artifact.load(here / "out").extra["items"]] == ["x"]


# -- options and configuration files -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("option", "message"),
    [("--model.nonsense=1", "nonsense"), ("--trainer.limit_train_batches=many", "trainer.limit_train_batches: ")],
    ids=["key", "type"],
)
def test_wrong_options(inputs, here, stage, option, message):
    assert message in refusal(here, *STAGES[stage](inputs, option))
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [("levels=[0,1]", "levels must decrease"), ("backbone=stylegan2", "painted by the light backbone")],
    ids=["value", "together"],
)
def test_refused_by_a_network(inputs, here, option, message):
    assert message in refusal(here, *prior(inputs, f"--model.generator.init_args.{option}"))
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("stage", "content", "message"),
    [
        ("anchor", None, "c.yaml"),
        ("stylize", "model: [unclosed", "c.yaml is not valid YAML"),
        ("present", "modle: {steps: 1}", "modle"),
        ("prior", "model: {nonsense: 1}", "nonsense"),
        ("features", "trainer: {max_steps: many}", "trainer.max_steps: "),
    ],
    ids=["missing", "no YAML", "section", "key", "type"],
)
def test_wrong_configuration_files(inputs, here, stage, content, message):
    if content is not None:
        (here / "c.yaml").write_text(content)
    assert message in refusal(here, *STAGES[stage](inputs, "--config=c.yaml"))
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("yaw_deg=200", "good.png: yaw_deg is 200, it must be between +-180 degrees"),
        ("pitch_deg=91", "good.png: pitch_deg is 91, it must be between +-90 degrees"),
        ("yaw_deg=.nan", "good.png: yaw_deg is nan, it must be between"),
        # What a generator was trained for, it alone knows.
        ("yaw_deg=-91", "good: yaw -91 and pitch 0 degrees are beyond the generator's training poses, of which -60 "),
        ("pitch_deg=80", "good: yaw 0 and pitch 80 degrees are beyond the generator's training poses"),
    ],
)
def test_angles_out_of_range(inputs, here, option, message):
    assert message in refusal(here, *STAGES["anchor"](inputs, f"--data.{option}"))


@pytest.mark.parametrize(
    ("stage", "network", "options"),
    [
        (
            "anchor",
            "LPIPS",
            ["--model.perceptual=models.features.perceptual.LPIPS", "--model.perceptual.weights=no.pth"],
        ),
        ("stylize", "CLIP", ["--model.style=models.features.clip.CLIPEmbedding", "--model.style.weights=no.pth"]),
    ],
)
def test_missing_weights(inputs, here, stage, network, options):
    sentence = refusal(here, *STAGES[stage](inputs, *options))
    assert network in sentence and "no.pth" in sentence and ".init_args.weights" in sentence


# -- artifacts -----------------------------------------------------------------------------------------------------


def damage(source: Path, target: Path, name: str) -> None:
    shutil.copytree(source, target)
    content = bytearray((target / name).read_bytes())
    content[-1] ^= 1
    (target / name).write_bytes(content)


TAKES = {  # command, the artifact it takes, the file whose last byte is changed, one that it cannot use
    "anchor": ("--model.prior.path", "prior", "generator.safetensors", "features", "no module 'generator'"),
    "stylize": ("--model.anchor.path", "stylize", "anchors.safetensors", "prior", "no module 'anchors'"),
    "present": ("--model.result.path", "stylize", "media/reference_ann.png", "features", "generator"),
}


@pytest.mark.parametrize("stage", TAKES)
class TestArtifacts:
    def test_missing(self, inputs, here, stage):
        sentence = refusal(here, *STAGES[stage](inputs, f"{TAKES[stage][0]}=nowhere"))
        assert sentence.startswith("there is no artifact in nowhere")

    def test_a_changed_byte(self, inputs, here, stage):
        option, source, name, *_ = TAKES[stage]
        place = here.with_name("damaged")
        damage(inputs / source, place, name)
        sentence = refusal(here, *STAGES[stage](inputs, f"{option}={place}"))
        assert f"{name} is damaged" in sentence

    def test_of_another_stage(self, inputs, here, stage):
        option, _, _, other, message = TAKES[stage]
        place = inputs / other if other == "prior" else Path(artifact.load("assets/features").path)
        assert message in refusal(here, *STAGES[stage](inputs, f"{option}={place}"))


# -- the output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", cases.collect())
class TestEveryStage:
    def test_output_below_a_file(self, small_inputs, here, stage):
        (here / "file").touch()
        sentence = refusal(here, *cases.collect()[stage].line(small_inputs), "--out=file/out")
        assert sentence == f"cannot write file/out: Not a directory: {here / 'file'}"

    def test_an_option_that_is_none(self, small_inputs, here, stage):
        line = cases.collect()[stage].line(small_inputs)
        assert "nonsense" in refusal(here, *line, "--model.nonsense=1", "--out=out") and not (here / "out").exists()

    def test_before_what_it_needs(self, small_inputs, here, stage):
        case = cases.collect()[stage]
        if case.needs is None:
            pytest.skip("it takes no other stage's result")
        sentence = refusal(here, *case.line(small_inputs), "--out=out")
        assert sentence.startswith(f"there is no artifact in {small_inputs / case.needs}")
        assert not (here / "out" / "artifact").exists()


@pytest.fixture(scope="module")
def small_inputs(tmp_path_factory):
    """What no stage makes, of every stage's small command line."""
    folder = tmp_path_factory.mktemp("small")
    cases.lines(folder)
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Command lines of the training stages, whose pictures are drawn."""
    folder = tmp_path_factory.mktemp("training")
    lines = cases.lines(folder)
    code, text = galatea(folder, *lines["prior"], "--trainer.fast_dev_run=true", f"--out={folder / 'drawn'}")
    assert code == 0, text
    return {stage: (*lines[stage], "--out=out") for stage in ("prior", "features")}


@pytest.mark.parametrize("stage", ["prior", "features"])
class TestCheckpoints:
    def test_full_disk(self, training, here, stage):
        """There is room for all but checkpoints: the last one that was whole is kept."""
        folder = here / "out" / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "step=0.ckpt").write_bytes(b"whole")
        kept = here / "out" / "checkpoints.1" / "step=0.ckpt"  # where that of an earlier run is set aside
        sentence = refusal(here, *training[stage], limit=50_000)
        assert re.fullmatch(
            rf"cannot write {folder}/step=1.ckpt: File too large \(it takes about \d+\.\d MB\)", sentence
        )
        assert kept.read_bytes() == b"whole" and list(kept.parent.iterdir()) == [kept]
        assert list(folder.iterdir()) == []

    def test_folder_that_is_a_file(self, training, here, stage):
        place = here / "out" / "checkpoints"
        place.parent.mkdir()
        place.write_bytes(b"mine")
        sentence = refusal(here, *training[stage])
        assert sentence.startswith(f"cannot write {place}/step=1.ckpt: Not a directory: {place}")
        assert place.read_bytes() == b"mine"


def test_full_disk_of_the_mannequins(here):
    options = ("--data.train_subjects=2", "--data.val_subjects=2", "--data.test_subjects=2", "--data.size=16")
    sentence = refusal(here, "prior", "fit", *options, "--data.cache_dir=cache", *TRAINER, limit=2_000)
    assert sentence.startswith("cannot write cache/mannequins/") and sentence.endswith(": File too large")
    assert list((here / "cache" / "mannequins").iterdir()) == []


@pytest.mark.parametrize("stage", ["anchor", "stylize", "present"])
def test_full_disk(inputs, here, stage):
    options = ["--data.yaw_deg=0"] if stage == "anchor" else []
    sentence = refusal(here, *STAGES[stage](inputs, *options), limit=2_000)
    assert sentence.startswith("cannot write") and "File too large" in sentence


# -- pipelines -----------------------------------------------------------------------------------------------------

PIPELINE = "configs/pipelines/artform.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "cannot read none.yaml"),
        (["bad.yaml"], "bad.yaml is not valid YAML"),
        (["key.yaml"], "key.yaml: unknown key 'stepz'"),
        ([PIPELINE], "--image"),
        ([PIPELINE, "--image=x.png", "--nonsense=1"], "nonsense"),
        ([PIPELINE, "--image=x.png", "--yaw_deg=left"], "yaw_deg"),
        ([PIPELINE, "--image=none.png"], "--image none.png: there is no such file or folder"),
        ([PIPELINE, "--image=x.png", "--model=nowhere"], "--model nowhere: there is no such file or folder"),
        ([PIPELINE, "--image=x.png", "--out=file/out"], "Not a directory"),
    ],
    ids=["missing", "YAML", "key", "required", "option", "type", "image", "model", "output"],
)
def test_pipelines(here, arguments, message):
    picture(here / "x.png")
    (here / "file").touch()
    (here / "bad.yaml").write_text("steps: [unclosed\n")
    (here / "key.yaml").write_text("stepz: []\n")
    before = sorted(here.iterdir())
    assert message in refusal(here, "run", *arguments)
    assert sorted(here.iterdir()) == before


def test_pipeline_on_a_full_disk(here):
    picture(here / "x.png")
    sentence = refusal(here, "run", PIPELINE, "--image=x.png", "--out=out", limit=10)
    assert sentence.startswith("cannot write")


# -- what Lightning, YAML and the shell let through ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("accumulate_grad_batches=2", "trainer.accumulate_grad_batches: prior steps its optimisers itself"),
        ("gradient_clip_val=1.0", "trainer.gradient_clip_val: prior steps its optimisers itself"),
        ("gradient_clip_algorithm=value", "trainer.gradient_clip_val"),
        ("precision=bf16-true", "trainer.precision is 'bf16-true': take 32-true, bf16-mixed or 16-mixed"),
        ("precision=64-true", "trainer.precision is '64-true'"),
        ("limit_val_batches=1.5", "1.5"),
        ("limit_train_batches=-1", "-1"),
        ("overfit_batches=2.5", "2.5"),
        ("val_check_interval=3.5", "3.5"),
        ("strategy=nonsense", "nonsense"),
        ("max_time=soon", "soon"),
        ("devices=0", "0"),
        ("devices=x", "x"),
        ("max_epochs=-3", "-3"),
        ("num_nodes=0", "num_nodes"),
        ("plugins=x", "x"),
        ("profiler=x", "x"),
    ],
)
def test_trainer_options(training, here, option, message):
    assert message in refusal(here, *training["prior"], f"--trainer.{option}")


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        ("prior", "--model.optimization.learning_rate=-1", "learning_rate is -1"),
        ("prior", "--model.optimization.learning_rate=.nan", "learning_rate is nan"),
        ("prior", "--model.optimization.discriminator_lr=0", "discriminator_lr is 0"),
        ("prior", "--model.adversarial.r1_weight=-5", "r1_weight is -5"),
        ("prior", "--model.total_images=0", "total_images is 0"),
        ("prior", "--model.optimization.ema_images=.inf", "ema_images is inf"),
        ("prior", "--data.batch_size=0", "batch_size is 0"),
        ("prior", "--data.size=0", "size is 0"),
        ("prior", "--threads=0", "--threads is 0: it must be at least 1"),
        ("prior", "--seed_everything=-1", "-1"),
        ("features", "--model.learning_rate=-1", "learning_rate is -1"),
        ("features", "--model.style_weight=-1", "style_weight is -1"),
        ("features", "--data.batch_size=0", "batch_size must be at least 1"),
    ],
)
def test_settings_that_cannot_be(training, here, stage, option, message):
    assert message in refusal(here, *training[stage], option)


def test_a_stage_without_a_command(here):
    assert refusal(here, "anchor") == "galatea anchor needs a command: fit, validate, test, predict; or --help"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text", [LAUGHS, "model: &a {x: *a}", "[" * 5000, "model: {steps: " + "9" * 5000 + "}", "\xff\xfe"]
)
def test_yaml_bombs(here, text):
    (here / "x.yaml").write_text(text, encoding="latin-1")
    (here / "x.png").touch()
    for arguments in (
        ["anchor", "fit", "--config=x.yaml"],
        ["run", "x.yaml"],
        ["run", PIPELINE, "--image=x.png", "--launcher=slurm", "--cluster=x.yaml", "--dry_run"],
        ["anchor", "fit", f"--model.search={text}"] if len(text) < 2000 and text.isascii() else ["run", "x.yaml"],
    ):
        assert len(refusal(here, *arguments)) < 1000


@pytest.mark.parametrize("value", ["{", "[1", "&a [*a]", "[" * 500, "'"])
def test_values_of_set_that_are_no_yaml(here, value):
    picture(here / "x.png")
    assert "--set anchor.model.x is not valid YAML" in refusal(
        here, "run", PIPELINE, "--image=x.png", "--dry_run", f"--set=anchor.model.x={value}"
    )


def test_what_nobody_has_thought_of(here, monkeypatch):
    """One line and exit code 1; with --debug all that led to it, in the processes that are started, too."""

    def broken(_):
        raise ZeroDivisionError("a number\x1b[31m\nis zero")

    monkeypatch.setattr("stages.commands.world.main", broken)
    code, text = galatea(here, "world")
    assert code == 1 and text == ("galatea: error: ZeroDivisionError: a number\\x1b[31m is zero; --debug shows where\n")
    for arguments in (("--debug", "world"), ("world", "--debug")):
        code, text = galatea(here, *arguments)
        assert code == 1 and "Traceback" in text


@pytest.mark.parametrize("closed", ["1", "2", "0", "1 2"])
def test_streams_that_are_closed(here, closed):
    """As under cron: work is done, and nothing that is opened meanwhile becomes a stream."""
    command = f"{sys.executable} -m stages world --size 16 --out out.png " + " ".join(f"{n}>&-" for n in closed.split())
    done = subprocess.run(["bash", "-c", command], env={**os.environ, "PYTHONPATH": os.getcwd()}, cwd=here, timeout=100)
    assert done.returncode == 0 and (here / "out.png").stat().st_size > 100


def test_a_terminal_that_knows_latin_letters_only(here):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "stages", "world", "--size=16", "--out=输出.png"]
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, timeout=100)
    assert done.returncode == 0 and b"wrote ??.png" in done.stdout


def test_ids_that_look_like_numbers():
    assert texts("[00012]") == ["00012"] and texts("[1e5, 'x']") == ["1e5", "x"] and texts("00012") == ["00012"]
    assert texts('["00012",true]') == ["00012", "true"] and texts(["ann"]) == ["ann"] and texts(None) is None
    assert texts("[]") == []


def test_an_item_that_looks_like_a_number(tmp_path_factory, here):
    folder = tmp_path_factory.mktemp("numbers")
    heads.stylised(folder, ids=("00012", "1e5"))
    options = ["--model.frames=2", "--model.scale=1", "--model.video_size=32", "--model.tile=32", "--model.mesh_size=0"]
    line = ["present", "predict", f"--model.result.path={folder / 'stylize'}", *options, *TRAINER]
    for number, items in enumerate(("[00012]", "[1e5]", "00012")):
        code, text = galatea(here, *line, f"--out={number}", f"--model.items={items}")
        assert code == 0, text
    (here / "new").mkdir()
    assert "has no item '7', it has: 00012, 1e5" in refusal(here / "new", *line, "--model.items=7")
