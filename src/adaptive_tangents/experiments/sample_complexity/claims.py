"""The claims of sample-complexity: each published statement, what would refute it, and its verdict."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptive_tangents.experiments.claims import Verdict, claim, spread
from adaptive_tangents.experiments.low_rank_targets.claims import samples_needed

FRESH, SAME = "fresh subset each epoch", "fixed subset"
PROTOCOLS = (FRESH, SAME)
# How the reported epoch is chosen, and by which curve.
TEST, VALIDATION = "test set", "validation split"
SELECTIONS = {TEST: "test", VALIDATION: "validation"}
FOCUS = 1000
WITHIN = 0.2  # relative difference that counts as the published error
FLATTERS = 0.01  # relative; a smaller difference does not count
TITLES = {"mnist": "MNIST", "mnist5k": "MNIST", "cifar10": "CIFAR-10"}
_SIZES = ("125", "250", "500", "1000", "2000", "4000", "8000", "16000", "32000", "all")
# Test errors read off the plot of arXiv:2308.15478v1, and the size that it calls "all".
_PUBLISHED: dict[str, tuple[int, dict[str, tuple[float, ...]]]] = {
    "MNIST": (
        60_000,
        {
            "fixed": (0.187, 0.175, 0.142, 0.122, 0.105, 0.094, 0.083, 0.077, 0.070, 0.066),
            "adaptive": (0.140, 0.131, 0.114, 0.099, 0.085, 0.078, 0.073, 0.070, 0.070, 0.070),
            "network": (0.067, 0.054, 0.044, 0.032, 0.025, 0.024, 0.020, 0.019, 0.017, 0.017),
        },
    ),
    "CIFAR-10": (
        50_000,
        {
            "fixed": (0.697, 0.68, 0.626, 0.595, 0.565, 0.532, 0.512, 0.484, 0.465, 0.453),
            "adaptive": (0.612, 0.578, 0.552, 0.521, 0.489, 0.467, 0.447, 0.436, 0.431, 0.430),
            "network": (0.544, 0.478, 0.388, 0.302, 0.276, 0.265, 0.265, 0.262, 0.261, 0.260),
        },
    ),
}
# Earlier errors for MNIST at n = 1000, with 14,262 training digits available; no more is known of the set-up.
EARLIER = {
    FRESH: {"fixed": 0.169, "adaptive": 0.117, "network": 0.042},
    SAME: {"fixed": 0.217, "adaptive": 0.268, "network": 0.127},
}
Errors = Mapping[str, Any]


def published(dataset: str) -> dict[str, dict[str, float]]:
    """The published test errors of a data set by model and size; "all" becomes the number of samples.

    >>> published("mnist")["network"]["1000"], published("cifar10")["fixed"]["50000"], published("openml:other")
    (0.032, 0.453, {})
    """
    if dataset not in TITLES:
        return {}
    everything, curves = _PUBLISHED[TITLES[dataset]]
    sizes = (*_SIZES[:-1], str(everything))
    return {kind: dict(zip(sizes, curve, strict=True)) for kind, curve in curves.items()}


def claims(errors: Errors, runs: Errors, exact: Errors, described: Errors) -> dict[str, dict[str, Any]]:
    """Every claim about every data set, for the models that were trained."""
    made: dict[str, dict[str, Any]] = {}
    for name in errors:
        title = TITLES.get(name, name)
        found = _order(name, errors[name]) | _levels(name, errors[name], described[name])
        found |= (
            _factor(name, errors[name])
            | _subset(errors[name], runs[name])
            | _counts(errors[name], runs[name], described[name])
        )
        found |= _selection(errors[name]) | _exact(exact[name])
        made |= {f"{name}.{key}": each | {"claim": f"{title}: {each['claim']}"} for key, each in found.items()}
    return made


def means(curve: Mapping[str, list[float]]) -> dict[str, float]:
    """The mean over seeds at each size."""
    return {n: float(np.mean(values)) for n, values in curve.items()}


def _focus(curve: Mapping[str, Any]) -> str:
    """The measured size nearest to the one that the claims are about."""
    return min(curve, key=lambda n: abs(np.log(int(n) / FOCUS)))


def _dotted(values: list[float]) -> str:
    return spread(values, ".3f")


def _order(name: str, errors: Errors) -> dict[str, dict[str, Any]]:
    curves = errors[FRESH][TEST]
    if set(curves) != {"fixed", "adaptive", "network"}:
        return {}
    n = _focus(curves["fixed"])
    figures = published(name)
    wanted = " < ".join(
        f"{figures[kind][n]:.3f}" for kind in ("network", "adaptive", "fixed") if n in figures.get(kind, {})
    )
    triples = list(zip(*(curves[kind][n] for kind in ("network", "adaptive", "fixed")), strict=True))
    return {
        "order": claim(
            f"with fresh subsets of n = {int(n):,} each epoch the network has the lowest error, then adaptive, then fixed "
            "features",
            all(a < b < c for a, b, c in triples),
            refuted_by="a seed with another order",
            published=wanted or None,
            evidence=", ".join(f"{kind} {_dotted(curves[kind][n])}" for kind in ("network", "adaptive", "fixed")),
        )
    }


def _levels(name: str, errors: Errors, described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Whether each error agrees with the published one at its size."""
    made = {}
    for kind, curve in errors[FRESH][TEST].items():
        figures = {n: e for n, e in published(name).get(kind, {}).items() if n in curve}
        if not figures:
            continue
        off = {n: float(np.mean(curve[n])) / figure - 1 for n, figure in figures.items()}
        near = [abs(difference) <= WITHIN for difference in off.values()]
        verdict: Verdict = "holds" if all(near) else "holds in part" if any(near) else "does not hold"
        everything = _PUBLISHED[TITLES[name]][0]
        few = described["pool"] < 0.9 * everything
        why = (
            f"drawn from {described['pool']:,} images instead of {everything:,}"
            if few
            else "training differs in details"
        )
        earlier = EARLIER[FRESH].get(kind) if TITLES[name] == "MNIST" and str(FOCUS) in figures else None
        made[f"level.{kind}"] = claim(
            f"with fresh subsets each epoch the error of {_words(kind)} is the published one",
            verdict,
            refuted_by=f"a size at which it is off by more than {WITHIN:.0%}",
            published="; ".join(f"n = {int(n):,}: {figure:.3f}" for n, figure in figures.items())
            + ("" if earlier is None else f" ({earlier:.3f} measured earlier for this project)"),
            evidence="; ".join(
                f"n = {int(n):,}: {_dotted(curve[n])}, {difference:+.0%}".replace("-", "−")
                for n, difference in off.items()
            ),
            why="" if verdict == "holds" else why,
        )
    return made


