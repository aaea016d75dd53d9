"""Merging the weights of models: EMA, SLERP and linear interpolation (WARP, Ramé et al. 2024, arXiv 2406.16768).

Notation: theta the weights of a model, delta = theta - theta_init its task vector, Omega the angle between two task
vectors, l a weight in [0, 1]. Weights are a mapping from names to tensors, such as `model.state_dict()`.

What holds for every function here:
- Inputs stay as they are, except the anchor of `ema_update_`; results are new tensors, without gradient, in the
  inputs' dtype. Each merge is computed in float64, one tensor at a time, and rounded at its end.
- Models have the same names, shapes and dtypes, and equal tensors where these are not floating point (masks,
  counters): ValueError names the first tensor that differs.
- Tied weights (names that are the same view of the same memory in at least one of the models) are one tensor: they
  count once, in the group that comes first, and are one tensor in a result. Where a model holds copies instead, the
  copies must be equal, else ValueError.
- Low-rank factors A and B are not weights in this sense: merge the products B A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Groups = Mapping[str, Sequence[str]]  # group -> the names in it; every name is in exactly one

# Below it SLERP is replaced by linear interpolation. Near Omega = 0 the two differ by Omega^2 / 8 of the task vector,
# here 1e-9: less than float32 resolves, so nothing jumps. Near 180 degrees SLERP divides rounding errors by sin Omega.
MIN_SINE = 1e-4

_BLOCK = re.compile(r"(?:^|.*?\.)(?:layers|layer|h|blocks|block)\.(\d+)(?=\.)")
_HEADS = frozenset({"lm_head", "embed_out", "output", "score", "classifier", "head", "v_head", "value_head"})


def layer_groups(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Sorts the names of a model's weights into layers, each of which has its own angle.

    - every transformer block, called as the names call it: `model.layers.3`, `transformer.h.3`. What is inside a block
      (experts, its norms) belongs to it;
    - `embeddings`: of tokens, positions and token types together, as they are added up to one input;
    - `final_norm`: norms outside the blocks;
    - `head`: what makes logits or rewards;
    - every other module by its own name: `bert.pooler.dense`.

    Args:
        names: of the weights, in any order, which plays no part.

    Returns:
        group -> its names, sorted; the groups in the order above, blocks by number, other modules by name.

    >>> layer_groups(["lm_head.weight", "model.layers.10.mlp.weight", "model.layers.9.mlp.weight", "wte.weight"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'embeddings': ('wte.weight',), 'model.layers.9': ('model.layers.9.mlp.weight',),
     'model.layers.10': ('model.layers.10.mlp.weight',), 'head': ('lm_head.weight',)}
    """
    found: dict[tuple[int, str, int, str], list[str]] = {}
    for name in sorted(set(names)):
        found.setdefault(_place(name), []).append(name)
    return {place[-1]: tuple(found[place]) for place in sorted(found)}


def _place(name: str) -> tuple[int, str, int, str]:
    """What groups are sorted by (kind, stack of blocks, number of the block), and the group's name."""
    block = _BLOCK.match(name)
    if block:
        return 1, block[0][: -len(block[1])], int(block[1]), block[0]
    modules = name.split(".")[:-1]
    # Heads first: `embed_out` embeds nothing, and a head may have a norm of its own. Then embeddings, for the same.
    if _HEADS.intersection(modules):
        return 3, "", 0, "head"
    if any("embed" in module or module in ("wte", "wpe", "shared") for module in modules):
        return 0, "", 0, "embeddings"
    if any("norm" in module.lower() or module.startswith("ln_") for module in modules):
        return 2, "", 0, "final_norm"
    return 4, "", 0, ".".join(modules) or name


