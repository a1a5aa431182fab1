"""Baked heads: one head's radiance, finished and laid down on its manifolds, seen from anywhere without a network.

Source: GRAMInverter (Deng et al., 2023), Sec. 4.1, "manifold caching": what costs time, the networks, does not depend
on the camera, because the radiance of manifolds has no viewing direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.generators.base import Generator
from models.latents import Latents
from models.rendering.atlas import Chart
from models.rendering.compositing import EMPTY, depth_normals
from models.rendering.manifolds import ManifoldPredictor, first_brackets
from models.rendering.output import Edit, Rendering

BORDER = 2  # texels


class BakedHead(Generator):
    """A head as one RGBA texture per manifold: the image is made of lookups alone.

    Rays search their crossings on a coarse image, in the predictor's grid. Where a ray misses a manifold, the point in
    which it comes closest stands in, so that chart coordinates can be enlarged across silhouettes; which pixels see the
    manifold is decided on the fine image, by how close their rays come.

    There are no codes left to give: ``mapping`` takes z without numbers, and neither expressions nor edits apply. The
    camera may stand anywhere before the head, also nearer or farther than the rig's own.

    Args:
        predictor: whose level sets the manifolds are; only its baked grid is looked at.
        layout: the chart on which the textures lie, see :class:`Chart`.
        levels: values of the manifolds, from the outermost to the innermost.
        size: side of a texture, pixels.
        rig: of the generator that was baked.
        resolution: native image side, pixels.
        stride: the coarse image is so many times smaller, where that divides the image's side.
        samples: along a ray, in the search.
        plane: x, y, z of the middle, and half the side of a square facing the front that the background is painted on,
            world units; None for a background that is attached to the screen.
    """

    textures: Tensor
    backdrop: Tensor
    levels: Tensor

    def __init__(
        self,
        predictor: ManifoldPredictor,
        layout: Chart,
        levels: Sequence[float],
        size: int,
        rig: Rig,
        resolution: int,
        stride: int = 4,
        samples: int = 48,
        plane: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.z_dim = self.num_ws = self.w_dim = 0
        self.predictor, self.layout, self.rig, self.resolution = predictor, layout, rig, resolution
        self.stride, self.samples, self.plane = stride, samples, plane
        self.register_buffer("levels", torch.tensor([float(v) for v in levels]), persistent=False)
        self.register_buffer("textures", torch.zeros(len(levels), 4, size, size))
        self.register_buffer("backdrop", torch.ones(1, 3, size, size))

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        if z.shape[1:] != (0,):
            raise ValueError(f"a baked head has no codes left: z must be (B, 0), got {tuple(z.shape)}")
        return Latents({"ws": z.new_zeros(len(z), 0, 0)})

    @property
    def mean_latents(self) -> Latents:
        return Latents({"ws": self.textures.new_zeros(1, 0, 0)})

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
        camera, _ = self.check_views(ws, camera, expression)
        if edit is not None or ws.ws.numel():
            raise ValueError("a baked head is finished: it takes neither codes nor edits")
        seen = self.show(camera, resolution)
        assert seen.depth is not None and seen.alpha is not None
        return seen.replace(normals=depth_normals(seen.depth, seen.alpha, camera))

    def bake(
        self,
        ws: Latents,
        size: int,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        stride: int = 4,
    ) -> BakedHead:
        return self

    @torch.no_grad()
    def show(self, camera: Camera, resolution: int | None = None) -> Rendering:
        """The fast way: image, depth and alpha (B, ., resolution, resolution) from B cameras."""
        side = resolution or self.resolution
        with torch.autocast(camera.device.type, enabled=False):
            maps = torch.stack([self._view(camera[i], side) for i in range(len(camera))])
        image, alpha, depth = maps.split((3, 1, 1), 1)
        return Rendering(image=image, depth=depth, alpha=alpha)

    def _view(self, camera: Camera, side: int) -> Tensor:
        """(5, side, side): RGB, alpha and depth of one camera."""
        stride = self.stride if side % self.stride == 0 else 1
        coarse = side // stride
        origins, directions = camera.rays(coarse)
        # As far before and behind the pivot as the rig's own camera looks.
        pivot = camera.project(camera.position.new_tensor(self.rig.pivot)[None, None])[1]
        near = (pivot + (self.rig.near - self.rig.radius)).clamp_min(0.02 * self.rig.radius)
        steps = torch.lerp(
            near, pivot + (self.rig.far - self.rig.radius), torch.linspace(0, 1, self.samples, device=near.device)
        )[0]
        values = self.predictor.baked()(origins[:, :, None] + steps[:, None] * directions[:, :, None])
        found = first_brackets(values[0], self.levels)
        closest, nearest = values[0].min(-1)
        depth = torch.lerp(steps[found.after - 1], steps[found.after], found.fraction)
        depth = torch.where(found.valid, depth, steps[nearest][:, None])  # (R, N)
        uv = self.layout(origins[0, :, None] + depth[..., None] * directions[0, :, None])  # (R, N, 2)

        closest = closest.reshape(1, 1, coarse, coarse)
        rows, columns = _window(closest[0, 0] <= self.levels[0])
        backdrop, behind = self._backdrop(camera, side)
        image = F.pad(backdrop, (0, 0, 0, 0, 0, 2))
        if rows.stop == 0:
            return image
        maps = torch.cat([uv, depth[..., None]], -1).permute(2, 1, 0).reshape(3, -1, coarse, coarse)
        maps, closest = maps[..., rows, columns], closest[..., rows, columns]
        uv = _enlarge(maps[:2].transpose(0, 1), stride).permute(0, 2, 3, 1)  # (N, h, w, 2)
        depth, closest = _enlarge(maps[2:], stride)[0], _enlarge(closest, stride)[0]

        texels = F.grid_sample(self.textures, uv, align_corners=False, padding_mode="border")  # (N, 4, h, w)
        window = slice(rows.start * stride, rows.stop * stride), slice(columns.start * stride, columns.stop * stride)
        alpha = texels[:, 3] * (closest <= self.levels[:, None, None])
        if behind is not None:
            alpha = alpha * (depth < behind[window])
        clear = (1 - alpha).cumprod(0)
        weights = torch.cat([alpha[:1], alpha[1:] * clear[:-1]])  # T_i a_i (Eq. 2)
        colour = (weights[:, None] * texels[:, :3]).sum(0)
        total = 1 - clear[-1:]
        depth = (weights * depth).sum(0, keepdim=True) / total.clamp_min(EMPTY)
        image[:3, *window] = colour + (1 - total) * backdrop[:, *window]
        image[3:, *window] = torch.cat([total, depth * (total > 0)])
        return image

    def _backdrop(self, camera: Camera, side: int) -> tuple[Tensor, Tensor | None]:
        """What is behind the head, (3, side, side), and the depth (side, side) of what it is painted on."""
        if self.plane is None:
            if self.backdrop.shape[-1] == side:
                return self.backdrop[0], None
            return F.interpolate(self.backdrop, (side, side), mode="bilinear", align_corners=False)[0], None
        x, y, z, reach = self.plane
        origins, directions = (rays.reshape(side, side, 3) for rays in camera.rays(side))
        depth = (origins[..., 2] - z) / (-directions[..., 2]).clamp_min(1e-3)
        points = origins + depth[..., None] * directions
        uv = torch.stack([points[..., 0] - x, y - points[..., 1]], -1) / reach
        return F.grid_sample(self.backdrop, uv[None], align_corners=False, padding_mode="border")[0], depth


def _window(mask: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a mask (H, W) that hold all of it, and one more on each side; empty without any."""
    spans = []
    for axis in (1, 0):
        found = mask.any(axis).nonzero()[:, 0].tolist()
        spans.append(slice(max(found[0] - 1, 0), found[-1] + 2) if found else slice(0, 0))
    return spans[0], spans[1]


def _enlarge(maps: Tensor, factor: int) -> Tensor:
    """Maps (B, C, H, W) bilinearly made ``factor`` times larger; channels last, which is fast and looked up so."""
    if factor == 1:
        return maps
    maps = maps.contiguous(memory_format=torch.channels_last)
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


def grow(textures: Tensor, known: Tensor) -> Tensor:
    """Continue textures (N, 4, H, W) over their borders (N, 1, H, W), as far as a lookup can reach."""
    for _ in range(BORDER):
        total, weight = (F.avg_pool2d(x * known, 3, 1, 1) for x in (textures, torch.ones_like(textures)))
        textures = torch.where(known > 0, textures, total / weight.clamp_min(EMPTY))
        known = F.max_pool2d(known, 3, 1, 1)
    return textures
