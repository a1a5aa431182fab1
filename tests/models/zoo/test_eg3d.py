"""EG3D against the official numbers, and its files."""

import math

import pytest
import torch
from torch.testing import assert_close

from models.generators.eg3d import RELEASED, EG3DGenerator, integrate
from models.generators.triplane import PLANES
from models.zoo import eg3d, parity, recognise
from models.zoo.family import Official, ZooError
from tests.models.zoo.fixtures import fixture_folder

NAMES = ("eg3d_sr128", "eg3d_sr512")
CONV = "backbone.synthesis.b16.conv0.weight"
FILTER = "backbone.synthesis.b16.conv0.resample_filter"


@pytest.fixture(scope="module")
def fixture():
    return parity.Fixture.load(fixture_folder(NAMES[0]))


@pytest.fixture(scope="module")
def state(fixture):
    return fixture.state("generator")


@pytest.fixture(scope="module")
def stored(fixture):
    """What a pickled network keeps of its construction."""
    return {"init_kwargs": fixture.config["G_kwargs"], "attributes": {"neural_rendering_resolution": 32}}


@pytest.mark.parametrize("name", NAMES)
def test_parity(name):
    for comparison in parity.replay(parity.Fixture.load(fixture_folder(name))):
        assert comparison.passed, comparison


def test_parity_of_one_pass():
    fixture = parity.Fixture.load(fixture_folder("eg3d_sr128"))
    fixture.config["G_kwargs"]["rendering_kwargs"]["depth_resolution_importance"] = 0
    for case in ("det", "jit"):
        fixture.arrays.pop(f"{case}/in/u_fine", None)
        results = eg3d.replay(fixture, case)
        for name in ("depths_coarse", "sigma_coarse", "rgb_coarse"):
            name = f"{case}/mid/{name}"
            found = fixture.strided(name, results[name.removeprefix(f"{case}/")])
            assert parity.compare(fixture, name, found).passed


def small(**changes):
    options = {
        "z_dim": 8, "w_dim": 8, "channels": (4, 4), "plane_features": 4, "decoder": {"hidden": 6},
        "render_resolution": 16, "superresolution": {"channels": (256, 128)},
    }  # fmt: skip
    return EG3DGenerator(**{**options, **changes})


# -- round trips -----------------------------------------------------------------------------------------------------


def test_round_trip(state, stored):
    official = Official({"G": state, "G_ema": state}, {"G_ema": stored})
    assert recognise(official) is eg3d.FAMILY
    converted = eg3d.convert(official, {})
    assert converted.found == "EG3D generator, 32 px rendered, 128 px after SuperresolutionHybrid2X, w of 512"
    exported = eg3d.export(converted.modules)
    assert list(exported["G_ema"]) == list(state)
    assert all(torch.equal(exported["G_ema"][key], tensor) for key, tensor in state.items())
    for name, value in stored["init_kwargs"]["rendering_kwargs"].items():
        assert exported["init_kwargs"]["rendering_kwargs"].get(name, value) == value


@pytest.mark.parametrize(
    ("resolution", "channels", "factor", "head"),
    [
        (512, [256, 128], 4, "SuperresolutionHybrid8XDC"),
        (512, [128, 64], 4, "SuperresolutionHybrid8X"),
        (256, [128, 64], 2, "SuperresolutionHybrid4X"),
        (128, [128, 64], 2, "SuperresolutionHybrid2X"),
    ],
)
def test_every_head_and_option_survives_a_round_trip(resolution, channels, factor, head):
    enlarge = {"resolution": resolution, "channels": channels, "factor": factor, "noise": "random", "antialias": False}
    generator = small(
        mapping={"layers": 3, "hidden": 12, "embedding": 5, "lr_multiplier": 0.1},
        label_scale=0.5, channels=(8, 6, 4), decoder={"hidden": 10, "lr_multiplier": 0.5}, clamp=64.0, box=1.6,
        coarse=7, fine=5, disparity=True, white_back=True, taps=(1, 2, 1),
        superresolution={**enlarge, "clamp": None}, rig={"radius": 1.7, "pivot": (0, 0, 0), "near": 0.1, "far": 2.6},
    )  # fmt: skip
    exported = eg3d.export({"generator": generator})
    assert exported["init_kwargs"]["rendering_kwargs"]["superresolution_module"].endswith(head)
    official = Official({"G_ema": exported.pop("G_ema")}, exported)
    again = eg3d.convert(official, {}).modules["generator"]
    assert isinstance(again, EG3DGenerator)
    assert again.rig == generator.rig and again.white_back and again.backbone.clamp == 64
    for name in ("channels", "resolution", "side", "noise", "antialias", "clamp"):
        assert getattr(again.superresolution, name) == getattr(generator.superresolution, name)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in generator.state_dict().items())
    camera, z = generator.rig.camera(0.2), torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ws, wanted = again.mapping(z, camera=camera).ws, generator.mapping(z, camera=camera).ws
        seen, expected = (integrate(g.march(g.backbone(wanted)[-1][1], *camera.rays(16))) for g in (again, generator))
    assert_close(ws, wanted)
    assert_close(seen, expected)


