"""The anchor: what the KL in a policy's reward is measured to, where that is not the fixed reference.

    anchor <- (1 - mu) * anchor + mu * policy     after every optimizer step

Ramé et al. 2024 (WARP, arXiv 2406.16768), the exponential moving average of a member's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.ops.merging import ema_update_


class EmaAnchor:
    """A model whose weights follow the policy's."""

    def __init__(
        self, model: PreTrainedModel, mu: float, policy_weights: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        """Starts where the policy does.

        Args:
            model: a copy of the policy at its start; its weights change from now on.
            mu: share of the policy in each update, from 0 (a fixed anchor) to 1 (the policy itself).
            policy_weights: gives the policy's parameters now, under the names that `model` has for its own.
        """
        self.model = model.eval().requires_grad_(False)
        self.mu = mu
        self._policy_weights = policy_weights

    @torch.no_grad()
    def update(self) -> None:
        """One step after the policy."""
        ema_update_(self.weights(), self._policy_weights(), self.mu)

    def weights(self) -> dict[str, Tensor]:
        """The anchor's own parameters; what a checkpoint has of it."""
        return dict(self.model.named_parameters())
