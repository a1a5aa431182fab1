"""The embedded world: procedural portrait heads with exact ground truth for every pixel.

``scene`` says who is portrayed, ``shapes`` and ``textures`` how a head looks, ``styles`` how it is drawn,
``render`` draws it, ``dataset`` keeps drawn samples on disk. ``python -m datamodules.mannequins`` draws a
contact sheet.
"""

from typing import TYPE_CHECKING

from datamodules.mannequins.dataset import (
    CacheConfig,
    MannequinImages,
    build_cache,
    draw_views,
)
from datamodules.mannequins.render import RIG, Truth, render
from datamodules.mannequins.scan import bare, face_scan, keypoints
from datamodules.mannequins.scene import (
    CODE_DIM,
    CODE_NAMES,
    EXAGGERATIONS,
    EXPRESSIONS,
    HAIR_STYLES,
    IDENTITY,
    LIGHT,
    SPLITS,
    SURROUNDINGS,
    WORLD_VERSION,
    Z_DIM,
    Z_NAMES,
    Palette,
    Scene,
    harmonics,
    sample_expression,
    sample_z,
    subject_code,
    subject_z,
)
from datamodules.mannequins.styles import ART_STYLES, HELD_OUT_STYLE, PLAIN, STYLES
from models.segments import SEGMENTS

if TYPE_CHECKING:
    from datamodules.mannequins.datamodule import MannequinDataModule

__all__ = [
    "ART_STYLES",
    "CODE_DIM",
    "CODE_NAMES",
    "EXAGGERATIONS",
    "EXPRESSIONS",
    "HAIR_STYLES",
    "HELD_OUT_STYLE",
    "IDENTITY",
    "LIGHT",
    "PLAIN",
    "RIG",
    "SEGMENTS",
    "SPLITS",
    "STYLES",
    "SURROUNDINGS",
    "WORLD_VERSION",
    "Z_DIM",
    "Z_NAMES",
    "CacheConfig",
    "MannequinDataModule",
    "MannequinImages",
    "Palette",
    "Scene",
    "Truth",
    "bare",
    "build_cache",
    "draw_views",
    "face_scan",
    "harmonics",
    "keypoints",
    "render",
    "sample_expression",
    "sample_z",
    "subject_code",
    "subject_z",
]


def __getattr__(name: str) -> object:
    # Drawing processes import this package; Lightning would make each of them start much later.
    if name == "MannequinDataModule":
        from datamodules.mannequins.datamodule import MannequinDataModule

        return MannequinDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
