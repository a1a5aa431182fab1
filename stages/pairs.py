"""Pseudo pairs: for each picture of a style set, photographs that show the same person, at several levels."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.artworks import Artwork
from datamodules.poses import find_camera
from models.artifact import Export, load
from models.camera import Camera
from models.checks import check_not_negative
from models.encoders.base import Encoder, inverted
from models.errors import UserError
from models.features.base import Frozen
from models.files import atomic_write
from models.generators.base import Generator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.index import Entry, subject_index
from models.heads.projector import ItemCodes, Projector, Search
from models.image import read_image, resized, write_image
from models.latents import Latents
from models.losses.adaptation import SemanticLoss
from models.metrics.judges import Judges
from models.metrics.portrait import ViewTruth
from models.metrics.records import Record
from models.rendering.sheets import sheet
from stages.base.foreign import warn_of_embedded
from stages.base.inversion import check_fit
from stages.base.kinship import check_kin
from stages.base.per_item import GroupState, PerItemStage
from stages.base.stage import ArtifactRef, GeneratorRef

LEVELS = (1, 2, 3)
PROTOCOL, VERSION = "pairs", "1"
_PAGE, _TILE = 16, 128  # pictures a sheet, pixels


@runtime_checkable
class KnowsTwins(Protocol):
    """Data that know the photographs of the people whom their pictures show."""

    def twin(self, identity: str) -> ViewTruth:
        """The photograph (1, 3, R, R) that one picture was made of."""
        ...


@dataclass(frozen=True)
class PairSearch(Search):
    """How codes are looked for at the second level: in z+, or in w+, which the paper finds worse (Sec. 4.5), from an
    encoder to the same space. The defaults are the paper's where it says something.

    Attributes:
        shell: weight of ((|z|^2 / z_dim) - 1)^2 of each layer's z, which keeps it where N(0, I) is dense.
    """

    space: Literal["z", "z+", "w", "w+"] = "z+"
    learning_rate: float = 2e-2
    shell: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "shell", where="search.")
        if self.space not in ("z+", "w+") or (self.shell and self.space == "w+"):
            raise UserError(
                f"search.space is {self.space!r}: pairs are looked for in z+, from the encoder's codes on, or in w+, "
                "which has no shell"
            )
        if self.restarts > 1 or self.candidates or self.refine or self.length != 1:
            raise UserError("search: pairs start at the encoder's codes: no restarts, candidates, refine or length")
        if self.optimize_expression or self.optimize_noise:
            raise UserError("search: a pair is a code: no optimize_expression or optimize_noise")


@dataclass
class PairsState(GroupState[Artwork]):
    """The group.

    Attributes:
        projector: the module.
        pictures: (n, 3, R, R) of the style, at the generator's resolution.
    """

    projector: Projector
    pictures: Tensor


class PairsStage(PerItemStage[Artwork, PairsState]):
    """Multi-level pseudo pairs (pseudo-paired stylization, Lu and Zhou, Sec. 3.2), with G of photographs and G* of the
    style, which was fine-tuned without constraints.

    1. Embedding: z1 = E_z+(S), w1 = mapping(z1), P1 = G(w1) (Eq. 4).
    2. Optimisation: z2 = argmin L_semantic(G*(z+), S) from z1 on, w2 = mapping(z2), P2 = G(w2) (Eq. 5).
    3. Refinement: w3 = E_w+(P2), P3 = G(w3). Eq. 6 prints S where the text has P2: ``refine_from``.

    Args:
        prior: artifact and module of G. style: of G*.
        embed: artifact of the encoder to Z+, or to W+ where ``search.space`` is w+: a generator whose z holds for all
            its layers, as those of the 3D priors, has no other. refine: of the encoder to W+.
        perceptual, identity: networks of L_semantic.
        semantic: its weights.
        search: of step 2. refine_from: "p2" or "s".
        pose: estimates the camera of pictures that have none, for 3D generators.
        tested: artifact of this stage whose photographs ``test`` compares with the true ones; ``metric`` and
            ``metric_identity`` are networks that no pair was made with, by default those that they were.
            attributes: what scores heads by their pictures.
        variant: name in the scores.
        steps, group_size, save_every, seed: as :class:`PerItemStage`.
    """

    name = "pairs"

    def __init__(
        self,
        perceptual: nn.Module,
        prior: GeneratorRef | None = None,
        style: GeneratorRef | None = None,
        embed: ArtifactRef | None = None,
        refine: ArtifactRef | None = None,
        identity: nn.Module | None = None,
        semantic: SemanticLoss = SemanticLoss(),  # noqa: B008 - frozen
        search: PairSearch = PairSearch(),
        refine_from: Literal["p2", "s"] = "p2",
        pose: nn.Module | None = None,
        tested: ArtifactRef | None = None,
        metric: nn.Module | None = None,
        metric_identity: nn.Module | None = None,
        attributes: list[nn.Module] | None = None,
        variant: str = "pairs",
        steps: int = 1000,
        group_size: int = 1,
        save_every: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(steps=steps, group_size=group_size, save_every=save_every, seed=seed)
        if semantic.identity and identity is None and tested is None:
            raise UserError("model.semantic.identity is measured by a network: set --model.identity")
        self.prior, self.style, self.embed_from, self.refine_with = prior, style, embed, refine
        self.perceptual = Frozen(perceptual)
        self.identity = None if identity is None else Frozen(identity)
        self.pose = None if pose is None else Frozen(pose)
        self.semantic, self.search, self.refine_from = semantic, search, refine_from
        self.tested, self.variant = tested, variant
        self.judges = Judges(
            perceptual if metric is None else metric,
            identity if metric_identity is None else metric_identity,
            attributes=attributes,
        )
        self._shown: dict[str, Path] = {}  # sheets by name

    def build_model(self) -> None:
        if self.tested is not None:
            self.inputs["tested"] = load(self.tested.path)
            return
        if self.prior is None or self.style is None or self.embed_from is None or self.refine_with is None:
            raise UserError(
                "pairs are made of four artifacts: give --model.prior, --model.style, --model.embed and --model.refine"
            )
        self.generator = self.take("prior", self.prior.path, self.prior.module, Generator).requires_grad_(False)
        self.adapted = self.take("style", self.style.path, self.style.module, Generator).requires_grad_(False)
        self.embed = self.take("embed", self.embed_from.path, "encoder", Encoder).requires_grad_(False)
        self.refine = self.take("refine", self.refine_with.path, "encoder", Encoder).requires_grad_(False)
        if self.embed.space != self.search.space[0]:
            raise UserError(
                f"{self.embed_from.path} has an encoder to {self.embed.space}: model.embed is one to "
                f"{self.search.space}, model.search.space"
            )
        if self.refine.space != "w":
            raise UserError(f"{self.refine_with.path} has an encoder to z: model.refine is one to w+")
        for encoder in (self.embed, self.refine):
            check_fit(encoder, self.generator)
        check_fit(self.embed, self.adapted)
        for role in ("style", "embed", "refine"):
            check_kin(self.inputs[role], self.inputs["prior"], self.prior.module)
        self.eval()

    def on_fit_start(self) -> None:
        if self.tested is not None:
            raise UserError("fit makes pairs, and does not test any: leave --model.tested out")
        warn_of_embedded(self.generator, self.perceptual, self.identity)
        super().on_fit_start()

    # -- one group --------------------------------------------------------------------------------

    @torch.no_grad()
    def start_group(self, items: Sequence[Artwork]) -> PairsState:
        pictures = torch.stack([item.at(self.generator.resolution) for item in items]).to(self.device)
        labels = [torch.zeros(0) if (camera := self._camera(item)) is None else camera.label()[0] for item in items]
        loss = partial(self.distance, pictures)
        projector = Projector(self.adapted, self.search, loss, labels, self.steps, ("loss",))
        for row in range(len(items)):
            projector.begin(row, self._first(pictures[row : row + 1]))
        return PairsState(items, projector, projector.optimizers(), projector, pictures)

    def _first(self, picture: Tensor) -> Latents | Tensor:
        """Where the search begins: z1 (1, num_ws, z_dim), or w1 outside of z."""
        if self.embed.space == "w":
            return inverted(picture, self.embed, self.generator)[0]
        mean = self.embed.mean_latents
        assert mean is not None
        return self.embed.codes(resized(picture, self.embed.resolution), mean).groups["z"]

    def _optimised(self, projector: Projector, found: ItemCodes) -> Latents:
        """w2, which z2 is mapped to by G."""
        return self.generator.mapping(found.codes["z"][found.rows]) if "z" in found.codes else projector.latents(found)

    def _camera(self, item: Artwork) -> Camera | None:
        return find_camera(item, self.generator, self.pose, None, self.device) if self.generator.is_3d else None

    def distance(self, pictures: Tensor, image: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """L_semantic (Eq. 1) of pictures (N, 3, R, R) by G* and those of the style that ``rows`` (N,) name."""
        identity = None if self.identity is None else self.identity.module
        found = self.semantic(image, pictures[rows], self.perceptual.module, identity)["semantic"]
        return {"loss": self.semantic.weight * found}

    def active(self, state: PairsState, step: int) -> Collection[str]:
        return state.projector.active(step)

    def settled(self, state: PairsState) -> bool:
        return state.projector.settled

    def optimise(self, state: PairsState, step: int) -> dict[str, Tensor]:
        losses = state.projector.losses(state.optimizers, step)
        if self.search.shell:
            away = [(item.codes["z"].square().mean(-1) - 1).square().mean() for item in state.projector]
            losses["loss"] = losses["loss"] + self.search.shell * torch.stack(away)
        return losses

    @torch.no_grad()
    def finish_group(self, state: PairsState) -> None:
        projector = state.projector
        projector.choose()
        for row, (item, found) in enumerate(zip(state.items, projector, strict=True)):
            picture, camera = state.pictures[row : row + 1], projector.camera(found)
            codes = [inverted(picture, self.embed, self.generator)[0], self._optimised(projector, found)]
            photos = [self.generator.synthesis(ws, camera).image.clamp(-1, 1) for ws in codes]
            last, _ = inverted(photos[1] if self.refine_from == "p2" else picture, self.refine, self.generator)
            codes.append(last)
            photos.append(self.generator.synthesis(last, camera).image.clamp(-1, 1))
            folder = self.item_dir(item.id)
            tensors = {f"w{k}_{name}": t for k, ws in zip(LEVELS, codes, strict=True) for name, t in ws.groups.items()}
            if camera is not None:
                tensors["label"] = camera.label()
            content = {name: t.float().cpu().contiguous().clone() for name, t in tensors.items()}
            with atomic_write(folder / "pairs.safetensors") as file:
                file.write_bytes(safetensors.torch.save(content))
            write_image(folder / "style.png", picture)
            for k, photo in zip(LEVELS, photos, strict=True):
                write_image(folder / f"p{k}.png", photo)
            distances = {f"p{k}": float(self.distance(picture, photo, torch.zeros(1, dtype=torch.long))["loss"])
                         for k, photo in zip(LEVELS, photos, strict=True)}  # fmt: skip
            losses = found.curve[:, 0]
            summary = {"id": item.id, "loss": float(losses[losses.isfinite()][-1]), **distances}
            with atomic_write(folder / "pairs.json") as file:
                file.write_text(json.dumps(summary) + "\n")

    # -- results ----------------------------------------------------------------------------------

    def export(self) -> Export:
        levels: dict[str, dict[str, HeadCode]] = {f"pairs{k}": {} for k in LEVELS}
        media, summaries, neutral = self._sheets(), [], torch.zeros(1, len(self.generator.expressions))
        for item in self.items:
            folder = self.item_dir(item.id)
            tensors = safetensors.torch.load_file(folder / "pairs.safetensors")
            for k in LEVELS:
                ws = Latents({name: tensors[f"w{k}_{name}"] for name in self.generator.mean_latents.groups})
                levels[f"pairs{k}"][item.id] = HeadCode(ws, None, neutral, tensors.get("label"))
            kinds = {"style": "style", **{f"p{k}": f"p{k}" for k in LEVELS}}
            media |= {f"{kind}_{item.id}.png": folder / f"{name}.png" for kind, name in kinds.items()}
            summaries.append(json.loads((folder / "pairs.json").read_text("utf-8")))
        packed: dict[str, nn.Module] = {name: HeadCodes.pack(codes, self.generator) for name, codes in levels.items()}
        modules = {"generator": self.generator, **packed}
        metrics = {key: sum(s[key] for s in summaries) / len(summaries) for key in ("loss", "p1", "p2", "p3")}
        entries = [
            Entry(item.id, codes="pairs2", artwork=f"style_{item.id}.png", caption="pseudo photograph, level 2")
            for item in self.items
        ]
        extra = {"items": summaries, "refine_from": self.refine_from, **subject_index(entries)}
        return Export(modules, metrics, media, extra=extra, delta_of=self.unchanged(modules))

    # -- test -------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        if self.tested is None:
            raise UserError("test compares finished pairs with the truth: give --model.tested.path")
        if not isinstance(self.trainer.datamodule, KnowsTwins):  # type: ignore[attr-defined]
            raise UserError("nobody knows whom these pictures show: test is for data of the embedded world")

    @torch.no_grad()
    def test_step(self, batch: Sequence[Artwork], batch_idx: int) -> None:
        """How near each level's photograph is to the true one; level 0 is the style's picture itself."""
        data, found = self.trainer.datamodule, self.inputs["tested"]  # type: ignore[attr-defined]
        for item in batch:
            truth = data.twin(item.id).image.to(self.device)
            files = {0: f"style_{item.id}.png", **{k: f"p{k}_{item.id}.png" for k in LEVELS}}
            for k, file in files.items():
                photo = resized(read_image(found.media(file)), truth.shape[-1]).to(self.device)
                variant, split = f"{self.variant}, level {k}" if k else "the style's picture", "test"
                for name, value in self.judges.likeness(photo, truth).items():
                    network = self.judges.network(name)
                    self.records.add(
                        [Record(PROTOCOL, VERSION, split, item.id, "", self.seed, variant, network, name, float(value))]
                    )

    def _sheets(self) -> dict[str, Path]:
        """By name, pages of all pictures, each beside its photographs, by which a level is chosen."""
        for page, start in enumerate(range(0, len(self.items), _PAGE), 1):
            file = self.out / "sheets" / f"sheet_{page:02d}.png"
            write_image(file, self._sheet(self.items[start : start + _PAGE]))
            self._shown[file.name] = file
        return dict(self._shown)

    def _sheet(self, items: Sequence[Artwork]) -> Tensor:
        """Two pictures a row: S, P1, P2, P3."""
        cells = [
            [(item.id if name == "style" else name.upper(), read_image(self.item_dir(item.id) / f"{name}.png")[0])
             for name in ("style", *(f"p{k}" for k in LEVELS))]
            for item in items
        ]  # fmt: skip
        return sheet([list(chain(*cells[i : i + 2])) for i in range(0, len(cells), 2)], _TILE)

    def panels(self) -> dict[str, Tensor]:
        """The last pictures that are done, each beside its photographs."""
        done = [item for item in self.items if (self.item_dir(item.id) / "pairs.json").exists()]
        return {"pairs": self._sheet(done[-_PAGE:])} if done else {}
