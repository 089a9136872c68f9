"""Conversations as text, through the chat template of the model.

In: the ``messages`` of a record of JSON lines, and a tokenizer of transformers. Out: the text that
the model would see, with the special tokens of its template. Holds one conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal_bonsai.errors import WRONG_VALUES, CalibrationError

MESSAGES = "messages"
_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'


class Chat(str):
    """A rendered conversation: it begins and ends as its template says, without blank lines."""


class ChatTemplate:
    """Renders conversations with the chat template of a model.

    Args:
        tokenizer: The model's tokenizer. None where there is none of transformers.
        model: Name of the model, for error texts.
    """

    def __init__(self, tokenizer: Any | None, model: str) -> None:
        self._tokenizer, self._model = tokenizer, model

    def render(self, messages: Any, where: str) -> Chat:
        """Return a conversation as text.

        Args:
            messages: List of objects with ``role`` and ``content``, the first message first.
            where: File and line, for error texts.

        Raises:
            CalibrationError: The model has no chat template, the messages are malformed, or the
                template refuses them.
        """
        _require_messages(messages, where)
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise CalibrationError(
                f"{where}: has '{MESSAGES}', but {self._model} has no chat template (a "
                "chat_template.jinja, or chat_template in tokenizer_config.json); take a model "
                "that was trained on chats, copy its template there, or write plain text under "
                "'text'"
            )
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, *WRONG_VALUES) as error:
            raise CalibrationError(
                f"{where}: the chat template of {self._model} refuses these messages "
                f"({type(error).__name__}: {str(error)[:200]}); change or remove the line"
            ) from error
        return Chat(text)


def document_text(record: Any, where: str, chat: ChatTemplate) -> str | None:
    """Return the text of a record, or its conversation as text; None if it has neither."""
    if not isinstance(record, Mapping):
        return None
    if isinstance(record.get("text"), str):
        return str(record["text"])
    return chat.render(record[MESSAGES], where) if MESSAGES in record else None


# Where text is read without transformers' tokenizer, such as for llama.cpp.
NO_TEMPLATE = ChatTemplate(None, "this runtime")


def _require_messages(messages: Any, where: str) -> None:
    """Raise unless messages are a list of roles and contents."""
    if not isinstance(messages, list) or not messages:
        raise CalibrationError(
            f"{where}: '{MESSAGES}' is no list of messages; write one object per line, such as "
            f"{_EXAMPLE}"
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = f"keys {sorted(message)}" if isinstance(message, dict) else repr(message)
            raise CalibrationError(
                f"{where}: message {number} has no 'role' and 'content' (found {found[:200]}); "
                f"write them such as {_EXAMPLE}"
            )
