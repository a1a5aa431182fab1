"""pSp: ``psp_ffhq_encode.pt`` and its kind, an encoder with the StyleGAN2 it was trained for. e4e's files are alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from models.configurable import Configurable
from models.encoders.pyramid import Encoder4Editing, GradualStyleEncoder
from models.errors import one_line, shown
from models.generators.stylegan2 import StyleGAN2Generator
from models.latents import Latents
from models.zoo import irse50, stylegan2
from models.zoo.family import Converted, Family, Official, State, ZooError, refuse_settings, shape_of
from models.zoo.parity import Fixture

EncoderType = type[GradualStyleEncoder]
"""Our classes are named as the official option ``encoder_type`` names theirs; their keys and shapes are the same."""

MARK = "encoder.styles.0.linear.weight"


def state_name(official: Official) -> str | None:
    """Name of the state dict that holds an encoder."""
    return next((name for name, state in official.states.items() if MARK in state), None)


def beside(official: Official, name: str, value: str) -> Any:
    """The value that lies in the same file as the state dict ``name``; None when there is none."""
    return official.values.get(name.removesuffix("state_dict") + value)


def matches(official: Official, *, cls: EncoderType) -> bool:
    """Whether a file holds an encoder of this type. One that does not say its type could be of any."""
    name = state_name(official)
    if name is None:
        return False
    return _options(official, name).get("encoder_type", cls.__name__) == cls.__name__


def _options(official: Official, name: str) -> Mapping[str, Any]:
    """What a file says of its training beside a state dict; nothing where it says something else."""
    found = beside(official, name, "opts")
    return found if isinstance(found, dict) else {}


def convert(official: Official, settings: Mapping[str, Any], *, cls: EncoderType, family: str) -> Converted:
    """The encoder, and the generator where the file has its decoder. See :class:`models.zoo.family.Family`."""
    refuse_settings(settings, family)
    name = state_name(official)
    if name is None:
        raise ZooError(f"{family}: the key {MARK!r} is missing")
    if not isinstance(beside(official, name, "opts"), dict | None):
        raise ZooError(f"{family}: opts are not options, but {shown(beside(official, name, 'opts'))}")
    options = _options(official, name)
    if (found := options.get("encoder_type", cls.__name__)) != cls.__name__:
        raise ZooError(f"{family}: the file holds a {one_line(found)[:80]}, not a {cls.__name__}")
    average = beside(official, name, "latent_avg")
    if not options.get("start_from_latent_avg", average is not None):
        average = None
    elif average is None:
        raise ZooError(f"{family}: its codes start from latent_avg, which the file does not have")
    parts: dict[str, State] = {"encoder": {}, "decoder": {}}
    for key, tensor in official.states[name].items():
        part, _, rest = key.partition(".")
        if part not in parts:
            raise ZooError(f"{family}: the key {key!r} is not known")
        parts[part][rest] = tensor
    encoder = build(cls, parts["encoder"], average, f"{family} encoder")
    size = f"{encoder.resolution} px, {encoder.num_ws} codes of {encoder.w_dim}"
    if not parts["decoder"]:
        return Converted({"encoder": encoder}, f"{family} encoder, {size}")
    generator = stylegan2.build_generator(parts["decoder"], f"{family} decoder")
    if (sizes := (generator.num_ws, generator.w_dim)) != (encoder.num_ws, encoder.w_dim):
        raise ZooError(f"{family}: the decoder takes {sizes[0]} codes of {sizes[1]}, the encoder gives {size}")
    if average is None:
        generator.update_mean()
    else:
        generator.w_avg.copy_(encoder.latent_avg.mean(0))
    return Converted(
        {"encoder": encoder, "generator": generator},
        f"{family} encoder, {size}, with its StyleGAN2 of {generator.resolution} px",
        {"recipe": "ffhq"},
    )


def build(cls: EncoderType, state: State, latent_avg: Tensor | None, where: str) -> GradualStyleEncoder:
    """An encoder from its official state dict, in evaluation mode.

    Args:
        latent_avg: (num_ws, w_dim) or (w_dim,); None for zeros.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    settings = irse50.trunk_settings(state, where)
    if (stages := len(settings["depths"])) != 4:
        raise ZooError(f"{where}: its trunk has {stages} stages, expected 4")
    heads = [int(found[1]) for key in state if (found := re.match(r"styles\.(\d+)\.", key))]
    strided = [key for key in state if re.fullmatch(r"styles\.0\.convs\.\d+\.weight", key)]
    w_dim = shape_of(state, "styles.0.linear.weight", 2, where)[0]
    num_ws = 1 + max(heads)
    channels = shape_of(state, irse50.INPUT, 4, where)[1]
    settings |= {"num_ws": num_ws, "w_dim": w_dim, "channels": channels, "resolution": 16 << len(strided)}
    average = torch.zeros(w_dim) if latent_avg is None else latent_avg
    if average.shape not in ((w_dim,), (1, w_dim), (num_ws, w_dim)):
        raise ZooError(f"{where}: latent_avg has shape {tuple(average.shape)}, expected {(num_ws, w_dim)}")
    return irse50.load(cls, settings, {**state, "latent_avg": average.expand(num_ws, w_dim).clone()}, where)


