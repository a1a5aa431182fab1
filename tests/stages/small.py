"""Parts of command lines on inputs so small that a stage takes a second or two; see ``tests.stages.cases``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datamodules.feature_pairs import FeaturePairs
from tests.stages import tiny

IDS = ("p0", "p1", "p2")
CHECKPOINT = {"class_path": "callbacks.checkpoint.LastCheckpoint", "init_args": {"every_n_batches": 1}}


def options(values: dict[str, Any]) -> list[str]:
    """``--name=value`` of each."""
    return [f"--{name}={value}" for name, value in values.items()]


TRAINER = options({"trainer.accelerator": "cpu", "trainer.enable_model_summary": "false", "threads": 1})


def pictures(data: FeaturePairs) -> None:
    """Fill the cache without a renderer: a colour for each subject, a stripe pattern for each style."""
    data.cache.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(data.counts.items()):
        g = np.random.default_rng(number)
        style = np.tile([0, 1, 0, 3, 0, 5] if split != "train" else [0, 1, 0, 2, 4, 5], (count, 1)).astype(np.uint8)
        colour = g.integers(40, 215, (count, 1, 3, 1, 1))
        stripes = 30 * np.sin(np.arange(64) * (0.3 + style[..., None, None, None]))
        image = (colour + stripes + np.zeros((count, 6, 3, 64, 64))).clip(0, 255).astype(np.uint8)
        segmentation = np.broadcast_to((np.arange(64) // 6).astype(np.uint8), (count, 6, 64, 64))
        yaw, pitch = g.uniform(-0.5, 0.5, (2, count, 6)).astype(np.float32)
        np.savez(data.file(split), image=image, segmentation=segmentation, style=style, yaw=yaw, pitch=pitch)


def write(path: Path, config: dict[str, Any]) -> Path:
    """A configuration as a file."""
    path.write_text(yaml.safe_dump(config))
    return path


def tiny_prior(folder: Path, count: int = 0) -> None:
    """Write the generator that the small stages start from to ``folder/tiny``."""
    tiny.prior(folder / "tiny")
