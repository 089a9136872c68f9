"""Read the text of a SOURCE, for calibration or measurement.

In: ``stdlib``, a text file, a JSON-lines file, or a data set on the hub. Out: a :class:`Text` with
the name that the model card states. A hub data set is streamed, and no more text is read than
requested. A source that cannot be used is an error that lists the alternatives; there is no
fallback to another text. ``self`` (text that the model samples) needs the model and is made in
``bonsai/calibration.py``. Holds the text.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from frugal_bonsai.errors import CalibrationError
from frugal_bonsai.plain_json import parse_json
from frugal_bonsai.text.chat import NO_TEMPLATE, Chat, ChatTemplate, document_text

SOURCES = (
    "a text file (UTF-8), a JSON-lines file (.jsonl or .json, key 'text', or 'messages' for "
    "chats), stdlib (documentation that every Python carries, works offline), self (text that the "
    "model writes), wikitext2, c4, or a hub data set org/name[:config]"
)
STDLIB, SELF, WIKITEXT = "stdlib", "self", "wikitext2"

# Data set and config, as other pruning methods use them: the rows of the training split, joined by
# blank lines.
_HUB_SETS = {
    WIKITEXT: ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
# Length of a hub data set if the caller states none: about a thousand windows of 2048 tokens.
HUB_CHARACTERS = 10_000_000
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?", re.ASCII)
_TEXT_SUFFIXES = {".txt", ".json", ".jsonl", ".raw", ".md", ".text", ".gz", ".csv", ".parquet"}
_JSON_SUFFIXES = {".jsonl", ".json"}
_SEPARATOR = "\n\n"
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Text:
    """A text and the name of its source.

    Attributes:
        name: name of the source for the model card, without a local path.
        text: the text.
    """

    name: str
    text: str


def load_text(
    source: str, *, characters: int | None = None, chat: ChatTemplate = NO_TEMPLATE
) -> Text:
    """Read a text source.

    Args:
        source: see ``SOURCES``. Write ``./`` before a file that is named like a keyword.
        characters: number of characters to read; None reads the whole text, or the first
            ``HUB_CHARACTERS`` of a hub data set.
        chat: template of the model, for records with ``messages`` instead of ``text``.

    Returns:
        The text, which is not empty. Windows line ends are converted.

    Raises:
        CalibrationError: the source is missing, unreadable, damaged (the text names file and line
            or byte), empty or not reachable, or the ``datasets`` package is missing.
    """
    if source == STDLIB:
        return _finish(_stdlib_name(), _read_stdlib(characters), characters)
    if source == SELF:
        raise CalibrationError(
            f"source {SELF!r} is written by the model and can only be used for calibration; here "
            f"use one of: {SOURCES}"
        )
    path = Path(source)
    if _is_file(path):
        if path.suffix.lower() in _JSON_SUFFIXES:
            text = _read_json_lines(path, characters, chat)
        else:
            text = _read_plain(path, characters)
        return _finish(f"file {path.name}", text, characters)
    characters = HUB_CHARACTERS if characters is None else characters
    name, dataset, config = _hub_set(source)
    return _finish(name, _read_hub(source, dataset, config, characters, chat), characters)


def require_source(source: str, option: str, *, sampled: bool = False) -> None:
    """Check the name of a source without reading it.

    Args:
        source: see ``SOURCES``.
        option: option that names it, for the error text.
        sampled: the model may write the text (``self``).

    Raises:
        CalibrationError: there is no such source.
    """
    if source == STDLIB or (source == SELF and sampled) or _is_file(Path(source)):
        return
    if source == SELF:
        raise CalibrationError(f"{option} {SELF}: is only for --calibration and --data")
    try:
        _hub_set(source)
    except CalibrationError as error:
        raise CalibrationError(f"{option}: {error}") from error


def _hub_set(source: str) -> tuple[str, str, str | None]:
    """Return name, data set and config of a source on the hub.

    Raises:
        CalibrationError: the source is no file, and no data set can have its name.
    """
    if source in _HUB_SETS:
        dataset, config = _HUB_SETS[source]
        return f"{source} ({dataset}, {config}, train)", dataset, config
    hub, path = _HUB_ID.fullmatch(source), Path(source)
    if hub is None or path.suffix.lower() in _TEXT_SUFFIXES or _is_folder(path):
        what = "is a folder" if _is_folder(path) else "there is no such file"
        raise CalibrationError(f"source {source!r}: {what}; use one of: {SOURCES}")
    return f"hub data set {source} (train)", hub.group(1), hub.group(2)


def _finish(name: str, text: str, characters: int | None) -> Text:
    """Cut the text to length, and refuse an empty one."""
    text = text.replace("\r\n", "\n")
    if characters is not None:
        text = text[:characters]
    if not text.strip():
        raise CalibrationError(f"{name}: holds no text; use one of: {SOURCES}")
    return Text(name, text)


def _stdlib_name() -> str:
    """Return the name of the ``stdlib`` source. The text depends on the Python version."""
    return f"stdlib (Python {sys.version_info[0]}.{sys.version_info[1]} docstrings and topics)"


def _read_stdlib(characters: int | None) -> str:
    """Read the ``stdlib`` source. Only as many modules are parsed as needed."""
    from frugal_bonsai.text.stdlib import documentation_documents

    return _join(documentation_documents(), characters)


def _is_file(path: Path) -> bool:
    """Return whether a file exists; False if the system raises, as for names that are too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    """Return whether a folder exists; False if the system raises."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _read_plain(path: Path, characters: int | None) -> str:
    """Read a UTF-8 file up to about ``characters``. A byte order mark is skipped."""
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


def _read_json_lines(path: Path, characters: int | None, chat: ChatTemplate) -> str:
    """Read the ``text`` or the ``messages`` of every line, up to about ``characters``."""
    try:
        with path.open("rb") as file:
            return _join(_json_texts(path, file, chat), characters)
    except OSError as error:
        raise _unreadable(path, error) from error


def _json_texts(path: Path, lines: Iterable[bytes], chat: ChatTemplate) -> Iterator[str]:
    """Yield the document of each line. Blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            raise CalibrationError(
                f"{where}: is not JSON ({error}); write one object per line, such as "
                '{"text": "..."}'
            ) from error
        text = document_text(record, where, chat)
        if text is None:
            found = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise CalibrationError(
                f"{where}: expected an object with a text under 'text', or a chat under "
                f"'messages', found {found[:200]}; write one object per line, such as "
                '{"text": "..."}'
            )
        yield text


