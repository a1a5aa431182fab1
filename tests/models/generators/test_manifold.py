"""The radiance-manifold generator."""

import pytest
import torch

from models.generators.manifold import ManifoldGenerator
from tests.models.generators.protocol import GeneratorContract

TINY = {
    "z_dim": 8, "w_dim": 16, "resolution": 16, "channels": [16, 12, 8], "start": 4, "mapping_hidden": 16,
    "background_channels": [8, 8], "ambient": 5, "samples": 48, "predictor": {"hidden": 8, "grid": 40},
}  # fmt: skip


class TestTextures(GeneratorContract):
    excused = ("predictor.",)  # searched on a baked grid
    field_tolerance = 0.2  # the layer index of a crossing is exact to one linear step of the search

    def make(self):
        return ManifoldGenerator(**TINY, expressions=["smile", "blink"])

    def make_still(self):
        return ManifoldGenerator(**TINY)


class TestTriPlane(GeneratorContract):
    """The paper's own field: tri-plane features decoded at the crossings."""

    excused = ("predictor.",)
    field_tolerance = 0.2

    def make(self):
        return ManifoldGenerator(**TINY, field="triplane", triplane={"features": 8, "hidden": 8}, expressions=["smile"])


class TestSearchedPredictor(GeneratorContract):
    """Crossings are found on the predictor itself, which then learns from rendering."""

    field_tolerance = 0.2

    def make(self):
        return ManifoldGenerator(**TINY, bake_predictor=False, background="none")


def test_coarse_crossings_are_close_to_exact_ones():
    """Crossings found on half the image side and upsampled (GRAMInverter, A.3)."""
    torch.manual_seed(0)
    exact = ManifoldGenerator(**TINY | {"resolution": 64}, background="none").eval()
    coarse = ManifoldGenerator(**TINY | {"resolution": 64}, background="none", intersection_stride=2).eval()
    coarse.load_state_dict(exact.state_dict())
    camera = exact.rig.camera(0.4)
    with torch.no_grad():
        found, upsampled = exact.crossings(camera, 64), coarse.crossings(camera, 64)
        (depth, valid), (near, kept) = (
            (h.scatter(h.depth, 64 * 64), h.scatter(h.valid.float(), 64 * 64) > 0) for h in (found, upsampled)
        )
    assert (kept & ~valid).sum() <= 0.01 * valid.sum()  # nothing is invented beyond the silhouette
    assert kept.sum() > 0.8 * valid.sum()
    # The surfaces are about 1 across and .1 apart.
    assert (near - depth).abs()[kept & valid].mean() < 0.02


def test_levels_must_decrease():
    with pytest.raises(ValueError, match="levels must decrease"):
        ManifoldGenerator(**TINY, levels=[0.0, 0.1])
