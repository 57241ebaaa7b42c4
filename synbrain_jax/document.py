"""The result of a study or of a run as data: sections of text, tables, figures and claims, and where they are kept.

Apart from `page.py`, which shows it, so that a study hands over numbers and need not know how a page is written.
All text (titles, notes, captions, claims) is plain: a blank line ends a paragraph, `backticks` set code, and nothing
else is markup.
"""

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from synbrain_jax.errors import InputError
from synbrain_jax.files import read_text, write_text
from synbrain_jax.statistics import Estimate

FILE = "document.json"
FORMAT = 1
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins

Cell = str | int | float | Estimate | None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each its name. A missing or not finite number is a dash.

    best: {column: "high", "low", or the number to be near}: where the best row is marked, with those that cannot be
      told from it. A column that is not named has no best.
    apart: names of the rows that do not compete, such as a noise ceiling.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    best: Mapping[str, Literal["high", "low"] | float] = dataclasses.field(default_factory=dict)
    apart: tuple[str, ...] = ()

    def __post_init__(self):
        if wrong := [row[:1] for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"table {self.title!r}: the row {wrong[0]} has not {len(self.columns)} cells")
        if unknown := self.best.keys() - set(self.columns):
            raise ValueError(f"table {self.title!r}: best of {sorted(unknown)}, which are no columns")


@dataclasses.dataclass(frozen=True)
class Figure:
    """NAME.png beside the document."""

    name: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement, whether the numbers bear it out (None: they cannot tell), and these numbers in words."""

    text: str
    holds: bool | None
    evidence: str


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    claims: tuple[Claim, ...] = ()


@dataclasses.dataclass(frozen=True)
class Document:
    """facts: how it was made, in words, by name: command, machine, date, seconds, seeds, versions."""

    title: str
    facts: Mapping[str, str]
    sections: tuple[Section, ...]

    @property
    def claims(self) -> tuple[Claim, ...]:
        return tuple(claim for section in self.sections for claim in section.claims)

    @property
    def figures(self) -> tuple[Figure, ...]:
        return tuple(figure for section in self.sections for figure in section.figures)

    def save(self, folder: str | os.PathLike) -> epath.Path:
        """Writes document.json into `folder`, where the figures are; returns its path."""
        path = epath.Path(folder) / FILE
        content = {"format": FORMAT, **_plain(self)}
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path


def load(folder: str | os.PathLike) -> Document:
    """The document that `Document.save` left in `folder`. InputError where there is none, or it is damaged."""
    path = epath.Path(folder) / FILE
    text = read_text(path)
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return Document(content["title"], content["facts"], tuple(map(_section, content["sections"])))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: is no document ({reason}); remove it and run its command again") from error


def read_figures(document: Document, folder: str | os.PathLike) -> dict[str, bytes]:
    """The PNG files of a document's figures, by name. InputError where one is missing or no PNG."""
    pictures = {}
    for figure in document.figures:
        path = epath.Path(folder) / f"{figure.name}.png"
        try:
            pictures[figure.name] = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error}); run the command that draws it again") from error
        if pictures[figure.name][:8] != PNG:
            raise InputError(f"{path}: is no PNG picture; remove it and run the command that draws it again")
    return pictures


def _plain(value: Any) -> Any:
    """As JSON has it: a number that is not finite is null."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _section(content: dict[str, Any]) -> Section:
    return Section(
        content["title"],
        content["text"],
        tuple(_table(**table) for table in content["tables"]),
        tuple(Figure(**figure) for figure in content["figures"]),
        tuple(Claim(**claim) for claim in content["claims"]),
    )


def _table(columns: list[str], rows: list[list[Any]], apart: list[str], **rest: Any) -> Table:
    return Table(
        columns=tuple(columns), rows=tuple(tuple(map(_read_cell, row)) for row in rows), apart=tuple(apart), **rest
    )


def _read_cell(content: Any) -> Cell:
    if not isinstance(content, dict):
        return content
    return Estimate(**content | {"value": math.nan if content["value"] is None else content["value"]})


# ---- cells -----------------------------------------------------------------------------------------


def cell_text(cell: Cell) -> str:
    """A cell as it is printed: three decimals, an interval in brackets, a dash for what is missing or not finite."""
    if isinstance(cell, Estimate):
        value, interval = cell_text(cell.value), interval_text(cell)
        return f"{value} {interval}" if interval else value
    if isinstance(cell, str):
        return cell
    if cell is None:
        return "-"
    if isinstance(cell, numbers.Integral):
        return f"{cell:,}"
    if not math.isfinite(cell):
        return "-"
    return f"{cell:z.3f}" if abs(cell) < 1e4 else f"{cell:.2e}"


def interval_text(cell: Cell) -> str:
    """ "[low, high]" of an estimate, or nothing."""
    if not isinstance(cell, Estimate) or any(_number(end) is None for end in (cell.low, cell.high)):
        return ""
    return f"[{cell_text(cell.low)}, {cell_text(cell.high)}]"


def _number(cell: Cell) -> float | None:
    value = cell.value if isinstance(cell, Estimate) else cell
    return None if value is None or isinstance(value, str) or not math.isfinite(value) else float(value)


def best_rows(table: Table, column: int) -> set[int]:
    """Numbers of the rows to mark in a column: the best, those printed alike, and those whose interval holds its value.

    None where the column has no best, or where that would mark every row that competes.
    """
    goal = table.best.get(table.columns[column])
    cells = {at: row[column] for at, row in enumerate(table.rows) if row[0] not in table.apart}
    known = {at: value for at, cell in cells.items() if (value := _number(cell)) is not None}
    if goal is None or not known:
        return set()
    loss = {"high": lambda value: -value, "low": lambda value: value}.get(goal, lambda value: abs(value - goal))
    best = min(known.values(), key=loss)
    marked = {at for at, value in known.items() if cell_text(value) == cell_text(best) or _holds(cells[at], best)}
    return set() if len(marked) == len(known) else marked


def _holds(cell: Cell, value: float) -> bool:
    return bool(interval_text(cell)) and cell.low <= value <= cell.high
