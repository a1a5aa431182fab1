"""Artifacts to look at: a tiny prior, its anchors and their stylised generators."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from models import artifact
from models.artifact import Artifact
from models.heads.codes import HeadCode, HeadCodes
from models.heads.directions import Directions, fingerprint
from models.heads.index import Entry, subject_index
from models.image import write_image
from models.relief.shape import Shape
from models.relief.shapes import ReliefShapes
from models.rendering.relief import Relief, sphere_cap
from tests.stages import tiny

LICENCE = {"name": "<b>odd</b>", "licence": "CC-BY-NC-4.0", "origin": "https://example.org/weights"}


def stylised(folder: Path, ids: tuple[str, ...] = ("ann", "bob")) -> Artifact:
    """A result as stage stylize leaves it, in ``folder/stylize``; its ancestors lie beside it."""
    prior = tiny.prior(folder / "prior")
    generator = prior.module("generator")
    anchors, media, modules = {}, {}, {}
    for i, identity in enumerate(ids):
        z = generator.sample_z(1, torch.Generator().manual_seed(i))
        camera = generator.rig.camera(0.3 * i - 0.1)
        latents = generator.mapping(z).detach()
        anchors[identity] = HeadCode(latents, z, torch.zeros(1, len(generator.expressions)), camera.label())
        with torch.no_grad():
            write_image(folder / f"{identity}.png", generator.synthesis(latents, camera).image)
        media[f"reference_{identity}.png"] = folder / f"{identity}.png"
        changed = copy.deepcopy(generator)
        with torch.no_grad():
            changed.backbone.out_bias[:3] += i + 1.0
        modules[f"stylised.{identity}"] = changed
    entries = [
        Entry(name, "anchors", f"stylised.{name}", "generator", artwork=f"reference_{name}.png", caption="stylised")
        for name in ids
    ]
    modules |= {"generator": generator, "anchors": HeadCodes.pack(anchors, generator)}
    return artifact.save(
        folder / "stylize",
        stage="stylize",
        modules=modules,
        parents={"prior": prior},
        media=media,
        metrics={"psnr": 21.5, "lost": float("nan")},
        licences=[LICENCE],
        extra=subject_index(entries),
    )


def directions(folder: Path, prior: Artifact, names: tuple[str, ...] = ("smile", "age")) -> Artifact:
    """Directions of a prior, of which each is a draw, as stage directions leaves them, in ``folder``."""
    generator, draws = prior.module("generator"), torch.Generator().manual_seed(0)
    groups = [(name, 1, codes.shape[2]) for name, codes in generator.mean_latents.groups.items()]
    found = Directions(names, groups, fingerprint(generator))
    for name, _, width in groups:
        found.direction(name).copy_(
            torch.nn.functional.normalize(torch.randn(len(names), 1, width, generator=draws), dim=2)
        )
        found.spread(name).fill_(0.5)
    found.limits.copy_(torch.tensor([-2.0, 3.0]))
    return artifact.save(folder, stage="directions", modules={"directions": found}, parents={"prior": prior})


def in_relief(folder: Path) -> Artifact:
    """The shapes of one head, "ann", and of its photo, with a smile that is known for it."""
    relief, light = Relief(), torch.tensor([[0.6, 0.3, 0.2, 0.2]])
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 2:-2, 4:-4] = 1.0

    def shape(value: float) -> Shape:
        albedo = torch.full((1, 3, 16, 16), value)
        albedo[:, 0, 8:] += 0.3
        return Shape(sphere_cap(mask), albedo, torch.tensor([[0.0, 0.2, 0.0, 0.0, 0.0, 0.0]]), light, mask)

    moved = {"smile": {"ann": "ann-smile-more"}}
    twin, photo = (
        ReliefShapes.pack({"ann": shape(v), "ann-smile-more": shape(v - 0.3)}, relief, moved) for v in (0.1, 0.5)
    )
    code = HeadCode(twin.code("ann"), None, torch.zeros(1, 1), twin.camera("ann").label())
    modules = {"shapes": twin, "original": photo, "heads": HeadCodes.pack({"ann": code}, twin)}
    extra = subject_index([Entry("ann", "heads", "shapes", "original", caption="its shape")])
    return artifact.save(folder, stage="shape", modules=modules, extra=extra)
