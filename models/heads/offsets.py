"""Offsets of single heads: where a direction changes more than is wanted, each head's own way beside it.

Source: 3D cartoon faces (Wang et al.), Sec. III-C: dw starts at alpha n, and codes move to w + dw and w - dw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Adam

from models.checks import check_positive
from models.errors import UserError
from models.latents import Latents
from models.schedule import projector_rate


@dataclass(frozen=True)
class OffsetSearch:
    """How offsets are looked for, from a direction on. The defaults are the paper's, but for the trust region.

    Attributes:
        strength: of the direction that it starts from, which gives alpha: 1 is the end of the useful range.
        steps: of Adam.
        learning_rate: in the codes' own units. The rate of step i is StyleGAN2's projector's at (i + 1) / steps: it is
            full for the first three quarters, and 0 at the last step.
        betas: of Adam.
        trust: how long an offset may become, relative to alpha n, in each group of codes; null lets it go.
        id_on: whose pictures the loss sees: of the generator that directions are of (photo_render), whose faces
            recognition knows, or of the styled one (direct).
    """

    strength: float = 1.0
    steps: int = 10
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    trust: float | None = 1.5
    id_on: Literal["photo_render", "direct"] = "photo_render"

    def __post_init__(self) -> None:
        check_positive(self, "strength", "steps", "learning_rate", "trust", where="offsets.")

    def fit(
        self, ws: Latents, start: Mapping[str, Tensor], losses: Callable[[Latents], Mapping[str, Tensor]]
    ) -> tuple[Latents, dict[str, Tensor]]:
        """Offsets of heads, side by side: each is what it would be alone.

        Layers that move alike at the start keep moving alike, so that there is one offset in W (Eq. 7); layers that do
        not move never do.

        Args:
            ws: (B, n, w) codes of each group.
            start: alpha n by group, (rows, w) of n rows or of one for all.
            losses: of moved codes: ``loss`` (B,), which is minimised, and its terms. Of B heads one by one.

        Returns:
            the offsets (B, n, w) of each group, without a gradient; and each term's course (steps, B), before each
            step.

        Raises:
            UserError: when nothing moves, or a loss is not finite.
        """
        moved = {name: _Moved(offset, ws.groups[name]) for name, offset in start.items() if bool(offset.any())}
        if not moved:
            raise UserError("an offset starts along a direction: this one moves no code")
        optimizer = Adam([part.free for part in moved.values()], self.learning_rate, self.betas)
        curves: dict[str, list[Tensor]] = {}
        with torch.enable_grad():
            for step in range(self.steps):
                optimizer.param_groups[0]["lr"] = self.learning_rate * projector_rate((step + 1) / self.steps)
                terms = losses(_added(ws, {name: part.offset for name, part in moved.items()}))
                for name, values in terms.items():
                    curves.setdefault(name, []).append(values.detach().float())
                if not bool(terms["loss"].isfinite().all()):
                    raise UserError(f"offsets: the loss is not finite at step {step}: lower offsets.learning_rate")
                optimizer.zero_grad(set_to_none=True)
                terms["loss"].sum().backward(inputs=optimizer.param_groups[0]["params"])
                optimizer.step()
                if self.trust is not None:
                    for part in moved.values():
                        part.hold(self.trust)
        nothing = ws.map(torch.zeros_like)
        found = _added(nothing, {name: part.offset.detach() for name, part in moved.items()})
        return found, {name: torch.stack(values) for name, values in curves.items()}


class _Moved:
    """What moves in one group of codes.

    Attributes:
        free: (B, 1 or rows, w), what is optimised.
    """

    def __init__(self, start: Tensor, codes: Tensor) -> None:
        start = start.detach().to(codes)
        self.moves = (start != 0).any(1).to(codes)[:, None]  # (rows, 1)
        rows = start[self.moves[:, 0] > 0]
        alike = bool((rows == rows[:1]).all())
        self.free = (rows[:1] if alike else start).expand(len(codes), -1, -1).clone().requires_grad_()
        self.length = float(start.norm())

    @property
    def offset(self) -> Tensor:
        """(B, rows, w)."""
        return self.free * self.moves

    @torch.no_grad()
    def hold(self, trust: float) -> None:
        """Shorten offsets that are longer than ``trust`` times the start."""
        length = self.offset.flatten(1).norm(dim=1)[:, None, None]
        self.free *= (trust * self.length / length.clamp_min(1e-12)).clamp_max(1)


def _added(ws: Latents, offsets: Mapping[str, Tensor]) -> Latents:
    """Codes with offsets added in some groups."""
    return Latents({name: codes + offsets[name] if name in offsets else codes for name, codes in ws.groups.items()})
