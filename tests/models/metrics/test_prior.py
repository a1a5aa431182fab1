"""Scores of a prior against a truth that is the prior itself, and distances by hand."""

import math

import pytest
import torch

from models.generators.manifold import ManifoldGenerator
from models.metrics.consistency import SurfaceRecipe
from models.metrics.distribution import Precomputed, kid
from models.metrics.prior import (
    KnowsSubjects,
    nearest_pictures,
    sample_consistency,
    sample_distances,
    subject_scores,
)
from models.rendering.output import Rendering


class Itself:
    """A world whose subjects look as a generator shows them."""

    def __init__(self, generator):
        self.generator, self.asked = generator, []

    def subject_truth(self, z, camera, size, expression=None):
        self.asked.append((len(camera), None if expression is None else expression.tolist()))
        found = self.generator.synthesis(self.generator.mapping(z), camera, expression=expression, resolution=size)
        return Truth(found)


class Truth:
    def __init__(self, found: Rendering) -> None:
        self.image, self.depth, self.mask, self.normals = found.image, found.depth, found.alpha, found.normals


@pytest.fixture
def generator():
    torch.manual_seed(0)
    generator = ManifoldGenerator(
        4, resolution=16, w_dim=8, channels=[8, 8, 6], start=4, mapping_hidden=8, background_channels=[6, 4],
        ambient=4, samples=16, predictor={"hidden": 4, "grid": 16}, expressions=["smile", "blink"],
    )  # fmt: skip
    for name, parameter in generator.named_parameters():  # what begins at zero
        if "expression" in name or "ambient" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        generator.backbone.out_bias[6::4] = 2.0
    return generator.eval()


def test_a_generator_is_its_own_truth(generator, monkeypatch):
    monkeypatch.setattr("models.metrics.prior.fit_latents", lambda generator, *_: generator.mapping(torch.zeros(1, 4)))
    world = Itself(generator)
    assert isinstance(world, KnowsSubjects) and not isinstance(generator, KnowsSubjects)
    records = subject_scores(generator, world, torch.randn(1, 4), subject=7, seed=3)
    assert {(r.item, r.seed, r.protocol) for r in records} == {("7", 3, "prior")}
    value = {(r.variant, r.metric, r.view): r.value for r in records}
    assert value["known z", "psnr", "yaw+0"] > 100 and value["known z", "psnr_60", "yaw-60"] > 100
    assert value["known z", "expression_smile", "source"] == pytest.approx(1.0, abs=1e-4)
    assert value["known z", "depth_mae", "yaw+12"] == pytest.approx(0.0, abs=1e-5)
    assert value["fitted", "psnr_source", "source"] < 60
    # Nine yaws, the fitted view, and that view with each expression by itself, for either code.
    assert sorted({n for n, _ in world.asked}) == [1, 9]
    assert [e for _, e in world.asked if e] == 2 * [[[1.0, 0.0]], [[0.0, 1.0]]]


def test_sample_distances_of_equal_halves():
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    pictures = torch.cat([rows, rows])
    labels = torch.arange(80.0)[:, None].expand(-1, 25)

    def sample(cameras):
        assert cameras[:, 0].tolist() == list(range(40))
        return (rows + 3).split(16)

    records = sample_distances(Precomputed(8), sample, pictures, labels, 5, torch.device("cpu"))
    assert [(r.variant, r.metric) for r in records] == [
        (v, m) for v in ("samples", "real halves") for m in ("fid", "kid")
    ]
    _, far, _, near = records
    metric = kid(Precomputed(8), subset_size=20)  # of the numbers as they are
    metric.update(rows + 3, real=False)
    metric.update(rows, real=True)
    torch.manual_seed(5)
    assert far.value == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    assert (far.variant, near.variant, far.feature_network) == ("samples", "real halves", "Precomputed")
    assert far.value > 10 * abs(near.value)


def test_so_many_samples_against_all_pictures():
    """Their cameras are the data's; more samples than pictures."""
    real, asked = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), []

    def sample(cameras):
        asked.append(cameras[:, 0].tolist())
        return (torch.randn(len(cameras), 8, generator=torch.Generator().manual_seed(1)) + 1).split(7)

    labels = torch.arange(20.0)[:, None].expand(-1, 25)
    records = sample_distances(Precomputed(8), sample, real, labels, 5, torch.device("cpu"), 50)
    assert [(r.variant, r.metric) for r in records[-2:]] == [("samples", "fid_50"), ("samples", "kid_50")]
    assert len(asked[1]) == 50 and set(asked[1]) <= set(range(20)) and len(set(asked[1])) > 10
    found = torch.cat(sample(labels[:1].expand(50, -1)))
    mean, covariance = found.double().mean(0), torch.cov(found.double().T)
    other, theirs = real.double().mean(0), torch.cov(real.double().T)
    values = torch.linalg.eigvals(covariance @ theirs).real.clamp_min(0).sqrt().sum()  # Heusel et al. 2017, Eq. 6
    expected = (mean - other).square().sum() + covariance.trace() + theirs.trace() - 2 * values
    assert records[-2].value == pytest.approx(float(expected), rel=1e-3)


def test_a_generators_heads_are_consistent(generator):
    """GRAMInverter, Table 1: one surface explains the views of a 3D head."""
    recipe = SurfaceRecipe(cells=8, levels=1, steps=2, rays=16, coarse=4, fine=2)
    records = sample_consistency(generator, 2, seed=3, views=4, recipe=recipe)
    assert [(r.item, r.metric) for r in records] == [(i, m) for i in "01" for m in ("psnr_mv", "ssim_mv")]
    assert all(math.isfinite(r.value) for r in records) and records[0].value != records[2].value


def test_nearest_pictures_by_hand():
    training = [torch.full((2, 3, 2, 2), 0.0), torch.stack([torch.full((3, 2, 2), v) for v in (0.5, 1.0)])]
    asked = {"samples": torch.full((1, 3, 2, 2), 0.6), "held out": torch.full((1, 3, 2, 2), -0.2)}
    found, sheet = nearest_pictures(asked, training)
    assert found["samples"].tolist() == pytest.approx([10 * math.log10(4 / 0.01)], rel=1e-4)
    assert found["held out"].tolist() == pytest.approx([10 * math.log10(4 / 0.04)], rel=1e-4)
    assert sheet.unique().tolist() == pytest.approx([0.5, 0.6, 1.0])  # the sample above its neighbour, and the frame
