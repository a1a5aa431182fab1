"""Trains the embedded feature networks: perceptual distance, style, identity, face parser, pose.

Two trunks are trained, one that ignores style (identity, parser, pose) and one that sees it (style, perceptual);
five self-contained networks are exported.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from models.artifact import Export
from models.batches import PairBatch
from models.checks import check_positive
from models.errors import UserError
from models.features.distortions import DISTORTIONS, affine_grid, appearance, distort, photometric
from models.features.embedded import EmbeddedIdentity, EmbeddedLPIPS, EmbeddedParser, EmbeddedPose, EmbeddedStyle
from models.features.evaluation import measure_features
from models.losses.contrastive import ranking, supervised_contrastive
from models.metrics.records import Record
from models.segments import SEGMENTS
from stages.base.ranks import gather
from stages.base.seeds import item_generator
from stages.base.stage import Stage

# Classes whose mean colours the style embedding must hold: face, hair with beard, cloth, background.
_COLOUR_GROUPS = ((1, 2, 3, 4, 5, 6), (7, 8), (9,), (0,))
_FILTERS = 4
_DIRECTION_TEMPERATURE = 0.2  # softer than the embedding's: directions of one style may differ by its colours
_RANKED = 4  # images in each of the six groups of comparisons
_IDENTITY_VIEWS = 4  # of a subject's six pictures, drawn anew at each step


class FeaturesStage(Stage):
    """Joint training of the five embedded feature networks.

    A batch holds S subjects with 6 images each, three poses of two images: (plain, art), (plain, art), (art, art);
    the two images of a pose differ in style only. See ``datamodules.feature_pairs``.

    Args:
        learning_rate: peak of a one-cycle schedule over the run.
        identity_weight, pose_weight, parsing_weight: of the style-blind trunk's losses.
        style_weight, direction_weight, appearance_weight, perceptual_weight: of the style-aware trunk's losses.
        seed: of the augmentations; the draws of a step depend on it and on the step only.
    """

    name = "features"
    monitor = ("val/identity_top1_art", "max")
    wrapped = False  # in validation, ranks with an odd number of batches would wait for one another

    def __init__(
        self,
        learning_rate: float = 2e-3,
        identity_weight: float = 0.7,
        pose_weight: float = 3.0,
        parsing_weight: float = 1.0,
        style_weight: float = 0.3,
        direction_weight: float = 0.5,
        appearance_weight: float = 4.0,
        perceptual_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.seed = seed
        check_positive(self, "learning_rate")
        self.loss_weights = {
            "identity": identity_weight,
            "pose": pose_weight,
            "parsing": parsing_weight,
            "style": style_weight,
            "direction": direction_weight,
            "appearance": appearance_weight,
            "perceptual": perceptual_weight,
        }
        for name, weight in self.loss_weights.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"{name}_weight is {weight}: it must be a number and must not be negative")

    def build_model(self) -> None:
        self.identity = EmbeddedIdentity(weights=None)
        self.pose = EmbeddedPose(weights=None)
        self.parser = EmbeddedParser(weights=None)
        self.style = EmbeddedStyle(weights=None)
        self.perceptual = EmbeddedLPIPS(weights=None)
        self.pose.trunk = self.parser.trunk = self.identity.trunk
        self.perceptual.trunk = self.style.trunk
        self.appearance_head = nn.Linear(self.style.dim, 3 * len(_COLOUR_GROUPS) + 3)
        self.to(memory_format=torch.channels_last)  # a third faster on CPUs

    def training_step(self, batch: PairBatch, _: int) -> Tensor:
        # The losses compare what is in a batch: each rank contrasts, and augments, its own.
        generator = Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        if self.global_rank:
            generator = item_generator(self.seed, f"rank {self.global_rank}", self.global_step)
        losses = {**self.style_blind_losses(batch, generator), **self.style_aware_losses(batch, generator)}
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()})
        return sum((self.loss_weights[name] * value for name, value in losses.items()), torch.zeros(()))

    def style_blind_losses(self, batch: PairBatch, generator: Generator) -> dict[str, Tensor]:
        """Identity (contrastive over a subject's poses and styles), pose (Huber) and parsing (cross-entropy)."""
        subjects, views = len(batch["image"]), _IDENTITY_VIEWS
        order = torch.rand(subjects, batch["image"].shape[1], generator=generator).argsort(1)[:, :views]
        rows = torch.arange(subjects)[:, None].expand(-1, views).flatten()
        index = (rows.to(batch["image"].device), order.flatten().to(batch["image"].device))
        image = batch["image"][index].float() / 127.5 - 1
        segmentation = batch["segmentation"][index].float()[:, None]
        grid = affine_grid(len(image), image.shape[-1], generator).to(image)
        # A mirrored head is another head: all views of a subject are mirrored or none.
        flip = (torch.rand(subjects, generator=generator) < 0.5).repeat_interleave(views).to(image.device)
        grid = torch.where(flip[:, None, None, None], grid * grid.new_tensor([-1.0, 1.0]), grid)
        image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
        segmentation = F.grid_sample(segmentation, grid, mode="nearest", padding_mode="border", align_corners=False)
        image = photometric(image, generator, strength=0.7)
        features = self.identity.trunk(image)

        label = torch.arange(subjects, device=image.device).repeat_interleave(views)
        identity = supervised_contrastive(F.normalize(self.identity.head(features[-1]), dim=1), label)

        yaw = torch.where(flip, -batch["yaw"][index], batch["yaw"][index])
        angles = torch.stack([yaw, batch["pitch"][index]], 1)
        predicted = self.pose.limit * torch.tanh(self.pose.head(features[-1]))
        pose = F.smooth_l1_loss(predicted, angles, beta=0.05)

        target = segmentation[:, 0].long()
        share = torch.bincount(target.flatten(), minlength=len(SEGMENTS)).to(image) / target.numel()
        balance = (share + 1e-3) ** -0.25  # small parts count more, not so much that they swallow their surroundings
        parsing = F.cross_entropy(self.parser.head(features), target, balance / balance.mean())
        return {"identity": identity, "pose": pose, "parsing": parsing}

    def style_aware_losses(self, batch: PairBatch, generator: Generator) -> dict[str, Tensor]:
        """Style and its direction from plain (contrastive), appearance, over "looks"; perceptual ranking.

        A look is an art style under a random photometric filter, one filter for a quarter of the batch, so that
        there are more looks than styles.
        """
        image = batch["image"].float() / 127.5 - 1
        size = image.shape[-1]
        plain, art = (image[:, k:4:2].flatten(0, 1) for k in (0, 1))
        segmentation_plain, segmentation_art = (batch["segmentation"][:, k:4:2].flatten(0, 1) for k in (0, 1))
        style = batch["style"][:, 1:4:2].flatten()
        usable = len(plain) // _FILTERS * _FILTERS
        order = torch.randperm(len(plain), generator=generator)[:usable].to(image.device)
        plain, art, segmentation_plain, segmentation_art, style = (
            t[order] for t in (plain, art, segmentation_plain, segmentation_art, style)
        )
        filters = torch.arange(_FILTERS, device=image.device).repeat_interleave(usable // _FILTERS)
        bare = (torch.rand(usable, generator=generator).to(image.device) < 0.2) & (filters > 0)
        art = torch.where(bare[:, None, None, None], plain, art)
        segmentation_art = torch.where(bare[:, None, None], segmentation_plain, segmentation_art)
        style = torch.where(bare, torch.zeros_like(style), style)
        filtered = photometric(art, generator, usable // _FILTERS, strength=1.3)
        art = torch.where((filters > 0)[:, None, None, None], filtered, art)

        grid = affine_grid(usable, size, generator).to(image)
        flip = (torch.rand(usable, generator=generator) < 0.5).to(image.device)
        grid = torch.where(flip[:, None, None, None], grid * grid.new_tensor([-1.0, 1.0]), grid).repeat(2, 1, 1, 1)
        both = F.grid_sample(torch.cat([plain, art]), grid, padding_mode="border", align_corners=False)
        labels = torch.cat([segmentation_plain, segmentation_art]).float()[:, None]
        labels = F.grid_sample(labels, grid, mode="nearest", padding_mode="border", align_corners=False)[:, 0].round()

        near, far, reference = self._ranked(image.flatten(0, 1), batch, generator)
        parts = [2 * usable, len(reference), len(near), len(far)]
        features = [f.split(parts) for f in self.style.trunk(torch.cat([both, reference, near, far]))]
        looks, base, first, second = ([f[i] for f in features] for i in range(4))
        embedding = F.normalize(self.style.head(looks), dim=1)
        look = style * _FILTERS + filters
        label = torch.cat([torch.full_like(look, -1), look])
        contrast = supervised_contrastive(embedding, label)
        delta = F.normalize(embedding[usable:] - embedding[:usable], dim=1)
        direction = supervised_contrastive(delta, look, _DIRECTION_TEMPERATURE)
        wanted, mask = appearance(both, labels, _COLOUR_GROUPS)
        error = F.smooth_l1_loss(self.appearance_head(embedding), wanted, reduction="none", beta=0.2)
        attributes = (error * mask).sum() / mask.sum()

        further = self.perceptual.head(base, second)
        perceptual = ranking(self.perceptual.head(base, first), further).mean()
        self.perceptual.head.calibrate(further[-_RANKED:])
        return {"style": contrast, "direction": direction, "appearance": attributes, "perceptual": perceptual}

    def _ranked(self, image: Tensor, batch: PairBatch, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(nearer, further, reference) images for the ranking loss, six groups of four.

        Three compare one damage at two strengths, one a shift with another damage, one two kinds of damage (a
        shift counts a third), the last a damaged image with another subject.
        """
        views = batch["image"].shape[1]
        count, kinds = _RANKED, len(DISTORTIONS)
        references, nears, fars = [], [], []
        picks = torch.randint(len(image), (6, count), generator=generator)
        families = torch.randperm(kinds, generator=generator).tolist()
        for slot in range(6):
            x = image[picks[slot].to(image.device)]
            kind, other = DISTORTIONS[families[slot]], DISTORTIONS[families[(slot + 1) % kinds]]
            low = torch.rand(count, generator=generator) * 0.5 + 0.05
            high = low + 0.15 + 0.3 * torch.rand(count, generator=generator)
            if slot < 3:
                state = generator.get_state()
                near = distort(x, kind, low, generator)
                far = distort(x, kind, high, generator.set_state(state))
            elif slot == 3:
                near = distort(x, "shift", 0.4 * high, generator)
                far = distort(x, kind if kind != "shift" else other, low * 0.5 + high * 0.5, generator)
            elif slot == 4:
                near = distort(x, kind, low * (1.0 if kind != "shift" else 2.0), generator)
                far = distort(x, other, (high + 0.1) if other != "shift" else 3 * high, generator)
            else:
                near = distort(x, kind, low, generator)
                far = image[(picks[slot] + views * (1 + slot)).to(image.device) % len(image)]
            references.append(x)
            nears.append(near)
            fars.append(far)
        return torch.cat(nears), torch.cat(fars), torch.cat(references)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=1e-3, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, int(self.trainer.estimated_stepping_batches), pct_start=0.08
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- evaluation -------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._seen: list[PairBatch] = []

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: PairBatch, _: int) -> None:
        self._seen.append(batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self.validated = {f"val/{name}": value for name, value in self._measure().items()}
        self.log_dict(self.validated)

    def summary(self) -> list[Record]:
        measured = self._measure().items()
        return [Record("features", "1", "test", "", "", self.seed, "embedded", "", k, v) for k, v in measured]

    def _measure(self) -> dict[str, float]:
        batch = {name: torch.cat([seen[name] for seen in self._seen]) for name in self._seen[0]}
        self._seen = []
        if self.world_size > 1:  # rank r has seen items r, r + world, ...
            parts = gather([{name: part.cpu() for name, part in batch.items()}])
            rows = [(parts[i % len(parts)], i // len(parts)) for i in range(sum(len(p["image"]) for p in parts))]
            batch = {n: torch.stack([part[n][row] for part, row in rows]).to(self.device) for n in batch}
        return measure_features(
            batch,
            style=self.style,
            identity=self.identity,
            pose=self.pose,
            parser=self.parser,
            perceptual=self.perceptual,
        )

    def export(self) -> Export:
        modules = {name: getattr(self, name) for name in ("perceptual", "style", "identity", "parser", "pose")}
        return Export(modules, self.validated, dtype=dict.fromkeys(modules, "float16"))
