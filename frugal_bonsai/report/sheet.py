"""A sheet of text and tables on a rich console, which neither cuts nor interprets what it prints.

In: plain text. Out: on the console. Text is wrapped at the console's width; a table whose numbers
need more than that is printed wider rather than cut. No markup, no emoji codes: a path such as
``[red]`` is printed as it is. Only ASCII where the encoding has nothing else.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# Columns of text are folded, but not below this.
_LEAST_TEXT_WIDTH = 14
# rich's SIMPLE_HEAD, a rule below the head and nothing else, with a dash that every encoding has.
_ASCII_BOX = "    \n    \n -- \n    \n    \n    \n    \n    \n"


class Sheet:
    """Prints on one console.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._begun = console, False

    def heading(self, text: str) -> None:
        """A line in bold; an empty line before all but the first."""
        if self._begun:
            self._print("")
        self._begun = True
        self._print("\n".join(self._wrapped(text)), style="bold")

    def say(self, text: str) -> None:
        """A paragraph, wrapped, its second line indented."""
        self._begun = True
        self._print("\n".join(self._wrapped(text)))

    def verbatim(self, text: str) -> None:
        """A line to copy: never wrapped."""
        self._begun = True
        self._print(text)

    def blank(self) -> None:
        """An empty line."""
        self._print("")

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1
    ) -> None:
        """A table: the first ``left`` columns are text and fold, the others numbers, which do not.

        Args:
            columns: heads; all empty for a table without a head.
            rows: cells.
            left: how many columns of text.
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
    """Text that rich does not interpret."""
    from rich.text import Text

    return Text(text, style=style)
