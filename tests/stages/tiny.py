"""A small random generator, random feature networks and its own samples as artworks, for the per-artwork stages."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from callbacks.artifact import ExportArtifact
from datamodules.artworks import Artwork
from datamodules.items import ItemsDataModule
from models import artifact
from models.features.embedded import EmbeddedIdentity, EmbeddedLPIPS, EmbeddedPose, EmbeddedStyle
from models.generators.manifold import ManifoldGenerator
from stages.base.per_item import PerItemStage
from stages.base.stage import Stage

OPTIONS = {
    "z_dim": 6, "w_dim": 16, "resolution": 32, "channels": [24, 16, 12], "start": 8, "mapping_hidden": 16,
    "background_channels": [8, 8], "ambient": 4, "samples": 32, "predictor": {"hidden": 8, "grid": 32},
    "expressions": ["smile", "blink"],
}  # fmt: skip


def prior(path: Any) -> artifact.Artifact:
    """Save a generator whose heads are opaque and differ from code to code."""
    torch.manual_seed(0)
    generator = ManifoldGenerator(**OPTIONS)
    with torch.no_grad():
        generator.backbone.out_bias[6::4] = 2.0
    generator.update_mean(256)
    return artifact.save(path, stage="prior", modules={"generator": generator.eval()})


def network(kind: str) -> nn.Module:
    """A feature network with random weights, the same at each call."""
    torch.manual_seed(1)
    kinds = {"perceptual": EmbeddedLPIPS, "style": EmbeddedStyle, "pose": EmbeddedPose, "identity": EmbeddedIdentity}
    return kinds[kind](weights=None)


class Portraits(ItemsDataModule[Artwork]):
    """Samples of a prior at known codes and views; ``tint`` colours them, so that there is a style to carry over."""

    def __init__(self, path: str, count: int = 1, tint: float = 0.0, pose: bool = True) -> None:
        super().__init__()
        generator = artifact.load(path).module("generator")
        z = generator.sample_z(count, torch.Generator().manual_seed(7))
        camera = generator.rig.camera(torch.linspace(-0.3, 0.3, count + 2)[1:-1])
        with torch.no_grad():
            image = generator.synthesis(generator.mapping(z), camera).image
        image = (image + tint * torch.tensor([1.0, -0.5, -1.0])[:, None, None]).clamp(-1, 1)
        labels = camera.label() if pose else [None] * count
        self.portraits = [Artwork(f"p{k}", image[k], labels[k]) for k in reversed(range(count))]

    def read_items(self) -> list[Artwork]:
        return self.portraits


def trainer(out: Any, **options: Any) -> pl.Trainer:
    """A quiet trainer that exports, as the command line makes it."""
    return pl.Trainer(**{
        "default_root_dir": out, "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "inference_mode": False, "callbacks": [ExportArtifact()], **options,
    })  # fmt: skip


def fit(stage: Stage, data: pl.LightningDataModule, out: Any, **options: Any) -> artifact.Artifact:
    """Fit and export; returns the artifact."""
    trainer(out, **options).fit(stage, datamodule=data)
    return artifact.load(out)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of images in [-1, 1], dB."""
    return 10 * math.log10(4 / float((a - b).square().mean()))


def ranks(function: Callable[[int], None], world: int, kill: bool = False) -> None:
    """Run ``function(rank)`` in forked processes, which need no imports; with ``kill`` they must end by SIGKILL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(index: int) -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(index)}
        function(index)

    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(i,)) for i in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [-signal.SIGKILL if kill else 0] * world


def killed(stage: PerItemStage[Any, Any], item: str, step: int) -> PerItemStage[Any, Any]:
    """The stage, whose process kills itself before this step of the group that begins with ``item``."""
    optimise = stage.optimise

    def deadly(state: Any, now: int) -> Any:
        if (state.items[0].id, now) == (item, step):
            os.kill(os.getpid(), signal.SIGKILL)
        return optimise(state, now)

    stage.optimise = deadly  # type: ignore[method-assign]
    return stage