def test_unconditional():
    generator = small(mapping={"label": 0}, label_scale=0.0)
    exported = eg3d.export({"generator": generator})
    assert exported["init_kwargs"]["c_dim"] == 0
    assert not any("embed" in key for key in exported["G_ema"])
    again = eg3d.convert(Official({"G_ema": exported.pop("G_ema")}, exported), {}).modules["generator"]
    assert isinstance(again, EG3DGenerator) and again.map_network.embed is None


def test_only_eg3d_is_exported():
    with pytest.raises(ZooError, match="exports an EG3DGenerator"):
        eg3d.export({})


# -- configuration ---------------------------------------------------------------------------------------------------


def test_a_bare_state_dict_is_taken_as_ffhq(state):
    generator = eg3d.convert(Official({"": state}), {}).modules["generator"]
    assert isinstance(generator, EG3DGenerator)
    assert (generator.coarse, generator.fine, generator.render_resolution) == (48, 48, 128)
    assert generator.rig.radius == 2.7 and generator.rig.pivot == (0, 0, 0.2) and generator.label_scale == 1
    assert generator.backbone.blocks[0].conv1.clamp is None  # type: ignore[union-attr]
    assert generator.superresolution.blocks[0].conv1.clamp == 256  # type: ignore[union-attr]


def test_settings_win(state, stored):
    official = Official({"G_ema": state}, {"G_ema": stored})
    settings = {"depth_resolution": 9, "white_back": True, "focal": 1.0254, "c_gen_conditioning_zero": True}
    generator = eg3d.convert(official, settings).modules["generator"]
    assert isinstance(generator, EG3DGenerator)
    assert generator.coarse == 9 and generator.white_back and generator.rig.focal == 1.0254
    assert generator.label_scale == 0
    with pytest.raises(ZooError, match="no setting 'colour', but: depth_resolution"):
        eg3d.convert(official, {"colour": 1})


def test_what_the_official_constructor_assumes(state, stored):
    """A pickle without these arguments was built with the constructor's own defaults, not with FFHQ's options."""
    kwargs = {name: value for name, value in stored["init_kwargs"].items() if name != "conv_clamp"}
    kwargs["rendering_kwargs"] = {k: v for k, v in kwargs["rendering_kwargs"].items() if k != "c_scale"}
    generator = eg3d.convert(Official({"G_ema": state}, {"G_ema": {"init_kwargs": kwargs}}), {}).modules["generator"]
    assert isinstance(generator, EG3DGenerator)
    assert generator.label_scale == 0 and generator.render_resolution == 64
    assert generator.backbone.blocks[0].conv1.clamp == 256  # type: ignore[union-attr]


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(CONV), f"the key '{CONV}' is missing"),
        (lambda s: s.update(other=torch.zeros(1)), "the key 'other' is not known"),
        (lambda s: s.update({CONV: torch.zeros(2, 32, 3, 3)}), rf"'{CONV}' has shape \(2, 32, 3, 3\), expected \(32,"),
        (
            lambda s: s.pop("backbone.synthesis.b64.torgb.weight"),
            "the key 'backbone.synthesis.b64.torgb.weight' is missing",
        ),
        (lambda s: s.pop("decoder.net.2.bias"), "the key 'decoder.net.2.bias' is missing"),
        (lambda s: s.update({FILTER: torch.ones(4, 4)}), f"'{FILTER}' is another filter"),
        (lambda s: s.pop("backbone.mapping.w_avg"), "the key 'backbone.mapping.w_avg' is missing"),
        (lambda s: s.update({"backbone.mapping.embed.weight": torch.zeros(512, 6)}), "conditioned on 6 numbers"),
        (
            lambda s: s.update({"backbone.mapping.embed.weight": torch.zeros(6)}),
            "embed.weight' has shape .*expected 2 axes",
        ),
        (lambda s: s.update({"superresolution.block1.conv1.weight": torch.zeros(5, 5, 3, 3)}), "no official super"),
        (lambda s: s.pop("decoder.net.0.weight"), "holds no EG3D generator"),
    ],
)
def test_wrong_keys_are_named(state, change, message):
    changed = dict(state)
    change(changed)
    with pytest.raises(ZooError, match=message) as caught:
        eg3d.convert(Official({"": changed}), {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ray_start": "auto"}, "ray_start must be a number, not 'auto'"),
        ({"clamp_mode": "relu"}, "clamp_mode must be softplus, not 'relu'"),
        ({"superresolution_module": "training.mine.Better"}, "super-resolution 'Better' is not one of"),
        ({"depth_resolution": 2}, "coarse must be at least 4"),
        ({"superresolution_noise_mode": "loud"}, "superresolution.noise must be one of"),
        ({"ray_end": 1}, "near"),
    ],
)
def test_options_that_do_not_fit(state, settings, message):
    with pytest.raises(ZooError, match=message):
        eg3d.convert(Official({"": state}), settings)


