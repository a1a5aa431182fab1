"""``galatea world``: draw a contact sheet of the embedded world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stages.arguments import Parser


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``, the ones after ``galatea world``.

    Raises:
        UserError: for a wrong option, or when the picture cannot be written.
    """
    parser = Parser("galatea world", "Draw a contact sheet of the embedded world.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/world.png"), help="the PNG to write (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=128, help="pixels per tile (default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="compile the distance field first")
    options = parser.parse_args(list(arguments))

    from datamodules.mannequins.sheet import contact_sheet, save_picture  # after --help, which needs no torch

    save_picture(contact_sheet(options.size, compiled=options.compiled), options.out)
    print(f"wrote {options.out}")
