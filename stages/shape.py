"""Shape, albedo and light of heads from a generator's pictures alone (3D cartoon faces, Wang et al., Sec. III-D)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.heads import Head
from datamodules.truth import KnowsSurface
from models.artifact import Export
from models.encoders.base import Encoder, inverted
from models.errors import UserError
from models.features.base import Frozen
from models.features.parts import face_mask, face_rows, head_share
from models.files import atomic_write
from models.generators.base import Discriminator, Generator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.index import Entry, subject_index
from models.image import read_image, write_image, write_video
from models.latents import Latents
from models.losses.image import smoothness_loss
from models.losses.relief import feature_loss, identity_loss, mean_within, reconstruction_loss
from models.metrics.records import Record
from models.metrics.surface import PROTOCOL, VERSION, surface_errors
from models.relief.networks import OffsetEncoder, ReliefNetworks
from models.relief.pictures import moving_light, rows_of
from models.relief.recipe import NETWORKS, Phase, ShapeRecipe
from models.relief.samples import PseudoSampling, agreed, behind
from models.relief.shape import Shape, head_mask, light_of
from models.relief.shapes import ReliefShapes
from models.rendering.mesh import write_mesh
from models.rendering.output import Tensors
from models.rendering.relief import Relief, mirrored, relit, shading, sphere_cap
from models.rendering.sheets import sheet
from stages.base.foreign import warn_of_embedded
from stages.base.inversion import check_fit
from stages.base.kinship import check_kin
from stages.base.offsets import moved_heads
from stages.base.per_item import GroupState, PerItemStage
from stages.base.seeds import item_generator, item_seed
from stages.base.stage import ArtifactRef, GeneratorRef

ACTIVE = {"prior": "D", "albedo": "A", "project": "E", "joint": "VLDA"}  # networks that learn, by phase
FITTED_TO = 256  # pictures by which the spread of views is fitted
FRAMES, YAW_DEG, SIDE = 60, 30.0, 256  # of predict's videos: frames, degrees, pixels
_PAGE, _TILE = 8, 128  # heads a sheet, pixels

_ORIGINAL = "original"  # what the photos' shapes are called in the artifact of the cartoons'

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class CapPrior:
    """The first guess at a face's depth, see :func:`models.rendering.relief.sphere_cap`.

    Attributes:
        radius, near, far: as there.
        face: names of the parser's segments whose box it fills; all but hair, cloth and what is behind when null.
    """

    radius: float = 0.4
    near: float = 0.91
    far: float = 1.02
    face: list[str] | None = None


@dataclass(frozen=True)
class NetworkSizes:
    """Of V, L, D, A and E: as of :class:`models.relief.networks.ReliefNetworks`, and the width of E. The defaults are
    Unsup3D's and GAN2Shape's at 64 px."""

    width: int = 64
    encoder_width: int = 64
    code: int = 256
    group: int = 4
    free_maps: bool = False
    offset_width: int = 32


@dataclass
class ShapeState(GroupState[Head]):
    """The group.

    Attributes:
        module: the networks, one set for each head or for all, with the rough shapes as buffers.
        ws: style codes of the heads. image: (N, 3, S, S) their pictures. face: (N, 3, S, S) whom they show.
        cap: (N, 1, S, S) first guesses at depths.
        view, light: (N, 6) and (N, 4) that those of the pictures are offsets to.
        head, behind: (N, 1, S, S) where the pictures show heads, and (N, 3, S, S) what is behind these; without a
            parser nobody knows.
        bank: what the running step 3 draws from.
    """

    module: _Networks
    ws: Latents
    image: Tensor
    face: Tensor
    cap: Tensor
    view: Tensor
    light: Tensor
    head: Tensor | None = None
    behind: Tensor | None = None
    bank: _Samples | None = None


@dataclass(frozen=True)
class _Samples(Tensors):
    """Pictures (N, K, 3, S, S) of N heads, where these may be looked at (N, K, 1, S, S), and the views (N, K, 6) and
    lights (N, K, 4) that V's and L's answers are offsets to."""

    image: Tensor
    mask: Tensor
    view: Tensor
    light: Tensor

    def flat(self) -> _Samples:
        """With all heads in one row, (N * K, ...)."""
        return self.map(lambda t: t.flatten(0, 1))


class _Networks(nn.Module):
    """Of a group: one set of networks a head, or one of all. ``rough_*`` are what pseudo samples are rendered of."""

    rough_depth: Tensor
    rough_albedo: Tensor
    rough_light: Tensor
    rough_mask: Tensor

    def __init__(
        self, heads: Sequence[ReliefNetworks], offsets: Sequence[OffsetEncoder], count: int, size: int
    ) -> None:
        super().__init__()
        self.heads, self.offsets = nn.ModuleList(heads), nn.ModuleList(offsets)
        self.register_buffer("rough_depth", torch.zeros(count, 1, size, size))
        self.register_buffer("rough_albedo", torch.zeros(count, 3, size, size))
        self.register_buffer("rough_light", torch.zeros(count, 4))
        self.register_buffer("rough_mask", torch.ones(count, 1, size, size))

    def each(self, say: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """What each head's networks say of what is given of it (N, K, ...): (N * K, ...)."""
        parts = zip(self.heads, *(_parts(g, len(self.heads)) for g in given), strict=True)
        return torch.cat([say(own, *of) for own, *of in parts])

    def named(self, name: str) -> list[nn.Parameter]:
        """Parameters of V, L, D, A or E."""
        held = self.offsets if name == "E" else [getattr(head, name) for head in self.heads]
        return [p for module in held for p in module.parameters()]


