"""galatea align: what it writes, that it is edited and read, and that nothing of the user's is touched."""

import csv
import importlib
import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from datamodules import alignment
from datamodules.artworks import ArtworkDataModule, read_artworks
from datamodules.portraits import PortraitDataModule
from datamodules.poses import find_camera
from models.camera import Camera
from models.errors import UserError
from models.faces.recipes import RECIPES
from models.image import read_image
from stages.commands.align import main


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(astronaut()).save(folder / "ann.jpg", quality=95)
    Image.fromarray(astronaut()).rotate(15, expand=True).save(folder / "bea.png")
    Image.new("RGB", (200, 160), "grey").save(folder / "wall.png")
    Image.fromarray(astronaut()[:, ::-1].copy()).save(folder / "more" / "cat.png")
    (folder / "notes.txt").write_text("mine")
    return folder


def run(*arguments):
    main([str(argument) for argument in arguments])


def content(file):
    return json.loads(file.read_text())


def test_a_folder(photos, tmp_path, capsys):
    out = tmp_path / "out"
    run(photos, "--for", "eg3d", "--out", out, "--size", 96)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        *("ann.png", "bea.png", "artworks.json", "dataset.json", "overlay.png", "report.csv"),
        *("originals/ann.jpg", "originals/bea.png"),
    }
    said = capsys.readouterr().out
    assert "left out: wall.png: found no face" in said and "2 of 3 pictures" in said
    assert (out / "originals" / "ann.jpg").read_bytes() == (photos / "ann.jpg").read_bytes()
    assert read_image(out / "ann.png").shape == (1, 3, 96, 96)
    items = content(out / "artworks.json")["items"]
    assert set(items[0]) == {"file", "yaw_deg", "pitch_deg", "points", "roll_deg", "scale", "shift"}
    assert items[1]["roll_deg"] - items[0]["roll_deg"] == pytest.approx(-15, abs=2)
    labels = dict(content(out / "dataset.json")["labels"])
    camera = Camera.from_label(torch.tensor(list(labels.values())))
    assert list(labels) == ["ann.png", "bea.png"] and torch.allclose(camera.position.norm(dim=1), torch.tensor(2.7))
    yaw, pitch = RECIPES["eg3d"].rig.angles(camera)
    assert math.degrees(yaw[0]) == pytest.approx(items[0]["yaw_deg"], abs=0.01)
    assert math.degrees(pitch[0]) == pytest.approx(items[0]["pitch_deg"], abs=0.01)
    rows = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    assert [row["aligned"] for row in rows] == ["yes", "yes", "no"] and "no face" in rows[2]["remarks"]


def test_edited_numbers_are_used_without_running_anything(photos, tmp_path):
    out = tmp_path / "out"
    run(photos / "ann.jpg", "--for", "embedded", "--out", out)
    before = read_image(out / "ann.png")
    (same,) = read_artworks(str(out), size=128)
    assert same.id == "ann" and float((same.image - before[0]).abs().max()) < 0.01  # 8 bits
    listed = content(out / "artworks.json")
    listed["items"][0] |= {"yaw_deg": 12, "scale": 1.3, "style": "photo"}
    (out / "artworks.json").write_text(json.dumps(listed))
    (edited,) = ArtworkDataModule(str(out), size=128).items
    assert math.degrees(edited.angles[0]) == pytest.approx(12) and edited.style == "photo" and not edited.estimated
    assert float((edited.image - before[0]).abs().mean()) > 0.05
    # And the crops follow when the folder is aligned again; what is the user's stays.
    (out / "mine.txt").write_text("x")
    run(out)
    assert float((read_image(out / "ann.png")[0] - edited.image).abs().max()) < 0.01
    assert content(out / "artworks.json")["items"] == [{**listed["items"][0], "file": "originals/ann.jpg"}]
    camera = Camera.from_label(torch.tensor([content(out / "dataset.json")["labels"][0][1]]))
    assert math.degrees(camera.yaw) == pytest.approx(12, abs=1e-3)
    assert (out / "mine.txt").read_text() == "x"


