"""What every family of official checkpoints offers, and the containers that travel between the zoo's files.

Flow: a file -> ``reading`` -> :class:`Official` -> ``Family.convert`` -> :class:`Converted` -> an artifact.
Parity: a fixture folder -> ``parity.Fixture`` -> ``Family.replay`` -> arrays, compared with the recorded ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.configurable import Configurable
from models.errors import UserError

if TYPE_CHECKING:
    from models.zoo.parity import Fixture

State = dict[str, Tensor]
"""Official key -> tensor, in official order."""


class ZooError(UserError):
    """A file that is not what it was taken for: names the first mismatch."""


@dataclass(frozen=True)
class Official:
    """What a file of a user holds, or several that belong together, read without running anything of it.

    A dictionary of tensors is a state dict, everything else is a value. Of one file the names are those in the file:
    "g_ema", "latent_avg"; "" for a file that is itself a state dict. Of several files a state dict or value is
    "STEM/NAME", and a file that is itself a state dict is "STEM", where STEM is the file's name without its suffix:
    "generator", "ema/shadow_params", "ffhq1024x1024/g_ema". Files with the same stem also get their folder's name:
    "identity/vae", "expression/vae". Users rename files, so go by keys and shapes first.

    Attributes:
        states: state dicts by name.
        values: plain values by name: numbers, strings, tensors, lists, dictionaries. Namespaces and other objects
            become dictionaries of their attributes. A network pickled whole (EG3D's ``G_ema``) is a state dict,
            and under the same name a value {"class_name", "init_args", "init_kwargs", "attributes", "modules"}: how it
            was constructed, its plain attributes (``rendering_kwargs``, ``neural_rendering_resolution``), and the same
            of each of its submodules by name ("renderer", "decoder.net.0").
    """

    states: dict[str, State]
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """Our modules with the file's weights."""

    modules: dict[str, Configurable]
    """By artifact name: generator, discriminator, encoder ..."""
    found: str
    """One line for the user: what the file turned out to be, with its sizes."""
    extra: dict[str, Any] = field(default_factory=dict)
    """JSON values for the manifest's ``extra``; ``recipe`` is how faces are framed, see :mod:`models.faces.recipes`."""
    licences: Sequence[Mapping[str, str]] = ()
    """{"name", "licence", "origin"} of parts that have licences of their own; without any, the family's is theirs."""
    dtype: Mapping[str, str | None] = field(default_factory=dict)
    """By module, as what its numbers are stored: see :class:`models.artifact.Export`."""


@dataclass(frozen=True)
class Family:
    """One kind of official checkpoint."""

    name: str
    """As on the command line."""
    files: str
    """File names users have, for ``galatea zoo list``."""
    origin: str
    """Repository, owner/name."""
    licence: str
    """Licence of the official weights, as their owner states it."""
    matches: Callable[[Official], bool]
    """Whether keys and shapes are this family's. Cheap; never raises."""
    convert: Callable[[Official, Mapping[str, Any]], Converted]
    """Read the configuration off keys and shapes, build our modules, load strictly. The mapping holds settings that
    a file cannot tell (GRAM's centre, fields of view ...), by name; unknown names raise :class:`ZooError`, as does the
    first missing, extra or misshapen key."""
    replays: Callable[[Mapping[str, Any]], bool]
    """Whether a fixture's ``meta.json`` is of this family. Cheap; never raises, whatever other families' hold."""
    replay: Callable[[Fixture, str], dict[str, Tensor]]
    """All arrays of one case, by their name without the case: "mid/w", "out/image"; those recorded in part, whole.
    The official weights come from ``fixture.state(model)`` and go through the same conversion as a user's file."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What ``convert`` takes in its mapping: name -> one line of explanation."""
    export: Callable[[Mapping[str, Configurable]], dict[str, Any]] | None = None
    """Our modules back to the official file's layout (nested dict of tensors and plain values)."""
    includes: Sequence[str] = ()
    """Families whose files may be given beside this one's own, or are part of them."""
    read: Callable[..., Official] | None = None
    """How files are read that are neither torch files nor safetensors, from their paths."""


def refuse_settings(settings: Mapping[str, Any], family: str) -> None:
    """For families whose files tell everything.

    Raises:
        ZooError: naming the first setting.
    """
    for name in settings:
        raise ZooError(f"{family} has no setting {name!r}, nor any other: its files tell everything")


def choose(settings: Mapping[str, Any], defaults: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The defaults, and a user's settings over them.

    Args:
        defaults: each also tells what its setting may be: true or false, a whole number, a number, text, or so many
            numbers; None takes anything.

    Raises:
        ZooError: naming the first setting that there is not, or that is something else than its default.
    """
    for name, value in settings.items():
        if name not in defaults:
            raise ZooError(f"{family} has no setting {name!r}, but: {', '.join(defaults)}")
        match defaults[name]:
            case bool():
                fits, wanted = isinstance(value, bool), "true or false"
            case int():
                fits, wanted = _is_number(value) and isinstance(value, int) and value >= 0, "a whole number"
            case float():
                fits, wanted = _is_number(value), "a number"
            case str():
                fits, wanted = isinstance(value, str), "text"
            case tuple() as example:
                fits = isinstance(value, list | tuple) and len(value) == len(example) and all(map(_is_number, value))
                wanted = f"{len(example)} numbers"
            case _:
                fits, wanted = True, ""
        if not fits:
            raise ZooError(f"{family}: {name} must be {wanted}, not {value!r}")
    return {**defaults, **settings}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shape_of(state: State, key: str, dims: int, where: str) -> tuple[int, ...]:
    """The shape of ``state[key]``, which must have ``dims`` dimensions.

    Raises:
        ZooError: naming the key.
    """
    if key not in state:
        raise ZooError(f"{where}: the key {key!r} is missing")
    if state[key].ndim != dims:
        raise ZooError(f"{where}: {key!r} has shape {tuple(state[key].shape)}, expected {dims} dimensions")
    return tuple(state[key].shape)


def take(state: State, renames: Mapping[str, str], own: Mapping[str, Tensor], where: str) -> State:
    """Rename official keys to ours, all of them.

    Args:
        renames: official key -> our key.
        own: our tensors, whose shapes they must have; keys that are not there may have any.

    Raises:
        ZooError: naming the first official key that is missing or misshapen, or the first that is left over.
    """
    for official, ours in renames.items():
        if official not in state:
            raise ZooError(f"{where}: the key {official!r} is missing")
        if ours in own and (found := state[official].shape) != own[ours].shape:
            raise ZooError(f"{where}: {official!r} has shape {tuple(found)}, expected {tuple(own[ours].shape)}")
    for key in state:
        if key not in renames:
            raise ZooError(f"{where}: the key {key!r} is not known")
    return {ours: state[official] for official, ours in renames.items()}


def check_numbers(key: str, found: Tensor, ours: Tensor, where: str) -> None:
    """Refuse numbers of another kind than ours, which casting would change without a word.

    Raises:
        ZooError: naming the key.
    """
    if ours.is_floating_point() != found.is_floating_point():
        raise ZooError(f"{where}: {key!r} is of {found.dtype}, where {ours.dtype} is expected")


def fill(module: Configurable, state: State, where: str) -> Configurable:
    """Load our keys into ``module``, strictly. One built on the "meta" device takes the tensors themselves, uncopied.

    Raises:
        ZooError: naming the first key that is missing, extra or of another shape.
    """
    own = module.state_dict()
    for key, tensor in own.items():
        if key not in state:
            raise ZooError(f"{where}: nothing in the file gives {key!r}")
        check_numbers(key, state[key], tensor, where)
        if state[key].shape != tensor.shape:
            raise ZooError(f"{where}: {key!r} has shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)}")
    for key in state:
        if key not in own:
            raise ZooError(f"{where}: {key!r} has no place in {type(module).__name__}")
    state = {key: state[key].to(tensor.dtype) for key, tensor in own.items()}
    module.load_state_dict(state, strict=True, assign=any(tensor.is_meta for tensor in own.values()))
    return module
