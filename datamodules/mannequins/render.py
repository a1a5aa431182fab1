"""Draw scenes by sphere tracing, with the ground truth of every pixel."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.mannequins import shapes
from datamodules.mannequins.scene import Palette, Scene, harmonics
from datamodules.mannequins.styles import PLAIN, Style, Surface, get_style
from datamodules.mannequins.textures import paint_head
from datamodules.truth import Movable
from models.camera import Camera, Rig
from models.segments import SEGMENTS

RIG = Rig()  # radius 7, field of view 23.5 degrees, looking at (0, -0.06, 0)

BOUND = 2.7  # everything that is drawn lies within this distance of the world's origin
STEP_FACTOR = 0.85  # distances are estimates, some a little too large
MAX_STEPS = 56
LEAST_STEP = 0.009  # world units; lets grazing rays pass narrow clefts within MAX_STEPS
MAX_BLOCK_STEPS = 14
SURFACE = 0.002  # world units; a ray that is nearer than this has arrived
BLOCK = 4  # rays of BLOCK x BLOCK samples share the first, long part of their way
COMPILED_CHUNK = 1024  # compiled kernels have one fixed shape
EAGER_CHUNK = 16384  # temporaries of this size stay in the cache and below malloc's mmap threshold


@dataclass(frozen=True)
class Truth(Movable):
    """Pictures and what they show, pixel by pixel.

    Attributes:
        image: (B, 3, H, W) RGB in [-1, 1].
        depth: (B, 1, H, W) camera-z depth in world units, mean over the samples that hit; 0 = background.
        mask: (B, 1, H, W) share of the samples that hit, in [0, 1].
        normals: (B, 3, H, W) unit, world axes; 0 = background.
        segmentation: (B, H, W) uint8 indices into ``SEGMENTS``, the commonest of the samples.
        z: (B, Z_DIM) latent.
        expression: (B, E) in [0, 1].
        camera: of each picture.
    """

    image: Tensor
    depth: Tensor
    mask: Tensor
    normals: Tensor
    segmentation: Tensor
    z: Tensor
    expression: Tensor
    camera: Camera


Evaluate = Callable[[Tensor], Tensor]


def _nearest_of(parameters: Tensor, points: Tensor) -> Tensor:
    return shapes.distance(shapes.named(parameters), points)


@functools.cache
def _compiled_nearest() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The compiled distance of points (3, COMPILED_CHUNK), None when the compiler fails."""
    # Inductor's worker pool deadlocks on some machines; one thread compiles in the process itself.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    nearest = torch.compile(_nearest_of, dynamic=False)
    try:
        nearest(torch.full((len(shapes.PARAMETERS),), 0.5), torch.zeros(3, COMPILED_CHUNK))
    except Exception as error:  # the compiler may fail in many ways; eager is always right
        warnings.warn(f"mannequins: torch.compile failed, drawing eagerly (slower): {error}", stacklevel=3)
        return None
    return nearest


class _Field:
    """The distance field of one head, evaluated in chunks."""

    def __init__(self, parameters: Tensor, compiled: bool) -> None:
        self.parameters = parameters
        self.knob = shapes.named(parameters.tolist())
        self._compiled = _compiled_nearest() if compiled and parameters.device.type == "cpu" else None

    def nearest(self, points: Tensor) -> Tensor:
        """(N,) distance to the whole head of points (3, N)."""
        if self._compiled is None:
            return self._chunked(lambda chunk: shapes.distance(self.knob, chunk), points, EAGER_CHUNK)
        nearest, count = self._compiled, points.shape[1]
        padded = F.pad(points, (0, -count % COMPILED_CHUNK))
        return self._chunked(lambda chunk: nearest(self.parameters, chunk), padded, COMPILED_CHUNK)[:count]

    def material(self, points: Tensor) -> Tensor:
        """(N,) int64 indices into ``shapes.MATERIALS``, the nearest to points (3, N)."""
        return self._chunked(lambda chunk: shapes.distances(self.knob, chunk).argmin(0), points, EAGER_CHUNK)

    @staticmethod
    def _chunked(function: Evaluate, points: Tensor, size: int) -> Tensor:
        if points.shape[1] <= size:
            return function(points)
        return torch.cat([function(chunk.contiguous()) for chunk in points.split(size, 1)])


