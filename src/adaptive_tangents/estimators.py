"""The exact adaptive model as scikit-learn estimators: a network at its start, plus features that adapt to targets.

``AdaptiveTangentRegressor`` and ``AdaptiveTangentClassifier`` choose ridge and strength by folds of the training samples.
They need scikit-learn, which the extra ``report`` installs; nothing else in the library imports this module.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.checks import check_choice
from adaptive_tangents.errors import TangentError, TangentWarning, raised_as
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.progress import Progress, shown, silent
from adaptive_tangents.runtime.recursion import deep_copy
from adaptive_tangents.solvers.fold_choice import Choice, Task, chosen, strengthened_to, temperature
from adaptive_tangents.solvers.losses import LossName
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Structure
from adaptive_tangents.structures.mixed import as_structure
from adaptive_tangents.structures.spectral import TWO_SIDED

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
except ImportError:  # the names stay, so that looking through the package works

    class BaseEstimator:  # type: ignore[no-redef]
        """Stands in for scikit-learn's where that is absent."""

        def __new__(cls, *given: Any, **options: Any) -> "BaseEstimator":
            """Raise TangentError that says what to install."""
            raise TangentError(
                f"{cls.__name__}: scikit-learn is not installed; pip install 'adaptive-tangents[report]' installs it"
            )

    class ClassifierMixin:  # type: ignore[no-redef]
        """Stands in likewise."""

    class RegressorMixin:  # type: ignore[no-redef]
        """Stands in likewise."""


WIDTH = 256
"""The width of both hidden layers of the network that an estimator makes where ``model`` is None."""

_ROWS = 1024  # samples whose features are made at once for predictions
_MOST_SEED = 2**31 - 1


def default_network(n_inputs: int, n_outputs: int) -> nn.Module:
    """Linear, ReLU, Linear, ReLU, Linear with two hidden layers of width ``WIDTH``, in PyTorch's own initialization.

    Args:
        n_inputs: columns of X.
        n_outputs: columns of y, or classes (1 for two classes).

    >>> [tuple(p.shape) for p in default_network(3, 1).parameters()][::2]
    [(256, 3), (256, 256), (1, 256)]
    """
    return nn.Sequential(
        nn.Linear(n_inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, n_outputs)
    )


