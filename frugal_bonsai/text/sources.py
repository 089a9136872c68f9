"""Text to calibrate with or to measure on, from what the user typed as SOURCE.

In: ``stdlib``, a text file, a JSON-lines file, or a data set on the hub. Out: a :class:`Text`, with
the name that the model card states. Reads no more than was asked for; a hub data set is streamed
and stops as soon as enough is there. A source that cannot be used is an error that lists the
others; nothing falls back to another text. ``self`` (text that the model writes) needs the model
and is made elsewhere.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from frugal_bonsai.errors import CalibrationError

SOURCES = (
    "a text file (UTF-8), a JSON-lines file (.jsonl or .json, key 'text'), stdlib (documentation "
    "that every Python carries, works offline), self (text that the model writes), wikitext2, c4, "
    "or a hub data set org/name[:config] (the last three need: pip install 'frugal-bonsai"
    "[datasets]')"
)
STDLIB, SELF = "stdlib", "self"

# As the peers take them: config, and the rows of the training split joined by blank lines.
_HUB_SETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
# A hub data set without a stated length: enough for a thousand windows of 2048 tokens.
HUB_CHARACTERS = 10_000_000
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?", re.ASCII)
_TEXT_SUFFIXES = {".txt", ".json", ".jsonl", ".raw", ".md", ".text", ".gz", ".csv", ".parquet"}
_JSON_SUFFIXES = {".jsonl", ".json"}
_SEPARATOR = "\n\n"
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Text:
    """A text and where it is from.

    Attributes:
        name: what was used, for the card; no path of this machine.
        text: the text itself.
    """

    name: str
    text: str


def load_text(source: str, *, characters: int | None = None) -> Text:
    """Read a text source.

    Args:
        source: see ``SOURCES``; a file named like a keyword is written with ``./`` in front.
        characters: read no more than this many; None for all of it (of a hub data set the first
            ``HUB_CHARACTERS``).

    Returns:
        The text, not empty; line ends of Windows become those of Unix.

    Raises:
        CalibrationError: missing, unreadable, damaged (file and line or byte are named), empty,
            not reachable, or the ``datasets`` package is missing.
    """
    if source == STDLIB:
        return _finish(_stdlib_name(), _read_stdlib(characters), characters)
    if source == SELF:
        raise CalibrationError(
            f"source {SELF!r} is written by the model and serves calibration alone; here use one "
            f"of: {SOURCES}"
        )
    path = Path(source)
    if _is_file(path):
        read = _read_json_lines if path.suffix.lower() in _JSON_SUFFIXES else _read_plain
        return _finish(f"file {path.name}", read(path, characters), characters)
    characters = HUB_CHARACTERS if characters is None else characters
    if source in _HUB_SETS:
        dataset, config = _HUB_SETS[source]
        name = f"{source} ({dataset}, {config}, train)"
        return _finish(name, _read_hub(source, dataset, config, characters), characters)
    hub = _HUB_ID.fullmatch(source)
    if hub is None or path.suffix.lower() in _TEXT_SUFFIXES or _is_folder(path):
        what = "is a folder" if _is_folder(path) else "there is no such file"
        raise CalibrationError(f"source {source!r}: {what}; use one of: {SOURCES}")
    dataset, config = hub.group(1), hub.group(2)
    name = f"hub data set {source} (train)"
    return _finish(name, _read_hub(source, dataset, config, characters), characters)


def _finish(name: str, text: str, characters: int | None) -> Text:
    """Cut, and refuse a text without content."""
    text = text.replace("\r\n", "\n")
    if characters is not None:
        text = text[:characters]
    if not text.strip():
        raise CalibrationError(f"{name}: holds no text; use one of: {SOURCES}")
    return Text(name, text)


def _stdlib_name() -> str:
    """The name says which Python: the text differs from one to the next."""
    return f"stdlib (Python {sys.version_info[0]}.{sys.version_info[1]} docstrings and topics)"


def _read_stdlib(characters: int | None) -> str:
    """What every Python carries; no more modules are parsed than are asked for."""
    from frugal_bonsai.text.stdlib import documentation_documents

    return _join(documentation_documents(), characters)


def _is_file(path: Path) -> bool:
    """False too where the system refuses to say, for instance for a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    """As ``_is_file``, for a folder."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _read_plain(path: Path, characters: int | None) -> str:
    """A UTF-8 file, up to about ``characters``; a byte order mark is skipped."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts: list[str] = []
    decoded_characters = read_bytes = 0
    try:
        with path.open("rb") as file:
            while characters is None or decoded_characters <= characters:
                pending_bytes = len(decoder.getstate()[0])
                chunk = file.read(_CHUNK_BYTES)
                try:
                    part = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    position = read_bytes - pending_bytes + error.start
                    raise CalibrationError(
                        f"{path}: is not UTF-8 text (byte {position}: {error.reason}); save it as "
                        "UTF-8"
                    ) from error
                parts.append(part)
                decoded_characters += len(part)
                read_bytes += len(chunk)
                if not chunk:
                    break
    except OSError as error:
        raise _unreadable(path, error) from error
    return "".join(parts).removeprefix("\ufeff")


