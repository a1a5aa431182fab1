"""Directions of a toy world whose attributes are known, by the real command lines."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from datamodules.latents import CodeBlock, CodeTruth, LatentDataModule, MannequinLatents
from datamodules.mannequins.scene import CODE_NAMES, Z_NAMES
from datamodules.seeds import index_generator
from models import artifact
from models.encoders.e3dge import GlobalEncoder
from models.encoders.pyramid import GradualStyleEncoder
from models.errors import UserError
from models.generators.stylegan2 import StyleGAN2Generator
from models.generators.stylesdf import StyleSDF
from models.heads.subjects import Subjects
from models.metrics.records import read_records
from stages import cli
from stages.directions import DirectionsStage
from tests.stages import small
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill, galatea

ATTRIBUTES = ("tall", "wide", "deep", "red", "green", "blue")


class ToyCodes(LatentDataModule):
    """Codes of six numbers whose attributes are themselves."""

    def code_truth(self, z_dim):
        return CodeTruth(ATTRIBUTES[:z_dim])


class Colours(nn.Module):
    """Mean colours of a picture."""

    names = ("bright", "reddish")

    def forward(self, image):
        mean = image.float().mean((2, 3))
        return torch.stack([mean.mean(1), mean[:, 0] - mean[:, 2]], 1)


class Same(nn.Module):
    """The same of every picture, but for what rounding does."""

    names = ("brow", "chin")

    def forward(self, image):
        return torch.tensor([0.1, 0.7]).expand(len(image), -1)


class Red(Colours):
    """What the codes tell too."""

    names = ("red", "reddish")


class Difference(nn.Module):
    """Between pictures, root mean square."""

    def forward(self, a, b):
        return (a - b).square().mean((1, 2, 3)).sqrt()


def prior(folder):
    """A StyleSDF of two groups of codes: w is a linear map of z, so that the attributes' axes are known."""
    torch.manual_seed(0)
    decoder = {"channels": (12, 8), "w_dim": 10, "mapping_layers": 1, "lr_multiplier": 1.0}
    generator = StyleSDF(6, 12, 2, 1, raw_resolution=16, samples=8, decoder=decoder)
    with torch.no_grad():
        generator.map_network[0].weight.copy_(torch.linalg.qr(torch.randn(12, 6))[0])
        generator.map_network[0].bias.fill_(9.0)  # all on one side of the activation's bend
        for layer in generator.field.layers:
            layer.gamma.weight.mul_(0.03)  # heads change smoothly with their codes
    generator.update_mean(256)
    return artifact.save(folder, stage="prior", modules={"generator": generator.eval()})


def inputs(folder, count=0):
    prior(folder / "sdf")


def line(folder, **model):
    given = {
        "prior": {"path": str(folder / "sdf")},
        "names": ["tall", "red", "reddish"],
        "attributes": [{"class_path": "tests.stages.test_directions.Colours"}],
        "method": {
            "class_path": "models.heads.boundaries.LinearBoundaries",
            "init_args": {"share": 0.2, "along": "normal"},
        },
        "perceptual": {"class_path": "tests.stages.test_directions.Difference"},
        "calibration": {"codes": 3, "steps": 3, "distance": 0.05},
        "heads": 2,
        "tile": 32,
    }
    data = {"class_path": "tests.stages.test_directions.ToyCodes"}
    data["init_args"] = {"samples": 44, "test_samples": 10, "block": 3}
    file = small.write(folder / "directions.yaml", {"model": {**given, **model}, "data": data})
    return ["directions", "fit", f"--config={file}", *small.TRAINER]


