"""A forecast is made of exact fits: what it must be on linear models, against dense algebra, and over its steps."""

import dataclasses
import importlib
import inspect
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.capture.batches import samples
from adaptive_tangents.forecasting import load_forecast
from cases import Case, mlp
from prepared import draw, fingerprint, prepare
from registry import by_name

trust_region = importlib.import_module("adaptive_tangents.forecasting.trust_region")
trials = importlib.import_module("adaptive_tangents.forecasting.trials")
forecast = inspect.unwrap(at.forecast)  # without the tests' shape checks, which would fail first


def network(seed: int = 0, outputs: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp(nn.Tanh, widths=(4, 8, outputs))


X = draw(30, 4)
Y = X[:, :1] * X[:, 1:2] + 0.5 * X[:, 2:3]


def flat(state: Any, model: nn.Module) -> Tensor:
    return torch.cat([state[name].flatten() for name, _ in model.named_parameters()])


# ------------------------------------------------------------------------------------- what it must be, against algebra


@pytest.mark.parametrize(
    "name",
    [
        "one output", "frozen layers", "two layers with one weight", "embedding of indices", "BatchNorm in eval",
        "grouped and depthwise convolutions", "attention", "a dict of inputs and an output picked",
    ],
)  # fmt: skip
def test_a_step_of_fixed_is_dense_kernel_regression_of_what_is_left(name: str) -> None:
    case: Case = by_name[name]
    p = prepare(case)
    names = case.names or tuple(k for k, q in p.model.named_parameters() if q.requires_grad)
    out = reference.evaluate(p.model, p.x, case.output_fn).detach().double()
    y = out + draw(*out.shape, seed=5)
    told = at.forecast(
        p.model, p.x, y, structure=at.Fixed(), ridge=0.7, validation=0, steps=1, wrt=case.wrt, output_fn=case.output_fn
    )
    (step,) = told.steps
    phi = p.phi.reshape(out.numel(), -1)
    K = phi @ phi.T
    ridge = 0.7 * 4.0 ** (step.tries - 1) * np.trace(K) / len(K)
    assert step.ridge == pytest.approx(ridge, rel=1e-6)
    beta = phi.T @ np.linalg.solve(K + ridge * np.eye(len(K)), (y - out).numpy().ravel())
    before = np.concatenate([told.start[k].detach().double().numpy().ravel() for k in names])
    after = np.concatenate([told.params[k].double().numpy().ravel() for k in names])
    np.testing.assert_allclose(after - before, step.length * beta, rtol=0, atol=1e-6 * np.abs(beta).max())
    others = told.start.keys() - {k for k, q in p.model.named_parameters(remove_duplicate=False) if q.requires_grad}
    assert all(torch.equal(told.start[k], told.params[k]) for k in others)
    assert all(torch.equal(value, told.start[k]) for k, value in p.model.state_dict().items())
    assert told.passes["backward"] == out.shape[1]
    assert samples(told.x) == len(out)


def test_the_forecast_of_a_linear_model_is_exact() -> None:
    model = nn.Linear(4, 2).double()
    y = draw(30, 2, seed=1)
    design = torch.cat([X, torch.ones(30, 1, dtype=X.dtype)], 1)
    least = torch.linalg.lstsq(design, y).solution.T
    found = at.forecast(model, X, y, structure=at.Fixed(), ridge=1.0, validation=0, steps=12).params
    torch.testing.assert_close(torch.cat([found["weight"], found["bias"][:, None]], 1), least, rtol=0, atol=1e-6)
    # One step is the ridge solution around θ₀, of strength κ times the mean eigenvalue of K = XXᵀ ⊗ I.
    ridge = 0.5 * float((design**2).sum()) / 30
    start = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    gram = design.T @ design + ridge * torch.eye(5, dtype=X.dtype)
    solution = start + torch.linalg.solve(gram, design.T @ (y - design @ start.T)).T
    found = at.forecast(model, X, y, structure=at.Fixed(), ridge=0.5, validation=0, steps=1).params
    torch.testing.assert_close(torch.cat([found["weight"], found["bias"][:, None]], 1), solution, rtol=0, atol=1e-9)


def test_no_change_is_foretold_where_nothing_is_left_to_learn() -> None:
    model = network()
    told = at.forecast(model, X, model(X).detach())
    assert told.steps == told.fits == ()
    assert told.alignment == {}
    assert all(torch.equal(told.params[k], value) for k, value in model.state_dict().items())
    assert "nothing is left to learn" in told.reason
    assert told.summary().startswith("Foretold: training on squared error changes nothing; ")
    kernels = told.kernels(X[:5])
    assert torch.equal(kernels.initial, kernels.average)
    assert {block.share for block in told.blocks.values()} == {0.0}


def test_without_adaptation_two_sided_foretells_what_fixed_does() -> None:
    strong, fixed = (
        at.forecast(network(), X, Y, structure=structure, steps=3)
        for structure in (at.TwoSided(at.Quadratic(1e12)), at.Fixed())
    )
    for k, value in fixed.params.items():
        torch.testing.assert_close(strong.params[k], value, rtol=0, atol=1e-6)
    assert len(fixed.steps) > 1
    weak = at.forecast(network(), X, Y, structure=at.TwoSided(at.Quadratic(0.3)), steps=1)
    assert not torch.allclose(weak.params["0.weight"], fixed.params["0.weight"], atol=1e-2)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_the_loss_never_rises_and_is_that_of_the_network_at_its_parameters(loss: Any) -> None:
    model = network(outputs=3 if loss == "cross-entropy" else 1)
    labels = (Y[:, 0] > 0).long() + (Y[:, 0] > 1).long()
    y = Y if loss == "squared" else labels
    told = at.forecast(model, X, y, loss=loss, validation=0, steps=4, strength=1.0, ridge=0.05)
    assert min(step.length for step in told.steps) < 1
    course = [told.initial_loss, *(step.loss for step in told.steps)]
    assert all(after < before for before, after in pairwise(course))
    assert all(step.agreement >= 0.25 for step in told.steps)
    with torch.no_grad():
        out = torch.func.functional_call(model, dict(told.params), (X,))
    true = nn.functional.mse_loss(out, Y) if loss == "squared" else nn.functional.cross_entropy(out, labels)
    assert told.steps[-1].loss == pytest.approx(float(true), rel=1e-9)
    moved = sum(step.length * flat_fit(fit, model) for step, fit in zip(told.steps, told.fits, strict=True))
    torch.testing.assert_close(flat(told.params, model) - flat(told.start, model), moved, rtol=0, atol=1e-9)


def flat_fit(fit: at.Fit, model: nn.Module) -> Tensor:
    parts = {
        k: v for name, block in fit.features.blocks.items() for k, v in block.split(fit.coefficients[name]).items()
    }
    return flat(parts, model)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_step_on_labels_is_a_fit_of_cross_entropy(outputs: int) -> None:
    model, labels = network(outputs=outputs), (Y[:, 0] > 0).long()
    told = at.forecast(model, X, labels, loss="cross-entropy", structure=at.Fixed(), ridge=2.0, validation=0, steps=1)
    (step,) = told.steps
    feats, offset = at.tangent_features(model, X), model(X).detach()
    p = offset.sigmoid() if outputs == 1 else offset.softmax(1)
    mean = float(feats.dense().pow(2).sum()) / (30 * outputs)
    ridge = 2.0 * mean * float((p * (1 - p)).mean()) / 2
    assert step.ridge == pytest.approx(ridge * 4.0 ** (step.tries - 1), rel=1e-6)
    fit = at.fit(feats, labels, loss="cross-entropy", offset=offset, structure=at.Fixed(), ridge=step.ridge)
    for name, B in fit.coefficients.items():
        torch.testing.assert_close(told.fits[0].coefficients[name], B, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- held-out samples


def test_the_same_seed_gives_the_same_numbers_and_another_holds_out_other_samples() -> None:
    one, again, other = (at.forecast(network(), X, Y, steps=2, seed=seed) for seed in (0, 0, 1))
    timeless = [[dataclasses.replace(step, seconds=0.0) for step in told.steps] for told in (one, again)]
    assert timeless[0] == timeless[1]
    assert all(torch.equal(one.params[k], again.params[k]) for k in one.params)
    assert one.initial_held_out != other.initial_held_out


def test_held_out_samples_have_no_part_in_a_candidate() -> None:
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    held, kept = order[:6], order[6:].sort().values
    told = at.forecast(network(), X, Y, steps=2, seed=3)
    alone = at.forecast(network(), X[kept], Y[kept], steps=len(told.steps), validation=0, structure=told.structure)
    for k, value in alone.params.items():
        torch.testing.assert_close(told.params[k], value, rtol=0, atol=1e-9)
    with torch.no_grad():
        out = torch.func.functional_call(network(), dict(told.params), (X[held],))
    assert told.steps[-1].held_out == pytest.approx(float(((out - Y[held]) ** 2).mean()), rel=1e-9)
    spoiled = Y.clone()
    spoiled[held] += 100.0
    again = at.forecast(network(), X, spoiled, steps=1, seed=3, structure=at.Fixed())
    first = at.forecast(network(), X, Y, steps=1, seed=3, structure=at.Fixed()).candidates[0].steps[0]
    assert again.candidates[0].steps[0].loss == first.loss


def test_of_the_steps_those_with_the_least_held_out_loss_are_taken() -> None:
    noisy = Y + 3 * draw(30, 1, seed=9)
    told = at.forecast(network(), X, noisy, ridge=0.01)
    for each in told.candidates:
        errors = [told.initial_held_out, *(step.held_out for step in each.steps)]
        assert each.chosen == int(np.argmin(errors))
        assert each.held_out == min(errors)
        assert len(each.steps) <= each.chosen + 2 or each.chosen == 8
    assert any(len(each.steps) > each.chosen for each in told.candidates)
    mine = next(each for each in told.candidates if each.structure is told.structure)
    assert mine.steps[: mine.chosen] == told.steps


@pytest.mark.parametrize(("held", "place"), [(2.5, 1), (2.99, 1), (3.01, 0), (0.5, 1)])
def test_what_adapts_is_chosen_unless_its_held_out_loss_is_a_fifth_higher(held: float, place: int) -> None:
    losses = (torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), torch.full((4,), held, dtype=torch.float64))
    walk = object.__new__(trust_region.Walk)
    candidates = [trials.Trial("", walk, {}, each, each) for each in losses]
    assert trials.chosen(candidates) is candidates[place]


def test_strengths_are_in_units_of_what_is_left_of_the_target() -> None:
    told = at.forecast(network(), X, Y, strength=[0.5, 4.0], steps=1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    size = float(((Y - network()(X).detach())[order[6:]] ** 2).mean())
    strengths = [each.structure.left.strength for each in told.candidates[1:]]
    assert strengths == pytest.approx([4.0 * size, 0.5 * size], rel=1e-9)
    assert isinstance(told.candidates[0].structure, at.Fixed)
    scaled = at.forecast(network(), X, 100 * (Y - network()(X).detach()) + network()(X).detach(), steps=1, strength=1.0)
    assert scaled.candidates[1].structure.left.strength == pytest.approx(1e4 * size, rel=1e-6)


def test_a_target_in_other_units_is_reached_by_steps_in_those_units() -> None:
    linear = nn.Linear(4, 2, bias=False).double()
    left = torch.randn(30, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = linear.weight.detach().clone()
    moves = [
        at.forecast(linear, X, linear(X).detach() + a * left, strength=1.0, steps=2, seed=1).params["weight"] - start
        for a in (1.0, 1000.0)
    ]
    torch.testing.assert_close(moves[1], 1000 * moves[0], rtol=1e-6, atol=0)


def test_larger_features_adapt_as_if_the_strength_were_larger() -> None:
    feats = at.tangent_features(network(), X)
    larger = feats.transformed(dict.fromkeys(feats.blocks, at.features.transforms.Sides(scale=10.0)))
    one = at.fit(larger, Y, structure=at.TwoSided(at.Quadratic(0.3)), ridge=100.0, tol=1e-10)
    other = at.fit(feats, Y, structure=at.TwoSided(at.Quadratic(30.0)), ridge=1.0, tol=1e-10)
    for name, found in other.coefficients.items():
        torch.testing.assert_close(10 * one.coefficients[name], found, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------------- ends that are worded


class Function(nn.Module):
    def __init__(self, function: Any, **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.function(self, x)
        return made


def test_a_trust_region_that_shrinks_to_nothing_ends_with_a_worded_reason() -> None:
    model = Function(lambda m, x: torch.tanh(m.w) + 0 * x[:, :1], w=torch.zeros(1, dtype=torch.float64))
    told = at.forecast(model, X, torch.full((30, 1), 1e6, dtype=torch.float64), structure=at.Fixed(), validation=0)
    assert told.steps == ()
    assert told.reason.startswith("the trust region shrank to nothing: 8 ridges, up to 4.9e+04 times")
    assert torch.equal(told.params["w"], model.w)
    assert told.reason in told.summary()


def test_no_change_is_foretold_where_every_step_raises_the_held_out_loss() -> None:
    told = at.forecast(network(), X, 100 * draw(30, 1, seed=9), structure=at.Fixed(), ridge=1e-3, steps=1)
    assert told.candidates[0].steps[0].held_out > told.initial_held_out
    assert told.steps == ()
    assert told.reason.startswith("no step lowers the held-out loss")
    assert torch.equal(told.params["0.weight"], told.start["0.weight"])


def test_features_that_are_zero_end_with_a_worded_reason() -> None:
    model = Function(lambda m, x: m.w**2 * x[:, :1], w=torch.zeros(1, dtype=torch.float64))
    told = at.forecast(model, X, Y, steps=1)
    assert told.steps == ()
    assert "features of all samples are zero" in told.reason


def test_a_length_at_which_outputs_are_not_finite_is_passed_over() -> None:
    model = Function(
        lambda m, x: torch.where(m.w > 0.6, torch.inf, m.w) + 0 * x[:, :1], w=torch.zeros(1, dtype=torch.float64)
    )
    told = at.forecast(
        model, X, torch.ones(30, 1, dtype=torch.float64), structure=at.Fixed(), ridge=1e-3, validation=0, steps=1
    )
    assert told.steps[0].length == 0.5


def test_a_step_after_which_held_out_outputs_are_not_finite_is_not_chosen() -> None:
    held = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:6]
    x = torch.zeros(30, 1, dtype=torch.float64).index_fill(0, held, 1.0)
    model = Function(
        lambda m, x: torch.where((m.w > 0.6) & (x > 0), torch.inf, m.w + 0 * x), w=torch.zeros(1, dtype=torch.float64)
    )
    told = at.forecast(model, x, torch.ones(30, 1, dtype=torch.float64), structure=at.Fixed(), ridge=1e-3, steps=1)
    assert told.candidates[0].steps[0].held_out == math.inf
    assert told.steps == ()
    assert told.reason.startswith("no step lowers the held-out loss")


def test_no_ridge_is_weaker_than_the_fit_before_has_earned() -> None:
    told = at.forecast(network(), X, Y, structure=at.Fixed(), validation=0, steps=8)
    for before, after in pairwise(told.steps):
        expected = before.relative_ridge * (1 / 3 if before.agreement >= 0.75 else 1.0) * 4.0 ** (after.tries - 1)
        assert after.relative_ridge == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------ what it promises


@pytest.mark.parametrize("name", ["BatchNorm in eval", "two layers with one weight", "hooks of the user", "float32"])
def test_the_model_is_left_as_found(name: str) -> None:
    model, x = by_name[name].build()
    with torch.no_grad():
        y = model(x).detach() + 1
    before = fingerprint(model, x)
    told = at.forecast(model, x, y, steps=1, validation=0.3)
    assert told.steps
    assert fingerprint(model, x) == before
    twin, _ = by_name[name].build()
    twin.load_state_dict(dict(told.params))
    assert {k: v.dtype for k, v in told.params.items()} == {k: v.dtype for k, v in model.state_dict().items()}


def test_a_shared_weight_has_one_value_under_all_its_names() -> None:
    model, x = by_name["two layers with one weight"].build()
    told = at.forecast(model, x, model(x).detach() + 1, structure=at.Fixed(), steps=1, validation=0)
    names = [k for k, p in model.named_parameters(remove_duplicate=False)]
    shared = [k for k in names if k not in dict(model.named_parameters())]
    assert shared
    (first,) = (
        k for k, p in model.named_parameters() if p is dict(model.named_parameters(remove_duplicate=False))[shared[0]]
    )
    assert torch.equal(told.params[shared[0]], told.params[first])
    assert not torch.equal(told.params[first], told.start[first])


def test_complex_parameters_stay_complex() -> None:
    model = Function(
        lambda m, x: torch.view_as_real(x.to(m.w.dtype) @ m.w).flatten(1), w=torch.ones(4, 1, dtype=torch.complex128)
    )
    told = at.forecast(model, X, draw(30, 2), structure=at.Fixed(), validation=0, steps=1)
    assert told.params["w"].dtype == torch.complex128
    assert told.steps[0].loss < told.initial_loss


def test_kernels_are_those_of_the_states_and_of_the_path_between() -> None:
    model = network()
    told = at.forecast(model, X, Y, steps=2)
    kernels = told.kernels(X[:9], nodes=4)
    for K, state in ((kernels.initial, told.start), (kernels.final, told.params)):
        torch.testing.assert_close(K, at.tangent_features(model, X[:9], params=state).kernel())
    average = at.average_features(model, told.start, told.params, X[:9], nodes=4)
    torch.testing.assert_close(kernels.average, average.kernel())
    assert kernels.cka == {
        "average": at.cka(kernels.initial, kernels.average),
        "final": at.cka(kernels.initial, kernels.final),
    }
    assert told.kernels(X[:9], outputs="trace").final.shape == (9, 9)
    change = at.forecast(model, X, Y, steps=2).change
    with torch.no_grad():
        after = torch.func.functional_call(model, dict(told.params), (X,))
        torch.testing.assert_close(change, after - model(X))
    turned = told.alignment["change"]
    K = told.kernels(X, outputs="trace").final
    assert turned["final"] == pytest.approx(at.alignment(K, change, centered=True))
    assert set(told.alignment) == {"change", "cka"}


def test_blocks_share_the_change_and_have_its_rank() -> None:
    model = network(outputs=3)
    told = at.forecast(model, X, torch.cat([Y, Y**2, -Y], 1), steps=2)
    assert math.fsum(block.share for block in told.blocks.values()) == pytest.approx(1.0)
    for name, block in told.blocks.items():
        change = torch.cat(
            [told.params[f"{name}.weight"] - told.start[f"{name}.weight"],
             (told.params[f"{name}.bias"] - told.start[f"{name}.bias"])[:, None]], 1
        )  # fmt: skip
        assert block.norm == pytest.approx(float(change.norm()))
        assert block.rank == pytest.approx(at.effective_rank(change).participation)
        assert block.shape == tuple(change.shape)
    assert f"{next(iter(told.blocks))}, effective rank" in told.summary()


def test_a_saved_forecast_is_read_back(tmp_path: Any) -> None:
    model = network()
    told = at.forecast(model, X, Y, steps=2)
    told.save(tmp_path / "told.safetensors")
    found = load_forecast(tmp_path / "told.safetensors", model, x=X)
    assert all(
        torch.equal(found.params[k], v) and torch.equal(found.start[k], told.start[k]) for k, v in told.params.items()
    )
    assert found.steps == told.steps
    assert found.blocks == told.blocks
    assert found.structure == str(told.structure)
    assert found.summary().splitlines()[1:3] == told.summary().splitlines()[1:3]
    assert found.alignment == told.alignment
    alone = load_forecast(tmp_path / "told.safetensors")
    with pytest.raises(
        at.TangentError, match=r"^kernels: this forecast was loaded without its network; use load_forecast"
    ):
        alone.kernels(X)
    with pytest.raises(at.TangentError, match=r"^alignment: this forecast was loaded without samples"):
        _ = load_forecast(tmp_path / "told.safetensors", model).alignment


def test_files_that_are_no_forecast_are_refused(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(at.TangentError, match=r"^load_forecast: .*other.safetensors is no forecast of this version"):
        load_forecast(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("not tensors", "utf-8")
    for name in ("text", "absent"):
        with pytest.raises(at.TangentError, match=rf"^load_forecast: .*{name} cannot be read"):
            load_forecast(tmp_path / name)
    told = at.forecast(network(), X, Y, steps=1)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(at.TangentError, match=r"^save: .* cannot be written"):
        told.save(tmp_path / "file" / "below")


def test_a_forecast_is_drawn() -> None:
    figure = at.forecast(network(), X, Y, steps=1).plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Loss",
        "What will change",
        "How far the kernel will turn",
    ]
    assert [bar.get_height() > 0 for bar in figure.axes[2].patches] == [True] * 3


def test_progress_is_told_by_step_in_words_and_ends_at_one() -> None:
    told: list[tuple[str, float]] = []
    at.forecast(network(), X, Y, steps=2, progress=lambda stage, fraction: told.append((stage, fraction)))
    assert list(dict.fromkeys(stage for stage, _ in told)) == [
        "kernel regression, step 1", "two-sided, strength 1, step 1", "kernel regression, step 2",
        "two-sided, strength 1, step 2", "done",
    ]  # fmt: skip
    assert all(0 <= fraction <= 1 for _, fraction in told)
    assert told[-1] == ("done", 1.0)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"y": Y[:9]}, r"targets have shape \(9, 1\), expected \(30, 1\): n samples, c outputs"),
        ({"y": Y.long()}, r"targets are torch.int64; give real numbers, e.g. y.double\(\), and of class numbers"),
        ({"y": ["a"] * 30}, r"give targets as a tensor, a NumPy array or a list of numbers"),
        ({"y": Y.log()}, r"the target of sample \d+ is not finite"),
        ({"y": Y.to(torch.complex128)}, r"targets are torch.complex128; give real ones"),
        ({"loss": "hinge"}, r"loss is one of squared, cross-entropy, got 'hinge'"),
        ({"loss": "cross-entropy"}, r"cross-entropy takes n = 30 integer labels, got torch.float64 of shape \(30, 1\)"),
        ({"loss": "cross-entropy", "y": torch.arange(30)}, r"labels are 0..1, sample 2 has 2"),
        ({"ridge": 0}, r"ridge is a positive, finite number, got 0"),
        ({"ridge": "weak"}, r"ridge is a positive, finite number, got 'weak'"),
        ({"strength": -1.0}, r"strength is a positive, finite number, got -1.0"),
        ({"strength": []}, r"strength is a positive number, or several, got none"),
        ({"strength": 1.0, "structure": at.Fixed()}, r"strength is of the structures that are chosen among"),
        ({"structure": "two-sided"}, r"'two-sided' is no structure; pass one, such as structure=at.TwoSided\(\)"),
        ({"steps": 0}, r"steps is a positive whole number, got 0"),
        ({"max_epochs": 0}, r"max_epochs is a positive, finite number, got 0"),
        ({"steps": 1.5}, r"steps is a positive whole number, got 1.5"),
        ({"validation": 1.0}, r"validation is a share of the samples, from 0 to below 1, got 1.0"),
        ({"validation": 0}, r"with validation = 0 nothing is held out to choose a structure by"),
        ({"validation": 0.999}, r"of n = 30 samples, validation = 0.999 leaves none to fit"),
        ({"wrt": "absent"}, r"wrt 'absent' matches no parameter"),
        ({"memory_limit": 2000}, r"needs .* of memory and the limit is 2 kB"),
        ({"memory_limit": 0}, r"memory_limit: expected a positive number of bytes, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(options: dict[str, Any], message: str) -> None:
    given = {"y": Y, **options}
    with pytest.raises(at.TangentError, match=message) as raised:
        forecast(network(), X, **given)
    assert str(raised.value).startswith(("forecast: ", "memory_limit: "))


def test_batch_norm_in_training_mode_is_refused() -> None:
    model, x = by_name["BatchNorm in eval"].build()
    with pytest.raises(at.TangentError, match=r"^forecast: BatchNorm1d '\d' is in training mode"):
        at.forecast(model.train(), x, draw(len(x), 2))
