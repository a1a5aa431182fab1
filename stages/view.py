"""``galatea view``: an artifact's heads, live in the browser.

viser shows pictures and reports the visitor's camera; every picture is rendered here. A worker renders the newest
request of each visitor, small while things move and sharp once they rest, so that dragging stays fluid.
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stages.arguments import Parser

REST = 0.25  # seconds without change after which the sharp picture is rendered
ZOOM = (0.55, 1.8)  # nearest and farthest place of the visitor's camera, in radii of the rig
MESH_SIZE = 112


def main(arguments: Sequence[str]) -> None:
    """Run the command with ``arguments``, the ones after ``galatea view``, until it is interrupted.

    Raises:
        UserError: for a wrong option, an artifact that holds no head, or an address that cannot be used.
    """
    parser = Parser("galatea view", "Look at the heads of an artifact, live in the browser.")
    parser.add_argument("artifact", metavar="ARTIFACT", help="its folder, or the run that made it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s: this machine)")
    parser.add_argument("--port", type=int, default=8080, help="the first free one from here (default: %(default)s)")
    parser.add_argument("--item", metavar="ID", help="the artwork to begin with")
    parser.add_argument("--module", default="generator", help="the original generator (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="heads drawn from a prior (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: %(default)s)")
    options = parser.parse_args(list(arguments))

    from models.artifact import load  # after --help, which needs no torch
    from models.subjects import Subjects

    subjects = Subjects(load(options.artifact), options.module, options.samples, options.seed)
    if options.item is not None:
        subjects.choose([options.item])
    with Viewer(subjects, options.host, options.port, options.item) as viewer:
        print(f"view: http://{options.host}:{viewer.port} (Ctrl-C ends it)", flush=True)
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


class Visitor(Protocol):
    """The part of viser's client that is used."""

    client_id: int
    camera: Any
    scene: Any


def pose_of(camera: Any) -> Pose:
    """The pose of viser's camera.

    Its scene is told that y is up, so that world points agree with ours; its camera axes (OpenCV) are not needed, as
    the orbit keeps the horizon level.
    """
    position, look_at = ((float(x), float(y), float(z)) for x, y, z in (camera.position, camera.look_at))
    return Pose(position, look_at, float(camera.fov), float(camera.aspect))


def rig_camera(pose: Pose, rig: Any) -> Any:
    """Our camera for a visitor's pose: on the sphere and within the angles that the generator knows.

    Distance becomes focal length, because a generator's depth range is that of its own rig.
    """
    import torch

    from models.camera import Camera

    offset = torch.tensor(pose.position) - torch.tensor(pose.look_at)
    distance = max(float(offset.norm()), 1e-6)
    yaw = math.atan2(float(offset[0]), float(offset[2]))
    pitch = math.asin(max(-1.0, min(1.0, float(offset[1]) / distance)))
    yaw, pitch = max(-rig.yaw_max, min(rig.yaw_max, yaw)), max(-rig.pitch_max, min(rig.pitch_max, pitch))
    focal = 1 / (2 * math.tan(pose.fov / 2)) * rig.radius / distance
    limit = rig.radius / (4 * rig.focal)  # how far the pivot may be dragged
    pivot = [p + max(-limit, min(limit, x - p)) for x, p in zip(pose.look_at, rig.pivot, strict=True)]
    camera = rig.replace(focal=focal, pivot=tuple(pivot)).camera(yaw, pitch)
    return Camera(camera.cam2world, camera.intrinsics)


