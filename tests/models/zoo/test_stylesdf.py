"""StyleSDF: official numbers, files that are not what they should be, and back to the official layout."""

import math

import pytest
import torch
from torch.testing import assert_close

from models.generators.stylegan2 import StyleGAN2Discriminator
from models.generators.stylesdf import StyleSDF, VolumeDiscriminator
from models.zoo import family, recognise
from models.zoo.family import Official, ZooError
from models.zoo.parity import Fixture, replay
from models.zoo.stylesdf import official_camera
from tests.models.generators.protocol import awaken
from tests.models.zoo.fixtures import fixture_folder

SIZES = {"z_dim": 6, "width": 8, "depth": 2, "mapping_layers": 3, "raw_resolution": 8}
DECODER = {"channels": (8, 4), "w_dim": 10, "mapping_layers": 2}
FAMILY = family("stylesdf")


def test_numbers_of_the_official_network():
    fixture = Fixture.load(fixture_folder("stylesdf_t32_s64"))
    results = list(replay(fixture))
    assert len(results) == sum(map(len, fixture.targets().values()))
    assert [result for result in results if not result.passed] == []


def test_the_renderer_alone_gives_the_same_numbers():
    fixture = Fixture.load(fixture_folder("stylesdf_t32_s64"))
    fixture.state = lambda model, state=fixture.state: {
        key: tensor for key, tensor in state(model).items() if not key.startswith("decoder.")
    }
    decoders = ("image", "decoder_latent", "decoder_conv1", "decoder_to_rgb1")
    arrays = fixture.meta["arrays"]
    fixture.meta["arrays"] = {name: limits for name, limits in arrays.items() if not name.endswith(decoders)}
    del fixture.arrays["trunc/in/truncation_latent_decoder"]
    results = {result.name: result for result in replay(fixture)}
    assert {"trunc/out/thumb_rgb", "full/out/xyz", "perturb/mid/features", "eikonal/out/eikonal_term"} <= results.keys()
    assert [result for result in results.values() if not result.passed] == []


def networks(decoder=DECODER, **changes):
    torch.manual_seed(0)
    generator = awaken(StyleSDF(decoder=decoder, **(SIZES | changes))).eval()
    generator.update_mean()
    judge = VolumeDiscriminator((3, 4, 4)) if decoder is None else StyleGAN2Discriminator((5, 4, 3))
    return {"generator": generator, "discriminator": awaken(judge).eval()}


