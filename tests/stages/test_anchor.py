"""The anchor stage on a small random generator: what it finds, and that nothing but its inputs decides it."""

import json
import math

import pytest
import safetensors.torch
import torch

from models import artifact
from models.camera import Camera
from models.errors import UserError
from models.heads.codes import HeadCodes
from stages.anchor import AnchorSearch, AnchorStage
from stages.base.ranks import IndependentRanks
from stages.base.stage import GeneratorRef
from tests.stages import small
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill
from tests.stages.tiny import Portraits, fit, killed, network, prior, psnr, ranks


def line(folder):
    options = {
        "model.prior.path": folder / "tiny",
        "data": "tests.stages.tiny.Portraits",
        "data.path": folder / "tiny",
        "data.count": len(small.IDS),
        "data.tint": 0.4,
        "model.steps": 6,
        "model.search.candidates": 4,
        "model.search.restarts": 2,
        "model.save_every": 2,
        "model.landmarks": "null",
        "model.search.landmark": 0,
    }
    return ["anchor", "fit", *small.options(options), *small.TRAINER]


CASE = StageCase(
    line,
    small.tiny_prior,
    commands={"fit": Command()},
    kills=[Kill("group.safetensors"), Kill("anchor.json", 2), Kill("artifact")],
)

QUICK = AnchorSearch(restarts=2, candidates=4, prune=0.5, refine=0.25, learning_rate=0.1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Path of the prior."""
    return str(prior(tmp_path_factory.mktemp("prior") / "artifact").path)


def stage(source, search=QUICK, **options):
    options = {"steps": 8, "save_every": 3, **options}
    return AnchorStage(GeneratorRef(source), network("perceptual"), network("pose"), search=search, **options)


def curve(out, item="p0"):
    rows = (out / "items" / item / "curve.csv").read_text().split()[1:]
    return [float(row.split(",")[1]) for row in rows]


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """Three artworks, one group each, uninterrupted."""
    out = tmp_path_factory.mktemp("reference")
    return fit(stage(source), Portraits(source, 3), out)


class TestSearch:
    def test_recovers_a_sample_of_the_generator(self, source, tmp_path):
        search = AnchorSearch(restarts=3, candidates=24, prune=0.3, refine=0.3, learning_rate=0.1, schedule="cosine")
        data = Portraits(source)
        found = fit(stage(source, search, steps=50), data, tmp_path)
        losses = curve(tmp_path)
        assert len(losses) == 50 and losses[-1] < 0.1 * losses[0]
        anchors, generator = found.module("anchors"), found.module("generator")
        assert isinstance(anchors, HeadCodes) and anchors.ids == ("p0",)
        anchor = anchors["p0"]
        with torch.no_grad():
            image = generator.synthesis(anchor.latents, anchor.camera).image
        assert psnr(image[0], data.items[0].image) > 32
        assert torch.equal(anchor.label[0], data.items[0].label)

    @pytest.mark.parametrize(
        "search",
        [
            AnchorSearch(),
            AnchorSearch(space="w", start="mean"),
            AnchorSearch(space="w+", restarts=2, candidates=4, schedule="cosine"),
            AnchorSearch(prior=0.1, perceptual=0),
            AnchorSearch(refine=0.5, pixel=0),
        ],
    )
    def test_every_way_descends(self, source, tmp_path, search):
        found = fit(stage(source, search, steps=10), Portraits(source), tmp_path)
        losses = curve(tmp_path)
        assert losses[-1] < losses[0]
        assert (found.module("anchors")["p0"].z is None) == (search.space != "z")

    def test_expression_is_fitted_and_kept(self, source, tmp_path):
        search = AnchorSearch(optimize_expression=True, expression_prior=1e-3, expression_learning_rate=0.1)
        found = fit(stage(source, search), Portraits(source), tmp_path)
        assert found.module("anchors")["p0"].expression.abs().max() > 0.05

    def test_pose_follows_the_picture(self, source, tmp_path):
        data = Portraits(source)
        truth = float(data.items[0].camera.yaw)
        generator = artifact.load(source).module("generator")
        data.items[0].label = generator.rig.camera(truth + 0.15).label()[0]
        search = AnchorSearch(optimize_pose=True, candidates=24, learning_rate=0.1, pose_learning_rate=0.02)
        found = fit(stage(source, search, steps=40), data, tmp_path)
        assert abs(float(found.module("anchors")["p0"].camera.yaw) - truth) < 0.08
        assert found.extra["items"][0]["pose"] == "optimised"

    def test_a_plateau_ends_the_group(self, source, tmp_path):
        search = AnchorSearch(learning_rate=1e-6, patience=2)
        fit(stage(source, search, steps=20, group_size=2), Portraits(source, 3), tmp_path)
        assert {len(curve(tmp_path, item)) for item in ("p0", "p1", "p2")} == {4}

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"start": "mean"}, "the mean is a code of w"),
            ({"restarts": 3, "candidates": 2}, "candidates 0 or at least as many"),
            ({"prune": 0.0}, "prune must be in"),
            ({"restarts": 2, "refine": 0.5}, "prune must not be later"),
        ],
    )
    def test_contradictions(self, options, match):
        with pytest.raises(UserError, match=match):
            AnchorSearch(**options)


class TestCamera:
    def test_estimated_where_it_is_not_given(self, source, tmp_path):
        data = Portraits(source, pose=False)
        found = fit(stage(source, steps=2), data, tmp_path)
        yaw, pitch = network("pose")(data.items[0].image[None])[0].tolist()
        camera = found.module("anchors")["p0"].camera
        assert isinstance(camera, Camera)
        assert float(camera.yaw) == pytest.approx(yaw, abs=1e-4) and float(camera.pitch) == pytest.approx(
            pitch, abs=1e-4
        )
        summary = json.loads((tmp_path / "items" / "p0" / "anchor.json").read_text())
        assert summary["pose"] == "estimated" and summary["yaw_deg"] == pytest.approx(math.degrees(yaw), abs=0.01)

    def test_neither_given_nor_estimated(self, source, tmp_path):
        without = AnchorStage(GeneratorRef(source), network("perceptual"), None, search=QUICK, steps=2)
        with pytest.raises(UserError, match="p0 has no camera: give"):
            fit(without, Portraits(source, pose=False), tmp_path)


class TestRuns:
    def test_what_is_written(self, reference):
        folder = reference.path.parent / "items" / "p1"
        names = {"anchor.safetensors", "anchor.json", "anchor.png", "reference.png", "overlay.png", "curve.csv"}
        assert names <= {path.name for path in folder.iterdir()}
        assert reference.media("reference_p1.png").exists() and reference.module("anchors").ids == ("p0", "p1", "p2")
        assert [entry["id"] for entry in reference.extra["items"]] == ["p0", "p1", "p2"]

    def test_groups_agree_with_singles(self, source, reference, tmp_path):
        together = fit(stage(source, group_size=3), Portraits(source, 3), tmp_path)
        # Sums over another batch are rounded otherwise, and Adam divides small gradients by their size.
        for one, other in zip(reference.module("anchors").buffers(), together.module("anchors").buffers(), strict=True):
            assert torch.allclose(one, other, atol=2e-3)

    def test_same_seed_same_bytes(self, source, reference, tmp_path):
        assert fit(stage(source), Portraits(source, 3), tmp_path).id == reference.id
        assert fit(stage(source, seed=1), Portraits(source, 3), tmp_path / "1").id != reference.id

    def test_killed_and_continued(self, source, reference, tmp_path):
        ranks(lambda _: fit(killed(stage(source), "p1", 5), Portraits(source, 3), tmp_path), 1, kill=True)
        assert (tmp_path / "items" / "p0" / "anchor.json").exists() and not (tmp_path / "artifact").exists()
        assert fit(stage(source), Portraits(source, 3), tmp_path).id == reference.id

    def test_two_processes(self, source, reference, tmp_path):
        options = {"devices": 2, "strategy": IndependentRanks()}
        ranks(lambda _: fit(stage(source), Portraits(source, 3), tmp_path, **options), 2)
        assert artifact.load(tmp_path).id == reference.id

    def test_bf16(self, source, tmp_path):
        found = fit(stage(source), Portraits(source), tmp_path, precision="bf16-mixed")
        assert all(b.isfinite().all() for b in found.module("anchors").buffers())

    def test_a_wrong_artifact(self, tmp_path):
        artifact.save(tmp_path / "a", stage="s")
        with pytest.raises(UserError, match="has no module 'generator', it has: none"):
            stage(str(tmp_path / "a")).build_model()
        anchors = HeadCodes(["x"], [("ws", 2, 3)])
        artifact.save(tmp_path / "b", stage="s", modules={"generator": anchors})
        with pytest.raises(UserError, match="'generator' is not a generator"):
            stage(str(tmp_path / "b")).build_model()


def test_anchor_sets_round_trip(tmp_path):
    anchors = HeadCodes(["b", "a"], [("renderer", 9, 4), ("decoder", 10, 5)], z_dim=3, expressions=["smile"])
    for buffer in anchors.buffers():
        buffer.normal_()
    anchors.label.copy_(torch.cat([torch.eye(4).flatten(), torch.eye(3).flatten()]).expand(2, -1))
    loaded = artifact.save(tmp_path / "a", stage="s", modules={"anchors": anchors}).module("anchors")
    one, other = anchors["a"], loaded["a"]
    assert list(other.latents.groups) == ["renderer", "decoder"]
    assert all(torch.equal(one.latents.groups[g], other.latents.groups[g]) for g in one.latents.groups)
    assert torch.equal(one.z, other.z) and torch.equal(one.expression, other.expression)
    assert "c" not in loaded
    with pytest.raises(KeyError):
        loaded["c"]
    stored = safetensors.torch.load_file(tmp_path / "a" / "anchors.safetensors")
    assert set(stored) == {"latents_renderer", "latents_decoder", "z", "expression", "label"}
