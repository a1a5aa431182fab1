"""Pictures in a style: as items, and beside photos that are shown in it."""

from __future__ import annotations

from torch.utils.data import Dataset

from datamodules.artworks import Artwork
from datamodules.items import ItemsDataModule
from datamodules.portraits import Portrait, PortraitDataModule, ids_of


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


class PhotosAndStyle(PortraitDataModule):
    """Photos, ``test_path``, to be shown in the style of the pictures of ``path``. Arguments as of the base."""

    def __init__(self, path: str, test_path: str, size: int = 256, batch_size: int = 8, workers: int = 0) -> None:
        super().__init__(path, None, test_path, 0.0, 0.0, size, batch_size, mirror=False, labels=False, workers=workers)

    def style_set(self) -> Dataset[Portrait]:
        """All pictures in the style."""
        self.setup("test")
        return self.datasets["train"]
