"""AniFaceGAN's generator."""

from models.generators.anifacegan import AniFaceGANGenerator
from tests.models.generators.protocol import GeneratorContract

TINY = {
    "identity": 5, "expression": 4, "noise": 3, "latent": 6, "vae_width": 8, "vae_layers": 2, "deform_width": 12,
    "deform_layers": 2, "deform_mapping_width": 8, "resolution": 16, "width": 16, "layers": 4, "mapping_width": 16,
    "predictor_width": 32, "manifolds": 6, "box": 1.0, "levels": (200, 60), "centre": (0, 0, -12.5),
}  # fmt: skip


class TestAniFaceGAN(GeneratorContract):
    excused = ("identity_vae.", "expression_vae.")  # trained on coefficients, not by rendering

    def make(self):
        return AniFaceGANGenerator(**TINY)
