"""Stages on a GPU, by their real command lines: one artwork from end to end, memory of steps, curves by precision.

Weights are random, so the pictures mean nothing; time and memory are those of the real ones.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import yaml

from models import artifact
from models.camera import Rig
from models.encoders.pyramid import Encoder4Editing
from models.files import ROOT
from models.generators.eg3d import EG3DGenerator
from models.image import write_image
from stages.__main__ import dispatch
from tests.benchmarks.free_view import PAPER, configured
from tests.benchmarks.gpu.networks import small_eg3d
from tests.benchmarks.gpu.parts import Case, Row, Setting, synchronize
from tests.benchmarks.steps import FILE
from tests.stages import cases, inversions, small, tiny

ARTWORK = ROOT / "assets" / "artworks" / "toon-1100003.png"
POSE = {"data.init_args.yaw_deg": -20.0, "data.init_args.pitch_deg": 8.0}
CONFIGS = ROOT / "configs"
HERE = "tests.benchmarks.gpu"


def run(setting: Setting, out: Path, line: Sequence[str], **options: Any) -> Row:
    """One command of ``galatea``: its seconds, of a fit also ``step_ms`` and ``peak_mib``.

    Args:
        options: of the command line, with ``__`` for a dot; None is null.
    """
    given = {
        "trainer.accelerator": "cpu" if setting.device.type == "cpu" else "gpu",
        "trainer.devices": 1,
        "trainer.enable_model_summary": "false",
        **{name.replace("__", "."): "null" if value is None else value for name, value in options.items()},
    }
    synchronize(setting.device)
    begin = time.perf_counter()
    dispatch([*line, *small.options(given), "--trainer.callbacks+=tests.benchmarks.steps.Steps", f"--out={out}"])
    synchronize(setting.device)
    found: Row = {"seconds": time.perf_counter() - begin}
    if (steps := json.loads((out / FILE).read_text()))["seconds"]:
        between = steps["seconds"][1:-1] or steps["seconds"][-1:]  # the last step writes a per-item stage's results
        found |= {"steps": len(steps["seconds"]), "step_ms": 1000 * mean(between), "peak_mib": steps["peak_mib"]}
    return found


# -- one artwork, from end to end ------------------------------------------------------------------------------------


def artwork(setting: Setting) -> Iterator[Case]:
    """Anchor, stylize and present of one artwork of 256 px, a few steps of each search; ``whole_s`` is extrapolated to
    the configuration's steps."""
    for name, (prior, paper, needed) in PRIORS.items():
        result = Artwork(setting, name, prior, paper)
        for stage, needs in zip(("anchor", "stylize", "present"), needed, strict=True):
            yield Case(f"{name}, {stage}", getattr(result, stage), needs)


def random_eg3d(setting: Setting) -> Path:
    """An artifact of EG3D at full size, rendering 512 px."""
    torch.manual_seed(0)
    generator = small_eg3d() if setting.small else EG3DGenerator()
    generator.update_mean(64)
    return artifact.save(setting.folder / "eg3d", stage="prior", modules={"generator": generator.eval()}).path


def shipped(setting: Setting) -> Path:
    """The embedded prior."""
    return tiny.prior(setting.folder / "tiny").path if setting.small else ROOT / "assets" / "prior"


