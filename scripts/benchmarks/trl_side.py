"""TRL's trainers as a peer; see peers.py for what is compared."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import workload
from our_side import BETA, LR
from peers import DTYPES, Flags, load_policy
from transformers import LlamaForSequenceClassification
from transformers.utils.import_utils import enable_tf32
from turns import Clock
from workload import Sizes

TRL_VERSION = "1.16"
_PLAIN = {"gradient_checkpointing": False}
DEFAULT = Flags("default")


def equal(precision: str) -> Flags:
    """The numerics that ours have under this precision."""
    return Flags("equal", {**_PLAIN, "bf16": precision == "bf16"})


def trl_numerics(precisions: Sequence[str]) -> tuple[Flags, ...]:
    """Candidates that differ in what they compute in."""
    found = []
    if "fp32" in precisions:
        found.append(Flags("fp32", {**_PLAIN, "bf16": False}))
    if "bf16" in precisions:
        found += [
            Flags("bf16 autocast", {**_PLAIN, "bf16": True}),
            Flags("bf16 weights and autocast", {**_PLAIN, "bf16": True}, "bfloat16"),
            Flags("bf16 weights", {**_PLAIN, "bf16": False}, "bfloat16"),
        ]
    return tuple(found)


def trl_problem() -> str | None:
    """Why TRL is not measured; None where it is."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "TRL is not installed (pip install -e '.[bench]'): only our figures"
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
        precision = torch.backends.fp32_precision  # its flag tf32 changes that of the whole process
        try:
            trainer = _make_trainer(self, num_steps)
            trainer.add_callback(_make_callback(self.clock, between))
            trainer.train()
        finally:
            torch.backends.fp32_precision = precision
            enable_tf32.cache_clear()
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
    if batch_size % parts:
        raise ValueError(f"a batch of {batch_size} has no {parts} equal parts")
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


def _load_reward_model(peer: TrlPeer) -> LlamaForSequenceClassification:
    kind = DTYPES[peer.flags.weights]
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
