"""The inversion protocol: its view rule, its values against references, and ranks against one process."""

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from models.camera import Camera
from models.errors import UserError
from models.features.embedded import EmbeddedIdentity, EmbeddedLPIPS
from models.files import ROOT
from models.metrics.consistency import SurfaceRecipe
from models.metrics.distribution import EmbeddedDistribution
from models.metrics.inversion import METRICS, SETS, InversionProtocol, InversionScores, Measured, draws, novel_yaw
from models.metrics.records import read_records
from models.metrics.table import summarise
from models.rendering.output import Rendering
from tests.models.metrics.ball import RIG, look, rendering
from tests.stages import tiny

TINY = SurfaceRecipe(cells=8, levels=1, steps=2, rays=16, coarse=4, fine=2)


@pytest.fixture(scope="module")
def protocol():
    torch.manual_seed(0)
    networks = EmbeddedLPIPS(weights=None), EmbeddedIdentity(weights=None), EmbeddedDistribution(weights=None)
    return InversionProtocol(*networks, surface=TINY, surface_views=3)


def perfect(image, camera):
    """Knows the ball, and puts on its picture what was painted on the input."""
    painted = image - look(camera).image

    def head(views):
        seen = rendering(look(views))
        mark = painted if len(views) == 1 and torch.equal(views.cam2world, camera.cam2world) else 0 * painted
        return seen.replace(image=seen.image + mark)

    return head


def flat(image, camera):
    """Shows the input whatever the camera."""
    return lambda views: Rendering(image.expand(len(views), -1, -1, -1))


def test_novel_yaws_follow_the_papers_rule():
    for index in range(200):
        yaw = -1.2 + 0.012 * index
        found = novel_yaw(yaw, draws(0, str(index), "novel"))
        assert 0.4 <= abs(found) <= 0.5
        again = novel_yaw(yaw, draws(0, str(index), "novel"))
        assert found == again
        drawn = novel_yaw(math.inf, draws(0, str(index), "novel"))  # no input is near: as drawn
        assert found == (-drawn if abs(drawn - yaw) < 0.3 else drawn)
        assert abs(found - yaw) >= 0.3
    both = [novel_yaw(0.0, draws(0, str(i), "novel")) for i in range(400)]
    assert 0.4 < sum(yaw > 0 for yaw in both) / 400 < 0.6
    assert sum(abs(yaw) for yaw in both) / 400 == pytest.approx(0.45, abs=0.005)


def test_the_novel_view_keeps_pitch_and_roll(protocol):
    camera = RIG.camera(0.2, 0.15)
    novel = protocol.novel_view("a", camera, RIG)
    assert float(novel.pitch) == pytest.approx(0.15, abs=1e-5)
    assert 0.4 <= abs(float(novel.yaw)) <= 0.5
    right = novel.cam2world[0, :3, 0]
    assert float(right[1]) == pytest.approx(0, abs=1e-6)  # upright
    assert torch.equal(novel.cam2world, protocol.novel_view("a", camera, RIG).cam2world)
    others = {float(protocol.novel_view(name, camera, RIG).yaw) for name in "bcdefgh"}
    assert len(others) == 7


def test_values_against_torchmetrics(protocol):
    g = torch.Generator().manual_seed(0)
    camera = RIG.camera(0.1)
    image = look(camera).image
    noisy = (image + 0.1 * torch.randn(image.shape, generator=g)).clamp(-1, 1)
    values = protocol("a", image, camera, RIG, lambda *_: flat(noisy, camera)).values
    assert values["psnr"] == pytest.approx(float(peak_signal_noise_ratio(noisy, image, data_range=2.0)), rel=1e-5)
    wanted = structural_similarity_index_measure((noisy + 1) / 2, (image + 1) / 2, data_range=1.0)
    assert values["ssim"] == pytest.approx(float(wanted), rel=1e-4)
    assert values["lpips"] == pytest.approx(float(protocol.perceptual(noisy, image)))
    assert values["id"] == pytest.approx(float((protocol.identity(noisy) * protocol.identity(image)).sum()), rel=1e-5)
    assert values["id_nv"] == values["id"]  # the same picture from everywhere
    assert values["detail"] > 1.1  # noise is high frequency
    assert not values.keys() & {"psnr@far", "mark_error", "psnr_mv"}  # neither truth nor a surface was asked for


