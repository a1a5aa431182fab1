"""E3DGE's protocol: its SSIM against a loop, its values against references, visibility, and the truth's own scores."""

import math

import numpy as np
import pytest
import torch

from models.camera import Camera
from models.errors import UserError
from models.features.embedded import EmbeddedIdentity, EmbeddedLPIPS
from models.image import resized
from models.metrics.e3dge import (
    E3DGEProtocol,
    mae,
    mae_e3dge,
    scan_records,
    ssim_e3dge,
    trajectory,
)
from models.metrics.geometry import at_size, shape_errors
from models.metrics.image import high_frequency
from models.metrics.scan import Scan
from models.rendering.output import Rendering
from models.rendering.visibility import seen_from
from tests.models.metrics.ball import RIG, look, rendering


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return EmbeddedLPIPS(weights=None), EmbeddedIdentity(weights=None), EmbeddedIdentity(weights=None)


@pytest.fixture(scope="module")
def protocol(networks):
    return E3DGEProtocol(*networks, frames=8, chunk=3)


def perfect(image, camera):
    return lambda views: rendering(look(views))


def flat(image, camera):
    """Shows the input whatever the camera."""
    return lambda views: Rendering(image.expand(len(views), -1, -1, -1))


def pair(size: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.interpolate(torch.rand(2, 3, 5, 5, generator=g), size, mode="bicubic").clamp(0, 1)
    truth = 2 * truth - 1
    return (truth + 0.3 * torch.randn(truth.shape, generator=g)).clamp(-1, 1), truth


def test_ssim_against_a_loop():
    """(1 + SSIM) / 2: windows of 5 x 5, Gaussian of deviation 1.5, mirrored borders, constants of values in [0, 1]."""
    image, truth = pair()
    offsets = np.arange(-2, 3)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for found, x, y in zip(ssim_e3dge(image, truth), image.double().numpy(), truth.double().numpy(), strict=True):
        values = []
        for a, b in zip(x, y, strict=True):
            a, b = np.pad(a, 2, mode="reflect"), np.pad(b, 2, mode="reflect")
            for i in range(14):
                for j in range(14):
                    u, v = a[i : i + 5, j : j + 5], b[i : i + 5, j : j + 5]
                    mu, mv = (window * u).sum(), (window * v).sum()
                    uu, vv = (window * u * u).sum() - mu**2, (window * v * v).sum() - mv**2
                    uv = (window * u * v).sum() - mu * mv
                    c1, c2 = 0.01**2, 0.03**2
                    index = (2 * mu * mv + c1) * (2 * uv + c2) / ((mu**2 + mv**2 + c1) * (uu + vv + c2))
                    values.append(1 - (1 - index) / 2)
        assert float(found) == pytest.approx(np.mean(values), rel=1e-4)
    torch.testing.assert_close(ssim_e3dge(truth, truth), torch.ones(2))
    mask = torch.zeros(2, 1, 14, 14)
    mask[:, :, :3, :3] = 1
    local = image.clone()
    local[:, :, 8:] = truth[:, :, 8:]
    torch.testing.assert_close(ssim_e3dge(local, truth, mask), ssim_e3dge(image, truth, mask))


def test_mae_on_both_scales():
    image, truth = pair()
    wanted = np.abs(image.double().numpy() - truth.double().numpy()).mean((1, 2, 3))
    assert mae_e3dge(image, truth).tolist() == pytest.approx(wanted, rel=1e-5)
    assert mae(image, truth).tolist() == pytest.approx(wanted / 2, rel=1e-5)
    assert float(mae_e3dge(torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4))) == 2


def test_the_trajectory_is_the_papers_ellipse():
    rig = RIG.replace(yaw_std=0.3, pitch_std=0.15)
    views = trajectory(rig)
    assert len(views) == 250
    phase = 2 * np.pi * np.arange(250) / 250
    np.testing.assert_allclose(views.yaw.numpy(), 1.5 * 0.3 * np.cos(phase), atol=1e-5)
    np.testing.assert_allclose(views.pitch.numpy(), 1.5 * 0.15 * np.sin(phase), atol=1e-5)
    assert float(trajectory(rig.replace(yaw_max=0.2), 8).yaw.abs().max()) == pytest.approx(0.2)


