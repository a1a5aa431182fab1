"""Parity fixtures: every array of every one, what is wrong with broken ones, and the files they stand for."""

import json
import math
import zlib

import numpy as np
import pytest
import torch

from models.zoo.family import ZooError
from models.zoo.parity import Fixture, compare, report
from tests.models.zoo.fixtures import fixture_folder, fixture_folders


@pytest.mark.slow  # the large encoders
@pytest.mark.parametrize("folder", fixture_folders(), ids=lambda folder: folder.name)
def test_numbers_of_the_official_network(folder):
    found = report(folder)
    assert not found.failure
    assert [c for c in found.comparisons if not c.passed] == []
    recorded = json.loads((folder / "meta.json").read_text())["arrays"]
    assert {c.name for c in found.comparisons} == {name for name in recorded if name.split("/")[1] in ("mid", "out")}


RULES = [
    {"match": "norm", "const": 2.0},
    {"match": "kernel", "keep": True},
    {"match": "twin", "scale": 0.5, "mean": 1.0, "seed_sub": ["twin", "weight"]},
    {"match": "abs", "abs": True, "fan": "out"},
    {"match": "weight", "fan": "in"},
]


@pytest.fixture
def folder(tmp_path):
    entries = [
        ["weight", [1, 4, 3, 2, 2], "float32"],
        ["twin", [1, 4, 3, 2, 2], "float32"],
        ["abs", [9], "float32"],
        ["norm", [3], "float32"],
        ["kernel", [2, 2], "float32"],
        ["steps", [], "int64"],
    ]
    meta = {
        "name": "toy",
        "config": {},
        "salt": "s",
        "models": {"toy": {"state_dict": entries, "rules": RULES, "parameter_names": ["twin", "weight"]}},
        "arrays": {
            "a/in/x": {"role": "in"},
            "a/out/y": {"atol": 0.1, "rtol": 0.1},
            "a/out/z": {"atol": 0.1, "rtol": 0.0, "min_fraction": 0.5},
        },
        "checkpoint": {
            "pt": {
                "layout": {
                    "merged": {"merge": [{"model": "toy", "prefix": "p."}, {"one": {"value": 1}}]},
                    "mean": {"array": "a/in/x"},
                    "ema": {"list_of_params": "toy"},
                }
            },
            "unknown": {"layout": None},
        },
    }
    arrays = {
        "a/in/x": np.ones(3, np.float32),
        "a/out/y": np.array([1.0, np.nan, np.inf, 0.0], np.float32),
        "a/out/z": np.zeros(4, np.float32),
        "kept/toy/kernel": np.eye(2, dtype=np.float32),
    }
    np.savez(tmp_path / "io.npz", **arrays)
    sums = {"sum": 0.0, "sum_abs": math.inf}  # within any tolerance, until the state is known
    meta["models"]["toy"]["weights_check"] = sums
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    values = [t.double() for t in Fixture(tmp_path, meta, arrays).state("toy").values()]
    sums |= {"sum": sum(float(t.sum()) for t in values), "sum_abs": sum(float(t.abs().sum()) for t in values)}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


