"""TRL's trainers and Hugging Face's `generate` on the same weights, texts and lengths.

Fairness:

- A trainer's step is timed inside its own `train()`, from one `on_step_end` to the next: fetching and collating rows,
  generation, scoring, loss, backward, clipping, optimizer, scheduler. Loading, mapping the data set, logging and saving
  are not in it. Ours runs while the trainer waits inside that callback.
- Both sides see the same prompts or pairs in every step, make the same number of new tokens, and use fused AdamW in
  float32 with one learning rate, one clip and no weight decay. TRL's rewards come from the same classifier; it
  loads its reference from the folder of the same weights.
- Settings, each a few flags on top of what defines the work (batch, lengths, k, beta, learning rate):
    default   TRL's own flags: bf16 autocast over float32 weights, gradient checkpointing
    equal     the same numerics as ours: bf16 autocast over float32 weights, no gradient checkpointing
    fp32      the same in float32
    best      the fastest of all candidates below, found in the same run; the JSON has its flags, and the times of all
  Where a processor has no bf16 instructions (its bf16 products are slower than a third of its float32 ones), bf16 is
  left out on both sides, `equal` is float32, and TRL's default flags are not measured, which would be no fair match.
- TRL has no padding-free path (1.16 switches it off) and Liger's kernels are Triton's: candidates of a GPU only.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from turns import Peer, peer_times

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Flags:
    """One way to run a peer."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)  # of its config, or of `generate`
    weights: str = "float32"  # dtype that the models are loaded in
    micro_share: int = 1  # the batch goes through in this many parts
    autocast: bool = False  # of `generate`: under bf16 autocast

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shown = {"name": self.name, "options": dict(self.options), "weights": self.weights}
        if self.micro_share > 1:
            shown["parts_of_batch"] = self.micro_share
        if self.autocast:
            shown["autocast"] = "bfloat16"
        return shown


def load_policy(folder: Path, weights: str) -> LlamaForCausalLM:
    """The saved policy."""
    return LlamaForCausalLM.from_pretrained(folder / "policy", dtype=DTYPES[weights])


@dataclass
class Tried:
    """Candidates with their times, and the fastest."""

    seconds: dict[str, float | str] = field(default_factory=dict)  # median, or why there is none
    best: Flags | None = None
    best_s: float = float("inf")

    def see(self, flags: Flags, make: Callable[[Flags], Peer], warm_up: int, runs: int) -> None:
        """Measures one; one that does not run is noted and left out."""
        try:
            median = statistics.median(peer_times(make(flags), warm_up, runs))
        except Exception as error:  # whatever a library raises at a flag that it cannot do here
            self.seconds[flags.name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
            return
        self.seconds[flags.name] = median
        if median < self.best_s:
            self.best, self.best_s = flags, median


def fastest(
    numerics: tuple[Flags, ...],
    more: Callable[[Flags], list[Flags]],
    make: Callable[[Flags], Peer],
    warm_up: int,
    runs: int,
) -> Tried:
    """Tries the numerics, then what is on top of the fastest of them.

    Raises:
        RuntimeError: none of them runs.
    """
    tried = Tried()
    for flags in numerics:
        tried.see(flags, make, warm_up, runs)
    if tried.best is None:
        raise RuntimeError(f"no setting of the peer runs: {tried.seconds}")
    for flags in more(tried.best):
        tried.see(flags, make, warm_up, runs)
    return tried
