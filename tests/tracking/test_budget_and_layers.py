"""How often a tracker records by what records cost, told by a clock of its own; and which layers blocks are of."""

import importlib
from itertools import pairwise

import pytest
import torch
from torch import nn

import adaptive_tangents as at
from adaptive_tangents.features.layer_names import layers_of
from adaptive_tangents.tracking.layers import grouped
from adaptive_tangents.tracking.measuring import Question, Seen


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(
    monkeypatch: pytest.MonkeyPatch, *, record: float, step: float, steps: int, n: int = 200, budget: float | None = 0.05,
    every: int = 1, samples: int | None = None,
) -> at.Tracker:  # fmt: skip
    """Train for some steps of so many seconds, with records that take so many a sample, and the share after each."""
    clock = Clock()

    def see(self: Question, model: nn.Module, x: torch.Tensor) -> Seen:
        clock.now += record * len(x)
        return Seen(
            torch.zeros(len(x), 1, dtype=torch.float64), {"all": torch.eye(2, dtype=torch.float64)}, ("weight",)
        )

    monkeypatch.setattr(Question, "see", see)
    numbers = {"all": at.tracking.KernelNumbers(trace=1.0)}
    monkeypatch.setattr(importlib.import_module("adaptive_tangents.tracking.tracker"), "numbers_by_group",
        lambda *arguments: dict(numbers))  # fmt: skip
    model, x = nn.Linear(2, 1), torch.randn(n, 2)
    tracker = at.Tracker(model, x, clock=clock, budget=budget, every=every, samples=samples)
    for k in range(steps):
        if tracker.record(k) is not None and k and budget is not None:
            assert tracker.cost.seconds <= max(budget * tracker.cost.training, 3.0) + 1e-9, f"after step {k}"
        clock.now += step
    tracker.close(steps)
    return tracker


@pytest.mark.parametrize("step", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("budget", [0.02, 0.05, 0.5])
def test_records_take_at_most_their_share_of_training_and_most_of_it(
    monkeypatch: pytest.MonkeyPatch, step: float, budget: float
) -> None:
    tracker = run(monkeypatch, record=0.001, step=step, steps=800, budget=budget)
    each = tracker.records[-1].seconds
    affordable = max(budget * tracker.cost.training, 3.0) / each
    earned = budget * tracker.cost.training / each
    assert min(earned, 800) / 2.5 - 2 <= len(tracker.records) <= affordable + 2
    assert tracker.cost.seconds == pytest.approx(sum(record.seconds for record in tracker.records))
    assert tracker.cost.training == pytest.approx(800 * step)


def test_a_training_too_short_for_its_share_has_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (10, 30, 100, 1000):
        tracker = run(monkeypatch, record=0.001, step=0.002, steps=steps)
        assert 8 <= len(tracker.records) <= 24
        assert tracker.cost.seconds <= 3.0 + 0.128  # the last one
    tracker = run(monkeypatch, record=0.001, step=0.002, steps=30)
    assert [record.step for record in tracker.records] == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 30]
    tracker = run(monkeypatch, record=0.001, step=0.002, steps=30, every=5)
    assert [record.step for record in tracker.records] == [0, 5, 10, 15, 20, 30]
    dear = run(monkeypatch, record=1.2 / 16, step=0.002, steps=30)
    assert [record.step for record in dear.records] == [0, 1, 30], (
        "three seconds are two records of this size, and the last"
    )


def test_a_long_training_has_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = run(monkeypatch, record=0.001, step=0.1, steps=20_000)
    assert tracker.cost.share <= 0.05


