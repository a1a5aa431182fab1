"""A picture's face with another expression: its points moved, and the picture moved and painted along with them.

This is how an artwork itself would smile or blink, seen from where it is seen: a target for the head made of it.
Points are those of MediaPipe's mesh, of which the numbers below are names; lengths are told by the distance between
the outer corners of the eyes.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.faces.pose import CanonicalFace
from models.faces.reader import OVAL
from models.rendering.mesh import Mesh
from models.rendering.raster import rasterise
from models.rendering.reprojection import PseudoView

# The person's right eye, then the left one, each from its outer to its inner corner.
_CORNERS = ((33, 133), (263, 362))
_UPPER_LIDS = ((246, 161, 160, 159, 158, 157, 173), (466, 388, 387, 386, 385, 384, 398))
_LOWER_LIDS = ((7, 163, 144, 145, 153, 154, 155), (249, 390, 373, 374, 380, 381, 382))
_CREASES = ((247, 30, 29, 27, 28, 56, 190), (467, 260, 259, 257, 258, 286, 414))
_SOCKETS = (
    (130, *_CREASES[0], 243, 112, 26, 22, 23, 24, 110, 25),
    (359, *_CREASES[1], 463, 341, 256, 252, 253, 254, 339, 255),
)
_BROWS = (70, 63, 105, 66, 107, 46, 53, 52, 65, 55, 300, 293, 334, 296, 336, 276, 283, 282, 295, 285)
_INNER_BROWS = (107, 336)
_MOUTH_CORNERS = (61, 291)
_LIP_CORNERS = (61, 291, 76, 306, 62, 292, 78, 308)
_UPPER_INNER_LIP = (191, 80, 81, 82, 13, 312, 311, 310, 415)
_LOWER_INNER_LIP = (95, 88, 178, 87, 14, 317, 402, 318, 324)
_LOWER_LIP = (
    *_LOWER_INNER_LIP, 96, 89, 179, 86, 15, 316, 403, 319, 325, 77, 90, 180, 85, 16, 315, 404, 320, 307,
    146, 91, 181, 84, 17, 314, 405, 321, 375,
)  # fmt: skip
_LIPS = (*_LIP_CORNERS, *_UPPER_INNER_LIP, *_LOWER_LIP)
_INSIDE = (*_UPPER_INNER_LIP, *_LOWER_INNER_LIP, 78, 308)
_FOREHEAD, _CHIN, _TEMPLE = 10, 152, 454

EXPRESSIONS = ("smile", "frown", "mouth_open", "brow_raise", "blink", "pucker")
"""Those that are known, by the names of the embedded world."""
# How far things move, in eye distances.
_JAW, _BROW = 0.24, 0.10
_LID = 0.85  # of the eye's opening
_MOUTH = {"smile": (0.08, -0.06), "frown": (-0.02, 0.07), "pucker": (-0.10, 0.0)}  # its corners: outwards, down
_REACH = 0.3  # from a corner of the mouth, over which that fades
_AROUND = (1.1, 1.2, 1.3, 1.4, 1.5)  # rings around the oval, by its size; beyond the last the picture stands still
_SOCKET = 1.1  # what is painted over, by the eye socket's size: drawn eyes are larger than the mesh's
_LASHES = 0.012  # half width of a closed eye's line


def moved(points: Tensor, canonical: CanonicalFace, name: str, strength: float = 1.0) -> Tensor:
    """A face's points with an expression.

    Args:
        points: (468, 2 or 3), x right and y down.
        name: of :data:`EXPRESSIONS`. strength: 1 is a full one.

    Returns:
        as many; the third coordinate does not change.

    Raises:
        KeyError: for an expression that is not known.
    """
    if name not in EXPRESSIONS:
        raise KeyError(name)
    flat = points[:, :2]
    across = flat[_CORNERS[1][0]] - flat[_CORNERS[0][0]]
    eyes = across.norm()
    down = flat[_CHIN] - flat[_FOREHEAD]
    axes = torch.stack([across / eyes, down / down.norm()])
    if name == "blink":
        shift = torch.zeros_like(flat)
        for upper, lower, crease in zip(_UPPER_LIDS, _LOWER_LIDS, _CREASES, strict=True):
            gap = flat[list(lower)] - flat[list(upper)]
            shift[list(upper)], shift[list(lower)], shift[list(crease)] = _LID * gap, (_LID - 1) * gap / 2, gap / 2
    else:
        # Not a product of matrices: half precision would move points by pixels.
        shift = eyes * (_shift(canonical.vertices.to(flat), name)[..., None] * axes).sum(1)
    return torch.cat([flat + strength * shift, points[:, 2:]], 1)


def _shift(face: Tensor, name: str) -> Tensor:
    """(468, 2) to the right and down, in eye distances, of the canonical face's points (468, 3)."""
    x, y = face[:, 0], face[:, 1]
    eyes = face[_CORNERS[1][0], 0] - face[_CORNERS[0][0], 0]
    lids = [point for side in (*_UPPER_LIDS, *_LOWER_LIDS, *_CREASES, *_CORNERS) for point in side]
    shift = torch.zeros_like(face[:, :2])
    if name == "mouth_open":
        middle = face[[13, 14], 1].mean()
        along = 1 - (x / face[_MOUTH_CORNERS[1], 0]).clamp(-1, 1).square()
        jaw = _smooth(0.0, 0.45, (middle - y) / (middle - face[_CHIN, 1]))  # nothing above the mouth
        jaw = jaw * (1 - _smooth(0.35, 1.0, x.abs() / face[_TEMPLE, 0]))
        jaw[list(_LOWER_LIP)] = along[list(_LOWER_LIP)].sqrt()
        jaw[list(_UPPER_INNER_LIP)] = -0.06 * along[list(_UPPER_INNER_LIP)].sqrt()
        jaw[list(_LIP_CORNERS)] = 0.3
        shift[:, 1] = _JAW * jaw
    elif name == "brow_raise":
        brow = face[list(_BROWS), 1].mean()
        crease = face[[point for side in _CREASES for point in side], 1].mean()
        rise = _smooth(float(crease), float(brow), y) * (1 - _smooth(float(brow), float(face[_FOREHEAD, 1]), y))
        rise[lids] = 0
        shift[:, 1] = -_BROW * rise
    else:
        out, fall = _MOUTH[name]
        for corner in _MOUTH_CORNERS:
            near = _near(face, corner, _REACH * eyes)
            near[[*lids, *_BROWS]] = 0
            shift = shift + near[:, None] * face.new_tensor([out * float(face[corner, 0].sign()), fall])
        if name == "frown":
            for brow in _INNER_BROWS:
                near = _near(face, brow, 0.22 * eyes)
                near[lids] = 0
                shift = shift + near[:, None] * face.new_tensor([-0.02 * float(face[brow, 0].sign()), 0.07])
    return shift


