"""Official generators and ours, with equal weights and equal inputs. Importing an official repository stays here.

Each adapter builds the official network from a checkout, and ours from its state dict. z and the samples along rays
are seeded, noise maps are the stored ones; all images are of 256 px but GRAM's, where a pixel costs the same at any
size. "eg3d" wants the path of the folder ``eg3d`` in its repository.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from models.camera import Rig
from models.generators.eg3d import EG3DGenerator
from models.generators.gram import GRAMGenerator
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from models.zoo import family
from models.zoo.family import Official, State

Run = Callable[[int], Tensor]
"""Batch size -> images."""

SIDE = 64
"""Of what rays render, pixels."""


@dataclass(frozen=True)
class Adapter:
    """How to run one family."""

    official: Callable[[], tuple[nn.Module, Run]]
    """Builds the official network; its checkout is importable by then."""
    ours: Callable[[State | None], tuple[nn.Module, Run]]
    """Converts the official state dict, or makes its own weights."""


def import_checkout(path: str) -> None:
    """Make a checkout importable, with its CPU code instead of CUDA extensions, and without what only draws meshes."""
    import torch.utils.cpp_extension as extensions

    extensions.load = lambda *_args, **_kwargs: None
    for name in ("pytorch3d", *(f"pytorch3d.{part}" for part in ("io", "renderer", "structures", "transforms"))):
        sys.modules[name] = MagicMock()
    sys.path.insert(0, path)


def seeded() -> torch.Generator:
    """What torch draws after ``manual_seed(0)``."""
    return torch.Generator().manual_seed(0)


def codes(batch: int, size: int) -> Tensor:
    """Seeded z."""
    return torch.randn(batch, size, generator=seeded())


def converted(name: str, official: Official, **settings: Any) -> Any:
    """Our generator."""
    return family(name).convert(official, settings).modules["generator"]


# -- StyleGAN2 (rosinality), 256 px ------------------------------------------------------------------------------------


def stylegan2_official() -> tuple[nn.Module, Run]:
    from model import Generator  # type: ignore[import-not-found]

    network = Generator(256, 512, 8)
    return network, lambda batch: network([codes(batch, 512)], randomize_noise=False)[0]


def stylegan2(state: State | None) -> tuple[nn.Module, Run]:
    generator = converted("stylegan2", Official({"g_ema": state})) if state else StyleGAN2Generator()
    return generator, lambda batch: generator(codes(batch, 512)).image


# -- EG3D: 64 x 64 rays of 48 + 48 samples, enlarged to 256 px

EG3D = {
    "z_dim": 512, "c_dim": 25, "w_dim": 512, "img_resolution": 256, "img_channels": 3,
    "mapping_kwargs": {"num_layers": 2}, "channel_base": 32768, "channel_max": 512, "num_fp16_res": 0,
    "sr_num_fp16_res": 0, "sr_kwargs": {"channel_base": 32768, "channel_max": 512, "fused_modconv_default": False},
    "rendering_kwargs": {
        "image_resolution": 256, "disparity_space_sampling": False, "clamp_mode": "softplus",
        "superresolution_module": "training.superresolution.SuperresolutionHybrid4X",
        "c_gen_conditioning_zero": False, "c_scale": 1.0, "superresolution_noise_mode": "none", "sr_antialias": True,
        "decoder_lr_mul": 1.0, "depth_resolution": 48, "depth_resolution_importance": 48, "ray_start": 2.25,
        "ray_end": 3.3, "box_warp": 1, "white_back": False, "avg_camera_radius": 2.7,
        "avg_camera_pivot": [0, 0, 0.2],
    },
}  # fmt: skip
"""FFHQ's configuration at 256 px, in fp32."""


def eg3d_official() -> tuple[nn.Module, Run]:
    from training.triplane import TriPlaneGenerator  # type: ignore[import-not-found]

    network = TriPlaneGenerator(**EG3D).eval()
    network.neural_rendering_resolution = SIDE
    label = Rig(radius=2.7, focal=4.2647, pivot=(0, 0, 0.2), centre=(0, 0, 0)).camera(0.0).label()

    def run(batch: int) -> Tensor:
        torch.manual_seed(0)  # its samples always move
        return network(codes(batch, 512), label.expand(batch, -1), noise_mode="const")["image"]

    return network, run


