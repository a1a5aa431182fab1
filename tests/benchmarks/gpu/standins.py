"""The papers' feature networks with random weights: they cost what the real ones do, and need no download."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders.irse import ArcFace, crop_face
from models.image import resized


class RandomLPIPS(nn.Module):
    """As :class:`models.features.perceptual.LPIPS`."""

    def __init__(self, net: str = "vgg", size: int | None = None) -> None:
        super().__init__()
        import lpips

        self.size = size
        self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.size is not None and a.shape[-1] > self.size:
            a, b = resized(a, self.size), resized(b, self.size)
        return self.network(a, b).flatten()


class RandomCLIP(nn.Module):
    """As :class:`models.features.clip.CLIPEmbedding`, of ViT-B-32."""

    dim = 512

    def __init__(self) -> None:
        super().__init__()
        import open_clip

        self.network: nn.Module = open_clip.create_model("ViT-B-32", pretrained=None).visual  # type: ignore[assignment]

    def forward(self, image: Tensor) -> Tensor:
        return self.network(F.interpolate(image, (224, 224), mode="bicubic", align_corners=False, antialias=True))


class RandomIdentity(nn.Module):
    """As :class:`models.features.identity.ArcFaceIdentity`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ArcFace().eval()
        self.dim = self.network.dim

    def train(self, mode: bool = True) -> RandomIdentity:
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        return self.network(crop_face(image, self.network.resolution))
