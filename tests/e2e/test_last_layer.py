"""Every stage with the last block and the head alone, on small models in folders of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.commands.launch import launch
from rlhf_cli.ops.merging import slerp_many
from tests.e2e.fixtures_e2e import content, crash, fail_at, figures, rows, weights
from tests.unit.fixtures_models import bert_tokenizer, byte_tokenizer, distilbert, gpt2_lm, seeded

TIED = "the last block alone is trained"
GPT2_BLOCK, LLAMA_BLOCK, BERT_BLOCK = "transformer.h.1.", "model.layers.1.", "distilbert.transformer.layer.1."


def llama() -> LlamaForCausalLM:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    return seeded(LlamaForCausalLM, config, 0)


@pytest.fixture(scope="module")
def folders(place: Path) -> dict[str, str]:
    for name, model in {"gpt2": gpt2_lm(byte_tokenizer()), "llama": llama()}.items():
        model.save_pretrained(place / name)
        byte_tokenizer().save_pretrained(place / name)
    distilbert(bert_tokenizer()).save_pretrained(place / "bert")
    bert_tokenizer().save_pretrained(place / "bert")
    return {name: str(place / name) for name in ("gpt2", "llama", "bert")}


@pytest.fixture(scope="module")
def small(place: Path) -> list[str]:
    lengths = ["data.max_prompt_tokens=32", "data.max_completion_tokens=24", "checkpoint.every=2"]
    return ["experiment=smoke", "device=cpu", "precision=fp32", f"stages.cache_dir={place / 'cache'}", *lengths]


def model(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Of what both have."""
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def crashes_and_goes_on(command: str, line: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whole and interrupted; both end alike."""
    assert launch(command, [*line, f"run_dir={folder / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        fail_at(patch, folder, 3, crash)
        assert launch(command, [*line, f"run_dir={folder / 'crashed'}"]) == 1
    assert launch(command, [*line, f"run_dir={folder / 'crashed'}", "resume=auto"]) == 0
    assert content(folder / "crashed" / "run.json")["resumed_from"] == [2]
    assert figures(folder / "crashed") == figures(folder / "whole")
    assert weights(folder / "crashed") == weights(folder / "whole")


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_a_reward_model_goes_on_to_the_bit(
    recompute: str, small: list[str], folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start = ["model@rm.model=distilbert", f"rm.model.path={folders['bert']}", "peft@rm.peft=last_layer"]
    training = ["rm.train.steps=4", f"rm.train.gradient_checkpointing={recompute}", "rm.train.lr=1e-2"]
    crashes_and_goes_on("train-rm", [*small, *start, *training], tmp_path, monkeypatch)
    before, after = model(folders["bert"]), model(tmp_path / "whole" / "model")
    backbone = {name for name in before if name.startswith("distilbert.")}
    block = {name for name in backbone if name.startswith(BERT_BLOCK)}
    assert changed(before, after) & backbone == block
    heads = {name for name in after if name not in backbone}
    counted = content(tmp_path / "whole" / "summary.json")["parameters/trainable"]
    assert counted == sum(after[name].numel() for name in block | heads)


@pytest.mark.parametrize(("name", "block"), [("gpt2", GPT2_BLOCK), ("llama", LLAMA_BLOCK)])
def test_a_policy_goes_on_to_the_bit_and_its_reference_stays(
    name: str,
    block: str,
    small: list[str],
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    start = ["model=pretrained", f"model.path={folders[name]}", f"sft.path={folders[name]}", "peft=last_layer"]
    training = ["algo.train.steps=4", "algo.train.lr=1e-2", "algo.train.gradient_checkpointing=true"]
    crashes_and_goes_on("train-policy", [*small, *start, *training], tmp_path, monkeypatch)
    said = [text for text in capsys.readouterr().err.splitlines() if TIED in text and " peft=" in f" {text}"]
    assert bool(said) == (name == "gpt2")
    metrics = rows(tmp_path / "whole" / "metrics.jsonl")
    assert metrics[0]["kl/k1"] == 0.0 and metrics[-1]["kl/k1"] != 0.0
    before, after = model(folders[name]), model(tmp_path / "whole" / "model")
    assert before.keys() == after.keys()
    expected = {key for key in before if key.startswith(block)} | ({"lm_head.weight"} & before.keys())
    assert changed(before, after) == expected
    assert not (tmp_path / "whole" / "model" / "adapter").exists()
    assert (
        launch("eval", [*small, *start, f"policies=[{tmp_path / 'whole'}]", f"run_dir={tmp_path / 'eval'}"]) == 0
    )


@pytest.mark.parametrize("reference", ["precomputed", "on_the_fly"])
def test_pairs_are_learned_from_against_a_reference_that_stays(
    reference: str, small: list[str], folders: dict[str, str], tmp_path: Path
):
    start = [
        "model=pretrained",
        f"model.path={folders['llama']}",
        f"sft.path={folders['llama']}",
        "peft=last_layer",
    ]
    training = ["algo=dpo", f"algo.reference={reference}", "algo.train.steps=3", "algo.train.lr=1e-2"]
    assert launch("train-policy", [*small, *start, *training, f"run_dir={tmp_path}"]) == 0
    losses = [row["loss"] for row in rows(tmp_path / "metrics.jsonl")]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and abs(losses[-1] - losses[0]) > 1e-3
    found = changed(model(folders["llama"]), model(tmp_path / "model"))
    assert found and all(name.startswith((LLAMA_BLOCK, "lm_head.")) for name in found)


def test_members_that_share_their_frozen_layers_are_merged(
    small: list[str], folders: dict[str, str], tmp_path: Path
):
    start = [
        "model=pretrained",
        f"model.path={folders['llama']}",
        f"sft.path={folders['llama']}",
        "peft=last_layer",
    ]
    training = ["algo=warp", "algo.I=1", "algo.M=2", "algo.T=3", "algo.mu=0.3", "algo.train.lr=1e-2"]
    assert launch("train-policy", [*small, *start, *training, f"run_dir={tmp_path}"]) == 0
    base, merged = model(folders["llama"]), model(tmp_path / "iterations" / "1" / "merged")
    members = [model(tmp_path / "members" / f"i1-m{number}" / "model") for number in (1, 2)]
    expected = slerp_many(base, members)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
    assert changed(base, merged) == {name for name in base if name.startswith((LLAMA_BLOCK, "lm_head."))}
    metrics = rows(tmp_path / "metrics.jsonl")
    assert metrics[0]["kl/anchor"] == metrics[0]["kl/k1"] == 0.0
    assert metrics[2]["kl/anchor"] != metrics[2]["kl/k1"], "the anchor follows the policy"
