"""Portrait photographs with camera labels, from a folder or a zip in the layout of FFHQ and EG3D."""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from datamodules.framing import frame
from datamodules.labels import LABELS, camera_labels
from datamodules.resumable import SplitDataModule
from models.camera import Camera
from models.documents import MOST_JSON_BYTES, parse_json
from models.errors import UserError, one_line
from models.faces.recipes import RECIPES
from models.files import os_errors, read_bytes, resolve
from models.image import IMAGE_SUFFIXES, MAX_BYTES, decode_image, pictures_among, say_left_out
from models.names import COMMON_SUFFIXES, item_id

Portrait = dict[str, Any]
_STEP = 1 << 6  # bytes of a member that are unpacked at once where the method sets no bound: they may become millions
# What zipfile raises on a wrong checksum, damaged data, encryption, unknown compression, and numbers that cannot be.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, OSError, ValueError),
    OverflowError,
)


class ImageArchive:
    """The files below a folder, or in a zip, which is never unpacked.

    Each process opens the zip for itself: an archive may be sent to, or inherited by, loader workers.

    Args:
        path: a folder or a zip file.

    Raises:
        UserError: when it is neither, or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = resolve(path)
        if not self.path.exists():
            raise UserError(f"portraits {path}: there is no such folder or zip")
        self.is_zip = self.path.is_file()
        if not self.is_zip and not self.path.is_dir():
            raise UserError(f"portraits {path}: it is neither a folder nor a zip")
        self._opened: tuple[int, zipfile.ZipFile] | None = None  # by which process
        if self.is_zip:
            self._zip()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def names(self) -> list[str]:
        """All files, sorted, as paths with slashes."""
        if self.is_zip:
            names = [name for name in self._zip().namelist() if not name.endswith("/")]
        else:
            with os_errors(self.path, "read"):
                names = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        return sorted(names)

    def read(self, name: str, most: int = MAX_BYTES) -> bytes:
        """A file's content, of at most ``most`` bytes.

        Raises:
            UserError: when it is not there, damaged or larger.
        """
        if not self.is_zip:
            return read_bytes(self.path / name, most)
        try:
            info = self._zip().getinfo(name)
            if info.file_size > most:
                raise UserError(f"{self.path}: member {name} is larger than {most >> 20} MB")
            with self._zip().open(info) as member:
                if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    return member.read(info.file_size + 1)  # no more is unpacked, whatever there is
                member.MIN_READ_SIZE = _STEP  # type: ignore[attr-defined]
                return b"".join(iter(lambda: member.read(_STEP), b""))
        except KeyError:
            raise UserError(f"{self.path} has no member {name}") from None
        except _DAMAGE as error:
            raise UserError(f"{self.path}: member {name} is damaged or cannot be read: {one_line(error)}") from error

    def _zip(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            except _DAMAGE as error:
                raise UserError(f"{self.path} is not a zip file that can be read: {one_line(error)}") from error
        return self._opened[1]


class PortraitImages(Dataset[Portrait]):
    """Pictures of an archive, each with its camera.

    An item: image (1, 3, size, size) in [-1, 1], label (1, 25) where there are labels, name. The dimension of one
    stands for the views of a subject, as in :class:`datamodules.mannequins.MannequinImages`.

    Args:
        archive: where the pictures are.
        names: of those to take, in this order.
        labels: (25,) by name; None for pictures alone.
        size: pictures are resized to it, pixels.
        mirror: append the same pictures mirrored, seen by mirrored cameras.
    """

    def __init__(
        self,
        archive: ImageArchive,
        names: Sequence[str],
        labels: dict[str, Tensor] | None,
        size: int,
        mirror: bool = False,
    ) -> None:
        self.archive, self.names, self.labels, self.size, self.mirror = archive, list(names), labels, size, mirror

    def __len__(self) -> int:
        return len(self.names) * (2 if self.mirror else 1)

    def __getitem__(self, index: int) -> Portrait:
        """Item ``index``.

        Raises:
            UserError: when the picture is damaged or not square.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"portrait {index} of {len(self)}")
        mirrored, row = divmod(index, len(self.names))
        name = self.names[row]
        where = f"{self.archive.path}/{name}"
        image = decode_image(self.archive.read(name), where)
        height, width = image.shape[-2:]
        if height != width:
            raise UserError(f"image {where} is {width} x {height}: portraits must be square, as their cameras are")
        image = frame(image, self.size, (0, 0, width, height))[None]
        item: Portrait = {"image": image.flip(-1) if mirrored else image, "name": name}
        if self.labels is not None:
            label = self.labels[name][None]
            item["label"] = Camera.from_label(label).mirror().label() if mirrored else label
        return item


