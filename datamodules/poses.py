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

log = logging.getLogger(__name__)


def check_camera(item: Artwork, rig: Rig) -> None:
    """Refuse a camera that a generator cannot have; one that is to be estimated passes.

    Raises:
        UserError: for a label of another generator's world, or angles beyond the training poses.
    """
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


def check_dataset(data: object, rig: Rig) -> None:
    """:func:`check_labels` of what a data module trains on: of a list all, of drawn pictures the first one's.

    Raises:
        UserError: as there.
    """
    if not isinstance(data, SplitDataModule):
        return
    train = data.datasets["train"]
    labels = getattr(train, "labels", None)
    if labels is None:
        labels = {f"training picture {row}": label for row, label in enumerate(train[0].get("label", ()))}
    check_labels(labels, rig, "the generator's rig must be that of the cameras, or the pictures be aligned for it")


def find_camera(item: Artwork, rig: Rig, pose: Callable[[Tensor], Tensor] | None, device: torch.device) -> Camera:
    """The camera of an artwork, a batch of one on the CPU; an estimated one is the nearest that ``rig`` knows.

    Args:
        pose: (1, 3, H, W) on ``device`` to yaw and pitch (1, 2), radians; None refuses artworks without a camera.

    Raises:
        UserError: when there is nothing to know it from.
    """
    if item.label is not None:
        return Camera.from_label(item.label[None])
    if item.angles is not None:
        if not item.estimated:
            return rig.camera(*item.angles)
        log.info("%s: its face shows yaw %.1f, pitch %.1f degrees", item.id, *map(math.degrees, item.angles))
        return rig.camera(*rig.within(*torch.tensor(item.angles)))
    if pose is None:
        raise UserError(f"{item.id} has no camera: give --data.init_args.yaw_deg, or a pose network as --model.pose")
    angles = pose(item.image[None].to(device)).detach().float().cpu()[0]
    log.info("%s: estimated yaw %.1f, pitch %.1f degrees", item.id, *torch.rad2deg(angles).tolist())
    return rig.camera(*rig.within(*angles))
