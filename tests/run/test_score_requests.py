"""Requests of different lengths, scored on streamed models, against transformers one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal_models import save_whole
from stand_in_device import installed
from tiny_models import tiny_family
from transformers import AutoModelForCausalLM

import frugal_bonsai
from frugal_bonsai.errors import BudgetError, CheckpointError
from frugal_bonsai.evaluation.requests import Request
from frugal_bonsai.memory.budget import find_device, parse_caps
from frugal_bonsai.progress import Silent
from frugal_bonsai.run import evaluate_tasks
from frugal_bonsai.run.evaluate_tasks import RequestScorer
from frugal_bonsai.run.open import open_model
from frugal_bonsai.text.windows import load_tokenizer

EXAMPLE = Path(frugal_bonsai.__file__).parent / "example"
Score = tuple[float, bool]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_tasks, "ENOUGH_TOKENS", 40)
    monkeypatch.setattr(evaluate_tasks, "ENOUGH_GPU_TOKENS", 40)


def make_requests(vocabulary: int, longest: int = 24) -> list[Request]:
    """Requests that read 1 to ``longest`` tokens; two share their inputs."""
    generator = torch.Generator().manual_seed(0)
    requests = []
    for length in (3, longest, 1, 12, longest, 9, 14, 2):
        tokens = torch.randint(vocabulary, (length + 1,), generator=generator).tolist()
        requests.append(Request(tokens=tuple(tokens), scored=1 + length // 2))
    last = requests[3].tokens
    return [*requests, Request(tokens=(*last[:-1], (last[-1] + 1) % vocabulary), scored=2)]


def score(model: str | Path, requests: list[Request], device: str = "cpu", cap: Any = None) -> Any:
    with open_model(str(model)) as opened:
        scorer = RequestScorer(
            opened,
            load_tokenizer(EXAMPLE),
            None,
            find_device(device),
            parse_caps(None, cap),
            Silent(),
        )
        found = scorer(requests)
    return found, scorer.describe()


@torch.no_grad()
def expect(model: Any, requests: list[Request]) -> list[Score]:
    scores = []
    for request in requests:
        logits = model(torch.tensor([request.inputs])).logits[0, -request.scored :]
        scored = torch.tensor(request.tokens[-request.scored :])
        chances = logits.double().log_softmax(-1).gather(1, scored[:, None])
        scores.append((float(chances.sum()), bool((logits.argmax(-1) == scored).all())))
    return scores


def require_equal(found: list[Score], expected: list[Score], *, rel: float = 1e-5) -> None:
    for (likelihood, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert likelihood == pytest.approx(wanted, rel=rel)
        assert greedy == wanted_greedy


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen3-moe", "whole"])
def test_scores_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """With learnt positions, sliding windows, experts, and in a model of images and text."""
    if kind == "whole":
        model = save_whole(tmp_path / "m", "gemma3")
        vocabulary, longest = 280, 24
    else:
        tiny = tiny_family(tmp_path / "m", kind)
        model, longest = tiny.hugging_face(), min(tiny.spec.positions, 40)
        vocabulary = tiny.spec.vocabulary
    requests = make_requests(vocabulary, longest)
    # One request continues with what the model finds most likely.
    best = int(model(torch.tensor([requests[0].inputs])).logits[0, -1].argmax())
    requests.append(Request(tokens=(*requests[0].inputs, best), scored=1))
    found, described = score(tmp_path / "m", requests)
    require_equal(found, expect(model, requests))
    assert found[-1][1] is True
    assert described["task_tokens"] >= sum(len(r.inputs) for r in requests[:8])


def test_scores_of_a_gguf_file(tmp_path: Path) -> None:
    file, requests = tmp_path / "example.gguf", make_requests(4096)
    frugal_bonsai.export_gguf(str(EXAMPLE), file, dtype="f32")
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    require_equal(score(file, requests)[0], expect(model, requests))


def test_scores_on_an_accelerator() -> None:
    """In bf16 on the stand-in for a GPU."""
    requests = make_requests(4096)
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    with installed() as machine:
        found, described = score(EXAMPLE, requests, "cuda")
    expected = expect(model, requests)
    for (likelihood, _), (wanted, _) in zip(found, expected, strict=True):
        assert likelihood == pytest.approx(wanted, rel=0.02)
    assert machine.order.races == []
    assert 0 < described["gpu_peak_bytes"] <= described["gpu_cap_bytes"]


def test_refused_requests() -> None:
    requests = [Request(tokens=(1, 5000, 2), scored=1)]
    with pytest.raises(CheckpointError, match=r"tasks: an item: contains the token .* 5000"):
        score(EXAMPLE, requests)
    with pytest.raises(BudgetError, match="--max-cpu-mem"):
        score(EXAMPLE, make_requests(4096), cap="10MB")
