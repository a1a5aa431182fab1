"""The gallery: one page, without external resources, that shows everything an artifact's media folder holds."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.artifact import Artifact, manifest_id, strictest
from models.camera import Rig
from models.rendering.mesh import Mesh
from models.version import VERSION

DENSITY = 0.66  # of the page's pixels to a picture's: sheets stay crisp on dense screens
LEAD, LEAD_2D = "One picture in, a head in three dimensions out.", "Pictures of a 2D generator."
TEMPLATE = Path(__file__).with_name("gallery.html")


@dataclass
class Figure:
    """A picture or an MP4 with its words: file name beside the page, heading, one sentence, size in pixels."""

    file: str
    title: str
    text: str
    width: int
    height: int


@dataclass
class Card:
    """What the page shows of one subject; files are names beside the page.

    Attributes:
        id: of the subject.
        facts: words and values under its name.
        reference: the input. video, poster: the turntable; a poster alone is a picture. mesh: of :func:`packed_mesh`.
        figures: in the order of the page.
        downloads: files offered by name.
        notes: what is missing, and why.
    """

    id: str
    facts: dict[str, str] = field(default_factory=dict)
    reference: str | None = None
    video: str | None = None
    poster: str | None = None
    mesh: str | None = None
    figures: list[Figure] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The card as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Card:
        """The card that :meth:`to_json` wrote."""
        values = json.loads(text)
        return Card(**{**values, "figures": [Figure(**figure) for figure in values["figures"]]})


def page(cards: Sequence[Card], artifact: Artifact) -> str:
    """The HTML of the gallery.

    Args:
        artifact: the shown one; the page lists its lineage, licences and metrics.
    """
    title = "Galatea" if len(cards) != 1 else f"Galatea: {cards[0].id}"
    links = "".join(f'<a href="#{_text(card.id)}">{_text(card.id)}</a>' for card in cards) if len(cards) > 1 else ""
    parts = {
        "title": _text(title),
        "lead": _text(LEAD if any(card.video for card in cards) else LEAD_2D),
        "nav": f"<nav>{links}</nav>" if links else "",
        "cards": "\n".join(_card(card) for card in cards),
        "about": _about(artifact),
    }
    document = TEMPLATE.read_text("utf-8")
    for name, content in parts.items():
        document = document.replace(f"<!--{name}-->", content)
    return document


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _card(card: Card) -> str:
    facts = "".join(f"<span><b>{_text(k)}</b> {_text(v)}</span>" for k, v in card.facts.items())
    stage = []
    if card.reference:
        stage.append(_frame(f'<img src="{_text(card.reference)}" alt="the input">', "input"))
    if card.video:
        video = (
            f'<video src="{_text(card.video)}" poster="{_text(card.poster)}" autoplay loop muted playsinline></video>'
        )
        stage.append(_frame(video, "turned"))
    elif card.poster:
        stage.append(_frame(f'<img src="{_text(card.poster)}" alt="the head">', "picture"))
    if card.mesh:
        canvas = f'<canvas data-mesh="{_text(card.id)}" data-file="{_text(card.mesh)}"></canvas>'
        stage.append(_frame(canvas, 'mesh: drag to turn <button type="button">clay</button>', markup=True))
    downloads = "".join(f'<a href="{_text(f)}" download>{_text(_kind(f, card.id))}</a>' for f in card.downloads)
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in card.notes)
    figures = "".join(
        f'<figure style="width: {round(f.width * DENSITY)}px">'
        f"<figcaption><h3>{_text(f.title)}</h3><p>{_text(f.text)}</p></figcaption>"
        f'<a href="{_text(f.file)}">{_media(f)}</a></figure>'
        for f in card.figures
    )
    return (
        f'<section id="{_text(card.id)}"><header><h2>{_text(card.id)}</h2><p class="facts">{facts}</p></header>'
        f'<div class="stage">{"".join(stage)}</div><p class="downloads">{downloads}</p>{notes}'
        f'<div class="figures">{figures}</div></section>'
    )


def _kind(file: str, identity: str) -> str:
    """What a download is: "mesh glb" of mesh_ID.glb."""
    path = Path(file)
    return f"{path.stem.removesuffix(f'_{identity}')} {path.suffix[1:]}"


def _media(figure: Figure) -> str:
    source, size = f'src="{_text(figure.file)}"', f'width="{figure.width}" height="{figure.height}"'
    if figure.file.endswith(".mp4"):
        return f"<video {source} {size} autoplay loop muted playsinline></video>"
    return f'<img loading="lazy" {source} alt="{_text(figure.title)}" {size}>'


def _frame(content: str, caption: str, markup: bool = False) -> str:
    return f"<div><div class=frame>{content}</div><span>{caption if markup else _text(caption)}</span></div>"


def _about(artifact: Artifact) -> str:
    rows = "".join(
        f"<tr><td>{'&nbsp;&nbsp;' * depth}{_text(role)}</td><td>{_text(manifest['stage'])}</td>"
        f"<td><code>{manifest_id(manifest)[:12]}</code></td><td>{_numbers(manifest['metrics'])}</td></tr>"
        for depth, role, manifest in _lineage("shown here", artifact.manifest)
    )
    licences = artifact.manifest["licences"]
    listed = "".join(
        f"<li>{_text(e.get('name', 'weights'))}: {_text(e['licence'])}"
        + (f", from {_text(_origin(e['origin']))}" if e.get("origin") else "")
        + "</li>"
        for e in licences
    )
    terms = f"<p>Strictest licence of all parts: <b>{_text(strictest(licences))}</b>.</p><ul>{listed}</ul>"
    return (
        "<h3>Where it comes from</h3><table><thead><tr><th>role</th><th>stage</th><th>artifact</th><th>metrics</th>"
        f"</tr></thead><tbody>{rows}</tbody></table><h3>Licences</h3>"
        f"{terms if licences else '<p>No imported weights: Apache-2.0.</p>'}"
        f'<p class="note">galatea {_text(VERSION)}</p>'
    )


def _lineage(role: str, manifest: Mapping[str, Any], depth: int = 0) -> list[tuple[int, str, Mapping[str, Any]]]:
    rows = [(depth, role, manifest)]
    for name, parent in manifest["parents"].items():
        rows += _lineage(name, parent, depth + 1)
    return rows


def _numbers(metrics: Mapping[str, float | None]) -> str:
    return (
        "<br>".join(f"{_text(k)} {'not finite' if v is None else f'{v:.4g}'}" for k, v in metrics.items()) or "&ndash;"
    )


def _origin(text: str) -> str:
    return text.partition("://")[2] or text  # named, not linked: the page points to nothing outside


def packed_mesh(identity: str, mesh: Mesh, rig: Rig) -> str:
    """The mesh as a script for the page: 16-bit positions in the rig's cube, 8-bit normals and colours.

    A script, because a page opened from a folder may not read any other file.
    """
    half = rig.radius / (2 * rig.focal) * 1.1  # the mesh fills the cube, with a layer around
    places = (mesh.vertices - torch.tensor(rig.pivot)) / half
    arrays = {
        "position": (places.clamp(-1, 1) * 32767).round().numpy().astype("<i2"),
        "normal": (mesh.normals * 127).round().numpy().astype("<i1"),
        "colour": ((mesh.colours + 1) * 127.5).round().clamp(0, 255).numpy().astype("<u1"),
        "index": mesh.faces.numpy().astype("<u4"),
    }
    content: dict[str, Any] = {name: _base64(array) for name, array in arrays.items()}
    content |= {"half": half, "radius": rig.radius, "focal": rig.focal}
    return f"(window.galatea = window.galatea || {{}})[{json.dumps(identity)}] = {json.dumps(content)};\n"


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
