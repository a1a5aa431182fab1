"""Stage present: every file is there, complete and named by the page, and mistakes are one sentence."""

import json
import math
import re
import resource
import shutil
from html.parser import HTMLParser

import imageio_ffmpeg
import pytest
import torch
import trimesh
from PIL import Image

from models import artifact
from models.errors import UserError
from models.generators.manifold import ManifoldGenerator
from models.generators.volume import TriPlaneVolumeGenerator
from models.heads.codes import HeadCode, HeadCodes
from models.heads.subjects import Subjects
from models.rendering import sheets
from stages import cli
from stages.base.stage import GeneratorRef
from stages.gallery.page import Card, page
from stages.present import PresentStage
from tests.stages import heads, small, tiny
from tests.stages.cases import Command, StageCase
from tests.stages.processes import Kill


def line(folder):
    options = {"frames": 4, "scale": 1, "video_size": 32, "tile": 32, "mesh_size": 32}
    given = {"model.result.path": folder / "stylize", **{f"model.{name}": value for name, value in options.items()}}
    return ["present", "predict", *small.options(given), *small.TRAINER]


CASE = StageCase(
    line,
    small.tiny_prior,
    needs="stylize",
    commands={"predict": Command()},
    kills=[Kill("turntable_p0.mp4"), Kill("card.json", 2), Kill("artifact")],
)

SMALL = {"frames": 6, "scale": 1, "video_size": 32, "tile": 32, "mesh_size": 32, "samples": 1}
KINDS = {
    *("views", "depth", "strength", "expressions", "mesh", "pose", "poster", "reference", "turntable"),
    *("lines", "dolly", "layers", "both", "beside"),
}


def present(source, out, **options):
    stage = PresentStage(GeneratorRef(str(source)), **{**SMALL, **options})
    tiny.trainer(out).predict(stage)
    return artifact.load(out)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return heads.stylised(tmp_path_factory.mktemp("result"))


@pytest.fixture(scope="module")
def shown(result, tmp_path_factory):
    """Presented through the command line."""
    out = tmp_path_factory.mktemp("shown")
    options = [f"--model.{name}={value}" for name, value in SMALL.items()]
    cli.run("present", PresentStage, [
        "predict", f"--model.result.path={result.path}", f"--out={out}", "--trainer.accelerator=cpu", *options
    ])  # fmt: skip
    return artifact.load(out)


