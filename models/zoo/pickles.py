"""Pickles and torch files as data: what they hold, with nothing of them run.

A pickle is a program for a stack machine whose only way out is to name a Python function or class. Here a name leads
to a stand-in of this file, which makes a tensor or a container of what it is given, or is refused; nothing is ever
imported for a file. What is left to a file is to use up memory, time or the C stack: so one :class:`Budget` pays for
every operation and copy of a file and of the files inside it, sizes are believed only as far as there are bytes,
numbers are short and keys are plain.

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
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

MOST_STEPS = 1 << 21
"""Operations and copied elements of one file; those of the official files are some ten thousand."""
_CALL, _TENSOR = 4, 16  # steps, by the memory that an object or a tensor takes
_MOST_NUMBERS_AS_KEYS = 1 << 14  # whose hashes a file can choose to be alike
_MOST_NESTED = 4
_MOST_KEY, _MOST_NAME = 1024, 256  # letters
_MOST_LINE, _MOST_LONG = 128, 32  # bytes of a number
_MOST_AXES = 16
_MOST_DIRECTORY = 1 << 23  # bytes of a zip archive's list of members

_DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip

OpenStorage = Callable[[torch.dtype, str, int, Any], Tensor]
"""(dtype, key, elements, view of legacy files) -> (elements,)."""


class Refused(pickle.UnpicklingError):
    """The file is, or does, something that data does not."""


class Budget:
    """What reading a file of ``size`` bytes may cost, the files inside it included.

    Raises:
        Refused: from its methods, when it is spent.
    """

    def __init__(self, size: int) -> None:
        self._steps, self._keys, self._nested = MOST_STEPS, _MOST_NUMBERS_AS_KEYS, _MOST_NESTED
        self._copied, self._claimed = 4 * size + (1 << 20), 4 * size + (1 << 26)

    def step(self, count: int = 1) -> None:
        """Pay for operations."""
        self._steps -= count
        if self._steps < 0:
            raise Refused("reading it takes more steps than any official file's")

    def copy(self, value: Any) -> None:
        """Pay for a copy of a string or a container."""
        if isinstance(value, str | bytes):
            self._copied -= len(value)
            if self._copied < 0:
                raise Refused("it copies its parts over and over")
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.step(len(value))

    def claim(self, elements: int, itemsize: int) -> None:
        """Pay for the numbers of a tensor, as if it shared them with no other: whoever takes it may copy it."""
        self.step(_TENSOR)
        self._claimed -= elements * max(itemsize, 4)
        if self._claimed < 0:
            raise Refused("a tensor claims more numbers than its storage has, or all of them more than the file")

    def key(self, key: Any) -> Any:
        """``key``, which can be one of a dictionary: hashing it is quick, and it is unlike the others."""
        if not isinstance(key, str | bytes | int | float | None):
            raise Refused(f"it uses a {type(key).__name__} as a key")
        if isinstance(key, str | bytes):
            if len(key) > _MOST_KEY:
                raise Refused(f"it uses a key of {len(key)} letters")
        elif key is not None:
            self._keys -= 1
            if self._keys < 0:
                raise Refused("it uses more numbers as keys than any official file")
        return key

    def nest(self) -> None:
        """Pay for a file inside the file."""
        self._nested -= 1
        if self._nested < 0:
            raise Refused("it holds files in files in files")

    def unnest(self) -> None:
        """The file inside is read."""
        self._nested += 1


class Attributes(dict[str, Any]):
    """An object of a class that is not imported: its attributes.

    Attributes:
        class_name: of the class, without its module.
    """

    __slots__ = ("class_name",)

    def __init__(self, class_name: str) -> None:
        super().__init__()
        self.class_name = class_name


class _Class:
    """A class that is not imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Ordered(dict[Any, Any]):
    """An ``OrderedDict`` or other dictionary without the attributes it may carry (``_metadata``)."""

    __slots__ = ()

    def __init__(self, reader: Unpickler, items: Any = (), *_rest: Any) -> None:
        super().__init__()
        for key, value in items.items() if isinstance(items, dict) else _sequence(reader, items):
            self[reader.budget.key(key)] = value


class _ArrayType:
    """A ``numpy.dtype`` of numbers."""

    def __init__(self, _reader: Unpickler, code: str, *_flags: Any) -> None:
        if not re.fullmatch(r"[<>|=]?[biufc]\d\d?", code):
            raise Refused(f"it holds an array of {code[:20]!r}, only numbers are read")
        self.dtype = np.dtype(code)

    def set_order(self, state: Any) -> None:
        """As ``numpy.dtype.__setstate__`` with (version, byte order, ...)."""
        self.dtype = self.dtype.newbyteorder("=" if state[1] == "|" else state[1])


