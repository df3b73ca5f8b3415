"""Capture leaves the model unchanged, follows what models do to a batch, and refuses what it cannot handle."""

import copy
from array import array
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.capture import block_sources as sources_file
from adaptive_tangents.capture import passes as passes_file
from adaptive_tangents.capture.batches import check_batch, take
from adaptive_tangents.capture.capture import Capture
from adaptive_tangents.capture.derivatives import disproved
from adaptive_tangents.capture.graph import GraphForm, same_form
from adaptive_tangents.capture.network import Network
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import Dense
from cases import CASES as SMALL
from cases import Case, Forward, mlp, normal
from prepared import every_case_and, fingerprint, over, prepare, with_gradients
from registry import CASES, by_name

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_the_model_is_left_as_found_when_it_raises_midway(fails_at: int) -> None:
    calls: SimpleQueue[None] = SimpleQueue()  # what a model reaches and can be copied is put back, even a counter

    def failing(m: nn.Module, x: Tensor) -> Tensor:
        h = m.fc(x)
        calls.put(None)
        if calls.qsize() == fails_at:
            raise KeyError("on purpose")
        return h.tanh() * m.scale + torch.rand(()) * 0

    model, x = Forward(failing, fc=nn.Linear(4, 2), scale=normal(2)).train(), normal(5, 4)
    before = fingerprint(model, x)
    with pytest.raises(KeyError, match="on purpose"):
        at.tangent_features(model, x)
    assert calls.qsize() == fails_at
    assert fingerprint(model, x) == before


def test_buffers_that_a_forward_pass_updates_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten()).train()
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    before = fingerprint(model, x)
    at.tangent_features(model, x)
    assert fingerprint(model, x) == before


@every_case_and("context", (torch.no_grad, torch.inference_mode))
def test_features_hold_no_graph_and_repeat_to_the_bit_also_where_gradients_are_switched_off(
    case: Case, context: Any
) -> None:
    """And at the same parameters given; the model and the batch are left as found each time."""
    model, x = case.build()
    with_gradients(model)
    one = prepare(case).feats
    assert prepare(case).left_as_found
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with context():
        before = fingerprint(model, x)
        two = at.tangent_features(model, x, params=state, wrt=case.wrt, output_fn=case.output_fn)
        assert fingerprint(model, x) == before
        assert torch.equal(one.dense(), two.dense())
    for name, block in one.blocks.items():
        for part, again in zip(block.summands, two.blocks[name].summands, strict=True):
            for key, tensor in vars(part).items():
                assert not tensor.requires_grad
                assert not vars(again)[key].requires_grad
                assert torch.equal(tensor, vars(again)[key])


def test_features_do_not_change_with_the_batch_or_the_model_afterwards() -> None:
    model, x = by_name["Tanh"].build()
    feats = at.tangent_features(model, x)
    expected = feats.dense().clone()
    x.zero_()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(feats.dense(), expected)


# The parameters at which features are evaluated, and those they differentiate.


@pytest.mark.parametrize(
    "name", ["Tanh", "a layer called twice", "two layers with one weight", "BatchNorm in eval", "LSTM"]
)
def test_features_at_a_state_dict_are_those_of_a_model_that_loaded_it(name: str) -> None:
    case = by_name[name]
    model, x = case.build()
    state = case.build(seed=7)[0].state_dict()
    made = at.tangent_features(model, x, params=state).dense().numpy()
    np.testing.assert_allclose(made, reference.jacobian(model, x, state=state), rtol=0, atol=1e-12)
    assert np.abs(made - reference.jacobian(model, x)).max() > 1e-3


def test_wrt_takes_patterns_parameters_and_several_of_them() -> None:
    model, x = by_name["Tanh"].build()
    for wrt, names in (
        ("2.*", ["2.weight", "2.bias"]),
        (model[0].bias, ["0.bias"]),
        ([model[4].bias, "0.*"], ["0.weight", "0.bias", "4.bias"]),
        (("*.bias", "0.bias"), ["0.bias", "2.bias", "4.bias"]),
    ):
        assert list(at.tangent_features(model, x, wrt=wrt).parameters) == names
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert at.tangent_features(model, x, wrt="*").p == 83


