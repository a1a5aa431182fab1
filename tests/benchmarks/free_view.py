"""Free views of one photo's head: with every network (one pass), by the synthesis alone, and from baked manifolds.

GRAMInverter (Deng et al., 2023), Sec. 4.1 reports 3 and 180 frames per second for the first and the last. Each way
lives in a process of its own, and they are asked in turn; every view is a new one, which no cache knows. Weights are
random at the paper's sizes, which costs the same, and those of the embedded prior at its own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from models import artifact
from models.camera import Camera
from models.configurable import build
from models.encoders.detail import DetailReconstructor
from models.files import ROOT
from models.latents import Latents
from models.rendering.output import Edit
from tests.benchmarks.official import Run
from tests.benchmarks.zoo import Cost, Request, Worker, alternate, line

PAPER = ROOT / "configs" / "paper" / "graminverter"
TURN = 1e-3  # radians from one view to the next
COLUMNS = ("head", "way", "threads", "rounds", "CPU s", "wall s", "times as long as cached: CPU", "wall", "peak MiB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``free_view``."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="views of each way, alternating")


def configured(stage: str, name: str) -> Any:
    """A network of the paper's configuration."""
    config = yaml.safe_load((PAPER / f"{stage}.yaml").read_text())["model"][name]
    return build(config).eval().requires_grad_(False)


def turning(generator: Any) -> Callable[[], Camera]:
    """Each call a camera that is a little farther round."""
    passes = itertools.count()
    return lambda: generator.rig.camera(generator.rig.yaw_mean + TURN * next(passes))


def paper(way: str) -> tuple[nn.Module, Run]:
    """GRAMInverter at 256 px: e4e's encoder, detail manifolds, efficient GRAM of 24 surfaces."""
    generator = configured("prior", "generator")
    with torch.no_grad():  # an opaque head: what is transparent throughout would be too easy
        generator.planes.out.bias[3] = 40.0
    detail = DetailReconstructor().eval().requires_grad_(False)
    detail.check(generator)
    encoder = configured("invert", "encoder") if way == "one pass" else None
    camera, photo = turning(generator), torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    front = generator.rig.camera(0.0)

    def details(ws: Latents) -> Edit:
        coarse = generator.synthesis(ws, front).image
        return detail(photo, coarse, front, generator).edit

    if encoder is not None:

        def one_pass(_: int) -> Tensor:
            ws = encoder.codes(photo, generator.mean_latents)
            return generator.synthesis(ws, camera(), edit=details(ws)).image

        return generator, one_pass
    ws = generator.mean_latents
    with torch.no_grad():
        edit = details(ws)
        if way == "synthesis":
            return generator, lambda _: generator.synthesis(ws, camera(), edit=edit).image
        head = generator.bake(ws, 256, edit=edit)
    return head, lambda _: head.show(camera()).image


def embedded(side: int, way: str) -> tuple[nn.Module, Run]:
    """The embedded prior: 16 manifolds."""
    generator = artifact.load("assets/prior").module("generator").requires_grad_(False)
    camera, ws = turning(generator), generator.mapping(torch.zeros(1, generator.z_dim))  # type: ignore[operator, arg-type]
    if way == "synthesis":
        return generator, lambda _: generator.synthesis(ws, camera(), resolution=side).image  # type: ignore[operator]
    head = generator.bake(ws, side, stride=4 if side >= 256 else 2)  # type: ignore[arg-type]
    return head, lambda _: head.show(camera(), side).image


HEADS: dict[str, tuple[tuple[str, ...], Callable[..., tuple[nn.Module, Run]]]] = {
    "embedded prior, 64 px": (("synthesis", "cached"), partial(embedded, 64)),
    "embedded prior, 256 px": (("synthesis", "cached"), partial(embedded, 256)),
    "GRAMInverter's sizes, 256 px": (("one pass", "synthesis", "cached"), paper),
}


def ratio(slow: list[Cost], fast: list[Cost], kind: str) -> str:
    """Median and range, round by round."""
    ratios = [getattr(a, kind) / getattr(b, kind) for a, b in zip(slow, fast, strict=True)]
    return f"{median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f})"


def main(arguments: argparse.Namespace) -> None:
    """Measure, and print a table in Markdown."""
    print(f"torch {torch.__version__}; medians, and the ranges of ratios over rounds\n")
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    request = Request("forward", arguments.threads, 1)
    for name, (ways, make) in HEADS.items():
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(partial(make, way))) for way in ways]
            for worker in workers:
                worker.ask(request)  # warms up
            costs = alternate(workers, request, arguments.rounds, budget=0 if arguments.rounds <= 3 else 1e9)
        for way, own in zip(ways, costs, strict=True):
            times = [f"{median(getattr(cost, kind) for cost in own):.3f}" for kind in ("cpu", "wall")]
            ratios = ["", ""] if way == "cached" else [ratio(own, costs[-1], kind) for kind in ("cpu", "wall")]
            peak = f"{max(cost.peak for cost in own) / 2**20:.0f}"
            print(line([name, way, f"{arguments.threads}", f"{len(own)}", *times, *ratios, peak]), flush=True)
