"""Every stage in one, two and three processes and in every precision, by the real command lines."""

from dataclasses import dataclass, field
from importlib import import_module

import pytest
import torch

from datamodules.feature_pairs import FeaturePairs
from models import artifact
from models.errors import UserError
from stages import cli
from stages.table import STAGES
from tests.stages import inversions, small
from tests.stages.processes import galatea

SUBJECTS = 22  # twelve to train on; five each in validation and in test, which neither two nor three ranks divide


@dataclass(frozen=True)
class Case:
    """How much a command may depend on the number of processes.

    Attributes:
        needs: the commands whose results it takes.
        batch: of all processes together; 0 leaves it.
        shared: options that count pictures, as the batch does, of all processes together.
        options: of the command line.
        tolerance: of the weights at equal batches, relative to how far training has moved them; 0: artifacts and tables
            are equal to the byte; None: ranks agree, but the losses compare what is in a rank's own batch.
    """

    needs: tuple[str, ...] = ()
    batch: int = 0
    shared: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    tolerance: float | None = 0


_FIFTHS = {f"data.init_args.{split}_fraction": 5 / SUBJECTS for split in ("val", "test")}
_FIVES = {f"data.init_args.{split}_subjects": count for split, count in (("train", 12), ("val", 5), ("test", 5))}
_PRIOR = {
    **_FIVES,
    "model.total_images": 48,
    # Of the minibatch standard deviation each rank has its own, as in StyleGAN.
    "model.discriminator.init_args.minibatch_group": 0,
}
_GAN = {"model.reconstruction.weight": 0, "model.adversarial.start": 0}
_SCORES = {"model.fit_subjects": 2, "model.neighbours": 2, "model.kid_features": "EmbeddedDistribution"}
CASES = {
    "anchor fit": Case(),
    "stylize fit": Case(("anchor fit",)),
    "present predict": Case(("stylize fit",)),
    "prior fit": Case(batch=6, options={**_PRIOR, "model.adversarial.start": 24}, tolerance=5e-3),
    "prior fit, plain GAN": Case(batch=6, options={**_PRIOR, **_GAN}, tolerance=5e-3),
    "prior test": Case(options={**_PRIOR, **_SCORES}),
    "invert fit": Case(batch=6, shared=("model.rendered",), options=_FIFTHS, tolerance=1e-4),
    "invert test": Case(options=_FIFTHS),
    "tune fit": Case(("invert fit",), 6, ("model.locality_samples",), _FIFTHS, tolerance=1e-4),
    "detail fit": Case(("tune fit",), 6, options={**_FIFTHS, "model.marks": 0.5}, tolerance=1e-4),
    "detail predict": Case(("tune fit",), options=_FIFTHS),
    "features fit": Case(batch=6, options=_FIVES, tolerance=None),
    "features test": Case(options=_FIVES),
}


class Results:
    """Runs a command when its result is asked for first, and before it those whose results it takes."""

    def __init__(self, folder):
        self.folder = folder
        inversions.prepare(folder, SUBJECTS)
        self.lines = {**small.lines(folder), **inversions.lines(folder)}
        small.pictures(FeaturePairs(str(folder / "pictures"), 64, 12, 5, 5))

    def __call__(self, name, ranks=1, **options):
        """Output folder of a case; ``options`` make it a run of their own."""
        stage, command = name.partition(",")[0].split()
        case, alone = CASES[name], ranks == 1 and not options
        plain = alone and name.endswith(" fit")  # where later stages expect it
        out = self.folder / (stage if plain else "-".join([*name.split(), str(ranks), *options.values()]))
        if not out.exists():
            for needed in case.needs:
                self(needed)
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
    elif tolerance == 0:
        assert artifact.load(found).id == artifact.load(alone).id
    else:
        (start, end), (begin, there) = (torch.load(out / "way.pt") for out in (alone, found))
        assert torch.equal(start, begin)
        if tolerance is not None:
            assert (there - end).norm() < tolerance * (end - start).norm()
            expected, metrics = (artifact.load(out).manifest["metrics"] for out in (alone, found))
            assert metrics == pytest.approx(expected, rel=1e-3)


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
