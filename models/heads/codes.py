"""Where heads lie in a generator: latent code, expression and camera of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.camera import LABEL_SIZE, Camera
from models.configurable import Configurable
from models.errors import shown
from models.generators.base import Generator
from models.latents import Latents
from models.names import is_plain


@dataclass(frozen=True)
class HeadCode:
    """One head's place in a generator.

    Attributes:
        latents: its style codes, a batch of one.
        z: (1, z_dim), or ``None`` where the search did not go through z.
        expression: (1, E), the zero of later edits; E = 0 where the generator cannot animate.
        label: (1, 25) camera label, or ``None`` in a 2D generator.
    """

    latents: Latents
    z: Tensor | None
    expression: Tensor
    label: Tensor | None

    @property
    def camera(self) -> Camera | None:
        """The camera it was seen by, a batch of one; ``None`` in a 2D generator."""
        return None if self.label is None else Camera.from_label(self.label)

    @property
    def neutral(self) -> bool:
        """Whether the expression is the generator's own zero."""
        return not bool(self.expression.any())


class HeadCodes(Configurable):
    """Codes of several heads, as a module of an artifact.

    Args:
        ids: of the heads, in the order of the rows.
        groups: [name, num_ws, w_dim] of each latent group; their order counts.
        z_dim: of z; 0 where the search did not go through z.
        expressions: names of the expression coefficients.
        cameras: whether there are any; False of a 2D generator.

    Raises:
        ValueError: for an id that cannot name a file, or is there twice; or for nonsense sizes.
    """

    def __init__(
        self,
        ids: Sequence[str],
        groups: Sequence[tuple[str, int, int]],
        z_dim: int = 0,
        expressions: Sequence[str] = (),
        cameras: bool = True,
    ) -> None:
        super().__init__()
        self.ids, self.expressions = tuple(ids), tuple(expressions)
        if wrong := [identity for identity in self.ids if not is_plain(identity)]:
            raise ValueError(f"the id {shown(wrong[0])} cannot name a file")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("two items have the same id")
        self.groups = tuple(name for name, _, _ in groups)
        for name, count, width in groups:
            self.register_buffer(f"latents_{name}", torch.zeros(len(self.ids), count, width))
        self.z: Tensor
        self.expression: Tensor
        self.label: Tensor
        self.register_buffer("z", torch.zeros(len(self.ids), z_dim))
        self.register_buffer("expression", torch.zeros(len(self.ids), len(self.expressions)))
        self.register_buffer("label", torch.zeros(len(self.ids), LABEL_SIZE if cameras else 0))

    @staticmethod
    def pack(anchors: Mapping[str, HeadCode], generator: Generator) -> HeadCodes:
        """The set of ``anchors`` by id, sorted; at least one, all with or all without z, or camera."""
        ids = sorted(anchors)
        ordered = [anchors[identity] for identity in ids]
        groups = [(name, t.shape[1], t.shape[2]) for name, t in ordered[0].latents.groups.items()]
        z_dim = 0 if ordered[0].z is None else ordered[0].z.shape[1]
        labels = [a.label for a in ordered if a.label is not None]
        packed = HeadCodes(ids, groups, z_dim, generator.expressions, bool(labels))
        for name in packed.groups:
            getattr(packed, f"latents_{name}").copy_(torch.cat([a.latents.groups[name] for a in ordered]))
        if z_dim:
            packed.z.copy_(torch.cat([a.z for a in ordered if a.z is not None]))
        packed.expression.copy_(torch.cat([a.expression for a in ordered]))
        if labels:
            packed.label.copy_(torch.cat(labels))
        return packed

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, identity: str) -> bool:
        return identity in self.ids

    def only(self, identity: str) -> HeadCodes:
        """The same without the others.

        Raises:
            KeyError: when there is none of that id.
        """
        if identity not in self.ids:
            raise KeyError(identity)
        row = self.ids.index(identity)
        arguments: dict[str, Any] = self.init_args | {"ids": [identity]}
        one = type(self)(**arguments)
        one.load_state_dict({name: tensor[row : row + 1] for name, tensor in self.state_dict().items()})
        return one

    def __getitem__(self, identity: str) -> HeadCode:
        """The code of one head.

        Raises:
            KeyError: when there is none of that id.
        """
        if identity not in self.ids:
            raise KeyError(identity)
        row = slice(self.ids.index(identity), self.ids.index(identity) + 1)
        return HeadCode(
            Latents({name: getattr(self, f"latents_{name}")[row] for name in self.groups}),
            self.z[row] if self.z.shape[1] else None,
            self.expression[row],
            self.label[row] if self.label.shape[1] else None,
        )
