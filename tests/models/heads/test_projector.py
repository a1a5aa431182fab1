"""Latent optimisation on small random generators: every space, what moves in it, and that items do not mix."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from models.heads.projector import Projector, Search, fit_latents
from models.latents import Latents
from models.losses.image import pixel_mse
from tests.models.generators.protocol import awaken, seeded

STEPS = 12
FAST = {"learning_rate": 0.05}


@pytest.fixture(scope="module")
def flat():
    """A 2D generator of one latent group, with noise maps."""
    torch.manual_seed(0)
    generator = awaken(StyleGAN2Generator(channels=(12, 8, 6), style_dim=10, mapping_layers=2)).eval()
    generator.update_mean(64)
    return generator.requires_grad_(False)


@pytest.fixture(scope="module")
def head():
    """A 3D generator of two latent groups."""
    decoder = {"channels": (16, 8), "w_dim": 10, "mapping_layers": 2, "lr_multiplier": 1.0}
    torch.manual_seed(0)
    generator = awaken(
        StyleSDF(z_dim=6, width=16, depth=2, mapping_layers=2, raw_resolution=16, samples=8, decoder=decoder)
    ).eval()
    generator.update_mean(64)
    return generator.requires_grad_(False)


def pictures(generator, count=1):
    z = generator.sample_z(count, seeded(3))
    camera = generator.rig.camera(torch.linspace(-0.1, 0.1, count)) if generator.is_3d else None
    image = generator.synthesis(generator.mapping(z), camera).image.detach()
    return image, [torch.zeros(0)] * count if camera is None else list(camera.label())


def projector(generator, search, count=1, steps=STEPS):
    image, labels = pictures(generator, count)
    found = Projector(generator, search, lambda shown, rows: {"loss": pixel_mse(shown, image[rows])}, labels, steps)
    found.draw([seeded(index) for index in range(count)])
    return found


def losses(item):
    return item.curve[:, 0].tolist()


@pytest.mark.parametrize("space", ["z", "z+", "w", "w+"])
def test_every_space_descends(flat, space):
    found = projector(flat, Search(space=space, restarts=2, candidates=4, **FAST), steps=40)
    found.fit()
    (item,) = found
    course = losses(item)
    assert course[-1] < 0.5 * course[0]
    assert len(found.latents(item)) == 1 and int(item.best) >= 0
    ws = found.latents(item).ws
    assert torch.equal(ws, ws[:, :1].expand_as(ws)) == (space in ("z", "w"))


def test_two_latent_groups(head):
    found = projector(head, Search(space="w+", start="mean", **FAST))
    found.fit()
    after, start = found.latents(found[0]), head.mean_latents.groups
    assert list(after.groups) == ["renderer", "decoder"]
    assert all(not torch.equal(t, start[name]) for name, t in after.groups.items())
    assert losses(found[0])[-1] < losses(found[0])[0]


@torch.no_grad()
def test_the_yardstick_fits_two_groups(head):
    """The prior's test on StyleSDF: once it took the one group of codes that there is elsewhere."""
    image, _ = pictures(head)
    camera = head.rig.camera(torch.zeros(1) - 0.1)
    before = head.synthesis(head.mean_latents, camera).image
    codes = fit_latents(head, image, camera, z_steps=6, ws_steps=10)
    assert list(codes.groups) == ["renderer", "decoder"] and not codes.groups["renderer"].requires_grad
    assert pixel_mse(head.synthesis(codes, camera).image, image) < pixel_mse(before, image)


def test_the_yardstick_leaves_the_generator_alone(flat):
    one = copy.deepcopy(flat).requires_grad_(True)
    image, _ = pictures(one)
    head = Projector(one, Search(), lambda a, rows: {"loss": pixel_mse(a, image[rows])}, [torch.zeros(0)], 2)
    head.draw([seeded()])
    head.fit()
    assert all(p.grad is None and p.requires_grad for p in one.parameters())


@pytest.mark.parametrize("space", ["w", "w+"])
def test_only_named_layers_move(head, space):
    found = projector(head, Search(space=space, start="mean", layers={"renderer": (1, 3)}, **FAST))
    found.fit()
    mean, codes = head.mean_latents.groups, found.latents(found[0]).groups
    moved = (codes["renderer"] != mean["renderer"]).any(2)[0].tolist()
    assert moved == [index in (1, 2) for index in range(len(moved))]
    assert torch.equal(codes["decoder"], mean["decoder"])


def test_it_goes_on_from_given_codes(flat):
    """As a chain of searches does: the second starts where the first has ended."""
    first = projector(flat, Search(**FAST))
    first.fit()
    second = projector(flat, Search(space="w+", pull=1.0, **FAST))
    second.begin(0, first.latents(first[0]))
    assert torch.equal(second.latents(second[0]).ws, first.latents(first[0]).ws)
    second.fit()
    assert losses(second[0])[-1] < losses(first[0])[-1]


