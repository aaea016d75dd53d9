"""Merging several models, interpolation and moving averages, and what holds for every way of merging."""

import math

import pytest
import torch
from fixtures_architectures import ALL
from fixtures_merging import SHAPES, flat, same_bits, two_blocks, vector
from fixtures_models import seeded
from transformers import AutoModelForCausalLM

from rlhf_cli.ops.merging import (
    angles,
    ema_update,
    ema_update_,
    interpolate,
    lerp,
    lerp_many,
    slerp,
    slerp_many,
    task_vector_norms,
)

# The arguments after the models, for what takes (start or anchor, other, ...) and gives weights.
TWO_MODELS = {"lerp": lerp, "interpolate": interpolate, "ema_update": ema_update}

# ---- several members


def test_one_member_is_returned_bit_for_bit():
    init, member = two_blocks(0), two_blocks(1)
    member["model.norm.weight"][0] = -0.0
    assert same_bits(slerp_many(init, [member]), member)
    assert same_bits(lerp_many(init, [member]), member)


def test_three_orthogonal_members_by_hand():
    # e1, e2 -> (s, s, 0), s = 1 / sqrt 2, of norm 1 and orthogonal to e3; then sin 60 and sin 30 for l = 1/3
    init = vector(0.0, 0.0, 0.0)
    members = [vector(1.0, 0.0, 0.0), vector(0.0, 1.0, 0.0), vector(0.0, 0.0, 1.0)]
    merged = slerp_many(init, members)["w"].tolist()
    assert merged == pytest.approx([math.sqrt(3 / 8), math.sqrt(3 / 8), 0.5])
    assert math.hypot(*merged) == pytest.approx(1.0)
    # sin(Omega / M) / sin Omega = 0.5 for every term is a mistake: its norm is 0.87
    assert merged != pytest.approx([0.5, 0.5, 0.5], abs=0.1)
    assert lerp_many(init, members)["w"].tolist() == pytest.approx([1 / 3] * 3)


def test_many_members_are_merged_one_after_another_in_their_order():
    init, members = two_blocks(0), [two_blocks(seed) for seed in (1, 2, 3, 4)]
    step = slerp(init, members[0], members[1], 1 / 2)
    step = slerp(init, step, members[2], 1 / 3)
    step = slerp(init, step, members[3], 1 / 4)
    merged = slerp_many(init, members)
    assert same_bits(merged, step) and same_bits(merged, slerp_many(init, members))
    backwards = slerp_many(init, members[::-1])
    assert (merged["model.norm.weight"] - backwards["model.norm.weight"]).abs().max() > 1e-2


def test_two_members_in_any_order_and_small_angles_are_the_mean():
    init, first, second = two_blocks(0), two_blocks(1), two_blocks(2)
    forwards, backwards = slerp_many(init, [first, second]), slerp_many(init, [second, first])
    assert torch.allclose(forwards["model.norm.weight"], backwards["model.norm.weight"], atol=1e-6)
    origin = vector(0.0, 0.0)
    members = [vector(1.0, x) for x in (0.0, 0.01, 0.02)]
    assert slerp_many(origin, members)["w"].tolist() == pytest.approx([1.0, 0.01], abs=1e-4)


def test_lerp_many_is_the_mean_of_task_vectors_in_any_order():
    init, members = two_blocks(0), [two_blocks(seed) for seed in (1, 2, 3)]
    merged = lerp_many(init, members)
    assert same_bits(merged, lerp_many(two_blocks(9), members[::-1]))
    for name in SHAPES:
        deltas = sum(member[name].double() - init[name].double() for member in members) / 3
        assert torch.allclose(merged[name].double(), init[name].double() + deltas, atol=1e-6)
    assert same_bits(lerp_many(init, [members[0]] * 3), members[0])


def test_no_member_is_refused():
    for merge in (slerp_many, lerp_many):
        with pytest.raises(ValueError, match="at least one model"):
            merge(two_blocks(0), [])


# ---- interpolation and EMA


def test_interpolate_and_ema_by_hand_move_by_the_share_of_the_second():
    # eta and mu are shares of what was learnt: 0.25 of the way from 4 to 8
    start, end = vector(4.0, -1.0), vector(8.0, -1.0)
    for function in TWO_MODELS.values():
        assert function(start, end, 0.25)["w"].tolist() == [5.0, -1.0]