class Artwork:
    """One artwork on its way.

    Args:
        prior: finds the generator's artifact.
        paper: whether by the configurations of 3DArtmator, with its feature networks; else by the embedded world's.
    """

    def __init__(self, setting: Setting, name: str, prior: Any, paper: bool) -> None:
        self.setting, self.prior, self.paper = setting, prior, paper
        self.folder = setting.folder / name.partition(",")[0].replace(" ", "_")
        self.steps = 4 if setting.small else 24

    def _config(self, stage: str) -> tuple[list[str], dict[str, Any]]:
        """The option that names the configuration, and what that says."""
        file = CONFIGS / "paper" / "artmator" / f"{stage}.yaml" if self.paper else CONFIGS / "stages" / f"{stage}.yaml"
        return [f"--config={file}"] if self.paper else [], yaml.safe_load(file.read_text())["model"]

    def _fit(self, stage: str, whole: int, options: dict[str, Any]) -> Row:
        found = run(self.setting, self.folder / stage, [stage, "fit", *self._config(stage)[0]], **options)
        left = (whole - found["steps"]) * found["step_ms"] / 1000
        return {**found, "whole_s": found["seconds"] + left, "whole_steps": whole, "extrapolated": True}

    def anchor(self) -> Row:
        """The latent search."""
        options = {"data.init_args.path": ARTWORK, "data.init_args.size": 256, **POSE, "model.steps": self.steps}
        options |= {"model.prior.path": self.prior(self.setting)}
        if self.paper:
            options |= {"model.perceptual": f"{HERE}.standins.RandomLPIPS"}
        return self._fit("anchor", self._config("anchor")[1]["steps"], options)

    def _without(self, stage: str) -> Row | None:
        """What the next stage says when this one has left nothing."""
        there = (self.folder / stage / "artifact").exists()
        return None if there else {"skipped": f"{stage} has left nothing to go on from"}

    def stylize(self) -> Row:
        """The tuning."""
        if reason := self._without("anchor"):
            return reason
        options: dict[str, Any] = {"model.recipe.steps": self.steps}
        options |= dict.fromkeys(("model.anchor.path", "data.init_args.path"), self.folder / "anchor")
        if self.paper:
            options |= {
                "model.perceptual": f"{HERE}.standins.RandomLPIPS",
                "model.style": f"{HERE}.standins.RandomCLIP",
            }
        if self.setting.small:
            options |= {"model.recipe.pool": 3}
        return self._fit("stylize", self._config("stylize")[1]["recipe"]["steps"], options)

    def present(self) -> Row:
        """Turntables, sheets, mesh, page: as configured, nothing is extrapolated."""
        if reason := self._without("stylize"):
            return reason
        shown = {"frames": 2, "scale": 1, "video_size": 32, "tile": 32, "mesh_size": 32} if self.setting.small else {}
        options = {"model.result.path": self.folder / "stylize", **{f"model.{name}": v for name, v in shown.items()}}
        found = run(self.setting, self.folder / "present", ["present", "predict"], **options)
        return {**found, "whole_s": found["seconds"], "extrapolated": False}


PRIORS = {
    "embedded prior, 64 px": (shipped, False, (4, 4, 8)),
    "EG3D, paper's settings": (random_eg3d, True, (6, 14, 12)),  # stylize renders 256 views before its first step
}
"""By name the artifact, whether with the paper's settings, and what each stage takes on a GPU, seconds."""


# -- memory of a step ------------------------------------------------------------------------------------------------


def memory(setting: Setting) -> Iterator[Case]:
    """Peak of GRAMInverter's stages, in the paper's configurations and with one GPU's share of its batch. Those of
    3DArtmator are in :func:`artwork`."""
    inputs = Inputs(setting)
    for stage in ("prior", "invert", "tune", "detail"):
        yield Case(f"{stage}, paper's settings", partial(inputs.step, stage), 6)


class Inputs:
    """What these stages take: noise as portraits, a random generator, a random encoder; made once."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.folder = setting, setting.folder
        self.made = False

    def step(self, stage: str) -> Row:
        """A few training steps."""
        if not self.made:
            self._make()
        line, options = self._small(stage) if self.setting.small else self._full(stage)
        return run(self.setting, self.folder / f"run_{stage}", line, **options)

    def _make(self) -> None:
        torch.manual_seed(0)
        if self.setting.small:
            inversions.prepare(self.folder)
            generator: Any = artifact.load(self.folder / "tiny").module("generator")
            sizes: dict[str, Any] = {**inversions.ENCODER, "expressions": 2}
            encoder: Any = Encoder4Editing(**sizes)
        else:
            generator, encoder = configured("prior", "generator"), configured("invert", "encoder")
            noise_portraits(self.folder / "portraits", generator.rig, 256, 64)
            artifact.save(self.folder / "tiny", stage="prior", modules={"generator": generator})
        artifact.save(self.folder / "invert", stage="invert", modules={"generator": generator, "encoder": encoder})
        self.made = True

    def _small(self, stage: str) -> tuple[list[str], dict[str, Any]]:
        """The tests' own command lines, with the networks that were made."""
        if stage == "prior":
            return cases.lines(self.folder)["prior"], {"model.total_images": 12}
        options = {} if stage == "invert" else {"model.inverter.path": self.folder / "invert"}
        return cases.lines(self.folder)[stage], options

    def _full(self, stage: str) -> tuple[list[str], dict[str, Any]]:
        """The paper's settings."""
        options: dict[str, Any] = {"data.path": self.folder / "portraits", "data.workers": 0}
        options |= {"trainer.limit_val_batches": 0, "trainer.log_every_n_steps": 1}
        if stage == "prior":
            options |= {"model.total_images": 3 * 8}  # of the share of one of four GPUs
        else:
            options |= {"trainer.max_steps": 3, "data.test_path": None, "model.protocol": None}
            options |= {"model.perceptual": f"{HERE}.standins.RandomLPIPS", "model.perceptual.net": "alex"}
            options |= {"model.identity": f"{HERE}.standins.RandomIdentity"}
            if stage == "invert":
                options |= {"model.prior.path": self.folder / "tiny", "model.trunk": None}
            else:
                options |= {"model.inverter.path": self.folder / "invert"}
        return [stage, "fit", f"--config={PAPER / f'{stage}.yaml'}"], options


