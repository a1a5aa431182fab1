"""The Lightning data module of the embedded world."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from datamodules.mannequins.dataset import CacheConfig, MannequinImages, Sample, build_cache
from datamodules.mannequins.envelope import envelope_field
from datamodules.mannequins.posed import PosedImages
from datamodules.mannequins.render import Truth, render
from datamodules.mannequins.scan import face_scan
from datamodules.mannequins.scene import CODE_DIM, CODE_NAMES, POSED_NAMES, Z_DIM, Z_NAMES, Scene, face_expression
from datamodules.mannequins.shapes import distance, named
from datamodules.mannequins.styles import PLAIN, STYLES
from datamodules.resumable import SplitDataModule
from models.camera import Camera
from models.errors import UserError
from models.metrics.scan import Scan
from models.rendering.compositing import field_gradient


class MannequinDataModule(SplitDataModule):
    """The embedded world's train, val and test sets, drawn once and kept in a cache.

    A batch is a :class:`models.batches.PortraitBatch` with all fields but ``name``.

    Args:
        train_subjects, val_subjects, test_subjects: from the beginning of each split.
        size: of the pictures, pixels.
        views_per_subject: V.
        batch_size: subjects per batch.
        styles: each view is drawn in one of them, at random; one by itself is a style.
        supersample: samples per pixel and axis.
        workers: loader processes.
        draw_workers: processes that draw a missing cache.
        compiled: compile the distance field for drawing.
        cache_dir: parent folder of the caches; default $GALATEA_CACHE or ~/.cache/galatea.
        seed: of the draws of poses, expressions and styles.
        pose_step: degrees; poses are rounded to multiples of it (see :class:`CacheConfig`).
        coded: the face is part of a subject's code z, for generators without expressions (see :class:`CacheConfig`).
        first: number of the first subject within its split.
        exaggerate: strengths of geometric exaggerations of all heads, by name (``EXAGGERATIONS``).
        posed: the pose is, too, for generators without cameras: each picture is an item of its own, with its own z.
    """

    def __init__(
        self,
        train_subjects: int = 1024,
        val_subjects: int = 64,
        test_subjects: int = 64,
        size: int = 64,
        views_per_subject: int = 4,
        batch_size: int = 4,
        styles: list[str] | str | None = None,
        supersample: int = 2,
        workers: int = 0,
        draw_workers: int = 2,
        compiled: bool = False,
        cache_dir: str | None = None,
        seed: int = 0,
        pose_step: float = 0.0,
        coded: bool = False,
        posed: bool = False,
        first: int = 0,
        exaggerate: dict[str, float] | None = None,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        given = {"batch_size": batch_size, "size": size, "views_per_subject": views_per_subject}
        for name, value in (given | {"supersample": supersample}).items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if min(train_subjects, val_subjects, test_subjects, pose_step, workers, draw_workers) < 0:
            raise UserError("subjects, workers and pose_step must not be negative")
        if posed and not coded:
            raise UserError("posed pictures have the face in their code as well: set coded true")
        subjects = {"train": train_subjects, "val": val_subjects, "test": test_subjects}
        self.configs = {
            split: CacheConfig(
                split=split,
                subjects=count,
                first=first,
                exaggerate=exaggerate or {},
                views_per_subject=views_per_subject,
                size=size,
                styles=(styles,) if isinstance(styles, str) else tuple(styles or (PLAIN,)),
                supersample=supersample,
                seed=seed,
                pose_step=pose_step,
                coded=coded,
                posed=posed,
            )
            for split, count in subjects.items()
        }
        self.draw_workers = draw_workers
        self.compiled = compiled
        self.cache_dir = cache_dir
        self.posed = posed
        self.traits = POSED_NAMES if posed else CODE_NAMES if coded else Z_NAMES

    def prepare_data(self) -> None:
        """Draw what is missing."""
        for split in self.configs:
            self._folder(split)

    def setup(self, stage: str | None = None) -> None:
        """Open the caches that ``stage`` needs."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in needed.get(stage or "", tuple(self.configs)):
            if split not in self.datasets:
                images = MannequinImages(self._folder(split))
                self.datasets[split] = PosedImages(images) if self.posed else images

    def manifold_field(self) -> tuple[Tensor, Tensor]:
        """Samples of the field whose level sets suit these heads, see :func:`envelope_field`."""
        return envelope_field()

    def view_truth(self, sample: Sample, camera: Camera) -> Truth:
        """What the first view of one test subject shows, expression and style included, from other cameras."""
        config = self.configs["test"]
        scene = self._scene(sample).repeat_interleave(len(camera))
        style = STYLES[int(sample["style"][0])]
        return render(scene, camera.to("cpu"), config.size, style, config.supersample, self.compiled)

    def changed(self, sample: Sample, trait: str, deviations: float) -> Sample:
        """A sample whose z has another number; its faces are of its code where that holds them."""
        z = sample["z"].clone()
        z[self.traits.index(trait)] += deviations
        if len(z) == Z_DIM:
            return {**sample, "z": z}
        face = face_expression(z[None, Z_DIM:CODE_DIM].cpu()).to(sample["expression"])
        return {**sample, "z": z, "expression": face.expand_as(sample["expression"])}

    def scan_truth(self, sample: Sample) -> Scan:
        """The surface and the keypoints of the first view of one test subject, with its expression."""
        return face_scan(self._scene(sample))

    def _scene(self, sample: Sample) -> Scene:
        """What the first view of one test subject shows."""
        scene = Scene.from_code(sample["z"][None].cpu()).with_expression(sample["expression"][:1].cpu())
        for name, strength in self.configs["test"].exaggerate.items():
            scene = scene.exaggerate(name, strength)
        return scene

    def subject_truth(self, z: Tensor, camera: Camera, size: int, expression: Tensor | None = None) -> Truth:
        """What the subject z (1, Z_DIM) shows to B cameras: plain, neutral but for an expression (1, E), or the face of
        a code (1, CODE_DIM or POSED_DIM)."""
        scene = Scene.from_code(z.cpu())
        if expression is not None:
            scene = scene.with_expression(expression.cpu())
        return render(scene.repeat_interleave(len(camera)), camera.to("cpu"), size)

    def distances(self, z: Tensor, points: Tensor) -> Tensor:
        """Distances (B, P) of points (B, P, 3) to the surfaces of the plain subjects z (B, Z_DIM or CODE_DIM), world
        units, negative inside: the field's estimates over the lengths of their gradients, right near the surface."""
        knob = named(Scene.from_code(z.cpu()).parameters().T[..., None])
        value, gradient = field_gradient(lambda p: distance(knob, p.movedim(-1, 0))[..., None], points.cpu())
        return (value[..., 0] / gradient.norm(dim=-1).clamp_min(0.3)).to(points)

    def _folder(self, split: str) -> Path:
        return build_cache(self.configs[split], self.cache_dir, self.draw_workers, self.compiled)
