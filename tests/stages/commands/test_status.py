"""``galatea status``: what it makes of status files, logs and the scheduler's word."""

import json
import os
import subprocess
import sys

import pytest
import pytorch_lightning as pl

from callbacks.progress import Lines
from models.errors import UserError
from models.files import ROOT
from stages.commands import status
from stages.commands.status import Row, main, rows
from stages.pipeline import jobs
from stages.pipeline.jobs import Entry, Job, write_plan
from stages.pipeline.steps import locked
from tests.stages.toy import ToyData, ToyTraining

STEPS = {"anchor": [], "stylize": ["anchor"], "present": ["stylize"]}


@pytest.fixture
def out(tmp_path):
    write_plan(tmp_path, {name: Entry(after) for name, after in STEPS.items()})
    return tmp_path


@pytest.fixture
def submitted(out, monkeypatch):
    """Jobs 1, 2_0 and 2_1 then 3, 4 of which the scheduler says this."""

    def say(**known):
        monkeypatch.setattr(status, "query", lambda _: {k.removeprefix("job"): Job(*v) for k, v in known.items()})
        return rows(out)

    numbers = {"anchor": ["1"], "stylize": ["2_0", "2_1", "3"], "present": ["4"]}
    write_plan(out, {name: Entry(after, numbers[name]) for name, after in STEPS.items()})
    return say