def _block_starts(
    field: _Field, origin: Tensor, directions: Tensor, spread: float, start: float, stop: float
) -> Tensor:
    """How far whole blocks of rays may go: march cones until they touch something.

    Args:
        origin: (3, 1).
        directions: (3, N) unit, through the middles of the blocks.
        spread: radius of a cone at distance 1.
        start, stop: where the cones begin and are given up.

    Returns:
        (N,) distance without any surface, infinite where a block sees background only.
    """
    travelled = torch.full_like(directions[0], start)
    reach = torch.full_like(travelled, torch.inf)
    index = torch.arange(len(travelled), device=travelled.device)
    for _ in range(MAX_BLOCK_STEPS):
        free = field.nearest(origin + directions * travelled) - spread * travelled
        arrived = free < 0.5 * spread * travelled
        reach[index[arrived]] = travelled[arrived]
        travelled = travelled + STEP_FACTOR * free
        going = ~arrived & (travelled < stop)
        index, travelled, directions = index[going], travelled[going], directions[:, going]
        if not len(index):
            break
    reach[index] = travelled  # not there yet, but free so far
    return reach


def _trace(field: _Field, origin: Tensor, directions: Tensor, travelled: Tensor, pixel: float, stop: float) -> Tensor:
    """(N,) distance along unit ``directions`` (3, N) to the surface, infinite where there is none."""
    hit = torch.full_like(travelled, torch.inf)
    index = (travelled < stop).nonzero()[:, 0]
    travelled, directions = travelled[index], directions[:, index]
    for step in range(MAX_STEPS):
        free = field.nearest(origin + directions * travelled)
        arrived = free.abs() < SURFACE
        if step == MAX_STEPS - 1:
            # Rays that creep along a crevice are on the surface as far as a pixel can tell.
            arrived = free < pixel
        else:
            careful = torch.where(free > 0, (STEP_FACTOR * free).clamp(min=LEAST_STEP), STEP_FACTOR * free)
            travelled = travelled + torch.where(arrived, free, careful)
        hit[index[arrived]] = travelled[arrived]
        going = ~arrived & (travelled < stop)
        index, travelled, directions = index[going], travelled[going], directions[:, going]
        if not len(index):
            break
    return hit


_TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0))


def _normals(field: _Field, points: Tensor, width: float = 0.006) -> Tensor:
    """(N, 3) unit gradients of the field at points (3, N), from four distances around each."""
    corners = points.new_tensor(_TETRAHEDRON)
    around = points[:, None] + width * corners.T[:, :, None]
    values = field.nearest(around.reshape(3, -1)).reshape(4, -1)
    return F.normalize(values.T @ corners, dim=1)


def _occlusion(field: _Field, points: Tensor, normals: Tensor) -> Tensor:
    """(N,) ambient occlusion, 1 = open: how much space there is along the normal, near and farther away."""
    reach = (0.07, 0.22)
    probes = torch.cat([points + length * normals.T for length in reach], 1)
    near, far = field.nearest(probes).reshape(2, -1)
    return 0.35 + 0.325 * ((near / reach[0]).clamp(0, 1) + (far / reach[1]).clamp(0, 1))


def _outline(depth: Tensor, material: Tensor, normals: Tensor, width: int) -> Tensor:
    """(S, S) opacity of contour lines: depth steps, borders of materials, creases.

    Args:
        depth: (S, S), a large number at the background.
        material: (S, S) float, -1 at the background.
        normals: (3, S, S).
        width: of a line in samples, on each side of the contour.
    """
    maps = torch.cat([depth[None], material[None], normals])[None]
    window = 2 * width + 1
    contrast = F.max_pool2d(maps, window, 1, width) + F.max_pool2d(-maps, window, 1, width)
    step, border, crease = contrast[0, 0] > 0.20, contrast[0, 1] > 0.5, contrast[0, 2:].sum(0)
    return torch.maximum((step | border).float(), ((crease - 1.9) * 1.2).clamp(0, 0.6))


