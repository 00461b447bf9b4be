"""Conversations as text, in the form of the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxsparse.errors import ProxsparseError

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for the template's


def is_conversation(document: Any) -> bool:
    """Whether a document is a list of messages, each a mapping."""
    return (
        isinstance(document, list | tuple)
        and len(document) > 0
        and all(isinstance(message, Mapping) for message in document)
    )


def render(messages: Any, tokenizer: Any, words: str) -> str:
    """Messages as the model has seen them: {"role", "content"}, or ShareGPT's {"from", "value"}.

    A BOS that the template begins with is left out, because blocks begin with it anyway.

    Args:
        messages: of one conversation.
        tokenizer: the model's, with a chat template.
        words: where the conversation is, for errors.

    Raises:
        ProxsparseError: no chat template, or one that refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ProxsparseError(
            f"{words} holds conversations, but the model's tokenizer has no chat template: give "
            "plain text, or a column of it with --text-column"
        )
    try:
        text = tokenizer.apply_chat_template([_message(m) for m in messages], tokenize=False)
    except Exception as error:  # a template is a program: it raises what it likes
        raise ProxsparseError(
            f"{words}: the chat template does not take this conversation "
            f"({type(error).__name__}: {error}); its messages need a role and content"
        ) from error
    bos = getattr(tokenizer, "bos_token", None)
    return str(text).removeprefix(bos) if bos else str(text)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if "from" in message and "value" in message:
        role = message["from"]
        return {"role": _ROLES.get(role, role), "content": message["value"]}
    return dict(message)
