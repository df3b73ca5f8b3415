"""The trainable adaptive model equals products with its features for every network, and reaches the exact fit."""

import copy
import functools
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import clean_process
from adaptive_tangents.nn import tangent_module as modules
from cases import Case, Forward, mlp
from prepared import every_case, prepare
from registry import CASES

Q = at.Quadratic(0.3)
STRUCTURES: dict[str, at.structures.Structure | Mapping[str, at.structures.Structure]] = {
    "Fixed": at.Fixed(), "Full": at.Full(Q), "LayerScale": at.LayerScale(Q), "Left": at.Left(Q), "Right": at.Right(Q),
    "TwoSided": at.TwoSided(Q, at.Quadratic(1.0)), "one side of two": at.TwoSided(Q, at.NoAdaptation()), "Rows": at.Rows(Q),
    "Columns": at.Columns(Q), "Diagonal": at.Diagonal(Q), "Modes of a linear layer": at.Modes({"in": Q}),
    "mixed": {"0": at.Full(Q), "*": at.TwoSided(Q)},
}  # fmt: skip
every_structure = pytest.mark.parametrize("name", STRUCTURES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small() -> tuple[nn.Module, Tensor, Tensor]:
    """A network, a batch and targets minus its outputs."""
    torch.manual_seed(0)
    return mlp(nn.Tanh, widths=(5, 7, 2)), normal(6, 5), 5 * normal(6, 2, seed=1)


@functools.cache
def fitted(name: str) -> tuple[nn.Module, Tensor, Tensor, at.TangentFeatures, at.Fit]:
    """The small network with its features and their fit, made once for all tests that take it over."""
    model, x, r = small()
    feats = at.tangent_features(model, x)
    return model, x, r, feats, at.fit(feats, r, structure=STRUCTURES[name], ridge=0.1, tol=1e-13)


def inner(adaptive: at.TangentModule, name: str) -> nn.Parameter:
    """θ of a block."""
    return adaptive.inner[modules._key(name)]


def wander(adaptive: at.TangentModule, scale: float = 0.2) -> at.TangentModule:
    """Random θ, and a random M near the current one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adaptive.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return adaptive


def joint_objective(adaptive: at.TangentModule, x: Any, r: Tensor, ridge: float) -> Tensor:
    change = adaptive(x) - adaptive.initial(x)
    return adaptive.regularizer() + ((r - change) ** 2).sum() / ridge


# ---------------------------------------------------------------------------------------------------------- computation


@every_case
def test_the_output_is_the_network_plus_adapted_features_times_inner_coefficients(case: Case) -> None:
    p = prepare(case)
    x = p.x
    adaptive = wander(at.TangentModule(p.model, at.TwoSided(), wrt=case.wrt, output_fn=case.output_fn))
    # Every other case takes the features from the module itself; those of the model must serve as well.
    feats = adaptive.adapted_features(x) if case in CASES[::2] else p.feats.transformed(adaptive.transforms())
    tolerance = case.tolerance or (1e-9 if feats.dtype == torch.float64 else 1e-4)
    change = feats.inner(adaptive.inner_coefficients())
    out, initial = adaptive(x), adaptive.initial(x)
    scale = float(change.abs().max()) + float(initial.abs().max()) * tolerance
    assert float((out.detach() - initial - change).abs().max()) <= 30 * tolerance * scale
    plain = p.feats.inner(adaptive.effective_coefficients())
    assert float((plain - change).abs().max()) <= 30 * tolerance * scale
    signal = normal(*out.shape, seed=2).to(out)
    (out * signal).sum().backward()
    for name, matrix in feats.combine(signal).items():
        if matrix.numel() == 0:
            continue
        found = inner(adaptive, name).grad
        assert found is not None
        assert float((found - matrix).abs().max()) <= 30 * tolerance * max(float(matrix.abs().max()), 1e-6)


@every_structure
def test_a_fit_taken_over_has_its_outputs_its_kernel_its_objective_and_is_stationary(name: str) -> None:
    model, x, r, feats, fit = fitted(name)
    adaptive = at.TangentModule(model, STRUCTURES[name]).load_fit(fit)
    torch.testing.assert_close(adaptive(x) - model(x), fit.predict(feats))
    torch.testing.assert_close(adaptive.adapted_features(x).kernel(), fit.transform(feats).kernel())
    for block, matrix in adaptive.effective_coefficients().items():
        torch.testing.assert_close(matrix, fit.coefficients[block])
    found = joint_objective(adaptive, x, r, 0.1)
    assert float(found.detach()) == pytest.approx(fit.objective, rel=1e-10)
    found.backward()
    for parameter in adaptive.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) < 1e-4 * fit.objective


@every_structure
def test_a_module_as_a_fit_is_that_fit_again(name: str) -> None:
    model, x, r, _, fit = fitted(name)
    found = at.TangentModule(model, STRUCTURES[name]).load_fit(fit).as_fit(x, r, ridge=0.1)
    assert found.objective == pytest.approx(fit.objective, rel=1e-10)
    assert found.converged
    assert found.stationarity == pytest.approx(fit.stationarity, abs=1e-6)
    if fit.lower_bound is not None:
        assert found.lower_bound == pytest.approx(fit.lower_bound, rel=1e-5)


EVERY = STRUCTURES | {
    "out": at.Modes({"out": Q}),
    "in": at.Modes({"in": Q}),
    "in and spatial": at.Modes({"in": Q, "spatial": Q}),
}


@functools.cache
def wandered() -> tuple[Tensor, at.TangentFeatures, dict[str, tuple[at.TangentModule, at.TangentFeatures]]]:
    """A batch, its features in a network with a convolution, and that network's module of every structure with its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).double()
    x = normal(6, 2, 3, 3)
    made = {name: wander(at.TangentModule(model, structure)) for name, structure in EVERY.items()}
    modules_of = {name: (adaptive, adaptive.features(x)) for name, adaptive in made.items()}
    return x, at.tangent_features(model, x), modules_of


@pytest.mark.parametrize("of_fit", EVERY)
def test_a_fit_of_any_structure_is_taken_over_as_it_is_or_refused_and_nothing_changed(of_fit: str) -> None:
    x, feats, modules_of = wandered()
    fit = at.fit(feats, 10 * normal(6, 1, seed=1), structure=EVERY[of_fit], ridge=0.1)
    wanted, taken, refusals = fit.transform(feats).kernel(), set(), list[str]()
    for name, (adaptive, own) in modules_of.items():
        before = {key: value.clone() for key, value in adaptive.state_dict().items()}
        try:
            adaptive.load_fit(fit)
        except at.TangentError as error:
            refusals.append(str(error))
            for key, value in adaptive.state_dict().items():
                torch.testing.assert_close(value, before[key], rtol=0, atol=0)
            continue
        taken.add(name)
        adapted = adaptive.adapted_features(x) if name == of_fit else own.transformed(adaptive.transforms())
        torch.testing.assert_close(adapted.kernel(), wanted)
        for block, matrix in adaptive.effective_coefficients().items():
            torch.testing.assert_close(matrix, fit.coefficients[block])
        adaptive.load_state_dict(before)
    for refusal in refusals:
        assert re.search(r"fit's M moves .* in block '.*', which the structure of this module does not", refusal)
    assert of_fit in taken
    if of_fit != "Fixed":
        assert "Fixed" not in taken
    assert taken >= {"Rows": {"Left", "TwoSided", "Diagonal"}, "Columns": {"Right", "TwoSided", "Diagonal"}}.get(
        of_fit, set()
    )


def test_modes_of_a_convolution_are_taken_over() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)).double()
    x, r = normal(4, 2, 3, 3), 3 * normal(4, 1, seed=1)
    feats = at.tangent_features(model, x)
    for structure in (at.Modes({"out": Q, "spatial": Q}), at.Modes({"in": Q}), at.Modes(Q)):
        fit = at.fit(feats, r, structure=structure, ridge=0.1, tol=1e-11, max_rounds=2000)
        adaptive = at.TangentModule(model, structure).load_fit(fit)
        torch.testing.assert_close(adaptive(x) - model(x), fit.predict(feats))
        torch.testing.assert_close(adaptive.adapted_features(x).kernel(), fit.transform(feats).kernel())
        assert float(joint_objective(adaptive, x, r, 0.1).detach()) == pytest.approx(fit.objective, rel=1e-8)