class Viewer:
    """A viser server with its controls, and the worker that paints for it.

    Args:
        subjects: what can be looked at.
        host, port: where to listen; the next free port is taken.
        item: the first subject.

    Raises:
        UserError: when ``host`` is not an address of this machine.
    """

    def __init__(self, subjects: Any, host: str = "127.0.0.1", port: int = 8080, item: str | None = None) -> None:
        _check_address(host, port)
        logging.getLogger("websockets").setLevel(logging.CRITICAL)  # browsers leave in many ways
        import viser

        self.subjects = subjects
        self.rig = subjects.generator.rig
        with contextlib.redirect_stdout(io.StringIO()):  # its banner says what we print
            self.server = viser.ViserServer(host=host, port=port, label="Galatea", verbose=False)
        self.port = self.server.get_port()
        self.visitors: dict[int, Visitor] = {}
        self._subject = subjects[item or subjects.ids[0]]
        self._wanted: dict[int, float] = {}  # visitor -> time of the last change
        self._shown: dict[int, tuple[float, bool]] = {}  # visitor -> change that is shown, and whether sharply
        self._mesh: tuple[object, Any] = (None, None)  # settings, and the mesh made with them
        self._wake = threading.Condition()
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
        start.position = (rig.pivot[0], rig.pivot[1], rig.pivot[2] + rig.radius)
        start.fov = 2 * math.atan(0.5 / rig.focal)
        # No share button: it would open a tunnel to the outside.
        self.server.gui.configure_theme(show_share_button=False, brand_color=(180, 83, 42))
        self.server.gui.main_panel.dock_right()

    def _controls(self) -> None:
        gui, subjects = self.server.gui, self.subjects
        native = subjects.generator.resolution
        self.item = gui.add_dropdown("Head", tuple(subjects.ids), initial_value=self._subject.id)
        self.sizes = {f"{native * scale} px": native * scale for scale in (1, 2, 4)}
        self.size = gui.add_dropdown("Resolution", tuple(self.sizes), initial_value=f"{2 * native} px")
        self.strength = gui.add_slider("Style strength", 0.0, 1.5, 0.05, 1.0)
        self.strength.visible = self._subject.original is not None
        self.expressions: dict[str, Any] = {}
        if subjects.generator.expressions:
            with gui.add_folder("Expression"):
                for name in subjects.generator.expressions:
                    self.expressions[name] = gui.add_slider(name.replace("_", " "), -0.5, 1.5, 0.05, 0.0)
        self.solid = gui.add_checkbox("Show the mesh", False)
        self.reset = gui.add_button("Reset")
        self.words = gui.add_markdown("")
        self._settle()
        self.item.on_update(lambda _: self._change_item())
        for control in (self.size, self.strength, self.solid, *self.expressions.values()):
            control.on_update(lambda _: self.changed())
        self.reset.on_click(lambda _: self._reset())

    def _settle(self) -> None:
        """Controls as the subject has them."""
        self.strength.value = 1.0
        for slider, value in zip(self.expressions.values(), self._subject.expression[0].tolist(), strict=True):
            slider.value = round(max(-0.5, min(1.5, value)) * 20) / 20

    def _change_item(self) -> None:
        with self._wake:
            self._subject = self.subjects[self.item.value]
            self.strength.visible = self._subject.original is not None
        self._settle()
        self.changed()

    def _reset(self) -> None:
        self._settle()
        for visitor in list(self.visitors.values()):
            start = self.server.initial_camera
            visitor.camera.position, visitor.camera.look_at = start.position, start.look_at
            visitor.camera.fov = start.fov
        self.changed()

    def welcome(self, visitor: Visitor) -> None:
        """A browser has connected."""
        near, far = (self.rig.radius * zoom for zoom in ZOOM)
        visitor.camera.min_orbit_distance, visitor.camera.max_orbit_distance = near, far
        visitor.camera.on_update(lambda _: self.changed(visitor.client_id))
        self.visitors[visitor.client_id] = visitor
        self.changed(visitor.client_id)

    def farewell(self, visitor: Visitor) -> None:
        """A browser has left."""
        self.visitors.pop(visitor.client_id, None)
        with self._wake:
            self._wanted.pop(visitor.client_id, None)
            self._shown.pop(visitor.client_id, None)

    def changed(self, visitor: int | None = None) -> None:
        """Ask for a new picture, for one visitor or for all; returns at once."""
        now = time.monotonic()
        with self._wake:
            for identity in [visitor] if visitor is not None else list(self.visitors):
                self._wanted[identity] = now
            self._wake.notify_all()

    # -- painting ---------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._wake:
                job = self._next()
                while job is None and not self._closed:
                    self._wake.wait(0.05 if self._wanted else None)
                    job = self._next()
                if self._closed or job is None:
                    return
                identity, stamp, sharp = job
                visitor = self.visitors.get(identity)
            if visitor is not None:
                try:
                    self._paint(visitor, sharp)
                except Exception as error:  # one picture that fails must not end the viewer
                    self.words.content = f"cannot render: {error}"
            with self._wake:
                self._shown[identity] = (stamp, sharp)

    def _next(self) -> tuple[int, float, bool] | None:
        """(visitor, change, sharply) to paint: pictures in motion first, then those at rest."""
        now = time.monotonic()
        rest: tuple[int, float, bool] | None = None
        for identity, stamp in list(self._wanted.items()):
            shown, sharp = self._shown.get(identity, (-1.0, False))
            if shown < stamp:
                return identity, stamp, False
            if sharp:
                del self._wanted[identity]
            elif now - stamp > REST:
                rest = identity, stamp, True
        return rest

    def _paint(self, visitor: Visitor, sharp: bool) -> None:
        pose = pose_of(visitor.camera)
        if self.solid.value:
            if sharp:
                self._show_mesh()
            visitor.scene.set_background_image(None)
            return
        self._hide_mesh()
        image = self.render(pose, self.sizes[self.size.value] if sharp else None)
        visitor.scene.set_background_image(image, format="jpeg", jpeg_quality=92 if sharp else 80)

    def _settings(self) -> tuple[Any, float, Any]:
        """The subject, style strength and expression code that the controls say."""
        import torch

        code = torch.tensor([[float(slider.value) for slider in self.expressions.values()]])
        return self._subject, float(self.strength.value), code

    def render(self, pose: Pose, resolution: int | None = None) -> Any:
        """The picture for one pose, uint8 (H, W, 3), as wide as the window.

        Args:
            resolution: image side, native when ``None``.
        """
        from models.image_io import to_uint8
        from models.rendering.sheets import enlarge
        from models.subjects import look

        subject, strength, code = self._settings()
        camera = rig_camera(pose, self.rig)
        begin = time.monotonic()
        generator = subject.styled(strength)
        try:
            seen = look(generator, subject.latents, camera, code, resolution)
        except ValueError:  # a generator of one resolution only
            seen = look(generator, subject.latents, camera, code)
        image = seen.image[0]
        took = time.monotonic() - begin
        yaw, pitch = (round(math.degrees(float(angle))) for angle in (camera.yaw, camera.pitch))
        self.words.content = f"yaw {yaw:+d}°, pitch {pitch:+d}°, {image.shape[-1]} px, {1000 * took:.0f} ms"
        return widen(to_uint8(enlarge(image, max(image.shape[-1], 384))), pose.aspect)

    def _show_mesh(self) -> None:
        subject, strength, code = self._settings()
        key = (subject.id, strength, tuple(code[0].tolist()))
        if self._mesh[0] != key:
            from models.rendering.mesh import fuse, mesh_cameras
            from models.subjects import look

            self.words.content = "making the mesh ..."
            camera = mesh_cameras(self.rig)
            side = 2 * subject.generator.resolution
            mesh = fuse(
                look(subject.styled(strength), subject.latents, camera, code, side), camera, self.rig, MESH_SIZE
            )
            self._hide_mesh()
            self._mesh = key, self._add(mesh)
            self.words.content = f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles"

    def _add(self, mesh: Any) -> Any:
        import torch
        import trimesh

        colours = ((mesh.colours + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        solid = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
        solid.visual.vertex_colors = colours.numpy()  # type: ignore[union-attr]
        return self.server.scene.add_mesh_trimesh("/head", solid, cast_shadow=False, receive_shadow=False)

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


def _check_address(host: str, port: int) -> None:
    from models.errors import UserError

    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}") from error
    if not ipaddress.ip_address(address).is_loopback:
        print(f"view: warning: {host} can be reached from other machines, and there is no password", flush=True)
    try:
        with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise UserError(f"cannot listen on {host}: {error.strerror or error}") from error