def noise_portraits(folder: Path, rig: Rig, size: int, count: int) -> None:
    """Pictures of noise in FFHQ's layout, with cameras of ``rig``."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = torch.Generator().manual_seed(0)
    labels = rig.random(count, draws).label().tolist()
    for index in range(count):
        write_image(folder / f"{index:02d}.png", torch.rand(3, size, size, generator=draws) * 2 - 1)
    named = [[f"{index:02d}.png", label] for index, label in enumerate(labels)]
    (folder / "dataset.json").write_text(json.dumps({"labels": named}))


# -- loss curves by precision ----------------------------------------------------------------------------------------

BOUND = 0.01
"""Largest relative difference of a smoothed curve from that in 32-true. On a CPU .0007 to .0025 were found, and with
another seed .013 (prior) and .028 (stylize)."""
WINDOW = 8  # steps that are averaged
CURVES = {"prior": "prior/reconstruction", "stylize": "stylize/loss"}
"""A stage with its own optimisation loop, adversarial from its first step, and one that works item by item."""


def precision(setting: Setting) -> Iterator[Case]:
    """Loss curves of the tests' small configurations in bf16-mixed and in 16-mixed, beside 32-true."""
    for stage in CURVES:
        training = Training(setting, stage)
        for name, needs in (("bf16-mixed", 9), ("16-mixed", 4)):  # the first also runs in 32-true
            yield Case(f"{stage}, {name}", partial(training.compare, name), needs)


class Training:
    """One stage's small configuration, its loss curve in 32-true kept."""

    def __init__(self, setting: Setting, stage: str) -> None:
        self.setting, self.stage = setting, stage
        self.folder = setting.folder / stage
        self.full: np.ndarray | None = None

    def compare(self, name: str) -> Row:
        """Mean difference of two curves, relative to the mean of the full one."""
        if self.full is None:
            self.full = self.curve("32-true")
        found = self.curve(name)
        difference = float(np.abs(smooth(found) - smooth(self.full)).mean() / np.abs(smooth(self.full)).mean())
        row: Row = {"difference": difference, "bound": BOUND, "steps": len(found)}
        if not difference <= BOUND:
            row["failed"] = f"the loss curve differs from that in 32-true by {100 * difference:.1f} %"
        return row

    def curve(self, name: str) -> np.ndarray:
        """The loss of each step."""
        folder, steps = self.folder, 12 if self.setting.small else 48
        if not folder.exists():
            folder.mkdir()
            self.lines = cases.lines(folder)
            if self.stage == "stylize":
                run(self.setting, folder / "anchor", self.lines["anchor"], data__count=1)
        options: dict[str, Any] = {"trainer.precision": name, "trainer.log_every_n_steps": 1}
        if name == "16-mixed" and self.setting.device.type == "cpu":  # which Lightning knows on GPUs alone
            options = {**options, "trainer.precision": None, "trainer.plugins": "tests.stages.processes.HalfOnCpu"}
        if self.stage == "prior":
            options |= {"model.total_images": 4 * steps, "model.adversarial.start": 0}
        else:
            options |= {"model.recipe.steps": steps, "model.save_every": steps}
        out = folder / name
        run(self.setting, out, self.lines[self.stage], **options)
        with open(next(out.glob("logs/*/metrics.csv")), newline="") as file:
            values = [row[CURVES[self.stage]] for row in csv.DictReader(file)]
        return np.array([float(value) for value in values if value])


def smooth(curve: np.ndarray) -> np.ndarray:
    """Means of ``WINDOW`` neighbours."""
    return np.convolve(curve, np.full(min(WINDOW, len(curve)), 1 / min(WINDOW, len(curve))), "valid")
