"""Modules that remember how they were built, and the one door that builds them again."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from models import classes
from models.errors import one_line, shown

Spec = dict[str, Any]  # {"class_path": "models.x.Y", "init_args": {...}}


class Configurable(nn.Module):
    """A module that records its constructor's arguments, defaults included, in ``init_args``.

    Arguments are JSON values, nested :class:`Configurable` modules or dataclasses of ``models``;
    the last two are recorded as ``{"class_path", "init_args"}``. Subclasses write a plain ``__init__``.

    Raises:
        TypeError: on construction, for an argument that cannot be recorded.
    """

    init_args: dict[str, Any]

    def validate(self) -> None:
        """Called when all is built: refuse what cannot be.

        Raises:
            ValueError: saying which attribute it is.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]


def _recording(init: Any) -> Any:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Configurable, *args: Any, **kwargs: Any) -> None:
        outermost = "init_args" not in self.__dict__  # it records, those it calls do not
        if outermost:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            values = dict(list(bound.arguments.items())[1:])
            for name, parameter in signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    values.update(values.pop(name))
                elif parameter.kind is parameter.VAR_POSITIONAL and values.pop(name):
                    raise TypeError(f"{type(self).__name__} is recorded: give its arguments by name")
            where = f"{type(self).__name__}.__init__"
            self.__dict__["init_args"] = {name: _record(value, f"{where}: {name}") for name, value in values.items()}
        init(self, *args, **kwargs)
        if outermost:
            self.validate()

    return wrapper


def _record(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_record(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _record(item, where) for key, item in value.items()}
    if isinstance(value, Configurable):
        return spec(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"class_path": _class_path(value), "init_args": _record(fields, where)}
    raise TypeError(f"{where} is a {type(value).__name__}, which cannot be recorded in a manifest")


def _class_path(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def spec(module: nn.Module) -> Spec:
    """How ``module`` was built: ``{"class_path", "init_args"}``.

    Raises:
        TypeError: when ``module`` is not :class:`Configurable`.
    """
    if not isinstance(module, Configurable):
        raise TypeError(f"{_class_path(module)} is not a models.configurable.Configurable module")
    return {"class_path": _class_path(module), "init_args": module.__dict__.get("init_args", {})}


def build(spec: Spec, numbers: int | None = None) -> nn.Module:
    """The module that ``spec`` describes, with freshly initialised parameters.

    Only the classes of :data:`models.classes.BUILDABLE` are imported, and none opens a file.

    Args:
        numbers: that it may hold: arguments that ask for more are refused before the memory is taken.

    Raises:
        ValueError: when the class is not one of ours or refuses its arguments.
    """
    if numbers is None:
        module = _build(spec)
    else:
        with _Budget(numbers):
            module = _build(spec)
    if not isinstance(module, Configurable):
        raise ValueError(f"{shown(spec['class_path'])} is not a module of this repository")
    return module


def _build(value: Any) -> Any:
    if isinstance(value, list):
        return [_build(item) for item in value]
    if not isinstance(value, dict):
        return _plain(value)
    if value.keys() != {"class_path", "init_args"}:
        return {key: _build(item) for key, item in value.items()}
    cls = class_named(value["class_path"])
    arguments = value["init_args"]
    if not isinstance(arguments, dict):
        raise ValueError(f"{value['class_path']} has {shown(arguments)} for arguments")
    for name in classes.FILES:
        if arguments.get(name) is not None:
            raise ValueError(f"{value['class_path']} names a file as its {name}, which a manifest must not")
    try:
        return cls(**{key: _build(item) for key, item in arguments.items()})
    except _REFUSALS as error:
        raise ValueError(
            f"{value['class_path']} cannot be built from its recorded arguments: {one_line(error)[:300]}"
        ) from error


# Of arguments that no constructor looks at, anything can come: sizes of 0 and below, texts for numbers.
_REFUSALS = (TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, LookupError, AssertionError)


def _plain(value: Any) -> Any:
    """Numbers as constructors know them: neither infinite nor sizes of billions."""
    if isinstance(value, int | float) and not abs(value) < (1e9 if isinstance(value, int) else math.inf):
        raise ValueError(f"{shown(value)} is not a number that anything is built with")
    return value


def class_named(class_path: Any) -> type:
    """One of the classes of :data:`models.classes.BUILDABLE`, by its path of today or of before.

    Raises:
        ValueError: for any other.
    """
    if isinstance(class_path, str):
        class_path = classes.MOVED.get(class_path, class_path)
    if not isinstance(class_path, str) or class_path not in classes.BUILDABLE:
        raise ValueError(f"class_path {shown(class_path)} does not name a class that an artifact may hold")
    module_name, _, class_name = class_path.rpartition(".")
    return getattr(importlib.import_module(module_name), class_name)


class _Budget(TorchFunctionMode):
    """Refuses tensors, made one after the other, that hold more numbers than ``left`` in all."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SIZED and args:
            sizes = args[0] if isinstance(args[0], list | tuple) else args
            self.left -= 1 + abs(math.prod(size for size in sizes if isinstance(size, int)))
        elif func in _COUNTED:
            numbers = [n for n in (*args, *(kwargs or {}).values()) if isinstance(n, int) and not isinstance(n, bool)]
            self.left -= 1 + max(map(abs, numbers), default=0)
        if self.left < 0:
            raise ValueError("its sizes are not those of the numbers that are stored")
        return func(*args, **(kwargs or {}))


_SIZED = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full}
_COUNTED = {torch.arange, torch.linspace, torch.logspace, torch.eye, torch.randperm}
