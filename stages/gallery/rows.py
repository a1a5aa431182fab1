"""A page of rows of pictures, without external resources."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

TEMPLATE = Path(__file__).with_name("rows.html")


def page(title: str, rows: Mapping[str, Sequence[tuple[str, str]]], notes: Sequence[str] = ()) -> str:
    """The HTML.

    Args:
        rows: by heading, pictures: file beside the page, caption.
        notes: of what was left out.
    """
    sections = []
    for heading, pictures in rows.items():
        cells = "".join(
            f'<figure><img src="{_text(file)}" alt="{_text(caption)}" loading="lazy">'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
            for file, caption in pictures
        )
        sections.append(f'<section id="{_text(heading)}"><h2>{_text(heading)}</h2><div>{cells}</div></section>')
    left = "".join(f"<li>{_text(note)}</li>" for note in notes)
    parts = {
        "title": _text(title),
        "notes": f"<h2>Left out</h2><ul>{left}</ul>" if notes else "",
        "rows": "\n".join(sections),
    }
    document = TEMPLATE.read_text("utf-8")
    for name, content in parts.items():
        document = document.replace(f"<!--{name}-->", content)
    return document


def _text(value: str) -> str:
    return html.escape(value, quote=True)
