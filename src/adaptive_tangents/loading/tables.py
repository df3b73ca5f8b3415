"""Tables of named columns, from CSV, JSON and Parquet files or from pandas."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.words import check_file, listed_names, optional, told


@dataclass(frozen=True)
class Table:
    """Columns by name, all of one length; ``where`` says where a row is, and ``classes`` how columns name their classes."""

    source: str
    columns: Mapping[str, Sequence[Any]]
    where: Callable[[int], str] = "row {}".format
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))

    def take(self, rows: Sequence[int] | None) -> "Table":
        """Some of the rows; None is all of them."""
        if rows is None:
            return self
        columns = {name: [values[k] for k in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, where=lambda k: self.where(rows[k]))


def read_table(path: Path, call: str) -> Table:
    """The table in a `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet` file. Raises TangentError if it is none, or empty."""
    check_file(path, "data file", "check the name", call)
    reader = READERS[path.suffix.lower()]
    table = reader(path, call)
    if not table.columns or not table.n:
        raise TangentError(f"{call}: {path} holds no samples; give a file with a row for each")
    return table


def _text(path: Path, call: str) -> str:
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TangentError(f"{call}: {path} is not in UTF-8 (line {line}); save it as UTF-8") from error
    if not text.strip():
        raise TangentError(f"{call}: {path} is empty; give a file with a row for each sample")
    if "\0" in text:
        raise TangentError(f"{call}: {path} holds zero bytes, so it is no text; give the file that was meant")
    return text


def _csv(path: Path, call: str) -> Table:
    text = _text(path, call)
    head = text.lstrip("\r\n").split("\n", 1)[0]
    tabs = path.suffix.lower() == ".tsv" or ("," not in head and "\t" in head)
    delimiter = "\t" if tabs else ";" if "," not in head and ";" in head else ","
    lines = _rows(path, call, text, delimiter, quoted=True)
    width = len(lines[0][1])
    torn = [line for line, row in lines if len(row) != width or any(f"{delimiter}" in v and "\n" in v for v in row)]
    if tabs and torn:  # a quote within a text, in a file that quotes nothing, swallows lines
        plain = _rows(path, call, text, delimiter, quoted=False)
        lines = plain if all(len(row) == width for _, row in plain) else lines
    for line, row in lines:
        if len(row) != width:
            raise TangentError(
                f"{call}: {path} has {width} columns ({listed_names(lines[0][1])}), but line {line} has {len(row)} "
                f"field{'s' * (len(row) != 1)}; put text that holds the separator in double quotes, and close every quote"
            )
    names = [name.strip() or f"column {k + 1}" for k, name in enumerate(lines[0][1])]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise TangentError(f"{call}: {path} has several columns {listed_names(twice)}; give every column its own name")
    places = [line for line, _ in lines[1:]]
    columns = {name: [row[k] for _, row in lines[1:]] for k, name in enumerate(names)}
    return Table(str(path), columns, lambda k: f"line {places[k]}")


def _rows(path: Path, call: str, text: str, delimiter: str, *, quoted: bool) -> list[tuple[int, list[str]]]:
    """Rows that are not empty, each with the line that it begins on."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    found, line = [], 1
    try:
        for row in reader:
            if row and (len(row) > 1 or row[0].strip()):
                found.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise TangentError(
            f"{call}: {path} cannot be read as a table near line {line} ({error}); check that quotes are closed"
        ) from error
    return found


def _json(path: Path, call: str) -> Table:
    text = _text(path, call)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if len(text.strip().splitlines()) > 1 and text.lstrip().startswith("{"):
            return _jsonl(path, call)
        raise TangentError(
            f"{call}: {path} is no JSON ({told(error)}); give a list of objects, one a sample"
        ) from error
    if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("data",)):
        content = content["data"]
    if isinstance(content, dict):
        content = [content] if not any(isinstance(value, list | dict) for value in content.values()) else content
    if not isinstance(content, list):
        held = f"an object with {listed_names(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise TangentError(f"{call}: {path} holds {held}; give a list of objects, one a sample")
    return from_records(str(path), content, call, "object {}".format)


def _jsonl(path: Path, call: str) -> Table:
    records, places = [], []
    for number, line in enumerate(_text(path, call).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TangentError(
                f"{call}: line {number} of {path} is no JSON ({told(error)}); give one object a line"
            ) from error
        if isinstance(record, list) and number == 1 and len(record) and isinstance(record[0], dict):
            raise TangentError(f"{call}: {path} is a list in one line; name it .json")
        records.append(record)
        places.append(number)
    return from_records(str(path), records, call, lambda k: f"line {places[k]}")


def from_records(source: str, records: Sequence[Any], call: str, where: Callable[[int], str]) -> Table:
    """A table of objects; a name that an object lacks is missing there."""
    names: dict[str, None] = {}
    for k, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise TangentError(
                f"{call}: {source} holds {type(record).__name__} at {where(k)}; give objects, such as "
                '{"text": "…", "label": 0}'
            )
        names.update(dict.fromkeys(map(str, record)))
    return Table(source, {name: [record.get(name) for record in records] for name in names}, where)


def _parquet(path: Path, call: str) -> Table:
    pa, pq = (optional(name, f"reading {path}", call, ", or give a .csv") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        found = pq.read_table(path)
        columns = {name: found.column(name).to_pylist() for name in found.column_names}
    except Exception as error:  # a broken file can make its reader raise anything
        raise TangentError(
            f"{call}: {path} is no Parquet file that can be read ({told(error)}); save it again"
        ) from error
    classes = {}
    for name in found.column_names:
        if pa.types.is_dictionary(found.schema.field(name).type):
            chunks = found.column(name).unify_dictionaries().chunks
            names = [] if not chunks else chunks[0].dictionary.to_pylist()
            if names and all(isinstance(each, str) for each in names):
                classes[name] = tuple(names)
    with suppress(ValueError, AttributeError, TypeError):
        said = json.loads((found.schema.metadata or {}).get(b"huggingface", b"{}"))
        for name, kind in said.get("info", {}).get("features", {}).items():
            if kind.get("_type") == "ClassLabel":
                classes[name] = tuple(kind["names"])
    kept = {name: values for name, values in columns.items() if not name.startswith("__index_level_")}
    return Table(str(path), kept, classes=classes)


def from_frame(frame: Any) -> Table:
    """The table of a pandas DataFrame."""
    columns = {str(name): frame[name].tolist() for name in frame.columns}
    classes = {}
    for name in frame.columns:
        named = getattr(getattr(frame[name], "cat", None), "categories", None)
        if named is not None and all(isinstance(each, str) for each in named):
            classes[str(name)] = tuple(named)
    index = [str(each) for each in frame.index]
    return Table("the DataFrame", columns, lambda k: f"row {index[k]}", classes)


READERS: dict[str, Callable[[Path, str], Table]] = {
    ".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet,
}  # fmt: skip
