"""Stages: exact resume, refusals, and results that do not depend on the number of processes."""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import safetensors.torch
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from models import artifact
from models.errors import UserError
from models.features.base import Frozen
from models.generators.base import Generator
from models.heads.codes import HeadCodes
from stages.base.ranks import IndependentRanks
from stages.base.seeds import item_generator, item_seed, rng_state, set_rng_state
from tests.stages.toy import ToyArtworks, ToyData, ToyPerArtwork, ToyTraining

TOY = Path(__file__).parents[1] / "toy.py"


def trainer(out, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "devices": 1, **options}
    return pl.Trainer(
        default_root_dir=out,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def optimise(out, count=5, trainer_options=None, **options):
    stage = ToyPerArtwork(**{"steps": 7, "group_size": 2, "save_every": 3, **options})
    trainer(out, **(trainer_options or {})).fit(stage, datamodule=ToyArtworks(count))


def results(out):
    return {
        path.parent.name: safetensors.torch.load_file(path)["row"]
        for path in sorted(out.glob("items/*/result.safetensors"))
    }


def step_hashes(out):
    """As the ranks wrote them to the files of their groups."""
    found = set()
    for path in out.glob("items/*/group.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            found.add(json.loads(file.metadata()["galatea"])["identity"]["step_hash"])
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def ranks(out, world, **options):
    """Run :func:`optimise` in ``world`` forked processes, which need no imports; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(index):
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(index)}
        strategy = IndependentRanks() if world > 1 else "auto"
        optimise(out, trainer_options={"devices": world, "strategy": strategy}, **options)

    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(i,)) for i in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in processes:
        process.join(5 if process.exitcode is None else None)
        process.kill()  # a rank whose partner died waits for it
        process.join()
    return [process.exitcode for process in processes]


def program(out, *options):
    command = [
        sys.executable,
        str(TOY),
        "toy",
        "fit",
        "--model.steps=7",
        "--model.group_size=2",
        "--model.save_every=3",
    ]
    command += ["--data=toy.ToyArtworks", "--trainer.accelerator=cpu", f"--out={out}", *options]
    root = str(TOY.parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Results of an uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("reference")
    optimise(out)
    return results(out)


class TestPerArtwork:
    def test_every_item_has_a_result_and_finished_groups_are_skipped(self, reference, tmp_path):
        assert sorted(reference) == ["i0", "i1", "i2", "i3", "i4"]
        optimise(tmp_path)
        times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        optimise(tmp_path)
        assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}

    def test_a_group_may_be_larger_than_the_items(self, tmp_path):
        optimise(tmp_path / "1", count=1, group_size=1)
        optimise(tmp_path / "5", count=1, group_size=5)
        assert equal(results(tmp_path / "1"), results(tmp_path / "5"))

    @pytest.mark.slow
    def test_two_processes_give_the_same_bits(self, reference, tmp_path):
        done = program(tmp_path, "--trainer.devices=2")
        assert done.returncode == 0, done.stderr
        assert equal(results(tmp_path), reference)
        rows = artifact.load(tmp_path).extra["rows"]
        assert rows == {name: row.tolist() for name, row in reference.items()}
        # The second rank has read no inputs, and yet knows their hash.
        assert step_hashes(tmp_path) == {artifact.load(tmp_path).manifest["step_hash"]} != {None}

    @pytest.mark.parametrize("devices", [1, 2])
    def test_a_killed_run_continues_to_the_same_bits(self, reference, tmp_path, devices):
        codes = ranks(tmp_path, devices, kill_at="i2:5")
        assert -signal.SIGKILL in codes and "i2" not in results(tmp_path)
        with safetensors.safe_open(tmp_path / "items" / "i2" / "group.safetensors", "pt") as file:
            assert json.loads(file.metadata()["galatea"])["step"] == 3
        optimise(tmp_path)  # in one process, whatever the killed run had
        assert equal(results(tmp_path), reference)

    def test_killed_between_the_last_step_and_the_results(self, reference, tmp_path, monkeypatch):
        def die(self, state):
            raise KeyError("died")

        with monkeypatch.context() as patch:
            patch.setattr(ToyPerArtwork, "finish_group", die)
            with pytest.raises(KeyError):
                optimise(tmp_path)
        optimise(tmp_path)
        assert equal(results(tmp_path), reference)

    def test_other_settings_are_refused(self, tmp_path):
        optimise(tmp_path)
        for options in ({"seed": 1}, {"steps": 8}, {"group_size": 3}):
            with pytest.raises(UserError, match="other settings or inputs"):
                optimise(tmp_path, **options)

    def test_a_damaged_record(self, tmp_path):
        optimise(tmp_path)
        (tmp_path / "items" / "i0" / "group.safetensors").write_bytes(b"x")
        with pytest.raises(UserError, match=r"group\.safetensors is damaged: remove it to start"):
            optimise(tmp_path)

    def test_not_finite(self, tmp_path):
        with pytest.raises(UserError, match="toy: loss of i0 is not finite at step 0"):
            optimise(tmp_path, weight=float("nan"))
        assert not (tmp_path / "items").exists()

    def test_out_is_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
            optimise(tmp_path / "file")

    def test_full_disk(self, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            with pytest.raises(UserError, match=r"group\.safetensors: File too large"):
                optimise(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]


class TestCheckpoint:
    def fit(self, out, steps, ckpt_path=None, stage=None):
        checkpoint = ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        pl.seed_everything(0)
        stage = stage or ToyTraining()
        trainer(out, max_steps=steps, max_epochs=-1, enable_checkpointing=True, callbacks=[checkpoint]).fit(
            stage, datamodule=ToyData(), ckpt_path=ckpt_path
        )
        return {k: v.clone() for k, v in stage.state_dict().items()}

    @pytest.mark.parametrize("stop", [4, 12, 17])  # within a pass, at its end, within the second
    def test_resume_equals_an_uninterrupted_run(self, tmp_path, stop):
        whole = self.fit(tmp_path / "a", 20)
        self.fit(tmp_path / "b", stop)
        torch.randn(100)
        resumed = self.fit(tmp_path / "b", 20, ckpt_path=tmp_path / "b" / f"step={stop}.ckpt")
        assert equal(whole, resumed)

    def test_holds_no_pickled_objects(self, tmp_path):
        self.fit(tmp_path, 2)
        content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
        assert content["galatea"]["stage"] == "training"

    def test_other_stages_and_inputs_are_refused(self, tmp_path):
        class Other(ToyTraining):
            name = "other"

        self.fit(tmp_path, 2)
        with pytest.raises(UserError, match="belongs to stage 'training': stage 'other' only resumes its own"):
            self.fit(tmp_path / "o", 4, tmp_path / "step=2.ckpt", Other())

        class WithInput(ToyTraining):
            def __init__(self, path):
                super().__init__()
                self.path = path

            def build_model(self):
                super().build_model()
                self.inputs["prior"] = artifact.load(self.path)

        for name in "ab":
            artifact.save(tmp_path / name, stage="s", extra={"name": name})
        self.fit(tmp_path / "i", 2, stage=WithInput(tmp_path / "a"))
        last = tmp_path / "i" / "step=2.ckpt"
        artifact.save(tmp_path / "moved", stage="s", extra={"name": "a"})
        self.fit(tmp_path / "o", 3, last, WithInput(tmp_path / "moved"))
        with pytest.raises(UserError, match="made with another prior"):
            self.fit(tmp_path / "o", 4, last, WithInput(tmp_path / "b"))

    def test_foreign_checkpoints_are_refused(self):
        with pytest.raises(UserError, match="not a checkpoint of galatea"):
            ToyTraining().on_load_checkpoint({"state_dict": {}})


def test_frozen_networks_move_with_the_stage():
    """Though they are none of its parameters: forgotten on a GPU, they would fail there only."""
    stage = ToyTraining()
    stage.network, stage.teacher = torch.nn.Linear(2, 2), Frozen(torch.nn.Linear(2, 2))
    assert not any(name.startswith("teacher") for name in stage.state_dict())
    stage.to("meta")
    assert stage.network.weight.device.type == stage.teacher.module.weight.device.type == "meta"


def test_take_wants_a_kind(tmp_path):
    artifact.save(tmp_path / "a", stage="s", modules={"anchors": HeadCodes(["x"], [("ws", 1, 2)])})
    stage = ToyTraining()
    message = "needs as its prior: module 'anchors' is not a generator, but HeadCodes"
    with pytest.raises(UserError, match=message):
        stage.take("prior", str(tmp_path / "a"), "anchors", Generator)
    taken = stage.take("prior", str(tmp_path / "a"), "anchors", HeadCodes)
    assert stage.inputs.keys() == {"prior"} and taken.ids == ("x",)
    others = {"codes": taken, "copy": stage.inputs["prior"].module("anchors")}
    assert stage.unchanged(others) == {"codes": (stage.inputs["prior"], "anchors")}


def test_take_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="there is no artifact in"):
        ToyTraining().take("prior", str(tmp_path), "generator", Generator)


def test_rng_state_round_trip():
    state = rng_state()
    first = torch.rand(3), np.random.rand(), random.random()
    set_rng_state(state)
    second = torch.rand(3), np.random.rand(), random.random()
    assert torch.equal(first[0], second[0]) and first[1:] == second[1:]


def test_item_draws_depend_on_their_arguments_only():
    assert item_seed(0, "a", 1) == item_seed(0, "a", 1)
    seeds = [item_seed(*arguments) for arguments in ((0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1", 0))]
    assert len(set(seeds)) == 5
    draw = torch.rand(4, generator=item_generator(3, "x", 7))
    assert torch.equal(draw, torch.rand(4, generator=item_generator(3, "x", 7)))
