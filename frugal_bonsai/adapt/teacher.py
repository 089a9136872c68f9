"""The teacher without its memory: what the dense model says, on disk.

In: an engine of the dense model and token windows. Out: a folder with, for each token but the last
of each window, the K most likely followers' log-probabilities (fp16), their numbers (int32) and the
mass of all others (fp32); behind chosen layers the hidden states (fp16). Written by sweeps over a
shard of windows each, read back window by window with pread. Holds one shard while it is written,
nothing when it is read. A cache says which weights and windows it is of, and is used for no others.

Shape suffixes: N windows, B those of a micro-batch, S tokens, K kept followers, H hidden.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.accelerator import sum_dtype
from frugal_bonsai.checkpoint.commit import output_errors, write_json
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import open_tensors, write_tensors
from frugal_bonsai.errors import CheckpointError, OptionError, StateError
from frugal_bonsai.memory.work import SHARD_BYTES
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.hidden import HiddenStates

CACHE_FILE, VERSION = "teacher.json", 1
_VALUES, _IDS, _REST, _HIDDEN = "log_probabilities", "ids", "rest", "hidden.{layer}"
_READ_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """What of the teacher is kept.

    Attributes:
        top: K, followers that are kept of each token.
        temperature: that its logits are divided by.
        layers: layers behind which hidden states are kept.
    """

    top: int = 64
    temperature: float = 1.0
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.top < 1:
            raise OptionError(f"--top: {self.top} is not at least 1")
        if not 0.0 < self.temperature <= 100.0:
            raise OptionError(f"--temperature: {self.temperature} is not above 0 and up to 100")

    def window_bytes(self, window: int, hidden: int) -> int:
        """What one window holds while its shard is made: fp32 values, the file's tensors."""
        return (window - 1) * (self.top * (4 + 4 + 2) + 4) + len(self.layers) * window * hidden * 2

    def file_bytes(self, window: int, hidden: int) -> int:
        """What one window takes of the cache's files."""
        return (window - 1) * (self.top * (2 + 4) + 4) + len(self.layers) * window * hidden * 2


@dataclass(frozen=True)
class Targets:
    """What the teacher says of some windows.

    Attributes:
        values_BSK: log-probabilities of the K most likely followers, fp32 ``[B, S-1, K]``.
        ids_BSK: their numbers, int64.
        rest_BS: mass of all other tokens, fp32 ``[B, S-1]``.
        hidden: layer -> hidden states behind it, fp32 ``[B, S, H]``.
    """

    values_BSK: torch.Tensor
    ids_BSK: torch.Tensor
    rest_BS: torch.Tensor
    hidden: dict[int, torch.Tensor]


def identify(
    checkpoint: Checkpoint, windows_NS: torch.Tensor, settings: TeacherSettings, dtype: torch.dtype
) -> dict[str, Any]:
    """What a cache is of: SHA-256 of the weights' files and of the windows, and the settings."""
    return {
        "model": hash_weights(checkpoint),
        "windows": hashlib.sha256(windows_NS.contiguous().numpy().tobytes()).hexdigest(),
        "shape": list(windows_NS.shape),
        "top": settings.top,
        "temperature": settings.temperature,
        "layers": list(settings.layers),
        "dtype": str(dtype).removeprefix("torch."),
    }


