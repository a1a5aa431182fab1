"""The step hash: what counts and what does not, of the resolved options of a stage."""

from typing import Any

import pytest

from stages import cli
from stages.anchor import AnchorStage
from stages.pipeline import hashing
from stages.pipeline.hashing import step_hash
from stages.stylize import StylizeStage
from tests.stages.toy import ToyPerArtwork

HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1"]


@pytest.fixture
def digest(tmp_path, monkeypatch, capsys):
    """Hash of a step as its own command line prints it."""
    monkeypatch.chdir(tmp_path)

    def ask(*options: str, stage: Any = AnchorStage, command: str = "fit") -> str:
        with pytest.raises(SystemExit) as stop:
            cli.run(stage.name, stage, [command, *options, "--print_hash"])
        assert not stop.value.code
        return capsys.readouterr().out.split()[-1]

    return ask


class TestCommandLine:
    def test_what_counts(self, digest):
        assert digest("--model.steps=4") != digest()
        assert digest("--seed_everything=1") != digest()
        assert digest("--trainer.precision=bf16-mixed") != digest()
        assert digest(stage=StylizeStage) != digest()

    def test_what_does_not(self, digest):
        options = ["--trainer.devices=0,1", "--trainer.strategy=ddp", "--threads=7", "--out=x", "--shard=0/2"]
        assert digest(*options, "--model.save_every=9", "--wandb") == digest()

    def test_defaults_count_wherever_they_are_given(self, digest, monkeypatch):
        before = digest()
        assert digest("--model.group_size=1") == before  # the default, spelled out
        defaults = AnchorStage.__init__.__defaults__
        assert defaults is not None and defaults[-1] == 0  # the seed
        monkeypatch.setattr(AnchorStage.__init__, "__defaults__", (*defaults[:-1], 7))
        assert digest() != before

    def test_values_are_as_a_configuration_holds_them(self, digest, tmp_path):
        (tmp_path / "a.yaml").write_text("model: {steps: 3, search: {space: z, restarts: 2}}\n")
        (tmp_path / "b.yaml").write_text("model: {search: {restarts: 5}}\n")
        options = ["--model.steps=3", "--model.search.space=z", "--model.search.restarts=5"]
        assert digest("--config=a.yaml", "--config=b.yaml") == digest(*options) != digest()

    def test_a_folder_may_be_called_2024(self, digest, tmp_path):
        (tmp_path / "2024").mkdir()
        before = digest("--data.init_args.path=2024")
        (tmp_path / "2024" / "a.png").write_bytes(b"a")
        assert digest("--data.init_args.path=2024") != before


@pytest.mark.parametrize("place", ["model.strategy", "model.config", "model.workers", "data.devices", "model.a.out"])
def test_names_count_but_where_they_are_the_trainers(place):
    """An option of a stage may be called as one that says where or how fast a step runs."""

    def config(value: str) -> dict[str, Any]:
        content: Any = value
        for key in reversed(place.split(".")):
            content = {key: content}
        return content

    assert step_hash("s", "fit", config("a")) != step_hash("s", "fit", config("b"))


@pytest.mark.parametrize("key", ["path", "val_path", "paths", "test_folder"])
def test_bare_names_under_a_path_key_are_paths(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    config = {"data": {"init_args": {key: ["faces"] if key == "paths" else "faces"}}}
    (tmp_path / "faces").mkdir()
    before = step_hash("s", "fit", config)
    (tmp_path / "faces" / "a.png").write_bytes(b"a")
    assert step_hash("s", "fit", config) != before


def test_bare_names_elsewhere_are_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"model": {"weights": "embedded", "class_path": "Search"}}
    before = step_hash("s", "fit", config)
    for name in ("embedded", "Search"):
        (tmp_path / name).write_bytes(b"a")
    assert step_hash("s", "fit", config) == before


class TestWhoReads:
    """Inputs may be a large data set: one process reads them, once."""

    @pytest.fixture
    def read(self, monkeypatch):
        calls: list[str] = []
        monkeypatch.setattr(cli, "step_hash", lambda *_: calls.append("read") or "ours")
        monkeypatch.setattr(cli.GalateaCLI, "_run_subcommand", lambda *_: None)
        return calls

    def build(self, *options: str) -> Any:
        data = "--data=tests.stages.toy.ToyArtworks"
        return cli.GalateaCLI("toy", ToyPerArtwork, ["fit", data, "--model.steps=1", *HERE, *options]).model

    def test_the_first_rank(self, read, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert self.build().step_hash == "ours" and read == ["read"]
        monkeypatch.setattr("pytorch_lightning.Trainer.is_global_zero", False)
        assert self.build().step_hash is None and read == ["read"]

    def test_a_pipeline_has_read_them(self, read, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(hashing.GIVEN, "given")
        assert self.build().step_hash == "given" and not read
