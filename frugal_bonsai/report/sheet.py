"""Text and tables on a rich console, printed as they are.

In: plain text. Out: lines on the console. Text is wrapped at the console's width; a table whose
numbers need more is printed wider, not truncated. Markup and emoji codes are not interpreted: a
path such as ``[red]`` stays as it is. If the encoding has only ASCII, so has the output.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# Narrowest column that text is folded to.
_LEAST_TEXT_WIDTH = 14
# rich's SIMPLE_HEAD, a rule below the head and nothing else, with a dash that every encoding has.
_ASCII_BOX = "    \n    \n -- \n    \n    \n    \n    \n    \n"


class Sheet:
    """Prints on one console.

    Args:
        console: Console that is printed on.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._begun = console, False

    def heading(self, text: str) -> None:
        """Print a line in bold, after an empty line unless it is the first."""
        if self._begun:
            self._print("")
        self._begun = True
        self._print("\n".join(self._wrapped(text)), style="bold")

    def say(self, text: str) -> None:
        """Print a wrapped paragraph with its second line indented."""
        self._begun = True
        self._print("\n".join(self._wrapped(text)))

    def warn(self, warnings: Iterable[str]) -> None:
        """Print warnings as paragraphs."""
        for text in warnings:
            self.say(f"warning: {text}")

    def verbatim(self, text: str) -> None:
        """Print a line to copy, which is never wrapped."""
        self._begun = True
        self._print(text)

    def blank(self) -> None:
        """Print an empty line."""
        self._print("")

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1
    ) -> None:
        """Print a table: columns of text, which fold, then columns of numbers, which do not.

        Args:
            columns: Heads of the columns; all empty for a table without a head.
            rows: Cells of each row.
            left: Number of columns of text.
        """
        from rich.segment import Segments

        self._begun = True
        cells = [list(row) for row in rows]
        widths = [
            max([*map(len, column.split()), *(len(row[at]) for row in cells)], default=1)
            for at, column in enumerate(columns)
        ]
        least = [min(w, _LEAST_TEXT_WIDTH) if at < left else w for at, w in enumerate(widths)]
        table = self._table(columns, least, left)
        for row in cells:
            table.add_row(*map(_text, row))
        needed = sum(least) + 3 * len(columns)
        options = self._console.options.update_width(max(self._console.width, needed))
        segments = self._console.render(table, options)
        self._console.print(Segments(segments), soft_wrap=True, end="")

    def _table(self, columns: Sequence[str], least: Sequence[int], left: int) -> Table:
        from rich.box import SIMPLE_HEAD, Box
        from rich.table import Table

        ascii_only = self._console.options.ascii_only
        table = Table(
            box=Box(_ASCII_BOX, ascii=True) if ascii_only else SIMPLE_HEAD,
            show_header=any(columns),
            show_edge=False,
            pad_edge=False,
        )
        for at, column in enumerate(columns):
            number = at >= left
            table.add_column(
                _text(column),
                justify="right" if number else "left",
                no_wrap=number,
                overflow="fold",
                min_width=least[at],
            )
        return table

    def _wrapped(self, text: str) -> list[str]:
        return textwrap.wrap(
            text,
            width=max(self._console.width, 20),
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(_text(text, style), soft_wrap=True)


def _text(text: str, style: str = "") -> Text:
    """Return text that rich does not interpret."""
    from rich.text import Text

    return Text(text, style=style)
