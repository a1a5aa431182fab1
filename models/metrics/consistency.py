"""Whether renderings of one head belong to one 3D shape.

Two measures. :func:`surface_consistency` fits one surface to all views and compares it with them, as GRAM-HD (Xiang
et al. 2022) and GRAMInverter (Deng et al. 2023, Sec. 4.2: PSNR_mv, SSIM_mv) do with NeuS (Wang et al. 2021).
:func:`carried` needs the true depth and no fit: it carries the colours of one view to another one.
Neither sees blur: read them beside a measure of sharpness. For the eye there is :func:`stacked_line`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.metrics.image import psnr, ssim
from models.rendering.compositing import composite_layers, layer_weights, resample, stratified_depths
from models.rendering.visibility import seen_from


@dataclass(frozen=True)
class SurfaceRecipe:
    """How a surface is fitted.

    Attributes:
        cells: of the finest grid along each side of the cube; about one a pixel.
        levels: grids, each half as fine as the next.
        features: colour channels of the grids; hidden: width of the colour network.
        steps: of Adam; rays: of each step.
        coarse, fine: pieces of a ray, evenly spread and near the surface.
        distance_lr, colour_lr, sharpness_lr: learning rates, falling by a cosine to 5 %.
        eikonal_weight, mask_weight: lambda and beta of NeuS, Eq. 14.
        seed: of all draws.
    """

    cells: int = 64
    levels: int = 3
    features: int = 6
    hidden: int = 32
    steps: int = 500
    rays: int = 512
    coarse: int = 24
    fine: int = 12
    distance_lr: float = 8e-3
    colour_lr: float = 2e-2
    sharpness_lr: float = 2e-3
    eikonal_weight: float = 0.1
    mask_weight: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.cells >> (self.levels - 1), self.levels, self.steps, self.rays, self.coarse, self.fine) < 1:
            raise ValueError(f"a surface needs levels, steps, rays, pieces and at least one cell a level: {self}")


class NeuralSurface(nn.Module):
    """NeuS on dense grids: a signed distance and colour features over the cube [-1, 1]^3, and a colour network.

    NeuS' networks of eight layers are replaced by sums of grids, which take minutes of a CPU instead of hours.

    Args:
        recipe: sizes.
        generator: of the initial values.
    """

    def __init__(self, recipe: SurfaceRecipe, generator: Generator) -> None:
        super().__init__()
        sides = [(recipe.cells >> level) + 1 for level in reversed(range(recipe.levels))]
        along = torch.linspace(-1, 1, sides[0])
        sphere = torch.stack(torch.meshgrid(along, along, along, indexing="ij")).norm(dim=0) - 0.5
        finer = [torch.zeros(1, 1, side, side, side) for side in sides[1:]]
        self.distance = nn.ParameterList([sphere[None, None], *finer])
        self.features = nn.ParameterList(
            0.1 * torch.randn(1, recipe.features, side, side, side, generator=generator) for side in sides
        )
        # Without their own initial values, which would be drawn from the global generator.
        hidden, out = (
            nn.utils.skip_init(nn.Linear, *sizes)
            for sizes in ((recipe.features + 6, recipe.hidden), (recipe.hidden, 3))
        )
        self.colour = nn.Sequential(hidden, nn.ReLU(), out)
        for parameter in self.colour.parameters():
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.sharpness = nn.Parameter(torch.tensor(0.3))  # s = exp(10 v), as NeuS learns it

    def grid(self) -> Tensor:
        """(1, 4 + features, n, n, n): the distance, its gradient (x, y, z) and the features, all levels summed."""
        side = self.distance[-1].shape[-1]

        def total(levels: nn.ParameterList) -> Tensor:
            finest = levels[-1]
            coarser = [F.interpolate(grid, (side,) * 3, mode="trilinear", align_corners=True) for grid in levels[:-1]]
            return sum(coarser, finest)

        distance = total(self.distance)
        z, y, x = torch.gradient(distance[0, 0], spacing=2 / (side - 1))
        return torch.cat([distance, torch.stack([x, y, z])[None], total(self.features)], 1)

    def alpha(self, grid: Tensor, points: Tensor) -> Tensor:
        """Opacity (1, R, N, 1) of the pieces between points (R, N + 1, 3) along rays."""
        phi = torch.sigmoid((10 * self.sharpness).exp() * look_up(grid[:, :1], points))
        # Eq. 13: alpha_i = max((Phi_s(f(p_i)) - Phi_s(f(p_i+1))) / Phi_s(f(p_i)), 0)
        return ((phi[:, :-1] - phi[:, 1:]) / phi[:, :-1].clamp_min(1e-7)).clamp(0, 1)[None]

    def render(self, grid: Tensor, origins: Tensor, directions: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Render rays (R, 3), cut into pieces at ``edges`` (R, N + 1).

        Returns:
            colour (R, 3) in [-1, 1], black where there is nothing; opacity (R, 1); and depth (R, 1).
        """
        middle = (edges[:, 1:] + edges[:, :-1]) / 2
        alpha = self.alpha(grid, origins[:, None] + edges[..., None] * directions[:, None])
        found = look_up(grid[:, 1:], origins[:, None] + middle[..., None] * directions[:, None])
        gradient, features = found.split([3, found.shape[-1] - 3], -1)
        normals, view = F.normalize(gradient, dim=-1), F.normalize(directions, dim=-1)[:, None].expand_as(gradient)
        colour = torch.tanh(self.colour(torch.cat([features, normals, view], -1)))
        # Eq. 11: C = sum_i T_i alpha_i c_i, over black
        blended, opacity, depth = composite_layers(colour[None] + 1, alpha, middle[None, ..., None])
        return blended[0] - 1, opacity[0], depth[0]


