"""EG3D: official network pickles, or the bare state dict of their generator, and :class:`EG3DGenerator`.

Keys and shapes tell every size. The rest, from depth ranges to the camera's radius, is in the arguments that a pickle
keeps of its network's construction; for a bare state dict it is FFHQ's unless set otherwise. EG3D's dual discriminator
is left behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.configurable import Configurable
from models.errors import one_line, shown
from models.generators.eg3d import RELEASED, EG3DGenerator
from models.generators.triplane import PLANES, Axes, sample_planes
from models.latents import Latents
from models.zoo.family import Converted, Family, Official, State, ZooError, choose, fill, take
from models.zoo.parity import Fixture

HEADS = {
    (512, (256, 128)): "SuperresolutionHybrid8XDC",
    (512, (128, 64)): "SuperresolutionHybrid8X",
    (256, (128, 64)): "SuperresolutionHybrid4X",
    (128, (128, 64)): "SuperresolutionHybrid2X",
}
"""Official super-resolution by its image side and channels."""

SAME_AS_4X = "SuperresolutionHybridDeepfp32"

RENDERING = {
    "depth_resolution": (48, "samples a ray, first pass"),
    "depth_resolution_importance": (48, "samples a ray, second pass"),
    "ray_start": (2.25, "nearest distance from the camera"),
    "ray_end": (3.3, "farthest distance from the camera"),
    "box_warp": (1.0, "side of the cube that the planes span"),
    "disparity_space_sampling": (False, "space samples evenly in 1 / distance"),
    "white_back": (False, "white background"),
    "avg_camera_radius": (2.7, "distance of the cameras from the pivot"),
    "avg_camera_pivot": ((0.0, 0.0, 0.2), "the point the cameras look at"),
    "c_scale": (1.0, "factor on the camera label"),
    "c_gen_conditioning_zero": (False, "whether the label is hidden from the generator"),
    "decoder_lr_mul": (1.0, "learning rate factor of the decoder"),
    "sr_antialias": (True, "antialiased input of the super-resolution"),
    "superresolution_noise_mode": ("none", "none, const or random"),
    "superresolution_module": (None, "class of the super-resolution; its sizes tell it as well"),
    "clamp_mode": ("softplus", "density activation, of which there is one"),
}
"""Rendering arguments of FFHQ's training, and what they mean."""

CONSTRUCTION = {
    "conv_clamp": (None, "largest activation of the backbone"),
    "sr_num_fp16_res": (4, "above 0, activations of the super-resolution are clamped to 256"),
    "lr_multiplier": (0.01, "learning rate factor of the mapping network"),
    "neural_rendering_resolution": (128, "side of the picture before super-resolution"),
    "focal": (None, "focal length in image widths; by default that of the data whose camera radius the file names"),
    "poses": (None, "distribution and limits of the cameras' angles, by default those of the data"),
    "plane_axes": ("zx", "the third plane: zx, of the first releases, or zy, of the corrected code"),
}
"""What else shapes do not tell."""

FOCALS = {2.7: 4.2647, 1.7: 1.0254}
"""By the radius of its cameras, the focal length of the data that EG3D was trained on: FFHQ and AFHQ, ShapeNet cars."""

ROUND = {"distribution": "uniform", "yaw_max": math.pi, "pitch_mean": math.pi / 4, "pitch_max": math.pi / 4}
"""Poses of ShapeNet's cameras: all around, from the ground to above."""

POSES = ("distribution", "yaw_std", "pitch_std", "yaw_max", "pitch_max", "yaw_mean", "pitch_mean")
"""Fields of a rig that no official file holds."""

PLANE_AXES: dict[str, Axes] = {"zx": RELEASED, "zy": PLANES}
"""By the name of the third plane."""

DEFAULTS = {name: default for name, (default, _) in {**RENDERING, **CONSTRUCTION}.items()}

ABSENT = {"c_scale": 0.0, "conv_clamp": 256, "sr_num_fp16_res": 0, "neural_rendering_resolution": 64}
"""What the official constructor makes of an argument it was not given."""


