"""Decoding by layout: nothing that only makes it fast changes a token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures_architectures import DECODERS
from fixtures_models import byte_tokenizer, seeded
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_cli.data.tokenise import collate
from rlhf_cli.models.attention import ATTENTION
from rlhf_cli.models.causal import sequence_logprobs
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.settings import PeftSettings
from rlhf_cli.rollout import cache, engine
from rlhf_cli.rollout.decoding import Decoding
from rlhf_cli.rollout.engine import Engine, Sampling, why_plain
from rlhf_cli.rollout.tuning import CPU, CUDA, Tuning
from rlhf_cli.types import PromptBatch, Rollout

PROMPTS = {7: (30,), 3: tuple(range(40, 60)), 9: (33, 44, 55), 1: (70, 71, 72, 73, 74), 4: tuple(range(90, 97))}
K, MAX_NEW = 3, 14
TUNINGS = {
    "as on a CPU": CPU,
    "as on a GPU": replace(CUDA, graphs=False),
    "one group": replace(CPU, group_bytes=1e12),
    "a group each": replace(CPU, group_bytes=0.0),
    "no rounding": replace(CPU, column_multiple=1),
    "late, with few sizes": Tuning(16, 4, 0.5, 0.0, 5, False),
    "later than the end": replace(CPU, lag=100),
}


def lm(name: str, eos: list[int] | None = None, **more: Any) -> PreTrainedModel:
    """A small random model that takes layouts."""
    architecture = DECODERS[name]
    config = architecture.config(byte_tokenizer(), **more)
    model: PreTrainedModel = seeded(AutoModelForCausalLM.from_config, config, 1)
    model.set_attn_implementation(ATTENTION)
    model.generation_config.eos_token_id = eos or list(
        range(0, 300, 12)
    )  # so many that rows end all over the place
    assert why_plain(model) is None
    return model


def rollout_of(
    model: PreTrainedModel,
    tuning: Tuning = CPU,
    prompts: dict[int, tuple[int, ...]] = PROMPTS,
    k: int = K,
    max_new: int = MAX_NEW,
    **sampling: Any,
) -> Rollout:
    batch = PromptBatch(tuple(map(str, prompts)), tuple(prompts.values()), tuple(prompts))
    return Engine(model, tuning).generate(byte_tokenizer(), batch, k, Sampling(max_new, **sampling), 5, 2)


def by_row(rollout: Rollout) -> dict[tuple[int, int], tuple[int, ...]]:
    keys = zip(rollout.prompt_index.tolist(), rollout.sample_index.tolist(), strict=True)
    return dict(zip(keys, rollout.completion_ids, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [*DECODERS, "Llama with 2 of 4 key heads"])
def test_greedy_is_that_of_transformers(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2} if name not in DECODERS else {}
    kind = DECODERS[name.split()[0]]
    config = kind.config(byte_tokenizer())
    for key, value in sizes.items():
        setattr(config, key, value)
    model = seeded(AutoModelForCausalLM.from_config, config, 1)
    model.generation_config.eos_token_id = [5, 290]
    expected = []
    for prompt in PROMPTS.values():
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW)
        expected.append(tuple(out[0, len(prompt) :].tolist()))
    model.set_attn_implementation(ATTENTION)
    if fused:
        monkeypatch.setattr(cache, "attend_by_products", cache.attend_fused)
    for tuning in (CPU, TUNINGS["a group each"], TUNINGS["one group"]):
        assert rollout_of(model, tuning, k=1, temperature=0.0).completion_ids == tuple(expected)
    assert len(set(expected)) > 1


@pytest.mark.parametrize("name", list(DECODERS))
def test_captured_log_probs_are_those_of_a_fresh_pass(name: str) -> None:
    model = lm(name, [5])
    rollout = rollout_of(model, temperature=0.8)
    fresh, _ = sequence_logprobs(model, rollout.sequences, 0.8, 4)
    torch.testing.assert_close(rollout.sampled_logprob, fresh, rtol=0, atol=1e-4)
    assert len(set(rollout.completion_ids)) > 10


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral"])
def test_no_size_changes_a_token(name: str) -> None:
    model = lm(name)
    expected = rollout_of(model, CPU)
    lengths = {len(row) for row in expected.completion_ids}
    assert len(lengths) > 4 and 0 < int(expected.truncated.sum()) < len(expected)
    for what, tuning in TUNINGS.items():
        found = rollout_of(model, tuning)
        assert found.completion_ids == expected.completion_ids, what
        torch.testing.assert_close(found.sampled_logprob, expected.sampled_logprob, rtol=0, atol=1e-4)
    for limits in ({"max_rows": 1}, {"max_rows": 7}, {"max_tokens": 1}, {"max_tokens": 150}):
        assert rollout_of(model, **limits).completion_ids == expected.completion_ids, limits


def test_no_other_row_changes_a_token() -> None:
    model = lm("Llama")
    expected = by_row(rollout_of(model))
    alone = [by_row(rollout_of(model, prompts={i: ids})) for i, ids in PROMPTS.items()]
    assert {key: row for rows in alone for key, row in rows.items()} == expected
    backwards = by_row(rollout_of(model, prompts=dict(reversed(PROMPTS.items()))))
    assert backwards == expected
    more = by_row(rollout_of(model, k=K + 2))
    assert {key: more[key] for key in expected} == expected


def test_max_tokens_bounds_what_is_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm("Llama")
    shapes = []
    plain = Decoding.__init__

    def spy(self: Decoding, *args: Any) -> None:
        shapes.append(args[2].groups)
        plain(self, *args)

    monkeypatch.setattr(Decoding, "__init__", spy)
    rollout_of(model, replace(CPU, column_multiple=1, group_bytes=0.0), max_tokens=130)
    assert [sum(rows for rows, _ in groups) for groups in shapes] == [3, 3, 6, 3]
    assert all(sum(rows * columns for rows, columns in groups) <= 130 for groups in shapes[:1] + shapes[2:])


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=list(TUNINGS))
def test_every_row_finished_or_one_token_alone(tuning: Tuning) -> None:
    every = lm("GPT-2", list(range(300)))
    rollout = rollout_of(every, tuning)
    assert {len(row) for row in rollout.completion_ids} == {1} and not rollout.truncated.any()
    model = lm("GPT-2")
    one = rollout_of(model, tuning, max_new=1)
    full = rollout_of(model, tuning)
    assert one.completion_ids == tuple(row[:1] for row in full.completion_ids)
    short = rollout_of(model, tuning, max_new=2)
    assert short.completion_ids == tuple(row[:2] for row in full.completion_ids)


def test_a_row_may_use_the_last_of_the_positions() -> None:
    model = lm("GPT-2", [5])
    prompts = {0: tuple(range(9, 59)), 1: (9,)}
    rollout = rollout_of(model, replace(CUDA, graphs=False), prompts)
    fresh, _ = sequence_logprobs(model, rollout.sequences, 1.0, 4)
    assert rollout.sequences.ids.shape[1] == 64
    torch.testing.assert_close(rollout.sampled_logprob, fresh, rtol=0, atol=1e-4)


def test_finished_rows_cost_nothing() -> None:
    model = lm("Llama")
    sizes = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rollout = rollout_of(model)
    handle.remove()
    alive = [sum(len(row) > t for row in rollout.completion_ids) for t in range(1, MAX_NEW)]
    assert sizes == [sum(map(len, PROMPTS.values())), *(count for count in alive if count)]


class NoHostSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        assert name not in [one.rstrip("_") for one in self.NAMES], name
        if name in ("index", "index_put"):
            assert all(one is None or one.dtype != torch.bool for one in args[1]), "a mask as an index"
        if name in ("_to_copy", "copy") and args:
            assert args[0].device == (args[1] if name == "copy" else args[0]).device
        return func(*args, **(kwargs or {}))


@contextmanager
def steps_without_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    counted: list[int] = []
    step = Decoding.step

    def watched(self: Decoding) -> None:
        counted.append(1)
        with NoHostSync():
            step(self)

    monkeypatch.setattr(Decoding, "step", watched)
    yield counted


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", list(DECODERS))
def test_a_step_never_waits_for_the_host(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        monkeypatch.setattr(cache, "attend_by_products", cache.attend_fused)
    model = lm(name)
    expected = rollout_of(model).completion_ids
    with steps_without_sync(monkeypatch) as counted:
        assert rollout_of(model).completion_ids == expected
    assert len(counted) == max(map(len, expected)) - 1


def test_the_guard_against_waiting_sees_it() -> None:
    values = torch.ones(3)
    for waits in (lambda: values.sum().item(), lambda: values[values > 0], lambda: values.nonzero()):
        with pytest.raises(AssertionError), NoHostSync():
            waits()


def test_memory_is_used_again_as_new() -> None:
    """What a GPU does from rollout to rollout: the same tensors, with whatever the last one left in them."""
    model = lm("Llama")
    kept: dict[Any, Decoding] = {}
    reused = Engine(model, replace(CUDA, graphs=False))
    make = reused._decoding

    def keep(decoder: PreTrainedModel, shape: Any) -> Decoding:
        return kept.setdefault(shape, kept.get(shape) or make(decoder, shape))

    reused._decoding = keep  # type: ignore[method-assign]
    batch = PromptBatch(tuple("abcde"), tuple(PROMPTS.values()), tuple(PROMPTS))
    found = []
    for step in (2, 0, 2):
        found.append(reused.generate(byte_tokenizer(), batch, K, Sampling(MAX_NEW), 5, step).completion_ids)
    assert len(kept) == 1
    assert found[0] == found[2] == rollout_of(model).completion_ids != found[1]


def test_an_adapter_is_decoded_with_a_merged_copy() -> None:
    model = lm("Llama")
    add_lora("peft", model, PeftSettings(name="lora", r=3), "base", seed=2)
    own = Engine(model, CPU)
    batch = PromptBatch(tuple("abcde"), tuple(PROMPTS.values()), tuple(PROMPTS))
    arguments = (byte_tokenizer(), batch, K, Sampling(MAX_NEW), 5, 2)
    untrained = own.generate(*arguments)
    assert untrained.completion_ids == rollout_of(lm("Llama")).completion_ids
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    trained = own.generate(*arguments)
    assert trained.completion_ids != untrained.completion_ids
    fresh, _ = sequence_logprobs(model, trained.sequences, 1.0, 4)
    torch.testing.assert_close(trained.sampled_logprob, fresh, rtol=0, atol=1e-4)


def test_under_autocast_log_probs_are_those_of_autocast() -> None:
    model = lm("Llama", [5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = rollout_of(model)
        fresh, _ = sequence_logprobs(model, rollout.sequences, 1.0, 4)
    exact, _ = sequence_logprobs(model, rollout.sequences, 1.0, 4)
    assert 0 < (fresh - exact).abs().max() < 1.0
    assert (rollout.sampled_logprob - fresh).abs().mean() < 1.5 * (fresh - exact).abs().mean()


def test_one_warning_where_a_model_takes_no_layout(caplog: pytest.LogCaptureFixture) -> None:
    engine._warn_once.cache_clear()
    model = lm("Llama")
    expected = rollout_of(model).completion_ids
    with caplog.at_level(logging.WARNING):
        assert not caplog.records
        model.set_attn_implementation("sdpa")
        assert rollout_of(model).completion_ids == rollout_of(model).completion_ids == expected
        (record,) = caplog.records
        assert "LlamaForCausalLM" in record.message and "slower" in record.message
        model.set_attn_implementation(ATTENTION)
        model.config.final_logit_softcapping = 30.0
        rollout_of(model)
        assert "final_logit_softcapping" in caplog.records[-1].message
    assert len(caplog.records) == 2


def test_padding_of_the_result_is_on_the_right() -> None:
    rollout = rollout_of(lm("Llama"))
    rows = [(list(PROMPTS[i]), list(ids)) for (i, _), ids in by_row(rollout).items()]
    assert torch.equal(rollout.sequences.ids, collate(rows, byte_tokenizer().pad_token_id).ids)
