"""What anchor and stylize make of a face: a photo of a person on the shipped prior, and what goes on without."""

import dataclasses
import json
import math

import pytest
import torch

from datamodules.anchored import AnchoredArtworks
from datamodules.artworks import Artwork, ArtworkDataModule
from datamodules.items import ItemsDataModule
from models import artifact
from models.errors import UserError
from models.faces.pose import lift
from models.features.landmarks import FaceLandmarks
from models.files import ROOT
from models.generators.gram import GRAMGenerator
from models.generators.manifold import ManifoldGenerator
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from models.heads.codes import HeadCode, HeadCodes
from models.heads.index import Entry, subject_index
from models.heads.tuning import select_parameters
from models.image import resized, write_image
from models.losses.landmarks import landmark_distance
from models.metrics.records import read_records, write_records
from models.rendering.animation import face_views
from stages.__main__ import dispatch
from stages.anchor import AnchorSearch, AnchorStage
from stages.base.seeds import item_generator
from stages.base.stage import ArtifactRef, GeneratorRef
from stages.stylize import StylizeStage, TuningConfig
from tests.models.generators.protocol import awaken
from tests.stages.small import TRAINER, options
from tests.stages.tiny import OPTIONS, fit, network, prior, trainer

PRIOR = str(ROOT / "assets" / "prior")
ALL = {"background": 0.1, "carry": 1.0, "carry_face": 1.0, "landmark": 0.3, "expression": 0.5, "mirror": 1.0}
QUICK = TuningConfig(steps=4, learning_rate=3e-3, pool=3, clip=1.0, direction=0.0, pixel=1.0, rim=0.3)


class Reader(FaceLandmarks):
    """Finds no face in pictures of 64 pixels, at once: to be sure that there is none takes seconds."""

    def find(self, image):
        return None if image.shape[-1] == 64 else super().find(image)


@pytest.fixture(scope="module")
def faces():
    return Reader()


@pytest.fixture(scope="module")
def portrait():
    picture = ROOT / "tests" / "fixtures" / "faces" / "astronaut_256.png"
    (item,) = ArtworkDataModule(str(picture), crop="face").items
    return dataclasses.replace(item, id="astronaut")


@pytest.fixture(scope="module")
def wall():
    """A picture without a face."""
    ramp = torch.linspace(-0.5, 0.5, 64)
    return Artwork("wall", torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)]),
                   angles=(0.0, 0.0), original_size=(64, 64))  # fmt: skip


class Items(ItemsDataModule[Artwork]):
    """Artworks as they are."""

    def __init__(self, *items):
        super().__init__()
        self.given = list(items)

    def read_items(self):
        return self.given


def anchored(folder, generator, *items):
    """An artifact of anchors at the generator's mean head, as stage anchor leaves it."""
    codes, media, entries = {}, {}, []
    for item in items:
        label = None
        if generator.is_3d:
            label = generator.rig.camera(*generator.rig.within(*torch.tensor(item.angles))).label()
        expression = torch.zeros(1, len(generator.expressions))
        codes[item.id] = HeadCode(generator.mean_latents, None, expression, label)
        write_image(folder / f"{item.id}.png", item.image)
        media[f"reference_{item.id}.png"] = folder / f"{item.id}.png"
        entries.append(Entry(item.id, artwork=f"reference_{item.id}.png", caption="anchor"))
    modules = {"generator": generator, "anchors": HeadCodes.pack(codes, generator)}
    extra = {"items": [{"id": item.id} for item in items], **subject_index(entries)}
    return str(artifact.save(folder / "anchors", stage="anchor", modules=modules, media=media, extra=extra).path)


@pytest.fixture(scope="module")
def anchors(portrait, wall, tmp_path_factory):
    """Of a small random generator."""
    generator = prior(tmp_path_factory.mktemp("prior") / "artifact").module("generator")
    return anchored(tmp_path_factory.mktemp("anchors"), generator, portrait, wall)


