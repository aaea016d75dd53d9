import pytest
import torch

from rlhf_cli.errors import RequestError
from rlhf_cli.train.precision import Precision, resolve_device, resolve_precision

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def devices(monkeypatch):
    """Sets which devices the machine seems to have."""

    def there(cuda=False, mps=False, bf16=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)

    return there


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(False, False, "cpu"), (False, True, "mps"), (True, False, "cuda"), (True, True, "cuda")],
)
def test_auto_prefers_cuda_then_mps(devices, cuda, mps, expected):
    devices(cuda, mps)
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(devices, name):
    devices()
    with pytest.raises(RequestError, match=rf"device.*{name}.*auto, cpu"):
        resolve_device(name)
    devices(cuda=True, mps=True)
    assert resolve_device(name).type == name


def test_auto_precision(devices):
    devices(cuda=True, bf16=True)
    assert resolve_precision("auto", CUDA).name == "bf16"
    devices(cuda=True, bf16=False)
    assert resolve_precision("auto", CUDA).name == "fp16"
    assert resolve_precision("auto", CPU).name == "fp32"
    assert resolve_precision("auto", MPS).name == "fp32"


def test_precision_by_name():
    for name in ("fp32", "bf16"):
        assert resolve_precision(name, CPU) == Precision(name, CPU)
    assert resolve_precision("fp16", CUDA) == Precision("fp16", CUDA)
    with pytest.raises(RequestError, match=r"precision.*fp16.*fp32 or bf16"):
        resolve_precision("fp16", CPU)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_matrix_products_run_in_the_precision_and_weights_stay_float32(name, dtype):
    layer = torch.nn.Linear(4, 4)
    with Precision(name, CPU).autocast():
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer(torch.ones(2, 4)).dtype == layer.weight.dtype == torch.float32


def test_only_fp16_scales_its_loss():
    assert Precision("fp16", CPU).scaler().is_enabled()
    for name in ("fp32", "bf16"):
        scaler = Precision(name, CPU).scaler()
        assert not scaler.is_enabled()
        assert scaler.scale(torch.tensor(3.0)).item() == 3.0
