"""Every family in the table under the contract."""

from __future__ import annotations

from tiny_models import FAMILY_CONFIGS

from families.contract import FamilyContract
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.layout import PER_LAYER


def test_every_family_has_a_tiny_model() -> None:
    assert {model_type for model_type, _ in FAMILY_CONFIGS.values()} == set(FAMILIES)


class TestLlama(FamilyContract):
    name = "llama"
    updates_on_device = True


class TestMistral(FamilyContract):
    name = "mistral"


class TestQwen2(FamilyContract):
    name = "qwen2"


class TestQwen3(FamilyContract):
    name = "qwen3"


class TestQwen3Biases(FamilyContract):
    name = "qwen3-biases"


class TestQwen35(FamilyContract):
    name = "qwen3_5"
    attention = ()


class TestSmolLM3(FamilyContract):
    name = "smollm3"


class TestGranite(FamilyContract):
    name = "granite"


class TestGranite4(FamilyContract):
    name = "granite4"
    attention = ()


class TestGranite4Experts(FamilyContract):
    name = "granite4-experts"
    refines = False
    attention = ()


class TestOlmo2(FamilyContract):
    name = "olmo2"
    attention = ()


class TestStableLm(FamilyContract):
    name = "stablelm"
    attention = (PER_LAYER,)


class TestStableLmParallel(FamilyContract):
    name = "stablelm-parallel"
    attention = ()


class TestMinistral3(FamilyContract):
    name = "ministral3"


class TestMinistral(FamilyContract):
    name = "ministral"


class TestOlmo3(FamilyContract):
    name = "olmo3"
    attention = ()


class TestGlm(FamilyContract):
    name = "glm"


class TestGlm4(FamilyContract):
    name = "glm4"


class TestExaone4(FamilyContract):
    name = "exaone4"


class TestErnie45(FamilyContract):
    name = "ernie4_5"


class TestErnie45Biases(FamilyContract):
    name = "ernie4_5-biases"


class TestHunyuan(FamilyContract):
    name = "hunyuan"


class TestLfm2(FamilyContract):
    name = "lfm2"
    attention = ()


class TestSeedOss(FamilyContract):
    name = "seed-oss"


class TestHelium(FamilyContract):
    name = "helium"
    attention = (PER_LAYER,)


class TestCohere(FamilyContract):
    name = "cohere"
    attention = (PER_LAYER,)


class TestCohereNorms(FamilyContract):
    name = "cohere-norms"
    attention = ()


class TestCohere2(FamilyContract):
    name = "cohere2"
    attention = (PER_LAYER,)


class TestApertus(FamilyContract):
    name = "apertus"
    updates_on_device = True


class TestArcee(FamilyContract):
    name = "arcee"
    updates_on_device = True


class TestNemotron(FamilyContract):
    name = "nemotron"


class TestStarcoder2(FamilyContract):
    name = "starcoder2"


class TestGemma(FamilyContract):
    name = "gemma"


class TestGemma2(FamilyContract):
    name = "gemma2"


class TestGemma3(FamilyContract):
    name = "gemma3"


class TestDeepseekV3Groups(FamilyContract):
    name = "deepseek-v3-groups"
    refines = False
    attention = ()


class TestDeepseekV2Groups(FamilyContract):
    name = "deepseek-v2-groups"
    refines = False
    attention = ()


class TestLlama4(FamilyContract):
    name = "llama4"
    refines = False


class TestErnie45Moe(FamilyContract):
    name = "ernie4_5-moe"
    refines = False


class TestErnie45MoeRouted(FamilyContract):
    name = "ernie4_5-moe-routed"
    refines = False


class TestGemma4(FamilyContract):
    name = "gemma4"
    attention = ()


class TestGemma4Experts(FamilyContract):
    name = "gemma4-experts"
    refines = False
    attention = ()


class TestFlexOlmo(FamilyContract):
    name = "flex-olmo"
    refines = False
    attention = ()


class TestBamba(FamilyContract):
    name = "bamba"
    attention = ()


class TestYoutu(FamilyContract):
    name = "youtu"
    attention = ()


class TestGraniteMoeShared(FamilyContract):
    name = "granitemoeshared"
    refines = False


class TestLfm2Moe(FamilyContract):
    name = "lfm2-moe"
    refines = False
    attention = ()


class TestSolarOpen(FamilyContract):
    name = "solar-open"
    refines = False


class TestGpt2(FamilyContract):
    name = "gpt2"
    updates_on_device = True
    attention = (PER_LAYER,)


class TestGpt2Untied(TestGpt2):
    name = "gpt2-untied"
    updates_on_device = False


class TestGptNeo(FamilyContract):
    name = "gpt-neo"
    attention = (PER_LAYER,)


class TestPythia(FamilyContract):
    name = "pythia"
    attention = (PER_LAYER,)


class TestGptNeoXSequential(FamilyContract):
    name = "gpt-neox-sequential"
    attention = (PER_LAYER,)


class TestOpt(FamilyContract):
    name = "opt"
    updates_on_device = True
    attention = (PER_LAYER,)


class TestFalconMultiQuery(FamilyContract):
    name = "falcon-multi-query"
    attention = ()


class TestFalconGroups(FamilyContract):
    name = "falcon-groups"
    attention = (PER_LAYER,)


class TestFalconSequential(FamilyContract):
    name = "falcon-sequential"
    attention = (PER_LAYER,)


class TestVaultGemma(FamilyContract):
    name = "vaultgemma"


class TestPhi3(FamilyContract):
    name = "phi3"
    updates_on_device = True


class TestMixtral(FamilyContract):
    name = "mixtral"
    refines = False


class TestQwen3Moe(FamilyContract):
    name = "qwen3-moe"
    refines = False


class TestOlmoe(FamilyContract):
    name = "olmoe"
    refines = False
    attention = ()


class TestQwen2Moe(FamilyContract):
    name = "qwen2-moe"
    refines = False


class TestQwen3Next(FamilyContract):
    name = "qwen3-next"
    refines = False
    rounding = 2e-3  # gates multiply what is rounded
    attention = ()


class TestQwen35Moe(FamilyContract):
    name = "qwen3_5-moe"
    refines = False
    rounding = 2e-3  # gates multiply what is rounded
    attention = ()


class TestMellum(FamilyContract):
    name = "mellum"
    refines = False


class TestMiniMaxM2(FamilyContract):
    name = "minimax-m2"
    refines = False
    attention = ()


class TestGraniteMoe(FamilyContract):
    name = "granitemoe"
    refines = False


class TestGptOss(FamilyContract):
    name = "gpt-oss"
    refines = False


class TestDeepSeekV3(FamilyContract):
    name = "deepseek-v3"
    refines = False
    attention = ()


class TestGlm4Moe(FamilyContract):
    name = "glm4-moe"
    refines = False


class TestGlm4MoeLite(FamilyContract):
    name = "glm4-moe-lite"
    refines = False
    attention = ()


class TestDots1(FamilyContract):
    name = "dots1"
    refines = False


class TestExaoneMoe(FamilyContract):
    name = "exaone-moe"
    refines = False


class TestDeepSeekV2(FamilyContract):
    name = "deepseek-v2"
    refines = False
    attention = ()
