"""Tokenizers: training the embedded one, and the pad token every model here needs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|eos|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so any text has tokens and comes back unchanged.

    Args:
        texts: the corpus; the same texts give the same tokenizer.
        vocab_size: upper limit, the bytes and two special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def has_own_pad_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True when the pad id is never a token of a text (it exists and is no EOS)."""
    return tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Adds a pad token of its own where there is none; True when the vocabulary grew.

    Classifier heads of transformers look for the last id that differs from pad, so pad == eos makes them read the
    wrong token.
    """
    if has_own_pad_token(tokenizer):
        return False
    return tokenizer.add_special_tokens({"pad_token": PAD_TOKEN}) > 0


@lru_cache(maxsize=32)
def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether ids mean the same to both: one kind of tokenizer, one vocabulary, one set of special tokens."""
    if one is other:
        return True
    return (
        type(one) is type(other)
        and one.special_tokens_map == other.special_tokens_map
        and one.get_vocab() == other.get_vocab()
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that are no text: decoding leaves them out."""
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*added, *tokenizer.all_special_ids))