def test_a_layer_added_to_a_module_twice_counts_its_calls() -> None:
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.Tanh(), layer).double(), normal(3, 4)
    feats = at.tangent_features(model, x)
    assert {name: (block.kind, block.positions) for name, block in feats.blocks.items()} == {"0": ("factored", 2)}
    np.testing.assert_allclose(feats.dense().numpy(), reference.jacobian(model, x), rtol=0, atol=1e-12)


def test_a_hook_on_all_modules_does_not_pass_unseen() -> None:
    model, x = by_name["Tanh"].build()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, arguments, out: 2 * out if isinstance(module, nn.Linear) else None
    )
    try:
        made = at.tangent_features(model, x).dense().numpy()
        expected = reference.jacobian(model, x)
    finally:
        handle.remove()
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-12)


def test_an_input_overwritten_behind_the_back_of_autograd_is_not_taken_for_the_input() -> None:
    def sneaky(m: nn.Module, x: Tensor) -> Tensor:
        z = x * 2
        h = m.fc(z)
        z.data.zero_()
        return h

    model, x = Forward(sneaky, fc=nn.Linear(4, 2)), normal(3, 4)
    # Autograd is misled too and gives zeros; capture returns the same, and says that this is no derivative.
    with pytest.warns(at.TangentWarning, match=r"do not change with fc\.weight as autograd's gradient says"):
        feats = at.tangent_features(model, x)
    np.testing.assert_array_equal(feats.dense().numpy(), reference.jacobian(model, x))


def test_bfloat16_features_stay_in_factors() -> None:
    model, x = mlp(nn.GELU, widths=(6, 40, 30, 3)).bfloat16(), normal(20, 6).bfloat16()
    feats = at.tangent_features(model, x)
    assert {block.kind for block in feats.blocks.values()} == {"factored"}
    exact = at.tangent_features(model.double(), x.double()).kernel()
    assert float((feats.kernel() - exact).norm() / exact.norm()) <= 0.05


@pytest.mark.parametrize("steps", [7, 14])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_factored_where_steps_could_be_taken_for_samples(
    layer: type[nn.RNNBase], steps: int
) -> None:
    """The weight sees steps as the first dimension and the bias sees samples as the second; each is handled separately."""
    torch.manual_seed(0)
    body, out = layer(3, 4, batch_first=True).double(), nn.Linear(4, 2).double()
    model = Forward(lambda m, x: m.out(m.body(x)[0][:, -1]), body=body, out=out)
    x = torch.randn(15, steps, 3, dtype=torch.float64)
    feats = at.tangent_features(model, x)
    assert {name for name, block in feats.blocks.items() if block.kind == "factored"} == set(feats.blocks)
    expected = reference.jacobian(model, x)
    np.testing.assert_allclose(feats.dense().numpy(), expected, rtol=1e-9, atol=1e-12)


# Refusals. Every message names the call, the cause and a remedy.


def refused(message: str, model: nn.Module, x: Any, **keywords: Any) -> None:
    before = fingerprint(model, x)
    with pytest.raises(at.TangentError, match="tangent_features: " + message):
        at.tangent_features(model, x, **keywords)
    assert fingerprint(model, x) == before


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4)], ids=lambda norm: type(norm).__name__)
def test_batch_norm_in_training_mode_is_refused(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm).double().train()
    refused(
        r"(Sync)?BatchNorm(1d)? '1' is in training mode, so samples .* call model.eval\(\) first", model, normal(3, 4)
    )


@pytest.mark.parametrize("n", [1, 4])
def test_batch_norm_without_running_statistics_is_refused_in_eval_too(n: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).double().eval()
    refused(r"BatchNorm1d '1' keeps no running statistics, .* track_running_stats=True", model, normal(n, 4))


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.5), nn.Dropout2d(0.1), nn.AlphaDropout(0.2), nn.RReLU(),
        nn.LSTM(4, 4, 2, dropout=0.1), nn.MultiheadAttention(4, 1, 0.1)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_random_layers_in_training_mode_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer).double().train()
    kind = type(layer).__name__
    refused(rf"{kind} '1' is in training mode, so outputs are random; call model.eval\(\) first", model, normal(3, 4))


