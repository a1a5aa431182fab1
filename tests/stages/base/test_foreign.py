"""Embedded networks beside a generator of another world: told, once, and only then."""

import logging

import pytest
from torch import nn

from models.configurable import spec
from models.features.base import Frozen
from models.generators.manifold import ManifoldGenerator
from stages.anchor import AnchorSearch, AnchorStage
from stages.base.foreign import TOLD, is_foreign, warn_of_embedded
from stages.base.stage import ArtifactRef, GeneratorRef
from stages.pipeline import presets
from stages.stylize import StylizeStage, TuningConfig
from tests.benchmarks.gpu.networks import FAMILIES
from tests.stages.tiny import OPTIONS, Portraits, fit, network, prior

FOREIGN = {"radius": 2.7, "near": 2.2, "far": 3.3, "focal": 4.2647}


@pytest.fixture(scope="module")
def embedded():
    return ManifoldGenerator(**OPTIONS)


@pytest.fixture(scope="module")
def foreign():
    return ManifoldGenerator(**{**OPTIONS, "rig": FOREIGN})


@pytest.mark.parametrize("name", [name for name in FAMILIES if "embedded" not in name and "efficient" not in name])
def test_official_generators_are_foreign(name):
    assert is_foreign(**spec(FAMILIES[name].small()))


EMBEDDED = {"radius": 7.0, "focal": 2.4038}
MANIFOLD = "models.generators.manifold.ManifoldGenerator"
STYLESDF = "models.generators.stylesdf.StyleSDF"


@pytest.mark.parametrize(
    ("class_path", "init_args", "kind"),
    [
        (MANIFOLD, {}, None),
        (MANIFOLD, {"rig": None}, None),
        (MANIFOLD, {"rig": {"near": 5.6, "far": 8.4, "yaw_std": 0.2}}, None),
        (MANIFOLD, {"rig": EMBEDDED}, None),
        (MANIFOLD, {"rig": FOREIGN}, "manifold"),
        (MANIFOLD, {"rig": {"focal": 4.2647}}, "manifold"),
        (MANIFOLD, {"rig": {"radius": 2.7}}, "manifold"),
        (
            STYLESDF,
            {"rig": {"class_path": "models.camera.Rig", "init_args": {"radius": 1.0, "focal": 4.757}}},
            "stylesdf",
        ),
        (STYLESDF, {"rig": {"class_path": "models.camera.Rig", "init_args": EMBEDDED}}, None),
        ("models.generators.eg3d.EG3DGenerator", {"rig": None}, "eg3d"),
        ("models.generators.eg3d.EG3DGenerator", {"rig": EMBEDDED}, None),
        ("models.generators.gram.GRAMGenerator", {"rig": {"radius": 7.0}}, "gram"),
        ("models.generators.stylegan2.StyleGAN2Generator", {}, "stylegan2"),
        ("models.generators.stylegan2.StyleGAN2Generator", {"rig": 3}, "stylegan2"),
        ("models.generators.stylegan2.StyleGAN2Generator", {"normalize": False}, None),
    ],
)
def test_presets_are_for_foreign_generators(tmp_path, monkeypatch, class_path, init_args, kind):
    entry = {"class_path": class_path, "init_args": init_args}
    monkeypatch.setattr(presets, "read_manifest", lambda folder: {"modules": {"generator": entry}})
    assert presets.kind(str(tmp_path)) == kind
    assert is_foreign(**entry) == (kind is not None)


def test_only_an_embedded_network_of_a_foreign_generator(embedded, foreign, caplog):
    own, other = Frozen(network("perceptual")), Frozen[nn.Module](nn.Identity())
    with caplog.at_level(logging.WARNING):
        warn_of_embedded(embedded, own)
        warn_of_embedded(foreign, other, None)
        assert not caplog.messages
        warn_of_embedded(foreign, own, Frozen(network("style")), other)
    (said,) = caplog.messages
    assert said.startswith("warning: EmbeddedLPIPS and EmbeddedStyle: made for the embedded world")
    assert "ManifoldGenerator" in said and "docs/real_weights.md" in said


def test_what_the_pipeline_has_told_is_not_told_again(foreign, caplog, monkeypatch):
    monkeypatch.setenv(TOLD, "EmbeddedLPIPS EmbeddedStyle")
    with caplog.at_level(logging.WARNING):
        warn_of_embedded(foreign, Frozen(network("perceptual")), Frozen(network("style")))
        assert not caplog.messages
        warn_of_embedded(foreign, Frozen(network("perceptual")), Frozen(network("pose")))
    (said,) = caplog.messages
    assert said.startswith("warning: EmbeddedPose: made for")


def test_stages_say_it_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(OPTIONS, "rig", FOREIGN)
    source = str(prior(tmp_path / "prior").path)
    with caplog.at_level(logging.WARNING, "stages"):
        data = Portraits(source, 2)
        fit(
            AnchorStage(GeneratorRef(source), network("perceptual"), search=AnchorSearch(), steps=1),
            data,
            tmp_path / "a",
        )
        assert [message.split(": made")[0] for message in caplog.messages] == ["warning: EmbeddedLPIPS"]
        caplog.clear()
        recipe = TuningConfig(steps=1, pool=1)
        stage = StylizeStage(ArtifactRef(str(tmp_path / "a")), network("perceptual"), network("style"), recipe=recipe)
        fit(stage, Portraits(source, 2), tmp_path / "s")
        assert [message.split(": made")[0] for message in caplog.messages] == [
            "warning: EmbeddedLPIPS and EmbeddedStyle"
        ]
