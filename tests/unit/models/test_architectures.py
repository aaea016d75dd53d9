"""Each architecture, from a folder that plain transformers wrote to one that plain transformers reads.

The table at the end of a test run says what was shown for which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_architectures import ALL, DECODERS, ENCODERS, POSITIONS, Hub, Loaded, cell
from fixtures_models import CPU, reward_model
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import TokenPair, collate, encode_prompt
from rlhf_cli.errors import RequestError
from rlhf_cli.models.causal import full_kls, sequence_logits, sequence_logprobs, token_logprobs
from rlhf_cli.models.loading import (
    classifier_from_lm,
    eos_ids,
    load_backbone_as_classifier,
    load_causal_lm,
    max_positions,
    save_model,
)
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.settings import PeftSettings
from rlhf_cli.rewards.model import RewardModel, load_reward_model
from rlhf_cli.rewards.scoring import score_sequences
from rlhf_cli.rollout.engine import Sampling, generate
from rlhf_cli.types import PromptBatch, Rollout

CLOSE = {"rtol": 0, "atol": 1e-5}
ROWS: list[TokenPair] = [
    ([33, 44, 55], [66, 77, 2]),
    ([99], [111]),
    ([110, 111, 112, 113, 114, 115, 116, 117], [118]),
    ([22, 22], [120, 121, 122, 123, 120, 121, 122, 123, 44]),
    ([5, 1, 6], [8, 9, 1, 1]),
]
PROMPTS = ("the film was", "a", "the plot is bad and slow . a warm , funny", "good bad good", "was ? !")
MAX_NEW = 14


def rollout_of(loaded: Loaded, max_new: int = MAX_NEW, **sampling: Any) -> Rollout:
    model, tokenizer = loaded
    ids = tuple(tuple(encode_prompt(tokenizer, prompt, 30)) for prompt in PROMPTS)
    batch = PromptBatch(PROMPTS, ids, tuple(range(len(PROMPTS))))
    k = 1 if sampling.get("temperature") == 0.0 else 3
    return generate(model, tokenizer, batch, k, Sampling(max_new, **sampling), seed=4, step=1)


def rows_for(tokenizer: PreTrainedTokenizerBase) -> list[TokenPair]:
    """The rows within a small vocabulary; BERT's here has two dozen words."""
    size = len(tokenizer)
    return [([i % size for i in prompt], [i % size for i in completion]) for prompt, completion in ROWS]