def test_a_second_network_judges_identity(protocol):
    """Beside the first; in the table each has the name of its own network."""
    torch.manual_seed(1)
    networks = (held.module for held in (protocol.perceptual, protocol.identity, protocol.distribution))
    both = InversionProtocol(*networks, judge=EmbeddedIdentity(weights=None))
    camera = RIG.camera(0.1)
    image = look(camera).image
    other = image.flip(2)
    values = both("a", image, camera, RIG, lambda *_: flat(other, camera)).values
    assert values["id"] == protocol("a", image, camera, RIG, lambda *_: flat(other, camera)).values["id"]
    assert values["id_judge"] == pytest.approx(float((both.judge(other) * both.judge(image)).sum()), rel=1e-5)
    assert values["id_judge"] != values["id"] and values["id_nv_judge"] == values["id_judge"]
    scores = InversionScores(both.networks, both.distribution.module.num_features)
    scores.update("a", Measured(values, torch.zeros(3, both.distribution.module.num_features)))
    told = {r.metric: r.feature_network for r in scores.records("x")}
    assert told["id_judge"] == both.networks["judge"] and told["psnr"] == ""


def test_the_truth_is_a_perfect_score(protocol):
    camera = RIG.camera(0.1)
    measured = protocol("a", look(camera).image, camera, RIG, perfect, look, surface=True)
    values = measured.values
    assert measured.pictures["line"].shape == (3, 32, 32)
    assert measured.pictures["sweep"].shape == (3, 4 * 32, 6 * 32)  # truth and found, without and with the mark
    assert values["psnr"] == values["psnr@near"] == values["psnr@far"] == values["psnr@hidden"] == math.inf
    for metric in ("lpips", "lpips@far", "lpips@hidden", "depth_mae", "depth_mae@far", "normal_error@near"):
        assert values[metric] == pytest.approx(0, abs=1e-3), metric
    assert values["id"] == pytest.approx(1) and values["detail"] == pytest.approx(1)
    assert values["psnr_carried"] > 25  # but for the sampling of pixels
    assert values["mark_found"] == 0  # this method does not carry the mark along
    assert {"psnr_mv", "ssim_mv"} <= values.keys() <= METRICS.keys()


def test_a_flat_picture_is_worse_from_farther(protocol):
    camera = RIG.camera(0.1)
    values = protocol("a", look(camera).image, camera, RIG, flat, look).values
    assert values["psnr"] == math.inf
    assert values["psnr@far"] < values["psnr@near"] < 30
    assert values["psnr_carried"] < 20
    assert values["mark_found"] == 1 and values["mark_slope"] == pytest.approx(0, abs=0.02)
    assert values["mark_error"] > 2
    assert "depth_mae" not in values


def test_views_beyond_the_rig_are_left_out(protocol):
    seen: list[Camera] = []

    def truth(camera):
        seen.append(camera)
        return look(camera)

    camera = RIG.camera(math.radians(50))
    protocol("a", look(camera).image, camera, RIG, flat, truth)
    assert seen[1].yaw.rad2deg().tolist() == pytest.approx([20, 30, 40, 60], abs=1e-3)
    aside = RIG.camera(math.radians(95))
    assert "psnr@near" not in protocol("a", look(aside).image, aside, RIG, flat, look).values


def test_half_precision_does_not_reach_the_scores(protocol):
    camera = RIG.camera(0.1)
    image = look(camera).image
    wanted = protocol("a", image, camera, RIG, flat, look)
    with torch.autocast("cpu", torch.bfloat16):
        found = protocol("a", image, camera, RIG, flat, look)
    assert found.values == pytest.approx(wanted.values, rel=1e-6, nan_ok=True)
    assert torch.equal(found.features, wanted.features)


def measured(index: int) -> Measured:
    g = torch.Generator().manual_seed(index)
    first = torch.rand(3, generator=g, dtype=torch.float64).tolist()
    values = {"psnr": 20 + first[0], "id_nv": first[1], "mark_error": first[2] if index % 3 else math.nan}
    return Measured(values, torch.randn(3, 4, generator=g, dtype=torch.float64) + torch.arange(3)[:, None])