def test_dropout_at_rate_zero_in_training_mode_is_fine() -> None:
    assert at.tangent_features(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.0)).double().train(), normal(3, 4)).p == 10


MIXING = {
    "batch statistics": lambda m, x: m.fc((x - x.mean(0)) / (1 + x.var(0, unbiased=False))),
    "minus the first sample": lambda m, x: m.fc(x) - m.fc(x)[:1],
    "minus the last sample": lambda m, x: m.fc(x - x[-1:]),
    "cumulative sum": lambda m, x: m.fc(x).cumsum(0),
    "cumulative sum from the end": lambda m, x: m.fc(x).flip(0).cumsum(0).flip(0),
    "divided by the norm of the batch": lambda m, x: m.fc(x) / m.fc(x).norm(),
    "neighbors": lambda m, x: m.fc(x) + x.roll(1, 0)[:, :2],
    "random": lambda m, x: m.fc(x) + torch.rand_like(m.fc(x)),
}


@pytest.mark.parametrize("n", [2, 5, 100])
@pytest.mark.parametrize("mixing", MIXING)
def test_samples_that_influence_each_other_are_refused(mixing: str, n: int) -> None:
    model = Forward(MIXING[mixing], fc=nn.Linear(4, 2))
    message = r"the output of the (first|last) sample is different in the batch and alone \(by .*influence each other"
    refused(message, model, normal(n, 4))


def test_a_difference_at_rounding_is_no_influence() -> None:
    model = Forward(lambda m, x: m.fc(x) + 1e-14 * x.mean(), fc=nn.Linear(4, 2))
    assert at.tangent_features(model, normal(5, 4)).n == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_are_refused_naming_the_first_sample(bad: float) -> None:
    model, x = by_name["Tanh"].build()
    x[3, 1] = x[5, 0] = bad
    refused("the input of sample 3 is not finite; remove the sample or fix its values", model, x)


@pytest.mark.parametrize("k", [0, 1, 4])
def test_non_finite_outputs_are_refused_naming_the_first_sample(k: int) -> None:
    model = Forward(lambda m, x: m.fc(x) / (x[:, :1] != 7), fc=nn.Linear(4, 2))
    x = normal(5, 4)
    x[k:, 0] = 7
    refused(f"the output of sample {k} is not finite", model, x)


def test_non_finite_outputs_between_probed_samples_are_refused_too() -> None:
    model = Forward(lambda m, x: m.fc(x) / (x[:, :1] != 7), fc=nn.Linear(4, 2))
    x = normal(100, 4)
    x[50, 0] = 7
    refused("the output of sample 50 is not finite", model, x)


@pytest.mark.parametrize("k", [0, 2])
def test_non_finite_features_are_refused_naming_block_and_sample(k: int) -> None:
    model = Forward(lambda m, x: m.fc(x).sub(m.fc(x).detach()).abs().sqrt() + x[:, :2], fc=nn.Linear(2, 2))
    refused("the tangent feature in block 'fc' of sample 0 is not finite", model, normal(4, 2))
    lone = Forward(lambda m, x: (x * m.free).square().sum(1, keepdim=True).sqrt(), free=torch.ones(2))
    x = normal(4, 2)
    x[k] = 0
    refused(f"the tangent feature in block 'free' of sample {k} is not finite", lone, x)


@pytest.mark.parametrize(
    ("wrt", "message"),
    [
        ("attn*", r"wrt 'attn\*' matches no parameter; the parameters are 0.weight, 0.bias, 2.weight"),
        (["0.*", "3.*"], r"wrt '3.\*' matches no parameter"),
        (nn.Parameter(torch.ones(2, 3)), r"wrt a tensor of shape \(2, 3\) matches no parameter"),
        ([], "wrt is empty; the parameters are 0.weight"),
    ],
)
def test_wrt_that_matches_nothing_is_refused(wrt: Any, message: str) -> None:
    refused(message, *by_name["Tanh"].build(), wrt=wrt)


