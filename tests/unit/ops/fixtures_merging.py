"""Small weights to merge, and a slow SLERP of them."""

import math

import torch

SHAPES = {
    "model.embed_tokens.weight": (5, 3),
    "model.layers.0.mlp.weight": (3, 4),
    "model.layers.0.norm.weight": (3,),
    "model.layers.1.mlp.weight": (3, 4),
    "model.norm.weight": (3,),
}


def two_blocks(seed, dtype=torch.float32, **more):
    """A tied model of two blocks, with a mask that is no weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    weights["model.layers.0.mask"] = torch.tensor([True, False])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return {**weights, **more}


def vector(*values, dtype=torch.float32):
    return {"w": torch.tensor(values, dtype=dtype)}


def same_bits(left, right):
    """Bit for bit: also tells 0.0 from -0.0."""
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert left[name].numpy().tobytes() == right[name].numpy().tobytes(), name
    return True


def slow_slerp(init, first, second, weight):
    """The unit vector at l * Omega from delta_1 in the plane of both, its oblique parts scaled to the two norms.

    Omega comes from an orthogonal basis and atan2, and everything is a list of Python floats.
    """
    one = [a - c for a, c in zip(first, init, strict=True)]
    two = [b - c for b, c in zip(second, init, strict=True)]
    norm_1, norm_2 = math.hypot(*one), math.hypot(*two)
    along = [x / norm_1 for x in one]
    dot = sum(x * y / norm_2 for x, y in zip(along, two, strict=True))
    across = [y / norm_2 - dot * x for x, y in zip(along, two, strict=True)]
    omega = math.atan2(math.hypot(*across), dot)
    across = [x / math.hypot(*across) for x in across]
    # cos(l Omega) along + sin(l Omega) across, written in the two directions instead
    share_2 = math.sin(weight * omega) / math.sin(omega)
    share_1 = math.cos(weight * omega) - share_2 * dot
    return [c + share_1 * x + share_2 * y for c, x, y in zip(init, one, two, strict=True)]


def flat(weights, names):
    return [x for name in names for x in weights[name].double().flatten().tolist()]
