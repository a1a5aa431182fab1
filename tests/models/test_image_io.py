"""Image files: every mode is read right, every bad file is refused in one sentence."""

import os
import struct
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from models.errors import UserError
from models.files import atomic_write, os_errors
from models.image_io import decode_image, pictures_among, read_image, to_uint8, write_image, write_video


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


class TestColours:
    """Pictures mean the colours that their profile says."""

    @staticmethod
    def display_p3() -> bytes:
        """Display P3 as a matrix profile: the standard's primaries, adapted to D50 (Bradford), and a gamma of 2.2."""
        columns = {"rXYZ": (0.51512, 0.24120, -0.00105), "gXYZ": (0.29198, 0.69225, 0.04189)}
        columns["bXYZ"] = (0.15710, 0.06657, 0.78407)
        columns["wtpt"] = (0.9642, 1.0, 0.8249)

        def fixed(value: float) -> bytes:
            return struct.pack(">i", round(value * 65536))

        tags = {name: b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz)) for name, xyz in columns.items()}
        curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
        tags |= dict.fromkeys(("rTRC", "gTRC", "bTRC"), curve)
        text = b"P3\0"
        tags["desc"] = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78
        place, table, data = 128 + 4 + 12 * len(tags), b"", b""
        for name, content in tags.items():
            content += b"\0" * (-len(content) % 4)
            table += name.encode() + struct.pack(">II", place + len(data), len(content))
            data += content
        size = place + len(data)
        header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + b"\0" * 12 + b"acsp"
        header += b"\0" * 28 + b"".join(map(fixed, (0.9642, 1.0, 0.8249))) + b"\0" * 48
        return header + struct.pack(">I", len(tags)) + table + data

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
    def test_profile(self, tmp_path, suffix):
        # Display P3's (200, 100, 100) has the sRGB components found by its matrix and sRGB's inverse one.
        p3 = (np.array([200, 100, 100]) / 255) ** 2.2
        to_xyz = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
        srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
        linear = np.linalg.solve(srgb, to_xyz @ p3)
        wanted = 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055)
        path = tmp_path / f"x.{suffix}"
        pixels = np.full((32, 32, 3), (200, 100, 100), np.uint8)
        options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(suffix, {})
        Image.fromarray(pixels).save(path, icc_profile=self.display_p3(), **options)
        assert np.abs(read(path) - wanted).max() <= 3 and np.abs(wanted - pixels[0, 0]).max() > 10
        assert np.array_equal(to_uint8(decode_image(path.read_bytes(), "x")[0]), read(path))

    def test_alpha_is_kept_and_srgb_is_exact(self, tmp_path, picture):
        alpha = np.full((40, 30, 1), 255, np.uint8)
        alpha[:20] = 0
        Image.fromarray(np.dstack([picture, alpha])).save(tmp_path / "x.png", icc_profile=self.display_p3())
        found = read(tmp_path / "x.png")
        assert (found[:20] == 255).all() and not np.array_equal(found[20:], picture[20:])
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        Image.fromarray(picture).save(tmp_path / "y.png", icc_profile=srgb)
        assert np.array_equal(read(tmp_path / "y.png"), picture)

    @pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK"])
    def test_other_modes_do_not_fail(self, tmp_path, picture, mode):
        Image.fromarray(picture).convert(mode).save(tmp_path / "x.tif", icc_profile=self.display_p3())
        assert read(tmp_path / "x.tif").shape == (40, 30, 3)

    def test_a_damaged_profile_is_passed_over(self, tmp_path, picture, caplog):
        Image.fromarray(picture).save(tmp_path / "x.png", icc_profile=b"nonsense" * 40)
        assert np.array_equal(read(tmp_path / "x.png"), picture)
        assert "colour profile is passed over" in caplog.text


class TestDoors:
    """What a file may start, and how much of it is read."""

    def test_programs_are_not_started(self, tmp_path, monkeypatch):
        monkeypatch.setattr("subprocess.Popen", None)
        text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
        (tmp_path / "x.png").write_bytes(text)
        with pytest.raises(UserError, match="is not an image file that can be read"):
            read_image(tmp_path / "x.png")

    def test_no_file(self, tmp_path):
        os.mkfifo(tmp_path / "x.png")
        with pytest.raises(UserError):
            read_image(tmp_path / "x.png")

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "P", "CMYK"])
    def test_a_turned_tiff(self, tmp_path, picture, mode, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(picture[..., 0].astype(np.uint16) * 257) if mode == "I;16" else None
        image = image or Image.fromarray(picture).convert(mode)
        image.save(tmp_path / "x.tif", exif=exif)
        image.save(tmp_path / "plain.tif")
        upright = read(tmp_path / "plain.tif")
        turned = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1]]
        turned += [np.swapaxes(t, 0, 1) for t in (upright, upright[::-1], upright[::-1, ::-1], upright[:, ::-1])]
        assert np.array_equal(read(tmp_path / "x.tif"), turned[orientation - 1])

    def test_transparent_value_of_16_bits(self, tmp_path):
        grey = np.full((20, 20), 1000, np.uint16)
        grey[:10] = 40_000
        Image.fromarray(grey).save(tmp_path / "x.png", transparency=1000)
        found = read(tmp_path / "x.png")
        assert (found[10:] == 255).all() and (found[:10] == round(40_000 / 257)).all()


def test_pictures_among_files(caplog):
    caplog.set_level("INFO")
    names = ["a.png", "b.JFIF", "c.avif", "d.jp2", "e.heic", "notes.txt", "f.jpe", "sub/g.tif"]
    hidden = ["._a.png", "@eaDir/a.png/SYNOPHOTO.jpg", "__MACOSX/a.png"]
    assert pictures_among([*names, *hidden], "art") == [*("a.png", "b.JFIF", "c.avif", "d.jp2", "f.jpe", "sub/g.tif")]
    assert [record.getMessage() for record in caplog.records] == ["art: left out: e.heic: these formats are not read"]
