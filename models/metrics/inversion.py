"""How well a portrait was inverted: GRAMInverter's protocol (Deng et al. 2023, Sec. 4.2 and A.6), and the truth.

Of any picture with a camera: fidelity at the input's view, and identity and distribution of novel views. Where the
true head is known, in the embedded world, also what no photograph can tell: novel views, depth and normals against
the truth, and the parallax of a painted mark.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from models.camera import Camera, Rig
from models.errors import UserError
from models.features.base import Frozen, move_frozen, network_name
from models.metrics.consistency import SurfaceRecipe, around, carried, stacked_line, surface_consistency
from models.metrics.distribution import Distribution, feature_distances
from models.metrics.geometry import shape_errors
from models.metrics.image import high_frequency, identity_similarity, masked_distance, psnr, ssim
from models.metrics.parallax import Mark, choose_mark, locate, parallax, shows
from models.metrics.portrait import ViewTruth
from models.metrics.records import Record
from models.rendering.output import Rendering
from models.rendering.visibility import seen_from

PROTOCOL, VERSION = "inversion", "1"
Renderer = Callable[[Camera], Rendering]
"""One head, seen by any number of cameras."""
Invert = Callable[[Tensor, Camera], Renderer]
"""A picture (1, 3, H, W) in [-1, 1] and its camera -> the head."""

# By metric, which network measures it, "" for none. "@near" and "@far" are views within and beyond 0.3 rad of the
# input's, "@hidden" the pixels of any view that the input does not show.
_COMPARED = {"psnr": "", "ssim": "", "lpips": "perceptual"}
_SHAPE = {"depth_mae": "", "normal_error": ""}
METRICS = {
    **_COMPARED, "id": "identity", "detail": "", "id_nv": "identity", "id_judge": "judge", "id_nv_judge": "judge",
    "psnr_mv": "", "ssim_mv": "", **_SHAPE,
    **{f"{name}@{place}": kind for place in ("near", "far") for name, kind in (_COMPARED | _SHAPE).items()},
    "psnr@hidden": "", "lpips@hidden": "perceptual", "psnr_carried": "",
    "mark_error": "", "mark_slope": "", "mark_found": "", "mark_strength": "",
}  # fmt: skip
SETS = ("fid", "kid", "fid_nv", "kid_nv")  # of all items together, measured with the distribution's network
NEAR = 0.3  # rad, the paper's border between a small and a large difference of pose
_KID_SUBSET = 100


def draws(seed: int, name: str, purpose: str) -> Generator:
    """A CPU generator for one item that depends on nothing but the arguments: the same for every method.

    It takes the lower 32 bits of its seed: of a hundred thousand items, one or two have the draws of another.
    """
    digest = hashlib.sha256(f"{seed}:{purpose}:{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def novel_yaw(yaw: float, generator: Generator) -> float:
    """Yaw of an item's novel view, radians (GRAMInverter, A.6).

    Uniform in [-.5, -.4] and [.4, .5]; the sign changes when the view is less than .3 from ``yaw``, the input's.
    """
    size, side = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
    drawn = math.copysign(0.4 + 0.1 * size, side - 0.5)
    return -drawn if abs(drawn - yaw) < NEAR else drawn


class Truth(Protocol):
    """The true head of an item."""

    def __call__(self, camera: Camera, /) -> ViewTruth:
        """What V cameras see."""
        ...


@dataclass(frozen=True)
class Measured:
    """All that is measured of one item.

    Attributes:
        values: by metric; a missing one was not measured.
        features: (3, D) of the input, its reconstruction and the novel view, by the distribution's network.
        pictures: rows of views for the eye, (3, h, w) in [-1, 1], by name.
    """

    values: dict[str, float]
    features: Tensor
    pictures: dict[str, Tensor] = field(default_factory=dict)


class InversionProtocol:
    """Measures inverted portraits one by one.

    Args:
        perceptual, identity: networks; the paper scores identity with another network than its loss's (CosFace, where
            the loss has ArcFace).
        judge: another identity network than any that a loss knows, which tells ``id_judge`` and ``id_nv_judge`` beside
            the other's; null leaves these out.
        distribution: network of FID and KID.
        sweep_deg: yaws of the true views relative to the input's; those beyond the rig's largest are left out.
        surfaces: so many items get PSNR_mv and SSIM_mv, which take a minute or more each.
        surface_views: the views of each of them; surface: how their surface is fitted.
        surface_yaw, surface_pitch: radians, how far these views go to each side.
        marks: whether a mark is painted and followed.
        seed: of all draws.

    Raises:
        UserError: when a number is too small.
    """

    def __init__(
        self,
        perceptual: torch.nn.Module,
        identity: torch.nn.Module,
        distribution: Distribution,
        sweep_deg: Sequence[float] = (-30, -20, -10, 10, 20, 30),
        surfaces: int = 50,
        surface_views: int = 30,
        surface: SurfaceRecipe | None = None,
        surface_yaw: float = 0.5,
        surface_pitch: float = 0.2,
        marks: bool = True,
        seed: int = 0,
        judge: torch.nn.Module | None = None,
    ) -> None:
        if surfaces < 0 or surface_views < 2:
            raise UserError(
                f"protocol: a surface needs two views, and none or more surfaces, got {surface_views=}, {surfaces=}"
            )
        self.perceptual, self.identity, self.distribution = Frozen(perceptual), Frozen(identity), Frozen(distribution)
        self.judge = None if judge is None else Frozen(judge)
        self.sweep = torch.tensor([math.radians(angle) for angle in sweep_deg])
        self.surfaces, self.surface_views, self.surface = surfaces, surface_views, surface or SurfaceRecipe()
        self.surface_yaw, self.surface_pitch = surface_yaw, surface_pitch
        self.marks, self.seed = marks, seed

    @property
    def networks(self) -> dict[str, str]:
        """Names of the networks, for the tables."""
        holders = {"perceptual": self.perceptual, "identity": self.identity, "distribution": self.distribution}
        if self.judge is not None:
            holders["judge"] = self.judge
        return {kind: network_name(holder.module) for kind, holder in holders.items()} | {"": ""}

    @torch.no_grad()
    def __call__(
        self,
        name: str,
        image: Tensor,
        camera: Camera,
        rig: Rig,
        invert: Invert,
        truth: Truth | None = None,
        surface: bool = False,
    ) -> Measured:
        """Measure one item.

        Args:
            name: of the item; all its draws follow from it and the seed.
            image: (1, 3, H, W) in [-1, 1]; camera: its own.
            rig: of the generator: around what cameras turn, and how far.
            invert: the method.
            truth: the true head, where it is known.
            surface: whether to fit a surface to it, and to draw the paper's stacked line.
        """
        move_frozen(self, image.device)
        head = invert(image, camera)
        found = head(camera)
        own, novel = _picture(found), _picture(head(self.novel_view(name, camera, rig)))
        with _exactly(image):
            values = {
                "psnr": psnr(own, image),
                "ssim": ssim(own, image),
                "lpips": self.perceptual(own, image),
                "id": identity_similarity(self.identity, own, image),
                "detail": high_frequency(own) / high_frequency(image),
                "id_nv": identity_similarity(self.identity, novel, image),
            }
            if self.judge is not None:
                values["id_judge"] = identity_similarity(self.judge, own, image)
                values["id_nv_judge"] = identity_similarity(self.judge, novel, image)
            features = self.distribution(torch.cat([image, own, novel])).double().cpu()
        measured = {metric: float(value) for metric, value in values.items()}
        pictures = {"input": torch.cat([image[0], own[0], novel[0]], 2)}
        offsets = self.offsets(camera, rig)
        if truth is not None and len(offsets):
            views = camera.repeat_interleave(len(offsets)).turn(offsets, rig.pivot)
            source, sweep, turned = truth(camera), truth(views), head(views)
            with _exactly(image):
                measured |= self._against(source, sweep, found, turned, offsets)
                mark = choose_mark(source, sweep, draws(self.seed, name, "mark")) if self.marks else None
            rows = [sweep.image, _picture(turned)]
            if mark is not None:
                opacity = mark.opacity(camera, source.depth, source.mask)
                change = mark.paint(source.image, opacity) - source.image
                marked = _picture(invert(image + change, camera)(views))
                with _exactly(image):
                    measured |= _followed(mark, sweep, rows[1], marked, change[0])
                rows += [mark.paint(sweep.image, mark.opacity(views, sweep.depth, sweep.mask)), marked]
            pictures["sweep"] = _rows(*rows)
        if surface:
            views = self.around(rig, image.device)
            seen = head(views)
            alpha = torch.ones_like(seen.image[:, :1]) if seen.alpha is None else seen.alpha
            one = surface_consistency(seen.image, alpha, views, self.surface)
            measured |= {"psnr_mv": one.psnr, "ssim_mv": one.ssim}
            pictures["surface"] = _rows((_picture(seen) + 1) * alpha - 1, one.fit.image)[:, :, : 8 * image.shape[-1]]
            steady = rig.orbit(image.shape[-2], self.surface_yaw).to(image.device)
            pictures["line"] = stacked_line(_picture(head(steady)))
        return Measured(measured, features, pictures)

    def novel_view(self, name: str, camera: Camera, rig: Rig) -> Camera:
        """The paper's novel view of an item: another yaw, the input's pitch and roll."""
        yaw = float(camera.yaw)
        return camera.turn(novel_yaw(yaw, draws(self.seed, name, "novel")) - yaw, rig.pivot)

    def around(self, rig: Rig, device: torch.device) -> Camera:
        """The views that a surface is fitted to."""
        return around(rig, self.surface_views, self.surface_yaw, self.surface_pitch).to(device)

    def offsets(self, camera: Camera, rig: Rig) -> Tensor:
        """(V,) yaws of the true views relative to the input's, radians, without those beyond the rig's largest."""
        yaws = camera.yaw.cpu() + self.sweep
        return self.sweep[(yaws - rig.yaw_mean).abs() <= rig.yaw_max + 1e-4].to(camera.device)

    def _against(
        self, source: ViewTruth, sweep: ViewTruth, own: Rendering, turned: Rendering, offsets: Tensor
    ) -> dict[str, float]:
        """Scores of the input's view and of the sweep against what they truly show."""
        found, camera, views = _picture(turned), source.camera, sweep.camera
        metrics = {
            "psnr": psnr(found, sweep.image),
            "ssim": ssim(found, sweep.image),
            "lpips": self.perceptual(found, sweep.image),
            **shape_errors(turned, sweep),
        }
        near = offsets.abs() <= NEAR
        values = {
            f"{metric}@{place}": float(value[chosen].nanmean())
            for metric, value in metrics.items()
            for place, chosen in (("near", near), ("far", ~near))
        }
        values |= {metric: float(value) for metric, value in shape_errors(own, source).items()}
        shown = seen_from(views, sweep.depth, sweep.mask, camera, source.depth, source.mask)
        hidden = ((sweep.mask > 0.5) & ~shown).float()
        telling = hidden.flatten(1).sum(1) >= 8  # fewer pixels say nothing
        if telling.any():
            pair, hidden = (found[telling], sweep.image[telling]), hidden[telling]
            values["psnr@hidden"] = float(psnr(*pair, hidden).mean())
            values["lpips@hidden"] = float(masked_distance(self.perceptual.module, *pair, hidden).mean())
        together = torch.cat([_picture(own), found])
        shape = torch.cat([source.depth, sweep.depth]), torch.cat([source.mask, sweep.mask])
        moved, shared = carried(together, Camera.cat([camera, views]), *shape, reference=0)
        return values | {"psnr_carried": float(psnr(together, moved, shared)[1:].nanmean())}


