"""The SLURM launcher with a scheduler that only writes down what it is asked; a real one is in tests/slurm."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from models.errors import UserError
from models.files import ROOT
from stages.pipeline import process, slurm, steps
from stages.pipeline import run as orchestrator
from stages.pipeline.jobs import Entry, Job, query, read_plan, write_plan
from stages.pipeline.run import main
from stages.pipeline.slurm import Resources, read_cluster
from stages.table import STAGES

PIPELINE = """
    steps:
      - {name: one, stage: dummy, command: fit}
      - {name: aside, stage: dummy, command: fit}
      - {name: two, stage: dummy, command: fit, inputs: {input.path: one}}
      - {name: three, stage: dummy, command: predict, inputs: {input.path: two, input.other: aside}}
"""
DUMMY = Path(__file__).with_name("dummy_step.py")
# Numbers from 101 on; what was asked goes to the file `asked`. Refuses a script that has the word in `refuse`.
SBATCH = """
    echo "sbatch $*" >> {place}/asked
    for script; do :; done
    if [ -e {place}/refuse ] && grep -qf {place}/refuse "$script"; then
        echo "sbatch: error: no such place" >&2
        exit 1
    fi
    echo $((100 + $(grep -c ^sbatch {place}/asked)))
"""
NOTE = 'echo "{name} $*" >> {place}/asked'
SHOW = "cat {place}/{name}.txt 2>/dev/null"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a pipeline, and the scheduler's programs on the PATH."""
    monkeypatch.setitem(STAGES, "dummy", ("stages.base.stage:Stage", "a dummy"))
    monkeypatch.setattr(process, "PROGRAM", (sys.executable, str(DUMMY)))
    monkeypatch.setattr(orchestrator.signal, "signal", lambda *_: None)
    programs = tmp_path / "bin"
    programs.mkdir()
    srun = 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'
    texts = {"sbatch": SBATCH, "scancel": NOTE, "scontrol": NOTE, "squeue": SHOW, "sacct": SHOW, "srun": srun}
    for name, text in texts.items():
        (programs / name).write_text(
            "#!/bin/bash\n" + textwrap.dedent(text).replace("{place}", str(tmp_path)).replace("{name}", name)
        )
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "pipeline.yaml").write_text(textwrap.dedent(PIPELINE))
    (tmp_path / "cluster.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def submit(place, capfd):
    """Run the pipeline with a cluster file of this content; returns what was printed."""

    def run(*options, cluster=None):
        (place / "cluster.yaml").write_text(yaml.safe_dump(cluster or {}))
        main(["pipeline.yaml", "--out=out", "--launcher=slurm", "--cluster=cluster.yaml", *options])
        return capfd.readouterr().out

    return run


def asked(place):
    file = place / "asked"
    return file.read_text().splitlines() if file.exists() else []


def local(*options):
    main(["pipeline.yaml", "--out=out", *options])


class TestSubmission:
    def test_jobs_wait_for_their_inputs(self, place, submit):
        text = submit()
        wait = "--kill-on-invalid-dep=yes"
        assert asked(place) == [
            "sbatch --parsable out/slurm/one.sbatch",
            "sbatch --parsable out/slurm/aside.sbatch",
            f"sbatch --parsable --dependency=afterok:101 {wait} out/slurm/two.sbatch",
            f"sbatch --parsable --dependency=afterok:103:102 {wait} out/slurm/three.sbatch",
        ]
        assert "three: job 104, after two, aside" in text
        assert read_plan(place / "out")["three"] == Entry(["two", "aside"], ["104"])

    def test_what_is_done_is_skipped(self, place, submit):
        local()
        assert submit().count("up to date") == 4 and not asked(place)
        before = (place / "out" / "one" / "marks.txt").read_text()
        submit("--set", "two.colour=red")
        assert [line.split()[-1] for line in asked(place)] == ["out/slurm/two.sbatch", "out/slurm/three.sbatch"]
        assert "afterok" not in asked(place)[0]  # its input is done
        assert (place / "out" / "one" / "marks.txt").read_text() == before and not (place / "out" / "two").exists()

    def test_what_is_unfinished_is_kept(self, place, submit):
        with pytest.raises(UserError, match=r"two failed \(signal 9\)"):
            local("--set", "two.work=3", "--set", "two.die_at=2")
        submit("--set", "two.work=3", "--set", "two.die_at=2")
        assert len((place / "out" / "two" / "marks.txt").read_text().split()) == 2

    def test_a_dry_run_shows_the_scripts_only(self, place, submit):
        text = submit("--dry_run")
        assert text.count("#!/bin/bash") == 4
        assert "# sbatch --parsable '--dependency=afterok:<two>:<aside>' --kill-on-invalid-dep=yes" in text
        assert not (place / "out").exists() and not asked(place)

    def test_a_refusal_takes_the_others_back(self, place, submit):
        (place / "refuse").write_text("far-away")
        with pytest.raises(UserError, match=r"sbatch .*two.sbatch failed: sbatch: error: no such place"):
            submit(cluster={"steps": {"two": {"partition": "far-away"}}})
        assert asked(place)[-1] == "scancel 101 102"
        assert all(not entry.jobs for entry in read_plan(place / "out").values())

    @pytest.mark.parametrize("launcher", [["--launcher=slurm", "--cluster=cluster.yaml"], []])
    def test_a_folder_in_which_jobs_work_is_left_alone(self, place, submit, launcher):
        submit()
        (place / "squeue.txt").write_text("101|COMPLETED|None\n102|RUNNING|None\n103|PENDING|Dependency\n")
        with pytest.raises(UserError, match=r"jobs 102, 103 still work in out: .* \(scancel 102 103\)"):
            main(["pipeline.yaml", "--out=out", *launcher])

    def test_without_a_scheduler(self, place, submit, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(UserError, match="there is no sbatch here: submit from a machine of the cluster"):
            submit()


SCRIPT = """\
#!/bin/bash
# Step of two, as galatea run --launcher slurm submitted it.
#SBATCH --job-name=out.two
#SBATCH --chdir={place}
#SBATCH --output={place}/out/slurm/two-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=1-00:00:00
#SBATCH --partition=gpu
#SBATCH --account='my project'
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --constraint=a100
set -e
module load cuda
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1
export OMP_NUM_THREADS=8
# galatea step keeps the books; it is the process that SLURM signals, and passes that on to srun.
exec {python} -m stages step out/two --requeues=100 -- \\
    srun --kill-on-bad-exit=0 --wait=300 --cpus-per-task=8 \\
    {python} {dummy} dummy fit \\
    '--text=a b' \\
    --input.path=out/one/artifact \\
    --out=out/two \\
    --trainer.accelerator=gpu \\
    --trainer.devices=4 \\
    --trainer.num_nodes=2
"""


class TestScripts:
    def test_text(self, place, submit):
        common = {"nodes": 2, "gpus_per_node": 4, "cpus_per_task": 8, "memory": "64G", "time": "1-00:00:00"}
        common |= {"partition": "gpu", "account": "my project", "grace_s": 300, "extra": ["--constraint=a100"]}
        submit("--set", "two.text=a b", cluster=common | {"setup": ["module load cuda"]})
        words = {"place": place, "root": ROOT, "python": sys.executable, "dummy": DUMMY}
        assert (place / "out" / "slurm" / "two.sbatch").read_text() == SCRIPT.format(**words)

    def test_a_step_counts_more_than_its_stage(self, place, submit):
        submit(cluster={"time": "01:00:00", "steps": {"dummy": {"time": "02:00:00"}, "two": {"time": "03:00:00"}}})
        times = {name: (place / "out" / "slurm" / f"{name}.sbatch").read_text() for name in ("one", "two")}
        assert "--time=02:00:00" in times["one"] and "--time=03:00:00" in times["two"]

    @pytest.mark.parametrize(("device", "gpus"), [("gpu", ["4", "1"]), ("cpu", [])])
    def test_a_device_for_all_steps(self, place, submit, device, gpus):
        submit("--device", device, cluster={"gpus_per_node": 4, "steps": {"two": {"gpus_per_node": 0}}})
        texts = [(place / "out" / "slurm" / f"{name}.sbatch").read_text() for name in ("one", "two")]
        assert [number for text in texts for number in re.findall(r"--gpus-per-node=(\d)", text)] == gpus
        assert all(f"--trainer.accelerator={device} " in text for text in texts)

    def test_an_array_and_the_job_that_exports(self, place, submit, monkeypatch):
        monkeypatch.setitem(STAGES, "dummy", ("stages.base.per_item:PerItemStage", "artworks"))
        submit(cluster={"steps": {"two": {"array": 3, "array_limit": 2}}})
        array, export = ((place / "out" / "slurm" / f"two{kind}.sbatch").read_text() for kind in (".array", ""))
        assert "#SBATCH --array=0-2%2" in array and "/two-%A_%a.out" in array
        assert '--requeues=100 --shard="$SLURM_ARRAY_TASK_ID/3" -- \\' in array
        assert "--array" not in export and "--shard" not in export
        assert asked(place)[2].split()[2:] == [
            "--dependency=afterok:101",
            "--kill-on-invalid-dep=yes",
            "out/slurm/two.array.sbatch",
        ]
        assert "afterok:103 " in asked(place)[3] and "afterok:104:102" in asked(place)[4]
        assert read_plan(place / "out")["two"].jobs == ["103_0", "103_1", "103_2", "104"]

    def test_they_run(self, place, submit):
        """The scripts themselves, as a job runs them: what the local launcher then finds up to date."""
        submit("--set", "one.text=a b'c")
        for name in ("one", "aside"):
            subprocess.run(["bash", f"out/slurm/{name}.sbatch"], check=True, timeout=120)
        assert (
            json.loads((place / "out" / "one" / "artifact" / "manifest.json").read_text())["extra"]["text"] == "a b'c"
        )
        (place / "asked").unlink()
        assert submit("--set", "one.text=a b'c").count("up to date") == 2
        assert len(asked(place)) == 2


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "expected a dict"),
        ("nodes: [", "is not valid YAML"),
        ("node: 2", "unknown key 'node', known are: steps, account"),
        ("nodes: 0", "step one: nodes is 0, it must be at least 1"),
        ("nodes: two", "nodes is 'two', it must be int"),
        ("time: 4:00:00", "time is 14400, it must be str or null: put it in quotes"),
        ("time: soon", "time is 'soon', write it as in"),
        ('{time: "00:02:00", grace_s: 120}', "grace_s is 120, and the time of 120 s ends before"),
        ("{gpus_per_node: 4, tasks_per_node: 2}", "tasks_per_node is 2 and gpus_per_node 4: a process has one GPU"),
        ("{array: 4, nodes: 2}", "array is 4 and a step has 2 processes: deal items out one way"),
        ("array_limit: 2", "array_limit is 2 without an array"),
        ("array: 2", "array is for fits item by item, not for dummy"),
        ("extra: [constraint=a100]", "is not an option of sbatch"),
        ("extra: [--nodes=2]", "extra has --nodes, which galatea sets itself"),
        ("setup: module load cuda", "setup is 'module load cuda', it must be a list of texts"),
        ('partition: "gpu\\nrm -rf x"', r"partition is 'gpu\\nrm -rf x': line breaks and control characters"),
        ('setup: ["module load cuda\\nrm -rf x"]', "setup is .*: line breaks and control characters"),
        ('extra: ["--constraint=a\\nrm -rf x"]', "extra is .*: line breaks and control characters"),
        ('memory: "32G\\e[2J"', "memory is .*: line breaks and control characters"),
        ("steps: [one]", "steps must hold a mapping of options"),
        ("steps: {won: {nodes: 2}}", "steps has 'won', which is neither a step nor a stage"),
        ("steps: {three: {nodes: -1}}", "step three: nodes is -1, it must be at least 1"),
    ],
)
def test_cluster_files_that_cannot_be(place, content, match):
    (place / "cluster.yaml").write_text(content)
    with pytest.raises(UserError, match=match):
        main(["pipeline.yaml", "--out=out", "--launcher=slurm", "--cluster=cluster.yaml"])
    assert not asked(place) and not (place / "out" / "slurm").exists()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("10:30", 630), ("01:00:00", 3600), ("2-12", 216000), ("2-12:30", 217800), ("1-00:00:05", 86405)],
)
def test_times_are_as_sbatch_reads_them(time, seconds):
    assert slurm._seconds(time) == seconds


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cluster_files(file):
    cluster = read_cluster(file)
    assert cluster.steps.keys() <= STAGES.keys()
    for stage in STAGES:
        assert cluster.resources(stage, stage).problem() is None


