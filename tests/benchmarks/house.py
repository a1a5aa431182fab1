"""How long the house's own operations take, as a table."""

from __future__ import annotations

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
        camera = find_camera(item, generator.rig, EmbeddedPose(), torch.device("cpu"))  # type: ignore[arg-type]
        subject = invert(item.id, item.at(detail.resolution)[None], camera, generator, encoder, detail)  # type: ignore[arg-type]
        render_views(subject.generator, subject.latents, camera, subject.expression)
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    table = Table("operation", "seconds", title=f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    command = [sys.executable, "-m", "stages", "--help"]
    table.add_row("galatea --help", f"{seconds(lambda: subprocess.run(command, cwd=ROOT, capture_output=True)):.3f}")
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
