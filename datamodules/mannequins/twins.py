"""Photos of heads, and what a style makes of the same heads: the truth that stylization is measured by."""

from __future__ import annotations

from torch.utils.data import Dataset

from datamodules.mannequins.datamodule import MannequinDataModule
from datamodules.mannequins.dataset import Sample
from datamodules.mannequins.styles import PLAIN
from datamodules.resumable import SplitDataModule


class Twins(Dataset[Sample]):
    """Samples of photos, each with ``twin`` (V, 3, H, W), the same heads in a style."""

    def __init__(self, photos: Dataset[Sample], styled: Dataset[Sample]) -> None:
        self.photos, self.styled = photos, styled

    def __len__(self) -> int:
        return len(self.photos)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        return {**self.photos[index], "twin": self.styled[index]["image"]}


class MannequinTwins(SplitDataModule):
    """Held-out heads as photos and in a style, seen alike; and the style set that a generator was adapted to.

    Args:
        style: of the twins. exaggerate: strengths of geometric exaggerations of them, by name.
        test_subjects, val_subjects: heads. style_subjects: pictures of the style set, as ``train_subjects`` is of
            :class:`MannequinDataModule` in this style.
        first, size, batch_size, supersample, compiled, draw_workers, cache_dir, seed, coded, posed: as there.
    """

    def __init__(
        self,
        style: str = "toon",
        exaggerate: dict[str, float] | None = None,
        test_subjects: int = 40,
        val_subjects: int = 20,
        style_subjects: int = 40,
        first: int = 0,
        size: int = 64,
        batch_size: int = 8,
        supersample: int = 2,
        compiled: bool = False,
        draw_workers: int = 2,
        cache_dir: str | None = None,
        seed: int = 0,
        coded: bool = True,
        posed: bool = True,
    ) -> None:
        super().__init__(batch_size, 0, seed)
        self.photos, self.styled = (
            MannequinDataModule(
                style_subjects, val_subjects, test_subjects, size, 1, batch_size, styles=[name],
                supersample=supersample,
                compiled=compiled, draw_workers=draw_workers, cache_dir=cache_dir, seed=seed, coded=coded, posed=posed,
                first=first, exaggerate=more,
            )
            for name, more in ((PLAIN, None), (style, exaggerate))
        )  # fmt: skip

    def setup(self, stage: str | None = None) -> None:
        """Draw and open what ``stage`` needs, "test" or "validate"."""
        split = "val" if stage == "validate" else "test"
        for data in (self.photos, self.styled):
            data.setup("validate" if split == "val" else "test")
        self.datasets[split] = Twins(self.photos.datasets[split], self.styled.datasets[split])

    def style_set(self) -> Dataset[Sample]:
        """The pictures that a generator learns the style from."""
        self.styled.setup("fit")
        return self.styled.datasets["train"]
