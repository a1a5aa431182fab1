"""What the adversarial stages share: generator and discriminator steps, their regularisers, an averaged generator.

A subclass of :class:`AdversarialStage` hands its networks to :meth:`AdversarialStage.adopt`; it draws its pictures in
:meth:`AdversarialStage.sample_fakes` and adds terms in :meth:`AdversarialStage.generator_terms` where the plain GAN is
not what it wants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.poses import check_dataset
from models.artifact import Export
from models.batches import PortraitBatch
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.ema import EMA
from models.errors import UserError
from models.generators.base import Discriminator, DiscriminatorOutput, Generator, ParameterGroup
from models.latents import Latents
from models.losses.gan import (
    differentiable_twice,
    discriminator_nonsaturating,
    generator_nonsaturating,
    path_length_penalty,
    r1_penalty,
)
from models.rendering.output import Rendering
from stages.base.ranks import average_gradients
from stages.base.seeds import item_generator, step_generator
from stages.base.stage import Stage


@dataclass(frozen=True)
class AdversarialLoss:
    """The adversarial terms. All counts are of REAL images seen, but for ``_every``, which counts steps.

    Attributes:
        weight: of the generator's adversarial terms.
        start: real images after which they set in.
        r1_weight: gamma / 2 of R1 (Mescheder et al. 2018).
        r1_every: steps between R1 steps (lazy regularisation).
        pose_weight: of pose regularisation: the discriminator regresses the cameras of real and fake images (GRAM).
        path_length_weight: of path length regularisation (StyleGAN2, Eq. 4); 0 leaves it out. It differentiates the
            synthesis twice, which torch cannot do with lookups in planes and textures.
        path_length_every: steps between its steps.
        fresh: let the discriminator judge other generated pictures than the generator is taught by, as GRAM's loop.
    """

    weight: float = 1.0
    start: int = 0
    r1_weight: float = 5.0
    r1_every: int = 16
    pose_weight: float = 1.0
    path_length_weight: float = 0.0
    path_length_every: int = 4
    fresh: bool = False

    def __post_init__(self) -> None:
        weights = ("weight", "r1_weight", "pose_weight", "path_length_weight")
        check_not_negative(self, *weights, "start", where="adversarial.")
        check_positive(self, "r1_every", "path_length_every", where="adversarial.")


@dataclass(frozen=True)
class Optimization:
    """Adam for both networks, and what becomes of the generator's learning rate and weights.

    Attributes:
        learning_rate: of the generator, after ``warmup_images``.
        lr_scales: by name of a group of parameters (``Generator.parameter_groups``), its rate relative to
            ``learning_rate``; the others have the generator's own.
        discriminator_lr: constant.
        betas: of the generator's Adam.
        schedule: "cosine" lets the learning rate fall to 1 % of itself.
        hold: share of the run before it begins to fall.
        warmup_images: over which it rises.
        clip: largest gradient norm of the generator. discriminator_clip: of the discriminator; null does not clip.
        ema_images: half-life of the averaged generator.
    """

    learning_rate: float = 2.5e-3
    lr_scales: dict[str, float] = field(default_factory=dict)
    discriminator_lr: float = 2e-3
    betas: tuple[float, float] = (0.0, 0.99)
    schedule: Literal["cosine", "constant"] = "constant"
    hold: float = 0.0
    warmup_images: int = 500
    clip: float = 1.0
    discriminator_clip: float | None = None
    ema_images: float = 1500.0

    def __post_init__(self) -> None:
        rates = "learning_rate", "discriminator_lr", "warmup_images", "clip", "discriminator_clip"
        check_positive(self, *rates, where="optimization.")
        check_not_negative(self, "ema_images", where="optimization.")
        if not 0 <= self.hold < 1:
            raise UserError(f"optimization.hold is {self.hold}: it must be at least 0 and less than 1")
        check_positive(SimpleNamespace(**self.lr_scales), *self.lr_scales, where="optimization.lr_scales.")


@dataclass(frozen=True)
class Fakes:
    """Generated pictures and what they were made of.

    Attributes:
        rendering: V pictures of each of B subjects in a row.
        latents: B codes.
        camera: of each picture; None from a 2D generator.
        noise: state of the generator that all draws within the synthesis came from; None: there were none.
        z: of the codes, where they were mapped from any. expression: of each picture, of an animatable generator.
    """

    rendering: Rendering
    latents: Latents
    camera: Camera | None
    noise: Tensor | None = None
    z: Tensor | None = None
    expression: Tensor | None = None

    def randomness(self) -> torch.Generator | None:
        """For another synthesis with the same draws."""
        return None if self.noise is None else torch.Generator().set_state(self.noise)


class AdversarialStage(Stage):
    """GAN training with manual optimisation, of 2D generators and of 3D ones, whose fakes take the real cameras.

    Args:
        total_images: real images of the whole run.
        adversarial, optimization: see there.
        channels_last: memory format; faster on CPUs.
        seed: of all draws.

    Attributes:
        average: of what is trained, for validation and export.
        images_seen, steps_done: of all runs that continue one another, real images of all ranks.
        path_length: its running mean.
        fake_taps: names of block outputs that :meth:`sample_fakes` returns, for terms that need them.
    """

    wrapped = False  # two networks, and backward passes that each leave some of their parameters out
    images_seen: Tensor
    steps_done: Tensor
    path_length: Tensor
    fake_taps: Sequence[str] = ()

    def __init__(
        self,
        total_images: int,
        adversarial: AdversarialLoss,
        optimization: Optimization,
        channels_last: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.total_images, self.adversarial, self.optimization = total_images, adversarial, optimization
        check_positive(self, "total_images")
        self.channels_last, self.seed = channels_last, seed
        self._step = 0  # steps_done on the host
        self._panel: Tensor | None = None
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self.register_buffer("path_length", torch.zeros(()), persistent=adversarial.path_length_weight > 0)

    # -- for subclasses ------------------------------------------------------------------------------------------

    def adopt(self, generator: Generator, discriminator: Discriminator | None = None) -> None:
        """Take the networks, from ``__init__`` or ``build_model``; what requires no gradient stays as it is."""
        self.generator, self.discriminator = generator, discriminator
        self.average: EMA[Any] = EMA(self.trained, self.optimization.ema_images)
        if self.channels_last:
            for network in self.children():
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def trained(self) -> nn.Module:
        """What the generator's optimiser moves."""
        return self.generator

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """Of what is trained, by name."""
        return self.generator.parameter_groups()

    def prepare(self, batch: PortraitBatch, draws: torch.Generator) -> PortraitBatch:
        """What a step uses of a batch."""
        return batch

    def sample_fakes(self, batch: PortraitBatch, draws: torch.Generator) -> Fakes:
        """Pictures of random subjects, one a real picture, from its camera and with its expression."""
        real, camera, expression = batch["image"].flatten(0, 1), self.camera(batch), self.expression(batch)
        rows = self.global_rows(len(real), batch["image"].shape[1])
        z = self.generator.sample_z(len(real) * self.world_size, draws)[rows].to(self.device)
        if self.global_rank > 0:  # what a generator draws inside, noise and jitter, it draws for its rank's rows
            draws = torch.Generator().manual_seed(draws.initial_seed() + self.global_rank)
        latents, noise = self.generator.mapping(z), draws.get_state()
        rendering = self.generator.synthesis(
            latents, camera, expression=expression, randomness=draws, taps=self.fake_taps
        )
        return Fakes(rendering, latents, camera, noise, z, expression)

    def generator_terms(self, batch: PortraitBatch, fakes: Fakes) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The generator's loss but for the adversarial terms, None for none, and scalars to log."""
        return None, {}

    def adversarial_terms(
        self, output: DiscriminatorOutput, fakes: Fakes, batch: PortraitBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss from what the discriminator says of its pictures, and scalars to log."""
        losses = {
            "adversarial": generator_nonsaturating(output.logits),
            "fake_pose": self._pose_error(output, fakes.camera),
        }
        return losses["adversarial"] + self.adversarial.pose_weight * losses["fake_pose"], losses

    def discriminator_terms(
        self, real: DiscriminatorOutput, fake: DiscriminatorOutput, fakes: Fakes, batch: PortraitBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss but for R1, from what it says of real and generated pictures, and scalars to log."""
        losses = {
            "discriminator": discriminator_nonsaturating(real.logits, fake.logits),
            "real_pose": self._pose_error(real, self._cameras(batch)),
        }
        poses = losses["real_pose"] + self._pose_error(fake, fakes.camera)
        return losses["discriminator"] + self.adversarial.pose_weight * poses, losses

    def judge(self, image: Tensor, camera: Camera | None, purpose: str) -> DiscriminatorOutput:
        """What the discriminator says of pictures, with cameras if it asks; ``purpose`` names the draws of augment."""
        network = self.discriminator
        assert network is not None
        if network.camera_conditioned and camera is None:
            raise UserError("the discriminator judges pictures with their cameras, and these have none")
        return network(self.augment(image, self.draws(purpose)), camera if network.camera_conditioned else None)

    def augment(self, image: Tensor, draws: torch.Generator) -> Tensor:
        """What the discriminator sees of pictures (B, 3, H, W), real and generated ones alike; differentiable twice."""
        return image

    def draws(self, purpose: str) -> torch.Generator:
        """For draws of this step, by each rank for its own pictures; the same at each call."""
        return item_generator(self.seed, f"{purpose}/{self.global_rank}", self._step)

    def on_fit_start(self) -> None:
        """Refuse cameras that the generator cannot have, before anything is computed."""
        if self.generator.is_3d:
            check_dataset(self.trainer.datamodule, self.generator.rig, "train")  # type: ignore[attr-defined]

    def camera(self, batch: PortraitBatch) -> Camera | None:
        """The cameras that the generator sees its subjects by; None in 2D.

        Raises:
            UserError: when there are none for a 3D generator.
        """
        if not self.generator.is_3d:
            return None
        if (camera := self._cameras(batch)) is None:
            raise UserError("these pictures have no cameras, which a 3D generator needs: give their labels")
        return camera

    def expression(self, batch: PortraitBatch) -> Tensor | None:
        """The expressions of the pictures (N, E), where they are known and the generator is animatable."""
        if not self.generator.expressions or "expression" not in batch:
            return None
        return batch["expression"].flatten(0, 1)

    @property
    def judged(self) -> bool:
        """Whether the adversarial terms have set in."""
        return self.discriminator is not None and int(self.images_seen) >= self.adversarial.start

    # -- Lightning -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        options, groups = self.optimization, self.parameter_groups()
        if unknown := sorted(options.lr_scales.keys() - groups.keys()):
            raise UserError(
                f"optimization.lr_scales: there is no group {unknown[0]!r}, there are {', '.join(groups)}; "
                "set --model.optimization.lr_scales"
            )
        scales = {
            id(p): options.lr_scales.get(name, group.lr_scale)
            for name, group in groups.items()
            for p in group.parameters
        }
        members: dict[float, list[nn.Parameter]] = {1.0: []}
        for parameter in self.trained.parameters():
            # What no group names is not trained: gradients that no step uses would pile up in the norm that is clipped.
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in scales)
            if parameter.requires_grad:
                members.setdefault(scales[id(parameter)], []).append(parameter)
        parameters = [{"params": found, "scale": scale} for scale, found in members.items() if found]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(parameters, lr=options.learning_rate, betas=options.betas)
        ]
        if self.discriminator is not None:
            every = self.adversarial.r1_every
            # Lazy regularisation: R1 every k steps shortens Adam's memory accordingly (StyleGAN2, App. B).
            ratio = every / (every + 1) if every > 1 else 1.0
            learning = [p for p in self.discriminator.parameters() if p.requires_grad]
            optimizers.append(torch.optim.Adam(learning, lr=options.discriminator_lr * ratio, betas=(0.0, 0.99**ratio)))
        return optimizers

    def on_train_start(self) -> None:
        super().on_train_start()
        # Resumed from the last step of all, there is nothing left but to export.
        self.trainer.should_stop = int(self.images_seen) >= self.total_images

    def training_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        self._step = int(self.steps_done)
        draws = step_generator(self.seed, self._step)
        batch = self.prepare(batch, draws)
        optimizers = self.optimizers()
        optimizer, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        for group in optimizer.param_groups:
            group["lr"] = self.optimization.learning_rate * group["scale"] * self._schedule()
        judged = self.judged

        fakes = self.sample_fakes(batch, draws)
        loss, losses = self.generator_terms(batch, fakes)
        if judged:
            self._learns(others[0], False)
            weights = self.adversarial
            output = self.judge(fakes.rendering.image, fakes.camera, "generated")
            term, found = self.adversarial_terms(output, fakes, batch)
            losses |= found
            loss = weights.weight * term if loss is None else loss + weights.weight * term
            if weights.path_length_weight and self._step % weights.path_length_every == 0:
                losses["path_length"] = self._path_length(fakes)
                loss = loss + weights.path_length_weight * weights.path_length_every * losses["path_length"]
        if loss is None:
            raise UserError(
                "nothing tells the generator what to do: pictures alone train a plain GAN, which needs a "
                "--model.discriminator, and --model.adversarial.start 0"
            )
        optimizer.zero_grad()
        self.manual_backward(loss)
        average_gradients(self.trained)
        optimizer.step()
        losses["gradient_norm"] = self._gradient_norm
        if judged:
            self._learns(others[0], True)
            losses |= self._discriminator_step(others[0], batch, fakes)

        images = self.images_in(batch) * self.trainer.world_size
        self.images_seen += images
        self.steps_done += 1
        self.average.update(self.trained, images, int(self.images_seen))
        self.log_dict({f"{self.name}/{name}": value.detach() for name, value in losses.items()})
        self.log("images", self.images_seen.float(), prog_bar=True)
        self.log(f"{self.name}/lr", optimizer.param_groups[0]["lr"])
        if int(self.images_seen) >= self.total_images:
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here, and not after backward: under 16-mixed gradients are scaled until now.
        if optimizer is self.trainer.optimizers[0]:
            norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.optimization.clip)
            # The scaler leaves a step out whose gradients overflow, and scales less from then on: nothing is wrong.
            skipped = getattr(self.trainer.precision_plugin, "scaler", None) is not None and not norm.isfinite()
            self._gradient_norm = torch.zeros_like(norm) if skipped else norm
        elif self.optimization.discriminator_clip is not None and self.discriminator is not None:
            torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.optimization.discriminator_clip)

    def on_train_end(self) -> None:
        for network in (self.trained, self.average.module):
            if isinstance(network, Generator):
                network.update_mean()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        if not any(name.startswith("average.module.") for name in state):  # of before the average was an EMA
            for name in [name for name in state if name.startswith("average.")]:
                state[f"average.module.{name.removeprefix('average.')}"] = state.pop(name)

    def export(self) -> Export:
        modules: dict[str, nn.Module] = {"generator": self.average.module.eval()}
        if self.discriminator is not None and int(self.images_seen) > self.adversarial.start:
            modules["discriminator"] = self.discriminator.eval()
        return Export(modules, dtype=dict.fromkeys(modules, "float16"))

    # -- steps ---------------------------------------------------------------------------------------------------

    def _discriminator_step(self, optimizer: Any, batch: PortraitBatch, fakes: Fakes) -> dict[str, Tensor]:
        real, weights = batch["image"].flatten(0, 1), self.adversarial
        camera = self._cameras(batch)
        output = self.judge(real, camera, "real")
        if weights.fresh:
            with torch.no_grad():
                fakes = self.sample_fakes(batch, item_generator(self.seed, "fresh", self._step))
        fake = self.judge(fakes.rendering.image.detach(), fakes.camera, "doubted")
        loss, losses = self.discriminator_terms(output, fake, fakes, batch)
        if self._step % weights.r1_every == 0:
            penalty, _ = r1_penalty(lambda image: self.judge(image, camera, "real").logits, real)
            losses["r1"] = penalty.mean()
            loss = loss + weights.r1_weight * weights.r1_every * losses["r1"]
        optimizer.zero_grad()
        self.manual_backward(loss)
        assert self.discriminator is not None
        average_gradients(self.discriminator)
        optimizer.step()
        return losses

    @staticmethod
    def _cameras(batch: PortraitBatch) -> Camera | None:
        """The cameras of the pictures, where they are known: also of those that a 2D generator learns from."""
        return Camera.from_label(batch["label"].flatten(0, 1)) if "label" in batch else None

    def _path_length(self, fakes: Fakes) -> Tensor:
        """Of half of the codes, as in the paper, with noise of their own."""
        count, views = max(1, len(fakes.latents) // 2), len(fakes.rendering.image) // len(fakes.latents)
        camera, draws = None if fakes.camera is None else fakes.camera[::views][:count], self.draws("path length")
        ws = fakes.latents[:count].map(lambda t: (t if t.requires_grad else t.detach()).float().requires_grad_())
        with torch.autocast(self.device.type, enabled=False), differentiable_twice():
            image = self.generator.synthesis(ws, camera, randomness=draws).image
            noise = torch.randn(image.shape, generator=draws).to(image)
            penalty, mean = path_length_penalty(image, ws, self.path_length, noise)
        self.path_length.copy_(self.trainer.strategy.reduce(mean, reduce_op="mean"))
        return penalty.mean()

    @staticmethod
    def _pose_error(output: DiscriminatorOutput, camera: Camera | None) -> Tensor:
        if output.pose is None or camera is None:
            return output.logits.new_zeros(())
        return F.mse_loss(output.pose.float(), torch.stack([camera.yaw, camera.pitch], -1))

    @staticmethod
    def _learns(optimizer: Any, on: bool) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(on)

    def _schedule(self) -> float:
        seen, options = float(self.images_seen), self.optimization
        falls = options.schedule == "cosine"
        progress = min(max(seen / self.total_images - options.hold, 0.0) / (1 - options.hold), 1.0) if falls else 0.0
        return min(1.0, (seen + 1) / options.warmup_images) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))

    # -- pictures ------------------------------------------------------------------------------------------------

    def samples(self, count: int, camera: Camera | None, draws: torch.Generator) -> Tensor:
        """Pictures (count, 3, R, R) of random subjects by the averaged generator, which draws nothing itself."""
        generator = self.average.module
        return generator.synthesis(generator.mapping(generator.sample_z(count, draws).to(self.device)), camera).image

    @torch.no_grad()
    def validation_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        if batch_idx == 0:
            real = batch["image"].flatten(0, 1)
            self.show(real, self.samples(len(real), self.camera(batch), torch.Generator().manual_seed(self.seed)))

    def show(self, real: Tensor, fake: Tensor) -> None:
        """Keep pictures (N, 3, H, W), and what stands beside them, for the panel."""
        self._panel = torch.stack([real, fake], 1).flatten(0, 1)[:32].clamp(-1, 1)

    def panels(self) -> dict[str, Tensor]:
        """Real and generated pictures from the same cameras, side by side."""
        pairs = self._panel
        if pairs is None:
            return {}
        rows = -(-len(pairs) // 8)
        pairs = F.pad(pairs, (1, 1, 1, 1), value=1.0)
        tiles = pairs.new_ones(rows * 8, *pairs.shape[1:])
        tiles[: len(pairs)] = pairs
        height, width = tiles.shape[-2:]
        picture = tiles.reshape(rows, 8, 3, height, width).permute(2, 0, 3, 1, 4).reshape(3, rows * height, 8 * width)
        return {"pairs": picture}
