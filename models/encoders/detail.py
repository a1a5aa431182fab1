"""Details that style codes cannot say, from one photo onto the surface manifolds.

Source: GRAMInverter (Deng et al., 2023), Sec. 3.3 and A.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.configurable import Configurable
from models.generators.manifold import ManifoldGenerator
from models.rendering.output import Edit

SPACES = ("camera", "world")


def _conv(dims: int, before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d | nn.Conv3d:
    layer = (nn.Conv2d, nn.Conv3d)[dims - 2](before, after, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _silent(layer: nn.Conv2d | nn.Conv3d) -> nn.Conv2d | nn.Conv3d:
    """Without an effect at first: training starts at the coarse result."""
    nn.init.zeros_(layer.weight)
    return layer


class Residual(nn.Module):
    """x + gain * conv(act(conv(act(x)))) in two or three dimensions.

    The gain is learnt from a small start, which makes normalisation unnecessary: absolute colour survives.
    """

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.first, self.second = _conv(dims, channels, channels), _conv(dims, channels, channels)
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.second(F.silu(self.first(F.silu(x))))


class UNet3d(nn.Module):
    """(B, widths[0], D, H, W) to the same shape; each level halves the sides, and skips are added.

    Args:
        widths: channels from the finest level to the coarsest.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.inwards = nn.ModuleList(Residual(3, width) for width in widths)
        self.down = nn.ModuleList(_conv(3, a, b, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_conv(3, b, a, kernel=1) for a, b in pairwise(widths))
        self.outwards = nn.ModuleList(Residual(3, width) for width in widths[:-1])

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.inwards
        x = first(x)
        skips = []
        for down, block in zip(self.down, others, strict=True):
            skips.append(x)
            x = block(down(F.silu(x)))
        for up, block, skip in zip(reversed(self.up), reversed(self.outwards), reversed(skips), strict=True):
            x = block(F.interpolate(up(F.silu(x)), skip.shape[2:], mode="trilinear", align_corners=False) + skip)
        return x


class DetailEncoder(Configurable):
    """E_detail: a photo, and what its coarse reconstruction misses, to a feature voxel (Eq. 4).

    2D blocks shrink the picture to the voxel's side, a convolution lifts it into depth, and a 3D U-Net and 3D
    residual blocks refine it.

    Args:
        resolution: image side in pixels.
        voxel: D, H and W.
        features: d_V, channels of the voxel.
        widths: of the 2D blocks; each but the first halves the side, down to the voxel's.
        unet: widths of the 3D U-Net, finest first.
        blocks: 3D residual blocks behind it.
        space: where the voxel lies: "camera", in the frustum between the rig's near and far depth that the outermost
            rays of the photo's camera bound, or "world", as that of a frontal camera would, but a box.

    Raises:
        ValueError: for an unknown space, or widths that do not lead to the voxel's side.
    """

    def __init__(
        self,
        resolution: int = 256,
        voxel: Sequence[int] = (32, 64, 64),
        features: int = 16,
        widths: Sequence[int] = (32, 64, 128),
        unet: Sequence[int] = (16, 32, 64, 128),
        blocks: int = 2,
        space: str = "camera",
    ) -> None:
        super().__init__()
        if space not in SPACES:
            raise ValueError(f"detail.space must be one of {SPACES}, got {space!r}")
        depth, height, width = voxel
        if height != width or resolution != height << (len(widths) - 1):
            raise ValueError(
                f"detail.widths: {len(widths)} 2D blocks lead from {resolution} to {resolution >> len(widths) - 1} "
                f"pixels, not to the voxel's {height} x {width}"
            )
        self.resolution, self.features, self.space, self.depth = resolution, features, space, depth
        self.stem = _conv(2, 6, widths[0])
        self.down = nn.ModuleList(
            nn.Sequential(_conv(2, a, b, stride=2), Residual(2, b), nn.SiLU()) for a, b in pairwise(widths)
        )
        self.lift = nn.Sequential(_conv(2, widths[-1], depth * unet[0], kernel=1), nn.Unflatten(1, (unet[0], depth)))
        self.refine = nn.Sequential(UNet3d(unet), *(Residual(3, unet[0]) for _ in range(blocks)), nn.SiLU())
        self.out = _conv(3, unet[0], features)

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Voxel V (B, d_V, D, H, W) of a photo I and its coarse reconstruction I_w, (B, 3, R, R) in [-1, 1].

        Raises:
            ValueError: for pictures of another size.
        """
        if tuple(image.shape[1:]) != (3, self.resolution, self.resolution) or image.shape != coarse.shape:
            raise ValueError(
                f"photos must be (B, 3, {self.resolution}, {self.resolution}) and their coarse reconstructions alike, "
                f"got {tuple(image.shape)} and {tuple(coarse.shape)}"
            )
        x = F.silu(self.stem(torch.cat([image, image - coarse], 1)))
        for down in self.down:
            x = down(x)
        return self.out(self.refine(self.lift(x)))

    def place(self, points: Tensor, camera: Camera, rig: Rig, *, behind: bool = False) -> Tensor:
        """World points (B, P, 3) to coordinates (B, P, 3) of the voxel, [-1, 1] inside: world2cam of Eq. 5.

        ``behind``: points beyond the far depth are put on the voxel's last slice, as the plane behind a head that the
        camera sees from the side.
        """
        if self.space == "world":
            x, y, z = (points - points.new_tensor(rig.pivot)).unbind(-1)
            half, depth = rig.frame / 2 * rig.far / rig.radius, rig.radius - z
            x, y = x / half, -y / half
        else:
            uv, depth = camera.project(points)  # the division by depth is in here
            x, y = (2 * uv - 1).unbind(-1)
        z = 2 * (depth - rig.near) / (rig.far - rig.near) - 1
        return torch.stack([x, y, z.clamp_max(1 - 1 / self.depth) if behind else z], -1)

    def lookup(self, voxel: Tensor, points: Tensor, camera: Camera, rig: Rig, *, behind: bool = False) -> Tensor:
        """f_lr (B, P, d_V) of world points (B, P, 3), 0 outside of the voxel (Eq. 5).

        Args:
            voxel: (B, d_V, D, H, W). camera: B cameras, of the photos. rig: gives near and far.
            behind: see :meth:`place`.
        """
        return trilinear(voxel, self.place(points, camera, rig, behind=behind), "zeros")


class ManifoldUpsampler(Configurable):
    """U: a 2D network that all manifolds share, of blocks with a bilinear enlargement in the middle (A.2).

    Args:
        before: channels of f_lr. after: channels of f_hr.
        widths: of the blocks, each of which doubles the side; two in the paper.
        project: whether a 1x1 convolution leads to f_hr; otherwise the last of the blocks' does, as in the paper.
    """

    def __init__(
        self, before: int = 16, after: int = 32, widths: Sequence[int] = (32, 32), project: bool = True
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        for a, b in pairwise((before, *widths)):
            enlarge = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            self.blocks.extend([_conv(2, a, b), nn.SiLU(), enlarge, _conv(2, b, b), nn.SiLU()])
        if project:
            self.out = _silent(_conv(2, widths[-1], after, kernel=1))
        else:
            self.out = nn.Identity()
            self.blocks = self.blocks[:-2].append(_silent(_conv(2, widths[-1], after)))

    @property
    def scale(self) -> int:
        """How many times larger f_hr is than f_lr."""
        return 2 ** sum(isinstance(layer, nn.Upsample) for layer in self.blocks)

    def forward(self, f_lr: Tensor) -> Tensor:
        """Flattened manifolds (B, N, before, h, w) -> (B, N, after, scale * h, scale * w)."""
        batch = f_lr.shape[0]
        # Channels last suits many small pictures on a CPU.
        x = f_lr.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.out(self.blocks(x)).unflatten(0, (batch, -1))


@dataclass(frozen=True)
class Details:
    """The details of B photos, at any point in space.

    Attributes:
        volume: (B, C, D, H, W) features.
        place: world points (B, P, 3) to coordinates (B, P, 3) in it.
        padding: what lies outside: "border" or "zeros".
        behind: of the plane behind the head, None where that has none.
    """

    volume: Tensor
    place: Callable[[Tensor], Tensor]
    padding: str
    behind: Details | None = None

    def __call__(self, points: Tensor) -> Tensor:
        """Details (B * V, P, C) at world points (B * V, P, 3), V sets for each photo."""
        rows = points.reshape(len(self.volume), -1, 3)
        return trilinear(self.volume, self.place(rows), self.padding).reshape(*points.shape[:-1], -1)

    def edit(self, points: Tensor, features: Tensor) -> Tensor:
        """Psi(w+, x) + f_hr(x): as ``edit`` of :meth:`models.generators.base.Generator.synthesis`."""
        return features + self(points).to(features.dtype)

    @property
    def edits(self) -> dict[str, Edit]:
        """Of :meth:`models.generators.manifold.ManifoldGenerator.synthesis` and ``bake``, by their names there."""
        return {"edit": self.edit} | ({} if self.behind is None else {"background_edit": self.behind.edit})


class DetailReconstructor(Configurable):
    """From a photo to details on the manifolds: E_detail and, with ``super_resolution``, U (Sec. 3.3).

    Args:
        features: channels of the generator's field, to which details are added.
        resolution, voxel, voxel_features, widths, unet, blocks, space: of :class:`DetailEncoder`.
        super_resolution: without it the voxel's own features are the details.
        atlas: side of the grid on each manifold that f_lr is read on.
        upsampler, project: widths of :class:`ManifoldUpsampler`, and whether it ends in a 1x1 convolution.
        background: whether the plane behind the head has details too, of a generator with a shared background: it is
            the last of the paper's surfaces. Without them what a photo shows there must hang before it.
    """

    def __init__(
        self,
        features: int = 32,
        resolution: int = 256,
        voxel: Sequence[int] = (32, 64, 64),
        voxel_features: int = 16,
        widths: Sequence[int] = (32, 64, 128),
        unet: Sequence[int] = (16, 32, 64, 128),
        blocks: int = 2,
        space: str = "camera",
        super_resolution: bool = True,
        atlas: int = 64,
        upsampler: Sequence[int] = (32, 32),
        project: bool = True,
        background: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.resolution, self.atlas, self.background = features, resolution, atlas, background
        self.encoder = DetailEncoder(resolution, voxel, voxel_features, widths, unet, blocks, space)
        enlarge = ManifoldUpsampler(voxel_features, features, upsampler, project) if super_resolution else None
        self.upsampler = enlarge
        self.direct = None if super_resolution else _silent(_conv(3, voxel_features, features, kernel=1))

    def check(self, generator: ManifoldGenerator) -> None:
        """Refuse a generator that the details do not fit.

        Raises:
            ValueError: saying which setting to change.
        """
        point = torch.zeros(1, 1, 3, device=generator.levels.device)
        with torch.no_grad():
            width = generator.features(generator.mean_latents, point).shape[2]
        if width != self.features:
            raise ValueError(f"detail.features is {self.features}, the generator's field has {width} channels")
        if generator.resolution != self.resolution:
            raise ValueError(f"detail.resolution is {self.resolution}, the generator renders {generator.resolution} px")
        if self.background and not generator.has_plane:
            raise ValueError("detail.background needs a generator with a plane behind the head (background: shared)")

    def forward(self, image: Tensor, coarse: Tensor, camera: Camera, generator: ManifoldGenerator) -> Details:
        """Details of photos.

        Args:
            image, coarse: (B, 3, R, R) in [-1, 1], photos and their coarse reconstructions.
            camera: B cameras.
            generator: on whose manifolds the details lie.
        """
        voxel = self.encoder(image, coarse)
        with torch.autocast(camera.device.type, enabled=False):
            encoder, rig = self.encoder, generator.rig
            if self.direct is not None:
                volume = self.direct(voxel.float())
                behind = Details(volume, lambda points: encoder.place(points, camera, rig, behind=True), "zeros")
                place = lambda points: encoder.place(points, camera, rig)  # noqa: E731
                return Details(volume, place, "zeros", behind if self.background else None)
            grid, rows = generator.atlas(self.atlas), len(image)
            points = grid.points.reshape(1, -1, 3).expand(rows, -1, -1)
            f_lr = [encoder.lookup(voxel, points, camera, rig) * grid.valid.reshape(1, -1, 1)]
            if self.background:  # the last surface
                plane = generator.plane_grid(self.atlas).reshape(1, -1, 3).expand(rows, -1, -1)
                f_lr.append(encoder.lookup(voxel, plane, camera, rig, behind=True))
        assert self.upsampler is not None
        flat = torch.cat(f_lr, 1).mT.unflatten(2, (-1, self.atlas, self.atlas))
        f_hr = self.upsampler(flat.transpose(1, 2)).transpose(1, 2)
        if not self.background:
            return Details(f_hr, generator.on_atlas, "border")
        behind = Details(f_hr[:, :, -1:], generator.on_plane, "border")
        return Details(f_hr[:, :, :-1], generator.on_atlas, "border", behind)


def trilinear(volume: Tensor, coordinates: Tensor, padding: str) -> Tensor:
    """Features (B, P, C) of a volume (B, C, D, H, W) at coordinates (B, P, 3), x first; at least in fp32.

    Voxel i of n has its centre at (2 i + 1) / n - 1.
    """
    with torch.autocast(volume.device.type, enabled=False):
        volume = volume.to(torch.promote_types(volume.dtype, coordinates.dtype))
        grid = coordinates[:, :, None, None]
        return F.grid_sample(volume, grid, align_corners=False, padding_mode=padding)[..., 0, 0].mT