def look_up(grid: Tensor, points: Tensor) -> Tensor:
    """Trilinear values (R, N, C) of a grid (1, C, n, n, n) over [-1, 1]^3 at points (R, N, 3)."""
    found = F.grid_sample(grid, points[None, None], padding_mode="border", align_corners=True)
    return found[0, :, 0].movedim(0, -1)


@dataclass(frozen=True)
class SurfaceFit:
    """A fitted surface, seen by the cameras it was fitted to."""

    image: Tensor
    """(V, 3, H, W) in [-1, 1], black where there is nothing."""
    depth: Tensor
    """(V, 1, H, W) camera-z, world units, where alpha > 0."""
    alpha: Tensor
    """(V, 1, H, W) in [0, 1]."""


def fit_surface(image: Tensor, mask: Tensor, camera: Camera, recipe: SurfaceRecipe | None = None) -> SurfaceFit:
    """Fit one surface to views of one head, and look at it from the same cameras.

    The cube around the head is as wide as the pictures; whatever is in front of another backdrop must be masked.

    Args:
        image: (V, 3, H, W) in [-1, 1], black where the mask is 0.
        mask: (V, 1, H, W) in [0, 1].
        camera: V cameras around one point.
        recipe: settings.
    """
    recipe = recipe or SurfaceRecipe()
    device, draws = image.device, Generator().manual_seed(recipe.seed)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        origins, directions, near, far = _cube(camera.to(dtype=torch.float32), image.shape[-2], image.shape[-1])
        colour = image.detach().float().permute(0, 2, 3, 1).reshape(-1, 3)
        solid = mask.detach().float().clamp(0, 1).reshape(-1, 1)  # sums of weights exceed 1 by rounding
        surface = NeuralSurface(recipe, draws).to(device)
        rates = {"distance": recipe.distance_lr, "sharpness": recipe.sharpness_lr}
        groups = [
            {"params": [parameter], "lr": rates.get(name.split(".")[0], recipe.colour_lr)}
            for name, parameter in surface.named_parameters()
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps, 0.05 * recipe.distance_lr)
        for _ in range(recipe.steps):
            rays = torch.randint(len(colour), (recipe.rays,), generator=draws).to(device)
            grid = surface.grid()
            edges = _pieces(surface, grid, origins[rays], directions[rays], near, far, recipe, draws)
            found, opacity, _ = surface.render(grid, origins[rays], directions[rays], edges)
            color_loss = (found - colour[rays]).abs().mean()  # Eq. 15
            eikonal = (grid[:, 1:4].norm(dim=1) - 1).square().mean()  # Eq. 16, at every node of the grid
            mask_loss = F.binary_cross_entropy(opacity.clamp(1e-3, 1 - 1e-3), solid[rays])  # Eq. 17
            loss = color_loss + recipe.eikonal_weight * eikonal + recipe.mask_weight * mask_loss  # Eq. 14
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        grid = surface.grid()
        parts = []
        for rays in torch.arange(len(colour), device=device).split(4 * recipe.rays):
            edges = _pieces(surface, grid, origins[rays], directions[rays], near, far, recipe)
            parts.append(torch.cat(surface.render(grid, origins[rays], directions[rays], edges), 1))
    maps = torch.cat(parts).reshape(len(image), *image.shape[-2:], 5).permute(0, 3, 1, 2)
    scale = _extent(camera)
    return SurfaceFit(maps[:, :3], maps[:, 4:] * scale, maps[:, 3:4])


def _extent(camera: Camera) -> float:
    """Half the side of the cube, world units: a bit more than half of what a picture is wide at its middle."""
    return 0.58 * float((camera.position - _middle(camera)).norm(dim=1).mean() / camera.intrinsics[:, 0, 0].mean())


