"""Compositing of surface layers and of sampled volumes, and the normals of what was rendered.

Rays are a batch of P; samples and layers are ordered front to back along the axis N. Depths are camera-z in
world units, as in :meth:`models.camera.Camera.rays`, whose directions are NOT of unit length: optical length
along a ray is depth times the length of its direction.

Sources: NeRF (Mildenhall et al., 2020) for volumes; GRAM (Deng et al., 2022, Eq. 3) and GRAMInverter
(Deng et al., 2023, Eq. 2) for manifolds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera

Randomness = torch.Generator | Tensor | None
"""Numbers for a random draw: a seeded generator, the uniform numbers themselves, or None for no randomness."""

EMPTY = 1e-8  # a ray with less weight than this has no depth; an opacity sum this small is not divided by


def uniform(shape: tuple[int, ...], randomness: Randomness, device: torch.device | str) -> Tensor:
    """Uniform numbers in [0, 1) of ``shape``: drawn, taken as given, or 0.5 everywhere.

    Raises:
        ValueError: when a given tensor has another shape.
    """
    if randomness is None:
        return torch.full(shape, 0.5, device=device)
    if isinstance(randomness, torch.Generator):
        return torch.rand(shape, generator=randomness, device=randomness.device).to(device)
    if tuple(randomness.shape) != tuple(shape):
        raise ValueError(f"randomness must be uniform numbers of shape {tuple(shape)}, got {tuple(randomness.shape)}")
    return randomness.to(device)


def layer_weights(alpha: Tensor) -> Tensor:
    """Visibility of each layer, T_i a_i with T_i = prod_{j<i} (1 - a_j) (GRAM Eq. 3).

    Args:
        alpha: (B, P, N, 1) opacities in [0, 1], front to back.

    Returns:
        (B, P, N, 1) weights; they sum to at most 1.
    """
    clear = torch.cumprod(1 - alpha, 2)
    transmittance = torch.cat([torch.ones_like(clear[:, :, :1]), clear[:, :, :-1]], 2)
    return transmittance * alpha


def composite_layers(colour: Tensor, alpha: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Composite layers or volume samples front to back.

    Args:
        colour: (B, P, N, C) colours or features.
        alpha: (B, P, N, 1) opacities in [0, 1].
        depth: (B, P, N, 1) depths, world units; finite, also where alpha is 0.

    Returns:
        colour (B, P, C), premultiplied, without any background; alpha (B, P, 1); and depth (B, P, 1), the
        expected depth of what is visible, 0 on empty rays.
    """
    weights = layer_weights(alpha)
    total = weights.sum(2)
    blended = (weights * colour).sum(2)  # C = sum_i T_i a_i c_i (GRAM Eq. 3)
    # z = sum_i T_i a_i z_i / sum_i T_i a_i: without the division a half transparent surface comes out too near.
    expected = (weights * depth).sum(2) / total.clamp_min(EMPTY)
    return blended, total, expected


def sample_edges(depth: Tensor, near: float, far: float) -> Tensor:
    """Borders of the piece of the ray that each sample stands for: the midpoints between samples.

    Args:
        depth: (B, P, N) sample depths in ascending order within [near, far].

    Returns:
        (B, P, N + 1) from ``near`` to ``far``. The pieces cover the ray without gap, so that a constant density
        is integrated exactly, wherever the samples are.
    """
    middle = (depth[..., 1:] + depth[..., :-1]) / 2
    ends = torch.full_like(depth[..., :1], near), torch.full_like(depth[..., :1], far)
    return torch.cat([ends[0], middle, ends[1]], -1)


def density_alpha(density: Tensor, length: Tensor) -> Tensor:
    """Opacity of a piece of a ray, a_i = 1 - exp(-sigma_i delta_i) (NeRF Eq. 3).

    Args:
        density: (B, P, N, 1) volume density, 1 / world unit.
        length: (B, P, N, 1) length delta of each piece, world units (depth interval times direction length).
    """
    return -torch.expm1(-density * length)


def stratified_depths(rays: tuple[int, int], count: int, near: float, far: float, jitter: Tensor) -> Tensor:
    """One sample in each of ``count`` equal pieces of [near, far] (NeRF Eq. 2).

    Args:
        rays: (B, P).
        jitter: uniform numbers, broadcastable to (B, P, count); 0.5 gives the middle of each piece.

    Returns:
        (B, P, count) ascending depths.
    """
    start = torch.arange(count, device=jitter.device, dtype=jitter.dtype)
    return (near + (far - near) * (start + jitter) / count).expand(*rays, count)


def widen(weights: Tensor) -> Tensor:
    """Let each piece's weight reach its neighbours (mip-NeRF Eq. 18).

    A surface may lie just before the piece whose sample was the first to hit.

    Args:
        weights: (B, P, N), in [0, 1].

    Returns:
        (B, P, N), at least 0.01 so that the second pass also looks elsewhere.
    """
    pairs = F.max_pool1d(weights, 2, 1, padding=1)  # max(w_{k-1}, w_k) for k = 0..N
    return (pairs[..., 1:] + pairs[..., :-1]) / 2 + 0.01


