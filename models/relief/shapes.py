"""What was found of heads: depth, albedo, view and light, as a module of an artifact that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.camera import Camera
from models.errors import shown
from models.generators.base import Generator
from models.latents import Latents
from models.names import is_plain
from models.relief.shape import Shape
from models.relief.surface import painted, surface
from models.rendering.mesh import Mesh
from models.rendering.output import Edit, Rendering
from models.rendering.raster import draw
from models.rendering.relief import Relief, relit


class ReliefShapes(Generator):
    """Shapes of several heads, and the generator that shows them, from anywhere before them and under any light.

    A code (B, 1, N) is how much of each of the N heads' maps there is: one head alone, or a mixture. There is no z:
    ``mapping`` takes z without numbers. An expression puts the maps of the same head with another face in the place of
    its own. Renderings are for looking at: they have no gradient.

    Args:
        ids: of the heads, in the order of the rows.
        size: S of the maps, pixels.
        relief: how they are seen.
        masked: whether it is known where the maps show the head, and not what is behind it.
        expressions: by name, for each head, the row of it with this expression; its own row where there is none.

    Raises:
        ValueError: for an id that cannot name a file, or is there twice; for rows that there are not.
    """

    relightable = True
    depth: Tensor
    albedo: Tensor
    view: Tensor
    light: Tensor
    mask: Tensor

    def __init__(
        self,
        ids: Sequence[str],
        size: int,
        relief: Relief = Relief(),  # noqa: B008 - frozen
        masked: bool = False,
        expressions: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.ids, self.size, self.relief, self.masked = tuple(ids), size, relief, masked
        if wrong := [identity for identity in self.ids if not is_plain(identity)]:
            raise ValueError(f"the id {shown(wrong[0])} cannot name a file")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("two heads have the same id")
        count = len(self.ids)
        self.z_dim, self.num_ws, self.w_dim, self.resolution, self.rig = 0, 1, count, size, relief.rig(size)
        self.rows = {name: list(rows) for name, rows in (expressions or {}).items()}
        self.expressions = tuple(self.rows)
        if any(len(rows) != count or not set(rows) <= set(range(count)) for rows in self.rows.values()):
            raise ValueError(f"expressions must give one of {count} rows for each head")
        self.register_buffer("depth", torch.zeros(count, 1, size, size))
        self.register_buffer("albedo", torch.zeros(count, 3, size, size))
        self.register_buffer("view", torch.zeros(count, 6))
        self.register_buffer("light", torch.zeros(count, 4))
        self.register_buffer("mask", torch.ones(count, 1, size, size), persistent=masked)

    @staticmethod
    def pack(
        shapes: Mapping[str, Shape], relief: Relief, expressions: Mapping[str, Mapping[str, str]] | None = None
    ) -> ReliefShapes:
        """Of heads by id, one or more, sorted; all with, or all without a mask.

        Args:
            expressions: by name, the ids of heads with this expression by those of the heads without.
        """
        ids = sorted(shapes)
        together = Shape.cat([shapes[identity] for identity in ids])
        rows = {
            name: [ids.index(moved.get(identity, identity)) for identity in ids]
            for name, moved in (expressions or {}).items()
        }
        packed = ReliefShapes(ids, together.depth.shape[-1], relief, together.mask is not None, rows)
        packed.load_state_dict(together.named())
        return packed

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, identity: str) -> bool:
        return identity in self.ids

    def __getitem__(self, identity: str) -> Shape:
        """The shape of one head, a batch of one.

        Raises:
            KeyError: when there is none of that id.
        """
        if identity not in self.ids:
            raise KeyError(identity)
        return self._all[self.ids.index(identity)]

    @property
    def _all(self) -> Shape:
        mask = self.mask if self.masked else None
        return Shape(self.depth, self.albedo, self.view, self.light, mask)

    @property
    def normals(self) -> Tensor:
        """(N, 3, S, S) unit, canonical, towards the camera: those of the depth maps."""
        return self.relief.normals(self.depth)

    # -- as a generator ---------------------------------------------------------------------------

    def code(self, identity: str) -> Latents:
        """One head alone, a batch of one."""
        return Latents({"ws": torch.eye(len(self)).to(self.depth)[None, [self.ids.index(identity)]]})

    def camera(self, identity: str) -> Camera:
        """That of the picture that a head was found in, a batch of one."""
        return self.relief.camera(self[identity].view, self.size)

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        if z.shape[1:] != (0,):
            raise ValueError(f"shapes have no z: it must be (B, 0), got {tuple(z.shape)}")
        return self.mean_latents.repeat_interleave(len(z))

    @property
    def mean_latents(self) -> Latents:
        return Latents({"ws": self.depth.new_full((1, 1, len(self)), 1 / len(self))})

    def shape(self, ws: Latents, expression: Tensor | None = None) -> Shape:
        """The maps of codes (B, 1, N), with expressions (B, E)."""
        share = ws.ws[:, 0]
        if expression is not None:
            for rows, strength in zip(self.rows.values(), expression.unbind(1), strict=True):
                moved = torch.zeros_like(share).index_add(1, torch.tensor(rows, device=share.device), ws.ws[:, 0])
                share = share + strength[:, None] * (moved - ws.ws[:, 0])
        return self._all.map(lambda t: torch.einsum("bn,n...->b...", share, t))

    @torch.no_grad()
    def synthesis(
        self,
        ws: Latents,
        camera: Camera | None = None,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        randomness: torch.Generator | Tensor | None = None,
        taps: Sequence[str] = (),
        resolution: int | None = None,
    ) -> Rendering:
        self.check_taps(taps)
        camera, rows = self.check_views(ws, camera, expression)
        if edit is not None:
            raise ValueError("shapes are finished: they take no edits")
        shapes = self.shape(ws if rows == len(ws) else ws.repeat_interleave(rows // len(ws)), expression)
        views, found = len(camera) // rows, []
        with torch.autocast(camera.device.type, enabled=False):
            for row in range(rows):
                shape = shapes[row]
                seen = draw(
                    surface(shape, self.relief),
                    camera[row * views : (row + 1) * views].to("cpu"),
                    resolution or self.resolution,
                )
                assert seen.alpha is not None
                albedo = (seen.image - (1 - seen.alpha)) / seen.alpha.clamp_min(1e-6)  # it comes on white
                seen = seen.replace(albedo=albedo.clamp(-1, 1))
                found.append(seen.replace(image=relit(seen, shape.lit.to("cpu"))))
        return Rendering.cat(found).to(camera.device)

    def mesh(self, ws: Latents, expression: Tensor | None = None) -> Mesh:
        shape = self.shape(ws, expression)
        return painted(surface(shape, self.relief), shape, self.relief)
