"""What a setting must be, said in one sentence where it enters."""

from __future__ import annotations

import math
from collections.abc import Callable

from models.errors import UserError, shown


def check_positive(owner: object, *names: str, where: str = "") -> None:
    """Refuse settings of ``owner`` that are not finite numbers above 0; None passes.

    Args:
        names: of its attributes.
        where: what stands before them in a configuration: "recipe.".

    Raises:
        UserError: naming the setting.
    """
    _check(owner, names, where, lambda value: value > 0, "above 0")


def check_not_negative(owner: object, *names: str, where: str = "") -> None:
    """As :func:`check_positive`; 0 passes too."""
    _check(owner, names, where, lambda value: value >= 0, "and must not be negative")


def _check(owner: object, names: tuple[str, ...], where: str, holds: Callable[[float], bool], what: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not holds(value)
        ):
            raise UserError(f"{where}{name} is {shown(value)}: it must be a number {what}")
