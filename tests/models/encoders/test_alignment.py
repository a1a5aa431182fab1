"""ADA against the official layout, written out in float64, and its gradients."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models.configurable import build, spec
from models.encoders.alignment import ResidualAligner
from tests.models.generators.protocol import dead_parameters, seeded

# Of HFGI's ``grid_align``: what each block reads and makes, its stride, and the side that its input is enlarged to.
LAYOUT = {
    "conv_layer2": [(16, 32, 2), (32, 32, 1), (32, 32, 1)],
    "conv_layer3": [(32, 48, 2), (48, 48, 1), (48, 48, 1)],
    "conv_layer4": [(48, 64, 2), (64, 64, 1), (64, 64, 1)],
    "dconv_layer1": [(112, 64, 1), (64, 32, 1), (32, 32, 1)],
    "dconv_layer2": [(64, 32, 1), (32, 16, 1), (16, 16, 1)],
    "dconv_layer3": [(32, 16, 1), (16, 3, 1), (3, 3, 1)],
}


def official_shapes():
    """Shapes of the official state dict."""

    def norm(name, channels):
        kinds = ("weight", "bias", "running_mean", "running_var")
        return {f"{name}.{kind}": (channels,) for kind in kinds} | {f"{name}.num_batches_tracked": ()}

    shapes = {"conv_layer1.0.weight": (16, 6, 3, 3), "conv_layer1.2.weight": (16,)} | norm("conv_layer1.1", 16)
    for layer, blocks in LAYOUT.items():
        for i, (before, after, _) in enumerate(blocks):
            name = f"{layer}.{i}"
            if before != after:
                shapes |= {f"{name}.shortcut_layer.0.weight": (after, before, 1, 1)}
                shapes |= norm(f"{name}.shortcut_layer.1", after)
            shapes |= norm(f"{name}.res_layer.0", before) | norm(f"{name}.res_layer.4", after)
            shapes |= {f"{name}.res_layer.1.weight": (after, before, 3, 3), f"{name}.res_layer.2.weight": (after,)}
            shapes |= {f"{name}.res_layer.3.weight": (after, after, 3, 3)}
    return shapes


def weights():
    """Arbitrary numbers for that state dict, in float64; variances are positive."""
    draws, state = seeded(7), {}
    for name, shape in sorted(official_shapes().items()):
        numbers = torch.randn(shape, generator=draws, dtype=torch.float64)
        scale = 1.0 if len(shape) < 2 else shape[1] ** -0.5 / shape[2]
        state[name] = numbers.abs() + 0.5 if name.endswith("running_var") else numbers * scale
    return {name: value.long() if name.endswith("tracked") else value for name, value in state.items()}


def reference(state, residual, target):
    """What HFGI computes, of functions alone."""

    def norm(x, name):
        kinds = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (state[f"{name}.{kind}"][:, None, None] for kind in kinds)
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def prelu(x, name):
        return torch.where(x > 0, x, x * state[f"{name}.weight"][:, None, None])

    def blocks(x, layer):
        for i, (before, after, stride) in enumerate(LAYOUT[layer]):
            name = f"{layer}.{i}"
            found = F.conv2d(norm(x, f"{name}.res_layer.0"), state[f"{name}.res_layer.1.weight"], padding=1)
            found = prelu(found, f"{name}.res_layer.2")
            found = F.conv2d(found, state[f"{name}.res_layer.3.weight"], stride=stride, padding=1)
            skip = x[:, :, ::stride, ::stride]
            if before != after:
                skip = norm(F.conv2d(skip, state[f"{name}.shortcut_layer.0.weight"]), f"{name}.shortcut_layer.1")
            x = norm(found, f"{name}.res_layer.4") + skip
        return x

    def doubled(x):
        """Bilinear, pixels as squares: each is 3/4 of the nearest and 1/4 of the next, the border repeated."""
        for axis in (2, 3):
            x = x.transpose(axis, 3)
            before = torch.cat([x[..., :1], x[..., :-1]], -1)
            after = torch.cat([x[..., 1:], x[..., -1:]], -1)
            x = torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], -1).flatten(3).transpose(axis, 3)
        return x

    first = F.conv2d(torch.cat([residual, target], 1), state["conv_layer1.0.weight"], padding=1)
    first = prelu(norm(first, "conv_layer1.1"), "conv_layer1.2")
    second = blocks(first, "conv_layer2")
    third = blocks(second, "conv_layer3")
    x = blocks(third, "conv_layer4")
    x = blocks(torch.cat([doubled(x), third], 1), "dconv_layer1")
    x = blocks(torch.cat([doubled(x), second], 1), "dconv_layer2")
    return blocks(torch.cat([doubled(x), first], 1), "dconv_layer3")


@torch.no_grad()
def test_the_official_layout():
    network, state, draws = ResidualAligner().eval(), weights(), seeded()
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == official_shapes()
    network.double().load_state_dict(state)
    residual, target = (torch.randn(2, 3, 32, 32, generator=draws) for _ in range(2))
    expected = reference(state, residual.double(), target.double())
    assert expected.std() > 0.1
    assert_close(network(residual.double(), target.double()), expected)
    assert_close(network.float()(residual, target), expected.float(), atol=1e-4, rtol=1e-4)


def test_a_small_one_trains():
    torch.manual_seed(0)
    network = ResidualAligner([8, 12, 16, 16])
    assert 1e4 < sum(p.numel() for p in network.parameters()) < 1e5
    assert spec(build(spec(network))) == spec(network)
    draws = seeded()
    found = network(*(torch.randn(2, 3, 64, 64, generator=draws) for _ in range(2)))
    assert found.shape == (2, 3, 64, 64)
    (found * torch.randn(found.shape, generator=draws)).sum().backward()
    assert dead_parameters(network) == []


def test_what_it_refuses():
    with pytest.raises(ValueError, match="widths must be 4"):
        ResidualAligner([8, 8])
    network = ResidualAligner([4, 4, 4, 4])
    with pytest.raises(ValueError, match="a multiple of 8"):
        network(torch.zeros(1, 3, 12, 12), torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match="residual and target"):
        network(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 8, 8))
