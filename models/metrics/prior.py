"""What a trained prior is worth: fits of held-out subjects, its samples' distribution, and whether it has copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torchvision.utils import make_grid

from models.camera import Camera
from models.features.base import network_name
from models.generators.base import Generator, RadianceGenerator
from models.generators.geometry import field_geometry, form_of
from models.generators.views import render_views
from models.heads.projector import fit_latents
from models.heads.subjects import TRUNCATION
from models.latents import Latents
from models.metrics.consistency import SurfaceRecipe, around, surface_consistency
from models.metrics.distribution import Distribution, feature_distances, features_of
from models.metrics.geometry import at_size, depth_mae, normal_error
from models.metrics.image import change_correlation, masked_mean, psnr, ssim
from models.metrics.records import Record
from models.rendering.mesh import fuse, mesh_cameras

_VIEWS_DEG = (-60, -36, -24, -12, 0, 12, 24, 36, 60)  # yaws at which fitted heads are compared with the truth
_NEAR_DEG = 36  # larger yaws are reported apart
_VOXELS = 96  # along a side of meshes
_PITCH_DEG = 12  # of the view that is fitted


class Truth(Protocol):
    """Pictures (B, 3, H, W) and what they show: (B, 1, H, W) twice, (B, 3, H, W)."""

    image: Tensor
    depth: Tensor
    mask: Tensor
    normals: Tensor


@runtime_checkable
class KnowsSubjects(Protocol):
    """Data whose subjects can be drawn from anywhere."""

    def subject_truth(self, z: Tensor, camera: Camera, size: int, expression: Tensor | None = None) -> Truth:
        """What the subject z (1, z_dim) shows to B cameras, with an expression (1, E) or none; on the CPU."""
        ...


@torch.no_grad()
def subject_scores(generator: Generator, data: KnowsSubjects, z: Tensor, subject: int, seed: int) -> list[Record]:
    """How well a subject is expressed by its own code and by one that is fitted to a single view.

    Args:
        generator: where it is animated, with the data's expressions.
        z: (1, z_dim), the true code.
        subject: its number, which also seeds the fitted view.
        seed: of the run, for the records.
    """
    size, device, rig = generator.resolution, z.device, generator.rig
    yaw, pitch = (torch.rand(2, generator=torch.Generator().manual_seed(subject)) * 2 - 1).tolist()
    source = rig.camera(math.radians(_NEAR_DEG) * yaw, math.radians(_PITCH_DEG) * pitch)
    views = rig.camera(torch.tensor([math.radians(v) for v in _VIEWS_DEG]))
    truth, given = data.subject_truth(z, views, size), data.subject_truth(z, source, size).image.to(device)
    image, mask = truth.image.to(device), truth.mask.to(device)
    here, views = source.to(device), views.to(device)
    codes = {"fitted": fit_latents(generator, given, here), "known z": generator.mapping(z)}
    records: list[Record] = []

    def add(variant: str, metric: str, view: str, value: Tensor) -> None:
        records.append(Record("prior", "1", "test", str(subject), view, seed, variant, "", metric, float(value)))

    def each(variant: str, metric: str, values: Tensor) -> None:
        for angle, value in zip(_VIEWS_DEG, values, strict=True):
            add(variant, metric if abs(angle) <= _NEAR_DEG else f"{metric}_60", f"yaw{angle:+d}", value)

    for variant, latents in codes.items():
        found = generator.synthesis(latents, views)
        each(variant, "psnr", psnr(found.image, image))
        each(variant, "ssim", ssim(found.image, image))
        if found.depth is not None and found.normals is not None:
            own = found.depth.shape[-2], found.depth.shape[-1]
            depth, covered, normals = at_size(own, truth.depth.to(device), mask, truth.normals.to(device))
            assert normals is not None
            solid = covered > 0.99
            each(variant, "depth_mae", depth_mae(found.depth, depth, solid))
            each(variant, "normal_deg", normal_error(found.normals, normals, solid))
            if isinstance(generator, RadianceGenerator) and form_of(generator) == "sdf":
                shows = (found.alpha if found.alpha is not None else covered) > 0.9
                each(variant, "slope", surface_slope(generator, latents, views, found.depth, shows))
        neutral = generator.synthesis(latents, here).image
        add(variant, "psnr_source", "source", psnr(neutral, given)[0])
        for name, code in zip(generator.expressions, torch.eye(len(generator.expressions)), strict=True):
            moved = data.subject_truth(z, source, size, code[None]).image.to(device)
            change = generator.synthesis(latents, here, expression=code[None].to(device)).image
            correlation = change_correlation(neutral, change, given, moved)
            add(variant, f"expression_{name}", "source", correlation[0])
    return records


@torch.no_grad()
def picture_scores(generator: Generator, image: Tensor, z: Tensor, subject: int, view: str, seed: int) -> list[Record]:
    """How well a 2D generator shows a picture by its own code and by one that is fitted to it.

    Args:
        image: (1, 3, H, W). z: (1, z_dim), the true code.
        subject, view: names of the picture. seed: of the run, for the records.
    """
    records = []
    for variant, latents in {"fitted": fit_latents(generator, image), "known z": generator.mapping(z)}.items():
        found = generator.synthesis(latents).image
        for metric, value in (("psnr", psnr(found, image)), ("ssim", ssim(found, image))):
            records.append(Record("prior", "1", "test", str(subject), view, seed, variant, "", metric, float(value)))
    return records


def surface_slope(generator: RadianceGenerator, ws: Latents, camera: Camera, depth: Tensor, mask: Tensor) -> Tensor:
    """Mean length of a signed distance's gradient (V,) at the surface that V cameras see of one head; 1 is a distance.

    Args:
        depth: (V, 1, h, w) camera-z. mask: (V, 1, h, w), where there is a surface.
    """
    origins, directions = camera.rays(depth.shape[-2], depth.shape[-1])
    points = origins + depth.flatten(2).mT * directions
    slope = field_geometry(generator, ws.repeat_interleave(len(camera)), points, form="sdf").slope
    return masked_mean(slope.mT.unflatten(2, depth.shape[-2:]), mask.to(slope.dtype))


@torch.no_grad()
def closed_meshes(generator: Generator, count: int, seed: int) -> list[Record]:
    """Whether the meshes of heads 0 to ``count`` - 1 are closed: 1, or 0 where one has a hole.

    Args:
        generator: a 3D one. seed: of the run, for the records.
    """
    device, rig, records = next(iter(generator.mean_latents.groups.values())).device, generator.rig, []
    camera = mesh_cameras(rig).to(device)
    for number in range(count):
        z = generator.sample_z(1, torch.Generator().manual_seed(number)).to(device)
        views = render_views(generator, generator.mapping(z, truncation=TRUNCATION), camera)
        closed = float(fuse(views, camera, rig, size=_VOXELS).closed)
        records.append(Record("prior", "1", "test", str(number), "", seed, "samples", "", "mesh_closed", closed))
    return records


def sample_distances(
    features: Distribution,
    sample: Callable[[Tensor], Iterable[Tensor]],
    real: Tensor,
    labels: Tensor,
    seed: int,
    device: torch.device,
    count: int | None = None,
) -> list[Record]:
    """FID and KID of samples against one half of held-out pictures, beside those of the two halves.

    Args:
        sample: cameras (N, 25) to pictures, in parts (n, 3, R, R).
        real, labels: features (N, F) of the held-out pictures, and their cameras (N, 25).
        seed: of the metric's subsets.
        device: where they are compared.
        count: so many samples are also compared with all pictures, as ``fid_COUNT`` and ``kid_COUNT``; their cameras
            are drawn from those of the pictures.
    """
    half, network, records = len(real) // 2, network_name(features), []

    def compare(variant: str, found: Tensor, real: Tensor, suffix: str = "") -> None:
        for name, value in feature_distances(found, real, seed).items():
            records.append(Record("prior", "1", "test", "all", "", seed, variant, network, name + suffix, value))

    compare("samples", features_of(features, sample(labels[:half]), device), real[:half])
    compare("real halves", real[half : 2 * half], real[:half])
    if count is not None:
        drawn = torch.randint(len(labels), (count,), generator=torch.Generator().manual_seed(seed))
        compare("samples", features_of(features, sample(labels[drawn]), device), real, f"_{count}")
    return records


def sample_consistency(
    generator: Generator, count: int, seed: int, views: int = 30, recipe: SurfaceRecipe | None = None
) -> list[Record]:
    """PSNR_mv and SSIM_mv of heads 0 to ``count`` - 1 (GRAMInverter, Table 1: 50 of them).

    Args:
        generator: a 3D one. seed: of the run, for the records.
        views: of each head. recipe: of the surface that is fitted to them.
    """
    device, records = next(iter(generator.mean_latents.groups.values())).device, []
    camera = around(generator.rig, views).to(device)
    for number in range(count):
        z = generator.sample_z(1, torch.Generator().manual_seed(number)).to(device)
        with torch.no_grad():
            seen = render_views(generator, generator.mapping(z), camera)
        alpha = torch.ones_like(seen.image[:, :1]) if seen.alpha is None else seen.alpha
        found = surface_consistency(seen.image, alpha, camera, recipe)
        for name, value in (("psnr_mv", found.psnr), ("ssim_mv", found.ssim)):
            records.append(Record("prior", "1", "test", str(number), "", seed, "samples", "", name, value))
    return records


def nearest_pictures(asked: dict[str, Tensor], training: Iterable[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """How near pictures come to a training set.

    Args:
        asked: by variant, pictures (N, 3, R, R) of each.
        training: batches of pictures (V, 3, R, R).

    Returns:
        by variant, the PSNR (N,) of each to the nearest; and a picture of the first variant: rows of it, each above
        that of the nearest ones.
    """
    first, *_ = asked.values()
    queries = torch.cat(list(asked.values())).flatten(1)
    best, nearest = torch.full((len(queries),), math.inf), torch.zeros_like(queries)
    for pictures in training:
        views = pictures.flatten(1)
        value, view = torch.cdist(queries, views).square().div_(queries.shape[1]).min(1)
        closer = value < best
        best[closer], nearest[closer] = value[closer], views[view[closer]]
    rows = torch.stack([queries, nearest])[:, : len(first)].unflatten(2, first.shape[1:]).split(12, 1)
    sheet = make_grid(torch.cat([pair.flatten(0, 1) for pair in rows]), nrow=rows[0].shape[1], pad_value=1.0)
    psnrs = (-10 * (best / 4).log10()).split([len(pictures) for pictures in asked.values()])
    return dict(zip(asked, psnrs, strict=True)), sheet
