"""Small models, tokenizers of every style, data and a job: built from configs, nothing is downloaded."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_cli import build
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.config.schema import (
    LoggerConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
    StagesConfig,
)
from rlhf_cli.data.settings import ReviewsSettings
from rlhf_cli.models.loading import build_tiny, classifier_from_lm
from rlhf_cli.models.settings import ModelSettings
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rewards.settings import ScalarRm
from rlhf_cli.runs.job import Job
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.precision import Precision

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)

CORPUS = ("the film was good . ", "the plot is bad and slow . ", "a warm , funny story ! ") * 4


def tiny_settings() -> ModelSettings:
    """A Llama of a few thousand parameters."""
    return ModelSettings(
        hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, vocab_size=300, max_positions=128
    )


@lru_cache(maxsize=1)
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded kind: pad 0, EOS 1, no BOS. Shared: not to be changed."""
    return train_tokenizer(CORPUS, 300)


def bos_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Llama style: <s> before every text, </s> to end one, no pad token."""
    tokenizer = byte_bpe(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """RoBERTa style: <s> text </s>, its EOS after every text."""
    tokenizer = byte_bpe(["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """BERT style: [CLS] text [SEP], neither BOS nor EOS."""
    words = sorted({word for text in CORPUS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


def byte_bpe(special_tokens: list[str]) -> Tokenizer:
    """Bytes and a few merges of the corpus."""
    """Byte-level BPE over the corpus, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tiny_lm(seed: int = 0) -> PreTrainedModel:
    """The embedded kind of model over `byte_tokenizer`."""
    return build_tiny(tiny_settings(), byte_tokenizer(), seed)


def gpt2_lm(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """Learned absolute positions, dropout 0.1, biases."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return seeded(GPT2LMHeadModel, config, seed)


def distilbert(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """An encoder with a classification head of one label."""
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=16,
        hidden_dim=32,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    return seeded(DistilBertForSequenceClassification, config, seed)


def seeded(model_class: Any, config: Any, seed: int) -> PreTrainedModel:
    """A model in eval mode, its weights a function of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def reward_model(kind: str = "llama", seed: int = 0, **changes: Any) -> RewardModel:
    """An untrained reward model; `kind` is llama, gpt2 or distilbert, `changes` go to its format."""
    text_format = RewardFormat(**{"max_prompt_tokens": 20, "max_completion_tokens": 16, **changes})
    if kind == "distilbert":
        bert = bert_tokenizer()
        return RewardModel(distilbert(bert, seed), bert, text_format)
    tokenizer = byte_tokenizer()
    language_model = tiny_lm(seed) if kind == "llama" else gpt2_lm(tokenizer, seed)
    return RewardModel(classifier_from_lm(language_model, seed + 1), tokenizer, text_format)


def edit_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def run_config(folder: Path, command: str = "train-policy") -> RunConfig:
    """The tree as the YAMLs compose it, at the smallest sizes; `rm.model` equals `model`, as it does there."""
    train = {"steps": 2, "batch_size": 4, "lr": 1e-3}
    return RunConfig(
        command=command,
        name="test",
        run_dir=str(folder / "run"),
        algo=Rloo(k=2, train=TrainSettings(**train)),
        rm=ScalarRm(model=tiny_settings(), train=TrainSettings(**train), standardize_samples=8),
        data=ReviewsSettings(
            name="reviews",
            num_sft=16,
            num_pairs=12,
            num_validation=4,
            num_test=4,
            num_prompts=32,
            max_prompt_tokens=24,
            max_completion_tokens=16,
        ),
        model=tiny_settings(),
        rollout=RolloutConfig(max_new_tokens=16),
        logger=LoggerConfig(),
        sft=SftConfig(train=TrainSettings(**train)),
        stages=StagesConfig(cache_dir=str(folder / "cache")),
    )


def make_job(config: RunConfig) -> Job:
    """What the stages take, on the CPU."""
    return Job(
        config=config,
        data=build.dataset(config.data, config.algo.eval_prompts),
        precision=build.precision(config),
        threads=1,
        folder=Path(config.run_dir),
        command=config.command,
        argv=("rlhf", config.command),
    )
