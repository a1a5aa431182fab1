"""How directions are found: linear boundaries between codes of opposite attributes, or files of those found elsewhere.

All of it is computed in float64. Source: InterFaceGAN (Shen et al., 2020), Sec. 3.2 and 4.1.
"""

from __future__ import annotations

import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from models.checks import check_positive
from models.errors import UserError, one_line, shown
from models.files import os_errors, resolve
from models.generators.base import Generator
from models.heads.directions import sizes
from models.latents import Latents

log = logging.getLogger(__name__)

_FEWEST = 2  # codes at an end
_LEAST_LEFT = 1e-6  # of a normal, when what is held is taken out of it
_MOST_ITERATIONS = 20_000


@dataclass(frozen=True)
class Samples:
    """Codes and what is known of their heads.

    Attributes:
        codes: (N, rows, w_dim) of each group, float64; of one row where all layers have the same code.
        names: of the attributes.
        scores: (N, K) float64; NaN where a head could not be scored.
        held_out: of the N the last so many are left to validation.
    """

    codes: Mapping[str, Tensor]
    names: tuple[str, ...]
    scores: Tensor
    held_out: int

    def __len__(self) -> int:
        return len(self.scores)

    @staticmethod
    def collect(blocks: Sequence[Latents], names: Sequence[str], scores: Tensor, held_out: int) -> Samples:
        """Of blocks of codes (n, rows, w_dim) a group, each as :func:`compact` leaves it."""
        codes = {}
        for group in blocks[0].groups:
            parts = [block.groups[group] for block in blocks]
            rows = max(part.shape[1] for part in parts)
            codes[group] = torch.cat([part.expand(-1, rows, -1) for part in parts]).double()
        return Samples(codes, tuple(names), scores.double(), held_out)

    def validation(self, count: int, rows: Mapping[str, int]) -> Latents:
        """The first ``count`` of the codes that are held out, of so many rows a group, float32."""
        start = len(self) - self.held_out
        some = slice(start, start + min(count, self.held_out))
        return Latents({name: codes[some].float().expand(-1, rows[name], -1) for name, codes in self.codes.items()})


def compact(ws: Latents) -> Latents:
    """Codes of one row where all layers have the same."""
    return ws.map(lambda t: t[:, :1] if torch.equal(t, t[:, :1].expand_as(t)) else t)


@dataclass(frozen=True)
class Found:
    """A direction.

    Attributes:
        name: of what changes along it.
        normals: (rows, w_dim) float64 of some groups, of unit length.
        scores: of its validation, by name.
    """

    name: str
    normals: Mapping[str, Tensor]
    scores: Mapping[str, float] = field(default_factory=dict)


class DirectionMethod(ABC):
    """A way to find directions.

    Attributes:
        scored: whether it learns from what is known of the samples' heads, and finds a direction for each attribute;
            otherwise attributes only name what it finds, where it changes them.
    """

    scored: ClassVar[bool] = True

    @abstractmethod
    def check(self, names: Sequence[str], generator: Generator) -> None:
        """Refuse settings that do not suit the attributes' names or the generator, before any sample is drawn.

        Raises:
            UserError: naming the setting.
        """

    @abstractmethod
    def find(self, samples: Samples, seed: int, generator: Generator) -> list[Found]:
        """Directions of a generator along which its heads change.

        Raises:
            UserError: when the samples do not tell one.
        """

    @property
    def tried_on(self) -> int:
        """Validation heads on which directions are tried, before they are :meth:`called`."""
        return 0

    def called(
        self, names: Sequence[str], changes: Tensor, attributes: Sequence[str], taken: Sequence[str]
    ) -> list[tuple[str, bool]]:
        """What directions are called after they have been tried, and whether each is turned; asked of a method that is
        not ``scored``.

        Args:
            names: of the K directions as they are.
            changes: (K, A) mean change of each attribute half the way from strength -1 to 1, in its standard
                deviations; NaN where it cannot be told.
            attributes: (A,) names. taken: names that are not free.
        """
        return [(name, False) for name in names]


