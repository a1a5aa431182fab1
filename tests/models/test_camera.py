"""The camera contract: axes, labels, projection, mirror, rigs; kornia's pinhole camera is the reference."""

import math

import pytest
import torch
from kornia.geometry.camera import PinholeCamera

from models.camera import Camera, Rig

RIG = Rig()
ANGLES = torch.tensor([-0.5, 0.0, 0.2, 0.6]), torch.tensor([0.1, 0.0, -0.3, 0.25])


def cameras() -> Camera:
    return RIG.camera(*ANGLES)


def skewed() -> Camera:
    """Cameras with unequal focals, skew and an off-centre principal point."""
    camera = cameras()
    intrinsics = torch.tensor([[2.0, 0.05, 0.48], [0.0, 2.3, 0.55], [0.0, 0.0, 1.0]]).repeat(len(camera), 1, 1)
    return Camera(camera.cam2world, intrinsics)


def points(batch: int, count: int = 20) -> torch.Tensor:
    return torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_axes_of_the_frontal_camera():
    camera = RIG.camera(0.0)
    pivot = torch.tensor(RIG.pivot)
    torch.testing.assert_close(camera.position[0], pivot + torch.tensor([0.0, 0.0, RIG.radius]))
    torch.testing.assert_close(camera.forward[0], torch.tensor([0.0, 0.0, -1.0]))  # the face looks back along +z
    uv, depth = camera.project((pivot + torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]]))[None])
    assert uv[0, 0, 0] > 0.5 and uv[0, 0, 1] == pytest.approx(0.5)  # world +x is image right
    assert uv[0, 1, 1] < 0.5 and uv[0, 1, 0] == pytest.approx(0.5)  # world +y is image up
    assert float(depth[0, 2]) == pytest.approx(RIG.radius - 0.5)  # the nose is nearer


def test_positive_yaw_moves_right_and_positive_pitch_up():
    assert RIG.camera(0.3).position[0, 0] > 0
    assert RIG.camera(0.0, 0.3).position[0, 1] > RIG.pivot[1]


def test_rotation_is_right_handed():
    rotation = cameras().cam2world[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(len(rotation)))


def test_yaw_and_pitch_are_read_back():
    yaw, pitch = ANGLES
    torch.testing.assert_close(cameras().yaw, yaw, atol=1e-6, rtol=0)
    torch.testing.assert_close(cameras().pitch, pitch, atol=1e-6, rtol=0)


def test_label_against_a_matrix_by_hand():
    yaw = 0.4  # a turn about y: right = (cos, 0, -sin), down = (0, -1, 0), forward = (-sin, 0, -cos)
    c, s = math.cos(yaw), math.sin(yaw)
    x, y, z = (p + RIG.radius * o for p, o in zip(RIG.pivot, (s, 0.0, c), strict=True))
    expected = [c, 0, -s, x, 0, -1, 0, y, -s, 0, -c, z, 0, 0, 0, 1, RIG.focal, 0, 0.5, 0, RIG.focal, 0.5, 0, 0, 1]
    label = RIG.camera(yaw).label()
    torch.testing.assert_close(label[0].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_label_round_trip():
    camera = skewed()
    again = Camera.from_label(camera.label())
    assert torch.equal(again.cam2world, camera.cam2world) and torch.equal(again.intrinsics, camera.intrinsics)


def test_bad_labels_are_refused():
    with pytest.raises(ValueError, match="25 numbers"):
        Camera.from_label(torch.zeros(2, 24))
    label = cameras().label()
    label[:, :3] *= 1.1
    with pytest.raises(ValueError, match="not orthonormal"):
        Camera.from_label(label)
    with pytest.raises(ValueError, match="not orthonormal"):
        Camera.from_label(label * math.nan)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="cam2world"):
        Camera(torch.eye(4), torch.eye(3)[None])
    with pytest.raises(ValueError, match="intrinsics"):
        Camera(torch.eye(4).repeat(2, 1, 1), torch.eye(3)[None])


