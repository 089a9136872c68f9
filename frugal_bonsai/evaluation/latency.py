"""The time that a model takes for a prompt (prefill) and for new tokens (decode).

In: a loaded model or a GGUF file, and token ids. Out: seconds of both. There are two runtimes:
transformers, and llama.cpp (``xllamacpp``), which measures its own time. Holds the model and one KV
cache.

Shape suffixes: B batch of one, S tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from frugal_bonsai.accelerator import synchronize
from frugal_bonsai.errors import BenchError
from frugal_bonsai.evaluation.llama_cpp import start_server

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one run.

    Attributes:
        prefill_seconds: time of the whole prompt, up to the logits of its last token.
        decode_seconds: time of all new tokens, one after the other.
    """

    prefill_seconds: float
    decode_seconds: float


class Timed(Protocol):
    """A model whose time can be measured."""

    def run(self, prompt: list[int], new_tokens: int) -> Latency:
        """Read the prompt and generate ``new_tokens`` tokens greedily."""


class TransformersModel:
    """A model that transformers has loaded.

    Args:
        model: a causal language model in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, prompt: list[int], new_tokens: int) -> Latency:
        """See :class:`Timed`. Uses a dynamic KV cache, and the head for the last token only."""
        import torch

        tokens_BS = torch.tensor([prompt], device=self._model.device)
        with torch.inference_mode():
            started = self._now()
            made = self._model(tokens_BS, use_cache=True, logits_to_keep=1)
            read = self._now()
            for _ in range(new_tokens):
                tokens_BS = made.logits[:, -1:].argmax(-1)
                made = self._model(tokens_BS, past_key_values=made.past_key_values, use_cache=True)
            ended = self._now()
        return Latency(prefill_seconds=read - started, decode_seconds=ended - read)

    def _now(self) -> float:
        """Return the time after the device has finished all its work."""
        device: torch.device = self._model.device
        synchronize(device)
        return time.perf_counter()


class LlamaCppModel:
    """A GGUF file in llama.cpp, with default settings but one sequence and no prompt cache.

    Args:
        path: the file.
        context_tokens: number of tokens of prompt and answer together.
        threads: number of CPU threads; None leaves it to llama.cpp.

    Raises:
        OptionError: the ``xllamacpp`` package is missing.
        BenchError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, context_tokens: int, threads: int | None) -> None:
        self._server = start_server(path, context_tokens, threads)

    def run(self, prompt: list[int], new_tokens: int) -> Latency:
        """See :class:`Timed`. Returns the times that llama.cpp measures.

        Raises:
            BenchError: llama.cpp did not read the whole prompt.
        """
        made = self._server.handle_completions(
            {
                "prompt": prompt,
                # The first token comes from the prompt's logits and does not count as decoding.
                "max_tokens": new_tokens + 1,
                "temperature": 0,
                "cache_prompt": False,
                "ignore_eos": True,
            }
        )
        times = made.get("timings")
        if times is None or times["prompt_n"] != len(prompt):
            raise BenchError(f"llama.cpp did not read the prompt: {made}")
        return Latency(
            prefill_seconds=times["prompt_ms"] / 1000,
            decode_seconds=times["predicted_ms"] / 1000,
        )
