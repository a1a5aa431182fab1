"""Edits of inverted heads in a test, against those of the true heads (:class:`models.metrics.editing.EditProtocol`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from datamodules.truth import KnowsTraits
from models.artifact import Artifact, load
from models.camera import Camera, Rig
from models.errors import UserError, shown
from models.heads.directions import directions_for
from models.heads.subjects import Subjects
from models.latents import Latents
from models.metrics.e3dge import Scores
from models.metrics.editing import EditProtocol
from models.rendering.output import Rendering

Editable = Callable[[Callable[[Latents], Latents]], Callable[[Camera | None], Rendering]]
"""Heads of pictures, as what turns their own codes into others shows them."""
SeenT = TypeVar("SeenT")


class EditTest:
    """Moves heads along directions, and the true heads' codes along the traits that the directions are of.

    Both move by the same number of standard deviations: the heads' codes of those of sampled codes along the direction
    (:attr:`models.heads.directions.Directions.spread`), the truth of those of the trait's own number. A direction along
    which other traits vary too goes a little farther than its trait's part, which ``expression_size`` then shows.

    Args:
        protocol: what is measured, and what is edited.
        directions: path of an artifact of the stage ``directions``.
        tested: artifact whose heads are edited.
        data: the test's.
        device: of the heads.

    Raises:
        UserError: when one of these is missing, or does not go with the others.
    """

    def __init__(
        self, protocol: EditProtocol, directions: str | None, tested: Artifact | None, data: Any, device: torch.device
    ) -> None:
        if not protocol.edits:
            raise UserError("nothing is edited: protocol.edits has no entries, such as smile: {deviations: 2.0}")
        if directions is None or tested is None:
            raise UserError(
                "edits are of a result's heads, along directions of its generator: --model.tested.path and "
                "--model.directions, see configs/stages/selftrain_edits_test.yaml"
            )
        subjects = Subjects(tested)
        if not subjects.generator.is_3d:
            raise UserError(f"edits are measured from several views: {tested.path} holds a 2D generator")
        self.protocol, self.data = protocol, data
        self.directions = directions_for(load(directions), subjects).to(device)
        self.directions.check({name: edit.deviations for name, edit in protocol.edits.items()})
        if not isinstance(data, KnowsTraits):
            raise UserError(
                "edits are measured against heads whose traits are known: give such data, "
                "datamodules.mannequins.MannequinDataModule"
            )
        for name, edit in protocol.edits.items():
            if (trait := edit.trait or name) not in data.traits:
                raise UserError(
                    f"protocol.edits.{name}: the data know no trait {shown(trait)}, they know: {', '.join(data.traits)}"
                )

    def __call__(
        self, heads: Editable, item: str, image: Tensor, camera: Camera, rig: Rig, sample: dict[str, Any]
    ) -> Iterator[tuple[str, Scores]]:
        """The name of each edit, and its scores.

        Args:
            heads: of the picture. image: (1, 3, H, W) in [-1, 1]. camera: its own. rig: of the trajectory.
            sample: whose first view the picture is.
        """
        own, truth = once(heads(lambda ws: ws)), once(partial(self._true, sample))
        for name, edit in self.protocol.edits.items():
            moved = heads(partial(self.directions.moved, name=name, deviations=edit.deviations))
            other = partial(self._true, self.data.changed(sample, edit.trait or name, edit.deviations))
            yield name, self.protocol(item, image, camera, rig, own, moved, truth, other)

    def _true(self, sample: dict[str, Any], camera: Camera) -> Any:
        return self.data.view_truth(sample, camera).to(camera.device)


def once(render: Callable[[Camera], SeenT]) -> Callable[[Camera], SeenT]:
    """The same, which keeps what it has rendered: all edits are compared with the same views."""
    held: dict[bytes, SeenT] = {}

    def seen(camera: Camera) -> SeenT:
        key = camera.label().cpu().numpy().tobytes()
        if key not in held:
            held[key] = render(camera)
        return held[key]

    return seen
