"""AniFaceGAN: ``generator.pth``, ``dif.pth`` and the two ``vae.pth``, with ``ema.pth`` beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera
from models.configurable import Configurable
from models.generators.anifacegan import AniFaceGANGenerator, CoefficientVAE
from models.generators.gram import BOX, PLANE, sphere_camera, unit_rays
from models.latents import Latents
from models.zoo import gram
from models.zoo.family import Converted, Family, Official, State, ZooError, choose, fill, shape_of, take
from models.zoo.parity import Fixture, repositories

PREFIXES = {"predictor": "model_sample.", "field": "siren.", "view": "siren.color_layer_sine.0.layer"}
"""Where the generator's state dict keeps what."""

RENAMED = {
    "num_steps": "num_manifolds", "alpha_delta": "delta_alpha", "clamp_mode": "sigma_clamp_mode",
}  # fmt: skip
"""What GRAM calls these settings."""

SAME = (
    "img_size", "fov", "ray_start", "ray_end", "center", "levels_start", "levels_end", "delta_final", "last_back",
    "rgb_clamp_mode", "lock_view_dependence", "h_mean", "h_stddev", "v_mean", "v_stddev", "sample_dist",
)  # fmt: skip
"""Settings that GRAM has as well."""

SETTINGS = {
    **{name: gram.SETTINGS[name] for name in SAME},
    **{ours: gram.SETTINGS[theirs] for ours, theirs in RENAMED.items()},
    "white_back": "whether the background plane is white, whatever its radiance",
}

DEFAULTS = gram.FFHQ | {"normalize": BOX, "white_back": False}
"""Of the official videos, by GRAM's names."""


def matches(official: Official) -> bool:
    return any(PREFIXES["predictor"] + "output_layer.weight" in state for state in official.states.values())


def convert(official: Official, settings: Mapping[str, Any]) -> Converted:
    chosen = choose(settings, {name: DEFAULTS[RENAMED.get(name, name)] for name in SETTINGS}, "anifacegan")
    parts = parts_of(official)
    options = DEFAULTS | {RENAMED.get(name, name): value for name, value in chosen.items()}
    generator = build(parts, options)
    identity, expression = generator.mean_identity.shape[1], len(generator.expressions)
    found = (
        f"AniFaceGAN generator: {identity} coefficients of identity, {expression} of expression, "
        f"{generator.field.width} channels, {options['num_manifolds']} surfaces, {generator.resolution} px"
    )
    return Converted({"generator": generator}, found, {"recipe": "anifacegan"})


def parts_of(official: Official) -> dict[str, State]:
    """The state dicts by what they are: generator (its moving average where there is one), deformation, identity and
    expression.

    Raises:
        ZooError: when a file is missing, or there is one too many.
    """
    marks = {"generator": "siren.network.0.layer.weight", "deformation": "final_layer.weight", "VAE": "fc_mu.weight"}
    found = {part: [name for name, s in official.states.items() if mark in s] for part, mark in marks.items()}
    for part, names in found.items():
        if len(names) != (2 if part == "VAE" else 1):
            raise ZooError(
                f"anifacegan: {len(names)} files with a {part}; needed are generator.pth, dif.pth, and the vae.pth "
                "of identities and of expressions"
            )
    generator, deformation = found["generator"][0], found["deformation"][0]
    average = gram.with_average(official.states[generator], official, generator)

    def rank(name: str) -> tuple[bool, int]:
        """Identities first: by the folder's name, else by their larger number of coefficients."""
        return "expression" in name, -shape_of(official.states[name], "encoder.0.0.weight", 2, name)[1]

    identity, expression = sorted(found["VAE"], key=rank)
    return {
        "generator": average,
        "deformation": official.states[deformation],
        "identity": official.states[identity],
        "expression": official.states[expression],
    }


def build(parts: Mapping[str, State], options: Mapping[str, Any]) -> AniFaceGANGenerator:
    """The generator of official state dicts.

    Args:
        parts: see :func:`parts_of`. options: by GRAM's names.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """

    def size(part: str, key: str) -> tuple[int, ...]:
        return shape_of(parts[part], key, 2, part)

    sizes = gram.sizes(parts["generator"], PREFIXES, "generator")
    vae_width, identity = size("identity", "encoder.0.0.weight")
    deform_width, channels = size("deformation", "network.0.layer.weight")
    arguments = gram.arguments(options)
    generator = gram.constructed(
        AniFaceGANGenerator,
        identity=identity,
        expression=size("expression", "encoder.0.0.weight")[1],
        noise=sizes.pop("z_dim") - identity,
        latent=size("identity", "fc_mu.weight")[0],
        vae_width=vae_width,
        vae_layers=gram.count(parts["identity"], "encoder.{}.0.weight"),
        deform_channels=channels,
        deform_width=deform_width,
        deform_layers=gram.count(parts["deformation"], "network.{}.layer.weight"),
        deform_mapping_width=size("deformation", "mapping_network.network.0.weight")[0],
        deform_mapping_layers=gram.count(parts["deformation"], "mapping_network.network.{}.weight", 2) - 1,
        white_plane=arguments.pop("white_back"),
        **sizes,
        **arguments,
    )
    own = generator.state_dict()
    ours: State = {"mean": generator.mean, "mean_identity": generator.mean_identity}
    for part, keys in layout(generator).items():
        ours |= take(parts[part], {official: key for key, official in keys.items()}, own, part)
    fill(generator, ours, "anifacegan")
    generator.update_mean()  # official code estimates it anew each time
    return generator.eval()


