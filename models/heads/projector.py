"""Latent codes of given pictures by optimisation, picture by picture and side by side.

A :class:`Projector` holds what is optimised for a group of items and tells the losses of a step; whoever owns the loop
runs backward and the optimisers: a per-item stage, or :meth:`Projector.fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.errors import UserError
from models.generators.base import Generator
from models.latents import Latents
from models.schedule import Schedule, rate, set_rates

_CHUNK = 8  # candidates rendered at once
Loss = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""Pictures (N, 3, R, R) and the item (N,) that each is to show -> terms (N,); ``loss`` is minimised."""


@dataclass(frozen=True)
class Search:
    """How a latent is looked for.

    Attributes:
        space: what is optimised: z, z+ with one z a layer, one w for all layers, or w+ with one w a layer.
        layers: of w and w+, the layers [first, end) that move, by latent group; the others stay at the start. Empty
            moves all.
        start: "random" codes, or the generator's "mean" (w and w+ only; PTI starts there).
        restarts: K codes optimised side by side as one batch; the one with the least loss is kept.
        candidates: random codes rendered first, of which the K best are the starts; 0 takes the first K draws.
        length: of random z, relative to that of N(0, I).
        prune: share of the steps after which only the best restart goes on; 1 keeps all to the end.
        refine: share of the steps, at the end, in which an offset per layer (w+) moves as well.
        learning_rate: of the codes (Adam). betas: of Adam.
        refine_learning_rate: of the offset, in standard deviations of w.
        refine_pull: weight of the offset's mean square, in variances of w.
        schedule: of the learning rates: "constant", or "cosine" from the full rate to the share ``final`` of it.
        prior: weight of mean(z^2): how firmly z is held to where N(0, I) is dense.
        pull: of w and w+, weight of the mean squared distance from the start, in variances of the start's numbers.
        optimize_expression: fit the expression, where there is one, with the latent; it becomes the zero of later
            edits.
        expression_learning_rate, expression_prior: as for the codes.
        optimize_pose: fit yaw and pitch as well (3DArtmator, Sec. 4.5), by central differences: not every generator
            is differentiable in its camera.
        pose_learning_rate: radians. pose_step: half width of the difference, radians.
        optimize_noise: fit the noise maps as well, where the generator has them, from drawn ones on.
        noise_regularization: weight of their correlations (StyleGAN2, Appendix D).
        patience: an item stops when its mean loss over this many steps is less than ``plateau`` (relative) below
            that over the same number of steps before; 0 never stops early.
    """

    space: Literal["z", "z+", "w", "w+"] = "z"
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    start: Literal["random", "mean"] = "random"
    restarts: int = 1
    candidates: int = 0
    length: float = 1.0
    prune: float = 1.0
    refine: float = 0.0
    learning_rate: float = 2e-2
    betas: tuple[float, float] = (0.9, 0.999)
    refine_learning_rate: float = 2e-2
    refine_pull: float = 1e-2
    schedule: Schedule = "constant"
    final: float = 0.05
    prior: float = 0.0
    pull: float = 0.0
    optimize_expression: bool = False
    expression_learning_rate: float = 2e-2
    expression_prior: float = 0.0
    optimize_pose: bool = False
    pose_learning_rate: float = 5e-3
    pose_step: float = 0.02
    optimize_noise: bool = False
    noise_regularization: float = 1e5
    patience: int = 0
    plateau: float = 1e-3

    def __post_init__(self) -> None:
        rates = ("learning_rate", "refine_learning_rate", "expression_learning_rate", "pose_learning_rate", "pose_step")
        check_positive(self, *rates, "length", where="search.")
        weights = ("refine_pull", "final", "prior", "pull", "expression_prior", "noise_regularization")
        check_not_negative(self, *weights, "candidates", "patience", "plateau", where="search.")
        if self.through_z and (self.start == "mean" or self.layers or self.pull):
            raise UserError("search: z starts at random codes; the mean is a code of w, as layers and pull are")
        if self.restarts < 1 or (self.candidates and self.candidates < self.restarts):
            raise UserError("search: restarts must be at least 1, and candidates 0 or at least as many as restarts")
        if not 0 < self.prune <= 1 or not 0 <= self.refine < 1:
            raise UserError("search: prune must be in (0, 1] and refine in [0, 1)")
        if self.refine > 0 and self.prune > 1 - self.refine and self.restarts > 1:
            raise UserError("search: prune must not be later than the refinement's start, 1 - refine")

    @property
    def through_z(self) -> bool:
        """Whether codes go through the mapping."""
        return self.space in ("z", "z+")

    @property
    def keeps_start(self) -> bool:
        """Whether the starts are needed all along."""
        return bool(self.layers or self.pull)

    def check(self, generator: Generator) -> None:
        """Refuse what a generator does not have.

        Raises:
            UserError: saying what.
        """
        name, mean = type(generator).__name__, generator.mean_latents.groups
        if self.optimize_pose and not generator.is_3d:
            raise UserError(f"search.optimize_pose: {name} is a 2D generator, which has no camera")
        if self.space == "w" and any(bool((t != t[:, :1]).any()) for t in mean.values()):
            raise UserError(f"search.space: {name} has no w that serves all layers; use z or w+")
        if self.optimize_noise and not generator.noise_sides:
            raise UserError(f"search.optimize_noise: {name} has no noise maps")
        for group, (first, end) in self.layers.items():
            if group not in mean or not 0 <= first < end <= mean[group].shape[1]:
                known = ", ".join(f"{name}: [0, {t.shape[1]}]" for name, t in mean.items())
                raise UserError(f"search.layers: {group}: [{first}, {end}] is not among {name}'s {known}")