def _exactly(image: Tensor) -> torch.autocast:
    """Measured in full precision whatever the renderings were made in."""
    return torch.autocast(image.device.type, enabled=False)


def _followed(mark: Mark, sweep: ViewTruth, plain: Tensor, marked: Tensor, change: Tensor) -> dict[str, float]:
    """Where the mark went in renderings (V, 3, H, W) of the sweep; ``change`` (3, H, W) was painted on the input."""
    places, _ = sweep.camera.project(mark.point.expand(len(plain), 1, 3))
    size = places.new_tensor([plain.shape[-1], plain.shape[-2]])
    path = parallax(locate(plain, marked, change), places[:, 0] * size, shows(sweep, mark.point))
    return {f"mark_{part}": value for part, value in vars(path).items()}


def _picture(rendering: Rendering) -> Tensor:
    return rendering.image.float().clamp(-1, 1)


def _rows(*rows: Tensor) -> Tensor:
    """(V, 3, H, W) each, below each other: (3, rows * H, V * W)."""
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1).clamp(-1, 1)


class InversionScores(Metric):
    """What an :class:`InversionProtocol` measured, of all items of all ranks, each item once.

    Args:
        networks: by kind, their names (:attr:`InversionProtocol.networks`).
        num_features: D of the features.
        seed: of KID's subsets.
    """

    full_state_update = False
    names: list[Tensor]
    values: list[Tensor]
    features: list[Tensor]

    def __init__(self, networks: dict[str, str], num_features: int, seed: int = 0) -> None:
        super().__init__()
        self.networks, self.num_features, self.seed = networks, num_features, seed
        for state in ("names", "values", "features"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, name: str, measured: Measured) -> None:
        """Add one item; an item that is there already changes nothing."""
        unknown = measured.values.keys() - METRICS.keys()
        if unknown:
            raise ValueError(f"unknown metrics: {', '.join(sorted(unknown))}")
        row = [measured.values.get(metric, math.nan) for metric in METRICS]
        self.names.append(_encoded(name).to(self.device))
        self.values.append(torch.tensor([row], dtype=torch.float64, device=self.device))
        self.features.append(measured.features.double()[None].to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Means over items, and FID and KID of the input's view and of novel ones."""
        _, values, features = self._items()
        means = {metric: column.nanmean() for metric, column in zip(METRICS, values.T, strict=True)}
        return {metric: value for metric, value in means.items() if value.isfinite()} | self._distances(features)

    def records(self, variant: str, split: str = "test", seed: int = 0) -> list[Record]:
        """All values, tidy; to be called by all ranks. Those of the whole set have the item "all"."""
        with self.sync_context(should_sync=not self._is_synced, should_unsync=not self._is_synced):
            names, values, features = self._items()

        def record(item: str, network: str, metric: str, value: float) -> Record:
            return Record(PROTOCOL, VERSION, split, item, "", seed, variant, self.networks[network], metric, value)

        measured = [metric for metric, column in zip(METRICS, values.T, strict=True) if column.isfinite().any()]
        index = {metric: number for number, metric in enumerate(METRICS)}
        records = [
            record(name, METRICS[metric], metric, float(row[index[metric]]))
            for name, row in zip(names, values, strict=True)
            for metric in measured
        ]
        sets = self._distances(features).items()
        return records + [record("all", "distribution", metric, float(value)) for metric, value in sets]

    def _items(self) -> tuple[list[str], Tensor, Tensor]:
        """Each item once, sorted by name: ranks that are given too few items repeat some."""
        if not len(self.names):
            return [], torch.zeros(0, len(METRICS)), torch.zeros(0, 3, self.num_features)
        names = [_decoded(row) for row in dim_zero_cat(self.names)]
        order = [names.index(name) for name in sorted(set(names))]
        return (
            [names[i] for i in order],
            dim_zero_cat(self.values)[order].cpu(),
            dim_zero_cat(self.features)[order].cpu(),
        )

    def _distances(self, features: Tensor) -> dict[str, Tensor]:
        """FID and KID between the inputs and the two kinds of renderings; nothing for a single item."""
        count = len(features)
        if count < 2:
            return {}
        real, own, novel = features.unbind(1)
        values: dict[str, float] = {}
        for suffix, fake in (("", own), ("_nv", novel)):
            # The items of all ranks are here already: nothing to gather.
            found = feature_distances(fake, real, self.seed, min(_KID_SUBSET, count))
            values |= {name + suffix: value for name, value in found.items()}
        return {metric: torch.tensor(values[metric]) for metric in SETS}


_NAME_BYTES = 256


def _encoded(name: str) -> Tensor:
    """(1, 256) uint8: ranks exchange tensors only. Of a longer name the end is kept, which tells items apart."""
    data = name.encode()[-_NAME_BYTES:]
    return torch.tensor([list(data.ljust(_NAME_BYTES, b"\0"))], dtype=torch.uint8)


def _decoded(row: Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode(errors="replace")
