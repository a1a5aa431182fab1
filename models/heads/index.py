"""The index of an artifact: what it shows, as the stage that wrote it says; in a manifest, as ``extra["subjects"]``.

``Subjects``, ``present``, ``view`` and ``lineage`` read the index and know no stage. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

from models.classes import WRAPPERS
from models.errors import shown
from models.manifest import ArtifactError
from models.names import is_plain

KEY = "subjects"
_REFERENCE = "media/reference_"  # pictures of artworks, in artifacts of before


@dataclass(frozen=True)
class Entry:
    """One subject.

    Attributes:
        id: of the item, safe as a file name.
        codes: module with the subject's code (:class:`models.heads.codes.HeadCodes`); None: there are pictures alone.
        generator: module that shows it.
        original: module of the generator before it was changed for this subject; None when it was not.
        wrapper: class path of a generator made of modules for this subject alone, which then shows it; one of
            :data:`models.classes.WRAPPERS`.
        parts: the wrapper's arguments, by the name of the module that each is. One of several subjects' codes is
            narrowed down to the subject.
        artwork: media file of the artwork, as it was framed.
        caption: what the result is called beside the artwork.
        left_out: expressions that the head cannot show, and why, by their names.
        pictures: media files of other pictures of it, from the artwork's view, by what they are called beside it.
    """

    id: str
    codes: str | None = "anchors"
    generator: str = "generator"
    original: str | None = None
    wrapper: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    artwork: str | None = None
    caption: str = "head"
    left_out: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)


_FIELDS = {f.name: f.type for f in fields(Entry)}


def subject_index(entries: Iterable[Entry]) -> dict[str, Any]:
    """Entries, in any order, as part of a manifest's ``extra``."""
    return {KEY: [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.id)]}


def read_index(manifest: Mapping[str, Any]) -> list[Entry]:
    """What an artifact shows, sorted by id; nothing of one that holds no subjects.

    Raises:
        ArtifactError: when the index is no such list, or names modules or media that are not there.
    """
    listed = manifest["extra"].get(KEY)
    if listed is None:
        return _of_before(manifest)
    if not isinstance(listed, list):
        raise ArtifactError(f"the index of subjects is {shown(listed)}, it must be a list")
    entries = sorted((_entry(value, manifest) for value in listed), key=lambda entry: entry.id)
    for one, other in pairwise(entries):
        if one.id == other.id:
            raise ArtifactError(f"the index of subjects has {one.id} twice")
    return entries


def _entry(value: Any, manifest: Mapping[str, Any]) -> Entry:
    if not isinstance(value, dict) or not value.keys() <= _FIELDS.keys() or "id" not in value:
        raise ArtifactError(f"the index of subjects has the entry {shown(value)}, which is none")
    tables = {name: value.get(name, {}) for name in ("parts", "left_out", "pictures")}
    texts = {name: text for name, text in value.items() if name not in tables}
    for name, given in tables.items():
        if not isinstance(given, dict) or not all(isinstance(text, str) for text in (*given, *given.values())):
            raise ArtifactError(f"the index of subjects has {shown(given)} for {name}, which must be texts by name")
    for name, text in texts.items():
        if not isinstance(text, str) and not (text is None and "None" in str(_FIELDS[name])):
            raise ArtifactError(f"the index of subjects has {shown(text)} for {name}, which must be a text")
    entry = Entry(**texts, **tables)
    if not is_plain(entry.id):
        raise ArtifactError(f"the index of subjects has the id {shown(entry.id)}, which cannot name a file")
    if entry.wrapper is not None and entry.wrapper not in WRAPPERS:
        raise ArtifactError(f"the index says that {entry.id} is shown by {shown(entry.wrapper)}, which wraps nothing")
    if bool(entry.parts) != (entry.wrapper is not None) or (entry.codes is None and entry.wrapper is not None):
        raise ArtifactError(f"the index gives {entry.id} a wrapper without its parts or codes, or parts without one")
    modules = () if entry.codes is None else (entry.codes, entry.generator, entry.original, *entry.parts.values())
    for name in filter(None, modules):
        if name not in manifest["modules"]:
            raise ArtifactError(f"the index says that {entry.id} is shown by {shown(name)}, which is not there")
    for file in filter(None, (entry.artwork, *entry.pictures.values())):
        if f"media/{file}" not in manifest["files"]:
            raise ArtifactError(f"the index says that {entry.id} is {shown(file)}, which is not there")
    return entry


def _of_before(manifest: Mapping[str, Any]) -> list[Entry]:
    """The index of an artifact that was written without one: told by the names of its modules and pictures."""
    modules, found = manifest["modules"], []
    pictures = {
        file.removeprefix(_REFERENCE).rpartition(".")[0]: file.removeprefix("media/")
        for file in manifest["files"]
        if file.startswith(_REFERENCE)
    }
    codes = modules.get("anchors")
    if codes is None:
        return [Entry(name, codes=None, artwork=pictures[name]) for name in sorted(pictures) if is_plain(name)]
    ids = codes["init_args"].get("ids", [])
    if not isinstance(ids, list) or not all(isinstance(identity, str) and is_plain(identity) for identity in ids):
        raise ArtifactError(f"the codes of heads have the ids {shown(ids)}, which must be names")
    detailed = str(codes["class_path"]).endswith(".PhotoSet") and "detail" in modules
    for identity in sorted(ids):
        own, artwork = f"stylised.{identity}", pictures.get(identity)
        if own in modules:
            found.append(Entry(identity, "anchors", own, "generator", artwork=artwork, caption="stylised"))
        elif detailed:
            found.append(detailed_entry(identity, artwork))
        else:
            found.append(Entry(identity, artwork=artwork, caption="anchor"))
    return found


def detailed_entry(identity: str, artwork: str | None) -> Entry:
    """A photo's head with its details."""
    return Entry(
        identity,
        wrapper="models.heads.detailed.DetailedGenerator",
        parts={"coarse": "generator", "detail": "detail", "photo": "anchors"},
        artwork=artwork,
        caption="one pass",
    )


def pixel_aligned_entry(identity: str, artwork: str | None) -> Entry:
    """A photo's head with details that are aligned pixel by pixel."""
    return Entry(
        identity,
        wrapper="models.heads.pixel_aligned.PixelAlignedGenerator",
        parts={"coarse": "generator", "local": "local", "photo": "anchors"},
        artwork=artwork,
        caption="one pass",
    )
