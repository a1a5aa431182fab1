"""Adapts a trained generator to a set of pictures in one style, and keeps who its codes show."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.resumable import SplitDataModule
from models.artifact import Export
from models.augment.judged import JudgedAugmentation
from models.batches import PortraitBatch
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.encoders.base import Encoder
from models.errors import UserError
from models.features.base import Frozen
from models.generators.base import Discriminator, Generator
from models.generators.blending import Blend, alike, blended
from models.heads.codes import HeadCode, HeadCodes
from models.heads.index import Entry, subject_index
from models.heads.tuning import select_parameters
from models.image import read_image, resized, write_image
from models.latents import Latents
from models.losses.adaptation import PairedLoss, SemanticLoss, ShiftLoss, StructureLoss
from models.low_rank import truncate_change
from models.metrics.distribution import Distribution, cmmd, feature_distances, features_of, recall
from models.metrics.image import diversity_of_each
from models.metrics.judges import Judges
from models.metrics.prior import nearest_pictures
from models.metrics.records import Record
from stages.base.adversarial import AdversarialLoss, AdversarialStage, Fakes, Optimization
from stages.base.foreign import warn_of_embedded
from stages.base.inversion import check_fit
from stages.base.kinship import check_kin
from stages.base.ranks import gather
from stages.base.seeds import item_generator
from stages.base.stage import ArtifactRef, GeneratorRef

log = logging.getLogger(__name__)

_SAMPLES = 6  # codes that an artifact holds
_CHUNK = 16  # pictures made or embedded at once
_FEWEST = 4  # samples that distances between sets are told by
PROTOCOL, VERSION = "finetune", "1"


class FinetuneStage(AdversarialStage):
    """Fine-tuning of a generator G on a style set: G' begins as G, codes are shared, and each term is a switch.

    With no term but the adversarial one this is plain transfer (G* of pseudo-paired stylization). The recipes of
    ``configs/stages/finetune_*.yaml`` are settings of it: ``train: late`` freezes the early layers (FreezeG), ``shift``
    without a discriminator is StyleGAN-NADA's, ``structure`` the cartoon faces', ``semantic`` and ``paired`` are those
    of pseudo-paired stylization. A 3D generator sees its heads by the cameras of the style pictures.

    Args:
        prior: artifact and module of G.
        judge: name of the discriminator in G's artifact, from which this one starts; null for none.
        discriminator: one to train from scratch instead.
        total_images, adversarial, optimization, channels_last, seed: of :class:`AdversarialStage`.
        train, freeze: which parameters move, see :func:`models.heads.tuning.select_parameters`. By default all that
            a picture of given codes depends on: codes of z stay what they were.
        semantic, structure, shift, paired: what holds G' to G; null for nothing.
        perceptual, identity, embedding: networks of these terms, needed where a term has a weight for them.
        augment: of what the discriminator sees; null for nothing.
        truncation: of the samples that are scored and shown.
        kid_features: network of the kernel distance to held-out style pictures, by which a fit is scored.
        scored: samples of a score.
        patience: validations without a better score after which a fit stops, and hands on what had the best; 0 hands on
            what comes at the end.
        rank: ``test`` and ``predict`` take the changes of weights down to this rank, and hand on no more than their
            factors: a style of some hundred kilobytes, beside G; null leaves them whole.
        tested: the adapted generator that ``test`` measures; the averaged one of a checkpoint by default. blend: a
            mixture of it with G, measured and handed on by ``predict`` in its place; null for none. encoder: artifact
            of an encoder of G, which ``predict`` hands on beside it: photos become heads in the style by ``predict`` of
            the stage that trained that encoder (E3DGE, Fig. 8); null for none.
        metric, metric_identity: networks of the scores, by default those of the terms: better ones that no term knows.
            metric_embedding: of CMMD; null leaves it out. attributes: what scores heads by their pictures.
        neighbours: samples shown beside the nearest picture that was trained on, the distance beside that of held-out
            pictures; 0 skips it.
        diversity_pictures, diversity_pairs: samples, and pairs of them, by which ``test`` tells how diverse G' is, and
            how much less than G at the same codes and views; 3DArtmator has 1,000 and all of their pairs (Sec. 4.4).
        variant: name in the scores.
    """

    name = "finetune"
    monitor = ("val/kid", "min")

    def __init__(
        self,
        prior: GeneratorRef,
        judge: str | None = "discriminator",
        discriminator: Discriminator | None = None,
        total_images: int = 4_000,
        adversarial: AdversarialLoss = AdversarialLoss(pose_weight=0.0),  # noqa: B008
        optimization: Optimization = Optimization(2e-3, ema_images=500.0),  # noqa: B008
        train: str = "synthesis",
        freeze: str = "",
        semantic: SemanticLoss | None = None,
        structure: StructureLoss | None = None,
        shift: ShiftLoss | None = None,
        paired: PairedLoss | None = None,
        perceptual: nn.Module | None = None,
        identity: nn.Module | None = None,
        embedding: nn.Module | None = None,
        augment: JudgedAugmentation | None = JudgedAugmentation(),  # noqa: B008
        truncation: float = 1.0,
        kid_features: Distribution | None = None,
        scored: int = 200,
        patience: int = 0,
        tested: GeneratorRef | None = None,
        blend: Blend | None = None,
        rank: int | None = None,
        encoder: ArtifactRef | None = None,
        metric: nn.Module | None = None,
        metric_identity: nn.Module | None = None,
        metric_embedding: nn.Module | None = None,
        attributes: list[nn.Module] | None = None,
        neighbours: int = 0,
        diversity_pictures: int = 200,
        diversity_pairs: int = 400,
        variant: str = "finetune",
        channels_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(total_images, adversarial, optimization, channels_last, seed)
        self.prior, self.judge_name, self.selection = prior, judge, (train, freeze)
        self.semantic, self.structure, self.shift, self.paired = semantic, structure, shift, paired
        self.augmentation, self.truncation = augment, truncation
        self.scored, self.patience, self.rank, self._scratch = scored, patience, rank, discriminator
        check_positive(self, "truncation", "scored")
        check_not_negative(self, "patience")
        if kid_features is not None and scored < _FEWEST:
            raise UserError(f"model.scored is {scored}: distances to a set of pictures take {_FEWEST} samples or more")
        given = {"perceptual": perceptual, "identity": identity, "embedding": embedding, "kid_features": kid_features}
        for what, network, needed in (
            ("semantic", "perceptual", semantic is not None),
            ("semantic.identity", "identity", semantic is not None and semantic.identity > 0),
            ("paired", "perceptual", paired is not None),
            ("shift", "embedding", shift is not None),
            ("patience", "kid_features", patience > 0),
        ):
            if needed and given[network] is None:
                raise UserError(f"model.{what} is measured by a network: set --model.{network}")
        check_positive(self, "rank")
        for what, given in (("blend", blend), ("rank", rank)):
            if given is not None and tested is None:
                raise UserError(f"model.{what} is of a generator that was adapted before: give --model.tested.path")
        self.perceptual, self.identity, self.embedding = (
            None if network is None else Frozen(network) for network in (perceptual, identity, embedding)
        )
        self.tested, self.blend, self.encoder_from, self.variant = tested, blend, encoder, variant
        self.judges = Judges(
            perceptual if metric is None else metric,
            identity if metric_identity is None else metric_identity,
            metric_embedding,
            kid_features,
            attributes,
        )
        self.neighbours = neighbours
        check_not_negative(self, "neighbours")
        self.diversity_pictures, self.diversity_pairs = diversity_pictures, diversity_pairs
        check_positive(self, "diversity_pairs")
        if diversity_pictures < 3:
            raise UserError(f"model.diversity_pictures is {diversity_pictures}: how each differs takes 3 or more")
        self._held: dict[int, dict[str, Tensor]] = {}  # by place in the split, what validation or test has seen
        self._best: dict[str, Any] = {"score": None, "waited": 0, "weights": None, "seen": 0}  # by which a fit stops
        self._score: float | None = None  # the last
        self._guide: Tensor | None = None

    def build_model(self) -> None:
        generator = self.take("prior", self.prior.path, self.prior.module, Generator)
        judge = self._scratch
        if judge is None and self.judge_name is not None and self.tested is None:
            if self.judge_name not in self.inputs["prior"].manifest["modules"]:
                raise UserError(
                    f"{self.prior.path} has no {self.judge_name!r} to start from: give a --model.discriminator, or "
                    "set --model.judge null for recipes without one"
                )
            judge = self.take("prior", self.prior.path, self.judge_name, Discriminator)
        self.source = Frozen(copy.deepcopy(generator))
        try:
            chosen = set(select_parameters(generator, *self.selection))
            self.fake_taps = () if self.structure is None else self.structure.taps(generator)
        except ValueError as error:
            raise UserError(f"model: {error}") from error
        for name, parameter in generator.named_parameters():
            parameter.requires_grad_(name in chosen)
        if self.paired is not None:
            name = f"pairs{self.paired.level}"
            self._pairs = Frozen(self.take("pairs", self.paired.path, name, HeadCodes))
            check_kin(self.inputs["pairs"], self.inputs["prior"], self.prior.module)
            media, ids = self.inputs["pairs"].media, self._pairs.module.ids
            side = min(generator.resolution, self.paired.resolution)  # the loss sees no more
            self._styles = torch.cat([resized(read_image(media(f"style_{i}.png")), side) for i in ids])
        self.adopt(generator, judge)
        if self.tested is not None:
            adapted = self.take("tested", self.tested.path, self.tested.module, Generator).requires_grad_(False)
            if not alike(generator, adapted):
                raise UserError(
                    f"{self.tested.path} is no generator that model.prior could have become: its layers are others"
                )
            check_kin(self.inputs["tested"], self.inputs["prior"], self.prior.module)
            if self.blend is not None:
                adapted = blended(self.source.module, adapted, self.blend)
            if self.rank is not None:
                adapted = copy.deepcopy(adapted)
                truncate_change(adapted, self.source.module, self.rank)
                adapted.update_mean()
            self.average.module = adapted
        self.encoder = None
        if self.encoder_from is not None:
            self.encoder = Frozen(self.take("encoder", self.encoder_from.path, "encoder", Encoder))
            check_fit(self.encoder.module, generator)
            check_kin(self.inputs["encoder"], self.inputs["prior"], self.prior.module)

    # -- terms ---------------------------------------------------------------------------------------------------

    def augment(self, image: Tensor, draws: torch.Generator) -> Tensor:
        return image if self.augmentation is None else self.augmentation(image, draws)

    def generator_terms(self, batch: PortraitBatch, fakes: Fakes) -> tuple[Tensor | None, dict[str, Tensor]]:
        total: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        if self.paired is not None:
            terms["paired"] = self._paired(self.paired).mean()
            total.append(self.paired.weight * terms["paired"])
        if self.semantic is None and self.structure is None and self.shift is None:
            return (torch.stack(total).sum() if total else None), terms
        with torch.no_grad():
            assert fakes.z is not None  # both are asked for the same z: where the mapping moves, w is not the same
            source = self.source.module.synthesis(
                self.source.module.mapping(fakes.z), fakes.camera, expression=fakes.expression,
                randomness=fakes.randomness(), taps=self.fake_taps,
            )  # fmt: skip
        image = fakes.rendering.image
        if self.semantic is not None:
            assert self.perceptual is not None
            identity = None if self.identity is None else self.identity.module
            found = self.semantic(image, source.image, self.perceptual.module, identity)
            terms |= {name: values.mean() for name, values in found.items()}
            total.append(self.semantic.weight * terms["semantic"])
        if self.structure is not None:
            terms["structure"] = self.structure(fakes.rendering, source, self.fake_taps).mean()
            total.append(self.structure.weight * terms["structure"])
        if self.shift is not None:
            assert self.embedding is not None and self._guide is not None
            terms["shift"] = self.shift(image, source.image, self._guide, self.embedding.module).mean()
            total.append(self.shift.weight * terms["shift"])
        return torch.stack(total).sum(), terms

    def _paired(self, paired: PairedLoss) -> Tensor:
        """L_paired (n,) of pairs that this step draws."""
        assert self.perceptual is not None
        codes: HeadCodes = self._pairs.module
        drawn = torch.randint(len(codes), (min(paired.batch, len(codes)),), generator=self.draws("pairs"))
        heads = [codes[codes.ids[i]] for i in drawn.tolist()]
        ws = Latents.cat([head.latents for head in heads])
        cameras = [head.camera for head in heads if head.camera is not None]
        image = self.generator.synthesis(ws, Camera.cat(cameras) if cameras else None).image
        return paired(image, self._styles[drawn].to(image), self.perceptual.module)

    def on_fit_start(self) -> None:
        if self.tested is not None:
            raise UserError("fit adapts model.prior, and hands on what comes of it: leave --model.tested out")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SplitDataModule)
        if self.judges.distribution is not None and len(data.datasets["val"]) < 2:
            raise UserError(
                f"a fit is scored by held-out pictures, and the data hold out {len(data.datasets['val'])}: hold out "
                "two or more, or set --model.kid_features null and --model.patience 0"
            )
        super().on_fit_start()
        warn_of_embedded(self.generator, self.perceptual, self.identity, self.embedding)
        if self.shift is not None:
            self._guide = self._direction(self.shift)

    @torch.no_grad()
    def _direction(self, shift: ShiftLoss) -> Tensor:
        """From G's pictures to the style's, in the embedding: by all pictures that are trained on."""
        assert self.embedding is not None
        data, embedding = self.trainer.datamodule, self.embedding.module  # type: ignore[attr-defined]
        assert isinstance(data, SplitDataModule)
        train = data.datasets["train"]
        style = [embedding(train[i]["image"].to(self.device)) for i in range(len(train))]
        labels = torch.cat([train[i]["label"] for i in range(len(train))]) if "label" in train[0] else None
        pictures = self.pictures(self.source.module, shift.pictures, labels, 1.0)
        source = [embedding(part.to(self.device)) for part in pictures]
        return shift.guide(torch.cat(style), torch.cat(source))

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.patience and self._best["waited"] >= self.patience:  # resumed from where it had stopped
            self.trainer.should_stop = True

    def prepare(self, batch: PortraitBatch, draws: torch.Generator) -> PortraitBatch:
        self.check_size(batch)
        return batch

    def check_size(self, batch: PortraitBatch) -> None:
        """Refuse pictures of another size than the generator's.

        Raises:
            UserError: saying what to set.
        """
        side, own = batch["image"].shape[-1], self.generator.resolution
        if side != own:
            raise UserError(
                f"the style's pictures have {side} px a side, {self.prior.path} makes {own}: set "
                f"--data.init_args.size={own}"
            )

    # -- validation ----------------------------------------------------------------------------------------------

    def pictures(
        self,
        generator: Generator,
        count: int,
        labels: Tensor | None = None,
        truncation: float | None = None,
        drawn: str = "sample",
    ) -> Iterator[Tensor]:
        """Random heads, (n, 3, R, R) at a time on the CPU: the same of each generator.

        Args:
            labels: (N, 25) cameras that see them in 3D, again and again; random ones of the generator's rig by default.
            drawn: other words, other heads.
        """
        for start in range(0, count, _CHUNK):
            draws, size = item_generator(self.seed, drawn, start), min(_CHUNK, count - start)
            z = generator.sample_z(size, draws).to(self.device)
            camera = None
            if generator.is_3d and labels is not None:
                camera = Camera.from_label(labels[torch.arange(start, start + size) % len(labels)].to(self.device))
            elif generator.is_3d:
                camera = generator.rig.random(size, draws).to(self.device)
            ws = generator.mapping(z, truncation=self.truncation if truncation is None else truncation)
            yield generator.synthesis(ws, camera).image.clamp(-1, 1).cpu()

    def samples(self, count: int, camera: Camera | None, draws: torch.Generator) -> Tensor:
        generator = self.average.module
        z = generator.sample_z(count, draws).to(self.device)
        return generator.synthesis(generator.mapping(z, truncation=self.truncation), camera).image

    @torch.no_grad()
    def validation_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        self.check_size(batch)
        super().validation_step(batch, batch_idx)
        self._hold(batch)

    def _hold(self, batch: PortraitBatch) -> list[int]:
        """Keep what set distances compare with: places in the split, as the loader deals subjects out."""
        places = []
        labels = {"label": batch["label"].cpu()} if "label" in batch else {}
        for row, image in enumerate(batch["image"].cpu()):
            places.append(len(self._held) * self.world_size + self.global_rank)
            self._held[places[-1]] = {"image": image, **{name: label[row] for name, label in labels.items()}}
        return places

    def _all_held(self) -> tuple[Tensor, Tensor | None]:
        """Of all ranks, in the split's order, and none is kept: pictures (N, 3, H, W), labels (N, 25) or none."""
        held, self._held = dict(gather(list(self._held.items()))), {}
        return _stacked([held[place] for place in sorted(held)])

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        held, labels = self._all_held()
        if self.tested is not None:  # by which a blend is chosen, beside the score
            for name, values in self._moved(labels).items():
                self.log(f"val/{name}_source", float(values.mean()), rank_zero_only=False)
        if self.judges.distribution is None or len(held) < 2:  # of which a fit has said so
            return
        score = self._kid(held, labels)
        self.log("val/kid", score, prog_bar=True, rank_zero_only=False)
        self.validated = {"val/kid": score}
        if not self.trainer.sanity_checking and self.patience:
            self._wait(score)

    def _kid(self, held: Tensor, labels: Tensor | None) -> float:
        """KID of samples; one score for all ranks, by which all go on, or stop."""
        assert self.judges.distribution is not None
        found, real = self._features(held, labels, self.judges.distribution.module)
        kid = feature_distances(found, real, self.seed, metrics=["kid"])["kid"]
        self._score = float(self.trainer.strategy.broadcast(kid))
        return self._score

    def _wait(self, score: float) -> None:
        """Keep the best weights; stop where they have been the best for long."""
        best = self._best
        if best["score"] is None or score < best["score"]:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in self.average.module.state_dict().items()}
            self._best = {"score": score, "waited": 0, "weights": weights, "seen": int(self.steps_done)}
        else:
            best |= {"waited": best["waited"] + 1, "seen": int(self.steps_done)}
            if best["waited"] >= self.patience:
                self.trainer.should_stop = True

    @torch.no_grad()
    def on_train_end(self) -> None:
        """What comes of the last steps is scored as well, though no validation falls on them."""
        super().on_train_end()
        if self.patience and self._best["seen"] < int(self.steps_done):
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            assert isinstance(data, SplitDataModule)
            held = data.datasets["val"]
            self._wait(self._kid(*_stacked([held[i] for i in range(len(held))])))

    def _features(self, held: Tensor, labels: Tensor | None, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Of samples, and of held-out pictures."""
        samples = self.pictures(self.average.module, self.scored, labels)
        return features_of(network, samples, self.device), features_of(network, [held], self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["best"] = {**self._best, "last": self._score}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._best |= checkpoint.get("best", {})
        self._score = self._best.pop("last", None)

    def export(self) -> Export:
        """The generator; beside it G, and codes of samples that both show: a style has a strength in ``view``."""
        predicts, prior = self.trainer.state.fn == "predict", (self.inputs["prior"], self.prior.module)
        if not predicts and self._best["weights"] is not None:
            self.average.module.load_state_dict(self._best["weights"])
            self.average.module.update_mean()
        found = Export({"generator": self.average.module.eval()}) if predicts else super().export()
        score = self._score if self._best["score"] is None else self._best["score"]
        codes = self._samples()
        modules: dict[str, nn.Module] = {**found.modules, "original": self.source.module}
        modules["samples"] = HeadCodes.pack(codes, self.source.module)
        if self.encoder is not None:
            modules["encoder"] = self.encoder.module
        entries = [Entry(name, codes="samples", original="original", caption="in the style") for name in codes]
        given = {
            "recipe": self.inputs["prior"].extra.get("recipe"),
            "blend": None if self.blend is None else asdict(self.blend),
            "rank": self.rank,
        }
        extra = {name: value for name, value in given.items() if value is not None}
        delta_of = {**self.unchanged(modules), "original": prior}
        if self.rank is not None:
            delta_of["generator"] = prior
        return replace(
            found,
            modules=modules,
            metrics={} if score is None else {"val/kid": score},
            extra={**extra, "truncation": self.truncation, **subject_index(entries)},
            dtype={**found.dtype, "generator": "float16"},
            delta_of=delta_of,
            rank={} if self.rank is None else {"generator": self.rank},
        )

    @torch.no_grad()
    def _samples(self) -> dict[str, HeadCode]:
        """Codes of some heads, which both generators show."""
        source = self.source.module
        z = source.sample_z(_SAMPLES, item_generator(self.seed, "shown", 0)).to(self.device)
        ws, neutral = (
            source.mapping(z, truncation=self.truncation).map(Tensor.cpu),
            torch.zeros(1, len(source.expressions)),
        )
        label = source.rig.camera(0.0).label() if source.is_3d else None
        return {f"sample{k}": HeadCode(ws[k : k + 1], None, neutral, label) for k in range(_SAMPLES)}

    # -- test ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        """Against the truth where codes are known: what a style's pictures show of the same heads."""
        self.check_size(batch)
        image, views = batch["image"].flatten(0, 1), batch["image"].shape[1]
        places = self._hold(batch)
        if "z" not in batch or "seed" not in batch:
            return
        if batch["z"].shape[1] != self.generator.z_dim or (views > 1 and not self.generator.is_3d):
            if batch_idx == 0:
                log.warning(
                    "warning: the codes of these pictures, %d numbers for %d views, are none of the generator's, which "
                    "have %d: nothing is compared with what they show",
                    *(batch["z"].shape[1], views, self.generator.z_dim),
                )
            return
        generator, expression = self.average.module, self.expression(batch)
        found = generator.synthesis(generator.mapping(batch["z"]), self.camera(batch), expression=expression).image
        for name, values in self.judges.likeness(found.clamp(-1, 1), image).items():
            for row, value in enumerate(values.tolist()):
                of, view = divmod(row, views)
                subject, picture = str(int(batch["seed"][of])), f"picture{places[of] * views + view}"
                self.records.add([self._record(name, "twin", value, subject, picture, subject)])

    def _record(
        self, metric: str, to: str, value: float, item: str = "all", view: str = "", subject: str = ""
    ) -> Record:
        network, name = self.judges.network(metric), f"{metric}_{to}" if to else metric
        return Record(PROTOCOL, VERSION, "test", item, view, self.seed, self.variant, network, name, value, subject)

    @torch.no_grad()
    def summary(self) -> list[Record]:
        """What samples tell: how far from the style, from what G draws, from G's of equal codes, and one another."""
        held, labels = self._all_held()
        if not self.trainer.is_global_zero:
            return []
        records = []
        if self.judges.distribution is not None and len(held) > 1:
            network = self.judges.distribution.module
            features = self._features(held, labels, network)
            values = {**feature_distances(*features, self.seed), "recall": recall(*features)}
            photos = self.pictures(self.source.module, self.scored, labels, drawn="other")
            far = feature_distances(features[0], features_of(network, photos, self.device), self.seed)
            values |= {f"{name}_source": value for name, value in far.items()}
            records += [self._record(name, "", value) for name, value in values.items()]
        if self.judges.embedding is not None:
            value = cmmd(*self._features(held, labels, self.judges.embedding.module))
            records.append(self._record("cmmd", "", value))
        for name, values in self._moved(labels).items():
            records += [self._record(name, "source", value, f"code{k}") for k, value in enumerate(values.tolist())]
        if self.judges.perceptual is not None:
            records += self._diversity(self.judges.perceptual.module, labels)
        return records + (self._nearest(held, labels) if self.neighbours else [])

    def _diversity(self, network: Any, labels: Tensor | None) -> list[Record]:
        """Of samples, and its change against G's at the same codes and views (3DArtmator, Sec. 4.4)."""
        spreads = []
        for generator in (self.average.module, self.source.module):
            some = torch.cat(list(self.pictures(generator, self.diversity_pictures, labels))).to(self.device)
            spreads.append(diversity_of_each(network, some, self.diversity_pairs, self.seed, _CHUNK))
        values = {"diversity": spreads[0], "diversity_change": spreads[0] - spreads[1]}
        return [
            self._record(name, "", value, f"code{k}")
            for name, each in values.items()
            for k, value in enumerate(each.tolist())
        ]

    def _moved(self, labels: Tensor | None) -> dict[str, Tensor]:
        """How like G's pictures at equal codes samples still are, (scored,) each."""
        both = (self.pictures(network, self.scored, labels) for network in (self.average.module, self.source.module))
        parts = [self.judges.likeness(*(t.to(self.device) for t in pair)) for pair in zip(*both, strict=True)]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def _nearest(self, held: Tensor, labels: Tensor | None) -> list[Record]:
        """Whether samples repeat what was trained on: nearer than pictures are that were not."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SplitDataModule)
        data.setup("fit")
        train = data.datasets["train"]
        asked = {"train": torch.cat(list(self.pictures(self.average.module, self.neighbours, labels)))}
        asked["train_held_out"] = held[: self.neighbours]
        found, shown = nearest_pictures(asked, (train[i]["image"] for i in range(len(train))))
        write_image(self.out / "neighbours.png", shown)
        return [
            self._record("psnr", name, value, f"nearest{item}")
            for name, values in found.items()
            for item, value in enumerate(values.tolist())
        ]

    @torch.no_grad()
    def predict_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        """Nothing of each picture: predict hands on the tested generator, mixed as ``blend`` says."""

    def on_predict_start(self) -> None:
        super().on_predict_start()
        if self.tested is None:
            raise UserError("predict hands on a generator that was adapted before: give --model.tested.path")


def _stacked(subjects: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor | None]:
    """All views of subjects: pictures (N, 3, H, W), labels (N, 25) or none."""
    if not subjects:
        return torch.zeros(0, 3, 1, 1), None
    labels = torch.cat([one["label"] for one in subjects]) if "label" in subjects[0] else None
    return torch.cat([one["image"] for one in subjects]), labels
