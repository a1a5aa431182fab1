"""Pictures of faces aligned for a generator: a folder to look at and edit, or a zip to train on.

A folder holds the crops, ``dataset.json`` with their cameras, the pictures themselves in ``originals`` and
``artworks.json``, which says how each was framed: whoever reads the folder frames the originals by it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.artworks import ORIGINALS, artwork_id, edits_of
from datamodules.framing import Edits, Framed, Framing
from datamodules.labels import LABELS
from datamodules.overlay import sheet, tile
from models.documents import MOST_JSON_BYTES, parse_json
from models.errors import UserError, one_line
from models.files import atomic_write, destination, os_errors, read_bytes, sweep, temporary
from models.image import read_image, to_uint8, write_image
from models.version import VERSION

log = logging.getLogger(__name__)

LIST, SHEET, REPORT = "artworks.json", "overlay.png", "report.csv"
PART = 64  # pictures of an archive that are written at once: what a killed run loses
MOST_TILES = 200  # pictures on a sheet
COLUMNS = ("file", "aligned", "yaw_deg", "pitch_deg", "roll_deg", "presence", "faces", "remarks")

Entry = dict[str, Any]


@dataclass
class Aligned:
    """One picture: what it was made into, or why it was left out.

    Attributes:
        file: its name.
        framed: None where it was left out.
        entry: of ``artworks.json``.
        label: (25,) camera; None where nothing tells the pose.
        why: it was left out.
    """

    file: str
    framed: Framed | None = None
    entry: Entry = field(default_factory=dict)
    label: Tensor | None = None
    why: str = ""

    @property
    def id(self) -> str:
        return artwork_id(self.file)

    @property
    def row(self) -> list[Any]:
        """Of the report."""
        if self.framed is None:
            return [self.file, "no", "", "", "", "", "", self.why]
        angles = [self.entry.get(name, "") for name in ("yaw_deg", "pitch_deg", "roll_deg")]
        seen = [f"{self.framed.presence:.2f}", self.framed.faces]
        return [self.file, "yes", *angles, *seen, "; ".join(self.framed.warnings)]


def align(place: Path, entry: Mapping[str, Any], framing: Framing, given: Edits) -> Aligned:
    """Align one picture of a folder.

    What is found is rounded as ``artworks.json`` has it, and the picture framed by that: so it is framed again.

    Args:
        entry: its ``file`` and what is known of it.
        given: of every picture, as far as its entry says nothing.

    Raises:
        UserError: when it cannot be read or framed.
    """
    file = entry["file"]
    image = read_image(place / file)
    asked = edits_of(entry, given)
    found = framing(image, file, replace(asked, roll_deg=None, scale=None, shift=None))
    own = {key: value for key, value in entry.items() if value is not None and key != "label"}
    entry = {"file": file, **_entry(found), **own}
    framed = framing(image, file, edits_of(entry))
    label = None if framed.camera is None else framed.camera.label()[0]
    return Aligned(file, replace(framed, faces=found.faces, warnings=found.warnings), entry, label)


def _entry(framed: Framed) -> Entry:
    """How a picture was framed, in numbers that a person can change."""
    entry: Entry = {}
    if framed.angles is not None:
        yaw, pitch = (round(math.degrees(angle), 3) for angle in framed.angles)
        entry |= {"yaw_deg": yaw, "pitch_deg": pitch}
    square = framed.square
    if framed.five is not None and not framed.boxed:
        entry["points"] = [[round(value, 2) for value in point] for point in framed.five.tolist()]
    else:
        corner = [round(middle - square.side / 2) for middle in square.centre]
        entry["crop"] = [*corner, round(square.side), round(square.side)]
    return entry | {"roll_deg": round(math.degrees(square.angle), 3), "scale": 1.0, "shift": [0.0, 0.0]}


def align_folder(
    place: Path,
    entries: Sequence[Mapping[str, Any]],
    out: Path,
    framing: Framing,
    given: Edits,
    again: bool = False,
) -> list[Aligned]:
    """Align pictures to a new folder.

    Args:
        again: ``out`` is an aligned folder, ``place`` too, and ``entries`` are all of its list: its crops are made
            anew.

    Raises:
        UserError: when ``out`` holds something else, or nothing could be aligned.
    """
    for entry, twin in zip(entries, _twins(entries), strict=True):
        if twin is not None:
            raise UserError(f"{place}: {twin} and {entry['file']} have the same id: rename one of the files")
    for entry in entries if again else ():
        if entry["file"] == f"{artwork_id(entry['file'])}.png":
            raise UserError(
                f"{place}: {entry['file']} is where its crop would be: move it to {ORIGINALS}, and list it there"
            )
    if not again:
        with os_errors(out):
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                told = f": galatea align {out} frames its pictures again" if recipe_in(out) else ""
                raise UserError(f"{out} is there already and is not changed{told}; take another --out")
    target = out if again else temporary(destination(out))
    done, tiles = [], []
    try:
        for entry in entries:
            one = _attempt(place, entry, framing, given)
            if one.framed is not None:
                write_image(target / f"{one.id}.png", one.framed.image)
                if not again:
                    one.entry["file"] = f"{ORIGINALS}/{one.id}{Path(one.file).suffix}"
                    copy(place / one.file, target / one.entry["file"])
                if len(tiles) < MOST_TILES:
                    tiles.append(tile(one.framed, one.id))
                one.framed = replace(one.framed, image=one.framed.image[:, :0])  # it is large
            done.append(one)
        _some(done)
        for one in done:
            if again and one.framed is None:
                with os_errors(target, "clean"):
                    (target / f"{one.id}.png").unlink(missing_ok=True)  # no crop that nothing tells of
        found = [one for one in done if one.framed is not None]
        listed = [one.entry for one in done if one.framed is not None or again]
        labelled = [[f"{one.id}.png", one.label.tolist()] for one in found if one.label is not None]
        _write_lines(target / LABELS, {"recipe": framing.recipe.name}, "labels", labelled)
        _write_lines(target / LIST, {"recipe": framing.recipe.name, "size": framing.size}, "items", listed)
        write_report(target / REPORT, [one.row for one in done])
        with atomic_write(target / SHEET) as half:
            sheet(tiles).save(half)
        if not again:
            with os_errors(out):
                if out.exists():
                    destination(out).rmdir()
                os.rename(target, destination(out))
    finally:
        if not again:
            shutil.rmtree(target, ignore_errors=True)
    return done


def align_archive(place: Path, entries: Sequence[Mapping[str, Any]], out: Path, framing: Framing, given: Edits) -> int:
    """Align pictures to a zip with ``dataset.json``.

    Beside it: a report, which says what was left out and why, and a sheet of the first crops.

    Finished parts are kept in a folder beside it until all are there: a killed run goes on after them.

    Returns:
        How many are in the zip.

    Raises:
        UserError: when ``out`` is there already, parts of other pictures are, or nothing could be aligned.
    """
    parts, report, overlay = (
        out.with_name(f"{out.name}.parts"),
        out.with_suffix(f".{REPORT}"),
        out.with_suffix(f".{SHEET}"),
    )
    whole, begun = parts / out.name, parts / "plan.json"
    plan = {
        "version": VERSION,
        "recipe": framing.recipe.name,
        "size": framing.size,
        "crop": framing.crop,
        "given": asdict(given),
        "pictures": hashlib.sha256(json.dumps([dict(e) for e in entries], sort_keys=True).encode()).hexdigest(),
    }
    held = parse_json(read_bytes(begun, MOST_JSON_BYTES), str(begun)) if begun.exists() else None
    count = held.pop("count", None) if isinstance(held, dict) else None  # only there once all are in the whole
    taken = (out, report, overlay) if held is None else (out,) if count is None or whole.exists() else ()
    for file in taken:
        if file.exists():
            raise UserError(f"{file} is there already and is not changed; take another --out")
    if held is None:
        with os_errors(parts):
            if parts.exists() and (not parts.is_dir() or any(parts.iterdir())):
                raise UserError(f"{parts} is there already, and is not what an earlier run left")
        _write_json(begun, plan)
    elif held != plan:
        raise UserError(f"{parts} holds parts of other pictures or options: take another --out, or remove it")
    files = {start: parts / f"{start:08d}.zip" for start in range(0, len(entries), PART)}
    rows = []
    if count is None:
        twins = _twins(entries)
        for start, file in files.items():
            part = slice(start, start + PART)
            if not file.exists():
                _write_part(file, place, entries[part], twins[part], framing, given)
            log.info("%d of %d pictures", min(start + PART, len(entries)), len(entries))
        rows, count = _join(list(files.values()), whole, report, overlay, framing)
        if count:
            _write_json(begun, plan | {"count": count})
    if count and whole.exists():
        with os_errors(out):
            os.replace(whole, out)
    sweep(parts)
    with os_errors(parts, "remove"):
        for file in (*files.values(), whole, begun):
            file.unlink(missing_ok=True)
        parts.rmdir()
    if not count:
        raise UserError(f"nothing could be aligned: {one_line('; '.join(str(row[-1]) for row in rows[:3]))}")
    return count


def _join(
    files: Sequence[Path], whole: Path, report: Path, overlay: Path, framing: Framing
) -> tuple[list[list[Any]], int]:
    """One zip of all parts, with report and sheet if it has a picture: the report's rows, and how many it has."""
    rows, labels, sheets = [], [], []
    with atomic_write(whole) as half, zipfile.ZipFile(half, "w") as archive:
        for file in files:
            with zipfile.ZipFile(file) as part:
                told = json.loads(part.read("part.json"))
                rows += told["rows"]
                labels += told["labels"]
                if told["labels"] and not sheets:
                    sheets.append(part.read(SHEET))
                for name, _ in told["labels"]:
                    _store(archive, name, part.read(name))
        _store(archive, LABELS, json.dumps({"recipe": framing.recipe.name, "labels": labels}))
    if labels:
        write_report(report, rows)
        with atomic_write(overlay) as half:
            half.write_bytes(sheets[0])
    return rows, len(labels)


