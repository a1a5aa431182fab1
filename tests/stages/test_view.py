"""The live viewer: it listens on this machine only, and every control leads to a new picture."""

import math
import os
import shutil
import socket
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest

from models import artifact
from models.errors import UserError
from models.subjects import Subjects
from stages import view
from stages.view import Pose, Viewer, rig_camera, widen
from tests.stages import heads, tiny

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return heads.stylised(tmp_path_factory.mktemp("result"))


@pytest.fixture
def viewer(result):
    with Viewer(Subjects(result), port=free_port()) as viewer:
        yield viewer


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def front(rig, **changes):
    x, y, z = rig.pivot
    return Pose(**{
        "position": (x, y, z + rig.radius), "look_at": rig.pivot, "fov": 2 * math.atan(0.5 / rig.focal), "aspect": 1.0,
        **changes,
    })  # fmt: skip


class Guest:
    """A browser, as far as the viewer can tell."""

    client_id = 7

    def __init__(self, rig, aspect=1.5):
        pose = front(rig, aspect=aspect)
        self.camera = SimpleNamespace(**vars(pose), on_update=lambda callback: None)
        self.scene = self
        self.pictures = []

    def set_background_image(self, image, **_):
        self.pictures.append(image)

    def wait(self, count, seconds=30.0):
        """Until ``count`` pictures have come; returns the last."""
        deadline = time.monotonic() + seconds
        while len(self.pictures) < count:
            assert time.monotonic() < deadline, f"{len(self.pictures)} pictures of {count}"
            time.sleep(0.01)
        return self.pictures[-1]


class TestCamera:
    rig = tiny.ManifoldGenerator(**tiny.OPTIONS).rig

    def test_the_start_is_the_frontal_camera_of_the_rig(self):
        camera, wanted = rig_camera(front(self.rig), self.rig), self.rig.camera(0.0)
        assert camera.label() == pytest.approx(wanted.label().numpy(), abs=1e-4)

    @pytest.mark.parametrize(("yaw", "pitch"), [(0.5, 0.2), (-0.9, -0.3)])
    def test_an_orbit_is_ours(self, yaw, pitch):
        wanted = self.rig.camera(yaw, pitch)
        pose = front(self.rig, position=tuple(wanted.position[0].tolist()))
        assert rig_camera(pose, self.rig).label() == pytest.approx(wanted.label().numpy(), abs=1e-4)

    def test_stays_within_the_trained_angles(self):
        behind = rig_camera(front(self.rig, position=(1.0, 6.0, -3.0)), self.rig)
        assert float(behind.yaw) == pytest.approx(self.rig.yaw_max, abs=1e-4)
        assert float(behind.pitch) == pytest.approx(self.rig.pitch_max, abs=1e-4)

    def test_nearer_is_a_longer_lens_from_the_same_place(self):
        x, y, z = self.rig.pivot
        camera = rig_camera(front(self.rig, position=(x, y, z + self.rig.radius / 2)), self.rig)
        assert float(camera.intrinsics[0, 0, 0]) == pytest.approx(2 * self.rig.focal, rel=1e-5)
        assert float(camera.position[0, 2]) == pytest.approx(z + self.rig.radius, rel=1e-5)


class TestWiden:
    def test_borders_are_drawn_out_and_the_middle_is_kept(self):
        image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        wide = widen(image, 2.0)
        assert wide.shape == (8, 16, 3) and (wide[:, 4:12] == image).all() and (wide[:, 0] == image[:, 0]).all()
        assert (widen(image, 0.5) == image[:, 2:6]).all() and (widen(image, 1.0) == image).all()


