"""Pictures whose pose is in their code, as that of a generator without cameras is."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.mannequins.dataset import PITCH_BEND, PITCH_DEG, YAW_BEND, YAW_DEG, MannequinImages, Sample
from datamodules.mannequins.render import RIG
from datamodules.mannequins.scene import CODE_DIM
from models.camera import Camera

# Shares of the poses at both ends that have one number: poses come in steps, the last of which is the limit.
_END = 5e-3


def pose_numbers(camera: Camera) -> Tensor:
    """Yaw and pitch as numbers (B, 2) that are N(0, I) over the poses of :func:`draw_views`."""
    angles = torch.stack(RIG.angles(camera), 1).double().rad2deg()
    ends, powers = angles.new_tensor([YAW_DEG, PITCH_DEG]), 1 + angles.new_tensor([YAW_BEND, PITCH_BEND])
    share = ((angles / ends).abs().clamp(max=1) ** (1 / powers)) * angles.sign()
    return torch.special.ndtri(((share + 1) / 2).clamp(_END, 1 - _END)).float()


def posed_camera(code: Tensor) -> Camera:
    """The cameras of codes (B, POSED_DIM): the inverse of :func:`pose_numbers`."""
    share = 2 * torch.special.ndtr(code[:, CODE_DIM:].double()) - 1
    ends, powers = share.new_tensor([YAW_DEG, PITCH_DEG]), 1 + share.new_tensor([YAW_BEND, PITCH_BEND])
    yaw, pitch = (share.sign() * share.abs() ** powers * ends * math.pi / 180).float().unbind(1)
    return RIG.camera(yaw, pitch, code.device)


class PosedImages(Dataset[Sample]):
    """Each picture of a coded cache by itself, V = 1, its pose the last numbers of its z (POSED_DIM,)."""

    def __init__(self, images: MannequinImages) -> None:
        self.images = images
        self.config = images.config

    def __len__(self) -> int:
        return len(self.images) * self.config.views_per_subject

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        subject, view = divmod(index, self.config.views_per_subject)
        sample = self.images[subject]
        whole = {name: sample.pop(name) for name in ("z", "seed")}
        found = {name: value[view : view + 1] for name, value in sample.items()}
        pose = pose_numbers(Camera.from_label(found["label"]))[0]
        return found | whole | {"z": torch.cat([whole["z"], pose])}
