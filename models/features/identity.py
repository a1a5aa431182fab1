"""Identity embedding by an ArcFace network."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from models import artifact
from models.configurable import Configurable
from models.encoders.irse import ArcFace, crop_face
from models.errors import UserError
from models.features.weights import MissingWeightsError, read_state
from models.files import resolve
from models.zoo import irse50
from models.zoo.family import ZooError


class ArcFaceIdentity(Configurable):
    """ArcFace features of photographs: (B, 3, H, W) in [-1, 1] -> (B, 512) unit vectors.

    Args:
        weights: path of ``model_ir_se50.pth``, whose licence is its publisher's, or of the artifact it was imported to.
        crop: "ffhq" cuts the face out of an FFHQ-aligned picture (rows 35 to 223 and columns 32 to 220 of 256, as
            the identity loss of pSp); "none" takes the picture as an aligned face.

    Raises:
        MissingWeightsError: when there is no such file.
        UserError: when it is not an IR-SE50 state dict.
    """

    def __init__(self, weights: str, crop: Literal["ffhq", "none"] = "ffhq") -> None:
        super().__init__()
        path = resolve(weights)
        if not path.exists():
            source = "the InsightFace_Pytorch project page (TreB1eN)"
            raise MissingWeightsError("ArcFaceIdentity", path, source, "identity.init_args.weights", "there is no")
        self.crop = crop
        self.network = _network(path).eval()
        self.dim = self.network.dim

    def train(self, mode: bool = True) -> ArcFaceIdentity:
        """The network stays in evaluation mode: its batch statistics belong to its weights."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        side = self.network.resolution
        if self.crop == "ffhq":
            image = crop_face(image, side)
        elif image.shape[-2:] != (side, side):
            image = F.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=True)
        return self.network(image)


def _network(path: Path) -> ArcFace:
    if path.is_dir():
        network = artifact.load(path).module("identity")
        if not isinstance(network, ArcFace):
            raise UserError(f"{path} holds a {type(network).__name__} as identity, not an ArcFace network")
        return network
    try:
        return irse50.network(read_state(path, "IR-SE50"))
    except ZooError as error:
        raise UserError(f"{path} is not an IR-SE50 state dict: {error}") from error
