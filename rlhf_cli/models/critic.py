"""The critic of actor-critic algorithms: V(s_t) of the state before each token, beside the policy or on top of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.models.causal import forward, token_logprobs
from rlhf_cli.ops.logprobs import TokenLogprobs, completion_logprobs
from rlhf_cli.types import Sequences


class ValueHead(nn.Module):
    """A linear head on hidden states; zero at first, so that every value is 0 until something has been learned."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, L, D] to values float32 [N, L-1]; column t is the state before token t + 1."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden[:, :-1].float())[..., 0]


class SharedCritic(nn.Module):
    """A value head on the policy's own last hidden states: the value loss trains the policy's backbone as well."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.head = ValueHead(policy.config.hidden_size).to(policy.device)


class SeparateCritic(nn.Module):
    """A value head on a backbone of its own.

    Args:
        classifier: a sequence classifier; its backbone is taken, its head is not.
    """

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = classifier.base_model
        self.head = ValueHead(classifier.config.hidden_size).to(classifier.device)

    def forward(self, sequences: Sequences) -> Tensor:
        """Values float32 [N, L-1]."""
        return self.head(forward(self.backbone, sequences).last_hidden_state)


Critic = SharedCritic | SeparateCritic


class ActorCritic(nn.Module):
    """Policy and critic as one module: what is trained, counted and kept in checkpoints."""

    def __init__(self, policy: PreTrainedModel, critic: Critic) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic


def policy_outputs(
    policy: PreTrainedModel, critic: Critic | None, sequences: Sequences, temperature: float
) -> tuple[TokenLogprobs, Tensor | None]:
    """Log-probs of the completion tokens and, where there is a critic, values float32 [N, L-1]; both with gradient."""
    if isinstance(critic, SharedCritic):
        answer = forward(policy, sequences, output_hidden_states=True)
        return completion_logprobs(answer.logits, sequences, temperature), critic.head(answer.hidden_states[-1])
    tokens = token_logprobs(policy, sequences, temperature)
    return tokens, None if critic is None else critic(sequences)
