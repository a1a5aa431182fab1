"""The artworks of an anchor artifact, for the stages that go on from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl

from datamodules.artworks import Artwork
from models import artifact
from models.anchors import AnchorSet
from models.errors import UserError
from models.image_io import read_image


class AnchoredArtworks(pl.LightningDataModule):
    """Artworks as the anchor stage framed and placed them, as ``items``.

    Args:
        path: the anchor artifact, or a folder that holds it as ``artifact/``.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.steps: Iterable[int] = ()  # of a per-artwork stage, which sets them when its fit starts
        self._items: list[Artwork] | None = None

    @property
    def items(self) -> list[Artwork]:
        """The artworks, sorted by id."""
        if self._items is None:
            source = artifact.load(self.path)
            anchors = source.module("anchors")
            if not isinstance(anchors, AnchorSet):
                raise UserError(f"{self.path} is not the result of galatea anchor")
            styles = _styles(source.extra.get("items"))
            self._items = [
                Artwork(
                    id=identity,
                    image=(image := read_image(source.media(f"reference_{identity}.png"))[0]),
                    label=None if (label := anchors[identity].label) is None else label[0],
                    original_size=(image.shape[1], image.shape[2]),
                    style=styles.get(identity),
                )
                for identity in anchors.ids
            ]
        return self._items

    def setup(self, stage: str) -> None:
        _ = self.items  # mistakes show before anything is computed

    def train_dataloader(self) -> Iterable[int]:
        return self.steps


def _styles(entries: Any) -> dict[str, str | None]:
    """Names of styles by id, where the artifact tells them."""
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
        return {}
    return {e["id"]: e["style"] for e in entries if isinstance(e.get("style"), str)}
