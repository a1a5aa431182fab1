"""Files inside wheels and npm's tarballs, read without unpacking them; nothing in them is run."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

from models.errors import one_line
from models.files import os_errors
from models.zoo.family import ZooError

_MOST_BYTES = 1 << 24  # of a file inside
_MOST_ALL = 1 << 29  # of a tarball unpacked
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError, RuntimeError, OSError)


def members(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Content of those files inside a package that are named so, of at most 16 MB each.

    Raises:
        ZooError: when it is neither a zip nor a gzipped tarball, or is damaged.
        UserError: when it cannot be opened.
    """
    with os_errors(path, "read"):
        if not path.is_file():
            raise ZooError(f"{path} is {'no file' if path.exists() else 'not there'}")
        with open(path, "rb") as stream:
            start = stream.read(4)
    try:
        if start == b"PK\x03\x04":
            return _of_zip(path, names)
        if start.startswith(b"\x1f\x8b"):
            return _of_tarball(path, names)
    except _DAMAGE as error:
        raise ZooError(f"{path} is damaged or cut short: {one_line(error)[:120]}") from error
    raise ZooError(f"{path} is neither a wheel nor a package of npm's")


def _of_zip(path: Path, names: Collection[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        found = [entry for entry in archive.infolist() if entry.filename in names]
        for entry in found:
            _check_size(path, entry.filename, entry.file_size)
        return {entry.filename: archive.read(entry) for entry in found}


def _of_tarball(path: Path, names: Collection[str]) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path, "r|gz") as archive:
        for entry in archive:
            if entry.offset_data + entry.size > _MOST_ALL:
                raise ZooError(f"{path} unpacks to more than {_MOST_ALL >> 20} MB")
            if entry.name in names and entry.isfile():
                _check_size(path, entry.name, entry.size)
                content = archive.extractfile(entry)
                assert content is not None  # it is a file
                found[entry.name] = content.read()
    return found


def _check_size(path: Path, name: str, size: int) -> None:
    if size > _MOST_BYTES:
        raise ZooError(f"{path}: {name} is larger than {_MOST_BYTES >> 20} MB")
