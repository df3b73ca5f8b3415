"""Arguments of `fit` in other shapes: accepted if their meaning is clear, else refused with what to pass."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import nn

import adaptive_tangents as at
from adaptive_tangents.checks import as_tensor
from adaptive_tangents.errors import raised_as
from adaptive_tangents.features.transforms import Sides
from adaptive_tangents.solvers import model_selection
from adaptive_tangents.solvers.results import Certified
from theory_reference import problem

CASE = problem(3, n=6, c=2, shapes=((4, 3, 1),))
LABELS, OFFSET = torch.tensor([0, 1, 1, 0, 1, 0]), torch.zeros(6, 2, dtype=torch.float64)
ENTROPY = {"loss": "cross-entropy", "ridge": 0.5, "structure": at.Left()}
X = torch.ones(6, 4)


def unchecked(function: Callable[..., object]) -> Callable[..., object]:
    """The function without the tests' shape checks, which would fail first."""
    return inspect.unwrap(function)


fit, certify, fit_path = unchecked(at.fit), unchecked(at.certify), unchecked(at.fit_path)
proximal, regression = unchecked(at.solvers.proximal_gradient), unchecked(at.kernel_regression)


# ------------------------------------------------------------------------------------------------------------ taken


def told_of_targets(r: object) -> dict[str, object]:
    """What every call makes of targets, to the last bit."""
    K, found = CASE.feats.kernel(), at.fit(CASE.feats, r, ridge=0.1)
    (path,) = at.fit_path(CASE.feats, r, ridges=(0.1,), folds=2).fits
    return {
        "fit": found.dual.tolist(),
        "certify": at.certify(CASE.feats, r, coefficients=found.coefficients, ridge=0.1).dual.tolist(),
        "fit_path": path.dual.tolist(),
        "fit to a kernel": at.fit(K, r, structure=at.Fixed(), ridge=0.1).dual.tolist(),
        "kernel_regression": at.kernel_regression(K, r, ridge=0.1).dual.tolist(),
        "proximal": at.solvers.proximal_gradient(CASE.feats, r, structure=at.Left(), ridge=5.0, tol=1e-4).objective,
    }


@functools.cache
def expected_of_targets() -> dict[str, object]:
    return told_of_targets(CASE.r)


@pytest.mark.parametrize(
    "given",
    [CASE.r.numpy(), CASE.r.tolist(), tuple(CASE.r), CASE.r.numpy()[::-1, ::-1][::-1, ::-1], CASE.r.numpy().T.copy().T],
)
def test_targets_may_be_arrays_and_lists(given: object) -> None:
    found, expected = told_of_targets(given), expected_of_targets()
    assert found == expected
    assert found["fit_path"] == expected["fit"]


def told_of_labels(labels: object, offset: object) -> list[object]:
    """What a fit and a path of fits make of labels and offsets, to the last bit."""
    path = at.fit_path(
        CASE.feats, labels, structures=[at.Left()], ridges=(0.5,), folds=2, loss="cross-entropy", offset=offset
    )
    return [at.fit(CASE.feats, labels, offset=offset, **ENTROPY).dual.tolist(), path.errors]


@functools.cache
def expected_of_labels() -> list[object]:
    return told_of_labels(LABELS, OFFSET)


# Every form of labels and every form of offsets: each is converted by itself.
@pytest.mark.parametrize(
    ("labels", "offset"),
    [
        (LABELS.numpy(), OFFSET.numpy()), (LABELS.tolist(), OFFSET.tolist()),
        (LABELS.numpy().astype(np.uint8), OFFSET.float()), (LABELS.int(), OFFSET.numpy()),
    ],
)  # fmt: skip
def test_labels_and_offsets_may_be_arrays_and_lists(labels: object, offset: object) -> None:
    assert told_of_labels(labels, offset) == expected_of_labels()


def test_the_structure_is_two_sided_unless_another_is_given() -> None:
    for function in (at.fit, at.certify):
        assert inspect.signature(function).parameters["structure"].default == at.TwoSided()
    assert at.fit(CASE.feats, CASE.r, ridge=0.1).structure == at.TwoSided()
    (found,) = at.fit_path(CASE.feats, CASE.r, ridges=(0.1,)).fits
    assert found.structure == at.TwoSided()