def _read_json_lines(path: Path, characters: int | None) -> str:
    """The ``text`` of every line, up to about ``characters``."""
    try:
        with path.open("rb") as file:
            return _join(_json_texts(path, file), characters)
    except OSError as error:
        raise _unreadable(path, error) from error


def _json_texts(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    """One document a line; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise CalibrationError(
                f"{where}: is not JSON ({error}); write one object a line, such as "
                '{"text": "..."}'
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            found = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise CalibrationError(
                f"{where}: expected an object with a text under 'text', found {found[:200]}"
            )
        if any("\ud800" <= character <= "\udfff" for character in record["text"]):
            raise CalibrationError(
                f"{where}: its text holds half of a surrogate pair, which is no character; remove "
                "the line"
            )
        yield record["text"]


def _read_hub(source: str, dataset: str, config: str | None, characters: int) -> str:
    """The training split of a hub data set, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"source {source!r}: is no file here, and hub data sets need the datasets package: pip "
            f"install 'frugal-bonsai[datasets]'; or use one of: {SOURCES}"
        ) from error
    from huggingface_hub.errors import HfHubHTTPError

    # The transport's own error (requests, httpx) is a base of the hub's. RuntimeError: a data set
    # that is a script, which datasets no longer runs.
    transport = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    expected: tuple[type[Exception], ...] = (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        *transport,
    )
    try:
        rows = datasets.load_dataset(dataset, config, split="train", streaming=True)
        return _join(_hub_texts(source, rows), characters)
    except expected as error:
        lines = str(error).strip().splitlines() or ["no details"]
        raise CalibrationError(
            f"source {source!r}: is no file here, and the hub data set {dataset} could not be read "
            f"({type(error).__name__}: {lines[0][:200]}); check the name and the connection, or "
            f"use one of: {SOURCES}"
        ) from error


def _hub_texts(source: str, rows: Iterable[Any]) -> Iterator[str]:
    """The ``text`` column; empty rows count, as in the peers' WikiText-2."""
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise CalibrationError(
                f"source {source!r}: the data set has no 'text' column, found "
                f"{sorted(row)}; write the column that you want to a JSON-lines file"
            )
        yield row["text"]


def _join(documents: Iterator[str], characters: int | None) -> str:
    """Documents with blank lines between them, until enough is there."""
    parts: list[str] = []
    held = 0
    for document in documents:
        parts.append(document)
        held += len(document) + len(_SEPARATOR)
        if characters is not None and held >= characters + len(_SEPARATOR):
            break
    return _SEPARATOR.join(parts)


def _unreadable(path: Path, error: OSError) -> CalibrationError:
    """A file that the system does not let us read."""
    return CalibrationError(
        f"{path}: cannot be read ({error.strerror or error}); check its permissions"
    )