@pytest.mark.parametrize("name", list(TWO_MODELS))
def test_both_ends_are_returned_bit_for_bit(name):
    first, second = two_blocks(1), two_blocks(2)
    first["model.norm.weight"][:2] = torch.tensor([-0.0, 1e-30])
    second["model.norm.weight"][:2] = torch.tensor([1e30, -0.0])
    assert same_bits(TWO_MODELS[name](first, second, 0.0), first)
    assert same_bits(TWO_MODELS[name](first, second, 1.0), second)
    between = TWO_MODELS[name](second, {**second}, 0.3)
    assert all(torch.equal(between[key], second[key]) for key in second)  # but for the sign of a zero


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", list(TWO_MODELS))
def test_in_between_they_equal_a_slow_implementation(name, share):
    first, second = two_blocks(1), two_blocks(2)
    merged = TWO_MODELS[name](first, second, share)
    slow = [(1 - share) * a + share * b for a, b in zip(flat(first, SHAPES), flat(second, SHAPES), strict=True)]
    assert flat(merged, SHAPES) == pytest.approx(slow, abs=1e-6)


def test_the_anchor_follows_and_still_holds_37_percent_after_100_steps_of_0_01():
    anchor, weights = vector(1.0), vector(0.0)
    for _ in range(100):
        anchor = ema_update(anchor, weights, 0.01)
    assert anchor["w"].item() == pytest.approx(0.99**100, rel=1e-4)
    assert anchor["w"].item() == pytest.approx(0.37, abs=0.005)


@pytest.mark.parametrize("mu", [0.0, 0.01, 0.7, 1.0])
def test_in_place_equals_the_pure_form_and_leaves_the_weights_alone(mu):
    anchor, weights = two_blocks(1), two_blocks(2)
    expected, tensors = ema_update(anchor, weights, mu), dict(anchor)
    ema_update_(anchor, weights, mu)
    assert same_bits(anchor, expected) and same_bits(weights, two_blocks(2))
    assert all(anchor[name] is tensors[name] for name in anchor)
    assert (mu == 0.0) == torch.equal(anchor["model.norm.weight"], two_blocks(1)["model.norm.weight"])


def test_tied_weights_of_the_anchor_take_one_step():
    anchor, weights = two_blocks(1), two_blocks(2)
    ema_update_(anchor, weights, 0.25)
    name = "lm_head.weight"
    assert torch.allclose(anchor[name], 0.75 * two_blocks(1)[name] + 0.25 * weights[name], atol=1e-6)
    copies = {
        key: value.clone() for key, value in two_blocks(1).items()
    }  # an anchor that is not tied: each takes it
    ema_update_(copies, weights, 0.25)
    assert same_bits(copies, anchor)


def test_an_anchor_that_is_no_copy_is_refused_and_frozen_tensors_may_be_shared():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has to be a copy"):
        ema_update_(model.state_dict(), dict(model.named_parameters()), 0.1)
    anchor = {"weight": torch.zeros(2, 2), "bias": model.bias}
    bias = model.bias.detach().clone()
    ema_update_(anchor, dict(model.named_parameters()), 0.5)
    assert torch.equal(anchor["weight"], model.weight.detach() / 2) and torch.equal(model.bias, bias)


def test_a_float32_anchor_follows_bfloat16_weights_and_a_bfloat16_one_stands_still():
    weights = {"w": torch.ones(1, dtype=torch.bfloat16)}
    anchor, narrow = vector(0.9), {"w": torch.tensor([0.9], dtype=torch.bfloat16)}
    stuck = narrow["w"].clone()
    for _ in range(100):
        ema_update_(anchor, weights, 0.01)
        ema_update_(narrow, weights, 0.01)
    assert anchor["w"].dtype == torch.float32
    assert anchor["w"].item() == pytest.approx(1 - 0.1 * 0.99**100, abs=1e-4)
    assert torch.equal(narrow["w"], stuck)


# ---- low-rank factors