class Links(HTMLParser):
    """Collects everything a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.files, self.anchors, self.ids = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            elif name in ("src", "href", "poster", "data-file"):
                (self.anchors if value.startswith("#") else self.files).add(value)


class TestMedia:
    def test_everything_is_there(self, shown, result):
        names = {p.name for p in (shown.path / "media").iterdir()}
        for identity in ("ann", "bob"):
            kinds = {n.split("_")[0] for n in names if n.endswith((f"_{identity}.png", f"_{identity}.mp4"))}
            assert kinds == KINDS
            assert {f"turntable_{identity}.gif", f"mesh_{identity}.glb", f"mesh_{identity}.ply"} <= names
            assert f"layers_{identity}.glb" in names
        assert "index.html" in names and len(names) == 1 + 2 * 19
        assert shown.stage == "present" and list(shown.ancestors) == [result.id, *result.ancestors]
        assert not (shown.path.parent / "items").exists()

    def test_files_can_be_read(self, shown):
        media = shown.path / "media"
        for path in media.glob("*.png"):
            with Image.open(path) as image:
                image.load()
        with Image.open(media / "turntable_ann.gif") as image:
            assert image.n_frames == 3
        for video in ("turntable_ann.mp4", "dolly_ann.mp4"):
            assert imageio_ffmpeg.count_frames_and_secs(str(media / video))[0] == 6
        for suffix in ("glb", "ply"):
            mesh = trimesh.load(media / f"mesh_bob.{suffix}", force="mesh")
            assert mesh.volume > 0 and mesh.visual.kind == (
                "texture" if suffix == "glb" else "vertex"
            )  # unlit, or plain
        layers = trimesh.load(media / "layers_bob.glb")
        assert list(layers.geometry) == ["core", "manifolds"]

    def test_panels_go_to_the_run_folder(self, shown):
        panels = shown.path.parent / "panels"
        assert sorted(p.relative_to(panels).as_posix() for p in panels.rglob("*.*")) == [
            "turntable/0000000.mp4",
            "views/0000000.png",
        ]

    def test_the_same_again(self, shown, result, tmp_path):
        again = present(result.path, tmp_path)
        assert again.manifest["files"] == shown.manifest["files"]

    def test_two_ranks_share_the_subjects(self, shown, result, tmp_path):
        def rank(index):
            stage = PresentStage(GeneratorRef(str(result.path)), **SMALL)
            tiny.trainer(tmp_path, devices=2, strategy="ddp").predict(stage, return_predictions=False)

        tiny.ranks(rank, 2)
        assert artifact.load(tmp_path).manifest["files"] == shown.manifest["files"]


class TestShapes:
    """A photo and its twin whose shapes are known: side by side, in a moving light, and as meshes to take along."""

    @pytest.fixture(scope="class")
    def found(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("shapes")
        return present(heads.in_relief(folder / "shapes").path, folder / "shown", frames=4)

    def test_everything_is_there(self, found):
        names = {p.name for p in (found.path / "media").iterdir()}
        both = {"both_ann.mp4", "light_ann.mp4", "beside_ann.png", "turntable_ann.mp4", "expressions_ann.png"}
        meshes = ("mesh", "mesh_before", "mesh_smile", "mesh_before_smile")
        assert both | {f"{mesh}_ann.glb" for mesh in meshes} | {"mesh_ann.ply", "mesh_ann.js"} <= names
        links = Links(found.media("index.html").read_text("utf-8"))
        assert links.files - {"data:,"} <= names and both <= links.files | {"turntable_ann.mp4"}

    def test_videos_are_of_both(self, found):
        frames = imageio_ffmpeg.read_frames(str(found.media("light_ann.mp4")))
        assert next(frames)["size"] == (64, 32)

    def test_meshes_have_their_own_pictures(self, found):
        twin, photo, smile = (
            trimesh.load(found.media(f"{kind}_ann.glb"), force="mesh").visual.material.baseColorTexture
            for kind in ("mesh", "mesh_before", "mesh_smile")
        )
        means = [
            float(torch.tensor(list(picture.convert("L").getdata())).float().mean()) for picture in (smile, twin, photo)
        ]
        assert means[0] + 5 < means[1] < means[2] - 5


class TestLeftOut:
    """Expressions that a head cannot show are not drawn, and the card says why."""

    def shown(self, result, out, left_out):
        folder = out / "source"
        shutil.copytree(result.path, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        for entry in manifest["extra"]["subjects"]:
            entry["left_out"] = left_out
        (folder / "manifest.json").write_text(json.dumps(manifest))
        drawn = []

        def sheet(rows, *args, **kwargs):
            drawn.append([caption for row in rows for caption, _ in row])
            return sheets.sheet(rows, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stages.present.sheet", sheet)
            found = present(folder, out / "shown", items=["ann"], frames=4)
        captions = [c for page in drawn for c in page if re.search(r"smile|blink", c, re.IGNORECASE)]
        page = found.media("index.html").read_text("utf-8")
        return captions, page, (found.path / "media" / "expressions_ann.png").exists()

    def test_one(self, result, tmp_path):
        captions, page, there = self.shown(result, tmp_path, {"smile": "the mouth gets no wider, -0.01"})
        assert there and captions and all("blink" in c.lower() for c in captions)
        assert "Smile is not shown: the mouth gets no wider, -0.01." in page

    def test_all(self, result, tmp_path):
        why = {"smile": "it looks <i>grim</i>", "blink": "the eyes only close to 0.95 of their opening"}
        captions, page, there = self.shown(result, tmp_path, why)
        assert not there and not captions
        assert "Blink is not shown: the eyes only close to 0.95 of their opening." in page
        assert "<i>grim" not in page and "&lt;i&gt;grim" in page  # it is another's text

    def test_none(self, result, tmp_path):
        captions, page, there = self.shown(result, tmp_path, {})
        assert there and "not shown" not in page
        assert {word for c in captions for word in ("smile", "blink") if word in c.lower()} == {"smile", "blink"}


class TestEdits:
    @pytest.fixture(scope="class")
    def directions(self, result, tmp_path_factory):
        folder = tmp_path_factory.mktemp("directions")
        return heads.directions(folder / "directions", artifact.load(result.path.parent / "prior"))

    def test_side_by_side(self, result, directions, tmp_path):
        """Edited and not, from the source's view and from others, of a head that another generator shows."""
        drawn = []

        def sheet(rows, tile, labels=()):
            drawn.append((rows, labels))
            return sheets.sheet(rows, tile, labels)

        options = {"items": ["ann"], "frames": 4, "directions": str(directions.path), "edits": {"smile": 1.0}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stages.present.sheet", sheet)
            found = present(result.path, tmp_path, **options)
        rows, labels = next((rows, labels) for rows, labels in drawn if "Edited: smile +1" in labels)
        assert labels == ["As it is", "Edited: smile +1"]
        turned = ["-36°", "-24°", "-12°", "front", "+12°", "+24°", "+36°"]
        assert [[caption for caption, _ in row] for row in rows] == [["input", "the input's view", *turned]] * 2
        assert rows[0][0][1] is not None and rows[1][0][1] is None
        subject = Subjects(result)["ann"]
        moved = subject.edited(directions.module("directions"), {"smile": 1.0})
        for (_, own, *_, last), head in zip(rows, (subject, moved), strict=True):
            for (_, shown), camera in ((own, head.camera), (last, head.generator.rig.camera(math.radians(36)))):
                image = head.generator.synthesis(head.latents, camera).image[0]
                torch.testing.assert_close(shown, image, atol=1e-5, rtol=0)
        assert all((a - b).abs().mean() > 1e-3 for (_, a), (_, b) in zip(rows[0][1:], rows[1][1:], strict=True))
        assert found.media("edits_ann.png").exists()
        video = found.media("edited_ann.mp4")
        assert imageio_ffmpeg.count_frames_and_secs(str(video))[0] == 4
        assert "As it is, and with smile +1." in found.media("index.html").read_text("utf-8")
        assert found.manifest["parents"].keys() == {"result", "directions"}

    def test_of_a_prior(self, result, directions, tmp_path):
        source = result.path.parent / "prior"
        options = {"directions": str(directions.path), "edits": {"age": -0.5, "smile": 0.5}, "layers": {"ws": 2}}
        page = present(source, tmp_path, frames=2, mesh_size=0, **options).media("index.html").read_text("utf-8")
        assert "with age -0.5, smile +0.5." in page

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"edits": {"joy": 1.0}}, "there is no direction 'joy', there are: smile, age"),
            ({"edits": {"smile": float("inf")}}, "the strength of smile is inf"),
            ({"edits": None}, r"--model\.edits and --model\.directions need each other"),
            ({"directions": None}, r"--model\.edits and --model\.directions need each other"),
            ({"layers": {"renderer": 3}}, "there are no codes 'renderer' to edit, there are: ws"),
        ],
    )
    def test_mistakes(self, result, directions, tmp_path, options, words):
        given = {"directions": str(directions.path), "edits": {"smile": 1.0}, **options}
        with pytest.raises(UserError, match=words):
            present(result.path, tmp_path, **given)

    def test_layers_of_no_edits(self, result, tmp_path):
        with pytest.raises(UserError, match=r"--model\.layers needs --model\.edits and --model\.directions"):
            present(result.path, tmp_path, layers={"ws": 2})

    def test_a_strength_that_is_no_number(self, result, directions, tmp_path):
        line = ["predict", f"--model.result.path={result.path}", f"--model.directions={directions.path}"]
        with pytest.raises(UserError, match="edits") as caught:
            cli.run("present", PresentStage, [*line, "--model.edits={smile: much}", f"--out={tmp_path}"])
        assert "\n" not in str(caught.value)

    def test_directions_of_another_generator(self, result, tmp_path):
        torch.manual_seed(3)
        other = artifact.save(tmp_path / "p", stage="prior", modules={"generator": ManifoldGenerator(**tiny.OPTIONS)})
        path = heads.directions(tmp_path / "directions", other).path
        with pytest.raises(
            UserError, match=r"are of the generator [0-9a-f]{12}, the heads of .*stylize of [0-9a-f]{12}"
        ):
            present(result.path, tmp_path / "out", directions=str(path), edits={"smile": 1.0})


