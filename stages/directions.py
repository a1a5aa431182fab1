"""Finds directions of a generator's latent space along which heads change (InterFaceGAN; E3DGE, Sec. 5; SeFa), and
offsets of single heads along them that keep who they are (3D cartoon faces, Sec. III-C)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.latents import CodeBlock, FoundLatents
from datamodules.truth import Attributes, KnowsCodeTruth
from models.artifact import Export, load
from models.camera import Camera
from models.encoders.base import Encoder, inverted
from models.errors import UserError, shown
from models.features.base import Frozen, frozen_scorers, network_name
from models.files import atomic_write
from models.generators.base import Generator
from models.heads.boundaries import DirectionMethod, LinearBoundaries, Samples, compact, imported
from models.heads.calibration import Calibration, calibrate
from models.heads.codes import HeadCodes
from models.heads.directions import Directions
from models.heads.index import Entry, subject_index
from models.heads.offsets import OffsetSearch
from models.image import write_image
from models.latents import Latents
from models.losses.offsets import OffsetLoss
from models.metrics.changes import PROTOCOL, VERSION, agreement, change_records, deviation
from models.metrics.records import Record
from models.rendering.sheets import sheet
from stages.base.foreign import warn_of_embedded
from stages.base.inversion import check_fit
from stages.base.kinship import check_kin
from stages.base.offsets import HeadOffsets, edited_heads, read_offsets, write_offsets
from stages.base.per_item import GroupState, PerItemStage
from stages.base.ranks import gather
from stages.base.stage import ArtifactRef, GeneratorRef

log = logging.getLogger(__name__)

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of predict's sheets
CHUNK = 16  # heads rendered at once, when directions are named


class DirectionsStage(PerItemStage[CodeBlock, GroupState[CodeBlock]]):
    """Samples codes, scores the heads that they are, and finds where in the latent space the scores rise.

    ``fit`` is one pass over the codes of the data module, block by block, which a killed run continues; then the
    method finds directions, and each one's useful range is calibrated. What is known of the codes
    (:class:`datamodules.truth.KnowsCodeTruth`) and what networks tell of pictures are both attributes.

    ``test`` moves heads that were not seen by one strength to both sides and scores them again: how much each attribute
    changes along each direction. ``predict`` draws sheets of heads along all directions.

    With ``offsets`` both find, for each head and direction, an offset dw that starts at the direction and keeps who is
    shown (3D cartoon faces, Eq. 7 to 9), and show w + dw and w - dw beside the direction itself; predict hands on the
    moved heads, which ``present`` shows as any others.

    Args:
        prior: artifact and module of the generator.
        attributes: networks that score pictures (:class:`models.features.base.AttributeScorer`).
        names: of the attributes that get directions, in this order; ``smile=mouth_corners`` calls one by another name.
            All when null. Of a method that learns from no attributes these may name what it finds, [] names nothing.
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
        offsets: how offsets of single heads are looked for in test and predict; not at all when null.
        offset_loss: by what.
        identity, parser: the networks of that loss.
        styled: another generator of the same codes, made of the tested one, that predict shows beside it, and in which
            test looks for the same changes.
        variant: what edits by offsets are called, after their direction.
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
        offsets: OffsetSearch | None = None,
        offset_loss: OffsetLoss = OffsetLoss(),  # noqa: B008 - frozen
        identity: nn.Module | None = None,
        parser: nn.Module | None = None,
        styled: GeneratorRef | None = None,
        variant: str = "optimised",
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
        self.encoder_from, self.tested, self.variant, self.heads, self.tile = encoder, tested, variant, heads, tile
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.attributes = frozen_scorers(attributes)
        self.offsets = None if offsets is None else HeadOffsets(offsets, offset_loss, identity, parser)
        self.styled_from = styled
        if offsets is not None and offsets.id_on == "direct" and styled is None:
            raise UserError("offsets.id_on: direct is the styled generator's pictures: give it, --model.styled.path")
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
        self.styled = None
        if self.styled_from is not None and self.tested is not None:
            self.styled = self.take("styled", self.styled_from.path, self.styled_from.module, Generator)
            self.styled.requires_grad_(False)
            self.directions.check_size(self.styled.mean_latents)
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
        scored = self.method.scored
        names = [*(self._known() if self.names is None and scored else wanted), *self.boundaries]
        if scored and not names:
            raise UserError(
                "there is nothing to find directions of: give networks that score pictures (--model.attributes), data "
                "whose codes are known (datamodules.latents.MannequinLatents), or --model.boundaries"
            )
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"there are two attributes or boundaries called {twice[0]}: name others, --model.names")
        self._naming()
        self.method.check(tuple(wanted), self.generator)
        networks = [] if self.offsets is None else [self.offsets.recognition, self.offsets.parser]
        warn_of_embedded(self.generator, self.perceptual, *self.attributes, *networks)
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
        """Names of the directions, in order, each with the attribute's that it is learnt from; see :meth:`_chosen`."""
        return self._chosen(self._known()) if self.method.scored else {}

    def _naming(self) -> dict[str, str]:
        """Names that directions may get by what they change, of what networks tell; see :meth:`_chosen`."""
        return {} if self.method.scored else self._chosen([name for _, name in self._told()])

    def _chosen(self, known: list[str]) -> dict[str, str]:
        """What is asked for by ``names``, each with its attribute's name.

        Raises:
            UserError: for a wanted attribute that there is not, or two of one name.
        """
        wanted = dict[str, str]()
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
        """A block's z (n, z_dim), and its style codes in full precision; heads that were found have no z."""
        if block.found:
            ws = Latents.cat([head.codes(self.generator) for head in block.found])
            return torch.zeros(block.count, 0, device=self.device), ws
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

    def render(self, ws: Latents, camera: Camera | None, generator: Generator | None = None) -> Tensor:
        """Pictures (n, 3, H, W) of heads, each from its camera; by the directions' own generator, if by no other."""
        return (generator or self.generator).synthesis(ws, camera).image

    def scores(self, image: Tensor) -> list[Tensor]:
        """What each network tells of pictures: (n, names)."""
        return [network(image) for network in self.attributes]

    # -- fit: directions --------------------------------------------------------------------------

    def export(self) -> Export | None:
        if self.trainer.state.fn == "predict":
            return self._moved()
        samples = self._samples()
        found = []
        if samples.names or not self.method.scored:
            found = self.method.find(samples, self.seed, self.generator)
        found += self._imported
        heads = self._validation(samples, self.calibration.codes)
        camera = self.front(len(heads))
        with torch.no_grad():
            before = self.render(heads, camera)

        def change(ws: Latents) -> Tensor:
            return self.perceptual(self.render(ws, camera), before)  # type: ignore[misc]

        directions, measured = calibrate(found, samples, self.generator, heads, change, self.calibration)
        directions, measured = self._called(directions, measured, samples)
        metrics = {}
        for row, (name, direction) in enumerate(zip(directions.names, found, strict=True)):
            low, high = directions.limits[row].tolist()
            scores = ", ".join(f"{score} {value:.3f}" for score, value in direction.scores.items())
            log.info("%s: useful from %.2f to %.2f standard deviations; %s", name, low, high, scores)
            metrics |= {f"{name}/{score}": value for score, value in {**measured[row], **direction.scores}.items()}
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

    def _validation(self, samples: Samples, count: int) -> Latents:
        """Heads that the method was not fitted to."""
        rows = {name: rows for name, (rows, _) in self._groups().items()}
        return samples.validation(count, rows).to(self.device)

    @torch.no_grad()
    def _called(
        self, directions: Directions, measured: list[dict[str, float]], samples: Samples
    ) -> tuple[Directions, list[dict[str, float]]]:
        """Directions by the names of what they change, where the method does not know it, and what was measured."""
        naming, count = self._naming(), len(directions.names) - len(self.boundaries)
        if not naming:
            return directions, measured
        heads = self._validation(samples, self.method.tried_on)
        told = [name for _, name in self._told()]
        columns = [told.index(attribute) for attribute in naming.values()]

        def scores(ws: Latents) -> Tensor:
            parts = [ws[slice(i, i + CHUNK)] for i in range(0, len(ws), CHUNK)]
            found = [torch.cat(self.scores(self.render(part, self.front(len(part)))), 1) for part in parts]
            return torch.cat(found)[:, columns].double().cpu()

        before, changes = scores(heads), []
        for name in directions.names[:count]:
            low, high = (scores(directions.apply(heads, {name: strength})) for strength in (-1.0, 1.0))
            changes.append(((high - low) / 2).nanmean(0))
        unit = deviation(before)
        unit = torch.where(unit > 1e-6 * before.abs().nan_to_num().amax(0), unit, math.nan)  # all alike: no unit
        taken = list(self.boundaries)
        called = self.method.called(directions.names[:count], torch.stack(changes) / unit, list(naming), taken)
        called += [(name, False) for name in directions.names[count:]]
        for (name, turned), values, old in zip(called, measured, directions.names, strict=True):
            log.info("%s is called %s%s", old, name, ", turned" if turned else "")
            if turned:
                values["low_distance"], values["high_distance"] = values["high_distance"], values["low_distance"]
        names, turned = zip(*called, strict=True)
        return directions.renamed(names, turned), measured

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
            image = self.render(ws, camera)
            before, rows = self._told_of(image), []
            for _, name, edit in self._edits(ws, camera):
                low, high = (self.render(edit(strength), camera) for strength in (-1.0, 1.0))
                row = {"change": (self._told_of(high) - self._told_of(low)) / 2}
                if self.styled is not None:
                    ends = [self._told_of(self.render(edit(strength), camera, self.styled)) for strength in (1.0, -1.0)]
                    row["styled"] = (ends[0] - ends[1]) / 2
                compared = {
                    **{f"{k}/more": f(high, image) for k, (_, f) in self._comparisons().items()},
                    **{f"{k}/less": f(low, image) for k, (_, f) in self._comparisons().items()},
                }
                if self.offsets is not None:
                    compared["length"] = _length(edit(1.0) - ws) / _length(self._along(ws, name, 1.0) - ws)
                rows.append((row, compared))
            for row, number in enumerate(block.numbers):
                self._measured.append(
                    {
                        "head": number,
                        "before": before[row].tolist(),
                        "changes": [told["change"][row].tolist() for told, _ in rows],
                        "styled": [told["styled"][row].tolist() for told, _ in rows if "styled" in told],
                        "compared": [{k: float(v[row]) for k, v in compared.items()} for _, compared in rows],
                    }
                )

    def _edits(self, ws: Latents, camera: Camera | None) -> list[tuple[str, str, Callable[[float], Latents]]]:
        """What each edit of heads is called, the direction's name, and the codes by strength."""
        found: list[tuple[str, str, Callable[[float], Latents]]] = []
        for name in self.directions.names:
            found.append((name, name, partial(self._along, ws, name)))
            if self.offsets is not None:
                shown_by = self.styled if self.offsets.search.id_on == "direct" else None
                render = partial(self.render, camera=camera, generator=shown_by)
                offset = self.offsets(ws, self.directions, name, render)
                found.append((f"{name} {self.variant}", name, partial(ws.lerp, ws + offset)))
        return found

    def _along(self, ws: Latents, name: str, strength: float) -> Latents:
        return self.directions.apply(ws, {name: strength})

    def _comparisons(self) -> dict[str, tuple[str, Callable[..., Tensor]]]:
        """By metric, of edits with offsets: the network's name, and what it says of edited and unedited pictures."""
        if self.offsets is None:
            return {}
        found: dict[str, tuple[str, Callable[..., Tensor]]] = {}
        found["identity"] = self.offsets.network, self.offsets.likeness
        if self.perceptual is not None:
            found["distance"] = network_name(self.perceptual.module), self.perceptual
        return found

    def _told_of(self, image: Tensor) -> Tensor:
        """Scores of heads by what they look like (n, all), float64 on the CPU."""
        found = self.scores(image)
        if self.encoder is not None:
            codes, _ = inverted(image, self.encoder, self.generator)
            found.append(self.directions.read(codes))
        return torch.cat([s.double().cpu() for s in found], 1)

    def summary(self) -> list[Record]:
        """See :func:`models.metrics.changes.change_records`; of edits with offsets also, for each head and side
        (``identity/more``, ``distance/less``), how much it is the same person and how much its picture changes, and the
        ``length`` of its offset, as a share of the direction's; ``agreement`` of changes in the styled generator."""
        measured = sorted(gather(self._measured), key=lambda entry: entry["head"])
        before = torch.tensor([entry["before"] for entry in measured], dtype=torch.float64)
        changes = torch.tensor([entry["changes"] for entry in measured], dtype=torch.float64)  # (N, K, A)
        measures = self._told()
        if self.encoder is not None:
            measures += [(type(self.encoder).__name__, name) for name in self.directions.names]
        ends = [""] if self.offsets is None else ["", f" {self.variant}"]
        variants = [(f"{name}{end}", name) for name in self.directions.names for end in ends]
        items = [f"{entry['head']:08d}" for entry in measured]
        records = change_records(before, changes, items, variants, measures, self.seed)
        for item, entry in zip(items, measured, strict=True):
            for (variant, _), values in zip(variants, entry["compared"], strict=True):
                for metric, value in values.items():
                    network, _ = self._comparisons().get(metric.partition("/")[0], ("", None))
                    records.append(self._record(item, variant, network, metric, value))
        if self.styled is not None:
            styled = torch.tensor([entry["styled"] for entry in measured], dtype=torch.float64)
            for item, values in zip(items, agreement(changes, styled, before).tolist(), strict=True):
                records += [
                    self._record(item, variant, "", "agreement", value)
                    for (variant, _), value in zip(variants, values, strict=True)
                ]
        return records

    def _record(self, item: str, variant: str, network: str, metric: str, value: float) -> Record:
        return Record(PROTOCOL, VERSION, "test", item, "", self.seed, variant, network, metric, value)

    # -- predict ----------------------------------------------------------------------------------

    def on_predict_start(self) -> None:
        if self.tested is None:
            raise UserError("directions predict needs what it shows, --model.tested.path")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, FoundLatents):
            check_kin(load(data.path), self.inputs["tested"])

    @torch.no_grad()
    def predict_step(self, batch: list[CodeBlock], batch_idx: int) -> None:
        for block in batch:
            count = min(block.count, self._shown().stop - block.start)
            if count < 1:
                continue
            ws = self.codes(block)[1][:count]
            edits = self._edits(ws, self.front(count))
            pictures = self.sheets(ws, edits)
            for name, picture in zip(block.names[:count], pictures, strict=True):
                write_image(self.item_dir(name) / f"directions_{name}.png", picture)
            if self.offsets is not None:
                offsets = {name: edit(1.0) - ws for variant, name, edit in edits if variant != name}
                write_offsets(self.item_dir(block.id) / "offsets.safetensors", ws, offsets)

    def _shown(self) -> range:
        """The numbers of the heads that predict shows."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return range(data.samples, data.samples + min(self.heads, data.test_samples))

    def sheets(self, ws: Latents, edits: Sequence[tuple[str, str, Callable[[float], Latents]]]) -> list[Tensor]:
        """Pictures of heads (n), each with a row for every edit, and another where a styled generator shows it too."""
        generators = {"": self.generator} if self.styled is None else {"": self.generator, ", styled": self.styled}
        rows: list[list[list[tuple[str, Tensor | None]]]] = [[] for _ in range(len(ws))]
        camera = self.front(len(ws))
        for _, _, edit in edits:
            for generator in generators.values():
                seen = [self.render(edit(s), camera, generator).float() for s in STRENGTHS]
                for row, pictures in enumerate(zip(*(x.clamp(-1, 1).cpu() for x in seen), strict=True)):
                    captions = [f"{s:+.1f}" for s in STRENGTHS]
                    if self.offsets is not None and generator is self.generator:
                        middle = seen[STRENGTHS.index(0.0)]
                        alike = [float(self.offsets.likeness(x, middle)[row]) for x in seen]
                        captions = [f"{c}, id {a:.2f}" for c, a in zip(captions, alike, strict=True)]
                    rows[row].append(list(zip(captions, pictures, strict=True)))
        labels = [f"{variant}{by}".replace("_", " ") for variant, _, _ in edits for by in generators]
        return [sheet(own, self.tile, labels) for own in rows]

    def _moved(self) -> Export:
        """The heads of predict as they are and moved by their offsets, to be shown as any others."""
        sheets = sorted(self.out.glob("items/*/directions_*.png"))
        media = {file.name: file for file in sheets}
        shown = self._shown()
        if self.offsets is None:
            return Export(media=media)
        heads, photos, camera = {}, dict[str, Path](), self.front(1)
        label = None if camera is None else camera.label().cpu()
        for block in self.trainer.datamodule.blocks(shown.start, len(shown)):  # type: ignore[attr-defined]
            file = self.item_dir(block.id) / "offsets.safetensors"
            for name, (ws, offsets) in zip(block.names, read_offsets(file, self.directions), strict=True):
                heads |= edited_heads(ws, offsets, name, label, len(self.generator.expressions))
            photos |= {head.id: head.picture for head in block.found if head.picture is not None}
        modules: dict[str, nn.Module] = {"generator": self.generator, "heads": HeadCodes.pack(heads, self.generator)}
        shown_by: tuple[str, str | None] = ("generator", None)
        if self.styled is not None:
            modules["styled"] = self.styled
            shown_by = ("styled", "generator")
        files = {name: f"photo_{name}.png" for name in photos}
        entries = [Entry(i, "heads", *shown_by, artwork=files.get(i), caption="edited") for i in heads]
        media |= {files[name]: photo for name, photo in photos.items()}
        return Export(modules, media=media, extra=subject_index(entries), delta_of=self.unchanged(modules))


def _length(offset: Latents) -> Tensor:
    """(B,) of offsets, all layers together."""
    return torch.cat([t.flatten(1) for t in offset.groups.values()], 1).norm(dim=1)
