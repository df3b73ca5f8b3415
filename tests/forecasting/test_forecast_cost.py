"""What a forecast costs: told before it starts, bounded, and the time that is left while it runs."""

from typing import Any

import pytest
import torch
from torch import nn

import adaptive_tangents as at
from adaptive_tangents.forecasting import cost
from adaptive_tangents.forecasting.cost import Costs, ForecastPlan, stages_of, upcoming
from adaptive_tangents.inspection.foretold_plan import Clock
from adaptive_tangents.runtime.pace import Pace, Stage
from cases import mlp
from prepared import draw

X = draw(30, 4)
Y = X[:, :1] * X[:, 1:2] + 0.5 * X[:, 2:3]


def network(outputs: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mlp(nn.Tanh, widths=(4, 8, outputs))


# ------------------------------------------------------------------------------------------------------------- bounded


def test_candidates_share_the_features_at_the_start() -> None:
    one = at.forecast(network(), X, Y, steps=1, structure=at.Fixed())
    several = at.forecast(network(), X, Y, steps=1, strength=[0.5, 2.0])
    assert [len(each.steps) for each in several.candidates] == [1, 1, 1]
    assert one.passes["backward"] == several.passes["backward"] == 1
    assert several.candidates[0].steps[0].loss == one.candidates[0].steps[0].loss


def losses(candidate: at.forecasting.Candidate) -> list[tuple[float, float]]:
    return [(step.loss, step.held_out) for step in candidate.steps]


def test_no_step_is_begun_that_would_go_beyond_the_epochs_allowed() -> None:
    whole = at.forecast(network(), X, Y, steps=4)
    told = at.forecast(network(), X, Y, steps=4, max_epochs=6.5)
    taken = [len(each.steps) for each in told.candidates]
    assert told.epochs <= 6.5
    assert 2 < sum(taken) < 8
    assert taken[0] - taken[1] in (0, 1)  # in turn
    for found, full in zip(told.candidates, whole.candidates, strict=True):
        assert losses(found) == losses(full)[: len(found.steps)]
    assert told.reason == "the next step would go beyond 6.5 epochs of passes (a larger max_epochs allows it)"
    assert told.reason in told.summary()


def test_the_first_step_of_each_candidate_is_taken_whatever_it_costs() -> None:
    told = at.forecast(network(outputs=3), X, torch.cat([Y, Y**2, -Y], 1), max_epochs=0.1)
    assert [len(each.steps) for each in told.candidates] == [1, 1]


def test_ten_outputs_take_at_most_the_sixty_epochs_of_the_default() -> None:
    each = cost.epochs_of_features(10)
    steps = upcoming([0, 0], [False, False], 8, 1 / 3, each, 60.0)
    assert len(steps) == 8
    assert len(upcoming([0, 0], [False, False], 8, 1 / 3, each, 1000.0)) == 16
    assert len(upcoming([0, 0], [False, False], 8, 1 / 3, cost.epochs_of_features(3), 60.0)) == 16


def test_when_one_candidate_is_over_the_others_have_its_share() -> None:
    assert upcoming([2, 2], [False, True], 4, 10.0, 3.0, 15.0) == [(0, 3)]
    assert upcoming([2, 2], [False, False], 4, 10.0, 3.0, 15.0) == [(0, 3)]
    assert upcoming([2, 2], [False, True], 4, 10.0, 3.0, 60.0) == [(0, 3), (0, 4)]


# --------------------------------------------------------------------------------------------------- told before it starts


def test_the_plan_is_shown_before_the_first_step() -> None:
    told: list[Any] = []
    found = at.forecast(network(), X, Y, steps=3, show=told.append, progress=lambda stage, fraction: told.append(stage))
    plan = told[0]
    assert isinstance(plan, ForecastPlan)
    assert (plan.samples, plan.held_out, plan.outputs, plan.parameters) == (24, 6, 1, 49)
    assert plan.candidates == ("kernel regression", "two-sided, strength 1")
    assert (plan.fewest, plan.most) == (4, 6)
    assert plan.fewest <= sum(len(each.steps) for each in found.candidates) <= plan.most
    assert plan.epochs[0] <= found.epochs <= plan.epochs[1]
    assert 0 < plan.seconds[0] <= plan.seconds[1]
    text = str(plan)
    assert text.startswith(
        "Forecast: 24 samples to fit, 6 held out, 1 output, 49 parameters\n  tries    kernel regression; two-"
    )
    assert "between 4 and 6 steps in all" in text
    assert "no step is begun that would go beyond 60" in text
    assert all(line in text for line in ("  memory   at most ", "  time     "))


def test_a_forecast_that_nobody_watches_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at.forecasting.trials, "stages_of", None)
    monkeypatch.setattr(cost, "_timed", None)
    assert at.forecast(network(), X, Y, steps=1).steps


def test_the_plan_sums_features_outputs_and_fits_of_all_steps() -> None:
    costs = Costs(features=2.0, outputs=0.5, fits=(10.0, 20.0), loading=1.0)
    stages = stages_of([(0, 1), (1, 1), (0, 2)], ["a", "b"], costs)
    assert [(stage.name, stage.seconds) for stage in stages] == [
        ("a, step 1", 14.0),
        ("b, step 1", 21.0),
        ("a, step 2", 13.0),
    ]


def test_a_fit_that_adapts_or_of_more_samples_is_planned_to_take_longer() -> None:
    one = at.tangent_features(network(outputs=3), X[:1])
    for loss in ("squared", "cross-entropy"):
        assert cost.fit_seconds(one, 100, loss, adapts=True) > cost.fit_seconds(one, 100, loss, adapts=False)
        assert cost.fit_seconds(one, 400, loss, adapts=True) > cost.fit_seconds(one, 100, loss, adapts=True)


# ------------------------------------------------------------------------------------------------------------ time left


class Hands:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_follows_what_steps_took() -> None:
    hands, told = Hands(), list[tuple[str, float]]()
    pace = Pace(lambda stage, share: told.append((stage, share)), hands)
    stages = [Stage(f"s{k}", 1.0, "fixed") for k in range(4)]
    for k in range(4):
        pace.replace(stages[k:])
        with pace.stage(f"s{k}"):
            hands.now += 3.0  # three times as long as planned
        done, share = hands.now, told[-1][1]
        left = done * (1 - share) / share
        assert left == pytest.approx(3.0 * (3 - k), rel=0.3)


def test_work_that_is_no_longer_needed_does_not_count_in_the_time_left() -> None:
    hands = Hands()
    pace = Pace(lambda stage, share: None, hands)
    pace.replace([Stage("a", 1.0, "fixed"), Stage("b", 8.0, "fixed"), Stage("c", 1.0, "adapting")])
    with pace.stage("a"):
        hands.now += 1.0
    assert pace.left() == pytest.approx(9.0)
    pace.replace([Stage("c", 1.0, "adapting")])
    assert pace.left() == pytest.approx(1.0)


def test_progress_of_the_command_is_the_share_of_the_time_of_all_its_parts() -> None:
    hands, told = Hands(), list[float]()
    clock = Clock(lambda stage, share: told.append(share), [20.0, 10.0], hands)
    clock.expected = 10.0
    first, second, third = (clock.part(place) for place in range(3))
    first("", 0.0)
    for part, seconds in ((first, 10.0), (second, 20.0), (third, 10.0)):
        began = hands.now
        part("", 0.0)
        for tenth in range(1, 11):
            hands.now = began + seconds * tenth / 10
            part("", tenth / 10)
            assert told[-1] == pytest.approx(hands.now / 40.0)
    assert told[0] == 0.0
