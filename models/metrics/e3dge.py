"""E3DGE's measurements (Lan et al. 2023, Sec. 5 and supplement B.2): the source view, a trajectory around it, shape.

Of any picture with a camera: fidelity at the source view, by the usual metrics and as the released code measures, and
identity along the trajectory. Where the true head is known, also every frame of the trajectory against the truth, over
all pixels, over those that the source view shows and over those that it does not; depth, normals, and the distance of
a scan of the face. Edits have measurements of their own: :mod:`models.metrics.editing`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.features.base import FacePoints, Frozen, move_frozen, network_name
from models.image import resized
from models.metrics.consistency import carried
from models.metrics.geometry import at_size, shape_errors
from models.metrics.image import high_frequency, identity_similarity, masked_distance, masked_mean, psnr, ssim
from models.metrics.inversion import NEAR, Invert, Renderer, Truth
from models.metrics.portrait import ViewTruth
from models.metrics.records import Record
from models.metrics.scan import (
    Scan,
    Unmeasurable,
    depth_surface,
    lifted,
    lifted_at,
    pooled,
    scan_distances,
    scan_scores,
)
from models.rendering.output import Rendering
from models.rendering.visibility import seen_from

log = logging.getLogger(__name__)

PROTOCOL, VERSION = "e3dge", "1"
FRAMES = 250  # of a trajectory, in the paper
SPREAD = 1.5  # standard deviations of the poses that it goes to each side
_SEVEN = (33, 133, 362, 263, 2, 61, 291)  # of MediaPipe's points, in the order of models.metrics.scan.KEYPOINTS
FEW = 8  # pixels: fewer say nothing


def mae(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error on the scale [0, 1]: (B,). The paper's tables have twice that, the error on [-1, 1]."""
    return masked_mean((image - truth).abs(), mask) / 2


