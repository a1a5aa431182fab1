"""Mixing by resolution, the axes of a generator's layers, and a reference's code."""

import pytest
import torch
from torch.testing import assert_close

from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from models.heads.mixing import ReferenceSearch, code_axes, code_sides, layer_basis
from tests.models.generators.protocol import awaken, seeded


def generator(channels=(6, 6, 4, 4), w_dim=6, **options):
    torch.manual_seed(0)
    made = awaken(StyleGAN2Generator(list(channels), style_dim=w_dim, mapping_layers=2, **options)).eval()
    made.update_mean(256)
    return made.requires_grad_(False)


def test_bands_of_the_paper():
    """n of 18 codes at 1024 px: 3 begins the 16 px block and 9 that of 128 px; 6 and 12 are within theirs."""
    large = StyleGAN2Generator(channels=[2] * 9, style_dim=2, mapping_layers=1)
    sides = code_sides(large)
    assert len(sides) == large.num_ws == 18
    assert [sides[n] for n in (0, 3, 6, 9, 12, 17)] == [4, 16, 32, 128, 256, 1024]
    assert code_sides(generator()) == [4, 8, 8, 16, 16, 32, 32, 32]
    with pytest.raises(UserError, match="StyleSDF is not mixed by layer"):
        code_sides(StyleSDF(6, 8, 2, 1, raw_resolution=8, samples=4))


@pytest.mark.parametrize("first", [1, 3, 5])
def test_codes_go_where_it_is_said(first):
    """What is mixed from a code on changes its block and those after it, and none before."""
    made = generator()
    content, style = made.mapping(made.sample_z(2, seeded(1))), made.mapping(made.sample_z(2, seeded(2)))
    found, sides = content.mix(style, first), code_sides(made)
    taps = tuple(f"block{side}" for side in (4, 8, 16, 32))
    ours, both = (made.synthesis(ws, taps=taps).taps for ws in (content, found))
    for side, tap in zip((4, 8, 16, 32), taps, strict=True):
        changed = float((both[tap] - ours[tap]).abs().max()) > 1e-3
        assert changed == (side >= sides[first])


def test_axes_of_the_layers():
    made = generator()
    basis, weight = layer_basis(made), made.affine_weights().double()
    assert_close(basis @ basis.T, torch.eye(6, dtype=torch.float64), atol=1e-12, rtol=0)
    lengths = (weight @ basis.T).square().sum(0)
    assert bool((lengths.diff() <= 1e-9).all())
    assert_close(lengths, torch.linalg.eigvalsh(weight.T @ weight).flip(0))
    assert bool((basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all())


def test_axes_of_codes():
    made = generator()
    axes, ws = code_axes(made, seeded(1), 500), made.mapping(made.sample_z(500, seeded(1))).ws[:, 0].double()
    cosines = torch.nn.functional.normalize(axes, dim=1)
    assert_close(cosines @ cosines.T, torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)
    assert_close((ws @ cosines.T).std(0), axes.norm(dim=1), atol=1e-9, rtol=1e-9)
    assert bool((axes.norm(dim=1).diff() >= 0).all())


@pytest.mark.parametrize("space", ["w", "w+"])
def test_codes_stay_among_those_of_z(space):
    """Of a mapping from two numbers to six, nearly flat: what is found lies by the plane."""
    made = generator(z_dim=2, normalize=False)
    axes, origin = code_axes(made, seeded(3)), made.mean_latents.ws
    spread = axes.norm(dim=1)
    picture = torch.rand(1, 3, 32, 32, generator=seeded(6)) * 2 - 1
    found = ReferenceSearch(space, steps=50, noise=None).fit(
        made, picture, lambda a, b: (a - b).square().mean((1, 2, 3)), seeded(5)
    )
    moved = (found.ws - origin).double() @ torch.nn.functional.normalize(axes, dim=1).T
    assert float((moved.abs() / spread).max()) < 6 and float(spread[0] / spread[-1]) < 0.1
    assert float(moved[..., 0].abs().max()) < 0.2 * float(moved[..., -2:].norm(dim=-1).max())


@pytest.mark.parametrize("space", ["v", "w", "w+", "z+"])
@pytest.mark.parametrize("noise", [None, 10.0])
def test_a_reference_is_found(space, noise):
    """Of a sample of the generator, from nothing but its picture; draws are the caller's."""
    made = generator()
    truth = made.mapping(made.sample_z(1, seeded(4)), truncation=0.5)
    picture = made.synthesis(truth).image

    def distance(a, b):
        return (a - b).square().mean((1, 2, 3))

    search = ReferenceSearch(space, steps=150, learning_rate=0.1, noise=noise)
    found = search.fit(made, picture, distance, seeded(5))
    assert found.ws.shape == truth.ws.shape
    assert bool((found.ws == found.ws[:, :1]).all()) == (space in ("v", "w"))
    start = distance(made.synthesis(made.mean_latents).image, picture)
    assert float(distance(made.synthesis(found).image, picture)) < (0.9 if space == "z+" else 0.3) * float(start)
    assert torch.equal(search.fit(made, picture, distance, seeded(5)).ws, found.ws)


def test_the_rate_rises_and_falls():
    rates = [ReferenceSearch(steps=100).rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4:74] == [1.0] * 70 and rates[-1] == 0 and rates[90] < 0.5
