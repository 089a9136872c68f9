"""A GGUF file, or the parts of a split one, as a :class:`Checkpoint`.

In: the config and the views that :mod:`frugal_bonsai.from_gguf` derives from the header. Out: the
tensors under Hugging Face's names, in one floating dtype; they are dequantised whenever they are
read, so nothing is converted beforehand and no disk space is needed. The tokenizer and the other
small files are written into a temporary folder when they are first asked for. Holds the header and
what :class:`GgufFile` holds.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.files import ReadFile
from frugal_bonsai.checkpoint.gguf_file import GgufFile, GgufView
from frugal_bonsai.checkpoint.gguf_header import GgufHeader
from frugal_bonsai.checkpoint.reader import Checkpoint

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufCheckpoint(Checkpoint):
    """The config and the tensors of a GGUF file, read-only.

    Attributes:
        header: header of the (first) file.
        notes: what the user should know about the file.

    Args:
        header: see above.
        config: values of ``config.json``.
        views: the tensors, by ascending virtual offsets in each file.
        write_companions: writes the tokenizer and the other small files into a folder.
        notes: see above.
    """

    def __init__(
        self,
        header: GgufHeader,
        config: dict[str, Any],
        views: Sequence[GgufView],
        write_companions: Callable[[Path], None],
        notes: Sequence[str] = (),
    ) -> None:
        self.header, self.notes = header, tuple(notes)
        self._views, self._write_companions = views, write_companions
        self._companions: tempfile.TemporaryDirectory[str] | None = None
        super().__init__(header.path, config, {view.entry.name: view.entry for view in views})

    @property
    def config_file(self) -> Path:
        """The GGUF file, whose metadata are the config."""
        return self.header.path

    @property
    def companions(self) -> Path:
        """A temporary folder with the tokenizer, the generation settings and a card.

        It is written at the first use and removed by :meth:`close`.

        Raises:
            UnsupportedModelError: transformers cannot build the tokenizer.
        """
        if self._companions is None:
            folder = tempfile.TemporaryDirectory(prefix="frugal-bonsai-gguf-")
            try:
                self._write_companions(Path(folder.name))
            except BaseException:
                folder.cleanup()
                raise
            self._companions = folder
        return Path(self._companions.name)

    def close(self) -> None:
        """Close the files, and remove the temporary folder."""
        super().close()
        if self._companions is not None:
            self._companions.cleanup()
            self._companions = None

    def _open_file(self, path: Path, *, drop_behind: bool) -> ReadFile:
        views = [view for view in self._views if view.entry.file == path]
        return GgufFile(path, views, drop_behind=drop_behind)


def part_files(path: Path) -> list[Path]:
    """Return all parts of a split GGUF file from the name of one; a whole file is its only part.

    The parts need not exist.
    """
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    if not 1 <= int(found["number"]) <= count:
        return [path]
    return [
        path.with_name(f"{found['stem']}-{number:05d}-of-{found['count']}.gguf")
        for number in range(1, count + 1)
    ]
