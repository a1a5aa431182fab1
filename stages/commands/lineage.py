"""``galatea lineage DIR``: from an artifact back to everything it was made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError, printable
from models.files import ROOT, resolve, sha256
from models.heads.index import read_index
from models.manifest import MANIFEST, manifest_id, read_manifest
from stages.arguments import Parser
from stages.configs import read_yaml
from stages.pipeline.jobs import PLAN, read_plan

_NOT_INPUT = ("out", "ckpt_path", "cache", "cache_dir", "default_root_dir")


@dataclass(frozen=True)
class Given:
    """A file or folder that a step was given by an option.

    Attributes:
        content: SHA-256 of a file, "N files" of a folder, "missing" when it is not there any more.
    """

    option: str
    path: str
    content: str


@dataclass(frozen=True)
class Node:
    """An artifact and what it was made of.

    Attributes:
        role: what it was to the artifact made of it; "" at the root.
        path: where it is; ``None`` when it was not found.
        note: why it was not found, or what is where it was.
        config: the configuration that its step ran with, where it is known.
        data: class of the data it was made with.
        given: artworks, photos and other files of that configuration.
        artworks: ids of the artworks that it holds.
    """

    role: str
    stage: str
    id: str
    step_hash: str | None
    path: str | None
    note: str
    config: str | None
    data: str | None
    given: list[Given]
    artworks: list[str]
    parents: list[Node]


def lineage(path: Path) -> Node:
    """The tree of an artifact, or of the one in ``path/artifact``.

    Manifests hold those of all ancestors, so that the tree is whole even where the folders are gone. Those are looked
    for where the run's configuration says, beside the artifact, and among the shipped ones.

    Raises:
        ArtifactError: when there is no artifact.
    """
    folder = _artifact(path) or path
    return _node("", read_manifest(folder), folder, {}, "")


def _node(role: str, manifest: Mapping[str, Any], folder: Path | None, places: Mapping[str, Path], note: str) -> Node:
    file = folder.parent / "config.yaml" if folder is not None and folder.name == "artifact" else None
    config: dict[str, Any] = read_yaml(file) if file is not None and file.exists() else {}
    options = dict(_options(config))
    if folder is not None:
        places = {**places, **_places(folder, options)}
    parents = []
    for name, parent in manifest["parents"].items():
        found = places.get(manifest_id(parent))
        parents.append(_node(name, parent, found, places, "" if found else _absence(name, options)))
    return Node(
        role,
        manifest["stage"],
        manifest_id(manifest),
        manifest["step_hash"],
        None if folder is None else str(folder),
        note,
        str(file) if config else None,
        data.get("class_path") if isinstance(data := config.get("data"), dict) else None,
        list(_given(options)),
        [entry.id for entry in read_index(manifest) if entry.artwork is not None],
        parents,
    )


def _artifact(path: Path) -> Path | None:
    """The artifact folder that ``path`` names."""
    return next((folder for folder in (path, path / "artifact") if (folder / MANIFEST).exists()), None)


def _identity(folder: Path) -> str | None:
    try:
        return manifest_id(read_manifest(folder))
    except UserError:  # damaged, which is not what was asked about
        return None


def _places(folder: Path, options: Mapping[str, str]) -> dict[str, Path]:
    """Artifacts by id: the shipped ones, the other steps' of the pipeline, and those that the options name."""
    named = [resolve(value) for value in options.values()]
    run = folder.parent if folder.name == "artifact" else folder
    candidates = [*(ROOT / "assets").iterdir(), *named, *run.parent.iterdir()]  # the last of equals is taken
    found = (place for path in candidates if path.is_dir() and (place := _artifact(path)) is not None)
    return {identity: place for place in found if (identity := _identity(place)) is not None}


def _absence(role: str, options: Mapping[str, str]) -> str:
    """Why the input ``role`` was not found."""
    named = next((resolve(v) for k, v in options.items() if k.endswith(f".{role}.path")), None)
    if named is None:
        return "not found"
    place = _artifact(named)
    identity = None if place is None else _identity(place)
    if identity is not None:
        return f"{named} now holds another: {identity[:12]}"
    return f"{named} is {'damaged' if place else 'missing'}"


def _options(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Options of a configuration that may name a file: (option, value)."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _NOT_INPUT:
                yield from _options(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _options(item, f"{key}.{index}")
    elif isinstance(value, str) and (key.endswith("path") or "/" in value or "." in value):
        yield key, value


def _given(options: Mapping[str, str]) -> Iterator[Given]:
    for option, value in options.items():
        path = resolve(value)
        if _artifact(path) is not None:
            continue  # a parent, which has its own place in the tree
        if path.is_file():
            yield Given(option, str(path), sha256(path))
        elif path.is_dir():
            yield Given(option, str(path), f"{sum(p.is_file() for p in path.rglob('*'))} files")
        elif option.startswith("data") and option.endswith(".path"):
            yield Given(option, str(path), "missing")


def _lines(node: Node, seen: set[str], first: str = "", rest: str = "") -> Iterator[str]:
    """The tree as text; ``first`` stands before the node's own line, ``rest`` before all others.

    What an artifact in ``seen`` was made of is not told again.
    """
    name = f"{node.role}: {node.stage}" if node.role else node.stage
    step = f", step {node.step_hash[:12]}" if node.step_hash else ""
    known = node.id in seen and node.parents
    yield f"{first}{name} {node.id[:12]}{step}, {node.path or node.note}{', see above' if known else ''}"
    if known:
        return
    seen.add(node.id)
    facts = [f"config: {node.config}"] if node.config else []
    facts += [f"data: {node.data}"] if node.data else []
    facts += [f"{g.option}: {g.path} ({g.content[:12] if len(g.content) == 64 else g.content})" for g in node.given]
    facts += [f"artworks: {', '.join(node.artworks)}"] if node.artworks else []
    stem = "│  " if node.parents else "   "
    yield from (f"{rest}{stem}{fact}" for fact in facts)
    for parent in node.parents:
        last = parent is node.parents[-1]
        yield from _lines(parent, seen, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")


def main(arguments: Sequence[str]) -> None:
    """``galatea lineage``.

    Raises:
        UserError: for a wrong option, or a folder without an artifact.
    """
    parser = Parser("galatea lineage", "From an artifact back to everything it was made of.")
    parser.add_argument("path", metavar="DIR", type=Path, help="an artifact, the folder of a step, or of a pipeline")
    parser.add_argument("--json", action="store_true", help="print the tree as JSON, with whole hashes")
    options = parser.parse_args(arguments)
    path = resolve(options.path)
    if not path.is_dir():
        raise UserError(f"{options.path} is not a folder")
    if _artifact(path) is None and (path / PLAN).exists():  # the last step of a pipeline that has a result
        path = next((path / name for name in reversed(read_plan(path)) if _artifact(path / name)), path)
    tree = lineage(path)
    print(json.dumps(asdict(tree), indent=1) if options.json else "\n".join(map(printable, _lines(tree, set()))))
