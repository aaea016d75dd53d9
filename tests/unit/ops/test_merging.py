"""Groups of weights, and SLERP of two models."""

import math

import pytest
import torch
from fixtures_architectures import ALL, DECODERS
from fixtures_merging import flat, same_bits, slow_slerp, two_blocks, vector
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_cli.ops import merging
from rlhf_cli.ops.merging import (
    angles,
    layer_groups,
    lerp,
    lerp_many,
    slerp,
    task_vector_norms,
)

# ---- groups


def test_groups_by_hand():
    names = [
        "transformer.wte.weight",
        "transformer.h.10.ln_1.weight",
        "transformer.h.2.attn.c_attn.weight",
        "transformer.h.2.mlp.experts.7.weight",
        "transformer.ln_f.weight",
        "transformer.wpe.weight",
        "lm_head.weight",
        "adapter.up.weight",
        "temperature",
    ]
    expected = {
        "embeddings": ("transformer.wpe.weight", "transformer.wte.weight"),
        "transformer.h.2": ("transformer.h.2.attn.c_attn.weight", "transformer.h.2.mlp.experts.7.weight"),
        "transformer.h.10": ("transformer.h.10.ln_1.weight",),
        "final_norm": ("transformer.ln_f.weight",),
        "head": ("lm_head.weight",),
        "adapter.up": ("adapter.up.weight",),
        "temperature": ("temperature",),
    }
    assert list(layer_groups(names).items()) == list(expected.items())
    assert list(layer_groups(names[::-1]).items()) == list(expected.items())
    assert layer_groups([]) == {}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("gpt_neox.embed_out.weight", "head"),
        ("lm_head.layer_norm.weight", "head"),
        ("score.weight", "head"),
        ("transformer.word_embeddings_layernorm.bias", "embeddings"),
        ("decoder.block.4.layer.1.DenseReluDense.wi.weight", "decoder.block.4"),
        ("encoder.block.4.layer.0.SelfAttention.q.weight", "encoder.block.4"),
        ("base_model.model.model.layers.3.mlp.weight", "base_model.model.model.layers.3"),
        ("layers.0.weight", "layers.0"),
        ("model.rotary_emb.inv_freq", "model.rotary_emb"),
    ],
)
def test_the_group_of_a_name(name, group):
    assert layer_groups([name]) == {group: (name,)}


@pytest.mark.parametrize("name", list(ALL))
def test_every_architecture_falls_into_its_blocks_and_three_more(name):
    architecture = ALL[name]
    config = architecture.config(architecture.tokenizer())
    auto = AutoModelForCausalLM if name in DECODERS else AutoModelForSequenceClassification
    with torch.device("meta"):
        names = list(auto.from_config(config).state_dict())
    groups = layer_groups(names)
    assert sorted(name for members in groups.values() for name in members) == sorted(names)
    blocks = [group for group in groups if group.endswith((".0", ".1"))]
    assert len(blocks) == config.num_hidden_layers == 2
    assert len(groups[blocks[0]]) == len(groups[blocks[1]]) > 5
    rest = [group for group in groups if group not in blocks]
    if name in DECODERS:
        assert rest == ["embeddings", "final_norm", "head"]
    else:  # a classifier has no norm at its end, and BERT and DistilBERT have a module of their own before the head
        own = {"BERT": ["bert.pooler.dense"], "DistilBERT": ["pre_classifier"]}
        assert rest == ["embeddings", "head", *own.get(name, [])]


# ---- SLERP


def test_slerp_by_hand():
    # 60 degrees between, norms 2 and 1: sin 30 / sin 60 = 1 / sqrt 3
    init, root = vector(1.0, 1.0), math.sqrt(3)
    first, second = vector(3.0, 1.0), vector(1.5, 1 + root / 2)
    merged = slerp(init, first, second, 0.5)["w"].tolist()
    assert merged == pytest.approx([1 + (2 + 0.5) / root, 1 + (root / 2) / root])
    assert angles(init, first, second)["w"] == pytest.approx(60)
    assert task_vector_norms(init, first) == {"w": 2.0}


def test_slerp_keeps_the_norm_of_unit_orthogonal_task_vectors_and_lerp_does_not():
    init = vector(0.5, -1.0, 2.0)
    first, second = vector(1.5, -1.0, 2.0), vector(0.5, -1.0, 3.0)
    assert angles(init, first, second)["w"] == 90.0
    assert task_vector_norms(init, slerp(init, first, second, 0.5))["w"] == pytest.approx(1.0, abs=1e-6)
    for linear in (lerp(first, second, 0.5), lerp_many(init, [first, second])):
        assert task_vector_norms(init, linear)["w"] == pytest.approx(0.707107, abs=1e-6)


