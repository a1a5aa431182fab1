"""Configuration files and what they stand on, the same for the command line and for pipelines."""

import pytest
import yaml

from models.errors import UserError
from stages import cli
from stages.configs import merge, read_config
from stages.pipeline.process import PROGRAM
from stages.pipeline.steps import command_hash
from tests.stages.toy import ToyTraining


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files by name: YAML, or text as it is."""
    monkeypatch.chdir(tmp_path)

    def files(**contents):
        for name, content in contents.items():
            text = content if isinstance(content, str) else yaml.dump(content, Dumper=cli._Quoting)
            (tmp_path / f"{name}.yaml").write_text(text)

    return files


class TestBase:
    def test_later_files_win_and_each_stands_on_its_own(self, write, tmp_path):
        (tmp_path / "deep").mkdir()
        write(low={"a": 1, "b": {"c": 1, "d": 1}}, other={"a": 2})
        (tmp_path / "deep" / "middle.yaml").write_text("base: [../low.yaml]\nb: {c: 2}\n")
        write(top={"base": ["deep/middle.yaml", "other.yaml"], "b": {"d": 3}})
        assert read_config("none", ["top.yaml"]) == {"a": 2, "b": {"c": 2, "d": 3}}
        write(last={"b": {"c": 5}})
        assert read_config("none", ["top.yaml", "last.yaml"])["b"] == {"c": 5, "d": 3}
        assert read_config("none", ["last.yaml", "top.yaml"])["b"] == {"c": 2, "d": 3}

    def test_one_without_it_stands_on_the_stage(self, write):
        write(mine={"model": {"steps": 3}}, alone={"base": [], "model": {"steps": 3}})
        mine, stage = read_config("anchor", ["mine.yaml"]), read_config("anchor", [])
        assert mine["model"].pop("steps") == 3 and stage["model"].pop("steps") == 160 and mine == stage
        assert read_config("anchor", ["alone.yaml"]) == {"model": {"steps": 3}}
        # A file of one's own beside one that names its base varies that, not the stage's.
        assert read_config("anchor", ["alone.yaml", "mine.yaml"]) == {"model": {"steps": 3}}

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ({"base": ["a.yaml"]}, r"^(anchor: )?a\.yaml stands on itself: a\.yaml on a\.yaml$"),
            ({"base": ["b.yaml"]}, r"^(anchor: )?a\.yaml stands on itself: a\.yaml on b\.yaml on a\.yaml$"),
            ({"base": ["none.yaml"]}, r"^(anchor: )?a\.yaml: base names none\.yaml, and there is no file none\.yaml$"),
            ({"base": ["."]}, r"base names \., and there is no file"),
            ({"base": "b.yaml"}, "base is 'b.yaml', it must be a list of files"),
            ({"base": [1]}, r"base is \[1\], it must be a list of files"),
            ({"base": None}, "base is None, it must be a list of files"),
            ({"base": ["c.yaml"]}, r"^(anchor: )?c\.yaml: expected a dict"),
            ({"base": ["d.yaml"]}, r"^(anchor: )?d\.yaml is not valid YAML"),
        ],
    )
    def test_what_cannot_be_is_one_sentence(self, write, content, match):
        write(a=content, b={"base": ["a.yaml"]}, c="- 1", d="[")
        for read in (
            lambda: read_config("anchor", ["a.yaml"]),
            lambda: command_hash([*PROGRAM, "anchor", "fit", "--config=a.yaml"]),
        ):
            with pytest.raises(UserError, match=match):
                read()

    def test_what_two_stand_on_lies_below_both(self, write):
        write(low={"a": 1}, left={"base": ["low.yaml"], "a": 2}, right={"base": ["low.yaml"], "b": 3})
        write(top={"base": ["left.yaml", "right.yaml"]})
        assert read_config("none", ["top.yaml"]) == {"a": 2, "b": 3}
        assert read_config("none", ["top.yaml", "low.yaml"]) == {"a": 1, "b": 3}  # given by name, it counts
        names = ["low"]
        for level in range(40):  # each read once
            write(**{f"f{level}": {"base": [f"{names[-1]}.yaml", f"{names[max(0, level - 1)]}.yaml"]}})
            names.append(f"f{level}")
        assert read_config("none", ["f39.yaml"]) == {"a": 1}

    def test_a_file_may_be_met_twice(self, write):
        write(low={"a": 1}, left={"base": ["low.yaml"], "b": 1}, right={"base": ["low.yaml"], "c": 1})
        write(top={"base": ["left.yaml", "right.yaml"]})
        assert read_config("none", ["top.yaml"]) == {"a": 1, "b": 1, "c": 1}


def test_another_class_starts_anew():
    config = {"net": {"class_path": "A", "init_args": {"weights": "embedded", "size": {"x": 1}}}}
    merge(config, {"net": {"init_args": {"size": {"y": 2}}}})
    merge(config, {"net": {"class_path": "A", "init_args": {"depth": 3}}})
    assert config["net"]["init_args"] == {"weights": "embedded", "size": {"x": 1, "y": 2}, "depth": 3}
    merge(config, {"net": {"class_path": "B", "init_args": {"depth": 4}}})
    assert config == {"net": {"class_path": "B", "init_args": {"depth": 4}}}
    merge(config, {"net": None})
    merge(config, {"net": {"class_path": "A"}})
    assert config == {"net": {"class_path": "A"}}


class TestCommandLine:
    def resolved(self, capsys, *options):
        with pytest.raises(SystemExit) as stop:
            cli.run("training", ToyTraining, ["fit", "--data=tests.stages.toy.ToyData", *options, "--print_config"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    def test_prints_what_the_files_say_together(self, write, capsys):
        write(
            low={"model": {"rate": 0.5}, "trainer": {"max_steps": 7}}, top={"base": ["low.yaml"], "seed_everything": 3}
        )
        for options in (("--config=top.yaml",), ("--config", "top.yaml"), ("-c", "top.yaml")):
            found = self.resolved(capsys, *options)
            assert (found["model"]["rate"], found["trainer"]["max_steps"], found["seed_everything"]) == (0.5, 7, 3)
            assert "base" not in found

    def test_options_win_wherever_they_stand(self, write, capsys):
        write(low={"model": {"rate": 0.5}})
        assert self.resolved(capsys, "--model.rate=0.25", "--config=low.yaml")["model"]["rate"] == 0.25
        assert self.resolved(capsys, "--config=low.yaml", "--model.rate=0.25")["model"]["rate"] == 0.25

    def test_texts_in_quotes_stay_texts(self, write, capsys):
        for text in ("1e5", "00012", "no", "null", "2026-01-01", "=", "~", "a: b", 'say "x"', "été"):
            write(low={"out": text})
            assert self.resolved(capsys, "--config=low.yaml")["out"] == text

    def test_numbers_are_read_as_they_are_in_a_file(self, write, capsys):
        write(low="model: {rate: 1e-3}")
        assert self.resolved(capsys, "--config=low.yaml")["model"]["rate"] == 1e-3

    def test_help_shows_what_holds_without_options(self, write, capsys):
        write(low={"model": {"rate": 0.125}})
        with pytest.raises(SystemExit):
            cli.run("training", ToyTraining, ["fit", "--config=low.yaml", "--help"])
        assert "default: 0.125" in capsys.readouterr().out


def test_a_step_is_known_by_all_that_its_files_say(write):
    line = [*PROGRAM, "present", "predict", "--config=top.yaml"]
    write(low={"model": {"result": {"path": "x"}, "samples": 3}}, top={"base": ["low.yaml"]})
    before = command_hash(line)
    assert before == command_hash([*line, "--model.samples=3"])
    write(low={"model": {"result": {"path": "x"}, "samples": 4}})
    assert command_hash(line) != before
