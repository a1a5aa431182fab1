"""Trains a generator: adversarially, and by reconstruction where the data's latents are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from datamodules.portraits import PortraitDataModule
from datamodules.resumable import SplitDataModule
from models.artifact import Export
from models.batches import PortraitBatch, some_subjects, some_views
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.features.base import Frozen
from models.generators.base import Discriminator, Generator
from models.generators.stylesdf import StyleSDF
from models.image import write_image
from models.losses.field import FieldLoss
from models.losses.rendering import RenderingLoss
from models.metrics.consistency import SurfaceRecipe
from models.metrics.distribution import Distribution, features_of
from models.metrics.prior import (
    KnowsSubjects,
    closed_meshes,
    nearest_pictures,
    picture_scores,
    sample_consistency,
    sample_distances,
    subject_scores,
)
from models.metrics.records import Record
from models.rendering.manifolds import ManifoldPredictor, fit_predictor
from models.rendering.output import Rendering
from stages.base.adversarial import AdversarialLoss, AdversarialStage, Fakes, Optimization
from stages.base.ranks import gather, means
from stages.base.seeds import item_generator
from stages.base.stage import GeneratorRef


@runtime_checkable
class KnowsSurfaces(Protocol):
    """Data that manifolds can be fitted to before training."""

    def manifold_field(self) -> tuple[Tensor, Tensor]:
        """World points (N, 3) and values (N,) of a field whose level sets suit the subjects."""
        ...


@runtime_checkable
class KnowsDistances(Protocol):
    """Data that know the surfaces of their subjects, everywhere."""

    def distances(self, z: Tensor, points: Tensor) -> Tensor:
        """Signed distances (B, P) of points (B, P, 3) to the subjects z (B, z_dim)."""
        ...


_FEWEST = 4  # pictures, of whose halves distances between sets are told as well


class PriorStage(AdversarialStage):
    """GAN training with known or unknown latents.

    Where a batch holds ``z`` (B, z_dim), the generator reconstructs the images from their own latents, cameras and
    expressions. Where z is N(0, I), as in the embedded world, these renderings are fair samples too, and the
    adversarial terms judge them (GRAMInverter, A.4); otherwise z is drawn.

    Args:
        generator, discriminator: networks to train.
        total_images, adversarial, optimization, channels_last, seed: of :class:`AdversarialStage`.
        reconstruction: see there; weight 0 trains a plain GAN.
        field: what a signed distance field is taught at points of known heads, first alone; null for nothing.
        jitter: draw where rays are sampled, in training.
        rendered: heads of a batch, of all ranks, that are pictures; the others are for ``field`` alone, which learns
            what codes mean from many heads at a time. All by default.
        views_per_step: views of each subject used in a step, drawn at random; all by default.
        fit_manifolds: fit the manifold predictor to the data's ``manifold_field`` before training.
        tested: the generator that ``test`` measures; the averaged one of a checkpoint by default.
        fit_subjects: held-out subjects that ``test`` fits latent codes to.
        kid_features: network for the distances between samples and held-out pictures; none skips them.
        samples_scored: so many samples are compared with all held-out pictures; 20,000 in the papers' FID. By default
            only as many as half of the pictures, with that half.
        surfaces: random heads whose 3D consistency ``test`` measures, by a surface that is fitted to their views, which
            takes a minute or more each. surface_views: the views of each; surface: how it is fitted.
        meshes: random heads whose meshes ``test`` looks at, whether they are closed.
        neighbours: samples shown beside the nearest picture of the training set, the distance beside that of held-out
            pictures; 0 skips it.
    """

    name = "prior"
    monitor = ("val/psnr", "max")

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator | None = None,
        total_images: int = 64_000,
        adversarial: AdversarialLoss = AdversarialLoss(weight=0.02, start=48_000),  # noqa: B008
        reconstruction: RenderingLoss = RenderingLoss(),  # noqa: B008
        optimization: Optimization = Optimization(6e-3, betas=(0.9, 0.99), schedule="cosine"),  # noqa: B008
        field: FieldLoss | None = None,
        jitter: bool = False,
        rendered: int | None = None,
        views_per_step: int | None = None,
        fit_manifolds: bool = True,
        channels_last: bool = True,
        tested: GeneratorRef | None = None,
        fit_subjects: int = 32,
        kid_features: Distribution | None = None,
        samples_scored: int | None = None,
        surfaces: int = 0,
        surface_views: int = 30,
        surface: SurfaceRecipe | None = None,
        meshes: int = 0,
        neighbours: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(total_images, adversarial, optimization, channels_last, seed)
        self.reconstruction, self.views_per_step, self.fit_manifolds = reconstruction, views_per_step, fit_manifolds
        self.field, self.jitter, self.rendered = field, jitter, rendered
        if rendered is not None and field is None:
            raise UserError("model.rendered leaves heads to model.field, and there is none")
        if field is not None and not (isinstance(generator, StyleSDF) and generator.beta is not None):
            kind = "a StyleSDF of densities" if isinstance(generator, StyleSDF) else type(generator).__name__
            raise UserError(f"model.field teaches a signed distance, which {kind} is not")
        if field is not None and adversarial.start < field.alone and discriminator is not None:
            raise UserError(
                f"model.adversarial.start is {adversarial.start}: before image {field.alone} (model.field.alone) "
                "there are no pictures to judge"
            )
        self.tested, self.fit_subjects, self.meshes, self.neighbours = tested, fit_subjects, meshes, neighbours
        self.kid_features = None if kid_features is None else Frozen(kid_features)
        self.samples_scored, self.surfaces = samples_scored, surfaces
        self.surface_views, self.surface = surface_views, surface
        if samples_scored is not None and samples_scored < _FEWEST:
            raise UserError(f"model.samples_scored is {samples_scored}: distances are told by {_FEWEST} or more")
        if surfaces and surface_views < 2:
            raise UserError(f"model.surface_views is {surface_views}: a surface needs two views")
        self._scored: list[dict[str, Tensor]] = []  # of the running validation
        self._tested: dict[int, dict[str, Tensor]] = {}  # by place in the split, what test has seen
        check_positive(self, "rendered", "views_per_step")
        check_not_negative(self, "fit_subjects", "meshes", "neighbours", "surfaces")
        self.adopt(generator, discriminator)

    def build_model(self) -> None:
        if self.tested is not None:
            self.average.module = self.take("tested", self.tested.path, self.tested.module, Generator).requires_grad_(
                False
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        predictor = getattr(self.generator, "predictor", None)
        if self.fit_manifolds and isinstance(predictor, ManifoldPredictor) and self.images_seen == 0:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            if not isinstance(data, KnowsSurfaces):
                raise UserError("these data know no surface to fit manifolds to: set --model.fit_manifolds false")
            points, values = (t.to(self.device) for t in data.manifold_field())
            with torch.enable_grad():
                error = fit_predictor(predictor, points, values, generator=torch.Generator().manual_seed(self.seed))
            self.print(f"manifolds fitted to the data's surfaces: root mean square error {error:.4f}")
            self.average.module.predictor.load_state_dict(predictor.state_dict())

    def export(self) -> Export:
        """Also how faces are framed for this generator, where its training pictures say so."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        recipe = data.recipe if isinstance(data, PortraitDataModule) else None
        return replace(super().export(), extra={} if recipe is None else {"recipe": recipe})

    # -- terms ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: PortraitBatch, draws: torch.Generator) -> PortraitBatch:
        """Some of each subject's views, (B, V, ...) -> (B, views_per_step, ...), and of those some subjects."""
        views = batch["image"].shape[1]
        if self.views_per_step is not None and self.views_per_step < views:
            pick = torch.randperm(views, generator=draws)[: self.views_per_step].to(batch["image"].device)
            batch = some_views(batch, pick)
        self._taught = batch
        if self.rendered is None:
            return batch
        if self.rendered % self.world_size:
            raise UserError(f"model.rendered is {self.rendered}: it must be a multiple of {self.world_size} processes")
        rows = (self.global_rows(len(batch["image"])) < self.rendered).nonzero()[:, 0].tolist()
        return some_subjects(batch, rows)

    def sample_fakes(self, batch: PortraitBatch, draws: torch.Generator) -> Fakes:
        if self.field is not None and "z" in batch and int(self.images_seen) < self.field.alone:
            none = Rendering(batch["image"].flatten(0, 1)[:0])
            return Fakes(none, self.generator.mapping(batch["z"]), self.camera(batch))
        known = "z" in batch and self.reconstruction.weight > 0
        if not known:
            return super().sample_fakes(batch, draws)
        return self.render(self.generator, batch, self.draws("rays") if self.jitter else None)

    def render(self, generator: Generator, batch: PortraitBatch, randomness: torch.Generator | None = None) -> Fakes:
        """The pictures of a batch by their own codes, cameras and expressions."""
        assert "z" in batch
        latents, camera = generator.mapping(batch["z"]), self.camera(batch)
        if camera is None and batch["image"].shape[1] > 1:
            raise UserError(
                "a generator without cameras shows one picture of each code: set --data.init_args.posed true"
            )
        rendering = generator.synthesis(latents, camera, expression=self.expression(batch), randomness=randomness)
        return Fakes(rendering, latents, camera)

    def generator_terms(self, batch: PortraitBatch, fakes: Fakes) -> tuple[Tensor | None, dict[str, Tensor]]:
        found: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        if self.field is not None:
            losses |= self._field_terms(self.field, fakes)
            found.append(self.field.weight * losses["field"])
        if "z" in batch and self.reconstruction.weight > 0 and len(fakes.rendering):
            losses |= self.reconstruction(fakes.rendering, batch)
            found.append(self.reconstruction.weight * losses["reconstruction"])
        return torch.stack(found).sum() if found else None, losses

    def _field_terms(self, field: FieldLoss, fakes: Fakes) -> dict[str, Tensor]:
        data, batch = self.trainer.datamodule, self._taught  # type: ignore[attr-defined]
        if not isinstance(data, KnowsDistances) or "z" not in batch:
            raise UserError("these data know no surfaces to teach a distance by: set --model.field null")
        assert isinstance(self.generator, StyleSDF)
        latents = fakes.latents if self.rendered is None else self.generator.mapping(batch["z"])
        camera = self.camera(batch)
        assert camera is not None and latents is not None
        count, views = batch["image"].shape[:2]
        draws = item_generator(self.seed, "points", self._step)
        drawn = field.draw(count * self.world_size, views, draws)[self.global_rows(count)]
        return field(self.generator, latents, camera, batch, data.distances, drawn)

    # -- validation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        if "z" not in batch:
            super().validation_step(batch, batch_idx)
            return
        real, fake = batch["image"].flatten(0, 1), self.render(self.average.module, batch).rendering.image
        error = (fake.clamp(-1, 1) - real).square().flatten(1).mean(1) / 4
        self._scored.append({"psnr": -10 * error.log10()})
        if batch_idx == 0:
            self.show(real, fake)

    def on_validation_epoch_end(self) -> None:
        for name, value in means(self._scored).items():
            self.log(f"val/{name}", value, prog_bar=True)
        self._scored.clear()

    # -- test ----------------------------------------------------------------------------------------------------

    def on_test_batch_start(self, batch: PortraitBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self._truth(batch) is None and self.kid_features is None:
            raise UserError(
                "test measures against the embedded world; of other pictures it knows the distribution only: "
                "name a network for it as --model.kid_features"
            )
        if self.surfaces and not self.average.module.is_3d:
            raise UserError("model.surfaces: a 2D generator has none")

    def _truth(self, batch: PortraitBatch) -> KnowsSubjects | None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data if "z" in batch and isinstance(data, KnowsSubjects) else None

    @torch.no_grad()
    def test_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        """Latent fits, expressions and samples against held-out subjects."""
        generator, truth = self.average.module.eval(), self._truth(batch)
        for row in range(len(batch["image"])):
            place = len(self._tested) * self.world_size + self.global_rank  # as the loader deals subjects out
            image = batch["image"][row].cpu()
            label = batch["label"][row].cpu() if "label" in batch else image.new_zeros(len(image), 0)
            self._tested[place] = {"label": label}
            if place < self.neighbours:
                self._tested[place]["image"] = image
            if self.kid_features is not None:
                self._tested[place]["features"] = features_of(self.kid_features.module, [image], self.device)
            if truth is not None and place < self.fit_subjects:
                assert "z" in batch and "seed" in batch
                z, subject = batch["z"][row][None], int(batch["seed"][row])
                if generator.is_3d:
                    self.records.add(subject_scores(generator, truth, z, subject, self.seed))
                else:
                    view = f"picture{place}"
                    self.records.add(picture_scores(generator, batch["image"][row], z, subject, view, self.seed))

    def summary(self) -> list[Record]:
        """Distances between sets of pictures, measured on rank 0."""
        tested, records = dict(gather(list(self._tested.items()))), []
        if not self.trainer.is_global_zero:
            return records
        subjects = [tested[place] for place in sorted(tested)]
        labels = torch.cat([subject["label"] for subject in subjects])
        generator = self.average.module.eval()
        if self.kid_features is not None:
            real = torch.cat([subject["features"] for subject in subjects])
            if len(real) < _FEWEST:
                raise UserError(
                    f"distances between sets are told by {_FEWEST} pictures or more, there are {len(real)}: give "
                    "more, or set --model.kid_features null"
                )
            features, count = self.kid_features.module, self.samples_scored
            records += sample_distances(features, self._samples, real, labels, self.seed, self.device, count)
        if self.surfaces:
            records += sample_consistency(generator, self.surfaces, self.seed, self.surface_views, self.surface)
        if self.meshes:
            records += closed_meshes(generator, self.meshes, self.seed)
        if self.neighbours:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            assert isinstance(data, SplitDataModule)
            data.setup("fit")
            train = data.datasets["train"]
            pictures = torch.cat([subject["image"] for subject in subjects if "image" in subject])[: self.neighbours]
            asked = {"samples": torch.cat([*self._samples(labels[: self.neighbours])]), "held out": pictures}
            found, sheet = nearest_pictures(asked, (train[i]["image"] for i in range(len(train))))
            records += [
                Record("prior", "1", "test", str(item), "", self.seed, variant, "", "psnr_to_nearest_training", value)
                for variant, values in found.items()
                for item, value in enumerate(values.tolist())
            ]
            write_image(self.out / "neighbours.png", sheet)
        return records

    @torch.no_grad()
    def _samples(self, labels: Tensor) -> Iterator[Tensor]:
        """Pictures (16, 3, R, R) of random codes, seen by cameras (N, 25) or, in 2D, by none (N, 0); on the CPU."""
        draws = torch.Generator().manual_seed(self.seed)
        for part in labels.split(16):
            camera = Camera.from_label(part.to(self.device)) if self.average.module.is_3d else None
            yield self.samples(len(part), camera, draws).clamp(-1, 1).cpu()