@pytest.fixture(scope="module")
def heads(portrait, tmp_path_factory):
    """Of the shipped prior, whose heads have faces."""
    generator = artifact.load(PRIOR).module("generator")
    return anchored(tmp_path_factory.mktemp("heads"), generator, portrait)


def stage(anchors, recipe=QUICK, **changes):
    recipe = dataclasses.replace(recipe, **changes)
    return StylizeStage(ArtifactRef(anchors), network("perceptual"), None, Reader(), recipe)


def begun(anchors, items, recipe=QUICK, **changes):
    one = stage(anchors, recipe, **changes)
    one.build_model()
    return one, one.start_group(items)


def advance(one, state, step):
    losses = one.optimise(state, step)
    state.optimizers["weights"].zero_grad(set_to_none=True)
    losses["loss"].sum().backward()
    one.before_step(state)
    state.optimizers["weights"].step()
    return losses


class TestAnchor:
    def found(self, source, portrait, out, steps=12, **search):
        search = AnchorSearch(restarts=1, candidates=4, learning_rate=0.1, perceptual=0.0, **search)
        one = AnchorStage(GeneratorRef(source), network("perceptual"), None, Reader(), search, steps=steps)
        return fit(one, Items(portrait), out)

    def test_the_term_brings_the_points_nearer(self, faces, portrait, tmp_path):
        found = self.found(PRIOR, portrait, tmp_path, pixel=0.0, landmark=1.0)
        code, points = found.module("anchors")["astronaut"], faces.find(portrait.image[None])[None]
        with torch.no_grad():
            image = found.module("generator").synthesis(code.latents, code.camera).image
            distance = float(landmark_distance(faces(image, points), points))
        folder = tmp_path / "items" / "astronaut"
        losses = [float(row.split(",")[1]) for row in (folder / "curve.csv").read_text().split()[1:]]
        assert distance < 0.9 * losses[0] and distance == pytest.approx(min(losses), rel=0.2)
        summary = json.loads((folder / "anchor.json").read_text())
        assert summary["pose"] == "estimated"  # by the mesh

    def test_it_is_added_where_there_is_a_face(self, anchors, faces, portrait, wall):
        search = AnchorSearch(landmark=0.5)
        one = AnchorStage(GeneratorRef(anchors), network("perceptual"), None, faces, search)
        one.build_model()
        targets = one._targets([wall, portrait])
        assert targets.faces.tolist() == [0, 1]
        image = one.generator.synthesis(one.generator.mean_latents, one.generator.rig.camera(0.0)).image
        image = image.repeat_interleave(3, 0)
        one.search = dataclasses.replace(search, landmark=0.0)
        rows = torch.tensor([1, 0, 1])
        plain = one.distance(targets, image, rows)["loss"]
        one.search = search
        added = one.distance(targets, image, rows)["loss"] - plain
        points = faces.find(portrait.image[None])[None]
        wanted = 0.5 * float(landmark_distance(faces(image[:1], points), points))
        assert added.tolist() == pytest.approx([wanted, 0, wanted], abs=1e-5)

    def test_without_a_face_it_goes_on(self, anchors, wall, tmp_path, caplog):
        with caplog.at_level("INFO"):
            found = [
                self.found(anchors, wall, tmp_path / str(weight), steps=2, landmark=weight) for weight in (0.0, 1.0)
            ]
        assert caplog.text.count("wall: no face is found in it as it is framed: it is fitted without") == 1
        one, other = (artifact_.module("anchors")["wall"].latents.ws for artifact_ in found)
        assert torch.equal(one, other)

    def test_without_a_finder(self):
        with pytest.raises(UserError, match=r"search\.landmark has a weight, .* see --model\.landmarks"):
            AnchorStage(GeneratorRef(PRIOR), network("perceptual"), search=AnchorSearch(landmark=0.1))


