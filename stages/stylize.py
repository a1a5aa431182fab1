"""Directional-guided stylisation of an anchored generator (3DArtmator, Sec. 3.3)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.artworks import Artwork
from models.anchors import Anchor, AnchorSet
from models.camera import Camera, Rig
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.features.base import Frozen, move_frozen
from models.files import atomic_write
from models.generators.base import Generator, Latents, Rendering
from models.image_io import write_image
from models.losses.augment import PairAugmentation
from models.losses.direction import directional_l2, directional_loss, displacement
from models.losses.inversion import locality
from models.losses.views import PseudoView, carried, faced, mirrored
from models.metrics.image import diversity
from models.metrics.portrait import Score, score_head, strip
from models.metrics.records import Record, read_records, write_records
from models.tuning import TunedWeights, part, with_weights
from stages.base import ArtifactRef, GroupState, PerArtworkStage, item_generator

log = logging.getLogger(__name__)

PROTOCOL, PROTOCOL_VERSION = "artform-multiview", "1"
_CHUNK = 8  # views rendered at once before the tuning starts
_ORBIT = 7


@dataclass(frozen=True)
class Recipe:
    """How a generator is tuned to an artwork. The defaults are the paper's.

    A 2D generator has one view, which is the artwork's and each random one. Terms that need more than a generator
    renders are left out, and the log says so: mirror, rim, carry and geometry without depth.

    Attributes:
        steps: optimisation steps (the paper gives no number).
        learning_rate: of Adam. schedule: "constant", or "cosine" down to a twentieth.
        clip: largest norm of an item's gradient over all its parameters; 0 does not clip.
        train, freeze: which parameters move, see :func:`models.tuning.part`.
        latent: "anchor", or "random": a fixed random code (the ablation of Sec. 4.5).
        direction: l3, weight of L_dir (Eq. 7). spatial: l4, weight of L_spa (LPIPS at the artwork's view).
        views: N random views a step.
        direction_form: "cosine" (Eq. 7), or "l2", which asks for the length of the direction as well.
        direction_floor: the direction is left out while its squared norm is at most this share of the guide's.
        normalize_embedding: bring embeddings to unit length before they are subtracted.
        augment: of both images of a pair, before they are embedded.
        pool: the random views are drawn from this many, fixed per item: the original's pictures are kept.
        yaw_max_deg, pitch_max_deg: limits of the random views, drawn uniformly; null for the generator's own poses.
        pixel: weight of the mean squared error at the artwork's view (PTI).
        mirror: weight of the flipped artwork as a picture from the mirrored view.
        mirror_hidden: only where the artwork itself shows nothing.
        rim: what pixels of the artwork count that show the head at a grazing angle, in the terms of its own view:
            an outline painted onto the side of the head is a black patch from elsewhere. 1 counts all alike.
        carry: weight of the artwork carried to the random views along the anchor's depth.
        carry_fill: weight in it of colours found by analogy, where the artwork shows nothing.
        geometry: weight of the squared change of opacity and depth at the random views.
        locality: weight of PTI's locality regularisation. locality_distance: of its codes from the pivot.
    """

    steps: int = 500
    learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
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
    pool: int = 64
    yaw_max_deg: float | None = None
    pitch_max_deg: float | None = None
    pixel: float = 0.0
    rim: float = 1.0
    mirror: float = 0.0
    mirror_hidden: bool = True
    carry: float = 0.0
    carry_fill: float = 0.5
    geometry: float = 0.0
    locality: float = 0.0
    locality_distance: float = 30.0

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "locality_distance", "yaw_max_deg", "pitch_max_deg", where="recipe.")
        weights = ("direction", "spatial", "pixel", "mirror", "carry", "geometry", "locality")
        check_not_negative(self, *weights, "clip", "direction_floor", "rim", "carry_fill", where="recipe.")
        if not any(getattr(self, name) for name in ("direction", "spatial", "pixel", "mirror", "carry")):
            raise UserError("recipe: no term that could move the generator has a weight")
        if self.steps < 1 or self.pool < 1 or self.views < 0:
            raise UserError("recipe: steps and pool must be at least 1, views at least 0")
        if self.views == 0 and (self.direction or self.carry or self.geometry):
            raise UserError("recipe: direction, carry and geometry need at least one random view")


@dataclass(frozen=True)
class Variant:
    """One row of the evaluation.

    Attributes:
        name: in the table.
        anchor: "anchor", or "baseline" for the second anchor artifact (PTI's w inversion).
        tune: false evaluates the anchor as it is.
        recipe: fields of :class:`Recipe` that differ from the stage's.
    """

    name: str
    anchor: Literal["anchor", "baseline"] = "anchor"
    tune: bool = True
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The constants of one item.

    Attributes:
        ws: its fixed codes. z: (1, z_dim) behind them, or None. expression: (1, E), or None for neutral.
        reference: the artwork, a batch of one, with what its pixels count. camera: its view, None in 2D.
        guide: (1, D), Eq. 4; None without a direction term.
        pool: the random views, None in 2D. views: of G_ori from there; the one there is in 2D.
        behind: the mirrored artwork, or None. carried: for all of the pool, or None.
    """

    ws: Latents
    z: Tensor | None
    expression: Tensor | None
    reference: PseudoView
    camera: Camera | None
    guide: Tensor | None
    pool: Camera | None
    views: Rendering
    behind: PseudoView | None
    carried: PseudoView | None


class ItemWeights(nn.Module):
    """What survives a kill: the tuned weights of one item and its loss curve (steps,)."""

    def __init__(self, tuned: TunedWeights, steps: int) -> None:
        super().__init__()
        self.tuned = tuned
        self.curve: Tensor
        self.register_buffer("curve", torch.full((steps,), torch.nan))


@dataclass
class StyleState(GroupState):
    """The group.

    Attributes:
        recipe: of this tuning. targets: by item.
        active: by item, whether any term of the last step had a gradient.
    """

    recipe: Recipe
    targets: list[Target]
    active: list[bool] = field(default_factory=list)

    def item(self, index: int) -> ItemWeights:
        """What is tuned for one item."""
        return self.module[index]  # type: ignore[index,return-value]


class StylizeStage(PerArtworkStage[StyleState]):
    """Tunes a copy of the generator per artwork: L_style = l3 L_dir + l4 L_spa (Eq. 4 to 7).

    The style's direction is measured at the artwork's view, between artwork and anchor, and asked for at random
    views. Beyond the paper, each with weight 0 by default: the pixels at the artwork's view, its mirror image,
    its colours carried along the anchor's depth, unchanged geometry, and PTI's locality.

    ``test`` is the evaluation on the embedded world (``datamodules.mannequin_artworks``): each variant on each
    artwork with each seed, one file a result; a rerun goes on where the last one ended.

    Args:
        anchor: artifact of the anchor stage; holds the generator and the anchors.
        perceptual: LPIPS of L_spa, and of the evaluation.
        style: the image embedding E of L_dir.
        recipe: how to tune.
        group_size, save_every, seed: as :class:`PerArtworkStage`.
        baseline: second anchor artifact, for variants that name it.
        identity: identity embedding of the evaluation; null leaves its metrics out.
        variants: of the evaluation; by default the recipe alone.
        seeds: of the evaluation.
        network: name of the evaluation's networks in the table.
    """

    name = "stylize"

    def __init__(
        self,
        anchor: ArtifactRef,
        perceptual: nn.Module,
        style: nn.Module,
        recipe: Recipe = Recipe(),
        group_size: int = 1,
        save_every: int = 100,
        seed: int = 0,
        baseline: ArtifactRef | None = None,
        identity: nn.Module | None = None,
        variants: list[Variant] | None = None,
        seeds: list[int] | None = None,
        network: str = "embedded",
    ) -> None:
        super().__init__(steps=recipe.steps, group_size=group_size, save_every=save_every, seed=seed)
        self.recipe = recipe
        self.refs = {"anchor": anchor} | ({"baseline": baseline} if baseline is not None else {})
        self.perceptual, self.style = Frozen(perceptual), Frozen(style)
        self.identity = None if identity is None else Frozen(identity)
        self.variants = variants or [Variant("full")]
        self.seeds = seeds or [0]
        self.network = network
        self.anchors: dict[str, AnchorSet] = {}
        self._strips: dict[str, Tensor] = {}
        self._said = False  # once for all groups
        for variant in self.variants:
            if variant.tune:
                self._recipe_of(variant)  # mistakes show at once
            if variant.anchor not in self.refs:
                raise UserError(f"variant {variant.name} needs --model.baseline.path, an anchor artifact")

    def build_model(self) -> None:
        for role, ref in self.refs.items():
            generator = self.take(role, dataclasses.replace(ref, module="generator"))
            anchors = self.take(role, dataclasses.replace(ref, module="anchors"))
            if not isinstance(generator, Generator) or not isinstance(anchors, AnchorSet):
                raise UserError(f"{ref.path} is not the result of galatea anchor")
            self.anchors[role] = anchors
            if role == "anchor":
                self.generator = generator.requires_grad_(False)

    # -- one group --------------------------------------------------------------------------------

    def start_group(self, items: Sequence[Artwork]) -> StyleState:
        return self.start(items, self.recipe, self.seed)

    def start(self, items: Sequence[Artwork], recipe: Recipe, seed: int, anchor: str = "anchor") -> StyleState:
        """Fresh weights for ``items``, tuned from the anchors of that role."""
        move_frozen(self, self.device)
        recipe = self._possible(recipe)
        names = part(self.generator, recipe.train, recipe.freeze)
        targets = [self._target(item, recipe, seed, self._anchor(item, anchor)) for item in items]
        modules = [ItemWeights(TunedWeights(self.generator, names), recipe.steps) for _ in items]
        module = nn.ModuleList(modules).to(self.device)
        # A zero gradient must not count as a step: parameters without one are left alone, moments included.
        optimizer = torch.optim.Adam(module.parameters(), recipe.learning_rate, betas=(0.9, 0.99))
        return StyleState(items, module, optimizer, recipe, targets)

    @torch.no_grad()
    def _possible(self, recipe: Recipe) -> Recipe:
        """The recipe without the terms that need more than the generator renders."""
        needs = {"rim": 1.0, "carry": 0.0, "geometry": 0.0}
        if recipe.mirror_hidden or not self.generator.is_3d:
            needs["mirror"] = 0.0
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
        if not self._said:
            log.info("the generator %s: the recipe goes without %s", what, ", ".join(without))
            self._said = True
        return dataclasses.replace(recipe, **without)

    def _anchor(self, item: Artwork, role: str) -> Anchor:
        anchors = self.anchors[role]
        if item.id not in anchors:
            raise UserError(
                f"{self.refs[role].path} has no anchor of the artwork {item.id}, it has: {', '.join(anchors.ids)}"
            )
        return anchors[item.id]

    @torch.no_grad()
    def _target(self, item: Artwork, recipe: Recipe, seed: int, anchor: Anchor) -> Target:
        generator, draws = self.generator, item_generator(seed, item.id, -1)
        reference = item.at(generator.resolution)[None].to(self.device)
        camera = None if anchor.camera is None else anchor.camera.to(self.device)
        ws, z = anchor.latents.to(self.device), None if anchor.z is None else anchor.z.to(self.device)
        if recipe.latent == "random":
            z = generator.sample_z(1, draws).to(self.device)
            ws = generator.mapping(z)
        expression = None if anchor.neutral else anchor.expression.to(self.device)
        pool = None if camera is None else self._pool(recipe, draws).to(self.device)
        views, seen = self._original(ws, pool, expression), self._original(ws, camera, expression)
        guide = None
        if recipe.direction:
            guide = displacement(self.style(reference), self.style(seen.image), recipe.normalize_embedding)  # Eq. 4
        behind = along = None
        face = PseudoView(reference, torch.ones_like(reference[:, :1]))
        if camera is not None and pool is not None:
            unit = generator.rig.frame / Rig().frame
            face = faced(reference, camera, seen, recipe.rim)
            if recipe.mirror:
                other = self._original(ws, camera.mirror(), expression)
                behind = mirrored(reference, camera, seen, other, recipe.mirror_hidden, unit)
            if recipe.carry:
                along = carried(reference, camera, seen, pool, views, recipe.carry_fill, unit)
        return Target(
            ws=ws,
            z=z,
            expression=expression,
            reference=face,
            camera=camera,
            guide=guide,
            pool=pool,
            views=views,
            behind=behind,
            carried=along,
        )

    def _pool(self, recipe: Recipe, draws: torch.Generator) -> Camera:
        rig = self.generator.rig
        if recipe.yaw_max_deg is None and recipe.pitch_max_deg is None:
            return rig.random(recipe.pool, draws)  # the training pose distribution
        yaw, pitch = 2 * torch.rand(2, recipe.pool, generator=draws) - 1
        limits = [
            limit if degrees is None else min(math.radians(degrees), limit)
            for degrees, limit in ((recipe.yaw_max_deg, rig.yaw_max), (recipe.pitch_max_deg, rig.pitch_max))
        ]
        return rig.camera(rig.yaw_mean + yaw * limits[0], rig.pitch_mean + pitch * limits[1])

    def _original(self, ws: Latents, cameras: Camera | None, expression: Tensor | None) -> Rendering:
        """G_ori from all cameras, a few at a time."""
        if cameras is None:
            return self.generator.synthesis(ws, expression=expression)
        parts = []
        for start in range(0, len(cameras), _CHUNK):
            chunk = cameras[slice(start, start + _CHUNK)]
            parts.append(self.generator.synthesis(ws, chunk, expression=expression))

        def join(name: str) -> Tensor | None:
            found = [getattr(p, name) for p in parts]
            return None if found[0] is None else torch.cat(found)

        image = join("image")
        assert image is not None
        return Rendering(image=image, depth=join("depth"), alpha=join("alpha"), normals=join("normals"))

    # -- one step ---------------------------------------------------------------------------------

    def optimise(self, state: StyleState, step: int) -> dict[str, Tensor]:
        return self.advance(state, step, self.seed)

    def advance(self, state: StyleState, step: int, seed: int) -> dict[str, Tensor]:
        """Losses (n,) of ``state`` at ``step``."""
        recipe = state.recipe
        for group in state.optimizer.param_groups:
            fade = (
                1.0 if recipe.schedule == "constant" else 0.05 + 0.475 * (1 + math.cos(math.pi * step / recipe.steps))
            )
            group["lr"] = recipe.learning_rate * fade
        rows = []
        state.active = []
        for index, (item, target) in enumerate(zip(state.items, state.targets, strict=True)):
            draws = item_generator(seed, item.id, step)
            terms, active = self._terms(state.item(index).tuned, target, recipe, draws)
            state.active.append(active)
            state.item(index).curve[step] = terms["loss"].detach().float()
            rows.append(terms)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _terms(
        self, tuned: TunedWeights, target: Target, recipe: Recipe, draws: torch.Generator
    ) -> tuple[dict[str, Tensor], bool]:
        """The terms of one item, each a scalar, with their weighted sum as ``loss``; and whether that can move it."""
        chosen = torch.randint(len(target.views.image), (recipe.views,), generator=draws).to(self.device)
        cameras, first = None, 0
        if target.camera is not None and target.pool is not None:
            given = [target.camera] + ([target.camera.mirror()] if target.behind is not None else [])
            cameras, first = Camera.cat([*given, target.pool[chosen]]), len(given)
        ws = target.ws
        if recipe.train == "all" and target.z is not None:
            # The mapping moves too; what the codes hold beyond mapping(z), a refinement in w+, stays.
            before = self.generator.mapping(target.z)
            after = tuned.mapping(target.z)
            ws = Latents({name: t + after.groups[name] - before.groups[name] for name, t in ws.groups.items()})
        # One pass of the backbone serves all views.
        out = tuned.synthesis(ws, cameras, expression=target.expression)
        own = out.image[:1]
        random_views = own.expand(recipe.views, -1, -1, -1) if cameras is None else out.image[first:]
        terms: dict[str, Tensor] = {}
        if recipe.spatial:
            terms["spatial"] = self.perceptual(own, target.reference.completed(own)).mean()  # L_spa
        if recipe.pixel:
            terms["pixel"] = target.reference.error(own).mean()
        if target.behind is not None:
            seen, pseudo = target.behind.sized(out.image[1:2]), target.behind
            distance = self.perceptual(seen, pseudo.completed(seen)) if recipe.spatial else 0.0
            terms["mirror"] = (pseudo.error(seen) + distance).mean()
        if target.carried is not None:
            pseudo = target.carried[chosen]
            seen = pseudo.sized(random_views)
            distance = self.perceptual(seen, pseudo.completed(seen)) if recipe.spatial else 0.0
            terms["carry"] = (pseudo.error(seen) + distance).mean()
        if recipe.geometry:
            assert out.alpha is not None and target.views.alpha is not None
            assert out.depth is not None and target.views.depth is not None
            alpha, deeper = target.views.alpha[chosen], out.depth[first:] - target.views.depth[chosen]
            both = (alpha > 0.5) & (out.alpha[first:] > 0.5)
            unit = self.generator.rig.frame / Rig().frame
            change = (out.alpha[first:] - alpha).square() + both * (deeper / unit).square()
            terms["geometry"] = change.mean()
        if recipe.locality:
            terms["locality"] = self._locality(tuned, target, recipe, draws)
        total = sum(
            (getattr(recipe, name) * value for name, value in terms.items()), torch.zeros((), device=self.device)
        )
        if recipe.direction and target.guide is not None:
            value, pull = self._direction(random_views, target.views.image[chosen], target.guide, recipe, draws)
            # Nothing else would ever leave the original: start along the guide.
            total = total + recipe.direction * (value if pull is None or terms else pull)
            terms["direction"] = value
        active = total.requires_grad
        loss = total if active else 0 * own.sum()  # backward needs a graph
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}, active

    def _direction(
        self, tuned: Tensor, original: Tensor, guide: Tensor, recipe: Recipe, draws: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """L_dir (Eq. 5 to 7), a mean over the views instead of their sum; and what to minimise while it is undefined.

        While tuned and original pictures are alike the direction is 0/0, and just after that its gradient is
        huge: Adam's second moment would remember it for long. Up to ``direction_floor`` a view is left out.
        The second result is minus the part of the change along the guide when all are left out, else ``None``.
        """
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

    def _locality(self, tuned: TunedWeights, target: Target, recipe: Recipe, draws: torch.Generator) -> Tensor:
        """PTI's regularisation at a code near the pivot, from the artwork's view."""
        z = self.generator.sample_z(1, draws).to(self.device)
        distance = recipe.locality_distance
        return locality(tuned, self.generator, target.ws, z, target.camera, self.perceptual, distance).mean()

    def before_step(self, state: StyleState) -> None:
        for index, active in enumerate(state.active):
            parameters = list(state.item(index).parameters())
            if not active:
                for parameter in parameters:
                    parameter.grad = None
            elif state.recipe.clip:
                torch.nn.utils.clip_grad_norm_(parameters, state.recipe.clip)

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
            before = self._original(target.ws, orbit, target.expression).image
            after = weights.tuned.synthesis(target.ws, orbit, expression=target.expression).image
            picture = strip(before, after).cpu()
            self._strips[item.id] = picture
            write_image(folder / "views.png", picture)
            own = weights.tuned.synthesis(target.ws, target.camera, expression=target.expression).image
            write_image(folder / "stylised.png", own)

    def export(self) -> dict[str, Any]:
        source, anchors = self.inputs["anchor"], self.anchors["anchor"]
        ids = sorted(item.id for item in self.trainer.datamodule.items)  # type: ignore[attr-defined]
        modules: dict[str, nn.Module] = {"generator": self.generator, "anchors": anchors}
        media: dict[str, Path] = {}
        for identity in ids:
            folder = self.item_dir(identity)
            tensors = safetensors.torch.load_file(folder / "tuned.safetensors")
            modules[f"stylised.{identity}"] = with_weights(self.generator, tensors)
            media[f"views_{identity}.png"] = folder / "views.png"
            media[f"stylised_{identity}.png"] = folder / "stylised.png"
            media[f"reference_{identity}.png"] = source.media(f"reference_{identity}.png")
        deltas = [name for name in modules if name.startswith("stylised.")]
        items = [entry for entry in source.extra.get("items", []) if isinstance(entry, dict) and entry.get("id") in ids]
        return {
            "modules": modules,
            "media": media,
            "dtype": dict.fromkeys(deltas, "float16"),
            "delta_of": dict.fromkeys(deltas, "generator"),
            "extra": {"items": items, "recipe": dataclasses.asdict(self.recipe)},
        }

    def panels(self) -> dict[str, Tensor]:
        return {"stylised": torch.cat(list(self._strips.values())[-4:], 1)} if self._strips else {}

    # -- evaluation -------------------------------------------------------------------------------

    def _recipe_of(self, variant: Variant) -> Recipe:
        try:
            nested = {k: v for k, v in variant.recipe.items() if isinstance(v, dict)}
            parts = {name: dataclasses.replace(getattr(self.recipe, name), **values) for name, values in nested.items()}
            return dataclasses.replace(self.recipe, **variant.recipe | parts)
        except (AttributeError, TypeError) as error:
            raise UserError(f"variant {variant.name}: {error}") from error

    def setup(self, stage: str) -> None:
        if stage == "test" and not hasattr(self.trainer.datamodule, "truth"):  # type: ignore[attr-defined]
            raise UserError(
                "test needs artworks whose truth is known: datamodules.mannequin_artworks.MannequinArtworks"
            )

    def on_test_start(self) -> None:
        if not self.generator.is_3d:
            raise UserError(f"test compares views, and {self.refs['anchor'].path} holds a 2D generator")

    def test_step(self, batch: Sequence[Artwork], batch_idx: int) -> None:
        for item in batch:
            todo = [
                (variant, seed)
                for variant in self.variants
                for seed in self.seeds
                if not self._result(variant.name, item.id, seed).exists()
            ]
            if not todo:
                continue
            truth = self.trainer.datamodule.truth(item.id)  # type: ignore[attr-defined]
            for variant, seed in todo:
                renderer, ws, expression = self._tuned(variant, item, seed)
                with torch.no_grad():
                    scores, pictures = score_head(
                        renderer, ws, expression, truth, self.perceptual, self.identity, self.generator.expressions
                    )
                    ratio = self._diversity(renderer) / self._diversity(self.generator)
                scores.append(Score("", "diversity_ratio", True, ratio))
                self._write_result(variant, item, seed, scores, truth.subject)
                write_image(self.out / "strips" / variant.name / f"{item.id}_{seed}.png", pictures)
                shown = {s.metric: s.value for s in scores if s.view == "input"}
                log.info("%s, %s, seed %d: input view %.2f dB", item.id, variant.name, seed, shown["psnr"])

    def _result(self, variant: str, item: str, seed: int) -> Path:
        return self.out / "results" / variant / f"{item}_{seed}.csv"

    def _tuned(self, variant: Variant, item: Artwork, seed: int) -> tuple[Any, Latents, Tensor | None]:
        """What renders as a variant does, with its codes and expression."""
        recipe = self._recipe_of(variant)
        if not variant.tune:
            recipe = dataclasses.replace(self._possible(recipe), pool=1)
            target = self._target(item, recipe, seed, self._anchor(item, variant.anchor))
            return self.generator, target.ws, target.expression
        with torch.enable_grad():
            self._seed([item], -1)
            state = self.start([item], recipe, seed, variant.anchor)
            for step in range(recipe.steps):
                loss = self.advance(state, step, seed)["loss"].float().sum()
                state.optimizer.zero_grad(set_to_none=True)
                with torch.autocast(self.device.type, enabled=False):
                    loss.backward()
                self.before_step(state)
                state.optimizer.step()
        return state.item(0).tuned, state.targets[0].ws, state.targets[0].expression

    def _diversity(self, renderer: Any, count: int = 12) -> float:
        """Mean perceptual distance between pictures of the same random codes and views (Sec. 4.4)."""
        draws = torch.Generator().manual_seed(self.seed)
        ws = self.generator.mapping(self.generator.sample_z(count, draws).to(self.device))
        cameras = self.generator.rig.random(count, draws).to(self.device)
        return float(diversity(self.perceptual, renderer.synthesis(ws, cameras).image))

    def _write_result(self, variant: Variant, item: Artwork, seed: int, scores: Sequence[Score], subject: str) -> None:
        split = self.trainer.datamodule.split  # type: ignore[attr-defined]
        records = [
            Record(
                PROTOCOL, PROTOCOL_VERSION, split, item.id, score.view, seed, variant.name,
                self.network if score.network else "", score.metric, score.value, subject,
            )
            for score in scores
        ]  # fmt: skip
        write_records(self._result(variant.name, item.id, seed), records)

    def on_test_end(self) -> None:
        self.trainer.strategy.barrier("all results")
        if self.trainer.is_global_zero:
            items = sorted(item.id for item in self.trainer.datamodule.items)  # type: ignore[attr-defined]
            files = [self._result(v.name, i, s) for v in self.variants for i in items for s in self.seeds]
            write_records(self.out / "metrics.csv", [r for file in files for r in read_records(file)])
