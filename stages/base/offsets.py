"""Offsets of single heads in a stage: whose pictures they are found by, and how the moved heads are handed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from models.errors import UserError
from models.features.base import Frozen, FrozenHolder, network_name
from models.files import atomic_write
from models.heads.codes import HeadCode
from models.heads.directions import Directions
from models.heads.offsets import OffsetSearch
from models.latents import Latents
from models.losses.offsets import OffsetLoss
from models.names import item_id

MORE, LESS = "-more", "-less"  # how ids of moved heads end


class HeadOffsets(FrozenHolder):
    """Finds offsets of heads that keep who they are (3D cartoon faces, Sec. III-C).

    Args:
        search: how. loss: by what.
        recognition: who is shown, with early features (:class:`models.features.base.FaceRecognition`).
        parser: where the face is (:class:`models.features.base.FaceParser`).

    Raises:
        UserError: when one of the networks is missing, or is not what is needed.
    """

    def __init__(
        self, search: OffsetSearch, loss: OffsetLoss, recognition: nn.Module | None, parser: nn.Module | None
    ) -> None:
        if recognition is None or parser is None:
            raise UserError("offsets are found by who is shown and where the face is: --model.identity, --model.parser")
        if not callable(getattr(recognition, "early", None)):
            raise UserError(f"{type(recognition).__name__} shows no early features, which model.offset_loss compares")
        if not isinstance(getattr(parser, "segments", None), tuple | list):
            raise UserError(f"model.parser is {type(parser).__name__}: it must be a face parser, which has segments")
        loss.rows(parser)  # type: ignore[arg-type]
        self.search, self.loss = search, loss
        self.recognition, self.parser = Frozen(recognition), Frozen(parser)

    @property
    def network(self) -> str:
        """The name of what tells who is shown."""
        return network_name(self.recognition.module)

    def __call__(self, ws: Latents, directions: Directions, name: str, render: Callable[[Latents], Tensor]) -> Latents:
        """Offsets (B, n, w) of each group, for B heads at once, from a direction on.

        Args:
            render: pictures (B, 3, H, W) of B heads by the generator whose pictures the loss sees.
        """
        start = directions.shift(name, directions.deviations(name, self.search.strength))
        device = next(iter(ws.groups.values())).device.type
        with torch.autocast(device, enabled=False):  # a few steps, whose small gradients half precision would lose
            with torch.no_grad():
                before = render(ws)
            networks = self.recognition.module, self.parser.module
            offsets, _ = self.search.fit(ws, start, lambda moved: self.loss(render(moved), before, *networks))  # type: ignore[arg-type]
        return offsets

    def likeness(self, image: Tensor, before: Tensor) -> Tensor:
        """Cosine (B,) of who is shown by pictures (B, 3, H, W)."""
        return torch.cosine_similarity(self.recognition(image), self.recognition(before), dim=1)


def write_offsets(file: Path, ws: Latents, offsets: Mapping[str, Latents]) -> None:
    """Codes of heads, and their offsets (B, n, w) by direction in the order of the directions, as safetensors."""
    found = {f"codes_{group}": t for group, t in ws.groups.items()}
    for k, offset in enumerate(offsets.values()):
        found |= {f"{k}_{group}": t for group, t in offset.groups.items()}
    with atomic_write(file) as written:
        written.write_bytes(safetensors.torch.save({key: t.float().cpu().clone() for key, t in found.items()}))


def read_offsets(file: Path, directions: Directions) -> Iterator[tuple[Latents, dict[str, Latents]]]:
    """Of each head that :func:`write_offsets` has written its codes, a batch of one, and its offsets by direction."""
    read = safetensors.torch.load_file(file)

    def codes(key: object, row: int) -> Latents:
        return Latents({group: read[f"{key}_{group}"][row : row + 1] for group in directions.groups})

    for row in range(len(next(iter(read.values())))):
        yield codes("codes", row), {name: codes(k, row) for k, name in enumerate(directions.names)}


def edited_heads(
    ws: Latents, offsets: Mapping[str, Latents], head: str, label: Tensor | None, expressions: int
) -> dict[str, HeadCode]:
    """A head as it is, and moved along each offset and against it: w, w + dw, w - dw.

    Args:
        ws: a batch of one. offsets: by direction. head: its id.
        label: (1, 25) of the camera that it is seen by, None in 2D. expressions: coefficients of the generator.

    Returns:
        codes by id: "00000007", "00000007-smile-more", "00000007-smile-less".
    """
    moved = {head: ws}
    for name, offset in offsets.items():
        kept = item_id(f"{name}.png")  # an id names files
        moved |= {f"{head}-{kept}{MORE}": ws + offset, f"{head}-{kept}{LESS}": ws - offset}
    neutral = torch.zeros(1, expressions)
    return {i: HeadCode(codes.map(lambda t: t.contiguous()), None, neutral, label) for i, codes in moved.items()}


def moved_heads(ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """Which heads are others that were moved, as :func:`edited_heads` calls them.

    Returns:
        by what was done ("smile", "less smile"), ids of moved heads by those of the heads that they are.
    """
    known, found = set(ids), dict[str, dict[str, str]]()
    for moved in sorted(known):
        for end, what in ((MORE, "{}"), (LESS, "less {}")):
            bare = moved.removesuffix(end)
            heads = [head for head in known if bare.startswith(f"{head}-")] if bare != moved else []
            if heads:
                head = max(heads, key=len)
                found.setdefault(what.format(bare.removeprefix(f"{head}-")), {})[head] = moved
    return found
