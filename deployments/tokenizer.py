"""Text in and out of a checkpoint: its tokenizer and its chat template, without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from cluster.core import Content, Image, Turn
from cluster.errors import CheckpointError

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """Renders chats and turns text into token ids and back. Safe to share between threads once made."""

    def __init__(self, folder: Path) -> None:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja; CheckpointError if one is bad."""
        self._tokens = _load_tokens(folder / "tokenizer.json")
        settings = _load_settings(folder / "tokenizer_config.json")
        self._names = {name: _token_text(settings.get(name)) for name in SPECIAL_TOKENS}
        self._template = _load_template(folder, settings)

    def encode_messages(self, messages: Sequence[Turn]) -> list[int]:
        """Token ids of a chat of (role, content) pairs, ready for the model to answer.

        The template puts a token for each image; what the image takes beyond that is the engine's to put there. Raises
        ValueError with the template's own reason when it refuses the chat.
        """
        turns = [{"role": role, "content": _content(content)} for role, content in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._names)
        except TemplateError as error:
            raise ValueError(str(error)) from None
        except TypeError as error:
            # Templates that only know texts add them up.
            if all(isinstance(content, str) for _, content in messages):
                raise
            raise ValueError(f"it takes only texts ({error})") from None
        return list(self._tokens.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; special tokens have none."""
        return str(self._tokens.decode(list(tokens), skip_special_tokens=True))


def _content(content: Content) -> str | list[dict[str, str]]:
    """In the form that chat templates of models with vision expect."""
    if isinstance(content, str):
        return content
    return [{"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part} for part in content]


def _load_tokens(path: Path) -> FastTokenizer:
    try:
        return FastTokenizer.from_str(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint needs its tokenizer") from None
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a bad file
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from None


def _load_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return settings if isinstance(settings, dict) else {}


def _load_template(folder: Path, settings: dict[str, Any]) -> Any:  # noqa: ANN401 - jinja2 templates are untyped
    path = folder / "chat_template.jinja"
    source = path.read_text() if path.exists() else settings.get("chat_template")
    if not isinstance(source, str):
        raise CheckpointError(f"{folder} has no chat template: expected chat_template.jinja")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise CheckpointError(f"{path} is not a valid template: {error}") from None


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _token_text(value: object) -> str:
    if isinstance(value, dict):
        return str(value.get("content", ""))
    return value if isinstance(value, str) else ""
