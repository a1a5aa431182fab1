"""Distance of a scan to a reconstructed surface, as the NoW benchmark measures it (Sanyal et al. 2019).

The reconstruction is aligned to the scan by seven keypoints, then by the distance itself; what is measured is the
distance of each point of the scan's face to the nearest point of the aligned surface. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.camera import Camera
from models.errors import UserError

KEYPOINTS = (
    *("right_eye_outer", "right_eye_inner", "left_eye_inner", "left_eye_outer"),
    *("nose_base", "right_mouth_corner", "left_mouth_corner"),
)
"""In NoW's order; right is the person's."""
_NEIGHBOURS = 16  # triangles that are tried first
_EVEN = 1.5  # triangles are cut that are this much larger than half of all are
_MOST_CUTS = 12  # each halves the sides of those triangles
_MOST_CORNERS = 4_000_000  # of the cut triangles together
_PAIRS = 1 << 20  # of points and triangles that are considered at once


class Unmeasurable(UserError):
    """A reconstruction without a surface that could be aligned: a method's failure, no fault of the data."""


@dataclass(frozen=True)
class Similarity:
    """x -> scale * rotation @ x + translation, (3, 3) and (3,), float64."""

    scale: float
    rotation: Tensor
    translation: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """Points (N, 3) moved."""
        return self.scale * points.double() @ self.rotation.T + self.translation

    @staticmethod
    def identity() -> Similarity:
        """What moves nothing."""
        return Similarity(1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def align(points: Tensor, target: Tensor, scale: bool = True) -> Similarity:
    """The motion that brings points nearest to their targets, in the least-squares sense (Umeyama 1991).

    Args:
        points, target: (N, 3), in corresponding order.
        scale: whether it may also scale. It never mirrors.

    Raises:
        ValueError: when there are not as many points as targets.
        UserError: when the points do not fix a rotation: fewer than three, or all on one line.
    """
    points, target = points.double(), target.double()
    if points.shape != target.shape or points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points and targets must both be (N, 3), got {tuple(points.shape)}, {tuple(target.shape)}")
    if not bool(points.isfinite().all() and target.isfinite().all()):
        raise UserError("keypoints that are not finite numbers cannot be aligned")
    middle, goal = points.mean(0), target.mean(0)
    spread = (points - middle).square().sum()
    # Eq. 38-43 of Umeyama: R = U S V^T of the covariance's U D V^T, with the last sign chosen so that det R = 1.
    left, values, right = torch.linalg.svd((target - goal).T @ (points - middle))
    if len(points) < 3 or not bool(values[1] > 1e-12 * values[0]):
        raise UserError("keypoints that lie on one line do not say how to turn a surface")
    signs = torch.ones(3, dtype=torch.float64)
    signs[2] = torch.sign(torch.linalg.det(left) * torch.linalg.det(right))
    rotation = left @ torch.diag(signs) @ right
    factor = float((values * signs).sum() / spread) if scale else 1.0
    return Similarity(factor, rotation, goal - factor * rotation @ middle)


class Surface:
    """Triangles whose nearest points are found exactly.

    Args:
        vertices: (V, 3). faces: (F, 3) indices.

    Raises:
        Unmeasurable: without triangles, or when vertices are not finite.
        UserError: when vertices are not there.
    """

    def __init__(self, vertices: Tensor, faces: Tensor) -> None:
        from scipy.spatial import KDTree  # here: only meshes need it

        vertices, faces = vertices.detach().double().cpu(), faces.long().cpu()
        if not len(faces):
            raise Unmeasurable("a surface without triangles cannot be measured")
        if int(faces.min()) < 0 or int(faces.max()) >= len(vertices):
            raise UserError(f"a surface of {len(vertices)} vertices has triangles with vertex {int(faces.max())}")
        corners = vertices[faces]
        if not bool(corners.isfinite().all()):
            raise Unmeasurable("a surface has vertices that are not finite numbers")
        self.corners = _evened(corners)  # (T, 3, 3)
        middle = self.corners.mean(1)
        self._radius = (self.corners - middle[:, None]).norm(dim=-1).amax(1)  # (T,) of balls around the triangles
        self._tree = KDTree(middle.numpy())

    def nearest(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of points (N, 3): nearest points (N, 3) on the surface, distances (N,), and their triangles' normals (N, 3).

        Triangles are tried in the order of their middles' distances until none that is left can be nearer, as the balls
        around them tell.
        """
        points = points.double()
        best = points.new_full((len(points),), torch.inf)
        chosen = torch.zeros(len(points), dtype=torch.int64)
        open_, count, largest = (
            torch.arange(len(points)),
            min(_NEIGHBOURS, len(self.corners)),
            float(self._radius.max()),
        )
        while len(open_):
            undecided = []
            for rows in open_.split(max(_PAIRS // count, 1)):
                which = np.arange(1, count + 1)  # as a list: one alone keeps its dimension
                far, which = self._tree.query(points[rows].numpy(), k=which)  # type: ignore[arg-type]
                far, which = torch.from_numpy(np.asarray(far)), torch.from_numpy(np.asarray(which))
                least = far - self._radius[which]  # no point of a triangle is nearer
                bound = (far + self._radius[which]).amin(1, keepdim=True)
                row, column = (least <= bound).nonzero().unbind(1)
                places = closest_on_triangles(points[rows[row]], self.corners[which[row, column]])
                distance = torch.full_like(far, torch.inf)
                distance[row, column] = _length(places - points[rows[row]])
                best[rows], pick = distance.min(1)
                chosen[rows] = which.gather(1, pick[:, None])[:, 0]
                undecided.append(rows[far[:, -1] < best[rows] + largest])
            if count == len(self.corners):
                break
            open_, count = torch.cat(undecided), min(4 * count, len(self.corners))
        corners = self.corners[chosen]
        found = closest_on_triangles(points, corners)
        a, b, c = corners.unbind(1)
        return found, best, torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1)


def _evened(corners: Tensor) -> Tensor:
    """The same surface of triangles (T, 3, 3) of similar size: large ones are cut at the middles of their sides."""
    for _ in range(_MOST_CUTS):
        longest = (corners - corners.roll(1, 1)).norm(dim=-1).amax(1)
        large = longest > _EVEN * longest.median()
        if not large.any() or 3 * (len(corners) + 3 * int(large.sum())) > _MOST_CORNERS:
            break
        a, b, c = corners[large].unbind(1)
        ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
        parts = [torch.stack(part, 1) for part in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))]
        corners = torch.cat([corners[~large], *parts])
    return corners


def closest_on_triangles(points: Tensor, corners: Tensor) -> Tensor:
    """The point of each triangle (..., 3, 3) that is nearest to points (..., 3): (..., 3).

    It is the foot of the perpendicular where that is within the triangle, else the nearest of the three sides' points.
    """
    a, b, c = corners.unbind(-2)
    best = _closest_on_segment(points, a, b)
    distance = _dot(points - best, points - best)
    for start, stop in ((b, c), (c, a)):
        other = _closest_on_segment(points, start, stop)
        further = _dot(points - other, points - other)
        best = torch.where((further < distance)[..., None], other, best)
        distance = torch.minimum(further, distance)
    u, v, to_point = b - a, c - a, points - a
    uu, uv, vv = _dot(u, u), _dot(u, v), _dot(v, v)
    pu, pv = _dot(to_point, u), _dot(to_point, v)
    area = uu * vv - uv * uv
    flat = area <= 1e-14 * uu * vv  # as good as a line: its sides say all
    area = torch.where(flat, torch.ones_like(area), area)
    s, t = (vv * pu - uv * pv) / area, (uu * pv - uv * pu) / area
    inside = ~flat & (s >= 0) & (t >= 0) & (s + t <= 1)
    return torch.where(inside[..., None], a + s[..., None] * u + t[..., None] * v, best)


def _closest_on_segment(points: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    along = stop - start
    length = _dot(along, along)
    share = _dot(points - start, along) / torch.where(length > 0, length, torch.ones_like(length))
    return start + share.clamp(0, 1)[..., None] * along


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Over the last dimension, of three; a sum over it takes several times as long."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def _length(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()


def refine(
    points: Tensor, surface: Surface, scale: bool = True, steps: int = 30, tolerance: float = 1e-5
) -> Similarity:
    """The motion of the surface that makes the squared distances of the scan's points to it least.

    Levenberg-Marquardt on the rotation, the translation and the logarithm of the scale, from no motion at all. NoW
    minimises the same sum with a dogleg.

    Args:
        points: (N, 3) of the scan.
        surface: already roughly in place.
        scale: whether it may also scale.
        steps: at most so many; tolerance: relative improvement that ends it.
    """
    points = points.double()
    # The scan is moved the other way, so that the surface's tree stays: scan -> moved = inverse motion.
    motion, damping = Similarity.identity(), 1e-3

    def residuals(motion: Similarity) -> tuple[Tensor, Tensor, Tensor]:
        """Distances, in the scan's units; and in the surface's frame their directions and the nearest points."""
        local = (points - motion.translation) @ motion.rotation / motion.scale
        place, distance, normal = surface.nearest(local)
        away = torch.where(distance[:, None] > 1e-9, (local - place) / distance.clamp_min(1e-30)[:, None], normal)
        return motion.scale * distance, away, place

    distance, away, place = residuals(motion)
    cost = float(distance.square().sum())
    for _ in range(steps):
        normal, moved = away @ motion.rotation.T, motion(place)
        # d = n . (p - q): to the first order only the motion of q along n counts.
        columns = [torch.linalg.cross(normal, moved - motion.translation), -normal]
        if scale:
            columns.append(-(normal * (moved - motion.translation)).sum(1, keepdim=True))
        jacobian = torch.cat(columns, 1)
        gram, slope = jacobian.T @ jacobian, jacobian.T @ distance
        before = cost
        for _ in range(10):
            diagonal = gram.diagonal()  # nothing tells how a ball should turn: then it should not
            damped = gram + damping * torch.diag(diagonal.clamp_min(1e-6 * float(diagonal.max()) + 1e-30))
            step = torch.linalg.solve(damped, -slope)
            turn = torch.linalg.matrix_exp(_skew(step[:3]))
            grow = float(step[6].exp()) if scale else 1.0
            tried = Similarity(motion.scale * grow, turn @ motion.rotation, motion.translation + step[3:6])
            found = residuals(tried)
            if float(found[0].square().sum()) < cost:
                motion, (distance, away, place), damping = tried, found, max(damping / 10, 1e-9)
                cost = float(distance.square().sum())
                break
            damping *= 10
        if before - cost <= tolerance * before:
            break
    return motion


def _skew(turn: Tensor) -> Tensor:
    """The matrix (3, 3) of the cross product with ``turn``."""
    x, y, z = turn.unbind()
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3)


@dataclass(frozen=True)
class Scan:
    """A true surface.

    Attributes:
        points: (N, 3) on it.
        keypoints: (7, 3), see ``KEYPOINTS``.
    """

    points: Tensor
    keypoints: Tensor

    def __post_init__(self) -> None:
        if self.keypoints.shape != (len(KEYPOINTS), 3):
            raise ValueError(f"a scan has {len(KEYPOINTS)} keypoints, got {tuple(self.keypoints.shape)}")

    def face(self) -> Tensor:
        """The points (M, 3) that NoW measures: those near the face's middle."""
        centre, radius = face_region(self.keypoints)
        return self.points[(self.points.double() - centre).norm(dim=1) <= radius]


def face_region(keypoints: Tensor) -> tuple[Tensor, float]:
    """Middle (3,) and radius of the ball that NoW measures in, from keypoints (7, 3).

    The middle is three tenths of the way from the nose's base to the point between the inner corners of the eyes, the
    radius 0.7 times the sum of that whole way and the distance of the outer corners.
    """
    keypoints = keypoints.double()
    base, bridge = keypoints[4], (keypoints[1] + keypoints[2]) / 2
    across, nose = (keypoints[0] - keypoints[3]).norm(), (bridge - base).norm()
    return base + 0.3 * (bridge - base), float(1.4 * (across + nose) / 2)


def scan_distances(
    scan: Scan, vertices: Tensor, faces: Tensor, keypoints: Tensor, scale: bool = True, refined: bool = True
) -> Tensor:
    """Distances (M,) of the scan's face to a reconstruction that is aligned to it, in the scan's units, float64.

    Args:
        scan: the truth.
        vertices: (V, 3). faces: (F, 3). keypoints: (7, 3) of the reconstruction.
        scale: whether the alignment may scale, as NoW's does; its "metrical" variant may not.
        refined: whether the alignment by keypoints is refined by the distance itself.

    Raises:
        Unmeasurable: when the surface or its keypoints are not usable.
        UserError: when the scan is not: no point of it lies in its face, or its keypoints are on one line.
    """
    face = scan.face().double().cpu()
    if not len(face):
        raise UserError("no point of the scan lies near its keypoints: they are of another scan, or in other units")
    align(scan.keypoints.cpu(), scan.keypoints.cpu())  # what fails here, is the scan's
    try:
        first = align(keypoints.cpu(), scan.keypoints.cpu(), scale)
    except UserError as error:
        raise Unmeasurable(f"of a reconstruction: {error}") from error
    surface = Surface(first(vertices.cpu()), faces)
    if refined:
        motion = refine(face, surface, scale)
        face = (face - motion.translation) @ motion.rotation / motion.scale
        return motion.scale * surface.nearest(face)[1]
    return surface.nearest(face)[1]


def scan_scores(distances: Tensor | None) -> dict[str, float]:
    """Median, mean and standard deviation, as NoW's tables have them: NaN of what could not be measured (None).

    Pool the distances of all pictures for those tables.
    """
    if distances is None:
        return dict.fromkeys(("scan_median", "scan_mean", "scan_sd"), math.nan)
    distances = distances.double().cpu()
    return {  # not torch's median, which is the lower of the two in the middle
        "scan_median": float(np.median(distances.numpy())),
        "scan_mean": float(distances.mean()),
        "scan_sd": float(distances.std(correction=0)),
    }


def depth_surface(depth: Tensor, alpha: Tensor, camera: Camera, steepest: float = 8.0) -> tuple[Tensor, Tensor]:
    """The surface that a depth map shows: two triangles between each four neighbours.

    Args:
        depth: (1, 1, H, W) camera-z, world units; pixels where it is no finite number show nothing.
        alpha: (1, 1, H, W); nor do those below 0.5.
        camera: its own.
        steepest: triangles with a side that leaves the picture's plane by more than so many of its pixels' widths are
            left out: they would join what lies before to what lies behind.

    Returns:
        vertices (H * W, 3), of which some belong to no triangle, and faces (F, 3), seen counter-clockwise.
    """
    height, width = depth.shape[-2:]
    origins, directions = camera.rays(height, width)
    vertices = (origins + depth.flatten(2).mT * directions)[0]
    index = torch.arange(height * width, device=depth.device).reshape(height, width)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    faces = torch.cat([torch.stack(corners, -1).reshape(-1, 3) for corners in ((a, c, b), (b, c, d))])
    shown = _covered(depth, alpha).flatten()[faces].all(1)
    z = depth.flatten()[faces]
    pixel = z.mean(1) / (camera.intrinsics[0, 0, 0] * width)
    level = (z.amax(1) - z.amin(1)) <= steepest * pixel
    return vertices, faces[shown & level]


def lifted(keypoints: Tensor, depth: Tensor, alpha: Tensor, camera: Camera) -> Tensor:
    """The points (K, 3) of a depth map that it shows where the camera sees points (K, 3): same place, its own depth.

    Raises:
        Unmeasurable: when the map shows nothing at all.
    """
    return lifted_at(camera.project(keypoints.to(camera.cam2world)[None])[0][0], depth, alpha, camera)


def lifted_at(places: Tensor, depth: Tensor, alpha: Tensor, camera: Camera) -> Tensor:
    """The points (K, 3) of a depth map at places (K, 2) of its picture, in units of the side.

    Depth is bilinear over the covered neighbours; a place without any takes the nearest covered pixel's.

    Raises:
        Unmeasurable: when the map shows nothing at all.
    """
    height, width = depth.shape[-2:]
    solid = _covered(depth, alpha)
    covered = solid[0, 0].nonzero().double() + 0.5
    if not len(covered):
        raise Unmeasurable("a reconstruction whose depth map shows nothing has no surface")
    uv = places.to(camera.cam2world)[None]
    maps = torch.cat([torch.where(solid, depth, 0.0), solid], 1).double()
    grid = (2 * uv - 1)[:, :, None].double()
    found = torch.nn.functional.grid_sample(maps, grid, align_corners=False)[0, :, :, 0]
    away = torch.cdist(uv[0].double() * uv.new_tensor([width, height]).double(), covered.flip(1))
    row, column = (covered[away.argmin(1)] - 0.5).long().unbind(1)
    z = torch.where(found[1] > 1e-6, found[0] / found[1].clamp_min(1e-6), depth[0, 0, row, column].double())
    origins, directions = camera.rays_at(uv)
    return (origins.double() + z[None, :, None] * directions.double())[0]


def _covered(depth: Tensor, alpha: Tensor) -> Tensor:
    """Which pixels (1, 1, H, W) show a surface."""
    return (alpha > 0.5) & depth.isfinite()


def pooled(distances: Sequence[Tensor | None]) -> dict[str, float]:
    """The scores of many pictures together: every point of every scan counts once.

    Args:
        distances: (M,) of each picture; None where nothing could be measured.

    Returns:
        ``scan_median_pooled`` and so on, NaN where there are none, and ``scan_missing``, how many pictures are None.

    Raises:
        UserError: without pictures.
    """
    if not distances:
        raise UserError("there is no picture to tell scan distances of")
    there = [found for found in distances if found is not None]
    scores = scan_scores(torch.cat(there) if there else None)
    return {f"{name}_pooled": value for name, value in scores.items()} | {"scan_missing": len(distances) - len(there)}