class TestPlanes:
    """Which axes the planes hold is read from the pickle's renderer."""

    @staticmethod
    def small(**options):
        torch.manual_seed(0)
        return EG3DGenerator(
            z_dim=16, w_dim=16, channels=(16, 16, 16), plane_features=8, decoder={"hidden": 8}, render_resolution=32,
            coarse=12, fine=12, superresolution={"channels": (128, 64), "resolution": 128, "factor": 2}, **options,
        )  # fmt: skip

    @pytest.mark.parametrize("axes", [RELEASED, PLANES, ((0, 1), (0, 2), (1, 2))])
    def test_matrices_mean_what_eg3d_does_with_them(self, axes):
        points = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = eg3d._axes(eg3d._matrices(axes), "x")
        assert found == axes
        for matrix, (column, row) in zip(eg3d._matrices(axes), found, strict=True):
            projected = points @ torch.linalg.inv(torch.tensor(matrix, dtype=torch.float64))
            assert torch.equal(projected[:, :2], points[:, [column, row]])

    @pytest.mark.parametrize("axes", [RELEASED, PLANES])
    def test_round_trip(self, axes):
        made = self.small(axes=axes)
        exported = eg3d.export({"generator": made})
        official = Official({"G_ema": exported["G_ema"]}, {"G_ema": {k: exported[k] for k in exported if k != "G_ema"}})
        back = eg3d.convert(official, {}).modules["generator"]
        assert back.axes == axes and back.rig == made.rig
        plain = Official({"G_ema": exported["G_ema"]}, {})  # a bare state dict cannot tell
        assert eg3d.convert(plain, {}).modules["generator"].axes == RELEASED
        assert eg3d.convert(plain, {"plane_axes": "zy"}).modules["generator"].axes == PLANES

    @pytest.mark.parametrize(
        "axes", ["yx", 7, None, [[1]], [[[1, 0, 0]] * 3] * 3, torch.zeros(3, 3, 3), [[["x"] * 3] * 3] * 3]
    )
    def test_others_are_refused(self, axes):
        exported = eg3d.export({"generator": self.small()})
        described = {
            "init_kwargs": exported["init_kwargs"],
            "modules": {"renderer": {"attributes": {"plane_axes": axes}}},
        }
        with pytest.raises(ZooError, match="plane_axes must be zx, zy or three matrices"):
            eg3d.convert(Official({"G_ema": exported["G_ema"]}, {"G_ema": described}), {})


class TestCameras:
    @pytest.mark.parametrize(("radius", "focal"), [(2.7, 4.2647), (1.7, 1.0254)])
    def test_focal_length_of_the_data(self, radius, focal):
        exported = eg3d.export({"generator": TestPlanes.small()})
        kwargs = exported["init_kwargs"]
        kwargs["rendering_kwargs"] |= {"avg_camera_radius": radius, "ray_start": 0.1, "ray_end": 3.0, "box_warp": 1.6}
        converted = eg3d.convert(Official({"G_ema": exported["G_ema"]}, {"G_ema": {"init_kwargs": kwargs}}), {})
        rig = converted.modules["generator"].rig
        assert rig.focal == focal and "focal" not in converted.found
        assert rig.yaw_max == pytest.approx(math.pi if radius == 1.7 else math.radians(60))

    def test_one_that_nobody_knows_is_said(self):
        exported = eg3d.export({"generator": TestPlanes.small()})
        kwargs = exported["init_kwargs"]
        kwargs["rendering_kwargs"] |= {"avg_camera_radius": 2.0, "ray_start": 0.1}
        official = Official({"G_ema": exported["G_ema"]}, {"G_ema": {"init_kwargs": kwargs}})
        assert "--set focal=NUMBER" in eg3d.convert(official, {}).found
        assert "focal" not in eg3d.convert(official, {"focal": 1.5}).found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    state = {key: tensor.to(dtype) for key, tensor in eg3d.export({"generator": TestPlanes.small()})["G_ema"].items()}
    found = eg3d.convert(Official({"G_ema": state}, {}), {}).modules["generator"]
    assert all(p.dtype == torch.float32 for p in found.parameters())
