"""``galatea align``: pictures of faces framed as a generator knows them, with cameras."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.errors import UserError, one_line
from stages.arguments import Parser


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``, the ones after ``galatea align``.

    Raises:
        UserError: for a wrong option, or when nothing can be aligned.
    """
    parser = Parser(
        "galatea align",
        "Frame pictures of faces as a generator knows them. Writes crops, their cameras (dataset.json), how each was "
        "framed (artworks.json, to be edited) and a sheet to judge by (overlay.png). With the folder that was written "
        "as its only argument, the crops are made again from the edited artworks.json. An --out that ends in .zip "
        "becomes training data.",
    )
    parser.add_argument("path", metavar="IMAGE|FOLDER", help="a picture, or a folder of pictures")
    parser.add_argument(
        "--for", dest="recipe", metavar="ARTIFACT|RECIPE", help="the generator, or how its pictures were framed"
    )
    parser.add_argument("--out", type=Path, help="the folder, or the .zip, to write")
    parser.add_argument("--size", type=int, help="side of the crops, pixels (default: the recipe's)")
    parser.add_argument(
        "--crop",
        choices=("face", "auto", "centre", "none"),
        default="face",
        help="what to frame (default: %(default)s)",
    )
    parser.add_argument("--face", type=int, metavar="N", help="of several faces, 1 is the largest")
    parser.add_argument(
        "--points", metavar="X,Y...", help="of one picture: eyes, nose tip, corners of the mouth, pixels"
    )
    parser.add_argument("--first", type=int, metavar="N", help="of a folder, only its first pictures by name")
    options = parser.parse_args(list(arguments))

    from datamodules.alignment import align_archive, align_folder, recipe_in  # after --help, which needs no torch
    from datamodules.artworks import list_artworks
    from datamodules.framing import Edits, Framing, recipe_of

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("size", "face", "first"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UserError(f"--{name} is {number}, it must be at least 1")
    archive = options.out is not None and options.out.suffix.lower() == ".zip"
    asked = None if options.recipe is None else recipe_of(options.recipe)
    place, entries = (_pictures if archive else list_artworks)(options.path, asked and asked.name)
    before = recipe_in(place) if Path(options.path).is_dir() else None
    if options.out is None and before is None:
        raise UserError("--out is missing: the folder, or the .zip, to write")
    recipe = asked or recipe_of(before[0] if before else "embedded")
    out = options.out or place
    again = before is not None and out.resolve() == place.resolve()
    if again and options.first is not None:
        raise UserError(f"--first is not for {place}, whose list would lose the others")
    if again and before is not None and recipe.name != before[0]:
        raise UserError(f"{place} was aligned for {before[0]}: give another --out to align it for {recipe.name}")
    size = options.size or (before[1] if before and again else recipe.size)
    if options.points is not None and len(entries) != 1:
        raise UserError(f"--points are of one picture, {options.path} has {len(entries)}: write them in artworks.json")
    framing = Framing(recipe, size, options.crop)
    given = Edits(points=options.points, face=options.face)
    entries = entries[: options.first]
    if archive:
        count = align_archive(place, entries, out, framing, given)
        print(f"{count} of {len(entries)} pictures are in {out}, framed for {recipe.name}, {size} px; see its report")
        return
    done = align_folder(place, entries, out, framing, given, again)
    for one in done:
        if one.framed is None:
            print(one_line(f"left out: {one.why}"))
        for doubt in one.framed.warnings if one.framed else ():
            print(one_line(f"{one.file}: {doubt}"))
    left = sum(one.framed is not None for one in done)
    print(f"{left} of {len(done)} pictures are in {out}, framed for {recipe.name}, {size} px: look at overlay.png")


def _pictures(path: str, recipe: str | None) -> tuple[Path, list[dict[str, Any]]]:
    """A folder and its pictures, with those in folders below it, or what its artworks.json lists."""
    from datamodules.artworks import list_artworks
    from models.files import os_errors, resolve
    from models.image import pictures_among

    place = resolve(path)
    if not place.is_dir() or (place / "artworks.json").exists():
        return list_artworks(path, recipe)
    with os_errors(place, "read"):
        files = sorted(file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file())
    if not (names := pictures_among(files, place)):
        raise UserError(f"no images found in {place}")
    return place, [{"file": name} for name in names]