def test_the_pull_holds_to_the_start(flat):
    distances = []
    for pull in (0.0, 10.0):
        found = projector(flat, Search(space="w+", start="mean", pull=pull, **FAST))
        found.fit()
        distances.append(float((found.latents(found[0]).ws.detach() - flat.mean_latents.ws).norm()))
    assert distances[1] < 0.5 * distances[0]


def test_items_do_not_mix(flat):
    search = Search(restarts=2, candidates=4, prune=0.5, refine=0.25, **FAST)
    together = projector(flat, search, count=2)
    together.fit()
    image, labels = pictures(flat, 2)
    for index in range(2):
        alone = Projector(
            flat, search, lambda a, rows, k=index: {"loss": pixel_mse(a, image[k : k + 1])}, [labels[index]], STEPS
        )
        alone.draw([seeded(index)])
        alone.fit()
        assert torch.allclose(alone.latents(alone[0]).ws, together.latents(together[index]).ws, atol=1e-4)


def test_a_plateau_stops_an_item_and_then_all(flat):
    found = projector(flat, Search(learning_rate=1e-7, patience=2))
    found.fit()
    assert [loss == loss for loss in losses(found[0])] == [True] * 4 + [False] * (STEPS - 4)
    assert found.settled and found.active(STEPS - 1) == []


def test_offsets_move_at_the_end_only(flat):
    found = projector(flat, Search(refine=0.25))
    assert [found.active(step) for step in (0, 8, 9)] == [["0"], ["0"], ["0", "0/offset"]]


class TestNoise:
    def test_maps_are_fitted_and_stay_noise(self, flat):
        found = projector(flat, Search(space="w", start="mean", optimize_noise=True, **FAST))
        begin = found.noise(found[0]).detach()
        found.fit()
        noise = found.noise(found[0]).detach()
        assert not torch.equal(begin, noise) and losses(found[0])[-1] < losses(found[0])[0]
        for maps in noise.split([side**2 for side in flat.noise_sides], 1):
            assert float(maps.mean()) == pytest.approx(0, abs=1e-5)
            assert float(maps.square().mean()) == pytest.approx(1, abs=1e-4)

    def test_the_penalty_is_stylegan2s(self, flat):
        found = projector(flat, Search(space="w", start="mean", optimize_noise=True, noise_regularization=3.0))
        total, sides = 0.0, flat.noise_sides
        noise = found.noise(found[0]).detach()[0].double()
        for pixels, side in zip(noise.split([s**2 for s in sides]), sides, strict=True):
            maps = pixels.reshape(side, side)
            while True:
                n = len(maps)
                cells = [(i, j) for i in range(n) for j in range(n)]
                across = sum(maps[i, j] * maps[i, j - 1] for i, j in cells)
                down = sum(maps[i, j] * maps[i - 1, j] for i, j in cells)
                total += float(across / n**2) ** 2 + float(down / n**2) ** 2
                if n <= 8:
                    break
                maps = F.avg_pool2d(maps[None, None], 2)[0, 0]
        value = found._penalties(found[0])
        assert float(value) == pytest.approx(3 * total, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"space": "z", "layers": {"ws": (0, 1)}}, "z starts at random codes"),
        ({"space": "z+", "pull": 1.0}, "z starts at random codes"),
        ({"restarts": 0}, "at least 1"),
    ],
)
def test_contradictions(options, match):
    with pytest.raises(UserError, match=match):
        Search(**options)


def test_what_a_generator_does_not_have(flat, head):
    for generator, options, match in (
        (flat, {"optimize_pose": True}, "is a 2D generator"),
        (head, {"optimize_noise": True}, "StyleSDF has no noise maps"),
        (head, {"space": "w+", "layers": {"ws": (0, 2)}}, r"ws: \[0, 2\] is not among StyleSDF's renderer: \[0, 3\]"),
        (flat, {"space": "w+", "layers": {"ws": (3, 99)}}, r"\[3, 99\] is not among"),
    ):
        with pytest.raises(UserError, match=match):
            Search(**options).check(generator)


def test_state_survives(flat):
    """What a group's file keeps is all there is."""
    search = Search(restarts=2, prune=0.5, refine=0.5, space="w+", pull=0.1, optimize_noise=True, **FAST)
    one, other = projector(flat, search), projector(flat, dataclasses.replace(search))
    one.fit()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.latents(one[0]).ws, other.latents(other[0]).ws)
    assert isinstance(one.latents(one[0]), Latents) and torch.equal(one.noise(one[0]), other.noise(other[0]))