def export(modules: Mapping[str, Configurable]) -> dict[str, Any]:
    """``state_dict``, ``opts`` and ``latent_avg``, with the decoder where there is a generator."""
    encoder = cast(GradualStyleEncoder, modules["encoder"])
    state = {f"encoder.{key}": tensor for key, tensor in irse50.official_state(encoder).items()}
    average = state.pop("encoder.latent_avg")
    if isinstance(generator := modules.get("generator"), StyleGAN2Generator):
        state |= {f"decoder.{key}": tensor for key, tensor in stylegan2.official_generator(generator).items()}
    size = 2 ** (encoder.num_ws // 2 + 1)  # num_ws = 2 log2(size) - 2
    options = {
        "encoder_type": type(encoder).__name__,
        "output_size": size,
        "stylegan_size": size,
        "start_from_latent_avg": True,
        "learn_in_w": False,
        "input_nc": encoder.channels,
        "label_nc": 0 if encoder.channels == 3 else encoder.channels,
    }
    return {"state_dict": state, "opts": options, "latent_avg": average}


def replay(fixture: Fixture, case: str, *, cls: EncoderType, family: str) -> dict[str, Tensor]:
    """Codes of a picture, with and without the mean code, and those of e4e's progressive stages."""
    average = fixture.input(case, "latent_avg")
    if "encoder" not in fixture.memory:
        state = {f"encoder.{key}": tensor for key, tensor in fixture.state("encoder").items()}
        official = Official({"state_dict": state}, {"opts": {"encoder_type": cls.__name__}, "latent_avg": average})
        fixture.memory["encoder"] = convert(official, {}, cls=cls, family=family).modules["encoder"]
    encoder, image = cast(GradualStyleEncoder, fixture.memory["encoder"]), irse50.picture(fixture, case)
    with irse50.recorded(encoder.trunk, fixture, case) as results:
        results["out/w_plus"] = encoder.codes(image, Latents({"ws": average[None]})).ws
    results["out/codes"] = encoder(image).ws
    for name in fixture.targets()[case]:
        if (found := re.fullmatch(r"out/codes_stage(\d+)", name)) and isinstance(encoder, Encoder4Editing):
            encoder.set_progressive_stage(int(found[1]))
            results[name] = encoder(image).ws
            encoder.set_progressive_stage(None)
    return results


def family(name: str, cls: EncoderType, files: str, origin: str) -> Family:
    """The family of files that hold encoders of one type."""
    return Family(
        name=name,
        files=files,
        origin=origin,
        licence="MIT, the decoder as the StyleGAN2 it was made from (NVIDIA: non-commercial)",
        matches=partial(matches, cls=cls),
        convert=partial(convert, cls=cls, family=name),
        replays=lambda meta: meta["config"].get("which") == name,
        replay=partial(replay, cls=cls, family=name),
        export=export,
    )


FAMILY = family(
    "psp",
    GradualStyleEncoder,
    "psp_ffhq_encode.pt, psp_ffhq_frontalization.pt, psp_ffhq_toonify.pt, psp_celebs_*.pt",
    "eladrich/pixel2style2pixel",
)
