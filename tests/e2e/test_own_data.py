"""A user's own rows and models, and the loggers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.fixtures_e2e import LOADED, content, ok, rows

COLOURS = ("red", "green", "blue", "grey", "pink", "black", "white", "brown", "amber", "beige")


def strings(colour: str, number: int) -> dict[str, object]:
    return {"prompt": f"name colour {number} .", "chosen": f" it is {colour} .", "rejected": " no ."}


def messages(colour: str, number: int) -> dict[str, object]:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Name colour {number}."}]
    right, wrong = ({"role": "assistant", "content": text} for text in (f"It is {colour}.", "No."))
    if number % 2:  # with the prompt in both conversations, and no column of its own
        return {"chosen": [*asked, right], "rejected": [*asked, wrong]}
    return {"prompt": asked, "chosen": f"It is {colour}.", "rejected": [wrong]}


def write(file: Path, kind: object) -> None:
    lines = [json.dumps(kind(COLOURS[number % 10], number)) for number in range(60)]  # type: ignore[operator]
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def sft(place: Path) -> Path:
    """A model of the tiny setting, as a folder of its own."""
    ok(["train-sft", "experiment=smoke", "run_dir=sft", "logger=tensorboard"], place, program=LOADED)
    return place / "sft"


def test_rows_of_strings_go_through_every_stage(place: Path):
    write(place / "strings.jsonl", strings)
    data = ["data=jsonl", "data.path=strings.jsonl", "data.test_fraction=0.2", "data.validation_fraction=0.2"]
    done = ok(
        ["train-policy", "experiment=smoke", *data, "stages.cache_dir=own", "run_dir=strings"],
        place,
        program=LOADED,
    )
    assert "gold" not in done.out  # nobody knows the true reward of these
    samples = rows(place / "strings" / "samples.jsonl")
    assert samples and all(sample["prompt"].startswith("name colour") for sample in samples)
    assert set(content(place / "strings" / "run.json")["upstream"]) == {"sft", "rm"}
    ok(["eval", "experiment=smoke", *data, "policies=[strings]", "run_dir=strings-eval"], place, program=LOADED)
    summary = content(place / "strings-eval" / "summary.json")
    assert "rloo/reward/mean_delta" in summary and not [name for name in summary if "gold" in name]


def test_rows_of_chat_messages_and_a_model_of_ones_own(place: Path, sft: Path):
    write(place / "messages.jsonl", messages)
    data = ["data=jsonl", "data.path=messages.jsonl", "data.test_fraction=0.2", "data.validation_fraction=0.2"]
    model = ["model=pretrained", f"model.path={sft / 'model'}"]
    ok(
        ["train-policy", "experiment=smoke", *data, *model, "stages.cache_dir=own", "run_dir=messages"],
        place,
        program=LOADED,
    )
    samples = rows(place / "messages" / "samples.jsonl")
    assert [turn["role"] for turn in samples[0]["prompt"]] == ["system", "user"]
    assert content(place / "messages" / "model" / "config.json")["hidden_size"] == 32


def test_published_columns_from_files(place: Path):
    """A reward model on transcripts, measured on an evaluation set by subset; sentiment without pairs in the file."""
    hh = [
        {
            side: f"\n\nHuman: Name colour {number}.\n\nAssistant: {answer}"
            for side, answer in (("chosen", f"It is {COLOURS[number % 10]}."), ("rejected", "No."))
        }
        for number in range(60)
    ]
    bench = [
        {
            "prompt": f"Name {number}.",
            "chosen": "It is red.",
            "rejected": "No.",
            "subset": ("easy", "hard", "llmbar-natural")[number % 3],
        }
        for number in range(12)
    ]
    reviews = [
        {"text": f"film {number} is {('bad', 'good')[number % 2]} , all of it", "label": number % 2}
        for number in range(60)
    ]
    for name, content_rows in (("hh", hh), ("bench", bench), ("reviews", reviews)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content_rows))
    caps = ["data.max_prompt_tokens=64", "data.max_completion_tokens=24", "data.test_fraction=0.3"]
    shared = ["experiment=smoke", *caps, "data.validation_fraction=0.3", "stages.cache_dir=own"]
    done = ok(["train-rm", "data=hh-rlhf", "data.path=hh.jsonl", *shared, "run_dir=hh-rm"], place, program=LOADED)
    assert "data=hh-rlhf: 60 rows -> 60 pairs (" in done.err
    measure = ["eval", "data=rewardbench", "data.path=bench.jsonl", *shared, "rm.path=hh-rm"]
    done = ok([*measure, "run_dir=bench-eval"], place, program=LOADED)
    summary = content(place / "bench-eval" / "summary.json")
    accuracy = [summary[f"rm/accuracy{subset}"] for subset in ("", "/easy", "/hard", "/llmbar-natural")]
    assert accuracy[0] == pytest.approx(sum(accuracy[1:]) / 3)
    assert summary["rm/section/chat_hard"] == accuracy[3] and "rm/section/overall" not in summary
    assert "rm/section/chat_hard is not the published one: mt-bench-hard has 0 of its 37 pairs" in done.out
    few = ["data.pairs_per_epoch=32", "data.num_validation_pairs=8", "data.num_test_pairs=8"]
    done = ok(
        ["train-rm", "data=imdb", "data.path=reviews.jsonl", *shared, *few, "run_dir=reviews-rm"],
        place,
        program=LOADED,
    )
    assert "data=imdb: 60 rows -> 60 reviews (" in done.err


def test_tensorboard_writes_its_events(sft: Path):
    (events,) = (sft / "tensorboard").glob("events.out.tfevents.*")
    assert b"grad_norm" in events.read_bytes()
    assert len(rows(sft / "metrics.jsonl")) == 2


def test_wandb_offline_writes_into_the_run(place: Path):
    ok(
        ["train-sft", "experiment=smoke", "run_dir=wandb-run", "logger=wandb", "logger.mode=offline"],
        place,
        program=LOADED,
    )
    (written,) = (place / "wandb-run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.stat().st_size > 1000
    assert written.stem == f"run-{content(place / 'wandb-run' / 'run.json')['id']}"
    assert len(rows(place / "wandb-run" / "metrics.jsonl")) == 2
    assert not (place / "wandb").exists()
