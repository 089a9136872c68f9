from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from frugal_bonsai.errors import CalibrationError
from frugal_bonsai.text import sources
from frugal_bonsai.text.sources import HUB_CHARACTERS, SOURCES, load_text


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


class FakeDatasets(ModuleType):
    """Replaces the datasets package: tests use no network."""

    def __init__(self, rows: list[dict[str, Any]] | Exception) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.asked: list[tuple[Any, ...]] = []
        self.served = 0
        self.exceptions = ModuleType("datasets.exceptions")
        self.exceptions.DatasetsError = type("DatasetsError", (Exception,), {})

    def load_dataset(self, *names: Any, **options: Any) -> Iterator[dict[str, Any]]:
        self.asked.append((*names, options))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self._serve(self.rows)

    def _serve(self, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            self.served += 1
            yield row


def install(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> Any:
    fake = FakeDatasets(rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


class TestFiles:
    def test_plain(self, tmp_path: Path) -> None:
        text = load_text(write(tmp_path / "calibration.txt", "Café\n\ntwo\n"))
        assert text.name == "file calibration.txt"
        assert text.text == "Café\n\ntwo\n"

    def test_any_suffix_is_plain_text(self, tmp_path: Path) -> None:
        assert load_text(write(tmp_path / "wiki.test.raw", '{"text": "x"}')).text == '{"text": "x"}'

    def test_line_ends_and_byte_order_mark(self, tmp_path: Path) -> None:
        assert load_text(write(tmp_path / "a.txt", "\ufeffone\r\ntwo\r\n")).text == "one\ntwo\n"
        content = "\ufeff" + lines("one\r\ntwo")
        assert load_text(write(tmp_path / "a.jsonl", content)).text == "one\ntwo"

    @pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7])
    def test_characters_across_reads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
    ) -> None:
        monkeypatch.setattr(sources, "_CHUNK_BYTES", chunk_bytes)
        content = "aé€😀" * 5
        source = write(tmp_path / "x.txt", content)
        assert load_text(source).text == content
        assert load_text(source, characters=6).text == content[:6]

    def test_no_more_than_asked_for_is_read(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.txt", b"a" * 2**21 + b"\xff")
        assert load_text(source, characters=100).text == "a" * 100
        with pytest.raises(CalibrationError, match=rf"byte {2**21}: "):
            load_text(source)

    @pytest.mark.parametrize("chunk_bytes", [1, 2, 4, 100])
    def test_undecodable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
    ) -> None:
        monkeypatch.setattr(sources, "_CHUNK_BYTES", chunk_bytes)
        source = write(tmp_path / "x.txt", "né".encode() + b"\xe2\x82x")
        with pytest.raises(CalibrationError, match=r"x.txt: is not UTF-8 text \(byte 3: invalid"):
            load_text(source)

    def test_cut_in_a_character(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"\(byte 1: unexpected end of data\)"):
            load_text(write(tmp_path / "x.txt", b"a\xe2\x82"))

    @pytest.mark.parametrize(
        ("name", "content"), [("x.txt", ""), ("x.txt", " \n\n"), ("x.jsonl", "\n"), ("x.json", "")]
    )
    def test_empty(self, tmp_path: Path, name: str, content: str) -> None:
        with pytest.raises(CalibrationError, match=rf"file {name}: holds no text; use one of: "):
            load_text(write(tmp_path / name, content))

    def test_json_lines(self, tmp_path: Path) -> None:
        content = lines("one", "two") + "\n" + lines("three")
        text = load_text(write(tmp_path / "c4.jsonl", content))
        assert text.name == "file c4.jsonl"
        assert text.text == "one\n\ntwo\n\nthree"

    def test_json_lines_stop_when_enough_is_there(self, tmp_path: Path) -> None:
        source = write(tmp_path / "x.JSON", lines("12345", "12345") + "damaged")
        assert load_text(source, characters=12).text == "12345\n\n12345"
        with pytest.raises(CalibrationError, match=r"x.JSON, line 3: is not JSON"):
            load_text(source, characters=13)

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("{'text': 1}", "is not JSON (Expecting property name"),
            (b'{"text": "\xff"}', "is not JSON ("),
            ('{"content": "x", "id": 1}', "under 'messages', found keys ['content', 'id']"),
            ('{"text": 3}', "under 'messages', found keys ['text']"),
            ("[1]", "under 'messages', found list"),
            ('{"text": "\\ud800"}', "half of a surrogate pair"),
            ('{"a":' * 100_000, "is not JSON ("),
        ],
    )
    def test_damaged_json_lines(self, tmp_path: Path, line: str | bytes, expected: str) -> None:
        content = line if isinstance(line, bytes) else line.encode()
        source = write(tmp_path / "x.jsonl", lines("good").encode() + content)
        with pytest.raises(CalibrationError) as caught:
            load_text(source)
        assert "x.jsonl, line 2: " in str(caught.value)
        assert expected in str(caught.value)

    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        paths = [write(tmp_path / name, "x") for name in ("a.txt", "a.jsonl")]
        monkeypatch.setattr(Path, "open", fail)
        for path in paths:
            with pytest.raises(CalibrationError, match=r"cannot be read \(Permission denied\)"):
                load_text(path)


