"""IR-SE identity networks: ``model_ir_se50.pth`` and its kind (50, 100 or 152 layers, with or without SE)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from models.configurable import Configurable
from models.encoders.irse import ArcFace, IRTrunk, crop_face
from models.zoo.family import Converted, Family, Official, State, ZooError, fill, refuse_settings, shape_of, take
from models.zoo.parity import Fixture

ModuleT = TypeVar("ModuleT", bound=Configurable)

INPUT, LINEAR = "input_layer.0.weight", "output_layer.3.weight"


def trunk_settings(state: State, where: str) -> dict[str, Any]:
    """``widths``, ``depths`` and ``reduction`` of :class:`models.encoders.irse.IRTrunk`, from keys and shapes.

    Raises:
        ZooError: naming what is missing.
    """
    blocks: list[int] = []
    while not blocks or f"body.{len(blocks)}.res_layer.1.weight" in state:
        blocks.append(shape_of(state, f"body.{len(blocks)}.res_layer.1.weight", 4, where)[0])
    stages = [(width, len(list(run))) for width, run in groupby(blocks)]
    squeeze = "body.0.res_layer.5.fc1.weight"
    return {
        "widths": [width for width, _ in stages],
        "depths": [depth for _, depth in stages],
        "reduction": blocks[0] // shape_of(state, squeeze, 4, where)[0] if squeeze in state else None,
    }


def load(cls: Callable[..., ModuleT], settings: Mapping[str, Any], state: State, where: str) -> ModuleT:
    """Build a network with an :class:`IRTrunk` from official keys, which ours are but for the trunk's prefix.

    The tensors of ``state`` become the network's: nothing is copied, nor initialised first.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    with torch.device("meta"):
        module = cls(**settings)
    own = module.state_dict()
    fill(module, take(state, {key.removeprefix("trunk."): key for key in own}, own, where), where)
    return module.eval()


def network(state: State, where: str = "IR-SE identity network") -> ArcFace:
    """The network with these official weights, in evaluation mode.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    settings = trunk_settings(state, where)
    dim, columns = shape_of(state, LINEAR, 2, where)
    side = math.isqrt(columns // settings["widths"][-1])
    resolution = side << len(settings["depths"])
    affine = "output_layer.4.weight" in state
    return load(ArcFace, {**settings, "resolution": resolution, "dim": dim, "affine": affine}, state, where)


def matches(official: Official) -> bool:
    """Whether one of the file's state dicts is an identity network's."""
    return any({INPUT, LINEAR} <= state.keys() for state in official.states.values())


def convert(official: Official, settings: Mapping[str, Any]) -> Converted:
    """See :class:`models.zoo.family.Family`."""
    refuse_settings(settings, "irse50")
    states = [state for state in official.states.values() if {INPUT, LINEAR} <= state.keys()]
    if len(states) != 1:
        raise ZooError(f"IR-SE identity network: the file has {len(states) or 'no'} state dicts with a key {LINEAR!r}")
    identity = network(states[0])
    kind = "IR" if identity.init_args["reduction"] is None else "IR-SE"
    layers = 2 * sum(identity.init_args["depths"]) + 2
    return Converted(
        {"identity": identity}, f"{kind}{layers} identity network, {identity.resolution} px, {identity.dim} features"
    )


def export(modules: Mapping[str, Configurable]) -> dict[str, Tensor]:
    """The bare state dict."""
    return official_state(modules["identity"])


def official_state(module: nn.Module) -> State:
    """Our state dict under official keys."""
    return {key.removeprefix("trunk."): tensor for key, tensor in module.state_dict().items()}


def picture(fixture: Fixture, case: str) -> Tensor:
    """The one image that goes into the network, whatever size its name tells."""
    (name,) = (name for name in fixture.arrays if name.startswith(f"{case}/in/image"))
    return torch.from_numpy(fixture.arrays[name])


@contextmanager
def recorded(trunk: IRTrunk, fixture: Fixture, case: str) -> Iterator[dict[str, Tensor]]:
    """While this is open, outputs inside ``trunk`` are collected under the names of the fixture's "mid" arrays."""
    parts: dict[str, nn.Module] = {"input_layer": trunk.input_layer, "body": trunk.body[-1]}
    parts |= {f"body_{i}": block for i, block in enumerate(trunk.body)}
    parts |= {f"c{i}": trunk.body[end - 1] for i, end in enumerate(trunk.ends)}
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def collect(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[name] = output

        return collect

    names = [name for name in fixture.targets()[case] if name.removeprefix("mid/") in parts]
    handles = [parts[name.removeprefix("mid/")].register_forward_hook(hook(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def replays(meta: Mapping[str, Any]) -> bool:
    """Whether the fixture is an identity network's."""
    return meta["config"].get("which") == "id"


def replay(fixture: Fixture, case: str) -> dict[str, Tensor]:
    """Feature of a face, or of the face in an FFHQ-aligned picture."""
    if "identity" not in fixture.memory:
        official = Official({"": fixture.state("facenet")})
        fixture.memory["identity"] = convert(official, {}).modules["identity"]
    identity = cast(ArcFace, fixture.memory["identity"])
    face = picture(fixture, case)
    with recorded(identity.trunk, fixture, case) as results:
        if face.shape[-1] != identity.resolution:
            results["mid/pooled"] = face = crop_face(face, identity.resolution)
        results["out/feature"] = identity(face)
    return results


FAMILY = Family(
    name="irse50",
    files="model_ir_se50.pth",
    origin="TreB1eN/InsightFace_Pytorch",
    licence="MIT (trained on MS-Celeb-1M, published for non-commercial research)",
    matches=matches,
    convert=convert,
    replays=replays,
    replay=replay,
    export=export,
)