def test_again_without_edits_changes_nothing(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, "--for", "eg3d", "--out", out, "--size", 64)
    files = [out / name for name in ("ann.png", "bea.png", "dataset.json", "artworks.json", "overlay.png")]
    before = [file.read_bytes() for file in files]
    run(out)
    assert [file.read_bytes() for file in files] == before


def test_a_crop_goes_when_its_picture_can_no_longer_be_framed(photos, tmp_path, capsys):
    out = tmp_path / "out"
    run(photos, "--out", out, "--size", 32)
    (out / "originals" / "bea.png").write_bytes(b"")
    run(out)
    assert "1 of 2 pictures" in capsys.readouterr().out
    assert not (out / "bea.png").exists() and (out / "ann.png").exists() and (out / "originals" / "bea.png").exists()
    assert [name for name, _ in content(out / "dataset.json")["labels"]] == ["ann.png"]
    assert len(content(out / "artworks.json")["items"]) == 2  # to be mended


def test_an_aligned_folder_for_another_generator(photos, tmp_path, caplog):
    photo = photos / "bea.png"
    run(photo, "--for", "embedded", "--out", tmp_path / "a", "--size", 64)
    listed = content(tmp_path / "a" / "artworks.json")
    listed["items"][0] |= {"yaw_deg": 20, "scale": 1.2, "shift": [0.1, 0]}  # a person's
    (tmp_path / "a" / "artworks.json").write_text(json.dumps(listed))
    for recipe in ("gram", "eg3d-wild"):
        run(photo, "--for", recipe, "--out", tmp_path / f"{recipe}-fresh", "--size", 64)
        caplog.clear()
        run(tmp_path / "a", "--for", recipe, "--out", tmp_path / recipe, "--size", 64)
        assert caplog.text.count(f"its angles are found again for {recipe}") == 1
        new, fresh = (content(tmp_path / name / "artworks.json") for name in (recipe, f"{recipe}-fresh"))
        assert new["recipe"] == recipe
        for name in ("yaw_deg", "pitch_deg", "roll_deg"):
            assert new["items"][0][name] == pytest.approx(fresh["items"][0][name], abs=1), name
        assert all(new["items"][0][name] == listed["items"][0][name] for name in ("points", "scale", "shift"))
        # A pipeline that is given the first folder frames it as its own generator needs.
        (item,) = read_artworks(str(tmp_path / "a"), size=64, recipe=recipe)
        assert float((item.image - read_image(tmp_path / recipe / "bea.png")[0]).abs().max()) < 0.01


@pytest.mark.parametrize("recipe", ["eg3d", "eg3d-wild"])
def test_pipelines_see_with_the_cameras_that_are_written(photos, tmp_path, recipe):
    run(photos / "bea.png", "--for", recipe, "--out", tmp_path / "out", "--size", 64)
    label = torch.tensor(content(tmp_path / "out" / "dataset.json")["labels"][0][1])
    generator = SimpleNamespace(rig=RECIPES[recipe].rig)
    for path, tolerance in ((tmp_path / "out", 1e-6), (photos / "bea.png", 0.01)):  # there the mesh is read once more
        (item,) = read_artworks(str(path), size=64, crop="face", recipe=recipe)
        found = find_camera(item, generator, None, None, torch.device("cpu")).label()[0]
        torch.testing.assert_close(found, label, atol=tolerance, rtol=0)


def test_points_and_face_by_hand(photos, tmp_path):
    points = "203,102 248,104 222,131 202,139 246,142"
    run(photos / "ann.jpg", "--out", tmp_path / "out", "--points", points, "--size", 64)
    assert content(tmp_path / "out" / "artworks.json")["items"][0]["points"][1] == [248, 104]