def test_a_long_list_of_parameters_is_cut_short() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(10)]).double()
    refused(r"wrt 'x' .*0.weight, .*3.bias and 12 more", model, normal(2, 2), wrt="x")


def test_models_with_nothing_to_differentiate_are_refused() -> None:
    refused("the model has no parameters", nn.Flatten(), normal(3, 4))
    model = mlp(nn.Tanh).requires_grad_(False)
    refused(r"no parameter requires a gradient; name the ones you want, e.g. wrt='\*'", model, normal(3, 4))


PICK = r"pass output_fn=, a function of what the model returns that gives a tensor \(n, c\)"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: m.fc(x)[:, 0], r"the output has shape \(3,\), expected \(3, c\), one row a sample; " + PICK),
        (lambda m, x: m.fc(x)[:, None], r"the output has shape \(3, 1, 2\), expected \(3, c\).*" + PICK),
        (lambda m, x: m.fc(x).mean(), r"the output has shape \(\), expected \(3, c\).*" + PICK),
        (lambda m, x: m.fc(x).argmax(1, keepdim=True), r"the output is torch.int64, which has no derivative; " + PICK),
        (lambda m, x: (m.fc(x), x), r"the model returned tuple, not a tensor; " + PICK),
        (lambda m, x: {"out": m.fc(x)}, r"the model returned dict, not a tensor; " + PICK),
    ],
)
def test_outputs_that_are_not_one_row_a_sample_are_refused(function: Callable[..., Any], message: str) -> None:
    refused(message, Forward(function, fc=nn.Linear(4, 2)), normal(3, 4))


def test_an_output_function_is_held_to_the_same() -> None:
    model, x = by_name["Tanh"].build()
    refused(r"the output has shape \(6,\), expected \(6, c\)", model, x, output_fn=lambda out: out.sum(1))


def test_batches_that_do_not_fit_are_refused() -> None:
    model = Forward(lambda m, *x: m.fc(x[0]), fc=nn.Linear(4, 2))
    refused(
        r"x is torch.float32 and the model torch.float64; convert one with .to\(dtype\)", model, normal(3, 4).float()
    )
    refused(r"the tensors of x hold different numbers of samples: \[2, 3\]", model, (normal(3, 4), normal(2, 4)))
    refused("x holds no samples", model, normal(0, 4))
    refused("every tensor of x has the samples as its first dimension; got a scalar or nothing", model, normal())
    refused("every tensor of x has the samples as its first dimension; got a scalar or nothing", model, ())
    refused("every tensor of x has the samples as its first dimension; got a scalar or nothing", model, {})
    with pytest.raises(
        at.TangentError, match=r"tangent_features: x is on meta and the model on cpu; move one with .to"
    ):
        at.tangent_features(model, normal(3, 4).to("meta"))


@pytest.mark.parametrize("x", [[np.ones(2)], np.ones(3), "text", None])
def test_batches_that_are_no_tensors_are_refused(x: Any) -> None:
    # This bypasses the annotations, which the type checker and the run-time checks would enforce.
    with pytest.raises(at.TangentError, match=r"f: x is a tensor, or a tuple, list, dict or dataclass of"):
        check_batch("f", x, {"w": torch.ones(2)})


