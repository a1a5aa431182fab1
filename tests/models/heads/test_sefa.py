"""Closed-form directions by an independent decomposition, on every kind of generator that has affines."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from models.errors import UserError
from models.generators.eg3d import EG3DGenerator
from models.generators.gram import GRAMGenerator
from models.generators.manifold import ManifoldGenerator
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from models.generators.volume import TriPlaneVolumeGenerator
from models.heads.boundaries import Samples, compact
from models.heads.calibration import Calibration, calibrate
from models.heads.sefa import SeFa, called_by_change, factorize, factors
from models.latents import Latents
from tests.models.generators import test_eg3d, test_gram, test_manifold, test_volume
from tests.models.generators.protocol import awaken, seeded


def stylegan2():
    torch.manual_seed(0)
    return awaken(StyleGAN2Generator(channels=[6, 6, 4], style_dim=7, mapping_layers=2)).eval()


def stylesdf():
    torch.manual_seed(0)
    decoder = {"channels": (6, 4), "w_dim": 5, "mapping_layers": 1}
    return awaken(StyleSDF(6, 8, 2, 1, raw_resolution=8, samples=4, decoder=decoder)).eval()


GENERATORS = {
    "stylegan2": stylegan2,
    "stylesdf": stylesdf,
    "eg3d": lambda: awaken(EG3DGenerator(**test_eg3d.TINY)).eval(),
    "volume": lambda: awaken(TriPlaneVolumeGenerator(**test_volume.TINY, fine=0)).eval(),
    "manifold": lambda: awaken(ManifoldGenerator(**test_manifold.TINY)).eval(),
}


def by_svd(weights):
    """Right singular vectors of the matrix of unit rows, largest first, by NumPy in float64."""
    a = weights.detach().numpy().astype(np.float64)
    a = a / np.linalg.norm(a, axis=1, keepdims=True)
    _, values, rows = np.linalg.svd(a, full_matrices=True)
    rows = np.stack([row * np.sign(row[np.abs(row).argmax()]) for row in rows])
    return np.pad(values**2, (0, len(rows) - len(values))), rows


class TestFactorize:
    @pytest.mark.parametrize("shape", [(40, 9), (5, 9)])  # of fewer rows than numbers some vectors are changed by none
    def test_it_is_an_svd_of_unit_rows(self, shape):
        weights = torch.randn(*shape, generator=seeded()) * torch.rand(shape[0], 1, generator=seeded(1)).exp()
        values, vectors = factorize(weights)
        wanted, rows = by_svd(weights)
        assert values.dtype == vectors.dtype == torch.float64
        np.testing.assert_allclose(values.numpy(), wanted, atol=1e-10)
        known = min(shape)
        np.testing.assert_allclose(vectors.numpy()[:known], rows[:known], atol=1e-8)

    def test_order_and_sign(self):
        values, vectors = factorize(torch.randn(30, 8, generator=seeded(2)))
        assert bool((values.diff() <= 0).all())
        assert bool((vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all())
        assert_close(vectors @ vectors.T, torch.eye(8, dtype=torch.float64), atol=1e-12, rtol=0)

    def test_a_known_matrix(self):
        """Rows along axes: A^T A counts them; how long they are does not matter."""
        weights = torch.tensor(
            [[0, -5.0, 0], [0, 0.1, 0], [0, 2.0, 0], [3.0, 0, 0], [-7.0, 0, 0], [0, 0, 1.0], [0, 0, 0]]
        )
        values, vectors = factorize(weights)
        assert values.tolist() == pytest.approx([3, 2, 1])
        assert_close(vectors, torch.eye(3, dtype=torch.float64)[[1, 0, 2]])


class TestDirections:
    @pytest.mark.parametrize("kind", GENERATORS)
    def test_of_every_kind_of_generator(self, kind):
        """The longest change of the styles that any unit vector makes, in the codes that they are read from alone."""
        generator = GENERATORS[kind]()
        found = SeFa(count=3, layers=[0, 1]).find(None, 0, generator)
        weights = generator.affine_weights([0, 1])
        values, rows = by_svd(weights)
        assert [f.name for f in found] == ["sefa_1", "sefa_2", "sefa_3"]
        group, mean = next(iter(generator.mean_latents.groups.items()))
        for k, direction in enumerate(found):
            assert direction.scores["eigenvalue"] == pytest.approx(values[k])
            assert direction.scores["share"] == pytest.approx(values[k] / values.sum())
            assert direction.normals.keys() == {group}
            normal = direction.normals[group]
            assert normal.shape == mean.shape[1:] and float(normal.norm()) == pytest.approx(1)
            assert not normal[2:].any()
            for row in normal[:2]:
                np.testing.assert_allclose(row * 2**0.5, rows[k, : mean.shape[2]], atol=1e-7)

    def test_known_affines(self):
        """A StyleGAN2 whose layer 1 reads one number of its code alone: that is the first direction, of code 1."""
        generator = stylegan2()
        with torch.no_grad():
            affine = generator.backbone.blocks[1].layers[0].affine
            affine.weight.zero_()
            affine.weight[:, 4] = -torch.arange(1.0, len(affine.weight) + 1)
        (first,) = SeFa(count=1, layers=[1]).find(None, 0, generator)
        wanted = torch.zeros(generator.num_ws, 7, dtype=torch.float64)
        wanted[1, 4] = 1
        assert_close(first.normals["ws"], wanted)
        assert first.scores == {"eigenvalue": pytest.approx(len(affine.weight)), "share": pytest.approx(1)}

    def test_styles_change_as_the_eigenvalue_says(self):
        """|A n|^2, by the affines themselves."""
        generator = stylegan2()
        found = SeFa(count=7).find(None, 0, generator)
        weights = generator.affine_weights().double()
        unit = weights / weights.norm(dim=1, keepdim=True)
        for direction in found:
            normal = direction.normals["ws"]
            n = normal[0] / normal[0].norm()
            assert float((unit @ n).square().sum()) == pytest.approx(direction.scores["eigenvalue"])

    def test_groups_of_codes_share_one_order(self):
        """Each direction is of one group: layers of StyleSDF read one code each."""
        generator = stylesdf()
        found = SeFa(count=13).find(None, 0, generator)
        assert [len(f.normals) for f in found] == [1] * 13
        assert sorted(next(iter(f.normals)) for f in found) == ["decoder"] * 5 + ["renderer"] * 8
        values = [f.scores["eigenvalue"] for f in found]
        assert values == sorted(values, reverse=True)
        assert sum(f.scores["share"] for f in found) == pytest.approx(1)
        parts = {group: (weights, rows) for group, weights, rows in factors(generator, None)}
        assert parts["renderer"][1] == [0, 1, 2] and parts["decoder"][1] == [
            0,
            1,
            2,
        ]  # its last code has no affine here
        assert parts["renderer"][0].shape[1] == 8 and parts["decoder"][0].shape[1] == 5
        only = SeFa(count=1, layers=[4]).find(None, 0, generator)[0]
        assert only.normals["decoder"].any(1).nonzero()[:, 0].tolist() == [1]

    def test_codes_that_no_affine_reads_stay(self):
        generator = GENERATORS["manifold"]()
        normal = SeFa(count=1).find(None, 0, generator)[0].normals["ws"]
        layers = len(generator.backbone.affines())
        assert bool(normal[:layers].any(1).all()) and not normal[layers:].any() and layers < generator.num_ws


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"layers": [0, 9]}, "method.layers has 9: the affines of StyleGAN2Generator are of layers 0 to 4$"),
            ({"layers": [-1]}, "method.layers has -1"),
            ({"count": 8}, "method.count is 8: codes of 7 numbers have 7 directions in all, no more"),
        ],
    )
    def test_of_a_generator(self, options, words):
        with pytest.raises(UserError, match=words) as caught:
            SeFa(**options).check((), stylegan2())
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"layers": []}, r"layers is \[\]"),
            ({"layers": [1, 1]}, "name each layer once"),
            ({"count": 0}, "count is 0"),
        ],
    )
    def test_of_settings(self, options, words):
        with pytest.raises(UserError, match=words):
            SeFa(**options)

    def test_no_affines(self):
        generator = GRAMGenerator(**test_gram.TINY)
        with pytest.raises(UserError, match="GRAMGenerator has no style affines"):
            SeFa().check((), generator)

    def test_affines_that_do_nothing(self):
        generator = stylegan2()
        with torch.no_grad():
            generator.backbone.blocks[0].layers[0].affine.weight.zero_()
        with pytest.raises(UserError, match="are all 0 in these layers"):
            SeFa(count=1, layers=[0]).check((), generator)
        SeFa(count=1, layers=[0, 1]).check((), generator)


def test_names_by_change():
    changes = torch.tensor([[0.1, -2.0], [0.9, 0.2], [1.5, float("nan")], [0.1, 0.2], [-0.7, 0.1]])
    names = [f"sefa_{k}" for k in range(1, 6)]
    found = called_by_change(names, changes, ["hair", "yaw"], 0.5, taken=["yaw"])
    assert found == [("yaw_2", True), ("hair", False), ("hair_2", False), ("sefa_4", False), ("hair_3", True)]
    assert called_by_change(names[:1], torch.zeros(1, 0), [], 0.0) == [("sefa_1", False)]
    assert SeFa(least_change=5.0).called(names, changes, ["hair", "yaw"], ()) == [(name, False) for name in names]


def test_latents_are_moved_alike_in_the_layers():
    """w' = w + a n in the chosen layers, n of the eigenvectors, whatever the layer count."""
    generator = stylegan2()
    ws = generator.mapping(generator.sample_z(60, seeded(3)))
    samples = Samples.collect([compact(ws)], [], torch.zeros(60, 0), 20)
    found = SeFa(count=2, layers=[1, 3]).find(samples, 0, generator)
    heads = samples.validation(4, {"ws": generator.num_ws})
    before = generator.synthesis(heads).image

    def change(moved: Latents):
        return (generator.synthesis(moved).image - before).square().mean((1, 2, 3)).sqrt()

    calibration = Calibration(distance=0.02, codes=4, steps=6, symmetric=True)
    directions, measured = calibrate(found, samples, generator, heads, change, calibration)
    assert directions.limits[:, 0].tolist() == (-directions.limits[:, 1]).tolist()
    assert all(values.keys() == {"low_distance", "high_distance"} for values in measured)
    moved = directions.apply(heads, {"sefa_1": 1.0}).ws - heads.ws
    _, rows = by_svd(generator.affine_weights([1, 3]))
    place = ws.ws[:, 0].double() @ torch.from_numpy(rows[0])
    length = float(directions.limits[0, 1]) * float(place.std(correction=0))
    wanted = torch.zeros(generator.num_ws, 7)
    wanted[[1, 3]] = length * torch.from_numpy(rows[0]).float()
    assert_close(moved[0], wanted, atol=1e-5, rtol=1e-4)