class _AdaptiveTangent(BaseEstimator):  # type: ignore[misc]
    """What both estimators share: the network, the choice by folds, the fit, and f(x;θ₀) + φ(x)β."""

    def __init__(
        self, model: Any, structure: Any, ridge: Any, strength: Any, folds: Any, choice_samples: Any, fit_intercept: Any,
        wrt: Any, dtype: Any, device: Any, memory_limit: Any, tol: Any, max_rounds: Any, random_state: Any, progress: Any,
    ) -> None:  # fmt: skip
        self.model, self.structure, self.ridge, self.strength = model, structure, ridge, strength
        self.folds, self.choice_samples, self.fit_intercept = folds, choice_samples, fit_intercept
        self.wrt, self.dtype, self.device, self.memory_limit = wrt, dtype, device, memory_limit
        self.tol, self.max_rounds, self.random_state, self.progress = tol, max_rounds, random_state, progress

    def _fitted(self, X: Any, targets: Any, outputs: int, loss: LossName, *, predictions: bool = False) -> Choice:
        """Make the network, choose ridge and strength, and fit; ``targets`` are (n, c), or labels for cross-entropy."""
        from sklearn.utils import check_random_state

        call = f"{type(self).__name__}.fit"
        check_choice(call, "dtype", self.dtype, ("float64", "float32"))
        self._check_numbers(call)
        structure = TWO_SIDED if self.structure is None else as_structure(call, self.structure)
        random = check_random_state(self.random_state)
        self.model_ = _network(call, self.model, X.shape[1], outputs, int(random.randint(_MOST_SEED)))
        self.model_.to(self.device, getattr(torch, self.dtype)).eval()
        x = self._tensor(X)
        start = self._start(call, x)
        y = torch.from_numpy(np.array(targets)).to(start.device)
        if start.ndim != 2 or (loss == "squared" and start.shape != y.shape) or start.shape[1] not in (outputs, 1):
            raise TangentError(
                f"{call}: the model returns {tuple(start.shape)} for {len(x)} samples, and y needs ({len(x)}, {outputs}); "
                "give a model with as many outputs, or a factory of (n_inputs, n_outputs)"
            )
        with raised_as(call, "fit", "tangent_features"), shown(self.progress) as told:
            feats = tangent_features(self.model_, x, wrt=self.wrt, memory_limit=self.memory_limit)
            task = Task(
                feats,
                start,
                y,
                loss,
                bool(self.fit_intercept),
                self.tol,
                self.max_rounds,
                int(random.randint(_MOST_SEED)),
            )
            choice = chosen(
                task, structure, self.ridge, self.strength, self.folds, self.choice_samples, predictions=predictions,
                progress=told or silent,
            )  # fmt: skip
            self._finish(task, choice, structure, told or silent)
        return choice

    def _finish(self, task: Task, choice: Choice, structure: Structure, told: Progress) -> None:
        everything = torch.arange(task.feats.n, device=task.feats.device)

        def watch(stage: str, fraction: float) -> None:
            told(f"fit, {stage}", choice.part + (1 - choice.part) * fraction)

        found = task.fit(everything, strengthened_to(structure, choice.strength), choice.ridge, watch=watch)
        if not found.converged:
            warnings.warn(f"{type(self).__name__}.fit: {found.reason}", TangentWarning, stacklevel=4)
        self.fit_: Fit = found
        self.intercept_ = task.intercept(everything).cpu().numpy()
        self.ridge_, self.strength_, self.n_iter_ = choice.ridge, choice.strength, max(1, found.rounds)
        self.cv_results_ = choice.table
        self.temperature_ = 1.0

    def _check_numbers(self, call: str) -> None:
        for name, least in (("ridge", 0.0), ("strength", 0.0)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value >= least):
                raise TangentError(f"{call}: {name} is None, to be chosen by folds, or a number ≥ 0; got {value!r}")
        if self.strength == 0:
            raise TangentError(f"{call}: strength 0 leaves transforms without a penalty; give a positive one, or None")
        for name in ("folds", "choice_samples"):
            value = getattr(self, name)
            if not (isinstance(value, int | np.integer) and value >= 2) and not (value is None and name != "folds"):
                raise TangentError(f"{call}: {name} is a whole number of at least 2, got {value!r}")

    def _tensor(self, X: Any) -> Tensor:
        return torch.from_numpy(np.array(X)).to(self.device, getattr(torch, self.dtype))

    def _start(self, call: str, x: Tensor) -> Tensor:
        """f(x;θ₀) in float64."""
        with torch.no_grad():
            made = [self.model_(x[part]) for part in ranges(len(x), _ROWS)]
        if not all(isinstance(part, Tensor) for part in made):
            raise TangentError(
                f"{call}: the model returns {type(made[0]).__name__}; give one that returns a tensor (n, c)"
            )
        return torch.cat(made).double()

    def _values(self, X: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        """f(x;θ₀) + φ(x)β + intercept, (n, c)."""
        from sklearn.utils.validation import check_is_fitted, validate_data

        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        made = []
        for part in ranges(len(X), _ROWS):
            x = self._tensor(X[part])
            feats = self._features(x)
            made.append(self._start("predict", x) + self.fit_.predict(feats))
        values: np.ndarray[Any, np.dtype[np.float64]] = torch.cat(made).cpu().numpy() + self.intercept_
        return values

    def _features(self, x: Tensor) -> TangentFeatures:
        with raised_as("predict", "tangent_features"):
            return tangent_features(self.model_, x, wrt=self.wrt, memory_limit=self.memory_limit)


class AdaptiveTangentRegressor(RegressorMixin, _AdaptiveTangent):  # type: ignore[misc]
    r"""Regression by a network's tangent features that adapt: f(x) = f(x;θ₀) + φ(x)β + intercept.

    β and the feature transform M minimize ‖θ‖² + Ω(M) + (1/ρ)Σ‖y − f(x)‖², β = Mᵀθ, as in ``fit``. The ridge ρ and the
    strength of the penalty Ω are chosen by folds of the training samples. Inputs are not standardized: put a
    ``StandardScaler`` before the estimator. Samples have no weights. y may have several columns.

    Args:
        model: the network f: a module, which is copied and left as it is; a factory of (n_inputs, n_outputs), called
            with PyTorch's generator seeded by ``random_state``; or None, two hidden layers of width 256 with ReLU.
        structure: which transforms M are allowed; None is ``TwoSided()``, and ``Fixed()`` is kernel ridge regression.
        ridge: ρ ≥ 0; None chooses among 0.001 to 100 times the mean of K₀'s diagonal.
        strength: the factor of the penalties' λ; infinity adapts nothing. None chooses among infinity and three finite
            ones, at which M would save 5, 20 and 50 % of the penalty of what the fixed kernel finds.
        folds: how many folds the choice uses; each fold is predicted by fits without it.
        choice_samples: at most so many samples, drawn by ``random_state``, make the choice; None is all of them.
        fit_intercept: whether the mean of y − f(x;θ₀) over the training samples is added to predictions, unpenalized.
        wrt: the parameters θ, as for ``tangent_features``; None is all that require a gradient.
        dtype: "float64" or "float32", of the network and its features; fits are always solved in float64.
        device: where the network and its features are.
        memory_limit: bytes that may be used; None is half of what is free.
        tol: of the fits, as for ``fit``.
        max_rounds: of the fits, as for ``fit``.
        random_state: an integer makes everything repeatable; None draws from NumPy's global generator.
        progress: called with the name of a stage and the fraction of ``fit`` that is done; True shows a bar, None nothing.

    Attributes:
        fit_: the ``Fit``, with coefficients, transforms and certificates.
        model_: the network at θ₀, a copy in ``dtype``.
        intercept_: what is added to predictions, (c,).
        ridge_: the ridge of the fit.
        strength_: its strength; infinity where nothing adapts.
        cv_results_: the candidates: "params" (dicts), "mean_test_loss" (held-out mean squared error), and "chosen" (index).
        n_iter_: how many kernel systems the fit solved.
        n_features_in_: columns of X.
        feature_names_in_: their names, where X has names.

    Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> import numpy as np, torch, adaptive_tangents as at
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> y = X[:, 0] * X[:, 1]
    >>> tiny = lambda i, c: torch.nn.Sequential(torch.nn.Linear(i, 32), torch.nn.Tanh(), torch.nn.Linear(32, c))
    >>> est = at.AdaptiveTangentRegressor(tiny, random_state=0).fit(X[:40], y[:40])
    >>> est.score(X[40:], y[40:]) > 0.5
    True
    """

    # Arguments are checked by `fit`, as scikit-learn asks.
    def __init__(
        self, model: Any = None, *, structure: Any = None, ridge: Any = None, strength: Any = None, folds: Any = 3,
        choice_samples: Any = 500, fit_intercept: Any = True, wrt: Any = None, dtype: Any = "float64", device: Any = "cpu",
        memory_limit: Any = None, tol: Any = 1e-6, max_rounds: Any = 100, random_state: Any = None, progress: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            model, structure, ridge, strength, folds, choice_samples, fit_intercept, wrt, dtype, device, memory_limit,
            tol, max_rounds, random_state, progress,
        )  # fmt: skip

    def fit(self, X: Any, y: Any) -> "AdaptiveTangentRegressor":
        """Fit to training samples.

        Args:
            X: inputs (n, features).
            y: real targets (n,) or (n, c).
        """
        from sklearn.utils.validation import validate_data

        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2)
        targets = np.asarray(y, np.float64)
        self._flat = targets.ndim == 1
        targets = targets.reshape(len(targets), -1)
        self._fitted(X, targets, targets.shape[1], "squared")
        return self

    def predict(self, X: Any) -> Any:
        """f(x) of samples, (n,) or (n, c) as y was.

        Args:
            X: inputs (n, features).
        """
        values = self._values(X)
        return values[:, 0] if self._flat else values

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class AdaptiveTangentClassifier(ClassifierMixin, _AdaptiveTangent):  # type: ignore[misc]
    r"""Classification by a network's tangent features that adapt: the class with the largest f(x;θ₀) + φ(x)β + intercept.

    With squared error, the outputs are fitted to 1 for the sample's class and −1 for others. Two classes have one output,
    unless a module that was given has two. The ridge and the strength are chosen by folds, as in
    ``AdaptiveTangentRegressor``, which describes the rest; inputs are not standardized, and samples have no weights.

    Args:
        model: as in ``AdaptiveTangentRegressor``; outputs are as many as classes, or 1 for two classes.
        loss: "squared" or "cross-entropy". The first solves one system a step, and is faster.
        structure, ridge, strength, folds, choice_samples: as in ``AdaptiveTangentRegressor``; folds keep the shares of
            classes.
        fit_intercept: whether predictions have an unpenalized part: the mean of targets − f(x;θ₀); for cross-entropy, the log
            odds of the classes' shares.
        wrt, dtype, device, memory_limit, tol, max_rounds, random_state, progress: as in ``AdaptiveTangentRegressor``.

    Attributes:
        classes_: the labels, sorted.
        temperature_: outputs are divided by it before softmax gives ``predict_proba``. For squared error it has the least
            cross-entropy on held-out predictions of the folds; for cross-entropy it is 1.
        fit_, model_, intercept_, ridge_, strength_, cv_results_, n_iter_, n_features_in_, feature_names_in_: as in
            ``AdaptiveTangentRegressor``; "mean_test_loss" is the held-out mean of the loss.

    Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> import numpy as np, torch, adaptive_tangents as at
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> y = np.where(X[:, 0] * X[:, 1] > 0, "same", "other")
    >>> tiny = lambda i, c: torch.nn.Sequential(torch.nn.Linear(i, 32), torch.nn.Tanh(), torch.nn.Linear(32, c))
    >>> est = at.AdaptiveTangentClassifier(tiny, random_state=0).fit(X[:40], y[:40])
    >>> est.classes_.tolist(), est.predict_proba(X[40:]).shape, est.score(X[40:], y[40:]) > 0.6
    (['other', 'same'], (20, 2), True)
    """

    def __init__(
        self, model: Any = None, *, loss: Any = "squared", structure: Any = None, ridge: Any = None, strength: Any = None,
        folds: Any = 3, choice_samples: Any = 500, fit_intercept: Any = True, wrt: Any = None, dtype: Any = "float64",
        device: Any = "cpu", memory_limit: Any = None, tol: Any = 1e-6, max_rounds: Any = 100, random_state: Any = None,
        progress: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            model, structure, ridge, strength, folds, choice_samples, fit_intercept, wrt, dtype, device, memory_limit,
            tol, max_rounds, random_state, progress,
        )  # fmt: skip
        self.loss = loss

    def fit(self, X: Any, y: Any) -> "AdaptiveTangentClassifier":
        """Fit to training samples.

        Args:
            X: inputs (n, features).
            y: labels of any kind (n,), at least two.
        """
        from sklearn.utils.multiclass import check_classification_targets
        from sklearn.utils.validation import validate_data

        call = "AdaptiveTangentClassifier.fit"
        check_choice(call, "loss", self.loss, ("squared", "cross-entropy"))
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        kinds = len(self.classes_)
        if kinds < 2:
            raise TangentError(
                f"{call}: y has one class, {self.classes_.tolist()[0]!r}; give samples of at least two classes"
            )
        outputs = 1 if kinds == 2 and not self._has_two_outputs(X) else kinds
        if self.loss == "cross-entropy":
            self._fitted(X, labels.astype(np.int64), outputs, "cross-entropy")
        else:
            signs = np.where(labels[:, None] == (np.arange(kinds) if outputs > 1 else 1), 1.0, -1.0)
            choice = self._fitted(X, signs, outputs, "squared", predictions=True)
            self.temperature_ = temperature(choice, torch.from_numpy(labels.astype(np.int64)))
        return self

    def _has_two_outputs(self, X: Any) -> bool:
        if not isinstance(self.model, nn.Module):
            return False
        copied = (
            deep_copy("AdaptiveTangentClassifier.fit", self.model).to(self.device, getattr(torch, self.dtype)).eval()
        )
        with torch.no_grad():
            made = copied(self._tensor(X[:1]))
        return isinstance(made, Tensor) and made.ndim == 2 and made.shape[1] == 2

    def decision_function(self, X: Any) -> Any:
        """f(x) of samples: (n,) for two classes, positive for the second; else (n, classes).

        Args:
            X: inputs (n, features).
        """
        values = self._values(X)
        if len(self.classes_) > 2:
            return values
        return values[:, 0] if values.shape[1] == 1 else values[:, 1] - values[:, 0]

    def predict(self, X: Any) -> Any:
        """The likeliest class of samples, (n,).

        Args:
            X: inputs (n, features).
        """
        values = self.decision_function(X)
        return self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(1)]

    def predict_proba(self, X: Any) -> Any:
        """The probability of each class, (n, classes): softmax of ``decision_function`` over ``temperature_``.

        Args:
            X: inputs (n, features).
        """
        values = self.decision_function(X) / self.temperature_
        logits = np.stack([np.zeros_like(values), values], 1) if values.ndim == 1 else values
        return torch.from_numpy(logits).softmax(1).numpy()


def _network(call: str, model: Any, inputs: int, outputs: int, seed: int) -> nn.Module:
    """A copy of a module, or a new network from a factory."""
    if isinstance(model, nn.Module):
        return deep_copy(call, model)
    if model is not None and not callable(model):
        raise TangentError(
            f"{call}: model is a module, a factory of (n_inputs, n_outputs), or None; got {type(model).__name__}"
        )
    with _seeded(seed):
        made = (model or default_network)(inputs, outputs)
    if not isinstance(made, nn.Module):
        raise TangentError(f"{call}: the factory returned {type(made).__name__}; return a torch.nn.Module")
    return made


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