def test_one_structure_is_a_path_of_one() -> None:
    for given in (at.Left(), {"*": at.Left()}):
        path = at.fit_path(CASE.feats, CASE.r, structures=given, ridges=(0.1,))
        assert len(path.fits) == 1


def test_all_but_the_first_two_arguments_are_given_by_name() -> None:
    for function in (at.fit, at.certify, at.fit_path, at.kernel_regression, at.solvers.proximal_gradient):
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert all(kind in (kind.KEYWORD_ONLY, kind.VAR_KEYWORD) for kind in kinds[2:])


def test_a_fit_says_the_loss_as_it_was_asked_for() -> None:
    found = at.fit(CASE.feats, CASE.r, loss="squared", ridge=0.1)
    assert found.loss == "squared"
    assert "squared error, ridge 0.1" in found.summary()
    entropy = at.fit(CASE.feats, LABELS, offset=OFFSET, **ENTROPY)
    assert entropy.loss == "cross-entropy"
    assert "cross-entropy, ridge 0.5" in entropy.summary()
    again = at.certify(
        CASE.feats, LABELS, coefficients=entropy.coefficients, loss=entropy.loss, offset=OFFSET, ridge=0.5
    )
    assert again.loss == entropy.loss


def test_a_fit_on_kernels_tells_what_a_fit_on_features_tells() -> None:
    K, r = CASE.feats.kernel(by_block=True), CASE.r / 10
    on_features = at.fit(CASE.feats, r, structure=at.LayerScale(), ridge=0.1)
    on_kernels = at.fit(K, r, structure=at.LayerScale(), ridge=0.1)
    for name in Certified.__dataclass_fields__:
        assert type(getattr(on_kernels, name)) is type(getattr(on_features, name)), name
    assert on_kernels.gap == pytest.approx(on_features.gap, abs=1e-6)
    assert torch.equal(on_kernels.targets, on_features.targets)
    assert sum(on_kernels.timings.values()) > 0
    shared = [line.split()[0] for line in on_features.summary().splitlines()]
    assert [line.split()[0] for line in on_kernels.summary().splitlines()] == shared
    assert "products with the kernel" in on_kernels.summary()
    assert repr(on_kernels).startswith("KernelFit(LayerScale(")
    assert "history" not in repr(on_kernels)


def test_a_fit_on_kernels_keeps_to_the_rounds_allowed() -> None:
    K = CASE.feats.kernel(by_block=True)
    for rounds in range(1, 6):
        with pytest.warns(at.TangentWarning, match=rf"stopped after {rounds} rounds"):
            found = at.fit(K, 5 * CASE.r, structure=at.LayerScale(at.Quadratic(0.01)), max_rounds=rounds)
        assert len(found.history) == rounds + 1


# ---------------------------------------------------------------------------------------------------------- refused


class Own(at.Left):
    """A user's own structure."""