def mae_e3dge(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error on the scale [-1, 1], as the paper's tables have it: (B,)."""
    return masked_mean((image - truth).abs(), mask)


def ssim_e3dge(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the paper's tables most likely call SSIM: 1 - DSSIM = (1 + SSIM) / 2, of an SSIM of its own: (B,).

    Its window has 5 pixels (Gaussian, deviation 1.5), and its constants are those of values in [0, 1] although the
    pictures are in [-1, 1]: .780 means an SSIM of .56.
    """
    from kornia.metrics import ssim as structural_similarity  # here: slow to import

    return masked_mean((1 + structural_similarity(image, truth, window_size=5, max_val=1.0)) / 2, mask)


_PIXELS: dict[str, Callable[..., Tensor]] = {
    "mae": mae, "psnr": psnr, "ssim": ssim, "mae_e3dge": mae_e3dge, "ssim_e3dge": ssim_e3dge,
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """All that is measured of one item.

    Attributes:
        values: by view ("" for those of all views together) and metric; a missing one was not measured.
        pictures: rows of views for the eye, (3, h, w) in [-1, 1], by name.
        distances: (M,) of the scan's points, to be pooled over items (:func:`scan_records`); None where there is no
            scan, or nothing to compare with it.
    """

    values: dict[tuple[str, str], float]
    pictures: dict[str, Tensor] = field(default_factory=dict)
    distances: Tensor | None = None

    def __getitem__(self, metric: str) -> float:
        """The value of all views together."""
        return self.values["", metric]

    @property
    def scanned(self) -> bool:
        """Whether the scan's distance was asked for, be it that it could not be measured."""
        return ("", "scan_median") in self.values

    def records(
        self,
        item: str,
        variant: str,
        networks: dict[str, str],
        protocol: str = PROTOCOL,
        split: str = "test",
        seed: int = 0,
        subject: str = "",
    ) -> list[Record]:
        """The values, tidy; ``networks`` are the names by metric without a suffix, see the protocols."""
        return [
            Record(protocol, VERSION, split, item, view, seed, variant, networks.get(_stem(metric), ""), metric, value,
                   subject)
            for (view, metric), value in self.values.items()
        ]  # fmt: skip


def scan_records(
    distances: Mapping[str, Tensor | None], variant: str, split: str = "test", seed: int = 0
) -> list[Record]:
    """NoW's numbers: the scores of all points of all items together, as item "all", and how many items are missing.

    Args:
        distances: of the items with a scan, by name: :attr:`Scores.distances`. None are no records.
    """
    values = pooled([distances[item] for item in sorted(distances)]) if distances else {}
    return [
        Record(PROTOCOL, VERSION, split, "all", "", seed, variant, "", metric, value)
        for metric, value in values.items()
    ]


def _stem(metric: str) -> str:
    """The metric without what it is measured on: lpips_nv@hidden -> lpips."""
    return metric.partition("@")[0].removesuffix("_nv")


def trajectory(rig: Rig, frames: int = FRAMES, spread: float = SPREAD) -> Camera:
    """The paper's ellipse of cameras: yaw = 1.5 yaw_std cos t, pitch = 1.5 pitch_std sin t (supplement B.2).

    No farther than the rig allows.
    """
    phase = torch.arange(frames) * (2 * math.pi / frames)
    yaw = rig.yaw_mean + spread * rig.yaw_std * phase.cos()
    pitch = rig.pitch_mean + spread * rig.pitch_std * phase.sin()
    return rig.camera(*rig.within(yaw, pitch))


def picture(rendering: Rendering) -> Tensor:
    """What is measured of a rendering: as a picture would be stored."""
    return rendering.image.float().clamp(-1, 1)


def check_sizes(found: Tensor, truth: Tensor) -> None:
    """Refuse pictures (B, 3, H, W) of different sizes.

    Raises:
        UserError: naming both.
    """
    if found.shape[-2:] != truth.shape[-2:]:
        raise UserError(
            f"the renderings are {found.shape[-1]} px and what they are compared with {truth.shape[-1]} px: "
            "both must be of one size, see --data.size"
        )


def exactly(image: Tensor) -> torch.autocast:
    """Measured in full precision whatever the renderings were made in."""
    return torch.autocast(image.device.type, enabled=False)


class PortraitNetworks:
    """The networks that a protocol compares portraits by.

    Args:
        perceptual: of LPIPS.
        identity: embedding of who is shown.
        second_identity: one that no method was trained with, measured as ``id2``.
    """

    def __init__(
        self, perceptual: torch.nn.Module, identity: torch.nn.Module, second_identity: torch.nn.Module | None = None
    ) -> None:
        self.perceptual, self.identity = Frozen(perceptual), Frozen(identity)
        self.second_identity = None if second_identity is None else Frozen(second_identity)

    @property
    def networks(self) -> dict[str, str]:
        """Names of the networks, by metric."""
        held = {"lpips": self.perceptual}
        for name, network in self._identities().items():
            held |= {name: network, f"{name}_input": network}
        return {metric: network_name(network.module) for metric, network in held.items()}

    def alike(self, found: Tensor, image: Tensor, suffix: str = "") -> dict[str, Tensor]:
        """Identity similarities (B,) by each network: ``id``, and ``id2`` where there is a second one."""
        return {
            name + suffix: identity_similarity(network, found, image) for name, network in self._identities().items()
        }

    def _identities(self) -> dict[str, Frozen[torch.nn.Module]]:
        held = {"id": self.identity, "id2": self.second_identity}
        return {name: network for name, network in held.items() if network is not None}


class E3DGEProtocol(PortraitNetworks):
    """Measures inverted portraits one by one.

    Args:
        perceptual: of LPIPS; the paper's is of AlexNet.
        identity: the paper's is ArcFace, which its loss has too.
        second_identity: one that no method was trained with, measured as ``id2``.
        frames: of the trajectory; 250 in the paper.
        spread: how far it goes, in standard deviations of the rig's poses.
        chunk: frames that are rendered at once.
        per_frame: whether every frame has its own rows, by their names ("frame=017"), instead of their means.
        scan: whether the scan's distance is measured where a scan is known.
        keypoints: finds a reconstruction's keypoints in its frontal view, as the paper (:class:`FacePoints`); null
            takes the places of the scan's own, which must be where the generator has its heads.
        scan_scale: whether its alignment may scale.
        pictures: frames of the trajectory that are kept to look at.
        side: size at which renderings and the truth are compared; null is the generator's. The paper's is 256,
            StyleSDF's own 1024.
    """

    def __init__(
        self,
        perceptual: torch.nn.Module,
        identity: torch.nn.Module,
        second_identity: torch.nn.Module | None = None,
        frames: int = FRAMES,
        spread: float = SPREAD,
        chunk: int = 10,
        per_frame: bool = False,
        scan: bool = True,
        scan_scale: bool = True,
        pictures: int = 6,
        side: int | None = None,
        keypoints: torch.nn.Module | None = None,
    ) -> None:
        super().__init__(perceptual, identity, second_identity)
        self.keypoints = None if keypoints is None else Frozen(keypoints)
        self.frames, self.spread, self.chunk, self.per_frame = frames, spread, chunk, per_frame
        self.scan, self.scan_scale, self.pictures, self.side = scan, scan_scale, pictures, side
        check_positive(self, "frames", "spread", "chunk", "side", where="protocol.")
        check_not_negative(self, "pictures", where="protocol.")

    @torch.no_grad()
    def __call__(
        self,
        name: str,
        image: Tensor,
        camera: Camera,
        rig: Rig,
        invert: Invert,
        truth: Truth | None = None,
        scan: Scan | None = None,
    ) -> Scores:
        """Measure one item.

        Args:
            name: of the item; nothing is drawn here, so it changes no value.
            image: (1, 3, H, W) in [-1, 1], of the size that pictures are compared at; camera: its own.
            rig: of the generator: of its trajectory.
            invert: the method.
            truth: the true head, where it is known.
            scan: the true surface, where it is known. The distances to a head that shows no surface are NaN.

        Raises:
            UserError: when renderings and pictures are of different sizes, or all frames are the input's view.
        """
        move_frozen(self, image.device)
        if truth is not None and self.side is not None:
            truth = partial(_resized, truth, self.side)
        head = invert(image, camera)
        found = head(camera)
        own = self._picture(found)
        check_sizes(own, image)
        with exactly(image):
            values = {("", metric): float(value) for metric, value in self._compared(own, image).items()}
        source = None if truth is None else truth(camera)
        if source is not None:
            with exactly(image):
                values |= {("", metric): float(value) for metric, value in shape_errors(found, source).items()}
        frames, views = self._views(camera, rig)
        measured: list[dict[str, Tensor]] = []
        rows: list[list[Tensor]] = [[], []]
        kept = set(torch.linspace(0, len(views) - 1, min(self.pictures, len(views))).round().int().tolist())
        for part in torch.arange(len(views)).split(self.chunk):
            cameras = views[part]
            seen = head(cameras)
            pictures = self._picture(seen)
            with exactly(image):
                scores = self.alike(pictures, image.expand_as(pictures), "_input")
                if truth is not None and source is not None:
                    true = truth(cameras)
                    scores |= self._against(seen, true, own, source)
                    rows[0] += [true.image[row] for row, frame in enumerate(part.tolist()) if frame in kept]
            measured.append(scores)
            rows[1] += [pictures[row] for row, frame in enumerate(part.tolist()) if frame in kept]
        values |= self._told(measured, frames, (views.yaw - camera.yaw).abs().cpu())
        shown = {"source": torch.cat([image[0], own[0]], 2)}
        if kept:
            shown["trajectory"] = torch.cat([torch.cat(row, 2) for row in rows if row], 1)
        distances = None
        if scan is not None and self.scan and found.depth is not None and found.alpha is not None:
            try:
                distances = self.scan_distances(scan, head, rig, image.device)
            except Unmeasurable as error:
                log.warning("warning: %s has no scan distance: %s", name, error)
            values |= {("", metric): value for metric, value in scan_scores(distances).items()}
        return Scores(values, shown, distances)

    def scan_distances(self, scan: Scan, head: Renderer, rig: Rig, device: torch.device) -> Tensor:
        """Distances (M,) of the scan to the surface of the canonical frontal view's depth map (supplement B.2).

        The reconstruction's keypoints are the points of its surface where a detector sees them, or where the frontal
        view has the true ones: then what is measured is how far the surface is from being right there.

        Raises:
            Unmeasurable: when the frontal view shows no surface, or no face to the detector.
        """
        camera = rig.camera(rig.yaw_mean, rig.pitch_mean, device)
        front = head(camera)
        assert front.depth is not None and front.alpha is not None
        depth, alpha, camera = front.depth.float().cpu(), front.alpha.float().cpu(), camera.to("cpu")
        vertices, faces = depth_surface(depth, alpha, camera)
        if self.keypoints is None:
            points = lifted(scan.keypoints, depth, alpha, camera)
        else:
            face = cast(FacePoints, self.keypoints.module).find(picture(front))
            if face is None:
                raise Unmeasurable("no face is found in its frontal view")
            points = lifted_at(face[list(_SEVEN), :2].cpu(), depth, alpha, camera)
        return scan_distances(scan, vertices, faces, points, self.scan_scale)

    def _picture(self, rendering: Rendering) -> Tensor:
        """What is measured of a rendering, at the size asked for."""
        found = picture(rendering)
        return found if self.side is None else resized(found, self.side)

    def _views(self, camera: Camera, rig: Rig) -> tuple[list[int], Camera]:
        """The trajectory without the frame that is the input, and the frames' numbers."""
        views = trajectory(rig, self.frames, self.spread).to(camera.device)
        frames = ((views.cam2world - camera.cam2world).abs().amax((1, 2)) > 1e-4).nonzero()[:, 0]
        if not len(frames):
            raise UserError("the trajectory has no frame but the input: protocol.frames must be larger")
        return frames.tolist(), views[frames]

    def _compared(self, found: Tensor, image: Tensor) -> dict[str, Tensor]:
        """All that two pictures tell: (B,) each."""
        return {
            **{name: metric(found, image) for name, metric in _PIXELS.items()},
            "lpips": self.perceptual(found, image),
            "detail": high_frequency(found) / high_frequency(image),
            **self.alike(found, image),
        }

    def _against(self, seen: Rendering, true: ViewTruth, own: Tensor, source: ViewTruth) -> dict[str, Tensor]:
        """Scores (B,) of frames against what they truly show."""
        found = self._picture(seen)
        check_sizes(found, true.image)
        scores = self._compared(found, true.image) | shape_errors(seen, true)
        shown = seen_from(true.camera, true.depth, true.mask, source.camera, source.depth, source.mask)
        for place, mask in (("seen", shown), ("hidden", (true.mask > 0.5) & ~shown)):
            scores |= {f"{name}@{place}": value for name, value in self._masked(found, true.image, mask).items()}
        # How the source view predicts the frames, if colours stay on their points.
        together, cameras = torch.cat([own, found]), Camera.cat([source.camera, true.camera])
        shape = torch.cat([source.depth, true.depth]), torch.cat([source.mask, true.mask])
        moved, shared = carried(together, cameras, *shape, reference=0)
        for name in ("psnr", "mae"):
            scores[f"{name}_carried"] = _PIXELS[name](together, moved, shared)[1:]
        return scores

    def _masked(self, found: Tensor, truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Scores (B,) over the pixels of a mask (B, 1, H, W); NaN where it has too few."""
        weight = mask.float()
        values = {name: metric(found, truth, weight) for name, metric in _PIXELS.items()}
        values["lpips"] = masked_distance(self.perceptual.module, found, truth, weight)
        values["detail"] = high_frequency(found, mask=weight) / high_frequency(truth, mask=weight)
        telling = weight.flatten(1).sum(1) >= FEW
        return {name: torch.where(telling, value, torch.nan) for name, value in values.items()}

    def _told(self, measured: list[dict[str, Tensor]], frames: list[int], away: Tensor) -> dict[tuple[str, str], float]:
        """Of frames: their means, also of those near the source's yaw and far from it; or each of them.

        Args:
            away: (V,) radians, from the source's yaw.
        """
        scores = {name: torch.cat([part[name] for part in measured]).double().cpu() for name in measured[0]}
        if self.per_frame:
            scores["yaw_distance"] = away.double()
            return {
                (f"frame={frame:03d}", _novel(name)): float(value)
                for name, column in scores.items()
                for frame, value in zip(frames, column, strict=True)
            }
        told = {("", _novel(name)): float(column.nanmean()) for name, column in scores.items()}
        for place, chosen in (("near", away <= NEAR), ("far", away > NEAR)):
            told |= {
                ("", f"{_novel(name)}@{place}"): float(column[chosen].nanmean())
                for name, column in scores.items()
                if "@" not in name and bool(chosen.any())
            }
        return told


def _resized(truth: Truth, side: int, camera: Camera) -> ViewTruth:
    """What cameras truly see, at ``side``."""
    true = truth(camera)
    if true.image.shape[-1] == side:
        return true
    depth, mask, normals = at_size((side, side), true.depth, true.mask, true.normals)
    parts = F.interpolate(true.segmentation[:, None].float(), (side, side), mode="nearest-exact")[:, 0]
    known: Any = true  # a dataclass, as all of these are
    return replace(
        known,
        image=resized(true.image, side),
        depth=depth,
        mask=mask,
        normals=normals,
        segmentation=parts.to(true.segmentation),
    )


def _novel(name: str) -> str:
    """Of a novel view: lpips@hidden -> lpips_nv@hidden."""
    metric, at, place = name.partition("@")
    return name if metric.endswith(("_carried", "_distance")) else f"{metric}_nv{at}{place}"