def recipe_in(folder: Path) -> tuple[str, int] | None:
    """Recipe and size of a folder that was aligned; None when it was not."""
    if not (folder / LIST).is_file():
        return None
    content = parse_json(read_bytes(folder / LIST, MOST_JSON_BYTES), str(folder / LIST))
    if not isinstance(content, dict):
        return None
    recipe, size = content.get("recipe"), content.get("size")
    return (recipe, size) if isinstance(recipe, str) and type(size) is int else None


def copy(source: Path, target: Path) -> None:
    """Copy a file, atomically."""
    with atomic_write(target) as half, os_errors(source, "copy"):
        shutil.copyfile(source, half)


def write_report(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """A row for each picture."""
    with atomic_write(path) as half, open(half, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])


def _attempt(place: Path, entry: Mapping[str, Any], framing: Framing, given: Edits) -> Aligned:
    try:
        return align(place, entry, framing, given)
    except UserError as error:
        return Aligned(entry["file"], entry=dict(entry), why=one_line(str(error)))


def _twins(entries: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """For each entry the file of an earlier one with the same id, whose crop would be in the same place."""
    known: dict[str, str] = {}
    twins = []
    for entry in entries:
        identity = artwork_id(entry["file"])
        twins.append(known.get(identity))
        known.setdefault(identity, entry["file"])
    return twins


def _some(done: Sequence[Aligned]) -> None:
    if not any(one.framed is not None for one in done):
        more = f" (and {len(done) - 1} more)" if len(done) > 1 else ""
        raise UserError(f"{done[0].why}{more}" if done else "there is nothing to align")


def _write_part(
    file: Path,
    place: Path,
    entries: Sequence[Mapping[str, Any]],
    twins: Sequence[str | None],
    framing: Framing,
    given: Edits,
) -> None:
    rows, labels, tiles = [], [], []
    with atomic_write(file) as half, zipfile.ZipFile(half, "w") as archive:
        for entry, twin in zip(entries, twins, strict=True):
            if twin is None:
                one = _attempt(place, entry, framing, given)
            else:
                one = Aligned(entry["file"], why=f"has the same id as {twin}: rename one of the files")
            if one.framed is not None and one.label is None:
                one = Aligned(one.file, why="no face tells its pose")
            if one.framed is not None and one.label is not None:
                _store(archive, f"{one.id}.png", _png(one.framed.image))
                labels.append([f"{one.id}.png", one.label.tolist()])
                tiles.append(tile(one.framed, one.id))
            rows.append(one.row)
        _store(archive, "part.json", json.dumps({"rows": rows, "labels": labels}))
        if tiles:
            stream = io.BytesIO()
            sheet(tiles).save(stream, "PNG")
            _store(archive, SHEET, stream.getvalue())


def _store(archive: zipfile.ZipFile, name: str, content: str | bytes) -> None:
    """Without the time: what is made of the same pictures is the same file."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    archive.writestr(info, content)


def _png(image: Tensor) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(stream, "PNG")
    return stream.getvalue()


def _write_lines(path: Path, head: Entry, name: str, items: Sequence[Any]) -> None:
    """A JSON object whose last value is a list with an item a line: to be read and edited."""
    rows = ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in items)
    told = "".join(f"{json.dumps(key)}: {json.dumps(value)}, " for key, value in head.items())
    with atomic_write(path) as half:
        half.write_text(f'{{{told}"{name}": [\n  {rows}\n]}}\n', encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as half:
        half.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