def test_records_fall_on_multiples_of_powers_of_two_of_every(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = run(monkeypatch, record=0.001, step=0.05, steps=2000, every=3)
    steps = [record.step for record in tracker.records]
    gaps = {b - a for a, b in pairwise(steps[1:-1])}
    assert all(step % 3 == 0 for step in steps[:-1])
    assert gaps
    assert all(gap % 3 == 0 and (gap // 3) & (gap // 3 - 1) == 0 for gap in gaps)
    assert (steps[0], steps[-1]) == (0, 2000)


@pytest.mark.parametrize(
    ("record", "chosen"), [(1e-5, 128), (0.001, 128), (0.003, 64), (0.007, 32), (0.02, 16), (1.0, 16)]
)
def test_samples_are_chosen_once_by_what_a_record_costs(
    monkeypatch: pytest.MonkeyPatch, record: float, chosen: int
) -> None:
    tracker = run(monkeypatch, record=record, step=1.0, steps=100)
    assert f"K of {chosen} of 200 samples" in tracker.summary()
    assert tracker.records[-1].seconds == pytest.approx(chosen * record)
    tracker = run(monkeypatch, record=record, step=1.0, steps=2, samples=40)
    assert "K of 40 of 200 samples" in tracker.summary(), "a number that is given is taken"


def test_few_samples_are_all_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "K of 9 samples" in run(monkeypatch, record=1.0, step=1.0, steps=2, n=9).summary()


def test_without_a_budget_every_call_or_every_so_many_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = run(monkeypatch, record=1.0, step=0.001, steps=10, budget=None, every=4)
    assert [record.step for record in tracker.records] == [0, 4, 8, 10]
    assert "128 of 200" in tracker.summary()


def test_the_first_and_the_last_record_are_taken_whatever_they_cost_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracker = run(monkeypatch, record=1.0, step=0.1, steps=50)
    assert [record.step for record in tracker.records] == [0, 50]
    assert (
        "of 5 % allowed; the first and the last record, and 3 s in all, are taken whatever they cost"
        in tracker.summary()
    )
    assert tracker.cost.share > 0.05
    lone = at.Tracker(nn.Linear(2, 1), torch.randn(3, 2), samples=3, clock=Clock())
    assert lone.cost.share == 0
    assert at.tracking.Cost(seconds=1.0, training=0.0, records=1).share == float("inf")


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["0", "2", "4"], ["layer 0", "layer 2", "layer 4"]),
        (["net.0", "net.2", "net.4"], ["net.0", "net.2", "net.4"]),
        (["net.fc1", "net.act.weight", "net.fc2"], ["fc1", "act", "fc2"]),
        (["fc1", "fc2"], ["fc1", "fc2"]),
        (["conv1", "bn1.weight", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "fc"],
            ["conv1", "bn1", "layer1.0", "layer1.1", "layer2.0", "head"]),
        (["0.model.embeddings.word", "0.model.encoder.layer.0.a", "0.model.encoder.layer.1.a",
            "0.model.encoder.layer.2.a", "2.linear"], ["embeddings", "layer 0", "layer 1", "layer 2", "2"]),
        (["0.0", "0.1", "0.2", "1"], ["layer 0", "layer 1"]),
        (["encoder.block.0.layer.0.q", "encoder.block.1.layer.1.q", "decoder.block.0.layer.0.q", "shared.weight"],
            ["encoder block 0", "encoder block 1", "decoder block 0", "embeddings"]),
        (["layers.0.blocks.0.a", "layers.0.blocks.1.a", "layers.0.blocks.2.a", "layers.1.blocks.0.a", "head"],
            ["layer 0 block 0", "layer 0 block 1", "layer 0 block 2", "layer 1 block 0", "head"]),
        (["base_model.model.h.0.lora_A.default", "base_model.model.h.1.lora_A.default", "base_model.model.score"],
            ["layer 0", "layer 1", "head"]),
        (["weight"], ["weight"]),
        (["all.weight", "b.weight"], ["all_", "b"]),
    ],
)  # fmt: skip
def test_blocks_are_grouped_by_the_layers_that_inspect_names(names: list[str], groups: list[str]) -> None:
    found = grouped("f", names)
    assert list(found) == groups
    assert [name.removesuffix("_") for name in found] == [layer.name for layer in layers_of(names)]
    assert sorted(name for members in found.values() for name in members) == sorted(names)


def test_blocks_that_no_pattern_names_are_the_rest() -> None:
    assert grouped("f", ["a.x", "b.x", "c"], {"one": "a*", "two": ["b*"]}) == {
        "one": ("a.x",), "two": ("b.x",), "rest": ("c",),
    }  # fmt: skip
