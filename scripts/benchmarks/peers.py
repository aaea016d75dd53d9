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
    best      the fastest of all candidates below, found in the same run; the JSON has its flags and all candidates' times
- TRL has no padding-free path (1.16 switches it off) and Liger's kernels are Triton's: candidates of a GPU only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import workload
from our_side import BETA, LR
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from turns import Clock, Peer, peer_times
from workload import Sizes

TRL_VERSION = "1.16"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


_PLAIN = {"gradient_checkpointing": False}
DEFAULT = Flags("default")
EQUAL = Flags("equal", {**_PLAIN, "bf16": True})
FP32 = Flags("fp32", {**_PLAIN, "bf16": False})
NUMERICS = (
    EQUAL,
    FP32,
    Flags("bf16 weights and autocast", {**_PLAIN, "bf16": True}, "bfloat16"),
    Flags("bf16 weights", {**_PLAIN, "bf16": False}, "bfloat16"),
)


def trl_problem() -> str | None:
    """Why TRL is not measured; None where it is."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "TRL is not installed (pip install -e '.[dev]'): only our figures"
    if not version.startswith(f"{TRL_VERSION}."):
        return f"TRL is {version}, this compares with {TRL_VERSION}: only our figures"
    return None


def extras(case: str, fastest: Flags, device: torch.device, compiled: bool) -> list[Flags]:
    """What may make the fastest numerics faster still."""

    def more(name: str, **options: Any) -> Flags:
        return replace(fastest, name=f"{fastest.name}, {name}", options={**fastest.options, **options})

    found = [replace(fastest, name=f"{fastest.name}, {n} micro-batches", micro_share=n) for n in (2, 4)]
    if case == "rloo_step":
        found.append(more("static cache", cache_implementation="static"))
    if device.type == "cuda":
        found.append(more("tf32", tf32=True))
        if importlib.util.find_spec("liger_kernel") is not None:
            found.append(more("liger", use_liger_kernel=True))
        if case == "rloo_step":
            found.append(more("continuous batching", use_transformers_continuous_batching=True))
    if compiled:
        found.append(more("torch.compile", torch_compile=True))
    return found


class TrlPeer:
    """One trainer, built anew for each `run`."""

    def __init__(
        self, case: str, sizes: Sizes, flags: Flags, device: torch.device, folder: Path, clock: Clock
    ) -> None:
        self.case = case
        self.sizes = sizes
        self.flags = flags
        self.device = device
        self.folder = folder
        self.clock = clock
        self.losses: list[float] = []
        self.tokens_per_step = 0  # prompts and completions, without padding

    def run(self, num_steps: int, between: Callable[[float], None]) -> None:
        """`train()` of that many steps."""
        _quiet()
        trainer = _make_trainer(self, num_steps)
        trainer.add_callback(_make_callback(self.clock, between))
        trainer.train()
        self.losses = [float(loss) for loss in trainer.seen_losses]
        self.tokens_per_step = _tokens_per_step(trainer, num_steps)


def _tokens_per_step(trainer: Any, num_steps: int) -> int:
    """As the trainer has counted them: RLOO's in its state, the others' beside it."""
    return round(max(trainer._total_train_tokens, trainer.state.num_input_tokens_seen) / num_steps)


def _quiet() -> None:
    """No progress bars and no advice on the way."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def _make_callback(clock: Clock, between: Callable[[float], None]) -> Any:
    from transformers import TrainerCallback

    class Between(TrainerCallback):
        """Time from step to step, without what happens in between."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            between(clock() - self.started)
            self.started = clock()

    return Between()


def _watched(base: type) -> type:
    """The trainer, its losses kept and nothing else changed but that it reports to nobody."""

    class Watched(base):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            self.seen_losses: list[torch.Tensor] = []
            super().__init__(**arguments)

        def _send_telemetry(self) -> None:
            """A constructor reports its use over the network."""

        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **named)
            self.seen_losses.append(loss)
            return loss

    return Watched


def _common(peer: TrlPeer, num_steps: int, batch_size: int) -> dict[str, Any]:
    """What defines the work, the same under all flags; nothing is logged, saved or sent."""
    parts = peer.flags.micro_share
    if peer.sizes.micro_batch is not None:
        parts *= max(1, batch_size // peer.sizes.micro_batch)
    assert batch_size % parts == 0, (batch_size, parts)
    return {
        "output_dir": str(peer.folder / "trl"),
        "max_steps": num_steps,
        "per_device_train_batch_size": batch_size // parts,
        "gradient_accumulation_steps": parts,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 0,
        "use_cpu": peer.device.type == "cpu",
        "dataloader_pin_memory": peer.device.type == "cuda",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **peer.flags.options,
    }


def _make_trainer(peer: TrlPeer, num_steps: int) -> Any:
    from transformers import PrinterCallback

    make = {"rloo_step": _rloo, "rm_step": _rm}.get(peer.case, _dpo)
    trainer = make(peer, num_steps)
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_policy(folder: Path, weights: str) -> LlamaForCausalLM:
    """The saved policy."""
    return LlamaForCausalLM.from_pretrained(folder / "policy", dtype=_DTYPES[weights])


def _load_reward_model(peer: TrlPeer) -> LlamaForSequenceClassification:
    kind = _DTYPES[peer.flags.weights]
    return LlamaForSequenceClassification.from_pretrained(peer.folder / "reward_model", dtype=kind)


def _rloo(peer: TrlPeer, num_steps: int) -> Any:
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    sizes, tokenizer = peer.sizes, workload.make_tokenizer(peer.sizes.vocab_size)
    options = RLOOConfig(
        num_generations=sizes.k,
        max_completion_length=sizes.new_tokens,
        beta=BETA,
        temperature=1.0,
        shuffle_dataset=False,
        **_common(peer, num_steps, sizes.num_prompts * sizes.k),
    )
    prompts = [workload.text_of(ids) for ids in workload.make_prompts(sizes)]
    return _watched(RLOOTrainer)(
        model=load_policy(peer.folder, peer.flags.weights),
        reward_funcs=_load_reward_model(peer),
        args=options,
        train_dataset=Dataset.from_dict({"prompt": prompts * num_steps}),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
    )


def _pairs(peer: TrlPeer, num_steps: int) -> Any:
    from datasets import Dataset

    return Dataset.from_list(workload.pair_rows(peer.sizes) * num_steps)


def _dpo(peer: TrlPeer, num_steps: int) -> Any:
    from trl import DPOConfig, DPOTrainer

    options = DPOConfig(
        beta=BETA,
        precompute_ref_log_probs=peer.case == "dpo_step_precomputed",
        train_sampling_strategy="sequential",
        **_common(peer, num_steps, peer.sizes.num_pairs),
    )
    return _watched(DPOTrainer)(
        model=load_policy(peer.folder, peer.flags.weights),
        args=options,
        train_dataset=_pairs(peer, num_steps),
        processing_class=workload.make_tokenizer(peer.sizes.vocab_size),
    )


def _rm(peer: TrlPeer, num_steps: int) -> Any:
    from trl import RewardConfig, RewardTrainer

    options = RewardConfig(train_sampling_strategy="sequential", **_common(peer, num_steps, peer.sizes.num_pairs))
    return _watched(RewardTrainer)(
        model=_load_reward_model(peer),
        args=options,
        train_dataset=_pairs(peer, num_steps),
        processing_class=workload.make_tokenizer(peer.sizes.vocab_size),
    )


# `generate`

_SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}  # of the whole distribution
HF_DEFAULT = Flags("default", autocast=True)
HF_NUMERICS = (HF_DEFAULT, Flags("fp32"), Flags("bf16 weights", weights="bfloat16"))


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


# the fastest


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