def slerp(
    init: Weights, first: Weights, second: Weights, weight: float, groups: Groups | None = None
) -> dict[str, Tensor]:
    """SLERP of task vectors, group by group (stage 2 of WARP; Shoemake 1985).

    theta_init + sin((1 - l) Omega) / sin Omega * delta_1 + sin(l Omega) / sin Omega * delta_2

    Omega is the angle between all tensors of the group, taken as one vector. Task vectors of equal norm keep it.
    It is linear interpolation, theta_init + (1 - l) delta_1 + l delta_2, in a group where sin Omega < MIN_SINE or
    where a task vector is zero, which has no direction.

    Args:
        init: the weights that both started from.
        first: returned bit for bit at l = 0, and in a group where `second` equals it.
        second: returned bit for bit at l = 1.
        weight: l in [0, 1].
        groups: which weights share an angle; None takes `layer_groups`.

    Raises:
        ValueError: models that do not fit together, a weight outside [0, 1], groups that leave a name out or have it
            twice, or a group with weights that are not finite.

    >>> init, first, second = ({"w": torch.tensor(w)} for w in ([1.0, 1.0], [2.0, 1.0], [1.0, 2.0]))
    >>> slerp(init, first, second, 0.5)["w"]  # both task vectors have norm 1, and so has 0.7071 * (1, 1)
    tensor([1.7071, 1.7071])
    """
    _check_weight("weight", weight)
    tied_to = _check_alike([init, first, second])
    counted = _counted(init, tied_to, groups)
    if weight in (0.0, 1.0):
        return _result(second if weight else first, tied_to, {})
    merged: dict[str, Tensor] = {}
    for group, names in counted.items():
        if all(torch.equal(first[name], second[name]) for name in names):
            continue  # as in `first`
        omega = _angle(*_products(init, first, second, names, group))
        weight_1, weight_2 = _slerp_weights(omega, weight)
        for name in names:
            start = _wide(init[name])
            delta_1, delta_2 = _wide(first[name]) - start, _wide(second[name]) - start
            merged[name] = (start + weight_1 * delta_1 + weight_2 * delta_2).to(init[name].dtype)
    return _result(first, tied_to, merged)


def slerp_many(init: Weights, members: Sequence[Weights], groups: Groups | None = None) -> dict[str, Tensor]:
    """SLERP of M task vectors: merged_m = slerp(merged_{m-1}, theta_m, l = 1/m) for m = 2, ..., M.

    It depends on the order of the members for M > 2: give them in a fixed one, such as the runs' index.

    Args:
        init: the weights that all started from.
        members: M >= 1; a single one is returned bit for bit.
        groups: as in `slerp`.

    Raises:
        ValueError: no member, or as in `slerp`.
    """
    tied_to = _check_members(init, members)
    _counted(init, tied_to, groups)
    merged = _result(members[0], tied_to, {})
    for number, member in enumerate(members[1:], start=2):
        merged = slerp(init, merged, member, 1.0 / number, groups)
    return merged


def lerp(first: Weights, second: Weights, weight: float) -> dict[str, Tensor]:
    """Linear interpolation: (1 - l) theta_1 + l theta_2.

    It is that of task vectors as well, theta_init + (1 - l) delta_1 + l delta_2: theta_init cancels, and so do groups.

    Args:
        first: returned bit for bit at l = 0.
        second: returned bit for bit at l = 1.
        weight: l in [0, 1].

    Raises:
        ValueError: models that do not fit together, or a weight outside [0, 1].

    >>> lerp({"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([3.0, 0.0])}, 0.25)["w"].tolist()
    [1.5, 3.0]
    """
    _check_weight("weight", weight)
    tied_to = _check_alike([first, second])
    if weight in (0.0, 1.0):
        return _result(second if weight else first, tied_to, {})
    merged = {
        name: torch.lerp(_wide(first[name]), _wide(second[name]), weight).to(first[name].dtype)
        for name in first
        if first[name].is_floating_point() and tied_to[name] == name
    }
    return _result(first, tied_to, merged)


def lerp_many(init: Weights, members: Sequence[Weights]) -> dict[str, Tensor]:
    """Mean of task vectors: theta_init + (1/M) sum_m delta_m, which is the members' mean.

    Args:
        init: the weights that all started from. They cancel; they are here so that this can stand for `slerp_many`.
        members: M >= 1, in any order; a single one is returned bit for bit.

    Raises:
        ValueError: no member, or models that do not fit together.

    >>> members = [{"w": torch.tensor([w])} for w in (1.0, 2.0, 6.0)]
    >>> lerp_many({"w": torch.tensor([9.0])}, members)["w"].item()
    3.0
    """
    tied_to = _check_members(init, members)
    if len(members) == 1:
        return _result(members[0], tied_to, {})
    merged: dict[str, Tensor] = {}
    for name, start in init.items():
        if start.is_floating_point() and tied_to[name] == name:
            total = torch.zeros_like(start, dtype=torch.float64)
            for member in members:
                total += _wide(member[name])
            merged[name] = (total / len(members)).to(start.dtype)
    return _result(init, tied_to, merged)


def interpolate(start: Weights, end: Weights, eta: float) -> dict[str, Tensor]:
    """LITI, linear interpolation towards the initialisation: (1 - eta) theta_start + eta theta_end (stage 3 of WARP).

    Args:
        start: what training began with (or, for the front of a finished run, the SFT weights): eta = 0 returns it bit
            for bit.
        end: the merged weights; eta = 1 returns them bit for bit.
        eta: in [0, 1]; the share of what was learnt that is kept.

    Raises:
        ValueError: models that do not fit together, or eta outside [0, 1].

    >>> interpolate({"w": torch.tensor([0.0])}, {"w": torch.tensor([8.0])}, 0.25)["w"].item()
    2.0
    """
    _check_weight("eta", eta)
    return lerp(start, end, eta)


