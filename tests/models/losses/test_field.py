"""What a distance field is taught at points, against loops in float64 on a ball that is known."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.errors import UserError
from models.generators.stylesdf import StyleSDF, camera_directions
from models.losses.field import FieldLoss
from models.rendering.output import FieldSample
from models.segments import SEGMENTS
from tests.models.generators.protocol import seeded

RIG = Rig(near=5.8, far=7.8)
SIDE, ROWS, VIEWS = 8, 2, 2


class Ball(StyleSDF):
    """A ball whose distances are 1.2 times too long, painted by where it is and from where it is seen."""

    def shade(self, ws, points, directions):
        distance = 1.2 * (points.norm(dim=-1, keepdim=True) - 0.6)
        return FieldSample(torch.tanh(points + directions), sdf=distance)


def known(z, points):
    """The true ball."""
    return points.norm(dim=-1) - 0.6


@pytest.fixture
def ball():
    return Ball(z_dim=3, width=8, depth=1, raw_resolution=SIDE, samples=4, rig=RIG).double()


@pytest.fixture
def batch():
    """Views of the true ball: a pixel whose ray hits it shows its depth and normal, the others none."""
    camera = RIG.camera(torch.tensor([0.0, 0.4, -0.3, 0.2]), torch.tensor([0.0, 0.1, 0.0, -0.2]))
    camera = Camera(camera.cam2world.double(), camera.intrinsics.double())
    origins, directions = camera.rays(SIDE)
    a, b = directions.square().sum(-1), (origins * directions).sum(-1)
    root = b * b - a * (origins.square().sum(-1) - 0.36)
    hit = root > 0
    depth = torch.where(hit, (-b - root.clamp_min(0).sqrt()) / a, 0.0)
    normals = F.normalize(origins + depth[..., None] * directions, dim=-1) * hit[..., None]
    maps = {"image": torch.rand(4, SIDE * SIDE, 3, generator=seeded(), dtype=torch.float64) * 2 - 1}
    maps |= {"mask": hit[..., None].double(), "depth": depth[..., None], "normals": normals}
    batch = {k: v.mT.reshape(ROWS, VIEWS, -1, SIDE, SIDE) for k, v in maps.items()}
    batch["mask"][0, 0, 0, 0, 0] = 0.5  # a pixel of the silhouette teaches neither
    return batch | {"z": torch.zeros(ROWS, 3, dtype=torch.float64)}, camera


def terms(loss, ball, batch, seed=3):
    found, camera = batch
    drawn = loss.draw(ROWS, VIEWS, seeded(seed))
    return loss(ball, ball.mapping(found["z"]), camera, found, known, drawn)


def test_terms_against_a_loop(ball, batch):
    loss = FieldLoss(weight=1, pixels=40, near=15, uniform=10, near_sd=0.2, band=0.3)
    found = terms(loss, ball, batch)
    data, camera = batch
    drawn = loss.draw(ROWS, VIEWS, seeded(3))
    assert 0.15 < float(drawn.offset.std()) < 0.25 and float(drawn.cube.abs().max()) <= 1.5
    origins, directions = camera.rays(SIDE)
    looking = F.normalize(camera_directions(camera, SIDE), dim=-1)
    sums = dict.fromkeys(("distance", "colour", "normal", "eikonal", "minimal_surface"), 0.0)
    for row in range(ROWS):
        points = []
        for view in range(VIEWS):
            place = 2 * row + view
            for pixel in loss.pick(data, drawn.pixels)[place].tolist():
                i, j = divmod(pixel, SIDE)
                mask, image, depth, normal = (
                    data[name][row, view, :, i, j] for name in ("mask", "image", "depth", "normals")
                )
                solid = float(mask) > 0.99
                x = origins[place, pixel] + (float(depth) if solid else RIG.far) * directions[place, pixel]
                points.append((x, solid))
                if solid or float(mask) == 0:
                    colour = torch.tanh(x + looking[place, pixel])
                    sums["colour"] += float((colour - image).abs().sum())
                if solid:
                    sums["normal"] += 1 - float(x @ normal / x.norm())
        surface = [x for x, _ in points]
        points += [(surface[k] + drawn.offset[row, i], False) for i, k in enumerate(drawn.chosen[row].tolist())]
        points += [(x.double(), False) for x in drawn.cube[row]]
        for x, solid in points:
            true, value = float(x.norm()) - 0.6, 1.2 * (float(x.norm()) - 0.6)
            sums["distance"] += abs(value - true) * 0.3 / (0.3 + abs(true))
            sums["eikonal"] += 0.2**2
            sums["minimal_surface"] += 0.0 if solid or abs(true) <= 0.05 else math.exp(-100 * abs(value))
    counts = {"distance": 210, "colour": 160 * 3, "normal": 160, "eikonal": 210, "minimal_surface": 210}
    for name, total in sums.items():
        assert float(found[name]) == pytest.approx(total / counts[name], rel=1e-6), name
    weights = {"distance": 5, "colour": 1, "normal": 0.2, "eikonal": 0.1, "minimal_surface": 0.05}
    assert float(found["field"]) == pytest.approx(sum(weights[n] * sums[n] / counts[n] for n in sums), rel=1e-6)


def test_pixels_are_drawn_by_what_they_show():
    """A background of 4 x 8 pixels, skin, and a mouth of 8: each as often as it is asked for."""
    loss = FieldLoss(background=0.25, features=3.0)
    mask, parts = torch.zeros(1, 1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    mask[..., 4:, :], parts[..., 4:, :], parts[..., 6, :] = 1, SEGMENTS.index("skin"), SEGMENTS.index("mouth")
    uniform = torch.rand(1, 1, 200_000, generator=seeded())
    batch = {"image": mask, "mask": mask, "segmentation": parts}
    found = loss.pick(batch, uniform)[0].bincount(minlength=64).view(8, 8) / 200_000  # type: ignore[arg-type]
    total = 32 * 0.25 + 24 + 8 * 4
    expected = torch.full((8, 8), 1 / total)
    expected[:4], expected[6] = 0.25 / total, 4 / total
    torch.testing.assert_close(found, expected, rtol=0.2, atol=0)
    edges = torch.tensor([[[0.0, 1 - 2**-24]]])
    assert loss.pick(batch, edges).tolist() == [[0, 63]]  # type: ignore[arg-type]


def test_draws_are_the_callers(ball, batch):
    loss = FieldLoss(weight=1, pixels=10, near=5, uniform=5)
    assert float(terms(loss, ball, batch)["field"]) == float(terms(loss, ball, batch)["field"])
    assert float(terms(loss, ball, batch)["field"]) != float(terms(loss, ball, batch, seed=4)["field"])


def test_every_weight_moves_the_field():
    """Gradients reach the field's own weights through values and through the gradients of values."""
    torch.manual_seed(0)
    generator = StyleSDF(z_dim=3, width=8, depth=1, raw_resolution=SIDE, samples=4, rig=RIG)
    camera = RIG.camera(torch.zeros(1), torch.zeros(1))
    maps = {name: torch.rand(1, 1, count, SIDE, SIDE) for name, count in (("image", 3), ("normals", 3))}
    maps |= {"mask": torch.ones(1, 1, 1, SIDE, SIDE), "depth": torch.full((1, 1, 1, SIDE, SIDE), 6.4)}
    for name in ("distance", "normal", "eikonal", "minimal_surface", "colour"):
        loss = FieldLoss(weight=1, pixels=20, near=20, uniform=20)
        ws = generator.mapping(torch.zeros(1, 3))
        value = loss(generator, ws, camera, maps | {"z": torch.zeros(1, 3)}, known, loss.draw(1, 1, seeded()))[name]  # type: ignore
        generator.zero_grad()
        value.backward()
        head = generator.field.colour if name == "colour" else generator.field.distance
        assert head.weight.grad is not None and float(head.weight.grad.abs().max()) > 0, name


@pytest.mark.parametrize("name", ["distance", "pixels", "band"])
def test_nonsense_is_refused(name):
    with pytest.raises(UserError, match=rf"field\.{name}"):
        FieldLoss(**{name: -1})
