"""Chats as text: through the model's own template, errors with file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.errors import CalibrationError
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.texts import read_windows
from frugal_bonsai.text.chat import ChatTemplate
from frugal_bonsai.text.sources import load_text

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
)
CHAT = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(find_model("example"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def template(model: Path) -> ChatTemplate:
    return ChatTemplate(AutoTokenizer.from_pretrained(model), "the model")


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def test_chats_are_rendered_and_follow_each_other_without_blank_lines(
    model: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": CHAT[:1]}, {"text": "x"})
    text = load_text(file, chat=template(model)).text
    chat = "<user>How?</user>\n<assistant>So.</assistant>\n"
    assert text == f"{chat}<user>How?</user>\n\n\nx"
    assert load_text(file, characters=10, chat=template(model)).text == chat[:10]


def test_windows_are_those_of_the_rendered_text(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *[{"messages": CHAT, "id": 1}] * 20)
    with open_model(str(model)) as opened:
        text = read_windows(opened, file, 32, windows=4, option="--data")
    tokenizer = AutoTokenizer.from_pretrained(model)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False) * 20
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"][:128]
    assert text.windows_nS.flatten().tolist() == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": "hello"}, "'messages' is no list of messages; write one object per line"),
        ({"messages": []}, "'messages' is no list of messages"),
        ({"messages": [*CHAT, {"from": "x"}]}, "message 3 has no 'role' and 'content' (found keys"),
        ({"messages": [{"role": "tool", "content": ""}]}, "unknown role tool); change or remove"),
        ({"chat": CHAT}, "or a chat under 'messages', found keys ['chat']"),
    ],
)
def test_errors_name_file_and_line(model: Path, tmp_path: Path, record: Any, expected: str) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": CHAT}, record)
    with pytest.raises(CalibrationError) as error:
        load_text(file, chat=template(model))
    assert str(error.value).startswith(f"{file}, line 2: ") and expected in str(error.value)


def test_a_model_without_a_template(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "x"}, {"messages": CHAT})
    with open_model("example") as opened, pytest.raises(CalibrationError) as error:
        read_windows(opened, file, 32, windows=4, option="--data")
    assert str(error.value).startswith(f"{file}, line 2: has 'messages', but example has no chat")
    with pytest.raises(CalibrationError, match="this runtime has no chat template"):
        load_text(file)


def test_commands_calibrate_and_train_with_chats(model: Path, tmp_path: Path) -> None:
    import frugal_bonsai

    file = write(tmp_path / "chats.jsonl", *[{"messages": CHAT}] * 400)
    caps = {"window": 64, "windows": 8, "max_cpu_mem": "8GB", "report": False}
    pruned, adapted = tmp_path / "pruned", tmp_path / "adapted"
    summary = frugal_bonsai.prune(
        str(model), pruned, sparsity=0.2, method="magnitude", calibration=file, **caps
    )
    assert summary["calibration"]["source"] == "file chats.jsonl"
    assert (pruned / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    trained = frugal_bonsai.adapt(
        str(pruned), adapted, teacher=str(model), data=file, tokens=2048, rank=8, **caps
    )
    before, after = trained["before"]["perplexity"], trained["after"]["perplexity"]
    assert after < 0.9 * before, "it learns the template's words"
