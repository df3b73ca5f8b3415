"""The estimators keep scikit-learn's rules, and are the fits that they say they are."""

import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.estimators import WIDTH, default_network
from adaptive_tangents.solvers.fold_choice import Task, dealt
from prepared import draw, fingerprint

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is in the extra 'report'")
from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402


class Tiny:
    """A factory whose name is the same in every process, as the names of tests must be."""

    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, outputs))

    def __repr__(self) -> str:
        return "tiny"


tiny = Tiny()


QUICK: dict[str, Any] = {"ridge": 0.1, "strength": 100.0, "folds": 2, "tol": 1e-2}


@parametrize_with_checks(
    [
        at.AdaptiveTangentRegressor(tiny, **QUICK),
        at.AdaptiveTangentClassifier(tiny, structure=at.Fixed(), **QUICK),  # transforms are the regressor's
        at.AdaptiveTangentClassifier(tiny, loss="cross-entropy", structure=at.Fixed(), ridge=0.1),
    ]
)
def test_the_rules_of_scikit_learn_are_kept(estimator: Any, check: Any) -> None:
    check(estimator)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4))
Y = X[:, 0] * X[:, 1] + 0.5 * X[:, 2]
NEW = RNG.normal(size=(20, 4))
LABELS = np.array(["blue", "green", "red"])[np.digitize(Y, [-0.5, 0.5])]


