"""True surfaces and keypoints of mannequins, against what is drawn."""

from dataclasses import replace

import pytest
import torch

from datamodules.mannequins import EXPRESSIONS, RIG, SEGMENTS, MannequinDataModule, Scene, render, sample_expression
from datamodules.mannequins.scan import bare, face_scan, keypoints
from datamodules.mannequins.scene import subject_z
from datamodules.mannequins.shapes import distance, named
from datamodules.truth import KnowsScan
from models.metrics.scan import KEYPOINTS, depth_surface, lifted, scan_distances, scan_scores

SIZE = 192


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scene() -> Scene:
    drawn = sample_expression(4, torch.Generator().manual_seed(5))
    drawn[0] = 0
    drawn[:, EXPRESSIONS.index("blink")] = 0  # shut eyes have no white
    found = Scene.from_z(subject_z(range(1_100_000, 1_100_004)), drawn)
    return replace(found, traits=dict(found.traits) | {"big_eyes": torch.tensor([0, 0, 0, 1.0])})


def columns(segmentation: torch.Tensor, *names: str) -> torch.Tensor:
    """Sorted (N,) u in [0, 1] of the pixels of segments."""
    wanted = torch.isin(segmentation.long(), torch.tensor([SEGMENTS.index(name) for name in names]))
    return (wanted.nonzero()[:, 1].sort().values + 0.5) / segmentation.shape[1]


def test_keypoints_are_where_eyes_and_mouth_are_drawn(scene):
    faces = bare(scene)
    for long_face in (0.0, 1.0):
        faces = faces.exaggerate("long_face", long_face)
        found = keypoints(faces)
        drawn = render(faces, RIG.camera(0.0), SIZE, supersample=1)
        uv, depth = RIG.camera(0.0).repeat_interleave(4).project(found.float())
        for points, z, segments, true_depth in zip(uv, depth, drawn.segmentation, drawn.depth, strict=True):
            # Painted edges are soft near the corners, where they meet: the drawn parts end a little before.
            eyes = columns(segments, "eye_white", "iris")
            right, left = eyes[eyes < 0.5], eyes[eyes > 0.5]
            corners = torch.stack([right[0], right[-1], left[0], left[-1]])
            torch.testing.assert_close(points[:4, 0], corners, atol=0.016, rtol=0)
            lips = columns(segments, "lips", "mouth")
            torch.testing.assert_close(points[5:, 0], lips[[0, -1]], atol=0.016, rtol=0)
            pixels = (points * SIZE).long()
            shown = true_depth[0, pixels[:, 1], pixels[:, 0]]
            steep = torch.tensor([0.4, 0.05, 0.05, 0.4, 0.08, 0.08, 0.08])  # large eyes end at the head's side
            assert ((z - shown).abs() < steep).all()


def test_keypoints_lie_on_the_surface_and_mirror_each_other(scene):
    for heads in (scene, bare(scene)):
        for row, points in zip(heads.parameters().double().tolist(), keypoints(heads), strict=True):
            free = distance(named(row), points.T)
            assert float(free.abs().max()) < 1e-6
            before = points + torch.tensor([0, 0, 0.02], dtype=torch.float64)
            assert (distance(named(row), before.T) > 0).all()
    skin = keypoints(bare(scene))
    mirrored = skin[:, [3, 2, 1, 0, 4, 6, 5]] * torch.tensor([-1.0, 1, 1])
    torch.testing.assert_close(mirrored, skin, atol=1e-6, rtol=0)
    assert len(KEYPOINTS) == 7


def test_expressions_move_the_mouth_alone(scene):
    one = bare(scene[0])
    smile = torch.eye(len(EXPRESSIONS))[[EXPRESSIONS.index("smile")]]
    before, after = keypoints(one)[0], keypoints(one.with_expression(smile))[0]
    assert float((after[6, 0] - after[5, 0]) / (before[6, 0] - before[5, 0])) == pytest.approx(1.26, abs=1e-5)
    assert (after[5:, 1] > before[5:, 1] + 0.05).all()
    torch.testing.assert_close(after[:4], before[:4], atol=0.02, rtol=0)


def test_a_scan_is_the_surface(scene):
    scan = face_scan(scene[2], 64)
    free = distance(named(scene.parameters()[2].double().tolist()), scan.points.double().T).abs()
    assert float(free.quantile(0.99)) < 4e-3 and float(free.max()) < 0.03
    assert 300 < len(scan.face()) < len(scan.points)
    with pytest.raises(ValueError, match="of one head, got 4"):
        face_scan(scene)


def test_the_true_depth_is_a_nearly_perfect_reconstruction(scene):
    """What the measure itself errs at 64 px: edges of hair and jaw that lie between two pixels."""
    camera = RIG.camera(0.0)
    for index in (0, 1):
        scan, truth = face_scan(scene[index], 64), render(scene[index], camera, 64)
        vertices, faces = depth_surface(truth.depth, truth.mask, camera)
        points = lifted(scan.keypoints, truth.depth, truth.mask, camera)
        own = scan_scores(scan_distances(scan, vertices, faces, points))
        assert own["scan_median"] < 0.003 and own["scan_mean"] < 0.01
        flat = torch.where(truth.mask > 0.5, truth.depth[truth.mask > 0.5].median(), truth.depth)
        vertices, faces = depth_surface(flat, truth.mask, camera)
        points = lifted(scan.keypoints, flat, truth.mask, camera)
        assert scan_scores(scan_distances(scan, vertices, faces, points))["scan_median"] > 0.04


def test_the_data_module_knows_scans(tmp_path):
    data = MannequinDataModule(test_subjects=1, views_per_subject=1, size=16, cache_dir=str(tmp_path), draw_workers=0)
    data.setup("test")
    sample = data.datasets["test"][0]
    assert isinstance(data, KnowsScan)
    wanted = face_scan(Scene.from_z(sample["z"][None], sample["expression"]))
    assert torch.equal(data.scan_truth(sample).points, wanted.points)