def matches(official: Official) -> bool:
    return bool(_candidates(official))


def _candidates(official: Official) -> list[str]:
    """Names of the states that are generators, the moving average first."""
    marks = ("backbone.mapping.fc0.weight", "decoder.net.0.weight", "superresolution.block0.conv0.weight")
    found = [name for name, state in official.states.items() if all(mark in state for mark in marks)]
    return sorted(found, key=lambda name: not name.endswith("G_ema"))


def convert(official: Official, settings: Mapping[str, Any]) -> Converted:
    choose(settings, DEFAULTS, "eg3d")
    candidates = _candidates(official)
    if not candidates:
        raise ZooError("eg3d: the file holds no EG3D generator")
    name = candidates[0]
    options = {**_options(official.values.get(name) or official.values), **settings}
    told = ""
    if options["focal"] is None:
        radius = options["avg_camera_radius"]
        options["focal"] = FOCALS.get(radius, FOCALS[2.7])
        if radius not in FOCALS:
            told = f"; the file does not tell its focal length, FFHQ's {options['focal']} is taken: --set focal=NUMBER"
    generator = build(official.states[name], options, name or "state dict")
    head, planes = _head(generator), "" if generator.axes == RELEASED else f", third plane {_third(generator.axes)}"
    side, resolution = generator.render_resolution, generator.resolution
    return Converted(
        {"generator": generator},
        f"EG3D generator, {side} px rendered, {resolution} px after {head}, w of {generator.w_dim}{planes}{told}",
        {} if _is_shapenet(options) else {"recipe": "eg3d"},
    )