class TestPage:
    @pytest.fixture(scope="class")
    def text(self, shown):
        return (shown.path / "media" / "index.html").read_text("utf-8")

    def test_needs_nothing_from_outside(self, text, shown):
        for match in re.findall(r"(?:https?:)?//[^\s\"'<]*", text):
            assert re.fullmatch(r"//(?: .*)?", match), match  # comments of the script
        assert "@import" not in text and "url(" not in text
        for name in ("mesh_ann.js", "mesh_bob.js"):
            assert "//" not in re.sub(r'"[A-Za-z0-9+/=]*"', "", shown.media(name).read_text())

    def test_every_file_it_names_exists(self, text, shown):
        links = Links(text)
        files = {f for f in links.files if f != "data:,"}
        assert len(files) > 20
        assert files < {p.name for p in (shown.path / "media").iterdir()}
        assert {a.removeprefix("#") for a in links.anchors} <= links.ids
        assert "<!--" not in text

    def test_lineage_licences_and_metrics(self, text, result):
        assert result.id[:12] in text and result.manifest["parents"]["prior"]["stage"] in text
        assert "psnr 21.5" in text and "lost not finite" in text
        assert "CC-BY-NC-4.0" in text and "&lt;b&gt;odd" in text and "example.org/weights" in text

    def test_the_mesh_script(self, shown):
        script = shown.media("mesh_ann.js").read_text()
        content = json.loads(script.partition("] = ")[2].rstrip(";\n"))
        assert content.keys() == {"position", "normal", "colour", "index", "half", "radius", "focal"}

    def test_cards_survive_json(self):
        card = Card("a", {"x": "y"}, figures=[], notes=["n"])
        assert Card.from_json(card.to_json()) == card

    def test_names_are_escaped(self, result):
        text = page([Card('<script>"', notes=["a < b"])], result)
        assert '<script>"' not in text and "a &lt; b" in text


