"""Encoders of pSp and e4e at a small size; the official numbers are in tests/models/zoo."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from models import artifact
from models.encoders.base import inverted
from models.encoders.irse import ArcFace, Bottleneck, IRTrunk, crop_face
from models.encoders.pyramid import Encoder4Editing, GradualStyleEncoder, MappedStyleEncoder, SharedStyleEncoder
from models.generators.stylegan2 import StyleGAN2Generator
from models.latents import Latents

TINY = {"w_dim": 6, "resolution": 32, "widths": (4, 6, 8, 10), "depths": (1, 2, 1, 1), "reduction": 1}


def tiny(cls, num_ws=8, **changes):
    torch.manual_seed(0)
    encoder = cls(num_ws, **{**TINY, **changes}).eval()
    for parameter in encoder.parameters():  # biases and slopes of a fresh network hide what they should do
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(encoder.latent_avg)
    return encoder


def images(count=2, side=32, channels=3):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(params=[GradualStyleEncoder, Encoder4Editing])
def encoder(request):
    return tiny(request.param)


@torch.no_grad()
def test_codes(encoder):
    offsets, given = encoder(images()).ws, torch.randn(1, 8, 6)
    assert offsets.shape == (2, 8, 6)
    torch.testing.assert_close(encoder.codes(images()).ws, offsets + encoder.latent_avg)
    torch.testing.assert_close(encoder.codes(images(), Latents({"ws": given})).ws, offsets + given)


@torch.no_grad()
def test_any_number_of_codes(encoder):
    cls, whole = type(encoder), encoder(images()).ws
    for num_ws in (1, 3, 6, 12):
        other = tiny(cls, num_ws)
        shared = {k: v for k, v in encoder.state_dict().items() if k in other.state_dict() and k != "latent_avg"}
        other.load_state_dict(shared, strict=False)
        torch.testing.assert_close(other(images()).ws[:, :8], whole[:, :num_ws])


@torch.no_grad()
def test_levels():
    """A code sees its own level of the pyramid, and the coarser ones through it."""
    encoder = tiny(GradualStyleEncoder)
    before = encoder(images()).ws
    for layer, first in ((encoder.latlayer2, 7), (encoder.latlayer1, 3)):
        layer.weight.mul_(2.0)
        changed = (encoder(images()).ws - before).abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [i >= first for i in range(8)]


@torch.no_grad()
def test_progressive_stages():
    encoder = tiny(Encoder4Editing)
    last = encoder(images()).ws
    encoder.set_progressive_stage(0)
    assert torch.equal(encoder(images()).ws, last[:, :1].expand_as(last))
    for stage in (1, 3, 7, 18):
        encoder.set_progressive_stage(stage)
        codes = encoder(images()).ws
        torch.testing.assert_close(codes[:, : stage + 1], last[:, : stage + 1])
        torch.testing.assert_close(codes[:, stage + 1 :], last[:, :1].expand_as(codes[:, stage + 1 :]))
    encoder.set_progressive_stage(None)
    assert torch.equal(encoder(images()).ws, last)
    with pytest.raises(ValueError, match="0 or more"):
        encoder.set_progressive_stage(-1)


@torch.no_grad()
def test_groups():
    """The same networks, told apart by group; each group has a code that its others differ from."""
    groups = {"renderer": (5, 6), "decoder": (3, 6)}
    for cls in (GradualStyleEncoder, Encoder4Editing):
        whole = tiny(cls)
        torch.manual_seed(0)
        encoder = cls(groups=groups, **TINY).eval()
        encoder.load_state_dict({k: v for k, v in whole.state_dict().items() if k != "latent_avg"}, strict=False)
        found = encoder(images()).groups
        assert {name: tuple(t.shape[1:]) for name, t in found.items()} == groups
        alone = whole(images()).ws
        torch.testing.assert_close(found["renderer"], alone[:, :5])
        if cls is GradualStyleEncoder:
            torch.testing.assert_close(found["decoder"], alone[:, 5:])
        else:
            deltas = alone - alone[:, :1]
            deltas[:, 0] = alone[:, 0]
            torch.testing.assert_close(
                found["decoder"], deltas[:, 5:] + torch.cat([deltas[:, 5:6] * 0, *[deltas[:, 5:6]] * 2], 1)
            )
    encoder.set_progressive_stage(5)
    again = encoder(images()).groups
    torch.testing.assert_close(again["renderer"], found["renderer"])
    torch.testing.assert_close(again["decoder"][:, 1], found["decoder"][:, 1])
    assert torch.equal(again["decoder"][:, 2], again["decoder"][:, 0])
    mean = Latents({name: torch.randn(1, *size) for name, size in groups.items()})
    encoder.mean_latents = mean
    for name, codes in encoder.codes(images()).groups.items():
        torch.testing.assert_close(codes, mean.groups[name] + again[name])
    with pytest.raises(ValueError, match="either num_ws or groups"):
        cls(8, groups=groups, **TINY)


def test_expressions():
    encoder = tiny(Encoder4Editing, expressions=3, style_width=5)
    latents, expression = encoder.invert(images())
    assert expression is not None and expression.shape == (2, 3) and latents.ws.shape == (2, 8, 6)
    torch.testing.assert_close(latents.ws, encoder.codes(images()).ws)
    encoder.set_progressive_stage(0)  # the codes look at the coarsest level only, the expression at the finest
    expression = encoder.invert(images())[1]
    assert expression is not None
    expression.sum().backward()
    assert encoder.latlayer2.weight.grad is not None and encoder.styles[0].linear.weight.grad is None
    assert tiny(Encoder4Editing).invert(images())[1] is None


@torch.no_grad()
def test_one_code_for_all_layers():
    """pSp to W: equal codes, from one network for each group, which sees all levels of the pyramid."""
    encoder = tiny(SharedStyleEncoder)
    codes = encoder(images()).ws
    assert codes.shape == (2, 8, 6) and bool((codes == codes[:, :1]).all()) and len(encoder.styles) == 1
    assert not torch.equal(codes[0], codes[1])
    encoder.latlayer2.weight.mul_(2.0)
    assert float((encoder(images()).ws - codes).abs().max()) > 1e-6
    torch.manual_seed(0)
    options = {name: value for name, value in TINY.items() if name != "w_dim"}
    several = SharedStyleEncoder(groups={"renderer": (3, 5), "decoder": (2, 7)}, **options).eval()
    found = several(images()).groups
    assert {name: tuple(t.shape) for name, t in found.items()} == {"renderer": (2, 3, 5), "decoder": (2, 2, 7)}


@torch.no_grad()
def test_codes_through_the_mapping():
    """pSp to Z+: what the generator's mapping makes of the codes, around the mean of z."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator(channels=[4, 4, 4], style_dim=6, mapping_layers=2).eval()
    generator.update_mean(64)
    options = {name: value for name, value in TINY.items() if name != "w_dim"}
    encoder = MappedStyleEncoder(groups={"z": (generator.num_ws, 6)}, **options).eval()
    encoder.start(generator.mean_latents)
    z = encoder(images()).groups["z"]
    found, _ = inverted(images(), encoder, generator)
    torch.testing.assert_close(found.ws, generator.mapping(z).ws)
    assert found.ws.shape == (2, 6, 6) and bool((found.ws[:, 0] != found.ws[:, 1]).any())


