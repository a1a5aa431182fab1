"""The NoW benchmark on disk (Sanyal et al. 2019), and reconstructions laid out for it: what :mod:`models.metrics.now`
measures, and what stages do that invert its pictures themselves.

The data set is a folder with::

    imagepathsvalidation.txt              one picture a line: ROOT/SUBJECT/CHALLENGE/NAME.jpg
    scans/SUBJECT/*.obj                   one scan a subject, in millimetres
    scans_lmks_onlypp/SUBJECT/*.pp        its seven keypoints, as MeshLab's point picker writes them

and a method's reconstructions are a folder with::

    SUBJECT/CHALLENGE/NAME.obj (or .ply)  the surface
    SUBJECT/CHALLENGE/NAME.npy (or .txt)  its seven keypoints: (7, 3), in the order of models.metrics.scan.KEYPOINTS
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.portraits import PortraitDataModule
from models.errors import UserError, one_line, shown
from models.files import os_errors, read_bytes
from models.metrics.now import NoWPicture, Pair, Reconstruction
from models.metrics.scan import KEYPOINTS, Scan
from models.names import is_plain, item_id

IMAGES = "imagepathsvalidation.txt"
_MOST_BYTES = 1 << 30  # of a scan, which takes some ten million
_MOST_LIST_BYTES = 1 << 24
_MOST_INDEX = 1 << 31  # of a vertex
_POINT = re.compile(r"<point\b([^>]*)>")  # of MeshLab's picked points
_PLACE = re.compile(r"""\b([xyz])\s*=\s*["']([^"']*)["']""")


class NoWDataModule(PortraitDataModule):
    """NoW's pictures, framed for a generator, with their subjects' scans, which test measures reconstructions by.

    Args:
        scans: folder of the data set, see above.
        images: the list of pictures in it.
        options: of :class:`PortraitDataModule`; the pictures of its test split are those of ``galatea align``, whose
            names are ids of SUBJECT/CHALLENGE/NAME.jpg, or files that end so.
    """

    def __init__(self, scans: str, images: str = IMAGES, **options: Any) -> None:
        super().__init__(**options)
        self.scans = NoWScans(scans, images)
        listed = self.scans.pictures
        self._subjects = {p.item: p.subject for p in listed} | {item_id(f"{p.item}.jpg"): p.subject for p in listed}

    def scan_truth(self, sample: dict[str, Any]) -> Scan:
        """The scan of who is shown, millimetres.

        Raises:
            UserError: when the picture is none of the data set, or its scan cannot be read.
        """
        path = PurePosixPath(sample["name"])
        for name in ("/".join(path.with_suffix("").parts[-3:]), path.stem):
            if name in self._subjects:
                return self.scans.scan(self._subjects[name])
        raise UserError(
            f"{sample['name']} is no picture of {self.scans.path}: its list names SUBJECT/CHALLENGE/PICTURE"
        )


class NoWScans:
    """The scans of a NoW data set, read as they are asked for.

    Args:
        path: of the data set.
        images: the list of pictures, below it.

    Raises:
        UserError: when the folder or its list is missing, or a line of it is no path of a picture.
    """

    def __init__(self, path: str, images: str = IMAGES) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"NoW {path}: there is no such folder")
        text = _text(self.path / images, _MOST_LIST_BYTES)
        self.pictures = [_listed(line, f"{self.path / images}, line {n}") for n, line in _lines(text)]
        if not self.pictures:
            raise UserError(f"{self.path / images} lists no pictures")
        self._read: tuple[str, Scan] | None = None  # the last one: pictures of a subject follow each other

    def scan(self, subject: str) -> Scan:
        """The scan of a subject, millimetres.

        Raises:
            UserError: when it is missing or damaged, or there are several.
        """
        if self._read is None or self._read[0] != subject:
            points, _ = read_obj(self._only("scans", subject, "*.obj"), faces=False)
            keypoints = read_picked_points(self._only("scans_lmks_onlypp", subject, "*.pp"))
            self._read = subject, Scan(points, keypoints)
        return self._read[1]

    def _only(self, folder: str, subject: str, pattern: str) -> Path:
        """The one file of a subject."""
        place = self.path / folder / subject
        found = sorted(place.glob(pattern))
        if len(found) != 1:
            count = "no file" if not found else f"{len(found)} files"
            raise UserError(f"{place} must hold one {pattern}: it has {count}")
        return found[0]


def pairs(scans: NoWScans, predictions: str) -> Iterator[Pair]:
    """Each picture with its scan and its reconstruction, read as they are asked for: what :func:`measure` takes.

    Args:
        predictions: folder of the reconstructions.

    Raises:
        UserError: when the folder is missing, or a file in it is damaged or not alone.
    """
    root = Path(predictions)
    if not root.is_dir():
        raise UserError(f"reconstructions {predictions}: there is no such folder")
    for picture in scans.pictures:
        found = read_reconstruction(root / picture.subject / picture.challenge / picture.name)
        yield picture, None if found is None else (scans.scan(picture.subject), found)


def read_reconstruction(stem: Path) -> Reconstruction | None:
    """What is in the files ``stem``.obj or .ply and .npy or .txt.

    Returns:
        None where none of them is there.

    Raises:
        UserError: when one of the two is missing, or a file is damaged.
    """
    surface, points = (
        next((path for path in (stem.with_name(stem.name + suffix) for suffix in suffixes) if path.exists()), None)
        for suffixes in ((".obj", ".ply"), (".npy", ".txt"))
    )
    if surface is None and points is None:
        return None
    if surface is None or points is None:
        missing = "surface (.obj or .ply)" if surface is None else "keypoints (.npy or .txt)"
        raise UserError(f"{stem} has no {missing}")
    vertices, faces = read_obj(surface) if surface.suffix == ".obj" else read_ply(surface)
    return Reconstruction(vertices, faces, read_keypoints(points))


def read_obj(path: Path, faces: bool = True) -> tuple[Tensor, Tensor]:
    """Vertices (V, 3) float64 and triangles (F, 3) of a Wavefront file; polygons are cut into fans.

    Colours behind vertices, textures and normals are passed over.

    Args:
        faces: whether triangles are read.

    Raises:
        UserError: when it cannot be read, or holds no vertices, or something that is no number or no vertex.
    """
    points: list[list[float]] = []
    corners: list[tuple[int, int, int]] = []
    for number, line in _lines(_text(path, _MOST_BYTES)):
        kind, *values = line.split()
        try:
            if kind == "v":
                x, y, z = map(float, values[:3])
                points.append([x, y, z])
            elif kind == "f" and faces:
                index = [int(value.partition("/")[0]) for value in values]
                if len(index) < 3 or not all(0 < abs(i) <= _MOST_INDEX for i in index):  # vertices count from 1
                    raise ValueError
                index = [i - 1 if i > 0 else len(points) + i for i in index]  # negative: from the end
                if min(index) < 0:
                    raise ValueError
                corners += [(index[0], b, c) for b, c in pairwise(index[1:])]
        except ValueError:
            raise UserError(f"{path}, line {number}: {shown(line)} is no vertex or face") from None
    return _checked(torch.tensor(points, dtype=torch.float64), torch.tensor(corners, dtype=torch.int64), path, faces)


def read_ply(path: Path) -> tuple[Tensor, Tensor]:
    """As :func:`read_obj`, of a PLY file.

    Raises:
        UserError: when it cannot be read.
    """
    import trimesh  # here: slow to import

    content = read_bytes(path, _MOST_BYTES)
    try:
        mesh = trimesh.load(io.BytesIO(content), file_type="ply", process=False)
        vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)  # type: ignore[union-attr]
    except Exception as error:  # the reader fails in many ways
        raise UserError(f"{path} is not a PLY file with triangles: {one_line(error)}") from error
    return _checked(torch.from_numpy(vertices.astype(np.float64)), torch.from_numpy(faces.astype(np.int64)), path, True)


def read_keypoints(path: Path) -> Tensor:
    """(7, 3) float64 of a NumPy file, or of a text file with a point a line.

    Raises:
        UserError: when it cannot be read, or holds something else.
    """
    content = read_bytes(path, _MOST_LIST_BYTES)
    try:
        if path.suffix == ".npy":
            array: Any = np.load(io.BytesIO(content), allow_pickle=False)
            if array.dtype.kind not in "fiu":
                raise ValueError(f"its values are {array.dtype}")
        else:
            array = np.array([line.replace(",", " ").split() for _, line in _lines(content.decode())], dtype=np.float64)
        found = torch.from_numpy(array.astype(np.float64))
    except Exception as error:  # of any kind, as of a file that is something else by another name
        raise UserError(f"{path} holds no points: {one_line(error)[:160]}") from error
    return _seven(found[0] if found.ndim == 3 and len(found) == 1 else found, path)


def read_picked_points(path: Path) -> Tensor:
    """(7, 3) float64 of a file that MeshLab's point picker wrote, in its order.

    Raises:
        UserError: when it cannot be read, or holds other than seven points.
    """
    points = []
    for point in _POINT.findall(_text(path, _MOST_LIST_BYTES)):
        place = dict(_PLACE.findall(point))
        try:
            points.append([float(place[axis]) for axis in "xyz"])
        except (KeyError, ValueError):
            raise UserError(f"{path}: a picked point has no place: {shown(point)}") from None
    return _seven(torch.tensor(points, dtype=torch.float64), path)


def _seven(points: Tensor, path: Path) -> Tensor:
    if points.shape != (len(KEYPOINTS), 3) or not bool(points.isfinite().all()):
        shape = " x ".join(map(str, points.shape)) if points.numel() else "no"
        raise UserError(f"{path} must hold {len(KEYPOINTS)} points of three finite numbers: it has {shape}")
    return points


def _checked(vertices: Tensor, faces: Tensor, path: Path, triangles: bool) -> tuple[Tensor, Tensor]:
    if not vertices.numel():
        raise UserError(f"{path} holds no vertices")
    if not bool(vertices.isfinite().all()):
        raise UserError(f"{path} has vertices that are not finite numbers")
    if triangles and not faces.numel():
        raise UserError(f"{path} holds no triangles")
    wrong = faces[(faces < 0) | (faces >= len(vertices))]
    if wrong.numel():
        raise UserError(f"{path} has {len(vertices)} vertices and a triangle with vertex {int(wrong[0]) + 1}")
    return vertices, faces.reshape(-1, 3)


def _listed(line: str, where: str) -> NoWPicture:
    """A line of the list of pictures, whose names become paths."""
    parts = PurePosixPath(line.strip()).parts
    if len(parts) < 3 or not all(map(is_plain, parts[-3:])) or not PurePosixPath(parts[-1]).suffix:
        raise UserError(f"{where}: {shown(line)} is no SUBJECT/CHALLENGE/PICTURE")
    return NoWPicture(parts[-3], parts[-2], PurePosixPath(parts[-1]).stem)


def _text(path: Path, most: int) -> str:
    with os_errors(path, "read"):
        return read_bytes(path, most).decode("utf-8-sig", errors="replace")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are neither empty nor comments, with their numbers."""
    for number, line in enumerate(text.splitlines(), 1):
        if (line := line.strip()) and not line.startswith("#"):
            yield number, line
