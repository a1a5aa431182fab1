"""``galatea view``: an artifact's heads, live in the browser.

viser shows pictures and reports the visitor's camera; every picture is rendered here. A worker renders the newest
state for each visitor, small while things move and sharp once they rest, so that dragging stays fluid.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stages.arguments import Parser
from stages.commands.doorkeeper import Doorkeeper, free_port

if TYPE_CHECKING:  # torch is not needed for --help
    import numpy as np

    from models.camera import Camera, Rig
    from models.generators.baked import BakedHead
    from models.heads.directions import Directions
    from models.heads.subjects import Subject, Subjects

REST = 0.25  # seconds without change after which the sharp picture is rendered
ZOOM = (0.55, 1.8)  # nearest and farthest place of the visitor's camera, in radii of the rig
MESH_SIZE = 112
LIGHT = {"moved": (0.0, 1.0, 0.0), "from the left": (-1.5, 1.5, 0.0), "from above": (-1.5, 1.5, 0.3)}
"""Sliders of the light, from where to where, and where they begin."""
FEW = 16  # sliders that are shown at once


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``, the ones after ``galatea view``, until it is interrupted.

    Raises:
        UserError: for a wrong option, an artifact that holds no head, or an address that cannot be used.
    """
    parser = Parser("galatea view", "Look at the heads of an artifact, live in the browser.")
    parser.add_argument("artifact", metavar="ARTIFACT", help="its folder, or the run that made it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s: this machine)")
    parser.add_argument("--port", type=int, default=8080, help="the first free one from here (default: %(default)s)")
    parser.add_argument("--item", metavar="ID", help="the head to begin with")
    parser.add_argument("--module", default="generator", help="the original generator (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="heads drawn from a prior (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: %(default)s)")
    parser.add_argument("--directions", metavar="PATH", help="of the stage directions: a slider edits along each")
    options = parser.parse_args(list(arguments))
    if options.samples < 1:
        parser.error(f"--samples is {options.samples}: at least one head is drawn")

    from models.artifact import load  # after --help, which needs no torch
    from models.errors import UserError
    from models.heads.directions import directions_for
    from models.heads.subjects import Subjects

    subjects = Subjects(load(options.artifact), options.module, options.samples, options.seed)
    if not subjects.generator.is_3d:
        raise UserError(
            f"module {options.module!r} of {options.artifact} is a 2D generator, which cannot be turned: "
            "galatea present shows its pictures"
        )
    if options.item is not None:
        subjects.choose([options.item])
    directions = None if options.directions is None else directions_for(load(options.directions), subjects)
    with Viewer(subjects, options.host, options.port, options.item, directions=directions) as viewer:
        print(f"view: {viewer.door.address} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(3600)


@dataclass(frozen=True)
class Pose:
    """A visitor's camera.

    Attributes:
        position, look_at: world points, in our axes.
        fov: vertical field of view, radians.
        aspect: width / height of the window.
    """

    position: tuple[float, float, float]
    look_at: tuple[float, float, float]
    fov: float
    aspect: float


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    Attributes:
        subject: the head, edited. strength: of its style. expression: a coefficient a name.
        resolution: side of a picture at rest, pixels.
        solid: whether the mesh is shown instead of pictures.
        edits: a strength a direction.
        light: how much of it (0 is the head's own light, 1 the moved one) and its slopes to the side and up.
    """

    subject: Subject
    strength: float
    expression: tuple[float, ...]
    resolution: int
    solid: bool
    edits: tuple[float, ...] = ()
    light: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def head(self) -> tuple[object, ...]:
        """What tells it from other heads."""
        return self.subject.id, self.strength, self.expression, self.edits


class Visitor(Protocol):
    """The part of viser's client that is used."""

    client_id: int
    camera: Any
    scene: Any


@dataclass(eq=False)
class _Seat:
    """A visitor, the number and time of the last change, and what is shown: which change, and whether sharply."""

    visitor: Visitor
    wanted: int = 0
    since: float = 0.0
    shown: int = -1
    sharp: bool = False

    @property
    def settled(self) -> bool:
        """Whether nothing is left to paint."""
        return self.sharp and self.shown == self.wanted


def pose_of(camera: Any) -> Pose:
    """The pose of viser's camera.

    Its scene is told that y is up, so that world points agree with ours; its camera axes (OpenCV) are not needed, as
    the orbit keeps the horizon level.
    """
    position, look_at = ((float(x), float(y), float(z)) for x, y, z in (camera.position, camera.look_at))
    return Pose(position, look_at, float(camera.fov), float(camera.aspect))


def rig_camera(pose: Pose, rig: Rig) -> Camera:
    """Our camera for a visitor's pose: on the sphere and within the angles that the generator knows.

    Distance becomes focal length, because a generator's depth range is that of its own rig.
    """
    import torch

    from models.camera import Camera

    offset = torch.tensor(pose.position) - torch.tensor(pose.look_at)
    distance = max(float(offset.norm()), 1e-6)
    # Where the line from the pivot towards the visitor meets the sphere.
    pivot, centre = torch.tensor(rig.pivot), torch.tensor(rig.centre or rig.pivot)
    along = (offset / distance) @ (pivot - centre)
    reach = (along.square() + rig.radius**2 - (pivot - centre).square().sum()).sqrt() - along
    met = Camera.look_at((pivot + reach * offset / distance)[None], pivot, rig.focal)
    focal = 1 / (2 * math.tan(pose.fov / 2)) * float(reach) / distance
    camera = rig.replace(focal=focal).camera(*rig.within(*rig.angles(met)))
    limit = rig.frame / 4  # how far the pivot may be dragged
    camera.cam2world[:, :3, 3] += (torch.tensor(pose.look_at) - pivot).clamp(-limit, limit)
    return camera


def render(
    settings: Settings, pose: Pose, resolution: int | None = None, head: BakedHead | None = None
) -> tuple[np.ndarray, str]:
    """The picture for one pose, uint8 (H, W, 3), as wide as the window, and what there is to say about it.

    Args:
        resolution: image side, native when ``None``.
        head: that these settings make, instead of the networks.
    """
    import torch

    from models.generators.views import render_views
    from models.image import to_uint8
    from models.relief.pictures import light_from
    from models.rendering.relief import relit
    from models.rendering.sheets import enlarge

    subject, begin = settings.subject, time.monotonic()
    camera = rig_camera(pose, subject.generator.rig)
    if head is not None:
        image = head.show(camera, resolution).image[0]
    else:
        generator, code = subject.styled(settings.strength), torch.tensor([settings.expression])
        seen = render_views(generator, subject.latents, camera, code, resolution)
        image = seen.image[0]
        if settings.light[0] and generator.relightable:
            image = torch.lerp(image, relit(seen, light_from(*settings.light[1:]))[0], settings.light[0])
    took = time.monotonic() - begin
    yaw, pitch = (round(math.degrees(float(angle))) for angle in subject.generator.rig.angles(camera))
    words = f"yaw {yaw:+d}°, pitch {pitch:+d}°, {image.shape[-1]} px, {1000 * took:.0f} ms"
    return widen(to_uint8(enlarge(image, max(image.shape[-1], 384))), pose.aspect), words


class Painter:
    """:func:`render`, which bakes a head on its manifolds, where it has any, as soon as it is only turned.

    From then on it is seen at the resolution of a picture at rest while it moves, too.
    """

    def __init__(self) -> None:
        self._shown: object = None  # settings of the last picture
        self._head: tuple[object, BakedHead | None] = (None, None)

    def __call__(self, settings: Settings, pose: Pose, resolution: int | None = None) -> tuple[np.ndarray, str]:
        key = (settings.head, settings.resolution)
        turned, self._shown = resolution is None and key == self._shown, key
        if not turned:
            return render(settings, pose, resolution)
        if self._head[0] != key:
            self._head = key, _baked(settings)
        head = self._head[1]
        return render(settings, pose) if head is None else render(settings, pose, settings.resolution, head)


def _baked(settings: Settings) -> BakedHead | None:
    import torch

    expression = torch.tensor([settings.expression])
    return settings.subject.baked(settings.resolution, expression, settings.strength)


class Viewer:
    """A viser server with its controls, and the worker that paints for it.

    Args:
        subjects: what can be looked at.
        host, port: where to listen; the next free port is taken.
        item: the first subject.
        paint: makes the pictures, as :class:`Painter` does.
        directions: along which heads can be edited.

    Raises:
        UserError: when ``host`` is not an address of this machine.
    """

    def __init__(
        self,
        subjects: Subjects,
        host: str = "127.0.0.1",
        port: int = 8080,
        item: str | None = None,
        paint: Callable[[Settings, Pose, int | None], tuple[np.ndarray, str]] | None = None,
        directions: Directions | None = None,
    ) -> None:
        self.door = _listen(host, port)
        logging.getLogger("websockets").setLevel(logging.CRITICAL)  # browsers leave in many ways
        import viser

        self.subjects, self.directions = subjects, directions
        self.rig = subjects.generator.rig
        from viser import _messages

        with contextlib.redirect_stdout(io.StringIO()), self.door.at_the_door():  # its banner says what we print
            self.server = viser.ViserServer(host=host, port=self.door.port, label="Galatea", verbose=False)
        self.port = self.door.port = self.server.get_port()
        # No visitor opens a tunnel to the outside: the button is not shown, and the message is not heard.
        for message in (_messages.ShareUrlRequest, _messages.ShareUrlDisconnect):
            self.server._websock_server.unregister_handler(message)
        self.paint = paint or Painter()
        self._subject = subjects[item or subjects.ids[0]]
        self._edit: tuple[object, Subject] | None = None  # edits, and the subject with them
        self._mesh: tuple[object, Any] = (None, None)  # settings, and the mesh made with them
        self._wake = threading.Condition()  # guards all that follows, and controls that change together
        self._seats: dict[int, _Seat] = {}
        self._closed = False
        self._scene()
        self._controls()
        self.server.on_client_connect(self.welcome)
        self.server.on_client_disconnect(lambda client: self.farewell(client))
        self._worker = threading.Thread(target=self._work, name="painter", daemon=True)
        self._worker.start()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker and the server."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._worker.join(10)
        self.server.stop()

    # -- what the visitor sees --------------------------------------------------------------------

    def _scene(self) -> None:
        rig = self.rig
        self.server.scene.set_up_direction("+y")
        self.server.scene.configure_default_lights(cast_shadow=False)  # shadows stall browsers without a GPU
        start = self.server.initial_camera
        start.look_at = rig.pivot
        start.position = tuple(rig.camera(rig.yaw_mean, rig.pitch_mean).position[0].tolist())
        start.fov = 2 * math.atan(0.5 / rig.focal)
        self.server.gui.configure_theme(show_share_button=False, brand_color=(180, 83, 42))
        self.server.gui.main_panel.dock_right()

    def _controls(self) -> None:
        gui, subjects = self.server.gui, self.subjects
        native = subjects.generator.resolution
        self.item = gui.add_dropdown("Head", tuple(subjects.ids), initial_value=self._subject.id)
        scales = (1, 2, 4) if subjects.generator.free_resolution else (1,)
        self.sizes = {f"{native * scale} px": native * scale for scale in scales}
        self.size = gui.add_dropdown("Resolution", tuple(self.sizes), initial_value=f"{scales[:2][-1] * native} px")
        self.strength = gui.add_slider("Style strength", 0.0, 1.5, 0.05, 1.0)
        self.strength.visible = self._subject.blends
        self.expressions: dict[str, Any] = {}
        if subjects.generator.expressions:
            with gui.add_folder("Expression", expand_by_default=len(subjects.generator.expressions) <= FEW):
                for name in subjects.generator.expressions:
                    self.expressions[name] = gui.add_slider(name.replace("_", " "), -0.5, 1.5, 0.05, 0.0)
        self.edits: dict[str, Any] = {}
        if self.directions is not None:
            with gui.add_folder("Edits", expand_by_default=len(self.directions.names) <= FEW):
                for name in self.directions.names:
                    self.edits[name] = gui.add_slider(name.replace("_", " "), -1.5, 1.5, 0.05, 0.0)
        self.light: dict[str, Any] = {}
        if subjects.generator.relightable:
            with gui.add_folder("Light"):
                for name, (low, high, start) in LIGHT.items():
                    self.light[name] = gui.add_slider(name, low, high, 0.05, start)
        self.solid = gui.add_checkbox("Show the mesh", False)
        self.reset = gui.add_button("Reset")
        self.words = gui.add_markdown("")
        self._restore()
        self.item.on_update(lambda _: self._change_item())
        sliders = (*self.expressions.values(), *self.edits.values(), *self.light.values())
        for control in (self.size, self.strength, self.solid, *sliders):
            control.on_update(lambda _: self.changed())
        self.reset.on_click(lambda _: self._reset())

    def _restore(self) -> None:
        """Controls as the subject has them."""
        self.strength.value = 1.0
        for slider in self.edits.values():
            slider.value = 0.0
        for name, slider in self.light.items():
            slider.value = LIGHT[name][2]
        for (name, slider), value in zip(self.expressions.items(), self._subject.expression[0].tolist(), strict=True):
            slider.value = round(max(-0.5, min(1.5, value)) * 20) / 20
            slider.hint = self._subject.left_out.get(name)
            slider.disabled = slider.hint is not None

    def _change_item(self) -> None:
        identity = self.item.value
        subject = self.subjects[identity]  # reads a network: not while others wait
        with self._wake:
            if identity == self.item.value:  # nobody has gone on to another head meanwhile
                self._subject = subject
                self.strength.visible = subject.blends
                self._restore()
                self.changed()

    def _reset(self) -> None:
        start = self.server.initial_camera
        with self._wake:
            self._restore()
            for seat in self._seats.values():
                camera = seat.visitor.camera
                camera.position, camera.look_at, camera.fov = start.position, start.look_at, start.fov
            self.changed()

    def welcome(self, visitor: Visitor) -> None:
        """A browser has connected."""
        near, far = (self.rig.radius * zoom for zoom in ZOOM)
        visitor.camera.min_orbit_distance, visitor.camera.max_orbit_distance = near, far
        visitor.camera.on_update(lambda _: self.changed(visitor.client_id))
        with self._wake:
            self._seats[visitor.client_id] = _Seat(visitor)
            self.changed(visitor.client_id)

    def farewell(self, visitor: Visitor) -> None:
        """A browser has left."""
        with self._wake:
            self._seats.pop(visitor.client_id, None)

    def changed(self, visitor: int | None = None) -> None:
        """Ask for a new picture, for one visitor or for all; returns at once."""
        with self._wake:
            for identity, seat in self._seats.items():
                if visitor in (None, identity):
                    seat.wanted += 1
                    seat.since = time.monotonic()
            self._wake.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every visitor sees a sharp picture of the last change; ``False`` when ``timeout`` s are over."""
        with self._wake:
            return self._wake.wait_for(lambda: all(seat.settled for seat in self._seats.values()), timeout)

    # -- painting ---------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._job()) is not None:
            seat, number, settings, sharp = job
            try:
                self._show(seat.visitor, settings, sharp)
            except Exception as error:  # one picture that fails must not end the viewer
                self.words.content = f"cannot render: {error}"
            with self._wake:
                # The change that was painted, not the last one: one that came meanwhile is still wanted.
                seat.shown, seat.sharp = number, sharp
                self._wake.notify_all()

    def _job(self) -> tuple[_Seat, int, Settings, bool] | None:
        """Wait for (visitor, number of the change, settings as of it, sharply); ``None`` at the end."""
        with self._wake:
            while not self._closed:
                if (found := self._next()) is not None:
                    seat, sharp = found
                    return seat, seat.wanted, self.settings, sharp
                self._wake.wait(None if all(seat.settled for seat in self._seats.values()) else REST / 5)
        return None

    def _next(self) -> tuple[_Seat, bool] | None:
        """Whom to paint for, and whether sharply: who waits longest for a change first, then those at rest."""
        moving = [seat for seat in self._seats.values() if seat.shown != seat.wanted]
        if moving:
            return min(moving, key=lambda seat: seat.since), False
        now = time.monotonic()
        resting = (seat for seat in self._seats.values() if not seat.sharp and now - seat.since >= REST)
        return next(((seat, True) for seat in resting), None)

    @property
    def settings(self) -> Settings:
        """What the controls say now."""
        with self._wake:
            edits = {name: float(slider.value) for name, slider in self.edits.items()}
            return Settings(
                self._edited(edits),
                float(self.strength.value),
                tuple(float(slider.value) for slider in self.expressions.values()),
                self.sizes[self.size.value],
                bool(self.solid.value),
                tuple(edits.values()),
                tuple(float(slider.value) for slider in self.light.values()) or (0.0, 0.0, 0.0),  # type: ignore[arg-type]
            )

    def _edited(self, edits: dict[str, float]) -> Subject:
        """The subject with these edits: the same one until something changes."""
        if self.directions is None or not any(edits.values()):
            return self._subject
        key = self._subject.id, edits
        if self._edit is None or self._edit[0] != key:
            self._edit = key, self._subject.edited(self.directions, edits)
        return self._edit[1]

    def _show(self, visitor: Visitor, settings: Settings, sharp: bool) -> None:
        if settings.solid:
            if sharp:
                self._show_mesh(settings)
            visitor.scene.set_background_image(None)
            return
        self._hide_mesh()
        image, words = self.paint(settings, pose_of(visitor.camera), settings.resolution if sharp else None)
        self.words.content = words
        visitor.scene.set_background_image(image, format="jpeg", jpeg_quality=92 if sharp else 80)

    def _show_mesh(self, settings: Settings) -> None:
        subject = settings.subject
        key = settings.head
        if self._mesh[0] != key:
            import torch

            from models.generators.views import render_views
            from models.rendering.mesh import fuse, mesh_cameras, to_glb

            self.words.content = "making the mesh ..."
            generator, code = subject.styled(settings.strength), torch.tensor([settings.expression])
            mesh = generator.mesh(subject.latents, code if code.shape[1] else None)
            if mesh is None:
                camera = mesh_cameras(self.rig)
                seen = render_views(generator, subject.latents, camera, code, 2 * subject.generator.resolution)
                mesh = fuse(seen, camera, self.rig, MESH_SIZE)
            self._hide_mesh()
            scene = self.server.scene
            self._mesh = key, scene.add_glb("/head", to_glb(mesh), cast_shadow=False, receive_shadow=False)
            self.words.content = f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles"

    def _hide_mesh(self) -> None:
        if self._mesh[1] is not None:
            self._mesh[1].remove()
        self._mesh = None, None


def widen(image: Any, aspect: float) -> Any:
    """A square uint8 image (S, S, 3) as wide as ``aspect`` says, its middle unchanged, its borders drawn out.

    A window narrower than high loses the sides.
    """
    import numpy as np

    side = image.shape[0]
    width = max(round(side * aspect), 1)
    if width <= side:
        start = (side - width) // 2
        return image[:, start : start + width]
    left = (width - side) // 2
    return np.pad(image, ((0, 0), (left, width - side - left), (0, 0)), mode="edge")


def _listen(host: str, port: int) -> Doorkeeper:
    """Who keeps the door of the first free port.

    Raises:
        UserError: when there is none, or ``host`` is not an address of this machine.
    """
    from models.errors import UserError

    try:
        if not 0 <= port < 1 << 16:
            raise OverflowError("a port is a number from 0 to 65535")
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
        found = free_port(host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}") from error
    if not ipaddress.ip_address(address).is_loopback:
        print(f"view: warning: {host} can be reached from other machines, by who knows the address below", flush=True)
    return Doorkeeper(host, found)
