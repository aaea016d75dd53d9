"""Devices and numerics: float32 master weights always, a lower precision only inside autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from rlhf_cli.errors import bad_value


@dataclass(frozen=True)
class Precision:
    """What forward passes run in."""

    name: str  # fp32 | bf16 | fp16
    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """Context for forward passes; nothing in fp32."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes matrix products in; None without autocast."""
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaler; only fp16 needs one, elsewhere it passes everything through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve_device(name: str) -> torch.device:
    """The device that `device=` asks for; auto prefers CUDA, then MPS.

    Raises:
        RequestError: the machine has no such device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        has = ", ".join(kind for kind, there in available.items() if there)
        raise bad_value("device", name, f"a device that this machine has: auto, {has}")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> Precision:
    """auto: bf16 on a CUDA device that computes in it (fp16 on an older one), fp32 elsewhere.

    On a CPU auto means fp32: small models gain little from bf16 there, and fp32 reproduces to the bit.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            name = "fp32"
    if name == "fp16" and device.type == "cpu":
        raise bad_value("precision", name, "fp32 or bf16 on a CPU")
    return Precision(name, device)
