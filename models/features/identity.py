"""Identity embedding by an ArcFace network."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from models.configurable import Configurable
from models.errors import UserError, one_line
from models.features.irse50 import IRSE50
from models.features.weights import MissingWeightsError, read_state
from models.files import resolve


class ArcFaceIdentity(Configurable):
    """ArcFace features of photographs: (B, 3, H, W) in [-1, 1] -> (B, 512) unit vectors.

    Args:
        weights: path of ``model_ir_se50.pth``; its licence is its publisher's.
        crop: "ffhq" cuts the face out of an FFHQ-aligned picture (rows 35 to 223 and columns 32 to 220 of 256, as
            the identity loss of pSp); "none" takes the picture as an aligned face.

    Raises:
        MissingWeightsError: when there is no such file.
        UserError: when it is not an IR-SE50 state dict.
    """

    dim = 512

    def __init__(self, weights: str, crop: Literal["ffhq", "none"] = "ffhq") -> None:
        super().__init__()
        path = resolve(weights)
        if not path.is_file():
            source = "the InsightFace_Pytorch project page (TreB1eN)"
            raise MissingWeightsError("ArcFaceIdentity", path, source, "identity.init_args.weights", "there is no")
        self.crop = crop
        self.network = IRSE50()
        try:
            self.network.load_state_dict(read_state(path, "IR-SE50"), strict=True)
        except RuntimeError as error:
            raise UserError(f"{path} is not an IR-SE50 state dict: {one_line(error)[:200]}") from error
        self.network.eval()

    def train(self, mode: bool = True) -> ArcFaceIdentity:
        """The network stays in evaluation mode: its batch statistics belong to its weights."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        if self.crop == "ffhq":
            if image.shape[-2:] != (256, 256):
                image = F.interpolate(image, (256, 256), mode="bilinear", align_corners=False, antialias=True)
            image = F.adaptive_avg_pool2d(image[:, :, 35:223, 32:220], 112)
        elif image.shape[-2:] != (112, 112):
            image = F.interpolate(image, (112, 112), mode="bilinear", align_corners=False, antialias=True)
        return self.network(image)
