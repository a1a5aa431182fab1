"""Directions in closed form: what a generator's own layers answer to most, with no sample and no label.

All of it is computed in float64. Source: SeFa (Shen and Zhou, "Closed-form factorization of latent semantics in GANs",
2021), Eq. 6 and its code; 3D cartoon faces (Wang et al.), Sec. III-C, whose Eq. 4 to 6 write z where w is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.checks import check_not_negative, check_positive
from models.errors import UserError, shown
from models.generators.base import Generator
from models.heads.boundaries import DirectionMethod, Found, Samples


@dataclass(frozen=True)
class SeFa(DirectionMethod):
    """The unit vectors n that change the styles A n of some layers most, added to the codes of these layers.

    Directions are called by number, ``sefa_1`` first, or by what they change; see :func:`called_by_change`.

    Attributes:
        count: directions, of all groups of codes together, the most telling first.
        layers: whose affines are factorised, and whose codes move; counted through the groups of codes, layer i reads
            code i. All that have affines when null.
        least_change: by which a direction is called by an attribute: of its mean, half the way from strength -1 to 1,
            in standard deviations among heads.
        named_by: validation codes that this is measured on.
    """

    count: int = 8
    layers: list[int] | None = None
    least_change: float = 0.5
    named_by: int = 128

    scored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, "count", "named_by", where="method.")
        check_not_negative(self, "least_change", where="method.")
        layers = self.layers
        if layers is not None and (not layers or len(set(layers)) != len(layers)):
            raise UserError(f"method.layers is {shown(layers)}: name each layer once, or all by null")

    def check(self, names: Sequence[str], generator: Generator) -> None:
        blocks = factors(generator, self.layers)
        if self.count > (most := sum(weights.shape[1] for _, weights, _ in blocks)):
            raise UserError(
                f"method.count is {self.count}: codes of {most} numbers have {most} directions in all, no more"
            )

    def find(self, samples: Samples | None, seed: int, generator: Generator) -> list[Found]:
        """``count`` directions; of each its ``eigenvalue``, the squared length of A n, and its ``share`` of their sum
        over all directions. Nothing is drawn, and no sample is needed."""
        self.check((), generator)
        counts = {name: t.shape[1] for name, t in generator.mean_latents.groups.items()}
        entries, total = [], 0.0
        for group, weights, rows in factors(generator, self.layers):
            values, vectors = factorize(weights)
            total += float(values.sum())
            moved = torch.zeros(counts[group], 1, dtype=torch.float64)
            moved[rows] = len(rows) ** -0.5  # of unit length over all rows
            entries += [(value, group, moved * n) for value, n in zip(values.tolist(), vectors, strict=True)]
        entries.sort(key=lambda entry: -entry[0])  # stable: of equal ones the first group's come first
        return [
            Found(f"sefa_{i}", {group: normal}, {"eigenvalue": value, "share": value / total})
            for i, (value, group, normal) in enumerate(entries[: self.count], 1)
        ]

    @property
    def tried_on(self) -> int:
        return self.named_by

    def called(
        self, names: Sequence[str], changes: Tensor, attributes: Sequence[str], taken: Sequence[str]
    ) -> list[tuple[str, bool]]:
        return called_by_change(names, changes, attributes, self.least_change, taken)


def factorize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (w_dim,) of A^T A, descending, and their unit vectors (w_dim, w_dim), a row each, float64.

    A is ``weights`` (rows, w_dim) with each row brought to unit length, as in SeFa's code; rows of zeros stay. Of the
    two signs of a vector it is the one that makes its largest component positive.
    """
    weights = weights.detach().double().cpu()
    length = weights.norm(dim=1, keepdim=True)
    unit = weights / torch.where(length > 0, length, 1.0)
    values, vectors = torch.linalg.eigh(unit.mT @ unit)
    rows = vectors.mT.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values.flip(0).clamp_min(0), rows * largest.sign()


def factors(generator: Generator, layers: Sequence[int] | None) -> list[tuple[str, Tensor, list[int]]]:
    """Of each group of codes that some layers read: its name, their affine weights (rows, w_dim), and their codes.

    Args:
        layers: counted through the groups; None takes all that have affines.

    Raises:
        UserError: when the generator has no affines, none of that number, or none that does anything.
    """
    name = type(generator).__name__
    affines = _affines(generator)
    if not affines:
        raise UserError(f"{name} has no style affines: its directions are not found in closed form")
    last = len(affines) - 1
    for layer in layers or ():
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
            raise UserError(f"method.layers has {shown(layer)}: the affines of {name} are of layers 0 to {last}")
    chosen = range(len(affines)) if layers is None else sorted(layers)
    found, first, column = [], 0, 0
    for group, mean in generator.mean_latents.groups.items():
        count, width = mean.shape[1:]
        own = [layer for layer in chosen if first <= layer < first + count]
        if own:
            weights = torch.cat([affines[layer][:, column : column + width] for layer in own])
            found.append((group, weights, [layer - first for layer in own]))
        first, column = first + count, column + width
    if not any(bool(weights.any()) for _, weights, _ in found):
        raise UserError(f"the affines of {name} are all 0 in these layers: nothing changes along any direction")
    return found


def _affines(generator: Generator) -> list[Tensor]:
    """The affine weights (rows, w_dim) of each layer in turn; w_dim counts all groups."""
    found = []
    for layer in range(sum(t.shape[1] for t in generator.mean_latents.groups.values())):
        try:
            found.append(generator.affine_weights([layer]).detach())
        except (IndexError, NotImplementedError):
            break
    return found


def called_by_change(
    names: Sequence[str], changes: Tensor, attributes: Sequence[str], least: float, taken: Sequence[str] = ()
) -> list[tuple[str, bool]]:
    """What directions are called after they have been tried.

    Each by the attribute that it changes most; where that is less than ``least``, or there is none, it keeps its name.
    Of two with one attribute the later is ``hair_2``. A direction along which its attribute falls is turned, so that 1
    is more of it, as along every direction that has an attribute's name.

    Args:
        names: of the directions as they are.
        changes: (K, A) mean change of each attribute half the way from strength -1 to 1, in its standard deviations;
            NaN where it cannot be told.
        attributes: (A,) names. taken: names that are not free.

    Returns:
        for each direction its name, and whether it is turned.
    """
    used, found = set(taken), []
    for name, row in zip(names, changes.nan_to_num(), strict=True):
        most = int(row.abs().argmax()) if len(row) else -1
        if most < 0 or float(row[most].abs()) < least:
            found.append((name, False))
            continue
        wanted, number = attributes[most], 2
        while wanted in used:
            wanted, number = f"{attributes[most]}_{number}", number + 1
        used.add(wanted)
        found.append((wanted, float(row[most]) < 0))
    return found
