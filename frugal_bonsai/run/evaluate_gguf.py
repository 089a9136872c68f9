"""``eval --runtime llama.cpp``: measure the perplexity of a GGUF file in llama.cpp.

In: a GGUF file and a text. Out: the perplexity over the windows that ``eval`` would cut, and what
it took, as plain values. The text is tokenised by llama.cpp, in a separate process like all else.
Holds the tokens and their losses.

Shape suffixes: N windows, S tokens.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_bonsai.checkpoint.gguf_reader import part_files
from frugal_bonsai.checkpoint.recognise_gguf import GGUF_SUFFIX
from frugal_bonsai.errors import OptionError
from frugal_bonsai.progress import Progress
from frugal_bonsai.run.child import Child
from frugal_bonsai.run.texts import DEFAULT_WINDOW, require_stride, require_window
from frugal_bonsai.text.sources import load_text
from frugal_bonsai.text.windows import CHARACTERS_PER_TOKEN

if TYPE_CHECKING:
    import torch

_WORKER = "frugal_bonsai.run.llama_cpp_worker"
# Tokens whose hidden states the process holds: the head is dequantised once for them.
_TOKENS_AT_A_TIME = 4096


def find_gguf(model: str) -> Path:
    """Return the path of a GGUF file, or of the only one in a folder.

    Raises:
        OptionError: There is none, or more than one, or it is a part of a split file.
    """
    path = Path(model)
    if path.is_file() and path.suffix == GGUF_SUFFIX:
        _require_whole(path)
        return path
    found = sorted(path.glob(f"*{GGUF_SUFFIX}")) if path.is_dir() else []
    if len(found) != 1:
        raise OptionError(
            f"{model}: --runtime llama.cpp takes a GGUF file or a folder with one in it, found "
            f"{len(found)}; write one: frugal-bonsai export {model} --out {path.name}.gguf"
        )
    _require_whole(found[0])
    return found[0]


def _require_whole(path: Path) -> None:
    """Raise for a part of a split file: the head may lie in another part."""
    parts = part_files(path)
    if len(parts) > 1:
        whole = path.with_name("whole.gguf")
        raise OptionError(
            f"{path}: is a part of a split GGUF file, and --runtime llama.cpp takes whole ones; "
            f"merge them: llama-gguf-split --merge {parts[0]} {whole}"
        )


def evaluate_gguf(
    model: str,
    text: str,
    *,
    window: int | None,
    windows: int | None,
    stride: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the perplexity of a GGUF file in llama.cpp, with as many threads as torch has.

    ``model`` is the file or a folder with one in it. The other arguments and the result are those
    of :func:`frugal_bonsai.run.evaluate.evaluate`.

    Raises:
        FrugalBonsaiError: The user can mend it.
    """
    import torch

    from frugal_bonsai.evaluation.perplexity import Perplexity
    from frugal_bonsai.text.windows import cut_windows

    started, file, threads = time.monotonic(), find_gguf(model), torch.get_num_threads()
    with Child(_WORKER, str(file), threads) as child:
        facts = child.ask({"file": str(file)})
        positions = facts.pop("positions")
        window = min(DEFAULT_WINDOW, positions) if window is None else window
        require_window(window, positions)
        require_stride(stride, window)
        characters = None if windows is None else windows * window * CHARACTERS_PER_TOKEN
        source = load_text(text, characters=characters)
        child.ask({"window": window, "threads": threads})
        tokens_T = torch.tensor(child.ask({"text": source.text})["tokens"])
        what = f"--text {source.name}"
        windows_NS = cut_windows(tokens_T, window, limit=windows, what=what, stride=stride)
        running = time.monotonic()
        losses, peak_bytes = _losses(child, windows_NS, progress)
    ended = time.monotonic()
    return {
        "model": model,
        "runtime": "llama.cpp",
        "text": source.name,
        "window": window,
        "windows": len(windows_NS),
        "stride": stride,
        **Perplexity.of(torch.tensor(losses), stride).describe(
            len(source.text.encode("utf-8", "replace")) / len(tokens_T)
        ),
        **facts,
        "threads": threads,
        "seconds": ended - started,
        "tokens_per_second": windows_NS.numel() / (ended - running),
        "host_peak_bytes": peak_bytes,
        "gpu_peak_bytes": None,
        "notes": [],
    }


def _losses(
    child: Child, windows_NS: torch.Tensor, progress: Progress
) -> tuple[list[list[float]], int]:
    """Return the loss of every token but a window's first, and the process's peak memory."""
    groups = windows_NS.split(max(1, _TOKENS_AT_A_TIME // windows_NS.shape[1]))
    progress.sweep("perplexity", len(groups), groups[0].numel())
    losses, peak_bytes = [], 0
    for group_NS in groups:
        answer = child.ask({"windows": group_NS.tolist()})
        losses += answer["losses"]
        peak_bytes = answer["host_peak_bytes"]
        progress.step()
    return losses, peak_bytes
