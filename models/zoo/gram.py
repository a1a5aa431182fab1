"""GRAM: ``generator.pth``, with ``ema.pth`` beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.camera import Camera
from models.configurable import Configurable
from models.errors import one_line
from models.generators.gram import FLAT, GRAMGenerator, sphere_camera, unit_rays
from models.latents import Latents
from models.rendering.manifolds import first_brackets
from models.rendering.pointwise import affine
from models.zoo.family import Converted, Family, Official, State, ZooError, choose, fill, shape_of, take
from models.zoo.parity import Fixture, repositories

GeneratorT = TypeVar("GeneratorT", bound=GRAMGenerator)

PREFIXES = {
    "predictor": "representation.sample_network.",
    "field": "representation.rf_network.",
    "view": "representation.rf_network.color_layer.0.layer",
}
"""Where the official state dict keeps what."""

SETTINGS = {
    "preset": "official configuration to start from: ffhq, cats or carla; by the scalar field's width if not given",
    "img_size": "native image side, pixels",
    "fov": "field of view, degrees",
    "ray_start": "distance from the camera where the search for surfaces starts",
    "ray_end": "distance from the camera where it ends",
    "normalize": "side of the cube that the radiance network sees as [-1, 1]",
    "center": "centre of the scalar field's first sphere, in units of .12",
    "num_samples": "samples per ray of the search",
    "num_manifolds": "surfaces, the background plane included",
    "levels_start": "level of the first manifold",
    "levels_end": "level of the last manifold",
    "delta_alpha": "optical thickness of a manifold",
    "delta_final": "optical thickness of the background plane",
    "background": "whether there is a background plane",
    "white_back": "whether what rays miss is white",
    "last_back": "whether the last surface gets all that is left of a ray",
    "sigma_clamp_mode": "softplus, relu or none",
    "rgb_clamp_mode": "widen_sigmoid, sigmoid or none",
    "lock_view_dependence": "colours as seen along -z, from everywhere",
    "h_mean": "mean yaw of the training poses, radians, pi / 2 in front",
    "h_stddev": "spread of the yaw, radians",
    "v_mean": "mean pitch of the training poses, radians from above",
    "v_stddev": "spread of the pitch, radians",
    "sample_dist": "gaussian, uniform or spherical_uniform, which is taken for uniform in the angles",
}

FFHQ: dict[str, Any] = {
    "img_size": 256, "fov": 12.0, "ray_start": 0.88, "ray_end": 1.12, "normalize": 0.24, "center": (0, 0, -1.5),
    "num_samples": 64, "num_manifolds": 24, "levels_start": 23.0, "levels_end": 8.0, "delta_alpha": 0.04,
    "delta_final": 1e10, "background": True, "white_back": False, "last_back": False, "sigma_clamp_mode": "softplus",
    "rgb_clamp_mode": "widen_sigmoid", "lock_view_dependence": False, "h_mean": math.pi / 2, "h_stddev": 0.3,
    "v_mean": math.pi / 2, "v_stddev": 0.155, "sample_dist": "gaussian",
}  # fmt: skip
CARLA: dict[str, Any] = {
    **FFHQ, "img_size": 128, "fov": 30, "ray_start": 0.7, "ray_end": 1.3, "normalize": 2, "center": (0, 0, 0),
    "num_manifolds": 48, "levels_start": 35, "levels_end": 5, "delta_alpha": 0.02, "background": False,
    "white_back": True, "h_stddev": math.pi, "v_mean": math.radians(42.5), "v_stddev": math.radians(42.5),
    "sample_dist": "spherical_uniform",
}  # fmt: skip
PRESETS = {"ffhq": FFHQ, "cats": FFHQ, "carla": CARLA}
"""The released configurations; cats differ from ffhq in what shapes tell only."""

WIDTHS = {128: "ffhq", 64: "cats", 256: "carla"}
"""Of the scalar fields of the released files."""


def matches(official: Official) -> bool:
    return _name(official) is not None


def _name(official: Official) -> str | None:
    mark = PREFIXES["predictor"] + "output_layer.weight"
    return next((name for name, state in official.states.items() if mark in state), None)


def convert(official: Official, settings: Mapping[str, Any]) -> Converted:
    name = _name(official)
    if name is None:
        raise ZooError("gram: the file holds no GRAM generator")
    where = name or "generator"
    state = with_average(official.states[name], official, where)
    preset, options = chosen(settings, scalar_width(state, PREFIXES, where))
    generator = build(state, options, where)
    return Converted(
        {"generator": generator},
        f"GRAM generator, settings of {preset}: z of {generator.z_dim}, {generator.field.width} channels, "
        f"{options['num_manifolds']} surfaces, {generator.resolution} px",
        {"recipe": "gram"} if preset == "ffhq" else {},
    )


def with_average(state: State, official: Official, where: str) -> State:
    """The state dict with the moving average's parameters, if a file has them: they follow the official order.

    Raises:
        ZooError: when they are not those of this state dict.
    """
    average = next((v for key, v in official.values.items() if key.split("/")[-1] == "shadow_params"), None)
    if average is None:
        return state
    if not isinstance(average, list | tuple) or not all(isinstance(other, Tensor) for other in average):
        raise ZooError(f"{where}: shadow_params is not a list of tensors")
    if len(average) != len(state):
        raise ZooError(f"{where}: shadow_params has {len(average)} parameters, the generator has {len(state)}")
    for (key, own), other in zip(state.items(), average, strict=True):
        if own.shape != other.shape:
            raise ZooError(
                f"{where}: in shadow_params {key!r} has shape {tuple(other.shape)}, expected {tuple(own.shape)}"
            )
    return dict(zip(state, average, strict=True))


def chosen(settings: Mapping[str, Any], width: int) -> tuple[str, dict[str, Any]]:
    """The preset's name, and the settings over it.

    Args:
        width: of the scalar field, which tells the released configurations apart.

    Raises:
        ZooError: for an unknown or wrong setting, or an unknown preset.
    """
    preset = choose(settings, {"preset": WIDTHS.get(width, "ffhq"), **FFHQ}, "gram")["preset"]
    if preset not in PRESETS:
        raise ZooError(f"gram has no preset {preset!r}, but: {', '.join(PRESETS)}")
    return preset, {**PRESETS[preset], **{name: value for name, value in settings.items() if name != "preset"}}


def scalar_width(state: State, prefixes: Mapping[str, str], where: str) -> int:
    """Channels of the scalar field."""
    return shape_of(state, prefixes["predictor"] + "output_layer.weight", 2, where)[1]


def count(state: State, stem: str, step: int = 1) -> int:
    """How many keys there are like ``stem``, numbered from 0 in steps."""
    return next(i for i in range(len(state) + 1) if stem.format(i * step) not in state)


def sizes(state: State, prefixes: Mapping[str, str], where: str) -> dict[str, int]:
    """Constructor arguments that shapes tell.

    Raises:
        ZooError: naming the first key that is missing or misshapen.
    """

    def shape(key: str) -> tuple[int, ...]:
        return shape_of(state, key, 2, where)

    mapping = prefixes["field"] + "mapping_network.network.{}.weight"
    mapping_width, z_dim = shape(mapping.format(0))
    return {
        "z_dim": z_dim,
        "width": shape(prefixes["field"] + "network.0.layer.weight")[0],
        "layers": count(state, prefixes["field"] + "network.{}.layer.weight"),
        "mapping_width": mapping_width,
        "mapping_layers": count(state, mapping, 2) - 1,
        "predictor_width": scalar_width(state, prefixes, where),
        "predictor_layers": count(state, prefixes["predictor"] + "network.{}.weight", 2),
    }


def arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments that settings tell.

    Raises:
        ZooError: for a number that is out of range.
    """
    for name, least in (("img_size", 2), ("num_samples", 2), ("num_manifolds", 1 + options["background"])):
        if options[name] < least:
            raise ZooError(f"{name} must be at least {least}, not {options[name]}")
    if not 0 < options["fov"] < 180:
        raise ZooError(f"fov must be between 0 and 180 degrees, not {options['fov']}")
    if options["normalize"] <= 0:
        raise ZooError(f"normalize must be above 0, not {options['normalize']}")
    gaussian = options["sample_dist"] in ("gaussian", "normal")
    reach = 3 if gaussian else 1
    return {
        "resolution": options["img_size"],
        "box": options["normalize"],
        "centre": options["center"],
        "manifolds": options["num_manifolds"],
        "levels": (options["levels_start"], options["levels_end"]),
        "samples": options["num_samples"],
        "near": options["ray_start"],
        "far": options["ray_end"],
        "fov": options["fov"],
        "delta": options["delta_alpha"],
        "delta_final": options["delta_final"],
        "background": options["background"],
        "white_back": options["white_back"],
        "last_back": options["last_back"],
        "density_clamp": options["sigma_clamp_mode"],
        "colour_clamp": options["rgb_clamp_mode"],
        "lock_view": options["lock_view_dependence"],
        "rig": {
            "distribution": "gaussian" if gaussian else "uniform",
            "yaw_mean": math.pi / 2 - options["h_mean"],
            "pitch_mean": math.pi / 2 - options["v_mean"],
            "yaw_std": options["h_stddev"],
            "pitch_std": options["v_stddev"],
            "yaw_max": reach * options["h_stddev"],
            "pitch_max": reach * options["v_stddev"],
        },
    }