@pytest.mark.parametrize("name", ["Fixed", "Left", "LayerScale", "Rows", "Full"])
def test_training_the_joint_objective_ends_at_the_exact_fit_where_the_structure_is_convex(name: str) -> None:
    torch.manual_seed(0)
    model, x, r = mlp(nn.Tanh, widths=(2, 3, 2)), normal(3, 2), 3 * normal(3, 2, seed=1)
    fit = at.fit(at.tangent_features(model, x), r, structure=STRUCTURES[name], ridge=0.1, tol=1e-13)
    adaptive = at.TangentModule(model, STRUCTURES[name])
    optimizer = torch.optim.LBFGS(
        adaptive.parameters(), max_iter=1000, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=1e-8,
        tolerance_change=1e-12,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = joint_objective(adaptive, x, r, 0.1)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure()) == pytest.approx(fit.objective, rel=1e-6)
    assert adaptive.as_fit(x, r, ridge=0.1).objective == pytest.approx(fit.objective, rel=1e-6)


@every_structure
def test_it_starts_as_the_network_with_the_identity_and_gradients_flow_from_the_second_step_on(name: str) -> None:
    model, x, r = small()
    adaptive = at.TangentModule(model, STRUCTURES[name])
    torch.testing.assert_close(adaptive(x), model(x))
    torch.testing.assert_close(adaptive.adapted_features(x).kernel(), at.tangent_features(model, x).kernel())
    optimizer = torch.optim.SGD(adaptive.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        ((r - adaptive(x) + adaptive.initial(x)) ** 2).mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in adaptive.parameters())


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_a_rank_limits_what_a_side_moves(rank: int) -> None:
    model, x, r = small()
    adaptive = wander(at.TangentModule(model, at.TwoSided(), rank=rank))
    for transform in adaptive.transforms().values():
        for side in (transform.left, transform.right):
            moved = side.matrix() - torch.eye(side.matrix().shape[0])
            assert int(torch.linalg.matrix_rank(moved)) == min(rank, moved.shape[0])
    change = adaptive.adapted_features(x).inner(adaptive.inner_coefficients())
    torch.testing.assert_close(adaptive(x) - model(x), change)
    fit = at.fit(at.tangent_features(model, x), r, structure=at.TwoSided(), ridge=0.1)
    if rank < 100:
        with pytest.raises(
            at.TangentError, match=rf"a side of the fit moves \d directions and rank is {rank}; raise rank"
        ):
            adaptive.load_fit(fit)
    else:
        assert float(joint_objective(adaptive.load_fit(fit), x, r, 0.1).detach()) == pytest.approx(fit.objective)


