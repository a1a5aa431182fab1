"""Finds directions of a generator's latent space along which heads change (InterFaceGAN; E3DGE, Sec. 5)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.latents import CodeBlock
from datamodules.truth import Attributes, KnowsCodeTruth
from models.artifact import Export
from models.camera import Camera
from models.encoders.base import Encoder, inverted
from models.errors import UserError, shown
from models.features.base import Frozen, frozen_scorers, network_name
from models.files import atomic_write
from models.generators.base import Generator
from models.heads.boundaries import (
    Calibration,
    DirectionMethod,
    Found,
    LinearBoundaries,
    Samples,
    compact,
    imported,
    spread_and_reach,
    useful_end,
)
from models.heads.directions import Directions, fingerprint
from models.image import write_image
from models.latents import Latents
from models.metrics.records import Record
from models.rendering.sheets import sheet
from stages.base.foreign import warn_of_embedded
from stages.base.inversion import check_fit
from stages.base.per_item import GroupState, PerItemStage
from stages.base.ranks import gather
from stages.base.stage import ArtifactRef, GeneratorRef

log = logging.getLogger(__name__)

PROTOCOL, VERSION = "directions", "1"
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of predict's sheets


class DirectionsStage(PerItemStage[CodeBlock, GroupState[CodeBlock]]):
    """Samples codes, scores the heads that they are, and finds where in the latent space the scores rise.

    ``fit`` is one pass over the codes of the data module, block by block, which a killed run continues; then the
    method finds directions, and each one's useful range is calibrated. What is known of the codes
    (:class:`datamodules.truth.KnowsCodeTruth`) and what networks tell of pictures are both attributes.

    ``test`` moves heads that were not seen by one strength to both sides and scores them again: how much each attribute
    changes along each direction. ``predict`` draws sheets of heads along all directions.

    Args:
        prior: artifact and module of the generator.
        attributes: networks that score pictures (:class:`models.features.base.AttributeScorer`).
        names: of the attributes that get directions, in this order; ``smile=mouth_corners`` calls one by another name.
            All when null.
        method: how directions are found.
        boundaries: directions found elsewhere, by name: a .npy or .pt file, or one for each latent group.
        perceptual: the distance by which useful ranges are calibrated.
        calibration: how far they go.
        held_out: share of the codes that method and calibration are validated on.
        views: heads are scored from the front, or from drawn poses.
        truncation: of the codes.
        encoder: artifact with an encoder of the same generator (module "encoder"), whose codes of edited pictures test
            reads along the directions.
        tested: artifact of this stage that test and predict take directions and generator from.
        heads: of predict's sheets.
        tile: side of a picture in a sheet, pixels.
        save_every, seed: as :class:`PerItemStage`; the method's draws, if any, are of the seed.
    """

    name = "directions"

    def __init__(
        self,
        prior: GeneratorRef | None = None,
        attributes: list[nn.Module] | None = None,
        names: list[str] | None = None,
        method: DirectionMethod = LinearBoundaries(),  # noqa: B008 - frozen
        boundaries: dict[str, str | dict[str, str]] | None = None,
        perceptual: nn.Module | None = None,
        calibration: Calibration = Calibration(),  # noqa: B008 - frozen
        held_out: float = 0.3,
        views: Literal["front", "drawn"] = "front",
        truncation: float = 1.0,
        encoder: ArtifactRef | None = None,
        tested: ArtifactRef | None = None,
        heads: int = 4,
        tile: int = 128,
        save_every: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(steps=1, save_every=save_every, seed=seed)
        if not 0 < held_out < 1:
            raise UserError(f"held_out is {held_out}: it must be between 0 and 1")
        if not math.isfinite(truncation) or heads < 1 or tile < 32:
            raise UserError("directions: truncation must be a number, heads at least 1 and tile at least 32")
        self.prior, self.method, self.boundaries, self.calibration = prior, method, boundaries or {}, calibration
        self.names, self.held_out, self.views, self.truncation = names, held_out, views, truncation
        self.encoder_from, self.tested, self.heads, self.tile = encoder, tested, heads, tile
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.attributes = frozen_scorers(attributes)
        self._measured: list[dict[str, Any]] = []  # of the running test

    def build_model(self) -> None:
        if self.tested is not None:
            self.generator = self.take("tested", self.tested.path, "generator", Generator).requires_grad_(False)
            self.directions = self.take("tested", self.tested.path, "directions", Directions)
        elif self.prior is not None:
            self.generator = self.take("prior", self.prior.path, self.prior.module, Generator).requires_grad_(False)
        else:
            raise UserError(
                "directions are of a generator: fit needs --model.prior.path, the others --model.tested.path"
            )
        if not self.generator.z_dim:
            raise UserError("this generator shows one head and has no codes to sample: there are no directions")
        self.encoder = None
        if self.encoder_from is not None:
            self.encoder = self.take("encoder", self.encoder_from.path, "encoder", Encoder).requires_grad_(False)
            check_fit(self.encoder, self.generator)

    # -- fit: samples -----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        if self.tested is not None or self.perceptual is None:
            what = "--model.prior.path, and not --model.tested" if self.tested else "--model.perceptual, for the ranges"
            raise UserError(f"directions fit needs {what}")
        self._owner = f"{type(self.generator).__name__} of {self.inputs['prior'].path}"
        self._imported = imported(self.boundaries, self._groups(), self._owner)
        wanted = self._wanted()
        names = [*(self._known() if self.names is None else wanted), *self.boundaries]
        if not names:
            raise UserError(
                "there is nothing to find directions of: give networks that score pictures (--model.attributes), data "
                "whose codes are known (datamodules.latents.MannequinLatents), or --model.boundaries"
            )
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"there are two attributes or boundaries called {twice[0]}: name others, --model.names")
        self.method.check(tuple(wanted))
        warn_of_embedded(self.generator, self.perceptual, *self.attributes)
        super().on_fit_start()
        if len(self._heads_of_fit()) < 2:
            raise UserError("directions are told by several heads: data.init_args.samples must be at least 2")

    def _groups(self) -> dict[str, tuple[int, int]]:
        return {name: (t.shape[1], t.shape[2]) for name, t in self.generator.mean_latents.groups.items()}

    def _truth(self) -> Attributes | None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.code_truth(self.generator.z_dim) if isinstance(data, KnowsCodeTruth) else None

    def _told(self) -> list[tuple[str, str]]:
        """What networks tell of pictures: network and attribute."""
        return [(network_name(n.module), name) for n in self.attributes for name in n.module.names]

    def _known(self) -> list[str]:
        """All attributes, in the order of the scores."""
        truth = self._truth()
        return [*(truth.names if truth else ()), *(name for _, name in self._told())]

    def _wanted(self) -> dict[str, str]:
        """Names of the directions, in order, each with its attribute's.

        Raises:
            UserError: for a wanted attribute that there is not, or two of one name.
        """
        known, wanted = self._known(), dict[str, str]()
        for text in known if self.names is None else self.names:
            name, _, attribute = text.partition("=")
            if not name:
                raise UserError(f"names has {shown(text)}: write a name, or NAME=ATTRIBUTE")
            if wanted.setdefault(name, attribute or name) != (attribute or name):
                raise UserError(f"names calls both {wanted[name]} and {attribute or name} {shown(name)}")
        if unknown := [name for name in wanted.values() if name not in known]:
            raise UserError(f"there is no attribute {shown(unknown[0])}, there are: {', '.join(known) or 'none'}")
        return wanted

    def _heads_of_fit(self) -> range:
        return range(sum(item.count for item in self.items))

    def images_in(self, batch: Any) -> int:
        return self._plan[0].items[0].count if self._plan else 0

    def start_group(self, items: Sequence[CodeBlock]) -> GroupState[CodeBlock]:
        return GroupState(items, nn.Module(), {})

    def optimise(self, state: GroupState[CodeBlock], step: int) -> dict[str, Tensor]:
        return {"loss": torch.zeros(len(state.items))}  # nothing learns: a block is scored when it is finished

    @torch.no_grad()
    def finish_group(self, state: GroupState[CodeBlock]) -> None:
        for block in state.items:
            z, ws = self.codes(block)
            scores = [] if (truth := self._truth()) is None else [truth(z)]
            told = {name for _, name in self._told()}
            if told & set(self._wanted().values()) - set(truth.names if truth else ()):  # codes tell theirs themselves
                scores += self.scores(self.render(ws, self.cameras(block)))
            elif told:  # what test scores by: nobody asks for it now, and nothing is rendered
                scores.append(torch.full((block.count, len(self._told())), math.nan))
            known = torch.cat([s.float().cpu() for s in scores], 1) if scores else torch.zeros(block.count, 0)
            content = {f"latents_{name}": codes.float().cpu().clone() for name, codes in compact(ws).groups.items()}
            with atomic_write(self.item_dir(block.id) / "heads.safetensors") as file:
                file.write_bytes(safetensors.torch.save({**content, "scores": known.contiguous()}))

    def codes(self, block: CodeBlock) -> tuple[Tensor, Latents]:
        """A block's z (n, z_dim), and its style codes in full precision."""
        z = block.z(self.generator.z_dim).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return z, self.generator.mapping(z, truncation=self.truncation)

    def cameras(self, block: CodeBlock) -> Camera | None:
        """Where a block's heads are scored from; None in 2D."""
        rig = self.generator.rig if self.generator.is_3d else None
        if rig is None:
            return None
        if self.views == "front":
            return self.front(block.count)
        return Camera.cat([rig.random(1, draws) for draws in block.generators("pose")]).to(self.device)

    def front(self, count: int) -> Camera | None:
        """The camera in the middle of the poses, ``count`` times; None in 2D."""
        if not self.generator.is_3d:
            return None
        rig = self.generator.rig
        return rig.camera(rig.yaw_mean, rig.pitch_mean, self.device).repeat_interleave(count)

    def render(self, ws: Latents, camera: Camera | None) -> Tensor:
        """Pictures (n, 3, H, W) of heads, each from its camera."""
        return self.generator.synthesis(ws, camera).image

    def scores(self, image: Tensor) -> list[Tensor]:
        """What each network tells of pictures: (n, names)."""
        return [network(image) for network in self.attributes]

    # -- fit: directions --------------------------------------------------------------------------

    def export(self) -> Export | None:
        if self.trainer.state.fn == "predict":
            sheets = sorted(self.out.glob("items/*/directions_*.png"))
            return Export(media={file.name: file for file in sheets})
        samples = self._samples()
        found = self.method.find(samples, self.seed) if samples.names else []
        found += self._imported
        directions, metrics = self.calibrated(found, samples)
        for row, direction in enumerate(found):
            low, high = directions.limits[row].tolist()
            scores = ", ".join(f"{name} {value:.3f}" for name, value in direction.scores.items())
            log.info("%s: useful from %.2f to %.2f standard deviations; %s", direction.name, low, high, scores)
            metrics |= {f"{direction.name}/{name}": value for name, value in direction.scores.items()}
        modules: dict[str, nn.Module] = {"directions": directions.cpu(), "generator": self.generator}
        return Export(modules, metrics, extra={"samples": len(samples)}, delta_of=self.unchanged(modules))

    def _samples(self) -> Samples:
        """What all ranks have written, in the order of the heads."""
        files = [self.item_dir(block.id) / "heads.safetensors" for block in self.items]
        read = [safetensors.torch.load_file(file) for file in files]
        blocks = [Latents({name: part[f"latents_{name}"] for name in self._groups()}) for part in read]
        scores = torch.cat([part["scores"] for part in read])
        wanted, known = self._wanted(), self._known()
        names, scores = list(wanted), scores[:, [known.index(name) for name in wanted.values()]]
        held_out = min(max(round(self.held_out * len(scores)), 1), len(scores) - 1)
        return Samples.collect(blocks, names, scores, held_out)

    @torch.no_grad()
    def calibrated(self, found: Sequence[Found], samples: Samples) -> tuple[Directions, dict[str, float]]:
        """The directions with their spreads and useful ranges; and what was measured of these."""
        groups = self._groups()
        # All rows are kept where one direction has them: a boundary of one row counts for each.
        rows = {g: max([1, *(f.normals[g].shape[0] for f in found if g in f.normals)]) for g in groups}
        sizes = [[g, rows[g], width] for g, (_, width) in groups.items()]
        directions = Directions([f.name for f in found], sizes, fingerprint(self.generator))  # type: ignore[arg-type]
        reaches: list[tuple[float, float]] = []
        for k, direction in enumerate(found):
            reach = (math.inf, math.inf)
            for group, normal in direction.normals.items():
                own = normal.expand(rows[group], -1) / math.sqrt(rows[group] / normal.shape[0])
                codes = samples.codes[group].expand(-1, rows[group], -1)
                spread, low, high = spread_and_reach(codes, own)
                directions.direction(group)[k], directions.spread(group)[k] = own.float(), spread
                reach = min(reach[0], low), min(reach[1], high)
            reaches.append(reach)
        directions.to(self.device)
        heads = self._validation_heads(samples)
        before = self.render(heads, self.front(len(heads)))
        metrics = {}
        for k, direction in enumerate(found):
            for side, (sign, reach) in enumerate(zip((-1, 1), reaches[k], strict=True)):
                end, distance = self._end(directions, direction.name, sign * reach, heads, before)
                directions.limits[k, side] = end
                metrics[f"{direction.name}/{'low' if sign < 0 else 'high'}_distance"] = distance
        return directions, metrics

    def _validation_heads(self, samples: Samples) -> Latents:
        """Codes that the method was not fitted to."""
        start = len(samples) - samples.held_out
        some = slice(start, start + min(self.calibration.codes, samples.held_out))
        groups = self._groups()
        return Latents(
            {g: c[some].float().expand(-1, groups[g][0], -1).to(self.device) for g, c in samples.codes.items()}
        )

    def _end(
        self, directions: Directions, name: str, reach: float, heads: Latents, before: Tensor
    ) -> tuple[float, float]:
        """How far heads go along a direction until their pictures have changed enough, and how much they have then.

        Args:
            before: their pictures from the front, as they are.
        """
        camera = self.front(len(heads))

        def distance(strength: float) -> float:
            moved = directions.moved(heads, name, strength)
            return float(self.perceptual(self.render(moved, camera), before).double().mean())  # type: ignore[misc]

        return useful_end(distance, reach, self.calibration.distance, self.calibration.steps)

    # -- test -------------------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        if self.tested is None:
            raise UserError("directions test needs what it tests, --model.tested.path")
        if not self.attributes and self.encoder is None:
            raise UserError(
                "directions test scores heads that are edited: give networks (--model.attributes), or an encoder "
                "of the generator (--model.encoder.path)"
            )
        if self.trainer.datamodule.test_samples < 2:  # type: ignore[attr-defined]
            raise UserError("changes are told by how heads differ: data.init_args.test_samples must be at least 2")
        self._measured = []

    @torch.no_grad()
    def test_step(self, batch: list[CodeBlock], batch_idx: int) -> None:
        for block in batch:
            _, ws = self.codes(block)
            camera = self.cameras(block)
            before = self._again(ws, camera)
            changes = []
            for name in self.directions.names:
                low, high = (self._again(self.directions.apply(ws, {name: s}), camera) for s in (-1.0, 1.0))
                changes.append((high - low) / 2)
            for row, number in enumerate(block.numbers):
                self._measured.append(
                    {"head": number, "before": before[row].tolist(), "changes": [c[row].tolist() for c in changes]}
                )

    def _again(self, ws: Latents, camera: Camera | None) -> Tensor:
        """Scores of heads by what they look like (n, all), float64 on the CPU."""
        image = self.render(ws, camera)
        found = self.scores(image)
        if self.encoder is not None:
            codes, _ = inverted(image, self.encoder, self.generator)
            found.append(self.directions.read(codes))
        return torch.cat([s.double().cpu() for s in found], 1)

    def summary(self) -> list[Record]:
        """For each head, direction and attribute: the change of half the way from -1 to 1, in standard deviations of
        the attribute among the heads; and of each direction its leakage, the mean change of the others as a share of
        its own. Attributes in which no two heads differ have no such unit, and are left out.

        Raises:
            UserError: when there are no others.
        """
        measured = sorted(gather(self._measured), key=lambda entry: entry["head"])
        before = torch.tensor([entry["before"] for entry in measured], dtype=torch.float64)
        changes = torch.tensor([entry["changes"] for entry in measured], dtype=torch.float64)  # (N, K, A)
        known = before.isfinite()
        centre = before.nan_to_num().sum(0) / known.sum(0)
        deviation = (((before - centre).square()).nan_to_num().sum(0) / known.sum(0)).sqrt()
        measures = self._told()
        if self.encoder is not None:
            measures += [(type(self.encoder).__name__, name) for name in self.directions.names]
        # Not by the deviation, which rounding may leave above 0; NaN of what no head could be scored for.
        varies = [b[k].unique().numel() > 1 for b, k in zip(before.T, known.T, strict=True)]
        if alike := [name for (_, name), varied in zip(measures, varies, strict=True) if not varied]:
            if not any(varies):
                raise UserError(f"no two of the test's {len(measured)} heads differ in {', '.join(alike)}: take more")
            log.warning("warning: no two heads differ in %s: it is left out", ", ".join(alike))
        measures = [measure for measure, varied in zip(measures, varies, strict=True) if varied]
        changes = (changes / deviation)[..., varies]
        records = []

        def record(item: str, variant: str, network: str, metric: str, value: float) -> None:
            records.append(Record(PROTOCOL, VERSION, "test", item, "", self.seed, variant, network, metric, value))

        for row, entry in enumerate(measured):
            for k, direction in enumerate(self.directions.names):
                for a, (network, name) in enumerate(measures):
                    record(f"{entry['head']:08d}", direction, network, f"change/{name}", float(changes[row, k, a]))
        for k, direction in enumerate(self.directions.names):
            for network in dict.fromkeys(network for network, _ in measures):
                own = [a for a, (n, name) in enumerate(measures) if n == network and name == direction]
                others = [a for a, (n, name) in enumerate(measures) if n == network and name != direction]
                if own and others:
                    mean = changes[:, k].nanmean(0).abs()
                    if float(mean[own[0]]) > 0:  # a direction along which nothing changes has no share of it
                        record("", direction, network, "leakage", float(mean[others].nanmean() / mean[own[0]]))
        return records

    # -- predict ----------------------------------------------------------------------------------

    def on_predict_start(self) -> None:
        if self.tested is None:
            raise UserError("directions predict needs what it shows, --model.tested.path")

    @torch.no_grad()
    def predict_step(self, batch: list[CodeBlock], batch_idx: int) -> None:
        first = self.trainer.datamodule.samples  # type: ignore[attr-defined]
        for block in batch:
            _, ws = self.codes(block)
            for row, number in enumerate(block.numbers):
                if number < first + self.heads:
                    picture = self.sheet(ws[row])
                    write_image(self.item_dir(f"{number:08d}") / f"directions_{number:08d}.png", picture)

    def sheet(self, ws: Latents) -> Tensor:
        """A head (a batch of one) along all directions: a row each."""
        rows = []
        for name in self.directions.names:
            edited = Latents.cat([self.directions.apply(ws, {name: strength}) for strength in STRENGTHS])
            images = self.render(edited, self.front(len(STRENGTHS))).float().clamp(-1, 1).cpu()
            rows.append([(f"{strength:+.1f}", image) for strength, image in zip(STRENGTHS, images, strict=True)])
        return sheet(rows, self.tile, [name.replace("_", " ") for name in self.directions.names])
