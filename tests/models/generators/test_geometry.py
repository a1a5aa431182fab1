"""The shape of every kind of field: values and gradients against float64 differences, normals that point outwards."""

import pytest
import torch
from torch.testing import assert_close

from models.generators.eg3d import EG3DGenerator
from models.generators.geometry import STEPS, FieldGeometry, field_geometry, field_values, form_of, step_length
from models.generators.manifold import ManifoldGenerator
from models.generators.stylesdf import StyleSDF
from models.generators.volume import TriPlaneVolumeGenerator
from tests.models.generators.protocol import awaken, seeded
from tests.models.generators.test_eg3d import TINY as EG3D
from tests.models.generators.test_stylesdf import RADIUS, ball, small
from tests.stages import tiny

PAINTED = {"z_dim": 6, "w_dim": 16, "resolution": 16, "channels": [12, 8], "start": 8, "mapping_hidden": 8}


def manifold():
    return ManifoldGenerator(**tiny.OPTIONS)


def planes_on_manifolds():
    return ManifoldGenerator(**{**tiny.OPTIONS, "field": "triplane", "expressions": []})


def volume():
    return TriPlaneVolumeGenerator(**PAINTED, field={"features": 6, "hidden": 8})


MAKERS = {
    "sdf": (small, "sdf"),
    "density": (lambda: small(signed_distance=False), "density"),
    "volume": (volume, "density"),
    "eg3d": (lambda: EG3DGenerator(**EG3D), "density"),
    "textures": (manifold, "occupancy"),
    "triplane": (planes_on_manifolds, "occupancy"),
}


@pytest.fixture(params=MAKERS)
def made(request):
    make, form = MAKERS[request.param]
    torch.manual_seed(0)
    generator = awaken(make()).eval()
    # Textures are looked up in fp32 only.
    return generator if request.param == "textures" else generator.double(), form


def asked(generator, count=20):
    """Two codes, and points of each in the scene."""
    dtype = next(generator.parameters()).dtype
    ws = generator.mapping(generator.sample_z(2, seeded()).to(dtype))
    rig = generator.rig
    spread = (rig.far - rig.near) * 0.3
    points = (torch.rand(2, count, 3, generator=seeded(1), dtype=torch.float64) - 0.5) * spread
    return ws, (points + torch.tensor(rig.pivot, dtype=torch.float64)).to(dtype)


def reference(generator, ws, points, form):
    """The value from the protocol's own functions, one point at a time."""
    rows = []
    for row in range(len(ws)):
        for point in points[row]:
            sample = generator.decode(generator.features(ws[row], point[None, None]))
            step = (generator.rig.far - generator.rig.near) / STEPS
            value = {
                "sdf": sample.sdf,
                "occupancy": sample.occupancy,
                "density": None if sample.density is None else 1 - torch.exp(-sample.density * step),
            }[form]
            rows.append(value.reshape(()))
    return torch.stack(rows).reshape(*points.shape[:2], 1)


@torch.no_grad()
def test_values_and_gradients(made):
    generator, form = made
    assert form_of(generator) == form
    ws, points = asked(generator)
    found = field_geometry(generator, ws, points)
    assert found.form == form and found.value.shape == (2, 20, 1) and found.gradient.shape == (2, 20, 3)
    assert not found.value.requires_grad and not found.gradient.requires_grad
    tolerance = {"atol": 1e-6, "rtol": 1e-5}
    assert_close(found.value.double(), reference(generator, ws, points, form).double(), **tolerance)
    assert_close(field_values(generator, ws, points).double(), found.value.double(), **tolerance)
    half = 1e-6 if form == "sdf" else step_length(generator) / 2
    for axis in range(3):
        offset = torch.zeros(3, dtype=points.dtype)
        offset[axis] = half
        ahead, behind = (reference(generator, ws, points + side * offset, form) for side in (1, -1))
        slope = ((ahead - behind) / (2 * half)).double()[..., 0]
        assert_close(found.gradient[..., axis].double(), slope, atol=1e-4 * float(slope.abs().max() + 1), rtol=1e-4)
    if form != "sdf":
        assert (found.value >= 0).all() and (found.value <= 1).all()


def test_both_are_differentiable(made):
    """With respect to the codes, by the value and by the normals, as a loss asks them."""
    generator, form = made
    ws, points = asked(generator, 6)
    ws = ws.map(lambda t: t.detach().clone().requires_grad_())
    for part in ("value", "normals", "slope"):
        found = getattr(field_geometry(generator, ws, points, form=form, create_graph=True), part)
        name, code = next(iter(ws.groups.items()))
        (slope,) = torch.autograd.grad(found.square().sum() if part != "normals" else found[..., 0].sum(), code)
        assert slope.isfinite().all() and slope.abs().sum() > 0, (name, part)


@torch.no_grad()
def test_parts_change_nothing(made, monkeypatch):
    generator, _ = made
    ws, points = asked(generator)
    whole = field_geometry(generator, ws, points)
    monkeypatch.setattr("models.generators.geometry.AT_ONCE", 14)
    parts, values = field_geometry(generator, ws, points), field_values(generator, ws, points)
    assert_close(values, whole.value, atol=1e-6, rtol=1e-5)
    assert_close(parts.value, whole.value, atol=1e-6, rtol=1e-5)
    assert_close(parts.gradient, whole.gradient, atol=1e-5, rtol=1e-4)


def test_normals_of_a_ball_point_outwards():
    """Of distances and of the opacity that the same distances have."""
    generator = small()
    generator.load_state_dict(ball())
    ws = generator.mapping(generator.sample_z(2, seeded())).detach()
    directions = torch.nn.functional.normalize(torch.randn(2, 50, 3, generator=seeded(1)), dim=-1)
    found = field_geometry(generator, ws, RADIUS * directions)
    assert found.value.abs().max() < 0.02 and ((found.normals * directions).sum(-1) > 0.85).float().mean() > 0.9
    assert_close(found.normals.norm(dim=-1), torch.ones(2, 50))
    assert_close(found.slope[..., 0], found.gradient.norm(dim=-1))
    opacity = FieldGeometry(1 - found.value, -found.gradient, "occupancy")
    assert_close(opacity.normals, found.normals)


def test_half_precision_is_not_used():
    generator = small()
    generator.load_state_dict(ball())
    ws = generator.mapping(generator.sample_z(1, seeded())).detach()
    points = torch.rand(1, 9, 3, generator=seeded(1)) * 0.1
    expected = field_geometry(generator, ws, points)
    with torch.autocast("cpu", torch.bfloat16):
        found = field_geometry(generator, ws, points)
    assert found.value.dtype == torch.float32
    assert_close(found.value, expected.value)
    assert_close(found.gradient, expected.gradient)


def test_what_has_no_shape_is_said(monkeypatch):
    generator = small()
    assert isinstance(generator, StyleSDF)
    monkeypatch.setattr("models.generators.geometry.StyleSDF", int)
    sample = generator.decode(generator.features(generator.mean_latents, torch.zeros(1, 1, 3)))
    monkeypatch.setattr(generator, "decode", lambda features: type(sample)(sample.colour))
    with pytest.raises(ValueError, match="neither a signed distance"):
        form_of(generator)
