"""What is measured: the sizes, a random Llama, a tokenizer that gives every id back, prompts and pairs.

Both sides get the same weights and the same texts. The random model never samples the end of a text nor padding (a
weight sees to it, see `_never_end`), so that every completion has the same length without a logits processor on
either side.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from rlhf_cli.models.loading import classifier_from_lm

PAD, EOS, NUM_SPECIAL = 0, 1, 2
_FIRST_CHARACTER = 0x10000  # of id 0; above it every number is a character, up to 1,048,575
_CHANNEL, _CHANNEL_VALUE, _LOW = 0, 0.1, -300.0  # see `_never_end`


@dataclass(frozen=True)
class Sizes:
    """Model and batch; lengths in tokens."""

    num_layers: int = 6
    hidden_size: int = 256
    num_heads: int = 8
    num_kv_heads: int = 8
    intermediate_size: int = 1024
    vocab_size: int = 8192
    is_tied: bool = False
    num_prompts: int = 16  # of a rollout
    k: int = 4  # samples per prompt
    new_tokens: int = 32  # of every sample
    num_pairs: int = 32  # of a DPO or reward model step
    prompt_tokens: tuple[int, int] = (8, 24)  # shortest, longest
    completion_tokens: tuple[int, int] = (8, 48)  # of the pairs; shortest, longest, the EOS included
    micro_batch: int | None = None  # sequences, or pairs, of a pass of both sides; None = the whole step

    @property
    def max_tokens(self) -> int:
        """Of the longest row that any case makes; one prompt may be four times longer."""
        return 4 * self.prompt_tokens[1] + max(self.new_tokens, self.completion_tokens[1])


PRESETS = {
    "cpu": Sizes(),
    "gpu": Sizes(  # SmolLM2-135M
        num_layers=30,
        hidden_size=576,
        num_heads=9,
        num_kv_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        is_tied=True,
        num_prompts=64,
        k=8,
        new_tokens=128,
    ),
    "quick": Sizes(
        num_layers=1,
        hidden_size=16,
        num_heads=2,
        num_kv_heads=2,
        intermediate_size=32,
        vocab_size=64,
        num_prompts=2,
        k=2,
        new_tokens=4,
        num_pairs=2,
        prompt_tokens=(3, 5),
        completion_tokens=(3, 6),
    ),
}

IdPair = tuple[list[int], list[int]]  # ids of a prompt, ids of its completion


def character(token: int) -> str:
    """The text of an ordinary token.

    >>> character(2)
    '𐀂'
    """
    return chr(_FIRST_CHARACTER + token)


def text_of(ids: list[int]) -> str:
    """The text of tokens, none of them special."""
    return "".join(character(token) for token in ids)


@lru_cache(maxsize=2)
def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One character a token, so that texts can be joined and cut anywhere and read as the same ids."""
    vocabulary = {"<pad>": PAD, "</s>": EOS}
    vocabulary |= {character(token): token for token in range(NUM_SPECIAL, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


def make_policy(sizes: Sizes) -> LlamaForCausalLM:
    """Random weights in float32, the same ones at every call."""
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=max(256, sizes.max_tokens),
        tie_word_embeddings=sizes.is_tied,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    _never_end(model)
    return model


def make_reward_model(policy: PreTrainedModel) -> PreTrainedModel:
    """A classifier of one label over the policy's backbone."""
    return classifier_from_lm(policy, seed=1)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes a folder that a peer loads its own copy from."""
    disable_progress_bar()
    model.save_pretrained(folder)


@torch.no_grad()
def _never_end(model: LlamaForCausalLM) -> None:
    """One channel of the residual stream is a positive constant, for which pad and EOS have logits far below others."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding[:, _CHANNEL] = _CHANNEL_VALUE
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[_CHANNEL] = 0.0
        layer.mlp.down_proj.weight[_CHANNEL] = 0.0
    if head is not embedding:
        head[:, _CHANNEL] = 0.0
    head[[PAD, EOS], _CHANNEL] = _LOW


def spread(shortest: int, longest: int, count: int, seed: int) -> list[int]:
    """`count` lengths evenly over the range, in an order that `seed` says.

    >>> sorted(spread(8, 24, 3, seed=0))
    [8, 16, 24]
    """
    step = (longest - shortest) / max(1, count - 1)
    lengths = [round(shortest + i * step) for i in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


def _random_ids(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    return [rng.randrange(NUM_SPECIAL, vocab_size) for _ in range(length)]


def make_prompts(sizes: Sizes, long_one: bool | None = None) -> list[list[int]]:
    """Prompts as ids.

    Args:
        sizes: how many and how long.
        long_one: None = lengths spread over the range; False = all of the middle length; True = of these the first
            four times longer.
    """
    rng, (low, high) = random.Random(1), sizes.prompt_tokens
    lengths = spread(low, high, sizes.num_prompts, seed=2)
    if long_one is not None:
        lengths = [(low + high) // 2] * sizes.num_prompts
        lengths[0] *= 4 if long_one else 1
    return [_random_ids(rng, length, sizes.vocab_size) for length in lengths]


def make_pairs(sizes: Sizes) -> list[tuple[IdPair, IdPair]]:
    """Chosen and rejected of each prompt; completions end with EOS."""
    rng, num = random.Random(3), sizes.num_pairs
    prompts = [_random_ids(rng, length, sizes.vocab_size) for length in spread(*sizes.prompt_tokens, num, seed=4)]
    low, high = sizes.completion_tokens
    sides = [
        [[*_random_ids(rng, length - 1, sizes.vocab_size), EOS] for length in spread(low, high, num, seed)]
        for seed in (5, 6)
    ]
    return [((p, chosen), (p, rejected)) for p, chosen, rejected in zip(prompts, *sides, strict=True)]


def pair_rows(sizes: Sizes) -> list[dict[str, str]]:
    """The pairs as texts without the EOS, which both sides append."""
    return [
        {"prompt": text_of(prompt), "chosen": text_of(chosen[:-1]), "rejected": text_of(rejected[:-1])}
        for (prompt, chosen), (_, rejected) in make_pairs(sizes)
    ]


def sizes_as_dict(sizes: Sizes) -> dict[str, object]:
    """For JSON."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(sizes).items()}


def sizes_from_dict(values: dict[str, object]) -> Sizes:
    """From JSON."""
    return Sizes(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})  # type: ignore[arg-type]