def test_merging_the_factors_of_updates_is_not_merging_the_updates():
    generator = torch.Generator().manual_seed(0)
    factors = [
        {"B": torch.randn(4, 2, generator=generator), "A": torch.randn(2, 3, generator=generator)}
        for _ in range(2)
    ]
    zero = {"B": torch.zeros(4, 2), "A": torch.zeros(2, 3)}
    base = {"w": torch.zeros(4, 3)}
    updates = [{"w": pair["B"] @ pair["A"]} for pair in factors]
    for together, apart in (
        (slerp_many(base, updates), slerp_many(zero, factors)),
        (lerp_many(base, updates), lerp_many(zero, factors)),
        (ema_update(*updates, 0.3), ema_update(*factors, 0.3)),
    ):
        assert (together["w"] - apart["B"] @ apart["A"]).abs().max() > 0.1
    # the rank of the merged update is that of both together
    assert int(torch.linalg.matrix_rank(slerp_many(base, updates)["w"])) == 3


# ---- what holds for all


def _every(init, first, second):
    """Each function on the models, with weights inside (0, 1)."""
    return {
        "slerp": lambda: slerp(init, first, second, 0.3),
        "slerp_many": lambda: slerp_many(init, [first, second]),
        "lerp": lambda: lerp(first, second, 0.3),
        "lerp_many": lambda: lerp_many(init, [first, second]),
        "interpolate": lambda: interpolate(first, second, 0.3),
        "ema_update": lambda: ema_update(first, second, 0.3),
    }


EVERY = list(_every({}, {}, {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_inputs_are_unchanged_and_results_are_new_in_their_dtype(name, dtype):
    models = [two_blocks(seed, dtype) for seed in range(3)]
    for weights in models:
        weights["model.norm.weight"].requires_grad_()
    result = _every(*models)[name]()
    result["model.layers.0.mask"].zero_()  # a result may be written to
    for tensor in result.values():
        assert not tensor.requires_grad
        tensor.fill_(0)
    for seed, weights in enumerate(models):
        for key, expected in two_blocks(seed, dtype).items():
            assert torch.equal(weights[key].detach(), expected)
            assert result[key].dtype == expected.dtype and result[key].shape == expected.shape


@pytest.mark.parametrize("name", EVERY)
def test_tied_weights_come_out_tied_in_the_order_of_the_names(name):
    models = [two_blocks(seed) for seed in range(3)]
    result = _every(*models)[name]()
    assert list(result) == list(models[0])
    assert result["lm_head.weight"] is result["model.embed_tokens.weight"]
    # a copy in some of the models changes nothing, unless its values are others
    models[1]["lm_head.weight"] = models[1]["lm_head.weight"].clone()
    again = _every(*models)[name]()
    assert same_bits(again, result) and again["lm_head.weight"] is again["model.embed_tokens.weight"]
    models[1]["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"^lm_head\.weight: tied to model\.embed_tokens\.weight"):
        _every(*models)[name]()


def test_tied_weights_count_once():
    init, first, second = two_blocks(0), two_blocks(1), two_blocks(2)
    untied = [
        {key: value for key, value in weights.items() if "head" not in key} for weights in (init, first, second)
    ]
    together = {"all": list(init)}
    assert task_vector_norms(init, first, together)["all"] == pytest.approx(
        math.hypot(*(a - b for a, b in zip(flat(first, SHAPES), flat(init, SHAPES), strict=True)))
    )
    assert angles(init, first, second) == angles(*untied)
    assert angles(init, first, second, together) == angles(*untied, {"all": list(untied[0])})
    assert "head" not in task_vector_norms(init, first)
    copies = [{key: value.clone() for key, value in weights.items()} for weights in (init, first, second)]
    assert angles(*copies)["head"] == angles(*copies)["embeddings"]  # no tie to be seen: a group of its own


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])  # tied, and not
def test_models_are_merged_by_their_state_or_by_their_parameters_and_load_the_result(name):
    architecture = ALL[name]
    config = architecture.config(architecture.tokenizer())
    models = [seeded(AutoModelForCausalLM.from_config, config, seed) for seed in range(3)]
    by_state = slerp(*(model.state_dict() for model in models), 0.5)
    parameters = [dict(model.named_parameters()) for model in models]  # a tied head is not among them
    assert ("lm_head.weight" in parameters[0]) == (name == "Llama")
    by_parameter = slerp(*parameters, 0.5)
    assert all(torch.equal(by_parameter[key], by_state[key]) for key in by_parameter)
    assert angles(*(model.state_dict() for model in models)) == angles(*parameters)
    models[0].load_state_dict(by_state)
    assert all(torch.equal(tensor, by_state[key]) for key, tensor in models[0].state_dict().items())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra.weight": torch.zeros(1)}, r"^extra\.weight: model \d of \d does not have it"),
        ({"model.norm.weight": torch.zeros(4)}, r"^model\.norm\.weight: shape \(4,\), expected \(3,\)"),
        (
            {"model.norm.weight": torch.zeros(3, dtype=torch.int64)},
            r"^model\.norm\.weight: torch\.int64, expected",
        ),
        ({"model.layers.0.mask": torch.tensor([True, True])}, r"^model\.layers\.0\.mask: .*not equal"),
    ],
)
def test_models_that_do_not_fit_together_are_refused_by_the_tensors_name(name, changes, message):
    init, first, second = two_blocks(0), two_blocks(1), two_blocks(2, **changes)
    with pytest.raises(ValueError, match=message):
        _every(init, first, second)[name]()
    if "extra.weight" in changes:
        with pytest.raises(ValueError, match=message):
            _every(init, second, first)[name]()


