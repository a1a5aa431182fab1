"""Inverts each picture by an optimisation of its own, without an encoder: what one pass is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from models.artifact import Export
from models.batches import PortraitBatch, some_views
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.generators.base import Generator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.index import Entry, subject_index
from models.heads.pivotal import PivotalTuning
from models.heads.projector import Projector, Search
from models.heads.tuning import TunedWeights, with_weights
from models.image import resized, write_image
from models.latents import Latents
from models.losses.image import pixel_mse
from models.metrics.e3dge import E3DGEProtocol, exactly
from models.metrics.inversion import InversionProtocol
from models.names import item_id
from models.rendering.output import Rendering
from stages.base.inversion import InversionStage, Renderer, items_of
from stages.base.ranks import collect
from stages.base.seeds import item_generator
from stages.base.stage import GeneratorRef


@dataclass(frozen=True)
class CodeSearch(Search):
    """How a picture's code is looked for. The defaults are E3DGE's of SG2 (supplement C).

    Of StyleGAN2's projector (Karras et al. 2020, Appendix D) there are neither the ramps of the learning rate nor the
    noise on w.

    Attributes:
        steps: of Adam.
        perceptual, pixel: weights of LPIPS and the mean squared error; the projector has the first only.
    """

    space: Literal["z", "z+", "w", "w+"] = "w"
    start: Literal["random", "mean"] = "mean"
    learning_rate: float = 5e-3
    steps: int = 450
    perceptual: float = 1.0
    pixel: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps", where="search.")
        check_not_negative(self, "perceptual", "pixel", where="search.")
        if not self.perceptual and not self.pixel:
            raise UserError("search: neither perceptual nor pixel has a weight")
        for what in ("optimize_noise", "optimize_pose"):
            if getattr(self, what):
                raise UserError(f"search.{what}: a head is a code here, seen by the camera that its picture has")


@dataclass(frozen=True)
class Head:
    """What was found of one picture.

    Attributes:
        ws: its code, a batch of one. expression: (1, E), or None where it was not optimised.
        weights: of the generator that shows it; None for the shared one's own.
    """

    ws: Latents
    expression: Tensor | None
    weights: TunedWeights | None


class OptimiseStage(InversionStage):
    """Finds the code of each picture by optimisation, at its own view (SG2), and then fits the weights of a copy of the
    generator to it (PTI): the baselines of E3DGE (Lan et al. 2023, supplement C).

    Nothing is trained: there are ``test``, by the protocols of the stages that train encoders, and ``predict``, which
    hands heads on as the stage ``anchor`` does, and tuned ones as ``stylize``.

    Args:
        prior: artifact and module of the generator.
        perceptual: LPIPS of both losses, and of the scores of a 2D generator.
        identity: for those scores; null leaves it out.
        search: how codes are looked for.
        tuning: how the generator is tuned to each picture afterwards; null leaves it as it is.
        protocol, variant, seed: as of :class:`InversionStage`. Draws are each picture's own, by its name.
    """

    name = "optimise"
    monitor = None
    # What a stage does not write itself is no command of it.
    training_step = pl.LightningModule.training_step  # type: ignore[assignment]
    validation_step = pl.LightningModule.validation_step  # type: ignore[assignment]

    def __init__(
        self,
        prior: GeneratorRef,
        perceptual: nn.Module,
        identity: nn.Module | None = None,
        search: CodeSearch = CodeSearch(),
        tuning: PivotalTuning | None = None,
        protocol: InversionProtocol | E3DGEProtocol | None = None,
        variant: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(perceptual, identity, protocol, variant=variant, seed=seed)
        self.prior, self.search, self.tuning = prior, search, tuning
        self._tuned: dict[str, dict[str, Tensor]] = {}  # weights of predict, by id

    def build_model(self) -> None:
        self.build_networks()
        self.train()

    def build_networks(self) -> None:
        generator = self.take("prior", self.prior.path, self.prior.module, Generator)
        self.generator = generator.requires_grad_(False)
        self.search.check(generator)
        self._moving = [] if self.tuning is None else self.tuning.names(generator)

    # -- one picture ------------------------------------------------------------------------------

    def distance(self, weights: CodeSearch | PivotalTuning, wanted: Tensor, image: Tensor) -> dict[str, Tensor]:
        """The loss (N,) of pictures (N, 3, R, R) that are to be a wanted one (1, 3, R, R)."""
        wanted = wanted.expand_as(image)
        return {"loss": weights.perceptual * self.perceptual(image, wanted) + weights.pixel * pixel_mse(image, wanted)}

    def optimise(self, item: str, image: Tensor, camera: Camera | None) -> Head:
        """The head of one picture (1, 3, H, W); in full precision: there is no scaler for gradients of half."""
        generator, wanted = self.generator, resized(image, self.generator.resolution).float()
        label = wanted.new_zeros(0) if camera is None else camera.label()[0]
        with exactly(image):
            projector = Projector(
                generator,
                self.search,
                lambda found, _: self.distance(self.search, wanted, found),
                [label],
                self.search.steps,
            )
            projector.draw([item_generator(self.seed, item, -1)])
            projector.fit()
            (found,) = projector
            ws = projector.latents(found).detach()
            expression = projector.expression(found).detach() if found.expression.numel() else None
            weights = None
            if self.tuning is not None:
                loss = partial(self.distance, self.tuning, wanted)
                weights = self.tuning.fit(generator, self._moving, ws, camera, loss, expression)
        return Head(ws, expression, weights)

    def show(self, head: Head) -> Renderer:
        """A head, seen by any cameras."""
        shown = self.generator if head.weights is None else head.weights
        return partial(shown.synthesis, head.ws, expression=head.expression)

    def reconstruct_item(self, item: str, image: Tensor, camera: Camera | None) -> Renderer:
        return self.show(self.optimise(item, image, camera))

    def reconstruct(self, image: Tensor, camera: Camera | None) -> Renderer:
        """As of the base; draws are by the place of a picture."""
        heads = [
            self.reconstruct_item(str(row), image[row : row + 1], None if camera is None else camera[row])
            for row in range(len(image))
        ]
        return partial(_together, heads)

    # -- predict ----------------------------------------------------------------------------------

    def modules_out(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    @torch.no_grad()
    def predict_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        image, camera = self.pictures(some_views(batch, slice(1)))
        for row, item in enumerate(items_of(batch)):
            own = None if camera is None else camera[row]
            head, name = self.optimise(item, image[row : row + 1], own), item_id(item)
            expression = torch.zeros(1, len(self.generator.expressions)) if head.expression is None else head.expression
            label = None if own is None else own.label().cpu()
            self._heads[name] = HeadCode(head.ws.to("cpu").map(Tensor.float), None, expression.cpu().float(), label)
            if head.weights is not None:
                self._tuned[name] = {key: tensor.cpu() for key, tensor in head.weights.tensors().items()}
            write_image(self.out / "pictures" / f"reference_{name}.png", image[row].cpu())

    def on_predict_epoch_end(self) -> None:
        super().on_predict_epoch_end()
        self._tuned = dict(collect(list(self._tuned.items())))

    def export_heads(self) -> Export:
        about: dict[str, Any] = {"search": asdict(self.search), "seed": self.seed}
        if self.tuning is None:
            plain = super().export_heads()
            return replace(plain, extra={**plain.extra, **about})
        modules: dict[str, nn.Module] = {"generator": self.generator}
        modules["anchors"] = HeadCodes.pack(self._heads, self.generator)
        entries, media = [], {}
        for identity in sorted(self._heads):
            own, picture = f"tuned.{identity}", f"reference_{identity}.png"
            modules[own] = with_weights(self.generator, self._tuned[identity])
            media[picture] = self.out / "pictures" / picture
            entries.append(Entry(identity, "anchors", own, "generator", artwork=picture, caption="tuned"))
        deltas = {entry.generator: "generator" for entry in entries}
        return Export(
            modules,
            media=media,
            extra=about | {"tuning": asdict(self.tuning)} | subject_index(entries),
            dtype=dict.fromkeys(deltas, "float16"),
            delta_of=deltas | self.unchanged({"generator": self.generator}),
        )


def _together(heads: Sequence[Renderer], camera: Camera | None) -> Rendering:
    """Several heads, seen by as many cameras each, in a row."""
    if camera is None:
        return Rendering.cat([head(None) for head in heads])
    views = len(camera) // len(heads)
    return Rendering.cat([head(camera[row * views : (row + 1) * views]) for row, head in enumerate(heads)])
