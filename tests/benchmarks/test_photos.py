"""The benchmark of folders of photos, on very few of them."""

import argparse

from tests.benchmarks import photos


def test_a_folder_costs_what_its_photos_do(capsys):
    parser = argparse.ArgumentParser()
    photos.add_arguments(parser)
    options = ["model.style.path=assets/prior2d", "model.samples=0"]
    photos.main(parser.parse_args(["--counts", "1", "3", "--threads", "1", *options]))
    text = capsys.readouterr().out
    assert "for each further photo" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("│")]
    assert [row[1] for row in rows] == ["1", "3"] and all(float(row[3]) > 1 and float(row[5]) > 100 for row in rows)
