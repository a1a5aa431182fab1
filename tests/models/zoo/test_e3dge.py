"""E3DGE: official numbers, files that are not what they should be, and back to the official layout."""

import pytest
import torch
from torch.testing import assert_close

from models.camera import Rig
from models.encoders.alignment import ResidualAligner
from models.encoders.e3dge import AlignmentFusion, GlobalEncoder, LocalEncoder, TextureFusion
from models.heads.pixel_aligned import LocalNetworks
from models.zoo import family, recognise
from models.zoo.e3dge import official_camera
from models.zoo.family import Official, ZooError
from models.zoo.parity import Fixture, replay
from tests.models.generators.protocol import awaken
from tests.models.zoo import test_stylesdf
from tests.models.zoo.fixtures import fixture_folder

FAMILY = family("e3dge")
TRUNK = {"widths": (4, 6, 8, 10), "depths": (1, 2, 1, 1), "reduction": 2}
GLOBAL = {"w_dim": 5, "decoder_dim": 7, **TRUNK}
LOCAL = {"stem": 4, "features": 6, "channels": 128, "stacks": 2, "depth": 2}


def test_numbers_of_the_official_network():
    fixture = Fixture.load(fixture_folder("e3dge"))
    results = list(replay(fixture))
    assert len(results) == sum(map(len, fixture.targets().values()))
    assert [result for result in results if not result.passed] == []


def networks(encoder=None, local=None, fusion=None, visibility=True):
    torch.manual_seed(0)
    modules = {
        "encoder": GlobalEncoder(**(GLOBAL | (encoder or {}))),
        "local_encoder": LocalEncoder(**(LOCAL | (local or {}))),
        "texture_fusion": TextureFusion(**({"width": 5, "channels": 6, "frequencies": 3} | (fusion or {}))),
        "alignment_fusion": AlignmentFusion(6, visibility=visibility),
        "aligner": ResidualAligner([4, 5, 6, 7]),
    }
    return {name: awaken(module).eval() for name, module in modules.items()}


def official(part="netLocal", *, drop=(), add=None, **changes):
    """A small file."""
    file = FAMILY.export(networks(**changes))
    states = {name: state for name, state in file.items() if name != "iter"}
    states[part] = {key: value for key, value in (states[part] | (add or {})).items() if key not in drop}
    return Official(states, {"iter": 0})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder": {"decoder_heads": 0}},
        {"encoder": {"decoder_heads": 10, "texture_side": 32, "geometry_side": 64, "reduction": None}},
        {"local": {"depth": 3, "stacks": 1}},
        {"local": {"norm": "batch", "strided": 64, "depth": 1}},
        {"fusion": {"frequencies": None}, "visibility": False},
    ],
    ids=str,
)
def test_configuration_is_read_off_the_file_and_written_back(changes):
    ours, file = networks(**changes), official(**changes)
    assert recognise(file) is FAMILY
    found = FAMILY.convert(file, {})
    assert found.modules.keys() == ours.keys()
    for name, module in found.modules.items():
        assert not module.training
        expected = ours[name].state_dict()
        assert module.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    shared = {"geometry_side", "decoder_dim"}  # says nothing without heads, or is the default's equal
    for name, module in found.modules.items():
        settings = changes.get({"encoder": "encoder", "local_encoder": "local"}.get(name, ""), {})
        assert all(module.init_args[key] == value for key, value in settings.items() if key not in shared)
    back = FAMILY.export(found.modules)
    for name, state in file.states.items():
        assert back[name].keys() == state.keys()
        assert all(torch.equal(back[name][key], value) for key, value in state.items())


def test_parts_and_prefixes():
    file = official()
    file.states["encoder"] = {f"module.{key}": value for key, value in file.states["encoder"].items()}
    file.states["grid_align"] = {f"module.{key}": value for key, value in file.states["grid_align"].items()}
    file.states["netLocal"]["downsample_channel_conv.conv.bias"] = torch.zeros(3)
    found = FAMILY.convert(file, {})
    assert list(found.modules) == ["encoder", "local_encoder", "texture_fusion", "alignment_fusion", "aligner"]
    assert found.found == "E3DGE: encoder, local encoder, texture fusion, alignment fusion, aligner"
    only = Official({"encoder": file.states["encoder"]})
    assert FAMILY.matches(only) and list(FAMILY.convert(only, {}).modules) == ["encoder"]
    assert not FAMILY.matches(Official({"": {"a": torch.zeros(1)}}))


def with_generator(*, drop=(), **changes):
    """Both files of one model, as they are read together."""
    own, other = (
        official(fusion={"width": 8} | (changes.pop("fusion", None) or {}), **changes),
        test_stylesdf.official(),
    )
    named = {f"runner/{name}": state for name, state in own.states.items() if name not in drop}
    return Official(named | {f"ffhq/{name}": state for name, state in other.states.items()}, {})


