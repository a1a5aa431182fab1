"""What keeps details of one photo plausible from elsewhere (GRAMInverter; Deng et al., 2023, Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.rendering.compositing import composite_layers, field_gradient, layer_weights


def layer_normals(opacity: Callable[[Tensor], Tensor], points: Tensor, valid: Tensor) -> Tensor:
    """Normals of composited surface layers, from the spatial gradient of their opacity (Eq. 9).

    Opacity grows inwards, so that its negative gradient points outwards. fp32 whatever the caller's autocast.

    Args:
        opacity: world points (B, P, 3) -> (B, P, 1) in [0, 1], each value depending on its own point alone.
        points: (B, R, N, 3) where R rays meet N layers, front to back.
        valid: (B, R, N) whether they do.

    Returns:
        (B, R, 3) unit vectors on world axes, 0 where the opacity is flat; without gradient.
    """
    alpha, gradient = (x.unflatten(1, points.shape[1:3]) for x in field_gradient(opacity, points.flatten(1, 2)))
    weights = layer_weights(alpha * valid[..., None])
    return F.normalize(-(weights * gradient).sum(2), dim=-1)  # N_w = -1/eta sum_i T_i a_i da_i/dx_i


def unseen(normals: Tensor, camera: Camera, tau: float = 0.1) -> Tensor:
    """Where a surface does not face the camera of the photo (Eq. 8).

    Args:
        normals: (B, 3, H, W) unit normals on world axes, as seen from anywhere; 0 where there is no surface, which
            counts as unseen.
        camera: B cameras, of the photos.
        tau: cosine below which a surface counts as unseen.

    Returns:
        M (B, 1, H, W), 1 where -r . N < tau, with the look-at direction r.
    """
    facing = -torch.einsum("bc,bchw->bhw", camera.forward.to(normals.dtype), normals)
    return (facing < tau)[:, None].to(normals.dtype)


def novel_view_loss(
    final: Tensor, coarse: Tensor, mask: Tensor, perceptual: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """L_nv = LPIPS(M I, M I_w) at a new view (Eq. 7): images (B, 3, H, W) and mask (B, 1, H, W) -> (B,).

    Gradient flows through the final image alone: the coarse one is the prior.
    """
    mask = mask.detach()
    return perceptual(mask * final, mask * coarse.detach())


def depth_loss(
    details: Tensor,
    alpha: Tensor,
    depth: Tensor,
    valid: Tensor,
    spacings: float = 1.5,
    behind: Tensor | None = None,
    details_behind: Tensor | None = None,
) -> Tensor:
    """L_depth: details far from the coarse surface are pulled to 0, so that the others get the right parallax (Eq. 10).

    The threshold epsilon is told in mean distances between the layers that a ray meets. The paper does not say over
    what its norm is summed: here over channels and the layers of a ray, and averaged over rays that meet any.

    Args:
        details: f_hr (B, R, N, C) where R rays of the photo meet N layers, front to back.
        alpha: (B, R, N, 1) coarse opacities; they get no gradient.
        depth: (B, R, N) camera-z, world units. valid: (B, R, N) whether the ray meets the layer.
        spacings: epsilon.
        behind: (B, R) camera-z of an opaque plane behind the layers, the last of the paper's N. Without it z_surf is
            the depth of what is visible of the others. details_behind: f_hr (B, R, C) there.

    Returns:
        (B,).
    """
    alpha = alpha.detach() * valid[..., None]
    if behind is None:
        _, _, surface = composite_layers(alpha[..., :0], alpha, depth[..., None])
    else:  # z_surf = sum_i T_i a_i z_i, where the last a_i is 1
        weights = layer_weights(alpha)[..., 0]
        surface = ((weights * depth).sum(2) + (1 - weights.sum(2)) * behind)[..., None]
    first = depth.masked_fill(~valid, torch.inf).amin(2, keepdim=True)
    last = depth.masked_fill(~valid, -torch.inf).amax(2, keepdim=True)
    spacing = (last - first) / (valid.sum(2, keepdim=True) - 1).clamp_min(1)
    far = valid & ((depth - surface).abs() > spacings * spacing)
    energy = (details.square().sum(3) * far).sum(2)
    rays = valid.any(2)
    if behind is not None and details_behind is not None:
        distant = rays & ((behind - surface[..., 0]).abs() > spacings * spacing[..., 0])
        energy = energy + details_behind.square().sum(2) * distant
    return energy.sum(1) / rays.sum(1).clamp_min(1)
