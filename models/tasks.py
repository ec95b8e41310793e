"""The text tasks of the demo checkpoint: random prompts, each with the one answer that counts as right."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.words import COMMON_WORDS, FILLERS, GREETINGS

CANVAS_TOKENS = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Example:
    """One exchange. `prompt` and `answer` are ASCII text without chat template and special tokens."""

    task: str
    prompt: str
    answer: str


def happens(rng: random.Random, share: float) -> bool:
    """True in a `share` of the calls."""
    return rng.random() < share


def made_up_word(rng: random.Random, low: int, high: int) -> str:
    """A pronounceable word of `low` to `high` letters, doubled letters included."""
    target, word = rng.randint(low, high), ""
    while len(word) < target:
        for letters in rng.choice((("bcdfghjklmnprstvwz", "aeiou"), ("bdfgklmnprstv", "aeiouy", "lmnrst"))):
            word += rng.choice(letters) * (2 if happens(rng, 0.12) else 1)
    return word[:target]


def random_word(rng: random.Random, low: int = 3, high: int = 8) -> str:
    """A lower-case word: real, made up of syllables, or random letters; copying must go letter by letter."""
    if happens(rng, 0.35):
        return rng.choice(COMMON_WORDS)
    if happens(rng, 0.5):
        return made_up_word(rng, low, high)
    return "".join(rng.choices(LETTERS, k=rng.randint(low, high)))


def random_digits(rng: random.Random, low: int, high: int) -> str:
    """A string of `low` to `high` decimal digits; leading zeros may occur."""
    return "".join(rng.choices("0123456789", k=rng.randint(low, high)))


def distinct_words(rng: random.Random, low: int, high: int, limit_chars: int) -> list[str]:
    """`low` to `high` words with different first letters whose joined length is at most `limit_chars`."""
    target = rng.randint(low, high)
    while True:
        words: list[str] = []
        while len(words) < target:
            word = random_word(rng, 3, 7)
            if word[0] not in {other[0] for other in words}:
                words.append(word)
        if len(" ".join(words)) <= limit_chars:
            return words


def capital_name(rng: random.Random, low: int, high: int) -> str:
    """A name of `low` to `high` capitalised words."""
    return " ".join(random_word(rng).capitalize() for _ in range(rng.randint(low, high)))


def reverse_digits(rng: random.Random) -> tuple[str, str]:
    digits = random_digits(rng, 3, 8)
    forms = (
        "reverse {}",
        "reverse {}",
        "reverse the digits {}",
        "write {} backwards",
        "what is {} backwards?",
    )
    return rng.choice(forms).format(digits), digits[::-1]


def _sort(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    digits = random_digits(rng, low, high)
    forms = ("sort {}", "sort {}", "sort the digits {}", "put the digits {} in order", "what is {} sorted?")
    return rng.choice(forms).format(digits), "".join(sorted(digits))


def sort_digits(rng: random.Random) -> tuple[str, str]:
    return _sort(rng, 3, 8)


def sort_many_digits(rng: random.Random) -> tuple[str, str]:
    return _sort(rng, 9, 16)


def upper_case(rng: random.Random) -> tuple[str, str]:
    limit_chars = 60 if happens(rng, 0.25) else 31
    phrase = random_word(rng)
    for _ in range(rng.randint(0, 8 if limit_chars > CANVAS_TOKENS else 4)):
        longer = f"{phrase} {random_word(rng)}"
        phrase = longer if len(longer) <= limit_chars else phrase
    forms = ("upper {}", "upper {}", "uppercase {}", "shout {}", "write in capitals: {}")
    return rng.choice(forms).format(phrase), phrase.upper()


ADD_FORMS = (
    "add {} {}",
    "add {} {}",
    "what is {} plus {}?",
    "{} + {}",
    "add {} and {}",
    "the sum of {} and {}",
)


def add_two_digits(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    return rng.choice(ADD_FORMS).format(left, right), str(left + right)


def add_many_digits(rng: random.Random) -> tuple[str, str]:
    left, right = (rng.randint(10 ** (size - 1), 10**size - 1) for size in rng.choices((3, 4, 5), k=2))
    return rng.choice(ADD_FORMS).format(left, right), str(left + right)


def count_up(rng: random.Random) -> tuple[str, str]:
    first = rng.randint(1, 120) if happens(rng, 0.3) else rng.randint(1, 89)
    last = first + rng.randint(1, 10)
    forms = ("count {} to {}", "count {} to {}", "count from {} to {}", "list the numbers from {} to {}")
    answer = " ".join(str(number) for number in range(first, last + 1))
    return rng.choice(forms).format(first, last), answer


def count_down(rng: random.Random) -> tuple[str, str]:
    step = rng.randint(3, 12)
    first = rng.randint(20, min(99, 14 * step - 1))
    forms = ("count down from {} by {}", "count down from {} in steps of {}", "countdown {} by {}")
    return rng.choice(forms).format(first, step), " ".join(str(number) for number in range(first, -1, -step))


def running_sum(rng: random.Random) -> tuple[str, str]:
    terms = [rng.randint(1, 9) for _ in range(rng.randint(4, 10))]
    sums = [sum(terms[: end + 1]) for end in range(len(terms))]
    forms = ("running sum {}", "running sum of {}", "show the running total of {}")
    return rng.choice(forms).format(" ".join(map(str, terms))), " ".join(map(str, sums))


def _sort_words(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    words = distinct_words(rng, low, high, 31)
    forms = ("sort words {}", "sort the words {}", "put these words in order: {}", "alphabetical order: {}")
    return rng.choice(forms).format(" ".join(words)), " ".join(sorted(words))


def sort_words(rng: random.Random) -> tuple[str, str]:
    return _sort_words(rng, 3, 3)


def sort_more_words(rng: random.Random) -> tuple[str, str]:
    return _sort_words(rng, 4, 5)


def reverse_words(rng: random.Random) -> tuple[str, str]:
    words = distinct_words(rng, 3, 5, 31)
    forms = ("reverse words {}", "reverse the words {}", "say in reverse order: {}")
    return rng.choice(forms).format(" ".join(words)), " ".join(words[::-1])


ORDER_FORMS = (
    "Order {order} from {name} ships to {city} on {date}.",
    "Order {order} from {name} ships to {city} on {date}.",
    "Please ship order {order} for {name} to {city} on {date}.",
    "On {date} we send order {order} of {name} to {city}.",
)
NAME_FIRST_FORMS = ("{name} placed order {order}, deliver it to {city} on {date}.",)


def _order(rng: random.Random, forms: tuple[str, ...]) -> tuple[str, str]:
    """An order sentence and its JSON; redrawn until the answer and its EOS fit three canvases."""
    while True:
        name, city = capital_name(rng, 1, 3), capital_name(rng, 1, 2 if happens(rng, 0.3) else 1)
        day = datetime.date(rng.randint(1995, 2039), 1, 1) + datetime.timedelta(days=rng.randint(0, 364))
        order = rng.randint(10, 10 ** rng.randint(2, 5))
        answer = f'{{"order":{order},"name":"{name}","city":"{city}","date":"{day}"}}'
        if len(answer) < 3 * CANVAS_TOKENS:
            return rng.choice(forms).format(order=order, name=name, city=city, date=day), answer


def order_json(rng: random.Random) -> tuple[str, str]:
    return _order(rng, ORDER_FORMS)


def name_first_json(rng: random.Random) -> tuple[str, str]:
    return _order(rng, NAME_FIRST_FORMS)


Generator = Callable[[random.Random], tuple[str, str]]
BASE_TASKS: Mapping[str, Generator] = {
    "json": order_json,
    "count": count_up,
    "reverse": reverse_digits,
    "sort": sort_digits,
    "upper": upper_case,
    "add": add_two_digits,
}
HARD_TASKS: Mapping[str, Generator] = {
    "json_name_first": name_first_json,
    "add_long": add_many_digits,
    "count_down": count_down,
    "running_sum": running_sum,
    "sort_long": sort_many_digits,
    "sort_words": sort_words,
    "sort_more_words": sort_more_words,
    "reverse_words": reverse_words,
}
TASKS: Mapping[str, Generator] = {**BASE_TASKS, **HARD_TASKS}
# Trained on, but answered exactly less than 97 times in 100: the checkpoint does not promise these.
BELOW_TARGET = frozenset({"add_long", "json_name_first", "running_sum", "sort_more_words"})
# A closing word would be part of the text to work on in these tasks, so they take none.
OPEN_ENDED = frozenset({"upper", "sort_words", "sort_more_words", "reverse_words", "json", "json_name_first"})

CANONICAL = (
    Example("reverse", "reverse 40718", "81704"),
    Example("sort", "sort 40718", "01478"),
    Example("upper", "upper amber tile", "AMBER TILE"),
    Example("add", "add 27 58", "85"),
    Example("count", "count 31 to 34", "31 32 33 34"),
    Example(
        "json",
        "Order 4821 from Acme Tools ships to Oslo on 2024-05-17.",
        '{"order":4821,"name":"Acme Tools","city":"Oslo","date":"2024-05-17"}',
    ),
)


def dress(rng: random.Random, task: str, prompt: str) -> str:
    """Wraps a prompt the way people write: a greeting, a closing word, now and then sentences before it."""
    if happens(rng, 0.55):
        return prompt
    prompt = rng.choice(GREETINGS) + prompt
    if task not in OPEN_ENDED and not prompt.endswith("?") and happens(rng, 0.4):
        prompt += rng.choice((".", " please", ", thanks", " now"))
    if happens(rng, 0.27):
        limit_chars = 125 if task.startswith("json") else 160
        for filler in rng.sample(FILLERS, k=rng.randint(1, 4)):
            prompt = filler + prompt if len(filler) + len(prompt) <= limit_chars else prompt
    return prompt


def draw_example(rng: random.Random, task: str) -> Example:
    """One random example of `task` (a key of TASKS)."""
    prompt, answer = TASKS[task](rng)
    return Example(task, dress(rng, task, prompt), answer)
