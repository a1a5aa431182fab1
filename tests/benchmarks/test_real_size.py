"""The rehearsal at real size, at a toy size: the way from an official file to a page, and the figures on it."""

import argparse
import json

import pytest

from tests.benchmarks import real_size


def rehearse(tmp_path, monkeypatch, *words):
    parser = argparse.ArgumentParser()
    real_size.add_arguments(parser)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    real_size.main(parser.parse_args([*words, "--small", "--steps=3", f"--out={tmp_path / 'out'}"]))


@pytest.mark.slow
def test_a_picture_goes_all_the_way(tmp_path, monkeypatch, capfd):
    rehearse(tmp_path, monkeypatch, "stylesdf")
    said = capfd.readouterr().out
    assert "a generator of the kind stylesdf" in said and "warning: LPIPS(vgg)" in said
    rows = json.loads((tmp_path / "out" / "real_size.json").read_text())
    assert [(row["step"], row["steps"]) for row in rows] == [("anchor", 3), ("stylize", 3), ("present", 0)]
    for row in rows:
        assert row["seconds"] > 0 and row["cpu"] > 0 and row["rss_mib"] > 100 and row["peak_mib"] is None
        assert (row["step_cpu"] is None) == (row["step"] == "present")
    assert (tmp_path / "out" / "stylesdf_artform" / "present" / "artifact" / "media" / "index.html").exists()


def test_what_fails_is_told_and_fails_the_rest_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_size, "rehearse", lambda name, *_: 1 / 0 if name == "gram" else [])
    with pytest.raises(SystemExit, match="failed: gram"):
        rehearse(tmp_path, monkeypatch)
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_generators_without_a_toy_file_are_refused(tmp_path):
    with pytest.raises(real_size.UserError, match="eg3d has no official file at a toy size"):
        real_size.imported("eg3d", True, tmp_path)