NETWORKS = {"perceptual": "P", "identity": "I", "distribution": "D", "": ""}


def collected(indices) -> InversionScores:
    scores = InversionScores(NETWORKS, num_features=4)
    for index in indices:
        scores.update(f"item/{index}.png", measured(index))
    return scores


def test_means_and_sets_against_references():
    found = collected(range(8)).compute()
    items = [measured(index) for index in range(8)]
    assert float(found["psnr"]) == pytest.approx(sum(m.values["psnr"] for m in items) / 8)
    marks = [m.values["mark_error"] for m in items if not math.isnan(m.values["mark_error"])]
    assert float(found["mark_error"]) == pytest.approx(sum(marks) / len(marks))
    assert "psnr_mv" not in found  # nobody measured it

    class Given(torch.nn.Module):
        num_features = 4

        def forward(self, x):
            return x

    for metric, row in (("fid", 1), ("fid_nv", 2)):
        wanted = FrechetInceptionDistance(feature=Given())
        for m in items:
            wanted.update(m.features[:1], real=True)
            wanted.update(m.features[row : row + 1], real=False)
        assert float(found[metric]) == pytest.approx(float(wanted.compute()), rel=1e-4)
    assert float(found["kid_nv"]) > float(found["kid"])


def test_ranks_equal_one_process(tmp_path):
    def rank(index: int) -> None:
        torch.distributed.init_process_group("gloo", rank=index, world_size=2)
        scores = collected([index, index + 2, 4] if index == 0 else [1, 3, 0])  # item 0 twice, as samplers pad
        torch.save((scores.compute(), scores.records("v")), tmp_path / f"{index}.pt")
        torch.distributed.destroy_process_group()

    tiny.ranks(rank, 2)
    alone = collected(range(5))
    for index in (0, 1):
        means, records = torch.load(tmp_path / f"{index}.pt", weights_only=False)
        assert means == alone.compute()
        assert list(map(repr, records)) == list(map(repr, alone.records("v")))  # NaN is not equal to itself


def test_records_name_their_networks():
    scores = collected(range(3))
    records = scores.records("tuned", seed=7)
    assert {(r.metric, r.feature_network) for r in records} == {
        ("psnr", ""), ("id_nv", "I"), ("mark_error", ""), ("fid", "D"), ("kid", "D"), ("fid_nv", "D"), ("kid_nv", "D"),
    }  # fmt: skip
    assert {r.item for r in records if r.metric == "psnr"} == {f"item/{i}.png" for i in range(3)}
    assert {r.item for r in records if r.metric == "fid"} == {"all"}
    assert {(r.variant, r.seed, r.protocol) for r in records} == {("tuned", 7, "inversion")}
    with pytest.raises(ValueError, match="unknown metrics: beauty"):
        scores.update("x", Measured({"beauty": 1.0}, torch.zeros(3, 4)))


def test_numbers_that_are_too_small(protocol):
    networks = (protocol.perceptual.module, protocol.identity.module, protocol.distribution.module)
    with pytest.raises(UserError, match="a surface needs two views"):
        InversionProtocol(*networks, surface_views=1)


def test_no_items_have_no_scores():
    empty = InversionScores(NETWORKS, num_features=4)
    assert empty.compute() == {} and empty.records("v") == []
    assert "fid" not in collected([0]).compute()  # one item has no covariance


def test_the_papers_numbers_are_a_file_like_ours():
    records = read_records(ROOT / "docs" / "graminverter")
    assert {r.metric for r in records} <= METRICS.keys() | set(SETS)
    found = {(r.variant, r.metric): r.value for r in records}
    # Table 2, the last row of Table 3, and what the tables share
    assert found["detail", "psnr"] == 21.51 and found["detail", "fid_nv"] == 36.02
    assert found["detail, no depth term", "psnr"] == 23.68 and found["general", "id"] == 0.648
    assert found["pix2NeRF", "psnr_mv"] == 50.66 and ("PIRenderer", "psnr") not in found
    assert len(summarise(records, "general")) == len(records) == len(found)