def module(outputs: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return tiny(4, outputs).to(dtype)


# ---------------------------------------------------------------------------------------------- what is predicted


def test_without_an_intercept_the_prediction_is_the_network_at_its_start_plus_the_fit_of_the_rest() -> None:
    net = module(1)
    est = at.AdaptiveTangentRegressor(net, ridge=0.1, strength=2.0, fit_intercept=False).fit(X, Y)
    x, new = torch.from_numpy(X), torch.from_numpy(NEW)
    r = torch.from_numpy(Y)[:, None] - net(x).detach()
    twin = at.fit(at.tangent_features(net, x), r, structure=at.TwoSided(at.Quadratic(2.0)), ridge=0.1, tol=1e-6)
    wanted = net(new).detach() + twin.predict(at.tangent_features(net, new))
    assert np.allclose(est.predict(NEW), wanted[:, 0], rtol=0, atol=1e-12)
    assert est.intercept_ == 0
    assert est.fit_.structure == at.TwoSided(at.Quadratic(2.0))


def test_fixed_is_kernel_ridge_regression_around_the_network_and_the_mean() -> None:
    net = module(2)
    targets = np.stack([Y, 3 + 2 * Y**2], 1)
    est = at.AdaptiveTangentRegressor(net, structure=at.Fixed(), ridge=0.3).fit(X, targets)
    phi, new = (at.tangent_features(net, torch.from_numpy(x)).dense().flatten(0, 1) for x in (X, NEW))
    start, begin = (net(torch.from_numpy(x)).detach() for x in (X, NEW))
    r = torch.from_numpy(targets) - start
    dual = torch.linalg.solve(phi @ phi.T + 0.3 * torch.eye(120, dtype=torch.float64), (r - r.mean(0)).flatten())
    wanted = begin + r.mean(0) + (new @ phi.T @ dual).reshape(-1, 2)
    assert np.allclose(est.predict(NEW), wanted, rtol=0, atol=1e-9)
    assert est.strength_ == np.inf


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_classes_are_the_largest_outputs_and_probabilities_their_softmax(loss: str) -> None:
    est = at.AdaptiveTangentClassifier(tiny, loss=loss, ridge=0.1, strength=1.0, random_state=0).fit(X, LABELS)
    values, shares = est.decision_function(NEW), est.predict_proba(NEW)
    assert est.classes_.tolist() == ["blue", "green", "red"]
    assert values.shape == shares.shape == (20, 3)
    assert (est.predict(NEW) == est.classes_[values.argmax(1)]).all()
    assert np.allclose(np.log(shares) - np.log(shares[:, :1]), (values - values[:, :1]) / est.temperature_, atol=1e-9)
    assert (est.temperature_ == 1.0) == (loss == "cross-entropy")
    assert est.fit_.loss == loss


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_two_classes_have_one_output_or_the_two_of_a_module_that_was_given(loss: str) -> None:
    labels = LABELS == "red"
    one = at.AdaptiveTangentClassifier(module(1), loss=loss, ridge=0.1, strength=1.0).fit(X, labels)
    two = at.AdaptiveTangentClassifier(module(2), loss=loss, ridge=0.1, strength=1.0).fit(X, labels)
    assert (one.fit_.dual.shape[1], two.fit_.dual.shape[1]) == (1, 2)
    for est in (one, two):
        values = est.decision_function(NEW)
        assert values.shape == (20,)
        assert (est.predict(NEW) == (values > 0)).all()
        assert np.allclose(est.predict_proba(NEW)[:, 1], 1 / (1 + np.exp(-values / est.temperature_)))


def test_the_intercept_of_cross_entropy_is_the_log_odds_of_the_classes() -> None:
    labels = np.repeat([0, 1], [45, 15])
    est = at.AdaptiveTangentClassifier(tiny, loss="cross-entropy", structure=at.Fixed(), ridge=1e6, random_state=0)
    assert est.fit(X, labels).intercept_ == pytest.approx(np.log(15.5 / 45.5))


# ------------------------------------------------------------------------------------------------- what is chosen


def test_the_candidate_chosen_has_the_least_held_out_loss_and_the_choice_saw_no_other_samples() -> None:
    est = at.AdaptiveTangentRegressor(tiny, random_state=0).fit(X, Y)
    losses, params = est.cv_results_["mean_test_loss"], est.cv_results_["params"]
    best = params[int(np.argmin(losses))]
    assert (est.ridge_, est.strength_) == (best["ridge"], best["strength"])
    assert est.cv_results_["chosen"] == int(np.argmin(losses))
    assert {one["strength"] for one in params[:6]} == {np.inf}
    assert len({one["strength"] for one in params}) == 4
    assert len(params) == len(losses) == 12
    assert est.fit_.ridge == est.ridge_


def test_a_held_out_loss_is_that_of_a_fit_to_the_other_samples_its_intercept_too() -> None:
    net = module(1)
    est = at.AdaptiveTangentRegressor(net, structure=at.Fixed(), folds=2, choice_samples=None, random_state=0)
    est.fit(X, Y)
    feats, start = at.tangent_features(net, torch.from_numpy(X)), net(torch.from_numpy(X)).detach()
    task = Task(feats, start, torch.from_numpy(Y)[:, None], "squared", True, 1e-6, 100, _seed_of(0))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(task.seed))
    total = 0.0
    for held in dealt(task, order, 2):
        kept = np.setdiff1d(np.arange(60), held.numpy())
        alone = at.AdaptiveTangentRegressor(net, structure=at.Fixed(), ridge=est.ridge_).fit(X[kept], Y[kept])
        total += float(((alone.predict(X[held.numpy()]) - Y[held.numpy()]) ** 2).sum())
    assert est.cv_results_["mean_test_loss"].min() == pytest.approx(total / 60, rel=1e-9)


def _seed_of(random_state: int) -> int:
    random = np.random.RandomState(random_state)
    random.randint(2**31 - 1)  # the network's
    return int(random.randint(2**31 - 1))


def test_folds_keep_the_shares_of_classes() -> None:
    signs = torch.where(torch.arange(20)[:, None] >= torch.tensor([18]), 1.0, -1.0).double()
    feats = at.tangent_features(module(1), draw(20, 4))
    task = Task(feats, torch.zeros(20, 1, dtype=torch.float64), signs, "squared", True, 1e-6, 100, 0)
    parts = dealt(task, torch.randperm(20), 2)
    assert [int((signs[part] > 0).sum()) for part in parts] == [1, 1]
    assert torch.cat(parts).sort().values.tolist() == list(range(20))


