"""Weights that are not there: one clear sentence, quickly, and never a random network."""

import json
import socket
import time

import pytest
import torch

from models.errors import UserError
from models.features.clip import CLIPEmbedding
from models.features.embedded import EmbeddedStyle
from models.features.identity import ArcFaceIdentity
from models.features.perceptual import LPIPS
from models.features.weights import offline_reason


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Empty caches, and a name server that never answers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("GALATEA_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(30))


CASES = {
    "lpips-alex": (lambda: LPIPS("alex"), "alexnet-owt-7be5be79.pth", "perceptual.init_args.weights"),
    "lpips-vgg": (lambda: LPIPS("vgg"), "vgg16-397923af.pth", "perceptual.init_args.weights"),
    "lpips-file": (lambda: LPIPS("alex", "no/alex.pth"), "no/alex.pth", "perceptual.init_args.weights"),
    "clip-tag": (lambda: CLIPEmbedding(), "open_clip_model.safetensors", "style.init_args.weights"),
    "clip-file": (lambda: CLIPEmbedding(weights="no/clip.pt"), "no/clip.pt", "style.init_args.weights"),
    "arcface": (lambda: ArcFaceIdentity("no/ir.pth"), "no/ir.pth", "identity.init_args.weights"),
    "embedded": (lambda: EmbeddedStyle("no/style.safetensors"), "no/style.safetensors", "style.init_args.weights"),
}


@pytest.mark.parametrize("case", CASES)
def test_missing_weights(case, no_network):
    import open_clip  # noqa: F401  # its import is not what is timed

    make, file, key = CASES[case]
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        make()
    assert time.monotonic() - start < 2
    message = str(error.value)
    assert file in message and key in message
    assert any(place in message for place in ("project page", "model zoo", "features.yaml"))
    assert "\n" not in message


@pytest.mark.parametrize("variable", ["GALATEA_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_mode_does_not_even_ask(variable, no_network, monkeypatch):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(UserError, match=r"offline mode is set and there is no .*vgg16"):
        LPIPS("vgg")


def test_reason(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("GALATEA_OFFLINE", "0")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [])
    assert offline_reason("host") == ""


def test_unknown_names():
    with pytest.raises(UserError, match="neither a file nor a tag of ViT-B-32, which has: openai"):
        CLIPEmbedding(weights="opneai")
    with pytest.raises(ValueError, match="alex or vgg"):
        LPIPS("squeeze")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alex_file(tmp_path_factory):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alex") / "alexnet-owt-7be5be79.pth"
    torch.save(alexnet(weights=None).state_dict(), path)
    return path


def test_lpips_reads_a_local_backbone(alex_file, monkeypatch):
    import lpips

    images = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(alex_file, weights_only=True)
    for key, value in reference.net.state_dict().items():
        value.copy_(state["features." + key.split(".", 1)[1]])
    ours = LPIPS("alex", str(alex_file))
    got = ours(*images)
    torch.testing.assert_close(got, reference(*images).flatten())
    assert got.shape == (3,)
    # The official route finds the same file in torch.hub's cache.
    home = alex_file.parent / "hub" / "checkpoints"
    home.mkdir(parents=True)
    (home / alex_file.name).symlink_to(alex_file)
    monkeypatch.setenv("TORCH_HOME", str(alex_file.parent))
    torch.testing.assert_close(LPIPS("alex")(*images), got)


def test_lpips_reduces_larger_pictures(alex_file):
    images = torch.rand(2, 1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, reduced = LPIPS("alex", str(alex_file)), LPIPS("alex", str(alex_file), size=64)
    small = torch.nn.functional.interpolate(images[:, 0], (64, 64), mode="bilinear", antialias=True)[:, None]
    torch.testing.assert_close(reduced(*images), plain(*small))
    torch.testing.assert_close(reduced(*small), plain(*small))
    with pytest.raises(UserError, match="size is 8"):
        LPIPS("alex", str(alex_file), size=8)


def test_what_is_missing_is_known_without_a_download(alex_file, no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    missing = LPIPS.missing("vgg")
    assert missing is not None and missing.file == str(
        tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    )
    assert missing.source == "torchvision's model zoo (VGG-16, ImageNet)"
    assert LPIPS.missing("alex", str(alex_file)) is None
    absent = CLIPEmbedding.missing()
    assert absent is not None and absent.network == "CLIPEmbedding(ViT-B-32)"
    assert CLIPEmbedding.missing(weights=str(alex_file)) is None  # a file, whatever is in it


def test_lpips_refuses_another_network(alex_file, tmp_path):
    with pytest.raises(UserError, match="is not torchvision's vgg network"):
        LPIPS("vgg", str(alex_file))
    (tmp_path / "x.pth").write_bytes(b"\0" * 64)
    with pytest.raises(UserError, match="cannot be read"):
        LPIPS("alex", str(tmp_path / "x.pth"))


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A small CLIP that open_clip knows by name, and its weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "galatea-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("galatea-tiny", pretrained=None).eval()
    torch.save(model.state_dict(), folder / "weights.pt")
    return model, folder / "weights.pt"


def test_clip_reads_a_file_and_preprocesses_as_open_clip(tiny_clip):
    from open_clip.transform import image_transform
    from PIL import Image

    model, path = tiny_clip
    embedding = CLIPEmbedding("galatea-tiny", str(path))
    assert embedding.dim == 16 and embedding.size == (32, 32)
    pixels = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    smooth = Image.fromarray(pixels.numpy()).resize((80, 80), Image.Resampling.BICUBIC)
    prepared = image_transform(32, is_train=False)(smooth)[None]
    image = torch.from_numpy(__import__("numpy").array(smooth)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        wanted, got = model.encode_image(prepared), embedding(image)
    assert torch.cosine_similarity(got, wanted).item() > 0.999  # Pillow rounds to 8 bits after resizing
    image = image.requires_grad_()
    embedding(image).sum().backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().sum() > 0


def test_clip_activation_follows_the_weights(tiny_clip, tmp_path):
    model, path = tiny_clip
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    plain, quick = CLIPEmbedding("galatea-tiny", str(path)), CLIPEmbedding("galatea-tiny", str(path), quick_gelu=True)
    assert not torch.equal(plain(image), quick(image))
    # OpenAI's own files are TorchScript archives and need the quick form.
    holder = torch.jit.script(Holder(model.visual))
    torch.jit.save(holder, tmp_path / "archive.pt")
    torch.testing.assert_close(CLIPEmbedding("galatea-tiny", str(tmp_path / "archive.pt"))(image), quick(image))


class Holder(torch.nn.Module):
    def __init__(self, visual: torch.nn.Module) -> None:
        super().__init__()
        self.visual = Tree(visual)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Tree(torch.nn.Module):
    """The same parameters under the same names, without the code."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self.register_parameter(name, parameter)
        for name, child in module._modules.items():
            if child is not None:
                self.add_module(name, Tree(child))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_clip_refuses_another_network(tiny_clip, alex_file):
    with pytest.raises(UserError, match="does not hold the image encoder"):
        CLIPEmbedding("galatea-tiny", str(alex_file))
    with pytest.raises(UserError, match="no model 'ViT-Z'"):
        CLIPEmbedding("ViT-Z", str(tiny_clip[1]))
