"""Tuned copies of weights beside a shared original, and which weights a choice means."""

import pytest
import torch

from models.errors import UserError
from models.generators.eg3d import EG3DGenerator
from models.generators.stylegan2 import StyleGAN2Generator
from models.heads.tuning import TunedWeights, select_parameters, with_weights
from tests.models.generators.protocol import awaken, seeded
from tests.stages.tiny import prior

SMALL_EG3D = {
    "z_dim": 8, "w_dim": 8, "channels": (6, 4), "plane_features": 4, "decoder": {"hidden": 6}, "coarse": 8, "fine": 8,
    "render_resolution": 8, "superresolution": {"channels": (6, 4), "resolution": 16},
}  # fmt: skip


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return awaken(StyleGAN2Generator(channels=(12, 8, 6), style_dim=10, mapping_layers=2)).eval().requires_grad_(False)


def codes(generator):
    return generator.mapping(generator.sample_z(1, seeded()))


class TestSelection:
    def test_parts(self, generator):
        names = {n for n, _ in generator.named_parameters()}
        parts = {part: set(select_parameters(generator, part)) for part in ("all", "synthesis", "affines", "late")}
        assert parts["all"] == names
        assert parts["synthesis"] == {n for n in names if not n.startswith("map_network")}
        assert parts["affines"] == {n for n in names if ".affine." in n}
        # Of the taps block4, image4, block8, image8... the last of the first half is block8.
        assert parts["late"] < parts["synthesis"]
        assert all(n.startswith(("backbone.blocks.2", "backbone.blocks.1.to_image", "backbone.blocks.0.to_image"))
                   for n in parts["late"])  # fmt: skip

    def test_what_draws_expressions_is_reached_with_them(self, tmp_path):
        heads = prior(tmp_path / "prior").module("generator").requires_grad_(False)
        neutral = set(select_parameters(heads, "synthesis"))
        moving = set(select_parameters(heads, "synthesis", expression=True))
        assert neutral < moving
        assert {n.partition(".")[0] for n in moving - neutral} == {"expression_field", "ambient_out"}
        late = set(select_parameters(heads, "late", expression=True))
        assert set(select_parameters(heads, "late")) <= late < moving

    def test_a_generator_without_expressions_has_nothing_more(self, generator):
        assert select_parameters(generator, "synthesis", expression=True) == select_parameters(generator, "synthesis")

    def test_a_regular_expression_less_what_is_frozen(self, generator):
        chosen = select_parameters(generator, r"blocks\.1", r"affine|noise")
        assert chosen == [
            n for n, _ in generator.named_parameters() if "blocks.1" in n and "affine" not in n and "noise" not in n
        ]

    @pytest.mark.parametrize(
        ("train", "freeze", "message"),
        [
            ("nothing", "", "'nothing' leaves no parameter of StyleGAN2Generator to train"),
            ("all", ".", "'all' leaves no parameter of StyleGAN2Generator to train"),
            ("(", "", "'(' is neither one of all, synthesis, affines, late nor a regular expression"),
        ],
    )
    def test_refusals(self, generator, train, freeze, message):
        with pytest.raises(UserError) as error:
            select_parameters(generator, train, freeze)
        assert str(error.value).startswith(message)


class TestTunedWeights:
    def test_nothing_is_tuned_yet(self, generator):
        ws = codes(generator)
        tuned = TunedWeights(generator, select_parameters(generator, "synthesis"))
        assert torch.equal(tuned.synthesis(ws, None).image, generator.synthesis(ws).image)
        assert torch.equal(tuned.mapping(generator.sample_z(1, seeded())).ws, ws.ws)

    def test_only_the_copies_learn(self, generator):
        ws, (name, *_) = codes(generator), select_parameters(generator, r"blocks\.0.*bias")
        tuned = TunedWeights(generator, [name])
        assert [n for n, _ in tuned.named_parameters()] == [f"weights.{name.replace('.', '/')}"]
        assert list(tuned.tensors()) == [name]
        tuned.synthesis(ws, None).image.sum().backward()
        (weight,) = tuned.parameters()
        assert weight.grad.abs().max() > 0 and all(p.grad is None for p in generator.parameters())

    def test_a_changed_copy_shows_the_same(self, generator):
        ws, before = codes(generator), generator.state_dict()
        tuned = TunedWeights(generator, select_parameters(generator, "affines"))
        with torch.no_grad():
            for weight in tuned.parameters():
                weight.add_(0.1)
        changed = with_weights(generator, tuned.tensors())
        assert torch.equal(changed.synthesis(ws).image, tuned.synthesis(ws, None).image.detach())
        assert all(torch.equal(before[n], t) for n, t in generator.state_dict().items())
        with pytest.raises(KeyError):
            with_weights(generator, {"none": torch.zeros(1)})


def test_view_by_view_is_the_same_but_for_rounding():
    """And the gradient is that of the tuned weights, which the generator no longer has when it is asked for."""
    torch.manual_seed(0)
    generator = awaken(EG3DGenerator(**SMALL_EG3D)).eval().requires_grad_(False)  # type: ignore[arg-type]
    tuned = TunedWeights(generator, select_parameters(generator, "synthesis"))
    with torch.no_grad():
        for weight in tuned.weights.values():
            weight.add_(0.1 * torch.randn_like(weight))
    ws, cameras = codes(generator), generator.rig.camera(torch.tensor([-0.3, 0.0, 0.3]))
    found = []
    for render in (tuned.synthesis, tuned.frugal):
        image = render(ws, cameras).image
        found.append([image.detach(), *torch.autograd.grad(image.square().mean(), list(tuned.weights.values()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in found[0][1:])
