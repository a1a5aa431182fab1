"""Image and video files at the edge: uint8 on disk, RGB float (B, 3, H, W) in [-1, 1] inside."""

from __future__ import annotations

import io
import os
import subprocess
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError, one_line
from models.files import atomic_write

MIN_SIDE = 16
MAX_PIXELS = 50_000_000
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image file as (1, 3, H, W) RGB in [-1, 1].

    The EXIF orientation is applied; grey, palette, CMYK and 16-bit images are converted, transparency is
    composited on white, and of an animation the first frame is taken.

    Raises:
        UserError: one sentence, when the file is missing, is not an image, is damaged, has a side shorter
            than 16 pixels or more than 50 million pixels (checked before decoding).
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"image {path} does not exist")
    if path.is_dir():
        raise UserError(f"image {path} is a folder")
    if path.stat().st_size == 0:
        raise UserError(f"image {path} is empty (0 bytes)")
    return _decode(path, path)


def decode_image(content: bytes, name: str) -> Tensor:
    """As :func:`read_image`, from a file's content; ``name`` is what errors call it.

    Raises:
        UserError: as :func:`read_image`.
    """
    if not content:
        raise UserError(f"image {name} is empty (0 bytes)")
    return _decode(io.BytesIO(content), name)


def _decode(source: Path | io.BytesIO, path: Path | str) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's size warning: our own limit is stricter
            with Image.open(source) as image:
                _check_size(path, *image.size)
                image.load()
                array = _rgb(path, image)
    except Image.DecompressionBombError as error:
        raise UserError(f"image {path} is too large: at most {MAX_PIXELS // 10**6} million pixels are read") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"image {path} is not an image file that can be read") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise on damage
        raise UserError(f"image {path} is damaged or cannot be read: {one_line(error)}") from error
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1


def _check_size(path: Path | str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"image {path} is too large: {width} x {height}, at most {MAX_PIXELS // 10**6} million pixels are read"
        )
    if min(width, height) < MIN_SIDE:
        raise UserError(f"image {path} is too small: {width} x {height}, both sides need {MIN_SIDE} pixels")


def _rgb(path: Path | str, image: Image.Image) -> np.ndarray:
    # Damaged EXIF does not make the pixels unreadable.
    with suppress(ValueError, SyntaxError, KeyError, TypeError, OverflowError, ZeroDivisionError):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(_to_8_bit(path, np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _to_8_bit(path: Path | str, values: np.ndarray) -> np.ndarray:
    top = 1.0 if values.dtype.kind == "f" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise UserError(f"image {path} has values outside 0 to {top:g}, whose meaning is not known")
    return np.round(values.astype(np.float64) * (255 / top)).astype(np.uint8)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (..., 3, H, W) in [-1, 1] as uint8 (..., H, W, 3), rounded and clamped."""
    images = ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return images.to(torch.uint8).movedim(-3, -1).contiguous().numpy()


def write_image(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write one image, (3, H, W) or (1, 3, H, W) in [-1, 1], atomically; the suffix chooses the format.

    Raises:
        UserError: when the file cannot be written.
    """
    with atomic_write(path) as temporary:
        Image.fromarray(to_uint8(image.reshape(image.shape[-3:]))).save(temporary)


def write_video(path: str | os.PathLike[str], frames: Tensor, fps: int = 30) -> None:
    """Write frames (T, 3, H, W) in [-1, 1] as ``.mp4`` (H.264) or ``.gif`` (looping), atomically.

    Raises:
        UserError: for another suffix, or when the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in to_uint8(frames)]
        with atomic_write(path) as temporary:
            first.save(temporary, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    elif suffix == ".mp4":
        with atomic_write(path) as temporary:
            _write_mp4(temporary, frames, fps)
    else:
        raise UserError(f"video {path}: the suffix must be .mp4 or .gif")


def _write_mp4(path: Path, frames: Tensor, fps: int) -> None:
    import imageio_ffmpeg  # here: it brings an ffmpeg program that only this needs

    height, width = frames.shape[-2:]
    frames = F.pad(frames, (0, width % 2, 0, height % 2), mode="replicate")  # 4:2:0 chroma needs even sides
    size = f"{frames.shape[-1]}x{frames.shape[-2]}"
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    # One thread and no version strings: the same frames give the same file anywhere.
    wanted = ["-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p", "-threads", "1", "-movflags", "+faststart"]
    exact = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *given, *wanted, *exact, str(path)]
    done = subprocess.run(command, input=to_uint8(frames).tobytes(), capture_output=True)
    if done.returncode != 0:
        reason = one_line(done.stderr.decode(errors="replace"))[-200:] or f"it ended with code {done.returncode}"
        raise OSError(f"ffmpeg: {reason}")
