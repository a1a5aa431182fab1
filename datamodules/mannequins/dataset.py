"""Drawn samples on disk.

A cache is a folder of ``.npy`` files, memory-mapped on reading, named by a hash of everything that
determines it (:class:`CacheConfig` and the world's version). It is written to a temporary folder that is
renamed last; its manifest holds each file's size and SHA-256, so that damage is found and repaired.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.mannequins.render import RIG, render
from datamodules.mannequins.scene import (
    CODE_DIM,
    EXAGGERATIONS,
    EXPRESSIONS,
    SPLITS,
    WORLD_VERSION,
    Z_DIM,
    Scene,
    sample_expression,
    stream,
    subject_code,
    subject_z,
)
from datamodules.mannequins.styles import PLAIN, STYLES
from models.camera import LABEL_SIZE, Camera
from models.documents import MOST_BYTES, parse_json
from models.errors import UserError
from models.files import cache_root, os_errors, read_bytes

MANIFEST = "manifest.json"
# Was meant to keep a subject's views apart from its latent. It does not, as PyTorch's generators take the lower 32 bits
# of a seed, but a change would be another world.
_VIEWS_SEED = 2**40
# An angle is end * u * |u|^bend of a uniform u in [-1, 1]: denser in the middle.
YAW_DEG, YAW_BEND, PITCH_DEG, PITCH_BEND = 60, 0.35, 25, 0.5

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class CacheConfig:
    """What a cache holds.

    Attributes:
        split: one of ``SPLITS``.
        subjects: how many, numbered from ``first`` within the split.
        first: index of the first subject within its split.
        views_per_subject: pictures of each subject, each with its own pose and expression.
        size: of the pictures, pixels.
        styles: each view is drawn in one of them, at random.
        supersample: samples per pixel and axis.
        seed: of the draws of poses, expressions and styles.
        pose_step: degrees; yaw and pitch are rounded to multiples of it, so that a renderer meets the same cameras
            again and can keep what depends on the camera alone. 0 leaves them as drawn.
        coded: a subject's expression is part of its code z, the same in all its views.
        exaggerate: strengths of geometric exaggerations, by name.
        posed: poses are to be part of codes, and say nothing of who is seen: they are drawn apart from the subjects,
            whose first view otherwise follows from the numbers of their code.
    """

    split: str = "train"
    subjects: int = 256
    first: int = 0
    views_per_subject: int = 4
    size: int = 64
    styles: tuple[str, ...] = (PLAIN,)
    supersample: int = 2
    seed: int = 0
    pose_step: float = 0.0
    coded: bool = False
    exaggerate: dict[str, float] = field(default_factory=dict)
    posed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "styles", tuple(self.styles))
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}, choose from {tuple(SPLITS)}")
        if min(self.subjects, self.views_per_subject, self.size, self.supersample) < 1:
            raise ValueError(f"subjects, views_per_subject, size and supersample must be at least 1: {self}")
        if self.first < 0 or self.first + self.subjects > len(SPLITS[self.split]):
            raise ValueError(f"split {self.split} has {len(SPLITS[self.split])} subjects, asked for {self}")
        unknown = sorted(set(self.styles) - set(STYLES))
        if unknown or not self.styles:
            raise ValueError(f"unknown style {unknown}, choose from {STYLES}")
        if wrong := sorted(self.exaggerate.keys() - set(EXAGGERATIONS)):
            raise ValueError(f"unknown exaggeration {wrong[0]!r}, choose from {EXAGGERATIONS}")

    @property
    def described(self) -> dict[str, Any]:
        """All that determines the content; without what came later, caches keep the names they had."""
        found = asdict(self)
        return {name: value for name, value in found.items() if value or name not in ("exaggerate", "posed")}

    @property
    def seeds(self) -> range:
        """The subjects' seeds."""
        return SPLITS[self.split][self.first : self.first + self.subjects]

    @property
    def key(self) -> str:
        """Name of the cache folder."""
        text = json.dumps({**self.described, "world_version": WORLD_VERSION}, sort_keys=True)
        return f"{self.split}-{self.size}px-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each file; N = subjects * views, those of a subject side by side."""
        n, s = self.subjects * self.views_per_subject, self.size
        return {
            "image": ((n, 3, s, s), "uint8"),
            "depth": ((n, 1, s, s), "float16"),
            "mask": ((n, 1, s, s), "uint8"),
            "segmentation": ((n, s, s), "uint8"),
            "normals": ((n, 3, s, s), "int8"),
            "z": ((n, CODE_DIM if self.coded else Z_DIM), "float32"),
            "expression": ((n, len(EXPRESSIONS)), "float32"),
            "label": ((n, LABEL_SIZE), "float32"),
            "style": ((n,), "uint8"),
            "seed": ((n,), "int64"),
        }


