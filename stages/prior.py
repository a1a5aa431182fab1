"""Trains a 3D-aware generator: adversarially, and by reconstruction where the data's latents are known."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid

from datamodules.mannequins import RIG, Scene, render
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.generators.base import Discriminator, Generator, Rendering, Verdict
from models.generators.painted import PaintedGenerator
from models.image_io import write_image
from models.inversion import fit_latents
from models.losses.gan import discriminator_nonsaturating, generator_nonsaturating, r1_penalty
from models.metrics.distribution import Distribution, kid
from models.metrics.geometry import depth_mae, normal_error
from models.metrics.image import change_correlation, psnr, ssim
from models.metrics.records import Record, write_records
from models.rendering.manifolds import ManifoldPredictor, fit_predictor
from stages.base import ArtifactRef, Stage, average_gradients, broadcast, gather, means, step_generator

_VIEWS_DEG = (-60, -36, -24, -12, 0, 12, 24, 36, 60)  # yaws at which fitted heads are compared with the truth
_NEAR_DEG = 36  # larger yaws are reported apart

_STYLE_PARTS = ("map_network", "affine", "outs", "details")  # of parameter names; see style_lr_scale

# Small but telling: weighted up in the reconstruction. Values of the embedded world's segmentation.
_FEATURES = (2, 6)  # eye_white, iris, lips, mouth, brow


class PriorStage(Stage):
    """GAN training with known or unknown latents.

    A batch holds ``image`` (B, V, 3, H, W) and ``label`` (B, V, 25). Where it also holds ``z`` (B, z_dim), the
    generator reconstructs the images from their own latents, cameras and expressions; ``depth``, ``mask`` and
    ``segmentation`` help where they are there. Where z is N(0, I), as in the embedded world, these renderings are
    fair samples too, and the adversarial terms judge them; otherwise z is drawn, and seen by the real images' cameras.

    Adversarial terms (GRAMInverter, A.4): non-saturating loss, R1, and pose regularisation, in which the
    discriminator regresses the camera of real and generated images. All counts are of REAL images seen.

    Args:
        generator, discriminator: networks to train.
        total_images: real images of the whole run.
        adversarial_from: real images after which the adversarial terms set in.
        adversarial_weight, r1_weight, pose_weight: weights; R1 is 10 / 2 times the mean squared norm in the paper.
        r1_every: steps between R1 steps (lazy regularisation); 1 is the paper's.
        reconstruction_weight: 0 trains a plain GAN.
        mask_weight, depth_weight, edge_weight, feature_weight: inside the reconstruction: of the opacity, the depth,
            image gradients, and how much more a pixel of an eye, a brow or the mouth counts.
        learning_rate: of the generator, after ``warmup_images``.
        schedule: "cosine" lets it fall to 1 % of itself, "constant" is the paper's.
        style_lr_scale: of mapping network, style affines, outputs and detail maps, against ``learning_rate``: with
            equalised learning rates these are what limits regression.
        discriminator_lr: constant.
        predictor_lr: of a manifold predictor that is not baked.
        betas: of the generator's Adam; the paper's is (0, .99).
        views_per_step: views of each subject used in a step, drawn at random; all by default.
        clip: largest gradient norm of the generator.
        ema_images: half-life of the averaged generator.
        fit_manifolds: fit the manifold predictor to the data's ``manifold_field`` before training.
        channels_last: memory format; faster on CPUs.
        tested: the generator that ``test`` measures; the averaged one of a checkpoint by default.
        fit_subjects: held-out subjects that ``test`` fits latent codes to.
        kid_features: network for the kernel distance between samples and held-out pictures; none skips it.
        neighbours: samples shown beside the nearest picture of the training set, the distance beside that of held-out
            pictures; 0 skips it.
        seed: of all draws.
    """

    name = "prior"
    monitor = ("val/psnr", "max")
    wrapped = False  # two networks, and backward passes that each leave some of their parameters out
    images_seen: Tensor
    steps_done: Tensor

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator | None = None,
        total_images: int = 64_000,
        adversarial_from: int = 48_000,
        adversarial_weight: float = 0.02,
        r1_weight: float = 5.0,
        r1_every: int = 16,
        pose_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        mask_weight: float = 1.0,
        depth_weight: float = 0.2,
        edge_weight: float = 0.5,
        feature_weight: float = 4.0,
        learning_rate: float = 6e-3,
        schedule: Literal["cosine", "constant"] = "cosine",
        style_lr_scale: float = 1.0,
        discriminator_lr: float = 2e-3,
        predictor_lr: float = 2e-5,
        warmup_images: int = 500,
        betas: tuple[float, float] = (0.9, 0.99),
        views_per_step: int | None = None,
        clip: float = 1.0,
        ema_images: float = 1500.0,
        fit_manifolds: bool = True,
        channels_last: bool = True,
        tested: ArtifactRef | None = None,
        fit_subjects: int = 32,
        kid_features: Distribution | None = None,
        neighbours: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = generator, discriminator
        self.average = copy.deepcopy(generator).requires_grad_(False)
        self.total_images, self.adversarial_from = total_images, adversarial_from
        self.adversarial_weight, self.r1_weight, self.r1_every = adversarial_weight, r1_weight, r1_every
        self.pose_weight, self.reconstruction_weight = pose_weight, reconstruction_weight
        self.mask_weight, self.depth_weight, self.edge_weight = mask_weight, depth_weight, edge_weight
        self.feature_weight = feature_weight
        self.learning_rate, self.discriminator_lr, self.predictor_lr = learning_rate, discriminator_lr, predictor_lr
        self.schedule = schedule
        self.warmup_images, self.betas, self.views_per_step, self.clip = warmup_images, betas, views_per_step, clip
        self.style_lr_scale = style_lr_scale
        self.ema_images, self.fit_manifolds, self.seed = ema_images, fit_manifolds, seed
        self.tested, self.fit_subjects, self.kid_features = tested, fit_subjects, kid_features
        self.neighbours = neighbours
        self._scored: list[dict[str, Tensor]] = []  # of the running validation
        self._records: list[Record] = []
        self._tested: dict[int, dict[str, Tensor]] = {}  # by place in the split, what test has seen
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        check_positive(
            self,
            *("learning_rate", "discriminator_lr", "predictor_lr", "style_lr_scale", "total_images", "r1_every"),
            *("warmup_images", "views_per_step", "clip"),
        )
        check_not_negative(
            self,
            *("adversarial_from", "adversarial_weight", "r1_weight", "pose_weight", "reconstruction_weight"),
            *("mask_weight", "depth_weight", "edge_weight", "feature_weight", "ema_images"),
            *("fit_subjects", "neighbours"),
        )
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def build_model(self) -> None:
        if self.tested is not None:
            taken = self.take("tested", self.tested)
            assert isinstance(taken, Generator)
            self.average = taken.requires_grad_(False)

    # -- Lightning -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        groups: dict[float, list[Tensor]] = {1.0: [], self.style_lr_scale: []}
        for name, parameter in self.generator.named_parameters():
            if name.startswith("predictor."):
                if not getattr(self.generator, "bake_predictor", False):
                    groups.setdefault(self.predictor_lr / self.learning_rate, []).append(parameter)
            else:
                fast = any(part in _STYLE_PARTS for part in name.split("."))
                groups[self.style_lr_scale if fast else 1.0].append(parameter)
        parameters = [{"params": members, "scale": scale} for scale, members in groups.items() if members]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(parameters, lr=self.learning_rate, betas=self.betas)
        ]
        if self.discriminator is not None:
            # Lazy regularisation: R1 every k steps shortens Adam's memory accordingly (StyleGAN2, App. B).
            ratio = self.r1_every / (self.r1_every + 1) if self.r1_every > 1 else 1.0
            optimizers.append(
                torch.optim.Adam(
                    self.discriminator.parameters(), lr=self.discriminator_lr * ratio, betas=(0.0, 0.99**ratio)
                )
            )
        return optimizers

    def on_fit_start(self) -> None:
        predictor = getattr(self.generator, "predictor", None)
        if self.fit_manifolds and isinstance(predictor, ManifoldPredictor) and self.images_seen == 0:
            field = getattr(self.trainer.datamodule, "manifold_field", None)  # type: ignore[attr-defined]
            if field is None:
                raise UserError("these data know no surface to fit manifolds to: set --model.fit_manifolds false")
            points, values = field()
            generator = torch.Generator().manual_seed(self.seed)
            with torch.enable_grad():
                error = fit_predictor(predictor, points.to(self.device), values.to(self.device), generator=generator)
            self.print(f"manifolds fitted to the data's surfaces: root mean square error {error:.4f}")
            self.average.predictor.load_state_dict(predictor.state_dict())  # type: ignore[union-attr]

    def on_train_start(self) -> None:
        broadcast(self)
        # Resumed from the last step of all, there is nothing left but to export.
        self.trainer.should_stop = int(self.images_seen) >= self.total_images

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        step = int(self.steps_done)
        draws = step_generator(self.seed, step)
        batch = self._pick_views(batch, draws)
        real, camera = batch["image"].flatten(0, 1), Camera.from_label(batch["label"].flatten(0, 1))
        optimizer, *others = self.optimizers()  # type: ignore[misc]
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * group["scale"] * self._schedule()
        known = "z" in batch and self.reconstruction_weight > 0
        adversarial = self.discriminator is not None and int(self.images_seen) >= self.adversarial_from
        if not (known or adversarial):
            raise UserError(
                "pictures whose latents are not known, or not used, train a plain GAN: it needs a "
                "--model.discriminator, and --model.adversarial_from 0"
            )

        fake = self._render(batch, camera) if known else self._sample(camera, batch["image"].shape[1], draws)
        losses = self.reconstruction(fake, batch) if known else {}
        loss = self.reconstruction_weight * losses["reconstruction"] if known else real.new_zeros(())
        if adversarial:
            assert self.discriminator is not None
            self.discriminator.requires_grad_(False)
            verdict = self.discriminator(fake.image)
            losses["adversarial"] = generator_nonsaturating(verdict.logits)
            losses["fake_pose"] = self._pose_error(verdict, camera)
            loss = loss + self.adversarial_weight * (losses["adversarial"] + self.pose_weight * losses["fake_pose"])
        optimizer.zero_grad()
        self.manual_backward(loss)
        average_gradients(self.generator)
        optimizer.step()
        losses["gradient_norm"] = self._gradient_norm
        if adversarial:
            losses |= self._judge(others[0], real, fake.image.detach(), camera, step)

        world = self.trainer.world_size
        self.images_seen += len(real) * world
        self.steps_done += 1
        self._update_average(len(real) * world)
        self.log_dict({f"prior/{name}": value.detach() for name, value in losses.items()})
        self.log("images", self.images_seen.float(), prog_bar=True)
        self.log("prior/lr", optimizer.param_groups[0]["lr"])
        if int(self.images_seen) >= self.total_images:
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here, and not after backward: under 16-mixed gradients are scaled until now.
        if optimizer is self.trainer.optimizers[0]:
            norm = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), self.clip)
            # The scaler leaves a step out whose gradients overflow, and scales less from then on: nothing is wrong.
            skipped = getattr(self.trainer.precision_plugin, "scaler", None) is not None and not norm.isfinite()
            self._gradient_norm = torch.zeros_like(norm) if skipped else norm

    def on_train_end(self) -> None:
        for generator in (self.generator, self.average):
            if isinstance(generator, PaintedGenerator):
                generator.update_mean()

    def export(self) -> dict[str, Any]:
        modules: dict[str, nn.Module] = {"generator": self.average.eval()}
        if self.discriminator is not None and int(self.images_seen) > self.adversarial_from:
            modules["discriminator"] = self.discriminator.eval()
        return {"modules": modules, "dtype": dict.fromkeys(modules, "float16")}

    # -- terms ---------------------------------------------------------------------------------------------------

    def reconstruction(self, fake: Rendering, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L1 + squared error, weighted up on features; image gradients; opacity and depth against the truth."""
        real = batch["image"].flatten(0, 1)
        error = fake.image - real
        weight = torch.ones_like(real[:, :1])
        if "segmentation" in batch:
            segments = batch["segmentation"].flatten(0, 1).reshape(weight.shape)
            feature = ((segments >= _FEATURES[0]) & (segments <= _FEATURES[1])).to(weight.dtype)
            weight = weight + self.feature_weight * F.max_pool2d(feature, 3, 1, 1)
        losses = {
            "image": (error.abs() * weight).mean() + 2 * (error.square() * weight).mean(),
            # The gradient of the error is the error of the gradients.
            "edge": error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean(),
        }
        total = losses["image"] + self.edge_weight * losses["edge"]
        if "mask" in batch and fake.alpha is not None:
            mask = batch["mask"].flatten(0, 1)
            losses["mask"] = F.mse_loss(fake.alpha, mask)
            total = total + self.mask_weight * losses["mask"]
            if "depth" in batch and fake.depth is not None:
                solid = (mask > 0.99).to(mask.dtype)
                error = (fake.depth - batch["depth"].flatten(0, 1)).square()
                if fake.spread is not None:  # sum_i w_i (z_i - z)^2: fog around the right depth is wrong too
                    error = error + fake.spread
                losses["depth"] = ((error + 1e-6).sqrt() * solid).mean()
                total = total + self.depth_weight * losses["depth"]
        return losses | {"reconstruction": total}

    def _judge(self, optimizer: Any, real: Tensor, fake: Tensor, camera: Camera, step: int) -> dict[str, Tensor]:
        """One discriminator step."""
        network = self.discriminator
        assert network is not None
        network.requires_grad_(True)
        verdict, doubt = network(real), network(fake)
        losses = {
            "discriminator": discriminator_nonsaturating(verdict.logits, doubt.logits),
            "real_pose": self._pose_error(verdict, camera),
        }
        loss = losses["discriminator"] + self.pose_weight * (losses["real_pose"] + self._pose_error(doubt, camera))
        if step % self.r1_every == 0:
            penalty, _ = r1_penalty(lambda image: network(image).logits, real)
            losses["r1"] = penalty.mean()
            loss = loss + self.r1_weight * self.r1_every * losses["r1"]
        optimizer.zero_grad()
        self.manual_backward(loss)
        average_gradients(network)
        optimizer.step()
        return losses

    @staticmethod
    def _pose_error(verdict: Verdict, camera: Camera) -> Tensor:
        if verdict.pose is None:
            return verdict.logits.new_zeros(())
        return F.mse_loss(verdict.pose.float(), torch.stack([camera.yaw, camera.pitch], -1))

    # -- helpers -------------------------------------------------------------------------------------------------

    def _pick_views(self, batch: dict[str, Tensor], draws: torch.Generator) -> dict[str, Tensor]:
        """Some of each subject's views: (B, V, ...) -> (B, views_per_step, ...)."""
        views = batch["image"].shape[1]
        if self.views_per_step is None or self.views_per_step >= views:
            return batch
        pick = torch.randperm(views, generator=draws)[: self.views_per_step].to(batch["image"].device)
        per_view = [name for name, value in batch.items() if value.ndim > 1 and value.shape[1] == views and name != "z"]
        return {name: value[:, pick] if name in per_view else value for name, value in batch.items()}

    def _render(self, batch: dict[str, Tensor], camera: Camera) -> Rendering:
        expression = batch["expression"].flatten(0, 1) if self.generator.expressions and "expression" in batch else None
        return self.generator.synthesis(self.generator.mapping(batch["z"]), camera, expression=expression)

    def _sample(self, camera: Camera, views: int, draws: torch.Generator) -> Rendering:
        """One subject a camera, seen by the cameras of the real batch, which has so many ``views`` of each subject."""
        z = self.generator.sample_z(len(camera) * self.world_size, draws)[self.own(len(camera), views)]
        if self.global_rank > 0:  # what a generator draws inside, noise and jitter, it draws for its rank's rows
            draws = step_generator(self.seed, int(self.steps_done), self.global_rank)
        return self.generator.synthesis(self.generator.mapping(z.to(self.device)), camera, randomness=draws)

    def _schedule(self) -> float:
        seen = float(self.images_seen)
        progress = min(seen / self.total_images, 1.0) if self.schedule == "cosine" else 0.0
        return min(1.0, (seen + 1) / self.warmup_images) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))

    @torch.no_grad()
    def _update_average(self, images: int) -> None:
        # A short memory at first: the average must forget the initial weights.
        half_life = min(self.ema_images, 0.05 * float(self.images_seen))
        keep = 0.5 ** (images / max(half_life, 1e-8))
        for average, current in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            average.lerp_(current, 1 - keep)
        for average, current in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            average.copy_(current)

    # -- validation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        known = "z" in batch
        if not known and batch_idx > 0:
            return
        camera = Camera.from_label(batch["label"].flatten(0, 1))
        expression = batch["expression"].flatten(0, 1) if known and self.average.expressions else None
        z = batch["z"] if known else self.average.sample_z(len(camera), torch.Generator().manual_seed(self.seed))
        with torch.no_grad():
            fake = self.average.synthesis(self.average.mapping(z.to(self.device)), camera, expression=expression)
        real = batch["image"].flatten(0, 1)
        if known:
            error = (fake.image.clamp(-1, 1) - real).square().flatten(1).mean(1) / 4
            self._scored.append({"psnr": -10 * error.log10()})
        if batch_idx == 0:
            pairs = torch.stack([real, fake.image], 1).flatten(0, 1)[:32].clamp(-1, 1)
            self._panel = pairs

    def on_validation_epoch_end(self) -> None:
        for name, value in means(self._scored).items():
            self.log(f"val/{name}", value, prog_bar=True)
        self._scored.clear()

    def panels(self) -> dict[str, Tensor]:
        """Truth, or a real picture, and generated from the same camera, side by side."""
        pairs = getattr(self, "_panel", None)
        if pairs is None:
            return {}
        rows = -(-len(pairs) // 8)
        pairs = F.pad(pairs, (1, 1, 1, 1), value=1.0)
        tiles = pairs.new_ones(rows * 8, *pairs.shape[1:])
        tiles[: len(pairs)] = pairs
        height, width = tiles.shape[-2:]
        picture = tiles.reshape(rows, 8, 3, height, width).permute(2, 0, 3, 1, 4).reshape(3, rows * height, 8 * width)
        return {"pairs": picture}

    # -- test: the embedded world knows the truth -------------------------------------------------------------------

    def on_test_batch_start(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if "z" not in batch and self.kid_features is None:
            raise UserError(
                "test measures against the embedded world; of other pictures it knows the distribution only: "
                "name a network for it as --model.kid_features"
            )

    @torch.no_grad()
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Latent fits, expressions and samples against held-out subjects of the embedded world."""
        generator = self.average.eval()
        for row in range(len(batch["image"])):
            place = len(self._tested) * self.world_size + self.global_rank  # as the loader deals subjects out
            self._tested[place] = {name: batch[name][row].cpu() for name in ("image", "label")}
            if "z" in batch and place < self.fit_subjects:
                self._records += self._measure(generator, batch["z"][row][None], int(batch["seed"][row]))

    def _measure(self, generator: Generator, z: Tensor, seed: int) -> list[Record]:
        """All scores of one subject; z (1, z_dim) is its true code."""
        size, device = generator.resolution, self.device
        draws = torch.Generator().manual_seed(seed)
        yaw, pitch = (torch.rand(2, generator=draws) * 2 - 1).tolist()
        scene = Scene.from_z(z.cpu())
        source = RIG.camera(math.radians(36) * yaw, math.radians(12) * pitch)
        views = RIG.camera(torch.tensor([math.radians(v) for v in _VIEWS_DEG]))
        truth, given = render(scene.repeat_interleave(len(views)), views, size), render(scene, source, size)
        image, mask = truth.image.to(device), truth.mask.to(device)
        source, views = source.to(device), views.to(device)
        codes = {
            "fitted": fit_latents(generator, given.image.to(device), source),
            "known z": generator.mapping(z),
        }
        records: list[Record] = []

        def add(variant: str, metric: str, view: str, value: Tensor) -> None:
            record = Record("prior", "1", "test", str(seed), view, self.seed, variant, "", metric, float(value))
            records.append(record)

        def each(variant: str, metric: str, values: Tensor) -> None:
            for angle, value in zip(_VIEWS_DEG, values, strict=True):
                add(variant, metric if abs(angle) <= _NEAR_DEG else f"{metric}_60", f"yaw{angle:+d}", value)

        for variant, latents in codes.items():
            found = generator.synthesis(latents, views)
            each(variant, "psnr", psnr(found.image, image))
            each(variant, "ssim", ssim(found.image, image))
            if found.depth is not None and found.normals is not None:
                solid = mask > 0.99
                each(variant, "depth_mae", depth_mae(found.depth, truth.depth.to(device), solid))
                each(variant, "normal_deg", normal_error(found.normals, truth.normals.to(device), solid))
            here = generator.synthesis(latents, source).image
            add(variant, "psnr_source", "source", psnr(here, given.image.to(device))[0])
            for k, name in enumerate(generator.expressions):
                code = torch.zeros(1, len(generator.expressions), device=device)
                code[0, k] = 1
                moved = render(scene.with_expression(code.cpu()), source.to("cpu"), size).image.to(device)
                change = generator.synthesis(latents, source, expression=code).image
                correlation = change_correlation(here, change, given.image.to(device), moved)
                add(variant, f"expression_{name}", "source", correlation[0])
        return records

    def on_test_epoch_end(self) -> None:
        records, tested = self._gather(self._records), dict(gather(list(self._tested.items())))
        if not self.trainer.is_global_zero:
            return
        subjects = [tested[place] for place in sorted(tested)]
        pictures, labels = (torch.cat([subject[name] for subject in subjects]) for name in ("image", "label"))
        if self.kid_features is not None:
            records += self._kernel_distances(self.kid_features.to(self.device), pictures, labels)
        if self.neighbours:
            records += self._nearest_training_pictures(pictures, labels)
        write_records(self.out / "metrics.csv", records)
        names = sorted({(record.variant, record.metric) for record in records})
        for variant, metric in names:
            values = [r.value for r in records if (r.variant, r.metric) == (variant, metric) and math.isfinite(r.value)]
            if values:
                self.log(f"test/{variant}/{metric}", sum(values) / len(values), rank_zero_only=True)

    @staticmethod
    def _gather(records: list[Record]) -> list[Record]:
        """The records of all ranks, each subject once."""
        unique = {(r.item, r.variant, r.metric, r.view): r for r in gather(records)}
        return [unique[key] for key in sorted(unique)]

    def _kernel_distances(self, features: Distribution, pictures: Tensor, labels: Tensor) -> list[Record]:
        """KID of samples against one half of the held-out pictures, beside that of the two halves."""
        half = len(pictures) // 2
        records = []
        sides = {"samples": self._samples(labels[:half]), "real halves": pictures[half : 2 * half]}
        for variant, others in sides.items():
            metric = kid(features, subset_size=max(2, min(100, half // 2)), gather=False).to(self.device)
            for part, real in ((others, False), (pictures[:half], True)):
                for chunk in part.split(32):
                    metric.update(((chunk + 1) / 2).to(self.device), real=real)
            torch.manual_seed(self.seed)  # of the metric's subsets
            mean, _ = metric.compute()
            network = type(features).__name__
            records.append(Record("prior", "1", "test", "all", "", self.seed, variant, network, "kid", float(mean)))
        return records

    def _samples(self, labels: Tensor) -> Tensor:
        """Pictures (N, 3, R, R) of random codes, seen by cameras (N, 25), on the CPU."""
        draws = torch.Generator().manual_seed(self.seed)
        samples = []
        for part in labels.split(16):
            z = self.average.sample_z(len(part), draws).to(self.device)
            camera = Camera.from_label(part.to(self.device))
            samples.append(self.average.synthesis(self.average.mapping(z), camera).image.clamp(-1, 1).cpu())
        return torch.cat(samples)

    def _nearest_training_pictures(self, pictures: Tensor, labels: Tensor) -> list[Record]:
        """How near samples, and as many held-out pictures, come to the training set; the former are shown."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.setup("fit")
        training = data.datasets["train"]
        asked = {"samples": self._samples(labels[: self.neighbours]), "held out": pictures[: self.neighbours]}
        queries = torch.cat(list(asked.values())).flatten(1)
        best = torch.full((len(queries),), math.inf)
        nearest = torch.zeros_like(queries)
        for index in range(len(training)):
            views = training[index]["image"].flatten(1)
            error = torch.cdist(queries, views).square().div_(queries.shape[1])
            value, view = error.min(1)
            closer = value < best
            best[closer], nearest[closer] = value[closer], views[view[closer]]
        # Rows of samples, each above the row of their neighbours.
        rows = (
            torch.stack([queries, nearest])[:, : self.neighbours].unflatten(2, asked["samples"].shape[1:]).split(12, 1)
        )
        picture = make_grid(torch.cat([pair.flatten(0, 1) for pair in rows]), nrow=rows[0].shape[1], pad_value=1.0)
        write_image(self.out / "neighbours.png", picture)
        psnrs = (-10 * (best / 4).log10()).split(self.neighbours)
        return [
            Record(
                "prior", "1", "test", str(item), "", self.seed, variant, "", "psnr_to_nearest_training", float(value)
            )
            for variant, values in zip(asked, psnrs, strict=True)
            for item, value in enumerate(values)
        ]