def test_slerp_is_of_task_vectors_and_not_of_whole_weights():
    origin = vector(0.0, 0.0)
    first, second = vector(5.0, 0.0), vector(5.0, 1.0)
    of_tasks = slerp(vector(4.0, 0.0), first, second, 0.5)["w"]
    assert of_tasks.tolist() == pytest.approx(
        [4 + 2 / (2 * math.cos(math.pi / 8)), 1 / (2 * math.cos(math.pi / 8))]
    )
    assert (of_tasks - slerp(origin, first, second, 0.5)["w"]).abs().max() > 0.03
    # moving all models moves the merge with them
    moved = slerp(origin, vector(1.0, 0.0), vector(1.0, 1.0), 0.5)["w"] + torch.tensor([4.0, 0.0])
    assert torch.allclose(moved, of_tasks)


def test_the_ends_of_slerp_are_the_models_bit_for_bit():
    init, first, second = two_blocks(0), two_blocks(1), two_blocks(2)
    first["model.norm.weight"][0], second["model.norm.weight"][0] = 1e-30, -0.0
    assert same_bits(slerp(init, first, second, 0.0), first)
    assert same_bits(slerp(init, first, second, 1.0), second)
    assert same_bits(slerp(init, first, {**first}, 0.3), first)
    assert same_bits(slerp(init, init, init, 0.3), init)


def test_slerp_of_a_model_with_itself_is_exact_where_the_arithmetic_is_not():
    init, member = vector(1.0, 0.1, dtype=torch.float64), vector(1e-20, 0.3, dtype=torch.float64)
    assert same_bits(slerp(init, member, vector(1e-20, 0.3, dtype=torch.float64), 0.3), member)


def test_slerp_exchanged_is_slerp_at_the_other_weight():
    init, first, second = two_blocks(0), two_blocks(1), two_blocks(2)
    left, right = slerp(init, first, second, 0.2), slerp(init, second, first, 0.8)
    assert all(torch.allclose(left[name].float(), right[name].float(), atol=1e-6) for name in left)
    assert (left["model.norm.weight"] - slerp(init, second, first, 0.2)["model.norm.weight"]).abs().max() > 0.1


@pytest.mark.parametrize("weight", [0.5, 1 / 3, 0.9])
def test_slerp_equals_a_slow_implementation_group_by_group(weight):
    init, first, second = two_blocks(0), two_blocks(1), two_blocks(2)
    merged = slerp(init, first, second, weight)
    for members in layer_groups(
        name for name in init if name not in ("lm_head.weight", "model.layers.0.mask")
    ).values():
        expected = slow_slerp(*(flat(weights, members) for weights in (init, first, second)), weight)
        assert flat(merged, members) == pytest.approx(expected, abs=1e-6)


def test_an_angle_is_of_the_whole_group_and_groups_may_be_given():
    init, first, second = two_blocks(0), two_blocks(1), two_blocks(2)
    names = [name for name in init if name not in ("lm_head.weight", "model.layers.0.mask")]
    whole = slerp(init, first, second, 0.5, {"all": list(init)})
    expected = slow_slerp(*(flat(weights, names) for weights in (init, first, second)), 0.5)
    assert flat(whole, names) == pytest.approx(expected, abs=1e-6)
    assert list(angles(init, first, second, {"all": list(init)})) == ["all"]
    by_tensor = slerp(init, first, second, 0.5, {name: [name] for name in init})
    by_layer = slerp(init, first, second, 0.5)
    for name in ("model.layers.0.mlp.weight", "model.layers.1.mlp.weight"):
        other = by_tensor if ".0." in name else whole  # block 1 has a single tensor
        assert (by_layer[name] - other[name]).abs().max() > 1e-3


