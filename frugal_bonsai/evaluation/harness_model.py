"""A language model of lm-evaluation-harness whose log-likelihoods another function computes.

In: the harness' requests, as text. Out: their log-likelihoods. Text is tokenised, truncated and
split as the harness' own model of transformers (``HFLM``) does. Generates no text. Imports the
harness. Holds the tokens of all requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from frugal_bonsai.errors import CheckpointError, OptionError
from frugal_bonsai.evaluation.requests import Request

Scorer = Callable[[Sequence[Request]], list[tuple[float, bool]]]


class StreamedModel(TemplateLM):  # type: ignore[misc]  # the harness has no types here
    """The harness' interface to a model.

    Args:
        tokenizer: Tokenizer of transformers.
        max_length: Largest number of tokens that the model reads at a time. Longer requests lose
            tokens on the left.
        score: Returns log-likelihood and greedy match of each request.
    """

    def __init__(self, tokenizer: Any, max_length: int, score: Scorer) -> None:
        super().__init__()
        self.tokenizer, self.max_length, self._score = tokenizer, max_length, score

    @property
    def eot_token_id(self) -> int | None:
        """Number of the token that ends a text; None if the tokenizer has none."""
        number: int | None = self.tokenizer.eos_token_id
        return number

    @property
    def prefix_token_id(self) -> int:
        """Number of the token that stands for an empty context.

        Raises:
            CheckpointError: The tokenizer has neither such a token nor one that ends a text.
        """
        number = self._prefix()
        if number is None:
            raise CheckpointError(
                "the tokenizer has neither a bos_token nor an eos_token, which stand for an empty "
                "context; name one in tokenizer_config.json"
            )
        return number

    def _prefix(self) -> int | None:
        number: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if number is None else number

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text.

        Args:
            string: The text.
            add_special_tokens: None leaves it to the tokenizer, and adds none to a text that begins
                with the first special token.
        """
        if add_special_tokens is None:
            prefix = self._prefix()
            begun = prefix is not None and string.startswith(self.tokenizer.decode(prefix))
            options = {"add_special_tokens": False} if begun else {}
        else:
            options = {"add_special_tokens": add_special_tokens}
        tokens: list[int] = self.tokenizer.encode(string, verbose=False, **options)
        return tokens

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood and greedy match of each (text, context, continuation)."""
        most = self.max_length
        for text, _context, continuation in requests:
            if not 1 <= len(continuation) <= most:
                raise OptionError(
                    f"tasks: a continuation has {len(continuation)} tokens, outside 1..{most} "
                    f"(the model's positions, or --window): {str(text)[-200:]!r}"
                )
        return self._score(
            [
                Request(
                    tokens=tuple([*context, *continuation][-(most + 1) :]), scored=len(continuation)
                )
                for _, context, continuation in requests
            ]
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text; long ones are read in windows, once per token."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((request.args[0], *make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (likelihood, _) in zip(
            owners, self._loglikelihood_tokens(windows), strict=True
        ):
            sums[number] += likelihood
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Refuse: the streamed model writes no answers."""
        raise OptionError(
            f"task {requests[0].task_name} lets the model write text (generate_until), which is "
            "not supported; take tasks that are scored by log-likelihoods, such as multiple choice"
        )