@dataclass(frozen=True)
class LinearBoundaries(DirectionMethod):
    """For each attribute and each group of codes a boundary of its own, by a linear SVM; its normal is the direction.

    Attributes:
        share: of the training codes at each end of an attribute's scores that the boundary parts; InterFaceGAN's code
            has .02.
        cost: C of the SVM, for codes whose numbers have a root mean square of 1.
        hold: by the name of a direction the attributes that are to stay as they are along it, which are projected out
            (Sec. 3.2, conditional manipulation); "all" holds all the others along each.
        along: what heads move along: the boundary's normal, which is the paper's, or the "pattern" of codes that goes
            with it. Where codes differ much more along some axes than along others, a normal leans towards the narrow
            ones, which part codes well and show little.
    """

    share: float = 0.02
    cost: float = 1.0
    hold: dict[str, list[str]] | str | None = None
    along: Literal["normal", "pattern"] = "normal"

    def __post_init__(self) -> None:
        check_positive(self, "share", "cost", where="method.")
        if self.share > 0.5:
            raise UserError(f"method.share is {self.share}: both ends together are at most all codes, which is 0.5")
        if isinstance(self.hold, str) and self.hold != "all":
            raise UserError(f"method.hold is {shown(self.hold)}: write all, or by name a list of what is held")

    def check(self, names: Sequence[str], generator: Generator | None = None) -> None:
        self.held(names)

    def held(self, names: Sequence[str]) -> dict[str, list[str]]:
        """What is held along each direction.

        Raises:
            UserError: for a name that there is not, or that is to be held along itself.
        """
        if not isinstance(self.hold, dict):
            return {name: [n for n in names if self.hold and n != name] for name in names}
        for name, others in self.hold.items():
            if unknown := [n for n in (name, *others) if n not in names]:
                raise UserError(f"method.hold names {shown(unknown[0])}, the attributes are: {', '.join(names)}")
            if name in others:
                raise UserError(f"method.hold: {name} cannot be held where it is to change")
        return {name: list(self.hold.get(name, ())) for name in names}

    def find(self, samples: Samples, seed: int, generator: Generator | None = None) -> list[Found]:
        held = self.held(samples.names)
        normals: dict[str, dict[str, Tensor]] = {}
        scores: dict[str, dict[str, float]] = {}
        for k, name in enumerate(samples.names):
            values = samples.scores[:, k]
            normals[name], scores[name] = {}, {}
            for group, codes in samples.codes.items():
                normal, found = self.boundary(codes.flatten(1), values, samples.held_out, name, seed)
                normals[name][group] = normal.view(codes.shape[1:])
                scores[name] |= {f"{group}/{metric}": value for metric, value in found.items()}
        found = []
        for name in samples.names:
            moves = {}
            for group, normal in normals[name].items():
                training = samples.codes[group][: len(samples) - samples.held_out]
                move = normal if self.along == "normal" else pattern(training, normal)
                moves[group] = project_out(move, [normals[other][group] for other in held[name]], name)
            found.append(Found(name, moves, scores[name]))
        return found

    def boundary(
        self, codes: Tensor, scores: Tensor, held_out: int, name: str, seed: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The unit normal (D,) of codes (N, D), towards higher scores (N,), and how well it parts those held out.

        Returns:
            the normal; and ``accuracy``, of the held-out codes at both ends, and ``correlation`` of the place along the
            normal with the score, of all held-out codes.
        """
        train, test = slice(len(codes) - held_out), slice(len(codes) - held_out, None)
        low, high = ends(scores[train], self.share, name)
        chosen = torch.cat([high, low])
        labels = torch.cat([torch.ones(len(high)), -torch.ones(len(low))]).double()
        normal, offset = linear_svm(codes[train][chosen], labels, self.cost, seed)
        place = codes[test] @ normal - offset
        values = scores[test]
        found = {"accuracy": math.nan, "correlation": math.nan}
        known = values.isfinite()
        if int(known.sum()) > 1:
            pair = torch.stack([place[known], values[known]])
            found["correlation"] = float(torch.corrcoef(pair)[0, 1])
            try:
                low, high = ends(values, self.share, name)
            except UserError:  # of few codes held out, none may differ
                return normal, found
            right = torch.cat([place[high] > 0, place[low] < 0])
            found["accuracy"] = float(right.double().mean())
        return normal, found


def ends(scores: Tensor, share: float, name: str) -> tuple[Tensor, Tensor]:
    """Rows of the lowest and of the highest scores (N,), of each a share of those that are known.

    Where many are equal, as of glasses that are there or not, an end may be smaller: no score is at both.

    Raises:
        UserError: when fewer than two are left at an end.
    """
    known = scores.isfinite().nonzero()[:, 0]
    order = known[scores[known].argsort(stable=True)]
    count = min(max(round(share * len(order)), _FEWEST), len(order) // 2)
    low, high = order[:count], order[len(order) - count :]
    if count and (tie := scores[low[-1]]) == scores[high[0]]:  # so many are equal that they are at both ends
        below, above = low[scores[low] < tie], high[scores[high] > tie]
        low, high = (low, above) if len(above) >= len(below) else (below, high)
    if min(len(low), len(high)) < _FEWEST:
        raise UserError(
            f"the scores of {name} tell too few heads apart: {len(known)} of {len(scores)} codes are scored, and "
            f"{len(high)} of them at the upper end and {len(low)} at the lower: take more samples or a larger share"
        )
    return low, high


def linear_svm(codes: Tensor, labels: Tensor, cost: float, seed: int) -> tuple[Tensor, Tensor]:
    """The boundary that parts codes (N, D) of labels (N,) 1 and -1, by scikit-learn's LinearSVC.

    Codes are shifted to their mean and divided by one number, which turns no direction.

    Returns:
        its unit normal (D,), towards label 1, and its offset: n . w > offset on that side. Float64.
    """
    from sklearn.exceptions import ConvergenceWarning  # here: slow to import
    from sklearn.svm import LinearSVC

    codes = codes.double()
    centre = codes.mean(0)
    scale = (codes - centre).square().mean().sqrt()
    if not scale > 0:
        raise UserError("all codes are equal: there is no boundary between them")
    machine = LinearSVC(C=cost, dual="auto", random_state=seed, max_iter=_MOST_ITERATIONS, tol=1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        machine.fit(((codes - centre) / scale).numpy(), labels.numpy())
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        log.warning("warning: a boundary has not settled after %d rounds: lower method.cost", _MOST_ITERATIONS)
    weight, bias = torch.from_numpy(machine.coef_[0]).double(), float(np.ravel(machine.intercept_)[0])
    length = weight.norm()
    normal = weight / length
    return normal, normal @ centre - scale * bias / length


def pattern(codes: Tensor, normal: Tensor) -> Tensor:
    """How codes (N, rows, w_dim) differ where they differ along a normal (rows, w_dim): their covariance times it, of
    unit length, which is the slope of a regression of codes on their places along the normal.

    Source: Haufe et al., "On the interpretation of weight vectors of linear models in multivariate neuroimaging"
    (2014), Eq. 6.
    """
    flat = codes.double().flatten(1)
    flat = flat - flat.mean(0)
    slope = flat.mT @ (flat @ normal.double().flatten())
    return (slope / slope.norm()).view(normal.shape)


def project_out(normal: Tensor, others: Sequence[Tensor], name: str = "direction") -> Tensor:
    """The part of ``normal`` orthogonal to all ``others``, of unit length, in float64 (InterFaceGAN, Eq. 10, for any
    number of conditions); all of one shape.

    Raises:
        UserError: when nothing is left.
    """
    flat = normal.double().flatten()
    flat = flat / flat.norm()
    if others:
        basis, triangle = torch.linalg.qr(torch.stack([other.double().flatten() for other in others], 1))
        strength = triangle.diagonal().abs()
        basis = basis[:, strength > 1e-12 * strength.max()]
        for _ in range(2):  # twice is enough: what rounding leaves of the first time
            flat = flat - basis @ (basis.mT @ flat)
        if float(flat.norm()) < _LEAST_LEFT:
            raise UserError(f"nothing is left of {name} when what is held along it is taken out: hold less")
        flat = flat / flat.norm()
    return flat.view(normal.shape)


# -- boundaries found elsewhere ------------------------------------------------------------------------------------


def imported(
    files: Mapping[str, str | Mapping[str, str]], groups: Mapping[str, tuple[int, int]], owner: str
) -> list[Found]:
    """Directions of files.

    Args:
        files: by the name of a direction its file, or by group one each.
        groups: (num_ws, w_dim) of the generator's groups.
        owner: the generator in words.

    Raises:
        UserError: for a file that holds no boundary of this generator, or a name without one.
    """
    found = []
    for name, given in files.items():
        places: Mapping[Any, Any] = given if isinstance(given, Mapping) else {None: given}
        if not places or not all(isinstance(file, str) and file for file in places.values()):
            raise UserError(f"boundaries.{name} is {shown(given)}: give a file, or for each group of codes one")
        normals: dict[str, Tensor] = {}
        for group, file in places.items():
            if group is not None and group not in groups:
                raise UserError(f"boundaries.{name}: {owner} has no codes {shown(group)}, it has {sizes(groups)}")
            boundary = read_boundary(file)
            normals |= _placed(boundary, groups if group is None else {group: groups[group]}, f"{file}", name, owner)
        found.append(Found(name, normals))
    return found


def _placed(
    boundary: Tensor, groups: Mapping[str, tuple[int, int]], file: str, name: str, owner: str
) -> dict[str, Tensor]:
    """The group whose codes a boundary (rows, w_dim) is of."""
    rows, width = boundary.shape
    fitting = [g for g, (n, w) in groups.items() if w == width and rows in (1, n)]
    if not fitting:
        raise UserError(f"{file} is a boundary of codes {(rows, width)}: {owner} has {sizes(groups)}")
    if len(fitting) > 1:
        raise UserError(
            f"{file} may be of any of the codes {', '.join(fitting)}: name them, {{{name}: {{{fitting[0]}: FILE}}}}"
        )
    return {fitting[0]: boundary / boundary.norm()}


def read_boundary(file: str) -> Tensor:
    """The boundary (rows, w_dim) in a file of NumPy (.npy) or torch (.pt), float64; nothing is unpickled.

    Raises:
        UserError: when it cannot be read, or holds anything but one boundary: finite numbers, not all 0, of the shape
            (w_dim,), (rows, w_dim) or (1, rows, w_dim).
    """
    path = resolve(file)
    with os_errors(file, "read"):
        if not path.is_file():
            raise UserError(f"cannot read {file}: {'it is no file' if path.exists() else 'there is no such file'}")
        try:
            values = _tensor(path)
        except Exception as error:  # of any kind: what reads bytes that are none of its own
            reason = one_line(error)[:160]
            raise UserError(f"{file} holds no boundary of plain numbers (.npy or .pt): {reason}") from error
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or values.numel() == 0:
        raise UserError(f"{file} is of shape {tuple(values.shape)}: a boundary is (1, w_dim) or (rows, w_dim)")
    if not bool(values.isfinite().all()) or not bool(values.any()):
        raise UserError(f"{file} holds no direction: its numbers are not finite, or all 0")
    return values


def _tensor(path: Path) -> Tensor:
    if path.suffix == ".npy":
        values: Any = np.load(path, allow_pickle=False)
        if values.dtype.kind not in "fiu":
            raise ValueError(f"its values are {values.dtype}")
        return torch.from_numpy(values.astype(np.float64))
    values = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(values, Tensor) or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"it holds {type(values).__name__}, not a tensor of numbers")
    return values.detach().double()
