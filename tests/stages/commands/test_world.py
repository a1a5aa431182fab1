"""``galatea world``: portraits in a style as a folder, and what it refuses."""

import pytest

from models.errors import UserError
from models.image import read_image
from stages.commands.world import main


def test_portraits_in_a_style(tmp_path):
    out = tmp_path / "toon"
    main(["--style", "toon", "--count", "2", "--size", "16", "--out", str(out)])
    files = sorted(out.iterdir())
    assert len(files) == 2 and all(file.name.startswith("toon-") for file in files)
    one, two = (read_image(file) for file in files)
    assert one.shape == two.shape == (1, 3, 16, 16) and not one.equal(two)


def test_exaggerated_heads_are_others(tmp_path):
    plain, eyes = tmp_path / "plain", tmp_path / "eyes"
    for out, options in ((plain, []), (eyes, ["--exaggerate", "big_eyes=1.0"])):
        main(["--style", "sketch", "--count", "1", "--size", "32", "--out", str(out), *options])
    one, two = (read_image(next(out.iterdir())) for out in (plain, eyes))
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("option", [["--count", "3"], ["--exaggerate", "big_eyes=1"]])
def test_options_of_portraits_need_a_style(option, tmp_path):
    with pytest.raises(UserError, match=r"^--count and --exaggerate are of portraits in a style: name one, --style$"):
        main([*option, "--out", str(tmp_path / "world.png")])
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already, and no empty folder: name another, --out"):
        main(["--style", "toon", "--count", "1", "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
