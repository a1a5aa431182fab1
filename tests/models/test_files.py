"""Reading what may be no file, and replacing folders where links lead."""

import os

import pytest

from models.errors import UserError
from models.files import (
    atomic_write,
    check_folder,
    destination,
    is_temporary,
    read_bytes,
    read_json,
    remove_folder,
    replace_folder,
    sweep,
    temporary,
)


class TestReadBytes:
    def test_a_file(self, tmp_path):
        (tmp_path / "a").write_bytes(b"12345")
        assert read_bytes(tmp_path / "a", most=5) == b"12345"
        with pytest.raises(UserError, match="larger than"):
            read_bytes(tmp_path / "a", most=4)

    def test_what_is_none(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
            with pytest.raises(UserError, match="it is no file"):
                read_bytes(tmp_path / path, most=5)
        with pytest.raises(UserError, match="there is no such file"):
            read_bytes(tmp_path / "none", most=5)

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\xff", "[]"])
    def test_records_that_are_none(self, tmp_path, text):
        (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
        assert read_json(tmp_path / "a.json") is None


class TestLinks:
    @pytest.fixture
    def link(self, tmp_path):
        """A link to a folder on a larger disk."""
        (tmp_path / "disk" / "runs").mkdir(parents=True)
        (tmp_path / "out").symlink_to("disk/runs")
        return tmp_path / "out"

    def test_destination(self, link, tmp_path):
        runs = (tmp_path / "disk" / "runs").resolve()
        assert destination(link) == runs and destination(link / "a") == runs / "a"
        assert destination(tmp_path / "new") == tmp_path.resolve() / "new"

    @pytest.mark.parametrize("name", ["out", "out/step/artifact", "round"])
    def test_that_lead_nowhere(self, tmp_path, name):
        (tmp_path / "out").symlink_to(tmp_path / "unmounted")
        (tmp_path / "round").symlink_to("round")
        for ask in (destination, check_folder):
            with pytest.raises(UserError, match=r"(out|round) is a link that points to nothing"):
                ask(tmp_path / name)

    def test_emptying(self, link, tmp_path):
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "thesis.txt").write_text("x")
        (link / "a").write_text("old")
        (link / "inside").symlink_to(tmp_path / "own")
        remove_folder(link)
        assert link.is_symlink() and list(link.iterdir()) == []
        assert {p.name for p in (tmp_path / "disk").iterdir()} == {"runs"}
        assert (tmp_path / "own" / "thesis.txt").exists()
        remove_folder(tmp_path / "none")
        assert not (tmp_path / "none").exists()

    def test_sweeping_leaves_what_links_point_to(self, link, tmp_path):
        (link / ".step.12.old").symlink_to(tmp_path / "disk")
        sweep(link)
        assert list(link.iterdir()) == [] and (tmp_path / "disk" / "runs").is_dir()


def test_replacing_a_folder(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in tmp_path.rglob("*")] == ["old", "new"]


@pytest.mark.parametrize("name", ["a.mp4", "x" * 250 + ".mp4", "像" * 80 + ".mp4"])
def test_temporary_names_are_never_too_long(tmp_path, name):
    with atomic_write(tmp_path / name) as file:
        file.touch()
        assert is_temporary(file) and file.suffix == ".mp4"
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert is_temporary(temporary(tmp_path / name, ".old"))