class TestTerms:
    def test_each_lowers_what_it_is_for(self, heads, portrait):
        others = {"pixel": 0.0, "spatial": 0.001, "views": 0, "rim": 1.0, "steps": 8}
        one, state = begun(heads, [portrait], **others, landmark=1.0, expression=1.0)
        tuned, target = state.item(0).tuned, state.targets[0]

        @torch.no_grad()
        def values():
            terms = [one._terms(tuned, target, state.recipe, item_generator(0, "x", seed)) for seed in range(6)]
            return [sum(float(term[name]) for term in terms) for name in ("landmark", "expression")]

        before = values()
        for step in range(8):
            losses = advance(one, state, step)
        assert set(losses) == {"loss", "spatial", "landmark", "expression"}
        after = values()
        assert all(now < 0.95 * then for now, then in zip(after, before, strict=True)), (before, after)

    def test_one_expression_a_step_as_the_artwork_would_have_it(self, anchors, portrait, faces):
        one, state = begun(anchors, [portrait], expression=1.0)
        target, names = state.targets[0], one.generator.expressions
        assert [names[int(other.expression.argmax())] for other in target.animated] == list(names)
        own = resized(portrait.image[None], one.generator.resolution)
        for name, other in zip(names, target.animated, strict=True):
            assert other.expression.sum() == 1 and other.expression.shape == (1, len(names))
            changed = (other.picture.image - own).abs().amax(1, keepdim=True)
            assert changed.max() > 0.1, name
            weight = other.picture.weight  # more where it is not the artwork's
            assert weight[changed > 0.1].min() > 3 and weight.min() == 1
            assert other.moved.min() >= 1 and other.world is not None
        assert [p for p in select_parameters(one.generator, "synthesis", expression=True) if "expression" in p]
        assert any("expression" in name for name in state.item(0).tuned.names)

    def test_the_background_counts_little(self, anchors, portrait, faces):
        full = begun(anchors, [portrait], rim=1.0)[1].targets[0].reference.weight
        assert torch.equal(full, torch.ones_like(full))
        one, state = begun(anchors, [portrait], rim=1.0, background=0.1)
        weight = state.targets[0].reference.weight
        person = faces.person(portrait.image[None], faces.find(portrait.image[None]))
        small = torch.nn.functional.interpolate(person, weight.shape[-2:], mode="area")
        alpha = one.generator.synthesis(state.targets[0].ws, state.targets[0].camera).alpha
        agree = (small - alpha).abs()
        assert weight[agree < 0.02].min() > 0.9 and weight[agree > 0.98].max() < 0.2
        assert (agree > 0.98).any() and weight.min() >= 0.1 - 1e-6

    def test_the_face_is_carried_by_its_own_mesh(self, anchors, portrait, faces):
        _, plain = begun(anchors, [portrait], carry=1.0)
        one, state = begun(anchors, [portrait], carry=1.0, carry_face=1.0)
        before, after, target = plain.targets[0].reprojected, state.targets[0].reprojected, state.targets[0]
        assert not torch.equal(before.image, after.image) and (after.weight >= before.weight).all()
        depth = one.generator.synthesis(target.ws, target.camera).depth
        points = faces.find(portrait.image[None])
        world = lift(points, target.camera, depth)
        own = face_views(target.reference.image, points, world, faces.canonical, target.pool, depth.shape[-1])
        firm = (own.weight > 0.99).expand_as(own.image)
        assert firm.any()
        torch.testing.assert_close(after.image[firm], own.image[firm], atol=0.02, rtol=0)
        half = begun(anchors, [portrait], carry=1.0, carry_face=0.5)[1].targets[0].reprojected
        nearer = (half.image - before.image).abs().mean(), (after.image - before.image).abs().mean()
        assert 0 < nearer[0] < nearer[1]

    def test_a_head_beside_the_face(self, anchors, portrait):
        """The anchor is nowhere under the face: nothing is carried there, and the fit goes on."""
        aside = dataclasses.replace(portrait, image=portrait.image.roll(64, 2))
        one, state = begun(anchors, [aside], **ALL)
        assert all(value.isfinite().all() for value in advance(one, state, 0).values())

    def test_pictures_with_and_without_a_face_together(self, anchors, portrait, wall, caplog):
        with caplog.at_level("INFO"):
            one, state = begun(anchors, [wall, portrait], **ALL)
        assert caplog.text.count("wall: no face is found in it: landmark, expression and background do not") == 1
        assert state.targets[0].points is None and state.targets[0].animated == []
        losses = advance(one, state, 0)
        assert losses["landmark"][0] == 0 < losses["landmark"][1] and losses["expression"][0] == 0
        assert all(len(value) == 2 and value.isfinite().all() for value in losses.values())

    def test_one_precision(self, anchors, portrait):
        one, state = begun(anchors, [portrait], **ALL)
        with torch.autocast("cpu", torch.bfloat16):
            half = {name: float(value) for name, value in one.optimise(state, 0).items()}
        full = {name: float(value) for name, value in one.optimise(state, 0).items()}
        assert half["landmark"] == pytest.approx(full["landmark"], rel=0.2)

    @pytest.mark.parametrize("changes", [{"landmark": 1.0}, {"expression": 1.0}, {"background": 0.5},
                                         {"carry": 1.0, "carry_face": 1.0}], ids=str)  # fmt: skip
    def test_without_a_finder(self, anchors, changes):
        with pytest.raises(UserError, match=r"need --model\.landmarks, which finds faces"):
            StylizeStage(ArtifactRef(anchors), network("perceptual"), recipe=dataclasses.replace(QUICK, **changes))

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"landmark": -1.0}, r"recipe\.landmark is -1\.0"),
            ({"expression": math.nan}, r"recipe\.expression is nan"),
            ({"background": -0.1}, r"recipe\.background is -0\.1"),
            ({"carry_face": 1.5}, r"recipe\.carry_face is 1\.5: it must be a number from 0 to 1"),
            ({"carry_face": -0.5}, r"recipe\.carry_face is -0\.5"),
        ],
    )
    def test_weights_that_cannot_be(self, changes, match):
        with pytest.raises(UserError, match=match):
            TuningConfig(**changes)