def _middle(camera: Camera) -> Tensor:
    """(3,) the point nearest to all optical axes, in the least-squares sense."""
    forward, position = camera.forward.double(), camera.position.double()
    across = torch.eye(3, dtype=torch.float64, device=camera.device) - forward[:, :, None] * forward[:, None]
    return torch.linalg.lstsq(across.sum(0), (across @ position[..., None]).sum(0)[:, 0]).solution.to(camera.position)


def _cube(camera: Camera, height: int, width: int) -> tuple[Tensor, Tensor, float, float]:
    """All rays (V * H * W, 3) in the cube's units, and the range of camera depths that it lies in."""
    scale = _extent(camera)
    origins, directions = camera.rays(height, width)
    origins = (origins - _middle(camera)) / scale
    distance = float(origins[:, 0].norm(dim=-1).mean())
    return origins.flatten(0, 1), directions.flatten(0, 1), distance - 1, distance + 1


def _pieces(
    surface: NeuralSurface,
    grid: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: float,
    far: float,
    recipe: SurfaceRecipe,
    draws: Generator | None = None,
) -> Tensor:
    """Edges (R, coarse + fine + 1) of a ray's pieces: evenly spread, and where the surface is now."""
    rays = len(origins)
    with torch.no_grad():
        jitter = torch.rand(rays, 2, generator=draws).to(grid.device) if draws else grid.new_full((rays, 2), 0.5)
        even = stratified_depths((1, rays), recipe.coarse + 1, near, far, jitter[None, :, :1])
        points = origins[:, None] + even[0, ..., None] * directions[:, None]
        weights = layer_weights(surface.alpha(grid.detach(), points))[..., 0]
        near_surface = resample(even, weights, jitter[None, :, 1:].expand(-1, -1, recipe.fine))
        return torch.cat([even, near_surface], -1)[0].sort(-1).values


@dataclass(frozen=True)
class Consistency:
    """PSNR_mv (dB) and SSIM_mv of one head, over the pixels of its mask."""

    psnr: float
    ssim: float
    fit: SurfaceFit


def around(rig: Rig, views: int = 30, yaw: float = 0.5, pitch: float = 0.2) -> Camera:
    """The views that a surface is fitted to: a figure of eight around the front, ``yaw`` and ``pitch`` radians wide."""
    phase = torch.arange(views) * (2 * math.pi / views)
    return rig.camera(rig.yaw_mean + yaw * phase.sin(), rig.pitch_mean + pitch * (2 * phase).sin())


def surface_consistency(
    image: Tensor, mask: Tensor, camera: Camera, recipe: SurfaceRecipe | None = None
) -> Consistency:
    """Fit one surface to views of one head and compare it with them (GRAMInverter, Sec. 4.2).

    Backgrounds are left out: a backdrop that is fixed to the picture belongs to no surface.

    Args:
        image: (V, 3, H, W) in [-1, 1]; the paper has 30 views.
        mask: (V, 1, H, W) in [0, 1]: the head.
        camera: V cameras.
        recipe: settings.

    Returns:
        means over views; and what was fitted.
    """
    alone = (image.float().clamp(-1, 1) + 1) * mask - 1
    fit = fit_surface(alone, mask, camera, recipe)
    solid = (mask > 0.5).float()
    values = psnr(fit.image, alone, solid), ssim(fit.image, alone, solid)
    return Consistency(float(values[0].nanmean()), float(values[1].nanmean()), fit)


def carried(image: Tensor, camera: Camera, depth: Tensor, mask: Tensor, reference: int) -> tuple[Tensor, Tensor]:
    """Each view as the ``reference`` view predicts it, by the true depth: colours stay on their points.

    Args:
        image: (V, 3, H, W) renderings of one head.
        camera: V cameras.
        depth: (V, 1, H, W) true camera-z, world units; mask: (V, 1, H, W) the true head.
        reference: index of the view whose colours are carried.

    Returns:
        pictures (V, 3, H, W), and (V, 1, H, W) bool: the pixels that both views show. Compare with ``image`` there.
    """
    size = image.shape[-2:]
    one = slice(reference, reference + 1)
    shared = seen_from(camera, depth, mask, camera[one], depth[one], mask[one])
    origins, directions = camera.rays(*size)
    uv, _ = camera[one].repeat_interleave(len(camera)).project(origins + depth.flatten(2).mT * directions)
    grid = (2 * uv - 1).unflatten(1, size)
    source = image[one].expand(len(image), -1, -1, -1)
    return F.grid_sample(source, grid, padding_mode="border", align_corners=False), shared


def stacked_line(image: Tensor, height: float = 0.5) -> Tensor:
    """One row of every view of a steady camera sweep, below each other (GRAMInverter, Fig. 5): (3, V, W).

    A consistent head gives smooth tilted strips, colours that stick to the picture upright ones.

    Args:
        image: (V, 3, H, W).
        height: of the row, 0 at the top and 1 at the bottom.
    """
    return image[:, :, min(int(height * image.shape[2]), image.shape[2] - 1)].transpose(0, 1)
