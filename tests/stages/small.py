"""The command line of every stage, on inputs so small that it takes a second or two."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datamodules.feature_pairs import FeaturePairs
from tests.stages import tiny

STAGES = ("prior", "features", "anchor", "stylize", "present", "invert", "tune", "detail")
for _name in ("cli", *STAGES):  # once here, and not in every process that a test forks
    importlib.import_module(f"stages.{_name}")
IDS = ("p0", "p1", "p2")
_PRESENT = {"frames": 4, "scale": 1, "video_size": 32, "tile": 32, "mesh_size": 32}


def lines(folder: Path) -> dict[str, list[str]]:
    """Per stage its command line but for ``--out``, which must be ``folder/STAGE`` once for later stages.

    What the first stages need is written to ``folder``.
    """
    tiny.prior(folder / "tiny")
    pictures(FeaturePairs(str(folder / "pictures"), 64, 4, 4, 4))
    anchor = {
        "model.prior.path": folder / "tiny",
        "data": "tests.stages.tiny.Portraits",
        "data.path": folder / "tiny",
        "data.count": len(IDS),
        "data.tint": 0.4,
        "model.steps": 6,
        "model.search.candidates": 4,
        "model.search.restarts": 2,
    }
    stylize = {
        "model.anchor.path": folder / "anchor",
        "data.path": folder / "anchor",
        "model.recipe.steps": 6,
        "model.recipe.pool": 3,
    }
    present = {"model.result.path": folder / "stylize", **{f"model.{name}": value for name, value in _PRESENT.items()}}
    return {
        "prior": ["prior", "fit", f"--config={_write(folder / 'prior.yaml', _prior(folder))}", *TRAINER],
        "features": ["features", "fit", f"--config={_write(folder / 'features.yaml', _features(folder))}", *TRAINER],
        "anchor": ["anchor", "fit", *options(anchor), "--model.save_every=2", *TRAINER],
        "stylize": ["stylize", "fit", *options(stylize), "--model.save_every=2", *TRAINER],
        "present": ["present", "predict", *options(present), *TRAINER],
    }


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


def _prior(folder: Path) -> dict[str, Any]:
    """Eight steps of two subjects with two views, adversarial from the fifth."""
    generator = {
        "resolution": 16,
        "w_dim": 16,
        "channels": [16, 12, 8],
        "start": 4,
        "mapping_hidden": 16,
        "background_channels": [8, 8],
        "predictor": {"hidden": 8, "grid": 32},
    }
    model = {
        "generator": {"class_path": "models.generators.manifold.ManifoldGenerator", "init_args": generator},
        "discriminator": {
            "class_path": "models.generators.discriminator.ImageDiscriminator",
            "init_args": {"channels": [8, 12, 16]},
        },
        "total_images": 32,
        "adversarial": {"start": 16, "r1_every": 2},
        "optimization": {"warmup_images": 1},
        "fit_manifolds": False,
    }
    data = {
        "train_subjects": 6,
        "val_subjects": 2,
        "test_subjects": 2,
        "size": 16,
        "views_per_subject": 2,
        "batch_size": 2,
        "supersample": 1,
        "draw_workers": 0,
        "compiled": False,
        "cache_dir": str(folder / "cache"),
    }
    data = {"class_path": "datamodules.mannequins.MannequinDataModule", "init_args": data}
    return {"model": model, "data": data, "trainer": {"callbacks": [_CHECKPOINT]}}


def _features(folder: Path) -> dict[str, Any]:
    """Four steps of two subjects, validated after each second."""
    data = {"train_subjects": 4, "val_subjects": 4, "test_subjects": 4, "batch_size": 2}
    data = {
        "class_path": "datamodules.feature_pairs.FeaturePairs",
        "init_args": data | {"size": 64, "cache": str(folder / "pictures")},
    }
    trainer = {"max_steps": 4, "check_val_every_n_epoch": 1, "callbacks": [_CHECKPOINT]}
    return {"data": data, "trainer": trainer}


_CHECKPOINT = {"class_path": "callbacks.checkpoint.LastCheckpoint", "init_args": {"every_n_batches": 1}}


def _write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path
