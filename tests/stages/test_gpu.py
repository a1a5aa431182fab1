"""What only a GPU can show of the stages: everything moves there, and comes back as a CPU would have made it.

``-m gpu --device cpu`` shows that these tests work.
"""

import shutil

import pytest
import torch

from models import artifact
from stages.__main__ import dispatch
from tests.stages import cases, small

pytestmark = pytest.mark.gpu


class Results:
    """Runs a stage's small command line when its result is asked for first, and before it those that it needs."""

    def __init__(self, folder):
        self.folder = folder
        self.lines = cases.lines(folder)

    def __call__(self, stage, device, name="", **options):
        """Output folder; ``options`` and ``name`` make it a run of its own."""
        out = self.folder / (name or stage)
        if not (out / "artifact").exists() or options:
            if (needed := cases.collect()[stage].needs) is not None:
                self(needed, device)
            given = {"trainer.accelerator": "gpu" if device.type == "cuda" else "cpu", "trainer.devices": 1}
            given |= {key.replace("__", "."): value for key, value in options.items()}
            dispatch([*self.lines[stage], *small.options(given), f"--out={out}"])
        return out


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Results(tmp_path_factory.mktemp("gpu"))


def numbers(out):
    """All tensors of an artifact."""
    loaded = artifact.load(out)
    return {
        f"{module}.{name}": tensor.float()
        for module in loaded.manifest["modules"]
        for name, tensor in loaded.module(module).state_dict().items()
        if tensor.is_floating_point()
    }


def difference(one, other):
    """Largest of two artifacts' numbers, relative to what stands beside them."""
    ours, theirs = numbers(one), numbers(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / ours[name].abs().max().clamp_min(1)) for name in ours)


@pytest.mark.parametrize("stage", cases.collect())
def test_a_stage_works_there(results, device, stage):
    """All it has moves: networks, frozen networks, batches, codes. What it leaves is on no device."""
    out = results(stage, device)
    assert all(tensor.isfinite().all() and tensor.device.type == "cpu" for tensor in numbers(out).values())


def test_the_scaler_of_16_mixed_steps_both_networks(results, device):
    half = {"trainer__precision": "16-mixed"}
    if device.type == "cpu":
        half = {"trainer__precision": "null", "trainer__plugins": "tests.stages.processes.HalfOnCpu"}
    options = {"model__adversarial__start": 0, "model__total_images": 24}
    out = results("prior", device, "scaled", **options, **half)
    plain = results("prior", device, "plain", **options)
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    (scaler,) = [value for value in saved.values() if isinstance(value, dict) and "_growth_tracker" in value]
    assert scaler["scale"] > 0 and scaler["_growth_tracker"] > 0  # steps since the last that overflowed
    before, after = numbers(plain), numbers(out)
    for network in ("generator.", "discriminator."):
        names = [name for name in after if name.startswith(network)]
        assert names and all(after[name].isfinite().all() for name in names)
        assert sum(float((after[name] - before[name]).abs().mean()) for name in names) / len(names) < 0.05


def test_a_checkpoint_resumes_there_and_on_a_cpu(results, device):
    whole = results("prior", device)
    begun = results("prior", device, "begun", trainer__max_steps=4)  # of eight
    for name, where in (("resumed", device), ("resumed on a CPU", torch.device("cpu"))):
        shutil.copytree(begun, results.folder / name, symlinks=True)
        out = results("prior", where, name, ckpt_path="last")
        assert difference(out, whole) < (1e-3 if device.type == "cuda" else 1e-6)


def test_an_item_comes_out_twice_the_same(results, device):
    """Gradients of lookups are summed in any order on a GPU, so that equal means: to rounding, over six steps."""
    once, again = results("anchor", device), results("anchor", device, "again", model__seed=0)
    assert difference(once, again) < (1e-3 if device.type == "cuda" else 1e-12)


@pytest.mark.parametrize("stage", ["anchor", "prior", "invert"])
def test_draws_are_those_of_a_cpu(results, device, stage):
    """Codes, order, views and noise are drawn on the CPU: other draws would lead elsewhere at once."""
    there = results(stage, device)
    here = results(stage, torch.device("cpu"), f"{stage} here", threads=1)
    assert difference(there, here) < (0.02 if device.type == "cuda" else 1e-6)
