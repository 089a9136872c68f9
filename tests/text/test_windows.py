from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from frugal_bonsai.errors import CalibrationError, CheckpointError
from frugal_bonsai.text.windows import cut_windows, load_tokenizer, spread_windows, tokenise


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Save a tokenizer of whole words with a short window and a start token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "a": 1, "b": 2, "c": 3, "<unk>": 4}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", model_max_length=4
    ).save_pretrained(tmp_path)
    return tmp_path


class TestTokenise:
    def test_no_special_tokens(self, made: Path) -> None:
        tokenizer = load_tokenizer(made)
        assert tokenizer("a b")["input_ids"] == [0, 1, 2]  # it would add one

        tokens = tokenise("a b c x", tokenizer)

        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [1, 2, 3, 4]

    def test_long_texts_are_whole_and_give_no_warning(self, made: Path, caplog: Any) -> None:
        import transformers

        transformers.logging.enable_propagation()
        try:
            tokenizer = load_tokenizer(made)
            assert len(tokenise("a b c " * 1000, tokenizer)) == 3000
            assert "longer than" not in caplog.text
            tokenizer("a b c " * 1000)  # the warning that is avoided
            assert "longer than" in caplog.text
        finally:
            transformers.logging.disable_propagation()

    def test_empty(self, made: Path) -> None:
        assert tokenise("", load_tokenizer(made)).tolist() == []

    def test_real_tokenizer(self, shared: Path, stories3m: Path) -> None:
        text = (shared / "text" / "tinystories_test.txt").read_text(encoding="utf-8")[:20_000]
        tokenizer = load_tokenizer(stories3m)
        tokens = tokenise(text, tokenizer)
        assert tokens.max() < 4096
        assert tokenizer.decode(tokens) == text


class TestCutWindows:
    def test_without_overlap_from_the_start(self) -> None:
        windows = cut_windows(torch.arange(11), 3, what="x")
        assert windows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]

    def test_limit(self) -> None:
        assert cut_windows(torch.arange(11), 3, limit=2, what="x").shape == (2, 3)
        assert cut_windows(torch.arange(11), 3, limit=9, what="x").shape == (3, 3)

    def test_exactly_one(self) -> None:
        assert cut_windows(torch.arange(3), 3, what="x").tolist() == [[0, 1, 2]]

    @pytest.mark.parametrize("found", [0, 2])
    def test_shorter_than_one_window(self, found: int) -> None:
        with pytest.raises(CalibrationError) as caught:
            cut_windows(torch.arange(found), 3, what="file x.txt")
        assert f"file x.txt: {found} tokens, shorter than one window of 3" in str(caught.value)
        assert "a longer text or a --window of at most" in str(caught.value)

    @pytest.mark.parametrize(("window", "limit"), [(0, None), (3, 0)])
    def test_wrong_calls(self, window: int, limit: int | None) -> None:
        with pytest.raises(ValueError, match="must be positive"):
            cut_windows(torch.arange(5), window, limit=limit, what="x")


class TestLoadTokenizer:
    def test_none(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no tokenizer \(looked for tokenizer.json"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_no_json(self, made: Path, name: str) -> None:
        (made / name).write_text("{")
        with pytest.raises(CheckpointError, match=rf"{name}: is not JSON"):
            load_tokenizer(made)

    def test_json_of_something_else(self, made: Path) -> None:
        (made / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "X"}}')
        with pytest.raises(CheckpointError, match=r"its tokenizer cannot be read \("):
            load_tokenizer(made)

    def test_code_in_the_folder_is_not_run(self, made: Path) -> None:
        (made / "evil.py").write_text("raise SystemExit('ran')\nclass T: pass\n")
        config = '{"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", null]}}'
        (made / "tokenizer_config.json").write_text(config)
        try:
            load_tokenizer(made)
        except CheckpointError as error:
            assert "cannot be read" in str(error)  # refused: as good as read without the code

    def test_a_copy_needs_nothing_else(self, stories3m: Path, tmp_path: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(stories3m / name, tmp_path)
        assert len(tokenise("Once upon a time", load_tokenizer(tmp_path))) > 0


class TestSpreadWindows:
    def test_a_long_text_gives_pieces_at_equal_distances(self, made: Path) -> None:
        tokenizer = load_tokenizer(made)
        text = "".join(" ".join([letter] * 1000) + " " for letter in "abc")

        windows_nS = spread_windows(text, tokenizer, 4, limit=3, what="text")

        assert windows_nS.tolist() == [[1] * 4, [2] * 4, [3] * 4]

    def test_a_short_text_is_cut_and_thinned(self, made: Path) -> None:
        tokenizer = load_tokenizer(made)
        text = "a a b b c c x x"  # four windows of two tokens, 15 of 16 characters

        assert spread_windows(text, tokenizer, 2, limit=4, what="text").tolist() == [
            [1, 1],
            [2, 2],
            [3, 3],
            [4, 4],
        ]
        text = "aaaa aaaa bbbb bbbb a a b b c c"  # five windows, at most two: 31 of 32 characters
        assert spread_windows(text, tokenizer, 2, limit=2, what="text").tolist() == [
            [4, 4],
            [1, 1],
        ]

    def test_pieces_begin_with_a_whole_word(self, made: Path) -> None:
        tokenizer = load_tokenizer(made)
        text = "ab " * 100  # a piece from inside "ab" would begin with a or b

        windows_nS = spread_windows(text, tokenizer, 3, limit=7, what="text")

        assert windows_nS.shape == (7, 3) and (windows_nS == 4).all()

    def test_pieces_with_too_few_tokens_are_left_out(self, made: Path) -> None:
        tokenizer = load_tokenizer(made)
        text = " ".join(["a"] * 100) + " " * 300 + " ".join(["b"] * 100)

        windows_nS = spread_windows(text, tokenizer, 4, limit=9, what="text")

        assert {row[0] for row in windows_nS.tolist()} == {1, 2} and len(windows_nS) < 9

    def test_too_short(self, made: Path) -> None:
        tokenizer = load_tokenizer(made)
        for text in ("a b", "a b" + " " * 500):
            with pytest.raises(CalibrationError, match="shorter than one window of 4"):
                spread_windows(text, tokenizer, 4, limit=3, what="text")
