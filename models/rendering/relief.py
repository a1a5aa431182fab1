"""The differentiable renderer of a depth map, Phi(d, a, v, l): lit, turned and seen again (Wang et al., Eq. 10).

A face is a canonical depth map and albedo, as its own pinhole camera sees it from the front. Its pixels are the
vertices of a surface, which is turned and moved before that camera; the view shows the canonical picture where the
rays of its pixels meet the surface. Gradients are those of the points that are seen; which ones are seen has none.

Axes are the camera's: x right, y down, z forward, the centre of rotation at (0, 0, ``centre``). The first and the last
pixel's centres of a row are ``fov_deg`` apart. All of it is in fp32, or in fp64 where that is given.

Sources: Unsup3D (Wu et al. 2020), whose conventions, ranges and signs these are, and GAN2Shape (Pan et al. 2021), which
the paper follows. Their rasteriser, neural_renderer, takes a view's depth half a pixel to the right of and below where
they use it, and averages it over 2 x 2 samples; here it is that of the pixel's centre, and an unmoved map comes back as
it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.rendering.output import Rendering, Tensors
from models.rendering.raster import edge_weights, nearest_faces
from models.rendering.sheets import over_white

SLACK = 8  # roundings of a place: an unmoved surface ends at its outermost pixels' centres, give or take these
BORDER = 2  # columns at the left and at the right of a depth map that lie back
BACK = 0.7  # where from near to far these lie
WORLD = (1.0, -1.0, -1.0)  # the camera's axes as the world's (models.camera), for a head that is seen from the front
YAW_DEG, PITCH_DEG = 45.0, 20.0  # how far a relief, which has no sides, is looked at from
FACE = 0.7  # masks of at least this much are the face


@dataclass(frozen=True)
class Light(Tensors):
    """One distant light for each picture, in the canonical frame."""

    ambient: Tensor
    """(B,) in [0, 1]."""
    diffuse: Tensor
    """(B,) in [0, 1]: what it adds to surfaces that face it."""
    slope: Tensor
    """(B, 2) dx and dy: it shines along (dx, dy, 1), from the left where dx > 0 and from above where dy > 0."""

    @property
    def towards(self) -> Tensor:
        """(B, 3) unit vectors from the surface to the light."""
        return -F.normalize(F.pad(self.slope, (0, 1), value=1.0), dim=1)

    @staticmethod
    def of(raw: Tensor) -> Light:
        """From what a network ends with (B, 4), in [-1, 1]: ambient, diffuse, dx, dy."""
        _check_shape("light", raw, 2, 4)
        raw = _precise(raw)
        ambient, diffuse = ((raw[:, :2] + 1) / 2).unbind(1)
        return Light(ambient, diffuse, raw[:, 2:])


@dataclass(frozen=True)
class Relief:
    """How depth maps are seen.

    Maps are square, (B, C, S, S). A view (B, 6) turns the surface around its centre, first about x, then y, then z, in
    radians, and then moves it by (x, y, z). A positive turn about x brings the nose down, about y to the left, and one
    about z turns the picture clockwise.

    Attributes:
        near, far: depths between which the maps lie, units.
        fov_deg: the angle that the camera sees, in degrees.
        rotation_deg: the largest angle that a network can ask for, in degrees.
        shift, shift_z: the largest movements that it can ask for, in units, across and along the camera's axis.
    """

    near: float = 0.9
    far: float = 1.1
    fov_deg: float = 10.0
    rotation_deg: float = 60.0
    shift: float = 0.1
    shift_z: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "near", "far", "fov_deg", "rotation_deg", where="relief.")
        check_not_negative(self, "shift", "shift_z", where="relief.")
        if self.near >= self.far or self.fov_deg >= 180:
            raise UserError(
                f"relief.near ({self.near}) must be below relief.far ({self.far}), and relief.fov_deg ({self.fov_deg}) "
                "below 180"
            )

    @property
    def centre(self) -> float:
        """Depth of the point that views turn around."""
        return (self.near + self.far) / 2

    @property
    def reach(self) -> float:
        """x / z of the last pixel's centre."""
        return math.tan(math.radians(self.fov_deg) / 2)

    @property
    def nothing(self) -> float:
        """Depth of pixels that see no surface: beyond all that is drawn, as in Unsup3D."""
        return self.far + (self.far - self.near) / 2

    def depth(self, raw: Tensor) -> Tensor:
        """What a network ends with (B, 1, S, S), unbounded, as a depth map within near and far.

        The mean is taken out, tanh bounds it, and two columns at either side lie back: a face's surroundings do not
        follow it.
        """
        _check_map("raw depth", raw)
        raw = _precise(raw)  # a half holds three digits of a depth
        bounded = (raw - raw.mean((1, 2, 3), keepdim=True)).tanh()
        depth = (1 + bounded) / 2 * self.far + (1 - bounded) / 2 * self.near
        border = BACK * self.far + (1 - BACK) * self.near
        return F.pad(depth[..., BORDER:-BORDER], (BORDER, BORDER), value=border)

    def view(self, raw: Tensor) -> Tensor:
        """What a network ends with (B, 6), in [-1, 1], as a view."""
        _check_shape("view", raw, 2, 6)
        raw = _precise(raw)
        turn = math.radians(self.rotation_deg)
        return raw * raw.new_tensor([turn, turn, turn, self.shift, self.shift, self.shift_z])

    def points(self, depth: Tensor) -> Tensor:
        """Points (B, 3, S, S) of a depth map (B, 1, S, S), canonical or a view's."""
        _check_map("depth", depth)
        depth = _precise(depth)
        at = torch.linspace(-self.reach, self.reach, depth.shape[-1], dtype=depth.dtype, device=depth.device)
        y, x = torch.meshgrid(at, at, indexing="ij")
        return depth * torch.stack([x, y, torch.ones_like(x)])

    def normals(self, depth: Tensor) -> Tensor:
        """Unit normals (B, 3, S, S) of a depth map (B, 1, S, S), facing the camera, from central differences.

        On the outermost pixels they are (0, 0, -1). Unsup3D's point the other way, as its light does.
        """
        points = self.points(depth)
        across = points[:, :, 1:-1, 2:] - points[:, :, 1:-1, :-2]
        down = points[:, :, 2:, 1:-1] - points[:, :, :-2, 1:-1]
        inner = F.normalize(torch.linalg.cross(down, across, dim=1), dim=1)
        return torch.cat([F.pad(inner[:, :2], (1,) * 4), F.pad(inner[:, 2:], (1,) * 4, value=-1.0)], 1)

    def shaded(self, depth: Tensor, albedo: Tensor, light: Light) -> Tensor:
        """The canonical picture (B, 3, S, S), not clipped: what the surface of a depth map reflects.

        Albedo (B, 3, S, S) in [-1, 1] stands for a share in [0, 1], which is what the shading multiplies.
        """
        _check_alike(depth, albedo)
        return (_precise(albedo) + 1) * shading(self.normals(depth), light) - 1

    def turned(self, depth: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """The depth map that a view shows, and where it shows any of the surface.

        Args:
            depth: (B, 1, S, S), canonical.
            view: (B, 6).

        Returns:
            depth (B, 1, S, S), :attr:`nothing` where nothing is seen; mask (B, 1, S, S), 0 or 1.

        Raises:
            ValueError: when a view brings the surface behind the camera.
        """
        rotation, shift = self._motion(depth, view)
        with torch.autocast(depth.device.type, enabled=False):
            vertices = self._about_centre(rotation, self.points(depth).flatten(2)) + shift
        z = vertices[:, 2]
        if not bool((z > 0).all()):
            raise ValueError("the view brings the surface behind the camera, or is no number")
        size = depth.shape[-1]
        places = (vertices[:, :2] / (self.reach * z[:, None]) + 1).mT * ((size - 1) / 2)  # centres at whole numbers
        inverse, triangles = 1 / z, grid_triangles(size, depth.device)
        slack = SLACK * torch.finfo(z.dtype).eps * size
        face, _ = nearest_faces(places.detach()[:, triangles], inverse.detach()[:, triangles], size, slack)
        hit = face.flatten(1) >= 0
        picture, pixel = hit.nonzero().unbind(1)
        # Vertices of all pictures, in one row.
        seen = triangles[face.flatten(1)[hit]] + (picture * size * size)[:, None]
        corners, inverse = places.flatten(0, 1)[seen], inverse.flatten()[seen]
        at = torch.stack([pixel % size, pixel // size], 1).to(corners)
        # 1 / z is linear over the image. The weights' common factor, which may be tiny, cancels.
        weights = edge_weights(corners, at)
        found = weights.sum(1) / (weights * inverse).sum(1)
        shown = torch.full_like(z, self.nothing).masked_scatter(hit, found)
        return shown.view_as(depth), hit.to(shown).view_as(depth)

    def carried(self, maps: Tensor, depth: Tensor, view: Tensor, mode: str = "bilinear") -> Tensor:
        """Canonical maps as a view shows them, taken where the view's points came from.

        Args:
            maps: (B, C, S, S).
            depth: (B, 1, S, S) of the view, as :meth:`turned` gives it.
            view: (B, 6).
            mode: of ``grid_sample``.

        Returns:
            (B, C, S, S); pixels whose points lie outside of the maps show their border.
        """
        _check_alike(depth, maps)
        rotation, shift = self._motion(depth, view)
        with torch.autocast(depth.device.type, enabled=False):
            points = self._about_centre(rotation.mT, self.points(depth).flatten(2) - shift)
        grid = (points[:, :2] / (self.reach * points[:, 2:])).mT.unflatten(1, depth.shape[-2:])
        return F.grid_sample(maps.to(grid), grid, mode=mode, padding_mode="border", align_corners=True)

    def gathered(self, maps: Tensor, depth: Tensor, view: Tensor) -> Tensor:
        """A view's maps as canonical ones, taken where it shows the points: the other way of :meth:`carried`.

        Args:
            maps: (B, C, S, S) of the view.
            depth: (B, 1, S, S), canonical.
            view: (B, 6).

        Returns:
            (B, C, S, S); points that the view does not show take what hides them, those outside of it its border.
        """
        _check_alike(depth, maps)
        rotation, shift = self._motion(depth, view)
        with torch.autocast(depth.device.type, enabled=False):
            points = self._about_centre(rotation, self.points(depth).flatten(2)) + shift
        grid = (points[:, :2] / (self.reach * points[:, 2:])).mT.unflatten(1, depth.shape[-2:])
        return F.grid_sample(maps.to(grid), grid, padding_mode="border", align_corners=True)

    def camera(self, view: Tensor, size: int) -> Camera:
        """The world's cameras that see a canonical surface, as :meth:`world` places it, as views (B, 6) do.

        Args:
            size: S of the maps.
        """
        _check_shape("view", view, 2, 6)
        axes = view.new_tensor(WORLD)
        rotation, shift = rotation_matrix(view[:, :3]), view[:, 3:, None]
        centre = view.new_tensor([[0.0], [0.0], [self.centre]])
        cam2world = torch.eye(4).to(view).repeat(len(view), 1, 1)
        cam2world[:, :3, :3] = axes[:, None] * rotation.mT
        cam2world[:, :3, 3] = -(cam2world[:, :3, :3] @ (centre + shift))[..., 0] * self.unit
        front = self.rig(size).camera(0.0, device=view.device)
        return Camera(cam2world, front.intrinsics.to(view).repeat(len(view), 1, 1))

    def rig(self, size: int) -> Rig:
        """How a canonical surface of S x S pixels is looked at in the world, see :meth:`world`."""
        return Rig(
            radius=self.unit * self.centre,
            focal=(size - 1) / (2 * self.reach * size),
            pivot=(0.0, 0.0, 0.0),
            near=self.unit * self.near / 2,
            far=self.unit * 2 * self.far,
            yaw_max=math.radians(YAW_DEG),
            pitch_max=math.radians(PITCH_DEG),
        )

    @property
    def unit(self) -> float:
        """World units that are as long as one of ours: a picture is 2 wide where the head turns."""
        return 1 / (self.reach * self.centre)

    def world(self, points: Tensor) -> Tensor:
        """Canonical points (B, 3, ...) in the world: around the centre, in :attr:`unit`, y up, the face towards z."""
        axes, centre = points.new_tensor(WORLD), points.new_tensor([0.0, 0.0, self.centre])
        shape = (3, *[1] * (points.ndim - 2))
        return (points - centre.view(shape)) * (self.unit * axes).view(shape)

    def __call__(self, depth: Tensor, albedo: Tensor, view: Tensor, light: Light) -> Rendering:
        """Phi(d, a, v, l), Eq. 10.

        Args:
            depth: (B, 1, S, S) canonical, see :meth:`depth`.
            albedo: (B, 3, S, S) canonical, in [-1, 1].
            view: (B, 6), see :meth:`view`.
            light: B of them.

        Returns:
            image (B, 3, S, S), clipped to [-1, 1]; depth (B, 1, S, S); alpha (B, 1, S, S), 0 or 1. Where nothing is
            seen, the image is 0 and the depth :attr:`nothing`.

        Raises:
            ValueError: for maps, views or lights that do not fit together, or a surface behind the camera.
        """
        picture = self.shaded(depth, albedo, light)
        seen, mask = self.turned(depth, view)
        image = self.carried(picture, seen, view).clamp(-1, 1) * mask
        return Rendering(image=image, depth=seen, alpha=mask)

    def _motion(self, depth: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Rotations (B, 3, 3) and movements (B, 3, 1) of views."""
        _check_shape("view", view, 2, 6)
        if len(view) != len(depth):
            raise ValueError(f"{len(view)} views of {len(depth)} depth maps")
        view = _precise(view)
        return rotation_matrix(view[:, :3]), view[:, 3:, None]

    def _about_centre(self, rotation: Tensor, points: Tensor) -> Tensor:
        """Points (B, 3, N) turned around the centre."""
        centre = points.new_tensor([[0.0], [0.0], [self.centre]])
        return rotation @ (points - centre) + centre


def rotation_matrix(angles: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that turn about x, then y, then z, by ``angles`` (B, 3) in radians."""
    (a, b, c), (d, e, f) = angles.cos().unbind(1), angles.sin().unbind(1)
    rows = (
        (c * b, c * e * d - f * a, c * e * a + f * d),
        (f * b, f * e * d + c * a, f * e * a - c * d),
        (-e, b * d, b * a),
    )
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def shading(normals: Tensor, light: Light) -> Tensor:
    """Lambert's law (B, 1, S, S): ambient + diffuse max(0, n . l), of unit normals (B, 3, S, S).

    Raises:
        ValueError: when there are not as many lights as maps.
    """
    if len(light) != len(normals):
        raise ValueError(f"{len(light)} lights for {len(normals)} maps")
    facing = (normals * light.towards[..., None, None]).sum(1, keepdim=True).clamp_min(0)
    return light.ambient.view(-1, 1, 1, 1) + light.diffuse.view(-1, 1, 1, 1) * facing


def relit(seen: Rendering, light: Light) -> Tensor:
    """Pictures (B, 3, h, w) of renderings under other lights, on white; of either there may be one for all.

    Args:
        seen: with alpha, albedo and normals.
        light: in the frame of the head that faces the camera, whose axes are the world's with y and z turned.
    """
    albedo, count = seen.albedo, max(len(seen), len(light))
    assert seen.alpha is not None and albedo is not None and seen.normals is not None
    light = light.map(lambda t: t.to(albedo).expand(count, *t.shape[1:]))
    normals = seen.normals * seen.normals.new_tensor(WORLD)[:, None, None]
    shade = shading(normals.expand(count, -1, -1, -1), light)
    return over_white(((albedo + 1) * shade - 1).clamp(-1, 1), seen.alpha)


def mirrored(depth: Tensor, albedo: Tensor) -> tuple[Tensor, Tensor]:
    """The face with its sides exchanged, for the symmetric term (Eq. 12), which keeps view, light and target.

    A flipped picture would be another thing wherever the face is not seen from the front.
    """
    return depth.flip(-1), albedo.flip(-1)


def sphere_cap(mask: Tensor, radius: float = 0.4, near: float = 0.91, far: float = 1.02) -> Tensor:
    """The first guess at a face's depth: a cap of a sphere, stretched over the box of its mask, on a flat ground.

    GAN2Shape's stands beside its box where that is not in the middle of the picture; this one fills it.

    Args:
        mask: (B, 1, S, S) of the face, where it is at least :data:`FACE`.
        radius: of the sphere, units.
        near, far: depths of its foremost point and of the ground.

    Returns:
        (B, 1, S, S).

    Raises:
        UserError: for a picture without a face, or a cap that is no part of half a sphere.
    """
    _check_map("mask", mask)
    if not 0 < near < far <= near + radius:
        raise UserError(f"a cap of depth {near} to {far} is not the front of a sphere of radius {radius}")
    face = mask >= FACE
    if not bool(face.flatten(1).any(1).all()):
        raise UserError(f"a picture shows no face: its mask is below {FACE} everywhere")
    y, x = _across_span(face.any(3), mask)[..., None], _across_span(face.any(2), mask)[..., None, :]
    distance = x.square() + y.square()  # from the middle, squared, 1 at the rim
    rim = radius**2 - (radius - (far - near)) ** 2  # the same of the cap, in squared units
    cap = near + radius - (radius**2 - rim * distance.clamp(max=1)).sqrt()
    return torch.where(distance <= 1, cap, far)


def _across_span(held: Tensor, like: Tensor) -> Tensor:
    """Places (B, 1, S) of pixels, -1 at the first and 1 at the last of those that are held (B, 1, S)."""
    at = torch.arange(held.shape[-1], dtype=like.dtype, device=like.device)
    first = torch.where(held, at, torch.inf).amin(-1, keepdim=True)
    last = torch.where(held, at, -torch.inf).amax(-1, keepdim=True)
    return (at - (first + last) / 2) / ((last - first) / 2).clamp_min(0.5)


def grid_triangles(size: int, device: torch.device) -> Tensor:
    """Corners (F, 3) of the triangles between the pixels of a map, which are numbered row by row; counter-clockwise as
    seen, each square cut from its lower left."""
    pixel = torch.arange(size * size, device=device).reshape(size, size)
    a, b, c, d = pixel[:-1, :-1], pixel[:-1, 1:], pixel[1:, :-1], pixel[1:, 1:]
    return torch.cat([torch.stack(corners, -1).flatten(0, 1) for corners in ((a, c, b), (b, c, d))])


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_map(name: str, value: Tensor) -> None:
    if value.ndim != 4 or value.shape[1] != 1 or value.shape[2] != value.shape[3] or value.shape[3] < 2 * BORDER + 1:
        least = 2 * BORDER + 1
        raise ValueError(f"{name} must be (B, 1, S, S) with S at least {least}, got {tuple(value.shape)}")


def _check_alike(depth: Tensor, maps: Tensor) -> None:
    _check_map("depth", depth)
    if maps.ndim != 4 or (len(maps), *maps.shape[2:]) != (len(depth), *depth.shape[2:]):
        raise ValueError(f"maps {tuple(maps.shape)} do not fit the depth {tuple(depth.shape)}")


def _check_shape(name: str, value: Tensor, dimensions: int, last: int) -> None:
    if value.ndim != dimensions or value.shape[-1] != last:
        raise ValueError(f"a {name} has {last} numbers, got shape {tuple(value.shape)}")