class TestFixture:
    def test_weights_by_recipe(self, folder):
        state = Fixture.load(folder).state("toy")
        assert list(state) == ["weight", "twin", "abs", "norm", "kernel", "steps"]
        draws = np.random.Generator(np.random.PCG64(zlib.crc32(b"s" + b"weight"))).standard_normal((4, 3, 2, 2))
        torch.testing.assert_close(state["weight"][0], torch.from_numpy(draws / math.sqrt(12)).float())
        torch.testing.assert_close(state["twin"], 1 + 0.5 * math.sqrt(12) * state["weight"])
        assert (state["abs"] >= 0).all()
        assert state["norm"].tolist() == [2, 2, 2]
        assert torch.equal(state["kernel"], torch.eye(2))
        assert state["steps"].dtype == torch.int64

    def test_salt_and_sums(self, folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "salt": "other"}))
        with pytest.raises(ZooError, match="toy: weights by recipe have sum"):
            Fixture.load(folder).state("toy")

    def test_checkpoint(self, folder):
        fixture = Fixture.load(folder)
        file, state = fixture.checkpoint("pt"), fixture.state("toy")
        assert list(file["merged"]) == [*(f"p.{key}" for key in state), "one"]
        assert file["merged"]["one"] == 1
        assert torch.equal(file["ema"][1], state["weight"])
        assert torch.equal(file["mean"], torch.ones(3))
        for name in ("unknown", "none"):
            with pytest.raises(ZooError, match="does not tell what a file"):
                fixture.checkpoint(name)

    def test_comparison(self, folder):
        fixture = Fixture.load(folder)
        right = torch.tensor([1.1, math.nan, math.inf, 0.05])
        assert compare(fixture, "a/out/y", right).passed
        for wrong in (torch.tensor([1.3, math.nan, math.inf, 0]), torch.tensor([1, 0, math.inf, 0])):
            assert not compare(fixture, "a/out/y", wrong).passed
        assert not compare(fixture, "a/out/y", torch.tensor([1, math.nan, math.nan, 0])).passed
        assert "shape (2,)" in compare(fixture, "a/out/y", torch.ones(2)).reason
        assert compare(fixture, "a/out/y", None).reason == "not computed"
        half = compare(fixture, "a/out/z", torch.tensor([0, 0, 1.0, 1.0]))
        assert half.passed and half.fraction == 0.5 and half.worst == pytest.approx(10)

    def test_strided(self, folder):
        fixture = Fixture.load(folder)
        assert fixture.strided("a/out/z", torch.arange(8)).tolist() == [0, 2, 4, 6]
        assert fixture.strided("a/out/unknown", torch.arange(8)).tolist() == list(range(8))
        assert fixture.strided("a/out/z", torch.ones(8, 2)).shape == (8, 2)

    @pytest.mark.parametrize(
        ("size", "step"),
        [(400, 32), (484, 64), (784, 64), (10, 8), (18, 8), (30, 4), (576, 64), (7, 1), (3, 4), (9, 3)],
    )
    def test_steps_of_sizes_that_they_do_not_divide(self, folder, size, step):
        fixture, full = Fixture.load(folder), torch.arange(size)
        fixture.arrays["a/out/z"] = full[::step].numpy()
        kept = fixture.strided("a/out/z", full)
        if step == 3:  # 3 of 9 are every third or every fourth: powers of two go first
            assert kept.tolist() == [0, 4, 8]
        else:
            assert kept.tolist() == full[::step].tolist()


class TestReport:
    def test_no_family(self, folder):
        found = report(folder)
        assert not found.passed and found.worst is None
        assert "'toy'" in found.failure

    @pytest.mark.parametrize(
        ("damage", "match"),
        [
            (lambda f: (f / "io.npz").unlink(), r"is not a parity fixture: io\.npz is missing"),
            (lambda f: (f / "meta.json").unlink(), r"is not a parity fixture: meta\.json is missing"),
            (lambda f: (f / "meta.json").write_text("{"), "is a damaged parity fixture: Expecting"),
            (lambda f: (f / "meta.json").write_text("[]"), r"damaged parity fixture: meta\.json has no 'config'"),
            (lambda f: (f / "io.npz").write_bytes(b"PK"), "is a damaged parity fixture"),
            (lambda f: np.savez(f / "io.npz", x=np.array([{}])), "is a damaged parity fixture: Object arrays"),
            (lambda f: np.savez(f / "io.npz", x=np.ones(1)), r"damaged parity fixture: io\.npz has no 'a/in/x'"),
        ],
    )
    def test_broken_folders(self, folder, damage, match):
        damage(folder)
        with pytest.raises(ZooError, match=match):
            Fixture.load(folder)
        assert not report(folder).passed and report(folder).failure

    def test_wrong_numbers_and_exceptions(self, tmp_path):
        original = Fixture.load(fixture_folder("gram_carla_like"))
        wrong = {**original.arrays, "rad/out/scalar": original.arrays["rad/out/scalar"] + 1}
        np.savez(tmp_path / "io.npz", **wrong)
        (tmp_path / "meta.json").write_text(json.dumps(original.meta))
        found = report(tmp_path)
        assert not found.passed and not found.failure
        assert [c.name for c in found.comparisons if not c.passed] == ["rad/out/scalar"]
        assert found.worst.name == "rad/out/scalar" and found.worst.worst > 1
        (tmp_path / "meta.json").write_text(json.dumps({**original.meta, "models": {}}))
        assert report(tmp_path).failure == "KeyError: 'generator'"
