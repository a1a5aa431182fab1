"""The ArcFace identity: where it takes its weights from, and what it makes of pictures of any size."""

import pytest
import torch

from models import artifact
from models.encoders.irse import ArcFace
from models.errors import UserError
from models.features.identity import ArcFaceIdentity
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