def tanh_state() -> dict[str, Tensor]:
    return copy.deepcopy(by_name["Tanh"].build()[0].state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"9.weight": torch.ones(2)}, "unknown 9.weight; pass a state dict of this architecture"),
        ({"2.bias": None}, "missing 2.bias; pass a state dict"),
        ({"2.bias": torch.ones(4)}, r"of another shape: 2.bias \(4,\) for \(5,\)"),
        ({"9.weight": torch.ones(2), "0.bias": None}, "missing 0.bias; unknown 9.weight"),
        ({"0.bias": torch.ones(6)}, "'0.bias' as torch.float32 on cpu, the model as torch.float64 on cpu; convert"),
        ({"0.bias": normal(6).to("meta")}, "'0.bias' as torch.float64 on meta, the model as torch.float64 on cpu"),
        ({"0.bias": normal(6) * torch.nan}, "holds a non-finite value in '0.bias'; use another checkpoint"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    state = tanh_state() | {name: value for name, value in change.items() if value is not None}
    state = {name: value for name, value in state.items() if change.get(name, value) is not None}
    refused("the state dict .*" + message, *by_name["Tanh"].build(), params=state)


def test_a_state_dict_with_names_of_shared_parameters_fits() -> None:
    model, x = by_name["two layers with one weight"].build()
    state = model.state_dict()
    assert {"a.weight", "b.weight"} <= set(state)
    assert at.tangent_features(model, x, params=state).p == at.tangent_features(model, x).p


def test_a_state_dict_with_two_values_for_one_shared_parameter_is_refused() -> None:
    model, x = by_name["two layers with one weight"].build()
    state = model.state_dict()
    state["b.weight"] = state["b.weight"] + 1
    message = "the state dict holds different values for 'a.weight' and 'b.weight', which are one tensor"
    refused(message, model, x, params=state)
    del state["b.weight"]
    at.tangent_features(model, x, params=state)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_of_width_zero_have_no_features() -> None:
    model, x = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.Linear(3, 2)).double(), normal(5, 4)
    feats = at.tangent_features(model, x)
    assert list(feats.blocks) == ["1.bias", "2"]
    np.testing.assert_allclose(
        feats.dense().numpy(), reference.jacobian(model, x, names=["1.bias", "2.weight", "2.bias"])
    )
    refused("wrt '0.*' matches no parameter", model, x, wrt="0.*")
    refused("the model's parameters have no entries", nn.Sequential(nn.Linear(4, 0)), x)


def test_too_little_memory_is_refused_before_the_batch_is_run() -> None:
    sizes: SimpleQueue[int] = SimpleQueue()
    model = Forward(lambda m, x: (sizes.put(len(x)), m.fc(x))[1], fc=nn.Linear(4, 2))
    refused(
        r"needs 1.8\d MB of memory and the limit is 1 MB; take fewer samples, narrow wrt, or use tangent_kernel, which "
        "works tile by tile, or raise memory_limit",
        model, normal(13_000, 4), memory_limit=10**6,
    )  # fmt: skip
    assert max(sizes.get() for _ in range(sizes.qsize())) <= 32


def test_too_little_memory_for_what_cannot_be_factored_is_refused_naming_it() -> None:
    model, x = by_name["a gate that sorts the batch"].build()
    message = (
        r"needs .* is 100 bytes; take fewer samples, or narrow wrt: fc\.weight, fc\.bias cannot be factored, or raise"
    )
    refused(message, model, x, memory_limit=100)


def test_the_memory_limit_is_positive() -> None:
    with pytest.raises(at.TangentError, match="memory_limit: expected a positive number of bytes, got -5"):
        at.tangent_features(*by_name["Tanh"].build(), memory_limit=-5)


def test_an_input_that_the_model_overwrites_is_kept_as_the_layer_saw_it() -> None:
    def fickle(m: nn.Module, x: Tensor) -> Tensor:
        z = x * 1
        h = m.fc(z)
        z += 1
        return h

    model, x = Forward(fickle, fc=nn.Linear(4, 2)), normal(3, 4)
    np.testing.assert_allclose(
        at.tangent_features(model, x).dense().numpy(),
        reference.jacobian(Forward(lambda m, x: m.fc(x), fc=model.fc), x),
        rtol=0, atol=1e-12,
    )  # fmt: skip


