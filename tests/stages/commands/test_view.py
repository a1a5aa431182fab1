"""The live viewer: it listens on this machine only, and every control leads to a new picture."""

import dataclasses
import http.client
import math
import os
import queue
import shutil
import socket
import threading
import time
import urllib.parse
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import viser
import websockets.exceptions
import websockets.sync.client

from models import artifact
from models.errors import UserError
from models.heads.directions import directions_for
from models.heads.subjects import Subjects
from stages.commands import view
from stages.commands.doorkeeper import Doorkeeper
from stages.commands.view import Painter, Pose, Settings, Viewer, render, rig_camera, widen
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


class Brush:
    """Paints grey, and each time only when it is told to: ``asked`` tells what for."""

    def __init__(self):
        self.asked, self.go = queue.Queue(), threading.Semaphore(0)

    def __call__(self, settings, pose, resolution=None):
        self.asked.put((settings, pose, resolution))
        assert self.go.acquire(timeout=30)
        return np.full((8, 8, 3), 128, np.uint8), "grey"

    def next(self):
        """What the worker stands in front of."""
        return self.asked.get(timeout=30)

    def finish(self):
        """Let it paint this one; returns what it is asked for next."""
        self.go.release()
        return self.next()


MOVES = {
    "expression": (lambda viewer: viewer.expressions["smile"], 1.0),
    "strength": (lambda viewer: viewer.strength, 0.5),
    "head": (lambda viewer: viewer.item, "bob"),
    "size": (lambda viewer: viewer.size, "128 px"),
}


def test_a_head_that_is_only_turned_is_baked(result):
    subject, painter = Subjects(result)["ann"], Painter()
    rig = subject.generator.rig
    wanted = Settings(subject, 1.0, (0.0, 0.0), 64, False)
    turned = front(rig, position=tuple(rig.camera(0.3).position[0].tolist()))
    assert "32 px" in painter(wanted, front(rig))[1]
    image, words = painter(wanted, turned)
    assert "64 px" in words
    sharp = render(wanted, turned, 64)[0]
    assert np.abs(image.astype(float) - sharp).mean() < 3
    for changed in ((0.0, 1.0), (0.5, 1.0)):  # a slider moves: baking would be the slower way
        moving = Settings(subject, 1.0, changed, 64, False)
        assert "32 px" in painter(moving, turned)[1]
    assert "64 px" in painter(moving, front(rig))[1]
    assert "96 px" in painter(moving, turned, 96)[1]