def _draw_one(
    parameters: Tensor, palette: Palette, light: Tensor, camera: Camera, samples: int, style: Style, compiled: bool
) -> tuple[Tensor, ...]:
    """Draw one head with S x S rays, S = ``samples``: (C, S, S) image, depth, hit, normals, segment."""
    field = _Field(parameters, compiled)
    origins, rays = camera.rays(samples)
    origin = origins[0, :1].T
    stretch = rays[0].norm(dim=-1)  # length of a ray of unit camera depth
    directions = (rays[0] / stretch[:, None]).T.contiguous()
    focal = float(camera.intrinsics[0, (0, 1), (0, 1)].min())
    away = float(origin.norm())
    start, stop = max(away - BOUND, 0.05), away + BOUND
    pixel = away / (focal * samples)

    block = BLOCK if samples % BLOCK == 0 else 1
    middle = F.normalize(camera.rays(samples // block)[1][0], dim=-1).T.contiguous()
    begin = _block_starts(field, origin, middle, 0.7072 * block / (focal * samples), start, stop)
    begin = begin.reshape(samples // block, 1, samples // block, 1).expand(-1, block, -1, block).reshape(-1)
    travelled = _trace(field, origin, directions, begin.clone(), pixel, stop)

    hit = travelled < stop
    index = hit.nonzero()[:, 0]
    points = (origin + directions[:, index] * travelled[index]).contiguous()
    normals = _normals(field, points)
    material = field.material(points)
    albedo, segment = paint_head(field.knob, palette, points, material, max(pixel, 0.014))
    # Eyes, lips and teeth lie in hollows; full occlusion would dull what makes a face readable.
    features = (segment >= SEGMENTS.index("eye_white")) & (segment <= SEGMENTS.index("mouth"))
    occlusion = _occlusion(field, points, normals)
    surface = Surface(
        points=points.T,
        normals=normals,
        view=-directions[:, index].T,
        material=material,
        segment=segment,
        albedo=albedo,
        irradiance=(harmonics(normals) @ light).clamp(min=0.05),
        occlusion=torch.where(features, occlusion.clamp(min=0.85), occlusion),
    )
    along = torch.linspace(-1, 1, samples, device=parameters.device)
    v, u = torch.meshgrid(along, along, indexing="ij")
    image = style.background(palette, u.flatten(), v.flatten()).clamp(0, 1)
    image[index] = style.paint(surface, palette).clamp(0, 1)
    depth = torch.zeros_like(travelled)
    depth[index] = travelled[index] / stretch[index]
    normal_map = torch.zeros_like(image)
    normal_map[index] = normals
    segments = torch.zeros_like(hit, dtype=torch.int64)
    segments[index] = segment
    if style.outline:
        materials = torch.full_like(depth, -1.0)
        materials[index] = material.float()
        square = (samples, samples)
        contour = torch.where(hit, depth, 2 * stop).reshape(square)
        lines = _outline(contour, materials.reshape(square), normal_map.T.reshape(3, *square), max(1, samples // 192))
        opacity = style.outline * lines.flatten()[:, None]
        image = image + (image.new_tensor(style.ink) - image) * opacity
    maps = (image, depth[:, None], hit[:, None].float(), normal_map, segments[:, None])
    return tuple(value.T.reshape(-1, samples, samples) for value in maps)


@torch.no_grad()
def render(
    scene: Scene,
    camera: Camera,
    size: int,
    style: str | Sequence[str] = PLAIN,
    supersample: int = 2,
    compiled: bool = False,
) -> Truth:
    """Draw each head of ``scene`` from its camera.

    Heads are drawn one by one: rays that have arrived are dropped, which pays more than batching.

    Args:
        scene: B heads.
        camera: B cameras, or one for all; outside of the head.
        size: height and width of the pictures.
        style: one of ``STYLES`` for all, or one for each head.
        supersample: samples per pixel and axis; 1 = no anti-aliasing.
        compiled: compile the distance field (about half a minute once per process, then several times
            faster); falls back to eager drawing with a warning.

    Raises:
        ValueError: on an empty scene, an unknown style, a wrong number of cameras or styles, or sizes below 1.
    """
    count = len(scene)
    if not count:
        raise ValueError("the scene holds no head")
    if size < 1 or supersample < 1:
        raise ValueError(f"size and supersample must be at least 1, got size={size}, supersample={supersample}")
    if len(camera) == 1 and count > 1:
        camera = camera.repeat_interleave(count)
    if len(camera) != count:
        raise ValueError(f"{count} heads need {count} cameras or one, got {len(camera)}")
    names = [style] * count if isinstance(style, str) else list(style)
    if len(names) != count:
        raise ValueError(f"{count} heads need {count} styles or one, got {len(names)}")
    styles = [get_style(name) for name in names]
    parameters, palette, light = scene.parameters(), scene.palette(), scene.light()
    drawn = []
    for item, chosen in enumerate(styles):
        colours = Palette(**{f.name: getattr(palette, f.name)[item : item + 1] for f in fields(Palette)})
        maps = _draw_one(
            parameters[item],
            chosen.recolour(colours),
            light[item],
            camera[item],
            size * supersample,
            chosen,
            compiled,
        )
        drawn.append(_downsample(*maps, factor=supersample))
    image, depth, mask, normals, segmentation = (torch.stack(maps) for maps in zip(*drawn, strict=True))
    return Truth(image, depth, mask, normals, segmentation, scene.z, scene.expression, camera)


def _downsample(
    image: Tensor, depth: Tensor, hit: Tensor, normals: Tensor, segments: Tensor, factor: int
) -> tuple[Tensor, ...]:
    """Average the samples of each pixel; depth and normals over those that hit, the segment by majority."""
    votes = F.one_hot(segments[0], len(SEGMENTS)).permute(2, 0, 1).float()
    image, depth, mask, normals, votes = (F.avg_pool2d(value, factor) for value in (image, depth, hit, normals, votes))
    depth = torch.where(mask > 0, depth / mask.clamp(min=1e-6), 0.0)
    return image * 2 - 1, depth, mask, F.normalize(normals, dim=0), votes.argmax(0).to(torch.uint8)
