"""One picture through official generators at their real sizes, with random weights: whether it works, and its cost.

Each generator is written as its official file and imported as a user's would be; then ``galatea run`` carries the
picture from anchor to present, by the presets of its kind. What is shown means nothing; seconds and memory are those of
real weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from models.errors import UserError, one_line
from models.files import ROOT, atomic_write, read_json
from models.generators.base import Generator
from models.generators.eg3d import EG3DGenerator
from models.generators.gram import GRAMGenerator
from models.generators.stylesdf import StyleSDF
from models.zoo import family
from stages.__main__ import dispatch
from tests.benchmarks.gpu.networks import small_stylesdf
from tests.benchmarks.steps import FILE

PICTURE = ROOT / "assets" / "artworks" / "toon-1100003.png"
PIPELINE = ROOT / "configs" / "pipelines" / "artform.yaml"
HERE = "tests.benchmarks"
NETWORKS = {
    "anchor": {"perceptual": "RandomLPIPS"},
    "stylize": {"perceptual": "RandomLPIPS", "style": "RandomCLIP"},
}
"""By step, networks of the sizes of those that a preset names, which need no download."""


class Size(NamedTuple):
    """One row of the table.

    Attributes:
        family: of the zoo.
        full, small: make the network at its official size, and at a toy size where official files have any.
        settings: of the import.
    """

    family: str
    full: Callable[[], Generator]
    small: Callable[[], Generator] | None = None
    settings: tuple[str, ...] = ()


SIZES = {
    "eg3d": Size("eg3d", EG3DGenerator),
    "stylesdf": Size("stylesdf", partial(StyleSDF, decoder={}), small_stylesdf),
    "gram": Size("gram", GRAMGenerator, settings=("preset=ffhq",)),
}


def imported(name: str, small: bool, out: Path) -> Path:
    """The artifact of a generator with random weights, by way of its official file."""
    size, way = SIZES[name], family(SIZES[name].family)
    make = size.small if small else size.full
    if make is None or way.export is None:
        raise UserError(f"{name} has no official file at a toy size")
    torch.manual_seed(0)
    generator = make()
    generator.update_mean(64)
    file = out / f"{name}.pt"
    torch.save(way.export({"generator": generator.eval()}), file)
    words = [size.family, str(file), "--out", str(out / name)]
    dispatch(["zoo", "import", *words, *(["--set", *size.settings] if size.settings else [])])
    file.unlink()
    return out / name


def rehearse(name: str, small: bool, steps: int | None, device: str, out: Path) -> list[dict[str, Any]]:
    """A row for each step of the pipeline: seconds, seconds a training step, and memory.

    Args:
        steps: of anchor and stylize; None for as many as the preset says.
    """
    folder = out / f"{name}_artform"
    words = [str(PIPELINE), "--model", str(imported(name, small, out)), "--image", str(PICTURE), "--out", str(folder)]
    words += ["--yaw_deg", "-10", "--pitch_deg", "5", "--device", device]
    options: dict[str, Any] = {}
    for step in ("anchor", "stylize", "present"):
        options[f"{step}.trainer.callbacks+"] = f"{HERE}.steps.Steps"
        networks = {} if small else NETWORKS.get(step, {})  # at toy sizes the embedded ones
        options |= {f"{step}.model.{key}": f"{HERE}.gpu.standins.{kind}" for key, kind in networks.items()}
    if steps is not None:
        options |= {
            "anchor.model.steps": steps,
            "stylize.model.recipe.steps": steps,
            "stylize.model.recipe.pool": steps,
        }
        options |= {"present.model.frames": steps, "anchor.model.search.candidates": 1}
    dispatch(["run", *words, *(word for key, value in options.items() for word in ("--set", f"{key}={value}"))])
    return [row(name, folder / step) for step in ("anchor", "stylize", "present")]


def row(name: str, folder: Path) -> dict[str, Any]:
    """What one step of a pipeline took; the first training step also prepares, and the last writes results."""
    cost = read_json(folder / FILE) or {}
    found = {"generator": name, "step": folder.name, "steps": len(cost["seconds"])}
    for key in ("seconds", "cpu"):
        between = cost[key][1:-1] or cost[key][-1:]
        found[f"step_{key}"] = median(between) if between else None
    found |= {"seconds": (read_json(folder / "status.json") or {})["seconds"], "cpu": cost["whole_cpu"]}
    return found | {"peak_mib": cost["peak_mib"], "rss_mib": cost["rss_mib"]}


COLUMNS = {
    "steps": "training steps", "step_seconds": "s a step", "step_cpu": "CPU s a step", "seconds": "s", "cpu": "CPU s",
    "peak_mib": "GPU MiB", "rss_mib": "process MiB",
}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Every step in a line."""
    shown = Table("generator", "step", *COLUMNS.values())
    for found in rows:
        if "failed" in found:
            shown.add_row(found["generator"], "[bold]failed[/bold]", found["failed"])
            continue
        numbers = (found[key] for key in COLUMNS)
        shown.add_row(
            found["generator"],
            found["step"],
            *("" if n is None else f"{n:.0f}" if n > 99 else f"{n:.3g}" for n in numbers),
        )
    return shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m tests.benchmarks real_size``."""
    parser.add_argument("generators", nargs="*", metavar="GENERATOR", help=f"of {', '.join(SIZES)} (default: all)")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="cpu")
    parser.add_argument("--steps", type=int, help="of anchor and stylize, as few as 3 (default: the preset's)")
    parser.add_argument("--small", action="store_true", help="at toy sizes, to try the rehearsal itself")
    parser.add_argument("--out", type=Path, default=Path("runs/real_size"), help="folder (default runs/real_size)")


def main(arguments: argparse.Namespace) -> None:
    """Rehearse, print, and write ``OUT/real_size.json``; exit code 1 when a generator has failed."""
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in arguments.generators or SIZES:
        try:
            rows += rehearse(name, arguments.small, arguments.steps, arguments.device, out)
        except Exception as error:
            rows.append({"generator": name, "failed": f"{type(error).__name__}: {one_line(error)[:300]}"})
    with atomic_write(out / "real_size.json") as file:
        file.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=120).print(table(rows))
    if failed := [found["generator"] for found in rows if "failed" in found]:
        raise SystemExit(f"failed: {', '.join(failed)}")
