"""What an artifact lets one look at: heads, each with its generator, code, expression and camera.

An artifact holds ``generator``; after artworks were fitted also ``anchors`` (:class:`models.heads.codes.HeadCodes`),
and after stylisation one ``stylised.ID`` per artwork. Where photos were inverted with details, it holds ``detail``
(:class:`models.encoders.detail.DetailReconstructor`) and the photos beside their anchors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.artifact import Artifact, ArtifactError
from models.camera import Camera
from models.encoders.base import Encoder
from models.encoders.detail import DetailReconstructor
from models.errors import UserError
from models.generators.baked import BakedHead
from models.generators.base import Generator
from models.generators.manifold import ManifoldGenerator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.detailed import DetailedGenerator
from models.heads.photos import PhotoSet
from models.image import read_image, resized
from models.latents import Latents
from models.rendering.output import Rendering

STYLISED = "stylised."  # prefix of the modules that hold one artwork's generator
TRUNCATION = 0.7  # of sampled subjects: typical rather than extreme heads


@dataclass
class Subject:
    """One head to look at.

    Attributes:
        id: of the artwork, or ``subject-N`` of a sampled head.
        generator: what to show.
        original: the generator before stylisation, ``None`` when there was none.
        latents: a batch of one.
        expression: (1, E) the head's own, E = 0 where the generator cannot animate.
        camera: of the artwork, ``None`` of a sampled head and in a 2D generator.
        artwork: (3, H, W) in [-1, 1], where the artifact holds it.
    """

    id: str
    generator: Generator
    original: Generator | None
    latents: Latents
    expression: Tensor
    camera: Camera | None = None
    artwork: Tensor | None = None

    @cached_property
    def _between(self) -> Generator:
        return copy.deepcopy(self.generator)

    def styled(self, strength: float) -> Generator:
        """The generator whose weights lie at ``strength`` between the original (0) and the stylised one (1).

        Outside of [0, 1] the difference is exaggerated or reversed. Without an original it is the generator.
        The result is valid until the next call.
        """
        if self.original is None or strength == 1:
            return self.generator
        if strength == 0:
            return self.original
        before, after = self.original.state_dict(), self.generator.state_dict()
        with torch.no_grad():
            for name, tensor in self._between.state_dict().items():
                # Untouched where equal, so that what is cached for those weights stays valid.
                if tensor.is_floating_point() and not torch.equal(before[name], after[name]):
                    tensor.copy_(torch.lerp(before[name], after[name], strength))
        return self._between

    def baked(self, size: int, expression: Tensor | None = None, strength: float = 1.0) -> BakedHead | None:
        """The head on its surfaces, None where it has none; ``size`` as of ``bake``, ``expression`` (1, E)."""
        code = self.expression if expression is None else expression
        ws = self.latents
        return self.styled(strength).bake(ws, size, expression=code if code.shape[1] else None, stride=2)


class Subjects:
    """The subjects of an artifact, by id; networks are read when a subject is asked for.

    Args:
        artifact: holds at least a generator.
        module: name of the generator.
        samples: heads drawn from a generator that no artwork was fitted to.
        seed: of the draw.

    Raises:
        UserError: when the artifact holds no generator of that name.
    """

    def __init__(self, artifact: Artifact, module: str = "generator", samples: int = 3, seed: int = 0) -> None:
        modules = artifact.manifest["modules"]
        if module not in modules:
            shown = [name for name, parent in artifact.manifest["parents"].items() if module in parent["modules"]]
            hint = f"; it was made from the artifact of its {shown[0]}, which has one" if shown else ""
            raise UserError(f"{artifact.path} (stage {artifact.stage}) has no module {module!r} to show{hint}")
        generator = artifact.module(module)
        if not isinstance(generator, Generator):
            raise UserError(f"module {module!r} of {artifact.path} is not a generator")
        self.artifact, self.generator = artifact, generator.requires_grad_(False)
        anchors = artifact.module("anchors") if "anchors" in modules else None
        self.anchors = anchors if isinstance(anchors, HeadCodes) else None
        self.samples, self.seed = samples, seed

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all subjects."""
        if self.anchors is not None:
            return self.anchors.ids
        count = self.samples if self.generator.z_dim else 1  # a baked head is what it is
        return tuple(f"subject-{i + 1}" for i in range(count))

    def choose(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """``wanted``, or all ids when it is ``None`` or empty.

        Raises:
            UserError: for an unknown id.
        """
        unknown = [identity for identity in wanted or () if identity not in self.ids]
        if unknown:
            raise UserError(f"{self.artifact.path} has no item {unknown[0]!r}, it has: {', '.join(self.ids)}")
        return tuple(wanted) if wanted else self.ids

    def __getitem__(self, identity: str) -> Subject:
        """The subject of one id.

        Raises:
            UserError: for an unknown id.
            ArtifactError: when its generator cannot be read.
        """
        self.choose([identity])
        if self.anchors is None:
            return self._sampled(identity)
        anchor = self.anchors[identity]
        generator, original = self.generator, None
        if STYLISED + identity in self.artifact.manifest["modules"]:
            stylised = self.artifact.module(STYLISED + identity)
            if not isinstance(stylised, Generator):
                raise ArtifactError(f"module {STYLISED + identity!r} of {self.artifact.path} is not a generator")
            generator, original = stylised.requires_grad_(False), self.generator
        elif isinstance(self.anchors, PhotoSet) and "detail" in self.artifact.manifest["modules"]:
            generator = self._detailed(self.anchors.only(identity))
        artwork = find_artwork(self.artifact, identity)
        return Subject(identity, generator, original, anchor.latents, anchor.expression, anchor.camera, artwork)

    def _detailed(self, photo: PhotoSet) -> Generator:
        detail = self.artifact.module("detail")
        if not isinstance(self.generator, ManifoldGenerator) or not isinstance(detail, DetailReconstructor):
            raise ArtifactError(f"{self.artifact.path} has details, but no generator of surface manifolds")
        return DetailedGenerator(self.generator, detail.requires_grad_(False), photo).eval()

    def _sampled(self, identity: str) -> Subject:
        z = self.generator.sample_z(self.samples, torch.Generator().manual_seed(self.seed))
        row = self.ids.index(identity)
        with torch.no_grad():
            latents = self.generator.mapping(z[row : row + 1], truncation=TRUNCATION)
        return Subject(identity, self.generator, None, latents, torch.zeros(1, len(self.generator.expressions)))


@torch.no_grad()
def invert(
    identity: str,
    image: Tensor,
    camera: Camera,
    generator: ManifoldGenerator,
    encoder: Encoder,
    detail: DetailReconstructor,
) -> Subject:
    """The head of a photo, in one pass of each network (GRAMInverter, Sec. 3).

    Args:
        image: (1, 3, H, W) in [-1, 1].
        camera: of the photo, a batch of one.
        generator, encoder, detail: of an artifact of the stage ``detail``.
    """
    mean = encoder.mean_latents or generator.mean_latents
    ws, expression = encoder.invert(resized(image, encoder.resolution), mean)
    if expression is None:
        expression = image.new_zeros(1, len(generator.expressions))
    anchor = HeadCode(ws.map(Tensor.float), None, expression.float(), camera.label())
    image = resized(image, detail.resolution)
    photo = PhotoSet.collect({identity: anchor}, {identity: image[0]}, generator).to(image.device)
    head = DetailedGenerator(generator, detail, photo).eval()
    return Subject(identity, head, None, anchor.latents, anchor.expression, camera, image[0])


def find_artwork(artifact: Artifact, identity: str) -> Tensor | None:
    """The framed artwork (3, H, W) that the artifact keeps as ``media/reference_ID.png``, or ``None``."""
    if f"media/reference_{identity}.png" not in artifact.manifest["files"]:
        return None
    return read_image(artifact.media(f"reference_{identity}.png"))[0]


@torch.no_grad()
def look(
    generator: Generator,
    latents: Latents,
    camera: Camera | None,
    expression: Tensor | None = None,
    resolution: int | None = None,
    chunk: int = 12,
) -> Rendering:
    """One subject from many cameras or with many expressions, a chunk at a time to bound memory; without taps.

    Args:
        latents: a batch of one.
        camera: V cameras; ``None`` for a 2D generator, where V is the number of expressions.
        expression: (1, E) or (V, E); ``None`` or E = 0 is neutral.
        resolution: image side, where it is free; native when ``None``.
        chunk: cameras rendered together: they share one backbone pass.

    Returns:
        fields (V, ., H, W).
    """
    if expression is not None and expression.shape[1] == 0:
        expression = None
    if not generator.free_resolution:
        resolution = None
    if camera is None and expression is not None:
        latents = latents.repeat_interleave(len(expression))
    parts = []
    for start in range(0, len(latents) if camera is None else len(camera), chunk):
        some = slice(start, start + chunk)
        code = expression if expression is None or len(expression) == 1 else expression[some]
        if camera is None:
            parts.append(generator.synthesis(latents[some], expression=code, resolution=resolution))
        else:
            parts.append(generator.synthesis(latents, camera[some], expression=code, resolution=resolution))
    fields = {}
    for name in ("image", "raw", "depth", "alpha", "normals"):
        values = [getattr(part, name) for part in parts]
        fields[name] = None if values[0] is None else torch.cat(values)
    return Rendering(**fields)
