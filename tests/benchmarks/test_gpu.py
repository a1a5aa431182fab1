"""The GPU rehearsal, at toy sizes on the CPU."""

from __future__ import annotations

import json
import math
import os
import sys
import time

import pytest
import torch

from models.files import ROOT
from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks.gpu import networks, rehearsal, training
from tests.benchmarks.gpu.parts import Case, Setting, rows

CPU = torch.device("cpu")
PLACES = ("tests/models/generators/test_stylegan2.py", "tests/models/generators/test_gram.py")


def rehearse(monkeypatch, out, *options):
    """``python -m tests.benchmarks gpu`` in this process: what gpu.json says, and what it ends with."""
    line = ["benchmarks", "gpu", "--device=cpu", "--small", f"--out={out}", *options]
    monkeypatch.setattr(sys, "argv", line)
    said = None
    try:
        benchmarks.main()
    except SystemExit as end:
        said = end.code
    return json.loads((out / "gpu.json").read_text()), said


def cases(result, part):
    return {case["case"]: case for case in result["parts"][part]["cases"]}


@pytest.mark.slow
def test_all_of_it_at_toy_sizes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rehearsal, "FOLDERS", PLACES)  # all of them: the test below
    result, said = rehearse(monkeypatch, tmp_path)
    assert said is None and result["failed"] == []
    assert (result["device"], result["small"]) == ("cpu", True)
    assert list(result["parts"]) == list(rehearsal.PARTS)
    for part in result["parts"].values():
        assert part["status"] == "passed" and part["seconds"] > 0 and part["cases"]
        assert not any("skipped" in case for case in part["cases"])
    assert sum(part["seconds"] for part in result["parts"].values()) < result["seconds"] + 0.1

    (machine,) = cases(result, "environment").values()
    assert machine["torch"] == torch.__version__ and machine["card"] is None and machine["galatea"]
    (tests,) = cases(result, "tests").values()
    assert tests["passed"] >= 4

    speed = cases(result, "speed")
    assert len(speed) == 4 * len(networks.FAMILIES) + 2
    assert all(case["ms_a_picture"] > 0 and case["peak_mib"] is None for case in speed.values())
    assert [name for name, case in speed.items() if "first_call_s" in case] == [
        f"StyleGAN2, 1024 px, bf16 compiled, batch {batch}" for batch in (8, 1)
    ]
    views = cases(result, "free view")
    assert len(views) == 8 and all(case["frames_a_second"] > 0 for case in views.values())

    artwork = cases(result, "artwork")
    assert len(artwork) == 6
    for name, case in artwork.items():
        assert 0 < case["seconds"] <= case["whole_s"]
        assert case["extrapolated"] == ("present" not in name)
        if case["extrapolated"]:
            extra = (case["whole_steps"] - case["steps"]) * case["step_ms"] / 1000
            assert case["whole_s"] == pytest.approx(case["seconds"] + extra)
    assert artwork["EG3D, paper's settings, anchor"]["whole_steps"] == 500
    memory = cases(result, "memory")
    assert [name.partition(",")[0] for name in memory] == ["prior", "invert", "tune", "detail"]
    assert all(case["step_ms"] > 0 and case["peak_mib"] is None for case in memory.values())
    precision = cases(result, "precision")
    assert len(precision) == 4
    assert all(0 < case["difference"] < case["bound"] for case in precision.values())

    shown = capsys.readouterr().out
    assert all(part in shown for part in rehearsal.PARTS) and "StyleSDF, 256 px from 64, bf16, batch 8" in shown


@pytest.mark.slow
def test_the_tests_marked_gpu_work(tmp_path):
    setting = Setting(CPU, True, tmp_path, time.monotonic() + 600)
    part = rehearsal.carry_out(rehearsal.tests, setting, tmp_path / "log")
    assert part["status"] == "passed", part
    assert part["cases"][0]["passed"] >= 40 and part["cases"][0]["left_out"] == 0


def test_every_test_marked_gpu_is_where_the_rehearsal_looks():
    marked = [p for p in (ROOT / "tests").rglob("*.py") if "mark.gpu" in p.read_text() and "benchmarks" not in p.parts]
    assert marked
    assert all(any(path.is_relative_to(ROOT / place) for place in rehearsal.FOLDERS) for path in marked)