class TestLight:
    """Sliders of the light are there where heads have colours without their own."""

    @pytest.fixture(scope="class")
    def shapes(self, tmp_path_factory):
        return Subjects(heads.in_relief(tmp_path_factory.mktemp("shapes") / "shapes"))

    def test_it_comes_from_where_it_is_put(self, shapes):
        subject = shapes["ann"]
        bare = Settings(subject, 1.0, (0.0,), 32, False)
        pose = front(subject.generator.rig)
        own = render(bare, pose, 32)[0].astype(float)
        left, right = (
            render(dataclasses.replace(bare, light=(1.0, side, 0.0)), pose, 32)[0].astype(float) for side in (1.4, -1.4)
        )
        half = (left - right).mean((0, 2))  # by column
        middle = len(half) // 2
        assert half[:middle].mean() > 3 > -3 > half[middle:].mean()
        none = render(dataclasses.replace(bare, light=(0.0, 1.4, 0.0)), pose, 32)[0]
        assert np.abs(none - own).max() == 0
        some = render(dataclasses.replace(bare, light=(0.5, 1.4, 0.0)), pose, 32)[0]
        assert np.abs(some - (own + left) / 2).mean() < 1

    def test_its_sliders(self, shapes, result):
        with Viewer(shapes, port=free_port()) as viewer:
            assert viewer.settings.light == (0.0, 0.0, 0.3) and list(viewer.expressions) == ["smile"]
            viewer.light["moved"].value, viewer.light["from the left"].value = 1.0, -0.5
            assert viewer.settings.light == (1.0, -0.5, 0.3)
            viewer._reset()
            assert viewer.settings.light == (0.0, 0.0, 0.3)
        with Viewer(Subjects(result), port=free_port()) as viewer:
            assert viewer.light == {} and viewer.settings.light == (0.0, 0.0, 0.0)


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
        with urllib.request.urlopen(viewer.door.address, timeout=20) as answer:
            assert answer.status == 200 and b"<html" in answer.read()

    def ask(self, viewer, path="/", **headers):
        """Status and headers of a request; ``_`` in names stands for "-"."""
        connection = http.client.HTTPConnection("127.0.0.1", viewer.port, timeout=20)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET", path, headers={"Host": f"127.0.0.1:{viewer.port}"} | headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, answer.headers

    def test_the_token_becomes_a_cookie(self, viewer):
        status, headers = self.ask(viewer, f"/?token={viewer.door.token}")
        cookie = headers["Set-Cookie"]
        assert status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert self.ask(viewer, "/", Cookie=f"other=1; {cookie.partition(';')[0]}")[0] == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"Host": "evil.example"},
            {"Host": "evil.example:{port}"},
            {"Host": "127.0.0.1.evil.example:{port}"},
            {"Host": "localhost"},
            {"Host": "127.0.0.1:1"},
            {"Host": ""},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
            {"Origin": "https://127.0.0.1:{port}"},
            {"Host": "localhost:{port}", "Origin": "http://127.0.0.1:{port}"},
        ],
        ids=str,
    )
    def test_other_sites_and_names_that_point_here(self, viewer, headers):
        headers = {name: value.format(port=viewer.port) for name, value in headers.items()}
        for path, more in ((f"/?token={viewer.door.token}", {}), ("/", {"Cookie": self.cookie(viewer)})):
            assert self.ask(viewer, path, **headers, **more)[0] == 403
            with pytest.raises(websockets.exceptions.InvalidStatus) as error:
                self.socket(viewer, path, headers | more)
            assert error.value.response.status_code == 403

    @staticmethod
    def cookie(viewer):
        return f"galatea-{viewer.port}={viewer.door.token}"

    @staticmethod
    def socket(viewer, path, headers):
        """Open, and close, a WebSocket."""
        place = socket.create_connection(("127.0.0.1", viewer.port), timeout=20)
        host = headers.get("Host", f"127.0.0.1:{viewer.port}")
        others = {name: value for name, value in headers.items() if name not in ("Host", "Origin")}
        url = f"ws://{host or 'x'}{path}"
        subprotocol = f"viser-v{viser.__version__}"
        with websockets.sync.client.connect(
            url, sock=place, origin=headers.get("Origin"), additional_headers=others, subprotocols=[subprotocol]
        ) as connection:
            return connection.recv(timeout=20)

    @pytest.mark.parametrize("token", ["", "?token=", "?token=x", "?token=é", "?token=" + "a" * 32, "?tokens=1"])
    def test_without_the_token(self, viewer, token):
        path = urllib.parse.quote(f"/{token}", safe="/?=")
        assert self.ask(viewer, path)[0] == 403 and self.ask(viewer, f"/assets/index.js{token}"[:20])[0] == 403
        with pytest.raises(websockets.exceptions.InvalidStatus):
            self.socket(viewer, path, {})

    def test_a_socket_of_our_own_page(self, viewer):
        own = {"Origin": f"http://127.0.0.1:{viewer.port}", "Cookie": self.cookie(viewer)}
        assert self.socket(viewer, "/", own)
        assert self.socket(viewer, f"/?token={viewer.door.token}", {})  # a program that was given the address

    def test_no_message_opens_a_tunnel(self, viewer, monkeypatch):
        handlers = viewer.server._websock_server._incoming_handlers
        assert not [message for message in handlers if "Share" in message.__name__]

    @pytest.mark.parametrize(
        ("host", "name", "known"),
        [
            ("192.0.2.7", "192.0.2.7", True),
            ("192.0.2.7", "192.0.2.8", False),
            ("0.0.0.0", "192.0.2.7", True),
            ("0.0.0.0", "rebound.example", False),
            ("::", "[2001:db8::1]", True),
            ("studio.local", "studio.local", True),
            ("studio.local", "STUDIO.local", True),
            ("127.0.0.1", "192.0.2.7", False),
        ],
    )
    def test_names_that_are_ours(self, host, name, known):
        assert Doorkeeper(host, 8080)._is_ours(f"{name}:8080") is known
        assert Doorkeeper(host, 80)._is_ours(name) is known and not Doorkeeper(host, 8080)._is_ours(name)

    def test_a_viser_that_starts_its_server_in_another_way(self):
        with pytest.raises(RuntimeError, match="nobody would be checked"), Doorkeeper("127.0.0.1", 1).at_the_door():
            pass

    def test_every_control_leads_to_a_new_picture(self, viewer):
        guest = Guest(viewer.rig)
        viewer.welcome(guest)
        assert viewer.wait(60) and guest.pictures[-1].shape == (384, 576, 3)
        assert guest.camera.min_orbit_distance < guest.camera.max_orbit_distance
        for control, value in MOVES.values():
            before = guest.pictures[-1]
            control(viewer).value = value
            assert viewer.wait(60) and (guest.pictures[-1] != before).any(), value
        assert viewer.strength.value == 1.0  # as the new head has it
        viewer.farewell(guest)
        count = len(guest.pictures)
        viewer.expressions["blink"].value = 1.0
        assert viewer.wait(60) and len(guest.pictures) == count

    def test_edits(self, result, tmp_path):
        """A slider a direction: each makes another head, which stays when another is chosen only if it is asked for."""
        directions = heads.directions(tmp_path / "directions", artifact.load(result.path.parent / "prior"))
        found = directions_for(directions, Subjects(result))
        with Viewer(Subjects(result), port=free_port(), directions=found) as viewer:
            viewer.welcome(guest := Guest(viewer.rig))
            assert viewer.wait(60) and viewer.edits.keys() == {"smile", "age"}
            before, plain = guest.pictures[-1], viewer.settings
            viewer.edits["age"].value = 1.0
            assert viewer.wait(60) and (guest.pictures[-1] != before).any()
            edited = viewer.settings
            assert edited == viewer.settings and edited.head != plain.head and edited.edits == (0.0, 1.0)
            wanted = plain.subject.edited(found, {"age": 1.0}).latents.ws
            assert (edited.subject.latents.ws == wanted).all() and edited.subject.id == plain.subject.id
            viewer.strength.value = 0.5
            assert viewer.wait(60) and viewer.settings.subject.styled(0.5) is plain.subject.styled(0.5)
            viewer._reset()
            assert viewer.settings == plain and viewer.wait(60)

    def test_edits_of_another_generator(self, result, tmp_path):
        other = tiny.prior(tmp_path / "other")
        generator = other.module("generator")
        generator.backbone.out_bias.data.add_(1)
        other = artifact.save(tmp_path / "other", stage="prior", modules={"generator": generator})
        path = heads.directions(tmp_path / "directions", other).path
        with pytest.raises(UserError, match="are of the generator"):
            view.main([str(result.path), f"--directions={path}"])

    def test_reset(self, viewer):
        guest = Guest(viewer.rig)
        viewer.welcome(guest)
        viewer.expressions["smile"].value = 1.2
        guest.camera.position = (1.0, 2.0, 3.0)
        viewer._reset()
        assert viewer.expressions["smile"].value == 0.0 and viewer.wait(60)
        assert tuple(guest.camera.position) == pytest.approx(front(viewer.rig).position)

    def test_the_mesh_is_shown_and_hidden(self, viewer, monkeypatch):
        monkeypatch.setattr(view, "MESH_SIZE", 32)
        guest = Guest(viewer.rig)
        viewer.welcome(guest)
        viewer.solid.value = True
        assert viewer.wait(120) and viewer._mesh[1] is not None and "triangles" in viewer.words.content
        assert guest.pictures[-1] is None
        viewer.solid.value = False
        assert viewer.wait(60) and guest.pictures[-1] is not None and viewer._mesh[1] is None

    def test_a_picture_that_fails_is_said(self, result):
        with Viewer(Subjects(result), port=free_port(), paint=lambda *_: 1 / 0) as viewer:
            viewer.welcome(Guest(viewer.rig))
            assert viewer.wait(60) and viewer.words.content == "cannot render: division by zero"

    def test_a_prior_has_samples_and_no_style(self, tmp_path):
        tiny.prior(tmp_path)
        with Viewer(Subjects(artifact.load(tmp_path), samples=2), port=free_port(), item="subject-2") as viewer:
            assert viewer.item.value == "subject-2" and not viewer.strength.visible
            image, words = render(viewer.settings, front(viewer.rig), 16)
            assert image.shape == (384, 384, 3) and words.startswith("yaw +0°, pitch +0°, 16 px")


