"""Photos in a style, in one pass each: as the style has them, in variations of it, and by a reference."""

from __future__ import annotations

import hashlib
import html
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from datamodules.artworks import Artwork
from models.encoders.base import Encoder, inverted
from models.errors import UserError
from models.features.base import Frozen, PerceptualDistance
from models.files import atomic_write
from models.generators.base import Generator
from models.heads.mixing import ReferenceSearch, first_code, mixed
from models.image import read_image, resized, write_image
from models.latents import Latents
from models.rendering.sheets import sheet
from stages.base.inversion import check_fit
from stages.base.ranks import gather
from stages.base.seeds import item_generator
from stages.base.stage import ArtifactRef, GeneratorRef, Stage

log = logging.getLogger(__name__)


class RestyleStage(Stage):
    """Pseudo-paired stylization's inference (Lu and Zhou, Sec. 3.3): w = E(photo), and pictures of it by G'.

    - general: G'(w).
    - variations: random codes, truncated, take the layers from a block on; the smaller its side, the more is theirs.
    - by a reference: likewise, with the code of a picture in the style, looked for once.

    Photos are read one after the other; one that cannot be read is named, left out, and makes the command fail at the
    end, when all others are done.

    Args:
        style: artifact and module of G'.
        encoder: artifact of the encoder to W of the generator that G' came from.
        samples: variations of each photo. mix_from: side of the block that theirs begin at, pixels.
        truncation: of the random codes.
        reference: a picture in the style; null for none. reference_from: as ``mix_from``, for the reference.
        search: how the reference's code is looked for. perceptual: its LPIPS.
        tile: side of a picture on the page, pixels.
        seed: of the variations, which are the same for all photos, and of the search.
    """

    name = "restyle"

    def __init__(
        self,
        style: GeneratorRef,
        encoder: ArtifactRef,
        samples: int = 4,
        mix_from: int = 16,
        truncation: float = 0.7,
        reference: str | None = None,
        reference_from: int = 16,
        search: ReferenceSearch = ReferenceSearch(),  # noqa: B008 - frozen
        perceptual: nn.Module | None = None,
        tile: int = 192,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if samples < 0 or not truncation > 0 or tile < 32:
            raise UserError("restyle: samples must not be negative, truncation above 0, and tile at least 32")
        if reference is not None and perceptual is None:
            raise UserError(
                "restyle: a reference's code is looked for by a perceptual distance: give --model.perceptual"
            )
        self.style, self.encoder_from, self.samples, self.mix_from = style, encoder, samples, mix_from
        self.truncation, self.reference, self.reference_from = truncation, reference, reference_from
        self.search, self.tile, self.seed = search, tile, seed
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.broken: list[str] = []
        self._shown: Tensor | None = None

    def build_model(self) -> None:
        self.generator = self.take("style", self.style.path, self.style.module, Generator).requires_grad_(False)
        self.encoder = self.take("encoder", self.encoder_from.path, "encoder", Encoder).requires_grad_(False)
        check_fit(self.encoder, self.generator)
        if self.generator.is_3d:
            raise UserError(f"{self.style.path} is a 3D generator: its heads are shown by invert and present")
        for side in (self.mix_from, self.reference_from):
            first_code(self.generator, side)
        self.eval()

    # -- codes ------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_predict_start(self) -> None:
        super().on_predict_start()
        z = [self.generator.sample_z(1, item_generator(self.seed, "variation", k)) for k in range(self.samples)]
        self._variations = [self.generator.mapping(one.to(self.device), truncation=self.truncation) for one in z]
        self._guide = None if self.reference is None else self._reference(self.reference)

    def _reference(self, path: str) -> Latents:
        """The reference's code, kept in ``OUT/references`` by all that it depends on."""
        picture = resized(read_image(path), self.generator.resolution).to(self.device)
        digest = hashlib.sha256(picture.cpu().numpy().tobytes())
        digest.update(f"{self.inputs['style'].id} {self.style.module} {self.search} {self.seed}".encode())
        file = self.out / "references" / f"{digest.hexdigest()[:16]}.safetensors"
        if not file.exists():
            log.info("%s: its code is looked for, %d steps", path, self.search.steps)
            assert self.perceptual is not None
            distance: PerceptualDistance = self.perceptual.module  # type: ignore[assignment]
            found = self.search.fit(self.generator, picture, distance, item_generator(self.seed, "reference", 0))
            content = {name: codes.cpu().contiguous() for name, codes in found.groups.items()}
            with atomic_write(file) as temporary:
                temporary.write_bytes(safetensors.torch.save(content))
        return Latents({name: t.to(self.device) for name, t in safetensors.torch.load_file(file).items()})

    def pictures(self, photo: Tensor) -> dict[str, Tensor]:
        """What becomes of photos (B, 3, H, W): pictures (B, 3, R, R) by name."""
        ws, _ = inverted(photo, self.encoder, self.generator)
        found = {"general": ws}
        for k, style in enumerate(self._variations, 1):
            found[f"sample{k}"] = mixed(ws, style.repeat_interleave(len(photo)), self.generator, self.mix_from)
        if self._guide is not None:
            guide = self._guide.repeat_interleave(len(photo))
            found["reference"] = mixed(ws, guide, self.generator, self.reference_from)
        return {name: self.generator.synthesis(codes).image.clamp(-1, 1) for name, codes in found.items()}

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
        for name, pictures in (shown := self.pictures(image)).items():
            for item, picture in zip(photos, pictures, strict=True):
                write_image(self.out / "items" / item.id / f"{name}.png", picture)
        for row, item in enumerate(photos):
            folder = self.out / "items" / item.id
            write_image(folder / "photo.png", image[row])
            tiles = [("photo", image[row]), *((name, pictures[row]) for name, pictures in shown.items())]
            write_image(folder / "row.png", contact := sheet([tiles], self.tile))
            self._shown = contact if self._shown is None else self._shown
            with atomic_write(folder / "item.json") as file:
                file.write_text(json.dumps({"id": item.id, "pictures": ["photo", *shown]}) + "\n")

    @torch.no_grad()
    def on_predict_epoch_end(self) -> None:
        """The page; then, where photos were left out, the failure that says so, on all ranks alike."""
        broken = gather(self.broken)
        if self.trainer.is_global_zero:
            with atomic_write(self.out / "index.html") as file:
                file.write_text(page(self.out, broken), encoding="utf-8")
        if broken:
            others = "the others are done" if any((self.out / "items").glob("*/item.json")) else "there are no others"
            more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise UserError(f"{broken[0]}{more}: left out, {others}")

    def panels(self) -> dict[str, Tensor]:
        return {} if self._shown is None else {"restyled": self._shown}


def page(out: Path, broken: Sequence[str]) -> str:
    """One row for each photo of ``OUT/items``: photo, general, variations, by reference."""
    rows = []
    for file in sorted((out / "items").glob("*/item.json")):
        item = json.loads(file.read_text("utf-8"))
        identity = html.escape(item["id"], quote=True)
        cells = "".join(
            f'<figure><img src="items/{identity}/{name}.png" alt="{name}" loading="lazy">'
            f"<figcaption>{name}</figcaption></figure>"
            for name in item["pictures"]
        )
        rows.append(f'<section id="{identity}"><h2>{identity}</h2><div>{cells}</div></section>')
    left = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in broken)
    notes = f"<h2>Left out</h2><ul>{left}</ul>" if broken else ""
    return _PAGE.replace("<!--rows-->", "\n".join(rows)).replace("<!--notes-->", notes)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Galatea: photos in a style</title>
<style>
  body { margin: 2rem; font: 15px/1.4 system-ui, sans-serif; background: #f7f5f0; color: #26221c }
  h1, h2 { font-weight: 600 } h2 { font-size: 1rem; margin: 1.2rem 0 .4rem }
  section > div { display: flex; flex-wrap: wrap; gap: .6rem }
  figure { margin: 0 } img { width: 160px; height: 160px; display: block; border-radius: 4px; image-rendering: auto }
  figcaption { font-size: .8rem; color: #6d665b; padding-top: .2rem }
</style>
<h1>Photos in a style</h1>
<!--notes-->
<!--rows-->
</html>
"""
