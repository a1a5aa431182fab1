"""The stylize stage on a small random generator: every switch, the undefined first step, exact results, evaluation."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from datamodules.anchored import AnchoredArtworks
from datamodules.mannequin_artworks import MannequinArtworks
from models import artifact
from models.artifact import ArtifactError
from models.augment.pairs import PairAugmentation
from models.errors import UserError
from models.heads.tuning import TunedWeights, select_parameters, with_weights
from models.image import read_image
from models.metrics.records import read_records
from stages.anchor import AnchorSearch, AnchorStage
from stages.base.ranks import IndependentRanks
from stages.base.stage import ArtifactRef, GeneratorRef
from stages.stylize import StylizeStage, TuningConfig
from tests.stages import small
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill
from tests.stages.tiny import Portraits, fit, killed, network, prior, psnr, ranks, trainer


def line(folder):
    options = {
        "model.anchor.path": folder / "anchor",
        "data.path": folder / "anchor",
        "model.recipe.steps": 6,
        "model.recipe.pool": 3,
        "model.save_every": 2,
        "model.landmarks": "null",  # with the face's terms: tests/stages/test_faces.py
        "model.recipe.landmark": 0,
        "model.recipe.expression": 0,
        "model.recipe.carry_face": 0,
        "model.recipe.background": 1,
    }
    return ["stylize", "fit", *small.options(options), *small.TRAINER]


CASE = StageCase(
    line,
    small.tiny_prior,
    needs="anchor",
    commands={"fit": Command()},
    kills=[Kill("group.safetensors", 2), Kill("tuned.safetensors", 3), Kill("artifact")],
)

QUICK = TuningConfig(steps=8, learning_rate=3e-3, pool=3, clip=1.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Path of the prior."""
    return str(prior(tmp_path_factory.mktemp("prior") / "artifact").path)


def anchored(source, data, out, **search):
    search = {"restarts": 1, "candidates": 8, "learning_rate": 0.1, **search}
    return fit(
        AnchorStage(GeneratorRef(source), network("perceptual"), search=AnchorSearch(**search), steps=8), data, out
    )


@pytest.fixture(scope="module")
def anchors(source, tmp_path_factory):
    """Path of the anchors of three tinted portraits."""
    return str(anchored(source, Portraits(source, 3, tint=0.4), tmp_path_factory.mktemp("anchors")).path)


def stage(anchors, recipe=QUICK, **options):
    options = {"save_every": 3, **options}
    return StylizeStage(ArtifactRef(anchors), network("perceptual"), network("style"), recipe=recipe, **options)


def stylised(anchors, out, recipe=QUICK, items=3, precision="32-true", **options):
    data = AnchoredArtworks(anchors)
    data._items = data.items[:items]
    return fit(stage(anchors, recipe, **options), data, out, precision=precision)


@pytest.fixture(scope="module")
def reference(anchors, tmp_path_factory):
    """Three artworks, one group each, uninterrupted."""
    return stylised(anchors, tmp_path_factory.mktemp("reference"))


def begun(anchors, recipe=QUICK, items=1):
    """A stage and its group before the first step, without a trainer."""
    one = stage(anchors, recipe)
    one.build_model()
    return one, one.start_group(AnchoredArtworks(anchors).items[:items])


def advance(one, state, step):
    losses = one.optimise(state, step)
    state.optimizers["weights"].zero_grad(set_to_none=True)
    losses["loss"].sum().backward()
    one.before_step(state)
    return losses


class TestFirstStep:
    """The tuned generator still equals the original: the direction is 0/0."""

    def test_contributes_nothing(self, anchors):
        one, state = begun(anchors)
        with_direction = advance(one, state, 0)
        gradients = [p.grad.clone() for p in state.module.parameters()]
        assert float(with_direction["direction"]) == 0 and all(g.isfinite().all() for g in gradients)
        other, without = begun(anchors, dataclasses.replace(QUICK, direction=0.0))
        advance(other, without, 0)
        for a, b in zip(gradients, without.module.parameters(), strict=True):
            assert torch.allclose(a, b.grad, atol=1e-6)

    def test_is_counted_soon_after(self, anchors):
        one, state = begun(anchors)
        values = []
        for step in range(4):
            values.append(float(advance(one, state, step)["direction"]))
            state.optimizers["weights"].step()
        assert values[0] == 0 and values[-1] > 0

    def test_alone_it_starts_along_the_guide(self, anchors):
        one, state = begun(anchors, dataclasses.replace(QUICK, spatial=0.0))
        first = advance(one, state, 0)
        assert float(first["direction"]) == 0 and first["loss"].isfinite()
        assert any(p.grad.abs().max() > 0 for p in state.module.parameters())

    def test_an_item_that_cannot_move_is_kept_out_of_the_moments(self, anchors):
        one, state = begun(anchors, dataclasses.replace(QUICK, spatial=0.0), items=2)
        state.targets[0] = dataclasses.replace(state.targets[0], guide=None)
        losses = advance(one, state, 0)
        state.optimizers["weights"].step()
        assert losses["loss"][0].item() == 0
        still, moving = (list(item.parameters()) for item in state.module)
        assert all(p.grad is None for p in still) and all(p.grad is not None for p in moving)
        moments = state.optimizers["weights"].state
        assert all(not moments.get(p) for p in still) and all(moments[p] for p in moving)