@pytest.mark.parametrize("make", [cameras, skewed])
def test_projection_agrees_with_kornia(make):
    camera, size = make(), 64
    matrix = torch.eye(4).repeat(len(camera), 1, 1)
    matrix[:, :3, :3] = camera.intrinsics
    matrix[:, :2] *= size
    side = torch.full((len(camera),), float(size))
    kornia = PinholeCamera(matrix, torch.linalg.inv(camera.cam2world), side, side)
    world = points(len(camera))
    uv, depth = camera.project(world)
    torch.testing.assert_close(uv * size, kornia.project(world), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(kornia.unproject(uv * size, depth[..., None]), world, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("make", [cameras, skewed])
def test_rays_invert_projection(make):
    camera, world = make(), points(4)
    uv, depth = camera.project(world)
    origins, directions = camera.rays_at(uv)
    torch.testing.assert_close(origins + depth[..., None] * directions, world, atol=1e-5, rtol=1e-5)


def test_rays_go_through_pixel_centres_row_by_row():
    camera = skewed()
    origins, directions = camera.rays(3, 5)
    assert origins.shape == directions.shape == (4, 15, 3)
    uv, depth = camera.project(origins + 2.5 * directions)
    torch.testing.assert_close(depth, torch.full((4, 15), 2.5))
    torch.testing.assert_close(uv[0, 7], torch.tensor([2.5 / 5, 1.5 / 3]))
    torch.testing.assert_close(uv[0, 4], torch.tensor([4.5 / 5, 0.5 / 3]))


def test_rays_stay_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        directions = cameras().rays(8)[1]
    torch.testing.assert_close(directions, cameras().rays(8)[1], rtol=0, atol=0)


@pytest.mark.parametrize("make", [cameras, skewed])
def test_mirror_sees_the_mirrored_point_at_the_mirrored_pixel(make):
    camera, world = make(), points(4)
    uv, depth = camera.project(world)
    mirrored_uv, mirrored_depth = camera.mirror().project(world * torch.tensor([-1.0, 1.0, 1.0]))
    torch.testing.assert_close(mirrored_uv, torch.stack([1 - uv[..., 0], uv[..., 1]], -1))
    torch.testing.assert_close(mirrored_depth, depth)
    torch.testing.assert_close(camera.mirror().yaw, -camera.yaw)
    torch.testing.assert_close(camera.mirror().mirror().label(), camera.label())


def test_batch_operations():
    camera = cameras()
    assert torch.equal(Camera.cat([camera[:1], camera[1:]]).label(), camera.label())
    assert torch.equal(camera[-1].label(), camera.label()[-1:])
    assert torch.equal(camera[torch.tensor([2, 0])].label(), camera.label()[[2, 0]])
    assert torch.equal(camera.repeat_interleave(2).label()[::2], camera.label())
    assert camera.to(torch.float64).cam2world.dtype == torch.float64


def test_random_poses_follow_the_rig():
    camera = RIG.random(4000, torch.Generator().manual_seed(0))
    assert float(camera.yaw.std()) == pytest.approx(RIG.yaw_std, rel=0.05)
    assert float(camera.pitch.std()) == pytest.approx(RIG.pitch_std, rel=0.05)
    again = RIG.random(4000, torch.Generator().manual_seed(0))
    assert torch.equal(camera.cam2world, again.cam2world)


def test_random_poses_are_around_their_mean():
    camera = RIG.replace(yaw_mean=0.4, pitch_mean=-0.2, pitch_max=0.1).random(4000, torch.Generator().manual_seed(0))
    assert abs(camera.yaw.mean() - 0.4) < 0.02 and abs(camera.pitch.mean() + 0.2) < 0.01
    assert camera.pitch.min() > -0.3001 and camera.pitch.max() < -0.0999


@pytest.mark.parametrize("distribution", ["gaussian", "uniform"])
def test_random_poses_stay_within_the_limits(distribution):
    rig = RIG.replace(distribution=distribution, yaw_max=0.2, pitch_max=0.1)
    camera = rig.random(1000, torch.Generator().manual_seed(0))
    assert camera.yaw.abs().max() <= 0.2 + 1e-5 and camera.pitch.abs().max() <= 0.1 + 1e-5


def test_orbit_and_turntable():
    orbit = RIG.orbit(7, math.radians(36))
    expected = torch.deg2rad(torch.tensor([-36.0, -24, -12, 0, 12, 24, 36]))
    torch.testing.assert_close(orbit.yaw, expected, atol=1e-6, rtol=0)
    distance = (orbit.position - torch.tensor(RIG.pivot)).norm(dim=1)
    torch.testing.assert_close(distance, torch.full((7,), RIG.radius))
    torch.testing.assert_close(RIG.turntable(8).label()[0], RIG.camera(0.0).label()[0])


@pytest.mark.parametrize("centre", [None, (0.0, 0.1, -0.3)])
def test_dolly_zoom_keeps_the_size_at_the_pivot_and_bends_the_rest(centre):
    rig = RIG.replace(pivot=(0.0, 0.0, 0.2), centre=centre, yaw_mean=0.1)
    camera, pivot, home = rig.dolly(8), torch.tensor(rig.pivot), rig.camera(rig.yaw_mean)
    right, forward = home.cam2world[0, :3, 0], home.cam2world[0, :3, 2]
    beside, before = (
        camera.project((pivot + d).expand(8, 1, 3))[0][:, 0] for d in (0.3 * right, 0.3 * right - forward)
    )
    torch.testing.assert_close(beside, home.project((pivot + 0.3 * right)[None, None])[0][0].expand(8, 2))
    distance = (camera.position - pivot).norm(dim=1) / (home.position - pivot).norm()
    assert float(distance[0]) == pytest.approx(3 * (rig.radius - rig.near) / rig.radius)
    assert float(distance.max()) == pytest.approx(4.0) and (distance[1:].flip(0) - distance[1:]).abs().max() < 1e-4
    assert (before[:4, 0] > before[1:5, 0]).all()  # what is near the camera is large when that is close


@pytest.mark.parametrize(
    ("change", "message"), [({"distribution": "normal"}, "distribution"), ({"near": 10.0}, "near")]
)
def test_contradictory_rigs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RIG.replace(**change)


@pytest.mark.parametrize("changes", [{}, {"pivot": (0.0, 0.0, 0.4), "centre": (0.0, 0.0, -0.3)}])
def test_angles_undo_the_camera(changes):
    rig, yaw, pitch = RIG.replace(**changes), torch.tensor([0.0, 0.4, -0.7]), torch.tensor([0.1, -0.2, 0.3])
    torch.testing.assert_close(torch.stack(rig.angles(rig.camera(yaw, pitch))), torch.stack([yaw, pitch]))


def test_angles_are_limited_around_the_mean():
    rig = RIG.replace(yaw_mean=0.5, yaw_max=0.2, pitch_mean=-0.3, pitch_max=0.1)
    yaw, pitch = rig.within(torch.tensor([0.0, 0.6, 1.0]), torch.tensor([-1.0, -0.25, 0.0]))
    torch.testing.assert_close(yaw, torch.tensor([0.3, 0.6, 0.7]))
    torch.testing.assert_close(pitch, torch.tensor([-0.4, -0.25, -0.2]))
    for cameras in (rig.orbit(5, pitch=-0.3), rig.turntable(8)):
        yaw, pitch = rig.angles(cameras)
        torch.testing.assert_close(torch.stack([yaw, pitch]), torch.stack(rig.within(yaw, pitch)))
        assert float(yaw.max() - yaw.min()) == pytest.approx(0.4, abs=1e-4)


def test_turning_changes_the_yaw_only():
    rig = Rig()
    camera = rig.camera(torch.tensor([-0.3, 0.2]), torch.tensor([0.1, -0.2]))
    tilt = torch.eye(4)
    tilt[0, 0] = tilt[1, 1] = math.cos(0.1)
    tilt[0, 1], tilt[1, 0] = -math.sin(0.1), math.sin(0.1)
    rolled = Camera(camera.cam2world @ tilt, camera.intrinsics)
    turned = camera.turn(torch.tensor([0.5, -0.4]), rig.pivot)
    wanted = rig.camera(torch.tensor([0.2, -0.2]), torch.tensor([0.1, -0.2]))
    torch.testing.assert_close(turned.cam2world, wanted.cam2world, atol=1e-5, rtol=0)
    again = rolled.turn(torch.tensor([0.5, -0.4]), rig.pivot)
    torch.testing.assert_close(again.cam2world, wanted.cam2world @ tilt, atol=1e-5, rtol=0)
