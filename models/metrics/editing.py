"""Edited portraits against true edited renders (E3DGE, Sec. 4.3: detail is kept, and leaves no ghosts).

Where the world is known, so is what an edit should give: the same head with another expression, from any camera. The
edit must bring about the true change where there is one, and change nothing elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.checks import check_not_negative, check_positive
from models.errors import UserError, shown
from models.features.base import move_frozen
from models.metrics.e3dge import FEW, SPREAD, PortraitNetworks, Scores, check_sizes, exactly, mae, picture, trajectory
from models.metrics.image import (
    change_correlation,
    high_frequency,
    high_pass,
    masked_distance,
    masked_mean,
    psnr,
)
from models.metrics.inversion import Renderer, Truth

PROTOCOL = "e3dge-editing"
_ALIKE = 0.999  # squared correlation of two pictures whose parts in a third cannot be told apart


def change_size(
    before: Tensor, after: Tensor, truth_before: Tensor, truth_after: Tensor, mask: Tensor | None = None
) -> Tensor:
    """How much of the true change there is: (B,); 1 = all, 0 = none, NaN where nothing truly changes.

    The factor of the true change that is nearest to the found one, in the least-squares sense.
    """
    change, wanted = after - before, truth_after - truth_before
    return masked_mean(change * wanted, mask) / masked_mean(wanted.square(), mask)


def ghosts(
    after: Tensor, truth_before: Tensor, truth_after: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How much of the fine detail from before and after an edit is in an edited picture: (B,) each.

    The factors of the least-squares fit of the picture's high frequencies by those of the true pictures before and
    after: (0, 1) for the truth, (1, 0) where nothing was edited, (.5, .5) for a double exposure. NaN where the two true
    pictures do not differ in them.
    """
    found, old, new = high_pass(after), high_pass(truth_before), high_pass(truth_after)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return masked_mean((a * b).double(), mask)

    oo, on, nn = product(old, old), product(old, new), product(new, new)
    fo, fn = product(found, old), product(found, new)
    determinant = oo * nn - on * on
    determinant = torch.where(determinant > (1 - _ALIKE) * oo * nn, determinant, torch.nan)
    return (fo * nn - fn * on) / determinant, (fn * oo - fo * on) / determinant


@dataclass(frozen=True)
class TraitEdit:
    """One edit that a test makes, of heads along a direction and of the truth along a trait's number in the code.

    Attributes:
        deviations: how far, in standard deviations: of sampled codes along the direction, and of the trait's number.
        trait: its name in the data; null where it is the direction's own.
    """

    deviations: float
    trait: str | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.deviations, int | float) and not isinstance(self.deviations, bool)
        if not number or not math.isfinite(self.deviations) or self.deviations == 0:
            raise UserError(f"protocol.edits: deviations is {shown(self.deviations)}, it must be a number other than 0")


class EditProtocol(PortraitNetworks):
    """Measures edited portraits one by one.

    Args:
        perceptual, identity: networks; second_identity: one that no method was trained with, measured as ``id2``.
        frames: novel views, of E3DGE's trajectory; spread: how far it goes, in standard deviations.
        still: the largest difference of the true pictures, on the scale [-1, 1], where nothing changed.
        margin: pixels around the true change that count as changed.
        edits: what a test of a stage edits, by the names of its directions; all of them are made of every head.
    """

    def __init__(
        self,
        perceptual: torch.nn.Module,
        identity: torch.nn.Module,
        second_identity: torch.nn.Module | None = None,
        frames: int = 8,
        spread: float = SPREAD,
        still: float = 0.04,
        margin: int = 2,
        edits: Mapping[str, TraitEdit] | None = None,
    ) -> None:
        super().__init__(perceptual, identity, second_identity)
        self.edits = dict(edits or {})
        self.frames, self.spread, self.still, self.margin = frames, spread, still, margin
        check_positive(self, "frames", "spread", where="protocol.")
        check_not_negative(self, "still", "margin", where="protocol.")

    @torch.no_grad()
    def __call__(
        self,
        name: str,
        image: Tensor,
        camera: Camera,
        rig: Rig,
        plain: Renderer,
        edited: Renderer,
        truth: Truth,
        edited_truth: Truth,
    ) -> Scores:
        """Measure one item's edit.

        Args:
            name: of the item; nothing is drawn here, so it changes no value.
            image: (1, 3, H, W) in [-1, 1]; camera: its own.
            rig: of the generator: of its trajectory.
            plain: the inverted head. edited: the same with the edited code.
            truth, edited_truth: the true head as it is, and as it should become.

        Returns:
            values of the source view and, with "_nv", means over novel views.

        Raises:
            UserError: when renderings and pictures are of different sizes.
        """
        move_frozen(self, image.device)
        values: dict[tuple[str, str], float] = {}
        rows: list[Tensor] = []
        around = trajectory(rig, self.frames, self.spread).to(image.device)
        for suffix, views in (("", camera), ("_nv", around)):
            before, after = picture(plain(views)), picture(edited(views))
            old, new = truth(views), edited_truth(views)
            check_sizes(after, new.image)
            with exactly(image):
                head = (old.mask > 0.5) & (new.mask > 0.5)
                scores = self._scores(before, after, old.image, new.image, head)
                scores |= self.alike(after, new.image)
                scores |= self.alike(after, image.expand_as(after), "_input")
            for metric, value in scores.items():
                metric, at, place = metric.partition("@")
                values["", f"{metric}{suffix}{at}{place}"] = float(value.double().nanmean())
            rows.append(torch.cat([torch.cat(list(row), 2) for row in (old.image, new.image, before, after)], 1))
        return Scores(values, {"edit": torch.cat(rows, 2).clamp(-1, 1)})

    def _scores(self, before: Tensor, after: Tensor, old: Tensor, new: Tensor, head: Tensor) -> dict[str, Tensor]:
        """By part of the picture, (B,) each; NaN where a part has too few pixels."""
        changed = ((new - old).abs().amax(1, keepdim=True) > self.still).float()
        near = F.max_pool2d(changed, 2 * self.margin + 1, 1, self.margin)
        kept = (head & (near < 0.5)).float()
        ghost, fresh = ghosts(after, old, new, near)
        scores = {
            "changed": masked_mean(changed, head.float()),
            "expression": change_correlation(before, after, old, new),
            "expression_size": change_size(before, after, old, new),
            # What the edit itself does where it should do nothing, whatever the inversion missed.
            "drift@kept": mae(after, before, kept),
            "ghost@changed": ghost.float(),
            "fresh@changed": fresh.float(),
        }
        for place, mask in (("kept", kept), ("changed", near)):
            scores |= {
                f"mae@{place}": mae(after, new, mask),
                f"psnr@{place}": psnr(after, new, mask),
                f"lpips@{place}": masked_distance(self.perceptual.module, after, new, mask),
                f"detail@{place}": high_frequency(after, mask=mask) / high_frequency(new, mask=mask),
            }
        telling = {"kept": kept.flatten(1).sum(1) >= FEW, "changed": changed.flatten(1).sum(1) >= FEW}
        return {
            metric: torch.where(telling[place], value, torch.nan) if place else value
            for metric, value in scores.items()
            for place in (metric.partition("@")[2],)
        }