class TestSwitches:
    @pytest.mark.parametrize(
        "changes",
        [
            {"direction": 0.0, "views": 0},
            {"spatial": 0.0},
            {"spatial": 0.0, "direction_form": "l2"},
            {"views": 2, "augment": PairAugmentation(count=2)},
            {"augment": PairAugmentation(count=0), "normalize_embedding": False},
            {"pixel": 1.0, "rim": 0.2},
            {"pixel": 1.0, "schedule": "cosine", "clip": 0.0},
            {"mirror": 1.0},
            {"mirror": 1.0, "mirror_hidden": False},
            {"carry": 1.0},
            {"carry": 1.0, "carry_fill": 0.0, "spatial": 0.0},
            {"geometry": 1.0, "yaw_max_deg": 20.0},
            {"geometry": 1.0, "pool": None, "views": 2, "mirror": 1.0},
            {"locality": 1e-4, "locality_truncation": 0.5, "betas": (0.9, 0.999)},
            {"latent": "random"},
            {"train": "all"},
            {"train": "affines"},
            {"train": "late"},
            {"train": "backbone"},
        ],
        ids=str,
    )
    def test_runs(self, anchors, changes):
        one, state = begun(anchors, dataclasses.replace(QUICK, **changes))
        before = {n: t.clone() for n, t in state.item(0).tuned.tensors().items()}
        for step in range(3):
            losses = advance(one, state, step)
            state.optimizers["weights"].step()
        assert all(value.isfinite().all() for value in losses.values())
        after = state.item(0).tuned.tensors()
        assert any(not torch.equal(before[name], after[name]) for name in before)

    def test_what_moves(self, source):
        generator = artifact.load(source).module("generator")
        parts = {name: set(select_parameters(generator, name)) for name in ("all", "synthesis", "late", "affines")}
        assert all(names <= parts["all"] for names in parts.values())
        assert parts["late"] < parts["synthesis"]
        assert not any(n.startswith(("map_network", "predictor", "expression")) for n in parts["synthesis"])
        assert any(n.startswith("background") for n in parts["synthesis"])
        assert parts["affines"] and all(".affine." in n for n in parts["affines"])
        assert not any(n.startswith("predictor") for n in select_parameters(generator, "all", "predictor"))

    @pytest.mark.parametrize(("train", "match"), [("nothing", "leaves no parameter"), ("(", "regular expression")])
    def test_a_wrong_part(self, source, train, match):
        with pytest.raises(UserError, match=match):
            select_parameters(artifact.load(source).module("generator"), train)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"direction": -1.0}, "must not be negative"),
            ({"direction": 0.0, "spatial": 0.0}, "no term that could move"),
            ({"views": 0}, "need at least one random view"),
            ({"pool": None, "carry": 1.0}, "null draws new views each step"),
            ({"steps": 0}, "at least 1"),
        ],
    )
    def test_contradictions(self, changes, match):
        with pytest.raises(UserError, match=match):
            TuningConfig(**changes)


