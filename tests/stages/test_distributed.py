"""Every stage in one, two and three processes and in every precision, by the real command lines."""

from importlib import import_module

import pytest
import torch

from models import artifact
from models.errors import UserError
from stages import cli
from stages.table import STAGES
from tests.stages import cases, inversions, small
from tests.stages.processes import galatea

CASES = {
    f"{stage} {name}": command for stage, case in cases.collect().items() for name, command in case.commands.items()
}


class Results:
    """Runs a command when its result is asked for first, and before it those whose results it takes."""

    def __init__(self, folder):
        self.folder, self.lines = folder, cases.lines(folder, inversions.SUBJECTS)

    def __call__(self, name, ranks=1, **options):
        """Output folder of a case; ``options`` make it a run of their own."""
        stage, command = name.partition(",")[0].split()
        case, alone = CASES[name], ranks == 1 and not options
        plain = alone and name.endswith(" fit")  # where later stages expect it
        out = self.folder / (stage if plain else "-".join([*name.split(), str(ranks), *options.values()]))
        if not out.exists():
            if (needed := cases.collect()[stage].needs) is not None:
                self(f"{needed} fit")
            given = {**case.options, **{f"trainer.{key}": value for key, value in options.items()}}
            if case.batch:
                given |= dict.fromkeys(["data.init_args.batch_size", *case.shared], case.batch // ranks)
                given["trainer.callbacks+"] = "tests.stages.processes.InStep"
            line = [stage, command, *self.lines[stage][2:]]
            galatea(*line, *small.options(given), f"--out={out}", ranks=ranks)
        return out


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Results(tmp_path_factory.mktemp("work"))


def test_every_stage_is_here():
    assert {name.split()[0] for name in CASES} == set(STAGES)


QUICK = {"anchor fit", "invert fit", "invert test"}


def thorough(names):
    """Parameters, all but the quick ones only with -m matrix."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.matrix) for name in names]


def compare(results, name, ranks):
    found, alone, tolerance = results(name, ranks), results(name), CASES[name].tolerance
    if name.endswith(" test"):
        assert (found / "metrics.csv").read_bytes() == (alone / "metrics.csv").read_bytes()
    elif not (alone / "artifact").exists():  # of a stage that makes pictures
        made, expected = (
            {file.relative_to(out): file.read_bytes() for file in [*out.glob("items/*/*"), out / "index.html"]}
            for out in (found, alone)
        )
        assert made == expected and len(made) > 1
    elif tolerance == 0:
        assert artifact.load(found).id == artifact.load(alone).id
    else:
        (start, end), (begin, there) = (torch.load(out / "way.pt") for out in (alone, found))
        assert torch.equal(start, begin)
        if tolerance is not None:
            assert (there - end).norm() < tolerance * (end - start).norm()
            expected, metrics = (artifact.load(out).manifest["metrics"] for out in (alone, found))
            assert metrics == pytest.approx(expected, rel=max(1e-3, tolerance / 10))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_does(results, name):
    compare(results, name, 2)


@pytest.mark.parametrize("name", thorough(CASES))
def test_three_processes_find_what_one_does(results, name):
    compare(results, name, 3)


PRECISIONS = {"bf16-mixed": {"precision": "bf16-mixed"}, "16-mixed": {"plugins": "tests.stages.processes.HalfOnCpu"}}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", thorough(name for name in CASES if not name.endswith(" test")))
def test_half_precision(results, name, precision):
    """32-true is what the others run in."""
    found, full = (artifact.load(out) for out in (results(name, **PRECISIONS[precision]), results(name)))
    for module, entry in full.manifest["modules"].items():
        assert found.manifest["modules"][module].get("dtype") == entry.get("dtype")
        tensors, expected = (loaded.module(module).state_dict() for loaded in (found, full))
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        assert {key: tensor.dtype for key, tensor in tensors.items()} == {key: t.dtype for key, t in expected.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_16_mixed_is_refused_without_a_gpu(results, tmp_path, stage):
    module, _, name = STAGES[stage][0].partition(":")
    line = [*results.lines[stage][1:], "--trainer.precision=16-mixed", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="16-mixed needs a GPU"):
        cli.run(stage, getattr(import_module(module), name), line)
    assert not (tmp_path / "out").exists()
