"""Heads of the embedded world as codes of its 2D generator, whose surfaces are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.heads import Head
from datamodules.items import ItemsDataModule
from datamodules.mannequins.posed import pose_numbers
from datamodules.mannequins.render import RIG, render
from datamodules.mannequins.scene import CODE_NAMES, Scene, stream, subject_code, subjects_of
from datamodules.mannequins.styles import ALBEDO, PLAIN
from models.camera import Camera
from models.errors import UserError, shown
from models.metrics.portrait import FACE
from models.metrics.surface import SurfaceTruth


class MannequinHeads(ItemsDataModule[Head]):
    """Subjects of the embedded world, each in one pose, as codes of a generator whose z is the world's own.

    Ids are ``head-SEED``; poses are drawn uniformly, in whole degrees, and depend on the subject alone.

    Args:
        split: of the subjects; tune on "val", report on "test".
        subjects: how many, from number ``first`` of the split on.
        yaw_max_deg, pitch_max_deg: of the poses.
        size: side of the truth's maps, pixels: the generator's.
        supersample: samples per pixel and axis of the truth.
        traits: numbers of the codes by name that all subjects share, N(0, 1) among the world's: ``light_x: 2`` lights
            them from the side, ``parting: 2`` parts their hair there.
    """

    def __init__(
        self,
        split: str = "val",
        subjects: int = 4,
        first: int = 0,
        yaw_max_deg: float = 20.0,
        pitch_max_deg: float = 8.0,
        size: int = 64,
        supersample: int = 2,
        traits: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.seeds = subjects_of(split, first, subjects)
        if min(size, supersample) < 1:
            raise UserError("size and supersample must be at least 1")
        self.split, self.size, self.supersample = split, size, supersample
        self.limits, self.traits = (yaw_max_deg, pitch_max_deg), dict(traits or {})
        if unknown := sorted(set(self.traits) - set(CODE_NAMES)):
            raise UserError(f"no number of a code is called {shown(unknown[0])}, there are: {', '.join(CODE_NAMES)}")

    def camera(self, seed: int) -> Camera:
        """Of one subject's picture."""
        share = 2 * torch.rand(2, dtype=torch.float64, generator=stream("head", seed)) - 1
        yaw, pitch = (math.radians(round(s * m)) for s, m in zip(share.tolist(), self.limits, strict=True))
        return RIG.camera(yaw, pitch)

    def code(self, seed: int) -> Tensor:
        """(1, CODE_DIM) of one subject."""
        code = subject_code([seed])
        for name, value in self.traits.items():
            code[:, CODE_NAMES.index(name)] = value
        return code

    def read_items(self) -> Sequence[Head]:
        return [
            Head(f"head-{seed}", z=torch.cat([self.code(seed), pose_numbers(self.camera(seed))], 1))
            for seed in self.seeds
        ]

    @cached_property
    def _seeds(self) -> dict[str, int]:
        return {f"head-{seed}": seed for seed in self.seeds}

    def surface(self, identity: str) -> SurfaceTruth:
        """What the mannequin of one item is; drawn at each call (a second at 64 px)."""
        seed = self._seeds[identity]
        scene, camera = Scene.from_code(self.code(seed)), self.camera(seed)
        truth = render(scene, camera, self.size, PLAIN, self.supersample)
        albedo = render(scene, camera, self.size, ALBEDO, self.supersample).image
        trait = scene.traits
        key = torch.stack([trait["light_x"], trait["light_y"], torch.full_like(trait["light_x"], 0.9)], 1)
        towards = torch.einsum("bij,bi->bj", camera.cam2world[:, :3, :3], F.normalize(key, dim=1))
        face = torch.isin(truth.segmentation, torch.tensor(FACE, dtype=torch.uint8))[:, None].float()
        return SurfaceTruth(truth.depth, truth.mask, face * (truth.mask > 0.99), albedo, towards, camera, RIG.radius)
