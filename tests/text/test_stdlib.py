"""The offline text source: its content, its omissions, and that it is reproducible."""

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from frugal_bonsai.errors import CalibrationError
from frugal_bonsai.text import stdlib


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(stdlib.documentation_documents())


@pytest.fixture(scope="module")
def documentation(documents: list[str]) -> str:
    return "\n\n".join(documents)


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return dict(stdlib.stdlib_sources())


@pytest.fixture(scope="module")
def held_out() -> str:
    return stdlib.held_out_text()


def test_documentation_holds_topics_and_docstrings(documentation: str) -> None:
    assert 'The "for" statement is used to iterate over the elements' in documentation
    assert "json.dumps(obj, *, skipkeys=False" in documentation
    assert "Serialize ``obj`` to a JSON formatted ``str``." in documentation
    assert "\n\ntempfile.TemporaryDirectory\n\nCreate and return a temporary" in documentation
    assert len(documentation) > 1_500_000


def test_documents_have_no_blank_lines_around_them(documents: list[str]) -> None:
    assert len(documents) > 400
    assert all(document and document == document.strip() for document in documents)


def test_sources_are_modules_with_their_text(sources: dict[str, str]) -> None:
    assert "def dumps(obj, *, skipkeys=False" in sources["json"]
    assert "class JSONDecoder" in sources["json.decoder"]
    assert sum(map(len, sources.values())) > 5_000_000
    assert {name.split(".")[0] for name in sources} <= sys.stdlib_module_names


def test_sources_leave_out_tests_tables_and_distributor_files(sources: dict[str, str]) -> None:
    parts = {part for name in sources for part in name.split(".")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert not {"html.entities", "re._casefix", "this", "sitecustomize"} & set(sources)
    assert not any(name.startswith("_sysconfigdata") for name in sources)


def test_text_is_unicode_with_plain_line_ends(
    documentation: str, sources: dict[str, str], held_out: str
) -> None:
    for text in (documentation, held_out, *sources.values()):
        text.encode("utf-8")
        assert "\r" not in text


def test_sources_and_held_out_text_are_the_same_again(
    sources: dict[str, str], held_out: str
) -> None:
    assert list(stdlib.stdlib_sources()) == list(sources.items())
    assert stdlib.held_out_text() == held_out


def test_documentation_is_the_same_in_another_process(documentation: str) -> None:
    """This also checks that the modules are read and not imported."""
    script = (
        "import hashlib, sys\n"
        "from frugal_bonsai.text import stdlib\n"
        "text = '\\n\\n'.join(stdlib.documentation_documents())\n"
        "print(hashlib.sha256(text.encode()).hexdigest())\n"
        "print({'torch', 'numpy', 'tkinter', 'turtle', 'pydoc_data.topics'} & set(sys.modules))\n"
    )
    root = Path(stdlib.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    expected = hashlib.sha256(documentation.encode()).hexdigest()
    assert run.stdout.split("\n") == [expected, "set()", ""]


def test_held_out_modules_stand_in_no_other_text(
    documentation: str, sources: dict[str, str], held_out: str
) -> None:
    assert not set(stdlib.HELD_OUT_MODULES) & set(sources)
    for phrase in (
        "class _SubParsersAction(",
        "Wrap a single paragraph of text, returning a list of wrapped lines.",
        "class TopologicalSorter:",
        "def harmonic_mean(",
        "class IPv6Network(",
    ):
        assert phrase in held_out
        assert phrase not in documentation
        assert not any(phrase in source for source in sources.values())


def test_each_held_out_module_gives_docstrings_and_source(held_out: str) -> None:
    assert len(held_out) > 300_000
    assert held_out.startswith("argparse\n\nCommand-line parsing library")
    for module in stdlib.HELD_OUT_MODULES:
        path = stdlib._stdlib_folder() / f"{module}.py"
        assert path.is_file(), f"{module} is not a single file in this Python"
        assert path.read_text(encoding="utf-8").strip("\n") in held_out


def test_long_lines_of_held_out_modules_are_not_found_elsewhere(
    documentation: str, sources: dict[str, str]
) -> None:
    """A near copy of a held-out module would have many equal lines."""
    elsewhere = {line.strip() for source in sources.values() for line in source.splitlines()}
    elsewhere |= {line.strip() for line in documentation.splitlines()}
    for module in stdlib.HELD_OUT_MODULES:
        text = stdlib._read_source(stdlib._stdlib_folder() / f"{module}.py")
        lines = [line.strip() for line in text.splitlines()]
        telling = [line for line in lines if len(line) >= 40 and line.strip("#-= ")]
        shared = [line for line in telling if line in elsewhere]
        assert len(shared) <= 0.05 * len(telling), (module, shared)


def test_module_documentation_of_a_small_module() -> None:
    source = '''"""Summary.

    Indented line.
"""

def shout(text, *, times: int = 2) -> str:
    """Return it loud."""
    def inner():
        """Not shown."""

class Box:
    """Holds."""

    async def open(self):
        """Open it."""

    def close(self):
        pass
'''
    ast.parse(source)
    assert stdlib.module_documentation("box", source) == (
        "box\n\nSummary.\n\nIndented line.\n\n"
        "box.shout(text, *, times: int=2)\n\nReturn it loud.\n\n"
        "box.Box\n\nHolds.\n\n"
        "box.Box.open(self)\n\nOpen it."
    )
    assert stdlib.module_documentation("empty", "x = 1\n") == ""


def test_missing_sources_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CalibrationError, match=r"found no argparse\.py; use a Python that is not"):
        stdlib.held_out_text()
    with pytest.raises(CalibrationError, match=tmp_path.name):
        list(stdlib.documentation_documents())
    (tmp_path / "argparse.py").touch()
    with pytest.raises(CalibrationError, match=r"found no pydoc_data/topics\.py"):
        list(stdlib.documentation_documents())