def test_the_truth_is_a_perfect_score(protocol):
    camera = RIG.camera(0.1)
    scores = protocol("a", look(camera).image, camera, RIG, perfect, look)
    for metric in ("mae", "mae_e3dge", "lpips", "depth_mae", "normal_error"):
        places = ["", "_nv", "_nv@near", "_nv@far"]
        places += ["_nv@seen", "_nv@hidden"] if metric in ("mae", "mae_e3dge", "lpips") else []
        for place in places:
            assert scores[metric + place] == pytest.approx(0, abs=1e-3), metric + place
    for metric in ("ssim", "ssim_e3dge", "detail", "id", "id2", "ssim_nv@hidden", "detail_nv@hidden", "id_nv"):
        assert scores[metric] == pytest.approx(1, abs=1e-4), metric
    assert scores["psnr"] == scores["psnr_nv@hidden"] == math.inf
    assert scores["psnr_carried"] > 25 and scores["mae_carried"] < 0.02  # but for the sampling of pixels
    assert scores.pictures["source"].shape == (3, 32, 64)
    assert scores.pictures["trajectory"].shape == (3, 64, 6 * 32)
    assert scores.distances is None


def test_values_along_the_trajectory_against_a_loop(protocol):
    """The means are those of frames that are rendered and compared one by one, in pieces of any size."""
    camera = RIG.camera(0.1)
    image = look(camera).image
    source = look(camera)
    lists: dict[str, list[float]] = {}
    for view in range(8):
        one = trajectory(RIG, 8)[view]
        true = look(one)
        shown = seen_from(one, true.depth, true.mask, camera, source.depth, source.mask)[0, 0]
        hidden = (true.mask[0, 0] > 0.5) & ~shown
        error = (image - true.image)[0].double().abs() / 2
        lists.setdefault("mae_nv", []).append(float(error.mean()))
        place = "near" if abs(float(one.yaw) - 0.1) <= 0.3 else "far"
        lists.setdefault(f"mae_nv@{place}", []).append(float(error.mean()))
        lists.setdefault("mae_nv@seen", []).append(float(error[:, shown].mean()))
        if int(hidden.sum()) >= 8:
            lists.setdefault("mae_nv@hidden", []).append(float(error[:, hidden].mean()))
        lists.setdefault("lpips_nv", []).append(float(protocol.perceptual(image, true.image)))
        lists.setdefault("id_nv", []).append(float((protocol.identity(image) * protocol.identity(true.image)).sum()))
        ratio = high_frequency(image) / high_frequency(true.image)
        lists.setdefault("detail_nv", []).append(float(ratio))
    found = protocol("a", image, camera, RIG, flat, look)
    assert {"mae_nv@near", "mae_nv@far", "mae_nv@hidden"} <= lists.keys()
    for metric, values in lists.items():
        assert found[metric] == pytest.approx(np.mean(values), rel=1e-4), metric
    assert found["id_input_nv"] == pytest.approx(1, abs=1e-5)  # the same picture from everywhere
    assert found["mae_nv@near"] < found["mae_nv@far"]
    assert ("", "depth_mae") not in found.values  # a picture has no depth


def test_hidden_pixels_are_told_from_seen_ones(protocol):
    """A method that is wrong only where the input shows nothing."""
    camera = RIG.camera(0.4)
    source = look(camera)

    def half(image, camera):
        def head(views):
            true = look(views)
            shown = seen_from(views, true.depth, true.mask, camera, source.depth, source.mask)
            wrong = (true.mask > 0.5) & ~shown
            return Rendering(torch.where(wrong, -true.image, true.image))

        return head

    found = protocol("a", source.image, camera, RIG, half, look)
    assert found["mae_nv@seen"] == 0 and found["lpips_nv@seen"] == 0
    assert found["mae_nv@hidden"] > 0.1 and found["lpips_nv@hidden"] > 0


