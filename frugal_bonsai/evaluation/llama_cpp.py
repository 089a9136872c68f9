"""llama.cpp (``xllamacpp``): its server, and its losses on token windows.

In: a GGUF file, and a text or token windows. Out: the tokens that llama.cpp makes of the text, and
the loss of each token of the windows. Its server returns no log-probabilities of a prompt, but the
hidden states behind the final norm. The head is multiplied here, from the file's dequantised
matrix, and one log-probability is compared with the server's. Holds llama.cpp's model and one
context, hidden states of a few thousand tokens and a block of the head in fp32. Does not import
torch: the peak memory of the process is llama.cpp's.

Shape suffixes: S tokens of a window, T tokens of all windows, H hidden size, V block of vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from frugal_bonsai.errors import BenchError, CheckpointError, OptionError

if TYPE_CHECKING:
    import numpy
    from gguf import GGUFReader

    Array = numpy.ndarray[Any, Any]

LLAMA_CPP = "llama.cpp"
# Logits that are computed at a time: 16 MiB in fp32.
_BLOCK_VALUES = 2**22
# llama.cpp rounds the head's input to 8 bits where the matrix is quantised. A head that computes
# something else, such as capped or scaled logits, differs by more.
_TOLERANCE_NATS = 0.1


def require_llama_cpp() -> None:
    """Check that the ``xllamacpp`` package is installed, without importing it.

    Raises:
        OptionError: It is not.
    """
    if find_spec("xllamacpp") is None:
        raise OptionError(
            "--runtime llama.cpp needs the xllamacpp package: in the clone, run "
            "pip install -e '.[llama-cpp]'"
        )


def start_server(
    path: Path, context_tokens: int, threads: int | None, *, hidden_states: bool = False
) -> Any:
    """Load a GGUF file with llama.cpp's default settings, but one sequence.

    Args:
        path: The file.
        context_tokens: Number of tokens of prompt and answer together.
        threads: Number of CPU threads; None leaves it to llama.cpp.
        hidden_states: Let the server return the hidden states of a prompt, which must then fit into
            one batch.

    Raises:
        OptionError: The ``xllamacpp`` package is missing.
        BenchError: llama.cpp cannot load the file.
    """
    require_llama_cpp()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = context_tokens, 1
    if threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if hidden_states:
        params.embedding, params.warmup = True, False
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.n_batch = params.n_ubatch = context_tokens
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise BenchError(f"{path}: llama.cpp cannot load it ({error})") from error


class GgufFile:
    """What a GGUF file says, and its head.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is no GGUF file, or has no token embedding.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: is no readable GGUF file ({error})") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = _value(reader, "general.architecture")
        self.positions = int(_value(reader, f"{architecture}.context_length") or 0)
        # Granite divides its logits by this, Gemma 2 caps them.
        self._divisor = _value(reader, f"{architecture}.logit_scale") or 1.0
        self._cap = _value(reader, f"{architecture}.final_logit_softcapping")
        for name in ("output.weight", "token_embd.weight"):
            if name in self._tensors:
                self._head = self._tensors[name]
                return
        raise CheckpointError(f"{path}: has no tensor token_embd.weight")

    @property
    def formats(self) -> dict[str, int]:
        """Number of tensors in each number format."""
        return dict(Counter(t.tensor_type.name.lower() for t in self._tensors.values()))

    def losses(self, hidden_TH: Array, targets_T: Array) -> Array:
        """Return minus the log-probability of each target, fp32 ``[T]``, from hidden states."""
        import gguf
        import numpy as np

        rows = len(self._head.data)
        top_T = np.full(len(targets_T), -np.inf, np.float32)
        total_T, chosen_T = np.zeros_like(top_T), np.zeros_like(top_T)
        step = max(1, _BLOCK_VALUES // max(hidden_TH.shape))
        for start in range(0, rows, step):
            block = self._head.data[start : start + step]
            logits_TV = hidden_TH @ gguf.dequantize(block, self._head.tensor_type).T
            if "output.bias" in self._tensors:
                logits_TV += self._tensors["output.bias"].data[start : start + step]
            logits_TV /= self._divisor
            if self._cap:
                logits_TV = self._cap * np.tanh(logits_TV / self._cap)
            higher_T = np.maximum(top_T, logits_TV.max(1))
            total_T *= np.exp(top_T - higher_T)
            total_T += np.exp(logits_TV - higher_T[:, None]).sum(1)
            top_T = higher_T
            inside_T = (targets_T >= start) & (targets_T < start + len(block))
            chosen_T[inside_T] = logits_TV[inside_T, targets_T[inside_T] - start]
        found: Array = top_T + np.log(total_T) - chosen_T
        return found


class LlamaCppLosses:
    """A GGUF file in llama.cpp, which tokenises texts and measures losses.

    Args:
        path: The file.
        file: Its contents.
        window: S, tokens of a window.
        threads: Number of CPU threads; None leaves it to llama.cpp.

    Raises:
        OptionError: The ``xllamacpp`` package is missing.
        BenchError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, file: GgufFile, window: int, threads: int | None) -> None:
        self._path, self._file, self._checked = path, file, False
        # The check generates a token behind a window.
        self._server = start_server(path, window + 8, threads, hidden_states=True)

    def tokenise(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that llama.cpp puts around it."""
        asked = {"content": text, "add_special": False, "parse_special": True}
        tokens: list[int] = self._post("/tokenize", asked)["tokens"]
        return tokens

    def losses(self, windows: list[list[int]]) -> list[list[float]]:
        """Return minus the log-probability of tokens 2 to S of each window, in nats.

        Raises:
            BenchError: llama.cpp failed, or its log-probabilities are not those that the hidden
                states give.
        """
        import numpy as np

        hidden = [self._hidden_states(window) for window in windows]
        if not self._checked:
            self._check(windows[0], hidden[0])
        states_TH = np.concatenate([states_SH[:-1] for states_SH in hidden])
        targets_T = np.concatenate([window[1:] for window in windows])
        found = self._file.losses(states_TH, targets_T).reshape(len(windows), -1)
        losses: list[list[float]] = found.tolist()
        return losses

    def _hidden_states(self, window: list[int]) -> Array:
        """Return the states behind the final norm, fp32 ``[S, H]``."""
        import numpy as np

        [answer] = self._post("/embeddings", {"content": window, "embd_normalize": -1})
        states_SH: Array = np.asarray(answer["embedding"], np.float32)
        if len(states_SH) != len(window):
            raise BenchError(
                f"{self._path}: llama.cpp returned {len(states_SH)} hidden states for "
                f"{len(window)} tokens"
            )
        return states_SH

    def _check(self, window: list[int], hidden_SH: Array) -> None:
        """Compare a log-probability with llama.cpp's own."""
        import numpy as np

        # The server gives none for a token that is a part of a character: try another place.
        for length in range(len(window), 0, -max(1, len(window) // 8)):
            asked = {"prompt": window[:length], "n_predict": 1, "n_probs": 1, "temperature": 0}
            found = self._post("/completion", asked | {"cache_prompt": False})
            for token in found.get("completion_probabilities") or ():
                target_T = np.asarray([token["id"]])
                here = -float(self._file.losses(hidden_SH[length - 1 : length], target_T)[0])
                if not math.isclose(here, token["logprob"], abs_tol=_TOLERANCE_NATS):
                    raise BenchError(
                        f"{self._path}: the hidden states and the head give token {token['id']} "
                        f"the log-probability {here:.4f}, llama.cpp gives {token['logprob']:.4f}: "
                        "its architecture changes the logits in a way that is not known here; "
                        "omit --runtime"
                    )
                self._checked = True
                return
        raise BenchError(
            f"{self._path}: llama.cpp gives no log-probability behind any of its first tokens to "
            "check the losses with; use another --text, or omit --runtime"
        )

    def _post(self, path: str, asked: dict[str, Any]) -> Any:
        """Return the server's answer to a request."""
        request = Request(
            self._server.listening_address + path,
            data=json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urlopen(request) as reply:
                return json.load(reply)
        except HTTPError as error:
            text = error.read().decode("utf-8", "replace")[:500]
            raise BenchError(f"{self._path}: llama.cpp refused {path}: {text}") from error


def _value(reader: GGUFReader, key: str) -> Any:
    """Return the value of a key, or None."""
    field = reader.get_field(key)
    return None if field is None else field.contents()