def test_what_autograd_itself_refuses_is_seen_through() -> None:
    """As many tokens as samples, tokens first, and an input overwritten so that plain autograd raises."""

    def overwritten(m: nn.Module, x: Tensor) -> Tensor:
        z = x.transpose(0, 1) * 1
        h = m.fc(z).tanh().mean(0)
        z.zero_()
        return h

    model, x = Forward(overwritten, fc=nn.Linear(4, 2)), normal(3, 3, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        reference.jacobian(model, x)
    plain = Forward(lambda m, x: m.fc(x.transpose(0, 1)).tanh().mean(0), fc=nn.Linear(4, 2))
    plain.load_state_dict(model.state_dict())
    np.testing.assert_allclose(
        at.tangent_features(model, x).dense().numpy(), reference.jacobian(plain, x), rtol=0, atol=1e-12
    )


def test_a_second_batch_is_checked_as_the_first_was() -> None:
    model = Forward(lambda m, x: m.fc(x), fc=nn.Linear(4, 2))
    capture = Capture("call", model, normal(3, 4), None, None, None, None)
    with pytest.raises(at.TangentError, match=r"call: x is torch\.float32 and the model torch\.float64"):
        capture.check_more(normal(3, 4).float())
    assert take((normal(3), normal(3, 2)), slice(0, 2))[1].shape == (2, 2)


ONE_BY_ONE = {
    "a convolution without samples": {"conv"},
    "a gate that sorts the batch": {"fc"},
    "experts": {"a", "b"},
}
MADE_OUTRIGHT = {
    "a learned query": {"query", "to_query"},
    "a learned query and one sample": {"query"},
    "two learned queries and two samples": {"query", "to_query"},
    "a weight penalized in the output": {"fc"},
    "a weight penalized a little in the output": {"fc"},
    "a lone scale": {"free"},
    "a lone vector": {"free"},
    "an unused parameter": {"free"},
    "an unused layer": {"spare"},
    "LayerNorm": {"1.weight", "1.bias"},
    "BatchNorm in eval": {"1.weight", "1.bias"},
    "grouped and depthwise convolutions": {"0", "2"},
    "transposed convolutions": {"0.bias"},
    "a transposed convolution with room left over": {"0.bias"},
    "a grouped transposed convolution": {"0.weight", "0.bias"},
    "norms of images": {"1.weight", "1.bias", "4.weight", "4.bias", "6.weight", "6.bias"},
    "InstanceNorm with running statistics": {"1.weight", "1.bias"},
    "norms of tokens": {"layer.weight", "layer.bias", "rms.weight"},
    "a residual network": {"n.weight", "n.bias"},
    "control flow by item()": {"scale"},
    "control flow by numpy()": {"scale"},
    "a subclass with its own forward": {"0.bias"},
    "a subclass without its own forward": {"0.extra"},
    "a forward set on the instance": {"0.bias"},
    "weight norm": {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
}


@over(SMALL)
def test_samples_are_gone_through_one_by_one_only_where_neither_layers_nor_the_graph_can_tell(case: Case) -> None:
    model, x = case.build()
    capture = Capture("call", model, x, None, case.wrt, case.output_fn, None)
    probe = capture.probe
    _, blocks = capture._in_one_pass(x)
    assert set(probe.dense) - set(blocks) == ONE_BY_ONE.get(case.name, set())
    assert {name for name, block in blocks.items() if block.dense is not None} == MADE_OUTRIGHT.get(case.name, set())


def _plain() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3)
    )
    return model.double(), normal(20, 2, 4, 4)


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The blocks that each pass compares with gradients."""
    checked: list[set[str]] = []

    def watching(
        out: Tensor, leaves: dict[str, Tensor], blocks: dict[str, Block], dtype: torch.dtype
    ) -> frozenset[str]:
        checked.append(set(blocks))
        return disproved(out, leaves, blocks, dtype)

    monkeypatch.setattr(passes_file, "disproved", watching)
    return checked


def _after_a_probe(model: nn.Module, x: Any, **options: Any) -> at.TangentFeatures:
    return Capture("call", model, x, None, options.get("wrt"), options.get("output_fn"), None).features(x)


@over(SMALL)
def test_features_that_are_made_at_once_are_those_made_after_a_probe(case: Case) -> None:
    ready = prepare(case)
    made = _after_a_probe(ready.model, ready.x, wrt=case.wrt, output_fn=case.output_fn)
    assert {name: block.kind for name, block in made.blocks.items()} == {
        name: block.kind for name, block in ready.feats.blocks.items()
    }
    scale = np.abs(ready.phi).max()
    np.testing.assert_allclose(
        made.dense().double(), ready.feats.dense().double(), rtol=0, atol=ready.tolerance * max(scale, 1)
    )


# In some layer of these, samples have no fixed place, or no rule fits a use of a parameter: they are captured after a probe.
AFTER_A_PROBE = {
    "a convolution without samples", "a gate that sorts the batch", "experts", "MultiheadAttention with a bias key",
    "EmbeddingBag, max", "EmbeddingBag with weights", "Fourier filter", "distances to learned centers",
    "LSTM of packed sequences", "tokens in an order of their own", "chunks of the batch", "one sample at a time",
    "samples reversed",
}  # fmt: skip


@over(CASES)
def test_no_other_network_makes_the_features_of_a_small_batch_twice(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = case.build()
    found, at_once = list[bool](), Capture._at_once

    def watched(capture: Capture, *given: Any) -> Any:
        probe = at_once(capture, *given)
        found.append(probe is not None)
        return probe

    monkeypatch.setattr(Capture, "_at_once", watched)
    at.tangent_features(model, x, wrt=case.wrt, output_fn=case.output_fn)
    assert found == [case.name not in AFTER_A_PROBE]


def test_a_small_batch_whose_features_are_refuted_is_captured_after_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _plain()

    def blocks_from(*given: Any, known: Any = None, **options: Any) -> Any:
        blocks, kept = sources_file.blocks_from(*given, known=known, **options)
        wrong = options["batched"] or known is not None  # at once, or by another choice from the gradients made at once
        return ({name: block.scaled(2.0) for name, block in blocks.items()} if wrong else blocks), kept

    checked = _watched(monkeypatch)
    monkeypatch.setattr(passes_file, "blocks_from", blocks_from)
    feats = at.tangent_features(model, x)
    assert checked[0] == set(feats.blocks)
    assert checked[-2:] == [set(feats.blocks), set()]
    np.testing.assert_allclose(feats.dense().numpy(), reference.jacobian(model, x), atol=1e-12)


def _passes(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[bool]]:
    """The samples of every pass forward, and of every pass backward whether it is of all outputs together."""
    forwards, backwards, run, grad = list[int](), list[bool](), Network.run, torch.autograd.grad

    def forward(network: Network, given: Tensor) -> Tensor:
        forwards.append(len(given))
        return run(network, given)

    def backward(*arguments: Any, **options: Any) -> Any:
        backwards.append(bool(options.get("is_grads_batched")))
        return grad(*arguments, **options)

    monkeypatch.setattr(Network, "run", forward)
    monkeypatch.setattr(torch.autograd, "grad", backward)
    return forwards, backwards


def test_a_small_batch_takes_three_passes_forward_and_two_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double(), normal(6, 4)
    taken = _passes(monkeypatch)
    feats = at.tangent_features(model, x)
    assert taken == ([1, 6, 1], [True, False])
    np.testing.assert_allclose(feats.dense().numpy(), reference.jacobian(model, x), atol=1e-12)


def test_a_block_whose_first_guess_is_wrong_is_made_from_the_gradients_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows of a layer may be sample by sample or, as in attention and recurrent layers, token by token.
    model = Forward(
        lambda self, x: self.head(torch.tanh(self.fc(x.transpose(0, 1).reshape(-1, 4))).reshape(2, -1, 3).sum(0)),
        fc=nn.Linear(4, 3), head=nn.Linear(3, 5),
    ).double()  # fmt: skip
    x = normal(6, 2, 4)
    taken = _passes(monkeypatch)
    feats = at.tangent_features(model, x)
    assert taken == ([1, 6, 1], [True, False, False]), "one more comparison with autograd, and no more gradients"
    np.testing.assert_allclose(feats.dense().numpy(), reference.jacobian(model, x), atol=1e-12)


def test_a_batch_that_shows_what_its_probe_did_needs_no_second_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _plain()
    checked = _watched(monkeypatch)
    feats = _after_a_probe(model, x)
    assert checked == [set(feats.blocks), set()]
    np.testing.assert_allclose(feats.dense().numpy(), reference.jacobian(model, x), atol=1e-12)


@pytest.mark.parametrize("fault", ["samples in another order", "an output's features are wrong", "one sample's are"])
def test_features_that_are_wrong_in_the_whole_batch_only_are_found_out(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _plain()

    def spoilt(block: Block) -> Block:
        assert block.dense is not None or block.outer is not None
        values = block.features().clone()
        if fault == "samples in another order":
            values = values.flip(0)
        elif fault == "one sample's are":
            values[0] *= 2  # the first is always probed
        else:
            values[:, 1] *= 2
        return block.of([Dense(values)])

    def blocks_from(groups: Any, sources: Any, out: Tensor, *rest: Any, **options: Any) -> Any:
        blocks, reach = sources_file.blocks_from(groups, sources, out, *rest, **options)
        return ({name: spoilt(b) for name, b in blocks.items()} if len(out) == 20 else blocks), reach

    checked = _watched(monkeypatch)
    monkeypatch.setattr(passes_file, "blocks_from", blocks_from)
    feats = _after_a_probe(model, x)
    # The norm's bias has the same features for every sample.
    assert checked[1:] == [set(feats.blocks) - ({"4.bias"} if fault == "samples in another order" else set())]
    np.testing.assert_allclose(feats.dense().numpy(), reference.jacobian(model, x), atol=1e-12)


class Relu(torch.autograd.Function):
    """A function with one of torch's names but a different derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