# Figures of mergekit 0.1.5 (merge_methods/slerp.py, run in float64; release 0.1.4, which has another implementation,
# gives the same to 1e-12): v0, v1, then the result at t = 0.25, 0.5, 0.9.
MERGEKIT = {
    "90 degrees": (
        [1, 0, 0],
        [0, 1, 0],
        [[0.9238795325, 0.3826834324, 0], [0.7071067812, 0.7071067812, 0], [0.156434465, 0.9876883406, 0]],
    ),
    "60 degrees": (
        [1, 1, 0],
        [0, 1, 1],
        [
            [0.8164965809, 1.1153550717, 0.2988584907],
            [0.5773502692, 1.1547005384, 0.5773502692],
            [0.1206990728, 1.0548714318, 0.934172359],
        ],
    ),
    "79 degrees, norms 5 and 2": (
        [3, 0, 4],
        [0, 2, 0.5],
        [
            [2.6243098183, 0.6873518041, 3.6709177088],
            [1.9413279639, 1.2942186426, 2.9119919458],
            [0.4193276603, 1.9268679946, 1.0408205457],
        ],
    ),
    "126 degrees": (
        [1, 0, 0.5],
        [-1, 0.25, 0.5],
        [
            [0.5861650222, 0.1609546848, 0.9369012504],
            [0.0, 0.2745893711, 1.0983574845],
            [-0.8645848375, 0.2833374809, 0.7010575051],
        ],
    ),
    "176 degrees": (
        [1, 0, 0],
        [-1, 0.0625, 0],
        [[0.6963260398, 0.6973449718, 0], [0.0, 1.0014632972, 0], [-0.9435049729, 0.362635058, 0]],
    ),
    "4 degrees": (
        [1, 0, 0],
        [1, 0.0625, 0],
        [[1.000365401, 0.0156345162, 0], [1.0004872112, 0.0312652254, 0], [1.0001753869, 0.056256942, 0]],
    ),
    "0 degrees, linear in both": ([1, 2, 2], [2, 4, 4], [[1.25, 2.5, 2.5], [1.5, 3, 3], [1.9, 3.8, 3.8]]),
    "180 degrees, linear in both": ([1, 0, 0], [-2, 0, 0], [[0.25, 0, 0], [-0.5, 0, 0], [-1.7, 0, 0]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", list(MERGEKIT))
def test_slerp_agrees_with_mergekit(case, dtype):
    v0, v1, expected = MERGEKIT[case]
    for weight, row in zip((0.25, 0.5, 0.9), expected, strict=True):
        merged = slerp(vector(0, 0, 0, dtype=dtype), vector(*v0, dtype=dtype), vector(*v1, dtype=dtype), weight)
        assert merged["w"].tolist() == pytest.approx(row, abs=1e-6)


def test_between_its_threshold_and_ours_mergekit_is_linear():
    # 0.9 degrees, its figure at t = 0.25: beyond a cosine of 0.9995 it interpolates linearly
    merged = slerp(vector(0.0, 0.0), vector(1.0, 0.0), vector(1.0, 0.015625), 0.25)["w"].tolist()
    assert merged == pytest.approx([1.0, 0.00390625], abs=3e-5)
    assert merged != pytest.approx([1.0, 0.00390625], abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0, 1e-3])
def test_parallel_task_vectors_have_an_angle_and_interpolate_linearly(scale):
    # sqrt(3) * sqrt(3) < 3 in floating point: the cosine of these two is above 1 before it is clamped
    assert 3 / (math.sqrt(3) * math.sqrt(3)) > 1
    init, first = vector(0.0, 0.0, 0.0), vector(1.0, 1.0, 1.0)
    second = vector(scale, scale, scale)
    assert angles(init, first, second)["w"] == pytest.approx(0.0, abs=1e-5)
    assert slerp(init, first, second, 0.25)["w"].tolist() == pytest.approx([0.75 + 0.25 * scale] * 3)
    opposite = vector(-scale, -scale, -scale)
    assert angles(init, first, opposite)["w"] == pytest.approx(180.0, abs=1e-5)
    assert slerp(init, first, opposite, 0.25)["w"].tolist() == pytest.approx([0.75 - 0.25 * scale] * 3)


def test_nothing_jumps_where_slerp_becomes_linear():
    around = [merging.MIN_SINE * factor for factor in (0.9, 1.1)]
    for sine in around:
        merged = slerp(vector(0.0, 0.0), vector(1.0, 0.0), vector(1.0, sine), 0.25)["w"]
        assert merged.tolist() == pytest.approx([1.0, 0.25 * sine], rel=1e-7)


def test_a_zero_task_vector_makes_its_group_linear():
    init, first, second = two_blocks(0), two_blocks(1), two_blocks(2)
    for name in init:
        if "layers.1." in name:
            second[name] = init[name].clone()
    merged, name = slerp(init, first, second, 0.25), "model.layers.1.mlp.weight"
    assert torch.allclose(merged[name], init[name] + 0.75 * (first[name] - init[name]), atol=1e-6)
    assert not torch.allclose(
        merged["model.norm.weight"], lerp(first, second, 0.25)["model.norm.weight"], atol=1e-2
    )
    assert set(angles(init, first, second)) == {"embeddings", "model.layers.0", "final_norm"}
    assert task_vector_norms(init, second)["model.layers.1"] == 0.0
    assert angles(init, init, init) == {}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99), st.integers(2, 6), st.floats(-3, 3))
def test_slerp_of_equal_norms_keeps_the_norm_and_divides_the_angle(seed, weight, size, exponent):
    generator = torch.Generator().manual_seed(seed)
    init, one, two = torch.randn(3, size, generator=generator, dtype=torch.float64)
    scale = 10**exponent
    first, second = ({"w": init + scale * delta / delta.norm()} for delta in (one, two))
    init = {"w": init}
    merged = slerp(init, first, second, weight)
    omega = angles(init, first, second)["w"]
    if 1 < omega < 179:
        assert task_vector_norms(init, merged)["w"] == pytest.approx(scale, rel=1e-9)
        assert angles(init, first, merged)["w"] == pytest.approx(weight * omega, abs=1e-3)