def layouts(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Sides, amounts and ids of padding."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id or 3
    return [
        {"pad_id": pad, "side": "left"},
        {"pad_id": pad, "length": 40},
        {"pad_id": pad, "side": "left", "length": POSITIONS + 30},
        {"pad_id": pad, "length": POSITIONS + 30},
        {"pad_id": eos, "length": 30},
        {"pad_id": 7, "side": "left", "length": 30},
    ]


@cell("padding: log-probs")
def test_padding_changes_no_log_prob(name: str, policy: Loaded) -> None:
    model, tokenizer = policy
    alone = [token_logprobs(model, collate([row], 0)) for row in ROWS]
    for layout in layouts(tokenizer):
        together = token_logprobs(model, collate(ROWS, **layout))
        for i, one in enumerate(alone):
            torch.testing.assert_close(together.logprob[i][together.mask[i]], one.logprob[one.mask], **CLOSE)
            torch.testing.assert_close(together.entropy[i][together.mask[i]], one.entropy[one.mask], **CLOSE)
    assert torch.cat([one.logprob[one.mask] for one in alone]).std() > 0.3


@cell("padding: log-probs")
def test_log_probs_are_those_of_a_plain_forward_pass(name: str, policy: Loaded) -> None:
    """Without a mask and without positions: the model's own (OPT's begin at 2, Gemma scales its embeddings)."""
    model, _ = policy
    tokens = token_logprobs(model, collate(ROWS, 0, "left"))
    for i, (prompt, completion) in enumerate(ROWS):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
        logprob = F.log_softmax(logits, -1)
        expected = [float(logprob[len(prompt) + t - 1, token]) for t, token in enumerate(completion)]
        assert tokens.logprob[i][tokens.mask[i]].tolist() == pytest.approx(expected, abs=1e-5)


@cell(*ALL, "padding: scores")
def test_padding_changes_no_score(name: str, scorer: RewardModel) -> None:
    rows = rows_for(scorer.tokenizer)
    with torch.no_grad():
        alone = torch.cat([score_sequences(scorer.model, collate([row], 0)) for row in rows])
        assert alone.std() > 0.05
        for layout in layouts(scorer.tokenizer):
            together = score_sequences(scorer.model, collate(rows, **layout))
            torch.testing.assert_close(together, alone, **CLOSE)


@cell(*ENCODERS, "padding: scores")
def test_an_encoder_scores_as_transformers_does(name: str, scorer: RewardModel) -> None:
    # RoBERTa takes every token with the id of pad for padding, one inside a text too: of no interest here
    rows = [row for row in rows_for(scorer.tokenizer) if scorer.tokenizer.pad_token_id not in (*row[0], *row[1])]
    assert len(rows) >= 4
    with torch.no_grad():
        found = score_sequences(scorer.model, collate(rows, int(scorer.tokenizer.pad_token_id), length=20))
        plain = [float(scorer.model(torch.tensor([[*row[0], *row[1]]])).logits) for row in rows]
    assert found[:, 0].tolist() == pytest.approx(plain, abs=1e-5)


@cell("decoding")
def test_greedy_decoding_is_that_of_transformers(name: str, policy: Loaded) -> None:
    model, tokenizer = policy
    tokenizer.padding_side = "left"
    ids = [encode_prompt(tokenizer, prompt, 30) for prompt in PROMPTS]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    assert not batch["attention_mask"].all()

    def theirs(stops: list[int]) -> list[list[int]]:
        model.generation_config.eos_token_id = stops
        out = model.generate(
            **batch, do_sample=False, max_new_tokens=MAX_NEW, temperature=None, top_k=None, top_p=None
        )
        rows = out[:, batch["input_ids"].shape[1] :].tolist()
        ends = [next((t for t, i in enumerate(row) if i in stops), MAX_NEW - 1) for row in rows]
        return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]

    free = theirs([tokenizer.eos_token_id])
    stops = sorted({tokenizer.eos_token_id, free[0][3], free[2][-2]})
    expected = theirs(stops)
    rollout = rollout_of(policy, temperature=0.0)
    assert [list(row) for row in rollout.completion_ids] == expected
    assert {len(row) for row in expected} != {MAX_NEW}
    assert len({tuple(row) for row in expected}) > 1


@cell("decoding")
def test_log_probs_captured_while_sampling_are_those_of_a_fresh_pass(name: str, policy: Loaded) -> None:
    rollout = rollout_of(policy, temperature=0.8)
    fresh, _ = sequence_logprobs(policy[0], rollout.sequences, 0.8, 4)
    torch.testing.assert_close(rollout.sampled_logprob, fresh, rtol=0, atol=1e-4)
    assert len(set(rollout.completion_ids)) > 10


@cell("several EOS")
def test_every_id_that_ends_a_completion_does(name: str, policy: Loaded) -> None:
    model, tokenizer = policy
    published = model.generation_config.eos_token_id
    published = published if isinstance(published, list) else [published]
    assert set(eos_ids(model, tokenizer)) == {*published, tokenizer.eos_token_id}
    free = rollout_of(policy)
    ends = {free.completion_ids[0][2], free.completion_ids[4][5], tokenizer.eos_token_id}
    model.generation_config.eos_token_id = sorted(ends)
    rollout = rollout_of(policy)
    seen = set()
    for row, cut in zip(rollout.completion_ids, rollout.truncated.tolist(), strict=True):
        assert (row[-1] in ends) is not cut
        assert not ends & set(row[:-1])
        seen.add(row[-1])
    assert len(seen & ends) > 1 and rollout.truncated.any()


@cell("pad")
def test_pad_is_a_token_of_its_own(name: str, hub: Hub, policy: Loaded) -> None:
    model, tokenizer = policy
    assert tokenizer.pad_token_id not in (None, *eos_ids(model, tokenizer)) or name == "Qwen2"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    reference, _ = load_causal_lm("sft.path", str(hub(name)), CPU)
    rollout = rollout_of(policy)
    assert not full_kls(model, reference, rollout.sequences, 1.0, 4).any()


