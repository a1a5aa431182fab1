"""What the inversion stages share: an encoder tells codes from a picture, a generator shows them from anywhere.

A subclass of :class:`InversionStage` builds ``generator`` and ``encoder`` in :meth:`InversionStage.build_networks` and
writes :meth:`InversionStage.losses`; one that shows heads in another way overrides :meth:`InversionStage.reconstruct`.
Trained is what requires a gradient.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from datamodules.poses import check_dataset
from datamodules.truth import KnowsScan, KnowsViewTruth
from models.artifact import Export
from models.batches import PortraitBatch, some_views, subject
from models.camera import Camera, Rig
from models.checks import check_not_negative, check_positive
from models.encoders.base import Encoder, inverted
from models.errors import UserError, one_line
from models.features.base import Frozen, network_name
from models.features.identity import ArcFaceIdentity
from models.generators.base import Generator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.index import Entry, subject_index
from models.image import resized, write_image
from models.latents import Latents
from models.losses.inversion import ReconstructionLoss
from models.metrics.e3dge import PROTOCOL as E3DGE
from models.metrics.e3dge import VERSION as E3DGE_VERSION
from models.metrics.e3dge import E3DGEProtocol, scan_records
from models.metrics.editing import PROTOCOL as EDITING
from models.metrics.editing import EditProtocol
from models.metrics.image import identity_similarity, psnr, ssim
from models.metrics.inversion import PROTOCOL, VERSION, InversionProtocol, InversionScores
from models.metrics.records import Record, write_records
from models.names import item_id
from models.rendering.output import Rendering
from stages.base.edits import Editable, EditTest
from stages.base.ranks import collect, means
from stages.base.records import Records, averages
from stages.base.seeds import step_generator
from stages.base.stage import ArtifactRef, Stage

Renderer = Callable[[Camera | None], Rendering]
"""B heads, seen by B * V cameras, V in a row of each head; by None in a 2D generator."""

SECONDS = "seconds.csv"  # beside the scores, as tidy as these: how long each inversion took
_SHOWN = 6  # heads on a panel


@dataclass(frozen=True)
class RateSchedule:
    """Adam and its learning rate. The defaults are GRAMInverter's for its encoder (A.4).

    Attributes:
        learning_rate: of the first step.
        final: learning rate from step ``drop_at`` on.
        drop_at: optimiser step; null lets the rate fall to ``final`` by a cosine over the whole run.
        betas: of Adam.
    """

    learning_rate: float = 3e-4
    final: float = 6e-5
    drop_at: int | None = 100_000
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "drop_at", where="schedule.")
        check_not_negative(self, "final", where="schedule.")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step of a run of so many steps."""
        if self.drop_at is not None:
            return self.learning_rate if step < self.drop_at else self.final
        share = min(step / max(steps, 1), 1.0)
        return self.final + (self.learning_rate - self.final) * 0.5 * (1 + math.cos(math.pi * share))