# -------------------------------------------------------------------------------------------------- as a module in torch


def test_optimizers_see_the_inner_coefficients_and_factors_alone() -> None:
    model, x, r = small()
    adaptive = at.TangentModule(model, at.TwoSided())
    outer = nn.Sequential(adaptive)
    trained = {id(p) for p in outer.parameters()}
    names = {name for name, _ in adaptive.named_parameters()}
    assert all(name.startswith(("inner.", "factors.")) for name in names)
    assert len(names) == 2 + 2 * 2
    before = {name: buffer.clone() for name, buffer in adaptive.model.named_buffers()}
    assert before
    assert not trained & {id(buffer) for buffer in adaptive.model.buffers()}
    outer.requires_grad_(True)
    optimizer = torch.optim.AdamW(outer.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ((outer(x) - r) ** 2).mean().backward()
        optimizer.step()
    for name, buffer in adaptive.model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_the_model_given_is_left_as_it_was_and_later_changes_to_it_do_not_matter() -> None:
    model, x, _ = small()
    before = copy.deepcopy(model.state_dict())
    adaptive = at.TangentModule(model, at.Fixed())
    out = adaptive(x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(adaptive(x), out)


def test_state_dicts_copies_and_pickles_hold_everything() -> None:
    model, x, _ = small()
    adaptive = wander(at.TangentModule(model, at.TwoSided()))
    other = at.TangentModule(mlp(nn.Tanh, widths=(5, 7, 2)), at.TwoSided())
    assert not torch.allclose(other(x), adaptive(x))
    other.load_state_dict(adaptive.state_dict())
    for twin in (other, copy.deepcopy(adaptive), pickle.loads(pickle.dumps(adaptive))):
        assert torch.equal(twin(x), adaptive(x))
        assert torch.equal(twin.adapted_features(x).kernel(), adaptive.adapted_features(x).kernel())


def test_it_moves_between_dtypes() -> None:
    model, x, _ = small()
    adaptive = wander(at.TangentModule(model, at.TwoSided()))
    exact, single = adaptive(x), copy.deepcopy(adaptive).float()
    assert single(x.float()).dtype == torch.float32
    torch.testing.assert_close(single(x.float()).double(), exact, rtol=1e-4, atol=1e-4)
    assert single.adapted_features(x.float()).dtype == torch.float32


def test_parameters_shared_by_modules_stay_shared_when_it_moves() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.table(x).mean(1)))

    model, x = Tied(), torch.randint(0, 6, (5, 3))
    adaptive = wander(at.TangentModule(model, at.TwoSided())).double()
    change = adaptive.adapted_features(x).inner(adaptive.inner_coefficients())
    torch.testing.assert_close(adaptive(x) - adaptive.initial(x), change)