def test_tests_marked_gpu_skip_themselves_with_a_reason(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(rehearsal, "FOLDERS", PLACES[:1])
    setting = Setting(torch.device("cuda"), True, tmp_path, time.monotonic() + 60)
    part = rehearsal.carry_out(rehearsal.tests, setting, tmp_path / "log")
    (case,) = part["cases"]
    assert case["passed"] == 0 < case["left_out"] and case["reasons"] == ["torch finds no CUDA device"]
    assert part["status"] == "failed" and case["failed"].startswith("no test has passed")


def broken(setting):
    """One case of three that fails."""
    yield Case("first", lambda: {"value": 1})
    yield Case("second", lambda: {"value": 1 / 0})
    yield Case("third", lambda: {"value": 3})


def abrupt(setting):
    """A part whose process dies."""
    yield Case("first", lambda: {"value": 1})
    os._exit(3)


def mistaken(setting):
    """A part that cannot say what its cases are."""
    yield Case("first", lambda: {"value": 1})
    raise RuntimeError("nothing\nmore")


def endless(setting):
    """A part whose second case never ends."""
    yield Case("first", lambda: {"value": 1})
    yield Case("second", lambda: time.sleep(1000) or {})


def test_what_fails_fails_alone_and_is_told(monkeypatch, tmp_path, capsys):
    parts = {"environment": rehearsal.environment, "broken": broken, "abrupt": abrupt, "mistaken": mistaken}
    monkeypatch.setattr(rehearsal, "PARTS", {name: (part, 10) for name, part in parts.items()})
    monkeypatch.setattr(rehearsal, "MODULES", ())
    result, said = rehearse(monkeypatch, tmp_path)
    assert result["failed"] == ["broken", "abrupt", "mistaken"]
    assert isinstance(said, str) and said.startswith("failed: broken, abrupt, mistaken")  # exit code 1
    assert cases(result, "broken")["second"] == {"case": "second", "failed": "ZeroDivisionError: division by zero"}
    assert cases(result, "broken")["third"]["value"] == 3
    assert "exit code 3" in result["parts"]["abrupt"]["failure"] and cases(result, "abrupt")["first"]["value"] == 1
    assert result["parts"]["mistaken"]["failure"] == "RuntimeError: nothing more"
    assert "Traceback" in (tmp_path / "logs" / "mistaken.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "logs"}
    assert "ZeroDivisionError: division by zero" in " ".join(capsys.readouterr().out.split())


def test_a_part_that_does_not_end_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(rehearsal, "GRACE", 0.3)
    begin = time.monotonic()
    part = rehearsal.carry_out(endless, Setting(CPU, True, tmp_path, begin + 0.5), tmp_path / "log")
    assert time.monotonic() - begin < 5
    assert part["status"] == "failed" and "ended after" in part["failure"] and part["cases"][0]["value"] == 1


def test_what_no_longer_fits_is_skipped_with_the_reason(tmp_path):
    setting = Setting(CPU, False, tmp_path, time.monotonic() + 3)
    found = list(rows(lambda _: iter([Case("long", dict, 60), Case("short", dict, 1)]), setting))
    assert found[0]["skipped"].startswith("it takes about 60 s, and") and found[1] == {"case": "short"}
    late = Setting(CPU, True, tmp_path, time.monotonic())
    assert rehearsal.carry_out(broken, late, tmp_path / "log")["status"] == "skipped"


def test_without_time_no_part_is_left_out_silently(monkeypatch, tmp_path):
    monkeypatch.setattr(rehearsal, "PARTS", {"environment": (rehearsal.environment, 1), "broken": (broken, 1)})
    monkeypatch.setattr(rehearsal, "MODULES", ())
    result, said = rehearse(monkeypatch, tmp_path, "--budget=0")
    assert said is None
    assert [part["status"] for part in result["parts"].values()] == ["skipped", "skipped"]
    assert all(part["failure"] == "no time was left" for part in result["parts"].values())


def test_a_missing_gpu_is_one_sentence(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as end:  # a text as its code means exit code 1
        benchmarks.main()
    assert str(end.value).startswith("there is no GPU to rehearse on: torch finds no CUDA device; --device cpu --small")
    assert not (tmp_path / "gpu.json").exists()


def test_curves_are_compared_relative_to_their_size():
    curve = training.smooth(torch.linspace(2, 1, 32).numpy())
    assert len(curve) == 32 - training.WINDOW + 1 and math.isclose(curve.mean(), 1.5, rel_tol=1e-3)
    assert training.smooth(torch.ones(3).numpy()).tolist() == pytest.approx([1])
