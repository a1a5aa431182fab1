"""Useful ranges of directions whose change is known."""

import math

import pytest
import torch

from models.generators.stylegan2 import StyleGAN2Generator
from models.heads.boundaries import Found, Samples
from models.heads.calibration import Calibration, calibrate
from models.latents import Latents


@pytest.mark.parametrize("symmetric", [False, True])
def test_ends_are_where_pictures_have_changed_enough(symmetric):
    """Pictures that change by 2 |shift| to one side and by |shift| to the other, of codes along one axis."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator(style_dim=3, channels=[4, 4], mapping_layers=1)
    codes = torch.randn(500, 1, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = Samples({"ws": codes}, (), torch.zeros(500, 0), 100)
    heads = samples.validation(5, {"ws": generator.num_ws})
    assert torch.equal(heads.ws, codes[400:405].float().expand(-1, generator.num_ws, -1))

    def change(ws: Latents):
        shift = (ws.ws - heads.ws)[:, 0, 1]
        return torch.where(shift > 0, 2 * shift, -shift)

    normal = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    directions, (measured,) = calibrate(
        [Found("up", {"ws": normal})], samples, generator, heads, change, Calibration(1.0, 5, 8, symmetric)
    )
    spread = float(codes[:, 0, 1].std(correction=0))
    low, high = (float(end) * spread for end in directions.limits[0])
    assert high == pytest.approx(0.5, abs=0.02) and measured["high_distance"] == pytest.approx(2 * high, rel=1e-4)
    assert low == pytest.approx(-high if symmetric else -1.0, abs=0.04)
    assert measured["low_distance"] == pytest.approx(-low, rel=1e-4)
    assert float(directions.spread("ws")[0]) == pytest.approx(spread) and not math.isnan(low)
