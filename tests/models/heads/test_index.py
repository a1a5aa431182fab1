"""What an artifact shows: said by its index, or, where it has none, by the names of its modules."""

import json
import shutil

import pytest
import torch

from models import artifact
from models.artifact import ArtifactError, load
from models.heads.detailed import DetailedGenerator
from models.heads.index import Entry, read_index, subject_index
from models.heads.subjects import Subjects
from tests.models.heads.test_detailed import head as detailed
from tests.stages import heads

WRAPPER = "models.heads.detailed.DetailedGenerator"


@pytest.fixture(scope="module")
def stylised(tmp_path_factory):
    return heads.stylised(tmp_path_factory.mktemp("stylised"))


def rewritten(source, folder, change):
    """A copy of an artifact whose manifest says something else."""
    shutil.copytree(source.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return load(folder)


def views(subjects, identity):
    subject = subjects[identity]
    return subject.generator.synthesis(subject.latents, subject.camera).image


def test_without_an_index_names_tell(stylised, tmp_path):
    before = rewritten(stylised, tmp_path / "a", lambda m: m["extra"].clear())
    ann, bob = read_index(before.manifest)
    assert ann == Entry("ann", "anchors", "stylised.ann", "generator", artwork="reference_ann.png", caption="stylised")
    assert bob.id == "bob" and [ann, bob] == read_index(stylised.manifest)
    for identity in ("ann", "bob"):
        assert torch.equal(*(views(Subjects(source), identity) for source in (before, stylised)))


def test_the_index_wins_over_names(stylised, tmp_path):
    plain = subject_index([Entry("ann", caption="anchor")])
    indexed = rewritten(stylised, tmp_path / "a", lambda m: m["extra"].update(plain))
    subjects = Subjects(indexed)
    assert subjects.ids == ("ann",)
    ann = subjects["ann"]
    assert ann.original is None and ann.artwork is None and ann.caption == "anchor"
    assert ann.generator is subjects.generator


def test_what_is_left_out_comes_back_and_need_not_be_told(stylised, tmp_path):
    told = subject_index([Entry("ann", left_out={"smile": "the mouth gets no wider"}), Entry("bob")])
    subjects = Subjects(rewritten(stylised, tmp_path / "a", lambda m: m["extra"].update(told)))
    assert subjects["ann"].left_out == {"smile": "the mouth gets no wider"} and subjects["bob"].left_out == {}
    for entry in told["subjects"]:  # as artifacts of before have it
        del entry["left_out"]
    before = Subjects(rewritten(stylised, tmp_path / "b", lambda m: m["extra"].update(told)))
    assert before["ann"].left_out == {} and before["ann"].generator.expressions


def test_a_wrapper_is_made_of_the_modules_it_names(tmp_path):
    one = detailed()
    entry = Entry(
        one.photo.ids[0],
        wrapper="models.heads.detailed.DetailedGenerator",
        parts={"coarse": "generator", "detail": "refiner", "photo": "photos"},
        codes="photos",
    )
    modules = {"generator": one.coarse, "refiner": one.detail, "photos": one.photo}
    artifact.save(tmp_path / "a", stage="any", modules=modules, extra=subject_index([entry]))
    subject = Subjects(load(tmp_path / "a"))[entry.id]
    assert isinstance(subject.generator, DetailedGenerator)
    shown = subject.generator.synthesis(subject.latents, subject.camera).image
    with torch.no_grad():
        assert torch.equal(shown, one.eval().synthesis(subject.latents, subject.camera).image)


def test_one_generator_for_all(stylised):
    subjects = Subjects(stylised, "stylised.bob")
    assert subjects["ann"].generator is subjects["bob"].generator and subjects["ann"].original is None


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        ("ann", "it must be a list"),
        ([["ann"]], "which is none"),
        ([{"id": "ann", "run": "rm"}], "which is none"),
        ([{"codes": "anchors"}], "which is none"),
        ([{"id": "../ann"}], "cannot name a file"),
        ([{"id": 7}], "must be a text"),
        ([{"id": "ann", "generator": None}], "must be a text"),
        ([{"id": "ann", "generator": "nobody"}], "shown by 'nobody', which is not there"),
        ([{"id": "ann", "parts": {"coarse": ["x"]}}], "must be texts by name"),
        ([{"id": "ann", "left_out": {"smile": 1}}], "for left_out, which must be texts by name"),
        ([{"id": "ann", "left_out": ["smile"]}], "for left_out, which must be texts by name"),
        ([{"id": "ann", "left_out": None}], "for left_out, which must be texts by name"),
        ([{"id": "ann", "artwork": "../../x.png"}], "which is not there"),
        ([{"id": "ann", "pictures": {"in 2D": "../../x.png"}}], "which is not there"),
        ([{"id": "ann", "pictures": ["x.png"]}], "for pictures, which must be texts by name"),
        ([{"id": "ann"}, {"id": "bob"}, {"id": "ann"}], "has ann twice"),
        ([{"id": "ann", "wrapper": "os.system", "parts": {"command": "anchors"}}], "which wraps nothing"),
        # A generator of its own would be built with random weights.
        ([{"id": "ann", "wrapper": "models.generators.gram.GRAMGenerator"}], "which wraps nothing"),
        ([{"id": "ann", "wrapper": WRAPPER}], "a wrapper without its parts"),
        ([{"id": "ann", "parts": {"coarse": "generator"}}], "or parts without one"),
        (
            [{"id": "ann", "codes": None, "wrapper": WRAPPER, "parts": {"photo": "anchors"}}],
            "without its parts or codes",
        ),
    ],
)
def test_an_index_that_cannot_be(stylised, tmp_path, subjects, message):
    with pytest.raises(ArtifactError, match=message):
        read_index(stylised.manifest | {"extra": {"subjects": subjects}})


@pytest.mark.parametrize("ids", [5, [["a"], 3], ["../x"], ["a", None]])
def test_ids_of_before_that_cannot_be(stylised, ids):
    codes = {"class_path": "models.anchors.AnchorSet", "init_args": {"ids": ids}}
    with pytest.raises(ArtifactError, match="must be names"):
        read_index(stylised.manifest | {"modules": {"anchors": codes}, "extra": {}})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": "eve"}, "its index has eve, its anchors have not"),
        ({"id": "ann", "codes": "generator"}, "is not codes of heads"),
        ({"id": "ann", "generator": "anchors"}, "is not a generator"),
        ({"id": "ann", "wrapper": WRAPPER, "parts": {"coarse": "generator"}}, "cannot be shown"),
        ({"id": "eve", "wrapper": WRAPPER, "parts": {"photo": "anchors"}}, "its index has eve"),
    ],
)
def test_what_an_index_cannot_show(stylised, tmp_path, entry, message):
    indexed = rewritten(stylised, tmp_path / "a", lambda m: m["extra"].update(subjects=[entry]))
    with pytest.raises(ArtifactError, match=message):
        _ = Subjects(indexed)[entry["id"]]
