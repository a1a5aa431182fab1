"""Artworks: what a folder may hold, and what is refused."""

import json
import math
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.artworks import ArtworkDataModule, read_artworks
from datamodules.framing import Edits, frame
from datamodules.labels import camera_labels
from datamodules.mannequin_artworks import MannequinArtworks
from models.camera import Camera, Rig
from models.errors import UserError
from models.faces.recipes import RECIPES
from models.image import write_image
from models.names import is_id, item_id


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("b.png", (40, 60)), ("a.jpg", (64, 64)), ("notes.txt", None)):
        if size is None:
            (tmp_path / name).write_text("x")
        else:
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def listed(folder, *items):
    (folder / "artworks.json").write_text(json.dumps({"items": list(items)}))
    return str(folder)


def test_a_file_and_a_folder(folder):
    one = read_artworks(str(folder / "b.png"), size=32)
    assert [a.id for a in one] == ["b"] and one[0].image.shape == (3, 32, 32)
    assert one[0].original_size == (40, 60) and one[0].label is None and one[0].camera is None
    assert [a.id for a in read_artworks(str(folder), size=32)] == ["a", "b"]


def test_pose_of_all(folder):
    artwork = read_artworks(str(folder), Edits(yaw_deg=20), size=32)[0]
    assert artwork.label is None and artwork.angles == (math.radians(20), 0)


def test_list(folder):
    items = read_artworks(
        listed(
            folder,
            {"file": "b.png", "yaw_deg": -10, "crop": [10, 4, 20, 30], "style": "toon", "seed": 3},
            {"file": "a.jpg"},
        ),
        Edits(yaw_deg=5, pitch_deg=2),
        size=16,
    )
    assert [[round(math.degrees(angle)) for angle in a.angles] for a in items] == [[5, 2], [-10, 2]]
    assert (items[1].style, items[1].seed) == ("toon", 3)


def test_dataset_json(folder):
    label = Rig().camera(0.3, 0.1).label()[0]
    (folder / "dataset.json").write_text(json.dumps({"labels": [["a.jpg", label.tolist()]]}))
    items = read_artworks(str(folder), size=32)
    assert [a.id for a in items] == ["a"] and torch.allclose(items[0].label, label)
    assert isinstance(items[0].camera, Camera)


def test_centre_crop_is_the_middle():
    image = torch.zeros(1, 3, 32, 64)
    image[..., 16:48] = 1
    assert (frame(image, 32, (16, 0, 32, 32)) == 1).all()


@pytest.mark.parametrize(
    ("items", "match"),
    [
        ([{"file": "b.png", "yaw_deg": 181}], "yaw_deg is 181, it must be between"),
        ([{"file": "b.png", "pitch_deg": -91}], "pitch_deg is -91"),
        ([{"file": "b.png", "yaw_deg": float("nan")}], "yaw_deg is nan"),
        ([{"file": "none.png"}], "none.png does not exist"),
        ([{"file": "b.png"}, {"file": "b.png"}], "two artworks with the id 'b'"),
        ([{"file": "b.png", "yaw": 3}], "unknown key 'yaw'"),
        ([{"file": "b.png", "seed": "x"}], "seed is 'x'"),
        ([{"name": "b.png"}], "item 0 has no file"),
        ([{"file": "b.png", "crop": [50, 0, 30, 30]}], "is not inside the image"),
        ([{"file": "b.png", "crop": [0, 0, 30]}], "crop must be"),
        ([], "at least one item"),
    ],
)
def test_bad_lists(folder, items, match):
    with pytest.raises(UserError, match=match):
        read_artworks(listed(folder, *items), size=32)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([["a.jpg", [0.0] * 26]], "26 numbers given"),
        ([["a.jpg", [1.0] * 25]], "not orthonormal"),
        ([["a.jpg", ["x"] * 25]], "a.jpg"),
        ([["a.jpg"]], "is not a pair"),
        ([], "must be"),
    ],
)
def test_bad_labels(folder, labels, match):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(UserError, match=match):
        read_artworks(str(folder), size=32)