def layout(generator: AniFaceGANGenerator) -> dict[str, dict[str, str]]:
    """Our key -> official key of each part."""
    deformation = {"deformation.last": "final_layer"}
    for i in range(len(generator.deformation.layers)):
        deformation[f"deformation.layers.{i}"] = f"network.{i}.layer"
    for i in range(len(generator.deformation.style.layers)):
        deformation[f"deformation.style.layers.{i}"] = f"mapping_network.network.{2 * i}"
    return {
        "generator": gram.layout(generator, PREFIXES),
        "deformation": gram.both(deformation),
        "identity": _vae_layout("identity_vae", generator.identity_vae),
        "expression": _vae_layout("expression_vae", generator.expression_vae),
    }


def _vae_layout(name: str, vae: CoefficientVAE) -> dict[str, str]:
    modules = {"mean": "fc_mu", "log_variance": "fc_var", "first": "decoder_input", "last": "final_layer.2"}
    modules |= {f"encoder.{i}": f"encoder.{i}.0" for i in range(len(vae.encoder))}
    modules |= {f"decoder.{i}": f"decoder.{i}.0" for i in range(len(vae.decoder) - 1)}
    modules[f"decoder.{len(vae.decoder) - 1}"] = "final_layer.0"
    return gram.both({f"{name}.{ours}": official for ours, official in modules.items()})


def export(modules: Mapping[str, Configurable]) -> dict[str, Any]:
    """The files of an :class:`AniFaceGANGenerator`, by path without suffix."""
    generator = modules["generator"]
    if not isinstance(generator, AniFaceGANGenerator):
        raise ZooError(f"anifacegan: {type(generator).__name__} is not an AniFaceGANGenerator")
    own = generator.state_dict()
    files = {"generator": "generator", "deformation": "dif", "identity": "identity/vae", "expression": "expression/vae"}
    return {
        files[part]: {official: own[ours] for ours, official in keys.items()}
        for part, keys in layout(generator).items()
    }


def replays(meta: Mapping[str, Any]) -> bool:
    return FAMILY.origin in repositories(meta)


def replay(fixture: Fixture, case: str) -> dict[str, Tensor]:
    cases = {
        "full": _replay_full, "view": _replay_view, "neutral": _replay_neutral,
        "deform": _replay_deformation, "rad": _replay_radiance, "vae": _replay_vaes,
    }  # fmt: skip
    return cases[case](fixture)


def _generator(fixture: Fixture, *, lock_view: bool = False) -> AniFaceGANGenerator:
    key = f"lock_view={lock_view}"
    if key not in fixture.memory:
        training = fixture.meta["models"]["generator"]["constructor"]["metadata"]
        videos = {"white_back": False, "lock_view_dependence": lock_view}  # which differ from training
        given = {**training, **fixture.config.get("overrides", {}), **fixture.config, **videos}
        names = {"generator": "generator", "deform": "dif", "vae_id": "identity/vae", "vae_exp": "expression/vae"}
        official = Official({name: fixture.state(model) for model, name in names.items()})
        settings = {name: value for name, value in given.items() if name in SETTINGS}
        generator = convert(official, settings).modules["generator"]
        assert isinstance(generator, AniFaceGANGenerator)
        averages = [fixture.input("full", name) for name in ("avg_frequencies", "avg_phase_shifts")]
        generator.mean.copy_(gram.stacked(averages[0], averages[1], len(generator.mean))[0])
        fixture.memory[key] = generator
    return fixture.memory[key]


def _latents(fixture: Fixture, generator: AniFaceGANGenerator, *, truncated: bool) -> Latents:
    z = torch.cat([fixture.input("full", "normal_id"), fixture.input("full", "noise")], -1)
    psi = float(fixture.input("full", "psi")) if truncated else 1.0
    return generator.mapping(z, truncation=psi, cutoff=len(generator.mean))  # identities are not truncated


