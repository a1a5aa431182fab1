"""Official files as data. Torch files, pickled networks and safetensors are read; nothing in them is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from models.errors import one_line
from models.files import os_errors
from models.zoo import pickles
from models.zoo.family import Official, State, ZooError
from models.zoo.pickles import Attributes, Refused

_TOO_MANY = 1 << 20  # submodules of one network: only a network that holds itself has as many
_NOT_A_FILE_OF_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer: the file itself was not downloaded",
    b"<": "a web page: the download went wrong",
}


def read(*paths: str | os.PathLike[str]) -> Official:
    """What official files hold; several files are those of one model, as :class:`Official` describes.

    Args:
        paths: torch files of any age (``.pt``, ``.pth``), pickles of whole networks (``.pkl``), safetensors.

    Raises:
        ZooError: for a file that cannot be read, is damaged, or holds anything but data.
        UserError: for a file that cannot be opened.
    """
    if len(paths) == 1:
        return _read(Path(paths[0]))
    states: dict[str, State] = {}
    values: dict[str, Any] = {}
    for stem, path in _stems([Path(path) for path in paths]).items():
        official = _read(path)
        states |= {f"{stem}/{name}".removesuffix("/"): state for name, state in official.states.items()}
        values |= {f"{stem}/{name}".removesuffix("/"): value for name, value in official.values.items()}
    return Official(states, values)


def _stems(paths: list[Path]) -> dict[str, Path]:
    stems = [path.stem for path in paths]
    names = [
        f"{path.resolve().parent.name}/{stem}" if stems.count(stem) > 1 else stem
        for path, stem in zip(paths, stems, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ZooError(f"two of the files have the same name and folder name: {max(names, key=names.count)}")
    return dict(zip(names, paths, strict=True))


def _read(path: Path) -> Official:
    if path.is_dir():
        raise ZooError(f"{path} is a folder, not a file of weights")
    with os_errors(path, "read"), open(path, "rb") as stream:
        start = stream.read(24)
        stream.seek(0)
        if not start:
            raise ZooError(f"{path} is empty")
        for text, meaning in _NOT_A_FILE_OF_WEIGHTS.items():
            if start.startswith(text):
                raise ZooError(f"{path} is {meaning}")
        if start[8:9] == b"{":
            return _read_safetensors(path)
        if not start.startswith((b"\x80", pickles.ZIP_MAGIC)):
            raise ZooError(f"{path} is not a torch file, a pickle or safetensors")
        try:
            return _official(pickles.load(stream))
        except Refused as error:
            raise ZooError(f"{path}: {error}") from error
        except Exception as error:  # of a damaged program for a stack machine, anything can come
            reason = f"{type(error).__name__}: {one_line(error)[:120]}"
            raise ZooError(f"{path} is damaged or cut short ({reason})") from error


def _read_safetensors(path: Path) -> Official:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            values = dict(file.metadata() or {})
        return Official({"": safetensors.torch.load_file(path)}, values)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ZooError(f"{path} is damaged or cut short: {one_line(error)[:120]}") from error


def _official(root: Any) -> Official:
    if not isinstance(root, dict):
        raise Refused(f"it holds a {type(root).__name__} where a dictionary of weights is expected")
    if _is_state(root) or _is_network(root):
        root = {"": root}
    states: dict[str, State] = {}
    values: dict[str, Any] = {}
    for name, value in root.items():
        if _is_network(value):
            states[str(name)] = _state_of_network(value)
            values[str(name)] = _description(value)
        elif _is_state(value):
            states[str(name)] = dict(value)
        else:
            values[str(name)] = value
    return Official(states, values)


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _is_network(value: Any) -> bool:
    return isinstance(value, Attributes) and value.keys() >= {"_parameters", "_buffers", "_modules"}


def _state_of_network(network: Attributes) -> State:
    """As ``nn.Module.state_dict``, in its order."""
    state: State = {}
    modules = [("", network)]
    for _ in range(_TOO_MANY):
        if not modules:
            return state
        prefix, module = modules.pop()
        transient = module.get("_non_persistent_buffers_set", ())
        buffers = {key: tensor for key, tensor in module["_buffers"].items() if key not in transient}
        for key, tensor in {**module["_parameters"], **buffers}.items():
            if tensor is not None:
                state[prefix + key] = tensor
        children = [(f"{prefix}{key}.", child) for key, child in module["_modules"].items() if child is not None]
        modules += reversed(children)
    raise Refused("a network in it holds itself")


def _description(network: Attributes) -> dict[str, Any]:
    return {
        "class_name": network.class_name,
        "init_args": network.get("_init_args", ()),
        "init_kwargs": network.get("_init_kwargs", {}),
        "attributes": {key: value for key, value in network.items() if not key.startswith("_")},
    }
