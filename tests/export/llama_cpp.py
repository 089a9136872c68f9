"""Run a real llama.cpp (``xllamacpp``) and compare it with transformers.

llama.cpp runs in a child process, because its asserts end the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from frugal_bonsai import load_pruned

# Flash attention off and the KV cache in fp32: the defaults round more than the comparison allows.
WORKER = """
import json, sys, urllib.request
import xllamacpp
path, ignore_eos, jobs = sys.argv[1], sys.argv[2] == "ignore-eos", json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
answers = []
for prompt, tokens in jobs:
    made = server.handle_completions({
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "top_k": 1, "logprobs": 1,
        "cache_prompt": False, "ignore_eos": ignore_eos})
    # None where the tokens are parts of a character.
    content = (made["choices"][0]["logprobs"] or {"content": []})["content"]
    answers.append({"ids": [t["id"] for t in content], "logprobs": [t["logprob"] for t in content],
                    "text": made["choices"][0]["text"], "prompt": made["usage"]["prompt_tokens"]})
with urllib.request.urlopen(server.listening_address + "/props") as reply:
    print("ANSWERS" + json.dumps([answers, json.load(reply)]))
"""

needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None,
    reason="needs xllamacpp (pip install -e '.[llama-cpp]')",
)


@dataclass(frozen=True)
class Answer:
    """Result of greedy decoding after one prompt."""

    ids: list[int]
    logprobs: list[float]
    text: str
    prompt_tokens: int


def complete(path: Path, jobs: list[tuple[str | list[int], int]]) -> list[Answer]:
    """Return greedy tokens after each prompt (text, or token ids); no token ends the text."""
    return _run(path, jobs, "ignore-eos")[0]


def complete_to_the_end(path: Path, prompt: str, tokens: int) -> tuple[Answer, dict[str, Any]]:
    """Return greedy tokens up to one that ends the text, and the server's properties."""
    [answer], properties = _run(path, [(prompt, tokens)], "stop")
    return answer, properties


def _run(
    path: Path, jobs: list[tuple[str | list[int], int]], ends: str
) -> tuple[list[Answer], dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(path), ends],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert done.returncode == 0 and lines, (done.returncode, done.stderr[-3000:])
    answers, properties = json.loads(lines[0].removeprefix("ANSWERS"))
    found = [Answer(a["ids"], a["logprobs"], a["text"], a["prompt"]) for a in answers]
    return found, properties


@torch.no_grad()
def assert_same_next_tokens(
    folder: Path,
    gguf: Path,
    *,
    text: list[int] | None = None,
    first: int = 259,
    step: int = 1,
    within: float = 1e-4,
) -> None:
    """Compare the next token and its log-probability with transformers', for each prefix of a text.

    The text has 60 random tokens if none is given. Prefixes whose next token is below ``first`` are
    skipped: llama.cpp's server merges tokens that are single bytes.
    """
    if text is None:
        generator = torch.Generator().manual_seed(0)
        text = [1, *torch.randint(first, 512, (60,), generator=generator).tolist()]
    logits = load_pruned(folder, dtype=torch.float32)(torch.tensor([text])).logits[0]
    best = logits.log_softmax(-1).max(-1)
    compared = [at for at, token in enumerate(best.indices.tolist()) if token >= first][::step]
    assert len(compared) > 15 // step
    answers = complete(gguf, [(text[: at + 1], 1) for at in compared])
    assert [answer.ids for answer in answers] == [[int(best.indices[at])] for at in compared]
    found = [answer.logprobs[0] for answer in answers]
    assert found == pytest.approx([float(best.values[at]) for at in compared], abs=within)
