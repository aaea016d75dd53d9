"""GPT-2's real tokenizer over real rows: texts come back, and prompt and completion are read as the whole text is.

Needs the samples beside the checkout; nothing of them is in the repository.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_cli import build
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.settings import (
    DataSettings,
    HelpSteer2Settings,
    HhRlhfSettings,
    ImdbSettings,
    RewardBenchSettings,
)
from rlhf_cli.data.tokenise import encode_completion, encode_prompt, render_prompt
from rlhf_cli.models.loading import classifier_from_lm
from rlhf_cli.models.tokenizer import ensure_pad_token
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.train.reward import encode
from rlhf_cli.types import Preference

SHARED = Path(__file__).parents[4] / "shared"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no samples beside the checkout (../shared)")

ROWS = 1000
LONG = 100_000  # tokens: nothing is cut

SOURCES: dict[str, DataSettings] = {
    "hh-rlhf": HhRlhfSettings(name="hh-rlhf", path=str(SHARED / "data" / "hh-rlhf")),
    "imdb": ImdbSettings(name="imdb", path=str(SHARED / "data" / "imdb"), test_prompt_tokens=None),
    "helpsteer2": HelpSteer2Settings(name="helpsteer2", path=str(SHARED / "data" / "helpsteer2")),
    "helpsteer2 binarized": HelpSteer2Settings(
        name="helpsteer2",
        path=str(SHARED / "data" / "helpsteer2" / "binarized_train.jsonl.gz"),
        test_path=str(SHARED / "data" / "helpsteer2" / "binarized_test.jsonl.gz"),
    ),
    "rewardbench": RewardBenchSettings(
        name="rewardbench", path=str(SHARED / "data" / "rewardbench" / "filtered_llmbar.jsonl.gz")
    ),
}


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerBase:
    """Built from its vocabulary and merges, as the published tokenizer.json is."""
    folder = SHARED / "models" / "gpt2-vocab"
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    merges = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    pairs = [(a, b) for a, b in (line.split(" ") for line in merges if line)]
    backend = ByteLevelBPETokenizer(vocabulary, pairs, add_prefix_space=False)._tokenizer
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)
    assert tokenizer("Hello world")["input_ids"] == [15496, 995], "the published ids"
    ensure_pad_token(tokenizer)
    return tokenizer


@pytest.fixture(scope="module", params=SOURCES)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    settings = SOURCES[request.param]
    settings.cache_dir = str(tmp_path_factory.mktemp("rows"))
    return build.dataset(settings, 8)


def pairs(data: Dataset) -> Iterator[Preference]:
    """Up to 1,000, of every split that the source has."""
    training = [] if data.name == "rewardbench" else [data.pairs, data.pairs_validation]
    return islice(chain(*training, data.pairs_test["test"]), ROWS)


def test_texts_come_back(data: Dataset, gpt2: PreTrainedTokenizerBase):
    seen = 0
    for pair in pairs(data):
        prompt, _ = render_prompt(pair.prompt, gpt2)
        for text in (prompt, pair.chosen, pair.rejected):
            ids = gpt2(text, add_special_tokens=False)["input_ids"]
            assert gpt2.decode(ids, clean_up_tokenization_spaces=False) == text
            seen += 1
    assert seen >= 3 * 200


def test_prompt_and_completion_are_read_as_the_whole_text(data: Dataset, gpt2: PreTrainedTokenizerBase):
    """Promised where a completion does not begin with a space: a role stands on a line of its own before it."""
    held = others = 0
    for pair in pairs(data):
        prompt, _ = render_prompt(pair.prompt, gpt2)
        for completion in (pair.chosen, pair.rejected):
            apart = [
                *(encode_prompt(gpt2, pair.prompt, LONG) if prompt else []),
                *encode_completion(gpt2, completion, LONG, append_eos=False),
            ]
            whole = gpt2(prompt + completion, add_special_tokens=False)["input_ids"]
            if completion[:1].isspace():
                others += 1
                assert gpt2.decode(apart, clean_up_tokenization_spaces=False) == prompt + completion
            else:
                held += 1
                assert apart == whole, (prompt[-40:], completion[:40])
    assert held >= 200 and held >= 20 * others


def test_ids_at_scoring_are_those_of_training(
    data: Dataset, gpt2: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    config = GPT2Config(vocab_size=len(gpt2), n_positions=1024, n_embd=4, n_layer=1, n_head=1, eos_token_id=50256)
    model = classifier_from_lm(GPT2LMHeadModel(config).eval(), 0)
    reward = RewardModel(model, gpt2, RewardFormat(max_prompt_tokens=96, max_completion_tokens=48))
    rows = list(islice(pairs(data), 200))
    trained = [[*prompt, *completion] for (prompt, completion), _, _ in encode(reward, rows)]
    scored: list[list[int]] = []

    def remember(_: object, batch: object) -> torch.Tensor:
        for ids, mask in zip(batch.ids, batch.attention_mask, strict=True):  # type: ignore[attr-defined]
            scored.append(ids[mask].tolist())
        return torch.zeros(len(batch.ids), 1)  # type: ignore[attr-defined]

    monkeypatch.setattr("rlhf_cli.rewards.scoring.score_sequences", remember)
    reward.score([row.prompt for row in rows], [row.chosen for row in rows])
    assert sorted(scored) == sorted(trained)
