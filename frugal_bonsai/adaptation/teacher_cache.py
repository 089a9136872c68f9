"""The teacher's answers on disk: which teacher and windows they belong to, and how they are read.

In: a folder that teacher.py has filled. Out: the answers for any of its windows, read with pread.
The folder's ``teacher.json`` names the weights, windows and settings that the answers belong to; a
cache of others is refused. Holds nothing but open files.

Shape suffixes: N windows, B windows of a micro-batch, S tokens, K kept tokens, H hidden channels.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.adaptation.objective import TopTokens
from frugal_bonsai.checkpoint.checksum import TRY_AGAIN, checksum
from frugal_bonsai.checkpoint.files import data_bytes
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import open_tensors
from frugal_bonsai.errors import WRONG_VALUES, CheckpointError, StateError
from frugal_bonsai.plain_json import read_json

CACHE_FILE, VERSION = "teacher.json", 1
# Tensors of a shard, each with a row a window.
VALUES, IDS, REST, HIDDEN = "log_probabilities", "ids", "rest", "hidden.{layer}"
CHECKS = "checks"
_SHARD_NAME = re.compile(r"\w+\.safetensors", re.ASCII)
_READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Targets:
    """The teacher's answers for some windows.

    Attributes:
        top: its distributions for tokens 2..S, with leading dimensions ``[B, S-1]``.
        hidden: layer -> hidden states behind this layer, fp32 ``[B, S, H]``.
    """

    top: TopTokens
    hidden: dict[int, torch.Tensor]

    def top_of(self, window: int, tokens: slice, device: torch.device) -> TopTokens:
        """Return the distributions for some tokens of one window on a device."""
        top = self.top
        return TopTokens(
            top.values_TK[window, tokens].to(device),
            top.ids_TK[window, tokens].to(device),
            top.rest_T[window, tokens].to(device),
        )


class TeacherCache:
    """A complete cache, open for reading.

    Args:
        folder: folder of the cache.
        identity: what the cache must belong to, as ``teacher.identify`` returns it.

    Raises:
        StateError: the cache belongs to another teacher, text or setting.
        CheckpointError: a shard is missing or damaged.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.layers: tuple[int, ...] = tuple(identity["layers"])
        self._shards: list[Checkpoint] = []
        self._places: list[tuple[int, int]] = []  # window -> (shard, row in it)
        self._checks: list[torch.Tensor | None] = []  # uint8 [n, 8], of a shard; older have none
        for at, shard in enumerate(read_shards(folder, identity)):
            self._shards.append(open_tensors(folder / shard["file"]))
            self._require_tensors(self._shards[at], folder / shard["file"], shard["windows"])
            self._places += [(at, row) for row in range(shard["windows"])]
            has = CHECKS in self._shards[at].tensors
            self._checks.append(self._shards[at].read(CHECKS) if has else None)

    def _require_tensors(self, shard: Checkpoint, path: Path, windows: int) -> None:
        """Check that a shard has all tensors, with a row a window."""
        for name in (VALUES, IDS, REST, *(HIDDEN.format(layer=layer) for layer in self.layers)):
            entry = shard.tensors.get(name)
            if entry is None or entry.shape[:1] != (windows,):
                found = "missing" if entry is None else f"of shape {list(entry.shape)}"
                raise CheckpointError(
                    f"{path}: tensor {name!r} is {found}, expected {windows} windows; delete "
                    f"{path.parent}, or name another --teacher-cache"
                )

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self._places)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.weight_bytes for shard in self._shards)

    def read(self, windows: Sequence[int]) -> Targets:
        """Read the answers for the windows with these numbers.

        Raises:
            CheckpointError: the disk fails, or the answers are not those that were written.
        """
        for window in windows:
            self._require_whole(window)
        return Targets(
            TopTokens(
                values_TK=self._rows(VALUES, windows).float(),
                ids_TK=self._rows(IDS, windows).long(),
                rest_T=self._rows(REST, windows),
            ),
            {
                layer: self._rows(HIDDEN.format(layer=layer), windows).float()
                for layer in self.layers
            },
        )

    def _require_whole(self, window: int) -> None:
        """Compare the answers for a window with their checksum."""
        at, row = self._places[window]
        shard, checks = self._shards[at], self._checks[at]
        if checks is None:
            return
        rows = {name: shard.read_rows(name, row, row + 1) for name in shard.tensors}
        del rows[CHECKS]
        if not torch.equal(window_checksums(rows)[0], checks[row]):
            raise CheckpointError(
                f"{shard.tensors[VALUES].file}: the answers for window {window} differ from their "
                f"checksum; {TRY_AGAIN}, and delete {self.folder}"
            )

    def rest_mass(self) -> float:
        """Return the mean probability mass outside the kept tokens."""
        sums = [float(shard.read(REST).double().sum()) for shard in self._shards]
        tokens = sum(math.prod(shard.tensors[REST].shape) for shard in self._shards)
        return sum(sums) / tokens

    def _rows(self, name: str, windows: Sequence[int]) -> torch.Tensor:
        places = [self._places[window] for window in windows]
        return torch.cat([self._shards[at].read_rows(name, row, row + 1) for at, row in places])

    def close(self) -> None:
        """Close the files of the shards."""
        for shard in self._shards:
            shard.close()


def window_checksums(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the checksum of each window's rows of all tensors, uint8 ``[n, 8]``."""
    names = sorted(tensors)
    found = [
        bytes.fromhex(checksum(b"".join(data_bytes(tensors[name][row]) for name in names)))
        for row in range(len(tensors[names[0]]))
    ]
    return torch.tensor([list(value) for value in found], dtype=torch.uint8).view(-1, 8)


def read_shards(folder: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the shards that a cache has so far: file name and number of windows of each.

    Raises:
        StateError: the cache is damaged, of another version, or of other weights, windows or
            settings.
    """
    path = folder / CACHE_FILE
    advice = f"delete {folder}, or name another --teacher-cache"
    try:
        saved = read_json(path)
        version, found, shards = saved["version"], dict(saved["identity"]), list(saved["shards"])
        named = [(str(shard["file"]), int(shard["windows"])) for shard in shards]
    except (OSError, *WRONG_VALUES) as error:
        raise StateError(f"{path}: is no teacher's cache ({error}); {advice}") from error
    if version != VERSION:
        raise StateError(f"{path}: version {version!r}, expected {VERSION}; {advice}")
    for name, windows in named:
        if not _SHARD_NAME.fullmatch(name) or windows < 1:
            raise StateError(f"{path}: has no such shard: {name!r}, {windows} windows; {advice}")
    differ = [key for key in identity if found.get(key) != identity[key]]
    if differ:
        raise StateError(
            f"{path}: was made with another teacher, text or setting (differs in "
            f"{', '.join(differ)}); {advice}"
        )
    return shards


def cache_folder(root: Path, identity: dict[str, Any]) -> Path:
    """Return the folder of a cache among others, named by a hash of its identity."""
    return root / hash_text(json.dumps(identity, sort_keys=True))[:16]


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_windows(windows_NS: torch.Tensor) -> str:
    """Return the SHA-256 of token windows."""
    return hashlib.sha256(windows_NS.contiguous().numpy().tobytes()).hexdigest()


def hash_weights(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of a checkpoint's config and of the bytes of its files.

    Raises:
        CheckpointError: a file cannot be read.
    """
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