def test_pictures_without_truth(protocol):
    camera = RIG.camera(0.1)
    found = protocol("a", look(camera).image, camera, RIG, perfect)
    metrics = {metric for _, metric in found.values}
    assert {"mae", "ssim_e3dge", "lpips", "id", "id2", "detail", "id_input_nv", "id_input_nv@far"} <= metrics
    assert not metrics & {"mae_nv", "depth_mae", "psnr_carried", "scan_median"}
    assert 0 < found["id_input_nv@far"] < 1
    assert found.pictures["trajectory"].shape == (3, 32, 6 * 32)


def test_pictures_of_a_large_generator_are_compared_at_the_papers_size(networks):
    """Heads of 64 px measured at 32: as the picture, so the frames."""
    camera = RIG.camera(0.1)
    measure = E3DGEProtocol(*networks, frames=4, side=32)
    image = look(camera).image
    seen: list[Camera] = []

    def large(image, camera):
        return lambda views: seen.append(views) or rendering(look(views, 64))

    found = measure("a", image, camera, RIG, large, look)
    own = resized(look(camera, 64).image, 32)
    assert found["mae"] == pytest.approx(float((own - image).abs().mean()) / 2, rel=1e-5)
    frames = torch.cat([views.cam2world for views in seen[1:3]])
    views = Camera(frames, seen[1].intrinsics[:1].expand(len(frames), -1, -1))
    error = (resized(look(views, 64).image, 32) - look(views).image).abs().mean((1, 2, 3)) / 2
    assert found["mae_nv"] == pytest.approx(float(error.mean()), rel=1e-4)
    assert found.pictures["source"].shape == (3, 32, 64)


def test_a_large_truth_is_compared_at_the_papers_size_too(networks):
    """What a generator shows of its own samples is as large as its pictures."""
    camera = RIG.camera(0.1)
    measure = E3DGEProtocol(*networks, frames=4, side=32)

    def method(image, camera):
        return lambda views: rendering(look(views))

    image = look(camera).image
    found = measure("a", image, camera, RIG, method, lambda views: look(views, 64))
    small = E3DGEProtocol(*networks, frames=4)("a", image, camera, RIG, method, look)
    views = [trajectory(RIG, 4)[i : i + 1] for i in range(4)]
    errors = [(look(view).image - resized(look(view, 64).image, 32)).abs().mean() / 2 for view in views]
    assert found["mae_nv"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)
    assert 0 < found["depth_mae"] < 0.01 and small["depth_mae"] == 0
    assert found["psnr_nv@seen"] > 20 and found["psnr_carried"] == pytest.approx(small["psnr_carried"], abs=3)


def test_the_input_is_no_frame_of_its_own(networks):
    seen: list[int] = []

    def head(image, camera):
        def show(views):
            seen.append(len(views))
            return rendering(look(views))

        return show

    camera = trajectory(RIG, 8)[3]
    found = E3DGEProtocol(*networks, frames=8, per_frame=True)("a", look(camera).image, camera, RIG, head, look)
    assert seen == [1, 7]
    frames = {view for view, _ in found.values} - {""}
    assert frames == {f"frame={i:03d}" for i in range(8) if i != 3}
    assert ("", "mae_nv") not in found.values and ("frame=000", "mae_nv@seen") in found.values
    yaws = [float(trajectory(RIG, 8)[i].yaw - camera.yaw) for i in (0, 4)]
    assert found.values["frame=004", "yaw_distance"] == pytest.approx(abs(yaws[1]), abs=1e-5)
    alone = trajectory(RIG, 1)
    with pytest.raises(UserError, match="no frame but the input"):
        E3DGEProtocol(*networks, frames=1)("a", look(alone).image, alone, RIG, head, look)


def test_coarse_depth_is_compared_at_its_own_size():
    camera = RIG.camera(0.1)
    fine, coarse = look(camera, 64), look(camera, 32)
    found = Rendering(fine.image, depth=coarse.depth, alpha=coarse.mask, normals=coarse.normals)
    errors = shape_errors(found, fine)
    assert float(errors["depth_mae"]) < 0.01 and float(errors["normal_error"]) < 3
    moved = Rendering(fine.image, depth=coarse.depth + 0.25, alpha=coarse.mask)
    assert float(shape_errors(moved, fine)["depth_mae"]) == pytest.approx(0.25, abs=0.01)
    assert shape_errors(moved, fine).keys() == {"depth_mae"}
    assert shape_errors(Rendering(fine.image), fine) == {}
    depth, mask, normals = at_size((2, 2), fine.depth, fine.mask, fine.normals)
    block = fine.depth[0, 0, :32, :32].double()
    assert float(depth[0, 0, 0, 0]) == pytest.approx(float(block.sum() / (block > 0).sum()), rel=1e-5)
    assert float(mask[0, 0, 0, 0]) == pytest.approx(float((block > 0).double().mean()))
    assert normals is not None and normals.norm(dim=1).flatten().tolist() == pytest.approx([1] * 4)