class ItemCodes(nn.Module):
    """What is optimised for one item: K rows of codes, expressions, pose changes and noise maps.

    Attributes:
        codes: {"z": (K, z_dim) or (K, num_ws, z_dim)}, or by latent group (K, 1 or n, w).
        offset: by latent group (1, n, w); none without a refinement.
        expression: (K, E). pose: (K, 2). noise: (K, P), the maps end to end. Their sizes are 0 where not optimised.
        label: (25,) camera, or (0,) in a 2D generator.
        best: the row that goes on; -1 while all are running. leader: the row with the least loss.
        stopped: whether the item has reached a plateau.
        curve: (steps, terms) of the leader.
    """

    label: Tensor
    best: Tensor
    leader: Tensor
    stopped: Tensor
    curve: Tensor

    def __init__(self, search: Search, generator: Generator, label: Tensor, steps: int, terms: int) -> None:
        super().__init__()
        rows, mean = search.restarts, generator.mean_latents.groups
        if search.through_z:
            sizes = {"z": (generator.z_dim,) if search.space == "z" else (generator.num_ws, generator.z_dim)}
        else:
            spans = search.layers or {name: (0, t.shape[1]) for name, t in mean.items()}
            counts = {name: 1 if search.space == "w" else end - first for name, (first, end) in spans.items()}
            sizes = {name: (count, mean[name].shape[2]) for name, count in counts.items()}
        self.codes = nn.ParameterDict({name: nn.Parameter(torch.zeros(rows, *size)) for name, size in sizes.items()})
        expressions = len(generator.expressions) if search.optimize_expression else 0
        pixels = sum(side**2 for side in generator.noise_sides) if search.optimize_noise else 0
        self.expression = nn.Parameter(torch.zeros(rows, expressions))
        self.pose = nn.Parameter(torch.zeros(rows, 2 if search.optimize_pose else 0))
        self.noise = nn.Parameter(torch.zeros(rows, pixels))
        refined = mean if search.refine > 0 else {}
        self.offset = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(t)) for name, t in refined.items()})
        for name, t in (mean if search.keeps_start else {}).items():
            self.register_buffer(f"start_{name}", t.repeat(rows, 1, 1))
        self.register_buffer("label", label.clone())
        self.register_buffer("best", torch.tensor(-1))
        self.register_buffer("leader", torch.tensor(0))
        self.register_buffer("stopped", torch.tensor(False))
        self.register_buffer("curve", torch.full((steps, terms), torch.nan))

    @property
    def rows(self) -> slice:
        """The rows that are optimised: all, or the chosen one."""
        best = int(self.best)
        return slice(None) if best < 0 else slice(best, best + 1)

    def start(self, name: str) -> Tensor:
        """The rows' first codes of a latent group."""
        return self.get_buffer(f"start_{name}")[self.rows]


