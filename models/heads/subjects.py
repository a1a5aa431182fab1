"""What an artifact lets one look at: heads, each with its generator, code, expression and camera.

Its index says what these are made of (:mod:`models.heads.index`); without one, the generator is sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.artifact import Artifact, ArtifactError
from models.camera import Camera
from models.configurable import class_named
from models.encoders.base import Encoder, inverted
from models.encoders.detail import DetailReconstructor
from models.errors import UserError, one_line
from models.generators.baked import BakedHead
from models.generators.base import Generator, RadianceGenerator
from models.generators.manifold import ManifoldGenerator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.detailed import DetailedGenerator
from models.heads.directions import Directions
from models.heads.index import Entry, read_index
from models.heads.photos import PhotoSet
from models.heads.pixel_aligned import LocalNetworks, PixelAlignedGenerator
from models.image import read_image, resized
from models.latents import Latents

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Details = DetailReconstructor | LocalNetworks
"""Networks that find in a photo what codes cannot say."""
TRUNCATION = 0.7  # of sampled subjects: typical rather than extreme heads


@dataclass
class Subject:
    """One head to look at.

    Attributes:
        id: of the item, or ``subject-N`` of a sampled head.
        generator: what to show.
        original: the generator before stylisation, ``None`` when there was none.
        latents: a batch of one: (1, n, w) of each group.
        expression: (1, E) the head's own, E = 0 where the generator cannot animate.
        camera: of the picture it was fitted to, ``None`` of a sampled head and in a 2D generator.
        artwork: (3, H, W) in [-1, 1], where the artifact holds it.
        caption: what it is called beside the artwork.
        left_out: expressions that it cannot show, and why.
        pictures: others of it, (3, H, W) in [-1, 1], by what they are called.
    """

    id: str
    generator: Generator
    original: Generator | None
    latents: Latents
    expression: Tensor
    camera: Camera | None = None
    artwork: Tensor | None = None
    caption: str = "head"
    left_out: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def _between(self) -> Generator:
        return copy.deepcopy(self.generator)

    @property
    def blends(self) -> bool:
        """Whether there are weights between those of the original and of the result."""
        return self.original is not None and type(self.original) is type(self.generator)

    def styled(self, strength: float) -> Generator:
        """The generator whose weights lie at ``strength`` between the original (0) and the stylised one (1).

        Outside of [0, 1] the difference is exaggerated or reversed. Without an original it is the generator.
        The result is valid until the next call.
        """
        if self.original is None or strength == 1 or not self.blends:
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

    def edited(
        self, directions: Directions, edits: Mapping[str, float], layers: Mapping[str, int] | None = None
    ) -> Subject:
        """The head with its codes moved along directions; arguments as of :meth:`Directions.apply`."""
        found = copy.copy(self)
        found.latents = directions.apply(self.latents, edits, layers)
        if self.blends:
            found.__dict__["_between"] = self._between  # one network for all edits
        return found

    def baked(self, size: int, expression: Tensor | None = None, strength: float = 1.0) -> BakedHead | None:
        """The head on its surfaces, None where it has none; ``size`` as of ``bake``, ``expression`` (1, E)."""
        code = self.expression if expression is None else expression
        ws = self.latents
        return self.styled(strength).bake(ws, size, expression=code if code.shape[1] else None, stride=2)


class Subjects:
    """The subjects of an artifact, by id; networks are read when a subject is asked for.

    What there is to see is said by the artifact's index (:mod:`models.heads.index`).

    Args:
        artifact: holds at least a generator.
        module: name of the generator, the index's own where there is none of that name; one other than "generator"
            shows all subjects itself.
        samples: heads drawn from a generator that nothing was fitted to.
        seed: of the draw.

    Raises:
        UserError: when the artifact holds no generator of that name.
    """

    def __init__(self, artifact: Artifact, module: str = "generator", samples: int = 3, seed: int = 0) -> None:
        modules = artifact.manifest["modules"]
        entries = [entry for entry in read_index(artifact.manifest) if entry.codes is not None]
        for_all = module != "generator"
        if not for_all and module not in modules and entries:
            module = entries[0].generator
        if module not in modules:
            shown = [name for name, parent in artifact.manifest["parents"].items() if module in parent["modules"]]
            hint = f"; it was made from the artifact of its {shown[0]}, which has one" if shown else ""
            raise UserError(f"{artifact.path} (stage {artifact.stage}) has no module {module!r} to show{hint}")
        self.artifact, self._shared = artifact, dict[str, nn.Module]()
        self.generator = self._module(module, Generator)
        if for_all:
            entries = [
                Entry(e.id, e.codes, module, artwork=e.artwork, caption=e.caption, pictures=e.pictures) for e in entries
            ]
        self.entries = {entry.id: entry for entry in entries}
        self.samples, self.seed = samples, seed

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all subjects."""
        if self.entries:
            return tuple(self.entries)
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
            ArtifactError: when what shows it cannot be read.
        """
        self.choose([identity])
        if not self.entries:
            return self._sampled(identity)
        entry = self.entries[identity]
        assert entry.codes is not None
        codes = self._module(entry.codes, HeadCodes)
        if identity not in codes:
            raise ArtifactError(f"{self.artifact.path}: its index has {identity}, its {entry.codes} have not")
        code = codes[identity]
        original = None if entry.original is None else self._module(entry.original, Generator)
        if entry.wrapper is not None:
            generator = self._wrapped(entry)
        else:  # what was changed for one subject, others do not need
            generator = self._module(entry.generator, Generator, shared=original is None)
        artwork = None if entry.artwork is None else read_image(self.artifact.media(entry.artwork))[0]
        return Subject(
            identity,
            generator,
            original,
            code.latents,
            code.expression,
            code.camera,
            artwork,
            entry.caption,
            entry.left_out,
            {name: read_image(self.artifact.media(file))[0] for name, file in entry.pictures.items()},
        )

    def _module(self, name: str, kind: type[ModuleT], shared: bool = True) -> ModuleT:
        module = self._shared.get(name) or self.artifact.module(name).requires_grad_(False)
        if not isinstance(module, kind):
            noun = {Generator: "a generator", HeadCodes: "codes of heads"}.get(kind, f"a {kind.__name__}")
            raise ArtifactError(f"module {name!r} of {self.artifact.path} is not {noun}")
        if shared:
            self._shared[name] = module
        return module

    def _wrapped(self, entry: Entry) -> Generator:
        assert entry.wrapper is not None
        parts = {name: self._module(module, nn.Module) for name, module in entry.parts.items()}
        try:
            own = {name: p.only(entry.id) if isinstance(p, HeadCodes) else p for name, p in parts.items()}
            wrapper: Generator = class_named(entry.wrapper)(**own)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ArtifactError(f"{self.artifact.path}: {entry.id} cannot be shown: {one_line(error)}") from error
        return wrapper.requires_grad_(False).eval()

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
    generator: RadianceGenerator,
    encoder: Encoder,
    details: Details | None = None,
) -> Subject:
    """The head of a photo, in one pass of each network.

    Args:
        image: (1, 3, H, W) in [-1, 1].
        camera: of the photo, a batch of one.
        generator, encoder: of an artifact of an inversion stage.
        details: what adds what codes cannot say: on surface manifolds (GRAMInverter, Sec. 3.3) or aligned pixel by
            pixel (E3DGE, Sec. 4.2); None for codes alone.
    """
    ws, expression = inverted(image, encoder, generator)
    if expression is None:
        expression = image.new_zeros(1, len(generator.expressions))
    anchor = HeadCode(ws.map(Tensor.float), None, expression.float(), camera.label())
    image = resized(image, generator.resolution if details is None else details.resolution)
    head: Generator = generator
    if details is not None:
        photo = PhotoSet.collect({identity: anchor}, {identity: image[0]}, generator).to(image.device)
        if isinstance(details, LocalNetworks):
            head = PixelAlignedGenerator(generator, details, photo).eval()
        else:
            assert isinstance(generator, ManifoldGenerator)
            head = DetailedGenerator(generator, details, photo).eval()
    return Subject(identity, head, None, anchor.latents, anchor.expression, camera, image[0], "one pass")
