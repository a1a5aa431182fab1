"""Image and video files at the edge: uint8 on disk, RGB float (B, 3, H, W) in [-1, 1] inside."""

from __future__ import annotations

import functools
import io
import logging
import os
import struct
import subprocess
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError, one_line
from models.files import atomic_write, os_errors
from models.names import COMMON_SUFFIXES, IMAGE_SUFFIXES

log = logging.getLogger(__name__)

MIN_SIDE = 16
MAX_PIXELS = 50_000_000
MAX_BYTES = 1 << 29  # of a picture in an archive: 50 million pixels of 16 bits in four channels, and some
_FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FLI", "FTEX", "GBR", "GIF", "ICNS", "ICO", "IM", "JPEG"),
    *("JPEG2000", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF"),
    *("WEBP", "XBM", "XPM"),
)
"""Pillow's formats that are read, all decoded in this process. Others start programs (EPS: Ghostscript), or are a frame
for something else."""
_OTHER_SUFFIXES = frozenset(
    ".heic .heif .hif .jxl .jxr .wdp .svg .svgz .eps .ps .ai .pdf .wmf .emf .exr .hdr .pfm .psb .xcf .kra .ora .clip "
    ".procreate .dng .cr2 .cr3 .crw .nef .arw .srw .orf .rw2 .raf .pef .ico .icns .cur .dds .blp .xbm .xpm .im .msp "
    ".pcd .pxr .bw .rgb .rgba .palm .fit .fits .dcx .flc .fli .ftc .ftu .gbr".split()
)
"""Of pictures that folders are not searched for: they cannot be read, or are icons, textures and the like."""
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, TypeError, ArithmeticError, LookupError, RuntimeError)
_SRGB_ERROR = 2  # of 255: profiles that differ less from sRGB are sRGB, rounded


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def pictures_among(names: Iterable[str], where: object) -> list[str]:
    """The names whose suffix is of a picture that is read, in order; of other pictures a line says that they are not.

    What programs hide or make beside pictures (thumbnails, forks) is passed over. Of a picture that is there in a
    common format and in others, as a source beside its export, the former is read.
    """
    shown = [name for name in names if not any(map(_is_hidden, PurePosixPath(name).parts))]
    suffixes = {name: PurePosixPath(name).suffix.lower() for name in shown}
    say_left_out(
        [name for name in shown if suffixes[name] in _OTHER_SUFFIXES], where, "these formats are not read from folders"
    )
    stems = {name: PurePosixPath(name).with_suffix("") for name in shown if suffixes[name] in IMAGE_SUFFIXES}
    common = {stem for name, stem in stems.items() if suffixes[name] in COMMON_SUFFIXES}
    again = {name for name, stem in stems.items() if suffixes[name] not in COMMON_SUFFIXES and stem in common}
    say_left_out(sorted(again), where, "they are there in a common format too")
    return [name for name in stems if name not in again]


def say_left_out(names: Iterable[str], where: object, why: str) -> None:
    """Log one line about pictures that are not taken, if there are any."""
    if names := list(names):
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        log.info("%s", one_line(f"{where}: left out: {', '.join(names[:8])}{more}: {why}"))