def _words(kind: str) -> str:
    return "the network" if kind == "network" else f"{kind} features"


def factors(curves: Mapping[str, Mapping[str, list[float]]]) -> dict[str, tuple[float, bool]]:
    """How many times more samples fixed features need for the error of adaptive ones at each size; whether that is a bound.

    If no measured size of the fixed features reaches that error, the largest gives a lower bound. If all are below it, the
    smallest gives an upper bound, which is returned as it is.

    >>> factors({"fixed": {"100": [0.4], "400": [0.2]}, "adaptive": {"100": [0.2], "400": [0.1]}})
    {'100': (4.0, False), '400': (1.0, True)}
    """
    fixed, adaptive = means(curves["fixed"]), means(curves["adaptive"])
    found = {}
    for n, error in adaptive.items():
        needed = samples_needed(fixed, error)
        if needed is not None:
            found[n] = (needed / int(n), False)
        elif error < min(fixed.values()):
            found[n] = (max(map(int, fixed)) / int(n), True)
        else:
            found[n] = (min(map(int, fixed)) / int(n), False)
    return found


def _factor(name: str, errors: Errors) -> dict[str, dict[str, Any]]:
    """The abstract of the first versions claims an order of magnitude: the claim by both protocols."""
    made = {}
    for key, protocol in (("fresh", FRESH), ("same", SAME)):
        curves = errors[protocol][TEST]
        if not {"fixed", "adaptive"} <= set(curves) or len(curves["fixed"]) < 2:
            continue
        found = factors(curves)
        known = {n: factor for n, (factor, bound) in found.items() if not bound or factor > 1}
        if not known:
            continue
        least = min(known.values())
        verdict: Verdict = "holds" if least >= 10 else "holds in part" if least > 1 else "does not hold"
        figures = published(name)
        plotted = (
            factors({kind: {n: [e] for n, e in curve.items()} for kind, curve in figures.items()}) if figures else {}
        )
        said = [f"{plotted[n][0]:.1f} times at n = {int(n):,}" for n in known if n in plotted]
        made[f"factor.{key}"] = claim(
            f"adaptive features need ten times fewer samples than fixed ones for the same error ({protocol})",
            verdict,
            refuted_by="a size at which they need more than a tenth",
            published="“an order of magnitude”" + (f"; the plot: {', '.join(said)}" if said and key == "fresh" else ""),
            evidence="; ".join(
                f"n = {int(n):,}: {'at least ' if found[n][1] else ''}{factor:.1f} times" for n, factor in known.items()
            ),
            why="" if verdict == "holds" else "fewer, but not ten times" if least > 1 else "no fewer at some size",
        )
    return made


