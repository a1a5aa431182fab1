"""Where the weights of a feature network come from, and the one sentence said when they are not there."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Protocol, runtime_checkable

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models import artifact
from models.errors import UserError, one_line
from models.files import resolve

EMBEDDED_FOLDER = "assets/features"
_OFFLINE_VARIABLES = ("GALATEA_OFFLINE", "HF_HUB_OFFLINE")


class MissingWeightsError(UserError):
    """A network's weights are not on this machine and cannot be fetched.

    Attributes:
        network: which one. file: of its weights. source: where its owners publish it.
    """

    def __init__(self, network: str, file: str | os.PathLike[str], source: str, key: str, reason: str) -> None:
        self.network, self.file, self.source = network, os.fspath(file), source
        super().__init__(
            f"{network} has no weights: {reason} {self.file}; get it from {source} and give its path as {key}"
        )


@runtime_checkable
class NeedsWeights(Protocol):
    """A feature network whose weights do not come with us."""

    @staticmethod
    def missing(*, weights: str) -> MissingWeightsError | None:
        """What would be missing with these arguments of its constructor; None when it is on this machine."""
        ...


def load_weights(module: nn.Module, kind: str, weights: str) -> None:
    """Fill an embedded network, strictly.

    Args:
        module: the network.
        kind: its name in an artifact.
        weights: "embedded" for the shipped artifact, the folder of another one, or a safetensors file.

    Raises:
        MissingWeightsError: when there is no such file.
        UserError: when the file does not fit the network.
    """
    place = resolve(EMBEDDED_FOLDER if weights == "embedded" else weights)
    name = type(module).__name__
    if not place.exists():
        source = "the training described in configs/stages/features.yaml"
        raise MissingWeightsError(name, place, source, f"{kind}.init_args.weights", "there is no")
    try:
        if place.is_dir():
            tensors = artifact.load(place).tensors(kind)
        else:
            tensors = safetensors.torch.load_file(place)
        module.load_state_dict(tensors, strict=True)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{place} does not hold the weights of {name}: {one_line(error)}") from error


def read_state(path: Path, network: str) -> dict[str, Tensor]:
    """A bare state dict of a ``.safetensors`` or ``torch.save`` file, read without running its pickled code.

    Raises:
        UserError: when the file is neither.
    """
    from models.zoo.reading import read  # here: the zoo knows networks of this room

    try:
        official = read(path)
    except UserError as error:
        raise UserError(f"{path} cannot be read as weights of {network}: {one_line(error)[:200]}") from error
    if list(official.states) != [""] or any(isinstance(value, Tensor) for value in official.values.values()):
        raise UserError(f"{path} does not hold a plain state dict of {network}")
    return official.states[""]


def hub_file(name: str) -> Path:
    """Where torch.hub keeps a downloaded checkpoint (follows TORCH_HOME)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def offline_reason(host: str, timeout: float = 1.0) -> str:
    """Why a download from ``host`` must not be tried: a phrase that a file's path completes, or "" when it may.

    Offline mode is set by a non-empty, non-zero ``GALATEA_OFFLINE`` or ``HF_HUB_OFFLINE``. Otherwise the host's name
    is resolved with a time limit in seconds, since the libraries themselves retry for most of a minute.
    """
    if any(os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off") for name in _OFFLINE_VARIABLES):
        return "offline mode is set and there is no"
    resolved = threading.Event()

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, 443)
            resolved.set()
        except OSError:
            pass

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(timeout)
    return "" if resolved.is_set() else "there is no network and no"
