"""Image files: every mode is read right, every bad file is refused in one sentence."""

import os
import struct
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from models import image as images
from models.errors import UserError
from models.files import atomic_write, os_errors
from models.image import IMAGE_SUFFIXES, decode_image, pictures_among, read_image, to_uint8, write_image, write_video


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

    @pytest.mark.parametrize(("mode", "suffix"), [("P", "png"), ("L", "png"), ("LA", "png"), ("YCbCr", "tif")])
    def test_a_profile_for_rgb_in_other_modes(self, tmp_path, picture, mode, suffix):
        image = Image.fromarray(picture).convert(mode)
        image.save(tmp_path / f"x.{suffix}", icc_profile=self.display_p3())
        image.convert("RGB").save(tmp_path / "y.png", icc_profile=self.display_p3())
        difference = read(tmp_path / f"x.{suffix}").astype(int) - read(tmp_path / "y.png")
        assert np.abs(difference).max() <= (3 if mode == "YCbCr" else 0)

    @staticmethod
    def grey(gamma: float) -> bytes:
        """A profile of grey tones."""
        tags = {"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)}
        tags["kTRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
        place, table = 128 + 4 + 12 * len(tags), b""
        for name, content in tags.items():
            table += name.encode() + struct.pack(">II", place, len(content))
            place += len(content)
        header = struct.pack(">I4sI4s4s4s12x4s28x3i48x", place, b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ",
                             b"acsp", 63190, 65536, 54061)  # fmt: skip
        return header + struct.pack(">I", len(tags)) + table + b"".join(tags.values())

    @pytest.mark.parametrize("mode", ["L", "LA", "I;16", "transparent"])
    def test_grey_tones(self, tmp_path, mode):
        image, options = Image.new("L", (20, 20), 100), {}
        if mode == "I;16":
            image = Image.fromarray(np.full((20, 20), 25_700, np.uint16))
        elif mode == "transparent":
            options = {"transparency": 7}
        else:
            image = image.convert(mode)
        image.save(tmp_path / "x.png", icc_profile=self.grey(1.0), **options)
        wanted = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)  # its numbers are amounts of light
        assert np.abs(read(tmp_path / "x.png") - wanted).max() <= 1

    def test_a_profile_of_grey_tones_takes_no_colour_away(self, tmp_path, picture, caplog):
        Image.fromarray(picture).save(tmp_path / "x.png", icc_profile=self.grey(1.0))
        assert np.array_equal(read(tmp_path / "x.png"), picture) and "it is for L, the picture is RGB" in caplog.text

    def test_inks(self, tmp_path):
        # Corners of ink, cyan outermost, to Lab: paper is white, magenta red, anything else black.
        corners = [(0, 128, 128)] * 16
        corners[0b0000], corners[0b0100] = (255, 128, 128), (136, 209, 195)
        lut = (
            b"mft1\0\0\0\0"
            + bytes((4, 3, 2, 0))
            + struct.pack(">9i", *(65536 * i for i in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
        )
        lut += bytes(range(256)) * 4 + bytes(v for corner in corners for v in corner) + bytes(range(256)) * 3
        header = struct.pack(">I4sI4s4s4s12x4s28x3i48x", 144 + len(lut), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ",
                             b"acsp", 63190, 65536, 54061)  # fmt: skip
        profile = header + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut
        inks = np.zeros((20, 20, 4), np.uint8)
        inks[:10, :, 1] = 255
        Image.fromarray(inks, "CMYK").save(tmp_path / "x.tif", icc_profile=profile)
        found = read(tmp_path / "x.tif").astype(int)
        red = np.array([255, 0, 0])  # Lab (53.2, 80.1, 67.2) against D65
        assert np.abs(found[5, 5] - red).max() <= 12 and found[15, 15].min() >= 253
        Image.fromarray(inks, "CMYK").save(tmp_path / "y.tif")
        assert np.abs(read(tmp_path / "y.tif")[5, 5].astype(int) - red).max() > 200  # taken for plain magenta

    @pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK"])
    def test_other_modes_do_not_fail(self, tmp_path, picture, mode):
        Image.fromarray(picture).convert(mode).save(tmp_path / "x.tif", icc_profile=self.display_p3())
        assert read(tmp_path / "x.tif").shape == (40, 30, 3)

    def test_a_damaged_profile_is_passed_over(self, tmp_path, picture, caplog):
        Image.fromarray(picture).save(tmp_path / "x.png", icc_profile=b"nonsense" * 40)
        assert np.array_equal(read(tmp_path / "x.png"), picture)
        assert caplog.text.count("colour profile is passed over") == 1
        content = bytearray((tmp_path / "x.png").read_bytes())
        begin = content.index(b"iCCP")
        (length,) = struct.unpack(">I", content[begin - 4 : begin])
        content[begin + 20] ^= 255  # within what is compressed
        body = bytes(content[begin : begin + 4 + length])
        content[begin + 4 + length : begin + 8 + length] = struct.pack(">I", zlib.crc32(body))
        assert np.array_equal(to_uint8(decode_image(bytes(content), "x")[0]), picture)
        assert caplog.text.count("colour profile is passed over") == 2


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

    @pytest.mark.parametrize(("depth", "kind"), [(2, 0), (4, 0), (8, 0), (16, 0), (16, 2)])
    def test_a_transparent_value_is_in_the_bits_of_the_file(self, depth, kind):
        values = (1,) if kind == 0 else (0x0034, 0x0078, 0x00BC)
        row = int("".join(f"{value:0{depth}b}" for value in values) * 32, 2).to_bytes(depth * len(values) * 4)
        parts = {
            b"IHDR": struct.pack(">IIBBBBB", 32, 32, depth, kind, 0, 0, 0),
            b"tRNS": struct.pack(f">{len(values)}H", *values),
        }
        parts |= {b"IDAT": zlib.compress((b"\0" + row) * 32), b"IEND": b""}
        found = {}
        for name in ("with", "without"):
            chunks = [(k, v) for k, v in parts.items() if name == "with" or k != b"tRNS"]
            content = b"".join(
                struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in chunks
            )
            found[name] = to_uint8(decode_image(b"\x89PNG\r\n\x1a\n" + content, "x")[0])
        assert (found["with"] == 255).all() and (found["without"] < 100).all()

    def test_icons_hold_what_they_do_not_say(self, tmp_path):
        Image.new("1", (8000, 7000)).save(tmp_path / "large.png")
        large = (tmp_path / "large.png").read_bytes()
        icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 1, len(large), 22) + large
        with pytest.raises(UserError, match="8000 x 7000, at most 50 million"):
            decode_image(icon, "x.ico")

    def test_a_large_file_is_not_read_at_once(self, tmp_path, picture):
        Image.fromarray(picture).save(tmp_path / "x.png")
        with open(tmp_path / "x.png", "r+b") as file:
            file.truncate(1 << 30)  # as the pages and layers behind a picture
        assert np.array_equal(read(tmp_path / "x.png"), picture)

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
    assert [record.getMessage() for record in caplog.records] == [
        "art: left out: e.heic: these formats are not read from folders"
    ]


def test_every_format_of_a_folder_is_read_or_named():
    formats = Image.registered_extensions()
    known = {suffix for suffix, name in formats.items() if name in images._FORMATS}
    assert known <= IMAGE_SUFFIXES | images._OTHER_SUFFIXES and not IMAGE_SUFFIXES & images._OTHER_SUFFIXES
    assert {formats[suffix] for suffix in IMAGE_SUFFIXES} <= {*images._FORMATS, "MPO"}
    assert not {"EPS", "WMF", "IPTC", "FITS"} & set(images._FORMATS)


def test_a_source_beside_its_export_is_left_out(caplog):
    caplog.set_level("INFO")
    names = ["face.psd", "face.png", "sub/face.avif", "other.avif", "both.jpg", "both.png"]
    assert pictures_among(names, "art") == ["face.png", "sub/face.avif", "other.avif", "both.jpg", "both.png"]
    assert "left out: face.psd: they are there in a common format too" in caplog.text
