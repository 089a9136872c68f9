"""docs/families.md agrees with the tables and with the tests."""

from __future__ import annotations

from pathlib import Path

from export import test_llama_cpp_families as in_llama_cpp
from tiny_models import EXPERTS_PRUNED, FAMILY_CONFIGS, PRUNED

from families import test_families
from families.contract import FamilyContract
from frugal_bonsai.export.architecture import ARCHITECTURES
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.layout import LAYOUTS, PER_LAYER

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows() -> dict[str, list[str]]:
    """Return the cells of each row of the table by model_type."""
    found = {}
    for line in (DOCS / "families.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) > 5 and cells[1].startswith("`"):
            found[cells[1].strip("`")] = cells
    found.pop("model_type", None)
    return found


def contracts() -> dict[str, list[type[FamilyContract]]]:
    """Return the test classes by model_type."""
    found: dict[str, list[type[FamilyContract]]] = {}
    for value in vars(test_families).values():
        if isinstance(value, type) and issubclass(value, FamilyContract) and hasattr(value, "name"):
            found.setdefault(FAMILY_CONFIGS[value.name][0], []).append(value)
    return found


def test_every_family_has_a_row_and_tests() -> None:
    assert rows().keys() == FAMILIES.keys() == contracts().keys()


def test_cells_are_those_of_the_contracts() -> None:
    for model_type, cells in rows().items():
        tests = contracts()[model_type]
        layouts = {layout for test in tests for layout in test.attention}
        assert ("whole" in cells[2]) == (not layouts), model_type
        assert ("(2)" in cells[2]) == (layouts == {PER_LAYER}), model_type
        assert cells[3:6] == ["yes", "yes", "yes"], model_type
        assert all(set(test.layouts) == set(LAYOUTS) for test in tests), model_type


def test_whole_prunes_are_those_that_are_tested() -> None:
    pruned = {FAMILY_CONFIGS[name][0] for name in (*PRUNED, *EXPERTS_PRUNED)} | {"llama", "gpt2"}
    assert {name for name, cells in rows().items() if cells[6].startswith("yes")} == pruned


def test_gguf_cells_are_those_that_run_in_llama_cpp() -> None:
    tested = {"llama", *(FAMILY_CONFIGS[name][0] for name in in_llama_cpp.FAMILIES)}
    by_layer = {"llama", *(FAMILY_CONFIGS[name][0] for name in in_llama_cpp.DECI)}
    assert tested == ARCHITECTURES.keys()
    for model_type, cells in rows().items():
        assert cells[7] == ("yes" if model_type in tested else "no (G1)"), model_type
        other = "no (G2)" if model_type in tested else "no (G1)"
        assert cells[8] == ("yes" if model_type in by_layer else other), model_type
