"""How often a policy's step passes through the policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures_policy import policy_task
from transformers import PreTrainedTokenizerBase

from rlhf_cli.algos.raft import Raft
from rlhf_cli.algos.reinforce import Reinforce
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.algos.vanilla_pg import VanillaPg
from rlhf_cli.models import causal, critic
from rlhf_cli.models.packing import enable_layouts
from rlhf_cli.train.policy import PolicyTask


def gradients(task: PolicyTask) -> list[torch.Tensor]:
    batch = task.batch(0)
    for part in batch.micro_batches:
        task.loss(part, batch.normaliser).loss.backward()
    return [parameter.grad for parameter in task.model.parameters() if parameter.grad is not None]


def passes(task: PolicyTask, monkeypatch: pytest.MonkeyPatch) -> int:
    """Passes of the policy over whole rows in one step."""
    count = 0

    def counted(original: Any) -> Any:
        def states(model: Any, *arguments: Any) -> Any:
            nonlocal count
            count += model is task.policy
            return original(model, *arguments)

        return states

    original = causal.completion_states
    for module in (causal, critic):
        monkeypatch.setattr(module, "completion_states", counted(original))
    gradients(task)
    return count


@pytest.fixture
def make_task(make_llama: Any, word_tokenizer: PreTrainedTokenizerBase) -> Any:
    def build(algorithm: Any, **settings: Any) -> PolicyTask:
        model = make_llama()
        assert enable_layouts(model)
        return policy_task(model, word_tokenizer, algorithm, **settings)

    return build


def test_one_step_of_one_micro_batch_passes_once(make_task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes(make_task(Rloo(k=2)), monkeypatch) == 1


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (Rloo(k=2), {"micro_batch_size": 4}),
        (Rloo(k=2), {"micro_batch_tokens": 20}),
        (Rloo(k=2, num_epochs=2), {}),
        (Raft(k=2), {}),
    ],
    ids=["micro-batches", "micro-batches of tokens", "two epochs", "the best alone"],
)
def test_other_steps_ask_for_the_sampling_policy_first(
    algorithm: Any, settings: dict[str, Any], make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passes(make_task(algorithm, **settings), monkeypatch) > 1


@pytest.mark.parametrize(
    "algorithm", [Rloo(k=2), Reinforce(), VanillaPg()], ids=["rloo", "reinforce", "vanilla_pg"]
)
def test_the_gradient_is_that_of_two_passes(
    algorithm: Any, make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = gradients(make_task(algorithm))
    monkeypatch.setattr(type(algorithm), "learns_from_all", False)
    twice = gradients(make_task(algorithm))
    assert once and all(torch.equal(one, two) for one, two in zip(once, twice, strict=True))


def test_micro_batches_of_tokens_have_the_gradient_of_all_rows(make_task: Any) -> None:
    whole = gradients(make_task(Rloo(k=2)))
    task = make_task(Rloo(k=2), micro_batch_tokens=20)
    assert len(task.batch(0).micro_batches) > 2
    for one, other in zip(whole, gradients(make_task(Rloo(k=2), micro_batch_tokens=20)), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-4)
