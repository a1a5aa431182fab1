"""The way back from an artifact to everything it was made of."""

import json
import shutil

import pytest
import yaml

from models import artifact
from models.errors import UserError
from models.files import sha256
from stages import cli
from stages.anchor import AnchorStage
from stages.commands import lineage
from stages.pipeline.hashing import path_hash
from stages.pipeline.jobs import Entry, write_plan
from stages.stylize import StylizeStage
from tests.stages import cases


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline's folder with the results of two steps, made from a prior that lies beside it."""
    folder = tmp_path_factory.mktemp("made")
    lines = cases.lines(folder)
    for name, stage in (("anchor", AnchorStage), ("stylize", StylizeStage)):
        cli.run(name, stage, [*lines[name][1:], f"--out={folder / name}"])
    write_plan(folder, {"anchor": Entry([]), "stylize": Entry(["anchor"]), "present": Entry(["stylize"])})
    return folder


@pytest.fixture
def work(made, tmp_path):
    """A copy of it, elsewhere."""
    return shutil.copytree(made, tmp_path / "work")


def tree(path, capsys):
    capsys.readouterr()
    lineage.main([str(path), "--json"])
    return json.loads(capsys.readouterr().out)


def text(path, capsys):
    capsys.readouterr()
    lineage.main([str(path)])
    return capsys.readouterr().out.splitlines()


def test_back_to_every_input(made, capsys):
    stylize = tree(made / "stylize", capsys)
    (anchor,) = stylize["parents"]
    (prior,) = anchor["parents"]
    for node, name in ((stylize, "stylize"), (anchor, "anchor")):
        saved = artifact.load(made / name)
        assert (node["stage"], node["id"], node["step_hash"]) == (name, saved.id, saved.manifest["step_hash"])
        assert node["path"] == str(made / name / "artifact") and node["note"] == ""
        assert node["config"] == str(made / name / "config.yaml") and node["artworks"] == ["p0", "p1", "p2"]
    assert (anchor["role"], anchor["data"]) == ("anchor", "tests.stages.tiny.Portraits")
    assert (prior["role"], prior["path"], prior["parents"]) == ("prior", str(made / "tiny"), [])
    # The last step of the pipeline has no result yet.
    assert tree(made, capsys) == tree(made / "stylize" / "artifact", capsys) == stylize
    id_, step = stylize["id"][:12], stylize["step_hash"][:12]
    lines = text(made, capsys)
    assert lines[0] == f"stylize {id_}, step {step}, {made / 'stylize' / 'artifact'}"
    assert lines[-1] == f"   └─ prior: prior {prior['id'][:12]}, {made / 'tiny'}"


def test_moved(made, work, capsys):
    shutil.move(work / "stylize", work / "elsewhere")
    (before,), (now,) = (tree(place, capsys)["parents"] for place in (made / "stylize", work / "elsewhere"))
    assert now == json.loads(json.dumps(before).replace(str(made), str(work)))


def test_what_is_gone_is_told(made, work, tmp_path, capsys):
    config = work / "stylize" / "config.yaml"
    config.write_text(config.read_text().replace(str(made), str(work)))
    for change, note in (
        (lambda: (work / "anchor" / "artifact" / "manifest.json").write_text("{"), "is damaged"),
        (lambda: shutil.rmtree(work / "anchor"), "is missing"),
        (lambda: artifact.save(work / "anchor", stage="other"), "now holds another: "),
    ):
        change()
        (anchor,) = tree(work / "stylize", capsys)["parents"]
        assert anchor["path"] is None and anchor["note"].startswith(f"{work / 'anchor'} {note}")
        assert anchor["parents"][0]["path"] == str(work / "tiny")  # found all the same
    alone = shutil.move(work / "stylize" / "artifact", tmp_path / "alone")
    (anchor,) = tree(alone, capsys)["parents"]
    assert anchor["note"] == anchor["parents"][0]["note"] == "not found"
    assert text(alone, capsys)[-1].endswith("not found")


def test_files_of_the_data(work, capsys):
    config = yaml.safe_load((work / "anchor" / "config.yaml").read_text())
    picture = work / "ann.png"
    picture.write_bytes(b"picture")
    (work / "many").mkdir()
    (work / "many" / "bob.png").write_bytes(b"picture")
    paths = {"a": picture, "b": work / "many", "c": work / "gone.png"}
    config["data"]["init_args"] = {name: {"path": str(path)} for name, path in paths.items()}
    (work / "anchor" / "config.yaml").write_text(yaml.safe_dump(config))
    given = {g["option"]: (g["path"], g["content"]) for g in tree(work / "anchor", capsys)["given"]}
    assert given == {
        "data.init_args.a.path": (str(picture), sha256(picture)),
        "data.init_args.b.path": (str(work / "many"), "1 files"),
        "data.init_args.c.path": (str(work / "gone.png"), "missing"),
    }
    assert f"│  data.init_args.a.path: {picture} ({path_hash(picture)[:12]})" in text(work / "anchor", capsys)


def test_an_ancestor_that_comes_twice_is_told_once(made, tmp_path, capsys):
    anchor = artifact.load(made / "anchor")
    artifact.save(tmp_path / "pair", stage="pair", parents={"left": anchor, "right": anchor})
    lines = text(tmp_path / "pair", capsys)
    assert [line[:9] for line in lines if "anchor" in line] == ["├─ left: ", "└─ right:"]
    assert lines[-1].endswith("not found, see above") and len([line for line in lines if "prior" in line]) == 1


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("nowhere", "nowhere is not a folder"),
        ("empty", "there is no artifact in .*empty"),
        (None, "unrecognized|arguments"),
    ],
)
def test_refusals(tmp_path, place, match):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=match):
        lineage.main([str(tmp_path / place)] if place else ["--yaml"])


def test_what_a_terminal_would_obey_is_spelled_out(tmp_path, capsys):
    artifact.save(tmp_path / "a", stage="prior\x1b[2J\nforged line", parents={})
    lineage.main([str(tmp_path / "a")])
    text = capsys.readouterr().out
    assert "\x1b" not in text and text.count("\n") == 1 and r"prior\x1b[2J\nforged line" in text
