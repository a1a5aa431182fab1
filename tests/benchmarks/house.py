"""How long the house's own operations take, as a table."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from models import artifact
from models.files import ROOT


def seconds(function: Callable[[], object], repeats: int = 5, warm: bool = True) -> float:
    """Median time of a call, after one that is not counted, or with ``warm=False`` from the first on."""
    if warm:
        function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return sorted(times)[repeats // 2]


def one_photo() -> float:
    """Seconds that a photo takes to become a head, seen once: loading, camera, codes, details; without imports."""
    from datamodules.artworks import read_artworks
    from datamodules.poses import find_camera
    from models.features.embedded import EmbeddedPose
    from models.generators.views import render_views
    from models.heads.subjects import invert

    photo = sorted((ROOT / "assets" / "artworks").glob("*.png"))[0]
    begin = time.perf_counter()
    loaded = artifact.load(ROOT / "assets" / "inverter")
    generator, encoder, detail = (loaded.module(name) for name in ("generator", "encoder", "detail"))
    (item,) = read_artworks(str(photo), size=detail.resolution)  # type: ignore[arg-type]
    with torch.no_grad():
        camera = find_camera(item, generator, EmbeddedPose(), None, torch.device("cpu"))  # type: ignore[arg-type]
        subject = invert(item.id, item.at(detail.resolution)[None], camera, generator, encoder, detail)  # type: ignore[arg-type]
        render_views(subject.generator, subject.latents, camera, subject.expression)
    return time.perf_counter() - begin


def cpu_of_steps(count: int) -> float:
    """CPU seconds, user and system, of a local pipeline of ``count`` steps that do next to nothing."""
    options = {"model.steps": 1, "model.search.candidates": 1, "model.search.restarts": 1, "trainer.accelerator": "cpu"}
    options["data.init_args.path"] = str(sorted((ROOT / "assets" / "artworks").glob("*.png"))[0])
    steps = [
        {"name": f"step{i}", "stage": "anchor", "command": "fit", "overrides": {**options, "seed_everything": i}}
        for i in range(count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        file.write_text(json.dumps({"steps": steps}))
        command = [sys.executable, "-m", "stages", "run", str(file), f"--out={folder}/out"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    table = Table("operation", "seconds", title=f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    command = [sys.executable, "-m", "stages", "--help"]
    table.add_row("galatea --help", f"{seconds(lambda: subprocess.run(command, cwd=ROOT, capture_output=True)):.3f}")
    for name, few, many in (("first", 0, 1), ("further", 1, 3)):
        spent = sorted(cpu_of_steps(many) - (cpu_of_steps(few) if few else 0) for _ in range(3))[1]
        table.add_row(f"a pipeline's {name} step with one optimisation step, CPU", f"{spent / (many - few):.3f}")
    cold = "from tests.benchmarks.house import *; import models.heads.subjects, datamodules.poses; print(one_photo())"
    times = [float(subprocess.check_output([sys.executable, "-c", cold], cwd=ROOT)) for _ in range(3)]
    table.add_row("one photo to a head, networks loaded for it", f"{sorted(times)[1]:.3f}")
    prior = ROOT / "assets" / "prior"
    if (prior / artifact.MANIFEST).exists():
        loaded = artifact.load(prior)
        table.add_row("load the embedded prior, verified", f"{seconds(lambda: artifact.load(prior)):.3f}")
        table.add_row("build its generator", f"{seconds(lambda: loaded.module('generator')):.3f}")
        generator = loaded.module("generator")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a"
            save = lambda: artifact.save(path, stage="bench", modules={"generator": generator})  # noqa: E731
            table.add_row("save it", f"{seconds(save):.3f}")
        with torch.no_grad():
            camera = generator.rig.camera(0.0)  # type: ignore[operator, union-attr]
            ws = generator.mapping(torch.zeros(1, generator.z_dim))  # type: ignore[operator, arg-type]
            table.add_row("render one view", f"{seconds(lambda: generator.synthesis(ws, camera)):.3f}")  # type: ignore[operator]
    Console().print(table)