class Projector(nn.Module):
    """Fits latent codes, and what else a :class:`Search` names, to the pictures of a group of items.

    The module's state is all that must survive a kill; the starts are given by :meth:`draw` or :meth:`begin`.

    Args:
        generator: frozen; it is not registered.
        search: how to look.
        loss: compares renderings with what their items are to show.
        labels: camera (25,) of each item; (0,) in a 2D generator.
        steps: of the optimisation.
        terms: names of the loss's terms whose course is kept, ``loss`` first.
        resolution: of the renderings, where it is free; native when ``None``.
    """

    def __init__(
        self,
        generator: Generator,
        search: Search,
        loss: Loss,
        labels: Sequence[Tensor],
        steps: int,
        terms: Sequence[str] = ("loss",),
        resolution: int | None = None,
    ) -> None:
        super().__init__()
        search.check(generator)
        self._generator = [generator]  # a list, so that nothing of it is registered
        self.search, self.loss, self.steps, self.terms, self.resolution = search, loss, steps, terms, resolution
        self.items = nn.ModuleList([ItemCodes(search, generator, label, steps, len(terms)) for label in labels])
        self._scales: dict[str, Tensor] = {}
        self.to(next(iter(generator.mean_latents.groups.values())).device)

    @property
    def generator(self) -> Generator:
        """The generator that shows the codes."""
        return self._generator[0]

    def __getitem__(self, index: int) -> ItemCodes:
        return self.items[index]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[ItemCodes]:
        return iter(self.items)  # type: ignore[arg-type]

    # -- starts -----------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, draws: Sequence[torch.Generator], compare: Loss | None = None) -> None:
        """Start each item at its best candidates, at its first draws, or at the mean.

        Args:
            draws: CPU generators, one an item.
            compare: by which candidates are compared; the loss by default.
        """
        search, generator = self.search, self.generator
        for index, (item, random) in enumerate(zip(self, draws, strict=True)):
            if search.start == "mean":
                self.begin(index, generator.mean_latents.repeat_interleave(search.restarts))
            else:
                z = search.length * generator.sample_z(max(search.candidates, search.restarts), random)
                self.begin(index, self._best(index, z.to(item.label.device), compare or self.loss))
            if item.noise.numel():
                item.noise.copy_(torch.randn(item.noise.shape, generator=random))

    @torch.no_grad()
    def begin(self, index: int, codes: Latents | Tensor) -> None:
        """Start an item at z (K, z_dim) or (K, num_ws, z_dim), or, outside of z, at latents of K rows."""
        item = self[index]
        if self.search.through_z:
            assert isinstance(codes, Tensor)
            item.codes["z"].copy_(codes[:, None] if codes.ndim < item.codes["z"].ndim else codes)
            return
        latents = codes if isinstance(codes, Latents) else self.generator.mapping(codes)
        for name, start in latents.groups.items():
            if name in item.codes:
                first, _ = self.search.layers.get(name, (0, 0))
                item.codes[name].copy_(start[:, first : first + item.codes[name].shape[1]])
            if self.search.keeps_start:
                item.get_buffer(f"start_{name}").copy_(start)

    def _best(self, index: int, z: Tensor, compare: Loss) -> Tensor:
        """The K of the candidates z that show an item best."""
        search, generator = self.search, self.generator
        if search.candidates <= search.restarts:
            return z
        item, losses = self[index], []
        for chunk in z.split(_CHUNK):
            camera = Camera.from_label(item.label[None]).repeat_interleave(len(chunk)) if generator.is_3d else None
            image = generator.synthesis(generator.mapping(chunk), camera, resolution=self.resolution).image
            losses.append(compare(image, torch.full((len(chunk),), index, device=z.device))["loss"])
        return z[torch.cat(losses).float().argsort(stable=True)[: search.restarts]]

    # -- one step ---------------------------------------------------------------------------------

    def optimizers(self) -> dict[str, Optimizer]:
        """Two for each item: of its codes and all that moves with them, and of its offset."""
        search, found = self.search, {}
        for index, item in enumerate(self):
            rates = {
                "codes": search.learning_rate,
                "expression": search.expression_learning_rate,
                "pose": search.pose_learning_rate,
                "noise": search.learning_rate,
            }
            groups = [
                {"params": [p for n, p in item.named_parameters() if n.split(".")[0] == kind and p.numel()], "lr": rate}
                for kind, rate in rates.items()
            ]
            found[f"{index}"] = Adam([group for group in groups if group["params"]], betas=search.betas)
            if item.offset:
                found[f"{index}/offset"] = Adam(item.offset.values(), search.refine_learning_rate, search.betas)
        return found

    def losses(self, optimizers: Mapping[str, Optimizer], step: int) -> dict[str, Tensor]:
        """Sets the learning rates of ``step`` and returns ``loss`` (n,) per item, and the other terms of its leader."""
        search = self.search
        set_rates(optimizers.values(), rate(search.schedule, step, self.steps, search.final))
        image, latents, counts = self.render()
        rows = torch.arange(len(counts), device=image.device).repeat_interleave(torch.tensor(counts).to(image.device))
        terms = self.loss(image, rows)
        row_loss = terms["loss"]
        kept = torch.stack([terms[name] for name in self.terms], 1).detach().float()
        if search.optimize_pose:
            row_loss = row_loss + self._pose_term(latents, rows)
        totals = []
        for item, loss, values in zip(self, row_loss.split(counts), kept.split(counts), strict=True):
            leader = int(loss.detach().float().argmin())
            item.curve[step] = values[leader]
            if int(item.best) < 0:
                item.leader.fill_(leader)
                if step + 1 >= min(search.prune, 1 - search.refine) * self.steps:
                    item.best.fill_(leader)
            totals.append(loss.sum() + self._penalties(item))
            self._watch(item, step)
        curves = torch.stack([item.curve[step] for item in self])
        return {"loss": torch.stack(totals), **dict(zip(self.terms[1:], curves[:, 1:].unbind(1), strict=True))}

    def active(self, step: int) -> list[str]:
        """Names of the optimisers that move at ``step``: not those of stopped items, nor offsets before their time."""
        refining = step >= (1 - self.search.refine) * self.steps
        running = [f"{index}" for index, item in enumerate(self) if not bool(item.stopped)]
        offsets = [f"{name}/offset" for name in running] if refining and self.search.refine > 0 else []
        return running + offsets

    @property
    def settled(self) -> bool:
        """Whether all items have stopped."""
        return all(bool(item.stopped) for item in self)

    def choose(self) -> None:
        """Go on with one row of each item: the leader, where all are still running."""
        for item in self:
            if int(item.best) < 0:
                item.best.copy_(item.leader)

    def fit(self) -> None:
        """All steps, without a trainer; then each item's best row is chosen."""
        optimizers = self.optimizers()
        with torch.enable_grad():
            for step in range(self.steps):
                loss = self.losses(optimizers, step)["loss"].sum()
                moving = [optimizers[name] for name in self.active(step)]
                for optimizer in moving:
                    optimizer.zero_grad(set_to_none=True)
                if moving:
                    loss.backward(inputs=[p for o in moving for group in o.param_groups for p in group["params"]])
                for optimizer in moving:
                    optimizer.step()
                if self.settled:
                    break
        self.choose()

    def _penalties(self, item: ItemCodes) -> Tensor:
        search, total = self.search, item.label.new_zeros(())
        if search.prior and search.through_z:
            total = total + search.prior * item.codes["z"][item.rows].square().flatten(1).mean(1).sum()
        if search.expression_prior and item.expression.numel():
            total = total + search.expression_prior * item.expression.square().mean(1).sum()
        for offset in item.offset.values():
            total = total + search.refine_pull * offset.square().mean()
        if search.pull:
            for name, t in self.latents(item).groups.items():
                start = item.start(name)
                variance = start.var().clamp_min(1e-6)
                total = total + search.pull * ((t - start).square().mean((1, 2)) / variance).sum()
        if item.noise.numel():
            total = total + search.noise_regularization * self._correlation(item).sum()
        return total

    def _watch(self, item: ItemCodes, step: int) -> None:
        """Stop an item whose loss has reached a plateau."""
        window = self.search.patience
        if window and step + 1 >= 2 * window:
            before, now = item.curve[step + 1 - 2 * window : step + 1, 0].reshape(2, window).mean(1).tolist()
            if before - now < self.search.plateau * before:
                item.stopped.fill_(True)

    # -- what is found ----------------------------------------------------------------------------

    def latents(self, item: ItemCodes) -> Latents:
        """Style codes of an item's active rows."""
        if self.search.through_z:
            latents = self.generator.mapping(item.codes["z"][item.rows])
        else:
            counts = {name: t.shape[1] for name, t in self.generator.mean_latents.groups.items()}
            latents = Latents({name: self._placed(item, name, count) for name, count in counts.items()})
        if item.offset:
            scale = self._scale()
            latents = Latents({name: t + item.offset[name] * scale[name] for name, t in latents.groups.items()})
        return latents

    def _placed(self, item: ItemCodes, name: str, count: int) -> Tensor:
        """An item's codes of one group among the layers that do not move."""
        if name not in item.codes:
            return item.start(name)
        first, end = self.search.layers.get(name, (0, count))
        code = item.codes[name][item.rows].expand(-1, end - first, -1)
        if end - first == count:
            return code
        start = item.start(name)
        return torch.cat([start[:, :first], code, start[:, end:]], 1)

    def _scale(self) -> dict[str, Tensor]:
        """The standard deviation of w, per group, over random codes."""
        if not self._scales:
            with torch.no_grad():
                z = self.generator.sample_z(256, torch.Generator().manual_seed(0)).to(self[0].label.device)
                groups = self.generator.mapping(z).groups
                self._scales = {name: t.float().std(0).mean() for name, t in groups.items()}
        return self._scales

    def expression(self, item: ItemCodes) -> Tensor:
        """(rows, E): 0 where it is not optimised."""
        if item.expression.numel():
            return item.expression[item.rows]
        return item.expression.new_zeros(len(item.pose[item.rows]), len(self.generator.expressions))

    def camera(self, item: ItemCodes) -> Camera | None:
        """Cameras of an item's active rows; ``None`` in a 2D generator."""
        if not self.generator.is_3d:
            return None
        rig, camera = self.generator.rig, Camera.from_label(item.label[None])
        if not item.pose.numel():
            return camera.repeat_interleave(len(item.pose[item.rows]))
        turned = item.pose[item.rows].detach() + torch.stack(rig.angles(camera), 1)
        return rig.camera(*rig.within(*turned.unbind(1)), item.label.device)

    def noise(self, item: ItemCodes) -> Tensor | None:
        """(rows, P) noise maps, each of mean 0 and variance 1; ``None`` where they are not optimised."""
        if not item.noise.numel():
            return None
        maps = item.noise[item.rows].split([side**2 for side in self.generator.noise_sides], 1)
        centred = [m - m.mean(1, keepdim=True) for m in maps]
        return torch.cat([m * m.square().mean(1, keepdim=True).clamp_min(1e-8).rsqrt() for m in centred], 1)

    def render(self, items: Sequence[ItemCodes] | None = None) -> tuple[Tensor, Latents, list[int]]:
        """Images of the items' active rows, all by default, their codes, and the number of rows per item."""
        items = list(self) if items is None else items
        parts = [self.latents(item) for item in items]
        latents = Latents.cat(parts)
        image = self._synthesis(items, latents, self._cameras(items))
        return image, latents, [len(part) for part in parts]

    def _synthesis(self, items: Sequence[ItemCodes], latents: Latents, camera: Camera | None) -> Tensor:
        expression = noise = None
        if self.search.optimize_expression and self.generator.expressions:
            expression = torch.cat([self.expression(item) for item in items])
        if self.search.optimize_noise:
            noise = torch.cat([maps for item in items if (maps := self.noise(item)) is not None])
        return self.generator.synthesis(
            latents, camera, expression=expression, randomness=noise, resolution=self.resolution
        ).image

    def _cameras(self, items: Sequence[ItemCodes]) -> Camera | None:
        cameras = [camera for item in items if (camera := self.camera(item)) is not None]
        return Camera.cat(cameras) if cameras else None

    def _pose_term(self, latents: Latents, rows: Tensor) -> Tensor:
        """(rows,) zeros whose gradient in the pose is the central difference of the loss."""
        items, rig, step = list(self), self.generator.rig, self.search.pose_step
        camera = self._cameras(items)
        assert camera is not None
        turns = torch.tensor([[step, 0.0], [-step, 0.0], [0.0, step], [0.0, -step]], device=rows.device)
        yaw, pitch = (torch.stack(rig.angles(camera), 1)[:, None] + turns).flatten(0, 1).unbind(1)
        with torch.no_grad():
            # One pass of the backbone serves the four views of a row.
            image = self._synthesis(items, latents.detach(), rig.camera(yaw, pitch, rows.device))
            loss = self.loss(image, rows.repeat_interleave(4))["loss"]
            plus_yaw, minus_yaw, plus_pitch, minus_pitch = loss.reshape(-1, 4).unbind(1)
            slope = torch.stack([plus_yaw - minus_yaw, plus_pitch - minus_pitch], 1) / (2 * step)
        pose = torch.cat([item.pose[item.rows] for item in items])
        term = (pose * slope).sum(1)
        return term - term.detach()

    def _correlation(self, item: ItemCodes) -> Tensor:
        """(rows,) squared correlation of neighbouring pixels of each noise map, at all sizes down to 8 x 8."""
        noise = self.noise(item)
        assert noise is not None
        return noise_correlation(noise, self.generator.noise_sides)