def test_bad_places(folder, tmp_path_factory):
    with pytest.raises(UserError, match="does not exist"):
        read_artworks(str(folder / "none"))
    with pytest.raises(UserError, match="no images found"):
        read_artworks(str(tmp_path_factory.mktemp("empty")))
    (folder / "artworks.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_artworks(str(folder))
    with pytest.raises(UserError, match="needs a square image"):
        read_artworks(str(folder / "b.png"), crop="none")


def test_data_module(folder):
    data = ArtworkDataModule(str(folder), size=32)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [b[0].id for b in batches] == ["a", "b"] and list(data.train_dataloader()) == []


class TestNames:
    def test_any_script(self, tmp_path):
        for name in ("蒙娜丽莎.png", "戴珍珠耳环的少女.png", "a b.png", "a_b.png", f"{'long_' * 45}.png"):
            Image.new("RGB", (32, 32)).save(tmp_path / name)
        ids = [artwork.id for artwork in read_artworks(str(tmp_path), size=32)]
        assert {"蒙娜丽莎", "戴珍珠耳环的少女", "a_b"} < set(ids) and len(set(ids)) == 5 and all(map(is_id, ids))

    @pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "", "a\nb.png", "C:\\x.png"])
    def test_that_lead_elsewhere(self, folder, name):
        with pytest.raises(UserError, match="is not a file in its folder") as error:
            read_artworks(listed(folder, {"file": name}), size=32)
        assert "\n" not in str(error.value)
        (folder / "artworks.json").unlink()
        label = Rig().camera(0.1).label()[0].tolist()
        (folder / "dataset.json").write_text(json.dumps({"labels": [[name, label]]}))
        with pytest.raises(UserError, match="is not a file in its folder"):
            read_artworks(str(folder), size=32)

    @pytest.mark.parametrize("listing", ["artworks.json", "dataset.json"])
    @pytest.mark.parametrize(
        "listed, file",
        [
            ("été.png", unicodedata.normalize("NFD", "été.png")),
            (unicodedata.normalize("NFD", "été.png"), "été.png"),
            ("a\\b.png", "a\\b.png"),
            ("3.00\u202fPM.png", "3.00\u202fPM.png"),
        ],
    )
    def test_the_file_that_is_meant(self, tmp_path, listing, listed, file):
        Image.new("RGB", (32, 32)).save(tmp_path / file)
        label = Rig().camera(0.1).label()[0].tolist()
        content = {"items": [{"file": listed}]} if listing == "artworks.json" else {"labels": [[listed, label]]}
        (tmp_path / listing).write_text(json.dumps(content))
        assert [artwork.id for artwork in read_artworks(str(tmp_path), size=32)] == [item_id(file)]

    def test_that_are_too_long(self, folder):
        with pytest.raises(UserError, match="File name too long"):
            read_artworks("x" * 300)
        with pytest.raises(UserError, match="File name too long"):
            read_artworks(listed(folder, {"file": "/".join(["x" * 200] * 40)}))

    def test_links_to_nothing_are_told_of(self, folder):
        (folder / "c.png").symlink_to("nowhere")
        with pytest.raises(UserError, match=r"c\.png does not exist"):
            read_artworks(str(folder), size=32)

    def test_lists_of_other_systems(self, folder):
        (folder / "sub").mkdir()
        (folder / "b.png").rename(folder / "sub" / "b.png")
        label = Rig().camera(0.1).label()[0].tolist()
        (folder / "dataset.json").write_bytes(
            b"\xef\xbb\xbf" + json.dumps({"labels": [["sub\\b.png", label]]}).encode()
        )
        assert [artwork.id for artwork in read_artworks(str(folder), size=32)] == [item_id("sub/b.png")]


@pytest.mark.parametrize("listing", ["artworks.json", "dataset.json"])
def test_pictures_that_are_not_listed_are_named(folder, caplog, listing):
    caplog.set_level("INFO")
    label = Rig().camera(0.1).label()[0].tolist()
    content = {"items": [{"file": "b.png"}]} if listing == "artworks.json" else {"labels": [["b.png", label]]}
    (folder / listing).write_text(json.dumps(content))
    assert [artwork.id for artwork in read_artworks(str(folder), size=32)] == ["b"]
    assert f"left out: a.jpg: {listing} does not list them" in caplog.text


@pytest.mark.parametrize(("width", "height"), [(800, 15_000), (40, 20_000), (20_000, 40), (17, 30_000)])
def test_strips(tmp_path, width, height):
    Image.new("RGB", (width, height), "grey").save(tmp_path / "x.png")
    assert read_artworks(str(tmp_path / "x.png"), size=16)[0].image.shape == (3, 16, 16)
    with pytest.raises(UserError, match="found no face"):
        read_artworks(str(tmp_path / "x.png"), size=16, crop="face")


def _pixels(label):
    return [*label[:16], label[16] * 512, 0.0, 256.0, 0.0, label[20] * 512, 256.0, 0.0, 0.0, 1.0]


def _opengl(label):
    turned = torch.tensor(label[:16]).reshape(4, 4) @ torch.diag(torch.tensor([1.0, -1, -1, 1]))
    return [*turned.flatten().tolist(), *label[16:]]


def _columns(label):
    return [*torch.tensor(label[:16]).reshape(4, 4).T.flatten().tolist(), *label[16:]]


