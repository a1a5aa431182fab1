"""Portraits with cameras, made by a tiny prior, and the command lines that invert them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from models import artifact
from models.generators.base import Generator
from models.image import write_image
from stages.base.stage import GeneratorRef
from tests.stages import cases, small, tiny

SUBJECTS = 22  # twelve to train on; five each to validate and test, which neither two nor three ranks divide
FIFTHS = {f"data.init_args.{split}_fraction": 5 / SUBJECTS for split in ("val", "test")}
ENCODER = {
    "num_ws": 7, "w_dim": 16, "resolution": 32, "widths": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "reduction": 1,
    "style_width": 8, "expressions": 0,
}  # fmt: skip


DETAIL = {
    "features": 4, "resolution": 32, "voxel": [4, 16, 16], "voxel_features": 4, "widths": [8, 8], "unet": [4, 6],
    "blocks": 1, "atlas": 8, "upsampler": [6, 6],
}  # fmt: skip


def portraits(folder: Path, generator: Generator, labels: bool = True, count: int = cases.COUNT) -> Path:
    """Samples of a generator as files of a folder, beside their cameras; held out is a third."""
    draws = torch.Generator().manual_seed(3)
    z = generator.sample_z(count, draws)
    camera = generator.rig.random(count, draws) if generator.is_3d else None
    with torch.no_grad():
        images = generator.synthesis(generator.mapping(z), camera).image.clamp(-1, 1)
    names = [f"{index:02d}.png" for index in range(count)]
    for name, image in zip(names, images, strict=True):
        write_image(folder / name, image)
    if labels and camera is not None:
        pairs = [[name, label] for name, label in zip(names, camera.label().tolist(), strict=True)]
        (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return folder


def data(folder: Path, side: int, **options: Any) -> dict[str, Any]:
    """The data module of such portraits."""
    given = {"path": str(folder), "size": side, "batch_size": 2, "val_fraction": 1 / 6, "test_fraction": 1 / 6}
    given["mirror"] = False
    return {"class_path": "datamodules.portraits.PortraitDataModule", "init_args": {**given, **options}}


def network(kind: str) -> dict[str, Any]:
    """An embedded feature network as a configuration names it."""
    return {"class_path": f"models.features.embedded.{kind}"}


PROTOCOL = {
    "class_path": "models.metrics.inversion.InversionProtocol",
    "init_args": {
        "perceptual": network("EmbeddedLPIPS"),
        "identity": network("EmbeddedIdentity"),
        "distribution": {"class_path": "models.metrics.distribution.EmbeddedDistribution"},
        "surfaces": 0,
    },
}


def settings(folder: Path, **model: Any) -> list[str]:
    """Options of these stages: a configuration file, and four steps of two portraits, which is one pass."""
    shared = {"perceptual": network("EmbeddedLPIPS"), "identity": network("EmbeddedIdentity"), "protocol": PROTOCOL}
    trainer = {"max_steps": 4, "callbacks": [small.CHECKPOINT]}
    config = {"model": {**shared, **model}, "data": data(folder / "portraits", 32), "trainer": trainer}
    file = folder / f"{'-'.join(sorted(model))}.yaml"
    file.write_text(yaml.safe_dump(config))
    return [f"--config={file}", *small.TRAINER]


def invert(folder: Path, **model: Any) -> list[str]:
    """The command line that trains an encoder of the prior in ``folder / "tiny"``."""
    schedule = {"learning_rate": 1e-3, "final": 1e-4, "drop_at": 3}
    prior = {"path": str(folder / "tiny"), "module": "generator"}
    encoder = {"class_path": "models.encoders.pyramid.Encoder4Editing", "init_args": ENCODER | {"expressions": 2}}
    given = {"prior": prior, "encoder": encoder, "schedule": schedule, "delta_from": 1, "delta_every": 1}
    return ["invert", "fit", *settings(folder, **{**given, **model})]


def tune(folder: Path, **model: Any) -> list[str]:
    """The command line that tunes the generator of the result in ``folder / "invert"``."""
    return ["tune", "fit", *settings(folder, **{"inverter": {"path": str(folder / "invert")}, **model})]


def detail(folder: Path, **model: Any) -> list[str]:
    """The command line that trains details for the result in ``folder / "tune"``."""
    reconstructor = {"class_path": "models.encoders.detail.DetailReconstructor", "init_args": DETAIL}
    given = {"inverter": {"path": str(folder / "tune")}, "detail": reconstructor}
    return ["detail", "fit", *settings(folder, **{**given, **model})]


def prepare(folder: Path, count: int = cases.COUNT) -> Path:
    """Write the prior and its portraits."""
    generator = artifact.load(tiny.prior(folder / "tiny").path).module("generator")
    portraits(folder / "portraits", generator, count=count)  # type: ignore[arg-type]
    return folder


def ref(path: Path) -> GeneratorRef:
    """The generator of an artifact."""
    return GeneratorRef(str(path))