def hash_weights(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's config and of its files' bytes, read in pieces."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for path in sorted({entry.file for entry in checkpoint.tensors.values()}):
        digest.update(path.name.encode())
        try:
            with path.open("rb", buffering=0) as file:
                while piece := file.read(_READ_BYTES):
                    digest.update(piece)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def cache_folder(root: Path, identity: dict[str, Any]) -> Path:
    """Where a cache lies among others: a folder named by what it is of."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return root / name


def build_teacher(
    folder: Path,
    engine: Engine,
    windows_NS: torch.Tensor,
    settings: TeacherSettings,
    identity: dict[str, Any],
) -> TeacherCache:
    """Write what of a cache is missing, and open it.

    Args:
        folder: of the cache; created if need be. Shards that are there already are kept.
        engine: the dense model's.
        windows_NS: int64 ``[N, S]``.
        settings: what is kept.
        identity: from :func:`identify`.

    Raises:
        OptionError: more followers than the vocabulary has, or a layer that is not there.
        StateError: the folder holds another cache.
        OutputError: the folder cannot be written or the disk is full.
    """
    spec = engine.spec
    if settings.top > spec.vocabulary:
        raise OptionError(
            f"--top: {settings.top} is more than the vocabulary's {spec.vocabulary} tokens"
        )
    for layer in settings.layers:
        if not 0 <= layer < spec.layers:
            raise OptionError(f"--hidden-layers: {layer} is outside 0..{spec.layers - 1}")
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shards = _shards_of(folder, identity) if (folder / CACHE_FILE).exists() else []
    done = sum(shard["windows"] for shard in shards)
    step = shard_windows(settings, windows_NS.shape[1], spec.hidden, engine.sweep.limits)
    if done < len(windows_NS):
        with engine.native() as stream:
            for start in range(done, len(windows_NS), step):
                part_NS = windows_NS[start : start + step]
                tensors = _ask(engine, stream, part_NS, settings)
                name = f"windows_{start:06d}.safetensors"
                write_tensors(folder / name, tensors)
                shards.append({"file": name, "windows": len(part_NS)})
                write_json(
                    folder / CACHE_FILE,
                    {"version": VERSION, "identity": identity, "shards": shards},
                )
                del tensors
    return TeacherCache(folder, identity)


def shard_windows(settings: TeacherSettings, window: int, hidden: int, limits: Any) -> int:
    """Windows of one shard: as many as the plan lets in flight, at most 64 MiB of them."""
    most = max(1, SHARD_BYTES // settings.window_bytes(window, hidden))
    return int(min(limits.windows_in_flight, most))


def _ask(
    engine: Engine, stream: Any, windows_NS: torch.Tensor, settings: TeacherSettings
) -> dict[str, torch.Tensor]:
    """One sweep over some windows; the shard's tensors on the CPU."""
    tensors: dict[str, torch.Tensor] = {}

    def keep(layer: int, hidden: HiddenStates) -> None:
        if layer in settings.layers:
            whole_NSH = torch.empty(
                *windows_NS.shape, engine.spec.hidden, dtype=torch.float16, device="cpu"
            )
            for at in range(len(windows_NS)):
                whole_NSH[at] = hidden.read(slice(at, at + 1))[0]
            if not bool(whole_NSH.isfinite().all()):
                raise OptionError(
                    f"--hidden-layers: the teacher's hidden states behind layer {layer} are beyond "
                    f"what fp16 holds (65,504); leave that layer out"
                )
            tensors[_HIDDEN.format(layer=layer)] = whole_NSH

    hidden = engine.sweep.run(stream, windows_NS, name="asking the teacher", after_layer=keep)
    with torch.inference_mode():
        values_NSK, ids_NSK = engine.head.top(hidden, settings.top, settings.temperature)
        rest_NS = (1.0 - values_NSK.exp().sum(-1, dtype=sum_dtype(values_NSK.device))).clamp_(
            0.0, 1.0
        )
        if not bool(values_NSK[..., 0].isfinite().all()):
            raise CheckpointError(
                f"{engine.checkpoint.folder}: the teacher's probabilities are no numbers in "
                f"{engine.dtype}; is this the model that was pruned?"
            )
        tensors |= {
            _VALUES: values_NSK.half().cpu(),
            _IDS: ids_NSK.cpu(),
            _REST: rest_NS.float().cpu(),
        }
    return tensors


def _shards_of(folder: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards of a cache that is this one.

    Raises:
        StateError: damaged, of another version, or of other weights, windows or settings.
    """
    path = folder / CACHE_FILE
    advice = f"delete {folder}, or name another folder"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        version, found, shards = saved["version"], saved["identity"], list(saved["shards"])
        whole = all(isinstance(s["file"], str) and isinstance(s["windows"], int) for s in shards)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StateError(f"{path}: is no teacher's cache ({error}); {advice}") from error
    if version != VERSION or not whole:
        raise StateError(f"{path}: version {version!r}, expected {VERSION}; {advice}")
    differ = [key for key in identity if found.get(key) != identity[key]]
    if differ:
        raise StateError(
            f"{path}: is of another teacher, text or setting (differs in {', '.join(differ)}); "
            f"{advice}"
        )
    return shards


class TeacherCache:
    """A whole cache, open for reading.

    Args:
        folder: where it lies.
        identity: what it must be of.

    Raises:
        StateError: it is another's.
        CheckpointError: a shard is missing or damaged.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.layers: tuple[int, ...] = tuple(identity["layers"])
        self._shards: list[Checkpoint] = []
        self._places: list[tuple[int, int]] = []
        for at, shard in enumerate(_shards_of(folder, identity)):
            self._shards.append(open_tensors(folder / shard["file"]))
            self._places += [(at, row) for row in range(shard["windows"])]

    @property
    def windows(self) -> int:
        """N."""
        return len(self._places)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.weight_bytes for shard in self._shards)

    def read(self, windows: Sequence[int]) -> Targets:
        """What the teacher says of these windows, by their numbers."""
        return Targets(
            values_BSK=self._rows(_VALUES, windows).float(),
            ids_BSK=self._rows(_IDS, windows).long(),
            rest_BS=self._rows(_REST, windows),
            hidden={
                layer: self._rows(_HIDDEN.format(layer=layer), windows).float()
                for layer in self.layers
            },
        )

    def rest_mass(self) -> float:
        """Mean mass outside the kept followers."""
        sums = [float(shard.read(_REST).double().sum()) for shard in self._shards]
        tokens = sum(
            shard.tensors[_REST].shape[0] * shard.tensors[_REST].shape[1] for shard in self._shards
        )
        return sum(sums) / tokens

    def _rows(self, name: str, windows: Sequence[int]) -> torch.Tensor:
        rows = []
        for window in windows:
            shard, row = self._places[window]
            rows.append(self._shards[shard].read_rows(name, row, row + 1))
        return torch.cat(rows)

    def close(self) -> None:
        """Close the shards' files."""
        for shard in self._shards:
            shard.close()

    def remove(self) -> None:
        """Close and delete it."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
