"""Shows what an artifact holds: turntables, sheets, expressions, depth, camera, meshes, and a page with all of it."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.artifact import Export, load
from models.camera import Camera
from models.errors import UserError
from models.files import atomic_write
from models.generators.baked import BakedHead
from models.generators.base import Generator
from models.generators.views import render_views
from models.heads.directions import directions_for, in_words
from models.heads.index import Entry, subject_index
from models.heads.layers import layers_of
from models.heads.subjects import Subject, Subjects
from models.image import write_image, write_video
from models.names import item_id
from models.relief.pictures import moving_light
from models.rendering.layers import write_layers
from models.rendering.mesh import Mesh, fuse, mesh_cameras, write_mesh
from models.rendering.output import Rendering
from models.rendering.raster import draw
from models.rendering.relief import relit
from models.rendering.sheets import (
    depth_colours,
    enlarge,
    normal_colours,
    over_white,
    pose_overlay,
    sheet,
    stacked_lines,
)
from stages.base.stage import GeneratorRef, Stage
from stages.gallery.page import Card, Figure, packed_mesh, page

log = logging.getLogger(__name__)

STRENGTHS = (0.35, 0.7, 1.0)  # of one expression
BLEND = 0.7  # of each of two expressions
STYLE_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
VIEWS, VIEW_DEG = 7, 36  # their number, and how far they go to each side
MESH_VIEWS_DEG = ((-90, 0), (-40, 10), (0, 0), (40, 10), (90, 0))
GIF_SIDE = 256
POSE_SIDE = 512
LAYERS_A_ROW = 8

_BOTH = "Before stylisation, and after."

Row = list[tuple[str, Tensor | None]]


@dataclass
class Exhibit:
    """What is shown of one subject: its files, and the card that shows them on the page."""

    folder: Path
    card: Card
    panels: dict[str, Tensor] = field(default_factory=dict)

    def name(self, kind: str, suffix: str) -> str:
        """The media file's name."""
        return f"{kind}_{self.card.id}{suffix}"

    def picture(self, kind: str, title: str, text: str, image: Tensor) -> None:
        """Write a picture and show it on the card."""
        write_image(self.folder / self.name(kind, ".png"), image)
        self.card.figures.append(Figure(self.name(kind, ".png"), title, text, image.shape[-1], image.shape[-2]))

    def video(self, kind: str, title: str, text: str, frames: Tensor, fps: int) -> None:
        """Write a video (T, 3, H, W) and show it on the card."""
        write_video(self.folder / self.name(kind, ".mp4"), frames, fps)
        self.card.figures.append(Figure(self.name(kind, ".mp4"), title, text, frames.shape[-1], frames.shape[-2]))


