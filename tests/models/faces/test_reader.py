"""The whole path on a real face, and its networks: batches, gradients, devices and numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.errors import UserError
from models.faces.identity import chip
from models.faces.pose import yaw_pitch_roll
from models.faces.reader import Face, FaceReader
from models.files import ROOT
from models.image import read_image


@pytest.fixture(scope="module")
def reader() -> FaceReader:
    return FaceReader.load()


@pytest.fixture(scope="module")
def astronaut() -> Tensor:
    return read_image(ROOT / "tests" / "fixtures" / "faces" / "astronaut_256.png")


@pytest.fixture(scope="module")
def face(reader: FaceReader, astronaut: Tensor) -> Face:
    (face,) = reader.find(astronaut)
    return face


def canvas(height: int, width: int) -> Tensor:
    """A picture without a face: soft clouds of colour."""
    draws = torch.Generator().manual_seed(0)
    clouds = torch.rand(1, 3, 5, 7, generator=draws) - 0.5
    return F.interpolate(clouds, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)


def test_where_the_astronauts_face_is(face: Face) -> None:
    """Read off the picture by eye: eyes, nose and corners of the mouth, of a face that is 130 pixels wide."""
    want = torch.tensor([[93.0, 129.5], [149.5, 133.0], [119.0, 164.5], [93.0, 179.0], [147.0, 181.0]])
    assert face.presence > 0.99 and face.score > 0.9
    assert float((face.five - want).norm(dim=1).max()) < 5
    assert float((face.keypoints[:3] - want[:3]).norm(dim=1).max()) < 5


def test_the_finders_points_stand_in_where_the_mesh_is_not_present(face: Face) -> None:
    weak = Face(face.points * 0, 0.2, face.score, face.keypoints, face.box)
    assert float((weak.five - face.five)[:3].norm(dim=1).max()) < 5
    torch.testing.assert_close(weak.five[3:].mean(0), face.keypoints[3])
    assert 30 < float(weak.five[4, 0] - weak.five[3, 0]) < 60  # a mouth at rest; the astronaut's smiles


def test_no_face_is_an_empty_list(reader: FaceReader) -> None:
    assert reader.find(canvas(200, 300)) == []


def test_the_largest_comes_first_and_order_does_not_change(reader: FaceReader, astronaut: Tensor) -> None:
    image = canvas(300, 600)
    image[..., 20:140, 20:140] = F.interpolate(astronaut, (120, 120), mode="bilinear", antialias=True)
    image[..., 40:296, 300:556] = astronaut
    faces = reader.find(image)
    assert [bool(face.box[0] > 250) for face in faces] == [True, False]
    again = reader.find(image)
    assert all(torch.equal(a.points, b.points) for a, b in zip(faces, again, strict=True))


@pytest.mark.parametrize("share", [0.1, 0.05, 0.03])
def test_small_faces_of_wide_pictures(reader: FaceReader, astronaut: Tensor, face: Face, share: float) -> None:
    image = canvas(700, 1000)
    scale = share * 1000 / float(face.box[2] - face.box[0])
    small = F.interpolate(astronaut, scale_factor=scale, mode="bilinear", antialias=scale < 1)[..., :400, :600]
    image[..., 230 : 230 + small.shape[-2], 340 : 340 + small.shape[-1]] = small
    (found,) = reader.find(image)
    want = face.five * scale + torch.tensor([340.0, 230.0])
    assert float((found.five - want).norm(dim=1).max()) < 0.2 * share * 1000


def test_a_very_large_picture_is_read_at_its_own_size(reader: FaceReader, astronaut: Tensor, face: Face) -> None:
    large = F.interpolate(astronaut, (3000, 3000), mode="bilinear", align_corners=False)
    (found,) = reader.find(large)
    assert float((found.points * 256 / 3000 - face.points).norm(dim=1).mean()) < 0.6


@pytest.mark.parametrize("degrees", [-40, 25, 90])
def test_a_turned_head_is_read_upright(reader: FaceReader, astronaut: Tensor, face: Face, degrees: float) -> None:
    from models.faces.crop import cut

    turned = cut(astronaut, torch.tensor([128.0, 128.0]), 256.0, math.radians(-degrees), 256)
    (found,) = reader.find(turned)
    angles = [yaw_pitch_roll(reader.canonical.head_pose(one.points[None])) for one in (face, found)]
    roll = math.degrees(float(angles[1][2] - angles[0][2]))
    assert (roll - degrees + 180) % 360 - 180 == pytest.approx(0, abs=4)
    for a, b in zip(angles[0][:2], angles[1][:2], strict=True):
        assert math.degrees(float(b - a)) == pytest.approx(0, abs=4)


def test_a_mirrored_face_looks_the_other_way(reader: FaceReader, astronaut: Tensor, face: Face) -> None:
    (other,) = reader.find(astronaut.flip(3))
    a, b = (yaw_pitch_roll(reader.canonical.head_pose(one.points[None])) for one in (face, other))
    for one, two, sign in zip(a, b, (-1, 1, -1), strict=True):
        assert math.degrees(float(one) - sign * float(two)) == pytest.approx(0, abs=3)


def framed(astronaut: Tensor) -> Tensor:
    return astronaut[..., 46:256, 18:228]


def test_a_batch_is_its_pictures(reader: FaceReader, astronaut: Tensor) -> None:
    batch = torch.cat([framed(astronaut), framed(astronaut).flip(3), torch.zeros(1, 3, 210, 210)])
    points, presence = reader.mesh(batch)
    assert points.shape == (3, 468, 3)
    assert presence[0] > 0.99 and presence[2] < 0.5
    single = [reader.mesh(one) for one in batch.split(1)]
    torch.testing.assert_close(points, torch.cat([one[0] for one in single]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(presence, torch.cat([one[1] for one in single]), atol=1e-5, rtol=1e-4)
    mask = reader.person(batch)
    assert mask.shape == (3, 1, 210, 210)
    torch.testing.assert_close(mask[1:2], reader.person(batch[1:2]), atol=1e-5, rtol=1e-4)


def test_framed_points_are_those_of_the_whole_path(reader: FaceReader, astronaut: Tensor, face: Face) -> None:
    points, _ = reader.mesh(framed(astronaut))
    there = points[0, :, :2] * 210 + torch.tensor([18.0, 46.0])
    assert float((there - face.points[:, :2]).norm(dim=1).mean()) < 2


def test_points_are_exact_in_mixed_precision(reader: FaceReader, astronaut: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        points, presence = reader.mesh(framed(astronaut).bfloat16().float())
    assert points.dtype == presence.dtype == torch.float32
    torch.testing.assert_close(points, reader.mesh(framed(astronaut).bfloat16().float())[0])


def test_the_whole_path_is_exact_in_mixed_precision(reader: FaceReader, astronaut: Tensor, face: Face) -> None:
    mask, angle = reader.person(astronaut), 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = reader.find(astronaut)
        assert torch.equal(found.points, face.points) and torch.equal(found.box, face.box)
        assert torch.equal(reader.person(astronaut), mask) and mask.dtype == torch.float32
        near = reader.read(astronaut, face.box, angle)[0]
        assert reader.person(astronaut.bfloat16()).dtype == torch.float32
    assert torch.equal(near, reader.read(astronaut, face.box, angle)[0])


def test_gradients_of_points_are_finite_differences(astronaut: Tensor) -> None:
    """In float64, along random changes of the picture, as exact as the networks' kinks allow."""
    reader = FaceReader.load().double()
    image = framed(astronaut).double().requires_grad_()
    weights = torch.randn(1, 468, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(image: Tensor) -> Tensor:
        points, presence = reader.mesh(image)
        return (points * weights).sum() + presence.sum()

    (gradient,) = torch.autograd.grad(value(image), image)
    for seed in range(3):
        change = torch.randn(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step = 1e-8 * change
        with torch.no_grad():
            slope = (value(image + step) - value(image - step)) / 2e-8
        assert float(slope) == pytest.approx(float((gradient * change).sum()), rel=1e-3)


def test_numbers_of_another_kind(astronaut: Tensor, face: Face) -> None:
    reader = FaceReader.load().double()
    (found,) = reader.find(astronaut.double())
    assert found.points.dtype == torch.float64
    torch.testing.assert_close(found.points.float(), face.points, atol=0.05, rtol=0)
    assert next(reader.half().parameters()).dtype == torch.float16


@pytest.mark.gpu
def test_another_device(device: torch.device, astronaut: Tensor, face: Face) -> None:
    reader = FaceReader.load().to(device)
    (found,) = reader.find(astronaut.to(device))
    assert found.points.device.type == device.type
    torch.testing.assert_close(found.points.cpu(), face.points, atol=0.5, rtol=0)


def test_the_mask_is_of_the_person(reader: FaceReader, astronaut: Tensor, face: Face) -> None:
    mask = reader.person(astronaut)[0, 0]
    left, top, right, bottom = (int(edge) for edge in face.box)
    assert float(mask[top:bottom, left:right].mean()) > 0.9
    assert float(mask[5:40, 225:250].mean()) < 0.1  # the wall
    assert float(mask.min()) >= 0 and float(mask.max()) <= 1


def test_the_identitys_square_is_upright_and_centred(reader: FaceReader, astronaut: Tensor, face: Face) -> None:
    """dlib's own points come to lie near where its mean face has them."""
    square = chip(astronaut, face.points)
    assert square.shape == (1, 3, 150, 150)
    points, presence = reader.mesh(square)
    assert presence > 0.9
    inner = points[0, [263, 362, 33, 133, 2], :2]
    want = (torch.tensor([[0.86, 0.21], [0.65, 0.23], [0.12, 0.21], [0.33, 0.23], [0.49, 0.63]]) + 0.25) / 1.5
    assert float((inner - want).norm(dim=1).max()) < 0.06


def test_camera_and_mesh_agree_on_what_is_to_the_right(reader: FaceReader) -> None:
    """The canonical face's left ear is at +x, which a camera in front sees on the right."""
    camera = Camera.look_at(torch.tensor([[0.0, 0, 50]]), torch.zeros(1, 3), 1.0)
    uv, _ = camera.project(reader.canonical.vertices[None, [263, 33]])
    assert uv[0, 0, 0] > uv[0, 1, 0]


def test_missing_and_incomplete_weights(tmp_path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        FaceReader.load(str(tmp_path / "none"))
