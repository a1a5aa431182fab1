"""A real SLURM cluster of two nodes on this machine: pytest -m slurm."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from models import artifact
from models.errors import UserError
from stages.commands import status
from stages.pipeline import run as orchestrator
from stages.pipeline.jobs import query, read_plan
from tests.stages import cases, small, test_prior
from tests.stages.processes import galatea

pytestmark = pytest.mark.slurm

CLUSTER = Path(__file__).with_name("cluster.sh")
INTERRUPT = "tests.slurm.interrupt.Interrupt"
BUSY = {"pending", "running", "requeued"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes; its folder."""
    if missing := [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]:
        pytest.skip(f"no SLURM on this machine ({missing[0]} is missing): tests/slurm/cluster.sh install")
    if os.geteuid() != 0:
        pytest.skip("only root can start a cluster")
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            subprocess.run([CLUSTER, "start", folder], check=True, timeout=300)
            yield folder
        finally:
            subprocess.run([CLUSTER, "stop", folder], check=True, timeout=300)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of the inputs and of each stage's uninterrupted, local result."""
    folder = tmp_path_factory.mktemp("work")
    for stage in ("anchor", "stylize", "present"):
        galatea(*cases.lines(folder)[stage], f"--out={folder / stage}")
    return folder


def overrides(line):
    """A command line's options, as a pipeline file has them."""
    return {key: yaml.safe_load(value) for key, value in (option[2:].split("=", 1) for option in line[2:])}


def submit(folder, steps, cluster_file):
    """Submit a pipeline; returns its ``--out`` folder."""
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"steps": steps}))
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"grace_s": 60, **cluster_file}))
    out = folder / "out"
    line = [str(folder / "pipeline.yaml"), f"--out={out}", "--launcher=slurm", f"--cluster={folder / 'cluster.yaml'}"]
    orchestrator.main(line)
    return out


def finished(out, seconds=1500):
    """The rows of ``galatea status`` when nothing moves any more, and all states that the steps were seen in."""
    deadline, seen = time.monotonic() + seconds, set()
    while True:
        rows = {row.name: row for row in status.rows(out)}
        seen |= {(row.name, row.state) for row in rows.values()}
        if not BUSY & {row.state for row in rows.values()}:
            return rows, seen
        assert time.monotonic() < deadline, f"{rows}\n{logs(out)}"
        time.sleep(1)


def logs(out):
    return "\n".join(f"==> {path}\n{path.read_text()}" for path in sorted(out.glob("slurm/*.out")))


def pipeline(work, tmp_path):
    lines = cases.lines(work)
    steps = [{"name": s, "stage": s, "command": lines[s][1], "overrides": overrides(lines[s])} for s in lines]
    steps = [step for step in steps if step["name"] in ("anchor", "stylize", "present")]
    inputs = {"anchor": {}, "stylize": {"model.anchor.path": "anchor", "data.path": "anchor"}}
    inputs["present"] = {"model.result.path": "stylize"}
    for step in steps:
        step["inputs"] = inputs[step["name"]]
        for key in ("threads", *step["inputs"]):
            step["overrides"].pop(key, None)
    return steps


def test_the_same_artifacts_as_on_one_machine(cluster, work, tmp_path, capfd):
    """Two nodes share the artworks of a job; two jobs of an array share them, and are preempted."""
    steps = pipeline(work, tmp_path)
    steps[1]["overrides"]["trainer.callbacks"] = [{"class_path": INTERRUPT, "init_args": {"first": 3}}]
    out = submit(tmp_path, steps, {"steps": {"anchor": {"nodes": 2}, "stylize": {"array": 2}}})
    rows, seen = finished(out)
    assert {row.state for row in rows.values()} == {"done"}, (rows, logs(out))
    assert ("stylize", "pending") in seen
    for stage in rows:
        assert artifact.load(out / stage).id == artifact.load(work / stage).id
    for shard in "01":
        assert "asked to stop: saved after 3 batches" in (out / "stylize" / "shards" / shard / "log.txt").read_text()
    orchestrator.main([str(tmp_path / "pipeline.yaml"), f"--out={out}"])  # to the local launcher all is done too
    assert capfd.readouterr().out.count("up to date") == 3