class TestTrainingData:
    def test_is_read(self, photos, tmp_path):
        out = tmp_path / "data.zip"
        run(photos, "--for", "eg3d", "--out", out, "--size", 32)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            *("data.overlay.png", "data.report.csv", "data.zip", "photos")
        ]
        data = PortraitDataModule(str(out), size=32, val_fraction=0.34, test_fraction=0.34, mirror=False)
        data.setup("fit")
        assert [len(data.datasets[split]) for split in ("train", "val", "test")] == [1, 1, 1]
        assert data.datasets["train"][0]["label"].shape == (1, 25)
        rows = list(csv.DictReader((tmp_path / "data.report.csv").read_text().splitlines()))
        assert [row["file"] for row in rows if row["aligned"] == "no"] == ["wall.png"]

    def test_goes_on_where_it_was_killed(self, photos, tmp_path, monkeypatch):
        monkeypatch.setattr(alignment, "PART", 1)
        whole, out = tmp_path / "whole.zip", tmp_path / "data.zip"
        run(photos, "--out", whole, "--size", 32)
        with monkeypatch.context() as later:
            later.setattr("time.time", lambda: 2e9)
            run(photos, "--out", tmp_path / "later.zip", "--size", 32)
        assert (tmp_path / "later.zip").read_bytes() == whole.read_bytes()
        framed, real = [], alignment.align

        def dies(place, entry, *rest):
            framed.append(entry["file"])
            if len(framed) == 3:
                raise KeyboardInterrupt
            return real(place, entry, *rest)

        monkeypatch.setattr(alignment, "align", dies)
        with pytest.raises(KeyboardInterrupt):
            run(photos, "--out", out, "--size", 32)
        assert not out.exists() and len(list((tmp_path / "data.zip.parts").glob("0*.zip"))) == 2
        with pytest.raises(UserError, match="holds parts of other pictures or options"):
            run(photos, "--out", out, "--size", 48)
        (tmp_path / "data.zip.parts" / ".00000002.1.tmp.zip").write_bytes(b"half")  # what a killed process leaves
        run(photos, "--out", out, "--size", 32)
        assert len(framed) == 5 and framed[3] == framed[2]  # none twice but the one that was lost
        assert not (tmp_path / "data.zip.parts").exists()
        assert (tmp_path / "data.report.csv").read_bytes() == (tmp_path / "whole.report.csv").read_bytes()
        assert out.read_bytes() == whole.read_bytes()
        assert {info.external_attr >> 16 for info in zipfile.ZipFile(out).infolist()} == {0o644}  # once unpacked

    @pytest.mark.parametrize("step", ["datamodules.alignment._write_json", "os.replace", "pathlib.Path.unlink"])
    def test_killed_when_all_is_there(self, photos, tmp_path, monkeypatch, step):
        """Right after it is noted that all is there, after the zip is in its place, and while parts are removed."""
        out, parts = tmp_path / "data.zip", tmp_path / "data.zip.parts"
        module, _, name = step.rpartition(".")
        real = getattr(Path if module == "pathlib.Path" else importlib.import_module(module), name)

        def dies(*arguments, **options):
            real(*arguments, **options)
            last = arguments[-1]
            if "count" in last if name == "_write_json" else last == {"replace": out}.get(name, parts / "00000000.zip"):
                raise KeyboardInterrupt

        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(step, dies)
            run(photos / "ann.jpg", "--out", out, "--size", 32)
        assert parts.exists() and out.exists() == (name != "_write_json")
        monkeypatch.setattr(alignment, "align", None)  # nothing is framed again
        run(photos / "ann.jpg", "--out", out, "--size", 32)
        assert not parts.exists() and zipfile.ZipFile(out).namelist() == ["ann.png", "dataset.json"]
        assert (tmp_path / "data.report.csv").exists() and (tmp_path / "data.overlay.png").exists()

    def test_two_names_of_one_id(self, photos, tmp_path):
        Image.fromarray(astronaut()).save(photos / "ann.png")
        run(photos, "--out", tmp_path / "data.zip", "--size", 32)
        names = zipfile.ZipFile(tmp_path / "data.zip").namelist()
        assert names.count("ann.png") == 1 and len(names) == 4
        rows = list(csv.DictReader((tmp_path / "data.report.csv").read_text().splitlines()))
        left = {row["file"]: row["remarks"] for row in rows if row["aligned"] == "no"}
        assert left["ann.png"] == "has the same id as ann.jpg: rename one of the files" and len(left) == 2

    def test_the_first(self, photos, tmp_path):
        run(photos, "--out", tmp_path / "data.zip", "--size", 32, "--first", 1)
        assert zipfile.ZipFile(tmp_path / "data.zip").namelist() == ["ann.png", "dataset.json"]


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (["--out", "OUT", "--for", "x"], "'x' is neither a recipe"),
            ([], "--out is missing"),
            (["--out", "OUT", "--size", 0], "--size is 0"),
            (["--out", "OUT", "--face", 0], "--face is 0"),
            (["--out", "OUT", "--points", "1,2 3,4"], "--points are of one picture"),
            (["--out", "OUT", "--crop", "x"], "invalid choice"),
        ],
    )
    def test_options(self, photos, tmp_path, options, match):
        with pytest.raises(UserError, match=match):
            run(photos, *(tmp_path / "out" if option == "OUT" else option for option in options))
        assert not (tmp_path / "out").exists()

    def test_what_is_there(self, photos, tmp_path):
        with pytest.raises(UserError, match=r"photos is there already and is not changed; take another"):
            run(photos / "ann.jpg", "--out", photos)
        (tmp_path / "data.zip").write_text("x")
        with pytest.raises(UserError, match="is there already"):
            run(photos, "--out", tmp_path / "data.zip")
        (tmp_path / "mine.report.csv").write_text("x")
        with pytest.raises(UserError, match=r"mine\.report\.csv is there already and is not changed"):
            run(photos, "--out", tmp_path / "mine.zip")
        (tmp_path / "new.zip.parts").mkdir()
        (tmp_path / "new.zip.parts" / "mine").write_text("x")
        with pytest.raises(UserError, match="not what an earlier run left"):
            run(photos, "--out", tmp_path / "new.zip")
        run(photos / "ann.jpg", "--out", tmp_path / "out", "--size", 32)
        with pytest.raises(UserError, match="frames its pictures again; take another"):
            run(photos / "bea.png", "--out", tmp_path / "out")
        listed = content(tmp_path / "out" / "artworks.json")
        listed["items"].append({"file": "bea.png"})
        (tmp_path / "out" / "artworks.json").write_text(json.dumps(listed))
        (tmp_path / "out" / "bea.png").write_bytes((photos / "bea.png").read_bytes())
        with pytest.raises(UserError, match=r"bea\.png is where its crop would be: move it to originals"):
            run(tmp_path / "out")
        assert (tmp_path / "out" / "bea.png").read_bytes() == (photos / "bea.png").read_bytes()
        with pytest.raises(UserError, match="was aligned for embedded: give another --out"):
            run(tmp_path / "out", "--for", "gram")

    def test_names_that_are_one_id(self, photos, tmp_path):
        Image.fromarray(astronaut()).save(photos / "ann.png")
        with pytest.raises(UserError, match=r"ann\.jpg and ann\.png have the same id: rename"):
            run(photos, "--out", tmp_path / "out")

    def test_nothing_to_align(self, photos, tmp_path):
        for out in (tmp_path / "out", tmp_path / "out.zip"):
            with pytest.raises(UserError, match="found no face, where one is needed"):
                run(photos / "wall.png", "--out", out)
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]

    def test_pictures_that_cannot_be_read_are_left_out(self, photos, tmp_path, capsys):
        (photos / "bad.png").write_bytes((photos / "bea.png").read_bytes()[:3000])
        Image.new("1", (10_000, 10_000)).save(photos / "huge.png")
        run(photos, "--out", tmp_path / "out", "--size", 32)
        said = capsys.readouterr().out
        assert "bad.png" in said and "at most 50 million pixels are read" in said and "2 of 5 pictures" in said


def test_it_is_quick():
    """Half a second a picture after loading, on a core of its own; three times that here, where others work too."""
    from time import process_time

    from datamodules.framing import Edits, Framing, reader

    reader()
    image = torch.from_numpy(np.ascontiguousarray(astronaut())).permute(2, 0, 1)[None] / 127.5 - 1
    start = process_time()
    for _ in range(3):
        Framing(RECIPES["ffhq"], 1024)(image, "x", Edits())
    assert process_time() - start < 3 * 1.5
