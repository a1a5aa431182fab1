"""The shape that a radiance field tells: a value at any point, and how it changes there.

A signed distance says where the surface is; density and occupancy only where a ray is stopped, which is compared all
the same (E3DGE, Sec. 4.1: "our method is not limited to the SDF-based shape representation").

Source: E3DGE (Lan et al., 2023), Eq. 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.generators.base import RadianceGenerator
from models.generators.stylesdf import StyleSDF
from models.latents import Latents
from models.rendering.compositing import density_alpha, field_gradient
from models.rendering.output import FieldSample

Form = Literal["sdf", "density", "occupancy"]

STEPS = 64  # into which a depth range is cut: the length of a step, for opacities and differences
AT_ONCE = 2**18  # points of all rows that are asked together where no graph is kept


@dataclass(frozen=True)
class FieldGeometry:
    """A field at points (B, P, 3).

    Attributes:
        value: (B, P, 1): signed distance, world units, negative inside; or the opacity of a step, in [0, 1].
        gradient: (B, P, 3) of the value on world axes, 1 / world unit; of a true distance its length is 1.
        form: what the value is.
    """

    value: Tensor
    gradient: Tensor
    form: Form

    @property
    def normals(self) -> Tensor:
        """(B, P, 3) unit, outward: along a distance's gradient, against an opacity's; 0 where the field is flat."""
        return F.normalize(self.gradient if self.form == "sdf" else -self.gradient, dim=-1)

    @property
    def slope(self) -> Tensor:
        """(B, P, 1) length of the gradient, differentiable at 0 too."""
        return self.gradient.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()


def step_length(generator: RadianceGenerator) -> float:
    """Length of a step through the generator's scene, world units: ``STEPS`` from near to far."""
    return (generator.rig.far - generator.rig.near) / STEPS


@torch.no_grad()
def form_of(generator: RadianceGenerator) -> Form:
    """What the generator's field is; of one that answers in several ways the one that says most.

    Raises:
        ValueError: when it answers in none.
    """
    if isinstance(generator, StyleSDF):
        return "density" if generator.beta is None else "sdf"
    mean = generator.mean_latents
    points = next(iter(mean.groups.values())).new_tensor(generator.rig.pivot)[None, None]
    return _form(generator.decode(generator.features(mean, points)))


def _form(sample: FieldSample) -> Form:
    for form in ("sdf", "occupancy", "density"):
        if getattr(sample, form) is not None:
            return form
    raise ValueError("the field has neither a signed distance, nor an occupancy, nor a density")


def field_values(generator: RadianceGenerator, ws: Latents, points: Tensor, form: Form | None = None) -> Tensor:
    """The field at world points (B, P, 3), a row for each code: (B, P, 1), see :class:`FieldGeometry`.

    A density becomes the opacity of a step, 1 - exp(-sigma * :func:`step_length`): in dense matter differences of
    densities say nothing.

    Where no graph is kept, points are asked for in parts.

    Args:
        form: of the generator, where it is known.
    """
    form = form or form_of(generator)
    if not torch.is_grad_enabled() and len(parts := _parts(points)) > 1:
        return torch.cat([field_values(generator, ws, part, form) for part in parts], 1)
    if form == "sdf" and isinstance(generator, StyleSDF):
        return generator.surface(ws, points)  # without the colours
    sample = generator.decode(generator.features(ws, points))
    if form == "density":
        assert sample.density is not None
        length = sample.density.new_tensor(step_length(generator))
        return density_alpha(sample.density, length)
    value = sample.sdf if form == "sdf" else sample.occupancy
    assert value is not None
    return value


def field_geometry(
    generator: RadianceGenerator, ws: Latents, points: Tensor, *, form: Form | None = None, create_graph: bool = False
) -> FieldGeometry:
    """Value and gradient of the field at world points (B, P, 3), in fp32 or more (Eq. 1).

    The gradient of a distance is exact. That of an opacity is the difference over a step to each side: such fields are
    looked up in painted maps, whose own gradient jumps from texel to texel, and PyTorch differentiates it once only.

    Args:
        form: of the generator, where it is known.
        create_graph: keep both differentiable with respect to codes and weights; otherwise they are detached.
    """
    form = form or form_of(generator)
    ask: Callable[[Tensor], tuple[Tensor, Tensor]]
    if form == "sdf":
        ask = lambda part: field_gradient(  # noqa: E731
            lambda p: field_values(generator, ws, p, form), part, create_graph=create_graph
        )
    else:
        ask = lambda part: _differences(generator, ws, part, form)  # noqa: E731
    with torch.autocast(points.device.type, enabled=False):
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        if create_graph:
            return FieldGeometry(*ask(points), form)
        with torch.no_grad():  # field_gradient enables what it needs
            parts = [ask(part) for part in _parts(points)]
    value, gradient = (torch.cat(part, 1).detach() for part in zip(*parts, strict=True))
    return FieldGeometry(value, gradient, form)


def _parts(points: Tensor) -> tuple[Tensor, ...]:
    """Points (B, P, 3), cut along P."""
    return points.split(max(AT_ONCE // len(points), 1), 1)


def _differences(generator: RadianceGenerator, ws: Latents, points: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """The value at points (B, P, 3), and central differences over half a step to each side."""
    half = step_length(generator) / 2
    offsets = half * torch.cat([points.new_zeros(1, 3), torch.eye(3).to(points), -torch.eye(3).to(points)])
    around = points[:, None] + offsets[:, None]  # (B, 7, P, 3): one painting serves all
    found = field_values(generator, ws, around.flatten(1, 2), form).unflatten(1, (7, -1))
    value, ahead, behind = found[:, 0], found[:, 1:4], found[:, 4:]
    return value, ((ahead - behind) / (2 * half))[..., 0].mT
