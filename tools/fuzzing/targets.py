"""What reads models: safetensors, indexes, configs, tokenizers, GGUF files, folders.

In: samples, a mutator, an empty folder. Each target writes something hostile there and reads it as
the commands do. What it may raise is checked by the caller.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.recognise import recognise
from frugal_bonsai.checkpoint.tensor_file import open_tensors
from frugal_bonsai.rewrite.companions import companion_bytes, write_companions
from frugal_bonsai.run.inspect import inspect
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.plan import plan
from frugal_bonsai.text.chat import ChatTemplate
from frugal_bonsai.text.sources import load_text
from frugal_bonsai.text.windows import load_tokenizer, tokenise
from fuzzing.mutate import Mutator, gguf_fields, safetensors_bytes
from fuzzing.samples import Samples

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
LINKED, ADAPTER = "linked-from-a-model", "adapter_config.json"
SECRET = "text of a file that nobody may copy"
Run = Callable[[Samples, Mutator, Path], None]


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        run: writes and reads one case.
        share: number of its cases among 1,000.
    """

    run: Run
    share: int


def read_safetensors(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Read a file with a wrong header, or a damaged file."""
    data = (mutator.draws.choice(samples.models) / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind, path = mutator.draws.randrange(4), folder / WEIGHTS
    if kind == 0:
        path.write_bytes(mutator.data(data))
    elif kind == 1:
        path.write_bytes(safetensors_bytes(header, body, mutator.hostile_count()))
    else:
        path.write_bytes(safetensors_bytes(mutator.json(json.loads(header)), body))
    read_all(path)


def read_all(path: Path) -> None:
    """Read all tensors of a file."""
    with open_tensors(path) as file:
        for name, entry in file.tensors.items():
            file.announce(name)
            tensor = file.read(name)
            if tensor.dim() and entry.shape[0]:
                file.read_rows(name, 0, 1)


def read_index(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Read a folder whose index is wrong."""
    model = mutator.draws.choice(samples.models)
    with Checkpoint.open(model) as checkpoint:
        names = list(checkpoint.tensors)
    shutil.copy(model / CONFIG, folder / CONFIG)
    shard = "model-00001-of-00001.safetensors"
    shutil.copy(model / WEIGHTS, folder / shard)
    index = {"metadata": {"total_size": 8}, "weight_map": dict.fromkeys(names, shard)}
    (folder / INDEX).write_bytes(mutator.json(index))
    recognise(folder)
    with Checkpoint.open(folder) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


def copy_model(model: Path, folder: Path, *names: str) -> None:
    """Copy some files of a model; all by default. Weights are linked."""
    for path in model.iterdir():
        if not names or path.name in names:
            if path.name == WEIGHTS:
                (folder / path.name).hardlink_to(path)
            else:
                shutil.copy(path, folder / path.name)


def read_config(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Inspect a model whose config is wrong."""
    model = mutator.draws.choice(samples.models)
    copy_model(model, folder)
    config = json.loads((model / CONFIG).read_text())
    (folder / CONFIG).write_bytes(mutator.json(config, edits=2))
    inspect(str(folder))


def plan_config(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Plan a prune of a model whose config is wrong, with or without its weights."""
    model = mutator.draws.choice(samples.models)
    copy_model(model, folder, CONFIG, *mutator.draws.choice(((), (WEIGHTS,))))
    config = json.loads((model / CONFIG).read_text())
    (folder / CONFIG).write_bytes(mutator.json(config, edits=1))
    plan(str(folder), sparsity=0.3, max_cpu_mem="8GB", device="cpu", window=32, windows=8)


def read_tokenizer(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Load a tokenizer whose files are wrong, and use it."""
    model = mutator.draws.choice(samples.models)
    copy_model(model, folder, CONFIG, "tokenizer.json", "tokenizer_config.json")
    name = mutator.draws.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    values = json.loads((model / name).read_text())
    if name == "tokenizer_config.json":
        values["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / name).write_bytes(mutator.json(values))
    tokenizer = load_tokenizer(folder)
    tokenise("Some words, and more: 12 é.\n", tokenizer)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "Hello"}]
        ChatTemplate(tokenizer, "m").render(messages, "here")


def read_gguf(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Open a GGUF file with a wrong header; read its tensors and its tokenizer."""
    source = mutator.draws.choice(samples.gguf)
    data, path = source.read_bytes(), folder / "model.gguf"
    if mutator.draws.randrange(3):
        path.write_bytes(mutator.fields(gguf_fields(data)))
    else:
        path.write_bytes(mutator.data(data))
    recognise(path)
    with open_model(str(path), check_config=mutator.draws.random() < 0.2) as model:
        for name, entry in model.checkpoint.tensors.items():
            if entry.shape and entry.shape[0]:
                model.checkpoint.read_rows(name, 0, 1)
        if mutator.draws.random() < 0.3:
            load_tokenizer(model.folder)


def read_layout(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Recognise and inspect a folder whose files are missing, links, folders or huge."""
    model = folder / "models--a--b" / "snapshots" / "0123"
    model.mkdir(parents=True)
    copy_model(mutator.draws.choice(samples.models), model)
    outside = folder.parent / LINKED
    for _ in range(mutator.draws.randint(1, 3)):
        _disturb(model, mutator, outside)
    place = mutator.draws.choice((model, model, model.parents[1], folder))
    found = inspect(str(place))
    if found["kind"] == "model":
        companion_bytes(model)
        out = folder / "out"
        out.mkdir()
        write_companions(model, out)
        if any(SECRET in path.read_text(errors="replace") for path in out.rglob("*.*")):
            raise AssertionError("a file from outside of the model's folder was copied")


def _disturb(model: Path, mutator: Mutator, outside: Path) -> None:
    """Change one file of a folder."""
    draws = mutator.draws
    files = sorted(model.iterdir())
    path = draws.choice(files) if files else model / CONFIG
    names = (path.name, "special_tokens_map.json", "chat_template.jinja", ADAPTER, "x.gguf")
    kind, target = draws.randrange(9), model / draws.choice(names)
    _remove(target)
    if kind == 0:
        return
    if kind == 1:
        target.mkdir()
    elif kind == 2:
        target.symlink_to(outside / draws.choice(("secret.json", WEIGHTS)))
    elif kind == 3:
        target.symlink_to(draws.choice(("nowhere", target.name, "..", ".", "/dev/zero")))
    elif kind == 4:
        with target.open("wb") as file:
            file.truncate(2**40)
    elif kind == 5:
        os.mkfifo(target)
    elif kind == 6:
        target.write_bytes(draws.choice((b"", b"PK\x03\x04", b"GGUF", b"null", b"[]", b"\xff\xfe")))
    elif kind == 7:
        target.write_bytes(mutator.json({"base_model_name_or_path": "a", "peft_type": "LORA"}))
    else:
        linked = model / "linked"
        if not linked.exists():
            linked.symlink_to(outside)
        index = {"weight_map": {"model.norm.weight": f"linked/{WEIGHTS}"}}
        _remove(model / INDEX)
        (model / INDEX).write_text(json.dumps(index))
        _remove(model / WEIGHTS)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_text(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Read a text source."""
    lines: list[Any] = [{"text": "Some words."}, {"text": "more"}]
    lines.append({"messages": [{"role": "user", "content": "Hi"}]})
    name = mutator.draws.choice(("a.jsonl", "a.json", "a.txt"))
    data = b"\n".join(mutator.json(line) for line in lines)
    (folder / name).write_bytes(data)
    load_text(str(folder / name), characters=mutator.draws.choice((None, 0, 5, 10_000)))


MODEL_TARGETS = {
    "safetensors": Target(read_safetensors, 200),
    "index": Target(read_index, 100),
    "config": Target(read_config, 60),
    "plan": Target(plan_config, 20),
    "tokenizer": Target(read_tokenizer, 80),
    "gguf": Target(read_gguf, 100),
    "layout": Target(read_layout, 40),
    "text": Target(read_text, 50),
}
