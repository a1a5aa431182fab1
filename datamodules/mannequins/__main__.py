"""``python -m datamodules.mannequins --out FILE.png``: draw a contact sheet of the embedded world."""

from __future__ import annotations

import argparse
from pathlib import Path

from datamodules.mannequins.sheet import contact_sheet, save_picture


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.mannequins", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--size", type=int, default=128, help="pixels per tile (default: 128)")
    parser.add_argument("--compiled", action="store_true", help="compile the distance field first")
    options = parser.parse_args()
    save_picture(contact_sheet(options.size, compiled=options.compiled), options.out)


if __name__ == "__main__":
    main()