def test_the_scan_of_a_ball(protocol, networks):
    """A ball in place, a ball of another size, which the alignment may undo, and an ellipsoid, which it may not."""
    camera = RIG.camera(0.1)
    front = look(RIG.camera(0.0), 64)
    origins, directions = RIG.camera(0.0).rays(64)
    points = (origins + front.depth.flatten(2).mT * directions)[0][front.mask.flatten() > 0.5]
    corners = [[-0.47, 0.06], [-0.11, 0.06], [0.11, 0.06], [0.47, 0.06], [0.0, -0.3], [-0.22, -0.5], [0.22, -0.5]]
    keypoints = torch.tensor([[x, y, math.sqrt(1 - x * x - y * y)] for x, y in corners])
    scan = Scan(points, keypoints)

    def ball(stretch):
        return lambda image, camera: lambda views: rendering(look(views, 64, stretch))

    image = look(camera, 64).image
    own = protocol("a", image, camera, RIG, ball(1.0), scan=scan)
    assert own["scan_median"] < 2e-3 and own.distances is not None
    assert own["scan_mean"] == pytest.approx(float(own.distances.mean()))
    egg = protocol("a", image, camera, RIG, ball(1.5), scan=scan)
    assert egg["scan_median"] > 5 * own["scan_median"]
    off = E3DGEProtocol(*networks, frames=2, scan=False)("a", image, camera, RIG, ball(1.0), scan=scan)
    assert ("", "scan_median") not in off.values and not off.scanned
    rows = scan_records({"b": egg.distances, "a": own.distances, "c": None}, "mine", seed=2)
    assert {(r.protocol, r.item, r.variant, r.seed, r.split) for r in rows} == {("e3dge", "all", "mine", 2, "test")}
    every = np.concatenate([own.distances.numpy(), egg.distances.numpy()])
    assert {r.metric: r.value for r in rows} == pytest.approx({
        "scan_median_pooled": np.median(every), "scan_mean_pooled": every.mean(), "scan_sd_pooled": every.std(),
        "scan_missing": 1,
    })  # fmt: skip
    assert scan_records({}, "mine") == []


