"""The ready experiments run, with the model replaced by a small random one of the same architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from rlhf_cli.commands.launch import launch
from tests.e2e.fixtures_e2e import content, rows
from tests.unit.fixtures_models import bert_tokenizer, byte_bpe

WORDS = [
    f"{adjective} {noun}"
    for adjective in ("good", "bad", "slow", "warm")
    for noun in ("film", "plot", "cast", "end")
]
TEXTS = [f"the {a} and the {b} ." for a in WORDS for b in WORDS]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def bpe(template: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2, SmolLM2 and Pythia have it: bytes, one special token for everything."""
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_bpe([end]), bos_token=end, eos_token=end, unk_token=end)
    fast.chat_template = template
    return fast


CONFIGS: dict[str, Any] = {
    "gpt2": lambda n: GPT2Config(vocab_size=n, n_positions=1024, n_embd=16, n_layer=2, n_head=2),
    "llama": lambda n: LlamaConfig(
        vocab_size=n,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "gpt-neox": lambda n: GPTNeoXConfig(
        vocab_size=n,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    ),
    "distilbert": lambda n: DistilBertConfig(
        vocab_size=n, dim=16, hidden_dim=32, n_layers=2, n_heads=2, num_labels=1
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each architecture."""
    found = {}
    for name, make in CONFIGS.items():
        folder = found[name] = tmp_path_factory.mktemp(name)
        tokenizer = bert_tokenizer() if name == "distilbert" else bpe(CHAT if name == "llama" else None)
        config: PretrainedConfig = make(len(tokenizer))
        if name != "distilbert":
            config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        torch.manual_seed(0)
        auto = AutoModelForSequenceClassification if name == "distilbert" else AutoModelForCausalLM
        auto.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return found


def hh() -> Iterator[dict[str, Any]]:
    for number, text in enumerate(TEXTS[:60]):
        start = f"\n\nHuman: what of number {number} ?\n\nAssistant:"
        yield {"chosen": f"{start} {text}", "rejected": f"{start} no ."}


def tldr() -> Iterator[dict[str, Any]]:
    for number, text in enumerate(TEXTS[:60]):
        info = {"post": f"post {number}: {text}", "title": f"title {number}", "subreddit": "films"}
        yield {"info": info, "summaries": [{"text": f" {text}"}, {"text": " no ."}], "choice": number % 2}


def imdb() -> Iterator[dict[str, Any]]:
    for number, text in enumerate(TEXTS):
        yield {"text": f"number {number} : {text} " * 3, "label": number % 2}


def helpsteer2() -> Iterator[dict[str, Any]]:
    for number, text in enumerate(TEXTS[:60]):
        for grade, response in ((4, text), (1, "no .")):
            rest = {"correctness": grade, "coherence": 3, "complexity": 1, "verbosity": 2}
            yield {"prompt": f"what of {number} ?", "response": response, "helpfulness": grade, **rest}


# experiment -> architecture, rows, what replaces the hub ids
PRESETS: dict[str, tuple[str, Any]] = {
    "rm_imdb": ("gpt2", imdb),
    "reinforce_imdb": ("gpt2", imdb),
    "reinforce_helpsteer2": ("llama", helpsteer2),
    "dpo_hh": ("gpt2", hh),
    "warp_imdb": ("gpt2", imdb),
    "warp_imdb_matched": ("gpt2", imdb),
    "rloo_hh": ("gpt-neox", hh),
    "rloo_tldr": ("gpt-neox", tldr),
}


def test_every_experiment_is_here():
    files = {file.stem for file in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml")}
    assert files - {"smoke"} == set(PRESETS)


@pytest.mark.parametrize("experiment", PRESETS)
def test_a_preset_runs(experiment: str, places: dict[str, Path], tmp_path: Path):
    architecture, make_rows = PRESETS[experiment]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    line = [
        f"experiment={experiment}",
        f"model.path={places[architecture]}",
        f"data.path={data}",
        f"data.cache_dir={tmp_path / 'rows'}",
        f"stages.cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'run'}",
        "device=cpu",
        "sft.train.steps=2",
        "rm.train.steps=2",
        "rm.standardize_samples=8",
        "rollout.max_new_tokens=8",
        "algo.eval_prompts=4",
        "algo.train.steps=3",
        "algo.train.batch_size=8",
    ]
    if experiment == "warp_imdb":
        line.append("algo.T=3")
    if "rloo" in experiment:
        line.append("algo.rollout_batch_size=16")
    if "imdb" in experiment:
        line += [f"rm.model.path={places['distilbert']}", f"sft.path={places['gpt2']}"]
        line += ["data.num_validation_pairs=8", "data.num_test_pairs=8"]
    command = "train-rm" if experiment.startswith("rm_") else "train-policy"
    assert launch(command, line) == 0
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    num_steps = {"rm_imdb": 2, "warp_imdb": 2 * 2 * 3}.get(experiment, 3)
    assert [row["step"] for row in metrics] == list(range(1, num_steps + 1))
    config = content(tmp_path / "run" / "model" / "config.json")
    kind = {"gpt2": "gpt2", "llama": "llama", "gpt-neox": "gpt_neox"}[architecture]
    assert config["model_type"] == ("distilbert" if command == "train-rm" else kind)
    summary = content(tmp_path / "run" / "summary.json")
    share = summary["parameters/trainable"] / summary["parameters/total"]
    has_adapter = command == "train-rm" or experiment == "dpo_hh"
    assert share < 0.9 if has_adapter else share == 1.0, "LoRA in the reward model, bottlenecks in DPO's policy"
