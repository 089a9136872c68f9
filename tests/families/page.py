"""The tables of docs/families.md, made from the families' tables and from the tests.

``python -m families.page``, run in ``tests/``, writes them into the page. ``test_docs.py`` compares
both.
"""

from __future__ import annotations

from pathlib import Path

from export import test_llama_cpp_families as in_llama_cpp
from tiny_models import (
    EXPERTS_PRUNED,
    FAMILY_CONFIGS,
    PRUNED,
    PRUNED_BRIEFLY,
    WHOLE_EXPERTS_PRUNED,
)

from families import test_families
from families.contract import FamilyContract
from frugal_bonsai.export.architecture import CONVERTED_ELSEWHERE
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.families.unsupported import UNSUPPORTED
from frugal_bonsai.model.family_schema import Condition, Family
from frugal_bonsai.model.layout import LAYOUTS, PER_LAYER

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
REFUSED = "refused by name"
TITLES = (
    *("family", "`model_type`", "attention units", *LAYOUTS, "whole prune tested"),
    *("GGUF, layers alike", "GGUF, per-layer", "attention whole, why"),
)


def contracts() -> dict[str, list[type[FamilyContract]]]:
    """Return the test classes by model_type."""
    found: dict[str, list[type[FamilyContract]]] = {}
    for value in vars(test_families).values():
        if isinstance(value, type) and issubclass(value, FamilyContract) and hasattr(value, "name"):
            found.setdefault(FAMILY_CONFIGS[value.name][0], []).append(value)
    return found


def table() -> str:
    """Return the table of all families."""
    lines = [TITLES, ("---",) * len(TITLES), *map(_row, FAMILIES.values())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(family: Family) -> tuple[str, ...]:
    tests = contracts()[family.model_type]
    cuts = {layout for test in tests for layout in test.attention}
    units = "heads" if family.heads_key == family.kv_heads_key else "KV groups"
    units += ", `per-layer` only" if cuts == {PER_LAYER} else ""
    layouts = ["yes" if all(lay in t.layouts for t in tests) else "no" for lay in LAYOUTS]
    return (
        *(family.models, f"`{family.model_type}`", units if cuts else "whole", *layouts),
        *(_pruned(family), *_gguf(family), _why_whole(family)),
    )


def _pruned(family: Family) -> str:
    real = {"llama": "yes, and real ones", "gpt2": "yes, and a real one"}
    names = {
        FAMILY_CONFIGS[name][0]
        for name in (*PRUNED, *PRUNED_BRIEFLY, *EXPERTS_PRUNED, *WHOLE_EXPERTS_PRUNED)
    }
    return real.get(family.model_type, "yes" if family.model_type in names else "-")


def _gguf(family: Family) -> tuple[str, str]:
    alike = {"llama", *(FAMILY_CONFIGS[name][0] for name in in_llama_cpp.FAMILIES)}
    by_layer = {"llama", *(FAMILY_CONFIGS[name][0] for name in in_llama_cpp.DECI)}
    if family.model_type not in alike:
        why = "no (G3)" if family.model_type in CONVERTED_ELSEWHERE else "no (G1)"
        return why, why
    return "yes", "yes" if family.model_type in by_layer else "no (G2)"


def _why_whole(family: Family) -> str:
    reasons = {condition.reason: _case(condition) for condition in family.whole_attention[::-1]}
    found = [f"{case}{reason}" for reason, case in reasons.items()]
    if family.head_dim_key is None and not any(c.other_than == "" for c in family.whole_attention):
        found.append("in `uniform` and `padded`: (1)")
    return "; ".join(found)


def _case(condition: Condition) -> str:
    return "" if condition.other_than == "" else f"with `{condition.key}` {condition.value}: "


def refusals() -> str:
    """Return the table of architectures that are refused by name."""
    by_reason: dict[str, list[str]] = {}
    for model_type, reason in UNSUPPORTED.items():
        by_reason.setdefault(reason, []).append(f"`{model_type}`")
    rows = [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]
    return "\n".join((f"| {REFUSED} | why |", "| --- | --- |", *rows))


def with_tables(page: str) -> str:
    """Return the page with today's tables."""
    for title, new in ((TITLES[0], table()), (REFUSED, refusals())):
        before, _, rest = page.partition(f"| {title} |")
        if not rest:
            raise ValueError(f"{PAGE.name} has no table that begins with | {title} |")
        page = f"{before}{new}\n\n{rest.partition(chr(10) * 2)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
