"""Targets given as integers: one-hot where a measure can take them, refused where it cannot, the same everywhere."""

from collections.abc import Callable
from inspect import unwrap

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import adaptive_tangents as at
from adaptive_tangents.checks import class_columns
from adaptive_tangents.inspection import outputs
from theory_reference import problem

N = 8
CASE = problem(3, n=N, c=3, shapes=((4, 3, 1),))
LABELS = torch.tensor([0, 2, 1, 2, 0, 1, 1, 2])
TRACE, FULL = CASE.feats.kernel(outputs="trace"), CASE.feats.kernel()
FORMS: dict[str, Callable[[Tensor], object]] = {
    "int64": lambda y: y,
    "int8": lambda y: y.to(torch.int8),
    "uint8": lambda y: y.to(torch.uint8),
    "column": lambda y: y[:, None],
    "numpy": lambda y: y.numpy(),
    "numpy uint16": lambda y: y.numpy().astype(np.uint16),
    "list": lambda y: y.tolist(),
}


def one_hot(y: Tensor) -> Tensor:
    return functional.one_hot(y).double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [(0, 1, 2), (1, 4, 9), (-1, 0, 1)])
def test_class_numbers_count_as_one_hot_columns_whatever_the_numbers_are(names: tuple[int, ...], form: str) -> None:
    y = torch.tensor(names)[LABELS]
    if min(names) < 0 and "uint" in form:
        return
    given = FORMS[form](y)
    alignment, decompose = (unwrap(f) for f in (at.alignment, at.decompose))
    for centering in (False, True):
        assert alignment(TRACE, given, centered=centering) == at.alignment(TRACE, one_hot(LABELS), centered=centering)
    assert decompose(TRACE, torch.eye(N), given).target_weight == pytest.approx(
        at.decompose(TRACE, torch.eye(N), one_hot(LABELS)).target_weight, rel=1e-12
    )


def test_class_numbers_have_a_column_for_each_output_of_a_full_kernel() -> None:
    assert at.alignment(FULL, LABELS) == at.alignment(FULL, one_hot(LABELS))
    two = LABELS.clamp_max(1)
    wanted = functional.one_hot(two, 3).double()
    assert at.alignment(FULL, two) == at.alignment(FULL, wanted)
    found, plain = at.representability(FULL, LABELS), at.representability(FULL, one_hot(LABELS))
    assert found.rkhs_norm == plain.rkhs_norm
    for wrong in (LABELS + 1, LABELS - 1):
        with pytest.raises(
            at.TangentError, match=r"class numbers from .* and there are 3 outputs; number the classes from 0"
        ):
            at.alignment(FULL, wrong)


def test_real_numbers_and_integers_of_two_values_are_taken_as_they_are() -> None:
    real = LABELS.double()
    assert at.alignment(TRACE, real) != pytest.approx(at.alignment(TRACE, LABELS), rel=1e-3)
    for two in (LABELS == 1, (LABELS == 1).int(), 2 * (LABELS == 1).int() - 1):
        assert at.alignment(TRACE, two) == at.alignment(TRACE, two.double())
    table = one_hot(LABELS).long()
    assert at.alignment(TRACE, table) == at.alignment(TRACE, table.double())


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "amounts": (
        lambda: at.alignment(TRACE, torch.arange(N)),
        r"^alignment: targets are integers of 8 values, which are class numbers and no amounts; give amounts as real "
        r"numbers, y\.double\(\), and classes as columns, torch\.nn\.functional\.one_hot\(y\)",
    ),
    "amounts in columns": (
        lambda: at.alignment(TRACE, torch.stack([LABELS, LABELS + 1], 1)),
        "^alignment: targets are integers of 4 values",
    ),
    "classes on one output": (
        lambda: at.alignment(CASE.feats.kernel()[:, :1, :, :1], LABELS),
        "^alignment: targets are integers of 3 values",
    ),
    "classes on a trace kernel": (
        lambda: at.representability(TRACE, LABELS),
        "^representability: several outputs need the full kernel .* classes, an output each",
    ),
    "complex targets": (
        lambda: at.alignment(TRACE, LABELS * 1j),
        "^alignment: targets are torch.complex64; give real ones",
    ),
    "names of classes": (
        lambda: unwrap(at.alignment)(TRACE, ["cat"] * N),
        "^alignment: give targets as a tensor, a NumPy array or a list of numbers, got list",
    ),
    **{
        name: (
            call,
            rf"^{name}: targets are torch\.int64; give real .*, and of class numbers y those of torch\.nn\.func",
        )
        for name, call in {
            "fit": lambda: at.fit(CASE.feats, one_hot(LABELS).long()),
            "certify": lambda: at.certify(CASE.feats, one_hot(LABELS).long(), coefficients={}),
            "fit_path": lambda: at.fit_path(CASE.feats, one_hot(LABELS).long()),
            "kernel_regression": lambda: at.kernel_regression(TRACE, LABELS),
            "kernel_change": lambda: at.kernel_change(CASE.feats, {}, one_hot(LABELS).long()),
        }.items()
    },
    "proximal steps": (
        lambda: at.solvers.proximal_gradient(CASE.feats, one_hot(LABELS).long(), ridge=1.0),
        r"^proximal_gradient: targets are real .* got torch\.int64 .*; and of class numbers y those of torch\.nn\.func",
    ),
    "a fit on kernels": (
        lambda: at.fit(TRACE, LABELS, structure=at.Fixed()),
        r"^fit: targets are torch\.int64; give real residuals",
    ),
    "classes on one output inspected": (
        lambda: outputs.targets(outputs.reduce_outputs("auto", torch.randn(N, 1), LABELS, None), LABELS, 1),
        "^inspect: targets are integers of 3 values, which are class numbers and no amounts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_integers_that_cannot_be_classes_are_refused_with_what_to_give(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(at.TangentError, match=words):
        call()


def test_arrays_go_to_the_device_of_the_features() -> None:
    """The device meta holds no numbers, which shows that nothing but the device was asked for."""
    from adaptive_tangents.checks import as_tensor

    for given in (np.ones((3, 2)), [[1.0, 2.0]], ((1, 2), (3, 4))):
        assert as_tensor("fit", "targets", given, torch.device("meta")).device.type == "meta"


def test_one_rule_serves_every_measure() -> None:
    wanted = one_hot(LABELS)
    assert torch.equal(class_columns("f", LABELS, None), wanted)
    assert torch.equal(class_columns("f", LABELS.float(), None), LABELS.double())
