"""The manifest of an artifact: plain JSON, read and checked without torch. See :mod:`models.artifact`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.documents import parse_json
from models.errors import UserError, one_line, shown
from models.files import read_bytes

FORMAT = 1
MANIFEST = "manifest.json"
_MOST_BYTES = 1 << 25  # with the manifests of all ancestors
MOST_DEPTH = 400  # of ancestors that are each made of one before, and then of arguments
_KEYS = {"format", "stage", "modules", "files", "parents", "licences", "metrics", "step_hash", "extra"}


class ArtifactError(UserError, ValueError):
    """An artifact that cannot be written, or must not be trusted."""


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of the artifact folder ``path``, checked for form; files are not verified.

    Raises:
        ArtifactError: when it is missing or not a manifest of this format.
    """
    file = Path(path) / MANIFEST
    if not file.exists():
        raise ArtifactError(f"there is no artifact in {path} ({MANIFEST} is missing)")
    if file.is_symlink():
        raise ArtifactError(f"{file} is a link, which an artifact must not hold")
    try:
        content = read_bytes(file, _MOST_BYTES)
        manifest = parse_json(content, "it", constants=False, deepest=MOST_DEPTH)
        _check_manifest(manifest)
    except (ValueError, RecursionError, UserError) as error:
        raise ArtifactError(f"{file} is not a manifest: {one_line(error)}") from error
    return manifest


def manifest_id(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical manifest."""
    return hashlib.sha256(canonical(manifest)).hexdigest()


def canonical(manifest: Mapping[str, Any]) -> bytes:
    """The bytes that :func:`manifest_id` hashes.

    Raises:
        ArtifactError: when the manifest cannot be JSON.
    """
    try:
        return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the manifest cannot be written as JSON: {one_line(error)}") from error


def _check_manifest(manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise ValueError("it is not a JSON object")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {shown(manifest.get('format'))}, this version reads {FORMAT}")
    if manifest.keys() != _KEYS:
        raise ValueError(f"its keys differ: {one_line(', '.join(sorted(manifest.keys() ^ _KEYS)))[:200]}")
    for key in ("modules", "files", "parents", "metrics", "extra"):
        if not isinstance(manifest[key], dict):
            raise ValueError(f"{key} is not an object")
    if not isinstance(manifest["stage"], str) or not isinstance(manifest["step_hash"], str | None):
        raise ValueError("stage and step_hash are not texts")
    for name, digest in manifest["files"].items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"the hash of {shown(name)} is not a SHA-256")
    for name, value in manifest["metrics"].items():
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value)):
            raise ValueError(f"the metric {shown(name)} is {shown(value)}, which is no number")
    for name, entry in manifest["modules"].items():
        _check_module(name, entry, manifest)
    licences = manifest["licences"]
    texts = isinstance(licences, list) and all(
        isinstance(entry, dict) and "licence" in entry and all(isinstance(text, str) for text in entry.values())
        for entry in licences
    )
    if not texts:
        raise ValueError("licences is not a list of objects of texts that name a licence")
    for parent in manifest["parents"].values():
        _check_manifest(parent)


def _check_module(name: str, entry: Any, manifest: Mapping[str, Any]) -> None:
    keys = {"class_path", "init_args", "file", "dtype", "delta_of"}
    if not isinstance(entry, dict) or entry.keys() != keys or not isinstance(entry["init_args"], dict):
        raise ValueError(f"module {one_line(name)[:80]} does not have exactly: {', '.join(sorted(keys))}")
    if not isinstance(entry["file"], str) or entry["file"] not in manifest["files"]:
        raise ValueError(f"the file of module {one_line(name)[:80]} has no hash")
    delta = entry["delta_of"]
    if delta is None:
        return
    if not (isinstance(delta, dict) and delta.keys() == {"id", "module"} and isinstance(delta["module"], str)):
        raise ValueError(f"delta_of of module {one_line(name)[:80]} does not have exactly: id, module")
    if not isinstance(delta["id"], str | None):
        raise ValueError(f"delta_of of module {one_line(name)[:80]} names {shown(delta['id'])}, which is no id")
    if delta["id"] is None:
        base = manifest["modules"].get(delta["module"])
        further = base.get("delta_of") if isinstance(base, dict) else None
        # A module that another artifact completes will do; one that goes on here could lead in a circle.
        if not isinstance(base, dict) or (isinstance(further, dict) and further.get("id") is None):
            raise ValueError(
                f"module {one_line(name)[:80]} is a delta of {shown(delta['module'])}, which is not a whole module here"
            )