class TestKeywords:
    def test_stdlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = ModuleType("frugal_bonsai.text.stdlib")
        parsed = []

        def documents() -> Iterator[str]:
            for document in ("topics", "docstrings", "more"):
                parsed.append(document)
                yield document

        fake.documentation_documents = documents
        monkeypatch.setitem(sys.modules, "frugal_bonsai.text.stdlib", fake)
        text = load_text("stdlib", characters=11)
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        assert text.name == f"stdlib (Python {version} docstrings and topics)"
        assert text.text == "topics\n\ndoc"
        assert parsed == ["topics", "docstrings"]  # no more than was asked for
        assert load_text("stdlib").text == "topics\n\ndocstrings\n\nmore"

    def test_self_needs_the_model(self) -> None:
        with pytest.raises(CalibrationError, match="'self' is written by the model"):
            load_text("self")

    @pytest.mark.parametrize("source", ["gone.txt", "dir/gone.jsonl", "nothing", "", "x" * 5000])
    def test_missing_file(self, source: str, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CalibrationError) as caught:
            load_text(source)
        assert "there is no such file" in str(caught.value) or source == ""
        assert SOURCES in str(caught.value)

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="is a folder; use one of"):
            load_text(str(tmp_path))

    def test_the_list_is_complete(self) -> None:
        for word in ("text file", "JSON-lines", "stdlib", "self", "wikitext2", "c4", "org/name"):
            assert word in SOURCES


class TestHub:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def test_wikitext2_as_the_peers_take_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, [{"text": ""}, {"text": " = A = \n"}, {"text": " b \n"}])
        text = load_text("wikitext2")
        assert text.name == "wikitext2 (Salesforce/wikitext, wikitext-2-raw-v1, train)"
        assert text.text == "\n\n = A = \n\n\n b \n"
        assert fake.asked == [
            ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train", "streaming": True})
        ]

    @pytest.mark.parametrize(
        ("source", "asked"),
        [
            ("c4", ("allenai/c4", "en")),
            ("org/name", ("org/name", None)),
            ("org/name:20231101.en", ("org/name", "20231101.en")),
        ],
    )
    def test_other_sets(
        self, monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None]
    ) -> None:
        fake = install(monkeypatch, [{"text": "x"}])
        text = load_text(source)
        assert fake.asked[0][:2] == asked
        assert source in text.name
        assert "train" in text.name

    def test_streaming_stops_when_enough_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, [{"text": "12345"}] * 1000)
        assert load_text("c4", characters=11).text == "12345\n\n1234"
        assert fake.served == 2

    def test_streaming_is_bounded_without_a_length(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, [{"text": "x" * 1_000_000}] * 1000)
        assert len(load_text("c4").text) == HUB_CHARACTERS
        assert fake.served == 10

    def test_files_go_before_the_hub(self, tmp_path: Path) -> None:
        (tmp_path / "org").mkdir()
        write(tmp_path / "org" / "name", "local")
        assert load_text("org/name").text == "local"

    @pytest.mark.parametrize(
        "error",
        [
            ConnectionError("Couldn't reach the Hub\nlong story"),
            ValueError("BuilderConfig 'x' not found"),
            RuntimeError("Dataset scripts are no longer supported"),
        ],
    )
    def test_not_reachable(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        install(monkeypatch, error)
        with pytest.raises(CalibrationError) as caught:
            load_text("c4")
        text = str(caught.value)
        assert "source 'c4': is no file here, and the hub data set allenai/c4 could not be" in text
        assert f"({type(error).__name__}: {str(error).splitlines()[0]})" in text
        assert "long story" not in text
        assert SOURCES in text

    def test_no_text_column(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, [{"question": "x", "answer": "y"}])
        with pytest.raises(
            CalibrationError, match=r"or 'messages' column, found \['answer', 'quest"
        ):
            load_text("org/name")


def test_real_samples(shared: Path) -> None:
    text = load_text(str(shared / "text" / "c4-sample.01.jsonl"), characters=5000)
    assert len(text.text) == 5000
    story = load_text(str(shared / "text" / "tinystories_test.txt"))
    assert story.text == (shared / "text" / "tinystories_test.txt").read_text(encoding="utf-8")