class TestWorker:
    """Changes that come while the worker paints, one picture at a time."""

    @pytest.fixture
    def brush(self, monkeypatch):
        monkeypatch.setattr(view, "REST", 0.0)
        return Brush()

    @pytest.fixture
    def viewer(self, result, brush):
        with Viewer(Subjects(result), port=free_port(), paint=brush) as viewer:
            yield viewer
            brush.go.release(100)

    @pytest.mark.parametrize("move", MOVES)
    @pytest.mark.parametrize("sharply", [False, True])
    def test_a_change_during_a_picture_is_painted_after_it(self, viewer, brush, move, sharply):
        viewer.welcome(Guest(viewer.rig))
        before, _, _ = brush.next()
        if sharply:
            before, _, _ = brush.finish()
        control, value = MOVES[move]
        control(viewer).value = value
        after = viewer.settings
        assert after != before
        assert brush.finish()[::2] == (after, None)  # soon, and small
        assert brush.finish()[::2] == (after, after.resolution)  # then sharp
        brush.go.release()
        assert viewer.wait(30) and brush.asked.empty()

    def test_a_clock_that_stands_still_loses_nothing(self, viewer, brush, monkeypatch):
        monkeypatch.setattr(view, "time", SimpleNamespace(monotonic=lambda: 1.0))
        viewer.welcome(guest := Guest(viewer.rig))
        assert brush.next() and brush.finish()
        guest.camera.fov = 0.2
        viewer.changed(guest.client_id)
        assert brush.finish()[1].fov == 0.2

    def test_a_drag_is_not_queued(self, viewer, brush):
        viewer.welcome(guest := Guest(viewer.rig))
        assert brush.next()
        for step in range(200):
            guest.camera.fov = 0.1 + step / 1000
            viewer.changed(guest.client_id)
        assert brush.finish()[1].fov == brush.finish()[1].fov == guest.camera.fov  # one small, one sharp
        brush.go.release()
        assert viewer.wait(30) and brush.asked.empty()

    def test_another_head_comes_with_its_own_controls(self, viewer, brush):
        viewer.expressions["smile"].value = 1.0
        viewer.strength.value = 0.5
        viewer.welcome(Guest(viewer.rig))
        before = brush.next()[0]
        viewer.strength.on_update(lambda _: time.sleep(0.2))  # time enough to paint what is half changed
        brush.go.release(100)
        viewer.item.value = "bob"
        assert viewer.wait(30)
        seen = [settings for settings, *_ in brush.asked.queue]
        assert all(settings in (before, viewer.settings) for settings in seen) and seen[-1] == viewer.settings

    def test_what_a_head_cannot_show_is_disabled_and_says_why(self, viewer):
        why = "the mouth gets no wider"
        viewer.subjects.entries["bob"].left_out["smile"] = why
        smile, blink = viewer.expressions["smile"], viewer.expressions["blink"]
        for head, disabled, hint in (("bob", True, why), ("ann", False, None)):
            smile.value = 1.0
            viewer.item.value = head
            assert viewer.wait(60) and viewer.settings.subject.id == head
            assert (smile.disabled, smile.hint, smile.value) == (disabled, hint, 0.0)
            assert not blink.disabled and blink.hint is None

    def test_who_waits_longest_is_next(self, viewer, brush):
        one, two = Guest(viewer.rig), Guest(viewer.rig, aspect=2.0)
        two.client_id = 8
        viewer.welcome(one)
        assert brush.next()
        viewer.welcome(two)
        viewer.changed(one.client_id)  # and so on: a drag that does not end
        assert brush.finish()[1].aspect == 2.0


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ([], "required: ARTIFACT"),
            (["nowhere"], "there is no artifact in nowhere"),
            (["{}", "--item", "eve"], "has no item 'eve', it has: ann, bob"),
            (["{}", "--host", "no such host"], "cannot listen on no such host:8080"),
            (["{}", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
            (["{}", "--port", "99999"], "cannot listen on 127.0.0.1:99999: a port is a number from 0 to 65535"),
            (["{}", "--port", "-1"], "cannot listen on 127.0.0.1:-1"),
            (["{}", "--samples", "0"], "--samples is 0"),
            (["{}", "--samples", "-1"], "--samples is -1"),
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
    """Drag, and the head turns; move a slider, and it changes. A folder in $GALATEA_BROWSER keeps a screenshot."""
    playwright = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-sync", "--use-angle=swiftshader"]
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=[*arguments, "--enable-unsafe-swiftshader"], headless=True
        )
        tab = browser.new_page(viewport={"width": 900, "height": 600})
        tab.set_default_timeout(120_000)
        tab.goto(viewer.door.address)
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
        canvas = tab.locator("canvas").first
        assert viewer.wait(60)
        tab.wait_for_timeout(1000)
        turned = canvas.screenshot()
        slider = tab.get_by_role("slider").nth(1)  # the first expression, after the style's strength
        slider.focus()
        for _ in range(12):
            slider.press("ArrowRight")
        deadline = time.monotonic() + 60
        while canvas.screenshot() == turned:
            assert time.monotonic() < deadline
            tab.wait_for_timeout(100)
        assert viewer.expressions["smile"].value > 0
        folder = os.environ["GALATEA_BROWSER"]
        tab.screenshot(path=os.path.join(folder if os.path.isdir(folder) else tmp_path, "view.png"))
        browser.close()