@cell(*ALL, "positions")
def test_a_row_longer_than_the_positions_is_refused(name: str, hub: Hub, scorer: RewardModel) -> None:
    assert max_positions(scorer.model) == POSITIONS
    fits: TokenPair = ([9] * (POSITIONS - 3), [8, 7, 6])
    longer: TokenPair = ([9] * (POSITIONS - 3), [8, 7, 6, 5])
    message = f"a row of {POSITIONS + 1} tokens is longer than the {POSITIONS} positions of the model"
    short: TokenPair = ([9], [8])
    with torch.no_grad():
        assert score_sequences(scorer.model, collate([fits, short], 3)).isfinite().all()
        with pytest.raises(RequestError, match=message):
            score_sequences(scorer.model, collate([short, longer], 3))
    if name in DECODERS:
        model, _ = load_causal_lm("model.path", str(hub(name)), CPU)
        assert sequence_logprobs(model, collate([fits], 3), 1.0, 1)[0].isfinite().all()
        with pytest.raises(RequestError, match=message):
            sequence_logits(model, collate([short, longer], 3))


@cell("positions")
def test_a_completion_that_may_outgrow_the_positions_is_refused(name: str, policy: Loaded) -> None:
    model, tokenizer = policy
    prompt = (9,) * 50
    batch = PromptBatch(("x",), (prompt,), (0,))
    room = POSITIONS - len(prompt)
    rollout = generate(model, tokenizer, batch, 2, Sampling(room), 0, 0)
    assert rollout.sequences.ids.shape[1] <= POSITIONS
    with pytest.raises(RequestError) as caught:
        generate(model, tokenizer, batch, 2, Sampling(room + 1), 0, 0)
    assert str(caught.value) == (
        f"rollout.max_new_tokens={room + 1}: expected at most {room}: the model has {POSITIONS} positions, "
        "and a prompt has 50 tokens"
    )


@cell(*ALL, "positions")
def test_long_texts_are_cut_as_the_reward_models_format_says(name: str, scorer: RewardModel) -> None:
    long = " ".join(["the film was good ."] * 50)
    scores = scorer.score([long], [long]).raw
    assert scores.isfinite().all()
    (row,) = [scorer.encode(long, long)]
    assert (len(row[0]), len(row[1])) == (20, MAX_NEW)


@cell("rows without token")
def test_an_id_without_a_token_is_in_no_distribution(name: str, tmp_path: Path) -> None:
    folder, extra = tmp_path / "model", 9
    DECODERS[name].write_lm(folder, extra_rows=extra)
    model, tokenizer = load_causal_lm("model.path", str(folder), CPU)
    plain = load_causal_lm("model.path", str(folder), CPU)[0]
    known = len(tokenizer)
    unknown = [*added_pad(tokenizer), *range(known, model.get_output_embeddings().weight.shape[0])]
    assert len(unknown) == extra  # one of them may have become the row of pad
    for one in (model, plain):  # random rows that outweigh all others, of either sign
        one.get_output_embeddings().weight.data[unknown] *= 30
    del plain.ids_without_token

    def mass(of: PreTrainedModel, rollout: Rollout) -> Tensor:
        with torch.no_grad():
            logits = sequence_logits(of, rollout.sequences)[rollout.sequences.attention_mask]
        return logits.float().softmax(-1)[:, unknown].sum(-1)

    rollout = rollout_of((model, tokenizer))
    assert mass(plain, rollout).mean() > 0.3  # they would have been sampled
    assert not mass(model, rollout).any()
    greedy = rollout_of((model, tokenizer), temperature=0.0)
    assert not {i for row in (*rollout.completion_ids, *greedy.completion_ids) for i in row} & set(unknown)
    assert {i for row in rollout_of((plain, tokenizer)).completion_ids for i in row} & set(unknown)
    # log-probs, entropy and KL are those of the distribution over tokens alone
    tokens = token_logprobs(model, rollout.sequences, 0.7)
    logits = sequence_logits(plain, rollout.sequences)[:, :-1].double() / 0.7
    logits[..., unknown] = -torch.inf
    logprob = F.log_softmax(logits, -1)
    expected = logprob.gather(-1, rollout.sequences.ids[:, 1:, None])[..., 0]
    entropy = torch.special.entr(logprob.exp()).sum(-1)
    torch.testing.assert_close(tokens.logprob[tokens.mask].double(), expected[tokens.mask], rtol=0, atol=2e-5)
    torch.testing.assert_close(tokens.entropy[tokens.mask].double(), entropy[tokens.mask], rtol=0, atol=2e-5)
    other = load_causal_lm("model.path", str(folder), CPU)[0]
    kl = full_kls(other, model, rollout.sequences, 1.0, 4)
    assert kl.isfinite().all() and (kl >= 0).all()
    torch.testing.assert_close(
        rollout.sampled_logprob, sequence_logprobs(model, rollout.sequences, 1.0, 4)[0], rtol=0, atol=1e-4
    )


