"""The manifest of an artifact: plain JSON, read and checked without torch. See :mod:`models.artifact`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import UserError, one_line

FORMAT = 1
MANIFEST = "manifest.json"
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
        manifest = json.loads(file.read_text("utf-8"), parse_constant=_refuse_constant)
        _check_manifest(manifest)
    except (ValueError, RecursionError, OSError) as error:
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
        raise ValueError(f"its format is {manifest.get('format')!r}, this version reads {FORMAT}")
    if manifest.keys() != _KEYS:
        raise ValueError(f"its keys differ: {', '.join(sorted(manifest.keys() ^ _KEYS))}")
    for key in ("modules", "files", "parents", "metrics", "extra"):
        if not isinstance(manifest[key], dict):
            raise ValueError(f"{key} is not an object")
    for name, digest in manifest["files"].items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"the hash of {name} is not a SHA-256")
    for name, entry in manifest["modules"].items():
        keys = {"class_path", "init_args", "file", "dtype", "delta_of"}
        if not isinstance(entry, dict) or entry.keys() != keys or not isinstance(entry["init_args"], dict):
            raise ValueError(f"module {name} does not have exactly: {', '.join(sorted(keys))}")
        if entry["file"] not in manifest["files"]:
            raise ValueError(f"the file of module {name} has no hash")
        delta = entry["delta_of"]
        if delta is not None and not (isinstance(delta, dict) and delta.keys() == {"id", "module"}):
            raise ValueError(f"delta_of of module {name} does not have exactly: id, module")
        if delta is not None and delta["id"] is None:
            base = manifest["modules"].get(delta["module"])
            if not isinstance(base, dict) or base.get("delta_of") is not None:
                raise ValueError(f"module {name} is a delta of {delta['module']!r}, which is not a whole module here")
    licences = manifest["licences"]
    if not isinstance(licences, list) or not all(isinstance(e, dict) and "licence" in e for e in licences):
        raise ValueError("licences is not a list of objects that name a licence")
    for parent in manifest["parents"].values():
        _check_manifest(parent)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
