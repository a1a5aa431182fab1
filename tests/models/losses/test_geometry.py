"""L_geo against sums over points in float64."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from models.errors import UserError
from models.generators.geometry import field_geometry
from models.latents import Latents
from models.losses.geometry import GeometryLoss, absolute, eikonal_loss, normal_loss, point_mean, surface_loss
from tests.models.generators.protocol import awaken, seeded
from tests.models.generators.test_geometry import manifold
from tests.models.generators.test_stylesdf import ball, small


def drawn(*shape):
    return torch.randn(*shape, generator=seeded(shape[-1]), dtype=torch.float64)


def loop(values, mask, summed=False):
    """The mean over counted points, one after the other, of the mean or the sum over axes."""
    rows = []
    for row, counts in zip(values.tolist(), mask[..., 0].tolist(), strict=True):
        kept = [
            sum(point) / (1 if summed else len(point)) for point, counted in zip(row, counts, strict=True) if counted
        ]
        rows.append(sum(kept) / len(kept) if kept else 0.0)
    return torch.tensor(rows, dtype=torch.float64)


def huber(x, smooth):
    return (0.5 * x * x if abs(x) < 1 else abs(x) - 0.5) if smooth else abs(x)


@pytest.mark.parametrize("smooth", [False, True])
def test_terms(smooth):
    mask = (drawn(3, 7, 1) > 0).double()
    mask[2] = 0  # a picture that shows nothing
    for loss, size in ((surface_loss, 1), (normal_loss, 3)):
        a, b = 2 * drawn(3, 7, size), drawn(3, 7, size).flip(1)
        each = torch.tensor([[[huber(x, smooth) for x in p] for p in r] for r in (a - b).tolist()], dtype=torch.float64)
        assert_close(loss(a, b, mask, smooth), loop(each, mask, loss is normal_loss and not smooth))
    slope = drawn(3, 7, 1).abs()
    assert_close(eikonal_loss(slope, mask), loop((slope - 1) ** 2, mask))
    assert point_mean(slope, mask)[2] == 0


def test_normals_are_compared_by_their_l1_norm():
    """Eq. 4: of a normal turned by 90 degrees 2, not a third of it."""
    found, true = torch.eye(3)[None, :1], torch.eye(3)[None, 1:2]
    mask = torch.ones(1, 1, 1)
    assert normal_loss(found, true, mask).tolist() == [2.0]
    assert_close(normal_loss(found, true, mask, smooth=True)[0], torch.nn.functional.smooth_l1_loss(found, true))


def test_smooth_l1_is_pytorchs():
    x = 3 * drawn(50, 1)
    assert_close(absolute(x, True), torch.nn.functional.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"))


def batch_of(generator, ws, views=2, count=9):
    """Points around the middle, of which some do not count, with what ``ws`` have there."""
    shape = len(ws), views, count
    spread = (generator.rig.far - generator.rig.near) / 4
    batch = {"image": torch.zeros(len(ws), views, 3, 4, 4, dtype=next(generator.parameters()).dtype)}
    for name in ("surface", "space"):
        points = torch.randn(*shape, 3, generator=seeded(len(name))) * spread
        batch[name] = points.to(batch["image"].dtype)
        batch[f"{name}_mask"] = (torch.rand(*shape, 1, generator=seeded(5)) > 0.3).to(points.dtype)
        found = field_geometry(generator, ws.repeat_interleave(views), batch[name].flatten(0, 1))
        batch[f"{name}_value"] = found.value.unflatten(0, (-1, views))
        if name == "surface":
            batch["surface_normals"] = found.normals.unflatten(0, (-1, views))
    return batch


def distances():
    generator = small()
    generator.load_state_dict(ball())
    return generator.double()


def opacities():
    torch.manual_seed(0)
    return awaken(manifold()).eval()


def codes(generator, count, seed=0):
    z = generator.sample_z(count, seeded(seed)).to(next(generator.parameters()).dtype)
    return generator.mapping(z).detach()


@pytest.mark.parametrize("make", [distances, opacities])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("target", ["zero", "sample"])
def test_the_whole(make, smooth, target):
    generator = make()
    batch, ws = batch_of(generator, codes(generator, 2)), codes(generator, 4, 1)
    loss = GeometryLoss(1.5, 2.0, 0.25, 0.125, smooth, target)
    found = loss(generator, ws, batch)
    on, around = (field_geometry(generator, ws, batch[name].flatten(0, 1)) for name in ("surface", "space"))
    flat = {name: value.flatten(0, 1) for name, value in batch.items()}
    is_distance = on.form == "sdf"
    wanted = 0 if is_distance and target == "zero" else flat["surface_value"]
    pairs = {
        "surface": (on.value - wanted, flat["surface_mask"]),
        "normal": (on.normals - flat["surface_normals"], flat["surface_mask"]),
        "space": (around.value - flat["space_value"], flat["space_mask"]),
    }
    expected = {
        name: loop(
            torch.tensor([[[huber(x, smooth) for x in p] for p in r] for r in difference.tolist()]),
            mask,
            summed=name == "normal" and not smooth,
        )
        for name, (difference, mask) in pairs.items()
    }
    if is_distance:
        lengths = around.gradient.norm(dim=-1, keepdim=True)
        expected["eikonal"] = loop((lengths - 1) ** 2, flat["space_mask"])
    expected["geometry"] = sum(getattr(loss, name) * value for name, value in expected.items())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name].double(), value.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [distances, opacities])
def test_true_codes_cost_nothing(make):
    generator = make()
    ws = codes(generator, 2)
    found = GeometryLoss(target="sample", eikonal=0)(generator, ws.repeat_interleave(2), batch_of(generator, ws))
    assert_close(found["geometry"], torch.zeros_like(found["geometry"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [distances, opacities])
def test_gradients_reach_the_codes(make):
    """By each term alone; one of weight 0 is not there."""
    generator = make()
    batch, ws = batch_of(generator, codes(generator, 2)), codes(generator, 4, 1)
    none = GeometryLoss(0, 0, 0, 0)
    assert none(generator, ws, batch).keys() == {"geometry"}
    for name in ("surface", "normal", "space", "eikonal"):
        if name == "eikonal" and make is opacities:
            continue
        ws = ws.map(lambda t: t.detach().clone().requires_grad_())
        found = dataclasses.replace(none, **{name: 1.0})(generator, ws, batch)
        assert found.keys() == {name, "geometry"}
        (slope,) = torch.autograd.grad(found["geometry"].sum(), next(iter(ws.groups.values())))
        assert slope.isfinite().all() and (slope.flatten(1).abs().sum(1) > 0).all(), name


@pytest.mark.parametrize("make", [distances, opacities])
def test_without_gradients_no_graph_is_kept(make, monkeypatch):
    """The same numbers, of a field that is not differentiated twice."""
    generator = make()
    batch, ws = batch_of(generator, codes(generator, 2)), codes(generator, 4, 1)
    kept = []

    def geometry(*arguments, **options):
        found = field_geometry(*arguments, **options)
        kept.append(found.gradient.requires_grad or found.value.requires_grad)
        return found

    monkeypatch.setattr("models.losses.geometry.field_geometry", geometry)
    own = ws.map(lambda t: t.detach().clone().requires_grad_())
    expected = GeometryLoss()(generator, own, batch)
    count = len(kept)
    assert count == (2 if make is distances else 1) and all(kept)
    with torch.no_grad():
        found = GeometryLoss()(generator, own, batch)
    assert len(kept) == 2 * count and not any(kept[count:])
    for name, value in expected.items():
        assert_close(found[name], value.detach())


def test_half_precision_is_kept_out():
    generator = small()
    generator.load_state_dict(ball())
    batch, ws = batch_of(generator, codes(generator, 2)), codes(generator, 4, 1)
    expected = GeometryLoss()(generator, ws, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = GeometryLoss()(generator, Latents(dict(ws.groups)), batch)
    for name, value in expected.items():
        assert_close(found[name], value)


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match=r"geometry\.normal is -1: it must be"):
        GeometryLoss(normal=-1)
    with pytest.raises(UserError, match=r"geometry\.target is 'one': take one of zero, sample"):
        GeometryLoss(target="one")
