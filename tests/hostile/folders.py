"""Checkpoint folders with one error each.

``FOLDERS`` maps a name to what fills the folder and the pieces that the error text must have.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hostile.files import file_bytes, tensor

INDEX = "model.safetensors.index.json"
Fill = Callable[[Path], None]


def files(contents: Mapping[str, Any], *, config: Any = "{}") -> Fill:
    """Fill a folder with texts, bytes, or JSON values."""

    def fill(folder: Path) -> None:
        for name, content in {"config.json": config, **contents}.items():
            if content is None:
                continue
            if not isinstance(content, str | bytes):
                content = json.dumps(content)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return fill


def shard(*names: str) -> bytes:
    """Return a valid file with some tensors of two numbers."""
    header = {name: tensor(8 * place, 8 * place + 8) for place, name in enumerate(names)}
    return file_bytes(header, bytes(8 * len(names)))


def index(weight_map: Any) -> dict[str, Any]:
    """Return an index."""
    return {"metadata": {"total_size": 0}, "weight_map": weight_map}


ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
GOOD_FOLDER = files({INDEX: index({"a": ONE, "b": TWO}), ONE: shard("a"), TWO: shard("b")})


def outside(name: str) -> tuple[Fill, list[str]]:
    """Return an index that names a file outside the folder."""
    return (
        files({INDEX: index({"a": name})}),
        [INDEX, "tensor 'a'", repr(name), "outside the folder", "refused"],
    )


FOLDERS: dict[str, tuple[Fill, list[str]]] = {
    "no config": (files({}, config=None), ["has no config.json", "architecture is unknown"]),
    "config not JSON": (files({}, config="{'a': 1}"), ["config.json: is not JSON ("]),
    "config not UTF-8": (files({}, config=b'{"\xff": 1}'), ["config.json: is not JSON ("]),
    "config a list": (files({}, config=[]), ["config.json: expected a JSON object, found list"]),
    "config nested": (files({}, config='{"a":' * 100_000), ["config.json: "]),
    "no weights": (files({}), ["has no weights, expected model.safetensors or", INDEX]),
    "pickled weights": (
        files({"pytorch_model.bin": b"PK", "x.pth": b"PK"}),
        [
            "only pickled weights (pytorch_model.bin, x.pth)",
            "AutoModelForCausalLM",
            "save_pretrained",
            "T.from_pretrained(a).save_pretrained(b)",
        ],
    ),
    "other names": (
        files({"weights.safetensors": shard("a")}),
        ["expected model.safetensors or", "found weights.safetensors; rename"],
    ),
    "index not JSON": (files({INDEX: "{"}), [f"{INDEX}: is not JSON ("]),
    "index without map": (files({INDEX: {}}), [f"{INDEX}: has no weight_map"]),
    "index with empty map": (files({INDEX: index({})}), [f"{INDEX}: has no weight_map"]),
    "index map a list": (files({INDEX: index(["a"])}), [f"{INDEX}: has no weight_map"]),
    "shard name no text": (
        files({INDEX: index({"a": 3})}),
        ["tensor 'a': expected the name of a shard, found 3"],
    ),
    "shard name empty": (files({INDEX: index({"a": ""})}), ["expected the name of a shard"]),
    "shard name with a zero": (
        files({INDEX: index({"a": "x\0y"})}),
        ["expected the name of a shard, found 'x\\x00y'"],
    ),
    "shard name no Unicode": (files({INDEX: index({"a": "\ud800"})}), ["half of a surrogate"]),
    "shard name too long": (files({INDEX: index({"a": "x" * 5000})}), ["shard is missing"]),
    "parent": outside("../model.safetensors"),
    "parent further in": outside("sub/../../model.safetensors"),
    "parent with backslashes": outside("..\\model.safetensors"),
    "absolute": outside("/etc/passwd"),
    "drive": outside("C:model.safetensors"),
    "share": outside("\\\\host\\share\\model.safetensors"),
    "shard missing": (
        files({INDEX: index({"a": ONE, "b": TWO, "c": TWO}), ONE: shard("a")}),
        [f"{TWO}: shard is missing ({INDEX} names it for 2 tensors)"],
    ),
    "shard a folder": (files({INDEX: index({"a": "."})}), ["shard is missing"]),
    "shard truncated": (
        files({INDEX: index({"a": ONE}), ONE: shard("a")[:-1]}),
        [ONE, "truncated: tensor 'a'"],
    ),
    "tensor not in its shard": (
        files({INDEX: index({"a": ONE, "b": ONE}), ONE: shard("a")}),
        [f"{ONE}: tensor 'b' is not in this file, though {INDEX} lists it there"],
    ),
    "tensor not in the index": (
        files({INDEX: index({"a": ONE}), ONE: shard("a", "b")}),
        [f"{ONE}: tensor 'b' is not in {INDEX}"],
    ),
    "tensor in two shards": (
        files({INDEX: index({"a": ONE, "b": TWO}), ONE: shard("a"), TWO: shard("b", "a")}),
        [f"{TWO}: tensor 'a' is also in {ONE} ({INDEX} says {ONE})"],
    ),
    "tensor in another shard": (
        files({INDEX: index({"c": ONE, "a": TWO}), ONE: shard("c", "a"), TWO: shard("a")}),
        [f"{ONE}: tensor 'a' is also in {TWO} ({INDEX} says {TWO})"],
    ),
}


def gguf_bytes(kind: str = "model", architecture: str = "llama") -> bytes:
    """Return a GGUF file without tensors."""
    keys = {"general.architecture": architecture, "general.type": kind}
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
    for key, value in keys.items():
        data += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 8)
        data += struct.pack("<Q", len(value)) + value.encode()
    return data