def eg3d(state: State | None) -> tuple[nn.Module, Run]:
    stored = {"init_kwargs": EG3D, "attributes": {"neural_rendering_resolution": SIDE}}
    if state:
        generator = converted("eg3d", Official({"G_ema": state}, {"G_ema": stored}))
    else:
        head = {"channels": (128, 64), "resolution": 256, "factor": 2}
        generator = EG3DGenerator(render_resolution=SIDE, superresolution=head)

    def run(batch: int) -> Tensor:
        random = seeded()
        passes = [torch.rand(batch, SIDE**2, count, generator=random) for count in (generator.coarse, generator.fine)]
        camera = generator.rig.camera(torch.zeros(batch))
        return generator(codes(batch, 512), camera, randomness=torch.cat(passes, -1)).image

    return generator, run


# -- StyleSDF: 64 x 64 rays of 24 samples, enlarged to 256 px ----------------------------------------------------------


class Options(dict[str, Any]):
    """Official options: attributes, and keys."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def stylesdf_official() -> tuple[nn.Module, Run]:
    from model import Generator  # type: ignore[import-not-found]

    model = Options(
        size=256, style_dim=256, channel_multiplier=2, lr_mapping=0.01, renderer_spatial_output_dim=SIDE,
        project_noise=False, freeze_renderer=False,
    )  # fmt: skip
    rendering = Options(
        depth=8, width=256, no_sdf=False, no_z_normalize=False, static_viewdirs=True, N_samples=24,
        no_offset_sampling=False, perturb=1.0, raw_noise_std=0.0, force_background=True, return_xyz=False,
        return_sdf=False,
    )  # fmt: skip
    network = Generator(model, rendering)
    pose = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])

    def run(batch: int) -> Tensor:
        network.is_train = torch.is_grad_enabled()  # else it keeps its activations in any case
        focal, near, far = (
            torch.full((batch, 1, 1), value) for value in (0.5 * SIDE / math.tan(math.radians(6)), 0.88, 1.12)
        )
        torch.manual_seed(0)
        return network([codes(batch, 256)], pose.expand(batch, 3, 4), focal, near, far, randomize_noise=False)[0]

    return network, run


def stylesdf(state: State | None) -> tuple[nn.Module, Run]:
    generator = StyleSDF(decoder={"channels": (512, 256, 128)})
    if state:
        generator = converted("stylesdf", Official({"g_ema": state}))

    def run(batch: int) -> Tensor:
        jitter = torch.rand(batch, SIDE, SIDE, generator=seeded())
        return generator(codes(batch, 256), generator.rig.camera(torch.zeros(batch)), randomness=jitter).image

    return generator, run


# -- GRAM: 64 px, 24 surfaces ------------------------------------------------------------------------------------------

TURN = 1e-3
"""Radians from one pass to the next: ours remembers the surfaces of cameras that it has seen."""


def gram_official() -> tuple[nn.Module, Run]:
    from generators.generators import GramGenerator  # type: ignore[import-not-found]

    front = math.pi / 2
    scalar = {"hidden_dim_sample": 128, "layer_num_sample": 3, "center": (0, 0, -1.5), "init_radius": 0}
    search = {"num_samples": 64, "num_manifolds": 24, "levels_start": 23, "levels_end": 8}
    network = GramGenerator(256, SIDE, 0.3, 0.155, front, front, "at the mean", scalar, search)
    passes = itertools.count()

    def run(batch: int) -> Tensor:
        network.h_mean = front - TURN * next(passes)  # given angles, it takes but one z
        return network(codes(batch, 256), 12, 0.88, 1.12)[0]

    return network, run


def gram(state: State | None) -> tuple[nn.Module, Run]:
    generator = converted("gram", Official({"": state}), img_size=SIDE) if state else GRAMGenerator(resolution=SIDE)
    passes = itertools.count()

    def run(batch: int) -> Tensor:
        return generator(codes(batch, 256), generator.rig.camera(torch.full((batch,), TURN * next(passes)))).image

    return generator, run


ADAPTERS = {
    "stylegan2": Adapter(stylegan2_official, stylegan2),
    "eg3d": Adapter(eg3d_official, eg3d),
    "stylesdf": Adapter(stylesdf_official, stylesdf),
    "gram": Adapter(gram_official, gram),
}
