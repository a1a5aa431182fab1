"""Parity with official networks: fixture folders, their weights by recipe, and the comparison.

A fixture folder holds ``meta.json`` and ``io.npz``: inputs and outputs recorded from an official implementation, whose
weights anyone rebuilds from key names and shapes. Of networks whose weights may be handed on there are plain records: a
folder of ``NETWORK_PICTURE.npz``, each a picture (uint8, H, W, 3), the range that it was scaled to, and the outputs.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.errors import UserError, one_line
from models.zoo.family import State, ZooError

_RECORD_INPUTS = ("picture", "range")
_RECORD_TOLERANCE = 1e-3
_RECORD_ROUNDING = 1e-5  # of an array's largest number: logits reach a thousand, and float32 rounds them by up to .004


@dataclass
class Fixture:
    """One recorded network.

    Attributes:
        meta: ``meta.json``.
        arrays: ``io.npz``: "CASE/in/x", "CASE/mid/x", "CASE/out/x", "kept/MODEL/KEY".
        memory: whatever a family's replay wants to keep from one case to the next (the built network).
    """

    folder: Path
    meta: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    memory: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def load(folder: str | Path) -> Fixture:
        """Read a fixture folder, or one record.

        Raises:
            ZooError: when it is not one, or incomplete.
        """
        folder = Path(folder)
        if folder.suffix == ".npz":
            return _record(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            with np.load(folder / "io.npz", allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except FileNotFoundError as error:
            raise ZooError(f"{folder} is not a parity fixture: {Path(error.filename).name} is missing") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ZooError(f"{folder} is a damaged parity fixture: {one_line(error)}") from error
        for key in ("config", "models", "arrays"):
            if not isinstance(meta, dict) or not isinstance(meta.get(key), dict):
                raise ZooError(f"{folder} is a damaged parity fixture: meta.json has no {key!r}")
        for name in meta["arrays"]:
            if name not in arrays:
                raise ZooError(f"{folder} is a damaged parity fixture: io.npz has no {name!r}")
        return Fixture(folder, meta, arrays)

    @property
    def config(self) -> dict[str, Any]:
        """How the official network was built."""
        return self.meta["config"]

    def state(self, model: str) -> State:
        """The official state dict of one model, rebuilt by recipe, in official order.

        Raises:
            ZooError: when its sums are not the recorded ones: the recipe is not being reproduced, and nothing else
                means anything.
        """
        entry = self.meta["models"][model]
        state = {key: self._tensor(key, tuple(shape), dtype, model) for key, shape, dtype in entry["state_dict"]}
        check = entry["weights_check"]
        for name, total in (
            ("sum", sum(float(array.sum(dtype=np.float64)) for array in state.values())),
            ("sum_abs", sum(float(np.abs(array).sum(dtype=np.float64)) for array in state.values())),
        ):
            if abs(total - check[name]) > 1e-6 * check["sum_abs"]:
                raise ZooError(f"{self.folder}: {model}: weights by recipe have {name} {total}, not {check[name]}")
        return {key: torch.from_numpy(array) for key, array in state.items()}

    def checkpoint(self, name: str) -> Any:
        """What the official file holds that ``meta["checkpoint"][name]`` describes: nested dictionaries of tensors and
        plain values, as ``torch.save`` takes them.

        Raises:
            ZooError: when the fixture has no such file, or does not say how it is laid out.
        """
        layout = self.meta.get("checkpoint", {}).get(name, {}).get("layout")
        if layout is None:
            raise ZooError(f"{self.folder} does not tell what a file {name!r} holds")
        return self._laid_out(layout)

    def _laid_out(self, node: Mapping[str, Any]) -> Any:
        match node:
            case {"model": model}:
                return {node.get("prefix", "") + key: tensor for key, tensor in self.state(model).items()}
            case {"list_of_params": model}:
                state = self.state(model)
                return [state[key] for key in self.meta["models"][model]["parameter_names"]]
            case {"array": name}:
                return torch.from_numpy(self.arrays[name])
            case {"value": value}:
                return value
            case {"merge": parts}:
                return {key: value for part in parts for key, value in self._laid_out(part).items()}
        return {key: self._laid_out(child) for key, child in node.items()}

    def input(self, case: str, name: str) -> Tensor:
        """The array CASE/in/NAME."""
        return torch.from_numpy(self.arrays[f"{case}/in/{name}"])

    def has(self, case: str, name: str) -> bool:
        """Whether there is an input of that name."""
        return f"{case}/in/{name}" in self.arrays

    def targets(self) -> dict[str, list[str]]:
        """Names of the recorded results ("mid/w", "out/image") by case, in recorded order."""
        found: dict[str, list[str]] = {}
        for array in self.meta["arrays"]:
            case, _, result = array.partition("/")
            if result.startswith(("mid/", "out/")):
                found.setdefault(case, []).append(result)
        return found

    def strided(self, name: str, full: Tensor) -> Tensor:
        """Every k-th element of each axis of ``full``, with the k that gives the array CASE/KIND/NAME its shape; all of
        it where there is no array of that name, or one with other axes."""
        recorded = self.arrays[name].shape if name in self.arrays else full.shape
        if len(recorded) != full.ndim:
            return full
        return full[tuple(slice(None, None, _step(*sizes)) for sizes in zip(full.shape, recorded, strict=True))]

    def _tensor(self, key: str, shape: tuple[int, ...], dtype: str, model: str) -> NDArray[Any]:
        if not dtype.startswith("float"):
            return np.zeros(shape, dtype=dtype)
        rules = self.meta["models"][model]["rules"]
        rule = next((rule for rule in rules if re.search(rule["match"], key)), None)
        if rule is None:
            raise ZooError(f"{self.folder}: no rule makes the weight {key!r}")
        if rule.get("keep"):
            return self.arrays[f"kept/{model}/{key}"].astype(np.float32).reshape(shape)
        if "const" in rule:
            return np.full(shape, rule["const"], dtype=np.float32)
        pattern, replacement = rule.get("seed_sub", ("", ""))
        seed = re.sub(pattern, replacement, key)
        draws = np.random.Generator(np.random.PCG64(zlib.crc32((self.meta.get("salt", "") + seed).encode())))
        noise = np.asarray(draws.standard_normal(shape), dtype=np.float64).astype(np.float32)
        if rule.get("abs"):
            noise = np.abs(noise)
        scale = np.float32(rule.get("scale", 1.0) * _fan_factor(shape, rule.get("fan")))
        return np.asarray(np.float32(rule.get("mean", 0.0)) + scale * noise, dtype=np.float32).reshape(shape)


def _record(file: Path) -> Fixture:
    """A record as a fixture of one case, "picture": what is not an input is an output."""
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ZooError(f"{file} is a damaged record: {one_line(error)}") from error
    outputs = sorted(arrays.keys() - set(_RECORD_INPUTS))
    picture, scale = (arrays.get(name) for name in _RECORD_INPUTS)
    if picture is None or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ZooError(f"{file} is not a record: it has no picture (uint8, height x width x 3)")
    if scale is None or scale.shape != (2,) or not scale[0] < scale[1]:
        raise ZooError(f"{file} is not a record: it does not say the range that the picture was scaled to")
    if not outputs or any(arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all() for name in outputs):
        raise ZooError(f"{file} is not a record: it has no outputs, or others than numbers")
    places = {name: f"picture/{'in' if name in _RECORD_INPUTS else 'out'}/{name}" for name in arrays}
    meta = {
        "name": file.stem,
        "record": file.stem,
        "config": {},
        "models": {},
        "arrays": {places[name]: {"atol": _record_tolerance(arrays[name]), "rtol": 0.0} for name in outputs},
    }
    return Fixture(file, meta, {places[name]: array for name, array in arrays.items()})


def _record_tolerance(output: NDArray[Any]) -> float:
    return max(_RECORD_TOLERANCE, _RECORD_ROUNDING * float(np.abs(output).max(initial=0.0)))


def _fan_factor(shape: tuple[int, ...], fan: str | None) -> float:
    if len(shape) == 5 and shape[0] == 1:
        shape = shape[1:]
    if fan in (None, "none") or not shape:
        return 1.0
    return 1 / math.sqrt(max(1, math.prod(shape[1:]) if fan == "in" else shape[0]))


def _step(size: int, kept: int) -> int:
    """The k of which ``kept`` of ``size`` elements are left: a power of two where it can be, as recorders like them."""
    step = math.ceil(size / max(kept, 1))
    power = 1 << max(step - 1, 0).bit_length()
    return power if math.ceil(size / power) == kept else max(step, 1)


def repositories(meta: Mapping[str, Any]) -> list[str]:
    """The repositories, owner/name, that a fixture was recorded from; ``source`` is one or a list of them."""
    source = meta.get("source", [])
    return [entry["repo"] for entry in (source if isinstance(source, list) else [source]) if "repo" in entry]


@dataclass(frozen=True)
class Comparison:
    """One array compared."""

    name: str
    passed: bool
    worst: float
    """Largest error over its tolerance: up to 1 passes, unless a fraction may differ."""
    fraction: float
    """Share of elements within tolerance."""
    reason: str = ""


def compare(fixture: Fixture, name: str, got: Tensor | None) -> Comparison:
    """Compare one result with the recorded array: |got - want| <= atol + rtol |want| for enough elements."""
    want, limits = fixture.arrays[name], fixture.meta["arrays"][name]
    if got is None:
        return Comparison(name, False, math.inf, 0.0, "not computed")
    value = got.detach().cpu().double().numpy()
    if value.shape != want.shape:
        return Comparison(name, False, math.inf, 0.0, f"shape {value.shape}, recorded {want.shape}")
    want = want.astype(np.float64)
    equal = (np.isnan(value) & np.isnan(want)) | (np.isinf(want) & (value == want))
    with np.errstate(invalid="ignore"):  # inf - inf
        error = np.where(equal, 0.0, np.abs(value - want))
    error = np.where(np.isnan(error), math.inf, error)
    tolerance = limits["atol"] + limits["rtol"] * np.abs(np.where(np.isfinite(want), want, 0.0))
    with np.errstate(divide="ignore"):  # a tolerance of 0 asks for equality
        ratio = np.divide(error, tolerance, out=np.zeros_like(error), where=error > 0)
    fraction = float((ratio <= 1).mean()) if ratio.size else 1.0
    passed = fraction >= limits.get("min_fraction", 1.0)
    return Comparison(name, passed, float(ratio.max(initial=0.0)), fraction)


def replay(fixture: Fixture) -> Iterator[Comparison]:
    """Run every recorded case through our network and compare every recorded array; none is skipped.

    Raises:
        ZooError: when no family knows the fixture.
    """
    from models.zoo import family_of_fixture

    family = family_of_fixture(fixture.meta)
    for case, names in fixture.targets().items():
        with torch.no_grad():
            results = family.replay(fixture, case)
        for name in (f"{case}/{name}" for name in names):
            found = results.get(name.removeprefix(f"{case}/"))
            yield compare(fixture, name, None if found is None else fixture.strided(name, found))


@dataclass(frozen=True)
class Report:
    """The parity of one fixture folder."""

    name: str
    comparisons: tuple[Comparison, ...]
    failure: str = ""
    """What kept it from being replayed to the end."""
    left_out: str = ""
    """Why there is nothing of ours to compare it with."""

    @property
    def passed(self) -> bool:
        """Whether every array was compared, and passed; what is left out does not fail."""
        return bool(self.left_out) or (
            not self.failure and bool(self.comparisons) and all(c.passed for c in self.comparisons)
        )

    @property
    def worst(self) -> Comparison | None:
        """A failed comparison if there is one, of those the one with the largest error over its tolerance."""
        return max(self.comparisons, key=lambda c: (not c.passed, c.worst), default=None)


class NotOfThisHouseError(ZooError):
    """A record of a network that is known and is not here."""


def reports(folder: str | Path) -> list[Report]:
    """Replay one fixture folder, or every record of a folder of them."""
    records = sorted(Path(folder).glob("*.npz")) if not (Path(folder) / "meta.json").exists() else []
    return [report(place) for place in records or [folder]]


def report(folder: str | Path) -> Report:
    """Replay one fixture folder or record; whatever goes wrong is part of the report."""
    done: list[Comparison] = []
    failure = ""
    try:
        done.extend(replay(Fixture.load(folder)))
    except NotOfThisHouseError as error:
        return Report(Path(folder).stem, (), left_out=one_line(error))
    except UserError as error:
        failure = one_line(error)
    except Exception as error:  # one fixture that fails must not keep the others from being looked at
        failure = f"{type(error).__name__}: {one_line(error)}"
    place = Path(folder).resolve()
    return Report(place.stem if place.suffix == ".npz" else place.name, tuple(done), failure)