def _is_hidden(part: str) -> bool:
    return part.startswith((".", "@eaDir", "@__thumb", "@Recycle", "#recycle", "$RECYCLE.BIN", "__MACOSX"))


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image file as (1, 3, H, W) RGB in [-1, 1].

    The EXIF orientation is applied, and an embedded colour profile: colours are sRGB. Grey, palette, CMYK and 16-bit
    images are converted, transparency is composited on white, and of an animation the first frame is taken.

    Raises:
        UserError: one sentence, when the file is missing, is not an image, is damaged, has a side shorter
            than 16 pixels or more than 50 million pixels (checked before decoding).
    """
    path = Path(path)
    with os_errors(path, "read"):
        if not path.exists():
            raise UserError(f"image {path} does not exist")
        if path.is_dir():
            raise UserError(f"image {path} is a folder")
        if path.stat().st_size == 0:
            raise UserError(f"image {path} is empty (0 bytes)")
        # Not by its path: Pillow would map an uncompressed file into memory, and cut the rows of a turned TIFF in
        # wrong places.
        with open(path, "rb") as file:
            return _decode(file, path)


def decode_image(content: bytes, name: str) -> Tensor:
    """As :func:`read_image`, from a file's content; ``name`` is what errors call it.

    Raises:
        UserError: as :func:`read_image`.
    """
    if not content:
        raise UserError(f"image {name} is empty (0 bytes)")
    return _decode(io.BytesIO(content), name)


def _decode(file: BinaryIO, path: Path | str) -> Tensor:
    try:
        head = file.read(25)
        depth = head[24] if head[12:16] == b"IHDR" and len(head) == 25 else 8
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's size warning: our own limit is stricter
            with Image.open(file, formats=_formats()) as image:
                _check_size(path, *image.size)
                image.load()
                _check_size(path, *image.size)  # what is in an icon may have another
                array = _rgb(path, image, depth)
    except Image.DecompressionBombError as error:
        raise UserError(f"image {path} is too large: at most {MAX_PIXELS // 10**6} million pixels are read") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"image {path} is not an image file that can be read") from error
    # What Pillow's decoders raise on damage.
    except (*_DAMAGE, struct.error, MemoryError) as error:
        raise UserError(f"image {path} is damaged or cannot be read: {one_line(error)}") from error
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1


def _check_size(path: Path | str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"image {path} is too large: {width} x {height}, at most {MAX_PIXELS // 10**6} million pixels are read"
        )
    if min(width, height) < MIN_SIDE:
        raise UserError(f"image {path} is too small: {width} x {height}, both sides need {MIN_SIDE} pixels")


def _rgb(path: Path | str, image: Image.Image, depth: int) -> np.ndarray:
    """uint8 (H, W, 3) of a loaded image; ``depth`` is that of a PNG's channels, bits."""
    transparent = _transparent(image, depth)
    # Damaged EXIF does not make the pixels unreadable.
    with suppress(struct.error, OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError):
        image = ImageOps.exif_transpose(image)
    has_profile, profile = "icc_profile" in image.info, image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if isinstance(transparent, int | float):
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        image = Image.fromarray(_to_8_bit(path, values))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparent is not None:
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        if transparent is not None:
            image.info["transparency"] = transparent
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert(mode)
    if has_profile:
        image = _in_srgb(path, image, profile or b"")  # nothing: what Pillow leaves of a damaged one
    image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return np.array(image)


def _transparent(image: Image.Image, depth: int) -> object:
    """The value that is to be transparent, as the pixels have been decoded; Pillow leaves it as the PNG has it."""
    value = image.info.get("transparency")
    if image.mode == "L" and isinstance(value, int) and value < 1 << depth < 256:
        return value * 255 // ((1 << depth) - 1)
    if image.mode == "RGB" and isinstance(value, tuple) and depth == 16:
        return tuple(number >> 8 for number in value)
    return value


def _in_srgb(path: Path | str, image: Image.Image, content: bytes) -> Image.Image:
    """The picture in sRGB, from the colours that an ICC profile gives its numbers a meaning in."""
    try:
        profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(content)), ImageCms.createProfile("sRGB")
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}[str(profile.profile.xcolor_space).strip()]  # type: ignore[attr-defined]
        if image.mode == "1":
            image = image.convert("L")
        if mode == "RGB" and image.mode in ("L", "P", "YCbCr"):
            image = image.convert("RGB")
        if image.mode != mode:
            raise ValueError(f"it is for {mode}, the picture is {image.mode}")
        transform = ImageCms.buildTransform(profile, srgb, mode, "RGB")
        if mode == "RGB":
            steps = np.linspace(0, 255, 9).round().astype(np.uint8)
            probe = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
            there = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform))
            if np.abs(there.astype(int) - probe).max() <= _SRGB_ERROR:
                return image
        found = ImageCms.applyTransform(image, transform)
        assert found is not None  # it is not in place
        return found
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s", one_line(f"{path}: its colour profile is passed over, as it cannot be read: {error}"))
        return image


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


def resized(image: Tensor, size: int) -> Tensor:
    """Resize (B, 3, H, W) to (B, 3, size, size), antialiased and differentiable; a no-op at that size."""
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bilinear", align_corners=False, antialias=True)


def at_most(image: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, H, W), made smaller where they are larger than ``side``."""
    return resized(image, side) if image.shape[-1] > side else image