@pytest.mark.filterwarnings("ignore")
def test_compiled_it_gives_the_same() -> None:
    model, x, _ = small()
    adaptive = wander(at.TangentModule(model, at.TwoSided()))
    compiled = torch.compile(adaptive, backend="eager")
    torch.testing.assert_close(compiled(x), adaptive(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in adaptive.parameters())


@clean_process.in_one_group
def test_the_compiler_is_imported_with_the_first_module_and_not_with_the_package() -> None:
    # The process has made features before its first module, and has seen then whether the compiler was there.
    done = clean_process.run(
        "import adaptive_tangents as at; print(*before_a_module, at.TangentModule.forward._torchdynamo_disable)"
    )
    assert done.stdout.split() == ["False", "False", "True"], done.stderr


def test_training_mode_leaves_the_frozen_network_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).double().eval()
    adaptive, x = at.TangentModule(model, at.Fixed()), normal(6, 4)
    out = adaptive.eval()(x)
    assert adaptive.train().training
    assert torch.equal(adaptive(x), out)
    torch.testing.assert_close(out, model(x))


# ---------------------------------------------------------------------------------------------------------- derivatives


def test_derivatives_of_derivatives_and_by_the_inputs_are_those_of_the_formula() -> None:
    model, x = mlp(nn.Tanh, widths=(2, 3, 2)), normal(2, 2)
    adaptive = wander(at.TangentModule(model, at.Left()))
    weights = [inner(adaptive, "0"), adaptive.factors[0].sides["left"].whole]
    assert torch.autograd.gradcheck(lambda *_: adaptive(x), weights)
    assert torch.autograd.gradgradcheck(lambda *_: adaptive(x), weights)
    moving = x.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(adaptive, (moving,))
    assert torch.equal(adaptive(moving).detach(), adaptive(x).detach())