def draw_views(
    seed: int,
    count: int,
    styles: tuple[str, ...] = (PLAIN,),
    salt: int = 0,
    pose_step: float = 0.0,
    posed: bool = False,
) -> tuple[Camera, Tensor, list[str]]:
    """Poses, expressions (count, E) and styles of one subject's views; more views never change the first ones.

    Yaw lies in +-60 degrees and pitch in +-25 degrees, both denser in the middle. Those of the first view follow from
    the subject's code, whose numbers are drawn from the same stream, unless they are ``posed``.
    """
    cameras, expressions, names = [], [], []
    generator = torch.Generator().manual_seed(_VIEWS_SEED + seed + 10_000_019 * salt)
    if posed:
        generator = stream("views", seed, salt)
    for _ in range(count):
        yaw, pitch, style = torch.rand(3, dtype=torch.float64, generator=generator).tolist()
        yaw, pitch = 2 * yaw - 1, 2 * pitch - 1
        yaw, pitch = yaw * abs(yaw) ** YAW_BEND, pitch * abs(pitch) ** PITCH_BEND
        yaw, pitch = YAW_DEG * yaw, PITCH_DEG * pitch
        if pose_step:
            yaw, pitch = (round(angle / pose_step) * pose_step for angle in (yaw, pitch))
        cameras.append(RIG.camera(math.radians(yaw), math.radians(pitch)))
        expressions.append(sample_expression(1, generator))
        names.append(styles[int(style * len(styles))])
    return Camera.cat(cameras), torch.cat(expressions), names


def _draw_subject(config: CacheConfig, folder: Path, compiled: bool, number: int) -> None:
    """Draw all views of the ``number``-th subject into the arrays of ``folder``."""
    torch.set_num_threads(1)
    seed, views = config.seeds[number], config.views_per_subject
    camera, expression, names = draw_views(seed, views, config.styles, config.seed, config.pose_step, config.posed)
    z = (subject_code([seed]) if config.coded else subject_z([seed])).expand(views, -1)
    scene = Scene.from_code(z) if config.coded else Scene.from_z(z, expression)
    for name, strength in config.exaggerate.items():
        scene = scene.exaggerate(name, strength)
    truth = render(scene, camera, config.size, names, config.supersample, compiled)
    values = {
        "image": ((truth.image + 1) * 127.5).round(),
        "depth": truth.depth,
        "mask": (truth.mask * 255).round(),
        "segmentation": truth.segmentation,
        "normals": (truth.normals * 127).round(),
        "z": z,
        "expression": scene.expression,
        "label": camera.label(),
        "style": torch.tensor([STYLES.index(name) for name in names]),
        "seed": torch.full((views,), seed),
    }
    rows = slice(number * views, (number + 1) * views)
    for name, (_, dtype) in config.arrays().items():
        array = np.load(folder / f"{name}.npy", mmap_mode="r+")
        array[rows] = values[name].numpy().astype(dtype)
        array.flush()


