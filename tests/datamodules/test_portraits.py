"""Portraits from folders and zips: layout, splits, mirrored cameras, workers, and one sentence for each mistake."""

import json
import os
import pickle
import struct
import tracemalloc
import unicodedata
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from datamodules.portraits import ImageArchive, PortraitDataModule
from models.camera import Camera, Rig
from models.errors import UserError, one_line

COUNT, SIDE = 10, 32


def camera(index):
    """Turned, raised, and with a principal point off the centre, so that nothing is its own mirror image."""
    found = Rig().camera(0.1 * index - 0.2, 0.05)
    found.intrinsics[:, 0, 2] = 0.45
    return found


def points(index):
    """A few points on a head that is not symmetric."""
    return torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(index)) * 0.5


def pixels(seen, where):
    """Columns and rows of world points."""
    uv, _ = seen.project(where)
    return (uv[0] * SIDE).long().clamp(0, SIDE - 1)


@pytest.fixture
def folder(tmp_path):
    """Pictures of the points as white pixels, in sub-folders, as FFHQ has them."""
    labels = []
    for index in range(COUNT):
        picture = np.zeros((SIDE, SIDE, 3), np.uint8)
        u, v = pixels(camera(index), points(index)).T
        picture[v, u] = 255
        name = f"{index // 4:05d}/img{index:08d}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / name)
        labels.append([name, camera(index).label()[0].tolist()])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return tmp_path


def zipped(folder, compression=zipfile.ZIP_DEFLATED):
    place = folder.with_suffix(".zip")
    with zipfile.ZipFile(place, "w", compression) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
        file.writestr("__MACOSX/00000/._img00000000.png", b"not a picture")
    return place


def module(path, stage="fit", **options):
    data = PortraitDataModule(str(path), **{"size": SIDE, "val_fraction": 0.2, "test_fraction": 0.1, **options})
    data.setup(stage)
    return data


def edit(folder, change):
    """Change the list of labels."""
    file = folder / "dataset.json"
    labels = json.loads(file.read_text())["labels"]
    change(labels)
    file.write_text(json.dumps({"labels": labels}))