def test_adaptation_is_chosen_where_the_target_depends_on_few_directions() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(340, 10))
    y = x[:, 0] * x[:, 1]
    wide = lambda i, c: nn.Sequential(nn.Linear(i, 64), nn.ReLU(), nn.Linear(64, c))  # noqa: E731
    adapted = at.AdaptiveTangentRegressor(wide, random_state=0).fit(x[:140], y[:140])
    fixed = at.AdaptiveTangentRegressor(wide, structure=at.Fixed(), random_state=0).fit(x[:140], y[:140])
    assert adapted.strength_ < np.inf
    assert adapted.score(x[140:], y[140:]) > fixed.score(x[140:], y[140:])


def test_the_temperature_is_where_held_out_predictions_have_the_least_cross_entropy() -> None:
    est = at.AdaptiveTangentClassifier(tiny, ridge=0.1, strength=np.inf, random_state=0)
    assert 0.01 < est.fit(X, LABELS).temperature_ < 2
    few = at.AdaptiveTangentClassifier(tiny, ridge=0.1, strength=np.inf, random_state=0).fit(X[:3], ["a", "b", "a"])
    assert few.temperature_ == 1.0, "nothing can be held out of three samples"


# -------------------------------------------------------------------------------------------- living with others


def test_pipelines_and_grid_searches_work() -> None:
    pipe = make_pipeline(StandardScaler(), at.AdaptiveTangentClassifier(tiny, random_state=0, folds=2))
    grid = {
        "adaptivetangentclassifier__structure": [at.Fixed(), at.TwoSided()],
        "adaptivetangentclassifier__ridge": [0.1, 1.0],
    }
    search = GridSearchCV(pipe, grid, cv=2).fit(X, LABELS)
    assert search.best_params_["adaptivetangentclassifier__ridge"] in (0.1, 1.0)
    assert search.best_estimator_.score(X, LABELS) > 0.6
    assert search.predict_proba(NEW).shape == (20, 3)


def test_a_module_that_was_given_is_left_as_found_and_so_is_the_generator() -> None:
    net = module(1, torch.float32).train()
    before = fingerprint(net, torch.zeros(1))
    est = at.AdaptiveTangentRegressor(net, ridge=0.1, strength=1.0, random_state=0)
    copied = clone(est)
    est.fit(X, Y)
    est.predict(NEW)
    assert fingerprint(net, torch.zeros(1))[:-4] == before[:-4]
    assert est.model is net
    assert est.model_ is not net
    assert not est.model_.training
    assert np.array_equal(copied.fit(X, Y).predict(NEW), est.predict(NEW))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_random_state_gives_one_prediction_and_pickles_give_it_again(dtype: str) -> None:
    made = [
        at.AdaptiveTangentRegressor(tiny, ridge=0.1, folds=2, dtype=dtype, random_state=7).fit(X, Y) for _ in range(2)
    ]
    first, second = (est.predict(NEW) for est in made)
    assert np.array_equal(first, second)
    assert np.array_equal(pickle.loads(pickle.dumps(made[0])).predict(NEW), first)
    assert next(made[0].model_.parameters()).dtype == getattr(torch, dtype)
    assert first.dtype == np.float64
    other = at.AdaptiveTangentRegressor(tiny, ridge=0.1, folds=2, dtype=dtype, random_state=8).fit(X, Y)
    assert not np.array_equal(other.predict(NEW), first)


def test_many_samples_are_predicted_as_one_by_one() -> None:
    est = at.AdaptiveTangentRegressor(tiny, ridge=0.1, strength=1.0, random_state=0).fit(X, Y)
    many = np.tile(NEW, (60, 1))
    assert np.allclose(est.predict(many)[:20], est.predict(NEW), rtol=0, atol=1e-12)