def build_cache(
    config: CacheConfig,
    root: Path | str | None = None,
    workers: int = 2,
    compiled: bool = False,
    progress: bool = True,
) -> Path:
    """The cache folder of ``config`` under ``root``, drawn now unless it is there and sound.

    Args:
        config: what to draw.
        root: parent folder; default :func:`models.files.cache_root`.
        workers: drawing processes; 0 or 1 draws in this process.
        compiled: compile the distance field in each process; pays from some thousand pictures on.
        progress: show a progress bar.

    Raises:
        UserError: when it cannot be written.
    """
    folder = (Path(root) if root is not None else cache_root()) / "mannequins" / config.key
    if folder.exists():
        problem = find_damage(folder, config)
        if problem is None:
            return folder
        warnings.warn(f"mannequin cache {folder} is damaged ({problem}); drawing it again", stacklevel=2)
        with os_errors(folder, "remove"):
            shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
    with os_errors(folder):
        _draw(config, folder, workers, compiled, progress)
    return folder


def _draw(config: CacheConfig, folder: Path, workers: int, compiled: bool, progress: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{config.key}-", suffix=".tmp", dir=folder.parent))
    try:
        for name, (shape, dtype) in config.arrays().items():
            _reserve(temporary / f"{name}.npy", shape, dtype)
        done = _work(partial(_draw_subject, config, temporary, compiled), config.subjects, workers)
        for _ in track(done, f"mannequins {config.key}", config.subjects, disable=not progress):
            pass
        files = {f"{name}.npy": _fingerprint(temporary / f"{name}.npy") for name in config.arrays()}
        manifest = {"world_version": WORLD_VERSION, "config": config.described, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        try:
            temporary.rename(folder)
        except OSError:  # another process finished the same cache first
            if find_damage(folder, config) is not None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _reserve(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """An array of zeros, with its space on the disk: writing to a map finds a full disk by SIGBUS."""
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _work(draw: partial[None], count: int, workers: int) -> Iterator[None]:
    if workers <= 1:
        threads = torch.get_num_threads()
        try:
            yield from map(draw, range(count))
        finally:
            torch.set_num_threads(threads)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, count)) as pool:
        yield from pool.imap_unordered(draw, range(count), chunksize=1)


def _fingerprint(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def find_damage(folder: Path, config: CacheConfig) -> str | None:
    """What is wrong with a cache folder, None when it is sound."""
    try:
        manifest = parse_json(read_bytes(folder / MANIFEST, MOST_BYTES), MANIFEST)
    except UserError as error:
        return f"no readable manifest: {error}"
    if not isinstance(manifest, dict) or manifest.get("config") != json.loads(json.dumps(config.described)):
        return "its manifest is of another cache"
    files = manifest.get("files")
    for name in config.arrays():
        path = folder / f"{name}.npy"
        if not path.exists():
            return f"{path.name} is missing"
        if not isinstance(files, dict) or _fingerprint(path) != files.get(path.name):
            return f"{path.name} differs from its checksum"
    return None


class MannequinImages(Dataset[Sample]):
    """Subjects of a cache, each with all its views.

    An item is a dict of tensors: image (V, 3, H, W) in [-1, 1], depth (V, 1, H, W), mask (V, 1, H, W) in
    [0, 1], segmentation (V, H, W) uint8, normals (V, 3, H, W), z (Z_DIM,) or, where it is coded, (CODE_DIM,),
    expression (V, E), label (V, 25), style (V,) int64 indices into ``STYLES``, seed () int64.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        config = json.loads((self.folder / MANIFEST).read_text())["config"]
        self.config = CacheConfig(**config)
        self._arrays: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.config.subjects

    def __getstate__(self) -> dict[str, object]:
        # Each worker process maps the files itself.
        return {**self.__dict__, "_arrays": {}}

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"subject {index} of {len(self)}")
        if not self._arrays:
            self._arrays = {n: np.load(self.folder / f"{n}.npy", mmap_mode="r") for n in self.config.arrays()}
        views = self.config.views_per_subject
        rows = slice(index * views, (index + 1) * views)
        sample = {name: torch.from_numpy(np.array(array[rows])) for name, array in self._arrays.items()}
        sample["image"] = sample["image"].float() / 127.5 - 1
        sample["depth"] = sample["depth"].float()
        sample["mask"] = sample["mask"].float() / 255
        sample["normals"] = sample["normals"].float() / 127
        sample["style"] = sample["style"].long()
        return sample | {"z": sample["z"][0], "seed": sample["seed"][0]}
