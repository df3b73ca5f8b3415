"""The claims of low-rank-targets: each statement, what would refute it, and its verdict."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from adaptive_tangents.experiments.claims import Verdict, claim

WITHIN = 0.2  # relative difference that counts as the same figure
LEVELS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)  # errors at which the samples needed are counted
QUARTER = 4  # the two-sided model is claimed to need at least this many times fewer samples
PEERS = {"Network": "the trained network", "RFM": "recursive feature machines"}

Targets = Mapping[str, Mapping[str, Any]]
Claims = dict[str, dict[str, Any]]


def samples_needed(errors: Mapping[str, float], level: float) -> float | None:
    """The n at which the error first falls to a level, by log-log interpolation; None if outside the sizes.

    >>> samples_needed({"100": 0.8, "400": 0.2}, 0.4)
    200.0
    """
    for (n, e), (n_next, e_next) in pairwise((int(n), e) for n, e in errors.items()):
        if e >= level >= e_next and e > e_next:
            # rounded, so that a level reached exactly at a size gives that size
            share = math.log(e / level) / math.log(e / e_next)
            return round(float(n * (n_next / n) ** share), 9)
    return None


def claims(targets: Targets, dimensions: Targets, *, last: str) -> Claims:
    """Every claim about what was measured, in words, with its verdict and numbers.

    ``dimensions`` holds the target of two directions at each input dimension; ``last`` is the largest number of samples that
    every model is fitted to.
    """
    made: Claims = {}
    for target, found in targets.items():
        made |= _of_target(target, found)
    made |= _quarter(dimensions, last) | _dimension(dimensions)
    for peer, name in PEERS.items():
        made |= _beside(peer, name, targets)
    return made | _sides(targets)


def _of_target(target: str, found: Mapping[str, Any]) -> Claims:
    made: Claims = {}
    formula, errors = found["formula"], found["errors"]
    if {"Fixed", "TwoSided"} <= set(errors):
        pairs = {n: (errors["Fixed"][n], two) for n, two in errors["TwoSided"].items()}
        lower = [two < fixed for fixed, two in pairs.values()]
        made[f"{target}.lower"] = claim(
            f"Adapting both sides lowers the test error of {formula} at every number of samples",
            _share(lower),
            refuted_by="a number of samples at which it does not",
            evidence="; ".join(f"n = {n}: {fixed:.2f} → {two:.3f}" for n, (fixed, two) in pairs.items()),
            why="" if all(lower) else f"not at n = {_listed(n for n, (fixed, two) in pairs.items() if two >= fixed)}",
        )
    saved = {level: factor for level, factor in found["saved"].get("TwoSided", {}).items() if factor is not None}
    if saved:
        made[f"{target}.saved"] = claim(
            f"It reaches the same error of {formula} with fewer samples",
            min(saved.values()) > 1,
            refuted_by="a level of the error that takes as many",
            evidence="; ".join(f"error {level}: {factor:.1f} times fewer" for level, factor in saved.items()),
        )
    for key, pair in found["earlier"].items():
        made[f"{target}.{key}"] = claim(
            f"{formula}, {key}: the error is the {pair['earlier']:g} measured earlier, within {WITHIN:.0%}",
            abs(pair["difference"]) <= WITHIN,
            refuted_by=f"a mean error off by more than {WITHIN:.0%}",
            published=f"{pair['earlier']:g} (this project, earlier)",
            evidence=f"{pair['measured']:.3f}, {pair['difference']:+.0%}".replace("-", "−"),
        )
    return made


def reached(found: Mapping[str, Any], last: str) -> int | None:
    """The smallest number of samples at which TwoSided is as good as Fixed at ``last``; None if there is none."""
    errors = found["errors"]
    return next((int(n) for n, error in errors["TwoSided"].items() if error <= errors["Fixed"][last]), None)


def _quarter(dimensions: Targets, last: str) -> Claims:
    """The claim, at each dimension, that TwoSided matches Fixed's best error with a quarter of the samples."""
    made = {}
    for d, found in dimensions.items():
        if not {"Fixed", "TwoSided"} <= set(found["errors"]):
            continue
        least, goal = reached(found, last), found["errors"]["Fixed"][last]
        enough = int(last) // QUARTER
        made[f"quarter.{d}"] = claim(
            f"On {found['formula']} at {d} inputs TwoSided reaches the error of Fixed at n = {last} with at most "
            f"n = {enough}",
            least is not None and least <= enough,
            refuted_by=f"an error at n = {enough} above that of Fixed at n = {last}",
            evidence=f"Fixed {goal:.2f}; TwoSided reaches it "
            + ("at none of the sizes" if least is None else f"at n = {least}: {found['errors']['TwoSided'][str(least)]:.2f}"),
        )  # fmt: skip
    return made