def _read_hub(
    source: str, dataset: str, config: str | None, characters: int, chat: ChatTemplate
) -> str:
    """Stream the training split of a hub data set."""
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config, split="train", streaming=True)
        return _join(_hub_texts(source, rows, chat), characters)
    except hub_errors() as error:
        lines = str(error).strip().splitlines() or ["no details"]
        raise CalibrationError(
            f"source {source!r}: is no file here, and the hub data set {dataset} could not be read "
            f"({type(error).__name__}: {lines[0][:200]}); check the name and the connection, or "
            f"use one of: {SOURCES}"
        ) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors by which a data set of the hub that cannot be read is reported."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    # The transport's error class (requests, httpx) is a base class of the hub's error. The datasets
    # package raises RuntimeError for data sets that are scripts.
    transport = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    return (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, *transport)


def _hub_texts(source: str, rows: Iterable[Any], chat: ChatTemplate) -> Iterator[str]:
    """Yield ``text`` or ``messages``, empty rows included, as other methods read WikiText-2."""
    for number, row in enumerate(rows, start=1):
        text = document_text(row, f"source {source!r}, row {number}", chat)
        if text is None:
            raise CalibrationError(
                f"source {source!r}: the data set has no 'text' or 'messages' column, found "
                f"{sorted(row)}; write the column that you need to a JSON-lines file"
            )
        yield text


def _join(documents: Iterator[str], characters: int | None) -> str:
    """Join documents, texts with blank lines before, until there are enough characters."""
    parts: list[str] = []
    held = 0
    for document in documents:
        if parts and not isinstance(document, Chat):
            parts.append(_SEPARATOR)
        parts.append(document)
        held += len(document) + len(_SEPARATOR)
        if characters is not None and held >= characters + len(_SEPARATOR):
            break
    return "".join(parts)


def _unreadable(path: Path, error: OSError) -> CalibrationError:
    """Return the error of a file that the system refuses to read."""
    return CalibrationError(
        f"{path}: cannot be read ({error.strerror or error}); check its permissions"
    )
