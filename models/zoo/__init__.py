"""Official checkpoint files <-> ours. One file a family; a family is imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from models.zoo.family import Family, Official, ZooError

FAMILIES = ("stylegan2", "eg3d", "stylesdf", "gram", "anifacegan", "psp", "e4e", "irse50", "e3dge", "faces")
"""Files of this folder, each with one ``FAMILY``."""


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        ZooError: when there is none.
    """
    if name not in FAMILIES:
        raise ZooError(f"unknown family {name!r}, there are: {', '.join(FAMILIES)}")
    return importlib.import_module(f"models.zoo.{name}").FAMILY


def recognise(official: Official) -> Family:
    """The family whose keys and shapes a file has.

    Raises:
        ZooError: when none or several claim it.
    """
    claims = [found for found in map(family, FAMILIES) if found.matches(official)]
    parts = {name for found in claims for name in found.includes}
    claims = [found for found in claims if found.name not in parts]
    if len(claims) == 1:
        return claims[0]
    if claims:
        raise ZooError(f"the file could be any of {', '.join(f.name for f in claims)}: name the family before the file")
    keys = [key for state in official.states.values() for key in state][:3]
    raise ZooError(f"no family has keys like {', '.join(keys) or 'those of this file (there are none)'}")


def family_of_fixture(meta: Mapping[str, Any]) -> Family:
    """The family that replays a parity fixture.

    Raises:
        ZooError: when none does.
    """
    for name in FAMILIES:
        if (found := family(name)).replays(meta):
            return found
    raise ZooError(f"no family replays the fixture {meta.get('name')!r}")
