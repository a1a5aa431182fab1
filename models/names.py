"""Names that become names of files: what they may be, and how one is made of any name of a picture.

A name out of a file is never joined to a path before :func:`is_plain` has said yes.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

MOST_ID_BYTES = 128  # in UTF-8, of an id: file systems take 255 bytes, and names are made of ids
_MOST_BYTES = 200
_HASH_LETTERS = 8
COMMON_SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())
"""Of pictures as they are mostly kept: see :func:`models.image.pictures_among`."""
IMAGE_SUFFIXES = COMMON_SUFFIXES | frozenset(
    ".apng .avif .avifs .dib .icb .j2c .j2k .jfif .jp2 .jpc .jpe .jpf .jpx .mpo .pbm .pcx .pgm .pnm .ppm .psd .qoi "
    ".ras .sgi .tga .vda .vst".split()
)
"""Of the files in a folder that are read as pictures, see :mod:`models.image`."""


def is_plain(name: object, most: int = _MOST_BYTES) -> bool:
    """Whether ``name`` is a file's name on every system, and nothing but one.

    Letters, marks and digits of any script, "_", "-" and ".", of which only letters and digits come first; in composed
    form (NFC), of at most ``most`` bytes: no separators, nothing hidden, no "..", no control or invisible characters.
    """
    return (
        isinstance(name, str)
        and name[:1].isalnum()
        and all(map(_is_kept, name))
        and unicodedata.is_normalized("NFC", name)
        and len(name.encode()) <= most
    )


def is_id(name: object) -> bool:
    """Whether ``name`` can be the id of an item, of which names of files are made."""
    return is_plain(name, MOST_ID_BYTES)


def item_id(file: str) -> str:
    """The id of a picture, from the name of its file without the suffix, as :func:`is_id` wants it.

    Letters of every script stay; anything else becomes "_". Where that, or cutting a long name, loses something, some
    letters of a hash of the whole name are added, so that different names stay apart. Both of Unicode's spellings of a
    letter are one name.

    >>> item_id("ann.png"), item_id("sub/ann.jpg")
    ('ann', 'sub_ann-e2dd576a')
    """
    stem = unicodedata.normalize("NFC", PurePosixPath(file).with_suffix("").as_posix())
    kept = "".join(c if _is_kept(c) else "_" for c in stem)
    kept = re.sub(r"^[\W_]+", "", kept)
    if kept == stem and len(kept.encode()) <= MOST_ID_BYTES:
        return kept
    digest = hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:_HASH_LETTERS]
    room = MOST_ID_BYTES - len(digest) - 1
    kept = kept.encode()[:room].decode(errors="ignore").rstrip("_.-")
    # Cutting may have parted a letter from its mark.
    return f"{unicodedata.normalize('NFC', kept) or 'artwork'}-{digest}"


def is_member(name: object) -> bool:
    """Whether ``name``, as lists of files give it, leads to something below the folder of the list.

    Slashes part folders; "..", absolute names, drives and control characters lead elsewhere.
    """
    if not isinstance(name, str) or not name or any(unicodedata.category(c) == "Cc" for c in name):
        return False
    path = PurePosixPath(name)
    if any(len(part.encode(errors="replace")) > 255 for part in path.parts):  # no file is called so
        return False
    return not (path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or path.name in ("", "."))


def _is_kept(character: str) -> bool:
    return character in "_-." or unicodedata.category(character)[0] in "LMN"