def ema_update(anchor: Weights, weights: Weights, mu: float) -> dict[str, Tensor]:
    """EMA of weights: theta_ema <- (1 - mu) theta_ema + mu theta (stage 1 of WARP).

    Args:
        anchor: theta_ema; returned bit for bit at mu = 0. The result has its dtypes: keep it in float32, for in
            bfloat16 most steps mu (theta - theta_ema) round to nothing and the anchor stands still.
        weights: theta, in any floating dtypes; returned bit for bit at mu = 1 where the dtypes are the same.
        mu: in [0, 1]; after T steps the anchor still holds (1 - mu)^T of its start.

    Raises:
        ValueError: models that do not fit together, or mu outside [0, 1].

    >>> ema_update({"w": torch.tensor([4.0])}, {"w": torch.tensor([8.0])}, 0.25)["w"].item()
    5.0
    """
    tied_to = _check_alike([anchor, weights], same_dtype=False)
    updated = _result(anchor, tied_to, {})
    ema_update_(updated, weights, mu)
    return updated


def ema_update_(anchor: Weights, weights: Weights, mu: float) -> None:
    """`ema_update` that writes to the tensors of `anchor`: no copy of a model at each training step.

    Tensors that are frozen may be shared between the two.

    Raises:
        ValueError: as in `ema_update`, or the anchor is not a copy but the weights themselves.
    """
    _check_weight("mu", mu)
    _check_alike([anchor, weights], same_dtype=False)
    floating = [name for name in anchor if anchor[name].is_floating_point() and anchor[name].numel()]
    if floating and all(_view(anchor[name]) == _view(weights[name]) for name in floating):
        raise ValueError(
            f"{floating[0]}: every tensor of the anchor is the weights' own; the anchor has to be a copy"
        )
    # By memory and not by name: tied weights would take the step twice.
    written = set()
    for name in floating:
        if _view(anchor[name]) in written:
            continue
        written.add(_view(anchor[name]))
        if mu == 1.0:
            anchor[name].detach().copy_(weights[name].detach())
        elif mu > 0.0:
            anchor[name].detach().lerp_(weights[name].detach().to(anchor[name].dtype), mu)


def angles(init: Weights, first: Weights, second: Weights, groups: Groups | None = None) -> dict[str, float]:
    """Angle between two task vectors in each group, in degrees from 0 to 180; SLERP is nearly LERP below 30.

    Args:
        init: the weights that both started from.
        first: one model.
        second: the other.
        groups: as in `slerp`; {"all": list(init)} gives the angle of the whole model.

    Returns:
        group -> degrees. A group has no angle, and is left out, where one of the task vectors is zero and where it
        holds nothing but weights that count in an earlier group or are not floating point.

    Raises:
        ValueError: models or groups that do not fit together, or weights that are not finite.

    >>> init, first, second = ({"w": torch.tensor(w)} for w in ([1.0, 1.0], [3.0, 1.0], [1.0, 2.0]))
    >>> round(angles(init, first, second)["w"], 6)
    90.0
    """
    tied_to = _check_alike([init, first, second])
    found = {
        group: _angle(*_products(init, first, second, names, group))
        for group, names in _counted(init, tied_to, groups).items()
    }
    return {group: math.degrees(omega) for group, omega in found.items() if omega is not None}


def task_vector_norms(init: Weights, weights: Weights, groups: Groups | None = None) -> dict[str, float]:
    """Euclidean norm of the task vector in each group; their squares add up to that of the whole model.

    Args:
        init: the weights that training started from.
        weights: those it ended with.
        groups: as in `slerp`.

    Returns:
        group -> norm, 0 where nothing changed; without groups that hold nothing of their own, as in `angles`.

    Raises:
        ValueError: models or groups that do not fit together, or weights that are not finite.

    >>> task_vector_norms({"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([4.0, 5.0])})
    {'w': 5.0}
    """
    tied_to = _check_alike([init, weights])
    return {
        group: math.sqrt(_products(init, weights, weights, names, group)[0])
        for group, names in _counted(init, tied_to, groups).items()
    }


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _products(
    init: Weights, first: Weights, second: Weights, names: Sequence[str], group: str
) -> tuple[float, float, float]:
    """|delta_1|^2, |delta_2|^2 and delta_1 . delta_2 over all tensors of a group."""
    totals = [0.0, 0.0, 0.0]
    for name in names:
        start = _wide(init[name])
        delta_1, delta_2 = _wide(first[name]) - start, _wide(second[name]) - start
        for index, (left, right) in enumerate(((delta_1, delta_1), (delta_2, delta_2), (delta_1, delta_2))):
            totals[index] += (left * right).sum().item()
    if not all(map(math.isfinite, totals)):
        raise ValueError(f"{group}: its weights are not finite")
    return totals[0], totals[1], totals[2]


