"""Image files: every mode is read right, every bad file is refused in one sentence."""

import struct
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import UserError
from models.files import atomic_write, os_errors
from models.image_io import read_image, to_uint8, write_image, write_video


@pytest.fixture
def picture():
    """(40, 30, 3) uint8, different in every corner."""
    return np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def read(path):
    return to_uint8(read_image(path)[0])


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            ("empty.png", b"", "is empty"),
            ("text.png", b"this is not an image", "is not an image file"),
            ("huge.png", png_header(20_000, 20_000), "is too large"),
            ("large.png", png_header(8_000, 7_000), "8000 x 7000, at most 50 million"),
            ("pixel.png", png_header(1, 1), "is too small: 1 x 1"),
            ("thin.png", png_header(15, 4000), "is too small"),
            ("hollow.png", png_header(32, 32), "is damaged"),
        ],
    )
    def test_content(self, tmp_path, name, content, match):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=match) as error:
            read_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
    def test_truncated(self, tmp_path, picture, suffix):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(picture).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=r"damaged|not an image"):
            read_image(path)

    def test_missing_and_folder(self, tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            read_image(tmp_path / "none.png")
        with pytest.raises(UserError, match="is a folder"):
            read_image(tmp_path)

    def test_float_values_of_unknown_range(self, tmp_path):
        Image.fromarray(np.full((20, 20), 300.0, np.float32)).save(tmp_path / "x.tiff")
        with pytest.raises(UserError, match="outside 0 to 1"):
            read_image(tmp_path / "x.tiff")


class TestModes:
    def test_rgb_is_exact(self, tmp_path, picture):
        Image.fromarray(picture).save(tmp_path / "x.png")
        image = read_image(tmp_path / "x.png")
        assert image.shape == (1, 3, 40, 30) and image.dtype == torch.float32
        assert image.min() >= -1 and image.max() <= 1
        assert np.array_equal(to_uint8(image[0]), picture)

    @pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "YCbCr"])
    def test_converted(self, tmp_path, picture, mode):
        source = Image.fromarray(picture).convert(mode)
        path = tmp_path / ("x.tiff" if mode in ("CMYK", "YCbCr") else "x.png")
        source.save(path)
        assert np.abs(read(path).astype(int) - np.array(source.convert("RGB")).astype(int)).max() <= 1

    def test_16_bit_grey(self, tmp_path):
        values = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "x.png")
        assert np.array_equal(read(tmp_path / "x.png")[..., 0], np.round(values / 257).astype(np.uint8))

    def test_transparency_on_white(self, tmp_path):
        rgba = np.zeros((20, 20, 4), np.uint8)
        rgba[:, 10:, 3] = 255
        rgba[10:, :10, 3] = 128
        Image.fromarray(rgba).save(tmp_path / "x.png")
        out = read(tmp_path / "x.png")[..., 0]
        assert (
            (out[:10, :10] == 255).all()
            and (out[:, 10:] == 0).all()
            and (abs(out[10:, :10].astype(int) - 127) <= 1).all()
        )

    def test_transparent_palette_colour(self, tmp_path):
        image = Image.new("P", (20, 20), 1)
        image.putpalette([0, 0, 0, 200, 0, 0])
        image.save(tmp_path / "x.png", transparency=1)
        assert (read(tmp_path / "x.png") == 255).all()

    def test_exif_orientation(self, tmp_path, picture):
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
        Image.fromarray(picture).save(tmp_path / "x.png", exif=exif)
        assert np.array_equal(read(tmp_path / "x.png"), np.rot90(picture, -1))


class TestWriting:
    def test_image_round_trip(self, tmp_path, picture):
        tensor = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
        write_image(tmp_path / "new" / "x.png", tensor)
        assert np.array_equal(read(tmp_path / "new" / "x.png"), picture)

    def test_values_are_clamped_and_rounded(self):
        values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 2.0]).reshape(1, 1, 5).expand(3, 1, 5)
        assert to_uint8(values)[0, :, 0].tolist() == [0, 0, 128, 255, 255]

    @pytest.mark.parametrize("size", [(32, 32), (33, 47)])
    def test_mp4_has_every_frame(self, tmp_path, size):
        write_video(tmp_path / "x.mp4", torch.rand(7, 3, *size) * 2 - 1, fps=10)
        reader = imageio_ffmpeg.read_frames(str(tmp_path / "x.mp4"))
        meta = next(reader)
        assert len(list(reader)) == 7 and meta["codec"] == "h264"

    def test_gif_loops(self, tmp_path):
        write_video(tmp_path / "x.gif", torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 16, 16), fps=10)
        with Image.open(tmp_path / "x.gif") as image:
            assert image.n_frames == 5 and image.info["loop"] == 0

    def test_other_suffix(self, tmp_path):
        with pytest.raises(UserError, match=r"must be \.mp4 or \.gif"):
            write_video(tmp_path / "x.avi", torch.zeros(1, 3, 16, 16))

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path):
        (tmp_path / "x").write_text("old")
        with pytest.raises(RuntimeError), atomic_write(tmp_path / "x") as file:
            file.write_text("half")
            raise RuntimeError
        assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1

    def test_os_errors_name_path_and_reason(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot write .*/file/x.png: Not a directory"):
            write_image(tmp_path / "file" / "x.png", torch.zeros(3, 16, 16))
        with pytest.raises(UserError, match="cannot read y: No space left"), os_errors("y", "read"):
            raise OSError(28, "No space left on device")
