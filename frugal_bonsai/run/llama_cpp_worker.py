"""The process in which ``eval`` runs llama.cpp: ``python -m frugal_bonsai.run.llama_cpp_worker``.

In: one JSON object per line of standard input: ``{"file": path}``, then ``{"window": tokens,
"threads": number}``, ``{"text": text}``, and ``{"windows": tokens}`` any number of times. Out: one
JSON object per line: what the file says; nothing; the text's tokens; the losses of the windows in
nats and the peak memory. Does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugal_bonsai.evaluation.llama_cpp import GgufFile, LlamaCppLosses
from frugal_bonsai.memory.meter import peak_resident_bytes
from frugal_bonsai.run.child import serve


class _Losses:
    """Answer the questions in their order."""

    def __init__(self) -> None:
        self._path = Path()
        self._file: Any = None
        self._model: Any = None

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one question."""
        if "file" in asked:
            self._path = Path(asked["file"])
            self._file = GgufFile(self._path)
            return {
                "positions": self._file.positions,
                "tensors": self._file.formats,
                "file_bytes": self._path.stat().st_size,
            }
        if "window" in asked:
            window, threads = asked["window"], asked["threads"]
            self._model = LlamaCppLosses(self._path, self._file, window, threads)
            return {}
        if "text" in asked:
            return {"tokens": self._model.tokenise(asked["text"])}
        losses = self._model.losses(asked["windows"])
        return {"losses": losses, "host_peak_bytes": peak_resident_bytes()}


if __name__ == "__main__":
    serve(_Losses())