def _angle(square_1: float, square_2: float, dot: float) -> float | None:
    """Omega in radians; None where a task vector is zero."""
    if square_1 == 0.0 or square_2 == 0.0:
        return None
    # clamp: rounding takes the cosine of parallel vectors past 1, where it has no angle
    return math.acos(max(-1.0, min(1.0, dot / (math.sqrt(square_1) * math.sqrt(square_2)))))


def _slerp_weights(omega: float | None, weight: float) -> tuple[float, float]:
    """What delta_1 and delta_2 are multiplied by."""
    if omega is None or math.sin(omega) < MIN_SINE:
        return 1.0 - weight, weight
    return math.sin((1.0 - weight) * omega) / math.sin(omega), math.sin(weight * omega) / math.sin(omega)


def _counted(weights: Weights, tied_to: Mapping[str, str], groups: Groups | None) -> dict[str, list[str]]:
    """Groups of what is merged: floating point only, tied weights once, no empty group."""
    if groups is None:
        groups = layer_groups(weights)
    seen: set[str] = set()
    merged: set[str] = set()
    counted: dict[str, list[str]] = {}
    for group, names in groups.items():
        for name in names:
            if name not in weights:
                raise ValueError(f"{name}: in group {group}, but not one of the weights")
            if name in seen:
                raise ValueError(f"{name}: twice in the groups, the second time in {group}")
            seen.add(name)
            if weights[name].is_floating_point() and tied_to[name] not in merged:
                merged.add(tied_to[name])
                counted.setdefault(group, []).append(tied_to[name])
    for name in weights:
        if name not in seen:
            raise ValueError(f"{name}: in none of the groups {', '.join(groups)}")
    return counted


def _result(source: Weights, tied_to: Mapping[str, str], merged: Weights) -> dict[str, Tensor]:
    """`merged` in the order of `source`, filled up with copies of it; tied names hold one tensor."""
    own = {
        name: merged[name] if name in merged else source[name].detach().clone() for name in set(tied_to.values())
    }
    return {name: own[tied_to[name]] for name in source}


def _view(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same view of the same memory."""
    where = (tensor.device, tensor.data_ptr()) if tensor.numel() else (id(tensor),)
    return (*where, tensor.dtype, tensor.shape, tensor.stride())


def _check_weight(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{key}={value}: expected a number from 0 to 1")


def _check_members(init: Weights, members: Sequence[Weights]) -> dict[str, str]:
    if not members:
        raise ValueError("members: expected at least one model")
    return _check_alike([init, *members])


def _check_alike(models: Sequence[Weights], same_dtype: bool = True) -> dict[str, str]:
    """Raises where models do not fit together; returns for each name the one it is tied to, its own where to none."""
    reference = models[0]
    for number, model in enumerate(models[1:], start=2):
        for name in (*reference, *model):
            if name not in reference or name not in model:
                lacking = number if name in reference else 1
                raise ValueError(f"{name}: model {lacking} of {len(models)} does not have it")
        for name, expected in reference.items():
            tensor = model[name]
            if tensor.shape != expected.shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
            floating = tensor.is_floating_point() and expected.is_floating_point()
            if tensor.dtype != expected.dtype and (same_dtype or not floating):
                raise ValueError(f"{name}: {tensor.dtype}, expected {expected.dtype}")
            if not floating and not torch.equal(tensor, expected):
                raise ValueError(f"{name}: not floating point, and not equal in all models")
    return _ties(models)


def _ties(models: Sequence[Weights]) -> dict[str, str]:
    tied_to = {name: name for name in models[0]}
    for model in models:
        names: dict[tuple[object, ...], str] = {}
        for name in tied_to:
            one, other = tied_to[names.setdefault(_view(model[name]), name)], tied_to[name]
            if one != other:
                tied_to = {key: one if value == other else value for key, value in tied_to.items()}
    for model in models:
        for name, one in tied_to.items():
            if _view(model[name]) != _view(model[one]) and not torch.equal(model[name], model[one]):
                raise ValueError(f"{name}: tied to {one} in one model, but a tensor of its own in another")
    return tied_to
