"""The renderer of depth maps against rays cast in float64, a sphere, kornia, and what is known by hand."""

import math

import numpy as np
import pytest
import torch
from kornia.geometry.depth import depth_to_normals
from torch.testing import assert_close

from models.errors import UserError
from models.rendering.relief import Light, Relief, mirrored, rotation_matrix, shading, sphere_cap
from tests.models.generators.protocol import seeded

RELIEF = Relief()
FLAT = Light(torch.ones(1), torch.zeros(1), torch.zeros(1, 2))  # the albedo as it is
VIEWS = {
    "front": (0.0, 0, 0, 0, 0, 0),
    "aside": (0.0, 0.5, 0, 0, 0, 0),
    "down": (0.4, -0.1, 0, 0, 0, 0),
    "rolled and moved": (0.1, -0.3, 0.6, 0.02, -0.03, 0.01),
    "profile": (0.05, -1.0, 0.02, 0.01, 0.0, 0.0),
}


def drawn(*shape, low=0.0, high=1.0, dtype=torch.float64):
    return low + (high - low) * torch.rand(*shape, generator=seeded(sum(shape)), dtype=dtype)


def bumps(count=1, size=16, dtype=torch.float64):
    """Depth maps with a nose in the middle, each of another height, on rough ground."""
    at = torch.linspace(-1, 1, size, dtype=dtype)
    nose = torch.exp(-8 * (at[:, None].square() + at.square()))
    height = torch.linspace(0.08, 0.05, count, dtype=dtype).view(-1, 1, 1, 1)
    return 1.03 - height * nose + drawn(count, 1, size, size, high=0.01, dtype=dtype)


def view_of(name, dtype=torch.float64):
    return torch.tensor([VIEWS[name]], dtype=dtype)


def lights(count=1, dtype=torch.float64):
    return Light.of(drawn(count, 4, low=-0.6, high=0.6, dtype=dtype))


def cast(depth, picture, view):
    """Depth, mask and colours that a camera sees that moves instead of the surface: every ray meets every triangle."""
    size = depth.shape[-1]
    half = math.tan(math.radians(5))
    (ax, ay, az), shift = view[:3], np.array(view[3:])
    turn_x = np.array([[1, 0, 0], [0, math.cos(ax), -math.sin(ax)], [0, math.sin(ax), math.cos(ax)]])
    turn_y = np.array([[math.cos(ay), 0, math.sin(ay)], [0, 1, 0], [-math.sin(ay), 0, math.cos(ay)]])
    turn_z = np.array([[math.cos(az), -math.sin(az), 0], [math.sin(az), math.cos(az), 0], [0, 0, 1]])
    back = (turn_z @ turn_y @ turn_x).T
    centre = np.array([0, 0, 1.0])
    origin = back @ (-shift - centre) + centre

    def ray(i, j):
        return np.array([(2 * j / (size - 1) - 1) * half, (2 * i / (size - 1) - 1) * half, 1])

    points = [[depth[i, j] * ray(i, j) for j in range(size)] for i in range(size)]
    corners = []
    for i in range(size - 1):
        for j in range(size - 1):
            corners.append((points[i][j], points[i + 1][j], points[i][j + 1]))
            corners.append((points[i][j + 1], points[i + 1][j], points[i + 1][j + 1]))
    a, b, c = np.array(corners).transpose(1, 0, 2)
    shown, mask, colours = np.full((size, size), 1.2), np.zeros((size, size)), np.zeros((3, size, size))
    for i in range(size):
        for j in range(size):
            direction = back @ ray(i, j)  # of which one unit is one of depth in the view
            across = np.cross(direction, c - a)
            scale = (across * (b - a)).sum(1)
            scale[scale == 0] = np.nan
            u = ((origin - a) * across).sum(1) / scale  # Moeller and Trumbore
            other = np.cross(origin - a, b - a)
            v = (other @ direction) / scale
            t = (other * (c - a)).sum(1) / scale
            hit = (u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9)
            if not hit.any():
                continue
            shown[i, j], mask[i, j] = t[hit].min(), 1
            x, y, z = origin + shown[i, j] * direction
            column, row = ((w / z / half + 1) / 2 * (size - 1) for w in (x, y))
            left, top = (min(max(int(w), 0), size - 2) for w in (column, row))
            e, f = column - left, row - top
            colours[:, i, j] = (
                (1 - e) * (1 - f) * picture[:, top, left]
                + e * (1 - f) * picture[:, top, left + 1]
                + (1 - e) * f * picture[:, top + 1, left]
                + e * f * picture[:, top + 1, left + 1]
            )
    return shown, mask, colours


