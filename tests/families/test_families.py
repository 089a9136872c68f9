"""Every family in the table under the contract."""

from __future__ import annotations

from tiny_models import FAMILY_CONFIGS

from families.contract import FamilyContract
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.layout import PADDED, UNIFORM


def test_every_family_has_a_tiny_model() -> None:
    assert {model_type for model_type, _ in FAMILY_CONFIGS.values()} == set(FAMILIES)


class TestLlama(FamilyContract):
    name = "llama"


class TestGpt2(FamilyContract):
    name = "gpt2"
    attention = ()
    layouts = (UNIFORM, PADDED)


class TestGpt2Untied(TestGpt2):
    name = "gpt2-untied"