def test_unused_style_networks_get_no_gradient():
    encoder = tiny(Encoder4Editing)
    encoder.set_progressive_stage(1)
    encoder(images()).ws.square().sum().backward()
    trained = [all(p.grad is not None for p in style.parameters()) for style in encoder.styles]
    assert trained == [True, True, *[False] * 6] and encoder.latlayer1.weight.grad is None


def test_no_parameter_is_dead(encoder):
    (encoder(images()).ws * torch.randn(2, 8, 6)).sum().backward()
    dead = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


def test_second_derivatives():
    encoder = tiny(Encoder4Editing, depths=(1, 1, 1, 1), widths=(2, 3, 4, 5), reduction=1, w_dim=2).double()
    image = images(1).double().requires_grad_()
    probe = torch.randn(image.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def along_probe(amount):  # a line through image space: as telling, and a thousand times fewer evaluations
        return encoder(image + amount * probe).ws

    amount = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(along_probe, amount, eps=1e-7) and gradgradcheck(along_probe, amount, eps=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("cls", [GradualStyleEncoder, Encoder4Editing, SharedStyleEncoder])
def test_rebuild_and_artifact(cls, tmp_path):
    encoder = tiny(cls)
    artifact.save(tmp_path / "encoder", stage="test", modules={"encoder": encoder})
    again = artifact.load(tmp_path / "encoder").module("encoder")
    assert isinstance(again, GradualStyleEncoder) and type(again) is type(encoder)
    assert torch.equal(again.codes(images()).ws, encoder.codes(images()).ws)


@pytest.mark.parametrize(
    ("side", "channels", "batched"), [(64, 3, True), (32, 1, True), (32, 3, False)], ids=["size", "channels", "batch"]
)
def test_wrong_images_are_refused(encoder, side, channels, batched):
    image = images(1, side, channels)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 32, 32\), got"):
        encoder(image if batched else image[0])


def test_wrong_resolution_is_refused():
    for resolution in (16, 48):
        with pytest.raises(ValueError, match="power of two of at least 32"):
            tiny(GradualStyleEncoder, resolution=resolution)


@torch.no_grad()
def test_label_maps():
    assert tiny(GradualStyleEncoder, channels=19)(images(channels=19)).ws.shape == (2, 8, 6)


class Zero(torch.nn.Module):
    def forward(self, x):
        return x * 0


@torch.no_grad()
def test_trunk():
    trunk = IRTrunk(3, (4, 6, 8), (1, 2, 1), None).eval()
    assert [tuple(m.shape) for m in trunk(images())] == [(2, 4, 16, 16), (2, 6, 8, 8), (2, 8, 4, 4)]
    assert trunk.ends == (1, 3, 4)
    block = Bottleneck(4, 4, 2, None).eval()
    block.res_layer = torch.nn.Sequential(block.res_layer, Zero())
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(block(x), x[:, :, ::2, ::2]), "equal widths: the input itself, strided"


@torch.no_grad()
def test_arcface():
    network = ArcFace(32, 5, (4, 6, 8, 10), (1, 1, 1, 1), 2, affine=False).eval()
    features = network(images())
    assert features.shape == (2, 5)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_crop_face():
    photograph = images(1, 256)
    face = crop_face(photograph, 94)  # half of 188: an exact mean of 2 x 2 pixels
    expected = photograph[:, :, 35:223, 32:220].unflatten(3, (94, 2)).unflatten(2, (94, 2)).mean((3, 5))
    torch.testing.assert_close(face, expected)
    larger = torch.linspace(-1, 1, 512).expand(1, 3, 512, 512)
    torch.testing.assert_close(crop_face(larger, 94)[0, 0, 0], larger[0, 0, 0, 64:440].unflatten(0, (94, 4)).mean(1))
