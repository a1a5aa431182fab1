"""``galatea world``: draw a contact sheet of the embedded world, or a set of portraits in one of its styles."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from models.errors import UserError
from stages.arguments import Parser

_COUNT = 100
_FIRST = 50_000  # number of their first head: no shipped network has seen it


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``, the ones after ``galatea world``.

    Raises:
        UserError: for a wrong option, or when a picture cannot be written.
    """
    parser = Parser("galatea world", "Draw a contact sheet of the embedded world, or portraits in one of its styles.")
    parser.add_argument("--out", type=Path, help="the PNG, or folder, to write (default: runs/world.png, styles/STYLE)")
    parser.add_argument("--size", type=int, help="pixels of a picture (default: 128 on the sheet, 64 in a folder)")
    parser.add_argument("--compiled", action="store_true", help="compile the distance field first")
    parser.add_argument("--style", help="write a folder of portraits in this style, each of another head")
    parser.add_argument("--count", type=int, help=f"of portraits (default: {_COUNT})")
    parser.add_argument(
        "--exaggerate", type=_strength, action="append", default=[], metavar="NAME=STRENGTH",
        help="a geometric exaggeration of their heads, for example big_eyes=1.0; may be given several times",
    )  # fmt: skip
    options = parser.parse_args(list(arguments))
    if options.style is None:
        if options.count is not None or options.exaggerate:
            raise UserError("--count and --exaggerate are of portraits in a style: name one, --style")
        from datamodules.mannequins.sheet import contact_sheet, save_picture  # after --help, which needs no torch

        out = options.out or Path("runs/world.png")
        save_picture(contact_sheet(options.size or 128, compiled=options.compiled), out)
        print(f"wrote {out}")
        return
    from datamodules.mannequin_artworks import MannequinStyleSet
    from models.image import write_image

    out = options.out or Path("styles") / options.style
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already, and no empty folder: name another, --out")
    count, size = _COUNT if options.count is None else options.count, options.size or 64
    pictures = MannequinStyleSet(
        options.style, count, _FIRST, dict(options.exaggerate), size, compiled=options.compiled
    ).items
    for picture in pictures:
        write_image(out / f"{picture.id}.png", picture.image)
    print(f"wrote {len(pictures)} portraits to {out}")


def _strength(text: str) -> tuple[str, float]:
    name, _, strength = text.partition("=")
    try:
        return name, float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=STRENGTH, for example big_eyes=1.0") from None
