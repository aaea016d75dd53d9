"""The model card: README.md of a saved model, with the metadata block that the Hugging Face hub reads.

A pure function from what is known of a run to text. Names, paths and settings are a user's text: they stand in code
spans, which nothing inside can end, and the metadata goes through a YAML writer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlhf_cli.files import write_bytes_atomic
from rlhf_cli.models.settings import INDEX_FILE

CARD_FILE = "README.md"

_STAGES = {"train-sft": "sft", "train-rm": "reward-model", "train-policy": "policy"}
_INTRODUCTIONS = {
    "sft": "A language model after supervised fine-tuning.",
    "policy": "A language model trained from preferences: against a reward model, or on pairs.",
}
_TASKS = {"sft": "text-generation", "reward-model": "text-classification", "policy": "text-generation"}

# Bidirectional and other invisible characters could show a reader another text than the one that is there.
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")


@dataclass(frozen=True)
class Card:
    """What a model's card says."""

    command: str  # train-sft | train-rm | train-policy
    name: str  # the run's
    data: str  # name of the data
    base_model: str | None = None  # folder or hub id that the training started from; None = built from sizes
    base_hub_id: str | None = None  # the same where it is one of the hub, see `hub_id`
    data_hub_id: str | None = None  # of the data, where it comes from the hub
    license: str = (
        "unknown"  # one of the hub's identifiers; "unknown" leaves it to the base model's and the data's
    )
    settings: Mapping[str, object] = field(default_factory=dict)  # the config, flat: dotted key -> value
    metrics: Mapping[str, float] = field(default_factory=dict)  # final figures
    upstream: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # stage -> path and digest

    @property
    def stage(self) -> str:
        """sft, reward-model or policy."""
        return _STAGES[self.command]


def config_digest(settings: Mapping[str, object]) -> str:
    """Twelve hex digits that change exactly when a setting does.

    >>> config_digest({"seed": 0}) == config_digest({"seed": 0}) != config_digest({"seed": 1})
    True
    """
    text = json.dumps(dict(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _introduction(card: Card) -> str:
    if card.stage == "reward-model":
        return _of_reward_model(card.settings)
    if card.stage == "policy" and card.upstream and "rm" not in card.upstream:
        if card.settings.get("reward.rm") == 0:
            return "A language model trained from the reward terms below, without a reward model."
        return "A language model trained on preference pairs, without a reward model."
    return _INTRODUCTIONS[card.stage]


def _less(settings: Mapping[str, object]) -> str:
    penalty = settings.get("rm.disagreement_penalty")
    return f", less {penalty} times their disagreement" if penalty else ""


def _of_reward_model(settings: Mapping[str, object]) -> str:
    name = settings.get("rm.name")
    begins = {
        "warm": "A reward model whose weights are the mean of several models' weights (WARM): a",
        "ensemble": f"Several reward models, in folders that {INDEX_FILE} names; their reward is that of their mean "
        f"prediction{_less(settings)}. Each is a",
    }.get(str(name), "A reward model: a")
    labels = "one label, whose logit is the score of prompt and completion together"
    if "distributional" in (name, settings.get("rm.kind")):
        grades = settings.get("rm.num_grades")
        labels = f"{grades} labels, the ordered grades that prompt and completion together may have"
    where = INDEX_FILE if name == "ensemble" else "config.json"
    return (
        f"{begins} sequence classifier with {labels}. How text is read, and how logits become a reward (read-out, "
        f"temperature, scale), is in {where} under `rlhf_reward`."
    )


def card_text(card: Card) -> str:
    """The card as Markdown after a YAML block."""
    parts = [
        f"# {_code(card.name)}",
        _introduction(card),
        _list(_facts(card)),
        "## Final figures" if card.metrics else "",
        _table("metric", "value", ((key, _number(value)) for key, value in sorted(card.metrics.items()))),
        "## Built on" if card.upstream else "",
        _table(
            "stage",
            "model, digest",
            ((stage, f"{one['path']} ({one['digest'][:12]})") for stage, one in card.upstream.items()),
        ),
        "## Settings" if card.settings else "",
        _table("key", "value", ((key, card.settings[key]) for key in sorted(card.settings))),
        "## Use",
        _use(card.stage, "member-0" if card.settings.get("rm.name") == "ensemble" else "."),
    ]
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{_metadata(card).to_yaml()}\n---\n\n{body}\n"


def write_card(folder: Path, card: Card) -> None:
    """Writes the card into a model's folder. Raises OSError as the file system gives it."""
    write_bytes_atomic(folder / CARD_FILE, card_text(card).encode("utf-8"))


def hub_id(path: str | None) -> str | None:
    """The path where it is a hub id, and neither a folder here nor anything else; None otherwise.

    The hub refuses a card whose base model or data set is not one of its own.
    """
    if path is None or Path(path).expanduser().exists() or path.startswith("outputs/"):
        return None
    return path if _has_form_of_hub_id(path) else None


def _has_form_of_hub_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _metadata(card: Card) -> ModelCardData:
    base, data = (
        one if one is not None and _has_form_of_hub_id(one) else None
        for one in (card.base_hub_id, card.data_hub_id)
    )
    task = _TASKS[card.stage]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data or _word(card.data),
            dataset_name=_visible(card.data) or "none",
            metric_type=_word(key),
            metric_name=_visible(key) or "none",
            metric_value=float(value),
        )
        for key, value in sorted(card.metrics.items())
        if math.isfinite(value)
    ]
    return ModelCardData(
        license=_word(card.license).lower(),
        library_name="transformers",
        pipeline_tag=task,
        base_model=base,
        datasets=[data] if data else None,
        tags=["rlhf", card.stage],
        model_name=(_visible(card.name) or "model") if results else None,
        eval_results=results or None,
    )


def _facts(card: Card) -> list[str]:
    start = "built from its sizes" if card.base_model is None else _code(card.base_model)
    facts = [f"Base model: {start}", f"Data: {_code(card.data)}"]
    if card.license == "unknown":
        facts.append("Licence: not stated; those of the base model and of the data apply")
    else:
        facts.append(f"Licence: {_code(card.license)}")
    if card.settings:
        facts.append(f"Config digest: `{config_digest(card.settings)}`")
    return facts


def _use(stage: str, folder: str) -> str:
    auto = "AutoModelForSequenceClassification" if stage == "reward-model" else "AutoModelForCausalLM"
    return "\n".join(
        [
            "```python",
            f"from transformers import AutoTokenizer, {auto}",
            "",
            f'folder = "{folder}"  # from the folder of this card',
            f"model, tokenizer = {auto}.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)",
            "```",
        ]
    )


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(left: str, right: str, rows: Iterable[tuple[object, object]]) -> str:
    lines = [f"| {_cell(a)} | {_cell(b)} |" for a, b in rows]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines]) if lines else ""


def _cell(value: object) -> str:
    # A table ends its cells before it looks for code, unless the pipe is escaped and the backslash is not.
    return _code(value).replace("\\|", "\\ |").replace("|", r"\|")


def _code(value: object) -> str:
    """A code span of one line: Markdown and HTML in it are only text."""
    text = _visible(value)
    if not text:
        return "(empty)"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}"


def _visible(value: object) -> str:
    """One line of characters that show."""
    return " ".join(_INVISIBLE.sub(" ", "null" if value is None else str(value)).split())


def _word(text: str) -> str:
    """As the hub wants the type of a metric or data set: a word."""
    return re.sub(r"[^A-Za-z0-9._/-]+", "-", text).strip("-./") or "none"


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