def constructed(cls: type[GeneratorT], **arguments: Any) -> GeneratorT:
    """The generator.

    Raises:
        ZooError: when it refuses a setting.
    """
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ZooError(f"a setting is wrong: {one_line(error)}") from error


def build(state: State, options: Mapping[str, Any], where: str) -> GRAMGenerator:
    """The generator of an official state dict.

    Args:
        options: all of ``SETTINGS`` but the preset.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    generator = constructed(GRAMGenerator, **sizes(state, PREFIXES, where), **arguments(options))
    renames = {official: key for key, official in layout(generator, PREFIXES).items()}
    ours = take(state, renames, generator.state_dict(), where)
    fill(generator, {**ours, "mean": generator.mean}, where)
    generator.update_mean()  # official code estimates it anew each time
    return generator.eval()


def layout(generator: GRAMGenerator, prefixes: Mapping[str, str]) -> dict[str, str]:
    """Our key -> official key of the scalar field, the radiance network and its mapping."""
    field, predictor = prefixes["field"], prefixes["predictor"]
    modules = {"field.view": prefixes["view"], "predictor.last": f"{predictor}output_layer"}
    modules |= {f"predictor.hidden.{i}": f"{predictor}network.{2 * i}" for i in range(len(generator.predictor.hidden))}
    modules |= {f"field.layers.{i}": f"{field}network.{i}.layer" for i in range(len(generator.field.layers))}
    modules |= {
        f"style.layers.{i}": f"{field}mapping_network.network.{2 * i}" for i in range(len(generator.style.layers))
    }
    for i in range(len(generator.field.density)):
        modules |= {f"field.density.{i}": f"{field}output_sigma.{i}", f"field.colour.{i}": f"{field}output_color.{i}"}
    return both(modules)


def both(modules: Mapping[str, str]) -> dict[str, str]:
    """The weight and the bias of modules."""
    return {f"{ours}.{p}": f"{official}.{p}" for ours, official in modules.items() for p in ("weight", "bias")}


def export(modules: Mapping[str, Configurable]) -> dict[str, Any]:
    """``generator.pth`` of a :class:`GRAMGenerator`."""
    generator = modules["generator"]
    if type(generator) is not GRAMGenerator:
        raise ZooError(f"gram: {type(generator).__name__} is not a GRAMGenerator")
    own = generator.state_dict()
    return {official: own[ours] for ours, official in layout(generator, PREFIXES).items()}


def replays(meta: Mapping[str, Any]) -> bool:
    return FAMILY.origin in repositories(meta)


def replay(fixture: Fixture, case: str) -> dict[str, Tensor]:
    cases = {
        "full": _replay_full, "trunc": _replay_truncation, "patch": _replay_patch,
        "isect": _replay_crossings, "rad": _replay_radiance,
    }  # fmt: skip
    return cases[case](fixture)


def _generator(fixture: Fixture, **changes: Any) -> GRAMGenerator:
    """The fixture's generator, with other settings where given."""
    key = repr(changes)
    if key not in fixture.memory:
        kwargs = fixture.config["kwargs"]
        given = {**kwargs, **kwargs["representation_kwargs"], **kwargs["renderer_kwargs"], **fixture.config["camera"]}
        settings = {name: value for name, value in given.items() if name in SETTINGS} | changes
        official = Official({"": fixture.state("generator")})
        fixture.memory[key] = convert(official, settings).modules["generator"]
    return fixture.memory[key]


