"""LPIPS with a backbone from torchvision or from a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from torch import Tensor

from models.configurable import Configurable
from models.errors import UserError, one_line
from models.features.weights import MissingWeightsError, hub_file, offline_reason, read_state
from models.files import resolve
from models.image import resized

_BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}


class LPIPS(Configurable):
    """LPIPS (Zhang et al. 2018, version 0.1): two (B, 3, H, W) in [-1, 1] -> (B,).

    Args:
        net: backbone.
        weights: "official" for the ImageNet backbone of torchvision, found in torch.hub's cache or downloaded there;
            or the path of that file. The linear heads come with the lpips package.
        size: side to which larger pictures are reduced before they are compared, as StyleGAN2's projector reduces them
            to 256 px: what the network was trained on, for a sixteenth of the memory of 1024. None compares them as
            they are.

    Raises:
        MissingWeightsError: when the backbone is not there and cannot be downloaded.
        UserError: when the file is not that backbone.
    """

    def __init__(
        self, net: Literal["alex", "vgg"] = "alex", weights: str = "official", size: int | None = None
    ) -> None:
        super().__init__()
        if net not in _BACKBONES:
            raise ValueError(f"net must be alex or vgg, got {net!r}")
        if size is not None and size < 32:
            raise UserError(f"LPIPS: size is {size}, its networks need 32 pixels")
        self.size = size
        if weights == "official":
            _download(net)
        if (missing := self.missing(net, weights)) is not None:
            raise missing
        path = _file(net, weights)
        state = read_state(path, f"the {net} backbone")
        import lpips  # its import takes seconds: only when the weights are there

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchvision.models")  # lpips uses its older arguments
            self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        try:
            backbone = {key: state["features." + key.split(".", 1)[1]] for key in self.network.net.state_dict()}
            self.network.net.load_state_dict(backbone, strict=True)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path} is not torchvision's {net} network: {one_line(error)[:200]}") from error

    @staticmethod
    def missing(net: str = "alex", weights: str = "official", size: int | None = None) -> MissingWeightsError | None:
        """What would be missing with these arguments; None when it is on this machine. Nothing is downloaded."""
        path = _file(net, weights)
        return None if path.is_file() else _missing(net, path, "there is no")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.size is not None and a.shape[-1] > self.size:
            a, b = resized(a, self.size), resized(b, self.size)
        return self.network(a, b).flatten()


def _missing(net: str, path: Path, reason: str) -> MissingWeightsError:
    source = f"torchvision's model zoo ({'AlexNet' if net == 'alex' else 'VGG-16'}, ImageNet)"
    return MissingWeightsError(f"LPIPS({net})", path, source, "perceptual.init_args.weights", reason)


def _file(net: str, weights: str) -> Path:
    return hub_file(_BACKBONES[net]) if weights == "official" else resolve(weights)


def _download(net: str) -> None:
    """Into torch.hub's cache, unless it is there.

    Raises:
        MissingWeightsError: when it cannot be.
    """
    file = hub_file(_BACKBONES[net])
    if file.is_file():
        return
    if reason := offline_reason("download.pytorch.org"):
        raise _missing(net, file, reason)
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = AlexNet_Weights.IMAGENET1K_V1 if net == "alex" else VGG16_Weights.IMAGENET1K_V1
    try:
        weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise _missing(net, file, f"the download failed ({one_line(error)[:120]}), there is no") from error