REFUSED: Mapping[str, tuple[Callable[[], object], str]] = {
    "a class": (
        lambda: fit(CASE.feats, CASE.r, structure=at.Left),
        r"^fit: the class Left is no structure; pass one, such as structure=at\.Left\(\)$",
    ),
    "the class of one that takes arguments": (
        lambda: fit(CASE.feats, CASE.r, structure=at.Mixed),
        r"such as structure=at\.Mixed\(\.\.\.\)$",
    ),
    "a class of the user's": (lambda: fit(CASE.feats, CASE.r, structure=Own), r"such as structure=Own\(\)$"),
    "a class without objects": (
        lambda: fit(CASE.feats, CASE.r, structure=at.structures.Structure),
        r"structure=at\.TwoSided\(\)$",
    ),
    "a name": (
        lambda: fit(CASE.feats, CASE.r, structure="TwoSided"),
        r"^fit: 'TwoSided' is no structure; pass one, such as structure=at\.TwoSided\(\)$",
    ),
    "a name written otherwise": (
        lambda: fit(CASE.feats, CASE.r, structure="layer-scale"),
        r"^fit: 'layer-scale' is no structure; pass one, such as structure=at\.LayerScale\(\)$",
    ),
    "another name": (
        lambda: fit(CASE.feats, CASE.r, structure="best"),
        r"^fit: 'best' is no structure; .*TwoSided\(\)$",
    ),
    "a penalty": (
        lambda: fit(CASE.feats, CASE.r, structure=at.Quadratic(1.0)),
        r"^fit: Quadratic\(.*\) is no structure; pass one, such as structure=at\.TwoSided\(\)$",
    ),
    "no structure": (lambda: fit(CASE.feats, CASE.r, structure=None), r"^fit: None is no structure"),
    "a class for some blocks": (
        lambda: fit(CASE.feats, CASE.r, structure={"*": at.Rows}),
        r"^fit: the class Rows is no structure; pass one, such as '\*': at\.Rows\(\)$",
    ),
    "a class to certify": (
        lambda: certify(CASE.feats, CASE.r, coefficients={}, structure=at.Left),
        r"^certify: the class Left is no structure",
    ),
    "a class on a path": (
        lambda: fit_path(CASE.feats, CASE.r, structures=[at.Left]),
        r"^fit_path: the class Left is no structure",
    ),
    "a name for a path": (
        lambda: fit_path(CASE.feats, CASE.r, structures="Left"),
        r"^fit_path: 'Left' is no structure; pass one, such as structure=at\.Left\(\)$",
    ),
    "a class to explain by": (
        lambda: unchecked(at.explain)(CASE.feats, CASE.feats, at.Left),
        r"^explain: the class Left is no structure",
    ),
    "a class for a module": (
        lambda: unchecked(at.TangentModule.__init__)(
            at.TangentModule.__new__(at.TangentModule), nn.Linear(4, 2), structure=at.Left
        ),
        r"^TangentModule: the class Left is no structure",
    ),
    "a class for proximal steps": (
        lambda: proximal(CASE.feats, CASE.r, structure=at.Left, ridge=1.0),
        r"^proximal_gradient: the class Left is no structure",
    ),
    "samples in place of features": (
        lambda: fit(X, CASE.r),
        r"^fit: takes features, such as at\.tangent_features\(model, x\), or a kernel: .* got Tensor of shape \(6, 4\)$",
    ),
    "an array of samples": (lambda: fit(X.numpy(), CASE.r), r"^fit: takes features, .* got ndarray of shape \(6, 4\)$"),
    "a model in place of features": (lambda: fit(nn.Linear(2, 2), CASE.r), r"^fit: takes features, .* got Linear$"),
    "samples to certify": (
        lambda: certify(X, CASE.r, coefficients={}),
        r"^certify: takes features, such as at\.tangent_features\(model, x\), got Tensor of shape \(6, 4\)$",
    ),
    "samples for a path": (lambda: fit_path(X, CASE.r, structures=[at.Left()]), r"^fit_path: takes features, such as"),
    "samples for proximal steps": (
        lambda: proximal(X, CASE.r, structure=at.Left(), ridge=1.0),
        r"^proximal_gradient: takes features, such as",
    ),
    "samples to predict": (
        lambda: unchecked(at.Fit.predict)(at.fit(CASE.feats, CASE.r, ridge=0.1), X),
        r"^predict: takes features, such as at\.tangent_features\(model, x\), got Tensor of shape \(6, 4\)$",
    ),
    "samples to transform": (
        lambda: unchecked(at.Fit.transform)(at.fit(CASE.feats, CASE.r, ridge=0.1), X),
        r"^transform: takes features, such as",
    ),
    "features of other blocks to transform": (
        lambda: unchecked(at.Fit.transform)(at.fit(CASE.feats, CASE.r, ridge=0.1), problem(2).feats),
        r"^transform: the coefficients are of blocks .*, these features have .*; make the features with the same model",
    ),
    "features of other blocks to predict": (
        lambda: unchecked(at.Fit.predict)(at.fit(CASE.feats, CASE.r, ridge=0.1), problem(2).feats),
        r"^predict: the coefficients are of blocks",
    ),
    "coefficients that are not finite": (
        lambda: certify(
            CASE.feats, CASE.r, coefficients={k: torch.full(b.shape, math.nan) for k, b in CASE.feats.blocks.items()}
        ),
        r"^certify: the coefficients are of blocks that are not finite, such as '\w+'; give those of another fit$",
    ),
    "one ridge for a path": (
        lambda: fit_path(CASE.feats, CASE.r, ridge=0.1),
        r"^fit_path: ridge is no option: give one or more as ridges=$",
    ),
    "one structure for a path": (
        lambda: fit_path(CASE.feats, CASE.r, structure=at.Left()),
        r"^fit_path: structure is no option: give one or more as structures=$",
    ),
    "a start for a path": (
        lambda: fit_path(CASE.feats, CASE.r, start=None),
        r"^fit_path: start is no option: every fit starts from the one before$",
    ),
    "samples to explain": (
        lambda: unchecked(at.explain)(CASE.feats, X),
        r"^explain: takes features, such as at\.tangent_features\(model, x\), got Tensor of shape \(6, 4\)$",
    ),
    "samples for a change": (
        lambda: unchecked(at.measures.kernel_change)(X, {}, CASE.r),
        r"^kernel_change: takes features, such as",
    ),
    "features in place of a kernel": (
        lambda: regression(CASE.feats, CASE.r),
        r"^kernel_regression: takes a kernel, got features; give feats\.kernel\(\), or tangent_kernel\(model, x\)$",
    ),
    "features to predict from kernels": (
        lambda: unchecked(at.solvers.KernelFit.predict)(
            at.fit(torch.eye(6), torch.ones(6), structure=at.Fixed()), CASE.feats
        ),
        r"^predict: takes a kernel, got features; give feats\.kernel\(\)",
    ),
    "words in place of a kernel": (
        lambda: regression("K", CASE.r),
        r"^kernel_regression: give the kernel as a tensor, a NumPy array or a list of numbers, got str$",
    ),
    "words for targets": (
        lambda: fit(CASE.feats, ["yes", "no"] * 3),
        r"^fit: give targets as a tensor, a NumPy array or a list of numbers, got list$",
    ),
    "uneven lists for targets": (lambda: fit(CASE.feats, [[1.0, 2.0], [3.0]]), r"^fit: give targets as a tensor"),
    "nothing for targets": (lambda: fit(CASE.feats, None), r"^fit: give targets as a tensor, .* got NoneType$"),
    "integers in a list": (lambda: fit(CASE.feats, LABELS.tolist()), r"^fit: targets have shape \(6,\), features are"),
    "integer targets in a list": (
        lambda: fit(CASE.feats, CASE.r.long().tolist()),
        r"^fit: targets are torch\.int64; give real residuals",
    ),
    "real labels in a list": (
        lambda: fit(CASE.feats, LABELS.double().tolist(), offset=OFFSET, **ENTROPY),
        r"^fit: cross-entropy takes n = 6 integer labels, got torch\.float64 of shape \(6,\)$",
    ),
    "words for an offset": (
        lambda: fit(CASE.feats, LABELS, offset="none", **ENTROPY),
        r"^fit: give offset as a tensor, a NumPy array or a list of numbers, got str$",
    ),
    "words for kernels' targets": (
        lambda: fit(torch.eye(6), "y", structure=at.Fixed()),
        r"^fit: give targets as a tensor",
    ),
    "another loss": (
        lambda: fit(CASE.feats, CASE.r, loss="hinge"),
        r"^fit: loss is one of squared, cross-entropy, got",
    ),
    "another loss on kernels": (
        lambda: fit(torch.eye(6), torch.ones(6), loss="hinge", structure=at.Fixed()),
        r"^fit: loss is one of squared, cross-entropy, got 'hinge'",
    ),
    "leaving one out of kernels": (
        lambda: unchecked(at.solvers.leave_one_out)(at.fit(torch.eye(6), torch.ones(6), structure=at.Fixed())),
        r"^leave_one_out: takes a fit on features, got KernelFit$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_of_no_clear_meaning_is_refused_with_what_to_pass(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(at.TangentError, match=words):
        call()


WRONG: Mapping[str, tuple[dict[str, object], str]] = {
    "targets": ({"r": CASE.r[:3]}, r"targets have shape \(3, 2\), features are of n = 6 samples"),
    "targets not finite": ({"r": CASE.r / 0}, r"the target of sample 0 is not finite"),
    "features not finite": (
        {"feats": CASE.feats.transformed({"block0": Sides(scale=math.nan)})},
        r"the features of block 'block0' are not finite at sample 0",
    ),
    "a ridge": ({"ridge": -1.0}, r"the ridge ρ is zero \(interpolation\) or positive, got -1"),
    "a form": ({"form": "sparse"}, r"form is one of auto, dense, primal, matrix-free, got 'sparse'"),
    "the primal form": ({"form": "primal", "ridge": 0.0}, r"the primal form needs a ridge"),
    "a loss": ({"loss": "hinge"}, r"loss is one of squared, cross-entropy, got 'hinge'"),
    "an offset": ({"offset": OFFSET}, r"offset is for cross-entropy"),
    "contradicting samples": (
        {"feats": CASE.feats[torch.tensor([0, 0])], "r": [[1.0, 0.0], [-1.0, 0.0]], "ridge": 0.0},
        r"\d of 4 constraints are linearly dependent and their targets contradict",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["fit", "certify", "fit_path"])
def test_errors_name_the_function_called(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_selection, "fit", fit)
    options, words = {"feats": CASE.feats, "r": CASE.r, "ridge": 0.5} | WRONG[wrong][0], WRONG[wrong][1]
    feats, r = options.pop("feats"), options.pop("r")
    if name == "certify":
        options["coefficients"] = {k: torch.zeros(b.shape) for k, b in CASE.feats.blocks.items()}
    if name == "fit_path":
        options |= {"structures": [at.Left()], "ridges": (options.pop("ridge"),)}
    with pytest.raises(at.TangentError, match=f"^{name}: {words}"):
        {"fit": fit, "certify": certify, "fit_path": fit_path}[name](feats, r, **options)


def test_errors_of_a_module_as_a_fit_name_it() -> None:
    module = at.TangentModule(nn.Linear(4, 2), structure=at.Left())
    with pytest.raises(at.TangentError, match=r"^as_fit: targets have shape \(3, 2\), features are of n = 6"):
        module.as_fit(X, torch.zeros(3, 2), ridge=0.1)
    with pytest.raises(at.TangentError, match=r"^as_fit: the ridge ρ is zero"):
        module.as_fit(X, torch.zeros(6, 2), ridge=-1.0)


def test_errors_are_renamed_only_where_they_come_from_within() -> None:
    for message, wanted in (("fit: no: way", "outer: no: way"), ("alignment: no", "alignment: no"), ("fit", "fit")):
        with pytest.raises(at.TangentError) as caught, raised_as("outer", "fit"):
            raise at.TangentError(message)
        assert str(caught.value) == wanted


def test_tensors_are_handed_on_as_they_are_and_arrays_are_shared() -> None:
    cpu = torch.device("cpu")
    assert as_tensor("f", "x", CASE.r, cpu) is CASE.r
    array = np.ones(3)
    assert as_tensor("f", "x", array, cpu).data_ptr() == array.ctypes.data
    assert as_tensor("f", "x", [1.0, 2.0], cpu).dtype == torch.float64
    assert as_tensor("f", "x", np.arange(3)[::-1], cpu).tolist() == [2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_fit_keeps_the_targets_it_was_given_when_these_change_in_place(dtype: torch.dtype) -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=torch.float64)
    y = torch.randn(6, 2, dtype=dtype)
    given = y.clone()
    fit = at.fit(at.tangent_features(model, x), y, ridge=0.1)
    before = fit.kernel_change().summary()
    y.zero_()
    torch.testing.assert_close(fit.targets.reshape(6, 2), given.double())
    assert fit.kernel_change().summary() == before
