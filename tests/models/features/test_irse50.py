"""IR-SE50 against numbers recorded from the official network."""

import importlib.util
from pathlib import Path

import pytest
import torch

from models.errors import UserError
from models.features.identity import ArcFaceIdentity
from models.files import ROOT

HERE = ROOT / "tests" / "fixtures" / "parity"
FOLDER = next(f for f in (ROOT.parent / "shared" / "parity", HERE) if (f / "irse50_id" / "io.npz").exists())


def load_recipe():
    spec = importlib.util.spec_from_file_location("parity_recipe", FOLDER / "recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    recipe = load_recipe()
    meta, io = recipe.load_fixture(str(FOLDER / "irse50_id"))
    state = recipe.fixture_state(meta, io, "facenet")
    check = meta["models"]["facenet"]["weights_check"]
    assert recipe.state_checksums(state)["sum_abs"] == pytest.approx(check["sum_abs"], rel=1e-6)
    file: Path = tmp_path_factory.mktemp("weights") / "model_ir_se50.pth"
    torch.save({key: torch.from_numpy(value) for key, value in state.items()}, file)
    return recipe, meta, io, file


def test_numbers_of_the_official_network(parity):
    recipe, meta, io, file = parity
    identity = ArcFaceIdentity(str(file), crop="none").train()  # stays in evaluation mode
    x = torch.from_numpy(io["face/in/image_112"])
    with torch.no_grad():
        first = identity.network.input_layer(x)
        feature = identity(x)
        identity.crop = "ffhq"
        cropped = identity(torch.from_numpy(io["crop/in/image_256"]))
    assert first.shape == (2, 64, 112, 112)
    for name, got in (("face/out/feature", feature), ("crop/out/feature", cropped)):
        result = recipe.compare(meta, name, got.numpy(), io)
        assert result["ok"], result
    with torch.no_grad():
        resized = identity(torch.from_numpy(io["crop/in/image_256"]).repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.cosine_similarity(resized, cropped).item() > 0.9


def test_refuses_other_files(tmp_path):
    with pytest.raises(UserError, match="not an IR-SE50 state dict"):
        torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
        ArcFaceIdentity(str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match="cannot be read"):
        (tmp_path / "b.pth").write_bytes(b"nothing")
        ArcFaceIdentity(str(tmp_path / "b.pth"))
