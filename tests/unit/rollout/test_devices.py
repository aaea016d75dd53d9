"""What decoding does on a GPU beside what it does here: the same tests run on both, `-m cuda` on a GPU alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from fixtures_architectures import DECODERS
from fixtures_models import byte_tokenizer, seeded
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_cli.models.attention import ATTENTION
from rlhf_cli.models.causal import sequence_logprobs
from rlhf_cli.rollout import decoding, graphs
from rlhf_cli.rollout.engine import Engine, Sampling
from rlhf_cli.rollout.tuning import CPU, CUDA
from rlhf_cli.types import PromptBatch, Rollout

PROMPTS = ((30,), tuple(range(40, 60)), (33, 44, 55), (70, 71, 72, 73, 74), tuple(range(90, 97)))
BATCH = PromptBatch(tuple(map(str, range(5))), PROMPTS, tuple(range(5)))
EAGER = replace(CUDA, graphs=False)
NUM_ROLLOUTS = 4  # a shape is called, captured, replayed, and replayed with other weights
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def lm(name: str, device: str) -> PreTrainedModel:
    model: PreTrainedModel = seeded(AutoModelForCausalLM.from_config, DECODERS[name].config(byte_tokenizer()), 1)
    model.set_attn_implementation(ATTENTION)
    model.generation_config.eos_token_id = list(range(0, 300, 12))  # so many that rows end all over the place
    return model.to(device)


def roll_out(engine: Engine, step: int) -> Rollout:
    return engine.generate(byte_tokenizer(), BATCH, 4, Sampling(14), 5, step)


@torch.no_grad()
def move_weights(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.02)


@contextmanager
def synchronisation_is_an_error(device: str) -> Iterator[None]:
    """Of the host with a GPU, by a kernel's result; events may be waited for."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(DECODERS))
def test_captured_steps_draw_the_tokens_of_called_ones(name: str, device: str) -> None:
    model = lm(name, device)
    captured, called = Engine(model, CUDA), Engine(model, CPU)
    seen = set()
    for step in range(NUM_ROLLOUTS):
        one, other = roll_out(captured, step % 2), roll_out(called, step % 2)
        assert one.completion_ids == other.completion_ids
        torch.testing.assert_close(one.sampled_logprob, other.sampled_logprob, rtol=0, atol=1e-4)
        seen.add(one.completion_ids)
        move_weights(model)
    assert len(seen) == NUM_ROLLOUTS  # of two rollouts with the same noise, the weights make the difference
    assert captured._capturing.enabled is (device == "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(DECODERS))
def test_captured_log_probs_are_those_of_a_fresh_pass(name: str, device: str) -> None:
    model = lm(name, device)
    engine = Engine(model, CUDA)
    for step in range(NUM_ROLLOUTS):
        rollout = roll_out(engine, step)
        fresh, _ = sequence_logprobs(model, rollout.sequences, 1.0, 4)
        torch.testing.assert_close(rollout.sampled_logprob, fresh.cpu(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_does_not_wait_for_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, steps = Engine(lm("Llama", device), EAGER), 0
    step_itself = decoding.Decoding.step

    def step(self: decoding.Decoding) -> None:
        nonlocal steps
        steps += 1
        with synchronisation_is_an_error(device):
            step_itself(self)

    roll_out(engine, 0)  # what is made once may wait
    monkeypatch.setattr(decoding.Decoding, "step", step)
    roll_out(engine, 0)
    assert steps > 5


@pytest.mark.parametrize("device", DEVICES)
def test_after_a_capture_that_failed_it_goes_on_without(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm("Llama", device)
    expected = [roll_out(Engine(model, EAGER), step).completion_ids for step in range(NUM_ROLLOUTS)]
    engine, captures = Engine(model, CUDA), 0
    step_itself = decoding.Decoding.step

    def step(self: decoding.Decoding) -> None:
        nonlocal captures
        step_itself(self)
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            captures += 1
            self._counts.sum().item()  # a graph cannot hold what waits for the device

    monkeypatch.setattr(decoding.Decoding, "step", step)
    found = [roll_out(engine, step).completion_ids for step in range(NUM_ROLLOUTS)]
    assert found == expected
    assert captures == (device == "cuda") and not engine._capturing.enabled


@pytest.mark.parametrize("device", DEVICES)
def test_counts_come_as_late_as_asked_for_and_whole(device: str) -> None:
    counts, sent = graphs.LateCounts(2, 3, torch.device(device)), []
    on_device = torch.zeros(2, dtype=torch.long, device=device)
    for number in range(10):
        on_device.add_(torch.tensor([1, 2], device=device))
        counts.note(on_device)
        sent.append([number + 1, 2 * (number + 1)])
        assert counts.read() == (sent[number - 3] if number >= 3 else None)
