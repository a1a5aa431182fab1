"""What an artwork says about other views: of a flat wall and a ball, where every answer is known."""

import math

import pytest
import torch
from torch.testing import assert_close

from models.camera import Camera
from models.rendering.output import Rendering
from models.rendering.reprojection import (
    PseudoView,
    mirrored,
    reprojected,
    shrunk,
    surface,
    visibility_weight,
    weighted_reference,
)
from tests.models.metrics.ball import RIG, look, rendering

SIDE = 8


def straight(x: float = 0.0) -> Camera:
    """At (x, 0, 0), looking along +z, 90 degrees wide."""
    pose = torch.eye(4)[None].clone()
    pose[0, 0, 3] = x
    return Camera(pose, torch.tensor([[[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]]))


def parallel() -> Camera:
    """So far that all its rays are parallel."""
    return Camera(straight().cam2world, torch.tensor([[[500.0, 0, 0.5], [0, 500.0, 0.5], [0, 0, 1]]]))


def wall(image: torch.Tensor | None = None, tilt: float = 0.0) -> Rendering:
    """At depth 2, its normal turned by ``tilt`` from the viewing direction."""
    normals = torch.tensor([math.sin(tilt), 0.0, -math.cos(tilt)])[None, :, None, None].expand(1, 3, SIDE, SIDE)
    image = torch.zeros(1, 3, SIDE, SIDE) if image is None else image
    return Rendering(
        image, depth=torch.full((1, 1, SIDE, SIDE), 2.0), alpha=torch.ones(1, 1, SIDE, SIDE), normals=normals
    )


def stripes() -> torch.Tensor:
    """A colour for each column."""
    return torch.linspace(-1, 1, SIDE).expand(1, 3, SIDE, SIDE).clone()


def test_surface_points():
    points = surface(straight(1.0), torch.full((1, 1, 2, 2), 2.0))
    assert_close(points[0], torch.tensor([[0.0, -1, 2], [2, -1, 2], [0, 1, 2], [2, 1, 2]]))


@pytest.mark.parametrize(
    ("degrees", "expected"), [(0, 1.0), (60, 0.4), (75, 1.6 * math.cos(math.radians(75)) - 0.4), (80, 0)]
)
def test_visibility_falls_with_the_angle(degrees, expected):
    camera = Camera(
        straight().cam2world, torch.tensor([[[500.0, 0, 0.5], [0, 500.0, 0.5], [0, 0, 1]]])
    )  # parallel rays
    weight = visibility_weight(camera, wall(tilt=math.radians(degrees)))
    assert_close(weight, torch.full_like(weight, max(expected, 0)), atol=2e-3, rtol=0)


def test_visibility_at_the_silhouette():
    view = wall()
    alpha = torch.zeros(1, 1, SIDE, SIDE)
    alpha[..., 2:6, 2:6] = 1
    weight = visibility_weight(straight(), view.replace(alpha=alpha, normals=None))
    inner = torch.zeros_like(alpha)
    inner[..., 3:5, 3:5] = 1
    assert torch.equal(weight, inner)


class TestReference:
    def test_the_papers_counts_all_alike(self):
        reference = stripes()
        found = weighted_reference(reference, straight(), wall(), rim=1)
        assert torch.equal(found.image, reference) and (found.weight == 1).all()

    def test_grazing_pixels_count_less(self):
        found = weighted_reference(stripes(), parallel(), wall(tilt=math.radians(60)), rim=0.25)
        assert_close(found.weight, torch.full_like(found.weight, 1 - 0.75 * 0.6), atol=2e-3, rtol=0)


class TestMirror:
    def test_the_whole_picture(self):
        found = mirrored(stripes(), straight(), wall(), wall(), hidden_only=False)
        assert torch.equal(found.image, stripes().flip(-1)) and (found.weight == 1).all()

    def test_what_the_artwork_shows_counts_nothing(self):
        camera = RIG.camera(0.7)
        reference, other = look(camera, 48), look(camera.mirror(), 48)
        found = mirrored(reference.image, camera, rendering(reference), rendering(other), hidden_only=True)
        assert found.weight[0, 0, 24, 24] == 0 and found.weight.max() > 0.5
        # The artwork is from the right, x > 0: hidden from there is what lies far on the left.
        columns = found.weight[0, 0].amax(0)
        assert columns[:14].max() > 0.5 and columns[30:].max() < 0.1


class TestReprojection:
    def test_colours_move_with_the_parallax(self):
        """At depth 2, one to the side is two of eight pixels."""
        found = reprojected(stripes(), straight(), wall(), straight(1.0), wall(), fill=0.0)
        assert_close(found.image[..., :6], stripes()[..., 2:], atol=1e-5, rtol=0)
        assert (found.weight[..., 6:] == 0).all() and (found.weight[..., 1:5] > 0).all()

    def test_a_ball_keeps_its_colours(self):
        source, views = look(RIG.camera(0.0), 64), look(RIG.camera(torch.tensor([-0.4, 0.4])), 64)
        found = reprojected(source.image, source.camera, rendering(source), views.camera, rendering(views), fill=0.0)
        sure = (found.weight > 0.5).expand_as(found.image)
        assert sure.float().mean() > 0.1
        assert (found.image - views.image)[sure].abs().max() < 0.1

    def test_what_is_hidden_takes_the_colour_of_its_like(self):
        camera = RIG.camera(0.6)
        source, views = look(camera, 48), look(camera.mirror(), 48)
        plain, filled = (
            reprojected(source.image, camera, rendering(source), views.camera, rendering(views), fill=fill)
            for fill in (0.0, 0.5)
        )
        new = (plain.weight < 0.01) & (filled.weight > 0.3)
        assert new.any() and float(filled.weight[new].max()) <= 0.5
        held = plain.weight >= 0.5
        assert torch.equal(filled.weight[held], plain.weight[held])
        assert torch.equal(filled.image[held.expand_as(filled.image)], plain.image[held.expand_as(plain.image)])


def test_pseudo_views_by_hand():
    weight = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]]])
    view = PseudoView(torch.ones(1, 3, 2, 2), weight)
    assert_close(view.error(torch.zeros(1, 3, 2, 2)), torch.tensor([1.5 / 4]))
    known = view.completed(torch.zeros(1, 3, 2, 2))
    assert_close(known, weight.expand(1, 3, 2, 2))
    large = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert_close(shrunk(large, weight), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    assert shrunk(weight, weight) is weight


def left(side: int = SIDE) -> torch.Tensor:
    """A mask of the picture's left half."""
    return (torch.arange(side) < side // 2).float().expand(1, 1, side, side).clone()


class TestPerson:
    """What a mask of the person says: the artwork's background is nothing of the head's."""

    def test_where_mask_and_head_disagree_counts_little(self):
        half = wall().replace(alpha=left())  # the anchor's head is on the left
        for person, wanted in ((left(), 1.0), (left().flip(-1), 0.1), (0.5 * left() + 0.25, 0.775)):
            found = weighted_reference(stripes(), straight(), half, 1.0, person, background=0.1)
            assert_close(found.weight, torch.full_like(found.weight, wanted))
        assert (weighted_reference(stripes(), straight(), half, 1.0, left().flip(-1)).weight == 1).all()

    def test_a_mask_and_an_artwork_of_other_sizes(self):
        half, large = wall().replace(alpha=left()), torch.zeros(1, 3, 2 * SIDE, 2 * SIDE)
        found = weighted_reference(large, straight(), half, 1.0, left(4 * SIDE).flip(-1), background=0.0)
        assert found.weight.shape == (1, 1, 2 * SIDE, 2 * SIDE) and (found.weight == 0).all()

    def test_both_reasons_to_count_little(self):
        grazing = wall(tilt=math.radians(60))
        found = weighted_reference(stripes(), parallel(), grazing, 0.25, left(), background=0.1)
        rim = 1 - 0.75 * 0.6
        assert_close(found.weight, rim * (0.1 + 0.9 * left()), atol=2e-3, rtol=0)

    def test_only_the_person_is_mirrored(self):
        camera = RIG.camera(0.7)
        reference, other = look(camera, 48), look(camera.mirror(), 48)
        plain, masked = (
            mirrored(reference.image, camera, rendering(reference), rendering(other), True, person=person)
            for person in (None, left(96))
        )
        assert_close(masked.weight, plain.weight * left(48).flip(-1))
        assert torch.equal(masked.image, plain.image)

    def test_only_the_person_is_carried(self):
        """Moved by the parallax: two of eight pixels at depth 2, one to the side."""
        views = (stripes(), straight(), wall(), straight(1.0), wall(), 0.0)
        plain, masked = reprojected(*views), reprojected(*views, person=left())
        assert_close(masked.weight[..., :2], plain.weight[..., :2])
        assert masked.weight[..., 2:].max() < 1e-5 and plain.weight[..., 2:5].min() > 0


def test_one_view_under_another():
    below = PseudoView(torch.zeros(1, 3, 1, 3), torch.tensor([[[[0.2, 0.9, 0.2]]]]))
    above = PseudoView(torch.ones(1, 3, 1, 3), torch.tensor([[[[1.0, 0.5, 0.0]]]]))
    found = below.under(above, 1.0)
    assert_close(found.image[0, 0, 0], torch.tensor([1.0, 0.5, 0.0]))
    assert_close(found.weight.flatten(), torch.tensor([1.0, 0.9, 0.2]))
    half = below.under(above, 0.5)
    assert_close(half.image[0, 0, 0], torch.tensor([0.5, 0.25, 0.0]))
    assert_close(half.weight.flatten(), torch.tensor([0.5, 0.9, 0.2]))
    none = below.under(above, 0.0)
    assert torch.equal(none.image, below.image) and torch.equal(none.weight, below.weight)
