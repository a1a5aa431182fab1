"""Content-analogous anchor: the latent whose rendering is nearest to an artwork (3DArtmator, Sec. 3.2)."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.artworks import Artwork
from datamodules.poses import check_camera, find_camera
from models.artifact import Export
from models.camera import Camera
from models.checks import check_not_negative
from models.errors import UserError
from models.features.base import FacePoints, Frozen
from models.files import atomic_write
from models.generators.base import Generator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.index import Entry, subject_index
from models.heads.projector import ItemCodes, Projector, Search
from models.image import write_image
from models.latents import Latents
from models.losses.image import pixel_mse
from models.losses.landmarks import landmark_distance
from stages.base.foreign import warn_of_embedded
from stages.base.per_item import GroupState, PerItemStage
from stages.base.seeds import item_generator
from stages.base.stage import GeneratorRef

log = logging.getLogger(__name__)

TERMS = ("loss", "perceptual", "pixel")


@dataclass(frozen=True)
class AnchorSearch(Search):
    """How an artwork's latent is looked for. The defaults are the paper's.

    Attributes:
        perceptual, pixel: weights of the two terms of Eq. 2.
        landmark: weight of the distance between the face's points in the picture and in the artwork.
    """

    perceptual: float = 1.0
    pixel: float = 1.0
    landmark: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "perceptual", "pixel", "landmark", where="search.")
        if self.optimize_noise:
            raise UserError("search.optimize_noise: an anchor holds no noise maps")


@dataclass
class AnchorState(GroupState[Artwork]):
    """The group.

    Attributes:
        projector: the module.
        targets: what the group is compared with.
    """

    projector: Projector
    targets: Targets


@dataclass(frozen=True)
class Targets:
    """The artworks of a group.

    Attributes:
        references: (n, 3, R, R) at the generator's resolution.
        points: (n, 468, 3) of their faces in units of the picture's side; anything where there is none.
        faces: (n,) 1 where there is one.
    """

    references: Tensor
    points: Tensor
    faces: Tensor


class AnchorStage(PerItemStage[Artwork, AnchorState]):
    """Finds for each artwork z* = argmin LPIPS(G(z, theta), I_ref) + |G(z, theta) - I_ref|^2 (Eq. 2 and 3).

    Beyond the paper: several restarts at once, a last refinement in w+, a prior on z, and points of the face, which
    the paper names as what its failures lack (Sec. 5).

    Args:
        prior: artifact and module of the generator G_ori.
        perceptual: the perceptual distance of Eq. 2.
        pose: estimates the camera of artworks that have none; null refuses such artworks.
        landmarks: finds the points of faces: for the term landmark, and to choose between the cameras that the face
            and the pose network tell; null without them.
        search: how to look.
        steps, group_size, save_every, seed: as :class:`PerItemStage`. The paper gives no number of steps.
    """

    name = "anchor"

    def __init__(
        self,
        prior: GeneratorRef,
        perceptual: nn.Module,
        pose: nn.Module | None = None,
        landmarks: nn.Module | None = None,
        search: AnchorSearch = AnchorSearch(),
        steps: int = 500,
        group_size: int = 1,
        save_every: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(steps=steps, group_size=group_size, save_every=save_every, seed=seed)
        self.prior = prior
        self.search = search
        self.perceptual = Frozen(perceptual)
        self.pose = None if pose is None else Frozen(pose)
        self.landmarks = None if landmarks is None else Frozen(landmarks)
        if search.landmark and landmarks is None:
            raise UserError("search.landmark has a weight, and nothing finds points: see --model.landmarks")
        self._pictures: dict[str, Tensor] = {}

    def build_model(self) -> None:
        generator = self.take("prior", self.prior.path, self.prior.module, Generator)
        self.generator = generator.requires_grad_(False)
        self.search.check(generator)

    def on_fit_start(self) -> None:
        self._check(self.items)
        # Beside the angles of a face the pose network is asked too where faces can be compared.
        seen = self.landmarks is not None
        unknown = any(i.label is None and (i.angles is None or (i.estimated and seen)) for i in self.items)
        warn_of_embedded(self.generator, self.perceptual, self.pose if unknown else None)
        super().on_fit_start()

    def _check(self, items: Sequence[Artwork]) -> None:
        """Refuse cameras that the generator cannot have, before anything is computed."""
        generator, rig = self.generator, self.generator.rig
        for item in items:
            side = item.image.shape[-1]
            if side < min(generator.resolution, *item.original_size):
                log.info(
                    "%s: framed at %d px, the generator renders %d: --data.init_args.size keeps more",
                    *(item.id, side, generator.resolution),
                )
            if not generator.is_3d:
                continue
            check_camera(item, rig, self.pose is not None)
        if not generator.is_3d:
            log.info("%s is a 2D generator: artworks are fitted as they are, without a camera", self.prior.path)

    # -- one group --------------------------------------------------------------------------------

    def start_group(self, items: Sequence[Artwork]) -> AnchorState:
        targets = self._targets(items)
        loss, labels = partial(self.distance, targets), [self._label(item) for item in items]
        projector = Projector(self.generator, self.search, loss, labels, self.steps, TERMS)
        projector.draw([item_generator(self.seed if i.seed is None else i.seed, i.id, -1) for i in items])
        return AnchorState(items, projector, projector.optimizers(), projector, targets)

    @torch.no_grad()
    def _targets(self, items: Sequence[Artwork]) -> Targets:
        references = torch.stack([item.at(self.generator.resolution) for item in items]).to(self.device)
        points, faces = torch.zeros(len(items), 468, 3), torch.zeros(len(items))
        for row, item in enumerate(items):
            if not self.search.landmark or self._faces is None:
                break
            if (found := self._faces.find(item.image[None].to(self.device))) is None:
                log.info("%s: no face is found in it as it is framed: it is fitted without the face's points", item.id)
            else:
                points[row], faces[row] = found.cpu(), 1
        return Targets(references, points.to(self.device), faces.to(self.device))

    def distance(self, targets: Targets, image: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Eq. 2 of pictures (N, 3, R, R) and the artworks that ``rows`` (N,) name."""
        wanted = targets.references[rows]
        perceptual, pixel = self.perceptual(image, wanted), pixel_mse(image, wanted)
        loss = self.search.perceptual * perceptual + self.search.pixel * pixel
        if self.landmarks is not None and bool((seen := targets.faces[rows] > 0).any()):
            points = targets.points[rows[seen]]
            distance = landmark_distance(self.landmarks(image[seen], points), points)
            loss = loss.index_add(0, seen.nonzero()[:, 0], self.search.landmark * distance)
        return {"loss": loss, "perceptual": perceptual, "pixel": pixel}

    def _label(self, item: Artwork) -> Tensor:
        """(25,) the artwork's camera, estimated where it is not given; (0,) in a 2D generator."""
        if not self.generator.is_3d:
            return torch.zeros(0)
        return find_camera(item, self.generator, self.pose, self._faces, self.device).label()[0]

    @property
    def _faces(self) -> FacePoints | None:
        return None if self.landmarks is None else cast(FacePoints, self.landmarks.module)

    def optimise(self, state: AnchorState, step: int) -> dict[str, Tensor]:
        return state.projector.losses(state.optimizers, step)

    def active(self, state: AnchorState, step: int) -> Collection[str]:
        return state.projector.active(step)

    def settled(self, state: AnchorState) -> bool:
        return state.projector.settled

    # -- results ----------------------------------------------------------------------------------

    @torch.no_grad()
    def finish_group(self, state: AnchorState) -> None:
        projector = state.projector
        projector.choose()
        for index, (item, found) in enumerate(zip(state.items, projector, strict=True)):
            image, latents, _ = projector.render([found])
            values = self.distance(state.targets, image, torch.tensor([index], device=image.device))
            terms = {name: float(values[name]) for name in TERMS[1:]}
            reference, camera = state.targets.references[index : index + 1], projector.camera(found)
            folder = self.item_dir(item.id)
            tensors = {f"latents_{name}": t for name, t in latents.groups.items()}
            tensors["expression"] = projector.expression(found)
            if camera is not None:
                tensors["label"] = camera.label()
            if self.search.space == "z":
                tensors["z"] = found.codes["z"][found.rows]
            content = {name: t.detach().float().cpu().contiguous().clone() for name, t in tensors.items()}
            with atomic_write(folder / "anchor.safetensors") as file:
                file.write_bytes(safetensors.torch.save(content))
            write_image(folder / "anchor.png", image)
            write_image(folder / "reference.png", item.image)
            write_image(folder / "overlay.png", (image + reference) / 2)  # a wrong pose shows as doubled contours
            _write_curve(folder / "curve.csv", found.curve)
            self._pictures[item.id] = torch.cat([reference, image]).cpu()
            self._write_summary(folder / "anchor.json", item, found, camera, terms)

    def _write_summary(
        self, path: Path, item: Artwork, found: ItemCodes, camera: Camera | None, terms: dict[str, float]
    ) -> None:
        source = "estimated" if item.estimated or (item.label is None and item.angles is None) else "given"
        yaw, pitch = (None, None) if camera is None else (math.degrees(x) for x in self.generator.rig.angles(camera))
        summary = {
            "id": item.id,
            "style": item.style,
            "space": self.search.space,
            "restart": int(found.best),
            "steps": int(found.curve[:, 0].isfinite().sum()),
            "stopped": bool(found.stopped),
            "pose": "none" if camera is None else "optimised" if self.search.optimize_pose else source,
            "yaw_deg": yaw,
            "pitch_deg": pitch,
            **terms,
        }
        with atomic_write(path) as file:
            file.write_text(json.dumps(summary, indent=1) + "\n")

    def export(self) -> Export:
        anchors, media, summaries = {}, {}, []
        for item in self.items:
            folder = self.item_dir(item.id)
            tensors = safetensors.torch.load_file(folder / "anchor.safetensors")
            latents = {name: tensors[f"latents_{name}"] for name in self.generator.mean_latents.groups}
            anchors[item.id] = HeadCode(Latents(latents), tensors.get("z"), tensors["expression"], tensors.get("label"))
            media |= {f"{kind}_{item.id}.png": folder / f"{kind}.png" for kind in ("reference", "anchor", "overlay")}
            summaries.append(json.loads((folder / "anchor.json").read_text("utf-8")))
        summaries.sort(key=lambda summary: summary["id"])
        metrics = {key: sum(s[key] for s in summaries) / len(summaries) for key in ("perceptual", "pixel")}
        modules = {"generator": self.generator, "anchors": HeadCodes.pack(anchors, self.generator)}
        entries = [Entry(identity, artwork=f"reference_{identity}.png", caption="anchor") for identity in anchors]
        extra = {"items": summaries, **subject_index(entries)}
        return Export(modules, metrics, media, extra=extra, delta_of=self.unchanged(modules))

    def panels(self) -> dict[str, Tensor]:
        if not self._pictures:
            return {}
        columns = [torch.cat(list(pair), 1) for pair in list(self._pictures.values())[-8:]]  # artwork above anchor
        return {"anchors": torch.cat(columns, 2)}


def _write_curve(path: Path, curve: Tensor) -> None:
    with atomic_write(path) as file, open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("step", *TERMS))
        for step, row in enumerate(curve.tolist()):
            if math.isfinite(row[0]):
                writer.writerow((step, *row))
