"""Official generators and ours, with equal weights and equal inputs. Importing an official repository stays here.

Each adapter builds the official network from a checkout, and ours from its state dict. z is seeded, cameras are
frontal, noise maps are the stored ones. EG3D's samples along rays move at random: its images differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.camera import Rig
from models.generators.eg3d import EG3DGenerator
from models.generators.stylegan2 import StyleGAN2Generator
from models.zoo import family
from models.zoo.family import Official, State

Run = Callable[[int], Tensor]
"""Batch size -> images."""


@dataclass(frozen=True)
class Adapter:
    """How to run one family."""

    official: Callable[[], tuple[nn.Module, Run]]
    """Builds the official network; its checkout is importable by then."""
    ours: Callable[[State | None], tuple[nn.Module, Run]]
    """Converts the official state dict, or makes its own weights."""


def import_checkout(path: str) -> None:
    """Make a checkout importable, with its CPU code instead of CUDA extensions."""
    import torch.utils.cpp_extension as extensions

    extensions.load = lambda *_args, **_kwargs: None
    sys.path.insert(0, path)


def codes(batch: int, size: int) -> Tensor:
    """Seeded z."""
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(0))


def converted(name: str, official: Official) -> Any:
    """Our generator."""
    return family(name).convert(official, {}).modules["generator"]


def stylegan2_official() -> tuple[nn.Module, Run]:
    from model import Generator  # type: ignore[import-not-found]

    network = Generator(256, 512, 8)
    return network, lambda batch: network([codes(batch, 512)], randomize_noise=False)[0]


def stylegan2(state: State | None) -> tuple[nn.Module, Run]:
    generator = converted("stylegan2", Official({"g_ema": state})) if state else StyleGAN2Generator()
    return generator, lambda batch: generator(codes(batch, 512)).image


EG3D = {
    "z_dim": 512, "c_dim": 25, "w_dim": 512, "img_resolution": 512, "img_channels": 3,
    "mapping_kwargs": {"num_layers": 2}, "channel_base": 32768, "channel_max": 512, "num_fp16_res": 0,
    "sr_num_fp16_res": 0, "sr_kwargs": {"channel_base": 32768, "channel_max": 512, "fused_modconv_default": False},
    "rendering_kwargs": {
        "image_resolution": 512, "disparity_space_sampling": False, "clamp_mode": "softplus",
        "superresolution_module": "training.superresolution.SuperresolutionHybrid8XDC",
        "c_gen_conditioning_zero": False, "c_scale": 1.0, "superresolution_noise_mode": "none", "sr_antialias": True,
        "decoder_lr_mul": 1.0, "depth_resolution": 48, "depth_resolution_importance": 48, "ray_start": 2.25,
        "ray_end": 3.3, "box_warp": 1, "white_back": False, "avg_camera_radius": 2.7,
        "avg_camera_pivot": [0, 0, 0.2],
    },
}  # fmt: skip
"""FFHQ's configuration, in fp32."""
EG3D_SIDE = 64


def eg3d_official() -> tuple[nn.Module, Run]:
    from training.triplane import TriPlaneGenerator  # type: ignore[import-not-found]

    network = TriPlaneGenerator(**EG3D).eval()
    network.neural_rendering_resolution = EG3D_SIDE
    label = Rig(radius=2.7, focal=4.2647, pivot=(0, 0, 0.2)).camera(0.0).label()

    def run(batch: int) -> Tensor:
        torch.manual_seed(0)  # its samples always move
        return network(codes(batch, 512), label.expand(batch, -1), noise_mode="const")["image"]

    return network, run


def eg3d(state: State | None) -> tuple[nn.Module, Run]:
    stored = {"init_kwargs": EG3D, "attributes": {"neural_rendering_resolution": EG3D_SIDE}}
    generator = EG3DGenerator(render_resolution=EG3D_SIDE)
    if state:
        generator = converted("eg3d", Official({"G_ema": state}, {"G_ema": stored}))

    def run(batch: int) -> Tensor:
        camera = generator.rig.camera(torch.zeros(batch))
        return generator(codes(batch, 512), camera, randomness=torch.Generator().manual_seed(0)).image

    return generator, run


ADAPTERS = {"stylegan2": Adapter(stylegan2_official, stylegan2), "eg3d": Adapter(eg3d_official, eg3d)}
