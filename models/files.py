"""Paths and safe writing: what a reader finds under a name is always complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from models.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # holds models/, stages/, configs/, assets/
_TEMPORARY = re.compile(r"\..+\.\d+\.(tmp|old)(\.\w+)?")  # of atomic_write and models.artifact


def resolve(path: str | os.PathLike[str]) -> Path:
    """``path`` as given where it exists, otherwise relative to the repository root (``assets/...``)."""
    given = Path(path)
    if not given.is_absolute() and not given.exists() and (ROOT / given).exists():
        return ROOT / given
    return given


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def os_errors(path: str | os.PathLike[str], action: str = "write") -> Iterator[None]:
    """Turn an ``OSError`` (disk full, no permission, not a folder, ...) into one sentence naming ``path``.

    Raises:
        UserError: in place of any ``OSError``.
    """
    try:
        yield
    except FileExistsError as error:  # mkdir's word for a file where a folder is needed
        raise UserError(f"cannot {action} {path}: Not a directory: {error.filename}") from error
    except OSError as error:
        raise UserError(f"cannot {action} {path}: {error.strerror or error}") from error


def check_folder(path: str | os.PathLike[str]) -> None:
    """Find out before any work, and without a trace, whether the folder ``path`` can be made and written in.

    Raises:
        UserError: when it cannot.
    """
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"cannot write {path}: Not a directory: {place}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: Permission denied: {place}")


def previous(path: Path) -> Path:
    """Where ``atomic_write(path, keep=True)`` leaves what ``path`` held before."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def versions(path: Path) -> list[Path]:
    """``path`` and what it held before, where they exist: should one be damaged, the next may do."""
    return [file for file in (path, previous(path)) if file.exists()]


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or in the one before it should it be damaged; ``None`` when there is none to read."""
    for file in versions(path):
        with suppress(OSError, ValueError):
            if isinstance(content := json.loads(file.read_text("utf-8")), dict):
                return content
    return None


@contextmanager
def atomic_write(path: str | os.PathLike[str], keep: bool = False) -> Iterator[Path]:
    """A temporary path in the folder of ``path`` that takes its place when the block ends without error.

    The suffix is kept, for writers that choose a format by it. The folder is created when missing. With ``keep`` what
    ``path`` held before stays beside it; between the two renames only that is there: read :func:`versions`.

    Raises:
        UserError: when the file cannot be written; whatever ``path`` held before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if keep and path.exists():
                os.replace(path, previous(path))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is, by its name, something half-written."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes left half-written below ``folder``; none may be writing there.

    Raises:
        UserError: when something cannot be removed.
    """
    with os_errors(folder, "clean"):
        for path in sorted(Path(folder).rglob(".*")):
            if is_temporary(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
