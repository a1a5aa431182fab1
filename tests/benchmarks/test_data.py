"""The benchmark of waiting for data."""

import pytest

from tests.benchmarks import data


@pytest.mark.filterwarnings("ignore")
def test_of_two_steps(tmp_path):
    options = {"train_subjects": 6, "val_subjects": 1, "test_subjects": 1, "views_per_subject": 2, "supersample": 1}
    options |= {"draw_workers": 0, "compiled": False, "cache_dir": str(tmp_path / "cache")}
    given = {f"data__init_args__{name}": value for name, value in options.items()}
    found = data.measure("prior", 1, tmp_path / "out", **given)
    assert found["images"] == pytest.approx(4)  # two heads, two views of each
    assert 0 < found["wait"] < found["step"] and found["share"] == pytest.approx(found["wait"] / found["step"])
