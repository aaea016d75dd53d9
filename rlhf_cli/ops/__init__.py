"""Pure tensor functions: tensors and floats in, tensors out.

A module is imported when it is first used as `ops.<module>`, and torch with it: an algorithm's hyperparameters are read
from the config before anything is computed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cli.ops import advantages as advantages
    from rlhf_cli.ops import gae as gae
    from rlhf_cli.ops import kl as kl
    from rlhf_cli.ops import masks as masks
    from rlhf_cli.ops import policy_losses as policy_losses
    from rlhf_cli.ops import preference_losses as preference_losses


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