def _options(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments a pickled network keeps, or the defaults where nothing is kept."""
    kwargs, attributes = stored.get("init_kwargs"), stored.get("attributes", {})
    if kwargs is None:
        return DEFAULTS
    renderer = stored.get("modules", {}).get("renderer", {}).get("attributes", {})
    given = {
        **kwargs,
        **kwargs.get("mapping_kwargs", {}),
        **kwargs.get("rendering_kwargs", {}),
        **attributes.get("rendering_kwargs", {}),  # what the network was last used with
        **attributes,
        **renderer,
    }
    return {**DEFAULTS, **ABSENT, **{name: value for name, value in given.items() if name in DEFAULTS}}


def build(state: State, options: Mapping[str, Any], where: str) -> EG3DGenerator:
    """The generator of an official state dict.

    Args:
        options: all of :data:`RENDERING` and :data:`CONSTRUCTION`.
        where: names the state dict in errors.

    Raises:
        ZooError: naming the first key or option that does not fit.
    """

    def shape(key: str, axes: int | None = None) -> torch.Size:
        if key not in state:
            raise ZooError(f"{where}: the key {key!r} is missing")
        if axes not in (None, state[key].ndim):
            raise ZooError(f"{where}: {key!r} has shape {tuple(state[key].shape)}, expected {axes} axes")
        return state[key].shape

    found = [re.fullmatch(r"backbone\.synthesis\.b(\d+)\.torgb\.weight", key) for key in state]
    largest = max((int(match[1]) for match in found if match), default=4)
    sides = [4 << k for k in range(max(largest.bit_length() - 2, 1))]
    layers = sum(bool(re.fullmatch(r"backbone\.mapping\.fc\d+\.weight", key)) for key in state)
    label, embedding = 0, 0
    if "backbone.mapping.embed.weight" in state:
        embedding, label = shape("backbone.mapping.embed.weight", 2)
    if label not in (0, 25):
        raise ZooError(f"{where}: conditioned on {label} numbers, a camera label has 25")
    hidden, planes_width = shape("decoder.net.0.weight", 2)
    w_dim = shape("backbone.mapping.w_avg", 1)[0]
    widths = tuple(shape(f"superresolution.block{k}.conv1.weight", 4)[0] for k in range(2))
    resolution = shape("superresolution.block1.conv1.noise_const", 2)[0]
    if (resolution, widths) not in HEADS:
        raise ZooError(f"{where}: no official super-resolution makes {resolution} px with channels {widths}")
    _check(options, where)
    fir, dense = "backbone.synthesis.b4.resample_filter", "backbone.mapping.fc0.weight"
    shape(fir, 2)
    try:
        generator = EG3DGenerator(
            z_dim=shape(dense, 2)[1] - embedding,
            w_dim=w_dim,
            mapping={
                "label": label,
                "embedding": embedding or None,
                "layers": layers,
                "hidden": shape(dense, 2)[0],
                "lr_multiplier": options["lr_multiplier"],
            },
            label_scale=0.0 if options["c_gen_conditioning_zero"] else options["c_scale"],
            channels=[shape(f"backbone.synthesis.b{side}.torgb.weight", 4)[1] for side in sides],
            plane_features=planes_width,
            taps=state[fir].sum(0).tolist(),
            clamp=options["conv_clamp"],
            box=options["box_warp"],
            axes=_axes(options["plane_axes"], where),
            decoder={"hidden": hidden, "lr_multiplier": options["decoder_lr_mul"]},
            render_resolution=options["neural_rendering_resolution"],
            coarse=options["depth_resolution"],
            fine=options["depth_resolution_importance"],
            disparity=options["disparity_space_sampling"],
            white_back=options["white_back"],
            superresolution={
                "channels": widths,
                "resolution": resolution,
                "factor": 4 if resolution == 512 else 2,
                "antialias": options["sr_antialias"],
                "noise": options["superresolution_noise_mode"],
                "clamp": 256.0 if options["sr_num_fp16_res"] > 0 else None,
            },
            rig={
                "radius": options["avg_camera_radius"],
                "pivot": options["avg_camera_pivot"],
                "near": options["ray_start"],
                "far": options["ray_end"],
                "focal": options["focal"],
                **(options["poses"] or (ROUND if _is_shapenet(options) else {})),
            },
        )
    except (TypeError, ValueError) as error:
        raise ZooError(f"{where}: {one_line(error)}") from error
    own, names = generator.state_dict(), dict(layout(generator))
    filters = {key: generator.backbone.kernel for key, ours in names.items() if ours is None}
    weights = take(state, {key: ours or key for key, ours in names.items()}, own | filters, where)
    for key, kernel in filters.items():
        if not torch.allclose(state[key].to(kernel), kernel, rtol=max(1e-5, 4 * torch.finfo(state[key].dtype).eps)):
            raise ZooError(f"{where}: {key!r} is another filter than that of the first block")
    fill(generator, {ours: weights[ours] for ours in own}, where)
    return generator


def _is_shapenet(options: Mapping[str, Any]) -> bool:
    return (options["avg_camera_radius"], options["box_warp"], options["ray_start"]) == (1.7, 1.6, 0.1)


def _check(options: Mapping[str, Any], where: str) -> None:
    """Refuse what official configurations can say and we cannot do."""
    module = str(options["superresolution_module"] or HEADS[512, (256, 128)]).rpartition(".")[2]
    if module not in (*HEADS.values(), SAME_AS_4X):
        raise ZooError(f"{where}: super-resolution {module!r} is not one of {', '.join(HEADS.values())}")
    if options["clamp_mode"] != "softplus":
        raise ZooError(f"{where}: clamp_mode must be softplus, not {options['clamp_mode']!r}")
    for name in ("ray_start", "ray_end"):
        if not isinstance(options[name], int | float):
            raise ZooError(f"{where}: {name} must be a number, not {options[name]!r}")
    if not isinstance(options["conv_clamp"], int | float | None):
        raise ZooError(f"{where}: conv_clamp must be a number or null, not {options['conv_clamp']!r}")


def _axes(given: Any, where: str) -> Axes:
    """Which axes of a point each plane is looked up at, from the name of the third plane or EG3D's three matrices.

    A point p is looked up at the first two numbers of p M^-1, M being the plane's matrix.
    """
    if isinstance(given, str) and given in PLANE_AXES:
        return PLANE_AXES[given]
    refusal = ZooError(f"{where}: plane_axes must be zx, zy or three matrices that order the axes, not {shown(given)}")
    try:
        matrices = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise refusal from None
    if matrices.shape != (3, 3, 3):
        raise refusal
    ordering = (
        ((matrices == 0) | (matrices == 1)).all() and (matrices.sum(1) == 1).all() and (matrices.sum(2) == 1).all()
    )
    if not ordering:
        raise refusal
    # The inverse of such a matrix is its transpose: its column j has its one where row j of the matrix does.
    return tuple((int(rows[0].argmax()), int(rows[1].argmax())) for rows in matrices)


def _matrices(axes: Axes) -> list[list[list[int]]]:
    """The planes' matrices that :func:`_axes` reads."""
    rows = [[*pair, *({0, 1, 2} - set(pair))] for pair in axes]
    return [[[int(axis == column) for column in range(3)] for axis in row] for row in rows]


def _third(axes: Axes) -> str:
    return "".join("xyz"[axis] for axis in axes[2])


def _head(generator: EG3DGenerator) -> str:
    return HEADS[generator.resolution, generator.superresolution.channels]


def layout(generator: EG3DGenerator) -> Iterator[tuple[str, str | None]]:
    """Official keys in official order, each with ours; None for a copy of the upsampling filter."""
    for k, side in enumerate(generator.backbone.sides):
        layers = ["conv1"] if k == 0 else ["conv0", "conv1"]
        yield from _block(f"backbone.synthesis.b{side}", f"backbone.blocks.{k}", layers)
    yield "backbone.mapping.w_avg", "w_avg"
    if generator.map_network.embed is not None:
        yield from _both("backbone.mapping.embed", "map_network.embed")
    for k in range(len(generator.map_network.network.layers)):
        yield from _both(f"backbone.mapping.fc{k}", f"map_network.network.layers.{k}")
    if _head(generator) != "SuperresolutionHybrid8XDC":
        yield "superresolution.resample_filter", None
    for k in range(2):
        yield from _block(f"superresolution.block{k}", f"superresolution.blocks.{k}", ["conv0", "conv1"])
    yield from _both("decoder.net.0", "decoder.hidden")
    yield from _both("decoder.net.2", "decoder.out")


def _block(official: str, ours: str, layers: list[str]) -> Iterator[tuple[str, str | None]]:
    if len(layers) == 1:
        yield f"{official}.const", f"{ours}.const"
    yield f"{official}.resample_filter", None
    for name in layers:
        there, here = f"{official}.{name}", f"{ours}.{name}"
        for key in ("weight", "noise_strength", "bias"):
            yield f"{there}.{key}", f"{here}.{key}"
        yield f"{there}.resample_filter", None
        yield f"{there}.noise_const", f"{here}.noise"
        yield from _both(f"{there}.affine", f"{here}.affine")
    yield from _both(f"{official}.torgb", f"{ours}.to_image")
    yield from _both(f"{official}.torgb.affine", f"{ours}.to_image.affine")


def _both(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for key in ("weight", "bias"):
        yield f"{official}.{key}", f"{ours}.{key}"


def export(modules: Mapping[str, Configurable]) -> dict[str, Any]:
    """The official state dict, with the construction arguments that an official pickle keeps beside it.

    Raises:
        ZooError: without an EG3D generator.
    """
    generator = modules.get("generator")
    if not isinstance(generator, EG3DGenerator):
        raise ZooError("eg3d exports an EG3DGenerator named generator")
    own, kernel = generator.state_dict(), generator.backbone.kernel
    rig, enlarge, network = generator.rig, generator.superresolution, generator.map_network.network
    return {
        "G_ema": {key: kernel.clone() if ours is None else own[ours] for key, ours in layout(generator)},
        "init_kwargs": {
            "z_dim": generator.z_dim,
            "c_dim": 0 if generator.map_network.embed is None else 25,
            "w_dim": generator.w_dim,
            "img_resolution": generator.resolution,
            "img_channels": 3,
            "conv_clamp": generator.backbone.clamp,
            "sr_num_fp16_res": 0 if enlarge.clamp is None else 4,
            "mapping_kwargs": {
                "num_layers": len(network.layers),
                "lr_multiplier": network.layers[0].lr_multiplier,
            },
            "rendering_kwargs": {
                "superresolution_module": f"training.superresolution.{_head(generator)}",
                "superresolution_noise_mode": enlarge.noise,
                "sr_antialias": enlarge.antialias,
                "depth_resolution": generator.coarse,
                "depth_resolution_importance": generator.fine,
                "ray_start": rig.near,
                "ray_end": rig.far,
                "avg_camera_radius": rig.radius,
                "avg_camera_pivot": list(rig.pivot),
                "box_warp": generator.box,
                "disparity_space_sampling": generator.disparity,
                "white_back": generator.white_back,
                "c_scale": generator.label_scale,
                "c_gen_conditioning_zero": generator.label_scale == 0,
                "clamp_mode": "softplus",
                "decoder_lr_mul": generator.decoder.hidden.lr_multiplier,
            },
        },
        "attributes": {
            "neural_rendering_resolution": generator.render_resolution,
            "plane_axes": _matrices(generator.axes),
            "focal": rig.focal,
            "poses": {name: getattr(rig, name) for name in POSES},
        },
    }


def official_camera(rig: Rig, yaw: float, pitch: float, fov: float) -> Camera:
    """What EG3D's scripts see with angles in radians from the front and a field of view in degrees.

    Their pitch grows downwards and is linear in the camera's height, and their constants are rounded.
    """
    elevation = math.asin(max(-1.0, min(1.0, -2 * pitch / math.pi)))
    focal = 1 / (math.tan(fov * 3.14159 / 360) * 1.414)
    return rig.replace(focal=focal).camera(yaw, elevation)


# -- parity ------------------------------------------------------------------------------------------------------


def replays(meta: Mapping[str, Any]) -> bool:
    model = meta.get("models", {}).get("generator", {})
    return str(model.get("class", "")).endswith("TriPlaneGenerator")


def replay(fixture: Fixture, case: str) -> dict[str, Tensor]:
    if "generator" not in fixture.memory:
        stored = {
            "init_kwargs": fixture.config["G_kwargs"],
            "attributes": {"neural_rendering_resolution": fixture.config["neural_rendering_resolution"]},
        }
        official = Official({"G_ema": fixture.state("generator")}, {"G_ema": stored})
        fixture.memory["generator"] = convert(official, {}).modules["generator"]
    generator = cast(EG3DGenerator, fixture.memory["generator"])
    z, camera = fixture.input("map", "z"), Camera.from_label(fixture.input("map", "c"))
    ws = generator.mapping(z, camera=camera)
    if case == "map":
        return {"out/ws": ws.ws[:, 0]}
    if case == "trunc":
        psi = float(fixture.input(case, "truncation_psi"))
        cutoff = int(fixture.input(case, "truncation_cutoff"))
        cut = generator.mapping(z, camera=camera, truncation=psi, cutoff=cutoff).ws
        return {
            "out/ws": generator.mapping(z, camera=camera, truncation=psi).ws[:, 0],
            "out/ws_cutoff5": cut[:, [0, cutoff - 1, cutoff]],
        }
    if case == "query":
        return _replay_query(fixture, generator, ws, camera)
    if case == "cam":
        yaw, pitch, fov = fixture.input(case, "yaw_pitch_fov").tolist()
        seen = official_camera(generator.rig, yaw, pitch, fov)
        return {"out/cam2world": seen.cam2world, "out/intrinsics": seen.intrinsics[0]}
    return _replay_rendering(fixture, generator, ws, camera, case)


def _replay_query(fixture: Fixture, generator: EG3DGenerator, ws: Latents, camera: Camera) -> dict[str, Tensor]:
    points = fixture.input("query", "points")
    _, painted = generator.backbone(ws[0].ws)[-1]
    planes = painted.unflatten(1, (len(RELEASED), -1))
    colour, sigma = generator.decoder(generator.at(painted, points))
    psi07 = generator.mapping(fixture.input("map", "z")[:1], camera=camera[0], truncation=0.7)
    return {
        "mid/plane_features": sample_planes(planes, points[:, ::4] * (2 / generator.box), RELEASED).mT,
        "out/sigma": sigma[..., None],
        "out/rgb": colour,
        "out/sigma_from_z_psi07": generator.decoder(generator.features(psi07, points))[1][..., None],
    }


def _replay_rendering(
    fixture: Fixture, generator: EG3DGenerator, ws: Latents, camera: Camera, case: str
) -> dict[str, Tensor]:
    """One rendering, watched; the image averaged where jittered, as it was recorded."""
    batch, side, jitter = len(camera), generator.render_resolution, None
    if fixture.has(case, "u_coarse"):
        jitter = fixture.input(case, "u_coarse")[..., 0]
        if generator.fine:
            jitter = torch.cat([jitter, fixture.input(case, "u_fine").unflatten(0, (batch, -1))], -1)
    origins, directions = camera.rays(side)
    length = directions.norm(dim=-1, keepdim=True)

    passes: list[Tensor] = []

    def watch(points: Tensor, features: Tensor) -> Tensor:
        passes.append((points.unflatten(1, (side**2, -1)) - origins[:, :, None]).norm(dim=-1))
        return features

    seen: dict[str, list[Any]] = {}
    parts = {
        "b4": generator.backbone.blocks[0],
        "b8": generator.backbone.blocks[1],
        "planes": generator.backbone.blocks[-1],
        "decoder": generator.decoder,
        "sr": generator.superresolution.blocks[0],
    }
    hooks = [
        part.register_forward_hook(lambda _module, _inputs, out, name=name: seen.setdefault(name, []).append(out))
        for name, part in parts.items()
    ]
    try:
        rendering = generator.synthesis(ws, camera, randomness=jitter, edit=watch)
    finally:
        for hook in hooks:
            hook.remove()
    assert rendering.raw is not None and rendering.features is not None
    assert rendering.alpha is not None and rendering.depth is not None
    # Officially an empty ray is at the farthest depth of the batch, and none is outside the depths.
    distance = torch.where(rendering.alpha > 0, rendering.depth * length.mT.unflatten(2, (side, side)), math.inf)
    depths = torch.cat([found.flatten() for found in passes])
    (colour, sigma), planes = seen["decoder"][0], seen["planes"][0][1]
    image = rendering.image if case == "det" else F.adaptive_avg_pool2d(rendering.image, 32)
    return {
        "mid/ray_origins": origins[:, 0],
        "mid/ray_directions": directions / length,
        "mid/depths_coarse": passes[0],
        "mid/depths_fine": passes[-1],
        "mid/sigma_coarse": sigma.unflatten(1, (side**2, -1)),
        "mid/rgb_coarse": colour.unflatten(1, (side**2, -1)),
        "mid/planes": planes,
        "mid/planes_mean_std": torch.stack([planes.mean((2, 3)), planes.std((2, 3))], -1),
        "mid/backbone_b4_x": seen["b4"][0][0],
        "mid/backbone_b4_img": seen["b4"][0][1],
        "mid/backbone_b8_x": seen["b8"][0][0],
        "mid/backbone_b8_img": seen["b8"][0][1],
        "mid/sr_block0_x": seen["sr"][0][0],
        "mid/sr_block0_rgb": seen["sr"][0][1],
        "out/weights_sum": rendering.alpha.flatten(1),
        "out/image_depth": distance.clamp(depths.min(), depths.max()),
        "out/image_raw": rendering.raw,
        "out/feature_image": rendering.features,
        "out/image": image,
    }


FAMILY = Family(
    name="eg3d",
    files="ffhq512-128.pkl, afhqcats512-128.pkl, shapenetcars128-64.pkl, network-snapshot-*.pkl",
    origin="NVlabs/eg3d",
    licence="NVIDIA Source Code License (non-commercial)",
    matches=matches,
    convert=convert,
    replays=replays,
    replay=replay,
    settings={name: meaning for name, (_, meaning) in {**RENDERING, **CONSTRUCTION}.items()},
    export=export,
)