def _camera(fixture: Fixture, generator: GRAMGenerator, side: int) -> Camera:
    phi, theta = fixture.input("full", "camera_pos_phi_theta").unbind(1)
    return sphere_camera(phi, theta, generator.fov, side)


def stacked(frequencies: Tensor, phases: Tensor, num_ws: int) -> Tensor:
    """Official frequencies and phases (B, num_ws * width) as our codes (B, num_ws, 2 width)."""
    return torch.cat([x.unflatten(-1, (num_ws, -1)) for x in (frequencies, phases)], -1)


def unstacked(ws: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse of :func:`stacked`."""
    frequencies, phases = ws.chunk(2, -1)
    return frequencies.flatten(1), phases.flatten(1)


def _replay_full(fixture: Fixture) -> dict[str, Tensor]:
    generator = _generator(fixture)
    ws, side = generator.mapping(fixture.input("full", "z")), generator.resolution
    origins, directions, _ = unit_rays(_camera(fixture, generator, side), side)
    distance, valid, _ = generator.crossings(ws, origins, directions)
    surfaces = generator.surfaces(ws, origins, directions)
    colour, weights, missed = generator.trace(ws, origins, directions, surfaces)
    total, depth = weights.sum(-1), (weights * surfaces.distance).sum(-1)
    mean = depth / (1 - missed)  # of what surfaces stop, as released: not of all that is seen, with last_back
    steps = torch.linspace(generator.near, generator.far, generator.samples)
    samples = origins[:, :, None] + steps[:, None] * directions[:, :, None]
    frequencies, phases = unstacked(ws.ws)

    def image(x: Tensor) -> Tensor:
        return x.unflatten(1, (side, side))

    points = fixture.strided("full/mid/points", image(surfaces.points(origins, directions)))
    seen = generator.view(directions)[:, :, None].expand(-1, -1, distance.shape[-1] + generator.background, -1)
    seen = fixture.strided("full/mid/points", image(seen))
    radiance = _radiance(generator, ws, points.flatten(1, 3), seen.flatten(1, 3)).unflatten(1, points.shape[1:4])
    return {
        "out/image": image(colour).movedim(-1, 1),
        "out/weights_sum": image(total),
        "out/depth_times_weights_sum": image(mean * total if generator.last_back else depth),
        "out/depth": image(mean),
        "mid/points": points,
        "mid/rgb_sigma": radiance,
        "mid/camera_origin": origins[:, 0],
        "mid/frequencies": frequencies,
        "mid/phase_shifts": phases,
        "mid/ray_directions_world": directions,
        "mid/sample_points_world": samples,
        "mid/scalar_field": generator.predictor(samples),
        "mid/weights": image(weights),
        "mid/z_vals": image(surfaces.distance),
        "out/is_valid": valid,
        "out/intersections": origins[:, :, None] + distance[..., None] * directions[:, :, None],
    }


def _replay_truncation(fixture: Fixture) -> dict[str, Tensor]:
    """Through the protocol's own door; views locked, as in official videos."""
    generator = _generator(fixture, lock_view_dependence=True)
    averages = [fixture.input("trunc", name) for name in ("avg_frequencies", "avg_phase_shifts")]
    generator.mean.copy_(stacked(averages[0], averages[1], generator.num_ws)[0])
    psi = float(fixture.input("trunc", "truncation_psi"))
    ws = generator.mapping(fixture.input("full", "z"), truncation=psi)
    return {"out/image": generator.synthesis(ws, _camera(fixture, generator, generator.resolution)).image}


def _replay_patch(fixture: Fixture) -> dict[str, Tensor]:
    """The second quarter of the pixels of an image of half the side, views locked."""
    generator = _generator(fixture, lock_view_dependence=True)
    ws, side = generator.mapping(fixture.input("full", "z")), generator.resolution // 2
    patch = slice(side * side // 4, side * side // 2)
    origins, directions, _ = unit_rays(_camera(fixture, generator, side), side)
    origins, directions = origins[:, patch], directions[:, patch]
    surfaces = generator.surfaces(ws, origins, directions)
    return {"out/pixels": generator.trace(ws, origins, directions, surfaces).colour.mT}


def _replay_crossings(fixture: Fixture) -> dict[str, Tensor]:
    points, levels = fixture.input("isect", "points"), fixture.input("isect", "levels")
    values = _generator(fixture).predictor(points)
    found = first_brackets(values, levels, flat=FLAT)
    return {
        "out/intersections": found.at(points),
        "out/scalar": values[..., None],
        "out/is_valid": found.valid[..., None],
    }


def _replay_radiance(fixture: Fixture) -> dict[str, Tensor]:
    generator = _generator(fixture)
    points, directions = fixture.input("rad", "points"), fixture.input("rad", "ray_directions")
    ws = generator.mapping(fixture.input("full", "z")[:1])
    first = affine(points, *generator.field.modulate(ws.ws).trunk[0]).sin()
    return {
        "out/rgb_sigma": _radiance(generator, ws, points, directions),
        "out/scalar": generator.predictor(points)[..., None],
        "mid/layer0": first,
    }


def _radiance(generator: GRAMGenerator, ws: Latents, points: Tensor, directions: Tensor) -> Tensor:
    """Official colour in [0, 1] and density (B, P, 4)."""
    sample = generator.activate(generator.field(generator.field.modulate(ws.ws), points, directions))
    assert sample.density is not None
    return torch.cat([(sample.colour + 1) / 2, sample.density], -1)


FAMILY = Family(
    name="gram",
    files="generator.pth, with ema.pth",
    origin="microsoft/GRAM",
    licence="Microsoft Research License Agreement (non-commercial)",
    matches=matches,
    convert=convert,
    replays=replays,
    replay=replay,
    settings=SETTINGS,
    export=export,
)
