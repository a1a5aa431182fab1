"""StyleSDF: ``ffhq1024x1024.pt``, ``*_vol_renderer.pt``: dictionaries of the state dicts ``g``, ``d`` and ``g_ema``.

The official networks own parameters that they never read: every styled convolution of the decoder has a ``bias``
beside the used ``activate.bias``. They must be there, are left out, and come back as zeros on export.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from models.camera import Camera, Rig
from models.configurable import Configurable
from models.generators.stylegan2 import StyleGAN2Discriminator
from models.generators.stylesdf import StyleSDF, VolumeDiscriminator, camera_directions
from models.latents import Latents
from models.rendering.compositing import field_gradient
from models.zoo import stylegan2
from models.zoo.family import Converted, Family, Official, State, ZooError, choose, shape_of
from models.zoo.parity import Fixture

ModuleT = TypeVar("ModuleT", bound=Configurable)

NETWORK = "renderer.network"
GENERATOR, VOLUME = f"{NETWORK}.sigma_linear.weight", "final_conv.conv.weight"
WHERE = "StyleSDF"

SETTINGS = {
    "samples": "samples per ray (24)",
    "raw_resolution": "side of the rendered picture, for files of the renderer alone (64)",
    "offset_sampling": "samples of a ray move together when drawn (true)",
    "normalize_points": "the field sees the depth range as [-1, 1] (true)",
    "static_directions": "directions are shown in the camera's frame (true)",
    "opaque_end": "what passes a ray's other samples is seen at the last (true)",
    "lr_mapping": "learning rate factor of the decoder's mapping network (0.01)",
    "fov": "half of the cameras' field of view, degrees (6)",
    "dist_radius": "depth range on either side of the origin (0.12)",
    "azim": "standard deviation of the training poses' yaw, radians (0.3; AFHQ: 0.15)",
    "elev": "standard deviation of the training poses' pitch, radians (0.15)",
    "uniform": "poses are uniform within azim and elev (false)",
}

DEFAULTS = {
    "samples": 24, "raw_resolution": 64, "offset_sampling": True, "normalize_points": True, "static_directions": True,
    "opaque_end": True, "lr_mapping": 0.01, "fov": 6.0, "dist_radius": 0.12, "azim": 0.3, "elev": 0.15,
    "uniform": False,
}  # fmt: skip
"""Of the released generators of faces."""


# -- layout ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a tensor of the official file goes."""

    key: str | None
    """Ours; None for what the official network never reads, or what is read off with the configuration."""
    official: Tensor
    """Our tensor as the file has it."""


Layout = dict[str, Place]
"""Official key -> place."""


def field_key(key: str) -> str:
    """The official name of a tensor of :class:`models.generators.stylesdf.SDFField`."""
    part, _, rest = key.partition(".")
    parts = {"trunk": "pts_linears", "view": "views_linears", "colour": "rgb_linear", "distance": "sigma_linear"}
    return f"{parts[part]}.{rest}"