@pytest.mark.parametrize(
    "function",
    [lambda self, x: self.fc(x)[:, [2, 0, 1]], lambda self, x: Relu.apply(self.fc(x))],
    ids=["an index", "an operation of one's own"],
)
def test_where_operations_may_tell_samples_apart_every_pass_is_checked(
    function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Forward(function, fc=nn.Linear(4, 3)), normal(20, 4)
    checked = _watched(monkeypatch)
    feats = _after_a_probe(model, x)
    assert checked == [{"fc"}, {"fc"}]
    np.testing.assert_allclose(feats.dense().numpy(), reference.jacobian(model, x), atol=1e-12)


def test_graphs_are_the_same_where_only_the_number_of_samples_differs() -> None:
    def form(*operations: tuple[str, tuple[tuple[int, ...], ...], tuple[int, ...]]) -> GraphForm:
        names, shapes, users = zip(*operations, strict=True)
        return GraphForm(names, array("q", range(len(names))), array("q", [k for some in users for k in some]), shapes)

    view, other_view = ("View", ((21, 2), (3,)), (0, 0, 0)), ("View", ((60, 2), (3,)), (0, 0, 0))
    first = ("Mm", ((20, 4),), ())
    one, two = form(("Mm", ((7, 4),), ()), view), form(first, other_view)
    assert same_form(one, 7, two, 20)
    assert same_form(one, 7, one, 7)
    assert not same_form(one, 7, None, 20)
    assert not same_form(None, 7, two, 20)
    assert not same_form(one, 7, form(first), 20)
    assert not same_form(one, 7, form(("Bmm", ((20, 4),), ()), other_view), 20)
    assert not same_form(one, 7, form(("Mm", ((20, 5),), ()), other_view), 20)
    assert not same_form(one, 7, form(("Mm", ((20, 4, 1),), ()), other_view), 20)
    assert not same_form(one, 7, form(first, (*other_view[:2], (0, 1, 0))), 20)


def test_an_instance_norm_in_training_uses_the_statistics_of_each_sample() -> None:
    model, x = by_name["InstanceNorm with running statistics"].build()
    model.train()
    assert not Capture("call", model, x, None, None, None, None).probe.refuted
    np.testing.assert_allclose(at.tangent_features(model, x).dense().numpy(), reference.jacobian(model, x), atol=1e-12)


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoder, batch first, pre-norm", "Transformer"])
def test_passes_of_one_sample_and_of_several_join(name: str) -> None:
    # One sample's graph shows other uses than that of several, so blocks have other numbers of positions.
    case = by_name[name]
    model, x = case.build()
    capture = Capture("call", model, x, None, case.wrt, case.output_fn, None)
    for chunk in (1, 2):
        np.testing.assert_allclose(capture.features(x, chunk).dense(), capture.features(x).dense(), atol=1e-10)