class ShapeStage(PerItemStage[Head, ShapeState]):
    """Finds depth, albedo, view and light of heads that a 2D generator shows, without any label.

    D is fitted to a cap of a sphere. Then, in each cycle:

    1. A learns, so that the rendering is the picture, by L_1 = L_recon + L_sym + L_id (Eq. 13).
    2. The shape so far is rendered from other views and under other lights; E learns the offset of w at which the
       generator shows what comes nearest to these pseudo samples, by L_2 (Eq. 16).
    3. V, L, D and A learn from the generator's samples together, by L_3 (Eq. 18).

    ``test`` compares with the truth after each cycle. ``predict`` writes sheets, turning heads and moving lights.

    Args:
        prior: artifact and module of the generator that shows the heads: of photos, or a fine-tuned or blended one.
        discriminator: artifact and module (``module``) whose features L_2 compares; null leaves that term out, which
            takes its absolute difference alone.
        photo: for ``id_on: photo_render``, the generator whose pictures of the same codes show who it is.
        encoder: artifact with an encoder of the generator's pictures, which projects in place of E. It is not trained.
        perceptual: F of Eq. 11. identity: face recognition of L_id. parser: finds the face for the first guess.
        pose: tells yaw and pitch: of pictures of the generator, which views are drawn like where ``sampling`` says so,
            and of the heads' own for ``recipe.known``.
        relief: how depth maps are seen. cap: the first guess. networks: sizes.
        light: what L's answers are offsets to: ambient, diffuse, dx, dy.
        recipe: steps and weights. sampling: of pseudo samples.
        shared: whether one set of networks is of all heads of a group, as in Unsup3D, or each head has its own.
        id_on: L_id compares with the picture itself ("direct"), or with the photo generator's of the same code.
        beside: artifact of this stage with the shapes of the same heads as photos, which are shown beside these.
        tested: artifact of this stage that test and predict take shapes from.
        variant: name in the scores.
        group_size, save_every, seed: as :class:`PerItemStage`.
    """

    name = "shape"

    def __init__(
        self,
        prior: GeneratorRef | None = None,
        discriminator: GeneratorRef | None = None,
        photo: GeneratorRef | None = None,
        encoder: ArtifactRef | None = None,
        perceptual: nn.Module | None = None,
        identity: nn.Module | None = None,
        parser: nn.Module | None = None,
        pose: nn.Module | None = None,
        relief: Relief = Relief(),  # noqa: B008 - frozen
        cap: CapPrior = CapPrior(),
        networks: NetworkSizes = NetworkSizes(),
        light: tuple[float, float, float, float] = (0.5, 0.5, 0.0, 0.3),
        recipe: ShapeRecipe = ShapeRecipe(),  # noqa: B008 - frozen
        sampling: PseudoSampling = PseudoSampling(),  # noqa: B008 - frozen
        shared: bool = False,
        id_on: Literal["direct", "photo_render"] = "direct",
        beside: ArtifactRef | None = None,
        tested: ArtifactRef | None = None,
        variant: str = "shape",
        group_size: int = 1,
        save_every: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(steps=recipe.steps, group_size=group_size, save_every=save_every, seed=seed)
        self.prior, self.discriminator_from, self.photo_from = prior, discriminator, photo
        self.encoder_from, self.beside, self.tested, self.variant = encoder, beside, tested, variant
        self.perceptual, self.identity, self.parser, self.pose = (
            None if network is None else Frozen(network) for network in (perceptual, identity, parser, pose)
        )
        self.relief, self.cap, self.sizes, self.recipe, self.sampling = relief, cap, networks, recipe, sampling
        self.mean_light, self.shared, self.id_on = light, shared, id_on
        if tested is None:
            self._check_networks()

    def _check_networks(self) -> None:
        for weight, network in (("perceptual", self.perceptual), ("identity", self.identity)):
            if getattr(self.recipe, weight) and network is None:
                raise UserError(f"model.recipe.{weight} is measured by a network: set --model.{weight}")
        if self.shared and self.sizes.free_maps:
            raise UserError("model.shared needs networks that tell heads apart: leave networks.free_maps false")
        if self.recipe.prior and self.parser is None:
            raise UserError("the first guess at a depth is fitted to the face: set --model.parser, or recipe.prior: 0")
        if self.recipe.known and self.pose is None:
            raise UserError("recipe.known starts where a network says that a picture is seen from: set --model.pose")
        if self.sampling.fitted and self.recipe.samples and self.pose is None:
            raise UserError("views are drawn like the generator's poses: set --model.pose, or sampling's deviations")
        if (self.id_on == "photo_render") != (self.photo_from is not None):
            raise UserError("model.photo.path is the generator of id_on: photo_render, and of no other")

    def build_model(self) -> None:
        if self.tested is not None:
            self.take("tested", self.tested.path, "shapes", ReliefShapes)
            return
        if self.prior is None:
            raise UserError(
                "shapes are of a generator's heads: fit needs --model.prior.path, the others --model.tested"
            )
        self.generator = self._take("prior", self.prior, Generator)
        if self.generator.is_3d:
            raise UserError(f"{self.prior.path} has a 3D generator, whose shapes are known: shape is for 2D ones")
        self.discriminator = self.photo = self.encoder = None
        if self.discriminator_from is not None:
            self.discriminator = self._take("discriminator", self.discriminator_from, Discriminator)
            sides = self.discriminator.resolution, self.generator.resolution
            if sides[0] != sides[1]:
                raise UserError(f"the discriminator judges {sides[0]} px, and the generator's pictures have {sides[1]}")
        if self.photo_from is not None:
            self.photo = self._take("photo", self.photo_from, Generator)
            check_kin(self.inputs["photo"], self.inputs["prior"], self.prior.module)
        if self.encoder_from is not None:
            self.encoder = self.take("encoder", self.encoder_from.path, "encoder", Encoder).requires_grad_(False)
            check_fit(self.encoder, self.generator)
        self.others = None
        if self.beside is not None:
            self.others = self.take("beside", self.beside.path, "shapes", ReliefShapes)
        self.eval()

    def _take(self, role: str, of: GeneratorRef, kind: type[ModuleT]) -> ModuleT:
        return self.take(role, of.path, of.module, kind).requires_grad_(False)

    def on_fit_start(self) -> None:
        if self.tested is not None:
            raise UserError("fit finds shapes, and does not test any: leave --model.tested out")
        warn_of_embedded(self.generator, self.perceptual, self.identity, self.parser, self.pose)
        if self.parser is not None:
            self._face = face_rows(self.parser.module, self.cap.face, "cap.face")  # type: ignore[arg-type]
        if self.others is not None and self.others.ids != (own := tuple(item.id for item in self.items)):
            raise UserError(
                f"model.beside holds shapes of {', '.join(self.others.ids)}, these heads are {', '.join(own)}: give "
                "the shapes of the same heads"
            )
        self.spread = self.sampling.spread(self._poses() if self.recipe.samples and self.sampling.fitted else None)
        super().on_fit_start()

    @torch.no_grad()
    def _poses(self) -> Tensor:
        """(K, 2) of pictures that the generator draws."""
        assert self.pose is not None
        draws = torch.Generator().manual_seed(item_seed(self.seed, "poses", -1))
        z = self.generator.sample_z(FITTED_TO, draws).to(self.device)
        return torch.cat([self.pose.module(self.picture(self.generator.mapping(part))) for part in z.split(32)])

    # -- one group --------------------------------------------------------------------------------

    def picture(self, ws: Latents, generator: Generator | None = None) -> Tensor:
        """(B, 3, S, S) in [-1, 1] of codes."""
        return (generator or self.generator).synthesis(ws).image.float().clamp(-1, 1)

    @torch.no_grad()
    def start_group(self, items: Sequence[Head]) -> ShapeState:
        ws = Latents.cat([item.codes(self.generator) for item in items])
        image = self.picture(ws)
        size, view = image.shape[-1], image.new_zeros(len(items), 6)
        if self.recipe.known:
            view[:, :2] = self._turns(image)
        cap = torch.full_like(image[:, :1], self.relief.centre)
        if self.recipe.prior:
            cap = torch.cat([self._first_guess(item, one[None]) for item, one in zip(items, image, strict=True)])
        light = torch.tensor(self.mean_light, device=self.device).expand(len(items), -1)
        own = items[:1] if self.shared else items
        sizes = asdict(self.sizes)
        wide = sizes.pop("offset_width")
        heads = [
            _drawn(self.seed, i.id, lambda: ReliefNetworks(self.relief, size, slack=self.recipe.slack, **sizes))
            for i in own
        ]
        offsets = []
        if self.encoder is None and self.recipe.samples and self.recipe.project:
            w_dim = self.generator.w_dim
            offsets = [_drawn(self.seed, i.id + " E", lambda: OffsetEncoder(size, wide, w_dim)) for i in own]
        module = _Networks(heads, offsets, len(items), size).to(self.device)
        decay, betas = self.recipe.weight_decay, self.recipe.betas
        optimizers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.Adam(parameters, self.recipe.rate(name), betas, weight_decay=decay)
            for name in NETWORKS
            if (parameters := module.named(name))
        }
        face = image if self.photo is None else self.picture(ws, self.photo)
        state = ShapeState(items, module, optimizers, ws, image, face, cap, view, light)
        if self.parser is not None:
            state.head = head_share(image, self.parser.module)  # type: ignore[arg-type]
            state.behind = behind(image, state.head)
        return state

    def _turns(self, image: Tensor) -> Tensor:
        """What the pose network tells (B, 2) of pictures (B, 3, S, S): turns about x and y, radians."""
        assert self.pose is not None
        return self.pose.module(image).float().flip(1)

    def _first_guess(self, item: Head, image: Tensor) -> Tensor:
        assert self.parser is not None
        mask = face_mask(image, self.parser.module, self._face)  # type: ignore[arg-type]
        if not bool(mask.any()):
            raise UserError(f"no face was found in the picture of {item.id}: its shape cannot be guessed at")
        return sphere_cap(mask, self.cap.radius, self.cap.near, self.cap.far)

    def active(self, state: ShapeState, step: int) -> Collection[str]:
        return [name for name in ACTIVE[self.recipe.at(step).name] if name in state.optimizers]

    def optimise(self, state: ShapeState, step: int) -> dict[str, Tensor]:
        phase = self.recipe.at(step)
        if step == phase.begin:
            for name in self.active(state, step):
                state.optimizers[name].state.clear()  # Adam starts anew with each step, as in GAN2Shape
            if self.recipe.roughens(phase):
                self._roughen(state)
        for cycle, end in enumerate(self.recipe.ends[:-1]):
            if step == end:
                self._keep(state, cycle)
        losses = getattr(self, f"_{phase.name}")(state, step, phase)
        return losses | {"loss": losses[phase.name]}

    def _prior(self, state: ShapeState, step: int, phase: Phase) -> dict[str, Tensor]:
        """D learns the first guess."""
        found = state.module.each(ReliefNetworks.depth, state.image[:, None])
        return {"prior": (found - state.cap).square().flatten(1).mean(1)}

    def _albedo(self, state: ShapeState, step: int, phase: Phase) -> dict[str, Tensor]:
        """Step 1, Eq. 13."""
        with torch.no_grad():
            rest = self.shape(state)
        albedo = state.module.each(ReliefNetworks.albedo, state.image[:, None])
        found = self._fidelity(
            replace(rest, albedo=albedo), state.image, torch.ones_like(rest.depth), state.face, phase
        )
        return {"albedo": found["whole"]}

    @torch.no_grad()
    def _roughen(self, state: ShapeState) -> None:
        """The shape so far becomes what pseudo samples are rendered of."""
        found, rough = self.shape(state), state.module
        rough.rough_depth.copy_(found.depth)
        rough.rough_albedo.copy_(found.albedo)
        rough.rough_light.copy_(found.light)
        if state.head is not None:
            rough.rough_mask.copy_(head_mask(state.head, found, self.relief))

    @torch.no_grad()
    def _pseudo(self, state: ShapeState, step: int, count: int) -> _Samples:
        """Pseudo samples of each head, as they are rendered."""
        rough, views, lights = state.module, [], []
        for item, light in zip(state.items, rough.rough_light.cpu(), strict=True):
            draws = item_generator(self.seed, item.id, step)
            views.append(self.sampling.views(count, self.spread, draws))
            lights.append(self.sampling.lights(light, count, draws))
        view, light = (torch.stack(each).to(self.device) for each in (views, lights))
        depth, albedo = (t.repeat_interleave(count, 0) for t in (rough.rough_depth, rough.rough_albedo))
        shown = Shape(depth, albedo, view.flatten(0, 1), light.flatten(0, 1)).seen(self.relief)
        assert shown.depth is not None and shown.alpha is not None
        picture = shown.image
        if state.behind is not None and not self.recipe.paper_only:
            # The generator knows no heads on slabs: it would see another head's hair in what is turned along.
            head = self.relief.carried(rough.rough_mask.repeat_interleave(count, 0), shown.depth, view.flatten(0, 1))
            picture = torch.lerp(state.behind.repeat_interleave(count, 0), picture, head * shown.alpha)
        image, mask = (t.unflatten(0, (-1, count)) for t in (picture, shown.alpha))
        return _Samples(image, torch.ones_like(mask) if self.recipe.paper_only else mask, view, light)

    def _offset(self, state: ShapeState, pseudo: Tensor) -> Latents:
        """dw of pseudo samples (N, K, 3, S, S), of N * K codes (Eq. 14): to the one for the picture, but in E's own
        words where ``paper_only``."""
        count = pseudo.shape[1]
        if self.encoder is not None:
            moved, still = (inverted(x, self.encoder, self.generator)[0] for x in (pseudo.flatten(0, 1), state.image))
            return moved - still.repeat_interleave(count)
        own, relative = state.module.offsets, not self.recipe.paper_only
        seen = torch.cat([pseudo, state.image[:, None]], 1) if relative else pseudo
        told = torch.cat([encoder(k) for encoder, k in zip(own, _parts(seen, len(own)), strict=True)]).float()
        told = told.unflatten(0, (len(pseudo), -1))
        if relative:
            told = told[:, :-1] - told[:, -1:]
        return state.ws.map(lambda t: told.flatten(0, 1)[:, None].expand(-1, t.shape[1], -1))

    def _shown(self, state: ShapeState, offset: Latents) -> Tensor:
        """I_p = G(w + dw) (Eq. 15), (N, K, 3, S, S), of the offsets of N * K codes."""
        ws = state.ws.repeat_interleave(len(offset) // len(state.ws))
        return self.picture(ws + offset).unflatten(0, (len(state.ws), -1))

    def _project(self, state: ShapeState, step: int, phase: Phase) -> dict[str, Tensor]:
        """Step 2, Eq. 16."""
        count = self.recipe.batch
        if not state.module.offsets:
            return {"project": torch.zeros(len(state.items), device=self.device)}
        pseudo = self._pseudo(state, step, count)
        dw = self._offset(state, pseudo.image)
        image, offset, pseudo = (
            self._shown(state, dw).flatten(0, 1),
            next(iter(dw.groups.values()))[:, 0],
            pseudo.flat(),
        )
        if self.recipe.paper_only:
            loss = self.recipe.offset * offset.norm(dim=1)
        else:
            loss = self.recipe.offset * offset.square().mean(1) + mean_within((image - pseudo.image).abs(), pseudo.mask)
        if self.discriminator is not None:
            loss = loss + feature_loss(self.discriminator, image, pseudo.image, pseudo.mask)
        return {"project": loss.unflatten(0, (-1, count)).mean(1)}

    @torch.no_grad()
    def _collect(self, state: ShapeState, begin: int) -> _Samples:
        """Samples that step 3 draws from, made when it begins, and again by a run that continues it."""
        pseudo = self._pseudo(state, begin, self.recipe.samples)
        image, around = pseudo.image, pseudo if self.recipe.known else _around(state, self.recipe.samples)
        view = around.view.clone()
        if self.recipe.project:
            image = torch.cat([self._shown(state, some) for some in self._offsets(state, pseudo)], 1)
            if self.recipe.known:  # the generator shows nearly the view that was asked for
                view[..., :2] = torch.stack([self._turns(some) for some in image])
        mask = pseudo.mask
        if state.head is not None and not self.recipe.paper_only:
            assert self.parser is not None  # what is behind a head does not turn with it
            parts = [some.flatten(0, 1) for some in image.split(self.recipe.batch, 1)]  # a paper's 1,600 are many
            shares = [head_share(some, self.parser.module) for some in parts]  # type: ignore[arg-type]
            mask = mask * torch.cat([share.unflatten(0, (len(image), -1)) for share in shares], 1)
        return _Samples(image, mask, view, around.light)

    def _offsets(self, state: ShapeState, pseudo: _Samples) -> list[Latents]:
        """dw of all pseudo samples, a batch of each head at a time."""
        heads = len(state.ws)
        found = [self._offset(state, some) for some in pseudo.image.split(self.recipe.batch, 1)]
        if not self.recipe.agreed:
            return found
        from_picture = pseudo.view[..., :2] - state.view[:, None, :2], pseudo.light - state.module.rough_light[:, None]
        by_head = [some.map(lambda t: t.unflatten(0, (heads, -1))) for some in found]
        whole = Latents.cat(by_head, 1).map(lambda t: agreed(t.flatten(2), *from_picture).unflatten(2, t.shape[2:]))
        parts = range(0, pseudo.image.shape[1], self.recipe.batch)
        return [whole.map(lambda t: t[:, k : k + self.recipe.batch].flatten(0, 1)) for k in parts]  # noqa: B023

    def _joint(self, state: ShapeState, step: int, phase: Phase) -> dict[str, Tensor]:
        """Step 3, Eq. 18."""
        networks, heads = state.module, len(state.items)
        seen = self._drawn_samples(state, step, phase)
        count, picture = seen.image.shape[1], state.image[:, None]
        depth, albedo = networks.each(ReliefNetworks.depth, picture), networks.each(ReliefNetworks.albedo, picture)
        d, a, face = (t.repeat_interleave(count, 0) for t in (depth, albedo, state.face))
        view = networks.each(ReliefNetworks.view, seen.image, seen.view)
        light = networks.each(ReliefNetworks.light, seen.image, seen.light)
        flat = seen.flat()
        found = self._fidelity(Shape(d, a, view, light), flat.image, flat.mask, face, phase)
        whole, reconstruction = (found[k].unflatten(0, (heads, count)).mean(1) for k in ("whole", "reconstruction"))
        rough = self.recipe.smooth * smoothness_loss(depth)
        if self.recipe.smooth_shading and not self.recipe.paper_only:
            towards = light.unflatten(0, (heads, count))[:, -1] * light.new_tensor([0, 0, 1, 1])
            diffuse = towards + towards.new_tensor([0, 1, 0, 0])
            shade = shading(self.relief.normals(depth), light_of(diffuse))
            rough = rough + self.recipe.smooth_shading * smoothness_loss(shade)
        if step == phase.end - 1:
            state.bank = None
        return {"joint": whole + rough, "reconstruction": reconstruction}

    def _drawn_samples(self, state: ShapeState, step: int, phase: Phase) -> _Samples:
        """What step 3 sees: some samples, then, unless ``paper_only``, the picture itself."""
        mask = torch.ones_like(state.image[:, None, :1])
        itself = _Samples(state.image[:, None], mask, state.view[:, None], state.light[:, None])
        if not self.recipe.samples:
            return itself
        if state.bank is None:
            state.bank = self._collect(state, phase.begin)
        draws = [item_generator(self.seed, item.id, step) for item in state.items]
        rows = [torch.randperm(self.recipe.samples, generator=g)[: self.recipe.batch] for g in draws]
        chosen = torch.stack(rows).to(self.device)
        some = state.bank.map(lambda t: t[torch.arange(len(t), device=t.device)[:, None], chosen])
        if self.recipe.paper_only:
            return some
        return _Samples(*(torch.cat(both, 1) for both in zip(vars(some).values(), vars(itself).values(), strict=True)))

    def _fidelity(self, shape: Shape, target: Tensor, mask: Tensor, face: Tensor, phase: Phase) -> dict[str, Tensor]:
        """L_recon, and with the symmetric and the identity term the whole (B,) (Eq. 11 to 13)."""
        recipe = self.recipe
        network = None if self.perceptual is None else self.perceptual.module
        shown, other = shape.seen(self.relief), None
        assert shown.alpha is not None
        mask = mask * shown.alpha
        if recipe.mirrors(phase):
            depth, albedo = mirrored(shape.depth, shape.albedo)
            other = replace(shape, depth=depth, albedo=albedo).seen(self.relief)
            assert other.alpha is not None
            mask = mask * other.alpha
        whole = reconstruction = reconstruction_loss(shown.image, target, mask, network, recipe.perceptual)  # Eq. 11
        if other is not None:  # Eq. 12
            whole = whole + recipe.mirror * reconstruction_loss(other.image, target, mask, network, recipe.perceptual)
        if recipe.identity:
            assert self.identity is not None
            whole = whole + recipe.identity * identity_loss(shown.image, face, self.identity.module)  # type: ignore[arg-type]
        return {"reconstruction": reconstruction, "whole": whole}

    # -- results ----------------------------------------------------------------------------------

    @torch.no_grad()
    def shape(self, state: ShapeState) -> Shape:
        """The heads of a group as far as they are."""
        image, networks, around = state.image[:, None], state.module, _around(state)
        return Shape(
            networks.each(ReliefNetworks.depth, image),
            networks.each(ReliefNetworks.albedo, image),
            networks.each(ReliefNetworks.view, image, around.view),
            networks.each(ReliefNetworks.light, image, around.light),
        )

    def _keep(self, state: ShapeState, cycle: int) -> None:
        """Write the heads as they are after a cycle; 0 is the first guess, and after the last one masks are known."""
        found = self.shape(state)
        if cycle == self.recipe.cycles and state.head is not None:
            found = replace(found, mask=head_mask(state.head, found, self.relief))
        found = found.to("cpu")
        for row, item in enumerate(state.items):
            content = {name: t.contiguous().clone() for name, t in found[row].named().items()}
            with atomic_write(self.item_dir(item.id) / f"cycle{cycle}.safetensors") as file:
                file.write_bytes(safetensors.torch.save(content))

    def _kept(self, identity: str, cycle: int) -> Shape:
        return Shape(**safetensors.torch.load_file(self.item_dir(identity) / f"cycle{cycle}.safetensors"))

    def finish_group(self, state: ShapeState) -> None:
        self._keep(state, self.recipe.cycles)
        for item, image in zip(state.items, state.image, strict=True):
            write_image(self.item_dir(item.id) / "picture.png", image)

    def export(self) -> Export:
        if self.trainer.state.fn == "predict":
            return Export(media={file.name: file for file in sorted((self.out / "pictures").iterdir())})
        modules: dict[str, nn.Module] = {}
        moved = moved_heads(item.id for item in self.items)
        for cycle in range(self.recipe.cycles + 1):
            name = "shapes" if cycle == self.recipe.cycles else f"cycle{cycle}"
            kept = {i.id: self._kept(i.id, cycle) for i in self.items}
            modules[name] = ReliefShapes.pack(kept, self.relief, moved if name == "shapes" else None)
        media = {f"picture_{item.id}.png": self.item_dir(item.id) / "picture.png" for item in self.items}
        for page, start in enumerate(range(0, len(self.items), _PAGE), 1):
            file = self.out / "sheets" / f"sheet_{page:02d}.png"
            write_image(file, self._sheet(self.items[start : start + _PAGE]))
            media[file.name] = file
        shapes = modules["shapes"]
        assert isinstance(shapes, ReliefShapes)
        modules["heads"], entries, pictures = self._heads(shapes, moved)
        if self.others is not None:
            modules[_ORIGINAL] = self.others
        extra = {"recipe": asdict(self.recipe), "sampling": asdict(self.sampling), **subject_index(entries)}
        return Export(modules, media=media | pictures, extra=extra, delta_of=self.unchanged(modules))

    def _heads(
        self, shapes: ReliefShapes, moved: Mapping[str, Mapping[str, str]]
    ) -> tuple[HeadCodes, list[Entry], dict[str, Path]]:
        """Codes of the heads, what there is to see, and pictures; moved heads are expressions of theirs."""
        own = [item for item in self.items if not any(item.id in found.values() for found in moved.values())]
        neutral, codes, media, entries = torch.zeros(1, len(moved)), {}, dict[str, Path](), []
        for item in own:
            codes[item.id] = HeadCode(shapes.code(item.id), None, neutral, shapes.camera(item.id).label())
            photo, before = f"photo_{item.id}.png", f"original_{item.id}.png"
            pictures = {"in 2D": f"picture_{item.id}.png"}
            if item.picture is not None:
                media[photo] = item.picture
            if self.others is not None:
                media[before] = self.inputs["beside"].media(f"picture_{item.id}.png")
                pictures = {"as a photo, in 2D": before, **pictures}
            left_out = {name: "its shape was not asked for" for name, of in moved.items() if item.id not in of}
            original, artwork = (None if self.others is None else _ORIGINAL), (photo if photo in media else None)
            shown = {"artwork": artwork, "caption": "its shape", "left_out": left_out, "pictures": pictures}
            entries.append(Entry(item.id, "heads", "shapes", original, **shown))
        return HeadCodes.pack(codes, shapes), entries, media

    def _sheet(self, items: Sequence[Head]) -> Tensor:
        rows = []
        for item in items:
            image = read_image(self.item_dir(item.id) / "picture.png")
            rows += rows_of(image, self._kept(item.id, self.recipe.cycles), self.relief, [item.id])
        return sheet(rows, _TILE)

    @torch.no_grad()
    def panels(self) -> dict[str, Tensor]:
        """The resident group as far as it is."""
        if not self._group:
            return {}
        state = self._group[0]
        shape, image = self.shape(state)[slice(0, _PAGE)], state.image[:_PAGE]
        return {
            "shapes": sheet(rows_of(image, shape.to("cpu"), self.relief, [i.id for i in state.items[:_PAGE]]), _TILE)
        }

    # -- test and predict -------------------------------------------------------------------------

    def on_test_start(self) -> None:
        if self.tested is None:
            raise UserError("test compares finished shapes with the truth: give --model.tested.path")
        if not isinstance(self.trainer.datamodule, KnowsSurface):  # type: ignore[attr-defined]
            raise UserError("nobody knows the surfaces of these heads: test is for data of the embedded world")

    def _tested(self, module: str) -> ReliefShapes:
        found = self.inputs["tested"].module(module)
        assert isinstance(found, ReliefShapes)
        return found

    def _found(self, identity: str, module: str = "shapes") -> Shape:
        shapes = self._tested(module)
        if identity not in shapes:
            raise UserError(
                f"{self.inputs['tested'].path} has no shape of {identity}: give the data that it was found of"
            )
        return shapes[identity].to(self.device)

    @torch.no_grad()
    def test_step(self, batch: Sequence[Head], batch_idx: int) -> None:
        """Errors of the shapes, after each cycle, of the first guess and of a flat face seen as the shapes are."""
        data, found = self.trainer.datamodule, self.inputs["tested"]  # type: ignore[attr-defined]
        relief = self._tested("shapes").relief
        names = [name for name in found.manifest["modules"] if name == "shapes" or name.startswith("cycle")]
        for item in batch:
            truth = data.surface(item.id).to(self.device)
            last = self._found(item.id)
            rows = {"flat": replace(last, depth=torch.full_like(last.depth, relief.centre))}
            for name in names:
                cycle = name.removeprefix("cycle")
                what = {"shapes": "", "0": ", first guess"}.get(cycle, f", {cycle} of the cycles")
                rows[self.variant + what] = self._found(item.id, name)
            about = PROTOCOL, VERSION, data.split, item.id, "", self.seed
            for variant, shape in rows.items():
                errors = surface_errors(relief, shape, truth)
                self.records.add([Record(*about, variant, "", name, float(value)) for name, value in errors.items()])

    def on_predict_start(self) -> None:
        if self.tested is None:
            raise UserError("predict shows finished shapes: give --model.tested.path")

    @torch.no_grad()
    def predict_step(self, batch: Sequence[Head], batch_idx: int) -> None:
        """Of each head a sheet, videos in which it turns, and its light, and its surface as a mesh."""
        shapes, folder = self._tested("shapes"), self.out / "pictures"
        for item in batch:
            shape, code = self._found(item.id), shapes.code(item.id)
            picture = read_image(self.inputs["tested"].media(f"picture_{item.id}.png"))
            rows = rows_of(picture, shape.to("cpu"), shapes.relief, [item.id])
            write_image(folder / f"sheet_{item.id}.png", sheet(rows, 2 * _TILE))
            for suffix in (".glb", ".ply"):
                write_mesh(folder / f"mesh_{item.id}{suffix}", shapes.mesh(code))
            turning = shapes.synthesis(code, shapes.rig.turntable(FRAMES, math.radians(YAW_DEG)), resolution=SIDE)
            write_video(folder / f"turning_{item.id}.mp4", turning.image)
            still = shapes.synthesis(code, shapes.camera(item.id), resolution=SIDE)
            write_video(folder / f"light_{item.id}.mp4", relit(still, moving_light(FRAMES)))


def _around(state: ShapeState, count: int = 1) -> _Samples:
    """The pictures, each ``count`` times, with the views and lights that theirs are offsets to."""
    image, view, light = (t[:, None].expand(-1, count, *t.shape[1:]) for t in (state.image, state.view, state.light))
    return _Samples(image, torch.ones_like(image[:, :, :1]), view, light)


def _parts(seen: Tensor, networks: int) -> Sequence[Tensor]:
    """What each of so many networks sees of (N, K, ...): of one head, or, where there is one network, of all."""
    return [seen.flatten(0, 1)] if networks == 1 else list(seen)


def _drawn(seed: int, what: str, build: Callable[[], ModuleT]) -> ModuleT:
    """A module whose weights hang on nothing but the seed and a name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(item_seed(seed, what, -1))
        return build()