def generator_layout(generator: StyleSDF) -> Layout:
    """How an official file holds this generator."""
    own, layout = generator.state_dict(), Layout()

    def put(official: str, ours: str, shape: tuple[int, ...] | None = None) -> None:
        layout[official] = Place(ours, own[ours].reshape(shape or own[ours].shape))

    def linear(official: str, ours: str) -> None:
        put(f"{official}.weight", f"{ours}.weight")
        put(f"{official}.bias", f"{ours}.bias")

    def styled(official: str, ours: str, up: bool = False) -> None:
        out, inside, *_ = own[f"{ours}.weight"].shape
        layout[f"{official}.bias"] = Place(None, torch.zeros(1, out, 1, 1))
        put(f"{official}.conv.weight", f"{ours}.weight", (1, out, inside, 3, 3))
        if up:
            layout[f"{official}.conv.blur.kernel"] = kernel
        linear(f"{official}.conv.modulation", f"{ours}.affine")
        put(f"{official}.noise.weight", f"{ours}.noise_strength", (1,))
        put(f"{official}.activate.bias", f"{ours}.bias")

    def to_rgb(official: str, ours: str, up: bool = True) -> None:
        put(f"{official}.bias", f"{ours}.bias", (1, 3, 1, 1))
        if up:
            layout[f"{official}.upsample.kernel"] = kernel
        put(f"{official}.conv.weight", f"{ours}.weight", (1, *own[f"{ours}.weight"].shape))
        linear(f"{official}.conv.modulation", f"{ours}.affine")

    for i in range(len(generator.map_network) // 2):
        linear(f"style.{i}", f"map_network.{2 * i}")
    if generator.beta is not None:
        put("renderer.sigmoid_beta", "beta", (1,))
    for key in generator.field.state_dict():
        put(f"{NETWORK}.{field_key(key)}", f"field.{key}")
    if generator.decoder is not None:
        kernel = Place(None, generator.decoder.kernel * 4)
        for i in range(len(generator.decoder.map_network.layers)):
            linear(f"decoder.style.{i + 1}", f"decoder.map_network.layers.{i}")
        blocks = [f"decoder.blocks.{k}" for k in range(len(generator.decoder.blocks))]
        convs = [f"{block}.{conv}" for block in blocks for conv in ("conv0", "conv1")]
        styled("decoder.conv1", "decoder.stem")
        to_rgb("decoder.to_rgb1", "decoder.to_image", up=False)
        for i, conv in enumerate(convs):
            styled(f"decoder.convs.{i}", conv, up=i % 2 == 0)
        for i, block in enumerate(blocks):
            to_rgb(f"decoder.to_rgbs.{i}", f"{block}.to_image")
        for i, conv in enumerate(["decoder.stem", *convs]):
            put(f"decoder.noises.noise_{i}", f"{conv}.noise", (1, 1, *own[f"{conv}.noise"].shape))
    return layout


def discriminator_layout(discriminator: VolumeDiscriminator) -> Layout:
    """How an official file holds this discriminator."""
    own = discriminator.state_dict()
    renames = {"convs.0.conv.weight": "stem.weight", "convs.0.activation.bias": "stem.bias"}
    for i in range(len(discriminator.blocks)):
        theirs, ours = f"convs.{i + 1}", f"blocks.{i}"
        for conv in ("conv1", "conv2"):
            renames[f"{theirs}.{conv}.conv.conv.weight"] = f"{ours}.{conv}.weight"
            renames[f"{theirs}.{conv}.activation.bias"] = f"{ours}.{conv}.bias"
        if f"{ours}.skip.weight" in own:
            renames |= {f"{theirs}.skip.conv.{kind}": f"{ours}.skip.{kind}" for kind in ("weight", "bias")}
    renames |= {f"final_conv.conv.{kind}": f"out.{kind}" for kind in ("weight", "bias")}
    return {official: Place(ours, own[ours]) for official, ours in renames.items()}


def load(module: ModuleT, layout: Layout, state: State, where: str) -> ModuleT:
    """Fill ``module`` with what the file holds at the places of ``layout``.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    own = module.state_dict()
    for key, place in layout.items():
        expected = tuple(place.official.shape)
        if shape_of(state, key, len(expected), where) != expected:
            raise ZooError(f"{where}: {key!r} has shape {tuple(state[key].shape)}, expected {expected}")
        if place.key is not None:
            own[place.key].copy_(state[key].reshape(own[place.key].shape))
    for key in state:
        if key not in layout:
            raise ZooError(f"{where}: the key {key!r} is not known")
    return module.eval()


# -- configuration -----------------------------------------------------------------------------------------------------


def count(state: State, pattern: str) -> int:
    """One more than the largest number that follows ``pattern`` in a key."""
    return max((int(found[1]) + 1 for key in state if (found := re.match(rf"{pattern}(\d+)\.", key))), default=0)


def build_rig(options: Mapping[str, Any]) -> Rig:
    """Cameras on the unit sphere around the origin; official options in, see ``SETTINGS``."""
    focal, near, far = (
        0.5 / math.tan(math.radians(options["fov"])),
        1 - options["dist_radius"],
        1 + options["dist_radius"],
    )
    rig = Rig(1.0, focal, (0, 0, 0), near, far, yaw_std=options["azim"], pitch_std=options["elev"])
    if options["uniform"]:
        return rig.replace(distribution="uniform", yaw_max=options["azim"], pitch_max=options["elev"])
    return rig


def build_generator(state: State, settings: Mapping[str, Any]) -> StyleSDF:
    """The generator, or the renderer alone, of a state dict.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen, or the first unknown setting.
    """
    chosen = choose(settings, DEFAULTS, WHERE)
    if chosen["samples"] < 2:
        raise ZooError(f"{WHERE}: samples must be at least 2, not {chosen['samples']}")
    if not 0 < chosen["fov"] < 90:
        raise ZooError(f"{WHERE}: fov, half of the field of view, must be between 0 and 90, not {chosen['fov']}")
    names = ("samples", "raw_resolution", "offset_sampling", "normalize_points", "static_directions", "opaque_end")
    options: dict[str, Any] = {name: chosen[name] for name in names}
    where = f"{WHERE} generator"
    if any(key.startswith("decoder.") for key in state):
        if "raw_resolution" in settings:
            raise ZooError(f"{WHERE}: raw_resolution is for files of the renderer alone, this one has a decoder")
        blocks = range(count(state, r"decoder\.to_rgbs\."))
        convs = ["decoder.conv1.conv.weight", *(f"decoder.convs.{2 * k}.conv.weight" for k in blocks)]
        options["raw_resolution"] = shape_of(state, "decoder.noises.noise_0", 4, where)[-1]
        options["decoder"] = {
            "channels": [shape_of(state, key, 5, where)[1] for key in convs],
            "w_dim": shape_of(state, "decoder.style.1.weight", 2, where)[0],
            "mapping_layers": count(state, r"decoder\.style\.") - 1,
            "lr_multiplier": chosen["lr_mapping"],
        }
        if blocks:
            kernel = "decoder.convs.0.conv.blur.kernel"
            shape_of(state, kernel, 2, where)
            options["decoder"]["taps"] = state[kernel].sum(0).tolist()
    shape_of(state, f"{NETWORK}.pts_linears.0.weight", 2, where)
    with torch.no_grad():
        generator = StyleSDF(
            z_dim=shape_of(state, "style.0.weight", 2, where)[1],
            width=shape_of(state, GENERATOR, 2, where)[1],
            depth=count(state, rf"{re.escape(NETWORK)}\.pts_linears\."),
            mapping_layers=count(state, r"style\."),
            signed_distance="renderer.sigmoid_beta" in state,
            rig=build_rig(chosen),
            **options,
        )
        load(generator, generator_layout(generator), state, where)
    generator.update_mean()  # as the official scripts: from 10,000 random codes, it is in no file
    return generator


def build_discriminator(state: State) -> VolumeDiscriminator:
    """The discriminator of rendered pictures of a state dict.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    where = f"{WHERE} volume discriminator"
    blocks = range(1, count(state, r"convs\."))
    keys = ["convs.0.conv.weight", *(f"convs.{i}.conv2.conv.conv.weight" for i in blocks)]
    channels = [shape_of(state, key, 4, where)[0] for key in keys]
    with torch.no_grad():
        discriminator = VolumeDiscriminator(channels, pose=shape_of(state, VOLUME, 4, where)[0] == 3)
        return load(discriminator, discriminator_layout(discriminator), state, where)


def find(official: Official, mark: str, *names: str) -> State | None:
    """The state dict with the key ``mark``; of several the one with the first of ``names``."""
    found = {name.rpartition("/")[2]: state for name, state in official.states.items() if mark in state}
    return next((found[name] for name in (*names, *found) if name in found), None)


def matches(official: Official) -> bool:
    """Whether one of the state dicts is a StyleSDF generator's."""
    return find(official, GENERATOR) is not None


def convert(official: Official, settings: Mapping[str, Any]) -> Converted:
    """The averaged generator, and the discriminator: of rendered pictures in files of the renderer alone, else
    StyleGAN2's. See :class:`Family`."""
    state = find(official, GENERATOR, "g_ema", "g")
    if state is None:
        raise ZooError(f"{WHERE}: the key {GENERATOR!r} is missing")
    generator = build_generator(state, settings)
    modules: dict[str, Configurable] = {"generator": generator}
    if (judge := find(official, VOLUME, "d")) is not None:
        modules["discriminator"] = build_discriminator(judge)
    elif (judge := find(official, stylegan2.DISCRIMINATOR_MARKS[-1], "d")) is not None:
        modules["discriminator"] = stylegan2.build_discriminator(judge, f"{WHERE} discriminator").eval()
    raw, size = generator.raw_resolution, generator.resolution
    sizes = f"{size} px from {raw} px features" if generator.decoder is not None else f"{raw} px, renderer alone"
    network = generator.init_args
    found = f"StyleSDF generator, {sizes}, {network['depth']} layers of {network['width']}"
    return Converted(modules, found, {"recipe": "stylesdf"})


def export(modules: Mapping[str, Configurable]) -> dict[str, Any]:
    """``g_ema``, and ``d`` where there is a discriminator.

    Raises:
        ZooError: without a StyleSDF generator.
    """
    generator, judge = modules.get("generator"), modules.get("discriminator")
    if not isinstance(generator, StyleSDF):
        raise ZooError(f"stylesdf exports a StyleSDF generator, not {type(generator).__name__}")
    file = {"g_ema": {key: place.official.clone() for key, place in generator_layout(generator).items()}}
    if isinstance(judge, VolumeDiscriminator):
        file["d"] = {key: place.official.clone() for key, place in discriminator_layout(judge).items()}
    elif isinstance(judge, StyleGAN2Discriminator):
        file["d"] = stylegan2.official_discriminator(judge)
    return file


# -- parity ------------------------------------------------------------------------------------------------------------


def official_camera(cam_poses: Tensor, focals: Tensor, side: int) -> Camera:
    """Official cameras as ours.

    Args:
        cam_poses: (B, 3, 4) camera to world, camera axes x right, y up, z backward. focals: (B, 1, 1) pixels.
        side: of the rendered picture, pixels.
    """
    cam2world = torch.eye(4).repeat(len(cam_poses), 1, 1)
    cam2world[:, :3] = cam_poses * torch.tensor([1.0, -1.0, -1.0, 1.0])
    intrinsics = torch.eye(3).repeat(len(cam_poses), 1, 1)
    intrinsics[:, :2, :2] *= focals / side
    intrinsics[:, :2, 2] = 0.5
    return Camera(cam2world, intrinsics)


def official_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of :func:`convert` from the options of a fixture."""
    model, rendering, camera = config["model"], config["rendering"], config["camera"]
    return {
        "samples": rendering["N_samples"],
        "offset_sampling": not rendering["no_offset_sampling"],
        "normalize_points": not rendering["no_z_normalize"],
        "static_directions": rendering["static_viewdirs"],
        "opaque_end": rendering["force_background"],
        "lr_mapping": model["lr_mapping"],
        **camera,
    }


def networks(fixture: Fixture, **changes: Any) -> dict[str, Configurable]:
    """The fixture's networks, with settings changed; built once."""
    memory = repr(changes)
    if memory not in fixture.memory:
        models = {"g_ema": "generator", "d": "volume_discriminator"}
        states = {name: fixture.state(model) for name, model in models.items() if model in fixture.meta["models"]}
        settings = official_settings(fixture.config)
        if "decoder.conv1.conv.weight" not in states["g_ema"]:
            settings["raw_resolution"] = fixture.config["model"]["renderer_spatial_output_dim"]
        fixture.memory[memory] = convert(Official(states), settings | changes).modules
    return fixture.memory[memory]


def replays(meta: Mapping[str, Any]) -> bool:
    """Whether the fixture is StyleSDF's."""
    return "generator" in meta["models"] and any(
        key == GENERATOR for key, *_ in meta["models"]["generator"]["state_dict"]
    )


def replay(fixture: Fixture, case: str) -> dict[str, Tensor]:
    """Renderings, plain, truncated or with drawn samples; points; the decoder; gradients; the discriminator."""
    changes = {"static_directions": False, "opaque_end": False} if case == "perturb" else {}
    found = networks(fixture, **changes)
    generator = cast(StyleSDF, found["generator"])
    side = generator.raw_resolution

    def given(name: str) -> Tensor:
        return fixture.input(case if fixture.has(case, name) else "full", name)

    if case == "vdisc":
        verdict = cast(VolumeDiscriminator, found["discriminator"])(given("image"))
        results = {"out/gan_pred": verdict.logits}
        return results if verdict.pose is None else results | {"out/viewpoint_pred": verdict.pose}
    if case == "trunc":
        generator.renderer_mean.copy_(given("truncation_latent_renderer")[0])
        if generator.decoder is not None:
            generator.decoder_mean.copy_(given("truncation_latent_decoder")[0])
        ws = generator.mapping(given("z"), truncation=float(given("truncation")))
    else:
        ws = generator.mapping(given("z"))
    if case == "query":
        return query(generator, ws[0], given("points_normalized"), given("viewdirs"))
    if case == "decoder" and generator.decoder is not None:
        *_, (_, image) = generator.decoder(given("features"), ws.groups["decoder"][:1])
        return {"out/image": image}
    camera = official_camera(given("cam_poses"), given("focals"), side)
    origins, directions = (t.unflatten(1, (side, side)) for t in camera.rays(side))
    jitter = given("t_rand") if case == "perturb" else None
    if case == "eikonal":
        depths = generator.sample_depths(1, side, jitter, camera.device)
        points = origins[:1, :, :, None] + depths[..., None] * directions[:1, :, :, None]
        _, gradient = field_gradient(lambda p: generator.surface(ws[0], p), points.flatten(1, 3))
        return {"out/eikonal_term": gradient.view_as(points)}
    rendering = generator.synthesis(ws, camera, randomness=jitter, taps=generator.tap_names)
    assert rendering.features is not None and rendering.alpha is not None
    maps = rendering.taps
    depths = generator.sample_depths(len(camera), side, jitter, camera.device).permute(0, 3, 1, 2)[:, None]
    origins, directions = (t.permute(0, 3, 1, 2)[:, :, None] for t in (origins, directions))
    results = {
        "mid/renderer_latent": ws.groups["renderer"][:, 0],
        "mid/rays_o": origins[:, :, 0].permute(0, 2, 3, 1),
        "mid/rays_d": directions[:, :, 0].permute(0, 2, 3, 1),
        "mid/viewdirs_static": torch.nn.functional.normalize(camera_directions(camera, side), dim=-1).unflatten(
            1, (side, side)
        ),
        "mid/features": rendering.features,
        "mid/sdf_along_rays": maps["field"].permute(0, 2, 3, 1)[..., None],
        "out/thumb_rgb": rendering.image if rendering.raw is None else rendering.raw,
        "out/xyz": (maps["weights"][:, None] * (origins + depths * directions)).sum(2),
        "out/mask": 1 - rendering.alpha,
    }
    if generator.decoder is not None:
        results |= {
            "mid/decoder_latent": ws.groups["decoder"][:, 0],
            "mid/decoder_conv1": maps[f"block{side}"],
            "mid/decoder_to_rgb1": maps[f"image{side}"],
            "out/image": rendering.image,
        }
    return results


def query(generator: StyleSDF, ws: Latents, points: Tensor, directions: Tensor) -> dict[str, Tensor]:
    """The field at normalised points (1, ..., 3)."""
    field, shape = generator.field, points.shape[1:-1]
    film = field.film(ws.groups["renderer"])
    flat = points.flatten(1, -2)
    distance, gradient = field_gradient(lambda p: field.distance(field.backbone(p, film)), flat)
    seen = field.features(field.backbone(flat, film), directions.flatten(1, -2), film)
    results = {
        "out/rgb_logits": field.colour(seen),
        "out/sdf": distance,
        "out/sigma": generator.density(distance),
        "out/dsdf_dpoints_normalized": gradient,
        "mid/features": seen,
        "mid/pts_linear_0": field.backbone(flat, film[:2]),
    }
    return {name: value.unflatten(1, shape) for name, value in results.items()}


FAMILY = Family(
    name="stylesdf",
    files="ffhq1024x1024.pt, afhq512x512.pt, *_vol_renderer.pt, full_pipeline/models_*.pt",
    origin="royorel/StyleSDF",
    licence="CC BY-NC-SA 4.0 (University of Washington)",
    matches=matches,
    convert=convert,
    replays=replays,
    replay=replay,
    settings=SETTINGS,
    export=export,
)