def resample(edges: Tensor, weights: Tensor, jitter: Tensor) -> Tensor:
    """Hierarchical sampling: draw depths where the weights are, by the inverse CDF (NeRF Sec. 5.2).

    Args:
        edges: (B, P, N + 1) ascending borders of the pieces.
        weights: (B, P, N) non-negative weight of each piece; a ray without weight is sampled evenly.
        jitter: (B, P, M) uniform numbers, one in each of M equal strata of the CDF.

    Returns:
        (B, P, M) ascending depths. No gradient flows through the choice of samples.
    """
    count = jitter.shape[-1]
    strata = torch.arange(count, device=jitter.device, dtype=jitter.dtype)
    return inverse_cdf(edges, weights, (strata + jitter) / count)


def inverse_cdf(edges: Tensor, weights: Tensor, quantiles: Tensor) -> Tensor:
    """Depths at which the piecewise constant density ``weights`` over ``edges`` reaches ``quantiles``.

    Args:
        edges, weights: as in :func:`resample`.
        quantiles: (B, P, M) in [0, 1], in any order.

    Returns:
        (B, P, M) depths, without gradient.
    """
    edges, weights = edges.detach(), weights.detach() + 1e-5
    cdf = torch.cumsum(weights / weights.sum(-1, keepdim=True), -1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], -1)
    upper = torch.searchsorted(cdf, quantiles.contiguous(), right=True).clamp(1, edges.shape[-1] - 1)
    low, high = cdf.gather(-1, upper - 1), cdf.gather(-1, upper)
    start, end = edges.gather(-1, upper - 1), edges.gather(-1, upper)
    return start + (end - start) * ((quantiles - low) / (high - low).clamp_min(1e-8)).clamp(0, 1)


def field_gradient(
    field: Callable[[Tensor], Tensor], points: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """A scalar field and its spatial gradient, in fp32 or more whatever the caller's autocast or no_grad.

    Args:
        field: (B, P, 3) -> (B, P, 1), each value depending on its own point alone.
        points: (B, P, 3) world points.
        create_graph: keep the gradient differentiable (an eikonal loss).

    Returns:
        value (B, P, 1), per world unit as the field gives it, and gradient (B, P, 3). Detached unless
        ``create_graph``.
    """
    with torch.enable_grad(), torch.autocast(points.device.type, enabled=False):
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        points = points if create_graph else points.detach()
        if not points.requires_grad:
            points = points.requires_grad_()
        value = field(points)
        (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=create_graph)
    return (value, gradient) if create_graph else (value.detach(), gradient)


def field_normals(
    field: Callable[[Tensor], Tensor], points: Tensor, *, outward: float, create_graph: bool = False
) -> Tensor:
    """Unit normals of a scalar field.

    Args:
        outward: +1 for a field that grows outwards (signed distance), -1 for one that grows inwards (density,
            occupancy).

    Returns:
        (B, P, 3) on world axes; 0 where the field is flat.
    """
    return F.normalize(outward * field_gradient(field, points, create_graph=create_graph)[1], dim=-1)


def depth_normals(depth: Tensor, alpha: Tensor, camera: Camera) -> Tensor:
    """Normals of a depth map, from the cross product of the tangents between neighbouring pixels.

    A neighbour counts by its opacity, so no tangent reaches over the silhouette into the background, and at the
    silhouette the differences are one-sided. A pixel without neighbours faces the camera.

    Args:
        depth: (B, 1, H, W) camera-z, world units.
        alpha: (B, 1, H, W) in [0, 1].
        camera: B cameras.

    Returns:
        (B, 3, H, W) unit normals on world axes, facing the camera; 0 where alpha is 0. fp32, differentiable
        with respect to depth.
    """
    height, width = depth.shape[-2:]
    with torch.autocast(depth.device.type, enabled=False):
        depth, alpha = depth.float(), alpha.float()
        directions = camera.rays(height, width)[1].float().mT.unflatten(2, (height, width))
        points = depth * directions  # relative to the camera centre: smaller numbers, less rounding
        normals = torch.linalg.cross(_tangent(points, alpha, 2), _tangent(points, alpha, 3), dim=1)
        facing = (normals * directions).sum(1, keepdim=True)
        normals = torch.where(facing > 0, -normals, normals)
        alone = normals.square().sum(1, keepdim=True) == 0
        normals = F.normalize(torch.where(alone, -directions, normals), dim=1, eps=1e-30)
        return normals * (alpha > 0)


def _tangent(points: Tensor, alpha: Tensor, axis: int) -> Tensor:
    """Mean of the forward and backward differences along ``axis``, weighted by both ends' opacities."""
    size = points.shape[axis]
    weight = alpha.narrow(axis, 1, size - 1) * alpha.narrow(axis, 0, size - 1)
    step = points.diff(dim=axis) * weight
    padding = [0, 0, 1, 1] if axis == 2 else [1, 1]
    step, weight = F.pad(step, padding), F.pad(weight, padding)
    total = step.narrow(axis, 0, size) + step.narrow(axis, 1, size)
    return total / (weight.narrow(axis, 0, size) + weight.narrow(axis, 1, size)).clamp_min(1e-12)
