"""Artifacts: round trip, strictness, damage, deltas."""

import importlib
import json
import os
import pkgutil
import resource
import shutil
import textwrap
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch

import models
from models import artifact, classes
from models.artifact import ArtifactError, load, save
from models.camera import Rig
from models.configurable import Configurable, build, spec
from models.errors import UserError
from models.files import sha256
from models.heads.codes import HeadCodes


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A ``models.toy`` module that exists for one test."""
    (tmp_path / "code" / "models").mkdir(parents=True)
    (tmp_path / "code" / "models" / "toy.py").write_text(
        textwrap.dedent(
            """
            import os
            from torch import nn
            from models.camera import Rig
            from models.configurable import Configurable

            class Inner(Configurable):
                def __init__(self, width: int = 3):
                    super().__init__()
                    self.layer = nn.Linear(width, width)

            class Outer(Inner):
                def __init__(self, inner: Inner, sizes=(2, 3), rig: Rig = Rig(radius=5.0), **kwargs):
                    super().__init__(**kwargs)
                    self.inner, self.sizes, self.rig = inner, sizes, rig
                    self.register_buffer("count", __import__("torch").tensor(7))

            class Plain(nn.Module):
                pass
            """
        )
    )
    ours = ("models.toy.Inner", "models.toy.Outer")
    monkeypatch.setattr(classes, "BUILDABLE", classes.BUILDABLE.union(ours))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "code" / "models")])
    import models.toy as toy  # type: ignore[import-not-found]

    yield toy
    del __import__("sys").modules["models.toy"]
    del models.toy


def edit(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class TestConfigurable:
    def test_records_defaults_nested_modules_and_dataclasses(self, toy):
        module = toy.Outer(toy.Inner(4), width=5)
        recorded = spec(module)
        assert recorded["class_path"] == "models.toy.Outer"
        assert recorded["init_args"]["inner"] == {"class_path": "models.toy.Inner", "init_args": {"width": 4}}
        assert recorded["init_args"]["sizes"] == [2, 3] and recorded["init_args"]["width"] == 5
        rebuilt = build(json.loads(json.dumps(recorded)))
        assert isinstance(rebuilt, toy.Outer) and rebuilt.rig == Rig(radius=5.0)
        assert rebuilt.layer.in_features == 5 and rebuilt.inner.layer.in_features == 4

    def test_refuses_what_cannot_be_recorded(self, toy):
        with pytest.raises(TypeError, match=r"Inner.__init__: width is a Tensor"):
            toy.Inner(torch.zeros(1))

    @pytest.mark.parametrize(
        "class_path",
        [
            "os.system",
            "models.toy.os",
            "models.toy.Plain",
            "models.toy.nn",
            "models.nothing.X",
            "models.toy.Nothing",
            "models..toy.Inner",
            "models/toy.Inner",
            "models.toy.Inner\n",
            "stages.base.stage.Stage",
            7,
        ],
    )
    def test_builds_only_our_own_classes(self, toy, class_path):
        with pytest.raises(ValueError, match="does not name a class"):
            build({"class_path": class_path, "init_args": {}})

    def test_top_level_must_be_a_module(self):
        with pytest.raises(ValueError, match="not a module"):
            build({"class_path": "models.camera.Rig", "init_args": {}})


def test_round_trip_is_exact_and_movable(toy, tmp_path):
    module = toy.Outer(toy.Inner())
    written = save(
        tmp_path / "a" / "artifact",
        stage="prior",
        modules={"generator": module},
        metrics={"psnr": 31.5, "broken": float("nan")},
        media={"view.png": b"png"},
        licences=[{"name": "x", "licence": "MIT", "origin": "here"}],
        step_hash="abc",
        extra={"items": ("a", "b")},
    )
    shutil.move(tmp_path / "a", tmp_path / "b")
    found = load(tmp_path / "b")  # the folder above is enough
    assert found.id == written.id and found.manifest == written.manifest
    assert same(found.module("generator"), module) and not found.module("generator").training
    assert found.extra == {"items": ["a", "b"]} and found.metrics == {"psnr": 31.5, "broken": None}
    assert found.media("view.png").read_bytes() == b"png" and found.licence == "MIT"
    text = (found.path / "manifest.json").read_text()
    assert str(tmp_path) not in text and os.uname().nodename not in text
    with pytest.raises(ArtifactError, match="no module 'x', it has: generator"):
        found.module("x")
    with pytest.raises(ArtifactError, match="no media"):
        found.media("other.png")


def test_same_content_same_id(toy, tmp_path):
    module = toy.Inner()
    ids = {save(tmp_path / n, stage="s", modules={"m": module}).id for n in "ab"}
    assert len(ids) == 1


def test_lineage_and_licences_are_inherited(toy, tmp_path):
    licence = {"name": "w", "licence": "CC-BY-NC-4.0", "origin": "somewhere"}
    first = save(tmp_path / "1", stage="one", licences=[licence])
    second = save(tmp_path / "2", stage="two", parents={"generator": first})
    third = save(
        tmp_path / "3",
        stage="three",
        parents={"anchor": second, "prior": first.manifest},
        licences=[{"name": "v", "licence": "MIT", "origin": ""}],
    )
    assert set(third.ancestors) == {first.id, second.id}
    assert third.licence == "CC-BY-NC-4.0" and len(third.manifest["licences"]) == 2
    assert load(tmp_path / "3").ancestors.keys() == third.ancestors.keys()


@pytest.mark.parametrize(
    ("licences", "strictest"),
    [
        (["MIT", "CC-BY-NC-4.0"], "CC-BY-NC-4.0"),
        (["MIT licence", "GPL-3.0"], "GPL-3.0"),  # "licence" is not "nc"
        (["Apache-2.0, since 2021", "CC-BY-SA-4.0"], "CC-BY-SA-4.0"),  # nor is "since"
        (["BSD-3-Clause, no warranty of mischance", "LGPLv3"], "LGPLv3"),
        (["Nvidia Source Code License-NC", "GPL"], "Nvidia Source Code License-NC"),
        (["non-commercial use only", "MIT"], "non-commercial use only"),
        (["CC-BY-NC-4.0", "nobody knows"], "nobody knows"),
        (["CC0-1.0", "BSD-2-Clause"], "CC0-1.0"),
        ([], "Apache-2.0"),
    ],
)
def test_the_strictest_licence_is_told_by_its_words(licences, strictest):
    assert artifact.strictest([{"licence": licence} for licence in licences]) == strictest


def test_float16_is_smaller_and_loads_in_the_module_dtype(toy, tmp_path):
    module = toy.Inner(64)
    full = save(tmp_path / "f", stage="s", modules={"m": module})
    half = save(tmp_path / "h", stage="s", modules={"m": module}, dtype={"m": "float16"})
    assert (half.path / "m.safetensors").stat().st_size < 0.6 * (full.path / "m.safetensors").stat().st_size
    loaded = load(tmp_path / "h").module("m")
    assert loaded.layer.weight.dtype == torch.float32
    assert torch.equal(loaded.layer.weight, module.layer.weight.half().float())
    with pytest.raises(ArtifactError, match="float16"):
        save(tmp_path / "x", stage="s", modules={"m": module}, dtype={"m": "float8"})


class TestDelta:
    def test_stores_only_what_changed(self, toy, tmp_path):
        module = toy.Outer(toy.Inner())
        base = save(tmp_path / "base", stage="prior", modules={"generator": module})
        changed = base.module("generator")
        with torch.no_grad():
            changed.layer.bias.add_(1)
        delta = save(
            tmp_path / "out" / "delta", stage="anchor", modules={"a": changed}, delta_of={"a": (base, "generator")}
        )
        assert artifact._read_tensors(delta.path / "a.safetensors").keys() == {"layer.bias"}
        assert same(load(tmp_path / "out" / "delta").module("a"), changed)  # found where it was
        shutil.move(tmp_path / "base", tmp_path / "moved")
        with pytest.raises(ArtifactError, match="base="):
            load(tmp_path / "out" / "delta").module("a")
        assert same(load(tmp_path / "out" / "delta", base=load(tmp_path / "moved")).module("a"), changed)
        other = save(tmp_path / "base", stage="prior", modules={"generator": toy.Outer(toy.Inner())})
        with pytest.raises(ArtifactError, match="is not the base"):
            load(tmp_path / "out" / "delta", base=other)

    def test_of_a_delta(self, toy, tmp_path):
        chain = [save(tmp_path / "0", stage="s", modules={"m": toy.Inner()})]
        for step in (1, 2):
            module = chain[-1].module("m")
            with torch.no_grad():
                (module.layer.bias if step == 1 else module.layer.weight).add_(step)
            chain.append(save(tmp_path / str(step), stage="s", modules={"m": module}, delta_of={"m": chain[-1]}))
        assert same(load(tmp_path / "2").module("m"), module)

    def test_what_is_handed_on_unchanged_is_a_reference_to_where_it_is(self, toy, tmp_path):
        first = save(tmp_path / "0", stage="s", modules={"generator": toy.Inner()})
        second = save(
            tmp_path / "1", stage="s", modules={"m": first.module("generator")}, delta_of={"m": (first, "generator")}
        )
        assert artifact._read_tensors(second.path / "m.safetensors") == {}
        assert second.origin("m")[0].id == first.id and second.origin("m")[1] == "generator"
        changed = second.module("m")
        with torch.no_grad():
            changed.layer.bias.add_(1)
        modules = {"m": second.module("m"), "own": changed}
        third = save(tmp_path / "2", stage="s", modules=modules, delta_of={"m": second, "own": "m"})
        shutil.rmtree(tmp_path / "1")  # which only handed it on
        again = load(tmp_path / "2")
        assert again.manifest["modules"]["m"]["delta_of"] == {"id": first.id, "module": "generator"}
        assert same(again.module("m"), first.module("generator")) and same(again.module("own"), changed)
        assert third.origin("own") == (third, "own")

    def test_is_completed_by_what_lies_beside_it(self, toy, tmp_path):
        base = save(tmp_path / "runs" / "prior" / "artifact", stage="s", modules={"m": toy.Inner()})
        module = base.module("m")
        save(tmp_path / "runs" / "anchor" / "artifact", stage="s", modules={"m": module}, delta_of={"m": base})
        shutil.move(tmp_path / "runs" / "anchor", tmp_path / "moved" / "anchor")
        with pytest.raises(ArtifactError, match="neither where it was nor beside this one"):
            load(tmp_path / "moved" / "anchor").module("m")
        shutil.copytree(tmp_path / "runs" / "prior" / "artifact", tmp_path / "moved" / "any name")
        assert same(load(tmp_path / "moved" / "anchor").module("m"), module)

    def test_a_damaged_neighbour_is_passed_over(self, toy, tmp_path, monkeypatch):
        base = save(tmp_path / "far" / "prior", stage="s", modules={"m": toy.Inner()})
        module = base.module("m")
        save(tmp_path / "runs" / "a", stage="s", modules={"m": module}, delta_of={"m": base})
        (tmp_path / "runs" / "a" / "run.json").unlink()
        for name in ("1 damaged", "2 whole"):
            shutil.copytree(base.path, tmp_path / "runs" / name)
        (tmp_path / "runs" / "1 damaged" / "m.safetensors").write_bytes(b"")
        monkeypatch.chdir(tmp_path / "runs" / "a")
        monkeypatch.setattr(artifact, "ROOT", tmp_path / "nowhere")
        for path in (".", "../a", tmp_path / "runs" / "a"):
            assert same(load(path).module("m"), module)
        shutil.rmtree(tmp_path / "runs" / "2 whole")
        with pytest.raises(ArtifactError, match="is damaged"):
            load(".")

    def test_of_what_is_shipped_is_found_from_anywhere(self, toy, tmp_path, monkeypatch):
        monkeypatch.setattr(artifact, "ROOT", tmp_path)
        shipped = save(tmp_path / "assets" / "prior", stage="s", modules={"m": toy.Inner()})
        module = shipped.module("m")
        save(tmp_path / "here" / "a", stage="s", modules={"m": module}, delta_of={"m": shipped})
        shutil.move(tmp_path / "here" / "a", tmp_path / "elsewhere")
        assert same(load(tmp_path / "elsewhere").module("m"), module)

    def test_of_a_module_beside_it(self, toy, tmp_path):
        base, changed = toy.Inner(), toy.Inner()
        changed.load_state_dict(base.state_dict())
        with torch.no_grad():
            changed.layer.bias.add_(1)
        modules = {"base": base, "changed": changed}
        saved = save(tmp_path / "a", stage="s", modules=modules, delta_of={"changed": "base"})
        assert artifact._read_tensors(saved.path / "changed.safetensors").keys() == {"layer.bias"}
        shutil.move(tmp_path / "a", tmp_path / "moved")
        assert same(load(tmp_path / "moved").module("changed"), changed)
        with pytest.raises(ArtifactError, match="not a whole module saved beside it"):
            save(tmp_path / "b", stage="s", modules={"changed": changed}, delta_of={"changed": "base"})
        manifest = json.loads((tmp_path / "moved" / "manifest.json").read_text())
        manifest["modules"]["changed"]["delta_of"]["module"] = "changed"  # would be completed from itself for ever
        (tmp_path / "moved" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match="is not a whole module here"):
            load(tmp_path / "moved")


class TestRefuses:
    @pytest.fixture
    def saved(self, toy, tmp_path):
        return save(tmp_path / "art", stage="s", modules={"m": toy.Inner()}, media={"v.png": b"x"}).path

    def test_missing(self, tmp_path):
        with pytest.raises(ArtifactError, match="there is no artifact in"):
            load(tmp_path / "none")

    @pytest.mark.parametrize("name", ["m.safetensors", "media/v.png"])
    def test_a_changed_byte(self, saved, name):
        content = bytearray((saved / name).read_bytes())
        content[-1] ^= 1
        (saved / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="is damaged"):
            load(saved)

    def test_a_missing_file(self, saved):
        (saved / "m.safetensors").unlink()
        with pytest.raises(ArtifactError, match=r"m\.safetensors is missing"):
            load(saved)

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "media/../m.safetensors", "a\\b", "", "media//.."])
    def test_names_outside(self, saved, name):
        edit(saved, lambda m: m["files"].update({name: "0" * 64}))
        with pytest.raises(ArtifactError, match="not a plain name"):
            load(saved)

    @pytest.mark.parametrize("name", ["m.safetensors", "media", "manifest.json"])
    def test_links(self, saved, tmp_path, name):
        shutil.move(saved / name, tmp_path / "elsewhere")
        (saved / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ArtifactError, match="is a link"):
            load(saved)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda m: m.update(more=1), "its keys differ: more"),
            (lambda m: m.pop("extra"), "its keys differ: extra"),
            (lambda m: m.update(format=2), "its format is 2"),
            (lambda m: m["modules"]["m"].update(more=1), "module m"),
            (lambda m: m["modules"]["m"].update(file="other.safetensors"), "has no hash"),
            (lambda m: m["files"].update({"m.safetensors": "abc"}), "not a SHA-256"),
            (lambda m: m["parents"].update(p={}), "its format is None"),
        ],
    )
    def test_another_form(self, saved, change, match):
        edit(saved, change)
        with pytest.raises(ArtifactError, match=match):
            load(saved)

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "[" * 100_000, "\xff"])
    def test_a_manifest_that_is_none(self, saved, text):
        (saved / "manifest.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ArtifactError, match="is not a manifest"):
            load(saved)

    @pytest.mark.parametrize("class_path", ["os.system", "torch.nn.Linear", "models.toy.Plain"])
    def test_another_class(self, saved, class_path):
        edit(saved, lambda m: m["modules"]["m"].update(class_path=class_path))
        with pytest.raises(ArtifactError, match="does not name a class"):
            load(saved).module("m")

    @pytest.mark.parametrize("init_args", [{"width": 4}, {"nothing": 1}, {"width": "x"}])
    def test_arguments_that_do_not_fit(self, saved, init_args):
        edit(saved, lambda m: m["modules"]["m"].update(init_args=init_args))
        with pytest.raises(ArtifactError, match="module 'm'"):
            load(saved).module("m")

    def test_saving_plain_modules_bad_names_and_values(self, toy, tmp_path):
        for arguments, match in (
            ({"modules": {"m": toy.Plain()}}, "cannot be stored"),
            ({"modules": {"../m": toy.Inner()}}, "cannot name a file"),
            ({"media": {"a/b.png": b""}}, "cannot name a file"),
            ({"extra": {"x": object()}}, "cannot be written as JSON"),
        ):
            with pytest.raises(ArtifactError, match=match):
                save(tmp_path / "a", stage="s", **arguments)
        assert list(tmp_path.iterdir()) == [tmp_path / "code"]  # nothing is left behind

    @pytest.mark.parametrize("name", ["thesis.txt", "manifest.json"])
    def test_to_replace_a_folder_of_something_else(self, tmp_path, name):
        (tmp_path / "docs").mkdir()
        (tmp_path / "docs" / name).write_text('{"name": "an extension of a browser"}')
        with pytest.raises(ArtifactError, match="is not an artifact"):
            save(tmp_path / "docs", stage="s")
        assert (tmp_path / "docs" / name).exists() and len(list(tmp_path.iterdir())) == 1


class TestAtomicity:
    def test_a_failed_save_leaves_the_old_one(self, toy, tmp_path):
        old = save(tmp_path / "a", stage="s", modules={"m": toy.Inner()})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as a full disk
        try:
            with pytest.raises(UserError, match=r"cannot write .*: File too large"):
                save(tmp_path / "a", stage="s", modules={"m": toy.Inner(100)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert load(tmp_path / "a").id == old.id
        assert {p.name for p in tmp_path.iterdir()} == {"a", "code"}

    def test_the_folder_above_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="Not a directory"):
            save(tmp_path / "file" / "a", stage="s")

    def test_replacing(self, toy, tmp_path):
        save(tmp_path / "a", stage="s", media={"old.png": b"1"})
        new = save(tmp_path / "a", stage="s", media={"new.png": b"1"})
        assert load(tmp_path / "a").id == new.id and not (tmp_path / "a" / "media" / "old.png").exists()

    @pytest.mark.parametrize("before", ["nothing", "an artifact"])
    def test_where_a_link_leads(self, tmp_path, before):
        (tmp_path / "disk" / "one").mkdir(parents=True)
        (tmp_path / "out").symlink_to("disk/one")
        if before != "nothing":
            save(tmp_path / "disk" / "one", stage="s", media={"old.png": b"1"})
        new = save(tmp_path / "out", stage="s", media={"new.png": b"1"})
        assert (tmp_path / "out").is_symlink() and load(tmp_path / "disk" / "one").id == new.id
        assert {p.name for p in tmp_path.iterdir()} == {"disk", "out"}
        assert [p.name for p in (tmp_path / "disk").iterdir()] == ["one"]

    def test_where_a_link_leads_nowhere(self, tmp_path):
        (tmp_path / "out").symlink_to("unmounted/disk")
        with pytest.raises(UserError, match="out is a link that points to nothing: unmounted/disk"):
            save(tmp_path / "out", stage="s")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


class TestStrangers:
    """Artifacts that somebody else wrote: nothing runs, nothing outside is touched, one sentence."""

    # Networks that read weights from a path are named in configurations only; bases and parts are never alone.
    NOT_BUILT = frozenset(
        {"CLIPEmbedding", "LPIPS", "ArcFaceIdentity", "FaceLandmarks", "EmbeddedFeature", "Encoder", "Generator"}
        | {"RadianceGenerator", "Discriminator", "PaintedGenerator", "Configurable", "FaceIdentity", "FaceReader"}
        | {"Finder", "PhotoGenerator"}
    )

    def test_every_class_is_listed_or_known_not_to_be(self):
        found = set()
        for module in pkgutil.walk_packages(models.__path__, "models."):
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, type) and issubclass(value, Configurable) and value.__module__ == module.name:
                    found.add(f"{module.name}.{name}")
        assert {path for path in found if path.rpartition(".")[2] not in self.NOT_BUILT} == {
            path for path in classes.BUILDABLE if path not in ("models.camera.Rig", "models.rendering.relief.Relief")
        }

    def test_classes_that_open_files(self, tmp_path):
        files = ("clip.CLIPEmbedding", "perceptual.LPIPS", "identity.ArcFaceIdentity", "landmarks.FaceLandmarks")
        for path in files:
            with pytest.raises(ValueError, match="does not name a class"):
                build({"class_path": f"models.features.{path}", "init_args": {"weights": str(tmp_path / "x.pt")}})
        with pytest.raises(ValueError, match="names a file as its weights"):
            build({"class_path": "models.features.embedded.EmbeddedStyle", "init_args": {"weights": str(tmp_path)}})

    @pytest.mark.parametrize(
        "identity", ["../x", "/etc", "a/b", "", "..", "a\0b", "a\nb", ".x", "x" * 201, 3, None, ["a"]]
    )
    def test_ids_that_are_paths(self, identity):
        with pytest.raises(ValueError, match="cannot name a file"):
            HeadCodes([identity], [("ws", 2, 4)])
        with pytest.raises(ValueError, match="the same id"):
            HeadCodes(["a", "a"], [("ws", 2, 4)])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.update(weight=t["weight"].double().fill_(float("nan"))), "weight holds numbers that are not"),
            (lambda t: t["bias"].fill_(float("inf")), "bias holds numbers that are not finite"),
            (lambda t: t.update(weight=t["weight"].long()), "weight is stored as torch.int64, the network has"),
            (lambda t: t.update(weight=t["weight"] > 0), "weight is stored as torch.bool"),
        ],
    )
    def test_weights_that_are_none(self, toy, tmp_path, change, message):
        save(tmp_path / "a", stage="s", modules={"m": toy.Inner()})
        file = tmp_path / "a" / "m.safetensors"
        tensors = safetensors.torch.load_file(file)
        inner = {name.removeprefix("layer."): tensor for name, tensor in tensors.items()}
        change(inner)
        file.write_bytes(safetensors.torch.save({f"layer.{name}": tensor for name, tensor in inner.items()}))
        edit(tmp_path / "a", lambda m: m["files"].update({"m.safetensors": sha256(file)}))
        with pytest.raises(ArtifactError, match=f"module 'm': layer.{message}"):
            load(tmp_path / "a").module("m")

    @pytest.mark.parametrize("width", [-1, 0, 100_000, 10**8, 10**12, 1e300, "x", None, [3], {"a": 1}])
    def test_sizes_that_are_none(self, toy, tmp_path, width):
        save(tmp_path / "a", stage="s", modules={"m": toy.Inner()})
        edit(tmp_path / "a", lambda m: m["modules"]["m"]["init_args"].update(width=width))
        tracemalloc.start()
        with pytest.raises(ArtifactError, match="module 'm'"):
            load(tmp_path / "a").module("m")
        assert tracemalloc.get_traced_memory()[1] < 1e8
        tracemalloc.stop()

    @pytest.mark.parametrize("arguments", [{"resolution": -1}, {"resolution": 0}, {"z_dim": -3}, {"rig": 7}])
    def test_generators_that_cannot_be(self, tmp_path, arguments):
        given = artifact.load("assets/prior").manifest["modules"]["generator"]
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}|recorded arguments"):
            build({"class_path": given["class_path"], "init_args": given["init_args"] | arguments})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m.update(stage=7), "stage and step_hash"),
            (lambda m: m.update(step_hash=["x"]), "stage and step_hash"),
            (lambda m: m["modules"]["m"].update(file=["m.safetensors"]), "has no hash"),
            (lambda m: m["modules"]["m"].update(file={"a": 1}), "has no hash"),
            (lambda m: m["modules"]["m"].update(delta_of={"id": 7, "module": "m"}), "which is no id"),
            (lambda m: m["modules"]["m"].update(delta_of={"id": None, "module": ["m"]}), "delta_of"),
            (lambda m: m["modules"]["m"].update(delta_of={"id": None, "module": "m"}), "not a whole module"),
            (lambda m: m["metrics"].update(x="1"), "which is no number"),
            (lambda m: m["metrics"].update(x=True), "which is no number"),
            (lambda m: m.update(licences=[{"licence": 7}]), "objects of texts"),
            (lambda m: m.update(licences=[{"licence": "MIT", "name": ["x"]}]), "objects of texts"),
            (lambda m: m["parents"].update(p=7), "not a JSON object"),
            (lambda m: m["extra"].update(x=10**400), "a number in it has 401 digits"),
            (lambda m: m["files"].update({"\x1b[2J": 1}), r"\\x1b"),
        ],
    )
    def test_values_of_other_types(self, toy, tmp_path, change, message):
        save(tmp_path / "a", stage="s", modules={"m": toy.Inner()})
        edit(tmp_path / "a", change)
        with pytest.raises(ArtifactError, match=message) as error:
            load(tmp_path / "a")
        assert "\x1b" not in str(error.value)

    @pytest.mark.parametrize("name", ["", "a//b", "../a", "/a", "a\\b", ".a", "a b", "a\n"])
    def test_names_of_files(self, toy, tmp_path, name):
        save(tmp_path / "a", stage="s", modules={"m": toy.Inner()})
        edit(tmp_path / "a", lambda m: m["files"].update({name: "0" * 64}))
        with pytest.raises(ArtifactError, match=r"not a plain name|is missing"):
            load(tmp_path / "a")

    def test_what_is_no_file(self, toy, tmp_path):
        save(tmp_path / "a", stage="s", modules={"m": toy.Inner()})
        for name in ("m.safetensors", "manifest.json"):
            (tmp_path / "a" / name).unlink()
            os.mkfifo(tmp_path / "a" / name)
            with pytest.raises(ArtifactError):
                load(tmp_path / "a")

    def test_a_header_of_a_million_tensors(self, toy, tmp_path):
        save(tmp_path / "a", stage="s", modules={"m": toy.Inner()})
        file = tmp_path / "a" / "m.safetensors"
        entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        header = ("{" + ",".join(entry % i for i in range(200_000)) + "}").encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        edit(tmp_path / "a", lambda m: m["files"].update({"m.safetensors": sha256(file)}))
        with pytest.raises(ArtifactError, match="more tensors than any network has"):
            load(tmp_path / "a").module("m")

    def test_bases_that_name_themselves(self, toy, tmp_path):
        base = save(tmp_path / "far" / "base", stage="s", modules={"m": toy.Inner()})
        save(tmp_path / "a", stage="s", modules={"m": toy.Inner()}, delta_of={"m": base})
        for place in (".", "../a", "../none", "\0", "x" * 5000, 7, ["a"]):
            (tmp_path / "a" / "run.json").write_text(json.dumps({"bases": {base.id: place}}))
            with pytest.raises(ArtifactError, match="only stores changes"):
                load(tmp_path / "a").module("m")
        for run in ("[]", '{"bases": 7}', "[" * 100_000, "{"):
            (tmp_path / "a" / "run.json").write_text(run)
            with pytest.raises(ArtifactError, match="only stores changes"):
                load(tmp_path / "a").module("m")

    def test_a_chain_of_bases(self, toy, tmp_path):
        made = save(tmp_path / "0", stage="s", modules={"m": toy.Inner()})
        for number in range(1, 25):
            made = save(tmp_path / str(number), stage="s", modules={"m": toy.Inner()}, delta_of={"m": made})
        assert same(load(tmp_path / "10").module("m"), load(tmp_path / "10").module("m"))
        with pytest.raises(ArtifactError, match="a chain of more than 16 artifacts"):
            load(tmp_path / "24")

    def test_ancestors_in_a_long_line(self, tmp_path):
        made = save(tmp_path / "a", stage="s")
        for _ in range(60):
            made = save(tmp_path / "a", stage="s", parents={"before": made})
        assert len(load(tmp_path / "a").ancestors) == 60
