"""Named directions: what an edit adds, to which codes, and whose they are."""

import copy

import pytest
import torch

from models import artifact
from models.errors import UserError
from models.generators.stylesdf import StyleSDF
from models.heads.directions import Directions, directions_for, fingerprint
from models.heads.subjects import Subjects
from models.latents import Latents
from tests.stages import heads, tiny

GROUPS = [["renderer", 1, 4], ["decoder", 3, 5]]


def directions(**options):
    found = Directions(**{"names": ["smile", "age"], "groups": GROUPS, "generator": "f" * 64, **options})
    draws = torch.Generator().manual_seed(0)
    for name, buffer in found.named_buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=draws))
        if name.startswith("direction"):
            buffer.div_(buffer.flatten(1).norm(dim=1)[:, None, None])
        if name.startswith("spread"):
            buffer.abs_()
    found.limits.copy_(torch.tensor([[-2.0, 3.0], [-1.0, 0.5]]))
    return found


def codes(count=2):
    draws = torch.Generator().manual_seed(1)
    shapes = {"renderer": (6, 4), "decoder": (3, 5)}
    return Latents({name: torch.randn(count, *shape, generator=draws) for name, shape in shapes.items()})


class TestApply:
    def test_what_is_added(self):
        """w' = w + s * direction, of both edits, in float64: s is 1 and -1 at the ends of the useful range."""
        found, ws = directions(), codes()
        edited = found.apply(ws, {"smile": 0.5, "age": -2.0})
        for group, values in ws.groups.items():
            smile, age = found.direction(group).double()
            spread = found.spread(group).double()
            wanted = values.double() + 0.5 * 3.0 * spread[0] * smile - 2.0 * 1.0 * spread[1] * age
            torch.testing.assert_close(edited.groups[group].double(), wanted, atol=1e-6, rtol=1e-6)

    def test_nothing_is_asked(self):
        ws = codes()
        for edits in ({}, {"smile": 0.0}):
            found = directions().apply(ws, edits)
            assert all(torch.equal(found.groups[name], values) for name, values in ws.groups.items())

    def test_the_first_codes_alone(self):
        found, ws = directions(), codes()
        edited, all_of_it = (found.apply(ws, {"smile": 1.0}, layers) for layers in ({"renderer": 2}, None))
        assert torch.equal(edited.groups["decoder"], ws.groups["decoder"])
        assert torch.equal(edited.groups["renderer"][:, 2:], ws.groups["renderer"][:, 2:])
        assert torch.equal(edited.groups["renderer"][:, :2], all_of_it.groups["renderer"][:, :2])

    def test_codes_keep_their_gradient_and_kind(self):
        ws = codes().map(lambda t: t.double().requires_grad_())
        edited = directions().apply(ws, {"smile": 1.0})
        assert edited.groups["decoder"].dtype == torch.float64
        edited.groups["decoder"].sum().backward()
        assert bool((ws.groups["decoder"].grad == 1).all())

    def test_places_are_read_in_deviations(self):
        found, ws = directions(), codes()
        before, after = found.read(ws), found.read(found.apply(ws, {"age": 1.0}))
        moved = (after - before)[:, 1]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5), atol=1e-5, rtol=0)
        alone = Latents({"renderer": ws.groups["renderer"]})  # of an encoder that tells no others
        place = ws.groups["renderer"].double().mean(1) @ found.direction("renderer").double()[:, 0].T
        torch.testing.assert_close(found.read(alone).double(), place / found.spread("renderer").double())
        found.direction("renderer").zero_()
        assert bool(found.read(alone).isnan().all())

    @pytest.mark.parametrize(
        ("edits", "words"),
        [
            ({"joy": 1.0}, "there is no direction 'joy', there are: smile, age"),
            ({"smile": float("nan")}, "the strength of smile is nan: it must be a number"),
            ({"smile": "much"}, "the strength of smile is 'much': it must be a number"),
            ({"smile": True}, "the strength of smile is True: it must be a number"),
        ],
    )
    def test_edits_that_cannot_be(self, edits, words):
        with pytest.raises(UserError, match=words):
            directions().apply(codes(), edits)

    def test_layers_that_cannot_be(self):
        with pytest.raises(UserError, match="no codes 'ws' to edit, there are: renderer, decoder"):
            directions().apply(codes(), {}, {"ws": 3})
        with pytest.raises(UserError, match="the first -1 codes"):
            directions().apply(codes(), {}, {"renderer": -1})

    def test_codes_of_another_size(self):
        words = r"of codes renderer \(1, 4\), decoder \(3, 5\), the generator has ws \(2, 4\)"
        with pytest.raises(UserError, match=words):
            directions().apply(Latents({"ws": torch.zeros(1, 2, 4)}), {"smile": 1.0})
        wrong = Latents({**codes().groups, "decoder": torch.zeros(2, 4, 5)})
        with pytest.raises(UserError, match=r"the generator has renderer \(6, 4\), decoder \(4, 5\)"):
            directions().apply(wrong, {"smile": 1.0})


