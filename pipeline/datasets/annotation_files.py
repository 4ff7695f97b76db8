"""Annotation files as rows: CSV, JSON and lines, with errors that name the file."""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vivit.pipeline.errors import DataError


def sha256_of(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; line ends of any kind become `\\n`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8: {error}") from error


def read_lines(path: Path) -> list[str]:
    """The lines that are not blank, without white space around them."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV that has at least `columns`, by its header; a cell that a short row lacks is empty."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            found, rows = list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    missing = [column for column in columns if column not in found]
    if missing:
        raise DataError(f"{path} lacks the column {missing[0]}: it has {', '.join(found) or 'none'}")
    return rows


def read_cells(path: Path, *, separator: str = ",") -> list[list[str]]:
    """The rows of a CSV without a header; blank lines are left out."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [row for row in csv.reader(file, delimiter=separator) if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): download it again") from error


def read_entries(path: Path, fields: Sequence[str]) -> list[Mapping[str, Any]]:
    """The entries of a JSON array of objects, each of which has at least `fields`."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path} holds a JSON {type(entries).__name__}, not a list of clips")
    for at, entry in enumerate(entries):
        if not isinstance(entry, dict) or any(field not in entry for field in fields):
            raise DataError(f"{path}, entry {at + 1}: {str(entry)[:80]} lacks one of {', '.join(fields)}")
    return entries


def in_id_order(names: Mapping[int, str], path: Path, num_rows: int | None = None) -> list[str]:
    """Class names whose ids are 0, 1, 2, ..., each once among the `num_rows` rows of the file."""
    if not names or sorted(names) != list(range(num_rows or len(names))):
        raise DataError(f"{path}: the class ids must be 0, 1, 2, ..., each once")
    return [names[index] for index in range(len(names))]