class TestPrior:
    def test_samples_without_expressions(self, tmp_path):
        options = {**tiny.OPTIONS, "expressions": []}
        artifact.save(tmp_path / "prior", stage="prior", modules={"generator": ManifoldGenerator(**options)})
        shown = present(tmp_path / "prior", tmp_path / "out", mesh_size=0)
        text = (shown.path / "media" / "index.html").read_text("utf-8")
        assert "This generator has no expressions." in text
        names = {p.name for p in (shown.path / "media").iterdir()}
        assert names == {
            *("index.html", "poster_subject-1.png", "views_subject-1.png", "depth_subject-1.png"),
            *("turntable_subject-1.mp4", "turntable_subject-1.gif", "lines_subject-1.png", "dolly_subject-1.mp4"),
        }

    def test_without_manifolds(self, tmp_path):
        generator = TriPlaneVolumeGenerator(
            z_dim=4, w_dim=8, resolution=16, channels=[8, 8], start=8, mapping_hidden=8, background="none",
            coarse=8, fine=0, field={"features": 4, "hidden": 4},
        )  # fmt: skip
        artifact.save(tmp_path / "prior", stage="prior", modules={"generator": generator})
        shown = present(tmp_path / "prior", tmp_path / "out", mesh_size=0)
        text = (shown.path / "media" / "index.html").read_text("utf-8")
        assert "no manifolds that can be baked: there is no dolly zoom and no layered mesh" in text
        names = {p.name for p in (shown.path / "media").iterdir()}
        assert "lines_subject-1.png" in names and "dolly_subject-1.mp4" not in names

    def test_a_baked_head(self, tmp_path):
        generator = tiny.prior(tmp_path / "prior").module("generator")
        head = generator.bake(generator.mean_latents, 32)
        artifact.save(tmp_path / "head", stage="present", modules={"generator": head})
        shown = present(tmp_path / "head", tmp_path / "out", samples=3)
        assert shown.extra["items"] == ["subject-1"] and shown.media("layers_subject-1.glb").exists()

    def test_a_mesh_that_cannot_be_made_is_said(self, tmp_path):
        torch.manual_seed(0)
        generator = ManifoldGenerator(**tiny.OPTIONS)
        with torch.no_grad():
            generator.backbone.out_bias[6::4] = -12.0  # nothing but air
        artifact.save(tmp_path / "prior", stage="prior", modules={"generator": generator})
        shown = present(tmp_path / "prior", tmp_path / "out")
        assert "There is no mesh" in (shown.path / "media" / "index.html").read_text("utf-8")

    def test_an_anchor_without_style(self, tmp_path):
        generator = tiny.prior(tmp_path / "prior").module("generator")
        anchor = HeadCode(generator.mean_latents, None, torch.zeros(1, 2), generator.rig.camera(0.2).label())
        modules = {"generator": generator, "anchors": HeadCodes.pack({"x": anchor}, generator)}
        artifact.save(tmp_path / "anchor", stage="anchor", modules=modules)
        shown = present(tmp_path / "anchor", tmp_path / "out", mesh_size=0)
        names = {p.name for p in (shown.path / "media").iterdir()}
        assert "views_x.png" in names and "strength_x.png" not in names and "pose_x.png" not in names