class InversionStage(Stage):
    """Base of the stages that train what turns a picture into a head.

    A batch holds ``image`` (B, V, 3, H, W) and, for a 3D generator, ``label`` (B, V, 25): each picture is a head of its
    own. ``test`` measures each subject's first picture by a shared protocol (:mod:`models.metrics.inversion`,
    :mod:`models.metrics.e3dge`); where the data module knows the truth (:mod:`datamodules.truth`), also against that.
    ``predict`` hands on heads as the stage ``anchor`` does.

    Args:
        perceptual: the perceptual distance of L_r.
        identity: the identity embedding of L_r; null leaves its term out.
        protocol: what ``test`` measures, and with which networks.
        directions: artifact of the stage ``directions``, along which an EditProtocol edits heads.
        reconstruction: weights of L_r.
        schedule: of the optimiser.
        tested: artifact of this stage that validate, test and predict take the networks from; by default a checkpoint.
        variant: name in the scores; the stage's by default.
        seed: of all draws.
    """

    monitor = ("val/psnr", "max")
    wrapped = False  # progressive training leaves some parameters without a gradient
    generator: Generator
    encoder: Encoder

    def __init__(
        self,
        perceptual: nn.Module,
        identity: nn.Module | None = None,
        protocol: InversionProtocol | E3DGEProtocol | EditProtocol | None = None,
        reconstruction: ReconstructionLoss = ReconstructionLoss(),  # noqa: B008 - frozen
        schedule: RateSchedule = RateSchedule(),
        tested: ArtifactRef | None = None,
        variant: str | None = None,
        directions: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.perceptual = Frozen(perceptual)
        self.identity = None if identity is None else Frozen(identity)
        self.protocol, self.directions_from = protocol, directions
        self.reconstruction, self.schedule, self.tested = reconstruction, schedule, tested
        self.variant, self.seed = variant or self.name, seed
        self._scored: list[dict[str, Tensor]] = []  # of the running validation
        self._heads: dict[str, HeadCode] = {}  # of predict, by id
        self._shown: PortraitBatch | None = None

    # -- for subclasses ---------------------------------------------------------------------------

    @abstractmethod
    def build_networks(self) -> None:
        """Set ``generator`` and ``encoder`` for training."""

    @abstractmethod
    def losses(self, image: Tensor, camera: Camera | None, batch: PortraitBatch) -> dict[str, Tensor]:
        """Terms (B,) of pictures (B, 3, H, W); the mean of ``"loss"`` is minimised, all are logged."""

    def reconstruct(self, image: Tensor, camera: Camera | None) -> Renderer:
        """The heads that pictures (B, 3, H, W) show, seen by B cameras (None in 2D)."""
        ws, expression = self.invert(image)
        return partial(self.generator.synthesis, ws, expression=expression)

    def reconstruct_item(self, item: str, image: Tensor, camera: Camera | None) -> Renderer:
        """As :meth:`reconstruct`, of the one picture that is measured; for methods that draw numbers for each item."""
        return self.reconstruct(image, camera)

    def editable(self, image: Tensor, camera: Camera | None) -> Editable:
        """The heads of :meth:`reconstruct`, to be shown with other codes than the pictures' own."""
        ws, expression = self.invert(image)
        return lambda move: partial(self.generator.synthesis, move(ws), expression=expression)

    @property
    def rig(self) -> Rig:
        """Around what cameras turn in a test, and how far."""
        return self.generator.rig

    def parameter_groups(self, learning: list[nn.Parameter]) -> list[dict[str, Any]]:
        """What learns, for the optimiser: ``lr`` of a group is relative to the schedule's, 1 by default."""
        return [{"params": learning}]

    def modules_out(self) -> dict[str, nn.Module]:
        """What the artifact holds."""
        return {"generator": self.generator, "encoder": self.encoder}

    # -- networks ---------------------------------------------------------------------------------

    def build_model(self) -> None:
        if self.tested is None:
            self.build_networks()
        else:
            self.take_networks("tested", self.tested.path)
            check_fit(self.encoder, self.generator)
        self.train()

    def take_networks(self, role: str, path: str) -> None:
        """Generator and encoder of an artifact, frozen."""
        self.generator = self.take(role, path, "generator", Generator).requires_grad_(False)
        self.encoder = self.take(role, path, "encoder", Encoder).requires_grad_(False)

    def train(self, mode: bool = True) -> InversionStage:
        """Networks that do not learn stay in evaluation mode."""
        super().train(mode)
        for network in self.children():
            if not any(parameter.requires_grad for parameter in network.parameters()):
                network.eval()
        return self

    def invert(self, image: Tensor) -> tuple[Latents, Tensor | None]:
        """Codes of pictures (B, 3, H, W), and expressions (B, E) where the encoder tells them."""
        return inverted(image, self.encoder, self.generator)

    def on_fit_start(self) -> None:
        self.check_data("train", "val")

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self.check_data("val")

    def on_test_start(self) -> None:
        self.check_data("test")

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self.check_data("test")

    def check_data(self, *splits: str) -> None:
        """Refuse cameras that the generator cannot have, before anything is computed.

        Args:
            splits: of the data that are used.

        Raises:
            UserError: naming a picture.
        """
        if self.generator.is_3d:
            check_dataset(self.trainer.datamodule, self.generator.rig, *splits)  # type: ignore[attr-defined]

    def pictures(self, batch: PortraitBatch) -> tuple[Tensor, Camera | None]:
        """A batch's pictures (B * V, 3, H, W) and their cameras, None for a 2D generator.

        Raises:
            UserError: when a 3D generator's pictures have no cameras.
        """
        image = batch["image"].flatten(0, 1)
        if not self.generator.is_3d:
            return image, None
        if "label" not in batch:
            raise UserError("a 3D generator needs the cameras of the pictures: their labels, see --data")
        return image, Camera.from_label(batch["label"].flatten(0, 1))

    def compared(self, found: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """A rendering and a picture, both at the smaller side of the two."""
        side = min(found.shape[-1], image.shape[-1])
        return resized(found, side), resized(image, side)

    def recover(self, found: Tensor, image: Tensor) -> dict[str, Tensor]:
        """The terms of L_r, see :class:`ReconstructionLoss`."""
        return self.reconstruction(*self.compared(found, image), self.perceptual, self.identity)

    # -- training ---------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not learning:
            raise UserError("there is nothing to train: model.tested is for validate, test and predict")
        optimizer = torch.optim.Adam(self.parameter_groups(learning), lr=1.0, betas=self.schedule.betas)
        # Not estimated_stepping_batches: it would make the loaders before a checkpoint can set their place.
        steps = self.trainer.max_steps
        if steps < 1 and self.schedule.drop_at is None:
            raise UserError("a learning rate that falls over the whole run (drop_at null) needs trainer.max_steps")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(self.schedule.rate, steps=steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: PortraitBatch, batch_idx: int) -> Tensor:
        self._shown = self._shown or batch
        terms = self.losses(*self.pictures(batch), batch)
        self.log_dict({f"{self.name}/{name}": value.detach().float().mean() for name, value in terms.items()})
        self.log(f"{self.name}/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return terms["loss"].mean()

    def draws(self) -> torch.Generator:
        """A CPU generator for the draws of this step, for the whole batch; see :meth:`global_rows`."""
        return step_generator(self.seed, self.global_step)

    # -- validation -------------------------------------------------------------------------------

    def validation_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        if batch_idx == 0:
            self._shown = batch
        image, camera = self.pictures(batch)
        self._scored.append(self.scores(self.reconstruct(image, camera)(camera).image, image))

    def on_validation_epoch_end(self) -> None:
        found = {f"val/{name}": value for name, value in means(self._scored).items()}
        for name, value in found.items():
            self.log(name, value, prog_bar=name == "val/psnr")
        self._scored.clear()
        if not self.trainer.sanity_checking:
            self.validated = found

    def scores(self, found: Tensor, image: Tensor) -> dict[str, Tensor]:
        """How well renderings show pictures: psnr, ssim, lpips and, with an identity network, id, (B,) each."""
        found, image = self.compared(found.float().clamp(-1, 1), image)
        values = {"psnr": psnr(found, image), "ssim": ssim(found, image), "lpips": self.perceptual(found, image)}
        return values if self.identity is None else values | {"id": identity_similarity(self.identity, found, image)}

    @torch.no_grad()
    def panels(self) -> dict[str, Tensor]:
        """Picture, reconstruction and the head from other sides, a row each."""
        if self._shown is None:
            return {}
        learning = self.training
        self.eval()
        image, camera = self.pictures(some_views(self._shown, slice(1)))
        image, camera = image[:_SHOWN].to(self.device), camera and camera[:_SHOWN].to(self.device)
        render, side = self.reconstruct(image, camera), self.generator.resolution
        columns = [resized(image, side), render(camera).image]
        if camera is not None:
            orbit = self.generator.rig.orbit(5).to(self.device)
            views = render(Camera.cat([orbit] * len(image))).image
            columns += views.unflatten(0, (len(image), -1)).unbind(1)
        self.train(learning)
        tiles = torch.stack(columns, 1).flatten(0, 1).clamp(-1, 1)
        return {"heads": make_grid(tiles, nrow=len(columns), padding=1, pad_value=1.0)}

    # -- test -------------------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        if self.protocol is None:
            raise UserError("test needs what it measures, model.protocol: see configs/stages/invert_test.yaml")
        self.seconds = Records()
        # Of what has values of the whole set:
        self._scores: InversionScores | None = None
        self._distances: list[tuple[str, Tensor | None]] = []  # of scans, by item
        if isinstance(self.protocol, InversionProtocol):
            features = self.protocol.distribution.module.num_features
            self._scores = InversionScores(self.protocol.networks, features, self.seed).to(self.device)
        if isinstance(self.protocol, EditProtocol):
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self._edits = EditTest(self.protocol, self.directions_from, self.inputs.get("tested"), data, self.device)

    @torch.no_grad()
    def test_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        image, camera = self.pictures(some_views(batch, slice(1)))
        side = self.protocol.side if isinstance(self.protocol, E3DGEProtocol) else None
        image = resized(image, side or self.generator.resolution)
        for row, item in enumerate(items_of(batch)):
            own = image[row : row + 1]
            if camera is None:
                found = self.timed(item, own, None)(None).image
                self.records.add(self.flat_records(item, found, own))
                continue
            pictures = self.measure(item, own, camera[row], subject(batch, row))
            for name, picture in pictures.items():
                write_image(self.out / name / f"{item_id(item)}.png", picture)

    def measure(self, item: str, image: Tensor, camera: Camera, sample: dict[str, Any]) -> dict[str, Tensor]:
        """Keep what the protocol measures of a picture (1, 3, H, W) and its camera; returns the pictures to look at."""
        data, truth = self.trainer.datamodule, None  # type: ignore[attr-defined]
        if isinstance(data, KnowsViewTruth):
            truth = partial(self.true_views, data.view_truth, sample)
        rig = self.rig
        if isinstance(self.protocol, EditProtocol):
            pictures: dict[str, Tensor] = {}
            for name, found in self._edits(self.editable(image, camera), item, image, camera, rig, sample):
                own = {"seed": self.seed, "subject": item}
                self.records.add(found.records(f"{name}-{item}", self.variant, self.protocol.networks, EDITING, **own))
                pictures |= {f"{kind}_{name}": picture for kind, picture in found.pictures.items()}
            return pictures
        invert = partial(self.timed, item)
        if isinstance(self.protocol, E3DGEProtocol):
            scan = data.scan_truth(sample) if isinstance(data, KnowsScan) else None
            scores = self.protocol(item, image, camera, rig, invert, truth, scan=scan)
            self.records.add(scores.records(item, self.variant, self.protocol.networks, seed=self.seed))
            if scores.scanned:
                self._distances.append((item, scores.distances))
            return scores.pictures
        assert self.protocol is not None and self._scores is not None
        place = len(self._scores.names) * self.world_size + self.global_rank  # among the items of all ranks
        surface = place < self.protocol.surfaces
        measured = self.protocol(item, image, camera, rig, invert, truth, surface)
        self._scores.update(item, measured)
        return measured.pictures

    def timed(self, item: str, image: Tensor, camera: Camera | None) -> Renderer:
        """As :meth:`reconstruct_item`, with its wall clock kept apart from the scores, which equal runs have equal.

        What is left to do for each view, such as rendering, does not count.
        """
        begin = self._clock()
        head = self.reconstruct_item(item, image, camera)
        protocol = (E3DGE, E3DGE_VERSION) if isinstance(self.protocol, E3DGEProtocol) else (PROTOCOL, VERSION)
        took = self._clock() - begin
        self.seconds.add([Record(*protocol, "test", item, "", self.seed, self.variant, "", "seconds", took)])
        return head

    def _clock(self) -> float:
        """Seconds, when the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_test_epoch_end(self) -> None:
        """As of the base, and the seconds of all ranks in ``OUT/seconds.csv``."""
        super().on_test_epoch_end()
        found = self.seconds.collect()
        if found and self.trainer.is_global_zero:  # an EditProtocol inverts for several edits, and has none
            write_records(self.out / SECONDS, found)
        for name, value in averages(found).items():
            self.log(f"test/{name}", value, rank_zero_only=True)

    @staticmethod
    def true_views(truth: Callable[[dict[str, Any], Camera], Any], sample: dict[str, Any], camera: Camera) -> Any:
        """What cameras see of a sample's head, on their device."""
        return truth(sample, camera).to(camera.device)

    def flat_records(self, item: str, found: Tensor, image: Tensor) -> list[Record]:
        """The protocol's scores of a 2D generator, which has one view."""
        networks = {"lpips": self.perceptual, "id": self.identity}
        return [
            Record(
                PROTOCOL, VERSION, "test", item, "", self.seed, self.variant,
                "" if (network := networks.get(metric)) is None else network_name(network.module),
                metric, float(value),
            )
            for metric, value in self.scores(found, image).items()
        ]  # fmt: skip

    def summary(self) -> list[Record]:
        if self._scores is None:
            return scan_records(dict(collect(self._distances)), self.variant, seed=self.seed)
        return self._scores.records(self.variant, seed=self.seed)

    # -- predict and export -----------------------------------------------------------------------

    @torch.no_grad()
    def predict_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        image, camera = self.pictures(some_views(batch, slice(1)))
        ws, expression = self.invert(image)
        count = len(self.generator.expressions)
        expression = image.new_zeros(len(image), count) if expression is None else expression
        labels = None if camera is None else camera.label().cpu()
        for row, item in enumerate(items_of(batch)):
            own = slice(row, row + 1)
            codes, moves = ws[own].to("cpu").map(Tensor.float), expression[own].cpu().float()
            head = HeadCode(codes, None, moves, None if labels is None else labels[own])
            write_image(self.out / "pictures" / f"reference_{item_id(item)}.png", image[row].cpu())
            self._heads[item_id(item)] = head

    def on_predict_epoch_end(self) -> None:
        self._heads = dict(collect(list(self._heads.items())))

    def export(self) -> Export:
        if self._heads:
            return self.export_heads()
        modules = self.modules_out()
        dtype = dict.fromkeys(modules, "float16") | {"generator": self._precision}
        return Export(modules, self.validated, dtype=dtype, delta_of=self.unchanged(modules))

    @property
    def _precision(self) -> str | None:
        """That the generator came in."""
        source = next(iter(self.inputs.values()))
        if "generator" not in source.manifest["modules"]:  # taken by another name
            return None
        source, name = source.origin("generator")
        return source.manifest["modules"][name]["dtype"]

    def export_heads(self) -> Export:
        """The heads of predict beside their generator, for the stages that go on from ``anchor``."""
        entries = [Entry(identity, artwork=f"reference_{identity}.png", caption="anchor") for identity in self._heads]
        media = {entry.artwork: self.out / "pictures" / entry.artwork for entry in entries if entry.artwork is not None}
        modules = {"generator": self.generator, "anchors": HeadCodes.pack(self._heads, self.generator)}
        return Export(modules, media=media, extra=subject_index(entries), delta_of=self.unchanged(modules))


def items_of(batch: PortraitBatch) -> list[str]:
    """What the subjects of a batch are called: their files' names, or the seeds of the embedded world."""
    if "name" in batch:
        return list(batch["name"])
    assert "seed" in batch
    return [str(seed) for seed in batch["seed"].tolist()]


def start_trunk(encoder: Encoder, weights: str) -> None:
    """Fill an encoder's IR-SE trunk from a face recognition network, as pSp and e4e start.

    Raises:
        UserError: when the encoder has no such trunk, or one of other sizes.
    """
    state = ArcFaceIdentity(weights).network.trunk.state_dict()
    try:
        encoder.get_submodule("trunk").load_state_dict(state)
    except (AttributeError, RuntimeError) as error:
        raise UserError(
            f"{weights} does not fit the trunk of {type(encoder).__name__}: {one_line(error)[:200]}"
        ) from error


@torch.no_grad()
def check_fit(encoder: Encoder, generator: Generator) -> tuple[str, ...]:
    """Refuse an encoder whose codes or expressions are not the generator's.

    Returns:
        the groups of codes that the encoder tells; others are :meth:`Generator.complete`'s.

    Raises:
        UserError: saying what both have.
    """
    wanted = {name: tuple(t.shape[1:]) for name, t in generator.mean_latents.groups.items()}
    if encoder.space == "z":
        wanted = {"z": (generator.num_ws, generator.z_dim)}
    was = encoder.training
    codes = encoder.eval()(torch.zeros(1, encoder.channels, encoder.resolution, encoder.resolution))
    encoder.train(was)
    found = {name: tuple(t.shape[1:]) for name, t in codes.groups.items()}
    if not (found and found.items() <= wanted.items()):
        raise UserError(f"the encoder gives {_sizes(found)}, the generator takes {_sizes(wanted)}")
    if encoder.expressions not in (0, len(generator.expressions)):
        raise UserError(
            f"the encoder tells {encoder.expressions} expressions, the generator has {len(generator.expressions)}"
        )
    return tuple(found)


def _sizes(groups: dict[str, tuple[int, ...]]) -> str:
    return " and ".join(f"{count} codes of {size} ({name})" for name, (count, size) in groups.items())
