"""Every stage with a bottleneck adapter, on a small model in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_cli.commands.launch import launch
from rlhf_cli.models.adapters import ADAPTER_FOLDER
from rlhf_cli.models.bottleneck import load_bottleneck
from tests.e2e.fixtures_e2e import content, crash, fail_at, figures, rows, weights
from tests.unit.fixtures_models import bert_tokenizer, byte_tokenizer, distilbert, gpt2_lm

WIDTH, INNER = 4, 64
WARNING = ".variant=replace: every MLP is replaced by fresh weights"


@pytest.fixture(scope="module")
def line(place: Path) -> list[str]:
    gpt2_lm(byte_tokenizer()).save_pretrained(place / "base")
    byte_tokenizer().save_pretrained(place / "base")
    small = ["experiment=smoke", "device=cpu", "precision=fp32", f"stages.cache_dir={place / 'cache'}"]
    model = [
        "model=pretrained",
        f"model.path={place / 'base'}",
        "data.max_prompt_tokens=32",
        "data.max_completion_tokens=24",
    ]
    return [*small, *model, "peft=adapter", f"peft.bottleneck={WIDTH}", "model.lr.policy=1e-2"]


@pytest.mark.parametrize("variant", ["residual", "replace"])
def test_a_policy_is_trained_saved_evaluated_and_goes_on_to_the_bit(
    variant: str,
    line: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    only_policy = [] if variant == "residual" else ["peft@sft.peft=none", "peft@rm.peft=none"]
    line = [*line, f"peft.variant={variant}", *only_policy, "algo.train.steps=4", "checkpoint.every=2"]
    assert launch("train-policy", [*line, f"run_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().err
    assert said.count(WARNING) == (variant == "replace") and ("peft" + WARNING in said) == (variant == "replace")

    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert (metrics[0]["kl/k1"] == 0.0) == (variant == "residual"), "the reference is the model before the adapter"
    assert metrics[-1]["kl/k1"] != 0.0
    sft = Path(content(tmp_path / "run" / "run.json")["upstream"]["sft"]["path"])
    widths = [content(folder / "config.json")["n_inner"] for folder in (sft, tmp_path / "run" / "model")]
    assert widths == ([INNER + WIDTH, INNER + 2 * WIDTH] if variant == "residual" else [None, WIDTH])
    summary = content(tmp_path / "run" / "summary.json")
    assert summary["parameters/trainable"] == 2 * (16 * WIDTH + WIDTH + WIDTH * 16 + 16)

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert policy.transformer.h[0].mlp.c_fc.weight.shape == (16, widths[1])
    base = AutoModelForCausalLM.from_pretrained(sft)
    load_bottleneck(base, tmp_path / "run" / "model" / ADAPTER_FOLDER)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, policy(ids).logits, atol=1e-5, rtol=1e-5)

    evaluate = [f"policies=[{tmp_path / 'run'}]", f"run_dir={tmp_path / 'eval'}"]
    assert launch("eval", [*line, *evaluate]) == 0
    assert "rloo/gold/mean_delta" in content(tmp_path / "eval" / "summary.json")

    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path, 3, crash)
        assert launch("train-policy", [*line, f"run_dir={tmp_path / 'crashed'}"]) == 1
    assert launch("train-policy", [*line, f"run_dir={tmp_path / 'crashed'}", "resume=auto"]) == 0
    assert content(tmp_path / "crashed" / "run.json")["resumed_from"] == [2]
    assert figures(tmp_path / "crashed") == figures(tmp_path / "run")
    assert weights(tmp_path / "crashed") == weights(tmp_path / "run")


def test_a_model_without_such_blocks_is_one_line(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    distilbert(bert_tokenizer()).save_pretrained(tmp_path / "bert")
    bert_tokenizer().save_pretrained(tmp_path / "bert")
    other = ["model@rm.model=distilbert", f"rm.model.path={tmp_path / 'bert'}", f"run_dir={tmp_path / 'run'}"]
    assert launch("train-rm", [*line, *other]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "rm.peft.name=adapter: expected none, lora or last_layer for a model of type distilbert" in last
