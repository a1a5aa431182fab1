"""Who is portrayed, with which face, under which light: the codes of the embedded world.

A head is a point of a Gaussian latent, ``z ~ N(0, I)`` with ``Z_DIM`` numbers, and an expression,
``len(EXPRESSIONS)`` coefficients in [0, 1]. :meth:`Scene.from_z` maps both deterministically to named
traits. A continuous trait is uniform in its range, ``lo + (hi - lo) * Phi(z_k)`` with Phi the Gaussian
CDF; a discrete one (hair style, glasses, beard) cuts its own ``z_k`` at fixed thresholds.

Layout of z: ``IDENTITY`` (shape, hair, glasses, beard, and the colours of skin, hair, eyes and lips),
then ``SURROUNDINGS`` (RGB of the cloth and of the background), then ``LIGHT`` (x, y, strength, warmth).

A generator without expressions has the face in its code as well: ``CODE_NAMES`` are those of z and ``FACE_AXES``, from
whose numbers, N(0, I) like the others, :func:`face_expression` makes the coefficients. One without cameras has the pose
there, too: ``POSED_NAMES``, see :mod:`datamodules.mannequins.posed`.

All draws are made on the CPU in float64 and rounded to float32, so that they are bit-equal everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError

# Bump whenever any pixel, label or draw changes: caches of older versions are then rebuilt.
WORLD_VERSION = 1

IDENTITY_TRAITS: dict[str, tuple[float, float]] = {
    "head_width": (0.94, 1.09),
    "head_height": (0.96, 1.06),
    "face_width": (0.95, 1.14),
    "jaw_taper": (0.02, 0.20),
    "chin_drop": (-0.06, 0.07),
    "cheek_size": (0.18, 0.26),
    "nose_length": (-0.06, 0.10),
    "nose_width": (0.75, 1.35),
    "nose_lift": (-0.05, 0.06),
    "eye_spacing": (0.255, 0.325),
    "eye_size": (0.135, 0.175),
    "eye_tilt": (-0.12, 0.16),
    "lid_opening": (0.80, 1.10),
    "brow_thickness": (0.020, 0.048),
    "brow_height": (-0.02, 0.045),
    "brow_arch": (0.02, 0.07),
    "mouth_width": (0.19, 0.265),
    "mouth_height": (-0.03, 0.03),
    "lip_fullness": (0.65, 1.40),
    "ear_size": (0.75, 1.25),
    "hair_volume": (0.05, 0.13),
    "hairline": (-0.06, 0.10),
    "hair_length": (0.0, 1.0),
    "parting": (-0.22, 0.22),
    "skin_tone": (0.0, 1.0),
    "skin_warmth": (-1.0, 1.0),
    "blush": (0.35, 1.0),
    "hair_light": (0.0, 1.0),
    "hair_red": (0.0, 1.0),
    "hair_grey": (0.0, 1.0),
    "iris_blue": (0.0, 1.0),
    "iris_green": (0.0, 1.0),
    "lip_colour": (0.0, 1.0),
}
DISCRETE_TRAITS = ("hair_style", "glasses", "beard")
SURROUNDING_TRAITS: dict[str, tuple[float, float]] = {
    "cloth_red": (0.12, 0.85),
    "cloth_green": (0.12, 0.80),
    "cloth_blue": (0.15, 0.85),
    "background_red": (0.40, 0.95),
    "background_green": (0.45, 0.92),
    "background_blue": (0.45, 0.95),
}
LIGHT_TRAITS: dict[str, tuple[float, float]] = {
    "light_x": (-0.8, 0.8),
    "light_y": (0.0, 0.8),
    "light_strength": (0.62, 1.0),
    "light_warmth": (-1.0, 1.0),
}
CONTINUOUS_TRAITS = {**IDENTITY_TRAITS, **SURROUNDING_TRAITS, **LIGHT_TRAITS}

# The order of z. Discrete traits come after the continuous ones of the identity.
Z_NAMES = (*IDENTITY_TRAITS, *DISCRETE_TRAITS, *SURROUNDING_TRAITS, *LIGHT_TRAITS)
Z_DIM = len(Z_NAMES)
IDENTITY = slice(0, len(IDENTITY_TRAITS) + len(DISCRETE_TRAITS))
SURROUNDINGS = slice(IDENTITY.stop, IDENTITY.stop + len(SURROUNDING_TRAITS))
LIGHT = slice(SURROUNDINGS.stop, Z_DIM)

# Ordered so that neighbours look alike; the thresholds give shares of 6, 24, 19, 10, 11, 15 and 15 %.
HAIR_STYLES = ("bald", "short", "fringe", "afro", "bun", "bob", "long")
HAIR_THRESHOLDS = (-1.5548, -0.5244, -0.0251, 0.2275, 0.5244, 1.0364)
GLASSES_THRESHOLD = 0.8416  # 20 % wear glasses
BEARD_THRESHOLD = 0.5244  # 30 % of those whose hair style allows it
BEARD_STYLES = ("bald", "short", "fringe", "afro")

EXPRESSIONS = ("smile", "frown", "mouth_open", "brow_raise", "blink", "pucker")
EXAGGERATIONS = ("big_eyes", "long_face")

FACE_AXES = ("mouth_corners", "mouth_open", "brow_raise", "blink", "pucker")
CODE_NAMES = (*Z_NAMES, *FACE_AXES)
CODE_DIM = len(CODE_NAMES)
POSE_AXES = ("yaw", "pitch")
POSED_NAMES = (*CODE_NAMES, *POSE_AXES)
POSED_DIM = len(POSED_NAMES)
_ACTIVE, _FROWNING = 0.35, 0.2  # shares of the heads whose axis shows something, and whose mouth's corners are down
SPLITS = {"train": range(1_000_000), "val": range(1_000_000, 1_100_000), "test": range(1_100_000, 1_200_000)}

# Everything a head is drawn from, in the order of Scene.parameters(): z's traits with each discrete one
# spelled out as 0/1, the strengths of the exaggerations, then the expression.
PARAMETERS = (*CONTINUOUS_TRAITS, *HAIR_STYLES, "glasses", "beard", *EXAGGERATIONS, *EXPRESSIONS)


def subjects_of(split: str, first: int, count: int) -> range:
    """Numbers of ``count`` subjects of a split, from its ``first`` on.

    Raises:
        UserError: for a split that there is not, or fewer subjects in it.
    """
    if split not in SPLITS or not 0 <= first < first + count <= len(SPLITS[split]):
        raise UserError(f"there are no subjects {first} to {first + count} in split {split!r} ({', '.join(SPLITS)})")
    return SPLITS[split][first : first + count]


def sample_z(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, Z_DIM) latents from N(0, I): CPU, float32, bit-equal for equal generators."""
    return torch.randn(count, Z_DIM, dtype=torch.float64, generator=generator).float()


