"""The camera of an artwork: given, made from given angles, or estimated."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from datamodules.artworks import Artwork
from datamodules.resumable import SplitDataModule
from models.camera import Camera, Rig
from models.errors import UserError
from models.features.base import FacePoints
from models.generators.base import Generator
from models.losses.landmarks import landmark_distance

log = logging.getLogger(__name__)

_CHUNK = 4  # heads rendered at once


def check_camera(item: Artwork, rig: Rig, estimated: bool = True) -> None:
    """Refuse a camera that a generator cannot have.

    Args:
        estimated: whether a camera that is not known will be; otherwise it is refused that there is none.

    Raises:
        UserError: for a label of another generator's world, angles beyond the training poses, or no camera at all.
    """
    if item.label is None and item.angles is None and not estimated:
        raise UserError(f"{item.id} has no camera: give --data.init_args.yaw_deg, or a pose network as --model.pose")
    if item.label is not None:
        check_labels({item.id: item.label}, rig, "give its angles instead of another generator's label")
    elif item.angles is not None and not item.estimated:
        given = torch.tensor(item.angles)
        nearest = torch.stack(rig.within(*given))
        if not torch.allclose(given, nearest, atol=1e-6):
            (yaw, pitch), (y, p) = torch.rad2deg(given).tolist(), torch.rad2deg(nearest).tolist()
            raise UserError(
                f"{item.id}: yaw {yaw:.4g} and pitch {pitch:.4g} degrees are beyond the generator's training "
                f"poses, of which {y:.4g} and {p:.4g} are the nearest"
            )


def check_labels(labels: Mapping[str, Tensor], rig: Rig, advice: str) -> None:
    """Refuse camera labels (25,) of another generator's world; they come by the names of their pictures.

    Args:
        advice: what to do, the end of the sentence.

    Raises:
        UserError: naming the first, when the head is not between the generator's near and far.
    """
    if not labels:
        return
    cameras = Camera.from_label(torch.stack(list(labels.values())))
    depths = cameras.project(torch.tensor(rig.pivot).expand(len(labels), 1, 3))[1].flatten()
    wrong = (~((rig.near < depths) & (depths < rig.far))).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{list(labels)[first]}: its camera is {depths[first]:.3g} from the head, where the generator sees from "
            f"{rig.near:.3g} to {rig.far:.3g}: {advice}"
        )


def check_dataset(data: object, rig: Rig, *splits: str) -> None:
    """:func:`check_labels` of a data module's sets: of a list all, of drawn pictures the first one's.

    Args:
        splits: "train", "val" or "test"; what is not there, or empty, passes.

    Raises:
        UserError: as there, or when the rig's own cameras are such.
    """
    if not isinstance(data, SplitDataModule):
        return
    for split in splits:
        pictures = data.datasets.get(split)
        if pictures is None or not len(pictures):
            continue
        labels = getattr(pictures, "labels", None)
        if labels is None:
            labels = {f"picture {row} of {split}": label for row, label in enumerate(pictures[0].get("label", ()))}
        check_labels(labels, rig, "the generator's rig must be that of the cameras, or the pictures be aligned for it")
    own = {"the generator's rig": rig.camera(rig.yaw_mean, rig.pitch_mean).label()[0]}
    check_labels(own, rig, "give all of it, radius and focal length too: what is left out is the generator's default")


def find_camera(
    item: Artwork,
    generator: Generator,
    pose: Callable[[Tensor], Tensor] | None,
    faces: FacePoints | None,
    device: torch.device,
) -> Camera:
    """The camera of an artwork, a batch of one on the CPU; an estimated one is the nearest that the rig knows.

    An artwork whose pose is not given may have two answers: that of its face's mesh, which knows people, and that of
    the pose network, which knows what it was trained on. Of these the one is taken from which heads of the generator
    show their faces more as the artwork does: see :func:`nearest_camera`.

    Args:
        pose: (1, 3, H, W) on ``device`` to yaw and pitch (1, 2), radians; None where there is no such network.
        faces: by which two answers are compared; without it the mesh's is taken.

    Raises:
        UserError: when there is nothing to know it from.
    """
    rig = generator.rig
    if item.label is not None:
        return Camera.from_label(item.label[None])
    if item.angles is not None and not item.estimated:
        return rig.camera(*item.angles)
    answers: dict[str, Tensor] = {}
    if item.angles is not None:
        answers["its face"] = torch.tensor(item.angles)
    if pose is not None and (not answers or faces is not None):
        answers["the pose network"] = pose(item.image[None].to(device)).detach().float().cpu()[0]
    if not answers:
        check_camera(item, rig, estimated=False)
    cameras = {name: rig.camera(*rig.within(*angles)) for name, angles in answers.items()}
    best = next(iter(cameras))
    if len(cameras) > 1 and faces is not None:
        best = nearest_camera(generator, cameras, item.image[None].to(device), faces)
    log.info("%s: %s shows yaw %.1f, pitch %.1f degrees", item.id, best, *torch.rad2deg(answers[best]).tolist())
    return cameras[best]


@torch.no_grad()
def nearest_camera(
    generator: Generator, cameras: Mapping[str, Camera], image: Tensor, faces: FacePoints, count: int = 16
) -> str:
    """The name of the camera from which a head of the generator has the points of its face nearest to a picture's.

    On mannequins in all styles that picks the pose network mostly, on portraits of people the mesh.

    Args:
        cameras: one each; the first where no face is found.
        image: (1, 3, S, S) in [-1, 1], on the generator's device.
        count: of random heads, always the same.
    """
    points = faces.find(image)
    if points is None:
        return next(iter(cameras))
    draws = torch.Generator().manual_seed(0)
    ws = generator.mapping(generator.sample_z(count, draws).to(image.device))
    distances = dict.fromkeys(cameras, math.inf)
    for name, camera in cameras.items():
        for start in range(0, count, _CHUNK):
            some = ws[start : start + _CHUNK]
            seen = generator.synthesis(some, camera.to(image.device).repeat_interleave(len(some))).image
            near = points.expand(len(seen), -1, -1)
            distances[name] = min(distances[name], float(landmark_distance(faces(seen, near), near).min()))
    return min(distances, key=distances.__getitem__)
