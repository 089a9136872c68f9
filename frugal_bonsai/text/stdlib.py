"""Text from the standard library of the running Python, as an offline text source.

In: the source files of the standard library. Out: documentation (pydoc topics and docstrings),
module sources, and both for a few held-out modules. Nothing is imported or downloaded, and files
are read in sorted order, so the text depends on the Python version only. Holds one document at a
time; the whole documentation is about 3 MB.

The embedded example model is trained on `documentation_documents` and `stdlib_sources` and
evaluated on `held_out_text`. Therefore the first two contain no held-out module.
"""

import ast
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from frugal_bonsai.errors import CalibrationError

HELD_OUT_MODULES: tuple[str, ...] = (
    "argparse",
    "calendar",
    "colorsys",
    "configparser",
    "csv",
    "fractions",
    "graphlib",
    "heapq",
    "ipaddress",
    "selectors",
    "shlex",
    "statistics",
    "textwrap",
)
"""Modules that are neither trained on nor calibrated with. They are single files in Python 3.10 to
3.13, cover different subjects, and have no near copy among the other modules (as `decimal` has)."""

# Tests and fixtures repeat each other, tables are neither prose nor code, and `this` is rot13.
_EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)
_EXCLUDED_MODULES = frozenset({"encodings", "html.entities", "pydoc_data", "re._casefix", "this"})

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documentation_documents() -> Iterator[str]:
    """Yield the standard library's documentation without that of the held-out modules.

    Yields:
        One document per pydoc topic, then one per module, without blank lines around it. A module's
        document holds the docstrings of the module, its classes and its functions, each under its
        qualified name and signature.

    Raises:
        CalibrationError: the interpreter's standard library is not on disk as source files.
    """
    yield from _topics()
    for module, source in stdlib_sources():
        document = module_documentation(module, source)
        if document:
            yield document


def stdlib_sources() -> Iterator[tuple[str, str]]:
    """Yield the standard library's modules without tests, generated tables and held-out modules.

    Yields:
        A module's dotted name and its source text, in the order of the file paths.

    Raises:
        CalibrationError: the interpreter's standard library is not on disk as source files.
    """
    for module, path in _module_files():
        if not _is_within(module, HELD_OUT_MODULES):
            yield module, _read_source(path)


def held_out_text() -> str:
    """Return docstrings and source of each of `HELD_OUT_MODULES`, separated by blank lines.

    Returns:
        For each module, its document as in `documentation_documents`, then its source.

    Raises:
        CalibrationError: the interpreter's standard library is not on disk as source files.
    """
    parts = []
    for module, path in _module_files():
        if _is_within(module, HELD_OUT_MODULES):
            source = _read_source(path)
            parts += [module_documentation(module, source), source.strip("\n")]
    return "\n\n".join(parts)


def module_documentation(module: str, source: str) -> str:
    """Collect the docstrings of one module from its source, without importing it.

    Args:
        module: the module's dotted name.
        source: the module's source text.

    Returns:
        Each docstring, dedented, under the qualified name and signature of its owner. Empty if the
        module has no docstrings.
    """
    with warnings.catch_warnings():
        # The standard library contains invalid escapes.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    entries = []
    for heading, node in _documented(module, tree):
        docstring = ast.get_docstring(node)
        if docstring:
            entries.append(f"{heading}\n\n{docstring.strip()}")
    return "\n\n".join(entries)


def _documented(heading: str, node: _Documented) -> Iterator[tuple[str, _Documented]]:
    """Yield heading and node of a module or class, and of the classes and functions in it."""
    yield heading, node
    # Functions inside functions are no interface.
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _documented(f"{heading}.{child.name}", child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = ast.unparse(child.args)
            yield from _documented(f"{heading}.{child.name}({signature})", child)


def _topics() -> Iterator[str]:
    """Yield the pydoc topics in the order of their names."""
    # Parsed and not imported, so that a `topics.py` on the import path cannot replace it.
    path = _stdlib_folder() / "pydoc_data" / "topics.py"
    tree = ast.parse(_read_source(path))
    for node in tree.body:
        if isinstance(node, ast.Assign):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield topics[name].strip()


def _module_files() -> Iterator[tuple[str, Path]]:
    """Yield dotted name and path of the standard library's modules, in the order of the paths."""
    folder = _stdlib_folder()
    relative = (PurePosixPath(path.relative_to(folder).as_posix()) for path in folder.rglob("*.py"))
    for path in sorted(relative, key=lambda path: path.parts):
        parts = path.with_suffix("").parts
        # This also skips files of a distributor or build: sitecustomize, _sysconfigdata, config-*
        if parts[0] not in sys.stdlib_module_names or _EXCLUDED_FOLDERS.intersection(parts[:-1]):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        if not _is_within(module, _EXCLUDED_MODULES):
            yield module, folder / path


def _stdlib_folder() -> Path:
    """Return the folder of the standard library's source files."""
    folder = Path(sysconfig.get_path("stdlib"))
    for needed in ("argparse.py", "pydoc_data/topics.py"):
        if not (folder / needed).is_file():
            raise CalibrationError(
                f"{folder}: expected the source files of Python's standard library, found no "
                f"{needed}; use a Python that is not zipped or stripped, or another text source"
            )
    return folder


def _is_within(module: str, names: frozenset[str] | tuple[str, ...]) -> bool:
    """Return whether a module is one of the named modules or inside one of them."""
    return any(module == name or module.startswith(name + ".") for name in names)


def _read_source(path: Path) -> str:
    """Return the text of a source file."""
    # tokenize.open reads the file's coding line and converts line ends to "\n".
    with tokenize.open(path) as file:
        return file.read()
