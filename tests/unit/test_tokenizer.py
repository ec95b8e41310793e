"""A checkpoint's tokenizer and chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.core import Image, Turn
from cluster.errors import CheckpointError
from deployments.tokenizer import Tokenizer

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


def test_a_chat_is_rendered_with_the_checkpoints_template() -> None:
    tokens = Tokenizer(TINY).encode_messages([("user", "hi")])
    assert tokens == [2, 3, ord("h"), ord("i"), 4]


def test_text_comes_back_without_special_tokens() -> None:
    assert Tokenizer(TINY).decode([2, ord("o"), ord("k"), 1, 0, 0]) == "ok"


def test_images_are_rendered_where_the_template_puts_them(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for part in messages[0]['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    )
    chat: list[Turn] = [("user", ("a", Image(b"", "image/png"), "b"))]
    assert Tokenizer(folder).encode_messages(chat) == [ord("a"), 7, ord("b")]


def test_a_template_that_only_knows_texts_says_so() -> None:
    chat: list[Turn] = [("user", (Image(b"", "image/png"),))]
    with pytest.raises(ValueError, match="it takes only texts"):
        Tokenizer(TINY).encode_messages(chat)


def test_a_template_that_refuses_gives_its_own_reason(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    with pytest.raises(ValueError, match="no system turns"):
        Tokenizer(folder).encode_messages([("system", "x")])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "{", "cannot be read as a tokenizer"),
        ("tokenizer.json", "{}", "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("chat_template.jinja", None, "has no chat template"),
        ("chat_template.jinja", "{% for %}", "is not a valid template"),
    ],
)
def test_a_bad_file_is_one_clear_line(folder: Path, name: str, content: str | None, said: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        Tokenizer(folder)
    assert "\n" not in str(caught.value)
