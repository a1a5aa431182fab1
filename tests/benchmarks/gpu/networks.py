"""Speed and memory of the generators on a GPU: every family at full size, and heads seen from baked manifolds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from callbacks.compiler import compile_module
from models import artifact
from models.generators.anifacegan import AniFaceGANGenerator
from models.generators.base import Generator
from models.generators.eg3d import EG3DGenerator
from models.generators.gram import GRAMGenerator
from models.generators.manifold import ManifoldGenerator
from models.generators.stylegan2 import StyleGAN2Generator, stylegan2_channels
from models.generators.stylesdf import StyleSDF
from tests.benchmarks.free_view import configured
from tests.benchmarks.gpu.parts import Case, Row, Setting, forget_peak, peak_mib, synchronize
from tests.benchmarks.house import seconds
from tests.benchmarks.official import TURN
from tests.stages import tiny

BATCHES = (1, 8)
REPEATS = 7
_SMALL_GRAM = {
    "resolution": 16, "width": 8, "layers": 2, "mapping_width": 8, "predictor_width": 16, "manifolds": 4, "samples": 16,
}  # fmt: skip


class Family(NamedTuple):
    """One row of the table.

    Attributes:
        full, small: make the network at its size, and at a toy size.
        resolution: of its pictures, where it is not the native one.
    """

    full: Callable[[], Generator]
    small: Callable[[], Generator]
    resolution: int | None = None


def embedded() -> Generator:
    """The shipped prior."""
    return artifact.load("assets/prior").module("generator")  # type: ignore[return-value]


def small_manifolds() -> Generator:
    """As the tests' own prior."""
    return ManifoldGenerator(**tiny.OPTIONS)  # type: ignore[arg-type]


def small_eg3d() -> Generator:
    """16 rays a side, enlarged to 32 px."""
    return EG3DGenerator(
        z_dim=8, w_dim=8, channels=(6, 4), plane_features=4, decoder={"hidden": 6}, coarse=8, fine=8,
        render_resolution=16, superresolution={"channels": (6, 4), "resolution": 32},
    )  # fmt: skip


def small_stylesdf() -> Generator:
    """8 rays a side, enlarged to 16 px."""
    decoder = {"channels": (8, 4), "w_dim": 10, "mapping_layers": 2}
    return StyleSDF(z_dim=6, width=8, depth=2, raw_resolution=8, samples=8, decoder=decoder)


FAMILIES = {
    "StyleGAN2, 1024 px": Family(
        partial(StyleGAN2Generator, stylegan2_channels(1024)),
        partial(StyleGAN2Generator, (8, 8), style_dim=8, mapping_layers=2),
    ),
    "EG3D, 512 px from 128": Family(EG3DGenerator, small_eg3d),
    "StyleSDF, 256 px from 64": Family(partial(StyleSDF, decoder={"channels": (512, 256, 128)}), small_stylesdf),
    "GRAM, 256 px": Family(GRAMGenerator, partial(GRAMGenerator, z_dim=8, **_SMALL_GRAM)),
    "efficient GRAM, 256 px": Family(partial(configured, "prior", "generator"), small_manifolds),
    "AniFaceGAN, 256 px": Family(
        AniFaceGANGenerator,
        partial(AniFaceGANGenerator, identity=4, expression=3, noise=4, latent=4, vae_width=8, **_SMALL_GRAM),
    ),
    "embedded prior, 64 px": Family(embedded, small_manifolds, 64),
    "embedded prior, 256 px": Family(embedded, small_manifolds, 256),
}
COMPILED = {
    "StyleGAN2, 1024 px": ("backbone",),
    "EG3D, 512 px from 128": ("backbone", "superresolution"),
    "efficient GRAM, 256 px": ("backbone",),
}
"""By family the parts that ``--compile`` takes and that cost time; as far as time goes, in this order. Not the fields
of GRAM: each camera meets another number of points, for which all would be compiled anew."""


def speed(setting: Setting) -> Iterator[Case]:
    """Milliseconds a picture, from z to RGB: fp32 without TF32, bf16 under autocast, and compiled under autocast."""
    for name, family in FAMILIES.items():
        run = Drawing(family, setting)
        for precision, batch in itertools.product(("fp32", "bf16"), BATCHES):
            yield Case(f"{name}, {precision}, batch {batch}", partial(run, precision, batch), 2)
    for name, parts in ({"StyleGAN2, 1024 px": ("map_network",)} if setting.small else COMPILED).items():
        run = Drawing(FAMILIES[name], setting, parts)
        for batch in BATCHES[::-1]:
            yield Case(f"{name}, bf16 compiled, batch {batch}", partial(run, "bf16", batch), 20)


