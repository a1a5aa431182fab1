"""Identity embedding by an ArcFace network, or by dlib's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models import artifact
from models.configurable import Configurable
from models.encoders.irse import ArcFace, crop_face
from models.errors import UserError
from models.faces.identity import IDENTITY_COMMAND, IDENTITY_FOLDER, DlibIdentity, chip, load_identity
from models.faces.reader import FaceReader
from models.features.weights import MissingWeightsError, read_state
from models.files import resolve
from models.image import resized
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
        return self.network(self._face(image))

    def early(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 64, 56, 56), the output of the first residual stage."""
        return self.network.trunk(self._face(image))[0]

    def _face(self, image: Tensor) -> Tensor:
        side = self.network.resolution
        if self.crop == "ffhq":
            return crop_face(image, side)
        if image.shape[-2:] != (side, side):
            return F.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=True)
        return image


class FaceIdentity(Configurable):
    """dlib's identity of faces, found by the mesh: (B, 3, H, W) in [-1, 1] -> (B, 128) unit vectors.

    Trained on photographs, and to be trusted on these and on paintings, much less on drawings and cartoons (see
    docs/faces.md). Its own measure is the Euclidean :meth:`distance`; the cosine ranks nearly alike.

    Args:
        weights: "dlib" for what ``galatea zoo import faces`` puts into runs/face_identity, or the path of another such
            artifact.

    Raises:
        MissingWeightsError: when there is no such artifact.
        UserError: when it does not hold that network.
    """

    dim = DlibIdentity.dim

    def __init__(self, weights: str = "dlib") -> None:
        super().__init__()
        path = resolve(IDENTITY_FOLDER if weights == "dlib" else weights)
        if not path.exists():
            source = f"@vladmandic/face-api 1.7.15 by '{IDENTITY_COMMAND}'"
            raise MissingWeightsError("FaceIdentity", path, source, "identity.init_args.weights", "there is no")
        self.network = load_identity(path)
        self.reader = FaceReader.load()

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.descriptors(image), dim=1)

    def descriptors(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 128), not of unit length; of the largest face, or the whole picture where none is found.

        Gradients reach the picture through the square that is cut out, not through the square's place.
        """
        return self.network(torch.cat([self._square(one) for one in image.split(1)]))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,) distances; two pictures of one person are nearer than .6 mostly."""
        return (self.descriptors(a) - self.descriptors(b)).norm(dim=1)

    def _square(self, image: Tensor) -> Tensor:
        faces = self.reader.find(image.detach())
        return chip(image, faces[0].points) if faces else resized(image, self.network.size)


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
