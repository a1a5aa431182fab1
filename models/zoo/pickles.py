"""Pickles and torch files as data: what they hold, with nothing of them run.

A pickle is a program for a stack machine whose only way out is to name a Python function or class. Here a name leads
to a stand-in of this file, which makes a tensor or a container of what it is given, or is refused; nothing is ever
imported for a file. What is left to a file is to use up memory or the C stack: sizes are believed only as far as there
are bytes, copies are counted, and keys are plain.

Formats: Python's pickletools; torch/serialization.py for its two containers, a zip archive (``data.pkl``, ``data/KEY``)
and, before torch 1.6, five pickles followed by raw numbers.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_OVERLAPPING = 1 << 24  # elements that a tensor may have beyond its storage's (an expanded one)

_DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip

OpenStorage = Callable[[torch.dtype, str, int, Any], Tensor]
"""(dtype, key, elements, view of legacy files) -> (elements,)."""


class Refused(pickle.UnpicklingError):
    """The file is, or does, something that data does not."""


class Attributes(dict[str, Any]):
    """An object of a class that is not imported: its attributes. Each class gets an empty subclass of its name."""

    def __init__(self, *_arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # (__dict__, slots)
            if part is not None and not isinstance(part, dict):
                raise Refused(f"an object has a {type(part).__name__} for attributes")
            self.update(part or {})

    @property
    def class_name(self) -> str:
        """Of the class that was not imported, without its module."""
        return type(self).__name__


class _Ordered(dict[Any, Any]):
    """An ``OrderedDict`` or other dictionary without the attributes it may carry (``_metadata``)."""

    def __init__(self, items: Any = ()) -> None:
        super().__init__()
        for key, value in items.items() if isinstance(items, dict) else _sequence(items):
            self[_plain(key)] = value

    def __setstate__(self, state: Any) -> None:
        pass


class _ArrayType:
    """A ``numpy.dtype`` of numbers."""

    def __init__(self, code: str, *_flags: Any) -> None:
        if not re.fullmatch(r"[<>|=]?[biufc]\d\d?", code):
            raise Refused(f"it holds an array of {code[:20]!r}, only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder("=" if state[1] == "|" else state[1])


def load(stream: io.BufferedIOBase) -> Any:
    """The object in a pickle, or in a torch file of either format, at the start of a seekable stream.

    Numpy arrays and parameters become tensors, all else as the file's own classes name it stays a number, string,
    list, tuple, set or dictionary; objects become :class:`Attributes`.

    Raises:
        Refused: naming what is not data.
        Exception: of any kind, where the file is damaged.
    """
    magic = stream.read(4)
    stream.seek(0)
    if magic == ZIP_MAGIC:
        return _load_zip(stream)
    root = Unpickler(stream).load()
    return _load_legacy(stream) if isinstance(root, int) and root == _LEGACY_MAGIC else root


def _load_zip(stream: io.BufferedIOBase) -> Any:
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        roots = [entry.filename for entry in entries if re.fullmatch(r"(.*/)?data\.pkl", entry.filename)]
        if len(roots) != 1:
            raise Refused("it is a zip archive, but not one of torch")
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > _size(stream):
            raise Refused("it is a zip archive that unpacks to more than its size, torch stores tensors as they are")
        folder = roots[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise Refused("its numbers are big-endian")
        buffers: dict[str, bytearray] = {}

        def open_storage(dtype: torch.dtype, key: str, elements: int, _view: Any) -> Tensor:
            if key not in buffers:
                buffers[key] = bytearray(archive.read(f"{folder}data/{key}"))
            if len(buffers[key]) != elements * dtype.itemsize:
                raise Refused(f"the storage {key[:20]!r} has {len(buffers[key])} bytes, not {elements} {dtype}")
            return torch.frombuffer(buffers[key], dtype=dtype) if elements else torch.empty(0, dtype=dtype)

        return Unpickler(io.BytesIO(archive.read(roots[0])), open_storage).load()


def _load_legacy(stream: io.BufferedIOBase) -> Any:
    """What follows the magic number: protocol, system, object, keys of storages, and their numbers."""
    protocol, system = (Unpickler(stream).load() for _ in range(2))
    if protocol != 1001 or not system["little_endian"]:
        raise Refused("it is a big-endian torch file, or of an unknown protocol")
    storages: dict[str, Tensor] = {}
    left = _size(stream)

    def open_storage(dtype: torch.dtype, key: str, elements: int, view: Any) -> Tensor:
        nonlocal left
        if key not in storages:
            left -= elements * dtype.itemsize
            if elements < 0 or left < 0:
                raise Refused("it claims more numbers than it has bytes")
            storages[key] = torch.empty(elements, dtype=dtype)
        if view is None:
            return storages[key]
        _, start, length = view
        return storages[key][start : start + length]

    root = Unpickler(stream, open_storage).load()
    keys = _sequence(Unpickler(stream).load())
    if sorted(keys) != sorted(storages):
        raise Refused("the storages it lists are not those it uses")
    for key in keys:
        numbers = storages[key].view(torch.uint8).numpy().data
        (elements,) = struct.unpack("<q", stream.read(8))
        if elements != len(storages[key]) or stream.readinto(numbers) != len(numbers):
            raise Refused("it is cut short")
    return root


class Unpickler(pickle._Unpickler):
    """Python's own stack machine (the C one lets a file size its tables), with every way out replaced."""

    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BufferedIOBase, open_storage: OpenStorage | None = None) -> None:
        super().__init__(file, encoding="latin1")  # strings of Python 2 may hold bytes
        self._open_storage = open_storage
        self._copies_left = 4 * _size(file) + (1 << 20)

    def find_class(self, module: str, name: str) -> Any:
        module = _MOVED.get(module, module).replace("numpy._core", "numpy.core")
        path = f"{module}.{name}"
        if path in _NAMES:
            return _NAMES[path]
        storage = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage", path)
        if storage and storage[1] in _DTYPES:
            return _DTYPES[storage[1]]
        if _OBJECTS.fullmatch(path):
            return type(name, (Attributes,), {})
        raise Refused(f"it asks for {path[:80]!r}, which is not data: nothing of it was run")

    def persistent_load(self, pid: Any) -> Tensor:
        if self._open_storage is None or not isinstance(pid, tuple) or pid[0] != "storage":
            raise Refused("it refers to something outside itself")
        _, dtype, key, _location, elements, *view = pid
        return self._open_storage(dtype, str(_plain(key)), elements, view[0] if view else None)

    # Below, the operations that would let a file copy without end, set attributes of a class or function, or hash a
    # million times nested tuple, which overflows the C stack.

    def _charge(self, arguments: Any) -> None:
        self._copies_left -= sum(len(a) for a in arguments if isinstance(a, list | tuple | dict | str | bytes))
        if self._copies_left < 0:
            raise Refused("it copies its parts over and over")

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self._charge(arguments)
        self.stack[-1] = self.stack[-1](*arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        self._charge(state if isinstance(state, tuple) else (state,))
        if isinstance(target := self.stack[-1], Tensor):
            _fill_array(target, state)
        elif isinstance(target, Attributes | _Ordered | _ArrayType):
            target.__setstate__(state)
        else:
            raise Refused(f"it sets attributes of a {type(target).__name__}")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _setitems(self) -> None:
        self._put(self.pop_mark())

    def _put(self, items: list[Any]) -> None:
        if not isinstance(target := self.stack[-1], dict):
            raise Refused(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain(key)] = value

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._put(items)

    def _additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(target := self.stack[-1], set):
            raise Refused(f"it adds to a {type(target).__name__}")
        target.update(map(_plain, items))

    def _frozenset(self) -> None:
        self.stack.append(frozenset(map(_plain, self.pop_mark())))

    def _bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.stack.append(self.read(size))

    def _refuse(self) -> None:
        raise Refused("it uses copyreg extensions or buffers outside itself")

    dispatch = {  # type: ignore[assignment]
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
        pickle.BYTEARRAY8[0]: _bytearray8,
        pickle.EXT1[0]: _refuse,
        pickle.EXT2[0]: _refuse,
        pickle.EXT4[0]: _refuse,
        pickle.NEXT_BUFFER[0]: _refuse,
    }


def _size(stream: io.BufferedIOBase) -> int:
    position = stream.tell()
    size = stream.seek(0, io.SEEK_END)
    stream.seek(position)
    return size


def _plain(key: Any) -> Any:
    if not isinstance(key, str | bytes | int | float | None):
        raise Refused(f"it uses a {type(key).__name__} as a key")
    return key


def _sequence(value: Any = ()) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise Refused(f"it makes a sequence of a {type(value).__name__}")
    return value


def _set(values: Any = ()) -> set[Any]:
    return set(map(_plain, _sequence(values)))


def _bytes(value: str | bytes = b"", encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "utf-8", "ascii"):
        raise Refused("it holds text of another encoding")
    return value if isinstance(value, bytes) else value.encode(encoding)


def _object(cls: Any, *_base_and_state: Any) -> Any:
    """``copyreg._reconstructor(class, base, state)`` and ``copyreg.__newobj__(class, *args)``."""
    if not (isinstance(cls, type) and issubclass(cls, Attributes)):
        raise Refused("it makes an object of no class")
    return cls()


def _persistent(meta: Any) -> Attributes:
    """EG3D's ``torch_utils.persistence``: the object's state, without the source text it comes with."""
    made = type(meta["class_name"], (Attributes,), {})()
    made.__setstate__(meta["state"])
    return made


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_rest: Any) -> Tensor:
    if not all(isinstance(side, int) for side in size) or math.prod(size) > max(storage.numel(), _OVERLAPPING):
        raise Refused("a tensor claims more numbers than its storage has")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _typed_tensor(
    storage: Tensor,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    return _tensor(storage.view(dtype), offset, size, stride)


def _first(value: Any, *_rest: Any) -> Any:
    return value


def _tensor_of_type(function: Callable[..., Any], _type: Any, arguments: tuple[Any, ...], _state: Any) -> Any:
    return function(*arguments)


def _array(data: Any, kind: _ArrayType, shape: Any, order: str) -> Tensor:
    if isinstance(data, list):
        raise Refused("it holds an array of objects, only numbers are read")
    array = np.frombuffer(_bytes(data), kind.dtype).reshape(shape, order="F" if order == "F" else "C")
    return torch.from_numpy(array.astype(kind.dtype.newbyteorder("=")))


def _empty_array(*_type_shape_code: Any) -> Tensor:
    return torch.empty(0)


def _fill_array(target: Tensor, state: Any) -> None:
    _version, shape, kind, fortran, data = state
    target.data = _array(data, kind, shape, "F" if fortran else "C")


def _scalar(kind: _ArrayType, data: Any) -> Any:
    return _array(data, kind, (), "C").item()


def _nested(data: bytes) -> Any:
    return load(io.BytesIO(data))


_MOVED = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_OBJECTS = re.compile(
    r"argparse\.Namespace|munch\.Munch|(training|dnnlib|torch_utils|torch\.nn\.modules|torch_ema)\.[\w.]+", re.ASCII
)
"""Classes whose objects are read as attributes: options, EG3D's networks, averages of parameters."""

_NAMES: dict[str, Any] = {
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.list": _sequence,
    "builtins.tuple": _sequence,
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "builtins.complex": complex,
    "builtins.dict": _Ordered,
    "_codecs.encode": _bytes,
    "collections.OrderedDict": _Ordered,
    "collections.Counter": _Ordered,
    "collections.defaultdict": lambda *_factory: _Ordered(),
    "copyreg._reconstructor": _object,
    "copyreg.__newobj__": _object,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.Size": _sequence,
    "torch.device": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch.storage._load_from_bytes": _nested,
    "numpy.dtype": _ArrayType,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
    **{str(dtype): dtype for dtype in _DTYPES.values()},
    # Only ever arguments of the above:
    **dict.fromkeys(("builtins.object", "numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter")),
}
