"""L_geo: the shape of predicted codes against that of the true ones, at points (E3DGE, Eq. 4-6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.batches import SampleBatch
from models.checks import check_not_negative
from models.errors import UserError, shown
from models.generators.base import RadianceGenerator
from models.generators.geometry import Form, field_geometry, field_values, form_of
from models.latents import Latents

TARGETS = ("zero", "sample")


def point_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the points that count: (B, P, C) and a mask (B, P, 1) -> (B,); 0 where none does."""
    mask = mask.to(values.dtype)
    return (values.mean(-1, keepdim=True) * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)


def absolute(difference: Tensor, smooth: bool) -> Tensor:
    """|x|, or with ``smooth`` x^2 / 2 up to 1 and |x| - 1/2 beyond, element by element."""
    size = difference.abs()
    return torch.where(size < 1, difference.square() / 2, size - 0.5) if smooth else size


def surface_loss(value: Tensor, target: Tensor, mask: Tensor, smooth: bool = False) -> Tensor:
    """Mean of |d^_i - d_i| (Eq. 4's first term, Eq. 5): values (B, P, 1) twice, mask (B, P, 1) -> (B,)."""
    return point_mean(absolute(value - target, smooth), mask)


def normal_loss(normals: Tensor, target: Tensor, mask: Tensor, smooth: bool = False) -> Tensor:
    """Mean of |n^_i - n_i|_1 (Eq. 4's second term), the sum over the three axes: (B, P, 3) twice -> (B,).

    With ``smooth`` it is the mean over the axes, as PyTorch's smooth L1 takes it.
    """
    each = absolute(normals - target, smooth)
    return point_mean(each if smooth else each.sum(-1, keepdim=True), mask)


def eikonal_loss(slope: Tensor, mask: Tensor) -> Tensor:
    """Mean of (|grad d^| - 1)^2, which is 0 of a true distance: lengths (B, P, 1), mask (B, P, 1) -> (B,)."""
    return point_mean((slope - 1).square(), mask)


@dataclass(frozen=True)
class GeometryLoss:
    """L_geo = surface |d^| + normal |n^ - n|_1 on P_O, + space |d^ - d| + eikonal (|grad d^| - 1)^2 on P_F (Eq. 4-6).

    The paper leaves the weights open; these are the released code's, and so is the eikonal term. Of a field that is no
    distance the surface is nowhere at 0 and a slope of 1 means nothing: its surface term takes the sample's own values,
    and there is no eikonal term.

    Attributes:
        surface, normal, space, eikonal: weights; a term of weight 0 is not computed.
        smooth: smooth L1, as the released code, of normals the mean over the axes; otherwise L1, as the paper.
        target: of a distance on P_O: "zero" (the paper), or "sample", what the true codes have there. Points of
            expected depth are not exactly on the surface: "zero" has a bias as large as the generator's blur.
    """

    surface: float = 1.0
    normal: float = 1.0
    space: float = 0.2
    eikonal: float = 0.1
    smooth: bool = True
    target: Literal["zero", "sample"] = "zero"

    def __post_init__(self) -> None:
        check_not_negative(self, "surface", "normal", "space", "eikonal", where="geometry.")
        if self.target not in TARGETS:
            raise UserError(f"geometry.target is {shown(self.target)}: take one of {', '.join(TARGETS)}")

    def __call__(self, generator: RadianceGenerator, ws: Latents, batch: SampleBatch) -> dict[str, Tensor]:
        """Compare the shapes of predicted codes with those of samples, in fp32.

        Args:
            generator: of the samples.
            ws: B * V codes, one a picture.
            batch: of B samples, V pictures of each.

        Returns:
            the terms by name (B * V,), and their weighted sum as ``geometry``; without a graph where gradients are off.
        """
        form = form_of(generator)
        with torch.autocast(batch["image"].device.type, enabled=False):
            # Half precision comes out of encoders under autocast.
            ws = ws.map(lambda t: t.to(torch.promote_types(t.dtype, torch.float32)))
            terms = self._on_surface(generator, form, ws, batch) | self._in_space(generator, form, ws, batch)
        none = batch["image"].new_zeros(len(ws))
        return {**terms, "geometry": sum((getattr(self, name) * value for name, value in terms.items()), none)}

    def _on_surface(
        self, generator: RadianceGenerator, form: Form, ws: Latents, batch: SampleBatch
    ) -> dict[str, Tensor]:
        if not (self.surface or self.normal):
            return {}
        points, mask = batch["surface"].flatten(0, 1), batch["surface_mask"].flatten(0, 1)
        terms: dict[str, Tensor] = {}
        if self.normal:
            found = field_geometry(generator, ws, points, form=form, create_graph=torch.is_grad_enabled())
            value = found.value
            terms["normal"] = normal_loss(found.normals, batch["surface_normals"].flatten(0, 1), mask, self.smooth)
        else:
            value = field_values(generator, ws, points, form)
        if self.surface:
            target = batch["surface_value"].flatten(0, 1)
            if form == "sdf" and self.target == "zero":
                target = torch.zeros_like(target)  # d_i = 0 for points over the surface
            terms["surface"] = surface_loss(value, target, mask, self.smooth)
        return terms

    def _in_space(self, generator: RadianceGenerator, form: Form, ws: Latents, batch: SampleBatch) -> dict[str, Tensor]:
        eikonal = self.eikonal > 0 and form == "sdf"
        if not (self.space or eikonal):
            return {}
        points, mask = batch["space"].flatten(0, 1), batch["space_mask"].flatten(0, 1)
        terms: dict[str, Tensor] = {}
        if eikonal:
            found = field_geometry(generator, ws, points, form=form, create_graph=torch.is_grad_enabled())
            value = found.value
            terms["eikonal"] = eikonal_loss(found.slope, mask)
        else:
            value = field_values(generator, ws, points, form)
        if self.space:
            terms["space"] = surface_loss(value, batch["space_value"].flatten(0, 1), mask, self.smooth)
        return terms
