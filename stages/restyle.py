"""Photos in a style, in one pass each: as the style has them, in variations of it, and by a reference."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.artworks import Artwork
from datamodules.photos import PhotoDataModule
from datamodules.resumable import SplitDataModule
from datamodules.truth import KnowsStyleSet
from models.artifact import Export
from models.batches import PortraitBatch
from models.camera import Camera
from models.encoders.base import Encoder, inverted
from models.errors import UserError
from models.features.base import Frozen, PerceptualDistance
from models.files import atomic_write, cache_root, os_errors
from models.generators.base import Generator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.directions import fingerprint
from models.heads.index import Entry, subject_index
from models.heads.mixing import ReferenceSearch, code_sides
from models.image import read_image, resized, write_image
from models.latents import Latents
from models.metrics.distribution import Distribution, cmmd, feature_distances, features_of
from models.metrics.judges import Judges
from models.metrics.records import Record
from models.rendering.sheets import sheet
from stages.base.foreign import warn_of_embedded
from stages.base.inversion import check_fit
from stages.base.kinship import check_kin
from stages.base.ranks import gather
from stages.base.seeds import item_generator
from stages.base.stage import ArtifactRef, GeneratorRef, Stage
from stages.gallery.rows import page

log = logging.getLogger(__name__)

PROTOCOL, VERSION = "restyle", "1"
_ORIGINAL = "original"  # what G is called in the artifact of G'
_CODE = "code.safetensors"  # of a photo, beside its pictures
_FEWEST = 2  # pictures that distances between sets are told by


class RestyleStage(Stage):
    """Pseudo-paired stylization's inference (Lu and Zhou, Sec. 3.3): w = E(photo), and pictures of it by G'.

    - general: G'(w).
    - variations: random codes, truncated, take the place of the photo's from number n on; the smaller n, the more is
      theirs (:func:`models.heads.mixing.code_sides` tells what each code goes into).
    - by a reference: likewise, with the code of a picture in the style, looked for once.

    ``predict`` writes these pictures and a page of them, and hands on the photos' codes.

    Photos are read one after the other; one that cannot be read is named, left out, and makes the command fail at the
    end, when all others are done.

    Args:
        style: artifact and module of G'.
        encoder: artifact of an encoder of the generator that G' came from, to W in the paper.
        samples: variations of each photo. variation: what they are drawn from, Z, or Z+, a z for each code, which the
            paper names. mix_from: the n of theirs, one picture each.
        truncation: of the random codes. content_truncation: of the photo's own. The paper has one number for both: .7
            for cartoons, .6 for anime, .9 otherwise.
        reference: a picture in the style, framed as the photos are; null for none. reference_from: as ``mix_from``.
            ``test`` takes one that is framed already, and measures how far pictures are from its look.
        search: how the reference's code is looked for. perceptual: its LPIPS.
        tile: side of a picture on the page, pixels.
        metric, metric_identity: networks by which ``test`` compares pictures with the photos, and with the true
            pictures of the same heads in the style. metric_embedding, kid_features: those of the distances to the
            style set. attributes: what scores heads by their pictures. null, or none, leaves values out.
        variant: name in the scores.
        seed: of the variations, which are the same for all photos, and of the search.
    """

    name = "restyle"

    def __init__(
        self,
        style: GeneratorRef,
        encoder: ArtifactRef,
        samples: int = 4,
        variation: Literal["z", "z+"] = "z",
        mix_from: list[int] = [3, 6, 9, 12],  # noqa: B006 - read only
        truncation: float = 0.7,
        content_truncation: float = 1.0,
        reference: str | None = None,
        reference_from: list[int] = [3, 6, 9],  # noqa: B006
        search: ReferenceSearch = ReferenceSearch(),  # noqa: B008 - frozen
        perceptual: nn.Module | None = None,
        tile: int = 192,
        metric: nn.Module | None = None,
        metric_identity: nn.Module | None = None,
        metric_embedding: nn.Module | None = None,
        kid_features: Distribution | None = None,
        attributes: list[nn.Module] | None = None,
        variant: str = "restyle",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if samples < 0 or not min(truncation, content_truncation) > 0 or tile < 32:
            raise UserError("restyle: samples must not be negative, truncations above 0, and tile at least 32")
        if reference is not None and perceptual is None:
            raise UserError(
                "restyle: a reference's code is looked for by a perceptual distance: give --model.perceptual"
            )
        self.style, self.encoder_from, self.samples, self.mix_from = style, encoder, samples, mix_from
        self.variation = variation
        self.truncation, self.content_truncation = truncation, content_truncation
        self.reference, self.reference_from = reference, reference_from
        self.search, self.tile, self.seed = search, tile, seed
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.broken: list[str] = []
        self.judges = Judges(metric, metric_identity, metric_embedding, kid_features, attributes)
        self.variant = variant
        self._features: dict[tuple[str, str], list[Tensor]] = {}  # of the running test, by metric and variant
        self._done: list[str] = []
        self._shown: Tensor | None = None

    def build_model(self) -> None:
        self.generator = self.take("style", self.style.path, self.style.module, Generator).requires_grad_(False)
        self.encoder = self.take("encoder", self.encoder_from.path, "encoder", Encoder).requires_grad_(False)
        check_fit(self.encoder, self.generator)
        check_kin(self.inputs["encoder"], self.inputs["style"], self.style.module)
        if self.generator.is_3d:  # heads, which test alone sees
            if self.samples or self.reference is not None:
                raise UserError(
                    f"{self.style.path} is a 3D generator, whose codes are not mixed by layer: set --model.samples 0 "
                    "and --model.reference null"
                )
            self.sides = []
            self.eval()
            return
        self.sides = code_sides(self.generator)
        for name in ("mix_from", "reference_from"):
            for first in getattr(self, name):
                if not 0 <= first < len(self.sides):
                    told = ", ".join(map(str, self.sides))
                    raise UserError(
                        f"restyle.{name} names code {first}, {self.style.path} has {len(self.sides)}, numbered from 0, "
                        f"for blocks of {told} px"
                    )
        self.eval()

    # -- codes ------------------------------------------------------------------------------------

    def on_predict_start(self) -> None:
        super().on_predict_start()
        if self.generator.is_3d:
            raise UserError(
                f"{self.style.path} is a 3D generator: galatea finetune predict with --model.encoder.path makes an "
                "artifact of which galatea invert, or selftrain, predicts heads"
            )
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PhotoDataModule):
            raise UserError("restyle reads photos one by one: give --data datamodules.photos.PhotoDataModule")
        if (side := data.side) < self.encoder.resolution:
            raise UserError(
                f"photos are framed with {side} px a side, the encoder of {self.encoder_from.path} reads "
                f"{self.encoder.resolution}: raise --data.init_args.size"
            )
        self._begin()
        if self.reference is not None:
            warn_of_embedded(self.generator, self.perceptual)
            picture = data.framed(self.reference).at(self.generator.resolution)[None]
            self._guide = self._reference(self.reference, picture.to(self.device))

    @torch.no_grad()
    def _begin(self) -> None:
        """Draw the variations, before any photo comes."""
        generator, many = self.generator, self.generator.num_ws if self.variation == "z+" else 1
        drawn = [generator.sample_z(many, item_generator(self.seed, "variation", k)) for k in range(self.samples)]
        codes = [z[None] if self.variation == "z+" else z for z in drawn]
        self._variations = [generator.mapping(z.to(self.device), truncation=self.truncation) for z in codes]
        self._guide = self._look = None

    @torch.no_grad()
    def _reference(self, path: str, picture: Tensor) -> Latents:
        """The code of a reference (1, 3, R, R), kept by all that it depends on; rank 0 looks for it."""
        assert self.perceptual is not None
        distance: PerceptualDistance = self.perceptual.module  # type: ignore[assignment]
        digest = hashlib.sha256(picture.cpu().numpy().tobytes())
        kind = (type(distance).__qualname__, getattr(distance, "init_args", None))
        told = (self.inputs["style"].id, self.style.module, self.search, self.seed, kind)
        digest.update(f"{told} {fingerprint(self.perceptual.module)}".encode())
        file = cache_root() / "references" / f"{digest.hexdigest()[:32]}.safetensors"
        if self.global_rank == 0 and _kept(file) is None:
            log.info("%s: its code is looked for, %d steps", path, self.search.steps)
            found = self.search.fit(self.generator, picture, distance, item_generator(self.seed, "reference", 0))
            content = {name: codes.cpu().contiguous() for name, codes in found.groups.items()}
            with os_errors(file.parent):
                file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as temporary:
                temporary.write_bytes(safetensors.torch.save(content))
        self.trainer.strategy.barrier("reference")
        kept = _kept(file)
        assert kept is not None
        return Latents({name: t.to(self.device) for name, t in kept.items()})

    def codes(self, photo: Tensor) -> tuple[dict[str, Latents], Tensor | None]:
        """What becomes of photos (B, 3, H, W): codes by name, and expressions (B, E), which all of them share."""
        ws, expression = inverted(photo, self.encoder, self.generator)
        ws = ws.truncate(self.generator.mean_latents, self.content_truncation)
        found = {"general": ws}
        for k, style in enumerate(self._variations, 1):
            for first in self.mix_from:
                found[f"sample{k}_from{first}"] = ws.mix(style.repeat_interleave(len(photo)), first)
        if self._guide is not None:
            for first in self.reference_from:
                found[f"reference_from{first}"] = ws.mix(self._guide.repeat_interleave(len(photo)), first)
        return found, expression

    def pictures(
        self, found: Mapping[str, Latents], expression: Tensor | None, camera: Camera | None = None
    ) -> dict[str, Tensor]:
        """Pictures (B, 3, R, R) of codes, by name, seen by the photos' cameras in 3D."""
        return {
            name: self.generator.synthesis(codes, camera, expression=expression).image.clamp(-1, 1)
            for name, codes in found.items()
        }

    def caption(self, name: str) -> str:
        """What a picture's name says, in words."""
        kind, _, first = name.partition("_from")
        what = f"{kind} (seed {self.seed})" if kind.startswith("sample") else kind
        return f"{what}, codes from {first} on ({self.sides[int(first)]} px)" if first else what

    # -- predict ----------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_step(self, batch: Sequence[Artwork | str], batch_idx: int) -> None:
        photos = [item for item in batch if isinstance(item, Artwork)]
        for sentence in (item for item in batch if isinstance(item, str)):
            log.warning("left out: %s", sentence)
            self.broken.append(sentence)
        if not photos:
            return
        image = torch.stack([item.at(self.encoder.resolution) for item in photos]).to(self.device)
        codes, expression = self.codes(image)
        for name, pictures in (shown := self.pictures(codes, expression)).items():
            for item, picture in zip(photos, pictures, strict=True):
                write_image(self.out / "items" / item.id / f"{name}.png", picture)
        for row, item in enumerate(photos):
            folder = self.out / "items" / item.id
            write_image(folder / "photo.png", image[row])
            tiles = [("photo", image[row]), *((name, pictures[row]) for name, pictures in shown.items())]
            write_image(folder / "row.png", contact := sheet([tiles], self.tile))
            self._shown = contact if self._shown is None else self._shown
            with atomic_write(folder / "item.json") as file:
                told = {"truncation": self.truncation, "content_truncation": self.content_truncation, "seed": self.seed}
                file.write_text(json.dumps({"id": item.id, "pictures": ["photo", *shown], **told}) + "\n")
            own = {name: t[row : row + 1].cpu().contiguous() for name, t in codes["general"].groups.items()}
            with atomic_write(folder / _CODE) as file:  # in memory, many of them would scatter the heap
                file.write_bytes(safetensors.torch.save(own))
            self._done.append(item.id)

    @torch.no_grad()
    def on_predict_epoch_end(self) -> None:
        """The page, of what all ranks have done."""
        self.broken, self._done = gather(self.broken), sorted(gather(self._done))
        if self.trainer.is_global_zero:
            with atomic_write(self.out / "index.html") as file:
                file.write_text(page("photos in a style", self._rows(self._done), self.broken), encoding="utf-8")

    def on_predict_end(self) -> None:
        """When all is written, the failure of photos that were left out, on all ranks alike."""
        if self.broken:
            others = "the others are done" if self._done else "there are no others"
            more = f", and {len(self.broken) - 1} more" if len(self.broken) > 1 else ""
            raise UserError(f"{self.broken[0]}{more}: left out, {others}")

    def export(self) -> Export | None:
        """Codes of the photos, which G' and, where it came along, G show: a style has a strength in ``view``."""
        if not self._done:
            return None
        neutral = torch.zeros(1, len(self.generator.expressions))
        heads = {
            name: HeadCode(Latents(safetensors.torch.load_file(self.out / "items" / name / _CODE)), None, neutral, None)
            for name in self._done
        }
        modules: dict[str, nn.Module] = {"generator": self.generator, "photos": HeadCodes.pack(heads, self.generator)}
        original = _ORIGINAL if _ORIGINAL in self.inputs["style"].manifest["modules"] else None
        if original is not None:
            modules[original] = self.take("style", self.style.path, original, Generator).requires_grad_(False)
        entries = [
            Entry(name, codes="photos", original=original, artwork=f"photo_{name}.png", caption="in the style")
            for name in self._done
        ]
        media = {f"photo_{name}.png": self.out / "items" / name / "photo.png" for name in self._done}
        extra = {"content_truncation": self.content_truncation, **subject_index(entries)}
        return Export(modules, media=media, extra=extra, delta_of=self.unchanged(modules))

    def _rows(self, done: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
        """By photo its pictures: itself, general, variations, by reference."""
        found = {}
        for identity in done:
            names = json.loads((self.out / "items" / identity / "item.json").read_text("utf-8"))["pictures"]
            found[identity] = [(f"items/{identity}/{name}.png", self.caption(name)) for name in names]
        return found

    # -- test -------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not (isinstance(data, KnowsStyleSet) and isinstance(data, SplitDataModule)):
            raise UserError(
                "test compares photos with a style set: give --data datamodules.style_sets.PhotosAndStyle, or "
                "datamodules.mannequins.twins.MannequinTwins, which knows the photos' true pictures in a style as well"
            )
        photos, pictures = data.datasets["test"], data.style_set()
        if self._of_sets() and min(len(photos), len(pictures)) < _FEWEST:
            raise UserError(
                f"distances to a style are told by {_FEWEST} pictures of each kind or more, there are {len(photos)} "
                f"photos and {len(pictures)} pictures in the style: set --model.kid_features and "
                "--model.metric_embedding to null"
            )
        self._begin()
        if self.reference is not None:
            picture = read_image(self.reference)
            if picture.shape[2] != picture.shape[3]:
                raise UserError(
                    f"{self.reference} is not square: test takes a reference that is framed as the photos are"
                )
            picture = resized(picture, self.generator.resolution).to(self.device)
            self._guide, self._look = self._reference(self.reference, picture), picture

    @torch.no_grad()
    def test_step(self, batch: PortraitBatch, batch_idx: int) -> None:
        """How like the photos pictures are, and how like the same heads in the style where these are known."""
        photo, camera = batch["image"].flatten(0, 1), None
        truths = {"photo": photo} | ({"twin": batch["twin"].flatten(0, 1)} if "twin" in batch else {})
        if self.generator.is_3d:
            if "label" not in batch:
                raise UserError("these photos have no cameras, which a 3D generator needs: give their labels")
            camera = Camera.from_label(batch["label"].flatten(0, 1))
        items = [str(int(seed)) for seed in batch["seed"]] if "seed" in batch else batch.get("name", [])
        shown = self.pictures(*self.codes(resized(photo, self.encoder.resolution)), camera)
        for kind, pictures in shown.items():
            variant = self.variant if kind == "general" else f"{self.variant}, {kind}"
            for to, truth in truths.items():
                truth = resized(truth, pictures.shape[-1])
                for metric, values in self.judges.likeness(pictures, truth).items():
                    for row, value in enumerate(values.tolist()):
                        self.records.add([self._record(variant, f"{metric}_{to}", value, items[row])])
            if self._look is not None and self.judges.embedding is not None:
                embeddings = (self.judges.embedding.module(t) for t in (pictures, self._look))
                away = 1 - torch.cosine_similarity(*embeddings)
                for row, value in enumerate(away.tolist()):
                    self.records.add([self._record(variant, "style_reference", value, items[row])])
            for name, network in self._of_sets().items():
                self._features.setdefault((name, variant), []).append(network(pictures).cpu())

    def _record(self, variant: str, metric: str, value: float, item: str = "all") -> Record:
        return Record(
            PROTOCOL, VERSION, "test", item, "", self.seed, variant, self.judges.network(metric), metric, value
        )

    @torch.no_grad()
    def summary(self) -> list[Record]:
        """How far from the style set the pictures are, all together."""
        features = {key: torch.cat(gather(parts)) for key, parts in self._features.items()}
        if not self.trainer.is_global_zero or not features:
            return []
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, KnowsStyleSet)
        pictures = data.style_set()
        style = {}
        for name, network in self._of_sets().items():
            parts = (pictures[i]["image"] for i in range(len(pictures)))
            style[name] = features_of(network, parts, self.device)
        records = []
        for (name, variant), found in features.items():
            values = feature_distances(found, style[name], self.seed) if name == "kid" else {}
            if name == "cmmd":
                values["cmmd"] = cmmd(found, style[name])
            records += [self._record(variant, metric, value) for metric, value in values.items()]
        return records

    def _of_sets(self) -> dict[str, nn.Module]:
        """Networks of the distances between sets, by what they tell."""
        held = {"kid": self.judges.distribution, "cmmd": self.judges.embedding}
        return {name: frozen.module for name, frozen in held.items() if frozen is not None}

    def panels(self) -> dict[str, Tensor]:
        return {} if self._shown is None else {"restyled": self._shown}


def _kept(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a file; None where there is none that can be read."""
    try:
        return safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError):
        return None