def ids_of(names: Sequence[str]) -> list[str]:
    """An id of each file by its name.

    Raises:
        UserError: when two have the same.
    """
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(item_id(name), name)) != name:
            raise UserError(f"{other} and {name} have the same id {item_id(name)!r}: rename one of the files")
    return list(found)


class PortraitDataModule(SplitDataModule):
    """Portraits in a folder or a zip beside ``dataset.json``: {"labels": [[name, [25 floats]], ...]}.

    Without ``val_path`` or ``test_path`` the last pictures by name are held out: the test split at the end, the
    validation split before it.

    Args:
        path: a folder, searched with all its sub-folders, or a zip.
        val_path, test_path: of these splits where they are separate, in the same layout.
        val_fraction, test_fraction: held out of ``path`` where there is no path of their own.
        size: of the pictures, pixels.
        batch_size: pictures per batch.
        mirror: show each training picture mirrored as well.
        labels: false reads pictures alone, for 2D generators.
        workers: loader processes.
        seed: of the order of the training pictures.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        test_path: str | None = None,
        val_fraction: float = 0.02,
        test_fraction: float = 0.02,
        size: int = 256,
        batch_size: int = 4,
        mirror: bool = True,
        labels: bool = True,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
            raise UserError("val_fraction and test_fraction must not be negative and leave something to train on")
        if size < 1 or batch_size < 1:
            raise UserError("size and batch_size must be at least 1")
        self.paths = {"train": path, "val": val_path, "test": test_path}
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.size, self.mirror, self.labels = size, mirror, labels
        self.recipe: str | None = None
        """How the pictures were framed, where ``galatea align`` says so beside their cameras; of the last path read."""

    def setup(self, stage: str | None = None) -> None:
        """List the pictures and read all labels; pictures are read when they are asked for.

        Raises:
            UserError: when pictures and labels do not match, or a split is empty.
        """
        if not self.datasets:
            self._split()
        needed = {"fit": "train", "validate": "val"}.get(stage or "fit", "test")
        if not self.datasets[needed]:
            raise UserError(
                f"{self.paths['train']} has too few pictures for a {needed} split: raise its fraction, lower the "
                "others, or give it a path of its own"
            )
        if stage == "predict":  # each becomes a head of its own
            ids_of(self.datasets[needed].names)

    def _split(self) -> None:
        shared = self._open(self.paths["train"])
        names = shared.names
        held = {s: round(f * len(names)) for s, f in self.fractions.items() if self.paths[s] is None}
        end = len(names)
        for split in ("test", "val"):
            if (path := self.paths[split]) is not None:
                self.datasets[split] = self._open(path)
            else:
                chosen = names[end - held[split] : end]
                end -= held[split]
                self.datasets[split] = PortraitImages(shared.archive, chosen, shared.labels, self.size)
        self.datasets["train"] = PortraitImages(shared.archive, names[:end], shared.labels, self.size, self.mirror)

    def _open(self, path: str | None) -> PortraitImages:
        """All pictures of a path, with their labels."""
        archive = ImageArchive(str(path))
        files = archive.names()
        images = pictures_among(files, archive.path)
        if not images:
            raise UserError(f"no images found in {archive.path} ({', '.join(sorted(IMAGE_SUFFIXES))})")
        if not self.labels:
            return PortraitImages(archive, images, None, self.size)
        file = f"{archive.path}/{LABELS}"
        if LABELS not in files:
            raise UserError(f"there is no {file}: cameras are read from it; --data.labels false takes pictures alone")
        content = parse_json(archive.read(LABELS, MOST_JSON_BYTES), file)
        labels = camera_labels(content, file, set(files).__contains__)
        self.recipe = next((name for name in RECIPES if name == content.get("recipe")), None)
        unlisted = [name for name in images if name not in labels]
        # Of formats that others do not take for pictures of the set.
        beside = {name for name in unlisted if PurePosixPath(name).suffix.lower() not in COMMON_SUFFIXES}
        say_left_out(sorted(beside), archive.path, f"{LABELS} does not list them")
        images = [name for name in images if name not in beside]
        count = f"{file} has {len(labels)} labels for {len(images)} images"
        if missing := sorted(set(unlisted) - beside):
            raise UserError(f"{count}: {missing[0]} has none")
        if spare := sorted(labels.keys() - set(images)):
            raise UserError(f"{count}: {spare[0]} is not there")
        return PortraitImages(archive, images, labels, self.size)
