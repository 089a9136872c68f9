"""Values that fuzzing found to end in a traceback, take memory without end, or leave the folder."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import (
    Tiny,
    open_tiny,
    random_mask,
    random_windows,
    save_pair_tokenizer,
    tiny_family,
    tiny_llama,
)

from frugal_bonsai.adaptation.teacher_cache import read_shards
from frugal_bonsai.bonsai.round_log import RoundLog
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.bonsai.state import PruneState, StateFolder, saved_progress
from frugal_bonsai.checkpoint.checksum import with_checksum
from frugal_bonsai.checkpoint.folder import read_config
from frugal_bonsai.checkpoint.gguf_header import read_gguf_header
from frugal_bonsai.checkpoint.gguf_reader import part_files
from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.checkpoint.recognise import recognise
from frugal_bonsai.checkpoint.tensor_file import write_tensors
from frugal_bonsai.errors import CheckpointError, OptionError, StateError
from frugal_bonsai.hardware.profile import find_profile, read_profile
from frugal_bonsai.model.cut import slices_by_tensor
from frugal_bonsai.rewrite.companions import companion_bytes, write_companions
from frugal_bonsai.run.events import read_events
from frugal_bonsai.run.from_config import open_config
from frugal_bonsai.run.inspect import inspect
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.provenance import read_provenance
from frugal_bonsai.run.report import report_page
from frugal_bonsai.run.resolve import _self_windows
from frugal_bonsai.run.runs import list_runs
from frugal_bonsai.text.sources import load_text
from frugal_bonsai.text.windows import load_tokenizer, tokenise

DEEP = '{"a":' + "[" * 100_000


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    model = tiny_llama(tmp_path / "m")
    save_pair_tokenizer(tmp_path / "m")
    return model


# -- nesting, huge files, half characters ---------------------------------------------------------
def _cache(folder: Path) -> None:
    read_shards(folder, {})


@pytest.mark.parametrize(
    ("name", "read", "error"),
    [
        ("config.json", read_config, CheckpointError),
        ("teacher.json", _cache, StateError),
        ("machine.toml", lambda folder: read_profile(folder / "machine.toml"), OptionError),
    ],
)
@pytest.mark.parametrize(
    ("text", "what"),
    [(DEEP, "nested too deeply"), (None, "more than the 268435456 that are read")],
)
def test_files_that_are_nested_or_huge(
    name: str,
    read: Callable[[Path], Any],
    error: type[Exception],
    text: str | None,
    what: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    path.write_text("x = " + "[" * 5000 if text and name.endswith("toml") else text or "")
    if text is None:
        os.truncate(path, 2**40)
    with pytest.raises(error, match=what) as refused:
        read(tmp_path)
    assert str(path) in str(refused.value)


def test_half_of_a_character_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_config(tmp_path) == {"a": "\N{GRINNING FACE}"}
    (tmp_path / "config.json").write_text('{"a": "\\ud83d"}')
    with pytest.raises(CheckpointError, match=r"config\.json: .*half of a surrogate pair"):
        read_config(tmp_path)


@pytest.mark.parametrize("line", [DEEP, '{"key": "a", "values": [1], "tokens": 1e999}', "[]"])
def test_lines_of_logs_that_nobody_wrote(line: str, tmp_path: Path) -> None:
    log, run = RoundLog(tmp_path / "round.jsonl"), tmp_path / "a.run"
    log.append("a", [1.0], 4)
    with (tmp_path / "round.jsonl").open("a") as file:
        file.write(line + "\n")
    assert RoundLog(tmp_path / "round.jsonl").find("a").values == [1.0]
    run.mkdir()
    (run / "state.json").touch()
    (run / "events.jsonl").write_text(f'{line}\n{{"event": "round", "number": 1}}\n')
    assert read_events(run) == []
    assert [found["out"] for found in list_runs(tmp_path)] == ["a"]
    (tmp_path / "a.jsonl").write_text(DEEP)
    with pytest.raises(Exception, match="line 1: is not JSON"):
        load_text(str(tmp_path / "a.jsonl"))


def test_events_have_the_types_that_runs_write(tmp_path: Path) -> None:
    good = [
        {"event": "start", "seconds": 0.0, "at": "2026-01-01T00:00:00Z"},
        {"event": "sweep", "seconds": 1, "name": "statistics", "steps": 2, "tokens": 3},
        {"event": "memory", "seconds": 2.5, "host_bytes": 5, "gpu_bytes": None},
        {"event": "of a later version", "seconds": 3.0},
    ]
    bad = [
        {"event": "memory", "seconds": 2.5, "host_bytes": "5", "gpu_bytes": None},
        *({**good[1], **change} for change in ({"name": 3}, {"seconds": -1}, {"seconds": "1"})),
        {**good[0], "at": 7},
        {"event": ["start"], "seconds": 0},
    ]
    lines = [json.dumps(event) for pair in zip(good, bad, strict=False) for event in pair]
    lines += [json.dumps(event) for event in bad[4:]]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    assert read_events(tmp_path) == good


# -- models ---------------------------------------------------------------------------------------
def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_architectures_that_are_no_list(tiny: Tiny) -> None:
    edit(tiny.folder / "config.json", architectures=7.5)
    assert recognise(tiny.folder).kind == "model"


@pytest.mark.parametrize("count", [10**12, -1, "1"])
def test_layers_behind_the_last_one(count: Any, tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "m", "deepseek-v3").folder
    edit(folder / "config.json", num_nextn_predict_layers=count)
    with (
        pytest.raises(CheckpointError, match=r"num_nextn_predict_layers is .* at most 100"),
        open_model(str(folder), check_config=False),
    ):
        pass


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("num_hidden_layers", 2**40, "num_hidden_layers is 1099511627776, more than the 10000"),
        ("hidden_size", -24, "transformers does not accept it"),
        ("num_key_value_heads", 0, "transformers does not accept it"),
        ("vocab_size", 2**62, "transformers does not accept it"),
    ],
)
def test_sizes_that_no_model_has(key: str, value: int, what: str, tiny: Tiny) -> None:
    edit(tiny.folder / "config.json", **{key: value})
    (tiny.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=what):
        open_config(tiny.folder)


def _gguf(*parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + b"".join(parts)


def test_a_gguf_text_of_any_length(tmp_path: Path) -> None:
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
    path = tmp_path / "a.gguf"
    path.write_bytes(_gguf(key, struct.pack("<IQQ", 8, 2, 2**64 - 9)))
    with pytest.raises(CheckpointError, match="truncated inside its header"):
        read_gguf_header(path)


@pytest.mark.parametrize("name", ["m-00000-of-00000.gguf", "m-00003-of-00002.gguf"])
def test_a_gguf_part_that_cannot_be(name: str, tmp_path: Path) -> None:
    assert part_files(tmp_path / name) == [tmp_path / name]
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="truncated"):
        recognise(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("tokenizer_config.json", "model_max_length", "many"),
        ("tokenizer.json", "model", {"type": "WordPiece", "vocab": {}, "unk_token": "?"}),
        ("tokenizer.json", "added_tokens", {"a": 1}),
    ],
)
def test_a_tokenizer_that_its_package_chokes_on(
    file: str, path: str, value: Any, tiny: Tiny
) -> None:
    edit(tiny.folder / file, **{path: value})
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read") as refused:
        tokenise("Some text", load_tokenizer(tiny.folder))
    assert str(tiny.folder) in str(refused.value)


# -- links ----------------------------------------------------------------------------------------
def test_what_is_copied_lies_in_the_models_folder(tiny: Tiny, tmp_path: Path) -> None:
    secret, linked = tmp_path / "secret.json", tiny.folder / "special_tokens_map.json"
    secret.write_text('{"token": "secret"}')
    linked.symlink_to(secret)
    (tmp_path / "out").mkdir()
    for call in (companion_bytes, lambda folder: write_companions(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: is a link to"):
            call(tiny.folder)
    assert list((tmp_path / "out").iterdir()) == []
    linked.unlink()
    linked.symlink_to("tokenizer_config.json")  # inside
    assert "special_tokens_map.json" in write_companions(tiny.folder, tmp_path / "out")
    linked.unlink()
    with linked.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=r"more than any file of a tokenizer has"):
        companion_bytes(tiny.folder)


def test_links_of_the_hubs_cache_are_followed(tiny: Tiny, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(tiny.folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "out").mkdir()
    assert inspect(str(snapshot))["kind"] == "model"
    assert "tokenizer.json" in write_companions(snapshot, tmp_path / "out")


# -- files of this program ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("identity", "x", "identity is str"),
        ("rounds", {"0": 1}, "rounds is dict"),
        ("rounds", [1], "a round's report is no object"),
        ("forward_tokens", True, "forward_tokens is bool"),
        ("removed", [], "removed is list"),
        ("removed", {"ffn": 3}, r"removed\['ffn'\] lists a number"),
    ],
)
def test_a_state_with_values_of_other_types(
    key: str, value: Any, what: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = StateFolder(tmp_path / "run", {"settings": {"seed": 0}})
    folder.save(PruneState(mask=random_mask(tiny.spec)))
    saved = json.loads((tmp_path / "run" / "state.json").read_text()) | {key: value}
    del saved["checksum"]
    (tmp_path / "run" / "state.json").write_text(json.dumps(with_checksum(saved)))
    with pytest.raises(StateError, match=rf"state\.json: is damaged .*{what}.*; delete"):
        folder.load(tiny.spec.table)
    assert saved_progress(tmp_path / "run")[1] == 0


def test_refits_of_another_shape(tiny: Tiny, tmp_path: Path) -> None:
    folder, mask = StateFolder(tmp_path, {}), random_mask(tiny.spec)
    name = next(iter(slices_by_tensor(tiny.spec.table)))
    (tmp_path / "round_001").mkdir()
    for layer in range(tiny.spec.layers):
        write_tensors(tmp_path / f"round_001/refit_{layer:05d}.safetensors", {})
    import torch

    write_tensors(tmp_path / "round_001/refit_00000.safetensors", {name: torch.zeros(3, 3)})
    with pytest.raises(StateError, match=r"refit_00000\.safetensors: tensor .* has shape \[3, 3\]"):
        folder.refits(1, tiny.spec, mask, mask)


@pytest.mark.parametrize(
    "shard",
    [
        {"file": "../windows_000000.safetensors", "windows": 2},
        {"file": "/etc/passwd", "windows": 2},
        {"file": "windows_000000.safetensors", "windows": -1},
        {"file": "windows_000000.safetensors"},
        7,
    ],
)
def test_a_cache_whose_shards_lie_elsewhere(shard: Any, tmp_path: Path) -> None:
    saved = {"version": 1, "identity": {}, "shards": [shard]}
    (tmp_path / "teacher.json").write_text(json.dumps(saved))
    with pytest.raises(StateError, match=r"teacher\.json: .*delete"):
        read_shards(tmp_path, {})


def test_reports_of_no_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(find_model("example"), out)
    report = {key: 3 for key in ("model", "before", "after", "kept", "dense", "rounds", "memory")}
    (out / "pruning_report.json").write_text(json.dumps({**report, "settings": []}))
    with pytest.raises(CheckpointError, match="a report there is damaged"):
        report_page(out, kind="md")
    assert list_runs(tmp_path)[0]["progress"] == "its report is damaged"
    with open_model(str(out), headers_only=True) as model:
        assert read_provenance(model)["steps"] == []
    provenance = {"dense": "a", "steps": [{"command": "prune", "model": 3}]}
    edit(out / "pruning_report.json", provenance=provenance)
    with open_model(str(out), headers_only=True) as model:
        assert read_provenance(model)["steps"] == []


def test_a_profile_with_a_list_as_its_device(tmp_path: Path) -> None:
    text = find_profile("rtx-12gb").read_text()
    (tmp_path / "a.toml").write_text(text.replace('device = "cuda"', "device = []"))
    with pytest.raises(OptionError, match=r"a\.toml: device is \[\]"):
        read_profile(tmp_path / "a.toml")


def test_a_saved_setting_of_another_type_is_not_taken() -> None:
    settings = PruneSettings(sparsity=0.3)
    for value, expected in ((4, 4), ("4", None), ([], None)):
        assert _self_windows(settings, "stdlib", {"self_windows": value}) == expected


def test_a_factor_beyond_any_float(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "m", "granite").folder
    edit(folder / "config.json", embedding_multiplier=10**400)
    tiny = open_tiny(folder)
    with (
        pytest.raises(CheckpointError, match="a number there is too large to compute with"),
        tiny.engine().native() as stream,
    ):
        tiny.engine().sweep.run(stream, random_windows(1, 4))