@pytest.mark.parametrize("kind", ["foggy", "without depth", "one pixel", "speck", "not a number"])
def test_a_head_without_a_surface_is_missing(networks, kind):
    """It has no scan distances, all else is measured, and the others' test goes on."""
    camera = RIG.camera(0.1)
    points = torch.nn.functional.normalize(torch.randn(300, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    keypoints = torch.tensor([[x, y, 0.8] for x, y in [(-0.4, 0), (-0.1, 0), (0.1, 0.1), (0.4, 0), (0, -0.3)]])
    scan = Scan(points, torch.cat([keypoints, torch.tensor([[-0.2, -0.5, 0.8], [0.2, -0.5, 0.8]])]))

    def head(views):
        view = look(views)
        depth, alpha, image = view.depth, view.mask.clone(), view.image
        if kind == "foggy":
            alpha = 0.4 * alpha
        elif kind == "without depth":
            depth = torch.full_like(depth, math.nan)
        elif kind in ("one pixel", "speck"):
            side = 1 if kind == "one pixel" else 2
            alpha = torch.zeros_like(alpha)
            alpha[..., 15 : 15 + side, 15 : 15 + side] = 1
        else:
            depth, image = depth + math.nan, image + math.nan
        return Rendering(image, depth=depth, alpha=alpha)

    protocol = E3DGEProtocol(*networks, frames=2)
    found = protocol("a", look(camera).image, camera, RIG, lambda image, camera: head, look, scan=scan)
    assert found.scanned and {"mae", "mae_nv", "id_input_nv"} <= {metric for _, metric in found.values}
    if kind == "speck":  # of two triangles: it is measured, however bad it is
        assert found.distances is not None and found["scan_mean"] > 0.1
    else:
        assert found.distances is None
        assert all(math.isnan(found[f"scan_{name}"]) for name in ("median", "mean", "sd"))
    broken = Scan(points, scan.keypoints * torch.tensor([1.0, 0, 0]))
    if kind == "speck":
        with pytest.raises(UserError, match="no point of the scan lies near"):  # of the data: no method's failure
            protocol("a", look(camera).image, camera, RIG, lambda image, camera: head, scan=broken)


def test_keypoints_that_a_detector_sees(networks):
    """A scan elsewhere, in other units: the detector's points tell where it belongs. Without a face it is missing."""
    camera, front = RIG.camera(0.1), RIG.camera(0.0)
    seven = torch.tensor(
        [[-0.47, 0.06], [-0.11, 0.06], [0.11, 0.06], [0.47, 0.06], [0, -0.3], [-0.22, -0.5], [0.22, -0.5]]
    )
    seven = torch.cat([seven, (1 - seven.square().sum(1, keepdim=True)).sqrt()], 1)
    view = look(front, 64)
    origins, directions = front.rays(64)
    points = (origins + view.depth.flatten(2).mT * directions)[0][view.mask.flatten() > 0.5]
    turn = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])

    class Detector(torch.nn.Module):
        def __init__(self, sees=True):
            super().__init__()
            self.sees = sees

        def find(self, image):
            assert image.shape == (1, 3, 32, 32)
            face = torch.rand(468, 3, generator=torch.Generator().manual_seed(0))
            face[[33, 133, 362, 263, 2, 61, 291], :2] = front.project(seven[None])[0][0]
            return face if self.sees else None

    scan = Scan(100 * points @ turn.T + 7, 100 * seven @ turn.T + 7)
    measured = {}
    for sees in (True, False):
        measure = E3DGEProtocol(*networks, frames=2, keypoints=Detector(sees))
        measured[sees] = measure("a", look(camera).image, camera, RIG, perfect, scan=scan)
    assert measured[True]["scan_median"] < 1 and measured[True].distances is not None
    assert math.isnan(measured[False]["scan_median"]) and measured[False].distances is None


def test_half_precision_does_not_reach_the_scores(protocol):
    camera = RIG.camera(0.1)
    image = look(camera).image
    wanted = protocol("a", image, camera, RIG, flat, look)
    with torch.autocast("cpu", torch.bfloat16):
        found = protocol("a", image, camera, RIG, flat, look)
    assert found.values == pytest.approx(wanted.values, rel=1e-6, nan_ok=True)


def test_records_name_their_networks(protocol):
    camera = RIG.camera(0.1)
    scores = protocol("a", look(camera).image, camera, RIG, perfect, look)
    records = scores.records("item.png", "hybrid", protocol.networks, seed=3, subject="s")
    named = {(record.metric, record.feature_network) for record in records}
    assert {("lpips_nv@hidden", "EmbeddedLPIPS"), ("id2", "EmbeddedIdentity"), ("mae_nv", "")} <= named
    assert ("id_input_nv@far", "EmbeddedIdentity") in named
    assert {(r.protocol, r.version, r.item, r.variant, r.seed, r.subject) for r in records} == {
        ("e3dge", "1", "item.png", "hybrid", 3, "s")
    }
    assert len(records) == len(scores.values)


def test_what_cannot_be_measured(networks):
    with pytest.raises(UserError, match=r"protocol\.frames is 0"):
        E3DGEProtocol(*networks, frames=0)
    camera = RIG.camera(0.1)
    protocol = E3DGEProtocol(*networks, frames=2)
    with pytest.raises(UserError, match="the renderings are 32 px and what they are compared with 64 px"):
        protocol("a", look(camera, 64).image, camera, RIG, perfect, look)

    def larger(camera: Camera):
        return look(camera, 64)

    with pytest.raises(UserError, match="the renderings are 32 px"):
        protocol("a", look(camera).image, camera, RIG, perfect, larger)
