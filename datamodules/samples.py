"""Samples of a frozen generator as data: pictures, the codes and cameras behind them, and points of their shape.

E3DGE learns from these alone. Items are nothing but draws; pictures and shapes are made of a batch where it lies, so
that nothing is stored and a GPU makes them.

Source: E3DGE (Lan et al., 2023), Sec. 4.1 and supplement B.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from datamodules.resumable import SplitDataModule
from datamodules.seeds import SEEDS, index_generator, index_seed
from datamodules.truth import Movable
from models.artifact import Artifact, load
from models.batches import SampleBatch
from models.camera import Camera, Rig
from models.checks import check_not_negative, check_positive
from models.errors import UserError, shown
from models.features.base import Frozen
from models.generators.base import RadianceGenerator
from models.generators.geometry import field_geometry, field_values, form_of
from models.generators.views import render_views
from models.latents import Latents
from models.rendering.output import Rendering


class SampleItems(Dataset[dict[str, Any]]):
    """Draws: z (z_dim,), label (V, 25) from the rig's poses, draws (V,) seeds of each view's points, and a name.

    Codes, poses and each view's points are drawn apart. Those of item i depend on ``seed`` and ``first + i`` only.

    Args:
        split: name of the set.
        count: of items. views: V. z_dim: of the generator. rig: of the poses. seed: of all draws.
        first: number of the first item; sets whose numbers do not overlap have no item in common.
    """

    def __init__(self, split: str, count: int, views: int, z_dim: int, rig: Rig, seed: int, first: int = 0) -> None:
        self.split, self.count, self.views, self.z_dim, self.rig, self.seed = split, count, views, z_dim, rig, seed
        self.first = first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item ``index``, whatever was asked before."""
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        number = self.first + index
        return {
            "z": torch.randn(self.z_dim, generator=index_generator(self.seed, number, "sample's code")),
            "label": self.rig.random(self.views, index_generator(self.seed, number, "sample's poses")).label(),
            "draws": torch.tensor(
                [index_seed(self.seed, number, f"sample's points {view}") for view in range(self.views)]
            ),
            "name": f"{self.split}{index:07d}",
        }


def scaled_poses(camera: Camera, rig: Rig, views: int, pose_sd: float = 1.0, view_gap: float = 1.0) -> Camera:
    """Easier poses for the beginning of a training with several views (Sec. 4.3, "Curriculum Pose Sampling").

    Args:
        camera: of B * V pictures, V of each subject in a row, as drawn.
        pose_sd: factor of all angles from their means: what the paper scales is their sd. At 0 all views are frontal.
        view_gap: how far views after a subject's first lie towards where they were drawn, from the first: at 0 all
            views of a subject are one, wherever that is.
    """
    if pose_sd == 1 and view_gap == 1:
        return camera
    angles = torch.stack(rig.angles(camera), -1)
    mean = angles.new_tensor([rig.yaw_mean, rig.pitch_mean])
    angles = (mean + pose_sd * (angles - mean)).unflatten(0, (-1, views))
    first = angles[:, :1]
    yaw, pitch = (first + view_gap * (angles - first)).flatten(0, 1).unbind(-1)
    return rig.camera(yaw, pitch, camera.device)


