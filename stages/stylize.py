"""Directional-guided stylisation of an anchored generator (3DArtmator, Sec. 3.3)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.artworks import Artwork
from datamodules.truth import KnowsItemTruth
from models.artifact import Export, load
from models.augment.pairs import PairAugmentation
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.faces.pose import lift
from models.features.base import FacePoints, Frozen
from models.files import atomic_write
from models.generators.base import Generator
from models.generators.views import render_views
from models.heads.codes import HeadCode, HeadCodes
from models.heads.index import Entry, read_index, subject_index
from models.heads.subjects import Subject, Subjects
from models.heads.tuning import TunedWeights, select_parameters, with_weights
from models.image import resized, write_image
from models.latents import Latents
from models.losses.direction import directional_l2, directional_loss, displacement
from models.losses.inversion import locality
from models.losses.landmarks import landmark_distance
from models.metrics.faces import EXPECTED, measured_expressions, score_faces
from models.metrics.image import change_correlation, diversity, identity_similarity, masked_mean
from models.metrics.portrait import HeadTruth, Score, compare_input, compare_views, score_head, strip
from models.metrics.records import Record, read_records, write_records
from models.rendering.animation import EXPRESSIONS, animate, face_views
from models.rendering.output import Rendering
from models.rendering.reprojection import PseudoView, mirrored, reprojected, weighted_reference
from models.schedule import Schedule, rate, set_rates
from stages.base.foreign import warn_of_embedded
from stages.base.per_item import GroupState, PerItemStage
from stages.base.seeds import item_generator
from stages.base.stage import ArtifactRef

log = logging.getLogger(__name__)

PROTOCOL, PROTOCOL_VERSION = "artform-multiview", "1"
FACES_PROTOCOL, FACES_VERSION = "portrait-faces", "1"
PICTURE_PROTOCOL, PICTURE_VERSION = "portrait-picture", "1"
_WARP = "warp"
_CHUNK = 8  # views rendered at once before the tuning starts
_ORBIT = 7
_WAY = 0.12  # eye distances that an expression's points count for, all its way
_BY_POINTS = ("blink",)  # a lid is a pixel high, which pictures hardly teach; a mouth they do, and points smear it


@dataclass(frozen=True)
class TuningConfig:
    """How a generator is tuned to an artwork. The defaults are the paper's.

    A 2D generator has one view, which is the artwork's and each random one. Terms that need more than a generator
    renders are left out, and the log says so: mirror, rim, background, carry, carry_face and geometry without depth,
    expression without any that could be drawn.

    Attributes:
        steps: optimisation steps (the paper gives no number).
        learning_rate, betas: of Adam. schedule: "constant", or "cosine" down to a twentieth.
        clip: largest norm of an item's gradient over all its parameters; 0 does not clip.
        train, freeze: which parameters move, see :func:`models.heads.tuning.select_parameters`.
        latent: "anchor", or "random": a fixed random code (the ablation of Sec. 4.5).
        direction: l3, weight of L_dir (Eq. 7). spatial: l4, weight of L_spa (LPIPS at the artwork's view).
        views: N random views a step.
        direction_form: "cosine" (Eq. 7), or "l2", which asks for the length of the direction as well.
        direction_floor: the direction is left out while its squared norm is at most this share of the guide's.
        normalize_embedding: bring embeddings to unit length before they are subtracted.
        augment: of both images of a pair, before they are embedded.
        pool: the random views are drawn from this many, fixed per item: the original's pictures are kept. null draws
            new ones each step, as the paper, and renders the original there too.
        frugal: render view by view, for the gradient again: a third more work, and memory for one view.
        yaw_max_deg, pitch_max_deg: limits of the random views, drawn uniformly; null for the generator's own poses.
        pixel: weight of the mean squared error at the artwork's view (PTI).
        background: what pixels of the artwork count, in the terms of its own view, where it shows background and the
            anchor its head, or a person beyond that head; and whether only the person is carried and mirrored, which
            is so below 1. 1 counts all alike.
        mirror: weight of the flipped artwork as a picture from the mirrored view.
        mirror_hidden: only where the artwork itself shows nothing.
        rim: what pixels of the artwork count that show the head at a grazing angle, in the terms of its own view:
            an outline painted onto the side of the head is a black patch from elsewhere. 1 counts all alike.
        carry: weight of the artwork carried to the random views along the anchor's depth.
        carry_fill: weight in it of colours found by analogy, where the artwork shows nothing.
        geometry: weight of the squared change of opacity and depth at the random views.
        carry_face: how far the face is carried by its own mesh instead, from 0 to 1: the anchor's nose is not the
            artwork's.
        landmark: weight of the distance between the face's points in the picture and in the artwork, at its view.
        expression: weight of the artwork with another expression, as :mod:`models.rendering.animation` draws it, asked
            of the head with that expression; one expression a step, at the artwork's view and at the random ones by
            turns.
        expression_beyond: artworks that are nearer to their anchor than this perceptual distance are of the generator's
            own kind: its own expressions are kept, as they fit.
        locality: weight of PTI's locality regularisation. locality_distance: of its codes from the pivot.
        locality_truncation: of the random codes that these lie towards; 1 does not truncate.
    """

    steps: int = 500
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Schedule = "constant"
    clip: float = 0.0
    train: str = "synthesis"
    freeze: str = "predictor"
    latent: Literal["anchor", "random"] = "anchor"
    direction: float = 1.0
    spatial: float = 1.0
    views: int = 1
    direction_form: Literal["cosine", "l2"] = "cosine"
    direction_floor: float = 1e-2
    normalize_embedding: bool = True
    augment: PairAugmentation = PairAugmentation()  # noqa: RUF009 - frozen
    pool: int | None = 64
    frugal: bool = False
    yaw_max_deg: float | None = None
    pitch_max_deg: float | None = None
    pixel: float = 0.0
    rim: float = 1.0
    background: float = 1.0
    mirror: float = 0.0
    mirror_hidden: bool = True
    carry: float = 0.0
    carry_fill: float = 0.5
    carry_face: float = 0.0
    geometry: float = 0.0
    landmark: float = 0.0
    expression: float = 0.0
    expression_beyond: float = 0.0
    locality: float = 0.0
    locality_distance: float = 30.0
    locality_truncation: float = 1.0

    def __post_init__(self) -> None:
        positive = "learning_rate", "locality_distance", "locality_truncation", "yaw_max_deg", "pitch_max_deg"
        check_positive(self, *positive, where="recipe.")
        weights = (
            "direction", "spatial", "pixel", "mirror", "carry", "geometry", "landmark", "expression", "locality"
        )  # fmt: skip
        check_not_negative(
            self, *weights, "clip", "direction_floor", "rim", "background", "carry_fill", "carry_face", where="recipe."
        )
        if self.carry_face > 1:
            raise UserError(f"recipe.carry_face is {self.carry_face}: it must be a number from 0 to 1")
        if not any(getattr(self, name) for name in ("direction", "spatial", "pixel", "mirror", "carry")):
            raise UserError("recipe: no term that could move the generator has a weight")
        if self.steps < 1 or self.views < 0 or (self.pool is not None and self.pool < 1):
            raise UserError("recipe: steps and pool must be at least 1, views at least 0")
        if self.pool is None and (self.carry or not self.views):
            raise UserError("recipe.pool: null draws new views each step, which carry and no views at all cannot use")
        if self.views == 0 and (self.direction or self.carry or self.geometry):
            raise UserError("recipe: direction, carry and geometry need at least one random view")

    @property
    def reads_faces(self) -> bool:
        """Whether a term needs the artwork's face."""
        return bool(self.landmark or self.expression or self.carry_face or self.background < 1)


@dataclass(frozen=True)
class Target:
    """The constants of one item.

    Attributes:
        ws: its fixed codes. z: (1, z_dim) behind them, or None. expression: (1, E), or None for neutral.
        reference: the artwork, a batch of one, with what its pixels count. camera: its view, None in 2D.
        guide: (1, D), Eq. 4; None without a direction term.
        pool: the random views, None in 2D and where each step draws its own. views: of G_ori from there; the
            artwork's without a pool.
        mirrored: the artwork as the mirrored camera sees it, or None. reprojected: for all of the pool, or None.
        points: (1, 468, 3) of the artwork's face, or None.
        animated: what the artwork shows with other expressions; None where the generator's own fit.
    """

    ws: Latents
    z: Tensor | None
    expression: Tensor | None
    reference: PseudoView
    camera: Camera | None
    guide: Tensor | None
    pool: Camera | None
    views: Rendering
    mirrored: PseudoView | None
    reprojected: PseudoView | None
    points: Tensor | None
    animated: list[Animated] | None


@dataclass(frozen=True)
class Animated:
    """The artwork with another expression.

    Attributes:
        expression: (1, E) of the head that is to look like it.
        picture: a batch of one, with what its pixels count: more where they are not the artwork's.
        points: (1, 468, 3) of its face. moved: (468,) how much each counts: more where it is not the artwork's.
        way: how far they are from the artwork's. by_points: whether they are followed beside the picture.
        world: (468, 3) of them where they lie, or None.
    """

    expression: Tensor
    picture: PseudoView
    points: Tensor
    moved: Tensor
    way: float
    by_points: bool
    world: Tensor | None


class ItemWeights(nn.Module):
    """What survives a kill: the tuned weights of one item and its loss curve (steps,)."""

    def __init__(self, tuned: TunedWeights, steps: int) -> None:
        super().__init__()
        self.tuned = tuned
        self.curve: Tensor
        self.register_buffer("curve", torch.full((steps,), torch.nan))


@dataclass
class StyleState(GroupState[Artwork]):
    """The group.

    Attributes:
        recipe: what is possible of the stage's. targets: by item.
    """

    recipe: TuningConfig
    targets: list[Target]

    def item(self, index: int) -> ItemWeights:
        """What is tuned for one item."""
        return self.module[index]  # type: ignore[index,return-value]


class StylizeStage(PerItemStage[Artwork, StyleState]):
    """Tunes a copy of the generator per artwork: L_style = l3 L_dir + l4 L_spa (Eq. 4 to 7).

    The style's direction is measured at the artwork's view, between artwork and anchor, and asked for at random
    views. Beyond the paper, each with weight 0 by default: the pixels at the artwork's view, its mirror image,
    its colours carried along the anchor's depth, unchanged geometry, and PTI's locality.

    ``test`` scores finished heads, of this stage or of any other, against data that know the truth
    (:class:`datamodules.truth.KnowsItemTruth`); where nobody knows it, by the artwork itself, by how diverse the tuned
    generator is, and by what a reader of faces sees (:mod:`models.metrics.faces`). One file a head; a rerun goes on
    where the last one ended.

    Args:
        anchor: artifact of the anchor stage; holds the generator and the anchors. Not for test.
        perceptual: LPIPS of L_spa, and of the evaluation.
        landmarks: finds faces, for the terms landmark, expression and background, and for what test sees of heads
            without truth; null without these.
        style: the image embedding E of L_dir; null without that term.
        recipe: how to tune.
        group_size, save_every, seed: as :class:`PerItemStage`.
        tested: the artifacts that test scores, by their name in the table.
        identity: identity embedding of the evaluation; null leaves its metrics out.
        network: name of the evaluation's networks in the table.
        warp: also score the artwork warped along the generator's average head, to which nothing is fitted: what a
            reenactment by warping alone can do. Its name in the table is "warp".
        diversity_pictures, diversity_pairs: random heads, and pairs of them, by which test tells how diverse the tuned
            generator is; the paper has 1,000 and all of their pairs (Sec. 4.4).
    """

    name = "stylize"

    def __init__(
        self,
        anchor: ArtifactRef | None,
        perceptual: nn.Module,
        style: nn.Module | None = None,
        landmarks: nn.Module | None = None,
        recipe: TuningConfig = TuningConfig(),
        group_size: int = 1,
        save_every: int = 100,
        seed: int = 0,
        tested: dict[str, str] | None = None,
        identity: nn.Module | None = None,
        network: str = "embedded",
        warp: bool = False,
        diversity_pictures: int = 12,
        diversity_pairs: int = 2000,
    ) -> None:
        super().__init__(steps=recipe.steps, group_size=group_size, save_every=save_every, seed=seed)
        self.anchor, self.recipe, self.tested, self.network = anchor, recipe, tested or {}, network
        self.diversity_pictures, self.diversity_pairs = diversity_pictures, diversity_pairs
        self.warp = warp
        if warp and _WARP in self.tested:
            raise UserError(f"model.tested: {_WARP} is the name of what --model.warp scores")
        check_positive(self, "diversity_pairs")
        if diversity_pictures < 2:
            raise UserError(f"diversity_pictures is {diversity_pictures}: pairs need at least 2")
        self.perceptual = Frozen(perceptual)
        self.style = None if style is None else Frozen(style)
        self.identity = None if identity is None else Frozen(identity)
        self.landmarks = None if landmarks is None else Frozen(landmarks)
        if recipe.reads_faces and landmarks is None:
            raise UserError(
                "recipe: landmark, expression, background and carry_face need --model.landmarks, which finds faces"
            )
        self._strips: dict[str, Tensor] = {}
        self._said: set[str] = set()  # once for all groups
        self._spread: dict[int, tuple[Generator, float]] = {}  # of the original that was measured last

    def build_model(self) -> None:
        if self.tested:
            self.inputs |= {name: load(path) for name, path in self.tested.items()}
            self.heads = {name: Subjects(self.inputs[name]) for name in self.tested}
            return
        if self.anchor is None:
            raise UserError("give what to stylise as --model.anchor.path, or for test what to score as --model.tested")
        if self.recipe.direction and self.style is None:
            raise UserError("recipe.direction has a weight, and there is no embedding to measure it: see --model.style")
        self.generator = self.take("anchor", self.anchor.path, "generator", Generator).requires_grad_(False)
        self.anchors = self.take("anchor", self.anchor.path, "anchors", HeadCodes)

    def on_fit_start(self) -> None:
        warn_of_embedded(self.generator, self.perceptual, self.style if self.recipe.direction else None)
        super().on_fit_start()

    # -- one group --------------------------------------------------------------------------------

    def start_group(self, items: Sequence[Artwork]) -> StyleState:
        recipe = self._possible(self.recipe)
        try:
            names = select_parameters(self.generator, recipe.train, recipe.freeze, expression=recipe.expression > 0)
        except UserError as error:
            raise UserError(f"recipe.train, recipe.freeze: {error}") from error
        targets = [self._target(item, recipe) for item in items]
        modules = [ItemWeights(TunedWeights(self.generator, names), self.steps) for _ in items]
        module = nn.ModuleList(modules).to(self.device)
        optimizer = torch.optim.Adam(module.parameters(), recipe.learning_rate, betas=recipe.betas)
        return StyleState(items, module, {"weights": optimizer}, recipe, targets)

    @torch.no_grad()
    def _possible(self, recipe: TuningConfig) -> TuningConfig:
        """The recipe without the terms that need more than the generator renders."""
        needs = {"rim": 1.0, "background": 1.0, "carry_face": 0.0, "carry": 0.0, "geometry": 0.0}
        if recipe.mirror_hidden or not self.generator.is_3d:
            needs["mirror"] = 0.0
        if recipe.expression and not expression_codes(self.generator, None, self.device):
            self._say("the generator has no expressions that could be drawn: the recipe goes without expression")
            recipe = dataclasses.replace(recipe, expression=0.0)
        without = {name: value for name, value in needs.items() if getattr(recipe, name) != value}
        if not without:
            return recipe
        what = "is 2D"
        if self.generator.is_3d:
            seen = self.generator.synthesis(
                self.generator.mean_latents, self.generator.rig.camera(0.0, 0.0, self.device)
            )
            if seen.depth is not None and seen.alpha is not None:
                return recipe
            what = "renders no depth"
        self._say(f"the generator {what}: the recipe goes without {', '.join(without)}")
        return dataclasses.replace(recipe, **without)

    def _say(self, what: str) -> None:
        if what not in self._said:
            log.info(what)
            self._said.add(what)

    def _code(self, identity: str, draws: torch.Generator) -> HeadCode:
        """Where an artwork lies in the generator: what is tuned."""
        assert self.anchor is not None
        if identity not in self.anchors:
            known = ", ".join(self.anchors.ids)
            raise UserError(f"{self.anchor.path} has no anchor of the artwork {identity}, it has: {known}")
        if self.recipe.latent == "anchor":
            return self.anchors[identity]
        z = self.generator.sample_z(1, draws).to(self.device)
        return dataclasses.replace(self.anchors[identity], z=z, latents=self.generator.mapping(z))

    @torch.no_grad()
    def _target(self, item: Artwork, recipe: TuningConfig) -> Target:
        generator, draws = self.generator, item_generator(self.seed, item.id, -1)
        anchor = self._code(item.id, draws)
        reference = item.at(generator.resolution)[None].to(self.device)
        camera = None if anchor.camera is None else anchor.camera.to(self.device)
        ws, z = anchor.latents.to(self.device), None if anchor.z is None else anchor.z.to(self.device)
        expression = None if anchor.neutral else anchor.expression.to(self.device)
        pool = None
        if camera is not None and recipe.pool is not None:
            pool = self._random_views(recipe, recipe.pool, draws).to(self.device)
        chunk = 1 if recipe.frugal else _CHUNK
        seen = render_views(generator, ws, camera, expression, chunk=chunk)
        views = seen if pool is None else render_views(generator, ws, pool, expression, chunk=chunk)
        beyond = recipe.expression_beyond
        akin = beyond > 0 and float(self.perceptual(seen.image, reference).mean()) < beyond
        guide = None
        if recipe.direction and self.style is not None:
            guide = displacement(self.style(reference), self.style(seen.image), recipe.normalize_embedding)  # Eq. 4
        opposite = elsewhere = None
        face = PseudoView(reference, torch.ones_like(reference[:, :1]))
        points = self._points(item, recipe)
        if camera is not None:
            unit = generator.rig.scale
            person = self._person(item, points, recipe)
            face = weighted_reference(reference, camera, seen, recipe.rim, person, recipe.background)
            if recipe.mirror:
                other = render_views(generator, ws, camera.mirror(), expression)
                opposite = mirrored(reference, camera, seen, other, recipe.mirror_hidden, unit, person)
            if recipe.carry and pool is not None:
                elsewhere = reprojected(reference, camera, seen, pool, views, recipe.carry_fill, unit, person)
                if points is not None and recipe.carry_face and seen.depth is not None:
                    world = lift(points[0], camera, seen.depth)
                    if world is not None:
                        side = elsewhere.image.shape[-1]
                        own = face_views(reference, points[0], world, self._faces.canonical, pool, side)
                        elsewhere = elsewhere.under(own, recipe.carry_face)
        animated: list[Animated] | None = None if akin else []
        if points is not None and not akin:
            animated = self._animated(item, points[0], camera, seen, expression, recipe)
        return Target(
            ws=ws,
            z=z,
            expression=expression,
            reference=face,
            camera=camera,
            guide=guide,
            pool=pool,
            views=views,
            mirrored=opposite,
            reprojected=elsewhere,
            points=points,
            animated=animated,
        )

    @property
    def _faces(self) -> FacePoints:
        assert self.landmarks is not None
        return cast(FacePoints, self.landmarks.module)

    def _points(self, item: Artwork, recipe: TuningConfig) -> Tensor | None:
        """(1, 468, 3) of the artwork's face."""
        if self.landmarks is None or not recipe.reads_faces:
            return None
        found = self._faces.find(item.image[None].to(self.device))
        if found is None:
            log.info("%s: no face is found in it: landmark, expression and background do not count", item.id)
            return None
        return found[None]

    def _person(self, item: Artwork, points: Tensor | None, recipe: TuningConfig) -> Tensor | None:
        """(1, 1, S, S) mask of the artwork, None where all of it counts alike."""
        if points is None or self.landmarks is None or recipe.background == 1:
            return None
        return self._faces.person(item.image[None].to(self.device), points[0])

    def _animated(
        self,
        item: Artwork,
        points: Tensor,
        camera: Camera | None,
        seen: Rendering,
        expression: Tensor | None,
        recipe: TuningConfig,
    ) -> list[Animated]:
        """The artwork with each expression that the generator has."""
        found = []
        if not recipe.expression or self.landmarks is None:
            return found
        image, side = item.image[None].to(self.device), self.generator.resolution
        before = resized(image, side)
        for name, code in expression_codes(self.generator, expression, self.device).items():
            picture, after = animate(image, points, self._faces.canonical, name)
            picture = resized(picture, side).clamp(-1, 1)
            changed = ((picture - before).abs().amax(1, keepdim=True) > 0.05).float()
            weight = 1 + 9 * F.avg_pool2d(F.max_pool2d(changed, 3, 1, 1), 3, 1, 1)
            distance = (after - points).norm(dim=1)
            moved = 1 + distance / distance.mean().clamp_min(1e-6)
            way = float(landmark_distance(points[None], after[None], moved))
            world = None if camera is None or seen.depth is None else lift(after, camera, seen.depth)
            found.append(
                Animated(
                    expression=code,
                    picture=PseudoView(picture, weight),
                    points=after[None],
                    moved=moved,
                    way=max(way, 1e-3),
                    by_points=name in _BY_POINTS,
                    world=world,
                )
            )
        return found

    def _random_views(self, recipe: TuningConfig, count: int, draws: torch.Generator) -> Camera:
        rig = self.generator.rig
        if recipe.yaw_max_deg is None and recipe.pitch_max_deg is None:
            return rig.random(count, draws)  # the training pose distribution
        yaw, pitch = 2 * torch.rand(2, count, generator=draws) - 1
        limits = [
            limit if degrees is None else min(math.radians(degrees), limit)
            for degrees, limit in ((recipe.yaw_max_deg, rig.yaw_max), (recipe.pitch_max_deg, rig.pitch_max))
        ]
        return rig.camera(rig.yaw_mean + yaw * limits[0], rig.pitch_mean + pitch * limits[1])

    # -- one step ---------------------------------------------------------------------------------

    def optimise(self, state: StyleState, step: int) -> dict[str, Tensor]:
        recipe, rows = state.recipe, []
        set_rates(state.optimizers.values(), rate(recipe.schedule, step, self.steps))
        for index, (item, target) in enumerate(zip(state.items, state.targets, strict=True)):
            draws = item_generator(self.seed, item.id, step)
            terms = self._terms(state.item(index).tuned, target, recipe, draws)
            state.item(index).curve[step] = terms["loss"].detach().float()
            rows.append(terms)
        names = dict.fromkeys(name for row in rows for name in row)  # an artwork without a face has fewer
        nothing = torch.zeros((), device=self.device)
        return {name: torch.stack([row.get(name, nothing) for row in rows]) for name in names}

    def _terms(
        self, tuned: TunedWeights, target: Target, recipe: TuningConfig, draws: torch.Generator
    ) -> dict[str, Tensor]:
        """The terms of one item, each a scalar, with their weighted sum as ``loss``."""
        chosen = torch.randint(len(target.views.image), (recipe.views,), generator=draws).to(self.device)
        cameras, first, original = None, 0, target.views[chosen]
        if target.camera is not None:
            given = [target.camera] + ([target.camera.mirror()] if target.mirrored is not None else [])
            if target.pool is not None:
                turned = target.pool[chosen]
            else:
                turned = self._random_views(recipe, recipe.views, draws).to(self.device)
                with torch.no_grad():
                    original = render_views(self.generator, target.ws, turned, target.expression, chunk=_CHUNK)
            cameras, first = Camera.cat([*given, turned]), len(given)
        ws = self._moved(tuned, target.ws, target.z)
        # One pass of the backbone serves all views.
        out = (tuned.frugal if recipe.frugal else tuned.synthesis)(ws, cameras, expression=target.expression)
        own = out.image[:1]
        random_views = own.expand(recipe.views, -1, -1, -1) if cameras is None else out.image[first:]
        terms: dict[str, Tensor] = {}
        if recipe.spatial:
            terms["spatial"] = self.perceptual(own, target.reference.completed(own)).mean()  # L_spa
        if recipe.pixel:
            terms["pixel"] = target.reference.error(own).mean()
        if target.mirrored is not None:
            seen, pseudo = target.mirrored.sized(out.image[1:2]), target.mirrored
            distance = self.perceptual(seen, pseudo.completed(seen)) if recipe.spatial else 0.0
            terms["mirror"] = (pseudo.error(seen) + distance).mean()
        if target.reprojected is not None:
            pseudo = target.reprojected[chosen]
            seen = pseudo.sized(random_views)
            distance = self.perceptual(seen, pseudo.completed(seen)) if recipe.spatial else 0.0
            terms["carry"] = (pseudo.error(seen) + distance).mean()
        if recipe.geometry:
            assert out.alpha is not None and original.alpha is not None
            change = out[first:] - original
            assert change.alpha is not None and change.depth is not None
            both = (original.alpha > 0.5) & (out.alpha[first:] > 0.5)
            moved = change.alpha.square() + both * (change.depth / self.generator.rig.scale).square()
            terms["geometry"] = moved.mean()
        if recipe.landmark and target.points is not None and self.landmarks is not None:
            terms["landmark"] = landmark_distance(self.landmarks(own, target.points), target.points).mean()
        if target.animated:
            other = target.animated[int(torch.randint(len(target.animated), (1,), generator=draws))]
            view = int(torch.randint(2 * len(target.views.image), (1,), generator=draws))
            terms["expression"] = self._expression(tuned, ws, target, other, view, recipe)
        if recipe.locality:
            terms["locality"] = self._locality(tuned, target, recipe, draws)
        total = sum(
            (getattr(recipe, name) * value for name, value in terms.items()), torch.zeros((), device=self.device)
        )
        if recipe.direction and target.guide is not None:
            value, pull = self._direction(random_views, original.image, target.guide, recipe, draws)
            # Nothing else would ever leave the original: start along the guide.
            total = total + recipe.direction * (value if pull is None or terms else pull)
            terms["direction"] = value
        return {"loss": total, **{name: value.detach() for name, value in terms.items()}}

    def _moved(self, tuned: TunedWeights | Generator, ws: Latents, z: Tensor | None) -> Latents:
        """The fixed codes as a tuned mapping has them; what they hold beyond mapping(z), a refinement in w+, stays."""
        if self.recipe.train != "all" or z is None:
            return ws
        return ws + tuned.mapping(z) - self.generator.mapping(z)

    def _direction(
        self, tuned: Tensor, original: Tensor, guide: Tensor, recipe: TuningConfig, draws: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """L_dir (Eq. 5 to 7), a mean over the views instead of their sum; and what to minimise while it is undefined.

        While tuned and original pictures are alike the direction is 0/0, and just after that its gradient is
        huge: Adam's second moment would remember it for long. Up to ``direction_floor`` a view is left out.
        The second result is minus the part of the change along the guide when all are left out, else ``None``.
        """
        assert self.style is not None
        tuned, original = recipe.augment(tuned, original, draws)
        with torch.no_grad():
            before = self.style(original)
        delta = displacement(self.style(tuned), before, recipe.normalize_embedding).float()  # Eq. 6
        guide = guide.float()
        if recipe.direction_form == "l2":
            return directional_l2(guide, delta).mean(), None
        square = guide.square().sum()
        views = directional_loss(guide, delta, eps=max(1e-8, recipe.direction_floor * float(square)))  # Eq. 7
        if bool(views.valid.any()):
            return views.mean(), None
        return delta.new_zeros(()), -(delta @ guide[0]).mean() / square.clamp(min=1e-8)

    def _expression(
        self, tuned: TunedWeights, ws: Latents, target: Target, other: Animated, view: int, recipe: TuningConfig
    ) -> Tensor:
        """How far the head with an expression is from the artwork with it: from its own view, or one of the pool's."""
        camera, picture, there = target.camera, other.picture, other.points
        if target.pool is not None and other.world is not None and view < len(target.pool):
            camera = target.pool[view]
            side = picture.image.shape[-1]
            picture = face_views(picture.image, other.points[0], other.world, self._faces.canonical, camera, side)
            there = camera.project(other.world[None])[0]
        show = tuned.frugal if recipe.frugal else tuned.synthesis
        seen = show(ws, camera, expression=other.expression).image
        distance = picture.error(seen)
        if recipe.spatial:
            distance = distance + self.perceptual(seen, picture.completed(seen))
        if recipe.landmark and self.landmarks is not None and other.by_points:
            left = landmark_distance(self.landmarks(seen, there), there, other.moved) / other.way
            distance = distance + recipe.landmark * _WAY * left
        return distance.mean()

    def _locality(self, tuned: TunedWeights, target: Target, recipe: TuningConfig, draws: torch.Generator) -> Tensor:
        """PTI's regularisation at a code near the pivot, from the artwork's view."""
        z = self.generator.sample_z(1, draws).to(self.device)
        where = recipe.locality_distance, recipe.locality_truncation
        return locality(tuned, self.generator, target.ws, z, target.camera, self.perceptual, *where).mean()

    def before_step(self, state: StyleState) -> None:
        if state.recipe.clip:
            for index in range(len(state.items)):
                torch.nn.utils.clip_grad_norm_(state.item(index).parameters(), state.recipe.clip)

    # -- results ----------------------------------------------------------------------------------

    @torch.no_grad()
    def finish_group(self, state: StyleState) -> None:
        for index, (item, target) in enumerate(zip(state.items, state.targets, strict=True)):
            folder, weights = self.item_dir(item.id), state.item(index)
            halves = {name: t.half().cpu().contiguous() for name, t in weights.tuned.tensors().items()}
            with atomic_write(folder / "tuned.safetensors") as file:
                file.write_bytes(safetensors.torch.save(halves))
            with atomic_write(folder / "curve.csv") as file:
                rows = [f"{step},{loss!r}" for step, loss in enumerate(weights.curve.tolist())]
                file.write_text("\n".join(["step,loss", *rows]) + "\n")
            orbit = None
            if target.camera is not None:
                _, pitch = self.generator.rig.angles(target.camera)
                orbit = self.generator.rig.orbit(_ORBIT, pitch=float(pitch)).to(self.device)
            chunk, codes = 1 if self.recipe.frugal else _CHUNK, self._moved(weights.tuned, target.ws, target.z)
            before = render_views(self.generator, target.ws, orbit, target.expression, chunk=chunk).image
            render = weights.tuned.frugal if self.recipe.frugal else weights.tuned.synthesis
            after = render(codes, orbit, expression=target.expression).image
            picture = strip(before, after).cpu()
            self._strips[item.id] = picture
            write_image(folder / "views.png", picture)
            own = weights.tuned.synthesis(codes, target.camera, expression=target.expression).image
            write_image(folder / "stylised.png", own)
            with atomic_write(folder / "expressions.json") as file:
                file.write_text(json.dumps(self._left_out(weights.tuned, target), indent=1) + "\n")

    def _left_out(self, tuned: TunedWeights, target: Target) -> dict[str, str]:
        """Expressions that the head does not show, and why."""
        if target.animated is None:
            return {}
        if target.points is None:
            if not self.recipe.expression:
                return {}
            names = expression_codes(self.generator, target.expression, self.device)
            return dict.fromkeys(names, "no face is found in the artwork")
        own = target.expression
        if own is None:
            own = torch.zeros(1, len(self.generator.expressions), device=self.device)
        head = with_weights(self.generator, tuned.tensors())
        codes = self._moved(tuned, target.ws, target.z)
        measured = measured_expressions(head, codes, own, self._faces)
        reasons = {name: EXPECTED[name].missing(*values) for name, values in measured.items()}
        return {name: why for name, why in reasons.items() if why}

    @torch.no_grad()
    def export(self) -> Export:
        source = self.inputs["anchor"]
        ids, codes = [item.id for item in self.items], {}
        artworks = {entry.id: entry.artwork for entry in read_index(source.manifest) if entry.artwork is not None}
        modules: dict[str, nn.Module] = {"generator": self.generator, "anchors": self.anchors}
        media: dict[str, Path] = {}
        entries, deltas = [], {}
        for identity in ids:
            folder, own, artwork = self.item_dir(identity), f"stylised.{identity}", f"reference_{identity}.png"
            tuned = with_weights(self.generator, safetensors.torch.load_file(folder / "tuned.safetensors"))
            modules[own], code = tuned, self._code(identity, item_generator(self.seed, identity, -1))
            z = None if code.z is None else code.z.to(self.device)
            codes[identity] = dataclasses.replace(code, latents=self._moved(tuned, code.latents.to(self.device), z))
            media |= {f"{kind}_{identity}.png": folder / f"{kind}.png" for kind in ("views", "stylised")}
            media[artwork] = source.media(artworks[identity])
            left_out = json.loads((folder / "expressions.json").read_text("utf-8"))
            entries.append(
                Entry(identity, "anchors", own, "generator", artwork=artwork, caption="stylised", left_out=left_out)
            )
            deltas[own] = "generator"
        if self.recipe.latent == "random" or self.recipe.train == "all":
            modules["anchors"] = HeadCodes.pack(codes, self.generator)
        items = [entry for entry in source.extra.get("items", []) if isinstance(entry, dict) and entry.get("id") in ids]
        about = {"items": items, "recipe": dataclasses.asdict(self.recipe), "seed": self.seed}
        return Export(
            modules,
            media=media,
            extra=about | subject_index(entries),
            dtype=dict.fromkeys(deltas, "float16"),
            delta_of=deltas | self.unchanged({"generator": self.generator}),
        )

    def panels(self) -> dict[str, Tensor]:
        return {"stylised": torch.cat(list(self._strips.values())[-4:], 1)} if self._strips else {}

    # -- evaluation -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "test":
            if self.tested:
                raise UserError("model.tested is for test")
            return
        if not self.tested:
            raise UserError("test scores finished heads: name their artifacts as --model.tested.NAME PATH")

    def on_test_start(self) -> None:
        for heads in self.heads.values():
            if not heads.generator.is_3d:
                raise UserError(f"test compares views, and {heads.artifact.path} holds a 2D generator")

    @torch.no_grad()
    def test_step(self, batch: Sequence[Artwork], batch_idx: int) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for item in batch:
            todo = [name for name in self.heads if not self._result(name, item.id).exists()]
            if not isinstance(data, KnowsItemTruth):
                for name in todo:
                    self._score_picture(name, self.heads[name], item.id)
                continue
            warps = self.warp and not self._result(_WARP, item.id).exists()
            truth = data.item_truth(item.id).to(self.device) if todo or warps else None
            if warps and truth is not None:
                self._score_warp(item.id, truth, data.split)
            for name in todo:
                assert truth is not None
                self._score(name, self.heads[name], item.id, truth, data.split)

    def _score(self, name: str, heads: Subjects, identity: str, truth: HeadTruth, split: str) -> None:
        head = heads[identity]
        generator, codes = head.generator.to(self.device), head.latents.to(self.device)
        expression = head.expression.to(self.device) if head.expression.any() else None
        scores, pictures = score_head(
            generator, codes, expression, truth, self.perceptual, self.identity, generator.expressions
        )
        scores += [*self._diversity(head), *self._beside_usual(head, codes, truth)]
        scores += self._expressions(head, codes, truth)
        if head.camera is not None:
            turn = (head.camera.forward.to(self.device) * truth.input.camera.forward).sum().clamp(-1, 1).acos()
            scores.append(Score("input", "camera_error_deg", False, math.degrees(float(turn))))
        about = PROTOCOL, PROTOCOL_VERSION, split
        write_records(self._result(name, identity), self._records(about, name, heads, identity, scores, truth.subject))
        write_image(self.out / "strips" / name / f"{identity}.png", pictures)
        shown = {score.metric: score.value for score in scores if score.view == "input"}
        log.info("%s, %s: input view %.2f dB", identity, name, shown["psnr"])

    def _beside_usual(self, head: Subject, codes: Latents, truth: HeadTruth) -> list[Score]:
        """Beside the original's average head, where inversions start: how far from it the artwork's mean colour is, in
        [-1, 1], and how like it the found head still looks (Fig. 7).
        """
        original, camera = (head.original or head.generator).to(self.device), truth.input.camera
        usual = original.synthesis(original.mean_latents, camera).image
        shift = (truth.input.image - resized(usual, truth.input.image.shape[-1])).transpose(0, 1)
        scores = [Score("input", "palette", False, float(masked_mean(shift, truth.input.mask).norm()))]
        if self.identity is not None:
            own = head.expression.to(self.device)
            found = head.generator.synthesis(codes, camera, expression=own if own.any() else None).image
            like = float(identity_similarity(self.identity, found.clamp(-1, 1), usual.clamp(-1, 1)))
            scores.append(Score("input", "identity_start", True, like))
        return scores

    def _expressions(self, head: Subject, codes: Latents, truth: HeadTruth) -> list[Score]:
        """How far an expression changes the tuned head as it changes the original one (Fig. 11): ``kept``, of the same
        codes, and ``alike``, of the original's mean head, with which all heads are compared.
        """
        tuned, original = head.generator, head.original
        names, expressions = tuned.expressions, truth.faces.expression
        if original is None or not names or len(names) != expressions.shape[1]:
            return []
        own, mean = head.expression.to(self.device), original.mean_latents
        asked = ((tuned, codes, own), (original.to(self.device), codes, own), (original, mean, torch.zeros_like(own)))
        changes = []
        for generator, ws, rest in asked:
            faces = generator.synthesis(ws, truth.faces.camera, expression=expressions + rest).image
            changes.append((faces[:1].expand_as(faces[1:]), faces[1:]))
        return [
            Score("", f"expression_{kind}:{name}", False, value)
            for kind, other in (("kept", changes[1]), ("alike", changes[2]))
            for name, value in zip(names, change_correlation(*changes[0], *other).tolist(), strict=True)
        ]

    def _score_warp(self, identity: str, truth: HeadTruth, split: str) -> None:
        """The artwork carried along the depth of the average head; what it does not show is guessed by analogy."""
        heads = next(iter(self.heads.values()))
        generator = heads.generator.to(self.device)
        here, there, mean = truth.input.camera, truth.views.camera, generator.mean_latents
        seen, views = (render_views(generator, mean, camera, None, chunk=_CHUNK) for camera in (here, there))
        artwork = truth.input.image
        warped = reprojected(artwork, here, seen, there, views, 1.0, generator.rig.scale)
        still = artwork.expand(len(there), -1, -1, -1)  # nothing moves beside the head
        found = Rendering(resized(warped.completed(resized(still, warped.image.shape[-1])), artwork.shape[-1]))
        scores = compare_views(found, truth.views, truth.input, self.perceptual, self.identity)
        about = PROTOCOL, PROTOCOL_VERSION, split
        records = self._records(about, _WARP, heads, identity, scores, truth.subject)
        write_records(self._result(_WARP, identity), records)
        write_image(self.out / "strips" / _WARP / f"{identity}.png", strip(truth.views.image, found.image))

    def _records(
        self,
        about: tuple[str, str, str],
        name: str,
        heads: Subjects,
        identity: str,
        scores: Sequence[Score],
        subject: str = "",
        network: str | None = None,
    ) -> list[Record]:
        """Scores of one head, ``about`` being protocol, version and split."""
        seed, network = int(heads.artifact.extra.get("seed", 0)), network or self.network
        return [
            Record(*about, identity, s.view, seed, name, network if s.network else "", s.metric, s.value, subject)
            for s in scores
        ]

    def _score_picture(self, name: str, heads: Subjects, identity: str) -> None:
        """What the artwork, other heads of the generator and a reader of faces tell where nobody knows the truth."""
        head = heads[identity]
        if head.camera is None or head.artwork is None:
            raise UserError(f"{heads.artifact.path}: {identity} has no camera and artwork to compare it with")
        generator, codes = head.generator.to(self.device), head.latents.to(self.device)
        own, artwork = head.expression.to(self.device), head.artwork[None].to(self.device)
        camera = head.camera.to(self.device)
        found = generator.synthesis(codes, camera, expression=own if own.any() else None)
        scores = compare_input(found, resized(artwork, generator.resolution), self.perceptual) + self._diversity(head)
        records = self._records((PICTURE_PROTOCOL, PICTURE_VERSION, ""), name, heads, identity, scores)
        if self.landmarks is not None:
            scores = score_faces(generator, codes, own, camera, artwork, self._faces)
            about = FACES_PROTOCOL, FACES_VERSION, ""
            records += [
                dataclasses.replace(record, feature_network="mediapipe")
                for record in self._records(about, name, heads, identity, scores)
            ]
        write_records(self._result(name, identity), records)

    def _result(self, name: str, identity: str) -> Path:
        """Where a head's scores are: what they depend on is part of the place."""
        of = next(iter(self.heads.values())) if name == _WARP else self.heads[name]
        key = hashlib.sha256(f"{of.artifact.id} {self.step_hash}".encode()).hexdigest()[:12]
        return self.out / "results" / name / key / f"{identity}.csv"

    def _diversity(self, head: Subject) -> list[Score]:
        """Mean perceptual distance between heads of the tuned generator, relative to the original's (Sec. 4.4)."""
        original = (head.original or head.generator).to(self.device)
        key = id(original)
        if key not in self._spread:
            self._spread = {key: (original, self._distance(original, original))}
        ratio = self._distance(head.generator, original) / self._spread[key][1]
        return [Score("", "diversity_ratio", True, ratio)]

    def _distance(self, renderer: Generator, original: Generator) -> float:
        """Between pictures of the same random (z, view), which no tuning has changed."""
        draws, count = torch.Generator().manual_seed(self.seed), self.diversity_pictures
        ws = renderer.mapping(original.sample_z(count, draws).to(self.device))
        cameras = original.rig.random(count, draws).to(self.device)
        parts = [slice(first, first + _CHUNK) for first in range(0, count, _CHUNK)]
        pictures = torch.cat([renderer.synthesis(ws[part], cameras[part]).image for part in parts])
        return float(diversity(self.perceptual, pictures, self.diversity_pairs))

    def summary(self) -> list[Record]:
        self.trainer.strategy.barrier("all results")
        warps = self.warp and isinstance(self.trainer.datamodule, KnowsItemTruth)  # type: ignore[attr-defined]
        names = [*self.heads, *([_WARP] if warps else [])]
        files = [self._result(name, item.id) for name in names for item in self.items]
        return [record for file in files for record in read_records(file)] if self.trainer.is_global_zero else []


def expression_codes(generator: Generator, own: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    """Codes (1, E) of the full expressions that can be drawn, by name; ``own`` is that of the head."""
    count = len(generator.expressions)
    base = torch.zeros(1, count, device=device) if own is None else own
    one = torch.eye(count, device=device)
    return {name: base + one[i] for i, name in enumerate(generator.expressions) if name in EXPRESSIONS}