def test_dtypes_may_differ_for_the_anchor_only():
    narrow = two_blocks(2, torch.bfloat16)
    for name, function in _every(two_blocks(0), two_blocks(1), narrow).items():
        if name == "ema_update":
            assert function()["model.norm.weight"].dtype == torch.float32
        else:
            with pytest.raises(ValueError, match=r"^model\.embed_tokens\.weight: torch\.bfloat16, expected"):
                function()


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_weight_outside_0_to_1_is_refused_by_its_name(value):
    init, first, second = two_blocks(0), two_blocks(1), two_blocks(2)
    with pytest.raises(ValueError, match=r"^weight="):
        slerp(init, first, second, value)
    with pytest.raises(ValueError, match=r"^weight="):
        lerp(first, second, value)
    with pytest.raises(ValueError, match=r"^eta="):
        interpolate(first, second, value)
    for update in (ema_update, ema_update_):
        with pytest.raises(ValueError, match=r"^mu="):
            update(first, second, value)
    assert same_bits(first, two_blocks(1))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["w", "other"]}, "^other: in group a, but not one of the weights"),
        ({"a": ["w"], "b": ["w", "v"]}, "^w: twice in the groups, the second time in b"),
        ({"a": ["w"]}, "^v: in none of the groups a"),
    ],
)
def test_groups_that_do_not_hold_every_weight_once_are_refused(groups, message):
    init, first, second = ({"w": torch.rand(2), "v": torch.rand(2)} for _ in range(3))
    for call in (
        lambda: slerp(init, first, second, 0.5, groups),
        lambda: slerp(init, first, second, 0.0, groups),
        lambda: slerp_many(init, [first], groups),
        lambda: angles(init, first, second, groups),
        lambda: task_vector_norms(init, first, groups),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_have_no_angle(bad):
    init, first, second = vector(0.0, 0.0), vector(1.0, 2.0), vector(1.0, bad)
    for call in (
        lambda: slerp(init, first, second, 0.5),
        lambda: angles(init, first, second),
        lambda: task_vector_norms(init, second),
    ):
        with pytest.raises(ValueError, match=r"^w: its weights are not finite"):
            call()


def test_tiny_task_vectors_on_large_weights_keep_their_angle():
    # what a small learning rate leaves: steps of a few float32 roundings
    step = 2.0**-20
    init = vector(1.0, 1.0)
    first, second = vector(1.0 + step, 1.0), vector(1.0, 1.0 + step)
    assert angles(init, first, second)["w"] == 90.0
    assert task_vector_norms(init, first)["w"] == step


def test_tensors_without_elements_and_scalars_are_weights_too():
    models = [{"none": torch.zeros(0, 3), "one": torch.tensor(float(seed))} for seed in (0, 1, 3)]
    result = slerp(*models, 0.5)
    assert result["none"].shape == (0, 3) and result["one"].item() == 2.0
    assert angles(*models) == {"one": 0.0}
    assert task_vector_norms(*models[:2]) == {"none": 0.0, "one": 1.0}
