"""Changes of a network's weights as products of two thin matrices (LoRA, Hu et al. 2021, Sec. 4.1), here by truncated
SVD of what an ordinary training has changed.

A weight (m, ...) is a matrix (m, n) of its other sizes in a row. Of weights that two factors would not make smaller,
biases among them, nothing is taken away.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

LEFT, RIGHT = "//left", "//right"  # after a tensor's name; no network's own names have slashes


def factors(before: Tensor, after: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """(m, r) and (r, n), whose product is nearest to the change of a weight; None where they are no smaller than it."""
    if after.ndim < 2 or not after.is_floating_point() or rank * (len(after) + after[0].numel()) >= after.numel():
        return None
    left, strength, right = torch.linalg.svd((after.double() - before.double()).flatten(1), full_matrices=False)
    root = strength[:rank].sqrt()
    return (left[:, :rank] * root).to(after.dtype), (root[:, None] * right[:rank]).to(after.dtype)


def folded(before: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A weight with its change.

    Raises:
        ValueError: when the factors are of another weight.
    """
    if not min(before.ndim, left.ndim, right.ndim) or left.shape + right.shape != (
        len(before), len(right), len(right), before[0].numel(),
    ):  # fmt: skip
        raise ValueError(f"factors {tuple(left.shape)} and {tuple(right.shape)} do not make {tuple(before.shape)}")
    return before + (left.to(before) @ right.to(before)).view(before.shape)


def unfold(stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, where ``stored`` holds factors of some, and ``base`` what these change.

    Raises:
        ValueError: when factors are alone, or of another weight.
    """
    found = {name: tensor for name, tensor in stored.items() if not name.endswith((LEFT, RIGHT))}
    for key, left in stored.items():
        if key.endswith(LEFT):
            name = key.removesuffix(LEFT)
            if name not in base or name + RIGHT not in stored:
                raise ValueError(f"{key} has no other half, or nothing that it changes")
            found[name] = folded(base[name], left, stored[name + RIGHT])
        elif key.endswith(RIGHT) and key.removesuffix(RIGHT) + LEFT not in stored:
            raise ValueError(f"{key} has no other half")
    return found


@torch.no_grad()
def truncate_change(network: nn.Module, before: nn.Module, rank: int) -> None:
    """Take away what a network's change from ``before`` has beyond a rank, in place."""
    source = dict(before.named_parameters())
    for name, parameter in network.named_parameters():
        if (found := factors(source[name], parameter, rank)) is not None:
            parameter.copy_(folded(source[name], *found))
