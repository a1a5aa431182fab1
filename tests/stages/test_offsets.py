"""Closed-form directions and offsets of single heads, by the real command lines, on a 2D and on a 3D toy."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from datamodules.latents import CodeBlock
from models import artifact
from models.artifact import load
from models.errors import UserError
from models.generators.gram import GRAMGenerator
from models.generators.stylegan2 import StyleGAN2Generator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.directions import directions_for, fingerprint
from models.heads.index import Entry, subject_index
from models.heads.sefa import SeFa
from models.heads.subjects import Subjects
from models.image import write_image
from models.latents import Latents
from models.losses.offsets import OffsetLoss
from models.metrics.records import read_records
from stages import cli
from stages.base.offsets import moved_heads
from stages.directions import DirectionsStage
from stages.present import PresentStage
from tests.models.generators import test_gram
from tests.stages import small
from tests.stages.processes import galatea
from tests.stages.test_directions import Colours, Difference, prior

HERE = "tests.stages.test_offsets"


class Who(nn.Module):
    """A recognition of colours: a unit vector of each channel's mean and deviation."""

    dim = 6

    def forward(self, image):
        image = image.float()
        found = torch.cat([image.mean((2, 3)), image.var((2, 3)).add(1e-6).sqrt()], 1)
        return nn.functional.normalize(found, dim=1)

    def early(self, image):
        return nn.functional.avg_pool2d(image.float(), 2)


