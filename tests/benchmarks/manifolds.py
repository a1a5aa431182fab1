"""Efficient GRAM beside our GRAM on the same manifolds (GRAMInverter, Table 1): time, memory, and what they can show.

Time and memory are those of the paper's configurations at random weights. Quality is that of small ones, fitted to a
few heads of the embedded world for an equal time: adversarial training would take days.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
import yaml
from torch import Tensor, nn

from datamodules.mannequins import RIG, SPLITS, Scene, render, subject_z
from models.camera import Camera
from models.configurable import build
from models.files import ROOT
from models.generators.base import Generator
from models.generators.gram import BOX, GRAMGenerator
from models.generators.manifold import ManifoldGenerator
from models.metrics.consistency import carried
from models.metrics.image import psnr
from models.rendering import pointwise
from models.rendering.manifolds import fit_predictor
from stages.prior import PriorStage
from tests.benchmarks.official import TURN, Run
from tests.benchmarks.zoo import COLUMNS, Case, Request, Worker, alternate, line

HALF = BOX / 2
SPHERES = {"start": "exact", "scale": 1.0, "centre": [0.0, 0.0, -1.5 * HALF], "radius": 0.0}
LEVELS = [HALF * (2.3 - 1.5 * k / 22) for k in range(23)]
"""GRAM's surfaces as it begins: spheres of 2.3 to .8 half boxes."""

UNIT = 15.0
"""Units of the embedded world in one of GRAM's."""
NEAR, FAR = 5.6 / UNIT, 8.4 / UNIT
SCALED = {"radius": 7 / UNIT, "focal": RIG.focal, "pivot": [v / UNIT for v in RIG.pivot], "near": NEAR, "far": FAR}
TRAINED_DEG, HELD_OUT_DEG = (-36, -24, -12, 0, 12, 24, 36), (-30, -18, -6, 6, 18, 30)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``manifolds``."""
    parser.add_argument("--side", type=int, default=256, help="of the images, forward, pixels")
    parser.add_argument("--backward_side", type=int, default=64, help="of those with a backward pass")
    parser.add_argument("--whole_side", type=int, default=128, help="of those with all points at once, as in the paper")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each network, alternating")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="of one row")
    parser.add_argument("--seconds", type=float, default=240, help="of CPU time that each fit takes; 0 leaves them out")
    parser.add_argument("--heads", type=int, default=4, help="fitted together")
    parser.add_argument("--size", type=int, default=32, help="of their pictures, pixels")


# -- time and memory -------------------------------------------------------------------------------------------------


def efficient(side: int) -> ManifoldGenerator:
    """The paper's, with GRAM's cameras and spheres."""
    config = yaml.safe_load((ROOT / "configs" / "paper" / "graminverter" / "prior.yaml").read_text())
    spec = config["model"]["generator"]
    gram = GRAMGenerator(resolution=side, width=8).rig
    spec["init_args"] |= {
        "resolution": side, "levels": LEVELS, "predictor": {**spec["init_args"]["predictor"], **SPHERES},
        "triplane": {**spec["init_args"]["triplane"], "extent": HALF},
        "rig": {"radius": gram.radius, "focal": gram.focal, "pivot": list(gram.pivot), "near": 0.88, "far": 1.12},
    }  # fmt: skip
    found = build(spec)
    assert isinstance(found, ManifoldGenerator)
    return found


def turning(make: Callable[[int], Generator], side: int, whole: bool) -> tuple[nn.Module, Run]:
    """A generator that sees each image from another camera, since both remember the surfaces of those they know."""
    generator, passes = make(side).eval(), itertools.count()
    if whole:
        pointwise.CPU_NUMBERS = 2**62

    def run(batch: int) -> Tensor:
        z = generator.sample_z(batch, torch.Generator().manual_seed(0))
        return generator(z, generator.rig.camera(torch.full((batch,), TURN * next(passes)))).image

    return generator, run


def gram(side: int) -> GRAMGenerator:
    """GRAM's own configuration."""
    return GRAMGenerator(resolution=side)


