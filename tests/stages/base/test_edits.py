"""Edits in a test: heads and truth move alike, details follow, and what does not go together is refused."""

from functools import partial

import pytest
import torch

from datamodules.mannequins import MannequinDataModule, Scene, render, subject_code, subject_z
from datamodules.mannequins.render import RIG
from datamodules.mannequins.scene import CODE_NAMES, Z_NAMES
from models import artifact
from models.camera import Camera
from models.errors import UserError
from models.heads.photos import PhotoSet
from models.heads.pixel_aligned import PixelAlignment, differ
from models.heads.subjects import Subjects, invert
from models.metrics.editing import EditProtocol, TraitEdit
from models.metrics.records import read_records
from models.metrics.table import summarise
from stages.base.edits import EditTest, once
from stages.selftrain import SelftrainStage
from tests.stages import heads, inversions, small, tiny
from tests.stages import test_selftrain as toy
from tests.stages import test_selftrain_details as details
from tests.stages.processes import galatea

NAMES = ("smile", "glasses", "age")
EDITS = {"smile": {"deviations": 2.0, "trait": "mouth_corners"}, "glasses": {"deviations": -1.5}}
SIDE = 32


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A generator, its directions and what selftrain makes of it: details of each alignment, and codes alone."""
    folder = tmp_path_factory.mktemp("work")
    toy.prepare(folder, rig=RIG)  # that of the mannequins
    heads.directions(folder / "directions", artifact.load(folder / "balls"), NAMES)
    for alignment in ("3d", "hybrid"):
        module = details.wake(details.built(folder, "hybrid" if alignment == "hybrid" else "local", alignment))
        modules = {"generator": module.generator, "encoder": module.encoder, "local": module.local.eval()}
        artifact.save(folder / alignment, stage="selftrain", modules=modules)
    modules.pop("local")
    artifact.save(folder / "codes", stage="selftrain", modules=modules)
    return folder


def protocol(edits=EDITS, **options):
    networks = {"perceptual": tiny.network("perceptual"), "identity": tiny.network("identity")}
    return EditProtocol(**networks, frames=2, edits={n: TraitEdit(**e) for n, e in edits.items()}, **options)


def mannequins(cache, **options):
    given = {"test_subjects": 2, "views_per_subject": 2, "size": SIDE, "supersample": 1, "draw_workers": 0}
    data = MannequinDataModule(**given, coded=True, cache_dir=str(cache), **options)
    data.setup("test")
    return data


def stage(work, kind, **options):
    networks = {"perceptual": tiny.network("perceptual"), "identity": tiny.network("identity")}
    made = SelftrainStage(tested=inversions.ref(work / kind), **networks, **options)
    made.build_model()
    return made.eval()


def photo(made):
    ws = made.generator.mapping(made.generator.sample_z(1, torch.Generator().manual_seed(3)))
    camera = made.generator.rig.camera(0.2, -0.1)
    image = made.generator.synthesis(ws, camera).image.clamp(-1, 1)
    return image + 0.2 * torch.rand(image.shape, generator=torch.Generator().manual_seed(4)), camera


class TestCommand:
    @pytest.fixture(scope="class")
    def measured(self, work, tmp_path_factory):
        """Of each kind of result, and with details that stay."""
        out = tmp_path_factory.mktemp("measured")
        given = {
            "perceptual": inversions.network("EmbeddedLPIPS"),
            "identity": inversions.network("EmbeddedIdentity"),
            "directions": str(work / "directions"),
        }
        measure = {"perceptual": given["perceptual"], "identity": given["identity"], "frames": 2, "edits": EDITS}
        given["protocol"] = {"class_path": "models.metrics.editing.EditProtocol", "init_args": measure}
        data = {"size": SIDE, "test_subjects": 2, "views_per_subject": 1, "supersample": 1, "draw_workers": 0}
        data |= {"coded": True, "cache_dir": str(out / "cache"), "train_subjects": 1, "val_subjects": 1}
        described = {"class_path": "datamodules.mannequins.MannequinDataModule", "init_args": data}
        for name, more in {
            "codes": {}, "3d": {}, "hybrid": {}, "still": {"realign": False, "tested": {"path": str(work / "hybrid")}}
        }.items():  # fmt: skip
            model = {"tested": {"path": str(work / name)}, "variant": name, **given, **more}
            file = small.write(out / f"{name}.yaml", {"base": [], "model": model, "data": described})
            galatea("selftrain", "test", f"--config={file}", *small.TRAINER, f"--out={out / name}")
        return out

    def test_records(self, measured):
        records = read_records(measured / "hybrid")
        items = {f"{edit}-110000{row}" for edit in EDITS for row in range(2)}
        assert {r.item for r in records} == items and {r.protocol for r in records} == {"e3dge-editing"}
        assert {(r.item, r.subject) for r in records} == {(item, item.partition("-")[2]) for item in items}
        metrics = {"expression", "ghost_nv@changed", "fresh@changed", "mae_nv@kept", "id_input", "drift@kept"}
        assert {r.metric for r in records} > metrics
        assert {p.name for p in measured.glob("hybrid/edit_*/*.png")} == {"1100000.png", "1100001.png"}
        assert {p.name for p in measured.glob("hybrid/edit_*")} == {"edit_smile", "edit_glasses"}

    def test_two_ranks_measure_the_same(self, measured):
        two = measured / "two"
        words = ["selftrain", "test", f"--config={measured / 'hybrid.yaml'}", *small.TRAINER]
        galatea(*words, "--trainer.strategy=ddp", f"--out={two}", ranks=2)
        assert (two / "metrics.csv").read_bytes() == (measured / "hybrid" / "metrics.csv").read_bytes()

    def test_kinds_are_compared_edit_by_edit(self, measured):
        rows = summarise([r for name in ("codes", "3d", "hybrid", "still") for r in read_records(measured / name)],
                         baseline="hybrid")  # fmt: skip
        found = {row.variant: row for row in rows if row.metric == "mae@kept"}
        assert found.keys() == {"codes", "3d", "hybrid", "still"}
        assert {(row.value.items, row.value.subjects) for row in found.values()} == {(4, 2)}
        assert len({row.value.mean for row in found.values()}) == 4


@pytest.mark.parametrize("kind", ["codes", "3d", "hybrid"])
@torch.no_grad()
def test_heads_are_those_that_present_shows(work, kind):
    """Unedited as reconstructed; edited with details moved to the edited head, as by the artifact's own head."""
    made = stage(work, kind)
    image, camera = photo(made)
    found, views = made.editable(image, camera), Camera.cat([camera, made.generator.rig.orbit(2)])
    directions = artifact.load(work / "directions").module("directions")
    torch.testing.assert_close(found(lambda ws: ws)(views).image, made.reconstruct(image, camera)(views).image)
    subject = invert("a", image, camera, made.generator, made.encoder, *made.details().values())
    strength = 2.0 / float(directions.limits[0, 1])
    edited = subject.edited(directions, {"smile": strength})
    wanted = edited.generator.synthesis(edited.latents, views, expression=None).image
    shown = found(partial(directions.moved, name="smile", deviations=2.0))(views).image
    # Artifacts keep photos in bytes.
    torch.testing.assert_close(shown, wanted, atol=5e-3, rtol=0)
    assert (shown - found(lambda ws: ws)(views).image).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["3d", "hybrid"])
