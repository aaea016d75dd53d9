"""Sizes that decide how fast rows are decoded, and never which tokens they get."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tuning:
    """What suits a device."""

    column_multiple: int  # attention looks at the columns in use, rounded up to this
    row_multiple: int  # rows that are computed are rounded up to this
    finished_share: float  # of the rows that are computed, at most this share is finished
    group_bytes: float  # what one more group of rows costs a layer, in bytes of keys and values read
    lag: int  # how many steps later the host looks at how many rows are left
    graphs: bool  # steps are captured in CUDA graphs and replayed


# Without graphs nothing is gained by few shapes. One more group is three small products, a softmax and two copies,
# about 50 us, in which 0.5 MB are read; moving a row costs a hundredth of a step.
CPU = Tuning(column_multiple=8, row_multiple=1, finished_share=0.05, group_bytes=5e5, lag=0, graphs=False)
# Three kernels, about 10 us, in which 30 MB are read. Shapes are few, so that a graph serves again.
CUDA = Tuning(column_multiple=64, row_multiple=8, finished_share=0.2, group_bytes=3e7, lag=3, graphs=True)


def tuning_for(device: torch.device) -> Tuning:
    """What suits this device."""
    return CUDA if device.type == "cuda" else CPU
