"""Folders of photos shown in a style: seconds and memory of each photo, beside those of starting.

Two folders are done, each by a process of its own: what the larger takes beyond the smaller is the photos' alone, and
its memory must not grow with them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from models.files import ROOT
from models.image import write_image

_WORDS = ("restyle", "predict", "--config", "configs/stages/restyle.yaml")


@dataclass(frozen=True)
class Taken:
    """Seconds, and the largest resident memory in MiB, of a whole command."""

    seconds: float
    mib: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``photos``."""
    parser.add_argument("--counts", type=int, nargs=2, default=(100, 1000), help="photos in the two folders")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", type=int, default=64, help="of the photos, pixels")
    parser.add_argument("options", nargs="*", help="of galatea restyle predict, as model.samples=4")


def photos(folder: Path, count: int, side: int) -> None:
    """Pictures of noise, which costs what faces cost."""
    folder.mkdir()
    draws = torch.Generator().manual_seed(0)
    for i in range(count):
        write_image(folder / f"{i:05}.png", torch.rand(1, 3, side, side, generator=draws) * 2 - 1)


def take(folder: Path, out: Path, threads: int, options: list[str]) -> Taken:
    """What the command takes for a folder of photos."""
    given = [f"--data.init_args.path={folder}", "--data.init_args.crop=none", f"--out={out}", f"--threads={threads}"]
    words = [*_WORDS, *given, "--trainer.accelerator=cpu", *(f"--{option}" for option in options)]
    code = "import json, resource, sys, time; from stages.__main__ import dispatch; start = time.perf_counter(); "
    code += "dispatch(json.loads(sys.argv[1])); peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024; "
    code += "print(json.dumps([time.perf_counter() - start, peak]))"
    told = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return Taken(*json.loads(told.stdout.splitlines()[-1]))


def main(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    table = Table("photos", "seconds", "peak MiB")
    taken = []
    with tempfile.TemporaryDirectory() as name:
        for count in arguments.counts:
            photos(folder := Path(name) / f"{count}", count, arguments.side)
            taken.append(take(folder, Path(name) / f"out{count}", arguments.threads, arguments.options))
            table.add_row(f"{count:,}", f"{taken[-1].seconds:.1f}", f"{taken[-1].mib:.0f}")
    few, many = taken
    more = arguments.counts[1] - arguments.counts[0]
    Console().print(table)
    each = (many.seconds - few.seconds) / more
    Console().print(f"{each:.4f} s and {(many.mib - few.mib) * 1024 / more:.1f} KiB for each further photo")