@torch.no_grad()
def test_details_that_stay(work, kind):
    """The edited head below what points find in the photo of the unedited one, in both branches."""
    made, moved = stage(work, kind, realign=False), stage(work, kind)
    image, camera = photo(made)
    move = partial(artifact.load(work / "directions").module("directions").moved, name="smile", deviations=2.0)
    views = Camera.cat([camera, made.generator.rig.orbit(2)])
    shown = made.editable(image, camera)(move)(views).image
    source, local = made.read(image, camera), made.local
    query = None if kind == "3d" else local.query(made.generator, source, views)
    expected = made.generator.synthesis(
        move(source.ws).repeat_interleave(len(views)) if query else move(source.ws),
        views,
        edit=PixelAlignment(local, source, query),
    ).image
    torch.testing.assert_close(shown, expected)
    assert differ(source, move(source.ws), source.expression).all()
    assert (shown - moved.editable(image, camera)(move)(views).image).abs().max() > 1e-3


class TestTruth:
    def test_of_codes(self, tmp_path):
        """The number of the trait moves, and the face with it; everything else stays."""
        data = mannequins(tmp_path)
        sample = data.datasets["test"][1]
        camera = Camera.from_label(sample["label"])
        for trait, far in (("mouth_corners", 2.0), ("glasses", 3.0), ("skin_tone", -1.0)):
            code = subject_code([1_100_001])
            code[:, CODE_NAMES.index(trait)] += far
            other = data.changed(sample, trait, far)
            wanted = render(Scene.from_code(code).repeat_interleave(2), camera, SIDE, supersample=1)
            assert torch.equal(data.view_truth(other, camera).image, wanted.image), trait
            assert other["expression"].shape == sample["expression"].shape
        assert torch.equal(sample["z"], subject_code([1_100_001])[0])  # what was given is as it was

    def test_of_faces_that_no_code_holds(self, tmp_path):
        data = MannequinDataModule(test_subjects=1, size=SIDE, supersample=1, draw_workers=0, cache_dir=str(tmp_path))
        data.setup("test")
        sample, camera = data.datasets["test"][0], data.datasets["test"][0]["label"][:1]
        z = subject_z([1_100_000])
        z[:, Z_NAMES.index("glasses")] += 2.0
        wanted = render(Scene.from_z(z, sample["expression"][:1]), Camera.from_label(camera), SIDE, supersample=1)
        found = data.view_truth(data.changed(sample, "glasses", 2.0), Camera.from_label(camera))
        assert torch.equal(found.image, wanted.image) and data.traits == Z_NAMES