def official(*, drop=(), add=None, decoder=DECODER, **changes):
    """A small file."""
    file = FAMILY.export(networks(decoder, **changes))
    state = {key: value for key, value in (file["g_ema"] | (add or {})).items() if key not in drop}
    untrained = {key: value + 1 for key, value in state.items()}
    return Official({"g": untrained, "d": file["d"], "g_ema": state}, {"g_optim": {}})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder": {**DECODER, "channels": (6,)}},
        {"decoder": {**DECODER, "channels": (6, 5, 4), "w_dim": 7, "mapping_layers": 5}},
        {"decoder": {**DECODER, "taps": (1, 1)}},
        {"decoder": None},
        {"decoder": None, "signed_distance": False},
        {"width": 5, "depth": 3, "z_dim": 4, "mapping_layers": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_configuration_is_read_off_the_file_and_written_back(changes):
    ours, file = networks(**changes), official(**changes)
    assert recognise(file) is FAMILY
    settings = {"raw_resolution": 8} if ours["generator"].decoder is None else {}
    found = FAMILY.convert(file, settings)
    generator = found.modules["generator"]
    assert not generator.training and not found.modules["discriminator"].training
    assert f"{generator.resolution} px" in found.found
    z = generator.sample_z(2, torch.Generator().manual_seed(0))
    camera = generator.rig.camera(torch.tensor([0.2, -0.1]))
    assert_close(generator(z, camera).image, ours["generator"](z, camera).image)
    assert_close(generator.mean_latents.groups, ours["generator"].mean_latents.groups)
    back = FAMILY.export(found.modules)
    for name, state in back.items():
        assert list(state) == list(file.states[name])
        assert all(torch.equal(state[key], value) for key, value in file.states[name].items())


def test_settings():
    settings = {
        "samples": 9, "offset_sampling": False, "normalize_points": False, "static_directions": False,
        "opaque_end": False, "lr_mapping": 0.1, "fov": 9.0, "dist_radius": 0.2, "azim": 0.15, "uniform": True,
    }  # fmt: skip
    generator = FAMILY.convert(official(), settings).modules["generator"]
    for name in ("samples", "offset_sampling", "normalize_points", "static_directions", "opaque_end"):
        assert generator.init_args[name] == settings[name]
    assert generator.init_args["decoder"]["lr_multiplier"] == 0.1
    rig = generator.rig
    assert (rig.near, rig.far, rig.distribution, rig.yaw_max, rig.pitch_max) == (0.8, 1.2, "uniform", 0.15, 0.15)
    assert rig.focal == pytest.approx(0.5 / math.tan(math.radians(9)))
    with pytest.raises(ZooError, match="StyleSDF has no setting 'size', but: samples"):
        FAMILY.convert(official(), {"size": 64})
    with pytest.raises(ZooError, match="raw_resolution is for files of the renderer alone"):
        FAMILY.convert(official(), {"raw_resolution": 64})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ["style.1.bias"]}, r"the key 'style\.1\.bias' is missing"),
        (
            {"drop": ["renderer.network.pts_linears.1.weight"]},
            r"the key 'renderer\.network\.pts_linears\.1\.weight' is",
        ),
        ({"drop": ["decoder.conv1.bias"]}, r"the key 'decoder\.conv1\.bias' is missing"),
        ({"drop": ["decoder.noises.noise_0"]}, r"the key 'decoder\.noises\.noise_0' is missing"),
        ({"add": {"extra": torch.zeros(1)}}, r"the key 'extra' is not known"),
        ({"add": {"decoder.extra.bias": torch.zeros(1)}}, r"the key 'decoder\.extra\.bias' is not known"),
        (
            {"add": {"decoder.convs.0.activate.bias": torch.zeros(3)}},
            r"'decoder\.convs\.0\.activate\.bias' has shape \(3,\), expected \(4,\)",
        ),
        (
            {"add": {"decoder.conv1.conv.weight": torch.zeros(3)}},
            r"'decoder\.conv1\.conv\.weight' has shape \(3,\), exp",
        ),
    ],
    ids=["mapping", "field", "unread", "noise", "extra", "extra in decoder", "shape", "dimensions"],
)
def test_first_mismatch_is_named(changes, message):
    with pytest.raises(ZooError, match=message) as error:
        FAMILY.convert(official(**changes), {})
    assert "\n" not in str(error.value)


def test_discriminator_mismatch_is_named():
    file = official(decoder=None)
    file.states["d"].pop("convs.1.conv1.activation.bias")
    with pytest.raises(ZooError, match=r"volume discriminator: the key 'convs\.1\.conv1\.activation\.bias' is missing"):
        FAMILY.convert(file, {"raw_resolution": 8})


def test_file_without_average():
    file = official()
    file.states.pop("g_ema")
    generator = FAMILY.convert(file, {}).modules["generator"]
    assert torch.equal(generator.field.colour.bias, file.states["g"]["renderer.network.rgb_linear.bias"])
    with pytest.raises(ZooError, match="sigma_linear"):
        FAMILY.convert(Official({"d": file.states["d"]}), {})


def test_official_cameras():
    """At azimuth a and elevation e the camera is at (cos e sin a, sin e, cos e cos a), as our rig puts it."""
    expected = StyleSDF(**SIZES).rig.camera(torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.0]))
    poses = expected.cam2world[:, :3] * torch.tensor([1.0, -1.0, -1.0, 1.0])
    focals = torch.full((2, 1, 1), 0.5 * 64 / math.tan(math.radians(6)))
    found = official_camera(poses, focals, 64)
    assert_close(found.cam2world, expected.cam2world)
    assert_close(found.intrinsics, expected.intrinsics)