@pytest.mark.parametrize(
    ("drop", "alignment"),
    [((), "hybrid"), (("Fuse_sft_block",), "2d"), (("grid_align",), "3d"), (("Fuse_sft_block", "grid_align"), "3d")],
)
def test_together_with_its_generator(drop, alignment):
    file = with_generator(drop=drop)
    assert recognise(file) is FAMILY
    found = FAMILY.convert(file, {"samples": 5})
    assert list(found.modules) == ["generator", "encoder", "local"] and found.modules["generator"].samples == 5
    assert found.extra == {"recipe": "stylesdf"} and len(found.licences) == 2
    local = found.modules["local"]
    assert isinstance(local, LocalNetworks) and local.alignment == alignment and local.resolution == 256
    assert not any(part.training for part in local.modules())
    back = FAMILY.export(found.modules)
    unused = {"Fuse_sft_block"} if alignment == "3d" else set()  # says nothing without an aligner
    assert back.keys() == {"iter", "encoder", "netLocal", "Fuse_sft_block", "grid_align", "g_ema"} - {*drop, *unused}
    states = {name.rpartition("/")[2]: state for name, state in file.states.items()}
    for name in back.keys() - {"iter"}:
        assert all(torch.equal(back[name][key], value) for key, value in states[name].items())
    again = FAMILY.convert(Official({name: back[name] for name in back.keys() - {"iter"}}), {})
    assert list(again.modules) == list(found.modules)


def test_the_encoder_alone_with_its_generator():
    found = FAMILY.convert(with_generator(drop=("netLocal", "Fuse_sft_block", "grid_align")), {})
    assert list(found.modules) == ["generator", "encoder"]


def test_of_another_generator():
    with pytest.raises(ZooError, match="are of 9 features, StyleSDF's field has 8: not files of one model"):
        FAMILY.convert(with_generator(fusion={"width": 9}), {})
    with pytest.raises(ZooError, match="StyleSDF has no setting 'sample'"):
        FAMILY.convert(with_generator(), {"sample": 5})
    with pytest.raises(ZooError, match="e3dge has no setting 'samples'"):
        FAMILY.convert(official(), {"samples": 5})


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("encoder", {"drop": ["styles_pigan.7.linear.bias"]}, r"the key 'styles_pigan\.7\.linear\.bias' is missing"),
        ("encoder", {"add": {"extra": torch.zeros(1)}}, r"the key 'extra' is not known"),
        ("netLocal", {"drop": ["image_filter.m1.b2_plus_1.bn2.bias"]}, r"'image_filter\.m1\.b2_plus_1\.bn2\.bias' is"),
        ("netLocal", {"drop": ["image_filter.conv2.bn4.bias"]}, r"the key 'image_filter\.conv2\.bn4\.bias' is missing"),
        ("netLocal", {"add": {"image_filter.tmp": torch.zeros(1)}}, r"the key 'image_filter\.tmp' is not known"),
        ("netLocal", {"add": {"image_filter.al0.bias": torch.zeros(3)}}, r"'image_filter\.al0\.bias' has shape \(3,\)"),
        (
            "netLocal",
            {"drop": ["local_feat_to_tex_modulations_linear.shortcut.weight"]},
            r"'local_feat_to_tex_modulations_linear\.shortcut\.weight' is missing",
        ),
        ("Fuse_sft_block", {"drop": ["shift.2.bias"]}, r"Fuse_sft_block: the key 'shift\.2\.bias' is missing"),
        ("grid_align", {"drop": ["conv_layer1.1.running_var"]}, r"the key 'conv_layer1\.1\.running_var' is missing"),
        ("grid_align", {"drop": ["conv_layer3.0.res_layer.1.weight"]}, r"'conv_layer3\.0\.res_layer\.1\.weight' is"),
        (
            "grid_align",
            {"add": {"conv_layer2.1.shortcut_layer.0.weight": torch.zeros(1)}},
            r"the key 'conv",
        ),
    ],
)
def test_first_mismatch_is_named(part, changes, message):
    with pytest.raises(ZooError, match=message) as error:
        FAMILY.convert(official(part, **changes), {})
    assert "\n" not in str(error.value)


def test_what_is_no_such_file():
    with pytest.raises(ZooError, match="e3dge has no setting 'size'"):
        FAMILY.convert(official(), {"size": 1})
    with pytest.raises(ZooError, match="there is neither a key"):
        FAMILY.convert(Official({"": {}}), {})


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_official_cameras(sign):
    """Rows are x, y up and z, the last backward or forward, as the first point tells."""
    expected = Rig(radius=1.0, focal=4.7, pivot=(0, 0, 0), near=0.8, far=1.2).camera(torch.tensor([0.3, -0.2]), 0.1)
    world2cam = torch.linalg.inv(expected.cam2world)
    calibs = world2cam * torch.tensor([2 * 4.7, -2 * 4.7, sign, 1.0])[:, None]
    found = official_camera(calibs, torch.zeros(2, 3, 1))
    assert_close(found.cam2world, expected.cam2world)
    assert_close(found.intrinsics, expected.intrinsics)
