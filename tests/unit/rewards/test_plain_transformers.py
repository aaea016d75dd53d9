"""What is saved is for everyone: plain transformers gives the same raw logits, in a process without our code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fixtures_rewards import GRADES, any_model, ensemble_of, save_all, with_lora

from rlhf_cli.rewards.ensemble import save_ensemble
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rewards.scoring import logits_of_rows
from rlhf_cli.runs.merged_reward import averaged

# One process for all models: most of its time goes into importing transformers.
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = {}
for folder, texts in json.load(sys.stdin).items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer.padding_side = "right"
    batch = tokenizer([text + (tokenizer.eos_token or "") for text in texts], padding=True, return_tensors="pt")
    assert batch["attention_mask"].min() == 0, "rows of unequal length"
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    config = model.config
    found[folder] = {"logits": logits.tolist(), "config": config.rlhf_reward, "labels": len(config.id2label)}
assert not [name for name in sys.modules if name.startswith(("rlhf_cli", "peft"))]
print(json.dumps(found))
"""

# whole prompts, so that one text has the ids of prompt and completion encoded apart
PROMPTS, COMPLETIONS = ["the film", "a", "the plot"], [" was good .", " warm , funny story !", " is bad"]
CAPS = {"max_prompt_tokens": 40, "max_completion_tokens": 24}

DECODERS = ("llama", "gpt2")
SINGLES = [
    *((kind, labels, peft) for kind in DECODERS for labels in (1, GRADES) for peft in ("none", "lora")),
    ("distilbert", 1, "none"),
    ("distilbert", GRADES, "none"),
]


def build(kind: str, labels: int, peft: str, folder: Path, seed: int = 0) -> RewardModel:
    """A saved one, whose scores are computed before it was merged with its adapter."""
    reward = any_model(kind, labels, seed, **CAPS)
    adapter = with_lora(reward, seed + 1) if peft == "lora" else None
    reward.save(folder, adapter)
    return reward


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, RewardModel]:
    """Every kind of single reward model, in its folder."""
    folder = tmp_path_factory.mktemp("plain")
    found = {}
    for kind, labels, peft in SINGLES:
        place = folder / f"{kind}-{labels}-{peft}"
        found[place] = build(kind, labels, peft, place)
    for labels in (1, GRADES):
        merged = averaged([any_model("llama", labels, seed, **CAPS) for seed in range(3)])
        merged.save(folder / f"warm-{labels}")
        found[folder / f"warm-{labels}"] = merged
    members = [any_model("llama", GRADES, seed, **CAPS) for seed in range(2)]
    save_ensemble(folder / "ensemble", save_all(members, folder), ensemble_of(members))
    for number, member in enumerate(members):
        found[folder / "ensemble" / f"member-{number}"] = member
    return found


def test_plain_transformers_gives_the_raw_logits_of_every_kind(models: dict[Path, RewardModel]):
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    decoders = {place: one for place, one in models.items() if not place.name.startswith("distilbert")}
    for reward in decoders.values():  # what is asked is the same for both
        rows = [reward.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        eos = reward.tokenizer.eos_token_id
        assert [[*a, *b] for a, b in rows] == [[*reward.tokenizer(text)["input_ids"], eos] for text in texts]
    result = subprocess.run(
        [sys.executable, "-c", PLAIN],
        input=json.dumps({str(place): texts for place in models}),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for place, reward in models.items():
        plain = found[str(place)]
        # [CLS] prompt [SEP] completion is no text: its own ids are scored by our code
        is_text = place in decoders
        ours = reward.score(PROMPTS, COMPLETIONS).logits if is_text else _scored_whole(reward, texts)
        assert ours is not None and ours.std(0).min() > 1e-3, f"{place.name}: the scores tell the rows apart"
        torch.testing.assert_close(
            torch.tensor(plain["logits"]),
            ours,
            atol=1e-5,
            rtol=0,
            msg=lambda text, name=place.name: f"{name}: {text}",
        )
        assert plain["labels"] == ours.shape[1]
        assert plain["config"] == json.loads(json.dumps(asdict(reward.format))), place.name


def _scored_whole(reward: RewardModel, texts: list[str]) -> torch.Tensor:
    """Logits by our code of the ids that the tokenizer gives for whole texts."""
    rows = [(list(reward.tokenizer(text)["input_ids"]), []) for text in texts]
    return logits_of_rows(reward.model, reward.tokenizer, rows, 128)


@pytest.mark.parametrize("labels", [1, GRADES])
@pytest.mark.parametrize("kind", DECODERS)
def test_an_adapter_is_in_the_weights(kind: str, labels: int, tmp_path: Path):
    """Else the comparison above would be one of two models without it."""
    with_it = build(kind, labels, "lora", tmp_path / "a").score(PROMPTS, COMPLETIONS).logits
    without = build(kind, labels, "none", tmp_path / "b").score(PROMPTS, COMPLETIONS).logits
    assert float((with_it - without).abs().max()) > 1e-2