def nothing() -> tuple[nn.Module, Run]:
    """What a process takes that has imported all, and does nothing."""
    return nn.Identity(), lambda batch: torch.zeros(batch)


def costs(arguments: argparse.Namespace) -> None:
    """Print the table of time and memory."""
    with Worker(nothing) as worker:
        idle = worker.ask(Request("forward", 1, 1)).peak / 2**20
    print(f"torch {torch.__version__}; efficient GRAM / GRAM; a process that does nothing takes {idle:.0f} MiB\n")
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    rows = [
        ("", arguments.side, False, "forward"),
        (", all points at once", arguments.whole_side, True, "forward"),
        ("", arguments.backward_side, False, "with backward"),
    ]
    for note, side, whole, kind in rows:
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(partial(turning, make, side, whole))) for make in (efficient, gram)]
            request = Request(kind, 1, 1)  # type: ignore[arg-type]
            ours, theirs = alternate(workers, request, arguments.rounds, arguments.budget)
            print(line(Case(f"{side} px{note}", request, ours, theirs, None).cells()), flush=True)


# -- quality ---------------------------------------------------------------------------------------------------------


class Views(NamedTuple):
    """Heads from several cameras, on white."""

    image: Tensor
    """(B, V, 3, H, W)."""
    depth: Tensor
    """(B, V, 1, H, W)."""
    mask: Tensor
    """(B, V, 1, H, W)."""
    camera: Camera
    """V cameras."""


def draw(heads: int, yaws_deg: tuple[int, ...], size: int) -> Views:
    """The first heads of the test split."""
    camera = RIG.camera(torch.tensor([math.radians(yaw) for yaw in yaws_deg]))
    scene = Scene.from_z(subject_z(SPLITS["test"][:heads])).repeat_interleave(len(camera))
    truth = render(scene, Camera.cat([camera] * heads), size)
    white = truth.image * truth.mask + 1 - truth.mask
    image, depth, mask = (x.unflatten(0, (heads, -1)) for x in (white, truth.depth, truth.mask))
    return Views(image, depth, mask, camera)


def shrunk(camera: Camera) -> Camera:
    """In GRAM's units."""
    pose = camera.cam2world.clone()
    pose[:, :3, 3] /= UNIT
    return Camera(pose, camera.intrinsics)


def small_efficient(size: int) -> ManifoldGenerator:
    """No background, light."""
    return ManifoldGenerator(
        32, field="triplane", backbone="stylegan2", resolution=size, w_dim=64, channels=[64, 64, 48, 32, 24], start=4,
        mapping_layers=2, mapping_hidden=64, background="none", levels=LEVELS, thickness=0.04,
        predictor={"hidden": 32, **SPHERES, "activation": "relu"}, bake_predictor=False, samples=64,
        triplane={"features": 16, "hidden": 32, "extent": HALF, "density_scale": 1.0, "density_bias": 0.0}, rig=SCALED,
    )  # fmt: skip


def small_gram(size: int) -> GRAMGenerator:
    """The same without a background; its manifolds are fitted to the spheres that the other one begins with."""
    generator = GRAMGenerator(
        32, resolution=size, width=64, layers=5, mapping_width=64, predictor_width=32, background=False,
        white_back=True, manifolds=23, near=NEAR, far=FAR, rig=SCALED,
    )  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    points = (torch.rand(20_000, 3, generator=draws) * 2 - 1) * HALF
    values = (points - torch.tensor(SPHERES["centre"])).norm(dim=-1) * (10 / HALF)
    with torch.enable_grad():
        error = fit_predictor(generator.predictor, points, values, steps=300, generator=draws)  # type: ignore[arg-type]
    print(f"GRAM's manifolds differ from the spheres by {error * HALF / 10 / (LEVELS[0] - LEVELS[1]):.2f} spacings")
    return generator