def test_batches_are_those_of_one_view(folder):
    data = module(folder, batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (3, 1, 3, SIDE, SIDE) and batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert batch["label"].shape == (3, 1, 25)
    assert len(batch["name"]) == 3 and batch["name"][0].endswith(".png")
    Camera.from_label(batch["label"].flatten(0, 1))


def test_splits_do_not_overlap_and_keep_their_order(folder):
    data = module(folder)
    names = {split: data.datasets[split].names for split in ("train", "val", "test")}
    assert [len(names[s]) for s in names] == [7, 2, 1]
    everyone = [name for split in names.values() for name in split]
    assert everyone == sorted(set(everyone)) and len(everyone) == COUNT
    assert len(data.datasets["train"]) == 14 and len(data.datasets["val"]) == 2  # mirrored in training only
    apart = module(folder, test_path=str(zipped(folder)))
    assert [len(apart.datasets[s].names) for s in ("train", "val", "test")] == [8, 2, 10]


def test_mirrored_pictures_have_mirrored_cameras(folder):
    """The mirrored camera projects the mirrored points to where they are in the mirrored picture."""
    found = module(folder, val_fraction=0.0, test_fraction=0.0).datasets["train"]
    flip = torch.tensor([-1.0, 1.0, 1.0])
    for index in range(COUNT):
        plain, mirrored = found[index], found[index + COUNT]
        assert torch.equal(plain["image"].flip(-1), mirrored["image"])
        for item, where in ((plain, points(index)), (mirrored, points(index) * flip)):
            uv, _ = Camera.from_label(item["label"]).project(where)
            u, v = (uv[0] * SIDE).long().clamp(0, SIDE - 1).T
            near = F.max_pool2d(item["image"], 3, 1, 1)  # points at a pixel's border
            assert (near[0, 0, v, u] == 1).all()


def test_a_zip_is_read_as_its_folder_is(folder):
    ours, theirs = module(folder).datasets["val"], module(zipped(folder)).datasets["val"]
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a["name"] == b["name"] and torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
    assert sorted(p.name for p in folder.iterdir()) == ["00000", "00001", "00002", "dataset.json"]


def test_processes_open_the_zip_for_themselves(folder):
    """Handles are neither sent to workers nor used in a forked one; their order is that of a single process."""
    place = zipped(folder)
    archive = ImageArchive(place)
    content = archive.read("dataset.json")
    assert pickle.loads(pickle.dumps(archive)).read("dataset.json") == content
    archive._opened = (-1, archive._zip())  # as after a fork: the handle is the parent's
    assert archive.read("dataset.json") == content and archive._opened[0] != -1
    alone, many = (
        [batch["name"] for batch in module(place, workers=workers, batch_size=2).train_dataloader()]
        for workers in (0, 2)
    )
    assert alone == many and len(alone) == 7


def test_pictures_are_resized(folder):
    image = module(folder, size=8).datasets["val"][0]["image"]
    whole = module(folder).datasets["val"][0]["image"]
    assert image.shape == (1, 3, 8, 8)
    assert image.mean() == pytest.approx(float(whole.mean()), abs=0.02)


def test_pictures_alone(folder):
    (folder / "dataset.json").unlink()
    item = module(folder, labels=False).datasets["train"][0]
    assert item.keys() == {"image", "name"}
    with pytest.raises(UserError, match=r"there is no .*dataset\.json: cameras are read from it"):
        module(folder)


def numbers(labels):
    labels[3][1].append(0.0)


def reflected(labels):
    labels[3][1][0:3] = [-value for value in labels[3][1][0:3]]


def scaled(labels):
    labels[3][1][0] = 2.0


def not_finite(labels):
    labels[3][1][3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (numbers, r"img00000003\.png: a camera label has 25 numbers, 26 numbers given"),
        (reflected, r"img00000003\.png: camera label: not a rotation but a reflection"),
        (scaled, r"img00000003\.png: camera label: rotation is not orthonormal"),
        (not_finite, r"img00000003\.png: camera label: a number is not finite"),
        (lambda labels: labels.pop(3), r"9 labels for 10 images: 00000/img00000003\.png has none"),
        (lambda labels: labels.append(["x.png", labels[0][1]]), r"11 labels for 10 images: x\.png is not there"),
        (lambda labels: labels.append(labels[0]), r"names 00000/img00000000\.png twice"),
    ],
)
@pytest.mark.parametrize("as_zip", [False, True])
def test_wrong_labels(folder, as_zip, change, message):
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        module(zipped(folder) if as_zip else folder)


@pytest.mark.parametrize(("kept", "message"), [(0, "is empty"), (4, "is not an image file"), (60, "is damaged")])
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_picture(folder, workers, kept, message):
    place = folder / "00001" / "img00000007.png"
    place.write_bytes(place.read_bytes()[:kept])
    with pytest.raises(UserError) as caught:
        list(module(folder, workers=workers).val_dataloader())
    assert one_line(caught.value).startswith(f"image {place} {message}")  # without the worker's traceback


def test_damaged_zips(folder):
    place = zipped(folder, zipfile.ZIP_STORED)
    with zipfile.ZipFile(place) as file:
        offset = file.getinfo("00001/img00000007.png").header_offset
    content = bytearray(place.read_bytes())
    content[offset + 100] ^= 255
    place.write_bytes(content)
    with pytest.raises(UserError, match=r"member 00001/img00000007\.png is damaged .*CRC"):
        list(module(place).datasets["val"])
    with pytest.raises(UserError, match="has no member"):
        ImageArchive(place).read("none")
    place.write_bytes(content[:500])
    with pytest.raises(UserError, match="is not a zip file"):
        module(place)


def test_other_mistakes(folder, tmp_path_factory):
    with pytest.raises(UserError, match="there is no such folder or zip"):
        module(folder / "none")
    with pytest.raises(UserError, match="no images found"):
        module(tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match="too few pictures for a test split"):
        module(folder, "test", test_fraction=0.01)
    with pytest.raises(UserError, match="fraction must not be negative"):
        module(folder, val_fraction=0.6, test_fraction=0.4)
    Image.new("RGB", (SIDE, SIDE + 4)).save(folder / "00001" / "img00000007.png")
    with pytest.raises(UserError, match="32 x 36: portraits must be square"):
        list(module(folder).datasets["val"])
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        module(folder)


