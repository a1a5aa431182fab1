"""Photos one after the other, however many there are: each is read when its turn comes."""

from __future__ import annotations

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset

from datamodules.artworks import Artwork, ArtworkSource
from datamodules.framing import Crop, Edits, recipe_of
from datamodules.resumable import evaluation_loader
from models.errors import UserError
from models.image import MIN_SIDE


class Photos(Dataset[Artwork | str]):
    """Framed photos by number; of one that cannot be read the sentence that says why.

    Args:
        source: of the photos.
    """

    def __init__(self, source: ArtworkSource) -> None:
        self.source, self.ids = source, sorted(source.entries)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Artwork | str:
        try:
            return self.source.read(self.ids[index])
        except UserError as error:
            return str(error)


class PhotoDataModule(pl.LightningDataModule):
    """A photo, or a folder of any number of them, for stages that take them in one pass.

    Args:
        path, size, crop, recipe, face, points: as of :class:`datamodules.artworks.ArtworkDataModule`.
        batch_size: photos a batch.
        workers: loader processes.
    """

    def __init__(
        self,
        path: str,
        size: int | None = None,
        crop: Crop = "auto",
        recipe: str = "embedded",
        face: int | None = None,
        points: str | None = None,
        batch_size: int = 8,
        workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise UserError("data: batch_size must be at least 1 and workers at least 0")
        if size is not None and size < MIN_SIDE:
            raise UserError(f"data.size is {size}: photos are framed with at least {MIN_SIDE} pixels a side")
        self.path, self.size, self.recipe, self.batch_size, self.workers = path, size, recipe, batch_size, workers
        self.crop: Crop = crop
        self.given = Edits(points=points, face=face)
        self.photos: Photos | None = None

    @property
    def side(self) -> int:
        """Of the framed photos, pixels."""
        return self.size or recipe_of(self.recipe).size

    def setup(self, stage: str) -> None:
        """List the photos; none is read yet."""
        self.photos = Photos(ArtworkSource(self.path, self.given, self.size, self.crop, self.recipe))

    def framed(self, path: str) -> Artwork:
        """One more picture, framed as the photos are.

        Raises:
            UserError: when it cannot be, or ``path`` holds several.
        """
        source = ArtworkSource(path, None, self.size, self.crop, self.recipe)
        if len(source.entries) != 1:
            raise UserError(f"{path} has {len(source.entries)} pictures: name one")
        return source.read(next(iter(source.entries)))

    def predict_dataloader(self) -> DataLoader[Artwork | str]:
        """Batches as lists, each photo on one rank."""
        assert self.photos is not None
        return evaluation_loader(
            self.photos, self.batch_size, trainer=self.trainer, collate_fn=list, num_workers=self.workers
        )

    def test_dataloader(self) -> DataLoader[Artwork | str]:
        """As the photos of predict."""
        return self.predict_dataloader()
