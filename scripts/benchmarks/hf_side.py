"""Hugging Face's `generate` as a peer; see peers.py for what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import workload
from peers import Flags, load_policy
from workload import Sizes

_SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}  # of the whole distribution


def hf_default(precision: str, device: torch.device) -> Flags:
    """No flags. Of bf16: on a GPU as one loads a model for that, on a CPU under autocast as ours."""
    if precision == "bf16" and device.type == "cuda":
        return Flags("default", weights="bfloat16")
    return Flags("default", autocast=precision == "bf16")


def hf_numerics(precisions: Sequence[str]) -> tuple[Flags, ...]:
    """Candidates that differ in what they compute in."""
    found = []
    if "fp32" in precisions:
        found.append(Flags("fp32"))
    if "bf16" in precisions:
        found += [Flags("bf16 autocast", autocast=True), Flags("bf16 weights", weights="bfloat16")]
    return tuple(found)


def hf_extras(fastest: Flags, compiled: bool) -> list[Flags]:
    """A static cache; compiled where that is asked for."""
    static = {"cache_implementation": "static"}
    found = [replace(fastest, name=f"{fastest.name}, static cache", options={**static, "disable_compile": True})]
    if compiled:
        found.append(replace(fastest, name=f"{fastest.name}, static cache, compiled", options=static))
    return found


class HfGenerate:
    """`generate` of the same prompts, k samples each; padded on the left as it wants them."""

    def __init__(self, sizes: Sizes, flags: Flags, device: torch.device, folder: Path) -> None:
        self.policy = load_policy(folder, flags.weights).to(device).eval()
        self.device = device
        self.autocast = flags.autocast
        tokenizer = workload.make_tokenizer(sizes.vocab_size)
        texts = [workload.text_of(ids) for ids in workload.make_prompts(sizes)]
        self.inputs = tokenizer(texts, return_tensors="pt", padding=True).to(device)
        self.inputs.pop("token_type_ids", None)
        self.options = {
            **_SAMPLING,
            "max_new_tokens": sizes.new_tokens,
            "num_return_sequences": sizes.k,
            **flags.options,
        }
        self.new_tokens = 0

    def __call__(self) -> torch.Tensor:
        """One rollout, ids with the prompts."""
        with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            ids: torch.Tensor = self.policy.generate(**self.inputs, **self.options)
        self.new_tokens = ids.shape[0] * (ids.shape[1] - self.inputs["input_ids"].shape[1])
        return ids