def stylegan2():
    return StyleGAN2Generator(channels=(6, 5, 4), style_dim=7, mapping_layers=2)


def stylesdf():
    decoder = {"channels": (8, 4), "w_dim": 10, "mapping_layers": 2}
    return StyleSDF(z_dim=6, width=8, depth=2, mapping_layers=3, raw_resolution=8, decoder=decoder)


def gram():
    return GRAMGenerator(z_dim=8, width=16, layers=4, mapping_width=16, predictor_width=32, resolution=16)


def manifolds():
    return ManifoldGenerator(**{**OPTIONS, "expressions": []})


@pytest.mark.parametrize("make", [stylegan2, stylesdf, gram, manifolds], ids=lambda make: make.__name__)
def test_any_generator_goes_on_with_what_it_has(make, portrait, tmp_path, caplog):
    torch.manual_seed(0)
    generator = make()
    generator = (generator if make in (gram, manifolds) else awaken(generator)).eval()
    generator.update_mean(16)
    source = anchored(tmp_path, generator, portrait)
    with caplog.at_level("INFO"):
        found = fit(stage(source, steps=2, **ALL), AnchoredArtworks(source), tmp_path / "out")
    assert caplog.text.count("has no expressions that could be drawn: the recipe goes without expression") == 1
    assert ("is 2D: the recipe goes without rim, background, carry_face, carry, mirror" in caplog.text) == (
        make is stylegan2
    )
    (entry,) = found.extra["subjects"]
    assert entry["left_out"] == {}
    changed, before = (found.module(name).state_dict() for name in ("stylised.astronaut", "generator"))
    assert any(not torch.equal(before[name], tensor) for name, tensor in changed.items())