def test_the_default_network_has_two_hidden_layers_and_names_of_columns_are_kept() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is in the extra 'integrations'")
    frame = pandas.DataFrame(X[:12], columns=list("abcd"))
    est = at.AdaptiveTangentRegressor(structure=at.Fixed(), ridge=0.1, random_state=0).fit(frame, Y[:12])
    assert [type(layer) for layer in est.model_] == [type(layer) for layer in default_network(4, 1)]
    assert est.model_[2].weight.shape == (WIDTH, WIDTH)
    assert est.feature_names_in_.tolist() == list("abcd")
    assert est.n_features_in_ == 4


# ------------------------------------------------------------------------------------------------------- errors


class _Both(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "model is a module, a factory of (n_inputs, n_outputs), or None; got int"),
        ({"model": lambda i, c: None}, "the factory returned NoneType; return a torch.nn.Module"),
        (
            {"model": module(5)},
            "the model returns (60, 5) for 60 samples, and y needs (60, 1); give a model with as many",
        ),
        ({"model": _Both()}, "the model returns tuple; give one that returns a tensor (n, c)"),
        ({"ridge": -1.0}, "ridge is None, to be chosen by folds, or a number ≥ 0; got -1.0"),
        ({"strength": "much"}, "strength is None, to be chosen by folds, or a number ≥ 0; got 'much'"),
        ({"strength": 0}, "strength 0 leaves transforms without a penalty; give a positive one, or None"),
        ({"folds": 1}, "folds is a whole number of at least 2, got 1"),
        ({"choice_samples": 1.5}, "choice_samples is a whole number of at least 2, got 1.5"),
        ({"dtype": "float16"}, "dtype is one of float64, float32, got 'float16'"),
        ({"structure": "TwoSided"}, "'TwoSided' is no structure; pass one, such as structure=at.TwoSided()"),
        ({"wrt": "9*"}, "9*"),
        ({"memory_limit": 1000}, "memory"),
    ],
)
def test_what_cannot_be_done_is_said_in_the_name_of_the_call(options: dict[str, Any], message: str) -> None:
    est = at.AdaptiveTangentRegressor(**{"model": tiny, "random_state": 0, **options})
    with pytest.raises(at.TangentError, match=r"^AdaptiveTangentRegressor\.fit: .*" + re.escape(message)):
        est.fit(X, Y)


def test_classes_and_losses_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        at.TangentError, match=r"^AdaptiveTangentClassifier\.fit: y has one class, 'a'; give samples of"
    ):
        at.AdaptiveTangentClassifier(tiny).fit(X, ["a"] * 60)
    with pytest.raises(at.TangentError, match=r"loss is one of squared, cross-entropy, got 'hinge'"):
        at.AdaptiveTangentClassifier(tiny, loss="hinge").fit(X, LABELS)
    with pytest.raises(NotFittedError):
        at.AdaptiveTangentClassifier(tiny).predict(X)


def test_a_fit_that_does_not_converge_warns_at_the_line_that_called() -> None:
    with pytest.warns(at.TangentWarning, match=r"^AdaptiveTangentRegressor\.fit: stopped after 1 rounds"):
        at.AdaptiveTangentRegressor(tiny, ridge=1e-6, strength=1e-3, max_rounds=1, random_state=0).fit(X, Y)


def test_progress_rises_to_the_end_and_changes_nothing() -> None:
    heard: list[tuple[str, float]] = []
    options: dict[str, Any] = {"folds": 2, "choice_samples": 30, "random_state": 0}
    est = at.AdaptiveTangentRegressor(tiny, progress=lambda *told: heard.append(told), **options)
    assert clone(est).get_params()["progress"] is est.progress, "a function is kept as it is"
    est.fit(X, Y)
    fractions = [fraction for _, fraction in heard]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    choice = [fraction for stage, fraction in heard if stage == "ridge and strength"]
    assert len(choice) == len(est.cv_results_["params"])
    assert len(choice) < len(heard), "the last fit is told of, too"
    assert np.array_equal(est.predict(NEW), at.AdaptiveTangentRegressor(tiny, **options).fit(X, Y).predict(NEW))