CASE = StageCase(
    line,
    inputs,
    commands={"fit": Command()},
    kills=[Kill("group.safetensors", 4), Kill("heads.safetensors", 6), Kill("artifact")],
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    inputs(folder)
    galatea(*line(folder), f"--out={folder / 'directions'}")
    return folder


@pytest.fixture(scope="module")
def good(work):
    """Of more codes, which know their attributes better; and the known ones' exact."""
    data = ["--data.init_args.samples=900", "--data.init_args.block=50"]
    galatea(*line(work), *data, f"--out={work / 'good'}")
    return work / "good"


def run(line, out, *more):
    """In this process, which keeps errors as they are."""
    cli.run(line[0], DirectionsStage, [*line[1:], f"--out={out}", *more])


def found(out):
    return artifact.load(out).module("directions")


def test_what_is_handed_on(work):
    result = artifact.load(work / "directions")
    directions = result.module("directions")
    assert directions.names == ("tall", "red", "reddish") and directions.groups == ("renderer", "decoder")
    assert directions.direction("renderer").shape == (3, 1, 12) and directions.direction("decoder").shape == (3, 1, 10)
    assert result.manifest["parents"].keys() == {"prior"} and result.origin("generator")[0].stage == "prior"
    for name in directions.names:
        assert result.metrics[f"{name}/renderer/accuracy"] > 0.6 and f"{name}/decoder/accuracy" in result.metrics
    assert bool((directions.limits[:, 0] < 0).all()) and bool((directions.limits[:, 1] > 0).all())
    assert Subjects(result).ids == ("subject-1", "subject-2", "subject-3")  # there is something to look at


def test_the_known_direction_is_found(work, good):
    """w = z A + b, of orthonormal rows: the boundary of one number of z is its row of A."""
    directions, generator = found(good), artifact.load(work / "sdf").module("generator")
    axes = generator.map_network[0].weight.detach().T
    for row, axis in ((0, axes[0]), (1, axes[3])):
        assert float(directions.direction("renderer")[row, 0] @ axis) > 0.97
    torch.testing.assert_close(directions.spread("renderer")[:2], torch.ones(2), atol=0.1, rtol=0)
    assert artifact.load(good).metrics["red/renderer/correlation"] > 0.97


def test_ranges_are_of_the_perceptual_change(work, tmp_path):
    """Or of how far sampled codes reach; what is measured at the ends is what was asked."""
    metrics = {}
    for distance in (0.02, 1e9):
        out = tmp_path / str(distance)
        calibration = {"codes": 4, "steps": 6, "distance": distance}
        run(line(work, names=["tall"], calibration=calibration), out)
        metrics[distance] = artifact.load(out).metrics, found(out).limits[0].tolist()
    (near, ends), (_, reach) = metrics.values()
    for side, key in enumerate(("tall/low_distance", "tall/high_distance")):
        assert 0.02 <= near[key] < 0.021 and abs(ends[side]) < abs(reach[side])
    directions, block = found(out), CodeBlock(0, 44, 0)
    ws = artifact.load(work / "sdf").module("generator").mapping(block.z(6))
    groups = [(t[:, 0] @ directions.direction(g)[0, 0]).detach().double() for g, t in ws.groups.items()]
    places = torch.stack([(p - p.mean()) / p.std(correction=0) for p in groups])
    wanted = [float(places.amin(1).max()), float(places.amax(1).min())]
    assert reach == pytest.approx(wanted, rel=1e-4)


def test_heads_as_they_are_are_drawn_once(work, tmp_path, monkeypatch):
    """When ranges are measured, whatever the number of directions."""
    drawn, render = [], DirectionsStage.render
    monkeypatch.setattr(
        DirectionsStage, "render", lambda self, ws, camera: drawn.append(ws) or render(self, ws, camera)
    )
    run(line(work, names=["tall", "red"]), tmp_path)
    directions, ws = found(tmp_path), drawn[0].groups
    unmoved = [d for d in drawn if all(torch.equal(d.groups[g], ws[g]) for g in directions.groups)]
    assert len(unmoved) == 1 and len(drawn) > 4 and len(drawn[0]) == 3


def test_held_attributes(work, tmp_path):
    method = {
        "class_path": "models.heads.boundaries.LinearBoundaries",
        "init_args": {"share": 0.2, "hold": "all", "along": "normal"},
    }
    run(line(work, method=method), tmp_path)
    plain, held = found(work / "directions"), found(tmp_path)
    for group in plain.groups:
        for k in range(3):
            others = plain.direction(group)[[i for i in range(3) if i != k], 0]
            assert float((others @ held.direction(group)[k, 0]).abs().max()) < 1e-6


def test_the_order_is_the_users(work, tmp_path):
    run(line(work, names=["reddish", "red"]), tmp_path)
    made, own = found(tmp_path), found(work / "directions")
    assert made.names == ("reddish", "red")
    assert torch.equal(made.direction("renderer").flip(0), own.direction("renderer")[1:])


def test_what_codes_tell_is_asked_of_no_picture(work, tmp_path, monkeypatch):
    """Networks may score by the same names, for the test."""
    monkeypatch.delattr(DirectionsStage, "scores")
    scorers = [{"class_path": "tests.stages.test_directions.Red"}]
    run(line(work, names=["tall", "red"], attributes=scorers), tmp_path / "out")
    found = artifact.load(tmp_path / "out").module("directions")
    known = artifact.load(work / "directions").module("directions")
    for group in ("renderer", "decoder"):
        for name in ("tall", "red"):
            own, other = (d.direction(group)[d.names.index(name)] for d in (found, known))
            torch.testing.assert_close(own, other)
    with pytest.raises(AttributeError, match="scores"):
        run(line(work, names=["reddish"], attributes=scorers), tmp_path / "other")


def test_names_of_ones_own(work, tmp_path):
    """Directions by what users ask for, of attributes by what the world calls them; what is held goes by the former."""
    method = {"class_path": "models.heads.boundaries.LinearBoundaries",
              "init_args": {"share": 0.2, "hold": {"height": ["colour"]}}}  # fmt: skip
    run(line(work, names=["colour=red", "height=tall"], method=method), tmp_path / "own")
    method["init_args"]["hold"] = {"tall": ["red"]}
    run(line(work, names=["red", "tall"], method=method), tmp_path / "plain")
    own, plain = found(tmp_path / "own"), found(tmp_path / "plain")
    assert own.names == ("colour", "height") and plain.names == ("red", "tall")
    for group in own.groups:
        assert torch.equal(own.direction(group), plain.direction(group))
    assert torch.equal(own.limits, plain.limits)
    with pytest.raises(UserError, match="no attribute 'smile', there are: tall, wide"):
        run(line(work, names=["joy=smile"]), tmp_path / "wrong")
    with pytest.raises(UserError, match="names calls both red and tall 'joy'"):
        run(line(work, names=["joy=red", "joy=tall"]), tmp_path / "wrong")


def test_drawn_poses(work, tmp_path):
    run(line(work, views="drawn"), tmp_path)
    assert not torch.equal(
        found(tmp_path).direction("renderer")[2], found(work / "directions").direction("renderer")[2]
    )
    assert torch.equal(found(tmp_path).direction("renderer")[:2], found(work / "directions").direction("renderer")[:2])


def test_a_generator_without_cameras(tmp_path):
    """2D, and one group of codes."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator(style_dim=6, channels=[8, 8, 8], mapping_layers=2)
    artifact.save(tmp_path / "sdf", stage="prior", modules={"generator": generator.eval()})
    run(line(tmp_path), tmp_path / "out")
    assert found(tmp_path / "out").groups == ("ws",)


class TestBoundaries:
    def test_found_elsewhere(self, work, tmp_path):
        own = found(work / "directions")
        np.save(tmp_path / "smile.npy", own.direction("renderer")[0].numpy())
        torch.save(3 * own.direction("decoder")[1], tmp_path / "age.pt")
        files = {"a_smile": f"{tmp_path}/smile.npy", "b_age": {"decoder": f"{tmp_path}/age.pt"}}
        run(line(work, names=[], boundaries=files, attributes=None), tmp_path / "out")
        made = found(tmp_path / "out")
        assert made.names == ("a_smile", "b_age")
        torch.testing.assert_close(made.direction("renderer")[0], own.direction("renderer")[0])
        torch.testing.assert_close(made.direction("decoder")[1], own.direction("decoder")[1])
        assert not made.direction("renderer")[1].any() and not made.direction("decoder")[0].any()
        assert bool((made.limits[:, 1] > 0).all())
        torch.testing.assert_close(made.spread("renderer")[0], own.spread("renderer")[0])

    def test_beside_those_that_are_found(self, work, tmp_path):
        np.save(tmp_path / "smile.npy", np.ones((3, 12)))  # of three rows: each layer has its own
        run(line(work, names=["tall"], boundaries={"smile": f"{tmp_path}/smile.npy"}), tmp_path / "out")
        made, own = found(tmp_path / "out"), found(work / "directions")
        assert made.names == ("tall", "smile") and made.direction("renderer").shape == (2, 3, 12)
        ws = artifact.load(work / "sdf").module("generator").mapping(torch.zeros(1, 6))
        deviation = {k: made.shift("tall", 1.0)[k] - own.shift("tall", 1.0)[k] for k in made.groups}
        assert all(float(d.abs().max()) < 1e-5 for d in deviation.values()) and len(made.apply(ws, {"smile": 1.0})) == 1


class TestUse:
    def test_it_moves_what_it_should(self, work, good, tmp_path):
        run(["directions", "test", *line(work)[2:]], tmp_path, f"--model.tested.path={good}")
        records = read_records(tmp_path)
        changes = {}
        for record in records:
            if record.metric == "change/reddish":
                changes.setdefault(record.variant, []).append(record.value)
        assert set(changes) == {"tall", "red", "reddish"} and len(changes["tall"]) == 10
        mean = {name: sum(values) / 10 for name, values in changes.items()}
        assert mean["reddish"] > 0 and {r.feature_network for r in records} == {"Colours"}
        leakage = {r.variant: r.value for r in records if r.metric == "leakage"}
        assert set(leakage) == {"reddish"}
        bright = [r.value for r in records if (r.variant, r.metric) == ("reddish", "change/bright")]
        assert leakage["reddish"] == pytest.approx(abs(sum(bright) / 10) / abs(mean["reddish"]))

    def test_changes_are_what_pictures_show(self, work, tmp_path):
        """One head, in a float64 loop."""
        run(["directions", "test", *line(work)[2:]], tmp_path, f"--model.tested.path={work / 'directions'}")
        directions, generator = found(work / "directions"), artifact.load(work / "sdf").module("generator")
        z = torch.cat([CodeBlock(start, 3, 0).z(6) for start in (44, 47, 50)])[:9]
        z = torch.cat([z, CodeBlock(53, 1, 0).z(6)])
        ws, camera = generator.mapping(z), generator.rig.camera(0.0).repeat_interleave(10)
        with torch.no_grad():
            scores = {
                s: Colours()(generator.synthesis(directions.apply(ws, {"tall": s}), camera).image).double()[:, 0]
                for s in (-1.0, 0.0, 1.0)
            }
        wanted = (scores[1.0] - scores[-1.0]) / 2 / scores[0.0].std(correction=0)
        rows = [r.value for r in read_records(tmp_path) if (r.variant, r.metric) == ("tall", "change/bright")]
        assert rows == pytest.approx(wanted.tolist(), rel=1e-2, abs=1e-3)

    def test_an_encoders_codes_are_read(self, work, tmp_path):
        """Along each direction, of what it makes of the edited pictures."""
        torch.manual_seed(0)
        sizes = {"geometry": 2, "texture": 1, "w_dim": 12, "geometry_side": 4, "texture_side": 8, "resolution": 32}
        shapes = {"decoder_heads": 0, "decoder_side": 16, "widths": [4, 6, 8, 10], "depths": [1] * 4, "reduction": 1}
        encoder = GlobalEncoder(**sizes, **shapes).eval()
        artifact.save(tmp_path / "encoder", stage="invert", modules={"encoder": encoder})
        given = [f"--model.tested.path={work / 'directions'}", f"--model.encoder.path={tmp_path / 'encoder'}"]
        run(["directions", "test", *line(work, attributes=None)[2:]], tmp_path / "out", *given)
        records = read_records(tmp_path / "out")
        assert {r.feature_network for r in records} == {"GlobalEncoder"}
        assert {r.metric for r in records} == {*(f"change/{n}" for n in ("tall", "red", "reddish")), "leakage"}
        assert all(math.isfinite(r.value) for r in records) and any(r.value for r in records)
        directions, generator = found(work / "directions"), artifact.load(work / "sdf").module("generator")
        ws = generator.mapping(torch.cat([CodeBlock(i, 1, 0).z(6) for i in range(44, 54)]))
        read = {}
        with torch.no_grad():
            for s in (-1.0, 0.0, 1.0):
                camera = generator.rig.camera(0.0).repeat_interleave(10)
                image = generator.synthesis(directions.apply(ws, {"red": s}), camera).image
                codes = encoder.codes(torch.nn.functional.interpolate(image, 32, mode="area"), generator.mean_latents)
                assert set(codes.groups) == {"renderer"}
                whole = generator.complete(codes).groups  # a decoder's codes, too, are the head's
                places = [
                    whole[g].mean(1).double()
                    @ directions.direction(g)[0, 0].double()
                    / directions.spread(g)[0].double()
                    for g in ("renderer", "decoder")
                ]
                read[s] = (places[0] + places[1]) / 2
        wanted = (read[1.0] - read[-1.0]) / 2 / read[0.0].std(correction=0)
        rows = [r.value for r in records if (r.variant, r.metric) == ("red", "change/tall")]
        assert rows == pytest.approx(wanted.tolist(), rel=0.02, abs=1e-3)

    def test_attributes_in_which_heads_do_not_differ_are_left_out(self, work, tmp_path, caplog):
        words = [*line(work)[2:], f"--model.tested.path={work / 'directions'}"]
        run(["directions", "test", *words], tmp_path / "own")
        scorers = [{"class_path": f"tests.stages.test_directions.{name}"} for name in ("Same", "Colours")]
        words = [*line(work, attributes=scorers)[2:], f"--model.tested.path={work / 'directions'}"]
        run(["directions", "test", *words], tmp_path / "both")
        assert (tmp_path / "both/metrics.csv").read_bytes() == (tmp_path / "own/metrics.csv").read_bytes()
        assert "no two heads differ in brow, chin: it is left out" in caplog.text
        assert all(math.isfinite(r.value) for r in read_records(tmp_path / "own"))
        words = [*line(work, attributes=scorers[:1])[2:], f"--model.tested.path={work / 'directions'}"]
        with pytest.raises(UserError, match="no two of the test's 10 heads differ in brow, chin: take more"):
            run(["directions", "test", *words], tmp_path / "none")

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_tables_do_not_depend_on_the_number_of_processes(self, work, tmp_path, ranks):
        given = [*line(work)[2:], f"--model.tested.path={work / 'directions'}"]
        galatea("directions", "test", *given, f"--out={tmp_path / 'one'}")
        galatea("directions", "test", *given, f"--out={tmp_path / 'more'}", ranks=ranks)
        one, more = ((tmp_path / name / "metrics.csv").read_bytes() for name in ("one", "more"))
        assert one == more

    def test_sheets(self, work, tmp_path):
        given = [*line(work)[2:], f"--model.tested.path={work / 'directions'}"]
        galatea("directions", "predict", *given, f"--out={tmp_path / 'one'}")
        galatea("directions", "predict", *given, f"--out={tmp_path / 'two'}", ranks=2)
        sheets = artifact.load(tmp_path / "one")
        assert set(sheets.manifest["files"]) == {f"media/directions_0000004{i}.png" for i in (4, 5)}
        assert sheets.id == artifact.load(tmp_path / "two").id


class TestData:
    def test_a_head_depends_on_its_number_alone(self):
        whole = CodeBlock(0, 40, 3).z(6)
        assert torch.equal(whole[7:12], CodeBlock(7, 5, 3).z(6)) and len(whole.unique(dim=0)) == 40
        assert not torch.equal(whole, CodeBlock(0, 40, 4).z(6))
        assert not torch.equal(whole[0], torch.randn(6, generator=index_generator(3, 0, "pose")))

    def test_of_test_and_of_fit_are_others(self):
        data = LatentDataModule(samples=10, test_samples=5, block=4)
        assert [(b.start, b.count) for b in data.items] == [(0, 4), (4, 4), (8, 2)]
        assert [(b.start, b.count) for b in data.blocks(10, 5)] == [(10, 4), (14, 1)]
        with pytest.raises(UserError, match="block is 0"):
            LatentDataModule(block=0)

    def test_traits_of_mannequins(self):
        data = MannequinLatents()
        assert data.code_truth(len(Z_NAMES)).names == Z_NAMES and data.code_truth(len(CODE_NAMES)).names == CODE_NAMES
        with pytest.raises(UserError, match="have 6 numbers, those of the embedded world 46, 51 or 53"):
            data.code_truth(6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"names": ["joy"]},
            "no attribute 'joy', there are: tall, wide, deep, red, green, blue, bright, reddish",
        ),
        ({"prior": None}, r"fit needs --model\.prior\.path"),
        ({"perceptual": None}, r"needs --model\.perceptual"),
        ({"names": []}, "there is nothing to find directions of"),
        ({"held_out": 1.0}, "held_out is 1"),
        ({"attributes": [{"class_path": "torch.nn.Identity"}]}, "Identity scores no attributes"),
        ({"attributes": [{"class_path": "tests.stages.test_directions.Colours"}] * 2, "names": None}, "called bright"),
        ({"boundaries": {"smile": "nowhere.npy"}}, "cannot read nowhere.npy: there is no such file"),
        ({"boundaries": {"smile": {}}}, r"boundaries\.smile is \{\}: give a file, or for each group of codes one"),
        ({"boundaries": {"smile": None}}, "boundaries"),
        ({"boundaries": {"smile": {"renderer": None}}}, "boundaries"),
        ({"boundaries": {"tall": "FILE"}}, "two attributes or boundaries called tall"),
        ({"boundaries": {"smile": "WRONG"}}, r"boundary of codes \(1, 4\): StyleSDF of .* has renderer \(3, 12\)"),
        (
            {"method": {"class_path": "models.heads.boundaries.LinearBoundaries", "init_args": {"share": 0.9}}},
            "share is",
        ),
    ],
)
def test_mistakes(work, tmp_path, changes, words):
    np.save(tmp_path / "file.npy", np.ones((1, 12)))
    np.save(tmp_path / "wrong.npy", np.ones((1, 4)))
    names = {"FILE": f"{tmp_path}/file.npy", "WRONG": f"{tmp_path}/wrong.npy"}
    changes = {
        k: {n: names.get(f, f) if isinstance(f, str) else f for n, f in v.items()} if k == "boundaries" else v
        for k, v in changes.items()
    }
    with pytest.raises(UserError, match=words) as caught:
        run(line(work, **changes), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "artifact").exists()


def test_commands_that_lack_their_input(work, tmp_path):
    with pytest.raises(UserError, match=r"--model\.tested\.path"):
        run(["directions", "test", *line(work)[2:]], tmp_path)
    given = f"--model.tested.path={work / 'directions'}"
    with pytest.raises(UserError, match="test scores heads that are edited: give networks"):
        run(["directions", "test", *line(work, attributes=None)[2:]], tmp_path, given)
    with pytest.raises(UserError, match=r"test_samples must be at least 2"):
        run(["directions", "test", *line(work)[2:]], tmp_path, given, "--data.init_args.test_samples=1")
    with pytest.raises(UserError, match="has no module 'directions'"):
        run(["directions", "test", *line(work)[2:]], tmp_path, f"--model.tested.path={work / 'sdf'}")
    with pytest.raises(UserError, match=r"--model\.prior\.path, and not --model\.tested"):
        run(line(work), tmp_path, given)
    flat = GradualStyleEncoder(num_ws=4, w_dim=5, resolution=32, widths=[2] * 4, depths=[1] * 4, reduction=None)
    artifact.save(tmp_path / "flat", stage="invert", modules={"encoder": flat.eval()})
    with pytest.raises(UserError, match=r"the encoder gives 4 codes of 5 \(ws\), the generator takes"):
        run(["directions", "test", *line(work)[2:]], tmp_path, given, f"--model.encoder.path={tmp_path / 'flat'}")
    with pytest.raises(UserError, match=r"names has '=tall'"):
        run(line(work, names=["=tall"]), tmp_path)
