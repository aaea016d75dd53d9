"""A world small enough to sum over every batch that can be drawn: expectations are exact, not sampled.

A policy over three tokens and an EOS, two prompts and at most two tokens: 13 completions a prompt. The policy is a
table of logits in float64, so nothing but the algorithm is in a comparison.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_cli.algos.base import BaselineState, OnlineAlgorithm
from rlhf_cli.ops.gae import token_rewards
from rlhf_cli.ops.kl import k1, kl_loss, shaped_reward
from rlhf_cli.ops.logprobs import TokenLogprobs
from rlhf_cli.settings import KlPlacement, KlSettings
from rlhf_cli.types import Experience, PolicyBatch, Sequences

NUM_PROMPTS, VOCAB, EOS, BETA = 2, 4, 3, 0.3
TOKENS = range(EOS)
PREFIXES: list[tuple[int, ...]] = [(), *((token,) for token in TOKENS)]
COMPLETIONS: list[tuple[int, ...]] = [(EOS,), *itertools.product(TOKENS, range(VOCAB))]
MAX_TOKENS = 2
MASK = torch.tensor([[t < len(completion) for t in range(MAX_TOKENS)] for completion in COMPLETIONS])
# The prefix that each token of a completion follows; what stands outside the mask is not read
STATES = torch.tensor(
    [[PREFIXES.index(completion[: min(t, len(completion) - 1)]) for t in range(2)] for completion in COMPLETIONS]
)


def random_table(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POLICY = random_table(0, NUM_PROMPTS, len(PREFIXES), VOCAB)
REFERENCE = POLICY + 0.7 * random_table(1, NUM_PROMPTS, len(PREFIXES), VOCAB)
START = BaselineState()
# a mean that is not 0, so that baselines matter
REWARD = 1.5 + random_table(2, NUM_PROMPTS, len(COMPLETIONS))
REWARD_K1 = KlSettings()


def token_logprobs(table: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(y_t|x, y_<t) of every token of every completion of every prompt, [2, 13, 2]; 0 outside the mask."""
    log_probability = torch.log_softmax(table / temperature, dim=-1)
    rows = []
    for completion in COMPLETIONS:
        steps = [log_probability[:, PREFIXES.index(completion[:t]), token] for t, token in enumerate(completion)]
        rows.append(torch.stack([*steps, *[torch.zeros_like(steps[0])] * (MAX_TOKENS - len(steps))], dim=-1))
    return torch.stack(rows, dim=1)


