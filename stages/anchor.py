"""Content-analogous anchor: the latent whose rendering is nearest to an artwork (3DArtmator, Sec. 3.2)."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.artworks import Artwork
from datamodules.poses import check_camera, find_camera
from models.anchors import Anchor, AnchorSet
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.features.base import Frozen, move_frozen
from models.files import atomic_write
from models.generators.base import Generator, Latents
from models.image_io import write_image
from models.losses.image import pixel_mse
from stages.base import ArtifactRef, GroupState, PerArtworkStage, item_generator

log = logging.getLogger(__name__)

TERMS = ("loss", "perceptual", "pixel")
_CHUNK = 8  # candidates rendered at once


@dataclass(frozen=True)
class Search:
    """How a latent is looked for. The defaults are the paper's.

    Attributes:
        space: what is optimised: z (Eq. 3), one w for all layers, or w+ with one w a layer.
        start: "random" codes, or the generator's "mean" (w and w+ only; PTI starts there).
        restarts: K codes optimised side by side as one batch; the one with the least loss is kept.
        candidates: random codes rendered first, of which the K best are the starts; 0 takes the first K draws.
        prune: share of the steps after which only the best restart goes on; 1 keeps all to the end.
        refine: share of the steps, at the end, in which an offset per layer (w+) moves as well.
        learning_rate: of the codes (Adam).
        refine_learning_rate: of the offset, in standard deviations of w.
        refine_pull: weight of the offset's mean square, in variances of w.
        schedule: of the learning rates: "constant", or "cosine" from the full rate to a twentieth.
        perceptual, pixel: weights of the two terms of Eq. 2.
        prior: weight of mean(z^2): how firmly z is held to where N(0, I) is dense.
        optimize_expression: fit the expression, where there is one, with the latent; it becomes the zero of later
            edits.
        expression_learning_rate, expression_prior: as for the codes.
        optimize_pose: fit yaw and pitch as well (Sec. 4.5), by central differences: not every generator is
            differentiable in its camera.
        pose_learning_rate: radians. pose_step: half width of the difference, radians.
        patience: an item stops when its mean loss over this many steps is less than ``plateau`` (relative) below
            that over the same number of steps before; 0 never stops early.
    """

    space: Literal["z", "w", "w+"] = "z"
    start: Literal["random", "mean"] = "random"
    restarts: int = 1
    candidates: int = 0
    prune: float = 1.0
    refine: float = 0.0
    learning_rate: float = 2e-2
    refine_learning_rate: float = 2e-2
    refine_pull: float = 1e-2
    schedule: Literal["constant", "cosine"] = "constant"
    perceptual: float = 1.0
    pixel: float = 1.0
    prior: float = 0.0
    optimize_expression: bool = False
    expression_learning_rate: float = 2e-2
    expression_prior: float = 0.0
    optimize_pose: bool = False
    pose_learning_rate: float = 5e-3
    pose_step: float = 0.02
    patience: int = 0
    plateau: float = 1e-3

    def __post_init__(self) -> None:
        rates = ("learning_rate", "refine_learning_rate", "expression_learning_rate", "pose_learning_rate", "pose_step")
        check_positive(self, *rates, where="search.")
        weights = ("perceptual", "pixel", "prior", "expression_prior", "refine_pull")
        check_not_negative(self, *weights, "candidates", "patience", "plateau", where="search.")
        if self.space == "z" and self.start == "mean":
            raise UserError("search.start: z starts at random codes; the mean is a code of w")
        if self.restarts < 1 or (self.candidates and self.candidates < self.restarts):
            raise UserError("search: restarts must be at least 1, and candidates 0 or at least as many as restarts")
        if not 0 < self.prune <= 1 or not 0 <= self.refine < 1 or self.prune + self.refine > 2:
            raise UserError("search: prune must be in (0, 1] and refine in [0, 1)")
        if self.refine > 0 and self.prune > 1 - self.refine and self.restarts > 1:
            raise UserError("search: prune must not be later than the refinement's start, 1 - refine")


class ItemSearch(nn.Module):
    """What is optimised for one artwork: K rows of codes, expressions and pose changes.

    Args:
        search: the settings.
        generator: gives the sizes.
        codes: the K starts: {"z": (K, z_dim)}, or by latent group (K, 1 or n, w).
        label: (25,) camera, or (0,) in a 2D generator.
        steps: of the run, for the loss curve.
    """

    def __init__(
        self, search: Search, generator: Generator, codes: dict[str, Tensor], label: Tensor, steps: int
    ) -> None:
        super().__init__()
        self.codes = nn.ParameterDict({name: nn.Parameter(code.clone()) for name, code in codes.items()})
        rows = search.restarts
        self.expression = nn.Parameter(
            torch.zeros(rows, len(generator.expressions) if search.optimize_expression else 0)
        )
        self.pose = nn.Parameter(torch.zeros(rows, 2 if search.optimize_pose else 0))
        groups = generator.mean_latents.groups if search.refine > 0 else {}
        self.offset = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(t)) for name, t in groups.items()})
        self.label: Tensor
        self.best: Tensor
        self.stopped: Tensor
        self.curve: Tensor
        self.register_buffer("label", label.clone())
        self.register_buffer("best", torch.tensor(-1))  # -1: all restarts are still running
        self.register_buffer("leader", torch.tensor(0))
        self.register_buffer("stopped", torch.tensor(False))
        self.register_buffer("curve", torch.full((steps, len(TERMS)), torch.nan))

    @property
    def rows(self) -> slice:
        """The rows that are optimised: all, or the chosen one."""
        best = int(self.best)
        return slice(None) if best < 0 else slice(best, best + 1)

    def choose(self, row: int) -> None:
        """Go on with one restart only."""
        self.best.fill_(row)


@dataclass
class AnchorState(GroupState):
    """The group, with its constant tensors.

    Attributes:
        references: (n, 3, R, R) the artworks at the generator's resolution.
        refining: whether the offsets move at the current step.
    """

    references: Tensor
    refining: bool = False

    @property
    def searches(self) -> list[ItemSearch]:
        """One per item."""
        return list(cast(nn.ModuleList, self.module))  # type: ignore[arg-type]


class AnchorStage(PerArtworkStage[AnchorState]):
    """Finds for each artwork z* = argmin LPIPS(G(z, theta), I_ref) + |G(z, theta) - I_ref|^2 (Eq. 2 and 3).

    Beyond the paper: several restarts at once, a last refinement in w+, and a prior on z.

    Args:
        prior: artifact and module of the generator G_ori.
        perceptual: the perceptual distance of Eq. 2.
        pose: estimates the camera of artworks that have none; null refuses such artworks.
        search: how to look.
        steps, group_size, save_every, seed: as :class:`PerArtworkStage`. The paper gives no number of steps.
    """

    name = "anchor"

    def __init__(
        self,
        prior: ArtifactRef,
        perceptual: nn.Module,
        pose: nn.Module | None = None,
        search: Search = Search(),
        steps: int = 500,
        group_size: int = 1,
        save_every: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(steps=steps, group_size=group_size, save_every=save_every, seed=seed)
        self.prior = prior
        self.search = search
        self.perceptual = Frozen(perceptual)
        self.pose = None if pose is None else Frozen(pose)
        self._pictures: dict[str, Tensor] = {}

    def build_model(self) -> None:
        module = self.take("prior", self.prior)
        if not isinstance(module, Generator):
            raise UserError(f"{self.prior.path}: module {self.prior.module!r} is not a generator")
        self.generator = module.requires_grad_(False)
        if self.search.optimize_pose and not module.is_3d:
            raise UserError(f"search.optimize_pose: {self.prior.path} is a 2D generator, which has no camera")
        codes = module.mean_latents.groups.values()
        if self.search.space == "w" and any(bool((t != t[:, :1]).any()) for t in codes):
            raise UserError(f"search.space: {self.prior.path} has no w that serves all layers; use z or w+")

    def on_fit_start(self) -> None:
        items = self.trainer.datamodule.items  # type: ignore[attr-defined]
        self._check(items)
        super().on_fit_start()

    def _check(self, items: Sequence[Artwork]) -> None:
        """Refuse cameras that the generator cannot have, before anything is computed."""
        generator, rig = self.generator, self.generator.rig
        for item in items:
            side = item.image.shape[-1]
            if side < min(generator.resolution, *item.original_size):
                log.info(
                    "%s: framed at %d px, the generator renders %d: --data.init_args.size keeps more",
                    *(item.id, side, generator.resolution),
                )
            if not generator.is_3d:
                continue
            check_camera(item, rig)
        if not generator.is_3d:
            log.info("%s is a 2D generator: artworks are fitted as they are, without a camera", self.prior.path)

    # -- one group --------------------------------------------------------------------------------

    def start_group(self, items: Sequence[Artwork]) -> AnchorState:
        move_frozen(self, self.device)
        references = torch.stack([item.at(self.generator.resolution) for item in items]).to(self.device)
        searches = []
        for item, reference in zip(items, references, strict=True):
            label = self._label(item)
            searches.append(
                ItemSearch(self.search, self.generator, self._starts(item, reference, label), label, self.steps)
            )
        module = nn.ModuleList(searches).to(self.device)
        rates = {
            "codes": self.search.learning_rate,
            "expression": self.search.expression_learning_rate,
            "pose": self.search.pose_learning_rate,
            "offset": self.search.refine_learning_rate,
        }
        groups = [
            {"params": [p for n, p in module.named_parameters() if n.split(".")[1] == kind and p.numel()], "lr": rate}
            for kind, rate in rates.items()
        ]
        optimizer = torch.optim.Adam([{**group, "rate": group["lr"]} for group in groups if group["params"]])
        return AnchorState(items, module, optimizer, references)

    def _label(self, item: Artwork) -> Tensor:
        """(25,) the artwork's camera, estimated where it is not given; (0,) in a 2D generator."""
        if not self.generator.is_3d:
            return torch.zeros(0)
        return find_camera(item, self.generator.rig, self.pose, self.device).label()[0]

    @torch.no_grad()
    def _starts(self, item: Artwork, reference: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The K start codes: the best candidates, or the first draws."""
        search, generator = self.search, self.generator
        draws = item_generator(item.seed if item.seed is not None else self.seed, item.id, -1)
        if search.start == "mean":
            latents = generator.mean_latents.repeat_interleave(search.restarts)
            return self._in_space(latents)
        z = generator.sample_z(max(search.candidates, search.restarts), draws).to(self.device)
        if search.candidates > search.restarts:
            camera = Camera.from_label(label[None].to(self.device)) if label.numel() else None
            losses = []
            for chunk in z.split(_CHUNK):
                cameras = camera if camera is None else camera.repeat_interleave(len(chunk))
                image = generator.synthesis(generator.mapping(chunk), cameras).image
                target = reference.expand_as(image)
                losses.append(
                    search.perceptual * self.perceptual(image, target) + search.pixel * pixel_mse(image, target)
                )
            z = z[torch.cat(losses).float().argsort(stable=True)[: search.restarts]]
        return {"z": z} if search.space == "z" else self._in_space(generator.mapping(z))

    def _in_space(self, latents: Latents) -> dict[str, Tensor]:
        if self.search.space == "w":
            latents = latents.map(lambda t: t[:, :1])
        return {name: t.clone() for name, t in latents.groups.items()}

    def optimise(self, state: AnchorState, step: int) -> dict[str, Tensor]:
        search = self.search
        state.refining = step >= (1 - search.refine) * self.steps
        for group in state.optimizer.param_groups:
            group["lr"] = group["rate"] * (
                1.0 if search.schedule == "constant" else 0.05 + 0.475 * (1 + math.cos(math.pi * step / self.steps))
            )
        image, latents, counts = self._render(state.searches)
        targets = torch.cat([r.expand(n, -1, -1, -1) for r, n in zip(state.references, counts, strict=True)])
        perceptual, pixel = self.perceptual(image, targets), pixel_mse(image, targets)
        row_loss = search.perceptual * perceptual + search.pixel * pixel  # Eq. 2
        if search.optimize_pose:
            row_loss = row_loss + self._pose_term(state, latents, targets)
        totals = []
        rows = zip(state.searches, row_loss.split(counts), perceptual.split(counts), pixel.split(counts), strict=True)
        for item, loss, lpips, mse in rows:
            leader = int(loss.detach().float().argmin())
            item.curve[step] = torch.stack([loss[leader], lpips[leader], mse[leader]]).detach().float()
            if int(item.best) < 0:
                item.get_buffer("leader").fill_(leader)
                if step + 1 >= min(search.prune, 1 - search.refine) * self.steps:
                    item.choose(leader)
            totals.append(loss.sum() + self._penalties(item))
            self._watch(item, step)
        curves = torch.stack([item.curve[step] for item in state.searches])
        logged = dict(zip(TERMS[1:], curves[:, 1:].unbind(1), strict=True))
        return {"loss": torch.stack(totals), **logged}

    def _penalties(self, item: ItemSearch) -> Tensor:
        total = item.label.new_zeros(())
        if self.search.prior and "z" in item.codes:
            total = total + self.search.prior * item.codes["z"][item.rows].square().mean(1).sum()
        if self.search.expression_prior and item.expression.numel():
            total = total + self.search.expression_prior * item.expression.square().mean(1).sum()
        for offset in item.offset.values():
            total = total + self.search.refine_pull * offset.square().mean()
        return total

    def _watch(self, item: ItemSearch, step: int) -> None:
        """Stop an item whose loss has reached a plateau."""
        window = self.search.patience
        if window and step + 1 >= 2 * window:
            before, now = item.curve[step + 1 - 2 * window : step + 1, 0].reshape(2, window).mean(1).tolist()
            if before - now < self.search.plateau * before:
                item.stopped.fill_(True)

    def before_step(self, state: AnchorState) -> None:
        for item in state.searches:
            for name, parameter in item.named_parameters():
                # Without a gradient Adam leaves a parameter, and its moments, as they are.
                if bool(item.stopped) or (name.startswith("offset") and not state.refining):
                    parameter.grad = None

    def settled(self, state: AnchorState) -> bool:
        return all(bool(item.stopped) for item in state.searches)

    # -- rendering --------------------------------------------------------------------------------

    def latents(self, item: ItemSearch) -> Latents:
        """Style codes of an item's active rows."""
        codes = {name: code[item.rows] for name, code in item.codes.items()}
        if "z" in codes:
            latents = self.generator.mapping(codes["z"])
        else:
            counts = {name: t.shape[1] for name, t in self.generator.mean_latents.groups.items()}
            latents = Latents({name: t.expand(-1, counts[name], -1) for name, t in codes.items()})
        if item.offset:
            scale = self._scales()
            latents = Latents({name: t + item.offset[name] * scale[name] for name, t in latents.groups.items()})
        return latents

    def _scales(self) -> dict[str, Tensor]:
        """The standard deviation of w, per group, over random codes."""
        if not hasattr(self, "_w_scale"):
            with torch.no_grad():
                z = self.generator.sample_z(256, torch.Generator().manual_seed(0)).to(self.device)
                groups = self.generator.mapping(z).groups
                self._w_scale = {name: t.float().std(0).mean() for name, t in groups.items()}
        return self._w_scale

    def camera(self, items: Sequence[ItemSearch]) -> Camera | None:
        """Cameras of all items' active rows; ``None`` in a 2D generator."""
        return Camera.cat([self._camera(item) for item in items]) if self.generator.is_3d else None

    def _camera(self, item: ItemSearch) -> Camera:
        rig, camera = self.generator.rig, Camera.from_label(item.label[None])
        if not item.pose.numel():
            return camera.repeat_interleave(len(item.expression[item.rows]))
        turned = item.pose[item.rows].detach() + torch.stack(rig.angles(camera), 1)
        return rig.camera(*rig.within(*turned.unbind(1)), item.label.device)

    def _render(self, items: Sequence[ItemSearch]) -> tuple[Tensor, Latents, list[int]]:
        """Images of all items' active rows, their codes, and the number of rows per item."""
        parts = [self.latents(item) for item in items]
        counts = [len(part) for part in parts]
        latents = Latents({name: torch.cat([p.groups[name] for p in parts]) for name in parts[0].groups})
        image = self.generator.synthesis(latents, self.camera(items), expression=self._expressions(items)).image
        return image, latents, counts

    def _expressions(self, items: Sequence[ItemSearch]) -> Tensor | None:
        if not self.search.optimize_expression or not self.generator.expressions:
            return None
        return torch.cat([item.expression[item.rows] for item in items])

    def _pose_term(self, state: AnchorState, latents: Latents, targets: Tensor) -> Tensor:
        """(rows,) zeros whose gradient in the pose is the central difference of the loss."""
        rig, step = self.generator.rig, self.search.pose_step
        centre = torch.stack(rig.angles(Camera.cat([self._camera(item) for item in state.searches])), 1)
        turns = torch.tensor([[step, 0.0], [-step, 0.0], [0.0, step], [0.0, -step]], device=self.device)
        yaw, pitch = (centre[:, None] + turns).flatten(0, 1).unbind(1)
        with torch.no_grad():
            # One pass of the backbone serves the four views of a row.
            expression = self._expressions(state.searches)
            image = self.generator.synthesis(
                latents.detach(), rig.camera(yaw, pitch, self.device), expression=expression
            )
            seen = targets.repeat_interleave(4, 0)
            loss = self.search.perceptual * self.perceptual(image.image, seen) + self.search.pixel * pixel_mse(
                image.image, seen
            )
            plus_yaw, minus_yaw, plus_pitch, minus_pitch = loss.reshape(-1, 4).unbind(1)
            slope = torch.stack([plus_yaw - minus_yaw, plus_pitch - minus_pitch], 1) / (2 * step)
        pose = torch.cat([item.pose[item.rows] for item in state.searches])
        term = (pose * slope).sum(1)
        return term - term.detach()

    # -- results ----------------------------------------------------------------------------------

    @torch.no_grad()
    def finish_group(self, state: AnchorState) -> None:
        for item, search, reference in zip(state.items, state.searches, state.references, strict=True):
            if int(search.best) < 0:
                search.choose(int(search.get_buffer("leader")))
            image, latents, _ = self._render([search])
            reference = reference[None]
            terms = {
                "perceptual": float(self.perceptual(image, reference)),
                "pixel": float(pixel_mse(image, reference)),
            }
            camera = self.camera([search])
            folder = self.item_dir(item.id)
            tensors = {f"latents_{name}": t for name, t in latents.groups.items()}
            tensors["expression"] = self._expression_of(search)
            if camera is not None:
                tensors["label"] = camera.label()
            if "z" in search.codes:
                tensors["z"] = search.codes["z"][search.rows]
            content = {name: t.detach().float().cpu().contiguous().clone() for name, t in tensors.items()}
            with atomic_write(folder / "anchor.safetensors") as file:
                file.write_bytes(safetensors.torch.save(content))
            write_image(folder / "anchor.png", image)
            write_image(folder / "reference.png", item.image)
            write_image(folder / "overlay.png", (image + reference) / 2)  # a wrong pose shows as doubled contours
            _write_curve(folder / "curve.csv", search.curve)
            self._pictures[item.id] = torch.cat([reference, image]).cpu()
            self._write_summary(folder / "anchor.json", item, search, camera, terms)

    def _expression_of(self, search: ItemSearch) -> Tensor:
        if search.expression.numel():
            return search.expression[search.rows]
        return torch.zeros(1, len(self.generator.expressions))

    def _write_summary(
        self, path: Path, item: Artwork, search: ItemSearch, camera: Camera | None, terms: dict[str, float]
    ) -> None:
        source = "estimated" if item.label is None and item.angles is None else "given"
        yaw, pitch = (None, None) if camera is None else (math.degrees(x) for x in self.generator.rig.angles(camera))
        summary = {
            "id": item.id,
            "style": item.style,
            "space": self.search.space,
            "restart": int(search.best),
            "steps": int(search.curve[:, 0].isfinite().sum()),
            "stopped": bool(search.stopped),
            "pose": "none" if camera is None else "optimised" if self.search.optimize_pose else source,
            "yaw_deg": yaw,
            "pitch_deg": pitch,
            **terms,
        }
        with atomic_write(path) as file:
            file.write_text(json.dumps(summary, indent=1) + "\n")

    def export(self) -> dict[str, Any]:
        anchors, media, summaries = {}, {}, []
        for item in self.trainer.datamodule.items:  # type: ignore[attr-defined]
            folder = self.item_dir(item.id)
            tensors = safetensors.torch.load_file(folder / "anchor.safetensors")
            latents = {name: tensors[f"latents_{name}"] for name in self.generator.mean_latents.groups}
            anchors[item.id] = Anchor(Latents(latents), tensors.get("z"), tensors["expression"], tensors.get("label"))
            media |= {f"{kind}_{item.id}.png": folder / f"{kind}.png" for kind in ("reference", "anchor", "overlay")}
            summaries.append(json.loads((folder / "anchor.json").read_text("utf-8")))
        summaries.sort(key=lambda summary: summary["id"])
        metrics = {key: sum(s[key] for s in summaries) / len(summaries) for key in ("perceptual", "pixel")}
        modules = {"generator": self.generator, "anchors": AnchorSet.pack(anchors, self.generator)}
        return {"modules": modules, "media": media, "metrics": metrics, "extra": {"items": summaries}}

    def panels(self) -> dict[str, Tensor]:
        if not self._pictures:
            return {}
        columns = [torch.cat(list(pair), 1) for pair in list(self._pictures.values())[-8:]]  # artwork above anchor
        return {"anchors": torch.cat(columns, 2)}


def _write_curve(path: Path, curve: Tensor) -> None:
    with atomic_write(path) as file, open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("step", *TERMS))
        for step, row in enumerate(curve.tolist()):
            if math.isfinite(row[0]):
                writer.writerow((step, *row))
