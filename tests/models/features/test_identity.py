"""The identities: where they take their weights from, and what they make of pictures of any size."""

import pytest
import torch

from models import artifact
from models.encoders.irse import ArcFace
from models.errors import UserError
from models.faces.identity import DlibIdentity, chip
from models.features.base import FaceRecognition
from models.features.identity import ArcFaceIdentity, FaceIdentity
from models.features.weights import MissingWeightsError
from models.files import ROOT
from models.image import read_image
from models.zoo.irse50 import official_state


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ArcFace(32, 16, widths=(4, 6, 8, 10), depths=(1, 2, 1, 1), reduction=2).eval()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model_ir_se50.pth"
    torch.save(official_state(network), path)
    return path


@torch.no_grad()
def test_pictures_of_any_size(network, file):
    identity = ArcFaceIdentity(str(file), crop="none").train()  # the network stays in evaluation mode
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert identity.dim == 16
    torch.testing.assert_close(identity(image), network(image))
    torch.testing.assert_close(identity(image).norm(dim=1), torch.ones(2))
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.cosine_similarity(identity(large), identity(image)).min() > 0.9
    identity.crop = "ffhq"
    photograph = torch.rand(1, 3, 256, 256) * 2 - 1
    torch.testing.assert_close(
        identity(photograph)[0], identity(photograph.repeat_interleave(2, 2)).squeeze(), atol=0.1, rtol=0
    )


@torch.no_grad()
def test_early_features(network, file):
    """What comes out of the first stage, of the face that identity sees."""
    identity = ArcFaceIdentity(str(file), crop="none")
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    found = identity.early(image)
    small = torch.nn.functional.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, network.trunk(small)[0])
    assert found.shape == (2, 4, 16, 16) and isinstance(identity, FaceRecognition)


@torch.no_grad()
def test_an_imported_network(network, file, tmp_path):
    artifact.save(tmp_path / "identity", stage="zoo", modules={"identity": network})
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(ArcFaceIdentity(str(tmp_path / "identity"))(image), ArcFaceIdentity(str(file))(image))


def test_refuses_other_files(tmp_path):
    with pytest.raises(UserError, match="not an IR-SE50 state dict"):
        torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
        ArcFaceIdentity(str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match="cannot be read"):
        (tmp_path / "b.pth").write_bytes(b"nothing")
        ArcFaceIdentity(str(tmp_path / "b.pth"))


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory):
    """The network with made-up weights: what surrounds it is tested here."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "identity"
    artifact.save(folder, stage="zoo", modules={"identity": DlibIdentity()})
    return FaceIdentity(str(folder))


def test_the_found_face_is_what_is_described(descriptors):
    image = read_image(ROOT / "tests" / "fixtures" / "faces" / "astronaut_256.png")
    wide = torch.nn.functional.pad(image, (90, 30, 20, 70), value=-1.0)
    without = torch.zeros(1, 3, *wide.shape[-2:])
    both = torch.cat([wide, without])
    points = descriptors.reader.find(wide)[0].points
    with torch.no_grad():
        want = descriptors.network(torch.cat([chip(wide, points), torch.zeros(1, 3, 150, 150)]))
        torch.testing.assert_close(descriptors.descriptors(both), want)
        torch.testing.assert_close(descriptors(both), want / want.norm(dim=1, keepdim=True))
        torch.testing.assert_close(descriptors.distance(wide, without), (want[:1] - want[1:]).norm(dim=1))
    wide.requires_grad_()
    descriptors(wide)[0, 0].backward()
    assert wide.grad is not None
    assert wide.grad[..., 60:240, 130:300].abs().sum() > 0 and wide.grad[..., :60].abs().sum() == 0


def test_dlibs_network_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("models.features.identity.IDENTITY_FOLDER", "runs/nowhere")
    with pytest.raises(MissingWeightsError, match=r"galatea zoo import faces .* identity\.init_args\.weights"):
        FaceIdentity()
    artifact.save(tmp_path / "other", stage="zoo", modules={"identity": ArcFace(32, 16, (4,), (1,), 2)})
    with pytest.raises(UserError, match="holds a ArcFace as identity, not dlib's network"):
        FaceIdentity(str(tmp_path / "other"))