def log_distribution(table: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(y|x) of every completion of every prompt, [2, 13]."""
    return token_logprobs(table, temperature).sum(-1)


def _tree_kl(q: Tensor, p: Tensor, prefix: tuple[int, ...] = ()) -> Tensor:
    """KL(q||p) of what follows a prefix: that of the next token, and the KLs behind each, as likely as the token is."""
    if len(prefix) == MAX_TOKENS or prefix[-1:] == (EOS,):
        return torch.zeros((), dtype=torch.float64)
    log_q = torch.log_softmax(q[PREFIXES.index(prefix)], -1)
    log_p = torch.log_softmax(p[PREFIXES.index(prefix)], -1)
    behind = torch.stack([_tree_kl(q, p, (*prefix, token)) for token in range(VOCAB)])
    return (log_q.exp() * (log_q - log_p + behind)).sum()


def reward_gradient(reward: Tensor = REWARD, temperature: float = 1.0) -> Tensor:
    """Gradient of the mean over prompts of E[r]."""
    table = POLICY.clone().requires_grad_()
    objective = (log_distribution(table, temperature).exp() * reward).sum() / NUM_PROMPTS
    return torch.autograd.grad(objective, table)[0]


def kl_gradient(direction: str = "reverse", temperature: float = 1.0, reference: Tensor = REFERENCE) -> Tensor:
    """Gradient of the mean over prompts of KL(pi||ref), or of the forward KL(ref||pi), without samples in it."""
    table = POLICY.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for prompt in range(NUM_PROMPTS):
        policy, ref = table[prompt] / temperature, reference[prompt] / temperature
        total = total + (_tree_kl(policy, ref) if direction == "reverse" else _tree_kl(ref, policy))
    return torch.autograd.grad(total / NUM_PROMPTS, table)[0]


def true_gradient(beta: float, reward: Tensor = REWARD, temperature: float = 1.0) -> Tensor:
    """Gradient of the mean over prompts of E[r] - beta * KL(pi||ref), without a log-prob of a completion in it."""
    return reward_gradient(reward, temperature) - beta * kl_gradient("reverse", temperature)


def exact_values(beta: float) -> Tensor:
    """V(s) of every prefix, [2, 4]: the expected sum of the token rewards from there on."""
    log_q, log_p = (torch.log_softmax(table, -1) for table in (POLICY, REFERENCE))
    values = torch.zeros(NUM_PROMPTS, len(PREFIXES), dtype=torch.float64)
    for prompt in range(NUM_PROMPTS):
        for prefix in reversed(PREFIXES):  # the longer ones first
            row = PREFIXES.index(prefix)
            for token in range(VOCAB):
                after = (*prefix, token)
                paid = -beta * (log_q[prompt, row, token] - log_p[prompt, row, token])
                if after in COMPLETIONS:
                    paid = paid + REWARD[prompt, COMPLETIONS.index(after)]
                else:
                    paid = paid + values[prompt, PREFIXES.index(after)]
                values[prompt, row] += log_q[prompt, row, token].exp() * paid
    return values


def at_tokens(values: Tensor) -> Tensor:
    """Values of prefixes, [2, 4], where the tokens that follow them are, [2, 13, 2]."""
    return values[:, STATES]


def batches(num_prompts: int, k: int) -> Iterator[tuple[list[int], list[int]]]:
    """Every batch: the prompt and the completion of each row, prompt-major."""
    for prompts in itertools.product(range(NUM_PROMPTS), repeat=num_prompts):
        x = [prompt for prompt in prompts for _ in range(k)]
        for y in itertools.product(range(len(COMPLETIONS)), repeat=num_prompts * k):
            yield x, list(y)


def _sequences(y: list[int]) -> Sequences:
    """Rows of which an algorithm can see no more than the masks."""
    counts = torch.cat([torch.zeros(len(y), 1, dtype=torch.bool), MASK[y]], dim=1)
    return Sequences(counts.long(), counts, counts)


def expected_gradient(
    algorithm: OnlineAlgorithm,
    num_prompts: int = 1,
    state: BaselineState = START,
    reward: Tensor = REWARD,
    table: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref: Tensor | None = None,
    kl: KlSettings = REWARD_K1,
    values: Tensor | None = None,
    normalised_by: str = "sequences",
) -> Tensor:
    """Minus the expected gradient of the loss, over all draws of prompts and of k completions for each.

    Args:
        algorithm: what is looked at; the KL acts as `PolicyTask` lets it act.
        num_prompts: of a batch.
        state: of a moving baseline.
        reward: [2, 13].
        table: of the policy, with gradient.
        logprobs: [2, 13, 2], a function of the table.
        ref: [2, 13, 2].
        kl: where it acts.
        values: V at every token of every completion, [2, 13, 2]; see `at_tokens`.
        normalised_by: "sequences" or "tokens" of what a batch learns from. How many tokens there are is random, and
            an expectation of ratios is none of the objective: a sum over a fixed number, sequences, is.
    """
    table = POLICY.clone().requires_grad_() if table is None else table
    logprobs = token_logprobs(table) if logprobs is None else logprobs
    ref = token_logprobs(REFERENCE) if ref is None else ref
    in_reward = kl.placement is KlPlacement.reward
    beta, estimator = algorithm.beta if in_reward else 0.0, kl.estimator.value
    total = torch.zeros((), dtype=logprobs.dtype)
    for x, y in batches(num_prompts, algorithm.k):
        tokens = TokenLogprobs(logprobs[x, y], torch.zeros_like(logprobs[x, y]), MASK[y])
        ref_logprob, old = ref[x, y].sum(-1), tokens.sequence_logprob().detach()
        r = reward[x, y].to(old.dtype)
        experience = Experience(r, shaped_reward(r, old, ref_logprob, beta, estimator))
        value = None
        if algorithm.acts_on_tokens:
            assert values is not None
            value = values[x, y]
            paid = token_rewards(r, k1(tokens.logprob.detach(), ref[x, y]), tokens.mask, beta)
            experience = Experience(r, experience.shaped_reward, tokens.mask, paid, value)
        result = algorithm.advantages(experience, state)
        batch = PolicyBatch(
            _sequences(y), old, ref_logprob, result.advantage, tokens.logprob.detach(), value, result.value_target
        )
        if result.keep is not None:
            batch = batch[result.keep]
            tokens = TokenLogprobs(tokens.logprob[result.keep], tokens.entropy, tokens.mask[result.keep])
        normaliser = float(len(batch) if normalised_by == "sequences" else tokens.mask.sum())
        loss = algorithm.loss(tokens, value, batch, normaliser).loss
        if not in_reward:
            loss = loss + kl_loss(
                estimator, tokens.sequence_logprob(), batch.ref_logprob, algorithm.beta, normaliser
            )
        total = total + (old.sum().exp() / NUM_PROMPTS**num_prompts) * loss
    return -torch.autograd.grad(total, table)[0]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=0, atol=1e-12), (found - expected).abs().max()