def _near(face: Tensor, point: int, reach: Tensor) -> Tensor:
    return torch.exp(-((face[:, :2] - face[point, :2]).norm(dim=1) / reach).square())


def _smooth(low: float, high: float, value: Tensor) -> Tensor:
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def animate(
    image: Tensor, points: Tensor, canonical: CanonicalFace, name: str, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The picture with an expression, and where the face's points are then.

    Skin moves with the triangles between the points and stands still outside of the face's oval. The mouth is dark
    inside; a closed eye is painted over with the skin around it, and a line of lashes.

    Args:
        image: (1, 3, S, S) in [-1, 1].
        points: (468, 3) in units of its side. name, strength: as of :func:`moved`.

    Returns:
        (1, 3, S, S), (468, 3).

    Raises:
        KeyError: for an expression that is not known.
    """
    after = moved(points, canonical, name, strength)
    if name == "blink":
        for side in range(2):
            image = _closed_eye(image, points, after, side, strength)
        return image, after
    size = image.shape[-1]
    triangles, inside = _triangles(canonical)
    around = _rings(points)
    fade = (_AROUND[-1] - points.new_tensor(_AROUND)) / (_AROUND[-1] - 1)
    follow = (fade[:, None, None] * (after - points)[list(OVAL)]).flatten(0, 1)
    source, target = torch.cat([points, around]), torch.cat([after, around + follow])
    face, corners = _drawn(target, triangles, size)
    rows, columns = torch.meshgrid(*2 * [(torch.arange(size).to(image) + 0.5) / size], indexing="ij")
    hit = face >= 0
    back = (source - target)[:, :2]  # and not the source itself: where nothing moves, nothing changes
    shift = (back[triangles[face]] * corners[..., None]).sum(2) * hit[..., None]
    place = torch.stack([columns, rows], -1) + shift
    result = F.grid_sample(image, (2 * place - 1)[None], mode="bicubic", padding_mode="border", align_corners=False)
    if name == "mouth_open":
        mouth = F.avg_pool2d((hit & inside[face]).to(image)[None, None], 3, 1, 1)
        lips = _colours(image, points[list(_LIPS)]).mean(1).view(1, 3, 1, 1)
        result = torch.lerp(result, 0.28 * (lips + 1) - 1, min(strength, 1.0) * mouth)
    return result.clamp(-1, 1), after


def _rings(points: Tensor) -> Tensor:
    """Points (n, 3) on rings around the face."""
    oval = points[list(OVAL)]
    middle = oval.mean(0)
    return torch.cat([middle + size * (oval - middle) for size in _AROUND])


def _triangles(canonical: CanonicalFace) -> tuple[Tensor, Tensor]:
    """Those of the face and of the bands around it, and which lie between the lips."""
    count, around = len(canonical.vertices), len(OVAL)
    rings = [list(OVAL), *(list(range(count + i * around, count + (i + 1) * around)) for i in range(len(_AROUND)))]
    bands = []
    for inner, outer in pairwise(rings):
        for i in range(around):
            j = (i + 1) % around
            bands += [(inner[i], inner[j], outer[i]), (inner[j], outer[j], outer[i])]
    triangles = torch.cat([canonical.triangles, canonical.triangles.new_tensor(bands)])
    return triangles, torch.isin(triangles, triangles.new_tensor(_INSIDE)).all(1)


def _drawn(points: Tensor, triangles: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which triangle (size, size) each pixel shows, -1 for none, and the weights (size, size, 3) of its corners."""
    depth = 4 + points[:, 2:]  # far away, nearer ones in front
    vertices = torch.cat([(points[:, :2] - 0.5) * depth, depth], 1).cpu()
    pinhole = Camera(torch.eye(4)[None], torch.tensor([[[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]]))
    nothing = torch.zeros_like(vertices)
    face, corners, _ = rasterise(Mesh(vertices, triangles.cpu(), nothing, nothing), pinhole, size)
    return face.to(points.device), corners.to(points)


def _colours(image: Tensor, places: Tensor) -> Tensor:
    """Colours (3, n) of a picture at places (n, 2 or 3)."""
    return F.grid_sample(image, (2 * places[:, :2] - 1)[None, None], align_corners=False)[0, :, 0]


def _closed_eye(image: Tensor, points: Tensor, after: Tensor, side: int, strength: float) -> Tensor:
    """A picture with one eye painted over, and its lashes where the lids meet."""
    outer, inner = _CORNERS[side]
    upper, lower = (points[[outer, *lids[side], inner], :2] for lids in (_UPPER_LIDS, _LOWER_LIDS))
    socket = points[list(_SOCKETS[side]), :2]
    eye = socket.mean(0) + _SOCKET * (socket - socket.mean(0))
    top, bottom, left, right = _box(eye, image.shape[-1])
    if top == bottom or left == right:  # beyond the picture
        return image
    skin, mask = _filled(image, eye), _polygon(eye, image)
    colours = _colours(image, torch.cat([upper, lower]))
    lashes = colours[:, colours.sum(0).argmin()].view(1, 3, 1, 1)
    met = torch.cat([upper[:1], after[list(_LOWER_LIDS[side]), :2], upper[-1:]])
    width = _LASHES * (points[_CORNERS[1][0], :2] - points[_CORNERS[0][0], :2]).norm()
    closed = torch.lerp(torch.lerp(image, skin, mask), lashes, _line(met, float(width), image))
    return torch.lerp(image, closed, min(strength, 1.0))


def _polygon(corners: Tensor, image: Tensor) -> Tensor:
    """Mask (1, 1, S, S) of a polygon (n, 2) in units of the side, with soft edges."""
    from skimage.draw import polygon2mask  # heavy, and only this needs it

    size, fine = image.shape[-1], 4
    top, bottom, left, right = _box(corners, size)
    places = fine * (size * corners.flip(1) - corners.new_tensor([top, left]))
    mask = polygon2mask((fine * (bottom - top), fine * (right - left)), places.cpu().numpy())
    soft = torch.zeros_like(image[:, :1])
    soft[..., top:bottom, left:right] = F.avg_pool2d(torch.from_numpy(mask)[None, None].to(image), fine)
    return F.avg_pool2d(soft, 3, 1, 1)


def _box(points: Tensor, size: int, margin: int = 3) -> tuple[int, int, int, int]:
    """The pixels around points (n, 2) with a margin, as far as they are in the picture: top, bottom, left, right."""
    low, high = (points.amin(0) * size).floor().long() - margin, (points.amax(0) * size).ceil().long() + margin
    (left, top), (right, bottom) = (edge.clamp(0, size).tolist() for edge in (low, high))
    return top, bottom, left, right


def _filled(image: Tensor, corners: Tensor) -> Tensor:
    """A picture whose polygon (n, 2) is filled with the colours around it (Laplace's equation, by relaxation)."""
    top, bottom, left, right = _box(corners, image.shape[-1])
    hole = (_polygon(corners, image) > 0)[..., top:bottom, left:right]
    part = image[..., top:bottom, left:right].clone()
    known = (~hole).expand_as(part)
    part = torch.where(known, part, part[known].reshape(3, -1).median(1).values.view(1, 3, 1, 1))
    for _ in range(4 * max(part.shape[-2:])):
        part = torch.where(known, part, F.avg_pool2d(F.pad(part, (1, 1, 1, 1), mode="replicate"), 3, 1))
    filled = image.clone()
    filled[..., top:bottom, left:right] = part
    return filled


def _line(points: Tensor, width: float, image: Tensor) -> Tensor:
    """Mask (1, 1, S, S) of a line through points (n, 2), ``width`` to each side, with soft edges."""
    size = image.shape[-1]
    top, bottom, left, right = _box(points, size, math.ceil(width * size) + 1)
    pixels = torch.arange(top, bottom), torch.arange(left, right)
    rows, columns = torch.meshgrid(*((p.to(image) + 0.5) / size for p in pixels), indexing="ij")
    place = torch.stack([columns, rows], -1)[..., None, :]
    start, step = points[:-1].to(image), points.diff(dim=0).to(image)
    along = (((place - start) * step).sum(-1) / step.square().sum(-1).clamp_min(1e-12)).clamp(0, 1)
    distance = (place - start - along[..., None] * step).norm(dim=-1).amin(-1)
    mask = torch.zeros_like(image[:, :1])
    mask[..., top:bottom, left:right] = ((width - distance) * size + 0.5).clamp(0, 1)
    return mask


def face_views(
    image: Tensor, points: Tensor, world: Tensor, canonical: CanonicalFace, cameras: Camera, size: int
) -> PseudoView:
    """What a picture's face looks like from other cameras: its mesh, with the picture on it.

    Known where the mesh faces both the picture's camera and the other one, less and less towards its rim.

    Args:
        image: (1, 3, S, S). points: (468, 3) its face, in units of the side. world: (468, 3) the same in the world.
        cameras: (V,). size: of the views, pixels.
    """
    triangles = canonical.triangles.to(world.device)
    a, b, c = points[triangles].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)  # outwards: z is away from the viewer
    frontal = _facing(-normal[:, 2] / normal.norm(dim=1).clamp_min(1e-12))
    inner = torch.ones(len(points)).index_fill(0, torch.tensor(OVAL), 0.0).to(world)
    pictures, weights = [], []
    for camera in (cameras[i] for i in range(len(cameras))):
        face, corners, _ = rasterise(Mesh.of(world.cpu(), triangles.cpu(), world.cpu()), camera.to("cpu"), size)
        face, corners = face.to(world.device), corners.to(world)
        hit = face >= 0
        place = (points[triangles[face], :2] * corners[..., None]).sum(2)
        shown = F.grid_sample(image, (2 * place - 1)[None].to(image), padding_mode="border", align_corners=False)
        a, b, c = world[triangles].unbind(1)
        outward = F.normalize(torch.linalg.cross(b - a, c - a), dim=1)
        towards = F.normalize(camera.position[0] - a, dim=1)
        seen = _facing((outward * towards).sum(1))
        rim = (inner[triangles[face]] * corners).sum(2)
        weight = torch.minimum(frontal, seen)[face] * rim * hit
        pictures.append(shown)
        weights.append(hit * F.avg_pool2d(weight[None, None].to(image), 3, 1, 1))  # beyond the face is no picture
    return PseudoView(torch.cat(pictures), torch.cat(weights))


def _facing(cosine: Tensor) -> Tensor:
    return (2 * cosine - 0.5).clamp(0, 1)