class Middle(nn.Module):
    """A parser whose face is the middle of the picture."""

    segments = ("background", "face")

    def forward(self, image):
        face = torch.zeros(len(image), *image.shape[2:])
        side = image.shape[-1]
        face[:, side // 4 : -side // 4, side // 4 : -side // 4] = 1
        return torch.stack([1 - face, face], 1)


def flat(folder, seed=0):
    """A StyleGAN2 of 16 px."""
    torch.manual_seed(seed)
    generator = StyleGAN2Generator(style_dim=6, channels=[8, 8, 8], mapping_layers=2)
    generator.update_mean(256)
    return artifact.save(folder, stage="prior", modules={"generator": generator.eval()})


def line(folder, kind, **model):
    given = {
        "prior": {"path": str(folder / kind)},
        "attributes": [{"class_path": "tests.stages.test_directions.Colours"}],
        "names": None,
        "method": {"class_path": "models.heads.sefa.SeFa", "init_args": {"count": 2, "named_by": 8}},
        "perceptual": {"class_path": "tests.stages.test_directions.Difference"},
        "calibration": {"codes": 3, "steps": 3, "distance": 0.05, "symmetric": True},
        "offsets": {"steps": 5},
        "identity": {"class_path": f"{HERE}.Who"},
        "parser": {"class_path": f"{HERE}.Middle"},
        "heads": 4,
        "tile": 32,
    }
    data = {"class_path": "datamodules.latents.LatentDataModule"}
    data["init_args"] = {"samples": 40, "test_samples": 8, "block": 3}
    file = small.write(folder / f"{kind}.yaml", {"model": {**given, **model}, "data": data})
    return ["directions", "fit", f"--config={file}", *small.TRAINER]


def run(line, out, *more):
    cli.run(line[0], DirectionsStage, [*line[1:], f"--out={out}", *more])
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prior(folder / "sdf")
    flat(folder / "flat")
    for kind in ("flat", "sdf"):
        galatea(*line(folder, kind), f"--out={folder / kind}_directions")
    return folder


@pytest.fixture(scope="module", params=["flat", "sdf"])
def kind(request):
    return request.param


def made(work, kind):
    """Directions of a kind, and their generator."""
    found = load(work / f"{kind}_directions")
    return found.module("directions"), found.module("generator").requires_grad_(False)


class TestFit:
    def test_what_is_handed_on(self, work, kind):
        result = load(work / f"{kind}_directions")
        directions, generator = made(work, kind)
        found = SeFa(count=2).find(None, 0, generator)
        assert len(directions.names) == 2 and directions.generator == fingerprint(generator)
        for k, (name, wanted) in enumerate(zip(directions.names, found, strict=True)):
            for group, normal in wanted.normals.items():
                own = directions.direction(group)[k]
                sign = 1 if name.startswith("sefa") else float((own * normal).sum().sign())
                assert_close(sign * own, normal.float(), atol=1e-6, rtol=0)
            assert result.metrics[f"{name}/eigenvalue"] == pytest.approx(wanted.scores["eigenvalue"])
        assert torch.equal(directions.limits[:, 0], -directions.limits[:, 1])
        assert bool((directions.limits[:, 1] > 0).all()) and result.manifest["parents"].keys() == {"prior"}
        assert directions_for(result, Subjects(load(work / kind))).names == directions.names

    def test_by_number(self, work, kind, tmp_path):
        """Nothing is named, and signs are the closed form's."""
        run(line(work, kind, names=[]), tmp_path)
        directions = load(tmp_path).module("directions")
        assert directions.names == ("sefa_1", "sefa_2")
        for k, wanted in enumerate(SeFa(count=2).find(None, 0, made(work, kind)[1])):
            for group, normal in wanted.normals.items():
                assert_close(directions.direction(group)[k], normal.float(), atol=1e-6, rtol=0)
        run(line(work, kind, attributes=None), tmp_path / "none")
        assert load(tmp_path / "none").module("directions").names == directions.names

    def test_by_what_changes(self, work, tmp_path):
        """Each is more of what it is called after, on heads that were not seen."""
        method = {"class_path": "models.heads.sefa.SeFa", "init_args": {"count": 3, "named_by": 8, "least_change": 0.0}}
        run(line(work, "flat", method=method, names=["light=bright", "reddish"]), tmp_path)
        result = load(tmp_path)
        directions, generator = result.module("directions"), result.module("generator")
        assert {name.split("_")[0] for name in directions.names} <= {"light", "reddish"}
        assert len(set(directions.names)) == 3
        ws = generator.mapping(CodeBlock(28, 8, 0).z(generator.z_dim))  # of 40 the last 12 are held out
        with torch.no_grad():
            for name in directions.names:
                low, high = (Colours()(generator.synthesis(directions.apply(ws, {name: s})).image) for s in (-1.0, 1.0))
                change = (high - low).mean(0)[0 if name.startswith("light") else 1]
                assert float(change) > 0, name

    def test_beside_boundaries_found_elsewhere(self, work, tmp_path):
        torch.save(torch.eye(6)[:1], tmp_path / "age.pt")
        run(line(work, "flat", boundaries={"age": f"{tmp_path}/age.pt"}), tmp_path / "out")
        directions = load(tmp_path / "out").module("directions")
        own, _ = made(work, "flat")
        assert directions.names == (*own.names, "age")
        assert_close(directions.direction("ws")[:2], own.direction("ws"))
        count = directions.direction("ws").shape[1]
        assert_close(directions.direction("ws")[2], torch.eye(6)[:1].expand(count, -1) / count**0.5)

    def test_nothing_is_rendered_for_samples(self, work, tmp_path, monkeypatch):
        counts, render = [], DirectionsStage.render
        monkeypatch.setattr(
            DirectionsStage, "render", lambda self, ws, *rest: counts.append(len(ws)) or render(self, ws, *rest)
        )
        run(line(work, "flat", names=[]), tmp_path)
        assert set(counts) == {3}  # calibration's heads


def by_hand(work, kind, name, block, steps=5):
    """Offsets of a block's heads, one head at a time, by a loop of its own."""
    directions, generator = made(work, kind)
    ws = generator.mapping(block.z(generator.z_dim)).detach()
    camera = None
    if generator.is_3d:
        camera = generator.rig.camera(generator.rig.yaw_mean, generator.rig.pitch_mean)
    start = directions.shift(name, float(directions.limits[directions.names.index(name), 1]))
    (group,) = [g for g, t in start.items() if t.any()]
    moves = start[group].any(1)
    alpha_n = start[group][moves][0]
    rates = [0.1, 0.1, 0.1, 0.1 * (0.5 - 0.5 * math.cos(0.2 / 0.25 * math.pi)), 0.0]  # at 1/5, 2/5, ... of the steps
    found = []
    for row in range(block.count):
        own = ws[row]
        offset = alpha_n.clone().requires_grad_()
        before = generator.synthesis(own, camera).image.detach()
        m, v = torch.zeros_like(alpha_n), torch.zeros_like(alpha_n)
        for step in range(steps):
            added = torch.zeros_like(own.groups[group])
            added = added + moves[:, None] * offset
            moved = Latents({**own.groups, group: own.groups[group] + added})
            loss = OffsetLoss()(generator.synthesis(moved, camera).image, before, Who(), Middle())["loss"].sum()
            (slope,) = torch.autograd.grad(loss, offset)
            m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
            update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                offset -= rates[step] * update
                offset *= min(1.0, 1.5 * float(alpha_n.norm()) / float(offset.norm()))
        found.append(moves[:, None] * offset.detach())
    return group, ws, torch.stack(found)


class TestPredict:
    def test_offsets_are_what_a_loop_finds(self, work, kind, tmp_path):
        """Batched in the stage, one by one here; w, w + dw and w - dw are handed on as heads."""
        run(["directions", "predict", *line(work, kind)[2:]], tmp_path, f"--model.tested.path={work}/{kind}_directions")
        result = load(tmp_path)
        directions, _ = made(work, kind)
        heads, name = result.module("heads"), directions.names[0]
        assert len(heads) == 4 * 5 and result.origin("generator")[0].stage == "prior"
        group, ws, offsets = by_hand(work, kind, name, CodeBlock(40, 3, 0))
        for row in range(3):
            own, more, less = (
                heads[f"{40 + row:08d}{end}"].latents.groups for end in ("", f"-{name}-more", f"-{name}-less")
            )
            assert_close(own[group], ws.groups[group][row : row + 1])
            assert_close(more[group] - own[group], offsets[row][None], atol=2e-4, rtol=1e-3)
            assert_close(own[group] - less[group], more[group] - own[group], atol=1e-5, rtol=1e-4)
            assert all(torch.equal(more[g], own[g]) for g in own if g != group)
        alpha = directions.shift(name, float(directions.limits[0, 1]))[group].norm()
        assert bool((offsets.flatten(1).norm(dim=1) <= 1.5 * alpha * (1 + 1e-5)).all())
        assert set(result.manifest["files"]) >= {f"media/directions_0000004{i}.png" for i in range(4)}

    def test_in_two_processes(self, work, kind, tmp_path):
        words = [*line(work, kind)[2:], f"--model.tested.path={work}/{kind}_directions"]
        galatea("directions", "predict", *words, f"--out={tmp_path / 'one'}")
        galatea("directions", "predict", *words, f"--out={tmp_path / 'two'}", ranks=2)
        assert load(tmp_path / "one").id == load(tmp_path / "two").id

    def test_they_are_shown_as_any_heads(self, work, kind, tmp_path):
        run(["directions", "predict", *line(work, kind)[2:]], tmp_path, f"--model.tested.path={work}/{kind}_directions")
        subjects = Subjects(load(tmp_path))
        name = made(work, kind)[0].names[1]
        assert len(subjects.ids) == 20 and f"00000043-{name}-less" in subjects.ids
        options = {"result": {"path": str(tmp_path)}, "items": ["00000040", f"00000040-{name}-more"], "frames": 2,
                   "mesh_size": 0, "tile": 32, "scale": 1, "samples": 1}  # fmt: skip
        file = small.write(tmp_path / "present.yaml", {"model": options})
        cli.run("present", PresentStage, ["predict", f"--config={file}", *small.TRAINER, f"--out={tmp_path / 'page'}"])
        assert (tmp_path / "page/artifact").exists()

    def test_another_generator_of_the_same_codes(self, work, tmp_path):
        """A cartoon generator shows the heads that the base generator's pictures have moved, or, asked so, its own."""
        generator = load(work / "flat").module("generator")
        with torch.no_grad():
            for parameter in generator.backbone.parameters():
                parameter.mul_(1.1)
        styled = artifact.save(tmp_path / "styled", stage="finetune", modules={"generator": generator})
        words = [*line(work, "flat")[2:], f"--model.tested.path={work}/flat_directions"]
        run(["directions", "predict", *words], tmp_path / "plain")
        found = {}
        for id_on in ("photo_render", "direct"):
            given = [f"--model.styled.path={styled.path}", f"--model.offsets.id_on={id_on}"]
            run(["directions", "predict", *words], tmp_path / id_on, *given)
            found[id_on] = load(tmp_path / id_on)
        plain = load(tmp_path / "plain")
        codes = {name: a.module("heads").latents_ws for name, a in {"plain": plain, **found}.items()}
        assert torch.equal(codes["plain"], codes["photo_render"])
        assert not torch.equal(codes["plain"], codes["direct"])
        subject = Subjects(found["direct"])["00000041"]
        assert fingerprint(subject.generator) == fingerprint(generator) and subject.original is not None
        assert found["direct"].manifest["parents"].keys() == {"tested", "styled"}

    def test_heads_that_were_found(self, work, tmp_path):
        """Heads of photos are moved as drawn ones are, keep their ids and pictures, and must be of this generator."""
        source = load(work / "flat")
        generator, words = source.module("generator"), line(work, "flat")[2:]
        draws = CodeBlock(40, 2, 0)
        ws = generator.mapping(draws.z(generator.z_dim))
        write_image(tmp_path / "ann.png", torch.zeros(3, 16, 16))
        codes = {
            name: HeadCode(ws[row].map(Tensor.clone), None, torch.zeros(1, 0), None)
            for row, name in enumerate(("ann", "bob"))
        }
        extra = subject_index([Entry("ann", "photos", artwork="ann.png"), Entry("bob", "photos")])
        modules = {"generator": generator, "photos": HeadCodes.pack(codes, generator)}
        media, delta = {"ann.png": tmp_path / "ann.png"}, {"generator": (source, "generator")}
        for name, of in {"photos": source, "strangers": load(work / "sdf")}.items():
            saved = {"modules": modules, "media": media, "extra": extra, "parents": {"prior": of}}
            artifact.save(tmp_path / name, stage="restyle", **saved, delta_of=delta if name == "photos" else None)
        words += [f"--model.tested.path={work}/flat_directions"]

        def found(name):
            return [
                "--data.class_path=datamodules.latents.FoundLatents", f"--data.init_args.path={tmp_path / name}",
                "--data.init_args.module=photos",
            ]  # fmt: skip

        run(["directions", "predict", *words], tmp_path / "drawn", "--data.init_args.block=2", "--model.heads=2")
        run(["directions", "predict", *words], tmp_path / "found", *found("photos"))
        drawn, moved = (load(tmp_path / name).module("heads") for name in ("drawn", "found"))
        assert {i.replace("00000040", "ann").replace("00000041", "bob") for i in drawn.ids} == set(moved.ids)
        for identity in moved.ids:
            same = drawn[identity.replace("ann", "00000040").replace("bob", "00000041")].latents
            assert_close(moved[identity].latents.ws, same.ws, atol=1e-4, rtol=0)
        shown = Subjects(load(tmp_path / "found"))
        assert shown["ann"].artwork is not None and shown["bob"].artwork is None
        assert set(moved_heads(moved.ids)) == {
            f"{less}{name}" for name in made(work, "flat")[0].names for less in ("", "less ")
        }
        with pytest.raises(UserError, match="made for another generator"):
            run(["directions", "predict", *words], tmp_path / "other", *found("strangers"))
        with pytest.raises(UserError, match="holds no codes of heads"):
            run(
                ["directions", "predict", *words],
                tmp_path / "none",
                *found("photos")[:2],
                "--data.init_args.module=generator",
            )

    def test_what_moved_heads_are_called(self):
        ids = ["a", "a-smile-more", "a-smile-less", "a-b", "a-b-smile-more", "c-smile-more", "d-more"]
        assert moved_heads(ids) == {
            "smile": {"a": "a-smile-more", "a-b": "a-b-smile-more"},
            "less smile": {"a": "a-smile-less"},
        }

    def test_without_offsets_there_are_sheets_alone(self, work, kind, tmp_path):
        words = [*line(work, kind, offsets=None)[2:], f"--model.tested.path={work}/{kind}_directions"]
        run(["directions", "predict", *words], tmp_path)
        assert set(load(tmp_path).manifest["files"]) == {f"media/directions_0000004{i}.png" for i in range(4)}
        assert not load(tmp_path).manifest["modules"]


class TestTest:
    def test_with_offsets(self, work, kind, tmp_path):
        """Who is shown and how much changes, by the pictures themselves; without offsets the table is as ever."""
        words = [f"--model.tested.path={work}/{kind}_directions", "--data.init_args.block=8"]
        styled = f"--model.styled.path={work / kind}"
        run(["directions", "test", *line(work, kind, views="front")[2:]], tmp_path / "with", *words, styled)
        run(["directions", "test", *line(work, kind, offsets=None)[2:]], tmp_path / "without", *words)
        records, plain = read_records(tmp_path / "with"), read_records(tmp_path / "without")
        assert {r.metric for r in plain} <= {"change/bright", "change/reddish", "leakage"}
        directions, generator = made(work, kind)
        names = directions.names
        assert {r.variant for r in plain} == set(names)
        assert {r.variant for r in records} == {*names, *(f"{name} optimised" for name in names)}
        same = [r.value for r in records if r.metric == "agreement"]
        assert same == pytest.approx([1.0] * len(same)) and len(same) == 2 * len(names) * len(
            {r.item for r in plain if r.item}
        )
        added = ("identity", "distance", "length", "agreement")
        kept = [r for r in records if r.variant in names and r.metric.partition("/")[0] not in added]
        assert kept == plain
        name, block = names[0], CodeBlock(40, 8, 0)
        group, ws, offsets = by_hand(work, kind, name, block)
        start = directions.shift(name, float(directions.limits[0, 1]))[group]
        camera = generator.rig.camera(generator.rig.yaw_mean, generator.rig.pitch_mean) if generator.is_3d else None
        camera = None if camera is None else camera.repeat_interleave(8)
        with torch.no_grad():
            image = generator.synthesis(ws, camera).image
            for variant, offset in ((name, start.expand_as(offsets)), (f"{name} optimised", offsets)):
                wanted = offset.flatten(1).norm(dim=1) / start.norm()
                rows = [r.value for r in records if (r.variant, r.metric) == (variant, "length")]
                assert rows[:8] == pytest.approx(wanted.tolist(), rel=1e-2)
                seen = [
                    generator.synthesis(Latents({**ws.groups, group: ws.groups[group] + sign * offset}), camera).image
                    for sign in (-1, 1)
                ]
                for side, moved in zip(("less", "more"), seen, strict=True):
                    alike = torch.cosine_similarity(Who()(moved), Who()(image))
                    for metric, wanted in (("identity", alike), ("distance", Difference()(moved, image))):
                        rows = [r.value for r in records if (r.variant, r.metric) == (variant, f"{metric}/{side}")]
                        assert rows == pytest.approx(wanted.tolist(), rel=1e-2, abs=1e-3)
        assert {r.feature_network for r in records if r.metric == "identity/more"} == {"Who"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"class_path": "models.heads.sefa.SeFa", "init_args": {"layers": [7]}}}, "method.layers has 7"),
        (
            {"method": {"class_path": "models.heads.sefa.SeFa", "init_args": {"count": 7}}},
            "method.count is 7: codes of 6",
        ),
        ({"names": ["joy"]}, "there is no attribute 'joy', there are: bright, reddish"),
        ({"identity": None}, "offsets are found by who is shown and where the face is"),
        ({"identity": {"class_path": "tests.stages.test_directions.Colours"}}, "Colours shows no early features"),
        ({"parser": {"class_path": f"{HERE}.Who"}}, "model.parser is Who: it must be a face parser"),
        ({"offset_loss": {"face": ["nose"]}}, "offset_loss.face has 'nose': the parser knows background, face"),
        ({"offsets": {"id_on": "direct"}}, "offsets.id_on: direct is the styled generator's pictures"),
        ({"offsets": {"steps": 0}}, "offsets.steps is 0"),
    ],
)
def test_mistakes(work, tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        run(line(work, "flat", **changes), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "artifact").exists()


def test_generators_that_do_not_fit(work, tmp_path):
    torch.manual_seed(0)
    gram = GRAMGenerator(**test_gram.TINY).eval()
    artifact.save(tmp_path / "gram", stage="prior", modules={"generator": gram})
    with pytest.raises(UserError, match="GRAMGenerator has no style affines"):
        run(line(tmp_path, "gram"), tmp_path / "out")
    other = flat(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"directions of .* are of the generator [0-9a-f]{12}, the heads of"):
        directions_for(load(work / "flat_directions"), Subjects(other))
    words = [*line(work, "flat")[2:], f"--model.tested.path={work}/flat_directions"]
    with pytest.raises(UserError, match=r"the directions are of codes ws \(\d, 6\), the generator has renderer"):
        run(["directions", "predict", *words], tmp_path / "out", f"--model.styled.path={work / 'sdf'}")