class TestServer:
    def test_answers_on_loopback(self, viewer):
        with urllib.request.urlopen(f"http://127.0.0.1:{viewer.port}", timeout=20) as answer:
            assert answer.status == 200 and b"<html" in answer.read()

    def test_every_control_leads_to_a_new_picture(self, viewer):
        guest = Guest(viewer.rig)
        viewer.welcome(guest)
        first = guest.wait(2)  # one at once, a sharp one at rest
        assert first.shape == (384, 576, 3) and guest.camera.min_orbit_distance < guest.camera.max_orbit_distance
        controls = [
            (viewer.expressions["smile"], 1.0), (viewer.strength, 0.0), (viewer.item, "bob"),
            (viewer.size, "32 px"),
        ]  # fmt: skip
        for control, value in controls:
            count = len(guest.pictures)
            control.value = value
            viewer.changed()  # as the control's own callback does, from a thread of the server
            guest.wait(count + 1)
        assert viewer.strength.value == 1.0  # as the new head has it
        viewer.farewell(guest)
        count = len(guest.pictures)
        viewer.expressions["blink"].value = 1.0
        time.sleep(0.3)
        assert len(guest.pictures) == count

    def test_a_busy_drag_is_not_queued(self, viewer):
        guest = Guest(viewer.rig)
        viewer.welcome(guest)
        guest.wait(2)
        count = len(guest.pictures)
        for _ in range(200):
            viewer.changed(guest.client_id)
        guest.wait(count + 2)
        time.sleep(0.4)
        assert len(guest.pictures) < count + 30

    def test_reset(self, viewer):
        guest = Guest(viewer.rig)
        viewer.welcome(guest)
        viewer.expressions["smile"].value = 1.2
        guest.camera.position = (1.0, 2.0, 3.0)
        viewer._reset()
        assert viewer.expressions["smile"].value == 0.0
        assert tuple(guest.camera.position) == pytest.approx(front(viewer.rig).position)

    def test_the_mesh_is_shown_and_hidden(self, viewer, monkeypatch):
        monkeypatch.setattr(view, "MESH_SIZE", 32)
        guest = Guest(viewer.rig)
        viewer.welcome(guest)
        guest.wait(2)
        viewer.solid.value = True
        deadline = time.monotonic() + 60
        while viewer._mesh[1] is None:
            assert time.monotonic() < deadline, viewer.words.content
            time.sleep(0.02)
        assert "triangles" in viewer.words.content or "making" in viewer.words.content
        assert guest.pictures[-1] is None
        count = len(guest.pictures)
        viewer.solid.value = False
        assert guest.wait(count + 2) is not None and viewer._mesh[1] is None

    def test_a_picture_that_fails_is_said(self, viewer, monkeypatch):
        guest = Guest(viewer.rig)
        monkeypatch.setattr(viewer, "render", lambda *_: 1 / 0)
        viewer.welcome(guest)
        deadline = time.monotonic() + 20
        while "division" not in viewer.words.content:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def test_a_prior_has_samples_and_no_style(self, tmp_path):
        tiny.prior(tmp_path)
        with Viewer(Subjects(artifact.load(tmp_path), samples=2), port=free_port(), item="subject-2") as viewer:
            assert viewer.item.value == "subject-2" and not viewer.strength.visible
            assert viewer.render(front(viewer.rig), 16).shape == (384, 384, 3)


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ([], "required: ARTIFACT"),
            (["nowhere"], "there is no artifact in nowhere"),
            (["{}", "--item", "eve"], "has no item 'eve', it has: ann, bob"),
            (["{}", "--host", "no such host"], "cannot listen on no such host:8080"),
            (["{}", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        ],
    )
    def test_refusals(self, result, arguments, match):
        with pytest.raises(UserError, match=match):
            view.main([a.format(result.path) for a in arguments])

    def test_another_host_is_warned_about(self, result, capsys):
        with Viewer(Subjects(result), "0.0.0.0", free_port()):
            assert "warning: 0.0.0.0 can be reached from other machines" in capsys.readouterr().out

    def test_loopback_is_not(self, viewer, capsys):
        assert "warning" not in capsys.readouterr().out


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.skipif("GALATEA_BROWSER" not in os.environ, reason="set GALATEA_BROWSER=1 to start a browser")
def test_in_a_browser(viewer, tmp_path):
    """Drag and see the head turn. Keeps a screenshot in $GALATEA_BROWSER when that is a folder."""
    playwright = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-sync", "--use-angle=swiftshader"]
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=[*arguments, "--enable-unsafe-swiftshader"], headless=True
        )
        tab = browser.new_page(viewport={"width": 900, "height": 600})
        tab.set_default_timeout(120_000)
        tab.goto(f"http://127.0.0.1:{viewer.port}")
        tab.get_by_text("pitch", exact=False).wait_for()
        before = viewer.words.content
        tab.mouse.move(300, 300)
        tab.mouse.down()
        for step in range(8):
            tab.mouse.move(300 - 5 * step, 300)
            tab.wait_for_timeout(50)
        tab.mouse.up()
        deadline = time.monotonic() + 60
        while viewer.words.content.split("°")[0] == before.split("°")[0]:
            assert time.monotonic() < deadline, before
            tab.wait_for_timeout(100)
        folder = os.environ["GALATEA_BROWSER"]
        tab.screenshot(path=os.path.join(folder if os.path.isdir(folder) else tmp_path, "view.png"))
        browser.close()