class TestStep:
    """``galatea step``, as the scripts call it."""

    @pytest.fixture
    def step(self, place, capfd, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "7")

        def run(*options, folder="out/one", before=()):
            command = [sys.executable, str(DUMMY), "dummy", "fit", *options, "--out=out/one"]
            (place / "out" / "one").mkdir(parents=True, exist_ok=True)
            slurm.step([folder, *before, "--", *command])
            return capfd.readouterr().out

        return run

    @pytest.fixture
    def stopped(self, monkeypatch):
        """A step that saves itself and stops."""
        monkeypatch.setattr(steps, "_stream", lambda *_: steps.PREEMPTED)

    def test_runs_once(self, place, step):
        assert "mark 0" in step()
        assert "one: up to date" in step()

    def test_other_inputs_are_refused(self, place, step):
        step()
        with pytest.raises(UserError, match="step one has other settings or inputs than when it was begun"):
            step("--colour=red")

    def test_a_stopped_step_goes_back_into_the_queue(self, place, step, stopped):
        assert "job 7 goes back into the queue" in step()
        assert asked(place) == ["scontrol requeue 7"]
        assert json.loads((place / "out" / "one" / "status.json").read_text())["state"] == "stopped"

    def test_a_task_of_an_array_by_its_own_number(self, place, step, stopped, monkeypatch):
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
        step()
        assert asked(place) == ["scontrol requeue 7_3"]

    def test_not_for_ever(self, place, step, stopped, monkeypatch):
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        step(before=["--requeues=3"])
        monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
        with pytest.raises(UserError, match="the step was stopped and saved, 3 times now"):
            step(before=["--requeues=3"])

    def test_shards_keep_their_own_books(self, place, step):
        step(before=["--shard=1/2"])
        shard = json.loads((place / "out" / "one" / "shards" / "1" / "status.json").read_text())
        whole = json.loads((place / "out" / "one" / "status.json").read_text())
        assert shard["state"] == "done" and whole == {"state": "running", "hash": shard["hash"]}
        assert "one: up to date" in step(before=["--shard=1/2"])
        step(before=["--shard=0/2"])
        assert "up to date" not in step()  # the one that exports
        assert json.loads((place / "out" / "one" / "status.json").read_text())["state"] == "done"


