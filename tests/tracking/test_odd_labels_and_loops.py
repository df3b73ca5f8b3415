"""A tracker with labels of any numbering, in loops that do more than train one network from start to end."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adaptive_tangents as at

N = 24
X = torch.randn(N, 3, generator=torch.manual_seed(1))
UPPER = X[:, 0] * X[:, 1] > 0


def network(outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))


def tracker(model: nn.Module, y: Any = None, **options: Any) -> at.Tracker:
    return at.Tracker(model, X, y, **{"budget": None, **options})


@pytest.mark.parametrize("pair", [(0, 1), (-1, 1), (-1, 0), (2, 3), (-5, 1)])
def test_two_classes_have_the_same_numbers_however_they_are_numbered(pair: tuple[int, int]) -> None:
    model = network()
    record = tracker(model, torch.where(UPPER, pair[1], pair[0])).record()
    outputs = model(X).detach().double()[:, 0]
    wanted = nn.functional.binary_cross_entropy_with_logits(outputs, UPPER.double())
    assert record is not None
    assert record.whole is not None
    assert record.loss == pytest.approx(float(wanted))
    assert record.accuracy == pytest.approx(float(((outputs > 0) == UPPER).double().mean()))
    usual = tracker(model, UPPER.long()).record()
    assert usual is not None
    assert record.whole == usual.whole


@pytest.mark.parametrize("pair", [(1, 2), (2, 3), (-1, 0)])
def test_a_class_is_the_upper_one_though_the_samples_drawn_lack_the_other(pair: tuple[int, int]) -> None:
    model = network()
    watched = tracker(model, torch.where(torch.arange(N) == N - 1, pair[0], pair[1]), samples=4)
    record = watched.record()
    index = watched.state_dict()["tensors"]["index"]
    assert N - 1 not in index.tolist()
    assert record is not None
    assert record.accuracy == float((model(X[index])[:, 0] > 0).double().mean())


def test_a_class_that_does_not_fit_is_told_though_the_samples_drawn_lack_it() -> None:
    last = torch.arange(N) == N - 1
    with pytest.raises(
        at.TangentError, match=r"Tracker: targets are class numbers from 1 to 3 and there are 3 outputs"
    ):
        tracker(network(3), torch.where(last, 3, 1 + (torch.arange(N) % 2)), samples=4).record()
    with pytest.raises(at.TangentError, match=r"Tracker: targets are integers of 3 values"):
        tracker(network(), torch.where(last, 2, torch.arange(N) % 2), samples=4).record()


def test_a_head_with_other_outputs_is_a_warning_and_a_note_and_training_goes_on() -> None:
    model = network(2)
    watched = tracker(model)
    watched.record()
    model[2] = nn.Linear(8, 3)
    with pytest.warns(
        at.TangentWarning, match=r"the network has 3 output\(s\), and had 2 at first; begin a new Tracker"
    ):
        record = watched.record()
    assert record is not None
    assert record.whole is None
    assert "begin a new Tracker" in record.note
    model[2] = nn.Linear(8, 2)
    after = watched.record()
    assert after is not None
    assert after.whole is not None
    assert not after.note


@pytest.mark.parametrize("options", [{"outputs": 1}, {"outputs": 2, "seed": 5}, {}])
def test_a_curve_goes_on_with_kernels_of_the_same_outputs_alone(options: dict[str, Any]) -> None:
    model = network(4)
    first = tracker(model, outputs=2)
    first.record()
    wanted = (
        r"is of kernels along 2 directions of 4 outputs that seed 0 draws, and this tracker's are .*; give the same"
    )
    with pytest.raises(at.TangentError, match=wanted):
        tracker(model, **options).load_state_dict(first.state_dict())
    again = tracker(model, outputs=2)
    again.load_state_dict(first.state_dict())
    record = again.record()
    assert record is not None
    assert record.whole is not None
    assert record.whole.cka_start == pytest.approx(1, abs=1e-12)


def test_numbers_of_the_caller_never_replace_those_of_a_record() -> None:
    watched = tracker(network(), UPPER.long())
    message = r"Tracker.record: loss is a column of the record's own, .*; give another name, e.g. train_loss"
    for call in (watched.record, watched.close):
        with pytest.raises(at.TangentError, match=message):
            call(0, loss=torch.tensor(2.0))
    assert not watched.records
    watched.record(0, train_loss=torch.tensor(2.0))
    assert watched.table()[0]["train_loss"] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2.5}, r"samples is 1 to 24, the samples of x, got 2\.5"),
        ({"every": 2.5}, r"every is a positive number of calls, got 2\.5"),
        ({"outputs": 2.5}, r"outputs is 'auto', 'trace' or a positive number of directions, got 2\.5"),
        ({"y": torch.where(torch.arange(N) == 3, float("nan"), X[:, 0])}, r"the target of sample 3 is not finite"),
    ],
)
def test_amounts_that_cannot_be_counted_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(at.TangentError, match=f"^Tracker: {message}"):
        tracker(network(), **options)
    tracker(network(), samples=np.int64(4), every=np.int64(2))


@pytest.mark.parametrize("step", [1.5, "a", float("nan"), float("inf"), torch.zeros(2)])
def test_a_step_is_a_whole_number(step: Any) -> None:
    watched = tracker(network())
    with pytest.raises(at.TangentError, match=r"^Tracker\.record: step is a whole number, got "):
        watched.record(step)
    for whole in (2.0, np.int32(3), torch.tensor(4)):
        record = watched.record(whole)
        assert record is not None
        assert record.step == whole


def test_labels_of_pandas_are_taken_without_a_word_and_stay_the_users() -> None:
    array = UPPER.long().numpy()
    array.flags.writeable = False  # as those of a pandas Series are
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = tracker(network(), array).record()
    assert record is not None
    assert at.alignment(torch.eye(N), array) == at.alignment(torch.eye(N), UPPER.long())
