"""StyleGAN2: files of rosinality's stylegan2-pytorch, converted from the original or trained there.

A file holds the moving average ``g_ema`` with the mean code ``latent_avg``, and sometimes the networks ``g`` and ``d``
of the training; or it is a bare state dict. Of ``g`` and ``g_ema`` the latter is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.configurable import Configurable
from models.generators.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from models.latents import Latents
from models.zoo.family import Converted, Family, Official, State, ZooError, check_numbers, choose, shape_of
from models.zoo.parity import Fixture, repositories

GENERATOR_MARKS = ("style.1.weight", "input.input", "to_rgb1.conv.weight")
DISCRIMINATOR_MARKS = ("convs.0.0.weight", "final_conv.0.weight", "final_linear.1.weight")
LR_MLP = 0.01


NOISES = "noises.noise_"


def find(official: Official, marks: Sequence[str]) -> str | None:
    """Name of the state dict that has the keys ``marks``, a moving average first."""
    found = [name for name, state in official.states.items() if all(mark in state for mark in marks)]
    return min(found, key=lambda name: not name.endswith("g_ema"), default=None)


def matches(official: Official) -> bool:
    # Other families have such a discriminator beside their own generator.
    if not official.states or find(official, GENERATOR_MARKS) is not None:
        return bool(official.states)
    return all(mark in state for state in official.states.values() for mark in DISCRIMINATOR_MARKS)


def convert(official: Official, settings: Mapping[str, Any]) -> Converted:
    options = choose(settings, {"lr_mlp": LR_MLP}, "stylegan2")
    modules: dict[str, Configurable] = {}
    found = []
    if (name := find(official, GENERATOR_MARKS)) is not None:
        where = name or "stylegan2 generator"
        generator = build_generator(official.states[name], where, options["lr_mlp"])
        average = official.values.get(re.sub(r"(g_ema|g)$", "latent_avg", name))
        if average is None:
            generator.update_mean()
        elif (average := torch.as_tensor(average)).numel() == generator.w_dim:
            generator.w_avg.copy_(average.flatten())
        else:
            raise ZooError(f"{where}: 'latent_avg' has shape {tuple(average.shape)}, expected ({generator.w_dim},)")
        modules["generator"] = generator
        mean = "mean code estimated" if average is None else "with its mean code"
        drawn = "" if has_noise_maps(official.states[name]) else ", noise maps drawn, as the file has none"
        sizes = f"{generator.resolution} px, {generator.num_ws} codes of {generator.w_dim}"
        found.append(f"generator, {sizes}, {mean}{drawn}")
    if (name := find(official, DISCRIMINATOR_MARKS)) is not None:
        discriminator = build_discriminator(official.states[name], name or "stylegan2 discriminator")
        modules["discriminator"] = discriminator
        found.append(f"discriminator, {discriminator.resolution} px")
    if not modules:
        raise ZooError(f"stylegan2: no network in the file has the key {GENERATOR_MARKS[0]!r}")
    return Converted(modules, f"StyleGAN2 {'; '.join(found)}", {"recipe": "ffhq"})


def build_generator(state: State, where: str, lr_mlp: float = LR_MLP) -> StyleGAN2Generator:
    """The generator of an official state dict; its mean code stays 0.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    outputs = ["to_rgb1.conv.weight", *(f"to_rgbs.{k}.conv.weight" for k in _numbers(state, r"to_rgbs\.(\d+)\."))]
    generator = StyleGAN2Generator(
        [shape_of(state, key, 5, where)[2] for key in outputs],
        style_dim=shape_of(state, "style.1.weight", 2, where)[1],
        mapping_layers=len(_numbers(state, r"style\.(\d+)\.weight")),
        mapping_lr=lr_mlp,
        taps=_taps(state, "to_rgbs.0.upsample.kernel", where),
    )
    own = official_generator(generator)
    if not has_noise_maps(state):
        draws = torch.Generator().manual_seed(0)
        maps = {key: torch.randn(own[key].shape, generator=draws) for key in own if key.startswith(NOISES)}
        state = {**state, **maps}
    _load(own, state, where)
    return generator


def has_noise_maps(state: State) -> bool:
    """Whether a state dict has any; files of before they were saved do not. They are constants that nothing trained."""
    return any(key.startswith(NOISES) for key in state)


