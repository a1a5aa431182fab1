"""e4e: ``e4e_ffhq_encode.pt`` and its kind. Files as pSp's, see there."""

from models.encoders.pyramid import Encoder4Editing
from models.zoo.psp import family

FAMILY = family(
    "e4e",
    Encoder4Editing,
    "e4e_ffhq_encode.pt, e4e_cars_encode.pt, e4e_horse_encode.pt, e4e_church_encode.pt",
    "omertov/encoder4editing",
)
