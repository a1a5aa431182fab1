"""Official files as data. Torch files, pickled networks and safetensors are read; nothing in them is run."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

from models.errors import one_line
from models.files import os_errors
from models.zoo import pickles
from models.zoo.family import Official, State, ZooError
from models.zoo.pickles import Attributes, Refused

_TOO_MANY = (
    1 << 15
)  # submodules and tensors of a file: only where one holds itself, or is many times there, are so many
_MOST_KEY = 512  # letters of a key
_MOST_HEADER = 1 << 23  # bytes of safetensors' list of tensors
_PARTS = ("_parameters", "_buffers", "_modules")
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
    if path.exists() and not path.is_file():
        raise ZooError(f"{path} is a pipe or a device, not a file of weights")
    if path.is_file() and path.suffix in (".whl", ".tgz"):
        raise ZooError(f"{path} is a package: name its family first")
    with os_errors(path, "read"), open(path, "rb") as stream:
        start = stream.read(24)
        stream.seek(0)
        if not start:
            raise ZooError(f"{path} is empty")
        for text, meaning in _NOT_A_FILE_OF_WEIGHTS.items():
            if start.startswith(text):
                raise ZooError(f"{path} is {meaning}")
        if start[8:9] == b"{":
            return _read_safetensors(path, stream)
        if not start.startswith((b"\x80", pickles.ZIP_MAGIC)):
            raise ZooError(f"{path} is not a torch file, a pickle or safetensors")
        try:
            return _Finds().official(pickles.load(stream))
        except Refused as error:
            raise ZooError(f"{path}: {error}") from error
        except Exception as error:  # of a damaged program for a stack machine, anything can come
            reason = f"{type(error).__name__}: {one_line(str(error)[:120])}"
            raise ZooError(f"{path} is damaged or cut short ({reason})") from error


def _read_safetensors(path: Path, stream: BinaryIO) -> Official:
    (size,) = struct.unpack("<Q", stream.read(8))
    if _MOST_HEADER < size < path.stat().st_size:
        raise ZooError(f"{path} has a header of {size >> 20} MB, which no file of weights has")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            values = dict(file.metadata() or {})
        return Official(_Finds().official({"": safetensors.torch.load_file(path)}).states, values)
    except Refused as error:
        raise ZooError(f"{path}: {error}") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ZooError(f"{path} is damaged or cut short: {one_line(str(error)[:120])}") from error


class _Finds:
    """What a file holds, found in its root; the same part may be there any number of times, and hold itself."""

    def __init__(self) -> None:
        self._left = _TOO_MANY

    def _count(self, number: int) -> None:
        self._left -= number
        if self._left < 0:
            raise Refused("a network in it holds itself, or it has more tensors than any official file")

    def official(self, root: Any) -> Official:
        """The state dicts and the values of a dictionary of them, or of one that is itself a state dict or network."""
        if not isinstance(root, dict):
            raise Refused(f"it holds a {type(root).__name__} where a dictionary of weights is expected")
        if self._is_state(root) or _is_network(root):
            root = {"": root}
        states: dict[str, State] = {}
        values: dict[str, Any] = {}
        self._count(len(root))
        for key, value in root.items():
            name = _checked(str(key))
            if _is_network(value):
                states[name], values[name] = self._network(value)
            elif self._is_state(value):
                states[name] = dict(value)
            else:
                values[name] = value
        return Official(states, values)

    def _is_state(self, value: Any) -> bool:
        if not isinstance(value, dict) or not value or not isinstance(next(iter(value.values())), Tensor):
            return False
        self._count(len(value))
        return all(
            isinstance(key, str) and isinstance(tensor, Tensor) and _checked(key) for key, tensor in value.items()
        )

    def _network(self, network: Attributes) -> tuple[State, dict[str, Any]]:
        """Its tensors, as ``nn.Module.state_dict`` in its order, and how :class:`Official` describes it."""
        state: State = {}
        parts: dict[str, dict[str, Any]] = {}
        modules = [("", network)]
        while modules:
            prefix, module = modules.pop()
            self._count(1)
            if not (isinstance(module, Attributes) and all(isinstance(module.get(k), dict) for k in _PARTS)):
                raise Refused(f"the part {prefix!r} of a network is not a network")
            self._count(sum(len(module[kind]) for kind in _PARTS))
            parts[prefix.removesuffix(".")] = _description(module)
            transient = module.get("_non_persistent_buffers_set")
            for kind in ("_parameters", "_buffers"):
                for key, tensor in module[kind].items():
                    if tensor is None or (kind == "_buffers" and isinstance(transient, set) and key in transient):
                        continue
                    if not isinstance(tensor, Tensor):
                        raise Refused(f"a network has a {type(tensor).__name__} where a tensor is expected")
                    state[_checked(prefix + key)] = tensor
            if len(prefix) > _MOST_KEY:
                raise Refused(f"a network in it holds itself, or has parts with names of {len(prefix)} letters")
            children = [(f"{prefix}{key}.", part) for key, part in module["_modules"].items() if part is not None]
            modules += reversed(children)
        described = parts.pop("")
        return state, described | {"modules": parts}


def _checked(key: str) -> str:
    if len(key) > _MOST_KEY:
        raise Refused(f"it has a key of {len(key)} letters: {key[:40]!r}...")
    return key


def _is_network(value: Any) -> bool:
    return isinstance(value, Attributes) and value.keys() >= set(_PARTS)


def _description(network: Attributes) -> dict[str, Any]:
    return {
        "class_name": network.class_name,
        "init_args": network.get("_init_args", ()),
        "init_kwargs": network.get("_init_kwargs", {}),
        "attributes": {key: value for key, value in network.items() if not key.startswith("_")},
    }
