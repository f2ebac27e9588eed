"""Rows of prompts out of files and data sets, each with where it stands."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import DistillError, HubAccessError

# A row's place, such as "line 3", and what is there: a string if all is well.
Row = tuple[str, Any]

USUAL_COLUMNS = ("prompt", "caption", "text")


def read_file(path: Path, column: str | None) -> Iterator[Row]:
    """The prompts of a file, by its suffix: see `PromptList.from_file`.

    Raises:
        DistillError: no such file; an unknown suffix; not UTF-8; broken JSON, CSV or parquet; or no
            such column. Names the file, and the line where there is one.
    """
    if not path.is_file():
        raise DistillError(
            f"{str(path)!r} is {'a folder' if path.is_dir() else 'no such file'}. Pass a list of "
            "prompts, or the path of a text file with one on each line. For a data set of the Hub, "
            "see t5slim.distill.PromptList.from_dataset."
        )
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise DistillError(
            f"{path} ends in {suffix!r}; expected one of {', '.join(filter(None, _READERS))}, or a "
            "text file without a suffix."
        )
    return _READERS[suffix](path, column)


def read_dataset(
    repo_id: str, column: str | None, config: str | None, split: str, revision: str | None
) -> Iterator[Row]:
    """The prompts of a data set, streamed: see `PromptList.from_dataset`."""
    datasets = _optional("datasets", f"The data set {repo_id!r}")
    where = f"data set {repo_id!r}"

    def stream() -> Iterator[dict[str, Any]]:
        # Never trust_remote_code: data sets that are programs are refused by `datasets` itself.
        found = datasets.load_dataset(
            repo_id, config, split=split, revision=revision, streaming=True
        )
        if column is not None and column in (found.column_names or ()):
            found = found.select_columns([column])
        yield from found

    rows = stream()
    number, chosen = 0, None
    while True:
        try:
            row = next(rows, None)
        except OSError as error:
            raise HubAccessError(
                f"The {where} can't be read after {number} rows: {error}. Is the name right, the "
                "Hub in reach, and its licence accepted?"
            ) from error
        except Exception as error:  # `datasets` has no common base for what else goes wrong
            raise DistillError(f"The {where} can't be read after {number} rows: {error}") from error
        if row is None:
            return
        chosen = chosen or _choose(column, list(row), f"The {where}")
        number += 1
        yield f"row {number}", row[chosen]


def _text(path: Path, column: str | None) -> Iterator[Row]:
    if column is not None:
        raise DistillError(f"{path} is a text file, which has no column {column!r}: leave it out.")
    # Lines end as everywhere (\n, \r\n, \r), and not, as for str.splitlines, at form feeds or
    # U+2028, which captions from the web do hold.
    for number, line in enumerate(io.StringIO(_decoded(path), newline=None), 1):
        yield f"line {number}", line


def _json(path: Path, column: str | None) -> Iterator[Row]:
    try:
        items = json.loads(_decoded(path))
    except json.JSONDecodeError as error:
        raise DistillError(
            f"{path}, line {error.lineno}: {error.msg}; expected a JSON list. If each line is an "
            "object of its own, name the file .jsonl."
        ) from None
    if not isinstance(items, list):
        raise DistillError(f"{path} holds a JSON {type(items).__name__}; expected a list.")
    numbered = ((f"item {number}", item) for number, item in enumerate(items, 1))
    return _from_objects(numbered, column, path)


def _json_lines(path: Path, column: str | None) -> Iterator[Row]:
    def items() -> Iterator[Row]:
        for number, line in enumerate(io.StringIO(_decoded(path), newline="\n"), 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DistillError(
                    f"{path}, line {number}: {error.msg} (column {error.colno}); expected JSON."
                ) from None

    return _from_objects(items(), column, path)


def _csv(path: Path, column: str | None) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # strict: a quote that is never closed would otherwise swallow the rest of the file.
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        place = header.index(_choose(column, header, str(path)))
        for row in reader:
            if row and len(row) != len(header):
                raise DistillError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, where the header has "
                    f"{len(header)}. A prompt that holds {delimiter!r} must stand in quotes."
                )
            yield f"line {reader.line_num}", row[place] if row else ""
    except csv.Error as error:
        raise DistillError(f"{path}, line {reader.line_num}: {error}") from None


def _parquet(path: Path, column: str | None) -> Iterator[Row]:
    parquet = _optional("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            chosen = _choose(column, file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(columns=[chosen]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", value
    except DistillError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's own derive from these
        raise DistillError(f"{path} is no parquet file that can be read: {error}") from error


_READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    "": _text,
    ".txt": _text,
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _from_objects(items: Iterable[Row], column: str | None, path: Path) -> Iterator[Row]:
    """JSON strings, or JSON objects with a prompt in one of their fields."""
    for place, item in items:
        if isinstance(item, dict):
            column = _choose(column, list(item), f"{path}, {place}:")
            item = item[column]
        elif column is not None:
            raise DistillError(
                f"{path}, {place}: {item!r}; expected an object with a field {column!r}."
            )
        yield place, item


def _choose(column: str | None, columns: list[str], source: str) -> str:
    """The column asked for, or the one that is called as prompts usually are."""
    if column is not None and column in columns:
        return column
    usual = [name for name in columns if name.lower() in USUAL_COLUMNS]
    if column is None and len(usual) == 1:
        return usual[0]
    wanted = (
        f"no column {column!r}"
        if column is not None
        else f"{len(usual) or 'no'} columns called {' or '.join(USUAL_COLUMNS)}"
    )
    raise DistillError(f"{source} has {wanted}, but {columns}. Name one of these with `column`.")


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DistillError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8. Save the file in "
            "UTF-8."
        ) from None


def _optional(module: str, reader: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DistillError(
            f"{reader} is read with {module.partition('.')[0]}, which is not installed: pip "
            'install "t5slim[prompts]"'
        ) from error