class TestRefusals:
    def test_no_generator(self, shown, tmp_path):
        with pytest.raises(UserError, match=r"has no module 'generator' to show; it was made from .* its result"):
            present(shown.path, tmp_path)
        artifact.save(tmp_path / "empty", stage="s")
        with pytest.raises(UserError, match=r"\(stage s\) has no module 'generator' to show$"):
            present(tmp_path / "empty", tmp_path / "out")

    def test_not_a_generator(self, tmp_path):
        modules = {"generator": tiny.network("pose")}
        artifact.save(tmp_path / "other", stage="s", modules=modules)
        with pytest.raises(UserError, match="is not a generator"):
            present(tmp_path / "other", tmp_path / "out")

    def test_unknown_item(self, result, tmp_path):
        with pytest.raises(UserError, match="has no item 'eve', it has: ann, bob"):
            present(result.path, tmp_path, items=["ann", "eve"])

    @pytest.mark.parametrize("option", ["frames", "samples", "scale", "tile", "video_size", "mesh_size"])
    def test_settings(self, option):
        with pytest.raises(UserError, match=option):
            PresentStage(GeneratorRef("x"), **{option: -1})

    def test_output_below_a_file(self, result, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
            present(result.path, tmp_path / "file")

    def test_full_disk(self, result, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
        try:
            with pytest.raises(UserError, match="cannot write"):
                present(result.path, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]


class TestSubjects:
    def test_style_strength_interpolates_weights(self, result):
        subject = Subjects(result)["bob"]
        assert subject.styled(0) is subject.original and subject.styled(1) is subject.generator
        half = subject.styled(0.5).state_dict()
        before, after = subject.original.state_dict(), subject.generator.state_dict()
        for name, tensor in half.items():
            assert tensor == pytest.approx((before[name] + after[name]).float().numpy() / 2, abs=1e-6) or (
                not tensor.is_floating_point()
            )
        back = subject.styled(0.25)
        assert back.backbone.out_bias[0] == pytest.approx(float(before["backbone.out_bias"][0]) + 0.5)

    def test_sampled_subjects_are_those_of_the_seed(self, tmp_path):
        saved = tiny.prior(tmp_path / "prior")
        a, b = (Subjects(saved, samples=2, seed=s)["subject-2"].latents.ws for s in (0, 1))
        assert torch.equal(a, Subjects(saved, samples=2, seed=0)["subject-2"].latents.ws) and not torch.equal(a, b)


class TestSheets:
    def test_lines_of_a_head_that_moves_evenly(self):
        """A bright pixel in row 9 moves one column a frame: a diagonal."""
        frames = -torch.ones(16, 3, 16, 16)
        frames[torch.arange(16), :, 9, torch.arange(16)] = 1.0
        marked, stack = sheets.stacked_lines(frames, torch.ones(16, 1, 8, 8), 16)
        assert torch.equal(stack, 2 * torch.eye(16).expand(3, -1, -1) - 1)
        assert (marked[0] > 0.5).any(1).nonzero()[:, 0].tolist() == [9, 10]

    def test_enlarge_keeps_the_picture(self):
        image = torch.rand(2, 3, 8, 8) * 2 - 1
        assert sheets.enlarge(image, 8) is image
        big = sheets.enlarge(image, 64)
        assert big.shape == (2, 3, 64, 64)
        small = torch.nn.functional.interpolate(big, (8, 8), mode="area")
        assert (small - image).abs().mean() < 0.15

    def test_depth_colours_run_from_warm_to_cool(self):
        depth = torch.linspace(6, 8, 64).reshape(1, 1, 8, 8)
        alpha = torch.ones_like(depth)
        alpha[..., 0, 0] = 0
        colours = sheets.depth_colours(depth, alpha)
        near, far = colours[0, :, 0, 2], colours[0, :, 5, 5]
        assert near[0] > near[2] and far[2] > far[0] and (colours[0, :, 0, 0] == 1).all()
        assert (sheets.depth_colours(depth, 0 * alpha) == 1).all()

    def test_normals_towards_the_camera_are_blue_from_any_side(self):
        camera = tiny.ManifoldGenerator(**tiny.OPTIONS).rig.camera(torch.tensor([0.0, 1.0]), 0.3)
        normals = -camera.forward[:, :, None, None].expand(-1, 3, 4, 4)
        colours = sheets.normal_colours(normals, torch.ones(2, 1, 4, 4), camera)
        assert colours == pytest.approx(torch.tensor([0.0, 0, 1])[:, None, None].expand(2, 3, 4, 4).numpy(), abs=1e-5)

    def test_the_overlay_marks_the_outline(self):
        rig = tiny.ManifoldGenerator(**tiny.OPTIONS).rig
        alpha = torch.zeros(1, 32, 32)
        alpha[:, 10:20, 10:20] = 1
        plain = sheets.pose_overlay(torch.zeros(3, 32, 32), rig, rig.camera(0.4), None, 128)
        marked = sheets.pose_overlay(torch.zeros(3, 32, 32), rig, rig.camera(0.4), alpha, 128)
        changed = (plain != marked).any(0).nonzero()
        assert changed.min() >= 34 and changed.max() <= 86