class _Odd(torch.autograd.Function):
    """Twice the input, by an operation without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        return 2 * signal


def test_operations_without_forward_mode_are_differentiated_backward_twice() -> None:
    model = Forward(lambda m, x: m.out(torch.tanh(_Odd.apply(m.first(x)))), first=nn.Linear(4, 5), out=nn.Linear(5, 2))
    adaptive, x = wander(at.TangentModule(model.double(), at.TwoSided())), normal(6, 4)
    change = adaptive.adapted_features(x).inner(adaptive.inner_coefficients())
    torch.testing.assert_close(adaptive(x) - adaptive.initial(x), change)
    adaptive(x).sum().backward()
    back = adaptive.adapted_features(x).combine(torch.ones(6, 2, dtype=torch.float64))
    torch.testing.assert_close(inner(adaptive, "first").grad, back["first"])
    assert adaptive._ways.chosen == "backward"


@pytest.mark.parametrize("first", [[[1, 2], [3, 4]], [[0, 2], [3, 0]]], ids=["without padding", "with padding"])
def test_a_padding_row_stays_still_whatever_the_first_batch_was(first: list[list[int]]) -> None:
    model = Forward(
        lambda m, x: m.out(torch.tanh(m.table(x).mean(1))), table=nn.Embedding(6, 4, padding_idx=0), out=nn.Linear(4, 2)
    ).double()
    nn.init.normal_(model.table.weight)  # type: ignore[arg-type]
    adaptive = wander(at.TangentModule(model, at.TwoSided()))
    for batch in (torch.tensor(first), torch.tensor([[0, 0], [0, 5], [1, 0]])):
        change = adaptive.adapted_features(batch).inner(adaptive.inner_coefficients())
        torch.testing.assert_close(adaptive(batch) - adaptive.initial(batch), change)
        adaptive.zero_grad()
        adaptive(batch).sum().backward()
        back = adaptive.adapted_features(batch).combine(torch.ones(len(batch), 2, dtype=torch.float64))
        torch.testing.assert_close(inner(adaptive, "table").grad, back["table"])
    assert adaptive._ways.chosen == "forward"


def test_an_operation_that_can_be_differentiated_once_only_goes_by_the_features() -> None:
    model = nn.Sequential(nn.EmbeddingBag(6, 4, mode="sum"), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.tensor([[0, 1, 2], [3, 3, 5]])
    adaptive = wander(at.TangentModule(model, at.TwoSided()))
    change = adaptive.adapted_features(x).inner(adaptive.inner_coefficients())
    torch.testing.assert_close(adaptive(x) - adaptive.initial(x), change)
    assert adaptive._ways.chosen == "features"
    weights = Forward(
        lambda m, z, w: m.out(m.bag(z, per_sample_weights=w)),
        bag=nn.EmbeddingBag(6, 4, mode="sum"),
        out=nn.Linear(4, 2),
    )
    adaptive = at.TangentModule(weights.double())
    with pytest.raises(at.TangentError, match="there is no derivative with respect to the inputs; detach"):
        adaptive((x, normal(2, 3).requires_grad_(True)))


# -------------------------------------------------------------------------------------------------------------- refused


def test_what_cannot_be_trained_is_refused() -> None:
    model, x, r = small()

    class Own(at.structures.Structure):
        def solution(self, coefficients: Any) -> at.structures.Solution:
            raise NotImplementedError

        def dual(self, matrices: Any) -> float:
            return 0.0

    with pytest.raises(at.TangentError, match="cannot train the transforms of Own"):
        at.TangentModule(model, Own())
    with pytest.raises(at.TangentError, match="TangentModule: rank is positive, got 0"):
        at.TangentModule(model, rank=0)
    with pytest.raises(at.TangentError, match="TangentModule: Dropout '1' is in training mode"):
        at.TangentModule(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    with pytest.raises(at.TangentError, match="'9' matches no block"):
        at.TangentModule(model, {"9": at.Fixed(), "*": at.Fixed()})
    fit = at.fit(at.tangent_features(nn.Sequential(nn.Linear(5, 2)).double(), x), r, structure=at.Fixed())
    with pytest.raises(at.TangentError, match=r"TangentModule: the fit has blocks \{'0': \(2, 6\)\}, this module"):
        at.TangentModule(model, at.Fixed()).load_fit(fit)
    unknown = at.TangentModule(model, at.LayerScale(scale_invariant=True))
    with pytest.raises(
        at.TangentError, match=r"a scale_invariant structure measures .* give structure.prepared\(feats\)"
    ):
        unknown.regularizer()
    with pytest.raises(at.TangentError, match=r"the output has shape .* expected \(6, c\)"):
        at.TangentModule(Forward(lambda m, x: m.out(x)[:, 0], out=nn.Linear(5, 1)).double())(x)


def test_units_of_scale_invariant_structures_count_in_the_regularizer() -> None:
    model, x, r = small()
    feats = at.tangent_features(model, x)
    structure = at.TwoSided(Q, scale_invariant=True)
    fit = at.fit(feats, r, structure=structure, ridge=0.1, tol=1e-13)
    adaptive = at.TangentModule(model, structure.prepared(feats)).load_fit(fit)
    assert float(joint_objective(adaptive, x, r, 0.1).detach()) == pytest.approx(fit.objective, rel=1e-9)


# ------------------------------------------------------------------------------------------------------- certifying


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_coefficients_from_elsewhere_are_certified_with_the_best_transforms_for_them(ridge: float) -> None:
    model, x, r = small()
    feats = at.tangent_features(model, x)
    structure = at.TwoSided(Q)
    best = at.fit(feats, r, structure=structure, ridge=ridge, tol=1e-12)
    again = at.certify(feats, r, coefficients=best.coefficients, structure=structure, ridge=ridge)
    assert again.converged
    assert again.objective == pytest.approx(best.objective, rel=1e-9)
    assert again.feasibility == pytest.approx(best.feasibility, abs=1e-9)
    fixed = at.fit(feats, r, structure=at.Fixed(), ridge=ridge)
    other = at.certify(feats, r, coefficients=fixed.coefficients, structure=structure, ridge=ridge)
    assert not other.converged
    assert other.objective == pytest.approx(structure.penalty(fixed.coefficients) + (fixed.objective - _size(fixed)))
    assert best.objective < other.objective < fixed.objective
    with pytest.raises(at.TangentError, match="certify: the coefficients are of blocks"):
        at.certify(feats, r, coefficients={"0": torch.zeros(1, 1)}, structure=structure, ridge=ridge)


def test_cross_entropy_is_certified_too() -> None:
    model, x, _ = small()
    feats, offset, labels = at.tangent_features(model, x), model(x).detach(), torch.tensor([0, 1, 1, 0, 1, 0])
    options = {"loss": "cross-entropy", "offset": offset, "ridge": 0.1}
    best = at.fit(feats, labels, structure=at.Left(Q), tol=1e-12, **options)
    adaptive = at.TangentModule(model, at.Left(Q)).load_fit(best)
    found = adaptive.as_fit(x, labels, **options)
    assert found.objective == pytest.approx(best.objective, rel=1e-9)
    assert found.lower_bound == pytest.approx(best.lower_bound, rel=1e-5)


def _size(fit: at.Fit) -> float:
    return sum(float((matrix**2).sum()) for matrix in fit.coefficients.values())


def test_transformer_layers_are_linearized_by_forward_mode_and_the_fused_kernel_is_allowed_again() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.body(x).mean(1))
            return out

    module = at.TangentModule(Encoder().eval())
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        module(torch.randn(4, 5, 8))
    assert module._ways.chosen == "forward"
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "last", [lambda h: h.squeeze(), lambda h: h if len(h) > 1 else [][0], lambda h: h / (1 if len(h) > 1 else "")]
)
def test_a_model_that_does_not_run_on_one_sample_is_linearized_all_the_same(last: Callable[[Tensor], Tensor]) -> None:
    model, x = Forward(lambda m, x: last(m.fc(x).tanh()), fc=nn.Linear(4, 2)), normal(5, 4)
    assert torch.equal(at.TangentModule(model, at.Fixed())(x), model(x))
