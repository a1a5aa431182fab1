"""Generators of other worlds than the embedded one: what suits them is not what the stages are set for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from models.features.base import Frozen
    from models.generators.base import Generator

log = logging.getLogger(__name__)

TOLD = "GALATEA_STAND_INS"  # in the environment of a pipeline's step: embedded networks that the pipeline has told of
_OWN = ("models.generators.manifold.", "models.generators.volume.")
"""Whose cameras are the embedded world's unless they are given others."""


def is_foreign(class_path: str, init_args: Mapping[str, Any]) -> bool:
    """Whether a generator is none of the embedded world, which has one radius and one focal length.

    Of any class one is when both are given so; our own classes have them from the start. A 2D one has no rig: it is
    told by its codes, whose length carries meaning, as no other StyleGAN2's does.

    Args:
        class_path, init_args: as a manifest has them.
    """
    from models.camera import Rig  # here: heavy

    if class_path == "models.generators.stylegan2.StyleGAN2Generator":
        return bool(init_args.get("normalize", True))
    own = Rig()
    rig = init_args.get("rig")
    if isinstance(rig, Mapping) and "class_path" in rig:  # as dataclasses are recorded
        rig = rig.get("init_args")
    given = rig if isinstance(rig, Mapping) else {}
    wanted = {"radius": own.radius, "focal": own.focal}
    found = (wanted if class_path.startswith(_OWN) else {}) | {name: given[name] for name in wanted if name in given}
    return found != wanted


def warn_of_embedded(generator: Generator, *networks: Frozen[nn.Module] | None) -> None:
    """Say so when embedded networks are to judge a foreign generator, and the pipeline has not said it."""
    from pytorch_lightning.utilities import rank_zero_only

    from models.configurable import spec
    from models.features.embedded import EmbeddedFeature

    told = os.environ.get(TOLD, "").split()
    found = [type(n.module).__name__ for n in networks if n is not None and isinstance(n.module, EmbeddedFeature)]
    found = [name for name in found if name not in told]
    if found and is_foreign(**spec(generator)):
        rank_zero_only(log.warning)(
            "warning: %s: made for the embedded world, which %s is not of; docs/real_weights.md names better "
            "networks, and configs/presets/ has their settings",
            *(" and ".join(found), type(generator).__name__),
        )