def test_members_larger_than_any_picture(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file, file.open("a.png", "w") as member:
        for _ in range(3):
            member.write(bytes(1 << 20))
    archive = ImageArchive(tmp_path / "x.zip")
    with pytest.raises(UserError, match=r"member a\.png is larger than 2 MB"):
        archive.read("a.png", most=2 << 20)
    assert len(archive.read("a.png", most=3 << 20)) == 3 << 20


@pytest.mark.parametrize(("field", "value"), [(6, 99), (8, 1), (10, 77)], ids=["version", "encrypted", "method"])
def test_zips_that_need_more(tmp_path, field, value):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a.png", b"x" * 100)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    central = content.find(b"PK\1\2")
    content[central + field] = value
    content[field - 2] = value  # in the local header
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.zip"):
        ImageArchive(tmp_path / "x.zip").read("a.png")


def test_what_programs_make_beside_pictures(folder, caplog):
    caplog.set_level("INFO")
    for name in ("@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg", "__MACOSX/a.png", "._a.png", "scan.heic"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    data = PortraitDataModule(str(folder), size=16, val_fraction=0.2)
    data.setup("fit")
    assert len(data.datasets["train"]) + 2 * len(data.datasets["val"]) <= 2 * COUNT
    assert "left out: scan.heic" in caplog.text and "THUMB" not in caplog.text


def test_pictures_of_uncommon_formats_beside_a_labelled_set(folder, caplog):
    caplog.set_level("INFO")
    for name in ("mask.tga", "00000/img00000000.psd"):
        Image.new("RGB", (SIDE, SIDE)).save(folder / "x.tga")
        (folder / "x.tga").rename(folder / name)
    assert len(module(folder).datasets["train"].names) == 7
    assert "left out: mask.tga: dataset.json does not list them" in caplog.text
    assert "left out: 00000/img00000000.psd: they are there in a common format too" in caplog.text


@pytest.mark.parametrize("change", [lambda n: n.replace("img", "é"), lambda n: n.replace("/", "\\")])
def test_members_that_are_spelled_otherwise(folder, change):
    place = folder.with_suffix(".zip")
    labels = [[change(name), label] for name, label in json.loads((folder / "dataset.json").read_text())["labels"]]
    with zipfile.ZipFile(place, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            name = change(path.relative_to(folder).as_posix())
            file.writestr(unicodedata.normalize("NFD", name), path.read_bytes())
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    assert module(place).datasets["train"][0]["image"].shape == (1, 3, SIDE, SIDE)


def test_heads_with_one_id(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / name)
    options = {"labels": False, "val_fraction": 0.0, "test_fraction": 0.99}
    assert len(module(tmp_path, "test", **options).datasets["test"]) == 3
    with pytest.raises(UserError, match=r"a\.jpg and a\.png have the same id 'a'"):
        module(tmp_path, "predict", **options)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_of_every_method(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as file:
        file.writestr("a.png", bytes(range(256)) * 40)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    for place in range(60, 80):
        content[place] ^= 255
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"member a\.png is damaged"):
        ImageArchive(tmp_path / "x.zip").read("a.png")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_is_more_than_it_says(tmp_path, method):
    """Of what is unpacked beyond the size that is declared, little is ever in memory."""
    size = (1 << 20) * (400 if method == zipfile.ZIP_BZIP2 else 100)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as file, file.open("a.png", "w") as member:
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    content = (tmp_path / "x.zip").read_bytes().replace(struct.pack("<I", size), struct.pack("<I", 100_000))
    (tmp_path / "x.zip").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"member a\.png is damaged .*CRC"):
        ImageArchive(tmp_path / "x.zip").read("a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2


def test_neither_folder_nor_zip(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="it is neither a folder nor a zip"):
        ImageArchive(tmp_path / "pipe")