class TestEditTest:
    def test_heads_and_truth_move_alike(self, work, tmp_path):
        """By the same number of deviations: of the code along the direction, and of the trait's number."""
        made, data, asked = stage(work, "codes"), mannequins(tmp_path), []

        class Spy(EditProtocol):
            def __call__(self, *given):
                asked.append(given)
                return super().__call__(*given)

        spy = Spy(tiny.network("perceptual"), tiny.network("identity"), frames=2, edits=protocol().edits)
        tested = EditTest(spy, str(work / "directions"), artifact.load(work / "codes"), data, torch.device("cpu"))
        sample = data.datasets["test"][0]
        camera, image = Camera.from_label(sample["label"][:1]), sample["image"][:1]
        moves = []

        def recorded(move):
            moves.append(move(made.invert(image)[0]))
            return partial(made.generator.synthesis, moves[-1])

        names = [name for name, _ in tested(recorded, "a", image, camera, made.generator.rig, sample)]
        assert names == ["smile", "glasses"]
        directions = artifact.load(work / "directions").module("directions")
        own, *edited = moves
        assert all(torch.equal(own.groups[g], t) for g, t in made.invert(image)[0].groups.items())
        for (name, edit), ws, given in zip(EDITS.items(), edited, asked, strict=True):
            place = (directions.read(ws) - directions.read(own))[0, NAMES.index(name)]
            assert float(place) == pytest.approx(edit["deviations"], abs=1e-4)
            code = subject_code([1_100_000])
            code[:, CODE_NAMES.index(edit.get("trait", name))] += edit["deviations"]
            assert torch.equal(
                given[-1](camera).image, render(Scene.from_code(code), camera, SIDE, supersample=1).image
            )

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"protocol": {}}, r"nothing is edited: protocol\.edits has no entries"),
            ({"directions": None}, r"--model\.tested\.path and --model\.directions"),
            ({"protocol": {"joy": {"deviations": 1.0}}}, "no direction 'joy', there are: smile, glasses, age"),
            ({"protocol": {"age": {"deviations": 1.0}}}, r"protocol\.edits\.age: the data know no trait 'age', they"),
            ({"data": None}, "against heads whose traits are known"),
            ({"directions": "other"}, "are of the generator [0-9a-f]{12}, the heads of"),
        ],
    )
    def test_what_does_not_go_together(self, work, tmp_path, changes, words):
        other = heads.directions(tmp_path / "other", tiny.prior(tmp_path / "prior"), NAMES)
        data = MannequinDataModule(coded=True)
        given = {"protocol": EDITS, "directions": str(work / "directions"), "data": data, **changes}
        given["directions"] = str(other.path) if given["directions"] == "other" else given["directions"]
        with pytest.raises(UserError, match=words):
            EditTest(protocol(given["protocol"]), given["directions"], artifact.load(work / "codes"), given["data"],
                     torch.device("cpu"))  # fmt: skip

    @pytest.mark.parametrize("value", [0, float("nan"), True])
    def test_deviations(self, value):
        with pytest.raises(UserError, match="it must be a number other than 0"):
            TraitEdit(value)

    def test_views_are_rendered_once(self):
        asked = []
        cameras = [Camera.look_at(torch.tensor([[x, 0.0, 5.0]]), torch.zeros(3), 2.0) for x in (0.0, 1.0, 0.0)]
        seen = once(lambda camera: asked.append(camera) or len(asked))
        assert [seen(camera) for camera in cameras] == [1, 2, 1]


def test_a_photo_head_reads_its_own_codes(work):
    """The codes of a photo's head are to the bit those that it is shown by, so that it is known as unedited."""
    made = stage(work, "3d")
    image, camera = photo(made)
    subject = invert("a", image, camera, made.generator, made.encoder, made.local)
    assert isinstance(subject.generator.photo, PhotoSet)
    source = subject.generator.source
    assert not differ(source, subject.latents, source.expression).any()
    assert Subjects(artifact.load(work / "3d")).generator.is_3d
