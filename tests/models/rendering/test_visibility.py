"""Which pixels another view shows, of walls and balls whose every ray is known."""

import torch
from torch.nn.functional import normalize

from models.camera import Camera
from models.rendering.visibility import seen_from
from tests.models.metrics.ball import RIG, look


def straight(x: float = 0.0) -> Camera:
    """At (x, 0, 0), looking along +z, 90 degrees wide."""
    pose = torch.eye(4)[None].clone()
    pose[0, 0, 3] = x
    return Camera(pose, torch.tensor([[[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]]))


def wall(depth: float, size: int = 8):
    return torch.full((1, 1, size, size), depth), torch.ones(1, 1, size, size)


def test_a_view_sees_what_it_shows():
    depth, mask = wall(2.0)
    assert seen_from(straight(), depth, mask, straight(), depth, mask).all()


def test_what_lies_behind_or_outside_is_not_seen():
    depth, mask = wall(2.0)
    assert not seen_from(straight(), depth, mask, straight(), depth - 0.5, mask).any()
    assert seen_from(straight(), depth, mask, straight(), depth - 0.5, mask, tolerance=0.6).all()
    # At depth 2 a view of 90 degrees is 4 wide: 1 to the side is two of eight pixels.
    shown = seen_from(straight(), depth, mask, straight(1.0), depth, mask)[0, 0]
    assert shown[:, 2:].all() and not shown[:, :2].any()


def test_background_is_neither():
    depth, mask = wall(2.0)
    half = mask.clone()
    half[..., :4] = 0
    assert torch.equal(seen_from(straight(), depth, half, straight(), depth, mask), half > 0.5)
    # One pixel beside what is there still counts: the farthest of the neighbours is asked.
    shown = seen_from(straight(), depth, mask, straight(), depth, half)[0, 0]
    assert shown[:, 3:].all() and not shown[:, :3].any()


def test_a_ball_from_two_sides():
    """A point is seen from where its normal points to, but for the tolerance."""
    front, side = look(RIG.camera(0.0), 64), RIG.camera(1.0)
    other = look(side, 64)
    shown = seen_from(front.camera, front.depth, front.mask, side, other.depth, other.mask)
    origins, directions = front.camera.rays(64)
    points = origins + front.depth.flatten(2).mT * directions
    facing = (normalize(side.position[:, None] - points, dim=-1) * front.normals.flatten(2).mT).sum(-1)
    facing, solid = facing.reshape(1, 1, 64, 64), front.mask > 0.5
    assert shown[solid & (facing > 0.3)].all() and not shown[solid & (facing < -0.4)].any()
    assert not shown[~solid].any()
    behind = look(RIG.camera(torch.pi), 64)
    assert not seen_from(front.camera, front.depth, front.mask, behind.camera, behind.depth, behind.mask)[
        ..., 24:40, 24:40
    ].any()


def test_one_other_view_serves_all():
    cameras = RIG.camera(torch.tensor([-0.3, 0.3]))
    views, one = look(cameras), look(RIG.camera(0.0))
    both = seen_from(cameras, views.depth, views.mask, one.camera, one.depth, one.mask)
    each = [
        seen_from(cameras[k], views.depth[k : k + 1], views.mask[k : k + 1], one.camera, one.depth, one.mask)
        for k in range(2)
    ]
    assert torch.equal(both, torch.cat(each))
