"""Style codes in ordered named groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """Ordered named groups of style codes.

    Attributes:
        groups: name -> (B, num_ws, w_dim). Most generators have one group, "ws".
    """

    groups: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.groups.values())))

    def __getitem__(self, index: int | slice | Tensor) -> Latents:
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        return self.map(lambda t: t[index])

    @property
    def ws(self) -> Tensor:
        """(B, num_ws, w_dim) of a generator with a single group.

        Raises:
            ValueError: when there are several groups.
        """
        if len(self.groups) != 1:
            raise ValueError(f"these latents have the groups {list(self.groups)}; name one")
        return next(iter(self.groups.values()))

    def map(self, function: Callable[[Tensor], Tensor]) -> Latents:
        """Apply a function to every group."""
        return Latents({name: function(t) for name, t in self.groups.items()})

    def _zip(self, other: Latents, function: Callable[[Tensor, Tensor], Tensor]) -> Latents:
        if self.groups.keys() != other.groups.keys():
            raise ValueError(f"latent groups differ: {list(self.groups)} and {list(other.groups)}")
        return Latents({name: function(t, other.groups[name]) for name, t in self.groups.items()})

    def __add__(self, other: Latents) -> Latents:
        return self._zip(other, lambda a, b: a + b)

    def __sub__(self, other: Latents) -> Latents:
        return self._zip(other, lambda a, b: a - b)

    @staticmethod
    def cat(parts: Sequence[Latents], dim: int = 0) -> Latents:
        """The codes of all parts, one after the other; all have the same groups."""
        return Latents({name: torch.cat([part.groups[name] for part in parts], dim) for name in parts[0].groups})

    def lerp(self, other: Latents, amount: float | Tensor) -> Latents:
        """self + amount * (other - self), group by group."""
        return self._zip(other, lambda a, b: a + amount * (b - a))

    def mix(self, other: Latents, layer: int) -> Latents:
        """Style mixing: codes before ``layer`` from self, from ``layer`` on from ``other``.

        Layers are counted through the groups in order.
        """
        mixed, start = {}, 0
        for name, ours in self.groups.items():
            theirs = other.groups[name]
            keep = min(max(layer - start, 0), ours.shape[1])
            mixed[name] = torch.cat([ours[:, :keep], theirs[:, keep:]], 1)
            start += ours.shape[1]
        return Latents(mixed)

    def mean(self) -> Latents:
        """The mean code of the batch, as a batch of one."""
        return self.map(lambda t: t.mean(0, keepdim=True))

    def truncate(self, centre: Latents, psi: float, cutoff: int | None = None) -> Latents:
        """Truncation trick: codes before layer ``cutoff`` (all by default) pulled to ``centre`` by ``psi``."""
        truncated = centre.lerp(self, psi)
        return truncated if cutoff is None else truncated.mix(self, cutoff)

    def repeat_interleave(self, repeats: int) -> Latents:
        """Repeat each item ``repeats`` times in place."""
        return self.map(lambda t: t.repeat_interleave(repeats, 0))

    def detach(self) -> Latents:
        """Detached from the graph."""
        return self.map(Tensor.detach)

    def to(self, *args: object, **kwargs: object) -> Latents:
        """Move or cast every group, as ``Tensor.to``."""
        return self.map(lambda t: t.to(*args, **kwargs))  # type: ignore[arg-type]