def load(stream: io.BufferedIOBase, objects: re.Pattern[str] | None = None) -> Any:
    """The object in a pickle, or in a torch file of either format, at the start of a seekable stream.

    Numpy arrays and parameters become tensors, all else as the file's own classes name it stays a number, string,
    list, tuple, set or dictionary; objects become :class:`Attributes`.

    Args:
        objects: full names of classes, beside those of official checkpoints, whose objects are read as attributes.

    Raises:
        Refused: naming what is not data.
        Exception: of any kind, where the file is damaged.
    """
    return _load(stream, Budget(_size(stream)), objects)


def _load(stream: io.BufferedIOBase, budget: Budget, objects: re.Pattern[str] | None) -> Any:
    magic = stream.read(4)
    stream.seek(0)
    if magic == ZIP_MAGIC:
        return _load_zip(stream, budget, objects)
    root = Unpickler(stream, budget, objects=objects).load()
    if isinstance(root, int) and root == _LEGACY_MAGIC:
        return _load_legacy(stream, budget, objects)
    return root


def _load_zip(stream: io.BufferedIOBase, budget: Budget, objects: re.Pattern[str] | None) -> Any:
    ending = zipfile._EndRecData(stream)  # type: ignore[attr-defined]
    if ending is not None and ending[zipfile._ECD_SIZE] > _MOST_DIRECTORY:  # type: ignore[attr-defined]
        raise Refused("it is a zip archive of more members than torch writes")
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        roots = [name for name in names if re.fullmatch(r"(.*/)?data\.pkl", name)]
        if len(roots) != 1 or len(set(names)) < len(names):
            raise Refused("it is a zip archive, but not one of torch")
        folder = roots[0].removesuffix("data.pkl")
        # Others, as the source text of compiled modules, are never read.
        read = [entry for entry in archive.infolist() if entry.filename.startswith((roots[0], f"{folder}data/"))]
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in read)
        if packed or sum(entry.file_size for entry in read) > _size(stream):
            raise Refused("it is a zip archive that unpacks to more than its size, torch stores tensors as they are")
        if f"{folder}byteorder" in names:
            with archive.open(f"{folder}byteorder") as order:
                if order.read(16) != b"little":
                    raise Refused("its numbers are big-endian")
        buffers: dict[str, bytearray] = {}

        def open_storage(dtype: torch.dtype, key: str, elements: int, _view: Any) -> Tensor:
            if key not in buffers:
                buffers[key] = bytearray(archive.read(f"{folder}data/{key}"))
            if len(buffers[key]) != elements * dtype.itemsize:
                raise Refused(f"the storage {key[:20]!r} has {len(buffers[key])} bytes, not {elements} {dtype}")
            return torch.frombuffer(buffers[key], dtype=dtype) if elements else torch.empty(0, dtype=dtype)

        return Unpickler(io.BytesIO(archive.read(roots[0])), budget, open_storage, objects).load()


def _load_legacy(stream: io.BufferedIOBase, budget: Budget, objects: re.Pattern[str] | None) -> Any:
    """What follows the magic number: protocol, system, object, keys of storages, and their numbers."""
    protocol, system = (Unpickler(stream, budget).load() for _ in range(2))
    if not isinstance(protocol, int) or protocol != 1001 or system["little_endian"] is not True:
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

    root = Unpickler(stream, budget, open_storage, objects).load()
    keys = Unpickler(stream, budget).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise Refused("the storages it lists are not those it uses")
    for key in keys:
        numbers = storages[key].view(torch.uint8).numpy().data
        (elements,) = struct.unpack("<q", stream.read(8))
        if elements != len(storages[key]) or stream.readinto(numbers) != len(numbers):
            raise Refused("it is cut short")
    return root


class _Source:
    """A file for the stack machine, which asks for as many bytes as the file tells it to."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file, self.readline = file, file.readline

    def read(self, size: int) -> bytes:
        if size > 1 << 16 and size > _size(self._file) - self._file.tell():
            raise EOFError("it is cut short")
        return self._file.read(size)


class _Memo(dict[int, Any]):
    """What the stack machine remembers, by number: picklers count them up."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self._budget = budget

    def __setitem__(self, index: int, value: Any) -> None:
        super().__setitem__(index if index < MOST_STEPS else self._budget.key(index), value)


class _Paid:
    """The operations of the stack machine by their code, each for a step of the budget."""

    def __init__(self, operations: Mapping[int, Any], budget: Budget) -> None:
        self._operations, self._budget = operations, budget

    def __getitem__(self, code: int) -> Any:
        self._budget.step()
        return self._operations[code]


