"""GRAM's generator."""

import math

import pytest
import torch
from torch.testing import assert_close

from models.generators.gram import GRAMGenerator, Surfaces, grid_focal, sphere_camera, unit_rays
from tests.models.generators.protocol import GeneratorContract, seeded

TINY = {
    "z_dim": 8, "resolution": 16, "width": 16, "layers": 4, "mapping_width": 16, "predictor_width": 32,
    "manifolds": 6, "samples": 24, "box": 1.0,  # a large box makes the random field smooth enough for 16 pixels
}  # fmt: skip


class TestPortraits(GeneratorContract):
    """As of FFHQ: a background plane."""

    def make(self):
        return GRAMGenerator(**TINY)

    def make_still(self):
        return self.make()


class TestObjects(GeneratorContract):
    """As of CARLA: a white background and a larger object."""

    def make(self):
        return GRAMGenerator(
            **TINY | {"box": 4.0}, background=False, white_back=True, centre=(0, 0, 0), levels=(30, 6), delta=0.02,
            fov=30.0, near=0.7, far=1.3,
        )  # fmt: skip