class TestResult:
    def test_artworks_of_the_generators_own_kind_keep_its_expressions(self, anchors, portrait):
        _, far = begun(anchors, [portrait], expression=1.0, expression_beyond=1e-6)
        one, near = begun(anchors, [portrait], expression=1.0, expression_beyond=1e6)
        assert far.targets[0].animated and near.targets[0].animated is None
        assert "expression" not in advance(one, near, 0)
        assert one._left_out(near.item(0).tuned, near.targets[0]) == {}

    def test_expressions_that_fail_are_told(self, anchors, portrait, tmp_path, monkeypatch):
        measured = {"smile": (-0.01, 0.0), "blink": (0.97, 0.01), "mouth_open": (0.12, 0.0)}
        monkeypatch.setattr("stages.stylize.measured_expressions", lambda *_: measured)
        found = fit(stage(anchors, steps=1, landmark=0.3), Items(portrait), tmp_path)
        (entry,) = found.extra["subjects"]
        assert entry["left_out"] == {
            "smile": "the mouth widens by -0.01 of the eyes' distance",
            "blink": "the eyes only close to 0.97 of their opening",
        }

    def test_all_terms_from_the_command_line(self, anchors, tmp_path):
        """The shipped recipe, two steps of it."""
        line = {"model.anchor.path": anchors, "data.init_args.path": anchors, "model.recipe.steps": 2}
        small = {"model.recipe.pool": 2, "model.save_every": 2}
        dispatch(["stylize", "fit", *options({**line, **small, "out": tmp_path / "fit"}), *TRAINER])
        found = artifact.load(tmp_path / "fit")
        assert {entry["id"] for entry in found.extra["subjects"]} == {"astronaut", "wall"}
        recipe = found.extra["recipe"]
        assert min(recipe[name] for name in ("landmark", "expression", "carry_face")) > 0 and recipe["background"] < 1

    def test_what_a_reader_of_faces_sees_is_in_the_table(self, heads, tmp_path, capsys):
        given = {"model.tested.anchor": heads, "data.init_args.path": heads}
        config = f"--config={ROOT / 'configs' / 'stages' / 'stylize_faces.yaml'}"
        dispatch(["stylize", "test", config, *options({**given, "out": tmp_path / "test"}), *TRAINER])
        records = read_records(tmp_path / "test")
        assert {(r.protocol, r.split) for r in records} == {("portrait-faces", ""), ("portrait-picture", "")}
        assert {r.feature_network for r in records if r.protocol == "portrait-faces"} == {"mediapipe"}
        assert {(r.variant, r.item) for r in records} == {("anchor", "astronaut")}
        seen = {r.metric for r in records}
        assert {"face_found", "points", "found_36", "yaw_offset_deg", "yaw_slope", "blink", "mouth_open"} <= seen
        (tmp_path / "other").mkdir()
        write_records(tmp_path / "other", [dataclasses.replace(r, variant="full") for r in records])
        capsys.readouterr()
        dispatch(["table", str(tmp_path), "--baseline", "anchor"])
        table = capsys.readouterr().out
        assert "portrait-faces" in table and "yaw_slope" in table and "full" in table

    def test_what_cannot_be_scored(self, anchors, portrait, tmp_path):
        heads = artifact.load(anchors)
        bare = artifact.save(
            tmp_path / "bare",
            stage="anchor",
            modules={name: heads.module(name) for name in ("generator", "anchors")},
            extra=subject_index([Entry("astronaut")]),
        )
        one = StylizeStage(None, network("perceptual"), landmarks=FaceLandmarks(), tested={"bare": str(bare.path)})
        with pytest.raises(UserError, match="astronaut has no camera and artwork to compare it with"):
            trainer(tmp_path).test(one, datamodule=Items(portrait), verbose=False)