class Unpickler(pickle._Unpickler):
    """Python's own stack machine (the C one lets a file size its tables), with every way out replaced.

    Args:
        objects: see :func:`load`.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        file: io.BufferedIOBase,
        budget: Budget,
        open_storage: OpenStorage | None = None,
        objects: re.Pattern[str] | None = None,
    ) -> None:
        super().__init__(_Source(file), encoding="latin1")  # type: ignore[arg-type]  # Python 2's strings may be bytes
        self.budget, self.objects, self._open_storage = budget, objects, open_storage
        self.memo = _Memo(budget)
        self.dispatch = _Paid(type(self).operations, budget)  # type: ignore[assignment]

    def find_class(self, module: str, name: str) -> Any:
        if len(module) + len(name) > _MOST_NAME:
            raise Refused(f"it asks for {module[:40]!r}..., which is not data: nothing of it was run")
        module = _MOVED.get(module, module).replace("numpy._core", "numpy.core")
        path = f"{module}.{name}"
        if path in _NAMES:
            return _NAMES[path]
        storage = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage", path)
        if storage and storage[1] in _DTYPES:
            return _DTYPES[storage[1]]
        if _OBJECTS.fullmatch(path) or (self.objects is not None and self.objects.fullmatch(path)):
            return _Class(name)
        raise Refused(f"it asks for {path[:80]!r}, which is not data: nothing of it was run")

    def persistent_load(self, pid: Any) -> Tensor:
        if self._open_storage is None or not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise Refused("it refers to something outside itself")
        _, dtype, key, _location, elements, *view = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str | int) or type(elements) is not int:
            raise Refused("it refers to something outside itself that is no storage of numbers")
        self.budget.step(_TENSOR)
        return self._open_storage(dtype, str(self.budget.key(key)), elements, view[0] if view else None)

    # Below, the operations that would let a file copy without end, call what is no stand-in, set attributes of a class
    # or function, spell numbers of a million digits, or hash a million times nested tuple, which overflows the C stack.

    def call(self, function: Any, arguments: Any) -> Any:
        """What a stand-in makes of ``arguments``."""
        if not isinstance(arguments, list | tuple):
            raise Refused(f"it calls something with a {type(arguments).__name__}")
        self.budget.step(_CALL)
        self.budget.copy(arguments)
        for argument in arguments:
            self.budget.copy(argument)
        if isinstance(function, _Class):
            return Attributes(function.name)
        if not isinstance(function, FunctionType | type):
            raise Refused(f"it calls a {type(function).__name__}")
        return function(self, *arguments)

    def set_attributes(self, target: Attributes, state: Any) -> None:
        """Add attributes: a dictionary, or one of attributes and one of slots."""
        for part in state if isinstance(state, tuple) else (state,):
            self.budget.copy(part)
            if part is not None and not (isinstance(part, dict) and all(isinstance(key, str) for key in part)):
                raise Refused(f"an object has a {type(part).__name__} for attributes")
            target.update(part or {})

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def _obj(self) -> None:
        function, *arguments = self.pop_mark()
        self.stack.append(self.call(function, arguments))

    def _inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.stack.append(self.call(self.find_class(module, name), self.pop_mark()))

    def _newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _object(self, self.stack[-1], arguments)

    def _newobj_ex(self) -> None:
        del self.stack[-2:]  # arguments, by place and by name
        self.stack[-1] = _object(self, self.stack[-1])

    def _build(self) -> None:
        state = self.stack.pop()
        self.budget.copy(state)
        if isinstance(target := self.stack[-1], Tensor):
            _fill_array(self, target, state)
        elif isinstance(target, Attributes):
            self.set_attributes(target, state)
        elif isinstance(target, _ArrayType):
            target.set_order(state)
        elif not isinstance(target, _Ordered):
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
            target[self.budget.key(key)] = value

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._put(items)

    def _additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(target := self.stack[-1], set):
            raise Refused(f"it adds to a {type(target).__name__}")
        target.update(map(self.budget.key, items))

    def _frozenset(self) -> None:
        self.stack.append(frozenset(map(self.budget.key, self.pop_mark())))

    def _bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.stack.append(self.read(size))

    def _line(self) -> bytes:
        line = self.readline()[:-1]
        if len(line) > _MOST_LINE:
            raise ValueError(f"a number of {len(line)} digits")
        return line

    def _int(self) -> None:
        line = self._line()
        self.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def _long(self) -> None:
        self.stack.append(int(self._line().removesuffix(b"L")))

    def _float(self) -> None:
        self.stack.append(float(self._line()))

    def _long1(self) -> None:
        self._long_of(self.read(1)[0])

    def _long4(self) -> None:
        self._long_of(struct.unpack("<i", self.read(4))[0])

    def _long_of(self, size: int) -> None:
        if not 0 <= size <= _MOST_LONG:
            raise ValueError(f"a number of {size} bytes")
        self.stack.append(int.from_bytes(self.read(size), "little", signed=True))

    def _refuse(self) -> None:
        raise Refused("it uses copyreg extensions or buffers outside itself")

    operations = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: _reduce,
        pickle.OBJ[0]: _obj,
        pickle.INST[0]: _inst,
        pickle.NEWOBJ[0]: _newobj,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
        pickle.BYTEARRAY8[0]: _bytearray8,
        pickle.INT[0]: _int,
        pickle.LONG[0]: _long,
        pickle.FLOAT[0]: _float,
        pickle.LONG1[0]: _long1,
        pickle.LONG4[0]: _long4,
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


# -- stand-ins ---------------------------------------------------------------------------------------------------------


def _sequence(_reader: Unpickler, value: Any = ()) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise Refused(f"it makes a sequence of a {type(value).__name__}")
    return value


def _set(reader: Unpickler, values: Any = ()) -> set[Any]:
    return set(map(reader.budget.key, _sequence(reader, values)))


def _bytes(_reader: Unpickler, value: str | bytes = b"", encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "utf-8", "ascii"):
        raise Refused("it holds text of another encoding")
    return value if isinstance(value, bytes) else value.encode(encoding)


def _complex(_reader: Unpickler, *parts: Any) -> complex:
    return complex(*parts)


def _default_dict(reader: Unpickler, *_factory: Any) -> _Ordered:
    return _Ordered(reader)


def _object(reader: Unpickler, cls: Any, *_base_and_state: Any) -> Any:
    """``copyreg._reconstructor(class, base, state)`` and ``copyreg.__newobj__(class, *args)``."""
    if not isinstance(cls, _Class):
        raise Refused("it makes an object of no class")
    reader.budget.step(_CALL)
    return Attributes(cls.name)


def _persistent(reader: Unpickler, meta: Any) -> Attributes:
    """EG3D's ``torch_utils.persistence``: the object's state, without the source text it comes with."""
    name, state = meta["class_name"], meta["state"]
    if not isinstance(name, str) or len(name) > _MOST_NAME:
        raise Refused("an object has no name for its class")
    made = Attributes(name)
    reader.set_attributes(made, state)
    return made


def _tensor(
    reader: Unpickler, storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_rest: Any
) -> Tensor:
    if len(_sequence(reader, size)) > _MOST_AXES or not all(type(side) is int and side >= 0 for side in size):
        raise Refused("a tensor claims more axes than any, or sides that are no whole numbers")
    reader.budget.claim(math.prod(size), storage.dtype.itemsize)
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _typed_tensor(
    reader: Unpickler,
    storage: Tensor,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    return _tensor(reader, storage.view(dtype), offset, size, stride)


def _first(_reader: Unpickler, value: Any, *_rest: Any) -> Any:
    return value


def _tensor_of_type(reader: Unpickler, function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    return reader.call(function, arguments)


def _array(reader: Unpickler, data: Any, kind: _ArrayType, shape: Any, order: str) -> Tensor:
    if isinstance(data, list):
        raise Refused("it holds an array of objects, only numbers are read")
    data = _bytes(reader, data)
    reader.budget.copy(data)
    array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if order == "F" else "C")
    reader.budget.claim(array.size, array.itemsize)
    return torch.from_numpy(array.astype(kind.dtype.newbyteorder("=")))


def _empty_array(reader: Unpickler, *_type_shape_code: Any) -> Tensor:
    reader.budget.claim(0, 0)
    return torch.empty(0)


def _fill_array(reader: Unpickler, target: Tensor, state: Any) -> None:
    _version, shape, kind, fortran, data = state
    target.data = _array(reader, data, kind, shape, "F" if fortran else "C")


def _scalar(reader: Unpickler, kind: _ArrayType, data: Any) -> Any:
    return _array(reader, data, kind, (), "C").item()


def _nested(reader: Unpickler, data: bytes) -> Any:
    reader.budget.nest()
    value = _load(io.BytesIO(data), reader.budget, reader.objects)
    reader.budget.unnest()
    return value


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
    "builtins.complex": _complex,
    "builtins.dict": _Ordered,
    "_codecs.encode": _bytes,
    "collections.OrderedDict": _Ordered,
    "collections.Counter": _Ordered,
    "collections.defaultdict": _default_dict,
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
    # Lists and dictionaries of compiled modules come with their types.
    **{f"torch.jit._pickle.build_{kind}list": _sequence for kind in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle.restore_type_tag": _first,
    **{str(dtype): dtype for dtype in _DTYPES.values()},
    # Only ever arguments of the above:
    **dict.fromkeys(("builtins.object", "numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter")),
}
