"""Edits of mannequins against true edited renders: the truth, no edit, half an edit, and a double exposure."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch

from datamodules.mannequins import EXPRESSIONS, RIG, Scene, render, subject_z
from models.errors import UserError
from models.features.embedded import EmbeddedIdentity, EmbeddedLPIPS
from models.files import ROOT
from models.metrics.editing import PROTOCOL, EditProtocol, change_size, ghosts
from models.metrics.image import high_pass
from models.metrics.records import read_records
from models.rendering.output import Rendering


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


_drawn = {}


def true_view(opened: float, camera):
    key = opened, camera.label().numpy().tobytes()
    if key not in _drawn:
        _drawn[key] = draw(opened, camera)
    return _drawn[key]


def draw(opened: float, camera):
    expression = torch.zeros(1, len(EXPRESSIONS))
    expression[:, EXPRESSIONS.index("mouth_open")] = opened
    scene = Scene.from_z(subject_z([1_100_002]), expression)
    return render(scene.repeat_interleave(len(camera)), camera, 48)


CLOSED, OPEN = partial(true_view, 0.0), partial(true_view, 1.0)


def shows(*views, weights=(1.0,)):
    """Renderings that mix true views, with weights of 1 in sum."""
    return lambda camera: Rendering(sum(w * v(camera).image for w, v in zip(weights, views, strict=True)))


@pytest.fixture(scope="module")
def protocol():
    torch.manual_seed(0)
    return EditProtocol(EmbeddedLPIPS(weights=None), EmbeddedIdentity(weights=None), frames=3)


@pytest.fixture(scope="module")
def measure(protocol):
    camera = RIG.camera(0.1)
    inverted = shows(CLOSED)
    return lambda edited, plain=inverted: protocol("a", CLOSED(camera).image, camera, RIG, plain, edited, CLOSED, OPEN)


def test_the_truth_is_a_perfect_edit(measure):
    found = measure(shows(OPEN))
    for metric in ("expression", "expression_nv", "expression_size", "fresh@changed", "fresh_nv@changed", "id_nv"):
        assert found[metric] == pytest.approx(1, abs=1e-3), metric
    for metric in ("mae@kept", "mae_nv@changed", "lpips@kept", "lpips_nv@changed", "ghost@changed", "ghost_nv@changed"):
        assert found[metric] == pytest.approx(0, abs=1e-3), metric
    assert found["psnr_nv@kept"] == math.inf
    assert found["detail@changed"] == pytest.approx(1)
    assert 0 <= found["drift@kept"] < 0.005  # shading may change a little where nothing else does
    assert found.pictures["edit"].shape == (3, 4 * 48, 4 * 48)


def test_no_edit(measure):
    found = measure(shows(CLOSED))
    assert math.isnan(found["expression"]) and found["expression_size"] == 0
    assert found["ghost@changed"] == pytest.approx(1, abs=1e-3)
    assert found["fresh_nv@changed"] == pytest.approx(0, abs=1e-3)
    assert found["mae@changed"] > 10 * found["mae@kept"]
    assert found["drift@kept"] == 0


def test_a_double_exposure_has_ghosts(measure):
    found = measure(shows(OPEN, CLOSED, weights=(0.7, 0.3)))
    assert found["expression"] == pytest.approx(1, abs=1e-3)  # which does not see them
    assert found["expression_size"] == pytest.approx(0.7, abs=1e-3)
    assert found["ghost@changed"] == found["ghost_nv@changed"] == pytest.approx(0.3, abs=1e-3)
    assert found["fresh_nv@changed"] == pytest.approx(0.7, abs=1e-3)


def test_what_changes_elsewhere_is_told_apart(measure):
    """An edit that also recolours the head: wrong on the kept part, and its own drift."""
    found = measure(lambda camera: Rendering(OPEN(camera).image + 0.1 * (OPEN(camera).mask > 0.5)))
    assert found["mae@kept"] == pytest.approx(0.05, abs=5e-3) and found["drift@kept"] == pytest.approx(0.05, abs=5e-3)
    # An inversion that misses the colour, with an edit that keeps what it has: wrong, but without drift.
    tinted = [lambda camera, view=view: Rendering((view(camera).image + 0.1).clamp(-1, 1)) for view in (OPEN, CLOSED)]
    found = measure(*tinted)
    assert found["mae@kept"] == pytest.approx(0.05, abs=5e-3) and found["drift@kept"] < 5e-3
    assert found["expression_nv"] > 0.99 and found["ghost@changed"] == pytest.approx(0, abs=0.02)


def test_ghosts_and_sizes_against_numpy():
    g = torch.Generator().manual_seed(0)
    after, old, new = torch.rand(3, 2, 3, 16, 16, generator=g)
    mask = (torch.rand(2, 1, 16, 16, generator=g) > 0.5).float()
    ghost, fresh = ghosts(after, old, new, mask)
    for row in range(2):
        inside = (mask[row, 0] > 0).numpy()
        found, *columns = (high_pass(x)[row].double().numpy()[:, inside].ravel() for x in (after, old, new))
        wanted = np.linalg.lstsq(np.stack(columns, 1), found, rcond=None)[0]
        assert [float(ghost[row]), float(fresh[row])] == pytest.approx(list(wanted), rel=1e-4)
        change, true = (x[row].double().numpy()[:, inside].ravel() for x in (after - old, new - old))
        wanted = np.linalg.lstsq(true[:, None], change, rcond=None)[0][0]
        assert float(change_size(old, after, old, new, mask)[row]) == pytest.approx(wanted, rel=1e-4)
    assert ghosts(after, old, old)[0].isnan().all()  # nothing to tell apart
    assert change_size(old, after, old, old).isnan().all()


def test_records(measure, protocol):
    records = measure(shows(OPEN)).records("a", "v", protocol.networks, PROTOCOL)
    named = {(record.metric, record.feature_network) for record in records}
    assert {("lpips_nv@kept", "EmbeddedLPIPS"), ("id_input_nv", "EmbeddedIdentity"), ("ghost@changed", "")} <= named
    assert {record.protocol for record in records} == {"e3dge-editing"}


def test_settings(protocol):
    with pytest.raises(UserError, match=r"protocol\.frames is 0"):
        EditProtocol(protocol.perceptual.module, protocol.identity.module, frames=0)


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    """An inverted mannequin opens its mouth where it should."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/e3dge_protocol.md").read_text("utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "EditProtocol(" in block)
    exec(code.replace("frames=8", "frames=2"), {})
    found = {record.metric: record.value for record in read_records("metrics.csv")}
    assert found["expression"] > 0.5 and found["expression_size"] > 0.3
    assert found["drift@kept"] < 0.3 * found["mae@changed"]
