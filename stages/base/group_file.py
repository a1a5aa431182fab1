"""What a group's optimisation needs to continue, in one file: written atomically, the one before kept, verified."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from models.errors import UserError
from models.files import atomic_write, previous, versions

log = logging.getLogger(__name__)

_RECORD = "galatea"  # our key in the file's metadata
_FORMAT = 2


@dataclass
class Progress:
    """How far a group is.

    Attributes:
        step: optimisation steps done.
        finished: whether its results are written; then nothing else is kept.
        module: the state of what is optimised.
        optimizers: their states, by name.
        scaler: of float16 losses.
    """

    step: int
    finished: bool = False
    module: Mapping[str, Tensor] = field(default_factory=dict)
    optimizers: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


class GroupFile:
    """Reads and writes a group's :class:`Progress`.

    Args:
        path: a safetensors file; the one before stands beside it.
        identity: what the results depend on: a file of another identity is refused.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, {"format": _FORMAT, **identity}

    def read(self) -> tuple[Path, Progress] | None:
        """The newest file that is not damaged, and what it says; None when there is none. Tensors are on the CPU.

        Raises:
            UserError: when all are damaged, or it is of another identity.
        """
        files = versions(self.path)
        for file in files:
            try:
                with safetensors.safe_open(file, "pt") as handle:
                    record = json.loads(handle.metadata()[_RECORD])
                    tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                intact = record["sha256"] == _digest(tensors)
            except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError):
                intact = False
            if not intact:
                continue
            if record["identity"] != self.identity:
                raise UserError(f"{file} is of a run with other settings or inputs: choose another --out folder")
            return file, Progress(record["step"], record["finished"], **_unpack(record["state"], tensors))
        if files:
            names = " and ".join(map(str, files))
            verb, what = ("is", "it") if len(files) == 1 else ("are", "them")
            raise UserError(f"{names} {verb} damaged: remove {what} to start this group again")
        return None

    def resume(self) -> Progress | None:
        """As :meth:`read`; a damaged file is removed, so that it does not take the place of the good one."""
        if (found := self.read()) is None:
            return None
        file, progress = found
        if file != self.path and self.path.exists():
            log.warning("%s is damaged: continuing from %s, step %d", self.path, file, progress.step)
            self.path.unlink()
        return progress

    def write(self, progress: Progress) -> None:
        """Write ``progress``; a finished group's file stands alone.

        Raises:
            UserError: when it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        state = {name: value for name, value in vars(progress).items() if name not in ("step", "finished")}
        record = {"identity": self.identity, "step": progress.step, "finished": progress.finished}
        record["state"] = _pack({} if progress.finished else state, "", tensors)
        content = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        record["sha256"] = _digest(content)
        if progress.finished:
            previous(self.path).unlink(missing_ok=True)
        with atomic_write(self.path, keep=not progress.finished) as file:
            file.write_bytes(safetensors.torch.save(content, {_RECORD: json.dumps(record)}))


def _pack(tree: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """``tree`` for JSON: tensors by their place in it, mappings, whose keys may be numbers, as pairs."""
    if isinstance(tree, Tensor):
        tensors[place] = tree
        return {"tensor": place}
    if isinstance(tree, Mapping):
        below = f"{place}/" if place else ""
        return {"pairs": [[key, _pack(value, f"{below}{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_pack(value, f"{place}/{index}", tensors) for index, value in enumerate(tree)]
    return tree


def _unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_unpack(value, tensors) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    return {key: _unpack(value, tensors) for key, value in packed["pairs"]}


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and contents: safetensors notices a file that is cut off, not one with changed bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