@dataclass(frozen=True)
class PointRecipe:
    """Which points of a sample's scene are looked at (supplement B.1). The scene is a cube around the rig's centre.

    Attributes:
        count: P of P_O, the expected depths of pixels: so many pixels of a picture, at random; null takes all.
        near_std: of the Gaussian around each, in the scene's radius, half its depth range (.25: in StyleSDF's, .03).
        uniform: share of P of points anywhere in the cube. P_F are the near ones and these.
        foreground: a pixel shows the subject when its ray's expected depth is less than this share of the depth range.
            What passes the subject counts there as the far end (StyleSDF: 1.08 between .88 and 1.12).
    """

    count: int | None = None
    near_std: float = 0.25
    uniform: float = 0.5
    foreground: float = (1.08 - 0.88) / (1.12 - 0.88)

    def __post_init__(self) -> None:
        check_positive(self, "count", where="points.")
        check_not_negative(self, "near_std", "uniform", "foreground", where="points.")

    def draw(self, pixels: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of one picture for each seed, on the CPU.

        Returns:
            chosen pixels (B, P), standard normal numbers (B, P, 3) and uniform ones in [-1, 1] (B, U, 3).
        """
        count = pixels if self.count is None else self.count
        rows = []
        for seed in seeds:
            draws = torch.Generator().manual_seed(seed)
            chosen = torch.arange(pixels) if self.count is None else torch.randperm(pixels, generator=draws)[:count]
            near = torch.randn(count, 3, generator=draws)
            rows.append((chosen, near, 2 * torch.rand(round(self.uniform * count), 3, generator=draws) - 1))
        chosen, near, anywhere = (torch.stack(part) for part in zip(*rows, strict=True))
        return chosen, near, anywhere


def pixel_points(rendering: Rendering, camera: Camera, rig: Rig, foreground: float) -> tuple[Tensor, Tensor]:
    """Where the rays of pixels end, t_s: points (B, h * w, 3), and whether they show the subject (B, h * w, 1).

    A ray of the subject ends at the subject's expected depth, another at the whole ray's, the far end included.
    """
    assert rendering.depth is not None and rendering.alpha is not None
    depth, alpha = rendering.depth.flatten(2).mT, rendering.alpha.flatten(2).mT
    whole = alpha * depth + (1 - alpha) * rig.far
    shows = whole < rig.near + foreground * (rig.far - rig.near)
    origins, directions = camera.rays(*rendering.depth.shape[-2:])
    return origins + torch.where(shows, depth, whole) * directions, shows


@dataclass(frozen=True)
class SampleTruth(Movable):
    """What cameras see of a sample: a :class:`models.metrics.portrait.ViewTruth`.

    Depth, mask and normals are enlarged to the picture's size, pixel by pixel. The parts of the head are not known:
    all of it counts as background.
    """

    image: Tensor
    depth: Tensor
    mask: Tensor
    normals: Tensor
    segmentation: Tensor
    camera: Camera


class SampleDataModule(SplitDataModule):
    """Samples of a frozen 3D generator, drawn anew: z from N(0, I), poses from its rig.

    A batch is a :class:`models.batches.SampleBatch`. An item's draws depend on the seed and its number only: training
    has the first numbers, validation those after them, test those after these.

    Args:
        path, module: artifact of the generator, and its name there.
        train_samples, val_samples, test_samples: of each split; after so many the training set comes again.
        views: V pictures of each sample; 2 for pairs of views (B.1, "Novel-View Training Details").
        batch_size: samples per batch.
        points: which points of their shape are given.
        truncation: of the codes.
        yaw_std, pitch_std: of Gaussian poses, radians; by default the rig's own distribution.
        workers: loader processes.
        seed: of all draws.
        order: which order the training samples come in, one of each seed. Trainings that go on from one another take
            others, so that none begins with the samples that the one before has learnt from.

    Attributes:
        scale_pose_sd, scale_view_gap: of the poses of training batches alone, see :func:`scaled_poses`; a stage sets
            them as its training goes.
    """

    def __init__(
        self,
        path: str,
        module: str = "generator",
        train_samples: int = 1_200_000,
        val_samples: int = 256,
        test_samples: int = 256,
        views: int = 1,
        batch_size: int = 4,
        points: PointRecipe = PointRecipe(),
        truncation: float = 1.0,
        yaw_std: float | None = None,
        pitch_std: float | None = None,
        workers: int = 0,
        seed: int = 0,
        order: int = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed, order)
        self.path, self.module, self.views, self.points = path, module, views, points
        self.train_samples, self.val_samples, self.test_samples = train_samples, val_samples, test_samples
        self.truncation = truncation
        self.yaw_std, self.pitch_std = yaw_std, pitch_std
        check_positive(self, "views", "batch_size", "train_samples")
        check_not_negative(
            self, "val_samples", "test_samples", "workers", "truncation", "yaw_std", "pitch_std", "order"
        )
        if (total := train_samples + val_samples + test_samples) > SEEDS:
            raise UserError(f"there are {total} samples in all: at most {SEEDS} have draws of their own")
        self.scale_pose_sd = self.scale_view_gap = 1.0
        self.source: Artifact | None = None
        self._frozen: Frozen[RadianceGenerator] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the generator.

        Raises:
            ArtifactError: when the artifact is missing or damaged.
            UserError: when its module is no 3D generator with a field, or there are no samples for the stage.
        """
        counts = {"train": self.train_samples, "val": self.val_samples, "test": self.test_samples}
        needed = {"fit": "train", "validate": "val"}.get(stage or "fit", "test")
        if not counts[needed]:
            raise UserError(f"{needed}_samples is 0: there is nothing to {stage}")
        if self.datasets:
            return
        self.source = load(self.path)
        generator = self.source.module(self.module)
        if not isinstance(generator, RadianceGenerator):
            raise UserError(
                f"{self.path}: module {self.module!r} is a {type(generator).__name__}, which has no radiance field to "
                "take the shape of samples from"
            )
        self._frozen = Frozen(generator)
        given = {"yaw_std": self.yaw_std, "pitch_std": self.pitch_std}
        spread = {name: value for name, value in given.items() if value is not None}
        self.rig = generator.rig.replace(distribution="gaussian", **spread) if spread else generator.rig
        first = 0
        for split, count in counts.items():
            self.datasets[split] = SampleItems(split, count, self.views, generator.z_dim, self.rig, self.seed, first)
            first += count

    def generator(self, device: torch.device | str) -> RadianceGenerator:
        """The frozen generator, moved to a device."""
        if self._frozen is None:
            self.setup()
        assert self._frozen is not None
        return self._frozen.to(device).module

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> SampleBatch:
        """Make pictures and shapes of an item's draws, on their device and in fp32."""
        return self.render(batch, training=self.trainer is not None and self.trainer.training)

    @torch.no_grad()
    def render(self, batch: dict[str, Any], training: bool = True) -> SampleBatch:
        """The samples of collated items.

        Args:
            training: with poses as easy as they are set, in one pass; otherwise with all poses as they were drawn, and
                one by one, so that their last bits do not depend on one another.

        Raises:
            UserError: when a picture has fewer pixels than points are asked for.
        """
        with torch.autocast(batch["z"].device.type, enabled=False):
            if training:
                return self._render(batch, self.scale_pose_sd, self.scale_view_gap)
            parts = []
            for row in range(len(batch["z"])):
                one = {name: value[row : row + 1] for name, value in batch.items()}
                parts.append(self._render(one))
            return _joined(parts)

    def _render(self, batch: dict[str, Any], pose_sd: float = 1.0, view_gap: float = 1.0) -> SampleBatch:
        device = batch["z"].device
        generator = self.generator(device)
        rows, views = batch["label"].shape[:2]
        camera = Camera.from_label(batch["label"].flatten(0, 1))
        camera = scaled_poses(camera, self.rig, views, pose_sd, view_gap)
        ws = generator.mapping(batch["z"], truncation=self.truncation)
        rendering = generator.synthesis(ws, camera)
        assert rendering.depth is not None and rendering.alpha is not None and rendering.normals is not None
        pictures = {
            "image": rendering.image.clamp(-1, 1),
            "label": camera.label(),
            "depth": rendering.depth,
            "mask": rendering.alpha,
            "normals": rendering.normals,
        }
        if rendering.raw is not None:
            pictures["raw"] = rendering.raw.clamp(-1, 1)
        pictures |= self._shape(generator, ws, rendering, camera, batch["draws"])
        of_views = {name: value.unflatten(0, (rows, views)) for name, value in pictures.items()}
        return {**batch, **of_views, "ws": dict(ws.groups)}  # type: ignore[typeddict-item]

    def _shape(
        self, generator: RadianceGenerator, ws: Latents, rendering: Rendering, camera: Camera, seeds: Tensor
    ) -> dict[str, Tensor]:
        """Points of B * V pictures, and what the codes have there (Eq. 1)."""
        ends, shows = pixel_points(rendering, camera, generator.rig, self.points.foreground)
        views, pixels = len(camera) // len(ws), ends.shape[1]
        if self.points.count is not None and self.points.count > pixels:
            raise UserError(f"points.count is {self.points.count}: a rendered picture has {pixels} pixels")
        chosen, near, anywhere = (t.to(ends.device) for t in self.points.draw(pixels, seeds.flatten().tolist()))
        surface = ends.gather(1, chosen[..., None].expand(-1, -1, 3))
        centre, radius = scene(generator.rig)
        middle = ends.new_tensor(centre)
        space = torch.cat([surface + self.points.near_std * radius * near, middle + radius * anywhere], 1)
        within = ((space - middle).abs() <= radius).all(-1, keepdim=True)
        form, codes = form_of(generator), ws.repeat_interleave(views)
        found = field_geometry(generator, codes, surface, form=form)
        return {
            "surface": surface,
            "surface_mask": shows.gather(1, chosen[..., None]).to(surface.dtype),
            "surface_value": found.value,
            "surface_normals": found.normals,
            "space": space,
            "space_mask": within.to(space.dtype),
            "space_value": field_values(generator, codes, space, form),
        }

    @torch.no_grad()
    def view_truth(self, sample: dict[str, Any], camera: Camera) -> SampleTruth:
        """What a sample's head shows to B cameras."""
        ws = Latents({name: codes[None] for name, codes in sample["ws"].items()})
        device = next(iter(ws.groups.values())).device
        with torch.autocast(device.type, enabled=False):
            seen = render_views(self.generator(device), ws, camera.to(device))
        assert seen.depth is not None and seen.alpha is not None and seen.normals is not None
        size = seen.image.shape[-2:]
        depth, mask, normals = (
            F.interpolate(t.float(), size, mode="nearest-exact") for t in (seen.depth, seen.alpha, seen.normals)
        )
        parts = torch.zeros(len(camera), *size, dtype=torch.uint8, device=device)
        return SampleTruth(seen.image.clamp(-1, 1), depth, mask, normals, parts, camera.to(device))


def scene(rig: Rig) -> tuple[tuple[float, float, float], float]:
    """Centre and radius, half the side, of the cube that a rig's cameras look into, world units."""
    return rig.pivot if rig.centre is None else rig.centre, (rig.far - rig.near) / 2


def _joined(parts: Sequence[SampleBatch]) -> SampleBatch:
    """Batches of one after the other."""

    fields: list[dict[str, Any]] = [dict(part) for part in parts]

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: torch.cat([value[name] for value in values]) for name in values[0]}
        return torch.cat(values) if isinstance(values[0], Tensor) else [name for value in values for name in value]

    return {name: join([part[name] for part in fields]) for name in fields[0]}  # type: ignore[return-value]


def check_samples(data: object, origin: tuple[Artifact, str]) -> None:
    """Refuse samples of another generator than that of a stage.

    Args:
        origin: artifact and module of the stage's generator.

    Raises:
        UserError: when the data are samples of another, or no samples.
    """
    if not isinstance(data, SampleDataModule):
        raise UserError(
            f"the data are {type(data).__name__}, which does not know the codes behind its pictures: take samples of "
            "the generator, --data datamodules.samples.SampleDataModule"
        )
    assert data.source is not None
    artifact, module = data.source.origin(data.module)
    ours, name = origin[0].origin(origin[1])
    if (artifact.id, module) != (ours.id, name):
        raise UserError(
            f"the samples are of {data.path} ({shown(data.module)}), but what learns is trained for another generator: "
            f"give --data.init_args.path that of {origin[0].path}"
        )