def test_a_prior_that_is_preempted_twice(cluster, tmp_path):
    """Two nodes train together; the job leaves twice and goes on at that very batch: the same bytes as undisturbed."""
    config = yaml.safe_load(small.write(tmp_path / "prior.yaml", test_prior.small_config(tmp_path)).read_text())
    config["model"]["total_images"] = 64
    config["data"]["init_args"]["train_subjects"] = 24
    del config["trainer"]  # so that only the end of an epoch, after six batches, and leaving save
    small.write(tmp_path / "prior.yaml", config)
    line = ["prior", "fit", f"--config={tmp_path / 'prior.yaml'}", *small.TRAINER, "--trainer.strategy=ddp"]
    galatea(*line, f"--out={tmp_path / 'whole'}", ranks=2)
    options = overrides(line) | {
        "trainer.callbacks": [{"class_path": INTERRUPT, "init_args": {"first": 2, "second": 4}}]
    }
    configs = [options.pop("config")]
    del options["threads"]
    step = {"name": "prior", "stage": "prior", "command": "fit", "configs": configs, "overrides": options}
    out = submit(tmp_path, [step], {"nodes": 2})
    rows, seen = finished(out)
    assert rows["prior"].state == "done" and "started 3 times" in rows["prior"].detail, (rows, logs(out))
    log = (out / "prior" / "log.txt").read_text()
    assert "saved after 2 batches" in log and "saved after 4 batches" in log
    assert ("prior", "requeued") in seen
    assert artifact.load(out / "prior").id == artifact.load(tmp_path / "whole").id


def test_a_time_limit(cluster, tmp_path):
    """The scheduler itself asks a training to leave: it goes on at that very batch. A test begins anew."""
    features = cases.lines(tmp_path)["features"]
    config = yaml.safe_load(small.write(tmp_path / "prior.yaml", test_prior.small_config(tmp_path)).read_text())
    config["data"]["init_args"]["train_subjects"] = 24
    del config["trainer"]  # so that only leaving saves before the end
    small.write(tmp_path / "prior.yaml", config)
    lines = {"prior": ["prior", "fit", f"--config={tmp_path / 'prior.yaml'}", *small.TRAINER]}
    lines["scores"] = ["features", "test", *features[2:]]
    callbacks = {
        "prior": {"class_path": "tests.slurm.interrupt.UntilTimeLimit", "init_args": {"batches": 3}},
        "scores": {"class_path": INTERRUPT, "init_args": {"first": 1}},
    }
    steps = []
    for name, line in lines.items():
        galatea(*line, f"--out={tmp_path / 'whole' / name}")
        options = overrides(line) | {"trainer.callbacks": [callbacks[name]]}
        configs = [options.pop("config")]
        del options["threads"]
        steps.append({"name": name, "stage": line[0], "command": line[1], "configs": configs, "overrides": options})
    out = submit(tmp_path, steps, {"steps": {"prior": {"time": "00:03:00"}}})
    rows, _ = finished(out)
    assert {row.state for row in rows.values()} == {"done"}, (rows, logs(out))
    assert "started 2 times" in rows["scores"].detail
    assert (out / "prior" / "log.txt").read_text().count("asked to stop: saved after 3 batches") == 1
    assert "asked to stop: stopped between two batches" in (out / "scores" / "log.txt").read_text()
    assert artifact.load(out / "prior").id == artifact.load(tmp_path / "whole" / "prior").id
    tables = [folder / "scores" / "metrics.csv" for folder in (out, tmp_path / "whole")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_a_failing_step(cluster, work, tmp_path):
    steps = pipeline(work, tmp_path)
    steps[0]["overrides"]["model.steps"] = 0
    out = submit(tmp_path, steps, {})
    rows, _ = finished(out)
    assert rows["anchor"].state == "failed"
    assert rows["anchor"].detail.startswith("steps, group_size and save_every must be at least 1 (job ")
    assert (rows["stylize"].state, rows["stylize"].detail) == ("cancelled", "anchor failed")
    assert (rows["present"].state, rows["present"].detail) == ("cancelled", "stylize failed")
    assert {job.state for job in query(read_plan(out)["present"].jobs).values()} == {"CANCELLED"}


def test_a_refused_job_leaves_none_behind(cluster, work, tmp_path):
    with pytest.raises(UserError, match=r"sbatch .*stylize.sbatch failed: .*invalid partition"):
        submit(tmp_path, pipeline(work, tmp_path), {"steps": {"stylize": {"partition": "none"}}})
    assert json.loads((tmp_path / "out" / "pipeline.json").read_text())["anchor"]["jobs"] == []
    names = subprocess.run(["squeue", "--noheader", "--format=%j"], capture_output=True, text=True, check=True).stdout
    assert "out.anchor" not in names
