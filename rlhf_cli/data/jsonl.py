"""A user's own preferences: a JSON-lines file with `prompt`, `chosen` and `rejected`.

Each is a string or a list of chat messages {"role", "content"}. `chosen` and `rejected` as lists are either the
assistant's answer alone or the whole conversation; then `prompt` may be missing and is what both have before the
answer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.settings import JsonlSettings
from rlhf_cli.errors import RequestError
from rlhf_cli.types import Example, Message, Preference, Prompt

_ROLES = ("system", "user", "assistant", "tool")


def load_jsonl(settings: JsonlSettings) -> Dataset:
    """Reads the file and splits it by prompt, so that no prompt is on two sides.

    With a test file of its own, rows whose prompt is in it are left out of training and validation.

    Raises:
        RequestError: naming file, line and column of what cannot be used.
    """
    path = existing_file("data.path", settings.path)
    rows = list(read_preferences(path))
    if not rows:
        raise RequestError(f"data.path={path}: has no rows")
    if settings.test_path is None:
        train, validation, test = split_by_prompt(rows, settings.validation_fraction, settings.test_fraction)
    else:
        test_path = existing_file("data.test_path", settings.test_path)
        test = list(read_preferences(test_path))
        if not test:
            raise RequestError(f"data.test_path={test_path}: has no rows")
        tested = {row.prompt for row in test}
        rows = [row for row in rows if row.prompt not in tested]
        if not rows:
            raise RequestError(f"data.path={path}: every prompt is also in data.test_path={test_path}")
        train, validation, _ = split_by_prompt(rows, settings.validation_fraction, 0.0)
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if not part:
            raise RequestError(
                f"data.path={path}: {len(rows)} rows leave the {name} split empty; add rows or change the fractions"
            )
    return Dataset(
        name="jsonl",
        sft=[Example(row.prompt, row.chosen) for row in train],
        sft_validation=[Example(row.prompt, row.chosen) for row in validation],
        pairs=train,
        pairs_validation=validation,
        pairs_test={"test": test},
        prompts=_unique_prompts(train),
        prompts_validation=_unique_prompts(validation),
        prompts_test={"test": _unique_prompts(test)},
        max_prompt_tokens=settings.max_prompt_tokens,
        max_completion_tokens=settings.max_completion_tokens,
    )


def read_preferences(path: Path) -> Iterator[Preference]:
    """Preferences of a file, one per line; blank lines are passed over.

    Raises:
        RequestError: naming file, line and column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise RequestError(f"{path}, line {line_number}: not UTF-8 text (byte 0x{byte:02x})") from error
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from error
    # not str.splitlines(): U+2028 and the like may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _preference(path, number, line)


def split_by_prompt(
    rows: Sequence[Preference], validation_fraction: float, test_fraction: float
) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """Train, validation and test rows; which one is a function of the prompt's text alone."""
    train: list[Preference] = []
    validation: list[Preference] = []
    test: list[Preference] = []
    for row in rows:
        place = int.from_bytes(hashlib.sha256(repr(row.prompt).encode()).digest()[:8], "big") / 2**64
        if place < test_fraction:
            test.append(row)
        elif place < test_fraction + validation_fraction:
            validation.append(row)
        else:
            train.append(row)
    return train, validation, test


def _preference(path: Path, number: int, line: str) -> Preference:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}, character {error.colno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: a number is too long, or the nesting too deep, to be read") from error
    if not isinstance(row, dict):
        raise RequestError(f"{where}: expected an object with prompt, chosen and rejected")
    for column in ("chosen", "rejected"):
        if column not in row:
            raise RequestError(f"{where}: no column {column}; it has {', '.join(sorted(row)) or 'none'}")
    chosen_context, chosen = _completion(where, "chosen", row["chosen"])
    rejected_context, rejected = _completion(where, "rejected", row["rejected"])
    if "prompt" in row:
        prompt = _prompt(where, row["prompt"])
        context = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        for column, found in (("chosen", chosen_context), ("rejected", rejected_context)):
            if found and found != context:
                raise RequestError(f"{where}, column {column}: its first turns are not those of prompt")
    elif chosen_context and chosen_context == rejected_context:
        prompt = chosen_context
    else:
        raise RequestError(
            f"{where}: no column prompt; without it chosen and rejected are message lists with the same first turns"
        )
    return Preference(prompt, chosen, rejected, margin=_margin(where, row.get("margin", 0.0)))


def _margin(where: str, value: Any) -> float:
    """A finite number: json reads NaN and Infinity too, and one of them would make every weight NaN."""
    try:
        margin = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        margin = math.inf
    if not math.isfinite(margin):
        raise RequestError(f"{where}, column margin: expected a finite number")
    return margin


def _prompt(where: str, value: Any) -> Prompt:
    if isinstance(value, str):
        return _text(where, "prompt", value)
    turns = _messages(where, "prompt", value)
    if turns[-1].role == "assistant":
        raise RequestError(
            f"{where}, column prompt: ends with the assistant's turn, which belongs to chosen and rejected"
        )
    return turns


def _completion(where: str, column: str, value: Any) -> tuple[tuple[Message, ...], str]:
    """The turns before the answer (none for a string), and the answer."""
    if isinstance(value, str):
        answer = _text(where, column, value)
        context: tuple[Message, ...] = ()
    else:
        turns = _messages(where, column, value)
        if turns[-1].role != "assistant":
            raise RequestError(f"{where}, column {column}: the last message is not the assistant's")
        context, answer = turns[:-1], turns[-1].content
    if not answer.strip():
        raise RequestError(f"{where}, column {column}: empty")
    return context, answer


def _messages(where: str, column: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RequestError(f"{where}, column {column}: expected a string or a list of messages")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise RequestError(f'{where}, column {column}: a message is {{"role": ..., "content": text}}')
        if turn.get("role") not in _ROLES:
            raise RequestError(
                f"{where}, column {column}: role {turn.get('role')!r} is not one of {', '.join(_ROLES)}"
            )
        turns.append(Message(turn["role"], _text(where, column, turn["content"])))
    return tuple(turns)


def _text(where: str, column: str, text: str) -> str:
    r"""The text itself, where tokenizers can read it: JSON can spell half a character, as in "\ud83d"."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RequestError(f"{where}, column {column}: {half} is one half of a character") from error
    return text


def _unique_prompts(rows: Sequence[Preference]) -> list[Prompt]:
    return list(dict.fromkeys(row.prompt for row in rows))


def existing_file(key: str, path: str | None) -> Path:
    """The file that a config key names. Raises RequestError where there is none."""
    assert path is not None
    file = Path(path).expanduser()
    if file.is_dir():
        raise RequestError(f"{key}={path}: is a folder; expected a .jsonl file")
    if not file.is_file():
        raise RequestError(f"{key}={path}: no such file")
    return file