class TestAgainstRays:
    @pytest.mark.parametrize("name", VIEWS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_what_is_seen(self, name, dtype):
        depth, albedo, light = bumps(dtype=dtype), drawn(1, 3, 16, 16, low=-0.9, high=0.9, dtype=dtype), lights()
        light = light.to(dtype)
        picture = RELIEF.shaded(depth, albedo, light)
        wanted = cast(depth[0, 0].double().numpy(), picture[0].double().numpy(), VIEWS[name])
        found = RELIEF(depth, albedo, view_of(name, dtype), light)
        for value, true in zip((found.depth, found.alpha, found.image), wanted, strict=True):
            assert value.dtype == dtype
            rounding = 1e-3 if value is found.image else 2e-5  # a grazing ray's place moves far with its depth
            tolerance = 1e-9 if dtype == torch.float64 else rounding
            limit = np.clip(true, -1, 1) if value is found.image else true
            np.testing.assert_allclose(value[0].squeeze(0).numpy(), limit, atol=tolerance, rtol=0)

    def test_some_is_seen_and_some_is_not(self):
        """What the tests above compare is no empty picture, and no full one."""
        shares = {name: float(RELIEF.turned(bumps(), view_of(name))[1].mean()) for name in VIEWS}
        assert shares["front"] == 1 and all(0.2 < share < 0.95 for name, share in shares.items() if name != "front")


class TestIdentity:
    @pytest.mark.parametrize("size", [5, 16, 64, 128])
    def test_an_unmoved_albedo_comes_back(self, size):
        depth = RELIEF.depth(drawn(1, 1, size, size, low=-3, high=3, dtype=torch.float32))
        albedo = drawn(1, 3, size, size, low=-1, high=1, dtype=torch.float32)
        found = RELIEF(depth, albedo, torch.zeros(1, 6), FLAT)
        assert found.alpha.min() == 1
        assert_close(found.depth, depth, atol=size * 5e-8, rtol=0)
        assert_close(found.image, albedo, atol=size * 1e-6, rtol=0)  # places have seven digits

    def test_in_float64_to_the_last_digits(self):
        depth, albedo = bumps(), drawn(1, 3, 16, 16, low=-1, high=1)
        found = RELIEF(depth, albedo, torch.zeros(1, 6, dtype=torch.float64), FLAT.to(torch.float64))
        assert_close(found.image, albedo, atol=1e-12, rtol=0)
        assert_close(found.depth, depth, atol=1e-13, rtol=0)


class TestSphere:
    """A ball around the centre of rotation looks the same however it is turned."""

    RADIUS, SIZE = 0.06, 96

    def ball(self):
        points = RELIEF.points(torch.ones(1, 1, self.SIZE, self.SIZE, dtype=torch.float64))[0]
        square = points.square().sum(0)
        inside = 1 - square * (1 - self.RADIUS**2)
        depth = torch.where(inside > 0, (1 - inside.clamp_min(0).sqrt()) / square, 1.0)
        return depth, (RELIEF.points(depth[None, None])[0] - torch.tensor([0, 0, 1.0]).view(3, 1, 1)) / self.RADIUS

    def middle(self, share):
        points = RELIEF.points(torch.ones(1, 1, self.SIZE, self.SIZE, dtype=torch.float64))[0]
        return points[:2].norm(dim=0) < share * self.RADIUS

    @pytest.mark.parametrize("view", [(0.0, 0.35, 0.0), (-0.3, 0.0, 0.5), (0.2, -0.2, -1.0)])
    def test_depth_does_not_turn(self, view):
        depth, _ = self.ball()
        found, mask = RELIEF.turned(depth[None, None], torch.tensor([(*view, 0, 0, 0)], dtype=torch.float64))
        middle = self.middle(0.7)
        assert mask[0, 0][middle].all()
        error = (found[0, 0] - depth)[middle].abs()
        assert error.max() < 7e-5 and error.mean() < 2e-5  # triangles are flat; a pixel is 2e-3 wide

    def test_it_moves_as_a_whole(self):
        depth, _ = self.ball()
        step = 2 * RELIEF.reach / (self.SIZE - 1)  # one pixel at depth 1
        view = torch.tensor([(0.1, 0.2, 0.3, 4 * step, -3 * step, 0)], dtype=torch.float64)
        found, _ = RELIEF.turned(depth[None, None], view)
        found = found[0, 0].roll((3, -4), (0, 1))
        assert (found - depth)[self.middle(0.5)].abs().max() < 3e-4  # seen a little more from the side

    def test_normals(self):
        depth, outwards = self.ball()
        found = RELIEF.normals(depth[None, None])[0]
        angle = (found * outwards).sum(0).clamp(-1, 1).acos().rad2deg()
        assert angle[self.middle(0.8)].max() < 0.3 and angle[self.middle(0.5)].max() < 0.1
        assert_close(found.norm(dim=0), torch.ones_like(depth))


class TestNormals:
    def test_against_kornia(self):
        """Its tangents are means over three rows: they are the same where the surface is smooth."""
        size = 64
        at = torch.linspace(-1, 1, size, dtype=torch.float64)
        depth = (1 + 0.01 * torch.sin(2 * at)[:, None] + 0.02 * torch.cos(1.5 * at))[None, None]
        focal = (size - 1) / 2 / RELIEF.reach
        matrix = torch.tensor([[[focal, 0, (size - 1) / 2], [0, focal, (size - 1) / 2], [0, 0, 1]]]).double()
        found, wanted = RELIEF.normals(depth), -depth_to_normals(depth, matrix)
        assert_close(found[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1], atol=1e-4, rtol=0)

    def test_a_plane(self):
        """z = 1 + x / 2: its normal towards the camera is (1/2, 0, -1)."""
        x = RELIEF.points(torch.ones(1, 1, 9, 9))[:, :1]
        normals = RELIEF.normals(1 / (1 - x / 2))
        wanted = torch.nn.functional.normalize(torch.tensor([0.5, 0, -1]), dim=0).view(1, 3, 1, 1)
        assert_close(normals[..., 1:-1, 1:-1], wanted.expand(1, 3, 7, 7), atol=1e-4, rtol=0)
        assert_close(normals[0, :, 0], torch.tensor([0, 0, -1.0])[:, None].expand(3, 9))


class TestGradients:
    """Against finite differences. At other places than these, edges of what is seen would cross a pixel's centre."""

    def inputs(self):
        depth, albedo = bumps(2, 7), drawn(2, 3, 7, 7, low=-0.8, high=0.4)
        view = torch.tensor([(0.12, -0.31, 0.07, 0.004, -0.003, 0.002), (-0.2, 0.23, -0.1, 0.001, 0.002, -0.01)])
        light = lights(2)
        values = (depth, albedo, view.double(), light.ambient, light.diffuse, light.slope)
        return [value.clone().requires_grad_() for value in values]

    def test_of_everything(self):
        def render(depth, albedo, view, *light):
            found = RELIEF(depth, albedo, view, Light(*light))
            return found.image, found.depth

        assert torch.autograd.gradcheck(render, self.inputs(), eps=1e-7, atol=1e-4)

    def test_each_has_some(self):
        inputs = self.inputs()
        found = RELIEF(*inputs[:3], Light(*inputs[3:]))
        for value in torch.autograd.grad(found.image.square().sum(), inputs):
            assert value.isfinite().all() and value.abs().max() > 0.01
        assert found.alpha.grad_fn is None

    def test_they_lead_a_view_home(self):
        """A view is found by the picture that it gives."""
        at = torch.linspace(-1, 1, 32)
        depth = 1.02 - 0.06 * torch.exp(-3 * (at[:, None].square() + at.square()))[None, None]
        albedo = torch.stack([torch.sin(3 * at)[:, None] * torch.cos(2 * at), at.expand(32, 32), -at.expand(32, 32).T])
        albedo = 0.8 * albedo[None]
        target = RELIEF(depth, albedo, torch.tensor([(0.1, 0.25, 0.0, 0, 0, 0)]), FLAT)
        view = torch.zeros(1, 6, requires_grad=True)
        optimizer = torch.optim.Adam([view], lr=0.02)
        for _ in range(60):
            found = RELIEF(depth, albedo, view * torch.tensor([1.0, 1, 0, 0, 0, 0]), FLAT)
            both = found.alpha * target.alpha
            loss = ((found.image - target.image).square() * both).sum() / both.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert view[0, :2].tolist() == pytest.approx([0.1, 0.25], abs=0.02)


class TestVisibility:
    def test_the_nose_hides_the_far_cheek(self):
        """A wall of height 0.1 in the middle, seen from 45 degrees: a strip of that width behind it is gone."""
        size = 64
        depth = torch.full((1, 1, size, size), 1.02)
        depth[..., 31:33] = 0.92
        cheeks = torch.full((1, 3, size, size), -1.0)
        cheeks[:, 0, :, 18:30] = 1  # red, left of it
        cheeks[:, 1, :, 34:46] = 1  # green, right of it

        def amounts(turn):
            image = RELIEF(depth, cheeks, torch.tensor([(0.0, turn, 0, 0, 0, 0)]), FLAT).image
            return [int((image[:, channel] > 0.5).sum()) for channel in (0, 1)]

        red, green = amounts(0.0)
        assert red == green == size * 12
        red, green = amounts(math.pi / 4)  # the nose points to the left
        assert red == 0 and green > size * 6
        red, green = amounts(-math.pi / 4)
        assert green == 0 and red > size * 6

    def test_where_nothing_is_seen(self):
        found = RELIEF(bumps(), drawn(1, 3, 16, 16), view_of("profile"), lights())
        away = found.alpha == 0
        assert away.any() and set(found.alpha.unique().tolist()) == {0.0, 1.0}
        assert (found.depth[away] == pytest.approx(1.2)) and (found.image * away == 0).all()
        assert found.depth[~away].max() < 1.2

    def test_a_batch_is_its_items(self):
        depth, albedo, light = bumps(5), drawn(5, 3, 16, 16, low=-1), lights(5)
        view = torch.cat([view_of(name) for name in VIEWS])
        together = RELIEF(depth, albedo, view, light)
        for i in range(5):
            alone = RELIEF(depth[i : i + 1], albedo[i : i + 1], view[i : i + 1], light[i])
            for name in ("image", "depth", "alpha"):
                assert torch.equal(getattr(together[i], name), getattr(alone, name))

    def test_masks_are_carried_as_the_picture_is(self):
        depth, view = bumps(), view_of("aside")
        seen, _ = RELIEF.turned(depth, view)
        albedo = drawn(1, 3, 16, 16, low=-1)
        found = RELIEF(depth, albedo, view, FLAT.to(torch.float64))
        assert_close(RELIEF.carried(albedo, seen, view).clamp(-1, 1) * found.alpha, found.image)
        mask = (drawn(1, 1, 16, 16) > 0.5).float()
        assert set(RELIEF.carried(mask, seen, view, "nearest").unique().tolist()) == {0.0, 1.0}


def test_a_mirrored_face_gives_a_mirrored_picture():
    """With the view and the light mirrored too. The squares' triangles are not, which smooth maps hardly show."""
    size, at = 48, torch.linspace(-1, 1, 48, dtype=torch.float64)
    depth = (1.02 - 0.05 * torch.exp(-4 * ((at[:, None] - 0.1).square() + (at - 0.2).square())))[None, None]
    albedo = (0.5 * torch.sin(2 * at + at[:, None]))[None, None].expand(1, 3, size, size)
    view = torch.tensor([(0.1, 0.3, -0.2, 0.01, 0.02, 0)], dtype=torch.float64)
    light = Light(*(torch.tensor(v, dtype=torch.float64) for v in ([0.3], [0.6], [(0.4, -0.2)])))
    other = light.replace(slope=light.slope * torch.tensor([-1.0, 1]))
    found = RELIEF(depth, albedo, view, light)
    flipped = RELIEF(*mirrored(depth, albedo), view * torch.tensor([1.0, -1, -1, -1, 1, 1]), other)
    both = found.alpha * flipped.alpha.flip(-1)
    assert both.mean() > 0.5
    assert ((found.image - flipped.image.flip(-1)) * both).abs().max() < 5e-3
    assert ((found.depth - flipped.depth.flip(-1)) * both).abs().max() < 5e-4


def test_what_networks_end_with():
    raw = drawn(2, 1, 8, 8, low=-2, high=2, dtype=torch.float32)
    depth = RELIEF.depth(raw)
    wanted = 1 + 0.1 * math.tanh(float(raw[1, 0, 3, 4]) - float(raw[1].mean()))
    assert float(depth[1, 0, 3, 4]) == pytest.approx(wanted, abs=1e-6)
    assert_close(depth[..., :2], torch.full((2, 1, 8, 2), 1.04))  # 0.7 * 1.1 + 0.3 * 0.9
    assert_close(depth[..., -2:], torch.full((2, 1, 8, 2), 1.04))
    assert_close(RELIEF.depth(raw + 7), depth)
    view = Relief(shift_z=0.05).view(torch.tensor([(1.0, -0.5, 0, 1, -1, 1)]))
    assert_close(view, torch.tensor([(math.pi / 3, -math.pi / 6, 0, 0.1, -0.1, 0.05)]))
    assert RELIEF.view(torch.ones(1, 6))[0, 5] == 0
    light = Light.of(torch.tensor([(-1.0, 1, 2, -2)]))
    assert (light.ambient.tolist(), light.diffuse.tolist(), light.slope.tolist()) == ([0.0], [1.0], [[2.0, -2.0]])
    assert_close(light.towards, torch.tensor([(-2.0, 2, -1)]) / 3)


def test_turns_are_about_x_then_y_then_z():
    angles = drawn(3, 3, low=-2, high=2)
    generators = torch.tensor([[[0, 0, 0], [0, 0, -1], [0, 1, 0]], [[0, 0, 1], [0, 0, 0], [-1, 0, 0]]]).double()
    generators = torch.cat([generators, torch.tensor([[[0, -1, 0], [1, 0, 0], [0, 0, 0]]]).double()])
    x, y, z = (torch.linalg.matrix_exp(angles[:, i, None, None] * generators[i]) for i in range(3))
    assert_close(rotation_matrix(angles), z @ y @ x)


class TestShading:
    def test_by_hand(self):
        normals = torch.tensor([(0.0, 0, -1), (-0.6, 0, -0.8), (0.6, 0, -0.8), (1, 0, 0)]).T.view(1, 3, 2, 2)
        light = Light(torch.tensor([0.25]), torch.tensor([0.5]), torch.tensor([(0.75, 0.0)]))  # from the left
        wanted = 0.25 + 0.5 * torch.tensor([0.8, 0.6 * 0.6 + 0.8 * 0.8, 0.8 * 0.8 - 0.6 * 0.6, 0])
        assert_close(shading(normals, light), wanted.view(1, 1, 2, 2))

    def test_it_multiplies_the_share_that_albedo_stands_for(self):
        depth, albedo = torch.ones(1, 1, 5, 5), drawn(1, 3, 5, 5, low=-1, dtype=torch.float32)
        light = Light(torch.tensor([0.2]), torch.tensor([0.4]), torch.zeros(1, 2))  # on a wall seen from the front
        assert_close(RELIEF.shaded(depth, albedo, light), (albedo / 2 + 0.5) * 0.6 * 2 - 1)
        bright = Light(torch.ones(1), torch.ones(1), torch.zeros(1, 2))
        assert RELIEF.shaded(depth, torch.full_like(albedo, 0.5), bright).max() == 2
        assert RELIEF(depth, torch.full_like(albedo, 0.5), torch.zeros(1, 6), bright).image.max() == 1


class TestSphereCap:
    def test_by_hand(self):
        mask = torch.zeros(1, 1, 64, 64)
        mask[:, :, 10:51, 20:41] = 1  # 41 rows around 30, 21 columns around 30: half as wide as high
        cap = sphere_cap(mask)
        assert cap[0, 0, 30, 30] == pytest.approx(0.91)
        rim = math.sqrt(0.4**2 - (0.4 - 0.11) ** 2)
        half = 0.91 + 0.4 - math.sqrt(0.4**2 - (rim / 2) ** 2)
        for row, column, wanted in ((30, 25, half), (40, 30, half), (30, 20, 1.02), (50, 30, 1.02), (10, 20, 1.02)):
            assert cap[0, 0, row, column] == pytest.approx(wanted, abs=1e-6)
        assert cap.max() == pytest.approx(1.02) and (cap[mask == 0] == cap.max()).all()

    def test_each_picture_has_its_own(self):
        mask = torch.zeros(2, 1, 16, 16)
        mask[0, :, 2:9, 2:9], mask[1, :, 6:15, 5:14] = 1, 0.7
        together = sphere_cap(mask)
        for i in range(2):
            assert torch.equal(sphere_cap(mask[i : i + 1])[0], together[i])
        assert together[0, 0, 5, 5] == together[1, 0, 10, 9] == pytest.approx(0.91)


def test_half_precision_around_it_changes_nothing():
    depth, albedo, view, light = bumps().float(), drawn(1, 3, 16, 16).float(), view_of("aside").float(), lights()
    wanted = RELIEF(depth, albedo, view, light.to(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found = RELIEF(depth, albedo, view, light.to(torch.float32))
    assert torch.equal(found.image, wanted.image) and torch.equal(found.depth, wanted.depth)
    raw = drawn(1, 1, 16, 16, low=-1).bfloat16()
    assert_close(RELIEF.depth(raw), RELIEF.depth(raw.float()), atol=0, rtol=0)
    ends = RELIEF.view(torch.rand(1, 6).bfloat16()), Light.of(torch.rand(1, 4).bfloat16())
    assert RELIEF(RELIEF.depth(raw), albedo.bfloat16(), *ends).image.dtype == torch.float32


@pytest.mark.gpu
def test_a_gpu_sees_the_same(device):
    depth, albedo, light = bumps(5, 64).float(), drawn(5, 3, 64, 64, low=-1).float(), lights(5).to(torch.float32)
    view = torch.cat([view_of(name) for name in VIEWS]).float()
    found = []
    for place in (torch.device("cpu"), device):
        leaf = depth.to(place).requires_grad_()
        seen = RELIEF(leaf, albedo.to(place), view.to(place), light.to(place))
        (gradient,) = torch.autograd.grad((seen.image * seen.alpha).mean(), leaf)
        found.append([value.detach().cpu() for value in (seen.alpha, seen.depth, seen.image, gradient)])
    (mask, *wanted), (other, *values) = found
    assert (mask != other).float().mean() < 1e-4
    for value, true in zip(values, wanted, strict=True):
        assert ((value - true).abs() > 1e-4).float().mean() < 1e-3


class TestRefusals:
    def test_settings(self):
        with pytest.raises(UserError, match=r"relief.near \(1.2\) must be below relief.far \(1.1\)"):
            Relief(near=1.2)
        with pytest.raises(UserError, match=r"relief.fov_deg \(180\) below 180"):
            Relief(fov_deg=180)
        with pytest.raises(UserError, match=r"relief.shift is -1: it must be a number and must not be negative"):
            Relief(shift=-1)

    def test_shapes(self):
        depth, albedo, view = bumps(2), drawn(2, 3, 16, 16), torch.zeros(2, 6, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"depth must be \(B, 1, S, S\) with S at least 5, got \(2, 16, 16\)"):
            RELIEF(depth[:, 0], albedo, view, lights(2))
        with pytest.raises(ValueError, match="do not fit the depth"):
            RELIEF(depth, albedo[..., 1:], view, lights(2))
        with pytest.raises(ValueError, match=r"a view has 6 numbers, got shape \(2, 5\)"):
            RELIEF(depth, albedo, view[:, 1:], lights(2))
        with pytest.raises(ValueError, match="1 views of 2 depth maps"):
            RELIEF(depth, albedo, view[:1], lights(2))
        with pytest.raises(ValueError, match="1 lights for 2 maps"):
            RELIEF(depth, albedo, view, lights(1))
        with pytest.raises(ValueError, match=r"a light has 4 numbers, got shape \(2, 3\)"):
            Light.of(torch.zeros(2, 3))

    def test_values(self):
        with pytest.raises(ValueError, match="behind the camera, or is no number"):
            RELIEF.turned(bumps(), torch.tensor([(0, 0, 0, 0, 0, -2.0)], dtype=torch.float64))
        with pytest.raises(ValueError, match="behind the camera, or is no number"):
            RELIEF.turned(bumps(), torch.full((1, 6), math.nan, dtype=torch.float64))
        with pytest.raises(UserError, match=r"a picture shows no face: its mask is below 0.7 everywhere"):
            sphere_cap(torch.zeros(1, 1, 8, 8))
        with pytest.raises(UserError, match=r"is not the front of a sphere of radius 0.05"):
            sphere_cap(torch.ones(1, 1, 8, 8), radius=0.05)
