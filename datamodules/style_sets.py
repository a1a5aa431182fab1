"""A style set as items: each picture that a fit learns from, by itself."""

from __future__ import annotations

from datamodules.artworks import Artwork
from datamodules.items import ItemsDataModule
from datamodules.portraits import PortraitDataModule, ids_of


class StyleSet(ItemsDataModule[Artwork]):
    """The training pictures of :class:`datamodules.portraits.PortraitDataModule`, none of which is mirrored.

    Args:
        path, val_fraction, test_fraction, size, labels: as there. The same values leave out the same pictures.
    """

    def __init__(
        self,
        path: str,
        val_fraction: float = 0.02,
        test_fraction: float = 0.02,
        size: int = 256,
        labels: bool = True,
    ) -> None:
        super().__init__()
        self.portraits = PortraitDataModule(
            path, val_fraction=val_fraction, test_fraction=test_fraction, size=size, mirror=False, labels=labels
        )

    def read_items(self) -> list[Artwork]:
        self.portraits.setup("fit")
        pictures, side = self.portraits.datasets["train"], self.portraits.size
        found = []
        for row, identity in enumerate(ids_of(pictures.names)):
            item = pictures[row]
            label = item["label"][0] if "label" in item else None
            found.append(Artwork(identity, item["image"][0], label, (side, side)))
        return found