def subject_z(seeds: Iterable[int]) -> Tensor:
    """(B, Z_DIM) latents of numbered subjects; a subject does not depend on its neighbours in the list."""
    rows = [sample_z(1, torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.cat(rows) if rows else torch.zeros(0, Z_DIM)


def subject_code(seeds: Iterable[int]) -> Tensor:
    """(B, CODE_DIM) codes of numbered subjects: their latents, then their faces."""
    seeds = [int(seed) for seed in seeds]
    faces = [torch.randn(len(FACE_AXES), dtype=torch.float64, generator=stream("face", seed)) for seed in seeds]
    face = torch.stack(faces).float() if faces else torch.zeros(0, len(FACE_AXES))
    return torch.cat([subject_z(seeds), face], 1)


def stream(what: str, *numbers: int) -> torch.Generator:
    """Draws of their own for each purpose. PyTorch takes a seed's lower 32 bits: adding a large number would not do."""
    digest = hashlib.sha256(":".join(map(str, (what, *numbers))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def face_expression(face: Tensor) -> Tensor:
    """Numbers of ``FACE_AXES`` (B, 5), N(0, I), to expressions (B, E): most axes show nothing, the others up to 1."""
    share = torch.special.ndtr(face.double())
    shown = ((share - 1 + _ACTIVE) / _ACTIVE).clamp(0, 1).unbind(1)
    strength: dict[str, Tensor] = dict(zip(FACE_AXES, shown, strict=True))
    strength["smile"] = strength["mouth_corners"]
    strength["frown"] = ((_FROWNING - share[:, FACE_AXES.index("mouth_corners")]) / _FROWNING).clamp(0, 1)
    return torch.stack([strength[name] for name in EXPRESSIONS], 1).float()


def sample_expression(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, E) expressions for training: 15 % neutral, the others with one to three active coefficients.

    An active coefficient is uniform in [0.25, 1], or exactly 1 in a fifth of the cases. A smile and a
    frown never come together.
    """
    size = (count, len(EXPRESSIONS))
    draw = torch.rand(4, *size, dtype=torch.float64, generator=generator)
    rank = draw[0].argsort(1).argsort(1)
    many = draw[1, :, :1]
    active = rank < (1 * (many >= 0.15) + 1 * (many >= 0.55) + 1 * (many >= 0.90))
    strength = torch.where(draw[3] < 0.2, torch.ones(size, dtype=torch.float64), 0.25 + 0.75 * draw[2])
    expression = strength * active
    smile, frown = EXPRESSIONS.index("smile"), EXPRESSIONS.index("frown")
    expression[:, frown] *= (expression[:, smile] == 0) | (rank[:, frown] < rank[:, smile])
    expression[:, smile] *= expression[:, frown] == 0
    return expression.float()


@dataclass(frozen=True)
class Palette:
    """RGB colours in [0, 1] of a batch of heads, each (B, 3)."""

    skin: Tensor
    hair: Tensor
    iris: Tensor
    lips: Tensor
    cloth: Tensor
    background: Tensor


@dataclass(frozen=True)
class Scene:
    """A batch of heads, ready to be drawn.

    Attributes:
        z: (B, Z_DIM) float32, the latent.
        expression: (B, E) float32 in [0, 1], in the order of ``EXPRESSIONS``.
        traits: name -> (B,) float32, all of ``PARAMETERS`` but the expressions.
    """

    z: Tensor
    expression: Tensor
    traits: Mapping[str, Tensor]

    @staticmethod
    def from_z(z: Tensor, expression: Tensor | None = None) -> Scene:
        """The scene of latents ``z`` (B, Z_DIM) and expressions (B, E), or neutral faces.

        Raises:
            ValueError: on wrong shapes, a latent that is not finite, or a coefficient outside [0, 1].
        """
        if z.ndim != 2 or z.shape[1] != Z_DIM:
            raise ValueError(f"z must be (B, {Z_DIM}), got {tuple(z.shape)}")
        if not bool(torch.isfinite(z).all()):
            raise ValueError("z holds numbers that are not finite")
        if expression is None:
            expression = torch.zeros(len(z), len(EXPRESSIONS), device=z.device)
        if expression.shape != (len(z), len(EXPRESSIONS)):
            wanted = (len(z), len(EXPRESSIONS))
            raise ValueError(f"expression must be {wanted} in the order {EXPRESSIONS}, got {tuple(expression.shape)}")
        if not bool(((expression >= 0) & (expression <= 1)).all()):
            raise ValueError("expression coefficients must lie in [0, 1]")
        cumulative = torch.special.ndtr(z.double())
        column = {name: k for k, name in enumerate(Z_NAMES)}
        traits = {
            name: (lo + (hi - lo) * cumulative[:, column[name]]).float() for name, (lo, hi) in CONTINUOUS_TRAITS.items()
        }
        thresholds = torch.tensor(HAIR_THRESHOLDS, device=z.device)
        style = torch.bucketize(z[:, column["hair_style"]].float().contiguous(), thresholds)
        for index, name in enumerate(HAIR_STYLES):
            traits[name] = (style == index).float()
        may_beard = sum(traits[name] for name in BEARD_STYLES)
        traits["glasses"] = (z[:, column["glasses"]] > GLASSES_THRESHOLD).float()
        traits["beard"] = (z[:, column["beard"]] > BEARD_THRESHOLD).float() * may_beard
        traits |= {name: torch.zeros_like(traits["beard"]) for name in EXAGGERATIONS}
        return Scene(z.float(), expression.float(), traits)

    @staticmethod
    def from_code(code: Tensor) -> Scene:
        """The scene of codes (B, CODE_DIM or POSED_DIM), or of latents (B, Z_DIM) with neutral faces.

        Raises:
            ValueError: as :meth:`from_z`.
        """
        if code.shape[1:] not in ((CODE_DIM,), (POSED_DIM,)):
            return Scene.from_z(code)
        z, face = code[:, :CODE_DIM].split((Z_DIM, len(FACE_AXES)), 1)
        return Scene.from_z(z, face_expression(face))

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, index: int | slice | Tensor) -> Scene:
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        traits = {name: value[index] for name, value in self.traits.items()}
        return Scene(self.z[index], self.expression[index], traits)

    @property
    def hair_style(self) -> Tensor:
        """(B,) int64 indices into ``HAIR_STYLES``."""
        return torch.stack([self.traits[name] for name in HAIR_STYLES], 1).argmax(1)

    def repeat_interleave(self, repeats: int) -> Scene:
        """Repeat each head ``repeats`` times in place: (B,) -> (B * repeats,)."""
        return self[torch.arange(len(self), device=self.z.device).repeat_interleave(repeats)]

    def with_expression(self, expression: Tensor) -> Scene:
        """The same heads with other expressions (B, E); exaggerations are kept."""
        return Scene(self.z, Scene.from_z(self.z, expression).expression, self.traits)

    def exaggerate(self, name: str, strength: float = 1.0) -> Scene:
        """A caricature: the named geometric exaggeration, 0 = none, 1 = strong.

        Raises:
            ValueError: when the name is not in ``EXAGGERATIONS``.
        """
        if name not in EXAGGERATIONS:
            raise ValueError(f"unknown exaggeration {name!r}, choose from {EXAGGERATIONS}")
        changed = torch.full_like(self.traits[name], strength)
        return Scene(self.z, self.expression, {**self.traits, name: changed})

    def parameters(self) -> Tensor:
        """(B, len(PARAMETERS)) float32, what the shapes and textures of a head are computed from."""
        named = dict(self.traits) | dict(zip(EXPRESSIONS, self.expression.unbind(1), strict=True))
        return torch.stack([named[name] for name in PARAMETERS], 1)

    def palette(self) -> Palette:
        """The colours of each head."""
        trait = {name: value[:, None] for name, value in self.traits.items()}

        def rgb(*values: float) -> Tensor:
            return self.z.new_tensor(values)

        tone = trait["skin_tone"]
        dark, middle, light = rgb(0.36, 0.21, 0.14), rgb(0.80, 0.55, 0.41), rgb(1.0, 0.84, 0.74)
        skin = torch.where(tone < 0.5, dark.lerp(middle, 2 * tone), middle.lerp(light, 2 * tone - 1))
        skin = skin * (1 + trait["skin_warmth"] * rgb(0.05, 0.0, -0.06))
        # Dark skin goes with dark hair more often than with fair hair, but not always.
        fair = (trait["hair_light"] ** 1.6 * (0.25 + 0.75 * ((tone - 0.2) / 0.4).clamp(0, 1))).clamp(0, 1)
        black, brown, blond = rgb(0.08, 0.06, 0.06), rgb(0.36, 0.20, 0.10), rgb(0.90, 0.69, 0.36)
        hair = torch.where(fair < 0.4, black.lerp(brown, fair / 0.4), brown.lerp(blond, (fair - 0.4) / 0.6))
        red = ((trait["hair_red"] - 0.65) / 0.35).clamp(0, 1) * (fair / 0.25).clamp(0, 1)
        hair = hair.lerp(rgb(0.68, 0.27, 0.10), 0.8 * red)
        hair = hair.lerp(rgb(0.76, 0.75, 0.74), ((trait["hair_grey"] - 0.80) / 0.12).clamp(0, 1))
        iris = rgb(0.30, 0.16, 0.08).lerp(rgb(0.24, 0.48, 0.76), ((trait["iris_blue"] - 0.45) / 0.2).clamp(0, 1))
        iris = iris.lerp(rgb(0.27, 0.52, 0.30), ((trait["iris_green"] - 0.6) / 0.2).clamp(0, 1))
        lips = skin * 0.46 + rgb(0.78, 0.16, 0.22) * (0.34 + 0.26 * trait["lip_colour"])
        cloth, background = (
            torch.cat([trait[f"{part}_{channel}"] for channel in ("red", "green", "blue")], 1)
            for part in ("cloth", "background")
        )
        return Palette(skin.clamp(0, 1), hair.clamp(0, 1), iris, lips.clamp(0, 1), cloth, background)

    def light(self) -> Tensor:
        """(B, 9, 3) spherical-harmonic irradiance, order 2, RGB: multiply with :func:`harmonics` of a normal.

        One key light whose direction, strength and warmth are the ``LIGHT`` dims of z, a dim cool fill
        from the other side, and constant ambient light.
        """
        trait = self.traits
        one = torch.ones_like(trait["light_x"])
        key = F.normalize(torch.stack([trait["light_x"], trait["light_y"], 0.9 * one], 1), dim=1)
        fill = F.normalize(torch.stack([-trait["light_x"], -0.1 * one, 0.3 * one], 1), dim=1)
        tint = trait["light_warmth"][:, None] * key.new_tensor([0.09, 0.01, -0.10]) + key.new_tensor([1.03, 1.0, 0.96])
        key_colour = 0.86 * trait["light_strength"][:, None] * tint
        fill_colour = 0.28 * key.new_tensor([0.88, 0.96, 1.12])
        # The clamped cosine's zonal coefficients pi, 2 pi / 3, pi / 4, over pi.
        band = key.new_tensor([1.0] + 3 * [2 / 3] + 5 * [1 / 4]) * torch.pi
        light = (band * harmonics(key))[..., None] * key_colour[:, None]
        light = light + (band * harmonics(fill))[..., None] * fill_colour
        ambient = torch.zeros_like(light)
        ambient[:, 0] = 0.27 / 0.282095
        return light + ambient


def harmonics(directions: Tensor) -> Tensor:
    """Real spherical harmonics up to order 2 of unit vectors (..., 3): (..., 9)."""
    x, y, z = directions.unbind(-1)
    return torch.stack(
        [
            torch.full_like(x, 0.282095),
            0.488603 * y,
            0.488603 * z,
            0.488603 * x,
            1.092548 * x * y,
            1.092548 * y * z,
            0.315392 * (3 * z * z - 1),
            1.092548 * x * z,
            0.546274 * (x * x - y * y),
        ],
        -1,
    )
