"""Modules that remember how they were built, and the one door that builds them again."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from models.errors import one_line
from models.files import ROOT

Spec = dict[str, Any]  # {"class_path": "models.x.Y", "init_args": {...}}


class Configurable(nn.Module):
    """A module that records its constructor's arguments, defaults included, in ``init_args``.

    Arguments are JSON values, nested :class:`Configurable` modules or dataclasses of ``models``;
    the last two are recorded as ``{"class_path", "init_args"}``. Subclasses write a plain ``__init__``.

    Raises:
        TypeError: on construction, for an argument that cannot be recorded.
    """

    init_args: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]


def _recording(init: Any) -> Any:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Configurable, *args: Any, **kwargs: Any) -> None:
        if "init_args" not in self.__dict__:  # the outermost constructor records, those it calls do not
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


def build(spec: Spec) -> nn.Module:
    """The module that ``spec`` describes, with freshly initialised parameters.

    Only classes defined in this repository's ``models`` package are imported; the class path is
    checked against the files there before anything is imported.

    Raises:
        ValueError: when the class is not one of ours or refuses its arguments.
    """
    module = _build(spec)
    if not isinstance(module, Configurable):
        raise ValueError(f"{spec['class_path']} is not a module of this repository")
    return module


def _build(value: Any) -> Any:
    if isinstance(value, list):
        return [_build(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"class_path", "init_args"}:
        return {key: _build(item) for key, item in value.items()}
    cls = _import(value["class_path"])
    try:
        return cls(**{key: _build(item) for key, item in value["init_args"].items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{value['class_path']} cannot be built from its recorded arguments: {one_line(error)}"
        ) from error


def _import(class_path: Any) -> type:
    refusal = ValueError(f"class_path {class_path!r} does not name a class of this repository's models package")
    if not isinstance(class_path, str) or not re.fullmatch(r"models(\.[A-Za-z_]\w*)+", class_path, re.ASCII):
        raise refusal
    module_name, _, class_name = class_path.rpartition(".")
    source = ROOT.joinpath(*module_name.split("."))
    if not (source.with_suffix(".py").is_file() or (source / "__init__.py").is_file()):
        raise refusal
    cls = getattr(importlib.import_module(module_name), class_name, None)
    if not isinstance(cls, type) or cls.__module__ != module_name:
        raise refusal
    if not issubclass(cls, Configurable) and not dataclasses.is_dataclass(cls):
        raise refusal
    return cls