class PresentStage(Stage):
    """Renders media of every subject of an artifact; ``galatea present predict``.

    The result is an artifact of media alone: ``media/index.html`` shows everything and needs nothing else. Subjects
    are shared out over ranks.

    Args:
        result: the artifact, and the name of its original generator.
        items: ids of the artworks to show, a list or "[ann, 00012]" as a text; all when null.
        samples: heads drawn from a prior, which holds no artworks.
        seed: of that draw.
        frames, fps: of the turntable, a closed loop.
        yaw_deg, pitch_deg: how far the turntable sways.
        scale: pictures are rendered this many times larger than the generator's resolution, where it allows.
        video_size: side of the turntable, pixels; smaller renderings are enlarged.
        tile: side of a picture in a sheet, pixels.
        mesh_size: voxels along a side of the mesh's grid; 0 leaves meshes out.
        expressions: at most so many are shown, of generators that have more.
        directions: artifact of the stage ``directions`` along which heads are edited.
        edits: strengths by its names, 1 and -1 at the ends of the useful range; shown beside the unedited head.
        layers: by latent group how many of its first codes are edited, and of no other group; all when null.
    """

    name = "present"

    def __init__(
        self,
        result: GeneratorRef,
        items: list[str] | str | None = None,
        samples: int = 3,
        seed: int = 0,
        frames: int = 60,
        fps: int = 24,
        yaw_deg: float = 36.0,
        pitch_deg: float = 8.0,
        scale: int = 2,
        video_size: int = 384,
        tile: int = 192,
        mesh_size: int = 160,
        expressions: int = 8,
        directions: str | None = None,
        edits: dict[str, float] | None = None,
        layers: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        if min(samples, frames, fps, scale, expressions) < 1 or min(video_size, tile) < 32:
            raise UserError(
                "present: samples, frames, fps, scale and expressions must be at least 1, video_size and tile 32"
            )
        if mesh_size and mesh_size < 32:
            raise UserError(f"present: mesh_size is {mesh_size}, it must be 0 or at least 32")
        self.result, self.items, self.samples, self.seed = result, texts(items), samples, seed
        self.frames, self.fps = frames, fps
        self.sway = math.radians(yaw_deg), math.radians(pitch_deg)
        self.scale, self.video_size, self.tile, self.mesh_size = scale, video_size, tile, mesh_size
        self.expressions = expressions
        if bool(edits) != bool(directions):
            raise UserError("present: edits are along directions: --model.edits and --model.directions need each other")
        if layers is not None and not edits:
            raise UserError("present: layers are of edits: --model.layers needs --model.edits and --model.directions")
        self.directions_from, self.edits, self.layers = directions, edits or {}, layers
        self._panels: dict[str, Tensor] = {}

    def build_model(self) -> None:
        self.inputs["result"] = load(self.result.path)
        self._subjects = [Subjects(self.inputs["result"], self.result.module, self.samples, self.seed)]
        self._ids = self._subjects[0].choose(self.items)
        self.directions = None
        if self.directions_from is not None:
            self.inputs["directions"] = load(self.directions_from)
            self.directions = directions_for(self.inputs["directions"], self._subjects[0])
            self.directions.check(self.edits, self.layers)

    def predict_dataloader(self) -> Sequence[str]:
        """The ids of this rank's subjects, "" where other ranks have one more."""
        rank, world = self.global_rank, self.trainer.world_size
        rounds = math.ceil(len(self._ids) / world)
        return [self._ids[i] if i < len(self._ids) else "" for i in range(rank, rounds * world, world)]

    @torch.no_grad()
    def predict_step(self, batch: str, batch_idx: int) -> str:
        if not batch:
            return batch
        subject = self._subjects[0][batch]
        for generator in {subject.generator, subject.original} - {None}:
            generator.to(self.device)  # type: ignore[union-attr]
        subject.latents, subject.expression = subject.latents.to(self.device), subject.expression.to(self.device)
        exhibit = self.exhibit(subject, self.out / "items" / subject.id)
        self._panels = self._panels or exhibit.panels
        with atomic_write(exhibit.folder / "card.json") as file:
            file.write_text(exhibit.card.to_json())
        return batch

    def exhibit(self, subject: Subject, folder: Path) -> Exhibit:
        """Write all media of one subject into ``folder``."""
        shutil.rmtree(folder, ignore_errors=True)
        show = _Show(subject, self.scale, self.device)
        if self.directions is not None:
            edited = subject.edited(self.directions, self.edits, self.layers)
            show.edited = _Show(edited, self.scale, self.device)
        exhibit = Exhibit(folder, Card(subject.id, _facts(subject)))
        if subject.generator.is_3d:
            self._turntable(show, exhibit)
            self._light(show, exhibit)
            self._views(show, exhibit)
        else:
            self._picture(show, exhibit)
        self._styles(show, exhibit)
        self._expressions(show, exhibit)
        if subject.generator.is_3d:
            self._lines(show, exhibit)
            self._baked(show, exhibit)
            self._shape(show, exhibit)
            self._pose(show, exhibit)
        for note in exhibit.card.notes:
            log.info("%s: %s", subject.id, note)
        return exhibit

    # -- media ------------------------------------------------------------------------------------

    def _turntable(self, show: _Show, exhibit: Exhibit) -> None:
        frames = show(show.rig.turntable(self.frames, *self.sway)).image
        video = enlarge(frames, max(self.video_size, frames.shape[-1]))
        write_video(exhibit.folder / exhibit.name("turntable", ".mp4"), video, self.fps)
        write_video(
            exhibit.folder / exhibit.name("turntable", ".gif"), enlarge(frames[::2], GIF_SIDE), self.fps // 2 or 1
        )
        write_image(exhibit.folder / exhibit.name("poster", ".png"), video[0])
        exhibit.card.video = exhibit.name("turntable", ".mp4")
        exhibit.card.poster = exhibit.name("poster", ".png")
        exhibit.card.downloads += [exhibit.name("turntable", ".mp4"), exhibit.name("turntable", ".gif")]
        exhibit.panels["turntable"] = video
        if show.edited is not None:
            edited = enlarge(show.edited(show.rig.turntable(self.frames, *self.sway)).image, video.shape[-1])
            text = f"As it is, and with {in_words(self.edits)}."
            exhibit.video("edited", "Edits, turning", text, torch.cat([video, edited], -1), self.fps)
        if (before := show.before()) is not None:
            other = enlarge(before(show.rig.turntable(self.frames, *self.sway)).image, video.shape[-1])
            exhibit.video("both", "Turning, side by side", _BOTH, torch.cat([other, video], -1), self.fps)

    def _light(self, show: _Show, exhibit: Exhibit) -> None:
        """A light that moves, where heads have colours without their own."""
        heads = [head for head in (show.before(), show) if head is not None and head.subject.generator.relightable]
        if not heads:
            return
        light = moving_light(self.frames)
        pictures = [relit(head(show.camera(0.0)), light) for head in heads]
        side = max(self.video_size, pictures[0].shape[-1])
        text = "From the front, under a light that goes around." + (f" {_BOTH}" if len(heads) > 1 else "")
        frames = torch.cat([enlarge(picture, side) for picture in pictures], -1)
        exhibit.video("light", "Light, moving", text, frames, self.fps)

    def _picture(self, show: _Show, exhibit: Exhibit) -> None:
        """All there is to see of a 2D generator's subject."""
        exhibit.card.notes.append("This generator is 2D: it has no camera, so that there is no turntable and no mesh.")
        row = self._beside(show, exhibit)
        if show.edited is not None:
            row.append((f"edited: {in_words(self.edits)}", show.edited(None).image[0]))
        write_image(exhibit.folder / exhibit.name("poster", ".png"), show(None).image[0])
        exhibit.card.poster = exhibit.name("poster", ".png")
        contact = sheet([row], self.tile)
        exhibit.picture("views", "Picture", "The head as the generator paints it.", contact)
        exhibit.panels["views"] = contact

    def _beside(self, show: _Show, exhibit: Exhibit) -> Row:
        """The input, others of it, its anchor and what became of it, from the input's view; of a sample its picture."""
        subject, row = show.subject, []
        if subject.artwork is not None:
            write_image(exhibit.folder / exhibit.name("reference", ".png"), subject.artwork)
            exhibit.card.reference = exhibit.name("reference", ".png")
            row.append(("input", subject.artwork))
        row.extend(subject.pictures.items())
        if subject.original is not None:
            row.append(("anchor", show(subject.camera, subject.original).image[0]))
        return [*row, (subject.caption, show(subject.camera).image[0])]

    def _views(self, show: _Show, exhibit: Exhibit) -> None:
        subject, rig = show.subject, show.rig
        reach = min(math.radians(VIEW_DEG), rig.yaw_max)
        angles = rig.yaw_mean + torch.linspace(-reach, reach, VIEWS)
        camera = rig.camera(angles, rig.pitch_mean)
        seen = show(camera)
        captions = [f"{degrees:+d}°" if (degrees := round(math.degrees(a))) else "front" for a in angles.tolist()]
        rows: list[Row] = [list(zip(captions, seen.image, strict=True))]
        labels = ["Turned"]
        if subject.camera is not None:
            rows.insert(0, self._beside(show, exhibit))
            labels.insert(0, "Same view")
        if subject.original is not None:
            rows.append(list(zip(captions, show(camera, subject.original).image, strict=True)))
            labels[1:] = ["Stylised, turned", "Before stylisation"]
        contact = sheet(rows, self.tile, labels)
        exhibit.picture("views", "Views", f"The head turned by up to {math.degrees(reach):.0f}° to each side.", contact)
        exhibit.panels["views"] = contact
        if show.edited is not None:
            self._edits(show, exhibit, list(zip(captions, seen.image, strict=True)), camera)
        if seen.depth is not None and seen.alpha is not None:
            maps: list[Row] = [list(zip(captions, depth_colours(seen.depth, seen.alpha), strict=True))]
            if seen.normals is not None:
                normals = normal_colours(seen.normals, seen.alpha, camera.to(seen.normals.device))
                maps.append(list(zip(captions, normals, strict=True)))
            text = "What the generator knows of the shape: near is warm, far is cool; normals as seen by the camera."
            exhibit.picture("depth", "Depth and normals", text, sheet(maps, self.tile, ["Depth", "Normals"]))

    def _edits(self, show: _Show, exhibit: Exhibit, turned: Row, camera: Camera) -> None:
        """The head as it is and edited, one below the other: from the input's view, where there is one, and turned.

        Args:
            turned: the head as it is, seen by ``camera``.
        """
        assert show.edited is not None
        subject, captions = show.subject, [caption for caption, _ in turned]
        rows: list[Row] = [turned, list(zip(captions, show.edited(camera).image, strict=True))]
        if subject.camera is not None:
            for row, head in zip(rows, (show, show.edited), strict=True):
                row.insert(0, ("the input's view", head(subject.camera).image[0]))
        if subject.artwork is not None:
            for row, picture in zip(rows, (subject.artwork, None), strict=True):
                row.insert(0, ("input", picture))
        text = f"As it is, and with {in_words(self.edits)}, from the same cameras."
        picture = sheet(rows, self.tile, ["As it is", f"Edited: {in_words(self.edits)}"])
        exhibit.picture("edits", "Edits", text, picture)

    def _styles(self, show: _Show, exhibit: Exhibit) -> None:
        if not show.subject.blends:
            return
        camera = show.camera(0.0, 0.45)
        seen = [show(camera, show.subject.styled(strength)).image for strength in STYLE_STRENGTHS]
        captions = ["original", *(f"{s:.0%}" for s in STYLE_STRENGTHS[1:])]
        rows: list[Row] = [list(zip(captions, images, strict=True)) for images in zip(*seen, strict=True)]
        text = "Between the weights of the original generator and of the stylised one, and a little beyond."
        exhibit.picture("strength", "Style strength", text, sheet(rows, self.tile))

    def _expressions(self, show: _Show, exhibit: Exhibit) -> None:
        names = show.subject.generator.expressions
        if not names:
            exhibit.card.notes.append("This generator has no expressions.")
            return
        left_out = show.subject.left_out
        for name, why in left_out.items():
            exhibit.card.notes.append(f"{_words(name).capitalize()} is not shown: {why}.")
        shown = [i for i, name in enumerate(names) if name not in left_out]
        if len(shown) > self.expressions:
            exhibit.card.notes.append(f"Of {len(shown)} expressions the first {self.expressions} are shown.")
            shown = shown[: self.expressions]
        if not shown:
            return
        names = [names[i] for i in shown]
        count, own = len(names), show.subject.expression
        codes = [own, *(_with(own, {i: strength}) for i in shown for strength in STRENGTHS)]
        pairs = [(i, (i + 1) % count) for i in range(count)] if count > 2 else [(0, 1)][: count - 1]
        codes += [_with(own, {shown[a]: BLEND, shown[b]: BLEND}) for a, b in pairs]
        images = show(show.camera(*[0.25] * len(codes)), expression=torch.cat(codes)).image
        neutral, strips = images[0], images[1 : 1 + count * len(STRENGTHS)].unflatten(0, (count, len(STRENGTHS)))
        rows: list[Row] = []
        for i in range(0, count, 2):  # two expressions side by side
            row: Row = []
            for name, strip in zip(names[i : i + 2], strips[i : i + 2], strict=True):
                row.append(("as it is", neutral))
                row += [(f"{_words(name)} {s:.0%}", image) for s, image in zip(STRENGTHS, strip, strict=True)]
            rows.append(row)
        blends: Row = [
            (f"{_words(names[a])} + {_words(names[b])}", image)
            for (a, b), image in zip(pairs, images[len(images) - len(pairs) :], strict=True)
        ]
        if blends:
            rows.append(blends)
        labels = [""] * (len(rows) - 1) + ["Two at once"] if blends else []
        text = "Each expression at three strengths, and pairs of them."
        exhibit.picture("expressions", "Expressions", text, sheet(rows, self.tile, labels))
        if (before := show.before()) is not None:
            code = torch.cat([own, *(_with(own, {i: 1.0}) for i in shown)])
            captions = ["as it is", *map(_words, names)]
            seen = [head(head.camera(*[0.25] * len(code)), expression=code).image for head in (before, show)]
            both: list[Row] = [list(zip(captions, images, strict=True)) for images in seen]
            picture = sheet(both, self.tile, ["Before", "Stylised"])
            exhibit.picture("beside", "Expressions, side by side", "Each in full, of the same code.", picture)

    def _lines(self, show: _Show, exhibit: Exhibit) -> None:
        seen = show(show.rig.orbit(max(self.frames // 2, 2)))
        if seen.alpha is None:
            return
        marked, stack = stacked_lines(seen.image, seen.alpha, 2 * self.tile)
        text = "One row of the picture over a sweep from left to right: smooth strips mean that the head holds still."
        row: Row = [("the row", marked), ("from the left (top) to the right", stack)]
        exhibit.picture("lines", "Stacked lines", text, sheet([row], 2 * self.tile))

    def _baked(self, show: _Show, exhibit: Exhibit) -> None:
        """What a head's finished manifolds are good for."""
        head = show.baked()
        if head is None:
            exhibit.card.notes.append(
                "This generator has no manifolds that can be baked: there is no dolly zoom and no layered mesh."
            )
            return
        frames = head.show(show.rig.dolly(self.frames).to(self.device), show.resolution).image
        video = enlarge(frames, max(self.video_size, frames.shape[-1]))
        text = "The camera goes away and comes close; its field of view keeps the head as large as it is."
        exhibit.video("dolly", "Dolly zoom", text, video, self.fps)
        if not self.mesh_size:
            return
        layers = layers_of(head)
        if not layers:
            exhibit.card.notes.append("There is no layered mesh: the manifolds are transparent throughout.")
            return
        write_layers(exhibit.folder / exhibit.name("layers", ".glb"), layers)
        exhibit.card.downloads.append(exhibit.name("layers", ".glb"))
        tiles: Row = [
            (f"{i + 1}", over_white(texture[:3], texture[3:])) for i, texture in enumerate(head.textures.cpu())
        ]
        rows: list[Row] = [tiles[i : i + LAYERS_A_ROW] for i in range(0, len(tiles), LAYERS_A_ROW)]
        text = "The head flattened, from the outermost manifold to the innermost: textures of the layered GLB."
        exhibit.picture("layers", "Manifolds", text, sheet(rows, self.tile))

    def _shape(self, show: _Show, exhibit: Exhibit) -> None:
        if not self.mesh_size:
            return
        surface = show.mesh()
        if surface is not None:
            self._surfaces(show, exhibit)
            self._show_mesh(show, exhibit, surface)
            return
        camera = mesh_cameras(show.rig)
        seen = show(camera)
        if seen.depth is None or seen.alpha is None:
            exhibit.card.notes.append("This generator renders no depth, so that there is no mesh.")
            return
        try:
            mesh = fuse(seen, camera, show.rig, self.mesh_size)
        except UserError as error:
            exhibit.card.notes.append(f"There is no mesh: {error}.")
            return
        self._show_mesh(show, exhibit, mesh)

    def _surfaces(self, show: _Show, exhibit: Exhibit) -> None:
        """Meshes of a head that is a surface, to be taken along: with each expression, and as it was before."""
        before, names = show.before(), show.subject.generator.expressions
        found = {"mesh_before": None if before is None else before.mesh()}
        for index, name in enumerate(names):
            if name not in show.subject.left_out:
                code, kind = _with(show.subject.expression, {index: 1.0}), item_id(f"{name}.png")
                found[f"mesh_{kind}"] = show.mesh(code)
                found[f"mesh_before_{kind}"] = None if before is None else before.mesh(code)
        for kind, mesh in found.items():
            if mesh is not None:
                write_mesh(exhibit.folder / exhibit.name(kind, ".glb"), mesh)
                exhibit.card.downloads.append(exhibit.name(kind, ".glb"))

    def _show_mesh(self, show: _Show, exhibit: Exhibit, mesh: Mesh) -> None:
        for suffix in (".glb", ".ply"):
            write_mesh(exhibit.folder / exhibit.name("mesh", suffix), mesh)
            exhibit.card.downloads.append(exhibit.name("mesh", suffix))
        with atomic_write(exhibit.folder / exhibit.name("mesh", ".js")) as file:
            file.write_text(packed_mesh(exhibit.card.id, mesh, show.rig))
        exhibit.card.mesh = exhibit.name("mesh", ".js")
        exhibit.picture(
            "mesh",
            "Mesh",
            f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles.",
            self._mesh_sheet(mesh, show),
        )

    def _mesh_sheet(self, mesh: Mesh, show: _Show) -> Tensor:
        yaw, pitch = torch.deg2rad(torch.tensor(MESH_VIEWS_DEG, dtype=torch.float32)).unbind(1)
        camera = show.rig.camera(yaw, pitch)
        captions = [f"{yaw:+d}°" if yaw else "front" for yaw, _ in MESH_VIEWS_DEG]
        pictures = [draw(mesh, camera, self.tile, coloured=coloured, supersample=1).image for coloured in (True, False)]
        return sheet([list(zip(captions, images, strict=True)) for images in pictures], self.tile)

    def _pose(self, show: _Show, exhibit: Exhibit) -> None:
        subject = show.subject
        if subject.camera is None or subject.artwork is None:
            return
        alpha = show(subject.camera).alpha
        outline = None if alpha is None else alpha[0]
        picture = pose_overlay(subject.artwork, show.rig, subject.camera, outline, POSE_SIDE)
        text = "The camera of the input: axes of the head, and in orange the outline of the head in 3D."
        exhibit.picture("pose", "Camera", text, picture)

    # -- results ----------------------------------------------------------------------------------

    def panels(self) -> dict[str, Tensor]:
        return self._panels

    def export(self) -> Export:
        cards, media = [], {}
        for identity in self._ids:
            folder = self.out / "items" / identity
            cards.append(Card.from_json((folder / "card.json").read_text("utf-8")))
            media |= {p.name: p for p in sorted(folder.iterdir()) if p.name != "card.json"}
        content: dict[str, Any] = {**media, "index.html": page(cards, self.inputs["result"]).encode()}
        entries = [Entry(card.id, codes=None, artwork=card.reference) for card in cards]
        return Export(media=content, extra={"items": [card.id for card in cards], **subject_index(entries)})

    def on_predict_end(self) -> None:
        # The callbacks, which export, come first.
        if self.trainer.is_global_zero:
            shutil.rmtree(self.out / "items", ignore_errors=True)
            print(f"gallery: {self.out / 'artifact' / 'media' / 'index.html'}", flush=True)


def texts(given: Sequence[str] | str | None) -> list[str] | None:
    """A list of texts, or one text, ``[00012, 1e5]``: what was written, where YAML would read numbers."""
    if isinstance(given, str):
        return [word for part in given.strip().strip("[]").split(",") if (word := part.strip().strip("'\""))]
    return None if given is None else list(given)


class _Show:
    """Renders one subject, larger than the generator's resolution where it allows.

    Attributes:
        edited: the same with edited codes, where these are asked for.
    """

    edited: _Show | None = None

    def __init__(self, subject: Subject, scale: int, device: torch.device) -> None:
        self.subject, self.scale, self.device = subject, scale, device
        self.rig, self.resolution = subject.generator.rig, scale * subject.generator.resolution

    def camera(self, *yaw: float) -> Camera | None:
        """Cameras at these angles from the mean, radians, or the nearest that the generator knows; ``None`` in 2D."""
        if not self.subject.generator.is_3d:
            return None
        angles = self.rig.yaw_mean + torch.tensor(yaw)
        return self.rig.camera(*self.rig.within(angles, torch.zeros_like(angles)))

    def before(self) -> _Show | None:
        """The head by its original generator, where that is another one, and in 3D."""
        original = self.subject.original
        if original is None or not original.is_3d:
            return None
        return _Show(replace(self.subject, generator=original, original=None), self.scale, self.device)

    def mesh(self, expression: Tensor | None = None) -> Mesh | None:
        """The head's surface, with an expression (1, E) in place of its own; None where it is not known as one."""
        code = self.subject.expression if expression is None else expression
        return self.subject.generator.mesh(self.subject.latents, code if code.shape[1] else None)

    def baked(self) -> BakedHead | None:
        """The head on its manifolds, as finely as it is rendered; ``None`` where it has none."""
        return self.subject.baked(self.resolution)

    def __call__(
        self, camera: Camera | None, generator: Generator | None = None, expression: Tensor | None = None
    ) -> Rendering:
        return render_views(
            generator or self.subject.generator,
            self.subject.latents,
            camera if camera is None else camera.to(self.device),
            self.subject.expression if expression is None else expression,
            self.resolution,
        )


def _with(own: Tensor, changes: dict[int, float]) -> Tensor:
    """The code (1, E) with some coefficients set."""
    code = own.clone()
    for index, value in changes.items():
        code[:, index] = value
    return code


def _words(name: str) -> str:
    return name.replace("_", " ")


def _facts(subject: Subject) -> dict[str, str]:
    facts = {}
    if subject.camera is not None:
        yaw, pitch = (round(math.degrees(float(a))) for a in subject.generator.rig.angles(subject.camera))
        facts["camera"] = f"yaw {yaw:+d}°, pitch {pitch:+d}°"
    facts["generator"] = type(subject.generator).__name__
    facts["resolution"] = f"{subject.generator.resolution} px"
    return facts