class TestResult:
    def test_the_artwork_is_met_and_the_original_kept(self, source, anchors, tmp_path):
        recipe = dataclasses.replace(QUICK, steps=30, pixel=1.0, learning_rate=1e-2)
        found = stylised(anchors, tmp_path, recipe, items=1)
        anchor = found.module("anchors")["p0"]
        artwork = AnchoredArtworks(anchors).items[0].image
        generator, tuned = found.module("generator"), found.module("stylised.p0")
        with torch.no_grad():
            before, after = (g.synthesis(anchor.latents, anchor.camera).image[0] for g in (generator, tuned))
        assert psnr(after, artwork) > psnr(before, artwork) + 3
        original = artifact.load(source).module("generator").state_dict()
        assert all(torch.equal(t, original[n]) for n, t in generator.state_dict().items())

    def test_a_delta_gives_the_same_pictures(self, anchors, tmp_path):
        one, state = begun(anchors)
        for step in range(3):
            advance(one, state, step)
            state.optimizers["weights"].step()
        tuned = state.item(0).tuned
        halves = {n: t.half().float() for n, t in tuned.tensors().items()}
        changed = with_weights(one.generator, halves)
        saved = artifact.save(
            tmp_path / "a",
            stage="s",
            modules={"generator": one.generator, "stylised.x": changed},
            dtype={"stylised.x": "float16"},
            delta_of={"stylised.x": "generator"},
        )
        loaded = artifact.load(saved.path).module("stylised.x")
        target = state.targets[0]
        with torch.no_grad():
            exact = tuned.synthesis(target.ws, target.pool).image
            half = changed.synthesis(target.ws, target.pool).image
            read = loaded.synthesis(target.ws, target.pool).image
        assert torch.equal(read, half)
        assert (read - exact).abs().max() < 0.02  # 16 bits a weight

    def test_what_is_handed_on(self, reference):
        names = {"generator", "anchors", "stylised.p0", "stylised.p1", "stylised.p2"}
        assert set(reference.manifest["modules"]) == names
        assert reference.media("reference_p1.png").exists() and reference.media("views_p1.png").exists()
        assert set(reference.manifest["parents"]) == {"anchor"}

    def test_groups_agree_with_singles(self, anchors, reference, tmp_path):
        together = stylised(anchors, tmp_path, group_size=3)
        for name in ("stylised.p0", "stylised.p1", "stylised.p2"):
            one, other = reference.module(name).state_dict(), together.module(name).state_dict()
            assert all(torch.allclose(one[n], other[n], atol=1e-3) for n in one)

    def test_same_seed_same_bytes(self, anchors, reference, tmp_path):
        assert stylised(anchors, tmp_path).id == reference.id

    def test_killed_and_continued(self, anchors, reference, tmp_path):
        def start(_):
            fit(killed(stage(anchors), "p1", 5), AnchoredArtworks(anchors), tmp_path)

        ranks(start, 1, kill=True)
        assert (tmp_path / "items" / "p0" / "tuned.safetensors").exists() and not (tmp_path / "artifact").exists()
        assert stylised(anchors, tmp_path).id == reference.id

    def test_two_processes(self, anchors, reference, tmp_path):
        options = {"devices": 2, "strategy": IndependentRanks()}
        ranks(lambda _: fit(stage(anchors), AnchoredArtworks(anchors), tmp_path, **options), 2)
        assert artifact.load(tmp_path).id == reference.id

    def test_bf16(self, anchors, tmp_path):
        recipe = dataclasses.replace(QUICK, pixel=1.0, mirror=1.0, carry=1.0)
        found = stylised(anchors, tmp_path, recipe, items=1, precision="bf16-mixed")
        assert all(t.isfinite().all() for t in found.module("stylised.p0").state_dict().values())

    def test_an_artwork_without_an_anchor(self, source, anchors, tmp_path):
        with pytest.raises(UserError, match=r"has no anchor of the artwork p3, it has: p0, p1, p2"):
            fit(stage(anchors), Portraits(source, 4), tmp_path)

    def test_a_wrong_artifact(self, source, tmp_path):
        with pytest.raises(ArtifactError, match="has no module 'anchors', it has: generator"):
            stage(source).build_model()
        with pytest.raises(ArtifactError, match="has no module 'anchors'"):
            _ = AnchoredArtworks(source).items
        artifact.save(tmp_path / "a", stage="s")
        with pytest.raises(ArtifactError, match="has no module 'generator', it has: none"):
            stage(str(tmp_path / "a")).build_model()


class TestTunedWeights:
    def test_leaves_the_original_alone(self, source):
        generator = artifact.load(source).module("generator").requires_grad_(False)
        tuned = TunedWeights(generator, select_parameters(generator, "synthesis"))
        with torch.no_grad():
            for weight in tuned.weights.values():
                weight.add_(0.1)
        codes, camera = generator.mean_latents, generator.rig.camera(0.1)
        before = generator.synthesis(codes, camera).image
        image = tuned.synthesis(codes, camera).image
        assert not torch.allclose(image, before)
        assert torch.equal(generator.synthesis(codes, camera).image, before)
        changed = with_weights(generator, tuned.tensors())
        assert torch.equal(changed.synthesis(codes, camera).image, image.detach())


WORLD = {"split": "val", "subjects": 1, "styles": ["toon"], "size": 32, "views": 3}


@pytest.fixture(scope="module")
def world_anchors(source, tmp_path_factory):
    """Path of the anchor of a portrait of the embedded world."""
    return str(anchored(source, MannequinArtworks(**WORLD), tmp_path_factory.mktemp("world")).path)


