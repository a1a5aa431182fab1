"""Paths and safe writing: what a reader finds under a name is always complete."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from models.documents import MOST_DEPTH, MOST_JSON_BYTES, parse_json
from models.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # holds models/, stages/, configs/, assets/
_TEMPORARY = re.compile(r"\..+\.\d+\.(tmp|old)(\.\w+)?")  # of temporary
_MOST_STEM_BYTES = 200  # of temporary names: file systems take 255 bytes


def resolve(path: str | os.PathLike[str]) -> Path:
    """``path`` as given where it exists, otherwise relative to the repository root (``assets/...``)."""
    given = Path(path)
    if not given.is_absolute() and not given.exists() and (ROOT / given).exists():
        return ROOT / given
    return given


def cache_root() -> Path:
    """Where caches live: $GALATEA_CACHE, or ~/.cache/galatea."""
    return Path(os.environ.get("GALATEA_CACHE") or Path.home() / ".cache" / "galatea")


def read_bytes(path: Path, most: int) -> bytes:
    """Content of a file of at most ``most`` bytes.

    Raises:
        UserError: when it is larger, cannot be read, or is no file: reading a pipe or a device may never end.
    """
    with os_errors(path, "read"):
        if not path.is_file():
            raise UserError(f"cannot read {path}: {'it is no file' if path.exists() else 'there is no such file'}")
        with open(path, "rb") as file:
            content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > most:
        raise UserError(f"cannot read {path}: it is larger than {most >> 20} MB")
    return content


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(file: Path) -> bool:
    """Whether a file is a zip whose checksums hold, as torch and NumPy write their archives."""
    try:
        with zipfile.ZipFile(file) as content:
            return content.testzip() is None
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return False


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
    place = _existing(path)
    if not place.is_dir():
        raise UserError(f"cannot write {path}: Not a directory: {place}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: Permission denied: {place}")


def destination(path: str | os.PathLike[str]) -> Path:
    """Where ``path`` leads once links are followed: what is replaced there is on the links' disk, and they stay.

    Raises:
        UserError: for a link that points to nothing, as to a disk that is not there.
    """
    _existing(path)
    return Path(path).resolve()


def _existing(path: str | os.PathLike[str]) -> Path:
    """The nearest of ``path`` and the folders above it that exists."""
    with os_errors(path):
        place = Path(path).absolute()
        while not place.exists():
            if place.is_symlink():
                raise UserError(f"cannot write {path}: {place} is a link that points to nothing: {place.readlink()}")
            place = place.parent
        return place


def temporary(path: Path, ending: str = ".tmp") -> Path:
    """A name beside ``path`` for something half-written, or about to be removed: see :func:`sweep`."""
    stem = path.name
    if len(os.fsencode(stem)) > _MOST_STEM_BYTES:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()
    return path.with_name(f".{stem}.{os.getpid()}{ending}")


def replace_folder(new: Path, path: Path) -> None:
    """Let ``new`` take the place of the folder ``path``, with all that is in it; both lie in one folder, no links.

    Raises:
        OSError: when it cannot; what was there stays, or is where :func:`temporary` names it.
    """
    if not path.exists():
        os.rename(new, path)
        return
    old = temporary(path, ".old")
    os.rename(path, old)  # a folder cannot be replaced in one call: for an instant there is none
    os.rename(new, path)
    shutil.rmtree(old)


def remove_folder(path: Path) -> None:
    """Remove the folder ``path``, where there is one; of a link to one what is in it, not what links in it point to.

    At once, as others see it: killed on the way, the rest is something for :func:`sweep`.

    Raises:
        UserError: when it cannot be removed, or is a link that points to nothing.
    """
    place = destination(path)
    if place.exists():
        old = temporary(place, ".old")
        with os_errors(path, "remove"):
            os.rename(place, old)
            if path.is_symlink():
                place.mkdir()
            shutil.rmtree(old)


def previous(path: Path) -> Path:
    """Where ``atomic_write(path, keep=True)`` leaves what ``path`` held before."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def versions(path: Path) -> list[Path]:
    """``path`` and what it held before, where they exist: should one be damaged, the next may do."""
    return [file for file in (path, previous(path)) if file.exists()]


def read_json(path: Path, deepest: int = MOST_DEPTH) -> dict[str, Any] | None:
    """The object in a JSON file, or in the one before it should it be damaged; ``None`` when there is none to read."""
    for file in versions(path):
        with suppress(UserError):
            content = parse_json(read_bytes(file, MOST_JSON_BYTES), str(file), deepest=deepest)
            if isinstance(content, dict):
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
    half = temporary(path.with_suffix(""), f".tmp{path.suffix}")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield half
            if keep and path.exists():
                os.replace(path, previous(path))
            os.replace(half, path)
        finally:
            half.unlink(missing_ok=True)


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
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
