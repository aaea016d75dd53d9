from __future__ import annotations

import gzip
import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.models.loading import load_backbone_as_classifier

TEXTS = ["a fine film with a fine cast", "A dull film, and a dull cast", "what a cast"]


@pytest.fixture
def study() -> Any:
    return import_module("rm_peft")


def test_the_rate_with_the_lowest_validation_loss_is_chosen_for_each_way(study: Any, tmp_path: Path) -> None:
    """Test figures have no say: there are none yet. One that diverged, or did not end, is the last choice."""

    def tried(way: str, lr: str, **summary: float | None) -> Any:
        return study.Tried("llama", way, lr, tmp_path, summary)

    found = study.chosen(
        [
            tried("none", "1e-3", loss=0.5),
            tried("none", "3e-3", loss=0.4),
            tried("none", "9e-3", loss=math.nan),
            tried("lora", "1e-3"),
            tried("lora", "3e-3", loss=0.69),
        ]
    )
    assert [(one.way, one.lr) for one in found] == [("none", "3e-3"), ("lora", "3e-3")]


def test_a_row_has_the_figures_with_their_intervals(study: Any, tmp_path: Path) -> None:
    summary = {"loss": 0.5, "parameters/trainable": 1234, "parameters/total": 5678, "time_s": 9.6}
    one = study.Tried("llama", "last_layer", "1e-3", tmp_path, summary)
    measured = {}
    for name, value in (("rm/accuracy", 0.7), ("rm/chosen_reward", 1.5), ("rm/rejected_reward", -0.5)):
        measured |= {name: value, f"{name}_lo": value - 0.1, f"{name}_hi": value + 0.1}
    line = study.as_markdown([study.row_of(one, measured)]).splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("llama", "last block and head", "1e-3", "1,234", "5,678"),
        *("0.700 [0.600, 0.800]", "1.50 [1.40, 1.60]", "-0.50 [-0.60, -0.40]", "10"),
    ]


def test_the_encoder_loads_as_a_classifier_and_is_the_same_every_time(study: Any, tmp_path: Path) -> None:
    heads = []
    for name in ("a", "b"):
        study.write_distilbert(tmp_path / name, TEXTS, vocab_size=80)
        model, tokenizer = load_backbone_as_classifier("rm.model", str(tmp_path / name), torch.device("cpu"), 0)
        heads.append(model)
    assert all(torch.equal(x, y) for x, y in zip(heads[0].parameters(), heads[1].parameters(), strict=True))
    ids = tokenizer("A FINE film")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert tokenizer.unk_token_id not in ids and tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a fine film"


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_the_tokenizer_reads_the_training_reviews(study: Any, tmp_path: Path, name: str) -> None:
    lines = "".join(json.dumps({"text": text, "label": 1}) + "\n" for text in TEXTS).encode()
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    assert study.training_texts(tmp_path) == TEXTS


def test_overrides_follow_two_dashes() -> None:
    study = import_module("study")
    assert study.overrides_apart(["model", "--jobs", "1", "--", "a=1", "b=2"]) == (
        ["model", "--jobs", "1"],
        ["a=1", "b=2"],
    )
    assert study.overrides_apart(["model"]) == (["model"], [])


def test_a_command_that_fails_ends_the_study_with_its_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = import_module("study")
    with pytest.raises(SystemExit) as caught:
        study.run_all([study.Command(["train-nothing"], tmp_path / "logs" / "a.log")], 1)
    assert caught.value.code not in (0, None)
    assert "train-nothing" in (tmp_path / "logs" / "a.log").read_text() and "a.log" in capfd.readouterr().err


def test_a_command_that_fails_in_this_process_ends_the_study_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = import_module("study")
    with pytest.raises(SystemExit) as caught:
        study.rlhf_here("train-rm", "rm=none", log=tmp_path / "logs" / "a.log")
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "rm=none: not one of" in (tmp_path / "logs" / "a.log").read_text()
    assert (
        "a.log" in said.err and "rm=none: not one of" in said.err and said.out.startswith("rlhf train-rm rm=none")
    )