def fit(generator: Generator, views: Views, seconds: float, lr: float, size: int) -> int:
    """Regress known codes to all views by the reconstruction term of ``prior``; returns the number of steps."""
    stage = PriorStage(generator)
    generator.predictor.requires_grad_(False)  # type: ignore[union-attr]
    parameters = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.9, 0.99))
    draws, steps, begin = torch.Generator().manual_seed(1), 0, time.process_time()
    z = codes(generator, len(views.image))
    while (spent := time.process_time() - begin) < seconds:
        optimizer.param_groups[0]["lr"] = lr * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * spent / seconds)))
        head = int(torch.randint(len(z), (1,), generator=draws))
        pick = torch.randperm(len(views.camera), generator=draws)[:2]
        fake = generator.synthesis(generator.mapping(z[head, None]), shrunk(views.camera[pick]), resolution=size)
        loss = stage.reconstruction(fake, {"image": views.image[head, None, pick]})["reconstruction"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        steps += 1
    return steps


def codes(generator: Generator, heads: int) -> Tensor:
    """One z a head."""
    return generator.sample_z(heads, torch.Generator().manual_seed(2))


def consistency(image: Tensor, views: Views, head: int) -> float:
    """PSNR of the middle view, carried to all others along the true depth, where both show the head."""
    middle = len(views.camera) // 2
    found, shared = carried(image, views.camera, views.depth[head], views.mask[head], middle)
    others = torch.arange(len(image)) != middle
    return float(psnr(found[others], image[others], shared[others].float()).mean())


@torch.no_grad()
def score(generator: Generator | None, trained: Views, held_out: Views, size: int) -> list[str]:
    """PSNR at the fitted and the held-out views, on the head, and consistency; of the truth itself without one."""
    cells: list[str] = []
    for views in (trained, held_out):
        pictures = views.image
        if generator is not None:
            latents = generator.mapping(codes(generator, len(views.image)))
            count = len(views.camera)
            cameras = shrunk(Camera.cat([views.camera] * len(latents)))
            found = generator.synthesis(latents, cameras, resolution=size).image.clamp(-1, 1)
            pictures = found.unflatten(0, (-1, count))
        errors = psnr(pictures.flatten(0, 1), views.image.flatten(0, 1), views.mask.flatten(0, 1))
        cells.append("" if generator is None else f"{errors.mean():.1f}")
    mean = sum(consistency(image, held_out, head) for head, image in enumerate(pictures)) / len(pictures)
    return [*cells, f"{mean:.1f}"]


def quality(arguments: argparse.Namespace) -> None:
    """Print the table of fits."""
    trained, held_out = (draw(arguments.heads, yaws, arguments.size) for yaws in (TRAINED_DEG, HELD_OUT_DEG))
    rows = [["truth", "", "", *score(None, trained, held_out, arguments.size)]]
    for name, make, lr in (("efficient GRAM", small_efficient, 5e-3), ("GRAM", small_gram, 5e-4)):
        torch.manual_seed(0)
        generator = make(arguments.size)
        steps = fit(generator.train(), trained, arguments.seconds, lr, arguments.size)
        count = sum(p.numel() for p in generator.parameters())
        rows.append([name, f"{count:,}", f"{steps}", *score(generator.eval(), trained, held_out, arguments.size)])
    print(f"\n{arguments.heads} heads at {arguments.size} px, {arguments.seconds:.0f} s of CPU time each; dB\n")
    columns = ["", "parameters", "steps", "fitted views", "held-out views", "carried along the true depth"]
    print(line(columns), line(["---"] * len(columns)), *(line(row) for row in rows), sep="\n", flush=True)


def main(arguments: argparse.Namespace) -> None:
    """Measure, and print tables in Markdown."""
    torch.set_num_threads(1)
    if arguments.rounds:
        costs(arguments)
    if arguments.seconds:
        quality(arguments)
