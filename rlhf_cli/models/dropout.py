"""Setting a backbone's dropout, whatever its architecture calls it."""

from __future__ import annotations

from torch import nn

from rlhf_cli.errors import bad_value

# Where a kernel or a function of the module drops out, the rate is a number of the module.
_AS_NUMBERS = ("attention_dropout", "dropout")


def set_dropout(key: str, model: nn.Module, rate: float) -> None:
    """Sets every dropout that the model has, in place; its config stays, so that what is saved is unchanged.

    Args:
        key: of the rate.
        model: any transformers model, before it gets an adapter.
        rate: in [0, 1).

    Raises:
        RequestError: the model has none, and the rate is not 0.
    """
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
            found += 1
        for name in _AS_NUMBERS:
            if isinstance(getattr(module, name, None), float | int):
                setattr(module, name, rate)
                found += 1
    if not found and rate:
        raise bad_value(key, rate, f"0 or null, because {type(model).__name__} has no dropout")