def book(folder, log="", **entries):
    """What a step leaves in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps(entries))
    (folder / "log.txt").write_text(log)


class TestHere:
    def test_before_anything(self, out):
        assert rows(out)[1:] == [Row("stylize", "pending", "after anchor"), Row("present", "pending", "after stylize")]

    def test_on_the_way(self, out):
        book(out / "anchor", state="done", seconds=75.4, starts=1)
        book(
            out / "stylize",
            "fit 10/40, 0:01:00 left, 0.50 it/s, loss 1\nfit 20/40, 0:00:40 left, 0.5 it/s\n",
            state="running",
        )
        with locked(out):
            assert rows(out)[:2] == [
                Row("anchor", "done", "0:01:15"),
                Row("stylize", "running", "fit 20/40, 0:00:40 left"),
            ]
        assert rows(out)[1] == Row("stylize", "stopped", "the same command continues it")  # nobody is there

    @pytest.mark.parametrize(
        ("log", "reason"),
        [
            ("fit 1/4, 0:00:03 left\ngalatea: error: the disk is full\n", "the disk is full"),
            (
                "Traceback (most recent call last):\n  File x\nRuntimeError: a bad shape\nlast words\n",
                "RuntimeError: a bad shape",
            ),
            ("torch.cuda.OutOfMemoryError: CUDA out of memory.\n", "torch.cuda.OutOfMemoryError: CUDA out of memory."),
            ("KeyboardInterrupt\n", "KeyboardInterrupt"),
            ("nothing that helps\n", "exit code 3"),
        ],
    )
    def test_failed(self, out, log, reason):
        book(out / "anchor", log, state="failed", exit_code=3)
        assert rows(out)[:2] == [
            Row("anchor", "failed", reason),
            Row("stylize", "pending", "after anchor, which has failed"),
        ]


class TestOnACluster:
    def test_waiting(self, submitted):
        assert submitted(
            job1=("PENDING", "Resources"), job2_0=("PENDING", "Dependency"), job2_1=("PENDING", "Dependency"),
            job3=("PENDING", "Dependency"), job4=("PENDING", "Dependency"),
        ) == [
            Row("anchor", "pending", "Resources, job 1"),
            Row("stylize", "pending", "after anchor, job 2_0"),
            Row("present", "pending", "after stylize, job 4"),
        ]  # fmt: skip

    def test_running_with_progress(self, out, submitted):
        book(out / "anchor", state="done", seconds=3, starts=2)
        book(out / "stylize" / "shards" / "0", state="done")
        book(out / "stylize" / "shards" / "1", "fit 3/9, 0:00:06 left, 1 it/s\n", state="running")
        found = submitted(
            job1=("COMPLETED",), job2_0=("COMPLETED",), job2_1=("RUNNING",), job3=("PENDING", "Dependency")
        )
        assert found[0] == Row("anchor", "done", "0:00:03, started 2 times")
        assert found[1] == Row("stylize", "running", "1 of 2 shares done, fit 3/9, 0:00:06 left, job 2_1")

    def test_requeued(self, out, submitted):
        book(out / "anchor", "fit 5/9, 0:00:06 left\nasked to stop\n", state="stopped", starts=2)
        found = submitted(job1=("PENDING", "BeginTime"))
        assert found[0] == Row("anchor", "requeued", "started 2 times, fit 5/9, 0:00:06 left, job 1")

    def test_failed_and_what_it_takes_along(self, out, submitted):
        book(out / "anchor", "galatea: error: no such artwork\n", state="failed")
        found = submitted(job1=("FAILED", "NonZeroExitCode"), job4=("CANCELLED", "Dependency"))
        assert found == [
            Row("anchor", "failed", f"no such artwork (job 1, {out}/anchor/log.txt)"),
            Row("stylize", "cancelled", "anchor failed"),
            Row("present", "cancelled", "stylize failed"),
        ]

    @pytest.mark.parametrize(
        ("state", "reason"),
        [
            ("TIMEOUT", "out of time: raise time in the cluster file"),
            ("OUT_OF_MEMORY", "out of memory: raise memory in the cluster file"),
            ("NODE_FAIL", "its machine failed"),
            ("FAILED", "bash: module: command not found"),  # before the step itself began
        ],
    )
    def test_ended_by_the_scheduler(self, out, submitted, state, reason):
        (out / "slurm").mkdir()
        (out / "slurm" / "anchor-1.out").write_text("bash: module: command not found\n")
        (row, *_) = submitted(job1=(state, "x"))
        assert row.state == "failed" and row.detail.startswith(f"{reason} (job 1, ")

    def test_cancelled_by_hand(self, submitted):
        found = submitted(job1=("CANCELLED",), job2_0=("PENDING", "DependencyNeverSatisfied"))
        assert found[0] == Row("anchor", "cancelled", "by scancel; the same command continues it")
        assert found[1] == Row("stylize", "cancelled", "anchor failed")

    def test_when_the_scheduler_has_forgotten(self, out, submitted):
        book(out / "anchor", state="done", seconds=3)
        book(out / "stylize", "ValueError: no\n", state="failed")
        assert [row.state for row in submitted()] == ["done", "failed", "cancelled"]
        book(out / "stylize", state="running")
        assert submitted()[1].state == "lost"


def test_the_progress_of_a_real_run_is_found(tmp_path, capsys):
    """The lines of callbacks.progress."""
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[Lines(0.0)],
    )  # fmt: skip
    trainer.fit(ToyTraining(), datamodule=ToyData())
    found = status.PROGRESS.findall(capsys.readouterr().out)
    assert len(found) == 12 and found[-1] == "fit 12/12, 0:00:00 left"


def test_the_table(out, capsys):
    book(out / "anchor", state="done", seconds=3725)
    main([str(out)])
    assert capsys.readouterr().out.splitlines() == [
        "anchor   done       1:02:05",
        "stylize  pending    after anchor",
        "present  pending    after stylize",
    ]


def test_it_is_quick():
    """Nothing heavy: people let it run again and again."""
    code = "import sys, stages.commands.status; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "yaml", "pytorch_lightning"} & set(loaded.stdout.split())


@pytest.mark.parametrize("content", [None, "[]", "{", '{"anchor": {"before": []}}'])
def test_a_folder_that_is_no_pipeline(tmp_path, content):
    if content is not None:
        (tmp_path / "pipeline.json").write_text(content)
    with pytest.raises(UserError, match="is not the --out folder of a pipeline"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="is not a folder"):
        main([str(tmp_path / "none")])


def test_only_unfinished_jobs_are_active():
    assert not jobs.ACTIVE & {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED"}
