"""Feature networks of the embedded world beside a generator of another one."""

from __future__ import annotations

import logging

from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from models.camera import Rig
from models.features.base import Frozen
from models.features.embedded import EmbeddedFeature
from models.generators.base import Generator

log = logging.getLogger(__name__)


def is_foreign(generator: Generator) -> bool:
    """Whether a generator is none of the embedded world: that has one radius and focal length, and nothing in 2D."""
    rig, own = generator.rig, Rig()
    return not generator.is_3d or (rig.radius, rig.focal) != (own.radius, own.focal)


@rank_zero_only
def warn_of_embedded(generator: Generator, *networks: Frozen[nn.Module] | None) -> None:
    """Say so when embedded networks are to judge a foreign generator."""
    found = [type(n.module).__name__ for n in networks if n is not None and isinstance(n.module, EmbeddedFeature)]
    if found and is_foreign(generator):
        log.warning(
            "warning: %s: made for the embedded world, which %s is not of; docs/real_weights.md names better "
            "networks, and configs/presets/ has their settings",
            *(" and ".join(found), type(generator).__name__),
        )