def test_other_names_and_turned():
    """Turned, 1 is where -1 was, and codes are read the other way."""
    found, ws = directions(), codes()
    other = found.renamed(["frown", "years"], [True, False])
    assert other.names == ("frown", "years") and other.generator == found.generator
    for strength in (-1.0, 0.5):
        for name, old, sign in (("frown", "smile", -1), ("years", "age", 1)):
            ours, theirs = other.apply(ws, {name: strength}), found.apply(ws, {old: sign * strength})
            for group in found.groups:
                torch.testing.assert_close(ours.groups[group], theirs.groups[group])
    torch.testing.assert_close(other.read(ws), found.read(ws) * torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="name"):
        found.renamed(["a", "a"], [False, False])


@pytest.mark.parametrize("options", [{"names": ["a", "a"]}, {"groups": [["ws", 1, 4]] * 2}, {"names": [1]}])
def test_nonsense(options):
    with pytest.raises(ValueError, match="name"):
        directions(**options)


def test_a_fingerprint_is_of_the_weights():
    torch.manual_seed(0)
    one = StyleSDF(z_dim=6, width=16, depth=2, mapping_layers=2, raw_resolution=16, samples=16)
    other = copy.deepcopy(one)
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.field.distance.bias.add_(1e-3)
    assert fingerprint(one) != fingerprint(other)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A prior, directions of it, and heads that are stylised: their generators are others."""
    folder = tmp_path_factory.mktemp("work")
    result = heads.stylised(folder)
    prior = artifact.load(folder / "prior")
    generator = prior.module("generator")
    groups = [[name, 1, t.shape[2]] for name, t in generator.mean_latents.groups.items()]
    save(folder / "directions", groups, generator, {"prior": prior})
    save(folder / "bare", groups, generator, {})
    other = copy.deepcopy(generator)
    torch.nn.init.ones_(next(other.parameters()))
    save(folder / "other", groups, other, {})
    save(folder / "sized", [["ws", 1, 3]], generator, {"prior": prior})
    artifact.save(folder / "copy", stage="prior", modules={"generator": generator})
    artifact.save(folder / "foreign", stage="prior", modules={"generator": other})
    return folder, Subjects(result)


def save(path, groups, generator, parents):
    made = Directions(["smile"], groups, fingerprint(generator))
    artifact.save(path, stage="directions", modules={"directions": made}, parents=parents)


class TestWhose:
    def test_of_a_generator_and_what_was_made_of_it(self, work):
        folder, stylised = work
        for name in ("directions", "bare"):
            assert directions_for(artifact.load(folder / name), stylised).names == ("smile",)
            assert directions_for(artifact.load(folder / name), Subjects(artifact.load(folder / "copy"))).names == (
                "smile",
            )
        tuned = Subjects(stylised.artifact, "stylised.ann")  # another generator, by its weights
        assert directions_for(artifact.load(folder / "directions"), tuned).names == ("smile",)
        with pytest.raises(UserError, match="fit directions to that one"):
            directions_for(artifact.load(folder / "bare"), tuned)

    def test_of_another(self, work):
        folder, stylised = work
        with pytest.raises(UserError, match=r"other are of the generator [0-9a-f]{12}, the heads of .*stylize of"):
            directions_for(artifact.load(folder / "other"), stylised)
        with pytest.raises(UserError, match="are of the generator"):
            directions_for(artifact.load(folder / "directions"), Subjects(artifact.load(folder / "foreign")))
        with pytest.raises(UserError, match=r"directions are of codes ws \(1, 3\), the generator has"):
            directions_for(artifact.load(folder / "sized"), stylised)

    def test_of_none(self, work, tmp_path):
        folder, stylised = work
        with pytest.raises(UserError, match="has no module 'directions'"):
            directions_for(artifact.load(folder / "prior"), stylised)
        generator = tiny.prior(tmp_path / "p").module("generator")
        artifact.save(tmp_path / "no", stage="x", modules={"directions": generator})
        with pytest.raises(UserError, match="holds no directions, but a ManifoldGenerator"):
            directions_for(artifact.load(tmp_path / "no"), stylised)
