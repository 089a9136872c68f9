"""The figures of a page, as SVG.

In: charts as plain values, each with a ``kind``. Out: SVG elements; the same numbers give the same
text. Imports matplotlib (extra ``plots``) when a figure is drawn. Holds one figure at a time.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from frugal_bonsai.errors import OptionError

Chart = Mapping[str, Any]
# Text and axes are drawn in a colour that nothing else has; the page replaces it by its own ink.
_INK = "#010203"
# Okabe and Ito's colours that can be told apart on white and on black.
COLOURS = ("#2f86d0", "#e07b1a", "#1f9e77", "#cc5fa5", "#8b7bd8", "#a8962a", "#7f8790")
_STYLE = {
    "svg.hashsalt": "frugal-bonsai",
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}
# More columns than this have no text in the cells of a heat map.
_MOST_TEXTS = 24


def require_plots() -> None:
    """Raise unless matplotlib is installed.

    Raises:
        OptionError: It is not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "--format html draws figures with matplotlib, which is not installed; run "
            "pip install 'frugal-bonsai[plots]', or use --format md"
        ) from error


def draw_figures(charts: Mapping[str, Chart]) -> dict[str, str]:
    """Return the SVG of each chart.

    Raises:
        OptionError: matplotlib is not installed.
    """
    require_plots()
    import matplotlib
    from matplotlib.figure import Figure

    kinds: dict[str, Callable[[Any, Chart], None]] = {
        "heat": _heat,
        "lines": _lines,
        "bars": _bars,
        "scatter": _scatter,
        "panels": _panels,
    }
    drawn = {}
    with matplotlib.rc_context(_STYLE):
        for name, chart in charts.items():
            figure = Figure(layout="constrained")
            kinds[chart["kind"]](figure, chart)
            drawn[name] = _svg(figure, name)
    return drawn


def _heat(figure: Any, chart: Chart) -> None:
    """Draw shares from 0 to 1: names of ``rows`` and ``columns``, and rows of ``values``."""
    rows, columns = chart["rows"], chart["columns"]
    figure.set_size_inches(9.5, 1.2 + 0.42 * len(rows))
    axes = figure.subplots()
    image = axes.imshow(chart["values"], aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(rows)), rows)
    step = 1 + len(columns) // 40
    axes.set_xticks(range(0, len(columns), step), columns[::step])
    axes.set_xlabel(chart["x"])
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, format=_percent, pad=0.01)
    bar.outline.set_visible(False)
    if len(columns) > _MOST_TEXTS:
        return
    for at, row in enumerate(chart["values"]):
        for column, share in enumerate(row):
            colour = "black" if share > 0.6 else "white"
            axes.text(
                column, at, f"{share:.0%}", color=colour, ha="center", va="center", fontsize=9
            )


def _lines(figure: Any, chart: Chart) -> None:
    """Draw ``series`` of points by name, and horizontal ``levels`` by name, such as caps."""
    figure.set_size_inches(6.2, 3.1)
    axes = figure.subplots()
    marker = "" if chart.get("dense") else "o"
    for at, (name, points) in enumerate(chart["series"].items()):
        colour = COLOURS[at % len(COLOURS)]
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, marker=marker, color=colour, label=name, markersize=5)
    for at, (name, level) in enumerate(chart.get("levels", {}).items()):
        dashes = ("--", ":", "-.")[at % 3]
        axes.axhline(level, linestyle=dashes, linewidth=1, color=COLOURS[-1], label=name)
    if chart.get("logarithmic"):
        axes.set_yscale("log")
        _label_logarithms(axes.yaxis)
    else:
        axes.set_ylim(bottom=chart.get("least"), top=chart.get("most"))
    if chart.get("whole"):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(chart["x"])
    axes.set_ylabel(chart["y"])
    _legend(axes)


def _bars(figure: Any, chart: Chart) -> None:
    """Draw horizontal bars with ``labels``, of stacked ``parts``, and ``marks`` beside them."""
    labels, left = chart["labels"], [0.0] * len(chart["labels"])
    figure.set_size_inches(6.8, 1.3 + 0.3 * len(labels) + 0.1 * len(chart["parts"]))
    axes = figure.subplots()
    for at, (name, sizes) in enumerate(chart["parts"].items()):
        axes.barh(labels, sizes, left=left, color=COLOURS[at % len(COLOURS)], label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for name, sizes in chart.get("marks", {}).items():
        found = [
            (size, label) for size, label in zip(sizes, labels, strict=True) if size is not None
        ]
        axes.plot(
            [size for size, _ in found],
            [label for _, label in found],
            linestyle="",
            marker="D",
            markersize=6,
            markerfacecolor="none",
            color=_INK,
            label=name,
        )
    for at, (name, level) in enumerate(chart.get("levels", {}).items()):
        dashes = ("--", ":", "-.")[at % 3]
        axes.axvline(level, linestyle=dashes, linewidth=1.2, color=_INK, label=name)
    axes.invert_yaxis()
    axes.set_xlabel(chart["x"])
    if chart.get("logarithmic"):
        axes.set_xscale("symlog", linthresh=1)
    _legend(axes)


def _scatter(figure: Any, chart: Chart) -> None:
    """Draw ``groups`` of points by name; a third value of a point is its label."""
    figure.set_size_inches(6.2, 3.4)
    axes = figure.subplots()
    _points(axes, chart["groups"], dict(zip(chart["groups"], COLOURS, strict=False)))
    if chart.get("log_x"):
        axes.set_xscale("log")
        _label_logarithms(axes.xaxis)
        axes.tick_params(axis="x", which="both", labelsize=9)
    axes.set_xlabel(chart["x"])
    axes.set_ylabel(chart["y"])
    _legend(axes)


def _panels(figure: Any, chart: Chart) -> None:
    """Draw several ``panels`` of grouped points that share their vertical axis."""
    panels = chart["panels"]
    names = dict.fromkeys(name for panel in panels for name in panel["groups"])
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}
    colours |= dict.fromkeys(chart.get("references", ()), _INK)
    figure.set_size_inches(9.5, 3.8 + 0.06 * len(names))
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(every, panels, strict=True):
        _points(axes, panel["groups"], colours)
        axes.set_xlabel(panel["x"])
        axes.margins(0.12)
    if chart.get("logarithmic"):
        every[0].set_yscale("log")
        _label_logarithms(every[0].yaxis)
    every[0].set_ylabel(chart["y"])
    _legend(every[0])


def _points(axes: Any, groups: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Draw groups of points in their colours, with their labels."""
    size = 9 if sum(map(len, groups.values())) < 40 else 7
    for name, points in groups.items():
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.scatter(x, y, s=28, color=colours.get(name, COLOURS[-1]), label=name, alpha=0.85)
        for point in points:
            if len(point) > 2:
                axes.annotate(
                    point[2], point[:2], xytext=(4, 3), textcoords="offset points", fontsize=size
                )


def _label_logarithms(axis: Any) -> None:
    """Write plain numbers, and those between powers of ten only where these are few."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.5)))


def _legend(axes: Any) -> None:
    """Put the legend outside of the data, if there is more than one entry."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        columns = max(1, min(len(names), 82 // (max(map(len, names)) + 8)))
        axes.figure.legend(handles, names, loc="outside upper left", ncols=columns, fontsize=10)


def _percent(value: float, _: int | None = None) -> str:
    return f"{value:.0%}"


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def _svg(figure: Any, name: str) -> str:
    """Return the figure as an element whose ids no other figure of the page has."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
