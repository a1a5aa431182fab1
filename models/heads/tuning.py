"""Tuning some of a generator's weights, per item, beside one shared frozen original."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from models.camera import Camera
from models.errors import UserError
from models.generators.base import Generator
from models.latents import Latents
from models.rendering.output import Rendering

PARTS = ("all", "synthesis", "affines", "late")


class _Call(nn.Module):
    """Makes ``mapping`` and ``synthesis`` reachable for ``functional_call``, which only calls ``forward``."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, method: str, *args: Any, **options: Any) -> Any:
        return getattr(self.generator, method)(*args, **options)


class TunedWeights(nn.Module):
    """Trainable copies of some parameters of ``generator``, and renderings with them in place.

    The generator itself is neither registered nor changed, so that many of these share one.

    Args:
        generator: the original.
        names: of the parameters that are copied.
    """

    def __init__(self, generator: Generator, names: Iterable[str]) -> None:
        super().__init__()
        self._call = [_Call(generator)]  # a list, so that nothing of it is registered
        original = dict(generator.named_parameters())
        self.names = tuple(names)
        # A parameter's name cannot hold a dot.
        self.weights = nn.ParameterDict({_key(n): nn.Parameter(original[n].detach().clone()) for n in self.names})

    def _forward(self, method: str, *args: Any, **options: Any) -> Any:
        weights = {f"generator.{name}": self.weights[_key(name)] for name in self.names}
        return functional_call(self._call[0], weights, (method, *args), options)

    def mapping(self, z: Tensor) -> Latents:
        """As :meth:`Generator.mapping`."""
        return self._forward("mapping", z)

    def synthesis(self, ws: Latents, camera: Camera | None, **options: Any) -> Rendering:
        """As :meth:`Generator.synthesis`."""
        return self._forward("synthesis", ws, camera, **options)

    def frugal(self, ws: Latents, camera: Camera | None, **options: Any) -> Rendering:
        """As :meth:`synthesis`, view by view, each computed again for the gradient: a third more work, and memory for
        one view.
        """
        if camera is None:
            return self.synthesis(ws, None, **options)
        views = [camera[i : i + 1] for i in range(len(camera))]
        return Rendering.cat([checkpoint(self.synthesis, ws, view, use_reentrant=False, **options) for view in views])

    def tensors(self) -> dict[str, Tensor]:
        """The tuned parameters by their name in the generator."""
        return {name: self.weights[_key(name)].detach() for name in self.names}


def _key(name: str) -> str:
    return name.replace(".", "/")


def with_weights(generator: Generator, tensors: Mapping[str, Tensor]) -> Generator:
    """A copy of ``generator`` in which the named parameters are replaced.

    Raises:
        KeyError: for a name that the generator does not have.
    """
    changed = copy.deepcopy(generator)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return changed


def select_parameters(generator: Generator, train: str, freeze: str = "", expression: bool = False) -> list[str]:
    """Names of the parameters that a choice means; what a parameter does is found by asking autograd.

    Args:
        train: "all"; "synthesis": those that a neutral picture of given style codes depends on; "late": those of
            them that the features of the first half of the blocks do not depend on; "affines": the layers that
            style codes enter by; or a regular expression of names.
        freeze: regular expression of names that are left out in any case; "" leaves out none.
        expression: the picture that is meant has all expressions.

    Raises:
        UserError: when nothing is left to train, or an expression is not valid.
    """
    names = [name for name, _ in generator.named_parameters()]
    if train == "synthesis":
        names = _reached(generator, names, None, expression)
    elif train == "late":
        taps = generator.tap_names
        early = set(_reached(generator, names, taps[(len(taps) - 1) // 2], expression)) if taps else set()
        names = [name for name in _reached(generator, names, None, expression) if name not in early]
    elif train != "all":
        names = _matching(names, r"\baffine\b" if train == "affines" else train)
    frozen = set(_matching(names, freeze)) if freeze else set()
    if not (kept := [name for name in names if name not in frozen]):
        raise UserError(f"{train!r} leaves no parameter of {type(generator).__name__} to train")
    return kept


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        choice = ", ".join(PARTS)
        raise UserError(f"{pattern!r} is neither one of {choice} nor a regular expression: {error}") from error
    return [name for name in names if expression.search(name)]


def _reached(generator: Generator, names: list[str], tap: str | None, expression: bool) -> list[str]:
    """Parameters with a gradient from the picture at the mean code, or from one tap."""
    weights = TunedWeights(generator, names)
    codes = generator.mean_latents
    device = next(iter(codes.groups.values())).device
    camera = generator.rig.camera(0.0, 0.0, device) if generator.is_3d else None
    full = torch.ones(1, len(generator.expressions), device=device) if expression and generator.expressions else None
    with torch.enable_grad():
        rendering = weights.synthesis(codes, camera, expression=full, taps=() if tap is None else (tap,))
        output = rendering.image if tap is None else rendering.taps[tap]
        gradients = torch.autograd.grad(output.sum(), list(weights.weights.values()), allow_unused=True)
    return [
        name
        for name, gradient in zip(weights.weights, gradients, strict=True)
        if gradient is not None
        for name in [name.replace("/", ".")]
    ]