@pytest.fixture(scope="module")
def tested(world_anchors, tmp_path_factory):
    """Paths of what is scored: two recipes, and the anchors as they are."""
    recipes = {"full": QUICK, "spatial": dataclasses.replace(QUICK, direction=0.0)}
    folders = {name: tmp_path_factory.mktemp(name) for name in recipes}
    for name, recipe in recipes.items():
        one = stage(world_anchors, dataclasses.replace(recipe, steps=2), seed=3)
        fit(one, MannequinArtworks(**WORLD), folders[name])
    return {**{name: str(folder) for name, folder in folders.items()}, "anchor": world_anchors}


class TestEvaluation:
    def evaluate(self, tested, out):
        one = StylizeStage(None, network("perceptual"), tested=tested, identity=network("identity"))
        trainer(out).test(one, datamodule=MannequinArtworks(**WORLD), verbose=False)
        return read_records(out)

    def test_rows_and_resume(self, tested, tmp_path):
        records = self.evaluate(tested, tmp_path)
        assert {r.variant for r in records} == {"full", "anchor", "spatial"} and {r.split for r in records} == {"val"}
        assert {(r.variant, r.seed) for r in records} == {("full", 3), ("spatial", 3), ("anchor", 0)}
        metrics = {r.metric for r in records}
        assert {"psnr", "ssim@face", "lpips", "identity", "depth_mae", "normal_error", "diversity_ratio"} <= metrics
        errors = [r.value for r in records if r.metric == "camera_error_deg"]
        assert errors == pytest.approx([0.0] * 3, abs=0.05)
        assert len({r.value for r in records if r.metric == "palette"}) == 1  # of the artwork, whatever the method
        start = [r.value for r in records if r.metric == "identity_start"]
        assert len(start) == 3 and all(-1 <= value < 1 for value in start)
        assert {r.view for r in records} >= {"input", "yaw=-36", "yaw=+0", "yaw=+36"}
        unchanged = [r.value for r in records if (r.variant, r.metric) == ("anchor", "diversity_ratio")]
        assert unchanged == [1.0]
        results = sorted(tmp_path.glob("results/*/*/*.csv"))
        assert len(results) == 3 and len(list(tmp_path.glob("strips/*/*.png"))) == 3
        times = [path.stat().st_mtime_ns for path in results]
        results[0].unlink()
        assert self.evaluate(tested, tmp_path) == records
        assert [path.stat().st_mtime_ns for path in results][1:] == times[1:]

    def test_results_are_of_the_artifact_that_was_given(self, tested, tmp_path):
        def scores(path):
            found = self.evaluate({"x": path}, tmp_path)
            return [r.value for r in found if r.metric == "psnr"]

        full, anchor = scores(tested["full"]), scores(tested["anchor"])
        assert full != anchor and scores(tested["full"]) == full

    def test_a_random_latent_is_what_is_scored(self, world_anchors, tmp_path):
        """The codes that were tuned are handed on."""
        recipe = dataclasses.replace(QUICK, steps=1, latent="random", learning_rate=1e-6, pixel=1.0)
        found = fit(stage(world_anchors, recipe), MannequinArtworks(**WORLD), tmp_path)
        (identity,) = found.module("anchors").ids
        shown, before = (found.module("anchors")[identity], artifact.load(world_anchors).module("anchors")[identity])
        assert not torch.equal(shown.latents.ws, before.latents.ws) and torch.equal(shown.label, before.label)
        with torch.no_grad():
            image = found.module("generator").synthesis(shown.latents, shown.camera).image[0]
        assert psnr(image, read_image(found.media(f"stylised_{identity}.png"))[0]) > 35

    def test_a_mapping_that_moves_is_what_is_scored(self, world_anchors, tmp_path):
        """The codes are those of the tuned mapping."""
        recipe = dataclasses.replace(QUICK, steps=4, train="all", freeze="predictor", learning_rate=1e-2)
        found = fit(stage(world_anchors, recipe), MannequinArtworks(**WORLD), tmp_path)
        (identity,) = found.module("anchors").ids
        shown, before = (found.module("anchors")[identity], artifact.load(world_anchors).module("anchors")[identity])
        tuned, original = (found.module(name) for name in (f"stylised.{identity}", "generator"))
        with torch.no_grad():
            moved = tuned.mapping(before.z).ws - original.mapping(before.z).ws
            image = tuned.synthesis(shown.latents, shown.camera).image[0]
        assert float(moved.abs().max()) > 1e-3
        torch.testing.assert_close(shown.latents.ws, before.latents.ws + moved, rtol=1e-4, atol=1e-4)
        assert psnr(image, read_image(found.media(f"stylised_{identity}.png"))[0]) > 35

    def test_where_nobody_knows_the_truth(self, tested, tmp_path):
        """The artwork itself is compared, and the diversity told; no reader of faces is needed."""
        one = StylizeStage(None, network("perceptual"), tested=tested, diversity_pictures=3, diversity_pairs=2)
        trainer(tmp_path).test(one, datamodule=AnchoredArtworks(tested["anchor"]), verbose=False)
        records = read_records(tmp_path)
        assert {(r.protocol, r.split) for r in records} == {("portrait-picture", "")}
        assert {(r.view, r.metric) for r in records} == {
            ("input", "psnr"), ("input", "ssim"), ("input", "lpips"), ("", "diversity_ratio"),
        }  # fmt: skip
        known = self.evaluate(tested, tmp_path / "known")
        for metric in ("psnr", "lpips"):  # the artwork is a drawing of 8 bits
            values = [
                {r.variant: r.value for r in found if (r.view, r.metric) == ("input", metric)}
                for found in (records, known)
            ]
            assert values[0] == pytest.approx(values[1], rel=0.02)

    def test_expressions_act_as_before(self, tested, tmp_path):
        """The change is that of the original head where nothing is tuned, and near it after two steps."""
        one = StylizeStage(None, network("perceptual"), tested=tested)
        one.build_model()
        (identity,) = (item.id for item in AnchoredArtworks(tested["anchor"]).items)
        head = one.heads["full"][identity]
        camera = head.generator.rig.camera(torch.zeros(3))
        faces = SimpleNamespace(camera=camera, expression=torch.cat([torch.zeros(1, 2), 3 * torch.eye(2)]))
        truth = SimpleNamespace(faces=faces)
        with torch.no_grad():
            found = {s.metric: s.value for s in one._expressions(head, head.latents, truth)}
            same = dataclasses.replace(head, generator=head.original)
            still = {s.metric: s.value for s in one._expressions(same, head.latents, truth)}
        assert found.keys() == {f"expression_{k}:{n}" for k in ("kept", "alike") for n in head.generator.expressions}
        kept = [name for name in found if "kept" in name]
        assert [still[name] for name in kept] == pytest.approx([1.0, 1.0], abs=1e-4)
        assert all(0.3 < found[name] < 1 for name in kept)
        assert one._expressions(one.heads["anchor"][identity], head.latents, truth) == []

    def test_the_artwork_warped(self, tested, tmp_path):
        """Along the average head: the artwork itself where it is seen from its own view."""
        heads = {"anchor": tested["anchor"]}
        one = StylizeStage(None, network("perceptual"), tested=heads, warp=True)
        data = MannequinArtworks(**WORLD, frontal=True)
        trainer(tmp_path).test(one, datamodule=data, verbose=False)
        records = read_records(tmp_path)
        views = {r.view: r.value for r in records if (r.variant, r.metric) == ("warp", "psnr")}
        assert views.keys() == {"yaw=-36", "yaw=+36"} and all(5 < value < 60 for value in views.values())
        assert list(tmp_path.glob("strips/warp/*.png"))
        with pytest.raises(UserError, match=r"warp is the name of what --model\.warp scores"):
            StylizeStage(None, network("perceptual"), tested={"warp": tested["anchor"]}, warp=True)

    def test_refusals(self, anchors, tested, tmp_path):
        with pytest.raises(UserError, match="diversity_pictures is 1: pairs need at least 2"):
            StylizeStage(None, network("perceptual"), tested=tested, diversity_pictures=1)
        with pytest.raises(UserError, match=r"name their artifacts as --model\.tested\.NAME"):
            trainer(tmp_path).test(stage(anchors), datamodule=MannequinArtworks(**WORLD), verbose=False)
        with pytest.raises(UserError, match=r"model\.tested is for test"):
            fit(StylizeStage(None, network("perceptual"), tested=tested), MannequinArtworks(**WORLD), tmp_path)
        with pytest.raises(UserError, match=r"give what to stylise as --model\.anchor\.path"):
            StylizeStage(None, network("perceptual")).build_model()
        with pytest.raises(UserError, match=r"recipe\.direction has a weight, .* see --model\.style"):
            StylizeStage(ArtifactRef(anchors), network("perceptual")).build_model()
        with pytest.raises(UserError, match=r"recipe\.train, recipe\.freeze: 'nothing' leaves no parameter"):
            begun(anchors, dataclasses.replace(QUICK, train="nothing"))