class TestQuery:
    def test_the_queue_counts_more_than_the_accounting(self, place):
        (place / "sacct.txt").write_text(
            "1|COMPLETED|None\n2|RUNNING|None\n3_0|CANCELLED by 1000|None\n2.batch|FAILED|x\n"
        )
        (place / "squeue.txt").write_text("2|FAILED|NonZeroExitCode\n4|PENDING|Dependency\n")
        assert query(["1", "2", "3_0", "4", "5"]) == {
            "1": Job("COMPLETED"),
            "2": Job("FAILED", "NonZeroExitCode"),
            "3_0": Job("CANCELLED"),
            "4": Job("PENDING", "Dependency"),
        }

    def test_without_a_scheduler(self, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        assert query(["1"]) == {} and query([]) == {}


def test_the_commands_of_the_docs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(orchestrator.signal, "signal", lambda *_: None)
    page = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", "")
    found = [shlex.split(line) for line in re.findall(r"^galatea (.*)$", page, re.MULTILINE)]
    runs = [words[1:] for words in found if words[0] == "run"]
    for words in runs:
        main([*words, "--out", str(tmp_path), *(["--dry_run"] if "--dry_run" not in words else [])])
    assert len(runs) == 4 and capfd.readouterr().out.count("#!/bin/bash") == 5  # two arrays
    keys = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page.partition("### What a step asks for")[2], re.MULTILINE)
    named = {key for cell in keys for key in re.findall(r"`(\w+)`", cell)}
    assert {each.name for each in dataclasses.fields(Resources)} <= named


def test_a_plan_is_read_back(tmp_path):
    plan = {"a": Entry([]), "b": Entry(["a"], ["1_0", "1_1", "2"])}
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan and Resources().problem() is None
