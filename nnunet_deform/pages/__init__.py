"""What self-contained HTML pages share: templates, their style, and figures that suit a light and a dark page."""

from __future__ import annotations

import base64
import html
import io
import re
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow and black; the blue is lighter, for
# dark pages.
COLOURS = ("#1B86CF", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31", "#7F7F7F")
INK = "#010203"  # replaced by the page's own text colour
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nnunet-deform",  # the same figure has the same identifiers in every run
    "font.family": "sans-serif",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def colour(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def new_figure(width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure in inches and its axes, [rows, columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(squeeze=False, **options)


def svg(figure: Figure, name: str, alt: str) -> str:
    """Inline SVG, whose text has the page's own colour.

    Args:
        name: goes before identifiers, because all figures share the page's name space; alt: what the figure shows.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", text)
    # As wide as the page has room for, and no wider than drawn.
    size = re.compile(r'width="([^"]+)pt" height="[^"]+pt"')
    drawn = size.search(text)
    assert drawn is not None
    return size.sub(f'style="max-width: {drawn[1]}pt" role="img" aria-label="{html.escape(alt)}"', text, count=1)


def png_url(figure: Figure) -> str:
    """A PNG as data URL, at the figure's own resolution."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def style() -> str:
    """The style sheet."""
    return files("nnunet_deform.pages").joinpath("style.css").read_text(encoding="utf-8")


@cache
def template(package: str, name: str) -> Template:
    """A package's template, compiled once. Names that it is not given are errors."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(files(package).joinpath(name).read_text(encoding="utf-8"))