@cell("rows without token")
def test_rows_without_a_token_learn_nothing_and_stay_in_the_saved_model(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    DECODERS[name].write_lm(folder, extra_rows=9)
    model, tokenizer = load_causal_lm("model.path", str(folder), CPU)
    head = model.get_output_embeddings()
    shape = head.weight.shape
    token_logprobs(model, collate(ROWS, 0)).sequence_logprob().sum().backward()
    assert head.weight.grad is not None
    without = [*added_pad(tokenizer), *range(len(tokenizer), shape[0])]
    with_token = sorted({*range(shape[0])} - {*without})
    if not model.config.tie_word_embeddings:  # the input's rows of pad, which ROWS are padded with, are the same
        assert not head.weight.grad[without].any()
    assert head.weight.grad[with_token].any() and not head.weight.grad[len(tokenizer) :].any()
    save_model(model, tokenizer, tmp_path / "saved")
    again, _ = load_causal_lm("sft.path", str(tmp_path / "saved"), CPU)
    assert again.get_output_embeddings().weight.shape == shape
    assert again.ids_without_token.tolist() == without


def added_pad(tokenizer: Any) -> list[int]:
    """The pad token, where it was added to a tokenizer that has none of its own: its row is untrained."""
    return [tokenizer.pad_token_id] if tokenizer.pad_token == "<|pad|>" else []


@cell("rows without token")
def test_a_reference_whose_adapter_is_off_has_the_same_tokens(name: str, tmp_path: Path) -> None:
    DECODERS[name].write_lm(tmp_path / "model", extra_rows=9)
    model, tokenizer = load_causal_lm("model.path", str(tmp_path / "model"), CPU)
    model.get_output_embeddings().weight.data[len(tokenizer) :] *= 30
    adapter = add_lora("peft", model, PeftSettings(name="lora", target_modules="all-linear"), "base", 0)
    rollout = rollout_of((model, tokenizer))
    assert max(max(row) for row in rollout.completion_ids) < len(tokenizer)
    assert not full_kls(model, adapter.off(), rollout.sequences, 1.0, 4).any()
    whole = adapter.merged()
    assert not full_kls(whole, model, rollout.sequences, 1.0, 4).any()


@cell("other tokenizers")
@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_a_reward_model_with_a_tokenizer_of_its_own_reads_the_text(name: str, kind: str, policy: Loaded) -> None:
    rollout = rollout_of(policy)
    scorer = reward_model(kind, max_prompt_tokens=24, max_completion_tokens=30)
    finished = [not cut for cut in rollout.truncated.tolist()]
    scores = scorer.score(rollout.prompts, rollout.completions, finished, batch_size=4)
    for i in (0, 5, 14):
        row = scorer.encode(rollout.prompts[i], rollout.completions[i], finished[i])
        assert row[0] == scorer.tokenizer(rollout.prompts[i])["input_ids"]
        with torch.no_grad():
            alone = float(score_sequences(scorer.model, collate([row], 0)))
        assert scores.raw[i].item() == pytest.approx(alone, abs=1e-5)


@cell("as reward model")
def test_a_classifier_over_a_copy_or_over_the_folder_is_one(name: str, hub: Hub, policy: Loaded) -> None:
    over_copy = classifier_from_lm(policy[0], 3)
    over_folder, _ = load_backbone_as_classifier("sft.path", str(hub(name)), CPU, 3)
    over_copy.score.load_state_dict(over_folder.score.state_dict())
    assert over_copy.config.pad_token_id == over_folder.config.pad_token_id
    with torch.no_grad():
        one, other = (score_sequences(model, collate(ROWS, 0)) for model in (over_copy, over_folder))
    torch.testing.assert_close(one, other, **CLOSE)
    assert one.std() > 0.01


def test_a_format_longer_than_the_positions_is_refused(tmp_path: Path) -> None:
    scorer = reward_model("distilbert", max_prompt_tokens=60, max_completion_tokens=5)
    assert max_positions(scorer.model) == 64
    scorer.save(tmp_path)
    with pytest.raises(RequestError, match="rows of up to 65 tokens, more than the model's 64 positions"):
        load_reward_model("rm.path", str(tmp_path), CPU)


def test_models_without_a_limit_have_none() -> None:
    config = type("Config", (), {"max_position_embeddings": -1})()
    assert max_positions(type("Model", (), {"config": config})()) is None  # XLNet's way to say it
