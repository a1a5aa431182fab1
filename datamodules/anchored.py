"""The artworks of an anchor artifact, for the stages that go on from it."""

from __future__ import annotations

from typing import Any

from datamodules.artworks import Artwork
from datamodules.items import ItemsDataModule
from models import artifact
from models.errors import UserError
from models.heads.codes import HeadCodes
from models.heads.index import read_index
from models.image import read_image


class AnchoredArtworks(ItemsDataModule[Artwork]):
    """Artworks as the anchor stage framed and placed them.

    Args:
        path: the anchor artifact, or a folder that holds it as ``artifact/``.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def read_items(self) -> list[Artwork]:
        source = artifact.load(self.path)
        anchors = source.module("anchors")
        if not isinstance(anchors, HeadCodes):
            raise UserError(f"{self.path} is not the result of galatea anchor")
        artworks = {entry.id: entry.artwork for entry in read_index(source.manifest) if entry.artwork is not None}
        if missing := [identity for identity in anchors.ids if identity not in artworks]:
            raise UserError(f"{self.path} does not hold the artwork of {missing[0]}")
        styles = _styles(source.extra.get("items"))
        return [
            Artwork(
                id=identity,
                image=(image := read_image(source.media(artworks[identity]))[0]),
                label=None if (label := anchors[identity].label) is None else label[0],
                original_size=(image.shape[1], image.shape[2]),
                style=styles.get(identity),
            )
            for identity in anchors.ids
        ]


def _styles(entries: Any) -> dict[str, str | None]:
    """Names of styles by id, where the artifact tells them."""
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
        return {}
    return {e["id"]: e["style"] for e in entries if isinstance(e.get("style"), str)}
