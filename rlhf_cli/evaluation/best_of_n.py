"""Best-of-n sampling: what the best of n samples by a reward model (the proxy) is worth, from N > n samples.

The estimator of Nakano et al. 2021 (WebGPT, arXiv:2112.09332, appendix I), which Gao et al. 2022 (arXiv:2210.10760)
use as well: instead of drawing n samples many times, average over all subsets of size n of N samples. A weight for each
rank does that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.dataset import GoldReward
from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.evaluation.statistics import Bootstrap, Estimate
from rlhf_cli.rewards.model import Scorer
from rlhf_cli.rollout.engine import Engine, Sampling
from rlhf_cli.train.precision import Precision
from rlhf_cli.types import Prompt

Column = NDArray[np.float64]


@dataclass(frozen=True)
class BestOf:
    """What the best of n samples is worth, averaged over prompts."""

    n: int
    kl: float  # nats, of best-of-n to the policy that sampled
    proxy: Estimate  # of the reward that chooses
    gold: Estimate | None  # true reward of what it chooses, where the data knows it


@dataclass(frozen=True)
class Samples:
    """N completions of each of P prompts, and what they are worth."""

    proxy: Column  # [P, N], standardised
    gold: Column | None  # [P, N]


def best_of_n(proxy: Column, value: Column, n: int) -> Column:
    """E[value of the sample with the highest proxy among n], estimated without bias from N samples of each prompt.

    With the samples in ascending order of the proxy, sample i (from 1) is the best of C(i-1, n-1) of the C(N, n)
    subsets of size n:

        sum_i C(i-1, n-1) / C(N, n) * value_i

    Samples of equal proxy share their weights equally, as if one of the tied were chosen at random. With n = 1 it is
    the mean, with n = N the value of the best. Nakano et al. 2021, appendix I.

    Example: proxies 0, 1, 2 with values 5, 7, 3 and n = 2: the best of {0, 1} is worth 7, that of the two other
    subsets 3, hence 13/3.

    Args:
        proxy: what chooses [P, N].
        value: what is averaged [P, N]; `proxy` itself for the expected proxy.
        n: from 1 to N.

    Returns:
        One estimate a prompt [P].

    Raises:
        ValueError: shapes differ, or n is not from 1 to N.
    """
    if proxy.ndim != 2 or proxy.shape != value.shape:
        raise ValueError(f"expected two tables [P, N], got shapes {proxy.shape} and {value.shape}")
    num_samples = proxy.shape[1]
    if not 1 <= n <= num_samples:
        raise ValueError(f"n={n}: expected a number from 1 to the {num_samples} samples of a prompt")
    weights = _rank_weights(num_samples, n)
    return np.array([_tied(row, weights) @ values for row, values in zip(proxy, value, strict=True)])


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n, nats: KL of best-of-n to the policy that sampled.

    Stiennon et al. 2020, appendix G.3. Exact where no two samples are equal, else an upper bound (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, ... up to `largest`, which is always among them."""
    powers = [2**i for i in range(largest.bit_length()) if 2**i <= largest]
    return powers if powers[-1] == largest else [*powers, largest]


def sample_and_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: Scorer,
    gold: GoldReward | None,
    prompts: Sequence[Prompt],
    max_prompt_tokens: int,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    precision: Precision,
) -> Samples:
    """Draws N = `num_samples` completions of each prompt and scores them, a few prompts at a time."""
    at_once = max(1, sampling.max_rows // num_samples)
    engine, proxy, golds = Engine(model), [], []
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        batch = prompt_batch(tokenizer, part, range(start, start + len(part)), max_prompt_tokens)
        with precision.autocast():
            rollout = engine.generate(tokenizer, batch, num_samples, sampling, seed, 0)
            scores = reward_model.score_rollout(rollout)
        proxy.append(scores.reward.double().numpy().reshape(-1, num_samples))
        if gold is not None:
            pairs = zip(rollout.prompts, rollout.completions, strict=True)
            golds.append(np.array([gold(*pair) for pair in pairs]).reshape(-1, num_samples))
    return Samples(np.concatenate(proxy), np.concatenate(golds) if golds else None)


def summarise(samples: Samples, largest: int, num_resamples: int, seed: int) -> list[BestOf]:
    """Proxy and gold of the best of 1, 2, 4, ... `largest`, with intervals by bootstrap over prompts."""
    bootstrap = Bootstrap(len(samples.proxy), num_resamples, seed)

    def of(n: int) -> BestOf:
        proxy = bootstrap.mean(best_of_n(samples.proxy, samples.proxy, n))
        gold = None if samples.gold is None else bootstrap.mean(best_of_n(samples.proxy, samples.gold, n))
        return BestOf(n, best_of_n_kl(n), proxy, gold)

    return [of(n) for n in sizes(largest)]


def _rank_weights(num_samples: int, n: int) -> Column:
    """C(i-1, n-1) / C(N, n) for i = 1..N, through logarithms: the binomials themselves overflow."""
    i = np.arange(n, num_samples + 1)
    log_total = _log_binomial(np.array([num_samples]), n)
    return np.concatenate([np.zeros(n - 1), np.exp(_log_binomial(i - 1, n - 1) - log_total)])


def _log_binomial(top: NDArray[np.int64], bottom: int) -> Column:
    return gammaln(top + 1) - gammaln(bottom + 1) - gammaln(top - bottom + 1)


def _tied(proxy: Column, weights: Column) -> Column:
    """Weights of the samples in their own order; those of equal proxy get the mean of their ranks' weights."""
    _, group, count = np.unique(proxy, return_inverse=True, return_counts=True)
    order = np.argsort(proxy, kind="stable")
    return (np.bincount(group[order], weights=weights) / count)[group]