CAMERAS = [
    (_pixels, "intrinsics must be divided by the image size"),
    (_opengl, "looks away from the origin.*OpenCV axes"),
    (_columns, "the last row of cam2world must be 0 0 0 1"),
    (lambda label: [*label[:12], 0.0, 0.0, 0.0, 2.0, *label[16:]], "the last row of cam2world must be 0 0 0 1"),
    (lambda label: [True, *label[1:]], "True is not a number of a camera"),
    (lambda label: ["1", *label[1:]], "'1' is not a number of a camera"),
    (lambda label: [1e300, *label[1:]], "not finite|not orthonormal"),
    (lambda label: [*label[:18], 1.5, *label[19:]], "intrinsics must be divided"),
    (lambda label: [*label[:24], 0.0], "the last row of the intrinsics must be 0 0 1"),
]


@pytest.mark.parametrize(("change", "message"), CAMERAS)
def test_cameras_of_another_kind(folder, change, message):
    label = Rig(radius=2.7, focal=4.2647).camera(0.3, 0.05).label()[0].tolist()
    content = {"labels": [["b.png", label], ["a.jpg", change(label)]]}
    with pytest.raises(UserError, match=rf"a\.jpg: .*({message})"):
        camera_labels(content, "dataset.json", lambda _: True)


@pytest.mark.parametrize("size", [0, -1, 8])
def test_size_that_is_none(size):
    with pytest.raises(UserError, match=f"data.size is {size}"):
        ArtworkDataModule("x.png", size=size)


@pytest.mark.parametrize("recipe", ["embedded", "eg3d"])
def test_size_of_the_recipe(tmp_path, recipe):
    write_image(tmp_path / "a.png", torch.zeros(3, 40, 40))
    (item,) = ArtworkDataModule(str(tmp_path / "a.png"), size=None, crop="none", recipe=recipe).items
    assert item.image.shape[-1] == RECIPES[recipe].size


@pytest.mark.parametrize("name", ["subjects", "size", "views", "supersample"])
def test_mannequins_that_are_none(name):
    with pytest.raises(UserError, match="must be at least 1"):
        MannequinArtworks(**{name: 0})


def test_photos_of_heads_whose_truth_is_in_a_style():
    options = {"split": "val", "subjects": 1, "styles": "toon", "size": 16, "views": 2, "supersample": 1}
    artworks, photos, plain = (
        MannequinArtworks(**options | more) for more in ({}, {"photos": True}, {"styles": "plain"})
    )
    (artwork,), (photo,) = artworks.items, photos.items
    assert artwork.id == photo.id and torch.equal(artwork.label, photo.label)
    assert torch.equal(artworks.item_truth(artwork.id).views.image, photos.item_truth(photo.id).views.image)
    (portrayal,), (own,) = photos.portrayals.values(), plain.portrayals.values()
    assert torch.equal(photo.image, own.render(portrayal.camera, 16, 1).image[0])
    assert not torch.equal(photo.image, artwork.image)


def test_the_papers_portraits():
    """Sec. 4.3.4: the frontal view is the artwork, the six others are scored; each subject in one style, by turns."""
    data = MannequinArtworks(
        "val", 4, styles=["toon", "sketch", "ukiyoe"], size=8, supersample=1, rotate_styles=True, frontal=True
    )
    first, *_ = data.items
    assert sorted(item.style for item in data.items) == ["sketch", "toon", "toon", "ukiyoe"]
    assert len({data.portrayals[item.id].seed for item in data.items}) == 4
    assert float(Camera.from_label(first.label[None]).yaw) == pytest.approx(0, abs=1e-5)
    truth = data.item_truth(first.id).views.camera
    assert truth.yaw.rad2deg().round().tolist() == [-36, -24, -12, 12, 24, 36]
    assert truth.pitch.abs().max() < 1e-5
    with pytest.raises(UserError, match="frontal artworks leave no view"):
        MannequinArtworks("val", 1, views=1, yaw_max_deg=0.0, frontal=True)


def test_caricatures_and_wrong_cameras():
    """A caricature is another head; a wrong camera is told of the same picture, and the truth stays."""
    options = {"split": "val", "subjects": 4, "styles": ["toon"], "size": 16, "supersample": 1, "views": 3}
    plain, wrong = MannequinArtworks(**options), MannequinArtworks(**options, camera_error_deg=10.0)
    drawn = MannequinArtworks(**options, exaggeration="big_eyes", strength=1.0)
    turns = []
    for ours, told, other in zip(plain.items, wrong.items, drawn.items, strict=True):
        assert torch.equal(ours.image, told.image) and not torch.equal(ours.image, other.image)
        assert torch.equal(ours.label, other.label)
        error = Camera.from_label(told.label[None]).yaw - Camera.from_label(ours.label[None]).yaw
        turns.append(round(math.degrees(float(error))))
        assert torch.equal(plain.item_truth(ours.id).views.image, wrong.item_truth(ours.id).views.image)
    assert set(turns) == {-10, 10}
    with pytest.raises(UserError, match="unknown exaggeration 'nose'"):
        MannequinArtworks(exaggeration="nose")
