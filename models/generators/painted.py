"""What generators share whose radiance a style backbone paints as a 2D map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.camera import Camera, Rig
from models.generators.backbone import StyleBackbone, StyleGAN2Backbone
from models.generators.base import ParameterGroup, RadianceGenerator
from models.generators.deformation import ExpressionField
from models.generators.fields import HeadChart
from models.generators.layers import MappingNetwork
from models.latents import Latents

BACKBONES = ("light", "stylegan2")
BACKGROUNDS = ("separate", "none")

_STYLE_PARTS = ("map_network", "affine", "outs", "details")  # of parameter names; see parameter_groups


class Painting(NamedTuple):
    """A painted radiance field, and how an expression moves and changes it."""

    map: Tensor
    """(B, channels, S, S)."""
    shift: Tensor | None
    """(B * V, 2, S, S) chart shift, V expressions per code; None when neutral."""
    ambient: Tensor | None
    """(B * V, A, S, S) ambient channels over the chart; None when neutral."""
    taps: dict[str, Tensor]
    """Every backbone block's output by name."""


class PaintedGenerator(RadianceGenerator):
    """Mapping network, backbone, expression field and background; subclasses say what the map means.

    Args:
        map_channels: channels of the painted map.
        resolution: native image side in pixels.
        backbone: "light" (:class:`StyleBackbone`) or "stylegan2" (:class:`StyleGAN2Backbone`).
        channels: backbone channels from the smallest block, of side ``start``, to the largest.
        mapping_layers, mapping_hidden: of the mapping network.
        normalize_z: as StyleGAN; off where the length of z carries meaning.
        detail_maps: of the light backbone, see :class:`StyleBackbone`.
        octaves: of z's Fourier features, see :class:`MappingNetwork`.
        lr_multiplier: of the mapping network and of light backbones' affines.
        expressions: names of the expression coefficients.
        expression_tap: backbone block whose features steer the expression field; the last but one by default.
        ambient: ambient channels of the expression field.
        background: "separate" (a small painted image behind the head) or "none" (white).
        chart: arguments of :class:`HeadChart`, on which expressions act. rig: arguments of :class:`Rig`.

    Raises:
        ValueError: when ``backbone``, ``background`` or ``expression_tap`` is unknown, or they do not go together.
    """

    w_mean: Tensor

    def __init__(
        self,
        map_channels: int,
        z_dim: int,
        resolution: int = 64,
        w_dim: int = 128,
        backbone: str = "light",
        channels: Sequence[int] = (128, 96, 64, 48),
        start: int = 8,
        mapping_layers: int = 3,
        mapping_hidden: int = 192,
        normalize_z: bool = True,
        lr_multiplier: float = 1.0,
        octaves: int = 0,
        detail_maps: bool = False,
        expressions: Sequence[str] = (),
        expression_tap: str | None = None,
        ambient: int = 24,
        background: str = "separate",
        background_channels: Sequence[int] = (32, 32, 24, 16),
        chart: dict[str, Any] | None = None,
        rig: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {BACKBONES}, got {backbone!r}")
        if backbone != "light" and detail_maps:
            raise ValueError(f"detail_maps are of the light backbone, not of {backbone!r}")
        if background not in BACKGROUNDS:
            raise ValueError(f"background must be one of {BACKGROUNDS}, got {background!r}")
        self.z_dim, self.resolution, self.w_dim = z_dim, resolution, w_dim
        self.expressions = tuple(expressions)
        self.rig = Rig(**(rig or {}))
        self.map_network = MappingNetwork(
            z_dim,
            w_dim,
            layers=mapping_layers,
            hidden=mapping_hidden,
            normalize=normalize_z,
            lr_multiplier=lr_multiplier,
            octaves=octaves,
        )
        if backbone == "light":
            self.backbone = StyleBackbone(
                w_dim, channels, map_channels, start=start, lr_multiplier=lr_multiplier, detail_maps=detail_maps
            )
        else:
            self.backbone = StyleGAN2Backbone(w_dim, channels, map_channels, start=start)
        self.num_ws = self.backbone.num_ws
        self.background = None
        if background == "separate":
            self.background = StyleBackbone(w_dim, background_channels, 3, start=4, lr_multiplier=lr_multiplier)
            self.num_ws += 1  # one code paints the background
        if self.expressions:
            self.expression_tap = expression_tap or self.tap_names[-2]
            self.check_taps([self.expression_tap])
            width = channels[self.tap_names.index(self.expression_tap)]
            self.chart = HeadChart(**(chart or {}))
            self.expression_field = ExpressionField(len(self.expressions), width, ambient=ambient)
        self.register_buffer("w_mean", torch.zeros(w_dim))

    @property
    def mean_latents(self) -> Latents:
        return Latents({"ws": self.w_mean.expand(1, self.num_ws, -1)})

    @torch.no_grad()
    def update_mean(self, count: int = 10_000, seed: int = 0) -> None:
        """Set the mean code from ``count`` random z."""
        z = self.sample_z(count, torch.Generator().manual_seed(seed)).to(self.w_mean.device)
        self.w_mean.copy_(self.map_network(z).mean(0))

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        if z.shape[1:] not in ((self.z_dim,), (self.num_ws, self.z_dim)):
            raise ValueError(f"z must be (B, {self.z_dim}) or (B, {self.num_ws}, {self.z_dim}), got {tuple(z.shape)}")
        w = self.map_network(z)
        latents = Latents({"ws": w if w.ndim == 3 else w[:, None].expand(-1, self.num_ws, -1)})
        return latents if truncation == 1 else latents.truncate(self.mean_latents, truncation, cutoff)

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """``main`` and ``style``: mapping network, style affines, outputs and detail maps.

        The latter are what limits regression where learning rates are equalised.
        """
        main: list[nn.Parameter] = []
        style: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            (style if any(part in _STYLE_PARTS for part in name.split(".")) else main).append(parameter)
        return {"main": ParameterGroup(main), "style": ParameterGroup(style)}

    @property
    def tap_names(self) -> tuple[str, ...]:
        return self.backbone.tap_names

    def affine_weights(self, layers: Sequence[int] | None = None) -> Tensor:
        affines = self.backbone.affines()
        chosen = affines if layers is None else [affines[i] for i in layers]
        return torch.cat([affine.weight * affine.scale for affine in chosen])  # type: ignore[operator]

    def paint(
        self, ws: Latents, expression: Tensor | None = None, randomness: torch.Generator | Tensor | None = None
    ) -> Painting:
        """One backbone pass.

        Args:
            expression: (B * V, E), V expressions per code; None is neutral.
            randomness: a generator draws the noise maps of StyleGAN2's backbone; they are the stored ones otherwise.
        """
        noise = randomness if isinstance(randomness, torch.Generator) else "const"
        painted, taps = self.backbone(ws.ws[:, : self.backbone.num_ws], noise)
        if expression is None:
            return Painting(painted, None, None, taps)
        shift, ambient = self.expression_field(taps[self.expression_tap], expression, self.backbone.sides[-1])
        return Painting(painted, shift, ambient, taps)

    def backdrop(self, ws: Latents, resolution: int) -> Tensor:
        """The image behind the head (B, 3, R, R), attached to the screen as in a studio portrait."""
        if self.background is None:
            return ws.ws.new_ones(len(ws), 3, resolution, resolution)
        painted, _ = self.background(ws.ws[:, -1:].expand(-1, self.background.num_ws, -1))
        return torch.tanh(F.interpolate(painted, size=(resolution,) * 2, mode="bilinear", align_corners=False) / 2)


def over_chart(fields: Tensor, uv: Tensor) -> Tensor:
    """Look up chart maps (B, C, S, S) at chart coordinates (B, P, 2), in fp32: (B, P, C)."""
    return F.grid_sample(fields.float(), uv[:, :, None].float(), align_corners=False, padding_mode="border")[..., 0].mT