def _dimension(dimensions: Targets) -> Claims:
    """Whether the factor grows with the input dimension, at each error that all dimensions reach."""
    factors = {d: found["saved"].get("TwoSided", {}) for d, found in dimensions.items()}
    shared = [str(level) for level in LEVELS if all(f.get(str(level)) is not None for f in factors.values())]
    if len(dimensions) < 2 or not shared:
        return {}
    of_level = {level: [f[level] for f in factors.values()] for level in shared}
    rises = {level: all(a < b for a, b in pairwise(values)) for level, values in of_level.items()}
    return {
        "dimension": claim(
            "The factor of samples saved grows with the input dimension",
            _share(list(rises.values())),
            refuted_by="an error, reached at every dimension, at which the factor does not rise from each to the next",
            evidence=f"at {', '.join(dimensions)} inputs: "
            + "; ".join(f"error {e}: {', '.join(f'{v:.1f}' for v in of_level[e])} times" for e in shared),
            why="" if all(rises.values()) else f"not at error {_listed(e for e, up in rises.items() if not up)}",
        )
    }


def _beside(peer: str, name: str, targets: Targets) -> Claims:
    """Whether the two-sided model beats a peer, at every number of samples of every target."""
    below: dict[str, list[str]] = {}
    told = []
    for target, found in targets.items():
        errors = found["errors"]
        if not {"TwoSided", peer} <= set(errors):
            continue
        below[target] = [n for n, e in errors[peer].items() if errors["TwoSided"][n] < e]
        pairs = "; ".join(f"n = {n}: {errors['TwoSided'][n]:.2f} against {e:.2f}" for n, e in errors[peer].items())
        told.append(f"{target}: {pairs}")
    if not below:
        return {}
    wins = [n in below[t] for t in below for n in targets[t]["errors"][peer]]
    lost = "; ".join(
        f"{t}: n = {_listed(n for n in targets[t]['errors'][peer] if n not in below[t])}"
        for t in below
        if len(below[t]) < len(targets[t]["errors"][peer])
    )
    return {
        f"beside.{peer}": claim(
            f"TwoSided has a lower test error than {name} on every target, at every number of samples",
            _share(wins),
            refuted_by="a target and number of samples at which it has not",
            evidence=" · ".join(told),
            why="" if all(wins) else f"not for {lost}",
        )
    }


def _sides(targets: Targets) -> Claims:
    one_sided = [
        abs(found["errors"]["Left"][n] / e - 1)
        for found in targets.values()
        if {"Left", "Right"} <= set(found["errors"])
        for n, e in found["errors"]["Right"].items()
    ]
    if not one_sided:
        return {}
    return {
        "sides": claim(
            "Left and Right have the same fit, as they induce the same penalty",
            max(one_sided) < 1e-3,
            refuted_by="errors a thousandth apart",
            evidence=f"errors differ by at most {max(one_sided):.1e} relative",
        )
    }


def _share(outcomes: list[bool]) -> Verdict:
    """Holds if all do, holds in part if some do."""
    return "holds" if all(outcomes) else "holds in part" if any(outcomes) else "does not hold"


def _listed(sizes: Any) -> str:
    return ", ".join(sizes)
