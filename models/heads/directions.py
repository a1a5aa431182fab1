"""Named directions of a generator's latent space, by which heads are edited: w' = w + s * direction.

Source: InterFaceGAN (Shen et al., 2020), Sec. 3.2; E3DGE (Lan et al., 2023), Sec. 5, has a boundary for the renderer's
codes and one for the decoder's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.artifact import Artifact
from models.configurable import Configurable
from models.errors import UserError, shown
from models.latents import Latents
from models.manifest import manifest_id

if TYPE_CHECKING:
    from models.heads.subjects import Subjects


class Directions(Configurable):
    """Directions by name, as a module of an artifact.

    An edit's strength is 1 at the end of the useful range and -1 at its other end; what lies between is in proportion.
    All groups move at once, each in standard deviations of its own codes.

    Args:
        names: of the directions.
        groups: [name, rows, w_dim] of each latent group in order; of one row where all layers move alike, otherwise of
            the group's own.
        generator: :func:`fingerprint` of the generator that they belong to.

    Attributes:
        limits: (K, 2) the ends of the useful range, below and above 0, in standard deviations.

    Raises:
        ValueError: for nonsense sizes, or a name that is there twice.
    """

    limits: Tensor

    def __init__(self, names: Sequence[str], groups: Sequence[tuple[str, int, int]], generator: str) -> None:
        super().__init__()
        self.names, self.groups, self.generator = tuple(names), tuple(name for name, _, _ in groups), generator
        if not all(isinstance(name, str) for name in (*self.names, *self.groups, generator)):
            raise ValueError(f"directions have names, got {shown(names)}")
        if len(set(self.names)) != len(self.names) or len(set(self.groups)) != len(self.groups):
            raise ValueError("two directions, or two groups, have the same name")
        count = len(self.names)
        for name, rows, width in groups:
            self.register_buffer(f"direction_{name}", torch.zeros(count, rows, width))
            self.register_buffer(f"spread_{name}", torch.zeros(count))
        self.register_buffer("limits", torch.zeros(count, 2))

    def direction(self, group: str) -> Tensor:
        """(K, rows, w_dim) of unit length, or 0 where a direction has no part in the group."""
        return getattr(self, f"direction_{group}")

    def spread(self, group: str) -> Tensor:
        """(K,) standard deviations of sampled codes along the directions."""
        return getattr(self, f"spread_{group}")

    def renamed(self, names: Sequence[str], turned: Sequence[bool]) -> Directions:
        """The same directions by other names, some of them pointing the other way.

        Args:
            names: one for each. turned: whether what was -1 is now 1.
        """
        sizes = {group: self.direction(group).shape for group in self.groups}
        groups = [(group, rows, width) for group, (_, rows, width) in sizes.items()]
        other = Directions(names, groups, self.generator).to(self.limits.device)
        other.load_state_dict(self.state_dict())
        for k in (k for k, turn in enumerate(turned) if turn):
            other.limits[k] = -self.limits[k].flip(0)
            for group in self.groups:
                other.direction(group)[k] = -self.direction(group)[k]
        return other

    def check(self, edits: Mapping[str, float], layers: Mapping[str, int] | None = None) -> None:
        """Refuse what :meth:`apply` cannot do.

        Raises:
            UserError: for an unknown name, a strength that is no finite number, or layers of an unknown group.
        """
        for name, strength in edits.items():
            if name not in self.names:
                raise UserError(f"there is no direction {shown(name)}, there are: {', '.join(self.names)}")
            number = isinstance(strength, int | float) and not isinstance(strength, bool)
            if not number or not math.isfinite(strength):
                raise UserError(
                    f"the strength of {name} is {shown(strength)}: it must be a number, 1 is its range's end"
                )
        for group, count in (layers or {}).items():
            if group not in self.groups:
                raise UserError(f"there are no codes {shown(group)} to edit, there are: {', '.join(self.groups)}")
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise UserError(f"of {group} the first {shown(count)} codes cannot be edited: give a number, or 0")

    def shift(self, name: str, deviations: float | Tensor) -> dict[str, Tensor]:
        """By group what a direction adds to codes: (rows, w_dim), or (T, rows, w_dim) for several strengths (T,).

        Args:
            deviations: how far, in standard deviations of the sampled codes.
        """
        k = self.names.index(name)
        far = torch.as_tensor(deviations, dtype=self.limits.dtype, device=self.limits.device)[..., None, None]
        return {group: far * self.spread(group)[k] * self.direction(group)[k] for group in self.groups}

    def deviations(self, name: str, strength: float) -> float:
        """A strength in standard deviations: in proportion up to either end of the useful range, and beyond."""
        low, high = self.limits[self.names.index(name)].tolist()
        return strength * (high if strength >= 0 else -low)

    def apply(self, ws: Latents, edits: Mapping[str, float], layers: Mapping[str, int] | None = None) -> Latents:
        """Edited codes w' = w + sum of s * direction.

        Args:
            ws: (B, n, w_dim) of each group.
            edits: strengths by name.
            layers: by group how many of its first codes are edited, and only of the groups that are named: with
                ``{"renderer": 6}`` StyleSDF's geometry alone. None edits all.

        Raises:
            UserError: as :meth:`check`, or when codes are of another size.
        """
        self.check(edits, layers)
        self.check_size(ws)
        for name, strength in edits.items():
            ws = self.moved(ws, name, self.deviations(name, strength), layers)
        return ws

    def moved(
        self, ws: Latents, name: str, deviations: float | Tensor, layers: Mapping[str, int] | None = None
    ) -> Latents:
        """Codes moved along one direction by so many standard deviations, all alike or each its own; ``layers`` as of
        :meth:`apply`.
        """
        added, moved = self.shift(name, deviations), {}
        for group, codes in ws.groups.items():
            count = codes.shape[1] if layers is None else layers.get(group, 0)
            kept = (torch.arange(codes.shape[1], device=codes.device) < count)[:, None]
            moved[group] = codes + kept * added[group].to(codes)
        return Latents(moved)

    def check_size(self, ws: Latents) -> None:
        """Refuse codes that are not of the directions' groups and sizes.

        Raises:
            UserError: saying both.
        """
        theirs = {name: tuple(codes.shape[1:]) for name, codes in ws.groups.items()}
        ours = {name: tuple(self.direction(name).shape[1:]) for name in self.groups}
        if theirs.keys() != ours.keys() or any(
            ours[g][1] != width or ours[g][0] not in (1, rows) for g, (rows, width) in theirs.items()
        ):
            raise UserError(f"the directions are of codes {sizes(ours)}, the generator has {sizes(theirs)}")

    def read(self, ws: Latents) -> Tensor:
        """Where codes lie along each direction, in standard deviations: (B, K), the mean over the groups that are there
        and that the direction has a part in; NaN where there is none. Of a direction of one row codes are read at the
        mean of their layers.
        """
        found = count = next(iter(ws.groups.values())).new_zeros(len(ws), len(self.names))
        for group in filter(ws.groups.__contains__, self.groups):
            direction, codes = self.direction(group), ws.groups[group]
            codes = codes.mean(1, keepdim=True) if direction.shape[1] == 1 else codes
            has = direction.flatten(1).norm(dim=1) > 0
            places = codes.flatten(1) @ direction.flatten(1).mT.to(codes)
            found = found + places / torch.where(has, self.spread(group), 1.0)
            count = count + has.to(found)
        return found / count


def in_words(edits: Mapping[str, float]) -> str:
    """Edits for a caption: "smile +1, age -0.5"."""
    return ", ".join(f"{name.replace('_', ' ')} {strength:+g}" for name, strength in edits.items())


def sizes(groups: Mapping[str, tuple[int, ...]]) -> str:
    """Groups and their sizes in words: "renderer (9, 256), decoder (10, 512)"."""
    return ", ".join(f"{name} {size}" for name, size in groups.items())


def fingerprint(generator: nn.Module) -> str:
    """SHA-256 of a network's tensors: the same weights have the same one, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def directions_for(source: Artifact, subjects: Subjects) -> Directions:
    """The directions of an artifact, for heads of another.

    They belong to the generator that the heads are codes of, which may be shown by a wrapper, and to what was made of
    it: a generator that was tuned or stylised after them.

    Raises:
        UserError: when there are none, or they are of another generator.
        ArtifactError: when they cannot be read.
    """
    found = source.module("directions")
    if not isinstance(found, Directions):
        raise UserError(f"module 'directions' of {source.path} holds no directions, but a {type(found).__name__}")
    shown_ids = {subjects.artifact.id, *subjects.artifact.ancestors}
    related = any(manifest_id(parent) in shown_ids for parent in source.manifest["parents"].values())
    if not related and (own := fingerprint(subjects.generator)) != found.generator:
        raise UserError(
            f"the directions of {source.path} are of the generator {found.generator[:12]}, the heads of "
            f"{subjects.artifact.path} of {own[:12]}: fit directions to that one"
        )
    found.check_size(subjects.generator.mean_latents)
    return found.requires_grad_(False)