def noise_correlation(noise: Tensor, sides: Sequence[int]) -> Tensor:
    """(B,) squared correlation of neighbouring pixels of noise maps (B, P), which lie end to end, at all sizes down to
    8 x 8 (StyleGAN2, Appendix D)."""
    total = noise.new_zeros(len(noise))
    for flat, side in zip(noise.split([side**2 for side in sides], 1), sides, strict=True):
        maps = flat.unflatten(1, (1, side, side))
        while True:
            for axis in (2, 3):
                total = total + (maps * maps.roll(1, axis)).mean((1, 2, 3)).square()
            if maps.shape[-1] <= 8:
                break
            maps = F.avg_pool2d(maps, 2)
    return total


def fit_latents(
    generator: Generator,
    image: Tensor,
    camera: Camera | None = None,
    *,
    seed: int = 0,
    z_steps: int = 80,
    ws_steps: int = 160,
) -> Latents:
    """Codes of given images by plain optimisation: the yardstick of what a generator can express.

    First z from the nearest of some random samples, under its Gaussian prior; then every layer's code by itself,
    held near the first answer: far from what mapping(z) gives, codes answer worse to expressions.

    Args:
        generator: its parameters get no gradient.
        image: (B, 3, H, W) in [-1, 1].
        camera: B cameras; None in 2D.
        seed: of the random samples. z_steps, ws_steps: of the two searches.

    Returns:
        detached codes of B rows.
    """

    def error(found: Tensor, rows: Tensor) -> dict[str, Tensor]:
        pairs = zip(found, image[rows], strict=True)
        return {"loss": torch.stack([F.mse_loss(a, b) * 4 + F.l1_loss(a, b) for a, b in pairs])}

    def distance(found: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": (found - image[rows]).square().flatten(1).mean(1)}

    labels, side = list(image.new_zeros(len(image), 0) if camera is None else camera.label()), image.shape[-1]
    # The origin is the mean of everything; from a sample of the right kind (hair, glasses) there is less to undo.
    first = Search(
        candidates=96, length=0.75, learning_rate=0.08, betas=(0.9, 0.99), schedule="cosine", final=0, prior=1e-3
    )
    found = Projector(generator, first, error, labels, z_steps, resolution=side)
    found.draw([torch.Generator().manual_seed(seed) for _ in image], distance)
    found.fit()
    second = replace(first, space="w+", learning_rate=0.02, prior=0, pull=0.1)
    refined = Projector(generator, second, error, labels, ws_steps, resolution=side)
    for index, item in enumerate(found):
        refined.begin(index, found.latents(item))
    refined.fit()
    return refined.render()[1].detach()
