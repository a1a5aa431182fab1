"""What is done when: the cycles of three steps by which a shape is found (Wang et al., Sec. III-D)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from models.checks import check_not_negative, check_positive
from models.errors import UserError

PhaseName = Literal["prior", "albedo", "project", "joint"]
NETWORKS = "VLDAE"


class Phase(NamedTuple):
    """A stretch of optimisation steps: ``begin`` to ``end`` - 1. Cycles count from 1; the prior is no part of one."""

    name: PhaseName
    cycle: int
    begin: int
    end: int


@dataclass(frozen=True)
class ShapeRecipe:
    """Lengths, rates and weights. Where the paper says nothing, defaults are GAN2Shape's for faces.

    GAN2Shape itself is ``mirror_in: first``, ``identity: 0``; Unsup3D is one cycle of step 3 without samples, for
    networks that many heads share: ``cycles: 1``, ``prior: 0``, ``first: [0, 0, N]``, ``samples: 0``.

    Attributes:
        cycles: of the three steps.
        prior: optimisation steps that fit D to the first guess at the depth, a cap of a sphere; 0 starts flat.
        first, later: optimisation steps of step 1, 2 and 3 in the first cycle, and in each later one.
        batch: pseudo samples of a head in a step.
        samples: projected pseudo samples of a head that step 3 draws from; with 0 it has the picture alone.
        project: whether step 3 sees pseudo samples as the generator shows them, or as they were rendered.
        agreed: samples are shown at what their offsets have in common (:func:`models.relief.samples.agreed`): ours.
        learning_rate, weight_decay, betas: of Adam, which starts anew with each step.
        rates: learning rates of V, L, D, A and E that are others: ours, none in the paper.
        perceptual: lambda_perc of Eq. 11. smooth: lambda_smooth of Eq. 18. offset: lambda_E of Eq. 16.
        smooth_shading: weight of the same of the diffuse shading: GAN2Shape's.
        mirror: weight of L_sym (Eq. 12). mirror_in: "every" step 1 and 3, or the "first" step 3 alone.
        identity: weight of L_id.
        known: V and L tell offsets to the light that a sample was rendered by, and to the view that a pose network
            tells of it as of the picture itself: ours. Otherwise all are offsets to the front and to a mean light.
        slack: how far these offsets go, as a share of the ranges of V and L: ours, 1 in the paper.
        paper_only: what the paper's equations say and no more: no absolute difference in step 2, an offset of w that is
            E's own answer and not relative to the one for the picture, its norm instead of the mean square, all pixels
            of a sample and not its head alone, no smooth shading, and a step 3 that does not see the picture itself.
    """

    cycles: int = 4
    prior: int = 1000
    first: tuple[int, int, int] = (600, 600, 400)
    later: tuple[int, int, int] = (200, 500, 300)
    batch: int = 16
    samples: int = 1600
    project: bool = True
    agreed: bool = False
    learning_rate: float = 1e-4
    weight_decay: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    rates: Mapping[str, float] = field(default_factory=dict)
    perceptual: float = 0.5
    smooth: float = 0.01
    smooth_shading: float = 0.01
    offset: float = 0.01
    mirror: float = 1.0
    mirror_in: Literal["every", "first"] = "every"
    identity: float = 1.0
    known: bool = False
    slack: float = 1.0
    paper_only: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "cycles", "batch", "learning_rate", where="recipe.")
        weights = ("perceptual", "smooth", "smooth_shading", "offset", "mirror", "identity")
        names = ("prior", "samples", "weight_decay", *weights, "slack")
        check_not_negative(self, *names, where="recipe.")
        if not set(self.rates) <= set(NETWORKS) or min(self.rates.values(), default=1) <= 0:
            raise UserError(f"recipe.rates is {dict(self.rates)}: give positive rates of {', '.join(NETWORKS)}")
        if min(*self.first, *self.later) < 0 or not (self.first[2] and self.later[2]):
            raise UserError("recipe.first and recipe.later are numbers of steps, of which step 3 has some")
        if self.mirror_in not in ("every", "first"):
            raise UserError(f"recipe.mirror_in is {self.mirror_in!r}: take every or first")
        if not self.samples and self.paper_only:
            raise UserError("recipe.paper_only has a step 3 that sees samples alone: recipe.samples must not be 0")

    @property
    def phases(self) -> list[Phase]:
        """All of them, in order; those without steps are left out."""
        names: tuple[PhaseName, ...] = ("albedo", "project", "joint")
        lengths: list[tuple[PhaseName, int, int]] = [("prior", 0, self.prior)]
        for cycle in range(1, self.cycles + 1):
            steps = self.first if cycle == 1 else self.later
            lengths.extend((name, cycle, length) for name, length in zip(names, steps, strict=True))
        found, begin = [], 0
        for name, cycle, length in lengths:
            if length:
                found.append(Phase(name, cycle, begin, begin + length))
            begin += length
        return found

    @property
    def ends(self) -> list[int]:
        """How many steps are done when the first guess is there, and at the end of each cycle."""
        return [self.prior, *(phase.end for phase in self.phases if phase.name == "joint")]

    @property
    def steps(self) -> int:
        """Of all phases."""
        return self.phases[-1].end

    def at(self, step: int) -> Phase:
        """The phase of a step."""
        return next(phase for phase in self.phases if step < phase.end)

    def rate(self, network: str) -> float:
        """The learning rate of V, L, D, A or E."""
        return self.rates.get(network, self.learning_rate)

    def roughens(self, phase: Phase) -> bool:
        """Whether pseudo samples are rendered from a phase on of the shape that there is when it begins."""
        steps = self.first if phase.cycle == 1 else self.later
        return phase.name == ("project" if steps[1] else "joint")

    def mirrors(self, phase: Phase) -> bool:
        """Whether the mirrored face counts in a phase."""
        once = phase.name == "joint" and phase.cycle == 1
        return self.mirror > 0 and (self.mirror_in == "every" or once)
