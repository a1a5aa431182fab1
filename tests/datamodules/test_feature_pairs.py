"""Matched pictures: what is equal within a pose, what differs between poses."""

import numpy as np
import pytest
import torch

from datamodules.feature_pairs import PITCH_MAX, YAW_MAX, FeaturePairs, draw_subject, plan
from datamodules.mannequins.styles import ART_STYLES, HELD_OUT_STYLE, PLAIN, STYLES
from models.errors import UserError


def test_training_never_shows_the_held_out_style():
    plans = [[picture.style for picture in plan(subject, held_out=False)] for subject in range(200)]
    shown = {style for styles in plans for style in styles}
    assert shown == set(STYLES) - {HELD_OUT_STYLE}
    for styles in plans:
        assert styles[0] == styles[2] == PLAIN
        assert len({styles[i] for i in (1, 3, 4, 5)}) == 4


def test_evaluation_goes_round_all_styles():
    for start in (0, 1_100_000):
        plans = [plan(subject, held_out=True) for subject in range(start, start + 2)]
        assert sorted(p.style for each in plans for p in each[1::2]) == sorted(ART_STYLES)
        assert all(p.style == PLAIN for each in plans for p in each[::2])


@pytest.fixture(scope="module")
def drawn():
    return draw_subject(1_100_000, 24, held_out=True)


def test_a_pose_differs_in_style_only(drawn):
    assert drawn["image"].shape == (6, 3, 24, 24) and drawn["image"].dtype == np.uint8
    for pose in range(3):
        a, b = 2 * pose, 2 * pose + 1
        assert drawn["yaw"][a] == drawn["yaw"][b] and drawn["pitch"][a] == drawn["pitch"][b]
        assert (drawn["segmentation"][a] == drawn["segmentation"][b]).mean() > 0.95
        assert (drawn["image"][a] != drawn["image"][b]).mean() > 0.3
    assert len(set(drawn["yaw"])) == 3
    assert np.abs(drawn["yaw"]).max() <= YAW_MAX + 1e-5 and np.abs(drawn["pitch"]).max() <= PITCH_MAX + 1e-5


def test_seeded(drawn):
    again = draw_subject(1_100_000, 24, held_out=True)
    assert all(np.array_equal(drawn[name], again[name]) for name in drawn)


def test_subjects_from_a_number_on(tmp_path):
    """Judges learn from heads of their own; their pictures lie beside the others."""
    ours, judges = (FeaturePairs(str(tmp_path), 8, 1, 1, 1, first=first, compiled=False) for first in (0, 3))
    for data in (ours, judges):
        data.prepare_data()
    assert len(list(tmp_path.iterdir())) == 6
    assert np.array_equal(judges.dataset("train")[0]["image"], draw_subject(3, 8, held_out=False)["image"])
    assert not np.array_equal(judges.dataset("val")[0]["image"], ours.dataset("val")[0]["image"])


@pytest.mark.parametrize(
    ("first", "of"), [(-1, "1000000 subjects of train, 1300"), (100_000, "100000 subjects of val, 60")]
)
def test_subjects_that_do_not_exist(first, of):
    with pytest.raises(UserError, match=rf"^first is {first}: of {of} from there are wanted$"):
        FeaturePairs(first=first)


def test_kept_on_disk(tmp_path):
    data = FeaturePairs(str(tmp_path), 8, 2, 1, 1, batch_size=1, compiled=False)
    data.prepare_data()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 3
    data.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    batches = list(data.train_dataloader())
    assert len(batches) == 2 and batches[0]["image"].shape == (1, 6, 3, 8, 8)
    assert batches[0]["style"].dtype == torch.int64
    assert len(list(data.val_dataloader())) == len(list(data.test_dataloader())) == 1


def test_needs_subjects(tmp_path):
    with pytest.raises(UserError, match="train_subjects must be at least 1"):
        FeaturePairs(str(tmp_path), train_subjects=0).prepare_data()


@pytest.mark.parametrize("damage", [b"", b"x", None], ids=["empty", "none", "cut"])
def test_what_is_damaged_is_drawn_again(tmp_path, monkeypatch, caplog, damage):
    data = FeaturePairs(str(tmp_path), size=24, train_subjects=1, val_subjects=1, test_subjects=1, compiled=False)
    drawn = {"image": np.zeros((6, 3, 24, 24), np.uint8), "style": np.zeros(6, np.uint8)}
    monkeypatch.setattr("datamodules.feature_pairs.draw_subject", lambda *_, **__: drawn)
    data.prepare_data()
    file = data.file("val")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    data.prepare_data()
    assert len(data.dataset("val")) == 1 and caplog.text.count("is damaged: its pictures are drawn again") == 1
