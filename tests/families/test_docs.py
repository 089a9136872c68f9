"""docs/families.md agrees with the tables and with the tests; so does README's list."""

from __future__ import annotations

from export import test_llama_cpp_families as in_llama_cpp
from tiny_models import FAMILY_CONFIGS

from families.page import PAGE, contracts, with_tables
from frugal_bonsai.export.architecture import ARCHITECTURES
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.layout import LAYOUTS


def test_every_family_has_tests() -> None:
    assert FAMILIES.keys() == contracts().keys()
    assert all(
        set(test.layouts) == set(LAYOUTS) for tests in contracts().values() for test in tests
    )


def test_the_page_has_the_table_that_the_families_give() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run python -m families.page in tests/"


def test_every_exported_family_runs_in_llama_cpp() -> None:
    tested = {"llama", *(FAMILY_CONFIGS[name][0] for name in in_llama_cpp.FAMILIES)}
    assert tested == ARCHITECTURES.keys()


def test_readme_names_every_family() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    words = " ".join(readme.split())
    missing = [
        name for f in FAMILIES.values() for name in f.models.split(",")[:1] if name not in words
    ]
    assert missing == []