class Drawing:
    """Pictures of one family's network, which is made when it is first asked for.

    Attributes:
        compiled: names of its parts that are; R1 and path length, which differentiate twice, cannot be.
    """

    def __init__(self, family: Family, setting: Setting, compiled: tuple[str, ...] = ()) -> None:
        self.family, self.setting, self.compiled = family, setting, compiled
        self.generator: Generator | None = None
        self.passes = itertools.count()

    def __call__(self, precision: str, batch: int) -> Row:
        device = self.setting.device
        forget_peak(device)
        if self.generator is None:
            self.generator = self._make().to(device).eval().requires_grad_(False)
        first = seconds_once(lambda: self._draw(precision, batch), device)
        if plain := [name for name in self.compiled if self._part(name)._compiled_call_impl is None]:
            return {"skipped": f"{', '.join(plain)} cannot be compiled as one graph; the part's log says why"}
        repeats = 1 if self.setting.small else REPEATS
        took = seconds(lambda: (self._draw(precision, batch), synchronize(device)), repeats)
        found = {"ms_a_picture": 1000 * took / batch, "peak_mib": peak_mib(device)}
        return {**found, "first_call_s": first} if self.compiled else found

    def _make(self) -> Generator:
        torch.manual_seed(0)
        generator = self.family.small() if self.setting.small else self.family.full()
        for name in self.compiled:
            compile_module(generator.get_submodule(name), name)
        return generator

    def _part(self, name: str) -> Any:
        assert self.generator is not None
        return self.generator.get_submodule(name)

    @torch.no_grad()
    def _draw(self, precision: str, batch: int) -> None:
        """From a camera a little farther round than the last: some remember the surfaces of cameras they know."""
        generator, device = self.generator, self.setting.device
        assert generator is not None
        z = generator.sample_z(batch, torch.Generator().manual_seed(0)).to(device)
        camera = None
        if generator.is_3d:
            camera = generator.rig.camera(torch.full((batch,), TURN * next(self.passes))).to(device)
        options = {"resolution": self.family.resolution} if self.family.resolution and not self.setting.small else {}
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            generator(z, camera, **options)


def seconds_once(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, the first."""
    return seconds(lambda: (function(), synchronize(device)), 1, warm=False)


def free_view(setting: Setting) -> Iterator[Case]:
    """Frames a second of one head, one new camera a frame: by its networks, and from baked manifolds."""
    sides = (16, 32) if setting.small else (256, 512)
    heads = {"embedded prior": embedded, "efficient GRAM": partial(configured, "prior", "generator")}
    for name, make in heads.items():
        for side in sides:
            view = FreeView(small_manifolds if setting.small else make, setting, side)
            yield Case(f"{name}, {side} px, synthesis", view.synthesis, 1.5)
            yield Case(f"{name}, {side} px, cached", view.cached, 2)


class FreeView:
    """One head at one size."""

    def __init__(self, make: Callable[[], Any], setting: Setting, side: int) -> None:
        self.make, self.setting, self.side = make, setting, side
        self.generator: Any = None
        self.passes = itertools.count()

    def _open(self) -> Any:
        """The generator, with an opaque head: what is transparent throughout would be too easy."""
        if self.generator is None:
            torch.manual_seed(0)
            self.generator = self.make().to(self.setting.device).eval().requires_grad_(False)
            if getattr(self.generator, "planes", None) is not None:
                self.generator.planes.out.bias[3] = 40.0
        return self.generator

    def _camera(self) -> Any:
        rig = self.generator.rig
        return rig.camera(rig.yaw_mean + TURN * next(self.passes)).to(self.setting.device)

    def _frames(self, show: Callable[[], object]) -> Row:
        device, repeats = self.setting.device, 1 if self.setting.small else 3 * REPEATS
        took = seconds(lambda: (show(), synchronize(device)), repeats)
        return {"frames_a_second": 1 / took, "peak_mib": peak_mib(device)}

    @torch.no_grad()
    def synthesis(self) -> Row:
        """With codes that are known."""
        forget_peak(self.setting.device)
        generator = self._open()
        ws = generator.mean_latents
        return self._frames(lambda: generator.synthesis(ws, self._camera(), resolution=self.side))

    @torch.no_grad()
    def cached(self) -> Row:
        """Once the head is baked, with how long that takes."""
        device = self.setting.device
        forget_peak(device)
        generator = self._open()
        baking = seconds_once(lambda: setattr(self, "head", generator.bake(generator.mean_latents, self.side)), device)
        head = self.head  # type: ignore[attr-defined]
        return {**self._frames(lambda: head.show(self._camera(), self.side)), "baking_s": baking}
