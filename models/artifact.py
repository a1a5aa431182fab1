"""Artifacts: what one stage hands to the next, and to a notebook.

A folder of ``NAME.safetensors`` files, ``media/`` and ``manifest.json``. The manifest names every module's
class and arguments, the SHA-256 of every file, the licences, and holds the manifests of all ancestors, so
that the lineage survives a move. Its canonical form's SHA-256 is the artifact's ``id``. Hashes detect damage,
not malice; nothing is ever unpickled, and only classes of this repository's ``models`` package are built.
Time, host and paths go to ``run.json``, which is not hashed.

>>> artifact = load("assets/prior")  # doctest: +SKIP
>>> generator = artifact.module("generator")  # doctest: +SKIP
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models.configurable import build, spec
from models.errors import UserError, one_line, shown
from models.files import ROOT, destination, os_errors, read_json, replace_folder, resolve, sha256, temporary
from models.low_rank import LEFT, RIGHT, factors, unfold
from models.manifest import FORMAT, MANIFEST, MOST_DEPTH, ArtifactError, canonical, manifest_id, read_manifest
from models.names import is_plain

RUN = "run.json"
_MOST_HEADER = 1 << 23  # bytes that name tensors: some ten thousand
_MOST_TRANSIENT = 1 << 27  # numbers that a module may make besides those that are stored
_MOST_BASES = 16  # artifacts whose modules complete one another, one after the other


@dataclass(frozen=True)
class Artifact:
    """A verified artifact folder.

    Attributes:
        path: the folder.
        manifest: its parsed manifest.
        bases: by id, the artifacts whose modules this one's delta modules complete.
    """

    path: Path
    manifest: dict[str, Any]
    bases: Mapping[str, Artifact] = field(default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        """SHA-256 of the canonical manifest: the same content has the same id anywhere."""
        return manifest_id(self.manifest)

    @property
    def stage(self) -> str:
        """Name of the stage that wrote it."""
        return self.manifest["stage"]

    @property
    def extra(self) -> dict[str, Any]:
        """The stage's own JSON values."""
        return self.manifest["extra"]

    @property
    def metrics(self) -> dict[str, Any]:
        """Final metrics; a value that was not finite is ``None``."""
        return self.manifest["metrics"]

    @property
    def licence(self) -> str:
        """The strictest licence of this artifact and its ancestors."""
        return strictest(self.manifest["licences"])

    @property
    def ancestors(self) -> dict[str, dict[str, Any]]:
        """Manifests of all ancestors by id, nearest first."""
        found: dict[str, dict[str, Any]] = {}
        queue = list(self.manifest["parents"].values())
        while queue:
            manifest = queue.pop(0)
            found.setdefault(manifest_id(manifest), manifest)
            queue.extend(manifest["parents"].values())
        return found

    def media(self, name: str) -> Path:
        """Path of one media file.

        Raises:
            ArtifactError: when there is none of that name.
        """
        if f"media/{name}" not in self.manifest["files"]:
            raise ArtifactError(f"{self.path} has no media file {name!r}")
        return self.path / "media" / name

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The complete state of module ``name`` as stored: a delta is completed from its base."""
        entry = self._entry(name)
        stored = _read_tensors(_safe_file(self.path, entry["file"]))
        if (delta := entry["delta_of"]) is None:
            return stored
        if delta["id"] is None:
            base = self.tensors(delta["module"])
        else:
            base = self.bases[delta["id"]].tensors(delta["module"]) if delta["id"] in self.bases else None
        if base is None:
            raise ArtifactError(
                f"{self.path}: module {name!r} only stores changes of the artifact {delta['id'][:12]}, which is "
                "neither where it was nor beside this one: put it there (in a notebook: load(path, base=...))"
            )
        try:
            stored = unfold(stored, base)
        except ValueError as error:
            raise ArtifactError(f"{self.path}: module {name!r}: {one_line(error)}") from error
        if not stored.keys() <= base.keys():
            raise ArtifactError(f"{self.path}: module {name!r} has tensors its base does not have")
        return {**base, **stored}

    def origin(self, name: str) -> tuple[Artifact, str]:
        """Where module ``name`` comes from: what an artifact only hands on is looked up in the one that holds it."""
        entry = self._entry(name)
        delta = entry["delta_of"]
        if delta is None or _read_tensors(_safe_file(self.path, entry["file"])):
            return self, name
        if delta["id"] is None:
            return self.origin(delta["module"])
        base = self.bases.get(delta["id"])
        return (self, name) if base is None else base.origin(delta["module"])

    def module(self, name: str) -> nn.Module:
        """A new instance of module ``name`` with its stored state, in evaluation mode.

        Raises:
            ArtifactError: for an unknown name, a class that is not ours, or keys or shapes that do not match.
        """
        entry = self._entry(name)
        tensors = self.tensors(name)
        numbers = 4 * sum(tensor.numel() for tensor in tensors.values()) + _MOST_TRANSIENT
        try:
            module = build({"class_path": entry["class_path"], "init_args": entry["init_args"]}, numbers)
            _check_kinds(module.state_dict(), tensors)
            module.load_state_dict(tensors, strict=True)
        except ArtifactError:
            raise
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"{self.path}: module {name!r}: {one_line(error)}") from error
        return module.eval()

    def _entry(self, name: str) -> dict[str, Any]:
        modules = self.manifest["modules"]
        if name not in modules:
            names = one_line(", ".join(sorted(modules)))
            raise ArtifactError(f"{self.path} has no module {name!r}, it has: {names or 'none'}")
        return modules[name]


@dataclass(frozen=True)
class Export:
    """What a stage hands on: the parts of an artifact that are its own.

    Attributes:
        modules: by name, modules whose class is :class:`models.configurable.Configurable`.
        metrics: final metrics.
        media: by file name, a file to copy or its content.
        licences: of weights imported here: ``{"name", "licence", "origin"}`` each.
        extra: JSON values of the stage's own.
        dtype: by module, ``"float16"`` or ``"bfloat16"`` to store its floating-point tensors so.
        delta_of: by module, the artifact (and module, default the same name), or the name of another module saved
            here, of which only changed tensors are stored. What is handed on unchanged is a delta that stores nothing.
        rank: by module, of a delta: changes of weights are stored as factors of this rank, see :mod:`models.low_rank`.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    media: Mapping[str, str | os.PathLike[str] | bytes] = field(default_factory=dict)
    licences: Sequence[Mapping[str, str]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    dtype: Mapping[str, str | None] = field(default_factory=dict)
    delta_of: Mapping[str, Artifact | tuple[Artifact, str] | str] = field(default_factory=dict)
    rank: Mapping[str, int] = field(default_factory=dict)


def save(
    path: str | os.PathLike[str],
    *,
    stage: str,
    modules: Mapping[str, nn.Module] | None = None,
    parents: Mapping[str, Artifact | dict[str, Any]] | None = None,
    metrics: Mapping[str, float] | None = None,
    media: Mapping[str, str | os.PathLike[str] | bytes] | None = None,
    licences: Sequence[Mapping[str, str]] = (),
    step_hash: str | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: Mapping[str, str | None] | None = None,
    delta_of: Mapping[str, Artifact | tuple[Artifact, str] | str] | None = None,
    rank: Mapping[str, int] | None = None,
) -> Artifact:
    """Write an artifact folder: complete under its name, or not at all.

    Args:
        path: the folder; an artifact already there is replaced, where a link leads too.
        stage: name of the stage that writes it.
        parents: by role, the artifacts (or manifests) it was made from; their licences are inherited.
        step_hash: hash of everything the step depends on, see ``stages.pipeline.hashing``.
        modules, metrics, media, licences, extra, dtype, delta_of, rank: as of :class:`Export`.

    Raises:
        ArtifactError: when something cannot be stored.
        UserError: when the folder cannot be written.
    """
    path = Path(path)
    dtype, delta_of, media = dtype or {}, delta_of or {}, media or {}
    manifests = {n: p.manifest if isinstance(p, Artifact) else p for n, p in (parents or {}).items()}
    bases: dict[str, Artifact] = {}
    place = check_place(path)
    new = temporary(place)
    with os_errors(path):
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            entries: dict[str, Any] = {}
            for name, module in (modules or {}).items():
                _check_name(name)
                base = delta_of.get(name)
                if isinstance(base, Artifact):
                    base = (base, name)
                if isinstance(base, tuple):
                    base = base[0].origin(base[1])
                    bases[base[0].id] = base[0]
                file = f"{name}.safetensors"
                before = _base_state(name, base, modules or {}, delta_of)
                state = _state(module, dtype.get(name), before, (rank or {}).get(name))
                (new / file).write_bytes(safetensors.torch.save(state))
                entries[name] = {
                    **_spec(name, module),
                    "file": file,
                    "dtype": dtype.get(name),
                    "delta_of": base and dict(zip(("id", "module"), _base_name(base), strict=True)),
                }
            for name, source in media.items():
                _check_name(name)
                (new / "media").mkdir(exist_ok=True)
                target = new / "media" / name
                target.write_bytes(source) if isinstance(source, bytes) else shutil.copyfile(source, target)
            files = {p.relative_to(new).as_posix(): sha256(p) for p in new.rglob("*") if p.is_file()}
            inherited = [licence for manifest in manifests.values() for licence in manifest["licences"]]
            manifest = {
                "format": FORMAT,
                "stage": stage,
                "modules": entries,
                "files": files,
                "parents": manifests,
                "licences": _unique([dict(licence) for licence in (*licences, *inherited)]),
                "metrics": {n: float(v) if math.isfinite(v) else None for n, v in (metrics or {}).items()},
                "step_hash": step_hash,
                "extra": dict(extra or {}),
            }
            manifest = json.loads(canonical(manifest))  # tuples become lists now, as they would when read back
            (new / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            (new / RUN).write_text(json.dumps(_run(place, bases), indent=1) + "\n")
            replace_folder(new, place)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return Artifact(path, manifest, bases)


def check_place(path: str | os.PathLike[str]) -> Path:
    """Where links lead from ``path``, which can become an artifact: there is none yet, an older one, or nothing at all.

    Raises:
        ArtifactError: when there is something else.
        UserError: for a link that points to nothing.
    """
    place = destination(path)
    with os_errors(path):
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return place
    manifest = read_json(place / MANIFEST, MOST_DEPTH)
    if manifest is None or "format" not in manifest or "stage" not in manifest:
        raise ArtifactError(f"{path} exists and is not an artifact: it is not replaced")
    return place


def load(path: str | os.PathLike[str], base: Artifact | None = None) -> Artifact:
    """Open and verify an artifact folder, or the one in ``path/artifact``.

    Args:
        path: relative paths are also looked for in the repository (``assets/prior``).
        base: completes delta modules; without it, the place where the base was when this artifact was written
            is tried. Either way its id must be the recorded one.

    Raises:
        ArtifactError: when it is missing, damaged, of another format, or names files it must not name.
    """
    return _load(resolve(path), base, 0)


def _load(path: Path, base: Artifact | None, depth: int) -> Artifact:
    if not (path / MANIFEST).exists() and (path / "artifact" / MANIFEST).exists():
        path = path / "artifact"
    manifest = _verified(path)
    return Artifact(path, manifest, _find_bases(path, manifest, base, depth))


def _verified(path: Path) -> dict[str, Any]:
    """The manifest of an artifact whose files are those that it names."""
    manifest = read_manifest(path)
    for name, digest in manifest["files"].items():
        file = _safe_file(path, name)
        with os_errors(file, "read"):
            if sha256(file) != digest:
                raise ArtifactError(f"{file} is damaged: its SHA-256 is not the one in the manifest")
    return manifest


def strictest(licences: Sequence[Mapping[str, str]]) -> str:
    """The licence of ``licences`` that allows least; one that is not known counts as the strictest."""
    ranks = (
        r"nc|non ?commercial|nvidia|research",
        r"[al]?gpl(v?\d)?|share ?alike|sa",
        r"cc by|mit|[\w]*bsd|apache|cc0|public domain|unlicense",
    )

    def rank(licence: str) -> int:
        words = " ".join(re.findall(r"[a-z0-9]+", licence.lower()))
        return next((i + 1 for i, found in enumerate(ranks) if re.search(rf"\b({found})\b", words)), 0)

    return min((entry["licence"] for entry in licences), key=rank, default="Apache-2.0")


def _base_name(base: tuple[Artifact, str] | str) -> tuple[str | None, str]:
    return (None, base) if isinstance(base, str) else (base[0].id, base[1])


def _base_state(
    name: str, base: tuple[Artifact, str] | str | None, modules: Mapping[str, nn.Module], delta_of: Mapping[str, Any]
) -> dict[str, Tensor] | None:
    """The tensors that the delta module ``name`` is compared with, ``None`` when it is no delta."""
    if base is None:
        return None
    if isinstance(base, tuple):
        return base[0].module(base[1]).state_dict()
    if base not in modules or isinstance(delta_of.get(base), str):
        raise ArtifactError(f"module {name!r} is a delta of {base!r}, which is not a whole module saved beside it")
    return modules[base].state_dict()


def _state(
    module: nn.Module, dtype: str | None, before: Mapping[str, Tensor] | None, rank: int | None
) -> dict[str, Tensor]:
    if dtype not in (None, "float16", "bfloat16"):
        raise ArtifactError(f"modules are stored as they are, or as float16 or bfloat16, not as {dtype}")
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    if before is not None:
        if before.keys() != state.keys():
            raise ArtifactError("the base of a delta has other tensors: it cannot be stored")
        before = {name: tensor.detach().cpu() for name, tensor in before.items()}
        state = {n: t for n, t in state.items() if t.shape != before[n].shape or not torch.equal(t, before[n])}
        if rank is not None:
            for name, tensor in list(state.items()):
                if tensor.shape == before[name].shape and (found := factors(before[name], tensor, rank)) is not None:
                    del state[name]
                    state[name + LEFT], state[name + RIGHT] = found
    if dtype is not None:
        state = {n: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for n, t in state.items()}
    # Cloned: tensors that share memory (tied weights) are refused by safetensors.
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def _spec(name: str, module: nn.Module) -> dict[str, Any]:
    try:
        return spec(module)
    except TypeError as error:
        raise ArtifactError(f"module {name!r} cannot be stored: {error}") from error


def _check_kinds(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Refuse what loading would turn into other numbers without a word, and what computes to nothing."""
    for name, tensor in stored.items():
        if name in own and own[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name} is stored as {tensor.dtype}, the network has {own[name].dtype}")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with open(file, "rb") as start:
            if int.from_bytes(start.read(8), "little") > _MOST_HEADER:
                raise ArtifactError(f"{file} cannot be read: it names more tensors than any network has")
        return safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {one_line(error)}") from error


def _find_bases(path: Path, manifest: dict[str, Any], base: Artifact | None, depth: int) -> dict[str, Artifact]:
    wanted = {e["delta_of"]["id"] for e in manifest["modules"].values() if e["delta_of"] is not None} - {None}
    found = {base.id: base} if base is not None else {}
    if wanted and base is not None and base.id not in wanted:
        raise ArtifactError(f"{base.path} is not the base of {path}: its id is {base.id[:12]}")
    if wanted - found.keys() and depth >= _MOST_BASES:
        raise ArtifactError(f"{path} is completed by a chain of more than {_MOST_BASES} artifacts")
    places = (read_json(path / RUN) or {}).get("bases")  # a convenience, not part of the artifact
    for identity in sorted(wanted - found.keys()):
        noted = [path / str(places[identity])] if isinstance(places, dict) and places.get(identity) else []
        # Where it was, beside this one, or among those that are shipped.
        own = path.resolve()
        run = own.parent if own.name == "artifact" else own
        damaged: UserError | None = None
        for place in (*noted, *_around(run.parent), *_around(ROOT / "assets")):
            if not _has_id(place, identity) or place.resolve() == own:
                continue
            try:
                manifest = _verified(place)
            except UserError as error:  # there may be a whole copy
                damaged = error
                continue
            found[identity] = Artifact(place, manifest, _find_bases(place, manifest, None, depth + 1))
            break
        else:
            if damaged is not None:
                raise damaged
    return found


def _around(folder: Path) -> Iterator[Path]:
    """Where artifacts may lie in a folder of runs."""
    with suppress(OSError):  # not there, or not ours to read
        for entry in sorted(folder.iterdir()):
            yield from (entry, entry / "artifact")


def _has_id(place: Path, identity: str) -> bool:
    """Known by its manifest alone: what is loaded then cannot come back to where we are."""
    try:
        return manifest_id(read_manifest(place)) == identity
    except (OSError, ValueError):  # names that no file can have, and what is no manifest
        return False


def _check_name(name: str) -> None:
    if not is_plain(name):
        raise ArtifactError(f"{shown(name)} cannot name a file of an artifact: use letters, digits, '_', '-' and '.'")


def _safe_file(path: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if "\\" in name or name.startswith("/") or not parts or not all(map(is_plain, parts)):
        raise ArtifactError(f"{path}: the manifest names {shown(name)}, which is not a plain name inside the artifact")
    file = path.joinpath(*parts)
    if any(p.is_symlink() for p in (file, *file.parents[: len(parts) - 1])):
        raise ArtifactError(f"{file} is a link, which an artifact must not hold")
    if not file.is_file():
        raise ArtifactError(f"{file} is missing")
    return file


def _unique(entries: list[dict[str, str]]) -> list[dict[str, str]]:
    return [entry for i, entry in enumerate(entries) if entry not in entries[:i]]


def _run(path: Path, bases: Mapping[str, Artifact]) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bases": {i: os.path.relpath(base.path.resolve(), path) for i, base in bases.items()},
    }
