"""Heads of the embedded world in matched pictures, for the training of the embedded feature networks.

A subject has three poses with two pictures each: the two pictures of a pose show the same face, expression,
light, clothes and camera and differ in style only. Between poses everything changes but the identity.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.mannequins.render import RIG, render
from datamodules.mannequins.scene import IDENTITY, SPLITS, WORLD_VERSION, Z_DIM, Scene, sample_expression, subject_z
from datamodules.mannequins.styles import ART_STYLES, HELD_OUT_STYLE, PLAIN, STYLES
from datamodules.resumable import ResumableLoader, evaluation_loader
from models.errors import UserError
from models.files import atomic_write, is_intact

log = logging.getLogger(__name__)

POSES, VIEWS = 3, 6
YAW_MAX, PITCH_MAX = math.radians(50), math.radians(20)
_FORMAT = 1


@dataclass(frozen=True)
class Picture:
    """One line of a subject's plan."""

    pose: int
    style: str


def plan(subject: int, held_out: bool) -> list[Picture]:
    """What is drawn of one numbered subject.

    Args:
        subject: seed of the subject.
        held_out: False for training, (plain, A), (plain, B), (C, D) with different styles, none of them
            ``HELD_OUT_STYLE``; True for evaluation, (plain, A) three times, going round all styles.
    """
    if held_out:
        turn = [ART_STYLES[(POSES * subject + pose) % len(ART_STYLES)] for pose in range(POSES)]
        return [Picture(pose, style) for pose in range(POSES) for style in (PLAIN, turn[pose])]
    shown = [style for style in ART_STYLES if style != HELD_OUT_STYLE]
    order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(subject)).tolist()
    first, second, third, fourth = (shown[i] for i in order[:4])
    drawn = (PLAIN, first, PLAIN, second, third, fourth)
    return [Picture(view // 2, style) for view, style in enumerate(drawn)]


def draw_subject(subject: int, size: int, held_out: bool, compiled: bool = False) -> dict[str, np.ndarray]:
    """The six pictures of one subject.

    Returns:
        ``image`` (6, 3, size, size) uint8, ``segmentation`` (6, size, size) uint8, ``style`` (6,) uint8 indices
        into ``STYLES``, ``yaw`` and ``pitch`` (6,) float32 in radians.
    """
    generator = torch.Generator().manual_seed(subject + 7_000_000)
    z = torch.randn(POSES, Z_DIM, generator=generator)
    z[:, IDENTITY] = subject_z([subject])[:, IDENTITY]
    angle = torch.rand(2, POSES, generator=generator) * 2 - 1
    camera = RIG.camera(angle[0] * YAW_MAX, angle[1] * PITCH_MAX)
    pictures = plan(subject, held_out)
    pose = torch.tensor([picture.pose for picture in pictures])
    scene = Scene.from_z(z, sample_expression(POSES, generator))
    styles = [picture.style for picture in pictures]
    truth = render(scene[pose], camera[pose], size, styles, compiled=compiled)
    return {
        "image": ((truth.image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy(),
        "segmentation": truth.segmentation.to(torch.uint8).numpy(),
        "style": np.array([STYLES.index(style) for style in styles], np.uint8),
        "yaw": camera.yaw[pose].numpy(),
        "pitch": camera.pitch[pose].numpy(),
    }


class Pairs(Dataset[dict[str, Tensor]]):
    """Subjects from a cached file; an item holds the arrays of :func:`draw_subject` as tensors."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays["image"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {name: torch.from_numpy(np.array(array[index])) for name, array in self.arrays.items()}
        return {**item, "style": item["style"].long()}


class FeaturePairs(pl.LightningDataModule):
    """Draws each split once and keeps it on disk; a batch is a :class:`models.batches.PairBatch`.

    Args:
        cache: folder of the drawn pictures.
        size: their side in pixels.
        train_subjects, val_subjects, test_subjects: six pictures each.
        first: number of the first subject of each split: networks that judge others learn from heads of their own.
        batch_size: subjects per batch.
        compiled: compile the renderer (half a minute, then several times faster).
        seed: of the training order.
    """

    def __init__(
        self,
        cache: str = "runs/cache/feature_pairs",
        size: int = 64,
        train_subjects: int = 1300,
        val_subjects: int = 60,
        test_subjects: int = 120,
        first: int = 0,
        batch_size: int = 24,
        compiled: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = {"train_subjects": train_subjects, "val_subjects": val_subjects, "test_subjects": test_subjects}
        for name, value in (given | {"size": size, "batch_size": batch_size}).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1")
        for split, count in (("train", train_subjects), ("val", val_subjects), ("test", test_subjects)):
            if not 0 <= first <= len(SPLITS[split]) - count:
                raise UserError(
                    f"first is {first}: of {len(SPLITS[split])} subjects of {split}, {count} from there are wanted"
                )
        self.cache = Path(cache)
        self.size = size
        self.counts = {"train": train_subjects, "val": val_subjects, "test": test_subjects}
        self.first = first
        self.batch_size = batch_size
        self.compiled = compiled
        self.seed = seed

    def file(self, split: str) -> Path:
        """Where a split is kept; the name says all that its content depends on."""
        number = f"{self.counts[split]}x{VIEWS}" + (f"from{self.first}" if self.first else "")
        return self.cache / f"world{WORLD_VERSION}-{_FORMAT}-{split}-{number}-{self.size}px.npz"

    def prepare_data(self) -> None:
        for split in self.counts:
            if self.file(split).exists() and not is_intact(self.file(split)):
                log.warning("%s is damaged: its pictures are drawn again", self.file(split))
                self.file(split).unlink()
            if not self.file(split).exists():
                self._draw(split)

    def _draw(self, split: str) -> None:
        subjects = SPLITS[split][self.first :][: self.counts[split]]
        drawn = [draw_subject(s, self.size, held_out=split != "train", compiled=self.compiled) for s in subjects]
        arrays: dict[str, Any] = {name: np.stack([d[name] for d in drawn]) for name in drawn[0]}
        with atomic_write(self.file(split)) as file:
            np.savez_compressed(file, **arrays)

    def dataset(self, split: str) -> Pairs:
        """One split, read from its file."""
        with np.load(self.file(split), allow_pickle=False) as archive:
            return Pairs({name: archive[name] for name in archive.files})

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return ResumableLoader(self.dataset("train"), self.batch_size, seed=self.seed, trainer=self.trainer)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[dict[str, Tensor]]:
        return evaluation_loader(self.dataset(split), self.batch_size, trainer=self.trainer)
