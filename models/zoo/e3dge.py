"""E3DGE: ``E3DGE_Full_Runner.pt``: ``encoder`` (E0), ``netLocal`` (E1, texture fusion), ``Fuse_sft_block``,
``grid_align`` (ADA) and others.

Left out: the discriminator and optimisers; and what the official networks own but never read: ``bn4`` of every block
of E1 (where it is read it is the same parameter as ``downsample.0``) and ``downsample_channel_conv``. The generator is
StyleSDF's, from its own file: given together, they are what turns photos into heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.camera import Camera
from models.configurable import Configurable
from models.encoders.alignment import ResidualAligner
from models.encoders.e3dge import (
    AlignmentFusion,
    ConvBlock,
    GlobalEncoder,
    LocalEncoder,
    Stack,
    TextureFusion,
    pixel_features,
    within,
)
from models.generators.stylesdf import SDFField, StyleSDF
from models.heads.pixel_aligned import LocalNetworks
from models.zoo import irse50, stylesdf
from models.zoo.family import Converted, Family, Official, State, ZooError, refuse_settings, shape_of
from models.zoo.parity import Fixture
from models.zoo.stylesdf import Layout, Place, count, field_key, load

E0, E1, SFT = "styles_pigan.0.linear.weight", "image_filter.conv1.weight", "encode_enc.fc_0.weight"
ADA = "dconv_layer1.0.res_layer.1.weight"
TEXTURE, UNREAD = "local_feat_to_tex_modulations_linear.", "downsample_channel_conv."
GEOMETRY_CODES = 6  # of the renderer's, before those of texture
RESOLUTION = 256  # of the pictures that E1 and ADA see
PARTS = ("local_encoder", "texture_fusion", "aligner", "alignment_fusion")


# -- layout ------------------------------------------------------------------------------------------------------------


def local_key(key: str, depth: int) -> str:
    """The official name of a tensor of :class:`LocalEncoder`, with hourglasses of some depth."""
    if key.startswith(("residual_conv", "depth_conv")):
        return key
    parts = {"stem.0": "conv1", "stem.1": "bn1", "block1": "conv2", "halve": "down_conv2"}
    parts |= {"block2": "conv3", "block3": "conv4"}
    for ours, official in parts.items():
        if key.startswith(f"{ours}."):
            return f"image_filter.{official}{key.removeprefix(ours)}"
    _, stack, part, rest = key.split(".", 3)
    if part == "hourglass":
        level = depth
        while (inner := rest.removeprefix("inner.")) != rest and level > 1:
            level, rest = level - 1, inner
        block, _, rest = rest.partition(".")
        name = {"same": "b1", "down": "b2", "up": "b3", "inner": "b2_plus"}[block]
        return f"image_filter.m{stack}.{name}_{level}.{rest}"
    if part == "mix":
        index, rest = rest.split(".")
        part += f".{index}"
    name = {"top": "top_m_", "mix.0": "conv_last", "mix.1": "bn_end", "out": "l", "back": "bl", "back_out": "al"}[part]
    return f"image_filter.{name}{stack}.{rest}"


def local_layout(encoder: LocalEncoder) -> Layout:
    """How an official file holds this encoder, without what is never read but ``bn4``."""
    own, depth = encoder.state_dict(), encoder.init_args["depth"]
    layout = {local_key(key, depth): Place(key, tensor) for key, tensor in own.items()}
    for name, block in encoder.named_modules():
        if isinstance(block, ConvBlock):
            shared = next(iter(block.downsample), block.bn1)
            for kind, tensor in shared.state_dict().items():
                layout[local_key(f"{name}.bn4.{kind}", depth)] = Place(None, tensor)
    return layout


def renamed(module: nn.Module, ours: str, official: str) -> Layout:
    """The layout of a module whose official keys differ by one prefix."""
    return {
        (official + key.removeprefix(ours) if key.startswith(ours) else key): Place(key, tensor)
        for key, tensor in module.state_dict().items()
    }


# -- configuration -----------------------------------------------------------------------------------------------------


def build_global(state: State, where: str = "E3DGE encoder") -> GlobalEncoder:
    """E0 from its official state dict.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """

    def side(head: str) -> int:
        return 2 ** sum(1 for key in state if re.fullmatch(rf"{re.escape(head)}\.convs\.\d+\.weight", key))

    heads, decoder_heads = count(state, r"styles_pigan\."), count(state, r"styles_stylegan\.")
    geometry = min(GEOMETRY_CODES, heads)
    settings = irse50.trunk_settings(state, where) | {
        "geometry": geometry,
        "texture": heads - geometry,
        "w_dim": shape_of(state, E0, 2, where)[0],
        "geometry_side": side("styles_pigan.0"),
        "texture_side": side(f"styles_pigan.{heads - 1}"),
        "decoder_heads": decoder_heads,
        "channels": shape_of(state, irse50.INPUT, 4, where)[1],
    }
    if (stages := len(cast(list[int], settings["depths"]))) != 4:
        raise ZooError(f"{where}: its trunk has {stages} stages, expected 4")
    if decoder_heads:
        settings["decoder_dim"] = shape_of(state, "styles_stylegan.0.linear.weight", 2, where)[0]
        settings["decoder_side"] = side("styles_stylegan.0")
    return irse50.load(GlobalEncoder, settings, state, where)


def build_local(state: State, where: str = "E3DGE netLocal") -> tuple[LocalEncoder, TextureFusion]:
    """E1 and the texture fusion from their official state dict.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    parts: dict[bool, State] = {True: {}, False: {}}
    for key, tensor in state.items():
        if not key.startswith(UNREAD):
            parts[key.startswith(TEXTURE)][key] = tensor
    features = shape_of(state, "image_filter.l0.weight", 4, where)[0]
    strided = "image_filter.down_conv2.weight"
    with torch.no_grad():
        encoder = LocalEncoder(
            stem=shape_of(state, "residual_conv.0.weight", 4, where)[0],
            features=features,
            channels=shape_of(state, "image_filter.conv_last0.weight", 4, where)[1],
            stacks=count(state, r"image_filter\.m"),
            depth=count(state, r"image_filter\.m0\.b1_") - 1,
            norm="batch" if "image_filter.bn1.running_mean" in state else "group",
            strided=shape_of(state, strided, 4, where)[1] if strided in state else 0,
        )
        load(encoder, local_layout(encoder), parts[False], where)
        width = shape_of(state, f"{TEXTURE}fc_1.weight", 2, where)[0] // 2
        encoding = shape_of(state, f"{TEXTURE}fc_0.weight", 2, where)[1] - features
        if encoding and (encoding < 3 or (encoding - 3) % 6):
            raise ZooError(f"{where}: {encoding} numbers of positional encoding, expected 0 or 3 and a multiple of 6")
        fusion = TextureFusion(width, features, (encoding - 3) // 6 if encoding else None)
        load(fusion, renamed(fusion, "film.", TEXTURE), parts[True], where)
    return encoder, fusion


def build_alignment(state: State, where: str = "E3DGE Fuse_sft_block") -> AlignmentFusion:
    """The fusion of details aligned in 3D and in 2D from its official state dict.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    channels = shape_of(state, "scale.0.weight", 2, where)[0]
    extra = shape_of(state, SFT, 2, where)[1] - 2 * channels
    if extra not in (0, 1):
        raise ZooError(f"{where}: {SFT!r} has {extra} inputs beside the features, expected 0 or 1")
    with torch.no_grad():
        fusion = AlignmentFusion(channels, visibility=bool(extra))
        return load(fusion, renamed(fusion, "encode.", "encode_enc."), state, where)


def build_aligner(state: State, where: str = "E3DGE grid_align") -> ResidualAligner:
    """ADA from its official state dict.

    Raises:
        ZooError: naming the first key that is missing, unknown or misshapen.
    """
    firsts = ["conv_layer1.0.weight", *(f"conv_layer{i}.0.res_layer.1.weight" for i in (2, 3, 4))]
    with torch.no_grad():
        aligner = ResidualAligner([shape_of(state, key, 4, where)[0] for key in firsts])
        return load(aligner, renamed(aligner, "", ""), state, where)


def states_of(official: Official) -> dict[str, State]:
    """State dicts by the key that tells what they are, without the prefix that distributed training leaves."""
    found = {}
    for state in official.states.values():
        bare = {key.removeprefix("module."): tensor for key, tensor in state.items()}
        found |= {mark: bare for mark in (E0, E1, SFT, ADA) if mark in bare}
    return found


def matches(official: Official) -> bool:
    """Whether one of the state dicts is E0's or E1's."""
    return bool(states_of(official).keys() & {E0, E1})


def convert(official: Official, settings: Mapping[str, Any]) -> Converted:
    """Those of E0, E1, texture fusion, alignment fusion and ADA that the file has. See :class:`Family`.

    With StyleSDF's file also its generator, and the networks of details as one, ``local``. Settings are StyleSDF's.
    """
    states = states_of(official)
    modules: dict[str, Configurable] = {}
    if E0 in states:
        modules["encoder"] = build_global(states[E0])
    if E1 in states:
        modules["local_encoder"], modules["texture_fusion"] = build_local(states[E1])
    if SFT in states:
        modules["alignment_fusion"] = build_alignment(states[SFT])
    if ADA in states:
        modules["aligner"] = build_aligner(states[ADA])
    if not modules:
        raise ZooError(f"E3DGE: there is neither a key {E0!r} nor {E1!r}")
    found = f"E3DGE: {', '.join(name.replace('_', ' ') for name in modules)}"
    if not stylesdf.matches(official):
        refuse_settings(settings, "e3dge")
        return Converted(modules, found)
    own = stylesdf.convert(official, settings)
    generator = cast(StyleSDF, own.modules["generator"])
    if E1 in states:
        modules = {name: module for name, module in modules.items() if name not in PARTS} | {
            "local": joined({name: modules[name] for name in PARTS if name in modules}, generator)
        }
    # The discriminator may be E3DGE's own, of other pictures: left out.
    licences = [{"name": f.name, "licence": f.licence, "origin": f.origin} for f in (FAMILY, stylesdf.FAMILY)]
    return Converted({"generator": generator, **modules}, f"{found}; {own.found}", own.extra, licences)


def joined(parts: Mapping[str, Any], generator: StyleSDF) -> LocalNetworks:
    """The networks of details, aligned as far as they allow it.

    Raises:
        ZooError: when they are not those of the generator, or do not fit each other.
    """
    alignment = "3d" if "aligner" not in parts else "hybrid" if "alignment_fusion" in parts else "2d"
    chosen = {name: part for name, part in parts.items() if alignment == "hybrid" or name != "alignment_fusion"}
    width, own = generator.init_args["width"], parts["texture_fusion"].width
    if width != own:
        raise ZooError(f"E3DGE's details are of {own} features, StyleSDF's field has {width}: not files of one model")
    try:
        return LocalNetworks(**chosen, alignment=alignment, resolution=RESOLUTION).eval()
    except ValueError as error:
        raise ZooError(f"E3DGE: {error}") from error


def export(modules: Mapping[str, Configurable]) -> dict[str, Any]:
    """``encoder``, ``netLocal`` without what it never reads, ``Fuse_sft_block`` and ``grid_align``, and what StyleSDF's
    file holds, as far as there are modules."""
    if isinstance(together := modules.get("local"), LocalNetworks):
        modules = {**modules, **cast(dict[str, Configurable], dict(together.named_children()))}
    layouts: dict[str, Layout] = {}
    if isinstance(encoder := modules.get("encoder"), GlobalEncoder):
        layouts["encoder"] = renamed(encoder, "trunk.", "")
    if isinstance(local := modules.get("local_encoder"), LocalEncoder):
        layouts["netLocal"] = local_layout(local) | renamed(modules["texture_fusion"], "film.", TEXTURE)
    if isinstance(fusion := modules.get("alignment_fusion"), AlignmentFusion):
        layouts["Fuse_sft_block"] = renamed(fusion, "encode.", "encode_enc.")
    if isinstance(aligner := modules.get("aligner"), ResidualAligner):
        layouts["grid_align"] = renamed(aligner, "", "")
    states = {name: {key: p.official.clone() for key, p in layout.items()} for name, layout in layouts.items()}
    return {"iter": 0, **states, **(stylesdf.export(modules) if "generator" in modules else {})}


# -- parity ------------------------------------------------------------------------------------------------------------


def official_camera(calibs: Tensor, points: Tensor) -> Camera:
    """Official calibrations as cameras.

    Args:
        calibs: (B, 4, 4) world to camera, axes x right, y up, with the first two rows times the focal length for
            image coordinates in [-1, 1].
        points: (B, 3, P), world: the camera looks along -z where the first of them lies there.
    """
    towards = -1.0 if calibs[0, 2, :3] @ points[0, :, 0] + calibs[0, 2, 3] < 0 else 1.0
    focal = calibs[:, :2, :3].norm(dim=-1)
    signs = calibs.new_tensor([1.0, -1.0, towards])
    world2cam = calibs[:, :3] * signs[:, None] / torch.cat([focal, torch.ones_like(focal[:, :1])], 1)[..., None]
    rotation, translation = world2cam.split((3, 1), -1)
    cam2world = torch.eye(4).repeat(len(calibs), 1, 1)
    cam2world[:, :3] = torch.cat([rotation.mT, -rotation.mT @ translation], -1)
    intrinsics = torch.eye(3).repeat(len(calibs), 1, 1)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = focal.unbind(1)
    intrinsics[:, :2, :2] /= 2
    intrinsics[:, :2, 2] = 0.5
    return Camera(cam2world, intrinsics)


@contextmanager
def recorded(encoder: LocalEncoder) -> Iterator[dict[str, Tensor]]:
    """While this is open, outputs inside ``encoder`` are collected under the names of the fixture's "mid" arrays."""
    stacks = cast(list[Stack], list(encoder.stacks))
    parts = {"residual_conv": encoder.residual_conv, "depth_conv": encoder.depth_conv, "stem": encoder.stem}
    parts |= {"conv4": encoder.block3}
    parts |= {f"hourglass_m{i}": stack.hourglass for i, stack in enumerate(stacks)}
    parts |= {f"stack{i}": stack.out for i, stack in enumerate(stacks)}
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def collect(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[f"mid/{name}"] = output

        return collect

    handles = [part.register_forward_hook(hook(name)) for name, part in parts.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def networks(fixture: Fixture) -> dict[str, Configurable]:
    """The fixture's networks, built once."""
    if "modules" not in fixture.memory:
        models = {"encoder": "e0", "netLocal": "local", "Fuse_sft_block": "sft_mlp"}
        states = {name: fixture.state(model) for name, model in models.items() if model in fixture.meta["models"]}
        fixture.memory["modules"] = convert(Official(states), {}).modules
    return fixture.memory["modules"]


def field(fixture: Fixture) -> SDFField:
    """The generator's field."""
    state = fixture.state("siren")
    width, depth = shape_of(state, "sigma_linear.weight", 2, "siren")[1], count(state, r"pts_linears\.")
    found = SDFField(width, depth, shape_of(state, "views_linears.gamma.weight", 2, "siren")[1])
    found.load_state_dict({key: state[field_key(key)] for key in found.state_dict()})
    return found


def replays(meta: Mapping[str, Any]) -> bool:
    """Whether the fixture is E3DGE's."""
    return bool(meta["models"].keys() & {"e0", "sft_mlp"}) and "e0" in meta["config"]


def replay(fixture: Fixture, case: str) -> dict[str, Tensor]:
    """Codes, details and those at points, and how they are fused with the field's features or with each other."""
    found = networks(fixture)

    def given(name: str, other: str = "") -> Tensor:
        return fixture.input(case if fixture.has(case, name) else other, name)

    if case == "e0":
        ws = cast(GlobalEncoder, found["encoder"])(irse50.picture(fixture, case)).groups
        results = {"out/renderer_latents": ws["renderer"]}
        if "decoder" in ws:
            results["out/decoder_latents"] = ws["decoder"]
    elif case == "sft":
        fusion, local, aligned = cast(AlignmentFusion, found["alignment_fusion"]), given("dec_feat"), given("enc_feat")
        results = {"out/fused": fusion(local, aligned), "out/fused_w05": fusion(local, aligned, 0.5)}
    elif case in ("local", "query"):
        encoder = cast(LocalEncoder, found["local_encoder"])
        with recorded(encoder) as results:
            details = encoder(given("residual_image", "local"), given("depth", "local"))
        results["out/im_feat"] = details
        if case == "query":
            results = query(fixture, details, given("points_world"), given("calibs"))
    else:
        fusion = cast(TextureFusion, found["texture_fusion"])
        results = fuse(field(fixture), fusion, case == "fuse", given)
    return results


def query(fixture: Fixture, details: Tensor, points: Tensor, calibs: Tensor) -> dict[str, Tensor]:
    """Details at points (B, 3, P)."""
    camera, pifu = official_camera(calibs, points), fixture.config["pifu"]
    uv, depth = camera.project(points.mT)
    return {
        "out/feats": pixel_features(details, camera, points.mT).mT,
        "out/z_condition": depth[:, None] * (pifu["loadSize"] // 2) / pifu["z_size"],
        "out/proj_xy": (2 * uv - 1).mT,
        "out/in_img": within(points.mT, camera)[..., 0],
        "mid/depth": depth[:, None],
    }


def fuse(network: SDFField, fusion: TextureFusion, modulate: bool, given: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The field at normalised points (B, ..., 3), with or without local features."""
    points = given("points_normalized", "fuse")
    shape, points = points.shape[1:-1], points.flatten(1, -2)
    directions, codes = given("viewdirs", "fuse").flatten(1, -2), given("styles_w9", "fuse")
    film = network.film(codes)
    backbone = network.backbone(points, film)
    one = codes[:, :1].expand_as(codes)
    results = {
        "mid/backbone_features": backbone,
        "out/sdf": network.distance(backbone),
        "out/sdf_single_w": network.distance(network.backbone(points, network.film(one))),
    }
    if modulate:
        local = given("local_feats", "fuse").flatten(1, -2)
        results["mid/modulation"] = fusion.film(local)
        backbone = fusion(backbone, local)
    seen = network.features(backbone, directions, film)
    results |= {"out/features": seen, "out/rgb_logits": network.colour(seen)}
    return {name: value.unflatten(1, shape) for name, value in results.items()}


FAMILY = Family(
    name="e3dge",
    files="E3DGE_Full_Runner.pt, with ffhq1024x1024.pt",
    origin="NIRVANALAN/CVPR23-E3DGE",
    licence="S-Lab License 1.0 (non-commercial)",
    matches=matches,
    convert=convert,
    replays=replays,
    replay=replay,
    export=export,
    settings=stylesdf.SETTINGS,
    includes=("stylesdf",),
)
