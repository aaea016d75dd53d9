"""Reward models on IMDb with all weights, with LoRA, and with the last block alone: what is trained, what comes of it.

    python scripts/rm_peft.py MODEL IMDB [--out outputs/rm-peft] [--jobs 2] [-- overrides]

MODEL is the folder of a small causal language model, IMDB one with train and test rows (text, label). The same is done
with a small DistilBERT that is built here: a WordPiece tokenizer of the training reviews and random weights, no
pre-training; what LoRA and the last block leave frozen there is random.

Each way of training has the same three learning rates to choose from. The one with the lowest loss on the validation
pairs is taken, and its model alone is measured on the test pairs, a positive and a negative review each. Rewards are in
standard deviations of the SFT model's samples.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from study import Command, overrides_apart, run_all, table, write_json
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import DistilBertConfig, DistilBertForMaskedLM, PreTrainedTokenizerFast

from rlhf_cli.commands.sweep import read_jobs

WAYS = {"none": "all weights", "lora": "LoRA", "last_layer": "last block and head"}
LEARNING_RATES = ("5e-4", "2e-3", "8e-3")

# One short pass of each on reviews cut at 128 tokens: 18 trainings on two CPU cores in about ten minutes.
SETTINGS = [
    "data=imdb",
    "data.max_completion_tokens=128",
    "data.max_sft_tokens=128",
    "data.pairs_per_epoch=2048",
    "model=pretrained",
    "sft.train.steps=100",
    "sft.train.lr=1e-3",
    "rollout.max_new_tokens=48",
    "rm.init=backbone",
    "rm.train.epochs=1",
    "rm.train.eval_every=16",
    "threads=1",
    "resume=auto",
]

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@dataclass(frozen=True)
class Tried:
    """A training: what it was, and what came of it."""

    backbone: str
    way: str
    lr: str
    folder: Path
    summary: Mapping[str, float | None]

    @property
    def loss(self) -> float:
        """On the validation pairs, nats; infinite where it is not finite."""
        loss = self.summary.get("loss")
        return loss if loss is not None and math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Row:
    """The chosen training of a backbone and a way, and its figures on the test pairs."""

    backbone: str
    way: str
    lr: str
    accuracy: tuple[float, float, float]  # value and 95% interval
    positive: tuple[float, float, float]  # reward of the positive reviews, SFT standard deviations
    negative: tuple[float, float, float]
    trainable: int
    total: int
    time_s: float


def main() -> int:
    """Trains what is missing, measures what is chosen, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("imdb", type=Path)
    parser.add_argument("--out", type=Path, default=Path("outputs/rm-peft"))
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time, a thread each")
    own, extra = overrides_apart(sys.argv[1:])
    options = parser.parse_args(own)
    out = options.out
    encoder = out / "distilbert"
    if not (encoder / "model.safetensors").is_file():
        write_distilbert(encoder, training_texts(options.imdb))
    common = [*SETTINGS, f"data.path={options.imdb.resolve()}", f"model.path={options.model.resolve()}", *extra]
    backbones = {
        options.model.resolve().name: ("decoder", []),
        "DistilBERT from scratch": ("encoder", ["model@rm.model=distilbert", f"rm.model.path={encoder}"]),
    }
    # The stage that all share comes first: others would wait for it with their clocks running.
    run_all([Command(["train-sft", *common, f"run_dir={out / 'sft'}"], out / "logs" / "sft.log")], 1)
    common.append(f"sft.path={out / 'sft'}")
    swept = [f"peft@rm.peft={','.join(WAYS)}", f"rm.train.lr={','.join(LEARNING_RATES)}"]
    run_all(
        [
            Command(
                ["sweep", "train-rm", *swept, *arguments, *common, f"run_dir={out / folder}"],
                out / "logs" / f"{folder}.log",
            )
            for folder, arguments in backbones.values()
        ],
        options.jobs,
    )
    best = chosen([one for name, (folder, _) in backbones.items() for one in trained_in(name, out / folder)])
    paths = ",".join(str(one.folder) for one in best)
    run_all(
        [
            Command(
                ["sweep", "eval", f"rm.path={paths}", *common, f"run_dir={out / 'eval'}"],
                out / "logs" / "eval.log",
            )
        ],
        1,
    )
    measured = {job.overrides["rm.path"]: job.summary for job in read_jobs(out / "eval")}
    rows = [row_of(one, measured[str(one.folder)]) for one in best]
    write_json(out / "table.json", [asdict(row) for row in rows])
    text = as_markdown(rows)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def chosen(tried: Iterable[Tried]) -> list[Tried]:
    """Of each backbone and way the training with the lowest validation loss; one that diverged is never it."""
    best: dict[tuple[str, str], Tried] = {}
    for one in tried:
        key = (one.backbone, one.way)
        if key not in best or one.loss < best[key].loss:
            best[key] = one
    return list(best.values())


def trained_in(backbone: str, folder: Path) -> list[Tried]:
    """The trainings of a sweep's folder."""
    return [
        Tried(
            backbone,
            job.overrides["peft@rm.peft"],
            job.overrides["rm.train.lr"],
            folder / str(job.number),
            job.summary,
        )
        for job in read_jobs(folder)
    ]


def row_of(one: Tried, measured: Mapping[str, Any]) -> Row:
    """A line of the table from a training and from what its evaluation measured."""
    trained: Mapping[str, Any] = one.summary

    def figure(name: str) -> tuple[float, float, float]:
        return measured[name], measured[f"{name}_lo"], measured[f"{name}_hi"]

    return Row(
        one.backbone,
        one.way,
        one.lr,
        figure("rm/accuracy"),
        figure("rm/chosen_reward"),
        figure("rm/rejected_reward"),
        int(trained["parameters/trainable"]),
        int(trained["parameters/total"]),
        float(trained["time_s"]),
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as the README has it."""
    head = ["backbone", "trained", "lr", "parameters", "of", "accuracy", "positive", "negative", "time, s"]
    return table(
        head,
        [
            [
                *(row.backbone, WAYS[row.way], row.lr, f"{row.trainable:,}", f"{row.total:,}"),
                *(_interval(row.accuracy, 3), _interval(row.positive, 2), _interval(row.negative, 2)),
                f"{row.time_s:.0f}",
            ]
            for row in rows
        ],
    )


def _interval(figure: tuple[float, float, float], digits: int) -> str:
    value, lo, hi = (f"{number:.{digits}f}" for number in figure)
    return f"{value} [{lo}, {hi}]"


def training_texts(folder: Path) -> list[str]:
    """The reviews of the training file, of which the tokenizer is made."""
    files = [file for suffix in ("jsonl", "jsonl.gz") if (file := folder / f"train.{suffix}").is_file()]
    if not files:
        raise SystemExit(f"{folder}: expected train.jsonl or train.jsonl.gz")
    opened = gzip.open if files[0].suffix == ".gz" else open
    with opened(files[0], "rt", encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def write_distilbert(folder: Path, texts: Iterable[str], vocab_size: int = 4000, seed: int = 0) -> None:
    """A DistilBERT of random weights and the WordPiece tokenizer of these texts, as plain transformers writes them."""
    tokenizer = wordpiece(texts, vocab_size)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=64,
        hidden_dim=256,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DistilBertForMaskedLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def wordpiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer in BERT's style: lower case, [CLS] text [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    marks = [(name, tokenizer.token_to_id(name)) for name in (SPECIAL["cls_token"], SPECIAL["sep_token"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=marks
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **SPECIAL)


if __name__ == "__main__":
    raise SystemExit(main())
