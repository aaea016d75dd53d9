import pytest
import torch

from rlhf_cli.runs.common import MemoryExhaustedError, explained_memory, micro_batch_keys

KEYS = (*micro_batch_keys("algo"), "rollout.max_rows")


def test_memory_of_a_device_that_runs_out_is_explained_with_the_keys_that_help():
    line = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 12 GiB."
    with pytest.raises(MemoryExhaustedError) as raised, explained_memory(KEYS):
        raise torch.OutOfMemoryError(f"{line}\nSee documentation.")
    assert str(raised.value) == (
        "out of memory; lower algo.train.micro_batch_size or algo.train.micro_batch_tokens or rollout.max_rows, or try "
        f"precision=bf16 ({line})"
    )
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_memory_of_the_machine_that_runs_out_is_explained_too():
    with pytest.raises(MemoryExhaustedError, match=r"rollout\.max_rows") as raised, explained_memory(KEYS):
        torch.empty(2**60, dtype=torch.uint8)  # an exbibyte
    assert "bf16" not in str(raised.value)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes differ$") as raised, explained_memory(KEYS):
        raise RuntimeError("shapes differ")
    assert type(raised.value) is RuntimeError
