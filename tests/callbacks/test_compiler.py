"""Compiled modules: the same numbers and names, and a line instead of an end where it does not work."""

import copy
import logging

import pytest
import torch
from torch import nn

from callbacks.compiler import Compile, compile_module
from models import artifact
from models.errors import UserError
from models.generators.discriminator import ImageDiscriminator
from models.generators.manifold import ManifoldGenerator
from models.losses.gan import r1_penalty
from stages import cli
from stages.prior import PriorStage
from tests.stages import cases, tiny
from tests.stages.toy import ToyTraining


class Net(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop, self.breaks = nn.Linear(3, 2), nn.Dropout(0.5), breaks

    def forward(self, x):
        if self.breaks and x.sum() > 0:  # a branch that depends on numbers
            x = -x
        return self.drop(self.layer(x)).tanh()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "callbacks.compiler")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "callbacks.compiler"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_compiler():
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "/nowhere/c++")}):
        yield


def outcome(net):
    """Output, gradient and the next draw."""
    torch.manual_seed(1)
    x = torch.linspace(-1, 2, 12).reshape(4, 3)
    y = net(x)
    net.zero_grad()
    y.square().sum().backward()
    return y.detach(), net.layer.weight.grad.clone(), torch.rand(())


@pytest.mark.slow
def test_compiled_numbers_and_names(warnings):
    net = Net().eval()
    plain, names = outcome(net), list(net.state_dict())
    compile_module(net, "net")
    for a, b in zip(outcome(net), plain, strict=True):
        torch.testing.assert_close(a, b)
    assert not warnings() and net._compiled_call_impl is not None
    assert list(net.state_dict()) == names and copy.deepcopy(net)._compiled_call_impl is None


def test_without_a_compiler(warnings, no_compiler):
    net = Net()
    plain = outcome(net)
    compile_module(net, "encoder")
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(outcome(net), plain, strict=True))
    (line,) = warnings()
    assert line.startswith("encoder runs without torch.compile: ") and "C++ compiler" in line and "\n" not in line


def test_what_is_not_one_graph(warnings):
    net = Net(breaks=True)
    plain = outcome(net)
    compile_module(net, "encoder")
    assert all(torch.equal(a, b) for a, b in zip(outcome(net), plain, strict=True))
    (line,) = warnings()
    assert "encoder runs without torch.compile: Unsupported: Data-dependent branching" in line


def test_mistakes_are_the_modules_own(warnings):
    net = Net()
    compile_module(net, "encoder")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        net(torch.zeros(4, 5))


def test_r1_is_differentiated_twice():
    torch.manual_seed(0)
    network, image = ImageDiscriminator(channels=[4, 4, 4]), torch.randn(2, 3, 16, 16)
    plain, _ = r1_penalty(lambda x: network(x).logits, image)
    network.compile(backend="aot_eager")
    twice = network(image.requires_grad_()).logits
    (gradient,) = torch.autograd.grad(twice.sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()
    found, _ = r1_penalty(lambda x: network(x).logits, image)
    found.sum().backward()
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("painter", "--compile painter: the stage has no 'painter', it has: generator$"),
        ("generator.hair.fringe", "--compile generator.hair.fringe: generator has no 'hair', it has: map_network, "),
        ("generator", "--compile generator: generator is not called itself, name one of its parts: map_network, "),
    ],
)
def test_refusals(name, match):
    stage = nn.Module()
    stage.generator = ManifoldGenerator(**tiny.OPTIONS)
    with pytest.raises(UserError, match=match):
        Compile([name]).on_fit_start(None, stage)


def test_on_the_command_line(tmp_path, warnings, no_compiler):
    artifacts = []
    for options in ([], ["--compile=[discriminator,generator.map_network]"]):
        line = [*cases.lines(tmp_path)["prior"][1:], f"--out={tmp_path / str(len(options))}", *options]
        cli.run("prior", PriorStage, line)
        artifacts.append(artifact.load(tmp_path / str(len(options))))
    assert len(warnings()) == 2
    assert artifacts[0].id == artifacts[1].id  # step hash and names included


def test_a_compiled_stage_is_only_compiled_where_it_runs():
    stage = ToyTraining()
    stage.configure_model()
    Compile(["layer"]).on_fit_start(None, stage)
    assert stage.layer._compiled_call_impl is not None and list(stage.state_dict()) == ["layer.weight", "layer.bias"]