def build_discriminator(state: State, where: str) -> StyleGAN2Discriminator:
    """The discriminator of an official state dict.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    ends = ["convs.0.0.weight", *(f"convs.{k}.conv2.1.weight" for k in _numbers(state, r"convs\.(\d+)\.conv2\."))]
    discriminator = StyleGAN2Discriminator(
        [shape_of(state, key, 4, where)[0] for key in ends], taps=_taps(state, "convs.1.conv2.0.kernel", where)
    )
    _load(official_discriminator(discriminator), state, where)
    return discriminator


def _numbers(state: State, pattern: str) -> list[int]:
    return sorted({int(found[1]) for key in state if (found := re.match(pattern, key))})


def _taps(state: State, key: str, where: str) -> list[float]:
    """The taps whose outer product a stored kernel is, whatever its gain."""
    shape_of(state, key, 2, where)
    kernel = state[key]
    return (kernel.sum(0) / kernel.sum()).tolist()


def _load(own: State, state: State, where: str) -> None:
    """Copy an official state dict into views of our weights; filters are compared, since the first one made them."""
    for key in state:
        if key not in own:
            raise ZooError(f"{where}: the key {key!r} is not known")
    for key, tensor in own.items():
        if key not in state:
            raise ZooError(f"{where}: the key {key!r} is missing")
        if (found := state[key]).shape != tensor.shape:
            raise ZooError(f"{where}: {key!r} has shape {tuple(found.shape)}, expected {tuple(tensor.shape)}")
        if key.endswith(".kernel"):
            if not torch.allclose(found.to(tensor), tensor, rtol=_rounding(found)):
                raise ZooError(f"{where}: {key!r} is another filter than the first, or not separable")
        else:
            check_numbers(key, found, tensor, where)
            tensor.copy_(found)


def _rounding(found: Tensor) -> float:
    """Of numbers that were stored in fewer bits."""
    return max(1e-5, 4 * torch.finfo(found.dtype).eps) if found.is_floating_point() else 1e-5


def official_generator(generator: StyleGAN2Generator) -> State:
    """Views of our weights under the official keys, in official order and shape; filters are copies."""
    own = generator.state_dict()
    kernel = generator.backbone.kernel * 4  # keeps the brightness when every other row and column is zero
    state: State = {}

    def weights(official: str, ours: str) -> None:
        for name in ("weight", "bias"):
            state[f"{official}.{name}"] = own[f"{ours}.{name}"]

    def layer(official: str, block: int, name: str) -> None:
        ours = f"backbone.blocks.{block}.{name}"
        state[f"{official}.conv.weight"] = own[f"{ours}.weight"][None]
        if name == "conv0":
            state[f"{official}.conv.blur.kernel"] = kernel
        weights(f"{official}.conv.modulation", f"{ours}.affine")
        state[f"{official}.noise.weight"] = own[f"{ours}.noise_strength"][None]
        state[f"{official}.activate.bias"] = own[f"{ours}.bias"]

    def output(official: str, block: int) -> None:
        ours = f"backbone.blocks.{block}.to_image"
        state[f"{official}.bias"] = own[f"{ours}.bias"][None, :, None, None]
        if block:
            state[f"{official}.upsample.kernel"] = kernel
        state[f"{official}.conv.weight"] = own[f"{ours}.weight"][None]
        weights(f"{official}.conv.modulation", f"{ours}.affine")

    for k in range(len(generator.map_network.layers)):
        weights(f"style.{k + 1}", f"map_network.layers.{k}")  # style.0 normalises
    state["input.input"] = own["backbone.blocks.0.const"][None]
    layer("conv1", 0, "conv1")
    output("to_rgb1", 0)
    later = range(1, len(generator.backbone.blocks))
    for block in later:
        layer(f"convs.{2 * block - 2}", block, "conv0")
        layer(f"convs.{2 * block - 1}", block, "conv1")
    for block in later:
        output(f"to_rgbs.{block - 1}", block)
    maps = [own[key] for key in own if key.startswith("backbone.") and key.endswith(".noise")]
    return state | {f"noises.noise_{k}": noise[None, None] for k, noise in enumerate(maps)}


def official_discriminator(discriminator: StyleGAN2Discriminator) -> State:
    """As :func:`official_generator`."""
    own, kernel = discriminator.state_dict(), discriminator.kernel
    state = {"convs.0.0.weight": own["stem.weight"], "convs.0.1.bias": own["stem.bias"]}
    for k in range(len(discriminator.blocks)):
        official, ours = f"convs.{k + 1}", f"blocks.{k}"
        state |= {
            f"{official}.conv1.0.weight": own[f"{ours}.first.weight"],
            f"{official}.conv1.1.bias": own[f"{ours}.first.bias"],
            f"{official}.conv2.0.kernel": kernel,
            f"{official}.conv2.1.weight": own[f"{ours}.second.weight"],
            f"{official}.conv2.2.bias": own[f"{ours}.second.bias"],
            f"{official}.skip.0.kernel": kernel,
            f"{official}.skip.1.weight": own[f"{ours}.skip.weight"],
        }
    state |= {"final_conv.0.weight": own["conv.weight"], "final_conv.1.bias": own["conv.bias"]}
    for k, name in enumerate(("dense", "logit")):
        state |= {f"final_linear.{k}.{part}": own[f"{name}.{part}"] for part in ("weight", "bias")}
    return state


def export(modules: Mapping[str, Configurable]) -> dict[str, Any]:
    """``g_ema`` and ``latent_avg``, and ``d`` where there is a discriminator.

    Raises:
        ZooError: without a StyleGAN2 generator, or with a discriminator of another kind.
    """
    generator, discriminator = modules.get("generator"), modules.get("discriminator")
    if not isinstance(generator, StyleGAN2Generator):
        raise ZooError("stylegan2 exports a StyleGAN2Generator named generator")
    file: dict[str, Any] = {"g_ema": official_generator(generator), "latent_avg": generator.w_avg}
    if discriminator is not None:
        if not isinstance(discriminator, StyleGAN2Discriminator):
            raise ZooError(f"stylegan2 exports a StyleGAN2Discriminator, not a {type(discriminator).__name__}")
        file["d"] = official_discriminator(discriminator)
    return file


# -- parity ------------------------------------------------------------------------------------------------------


def replays(meta: Mapping[str, Any]) -> bool:
    generator = meta.get("models", {}).get("generator", {})
    return FAMILY.origin in repositories(meta) and generator.get("class") == "model.Generator"


def replay(fixture: Fixture, case: str) -> dict[str, Tensor]:
    if not fixture.memory:
        names = {"generator": "g_ema", "discriminator": "d"}
        states = {names[model]: fixture.state(model) for model in fixture.meta["models"]}
        settings = {name: fixture.config[name] for name in FAMILY.settings if name in fixture.config}
        average = {"latent_avg": torch.from_numpy(fixture.arrays["in/latent_avg"])}
        fixture.memory.update(convert(Official(states, average), settings).modules)
    if case == "disc":
        return _replay_discriminator(fixture)
    generator = cast(StyleGAN2Generator, fixture.memory["generator"])
    randomness = None
    if case == "mix":
        one, other = (generator.mapping(fixture.input(case, name)) for name in ("z1", "z2"))
        ws = one.mix(other, int(fixture.input(case, "inject_index")))
    elif case in ("wplus", "latent_avg"):
        codes = fixture.input("wplus", "latent")
        ws = Latents({"ws": codes if case == "wplus" else codes + generator.w_avg})
    else:
        ws = generator.mapping(fixture.input("z", "z"))
    if case == "trunc":
        centre = Latents({"ws": fixture.input(case, "truncation_latent")[:, None]})
        ws = ws.truncate(centre, float(fixture.input(case, "truncation")))
    if case == "noise":
        randomness = [fixture.input(case, f"noise_{k}") for k in range(len(generator.noise_sides))]
    first_up = generator.backbone.blocks[1].conv0
    seen: dict[str, Any] = {}
    hook = cast(nn.Module, first_up).register_forward_hook(lambda _module, _inputs, out: seen.update(up=out))
    try:
        rendering = generator.synthesis(ws, randomness=randomness, taps=("block4", "image4", "image8"))
    finally:
        hook.remove()
    image, taps = rendering.image, rendering.taps
    pooled = F.avg_pool2d(image, image.shape[-1] // fixture.arrays[f"{case}/out/image"].shape[-1])
    return {
        "mid/w": ws.ws[:, 0],
        "mid/latents_first": ws.ws[:, 0],
        "mid/conv1": taps["block4"],
        "mid/convs_0": seen["up"],
        "mid/to_rgb1": taps["image4"],
        "mid/to_rgbs_0": taps["image8"],
        "out/image": pooled,
        "out/image_mean_std": torch.stack([image.mean((1, 2, 3)), image.std((1, 2, 3))], 1),
    }


def _replay_discriminator(fixture: Fixture) -> dict[str, Tensor]:
    discriminator = cast(StyleGAN2Discriminator, fixture.memory["discriminator"])
    image = fixture.input("disc", "image_b4")
    seen: dict[str, Any] = {}
    hook = discriminator.blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.update(stem=inputs[0]))
    try:
        verdict = discriminator(image)
    finally:
        hook.remove()
    return {
        "mid/convs_0": seen["stem"],
        "mid/convs_out": verdict.features[-1],
        "out/logits": verdict.logits,
        "out/logits_first_only": discriminator(image[:1]).logits,
        "out/logits_b2": discriminator(image[:2]).logits,
    }


FAMILY = Family(
    name="stylegan2",
    files="stylegan2-ffhq-config-f.pt, 550000.pt, any NAME.pt of stylegan2-pytorch",
    origin="rosinality/stylegan2-pytorch",
    licence="MIT for the code; weights converted from NVIDIA's: Nvidia Source Code License-NC (non-commercial)",
    matches=matches,
    convert=convert,
    replays=replays,
    replay=replay,
    settings={"lr_mlp": f"learning rate factor of the mapping network, {LR_MLP} by default"},
    export=export,
)
