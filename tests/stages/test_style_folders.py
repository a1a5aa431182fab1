"""What a folder of pictures in a style may hold: few, the same, of all sizes, and other files."""

import shutil

import numpy as np
import pytest
from PIL import Image

from models.errors import UserError
from models.metrics.records import read_records
from tests.stages.test_finetune import SIDE, inputs, line, run, states

MEANS = {"class_path": "tests.stages.test_finetune.Means"}
PLAIN = {"semantic": None, "structure": None}


@pytest.fixture
def work(tmp_path):
    inputs(tmp_path)
    return tmp_path


def adapted(folder, out, data=None, **model):
    run(line(folder, data, **PLAIN, **model), out)
    before, after = states(folder / "prior2d"), states(out)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not np.allclose(before[name], after[name], atol=2e-3) for name in before)


def test_three_pictures(work):
    """None can be held out to score a fit by; without a score it learns from all of them."""
    for file in sorted((work / "style").iterdir())[3:]:
        file.unlink()
    with pytest.raises(
        UserError, match=r"the data hold out 1: hold out two or more, or set --model\.kid_features null"
    ):
        run(line(work, **PLAIN, kid_features=MEANS), work / "scored")
    adapted(work, work / "out", {"val_fraction": 0.0, "test_fraction": 0.0}, kid_features=None)


def test_one_picture_many_times(work):
    """No distance to a set of the same is undefined."""
    first, *others = sorted((work / "style").iterdir())
    for file in others:
        shutil.copy(first, file)
    adapted(work, work / "out", kid_features=MEANS)
    tested = [f"--model.tested.path={work / 'out'}", f"--out={work / 'test'}"]
    words = line(work, **PLAIN, kid_features=MEANS, neighbours=2)
    run([words[0], "test", *words[2:], *tested], work / "test")
    sets = ("fid", "kid", "recall", "diversity", "diversity_change")
    found = [(record.metric, record.value) for record in read_records(work / "test") if record.metric in sets]
    assert {metric for metric, _ in found} == set(sets) and np.isfinite([value for _, value in found]).all()


def test_pictures_of_all_sizes_and_kinds(work):
    """Each becomes one of the generator's size."""
    files = sorted((work / "style").iterdir())
    for file, side, mode in zip(files, (17, 16, 33, 64, 300), ("RGB", "L", "RGBA", "P", "CMYK"), strict=False):
        picture = Image.open(file).convert("RGB").resize((side, side)).convert(mode)
        file.unlink()
        picture.save(file.with_suffix(".jpg" if mode == "CMYK" else ".png"))
    adapted(work, work / "out")


def test_other_files(work):
    """Are no pictures of the style."""
    (work / "style" / "notes.txt").write_text("where these come from")
    (work / "style" / ".hidden.png").write_bytes(b"no picture")
    adapted(work, work / "out")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda file: Image.new("RGB", (SIDE, 2 * SIDE)).save(file),
            r"style00\.png is 16 x 32: portraits must be square",
        ),
        (lambda file: file.write_text("no picture"), r"style00\.png"),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), r"style00\.png"),
    ],
)
def test_what_is_no_portrait(work, spoil, match):
    """One sentence names it."""
    spoil(work / "style" / "style00.png")
    with pytest.raises(UserError, match=match) as caught:
        run(line(work, {"seed": 0}, **PLAIN), work / "out")
    assert "\n" not in str(caught.value)
    assert not (work / "out" / "artifact").exists()
