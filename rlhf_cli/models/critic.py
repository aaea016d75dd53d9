"""The critic of actor-critic algorithms: V(s_t) of the state before each token, beside the policy or on top of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.models.attention import takes_layouts
from rlhf_cli.models.causal import completion_states, forward, logprobs_of_states, token_logprobs
from rlhf_cli.ops.logprobs import TokenLogprobs, completion_logprobs, on_grid
from rlhf_cli.types import Sequences


class ValueHead(nn.Module):
    """A linear head on hidden states; zero at first, so that every value is 0 until something has been learned."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] to values float32 [...]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float())[..., 0]


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
        """Values float32 [N, L-1], 0 outside the completions; column t is of the state before token t + 1."""
        if takes_layouts(self.backbone):
            hidden = completion_states(self.backbone, sequences)
        else:
            hidden = _predicting(forward(self.backbone, sequences).last_hidden_state, sequences)
        return on_grid(self.head(hidden), sequences.completion_mask[:, 1:])


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
    if not isinstance(critic, SharedCritic):
        tokens = token_logprobs(policy, sequences, temperature)
        return tokens, None if critic is None else critic(sequences)
    if takes_layouts(policy):
        hidden = completion_states(policy, sequences)
        tokens = logprobs_of_states(policy, hidden, sequences, temperature)
    else:
        answer = forward(policy, sequences, output_hidden_states=True)
        hidden = _predicting(answer.hidden_states[-1], sequences)
        tokens = completion_logprobs(answer.logits, sequences, temperature)
    return tokens, on_grid(critic.head(hidden), tokens.mask)


def _predicting(hidden: Tensor, sequences: Sequences) -> Tensor:
    """Of states [N, L, H] those that a completion token is predicted from, [C, H], row by row."""
    return hidden[:, :-1][sequences.completion_mask[:, 1:]]
