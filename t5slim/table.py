"""Objects that show themselves: aligned in a terminal, as an HTML table in a notebook."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any


class Table:
    """Base of objects whose `repr` is a table, of the cells in `_rows`."""

    _rows: Callable[[], Iterable[Sequence[Any]]]

    def __repr__(self) -> str:
        rows = [[*map(str, row)] for row in self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        cells = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in self._rows()]
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
