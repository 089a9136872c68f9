"""A few hundred of the cases of tools/fuzz.py, and JSON of any shape in place of each file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frugal_bonsai.adaptation.teacher_cache import read_shards
from frugal_bonsai.bonsai.round_log import RoundLog
from frugal_bonsai.bonsai.state import StateFolder, saved_progress
from frugal_bonsai.checkpoint.folder import find_tensors
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.recognise import recognise
from frugal_bonsai.errors import FrugalBonsaiError
from frugal_bonsai.rewrite.mask_file import read_mask
from frugal_bonsai.run.events import read_events
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.runs import list_runs
from hostile.files import file_bytes

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import fuzz
from fuzzing.samples import Samples, make_samples
from fuzzing.watch import install
from fuzzing.worker import make_outside, run_case

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer is for Linux")
# Cases of these take long.
FEW = {"resume": 1, "plan": 4, "eval": 6, "config": 15, "layout": 15, "reports": 15}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    install()
    return make_samples(tmp_path_factory.mktemp("samples"), ("llama", "gpt2"))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_hostile_files_get_an_error_of_the_user(
    name: str, samples: Samples, tmp_path: Path
) -> None:
    make_outside(tmp_path, samples.models[0])
    for case in range(FEW.get(name, 25)):
        failed = run_case(fuzz.TARGETS[name].run, samples, tmp_path, f"suite/{name}/{case}")
        assert failed is None, f"case {case}: {failed[0]}\n{failed[1]}"


# -- any JSON -------------------------------------------------------------------------------------
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.sampled_from(
    (
        "version identity settings rounds removed prior refit forward_tokens format model name "
        "family geometry attention ffn weight_map a dtype shape data_offsets __metadata__ event "
        "seconds key values tokens shards file windows before after architectures model_type"
    ).split()
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=8),
    max_leaves=12,
)


def _read_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(file_bytes({}))
    recognise(folder)
    with open_model(str(folder), check_config=False):
        pass


def _read_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(text)
    find_tensors(folder)


def _read_header(folder: Path, text: str) -> None:
    (folder / "a.safetensors").write_bytes(file_bytes(text, bytes(16)))
    read_header(folder / "a.safetensors")


def _read_state(folder: Path, text: str) -> None:
    (folder / "state.json").write_text(text)
    saved_progress(folder)
    with open_model("example", headers_only=True) as model:
        StateFolder(folder, {"a": 1}).load(model.spec.table)


def _read_mask(folder: Path, text: str) -> None:
    (folder / "mask.json").write_text(text)
    with open_model("example", headers_only=True) as model:
        read_mask(folder / "mask.json", model.spec)


def _read_cache(folder: Path, text: str) -> None:
    (folder / "teacher.json").write_text(text)
    read_shards(folder, {"a": 1})


def _read_logs(folder: Path, text: str) -> None:
    (folder / "round.jsonl").write_text(text + "\n")
    RoundLog(folder / "round.jsonl").find("a")
    run = folder / "a.run"
    run.mkdir(exist_ok=True)
    (run / "state.json").touch()
    for name in ("events.jsonl", "pruning_report.json"):
        (run / name).write_text(text)
        (folder / name).write_text(text)
    read_events(run)
    list_runs(folder)


READERS: list[Callable[[Path, str], None]] = [
    *(_read_config, _read_index, _read_header, _read_state),
    *(_read_mask, _read_cache, _read_logs),
]


@pytest.mark.parametrize("read", READERS)
def test_any_json_is_read_or_refused(
    read: Callable[[Path, str], None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("json")

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(JSON)
    def check(value: Any) -> None:
        try:
            read(folder, json.dumps(value))
        except FrugalBonsaiError as error:
            assert str(folder) in str(error)

    check()