def _subset(errors: Errors, runs: Errors) -> dict[str, dict[str, Any]]:
    curves = errors[SAME][TEST]
    if not {"fixed", "adaptive"} <= set(curves):
        return {}
    fixed, adaptive = means(curves["fixed"]), means(curves["adaptive"])
    lower = [adaptive[n] < fixed[n] for n in fixed]
    verdict: Verdict = "holds" if all(lower) else "holds in part" if any(lower) else "does not hold"
    closer = [
        np.mean(runs[SAME]["adaptive"][n]["loss"]) < np.mean(runs[SAME]["fixed"][n]["loss"])
        for n, better in zip(fixed, lower, strict=True)
        if not better
    ]
    return {
        "subset": claim(
            "with one fixed subset, too, trained adaptive features have a lower error than fixed ones",
            verdict,
            refuted_by="a size at which they have not",
            evidence="; ".join(
                f"n = {int(n):,}: {_dotted(curves['adaptive'][n])} against {_dotted(curves['fixed'][n])}" for n in fixed
            ),
            why=""
            if not closer
            else "they overfit: a lower training loss"
            if all(closer)
            else "they train more slowly",
        )
    }


def _counts(errors: Errors, runs: Errors, described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Whether the published n counts training samples."""
    kinds = list(errors[FRESH][TEST])
    n = _focus(errors[FRESH][TEST][kinds[0]])
    seen = max(max(runs[FRESH][kind][n]["distinct"]) for kind in kinds)
    pairs = "; ".join(
        f"{kind} {_dotted(errors[FRESH][TEST][kind][n])} against {_dotted(errors[SAME][TEST][kind][n])}"
        for kind in kinds
    )
    return {
        "counts": claim(
            "n of the published curves is the number of samples that were trained on",
            seen <= int(n),
            refuted_by="a run of the published protocol that sees more than n different samples",
            published="its axis: number of training samples",
            evidence=f"at n = {int(n):,} up to {seen:,} of {described['pool']:,} were seen; fresh against one subset: "
            f"{pairs}",
            why="" if seen <= int(n) else "the published code draws n of all samples anew each epoch",
        )
    }


def _selection(errors: Errors) -> dict[str, dict[str, Any]]:
    differences = [
        b - a
        for protocol in PROTOCOLS
        for kind, curve in errors[protocol][TEST].items()
        for n in curve
        for a, b in zip(curve[n], errors[protocol][VALIDATION][kind][n], strict=True)
    ]
    mean, most = float(np.mean(differences)), float(max(differences))
    return {
        "selection": claim(
            f"choosing the epoch by the test set flatters the error by less than {FLATTERS:g}",
            mean < FLATTERS,
            refuted_by=f"a mean over all runs of {FLATTERS:g} or more above, with the epoch chosen by a validation split",
            evidence=f"{mean:.4f} in the mean over {len(differences)} runs, at most {most:.3f}".replace("-", "−"),
        )
    }


def _exact(exact: Errors) -> dict[str, dict[str, Any]]:
    made = {}
    for loss, sizes in exact.items():
        held = {n: found for n, found in sizes.items() if found["adaptive"]}
        if not held:
            continue
        lower = [np.mean(found["adaptive"]) < np.mean(found["errors"]["fixed"]) for found in held.values()]
        verdict: Verdict = "holds" if all(lower) else "holds in part" if any(lower) else "does not hold"
        made[f"exact.{loss}"] = claim(
            f"fitted exactly ({loss}), adaptive features have a lower error than fixed ones on the same subset",
            verdict,
            refuted_by="a size at which they have not, the strength λ chosen by the validation split",
            evidence="; ".join(
                f"n = {int(n):,}: {_dotted(found['adaptive'])} ({', '.join(sorted(set(found['chosen'])))}) against "
                f"{_dotted(found['errors']['fixed'])}"
                for n, found in held.items()
            ),
            why="" if all(lower) else "at none of the strengths tried" if not any(lower) else "at some sizes only",
        )
    return made
