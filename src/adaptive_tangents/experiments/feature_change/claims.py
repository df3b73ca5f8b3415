"""The claims of feature-change: each statement, what would refute it, and its verdict over seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adaptive_tangents.experiments.claims import Verdict, claim, spread

# An R² above the first explains most of a change; another run's R² within the second counts as the same.
MOST, NEAR = 0.5, 0.15
# This project's earlier R² of the two-sided transform of an MLP with 256 units, layer by layer.
EARLIER = {"hidden1": 0.43, "hidden2": 0.83, "readout": 0.89}

Runs = Sequence[Mapping[str, Any]]


def claims(runs: Runs) -> dict[str, dict[str, Any]]:
    """Every claim of the experiment, judged on all networks and seeds."""
    return {
        "premise": _most(runs, "average", "The change from φ₀ to φ̄ is mostly a two-sided transform of each layer"),
        "layers": _layers(runs),
        "final": _most(runs, "final", "So is the change from φ₀ to φ_T, the features at the end of training"),
        "both": _both(runs),
        "few": _few(runs),
        **_earlier(runs),
        **_predicted(runs),
        "directions": _directions(runs, "overlap", "reads in"),
        "labels": _labels(runs, "overlap", "reads in"),
        "written": _directions(runs, "written", "writes in"),
        "written_labels": _labels(runs, "written", "writes in"),
        "same": _same(runs),
    }


def _share(outcomes: Sequence[bool]) -> Verdict:
    return "holds" if all(outcomes) else "holds in part" if any(outcomes) else "does not hold"


def _each(runs: Runs, value: Callable[[Mapping[str, Any]], float]) -> dict[str, np.ndarray]:
    """One number over seeds, for every network."""
    return {kind: np.array([value(run[kind]) for run in runs]) for kind in runs[0]}


def _of_structure(runs: Runs, goal: str, structure: str) -> dict[str, np.ndarray]:
    return _each(runs, lambda numbers: numbers["explain"][goal][structure]["total"])


def _most(runs: Runs, goal: str, text: str) -> dict[str, Any]:
    two, scale = _of_structure(runs, goal, "two_sided"), _of_structure(runs, goal, "layer_scale")
    good = {kind: bool((values > MOST).all()) for kind, values in two.items()}
    return claim(
        f"{text}, in every network",
        _share(list(good.values())),
        refuted_by=f"a network with a held-out R² of {MOST:g} or less",
        published="premise of the model",
        evidence="; ".join(f"{k}: R² {spread(two[k])}, a scale per layer {spread(scale[k])}" for k in two),
        why=_not(good),
    )


def _layers(runs: Runs) -> dict[str, Any]:
    """The premise layer by layer: the number of matrices for which it holds."""
    told, good = [], {}
    for kind in runs[0]:
        means = {
            name: float(np.mean([run[kind]["explain"]["average"]["two_sided"][name] for run in runs]))
            for name in runs[0][kind]["matrices"]
        }
        count = sum(value > MOST for value in means.values())
        worst = min(means, key=means.__getitem__)
        good[kind] = count == len(means)
        told.append(f"{kind}: {count} of {len(means)}, least {means[worst]:.2f} ({worst.removesuffix('.weight')})")
    return claim(
        "It is so in every weight matrix, not only in all",
        _share(list(good.values())),
        refuted_by=f"a weight matrix with a held-out R² of {MOST:g} or less",
        evidence="; ".join(told).replace("-", "−"),
        why=_not(good),
    )


def _both(runs: Runs) -> dict[str, Any]:
    found = {key: _of_structure(runs, "average", key) for key in ("left", "right", "two_sided")}
    good = {
        kind: bool((found["two_sided"][kind] > np.maximum(found["left"][kind], found["right"][kind])).all())
        for kind in runs[0]
    }
    return claim(
        "Both sides are needed: neither alone explains as much",
        _share(list(good.values())),
        refuted_by="a network in which one side alone has as high a held-out R²",
        published="figure 1: backward signals and activations both change",
        evidence="; ".join(
            f"{k}: left {spread(found['left'][k])}, right {spread(found['right'][k])}, both "
            f"{spread(found['two_sided'][k])}"
            for k in runs[0]
        ),
        why=_not(good),
    )


def _few(runs: Runs) -> dict[str, Any]:
    """Whether M − I lies along few directions: participation ratio of its singular values against the width."""
    good, told = {}, []
    for kind in runs[0]:
        shares = [side["participation"] / side["width"] for run in runs for side in run[kind]["sides"].values()]
        good[kind] = bool(shares) and float(np.median(shares)) < 0.25
        told.append(f"{kind}: median {np.median(shares):.2f} of the width" if shares else f"{kind}: no wide side")
    return claim(
        "The measured transforms are the identity plus few directions",
        _share(list(good.values())),
        refuted_by="a network whose median participation ratio of the singular values of M − I is a quarter of the width",
        published="low rank (premise)",
        evidence="; ".join(told),
        why=_not(good),
    )


def _earlier(runs: Runs) -> dict[str, dict[str, Any]]:
    if "mlp" not in runs[0] or not set(EARLIER) <= set(runs[0]["mlp"]["blocks"]):
        return {}
    found = {name: np.array([run["mlp"]["explain"]["average"]["two_sided"][name] for run in runs]) for name in EARLIER}
    good = {
        name.removesuffix(".weight"): abs(float(values.mean()) - EARLIER[name]) <= NEAR
        for name, values in found.items()
    }
    return {
        "earlier": claim(
            "The MLP’s two-sided R² are those measured earlier, layer by layer",
            _share(list(good.values())),
            refuted_by=f"a layer whose R² is off by more than {NEAR:g}",
            published=", ".join(f"{value:g}" for value in EARLIER.values()) + " (this project, earlier)",
            evidence=", ".join(spread(values) for values in found.values()),
            why=_not(good),
        )
    }


def _predicted(runs: Runs) -> dict[str, dict[str, Any]]:
    """How much of the change the predicted transform explains: as it is, and with two fitted numbers per layer."""
    keys = ("predicted", "measured", "shuffled", "scale", "predicted_scaled", "shuffled_scaled")
    found = {key: _each(runs, lambda n, key=key: n["fresh"][key]["total"]) for key in keys}  # type: ignore[misc]
    kinds = list(runs[0])
    as_it_is = {k: bool((found["predicted"][k] > np.maximum(0, found["scale"][k])).all()) for k in kinds}
    gains = {k: found["predicted_scaled"][k] - found["scale"][k] for k in kinds}
    most = {k: bool((gains[k] > MOST * (found["measured"][k] - found["scale"][k])).all()) for k in kinds}
    return {
        "predicted": claim(
            "The transform that the exact model predicts from the labels explains the change better than the best "
            "scale per "
            "layer",
            _share(list(as_it_is.values())),
            refuted_by="a network in which the predicted transform has the lower R² on fresh images",
            evidence="; ".join(
                f"{k}: predicted {spread(found['predicted'][k])}, scale {spread(found['scale'][k])}, from shuffled "
                "labels "
                f"{spread(found['shuffled'][k])}"
                for k in kinds
            ),
            why=_not(as_it_is),
        ),
        "amplitude": claim(
            "It does once each layer’s scale and the amplitude of M − I are fitted: it gains half of what the measured "
            "transform gains over a scale",
            _share(list(most.values())),
            refuted_by="a network in which it gains less than half on fresh images",
            evidence="; ".join(
                f"{k}: scale {spread(found['scale'][k], '.3f')}, with the predicted direction "
                f"{spread(found['predicted_scaled'][k], '.3f')} (shuffled labels "
                f"{spread(found['shuffled_scaled'][k], '.3f')}), "
                f"measured {spread(found['measured'][k])}"
                for k in kinds
            ),
            why=_not(most),
        ),
    }


def _compared(runs: Runs) -> dict[str, list[Mapping[str, Any]]]:
    """The sides of each network where the measured and the predicted transform can be compared."""
    return {
        kind: [side for run in runs for side in run[kind]["sides"].values() if side["match"] and side["shuffled"]]
        for kind in runs[0]
    }


def _directions(runs: Runs, key: str, text: str) -> dict[str, Any]:
    """Whether the subspaces that the two read (``overlap``) or write (``written``) agree more than random ones."""
    compared = _compared(runs)
    beyond = {
        kind: [side["match"][key] > side["match"]["beyond"] for side in sides] for kind, sides in compared.items()
    }
    good = {kind: bool(outcomes) and all(outcomes) for kind, outcomes in beyond.items()}
    return claim(
        f"It {text} the measured directions, more than chance gives",
        _share([each for outcomes in beyond.values() for each in outcomes] or [False]),
        refuted_by="a side whose principal subspaces overlap no more than 95% of random ones",
        evidence="; ".join(
            f"{k}: {sum(beyond[k])} of {len(beyond[k])} sides, mean overlap "
            f"{_mean(s['match'][key] for s in compared[k])} "
            f"(chance {_mean(s['match']['expected'] for s in compared[k])})"
            for k in compared
        ),
        why=_not(good),
    )


def _same(runs: Runs) -> dict[str, Any]:
    """Whether the predicted directions are the measured ones: the overlap exceeds one half."""
    compared = _compared(runs)
    half = {
        kind: [min(side["match"][key] for key in ("overlap", "written")) > MOST for side in sides]
        for kind, sides in compared.items()
    }
    good = {kind: bool(outcomes) and all(outcomes) for kind, outcomes in half.items()}
    return claim(
        "The directions are the same: those in which they read overlap by more than a half, and so do those in which "
        "they write",
        _share([each for outcomes in half.values() for each in outcomes] or [False]),
        refuted_by=f"a side with a mean squared cosine of principal angles of {MOST:g} or less",
        evidence="; ".join(
            f"{k}: {sum(half[k])} of {len(half[k])} sides, cosine of M − I "
            f"{_mean(s['match']['cosine'] for s in compared[k])}, smallest angle of reading "
            f"{min((s['match']['angles'][0] for s in compared[k]), default=float('nan')):.0f}°"
            for k in compared
        ),
        why=_not(good),
    )


def _labels(runs: Runs, key: str, text: str) -> dict[str, Any]:
    """Whether the agreement comes from the task or from the data alone: a comparison with shuffled labels."""
    compared = _compared(runs)
    better = {kind: [side["match"][key] > side["shuffled"][key] for side in sides] for kind, sides in compared.items()}
    good = {kind: bool(outcomes) and all(outcomes) for kind, outcomes in better.items()}
    return claim(
        f"That it {text} them comes of the labels: the same model of shuffled labels agrees less",
        _share([each for outcomes in better.values() for each in outcomes] or [False]),
        refuted_by="a side at which the model of shuffled labels overlaps as much",
        evidence="; ".join(
            f"{k}: {sum(better[k])} of {len(better[k])} sides, mean overlap "
            f"{_mean(s['match'][key] for s in compared[k])} "
            f"against {_mean(s['shuffled'][key] for s in compared[k])}"
            for k in compared
        ),
        why=_not(good),
    )


def _mean(values: Any) -> str:
    found = list(values)
    return f"{np.mean(found):.2f}".replace("-", "−") if found else "–"


def _not(good: Mapping[str, bool]) -> str:
    """The networks that contradict the claim, in words; empty if none do."""
    against = [name for name, fine in good.items() if not fine]
    return f"not for {', '.join(against)}" if against else ""
