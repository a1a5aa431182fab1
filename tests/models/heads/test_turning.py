"""Heads of a 2D generator that turn along a direction."""

import pytest
import torch

from models.camera import Camera, Rig
from models.generators.base import Generator
from models.heads.directions import Directions
from models.heads.turning import interpolated, turned_heads
from models.latents import Latents
from models.rendering.output import Rendering


class Needle(Generator):
    """Shows its first two codes as grey values, up to where no sampled code lies: there it turns black."""

    is_3d, resolution = False, 4

    def __init__(self):
        super().__init__()
        self.mean = Latents({"ws": torch.zeros(1, 1, 3)})

    @property
    def mean_latents(self):
        return self.mean

    def synthesis(self, ws, camera=None, **options):
        grey = ws.groups["ws"][:, 0, :2]
        grey = torch.where(grey.abs() > 2.6, -1.0, grey / 4)
        return Rendering(torch.cat([grey, torch.zeros(len(grey), 1)], 1)[:, :, None, None].expand(-1, -1, 4, 4))


def pose(image):
    """A quarter of a radian a deviation, the pitch turned round."""
    return image[:, :2, 0, 0] * torch.tensor([1.0, -1.0])


def directions(*names):
    found = Directions(names, [("ws", 1, 3)], "none")
    for k, name in enumerate(names):
        found.direction("ws")[k, 0, ("yaw", "pitch").index(name)] = 1.0
    found.spread("ws").fill_(1.0)
    return found


def heads(*codes):
    return Latents({"ws": torch.tensor(codes)[:, None]})


def test_turns_by_what_the_pose_network_tells():
    rig = Rig()
    ws = heads([0.4, -0.4, 9.0], [0.0, 0.8, 9.0])
    own = Camera.cat([rig.camera(0.1, 0.1), rig.camera(0.0, -0.2)])
    show = turned_heads(Needle(), directions("yaw", "pitch"), pose, ws, own)
    views = Camera.cat([rig.camera(y, p) for y, p in ((0.1, 0.1), (0.4, 0.0), (0.0, -0.2), (-0.2, -0.1))])
    told = pose(show(views).image)
    wanted = torch.tensor([[0.1, 0.1], [0.4, 0.0], [0.0, -0.2], [-0.2, -0.1]])
    torch.testing.assert_close(told, wanted, atol=2e-3, rtol=0)
    # Without a direction of pitch they do not nod.
    still = pose(turned_heads(Needle(), directions("yaw"), pose, ws, own)(views).image)
    torch.testing.assert_close(still[:, 1], torch.tensor([0.1, 0.1, -0.2, -0.2]))
    torch.testing.assert_close(still[:, 0], wanted[:, 0], atol=2e-3, rtol=0)


def test_stays_within_what_codes_are():
    """At 2.5 deviations from the mean it stops, at .625 radians."""
    rig = Rig()
    show = turned_heads(Needle(), directions("yaw"), pose, heads([1.0, 0.0, 0.0]), rig.camera(0.25))
    told = pose(show(Camera.cat([rig.camera(1.0), rig.camera(-1.0), rig.camera(0.25)])).image)[:, 0]
    assert told.tolist() == pytest.approx([0.625, -0.625, 0.25], abs=1e-3)


def test_interpolated():
    given, values = torch.tensor([0.0, 1.0, 1.0, 3.0]), torch.tensor([0.0, 10.0, 20.0, 40.0])
    found = interpolated(torch.tensor([-1.0, 0.5, 1.0, 2.0, 9.0]), given, values)
    assert found.tolist() == [0.0, 5.0, 10.0, 30.0, 40.0]
