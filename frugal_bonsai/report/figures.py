"""The figures of a report's page, as SVG.

In: the numbers of :func:`frugal_bonsai.report.page.page_context`. Out: SVG elements; the same
numbers give the same text. Imports matplotlib (extra ``plots``) when a figure is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from frugal_bonsai.errors import OptionError

_GREY = "#808080"  # reads on white and on black
_BLUE = "#3d8bd4"
_STYLE = {
    "svg.hashsalt": "frugal-bonsai",
    "svg.fonttype": "none",
    "text.color": _GREY,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}


def draw_figures(charts: Mapping[str, Any]) -> dict[str, str]:
    """Return the SVG of each figure that has numbers: ``kept``, ``rounds``, ``memory``.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "--format html draws figures with matplotlib, which is not installed; run "
            "pip install 'frugal-bonsai[plots]', or use --format md"
        ) from error
    drawn = {}
    with matplotlib.rc_context(_STYLE):
        for name, draw in (("kept", _kept), ("rounds", _rounds), ("memory", _memory)):
            if charts[name]:
                figure = Figure(layout="constrained")
                draw(figure, charts[name])
                drawn[name] = _svg(figure)
    return drawn


def _kept(figure: Any, shares: Mapping[str, list[float]]) -> None:
    """Draw a heat map: a row for each layer, a column for each kind."""
    kinds, layers = list(shares), len(next(iter(shares.values())))
    figure.set_size_inches(1.5 + 1.5 * len(kinds), 0.8 + 0.25 * layers)
    axes = figure.subplots()
    rows = [[shares[kind][layer] for kind in kinds] for layer in range(layers)]
    axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(layers))
    axes.set_ylabel("layer")
    for layer, row in enumerate(rows):
        for at, share in enumerate(row):
            colour = "black" if share > 0.6 else "white"
            axes.text(at, layer, f"{share:.0%}", color=colour, ha="center", va="center")


def _rounds(figure: Any, points: list[tuple[float, float]]) -> None:
    figure.set_size_inches(6, 3)
    axes = figure.subplots()
    axes.plot([100 * p[0] for p in points], [p[1] for p in points], marker="o", color=_BLUE)
    axes.set_xlabel("block weights removed (%)")
    axes.set_ylabel("search perplexity")


def _memory(figure: Any, items: list[tuple[str, int]]) -> None:
    items = sorted(items, key=lambda item: item[1])[-12:]
    figure.set_size_inches(6, 0.8 + 0.25 * len(items))
    axes = figure.subplots()
    axes.barh([str(i) for i in range(len(items))], [i[1] / 2**20 for i in items], color=_BLUE)
    axes.set_yticks(range(len(items)), [name for name, _ in items])
    axes.set_xlabel("planned MiB")


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