def _expression(fixture: Fixture, generator: AniFaceGANGenerator) -> Tensor:
    return generator.expression_vae.decode(fixture.input("full", "normal_exp"))


def _camera(fixture: Fixture, generator: AniFaceGANGenerator) -> Camera:
    pitch, yaw = fixture.input("full", "pitch_yaw")
    count = len(fixture.input("full", "noise"))
    return sphere_camera(pitch.expand(count), yaw.expand(count), generator.fov, generator.resolution)


def _replay_full(fixture: Fixture) -> dict[str, Tensor]:
    """Views locked and codes truncated, as in the official videos."""
    generator = _generator(fixture, lock_view=True)
    camera, side = _camera(fixture, generator), generator.resolution
    ws, expression = _latents(fixture, generator, truncated=True), _expression(fixture, generator)
    origins, directions, _ = unit_rays(camera, side)
    found, distance, shift = generator.search(ws, origins, directions, expression)
    samples = origins[:, :, None] + distance * directions[:, :, None]
    surfaces = generator.surfaces(ws, origins, directions, expression)
    colour, weights, missed = generator.trace(ws, origins, directions, surfaces)
    plane = origins + (PLANE - origins[..., 2:]) / directions[..., 2:] * directions
    target = torch.cat([found.at(samples), plane[:, :, None]], 2)
    canonical = torch.cat([found.at(samples) + found.at(shift), plane[:, :, None]], 2)
    frequencies, _ = gram.unstacked(_latents(fixture, generator, truncated=False).groups["ws"])
    cam2world = camera.cam2world * torch.tensor([1.0, -1.0, -1.0, 1.0])  # y up, looking along -z
    depth = (weights * surfaces.distance).sum(-1) / (1 - missed)
    return {
        "mid/frequencies": frequencies,
        "mid/cam2world": cam2world,
        "out/image": colour.unflatten(1, (side, side)).movedim(-1, 1),
        "out/depth": depth.unflatten(1, (1, side, side)),
        "out/is_valid": F.pad(found.valid, (0, 1), value=True),
        "mid/points_world": samples,
        "mid/ray_directions_world": directions,
        "mid/background_points": plane[:, :, None],
        "mid/weights": weights,
        "out/intersections_target": target,
        "out/intersections_canonical": canonical,
    }


def _replay_view(fixture: Fixture) -> dict[str, Tensor]:
    generator = _generator(fixture)
    ws, expression = _latents(fixture, generator, truncated=True), _expression(fixture, generator)
    return {"out/image": generator.synthesis(ws, _camera(fixture, generator), expression=expression).image}


def _replay_neutral(fixture: Fixture) -> dict[str, Tensor]:
    generator = _generator(fixture)
    ws = _latents(fixture, generator, truncated=False)
    return {"out/image": generator.synthesis(ws, _camera(fixture, generator)).image}


def _replay_deformation(fixture: Fixture) -> dict[str, Tensor]:
    generator, points = _generator(fixture), fixture.input("deform", "points")
    ws, expression = _latents(fixture, generator, truncated=False)[:1], _expression(fixture, generator)[:1]
    shift = generator.shift(ws, points.flatten(1, 2), expression).unflatten(1, points.shape[1:3])
    return {
        "out/new_coords": points * (2 / BOX) + shift,
        "out/deformation": shift,
        "out/scalar": generator.deformed_scalar(points, shift).flatten(1)[..., None],
    }


def _replay_radiance(fixture: Fixture) -> dict[str, Tensor]:
    generator = _generator(fixture)
    ws = _latents(fixture, generator, truncated=False)[:1]
    points, directions = fixture.input("rad", "points"), fixture.input("rad", "ray_directions")
    colour, density = generator.field(generator.field.modulate(ws.groups["ws"]), points, directions).split([3, 1], -1)
    return {"out/rgb_sigma": torch.cat([colour.sigmoid(), density], -1)}


def _replay_vaes(fixture: Fixture) -> dict[str, Tensor]:
    generator = _generator(fixture)
    identity, log_variance = generator.identity_vae.encode(fixture.input("vae", "coeff_id"))
    expression, _ = generator.expression_vae.encode(fixture.input("vae", "coeff_exp"))
    return {
        "out/z_id": generator.identity_vae.decode(fixture.input("full", "normal_id")),
        "out/z_exp": _expression(fixture, generator),
        "out/id_mu": identity,
        "out/id_log_var": log_variance,
        "out/exp_mu": expression,
    }


FAMILY = Family(
    name="anifacegan",
    files="generator.pth, dif.pth, identity/vae.pth, expression/vae.pth, with ema.pth",
    origin="YueWuHKUST/AniFaceGAN",
    licence="none stated",
    matches=matches,
    convert=convert,
    replays=replays,
    replay=replay,
    settings=SETTINGS,
    export=export,
)
