"""The claims of weight-spectra and kernel-spectra: each statement, what would refute it, and its verdict."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from adaptive_tangents.experiments.claims import Verdict, claim, spread

MEASURES = ("stable", "entropy", "participation")
# The number of leading singular values, one per class, and their share of Σσ² in a matrix of approximately low rank.
LEADING, MOST = 10, 0.9
PUBLISHED = "figure of the first versions: network and adaptive approximately of low rank, fixed not"

Layers = Mapping[str, Mapping[str, list[float]]]
Ranks = Mapping[str, Mapping[str, Layers]]


def weight_claims(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Claims about ranks, which are given by group, kind of matrix, layer and measure, one value per seed."""
    made: dict[str, dict[str, Any]] = {}
    for group, kinds in ranks.items():
        if "network" in kinds:
            made |= {f"{group}.{key}": found for key, found in _trained(group, kinds).items()}
    exact = ranks.get("exact", {})
    for model in exact:
        if model != "Fixed":
            name = model.replace("_", ", λ = ")
            made[f"exact.{model}"] = compared(
                f"Fitted exactly, the coefficients B of {name} are of lower effective rank than those of Fixed",
                exact[model], exact["Fixed"], ("TwoSided", "Fixed"), published="solutions are approximately low rank",
            )  # fmt: skip
    return made


def _trained(group: str, kinds: Mapping[str, Layers]) -> dict[str, dict[str, Any]]:
    network, fixed, adaptive, inner = (kinds[kind] for kind in ("network", "fixed", "adaptive", "inner"))
    where = f"Trained on a {group}, "
    return {
        "network": compared(
            f"{where}the network’s change is of lower effective rank than the fixed model’s coefficients",
            network, fixed, ("network", "fixed"), published=PUBLISHED,
        ),
        "adaptive": compared(
            f"{where}the adaptive model’s B is of lower effective rank than the fixed model’s coefficients",
            adaptive, fixed, ("adaptive", "fixed"), published=PUBLISHED,
        ),
        "like": _nearer(f"{where}the adaptive B is as near to low rank as the network’s change", adaptive, network, fixed),
        "inner": compared(
            f"{where}M makes it so: B is of lower effective rank than the inner θ", adaptive, inner, ("B", "θ")
        ),
        "leading": _leading(where, network, adaptive, fixed),
    }  # fmt: skip


def compared(
    text: str, low: Layers, high: Layers, names: tuple[str, str], *, published: str | None = None
) -> dict[str, Any]:
    """A claim that one model's ranks are below another's: in all layers by all measures, in most, or not."""
    return _counted(
        text, low, lambda layer, measure: _mean(low, layer, measure) < _mean(high, layer, measure),
        refuted_by="not lower in half of all layers, each by three measures (stable, entropy, participation rank)",
        evidence="entropy rank, layer by layer: "
        + "; ".join(f"{_entropies(of)} ({name})" for name, of in zip(names, (low, high), strict=True)),
        published=published,
    )  # fmt: skip


def _nearer(text: str, found: Layers, network: Layers, fixed: Layers) -> dict[str, Any]:
    def near(layer: str, measure: str) -> bool:
        mine, low, high = (np.log(_mean(of, layer, measure)) for of in (found, network, fixed))
        return bool(mine <= low or abs(mine - low) < abs(mine - high))

    return _counted(
        text, found, near,
        refuted_by="in half of the comparisons above the network’s rank and nearer, in ratio, to the fixed model’s",
        evidence=f"participation rank, layer by layer: {_entropies(found, 'participation')} (adaptive); "
        f"{_entropies(network, 'participation')} (network); {_entropies(fixed, 'participation')} (fixed)",
        published=PUBLISHED,
    )  # fmt: skip


def _counted(
    text: str, layers: Layers, holds: Callable[[str, str], bool], *, refuted_by: str, evidence: str, published: str | None
) -> dict[str, Any]:  # fmt: skip
    """The verdict of a comparison in every layer by every measure, with means over seeds."""
    failed = [(layer, measure) for layer in layers for measure in MEASURES if not holds(layer, measure)]
    total = len(layers) * len(MEASURES)
    verdict: Verdict = "holds" if not failed else "holds in part" if 2 * len(failed) < total else "does not hold"
    by = {measure: sum(of == measure for _, of in failed) for measure in MEASURES}
    why = ", ".join(f"{count} of {len(layers)} layers by the {measure} rank" for measure, count in by.items() if count)
    return claim(
        text, verdict, refuted_by=refuted_by, published=published,
        evidence=f"{total - len(failed)} of {total} comparisons; {evidence}", why=f"not in {why}" if why else "",
    )  # fmt: skip


def _leading(where: str, network: Layers, adaptive: Layers, fixed: Layers) -> dict[str, Any]:
    wide = list(network)[:-1]  # the last layer has no more rows than classes
    shares = {
        name: [float(np.mean(of[layer]["leading"])) for layer in wide]
        for name, of in (("network", network), ("adaptive", adaptive), ("fixed", fixed))
    }
    low = [min(shares[name]) >= MOST for name in ("network", "adaptive")]
    not_fixed = min(shares["fixed"]) < MOST
    right = sum((*low, not_fixed))
    verdict: Verdict = "holds" if right == 3 else "holds in part" if any(low) and not_fixed else "does not hold"
    misses = [
        *(f"the {name} is below it in a layer" for name, is_low in zip(shares, low, strict=False) if not is_low),
        *([] if not_fixed else ["the fixed model reaches it in every layer"]),
    ]
    return claim(
        f"{where}{LEADING} singular values carry {MOST:.0%} of Σσ² in every hidden layer of the network and the adaptive "
        "model, and not of the fixed model",
        verdict,
        refuted_by=f"a smaller share in a layer of both, or {MOST:.0%} in all layers of the fixed model",
        published=PUBLISHED,
        evidence="; ".join(
            f"{name} " + ", ".join(f"{share:.2f}" for share in of_layers) for name, of_layers in shares.items()
        ),
        why=", ".join(misses),
    )


def _mean(layers: Layers, layer: str, measure: str) -> float:
    return float(np.mean(layers[layer][measure]))


def _entropies(layers: Layers, measure: str = "entropy") -> str:
    return ", ".join(f"{_mean(layers, layer, measure):.1f}" for layer in layers)


# The diagonal falls away from the boundary if Spearman's correlation with the distance is at most this.
FALLS = -0.5
# Share of the network's gain at which the exact model does the same; share of steps at which a claim holds in part.
HALF = 0.5
_TARGETS = ("smooth", "sign")


def kernel_claims(seeds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Claims about the spectra of K_0, K̄, K_T and K_M; ``seeds`` holds each number's values over seeds, by its path."""
    values = {key: np.array(of_seeds) for key, of_seeds in seeds.items()}
    rows = {
        "share": ("share", "the share of the trace in the leading eigenvalue of the centered kernel", 1),
        "share_plain": ("share_plain", "the share of the trace in the leading eigenvalue, not centered,", 1),
        "rank": ("rank", "the effective (entropy) rank of the spectrum", -1),
        "leading": ("leading", "the share of the target in the centered kernel’s leading eigenvector", 1),
    }
    made = {key: _monotone(values, measure, words, sign) for key, (measure, words, sign) in rows.items()}
    gains = {t: values[f"{t}.top.average"] - values[f"{t}.top.initial"] for t in _TARGETS}
    more = gains["sign"] > gains["smooth"]
    made["hard"] = claim(
        "From K_0 to K̄ the ten leading eigenvectors gain more of the target for the sign than for the smooth target",
        _share_of(more & (gains["sign"] > 0)),
        refuted_by="seeds in which the sign gains less, or nothing",
        published="it aligns more where the initial features represent the target poorly",
        evidence="; ".join(
            f"{t}: {spread(values[f'{t}.top.initial'])} → {spread(values[f'{t}.top.average'])}" for t in _TARGETS
        ),
        why="" if more.all() else f"in {int((~more).sum())} of {len(more)} seeds the smooth target gains more",
    )
    made["adapted"] = _adapted(values)
    distance = {t: values[f"{t}.distance.average"] for t in _TARGETS}
    start = np.concatenate([values[f"{t}.distance.initial"] for t in _TARGETS])
    misses = {
        "for the sign it falls less steadily in some seed": (distance["sign"] > FALLS).any(),
        "it falls for the smooth target too": (distance["smooth"] <= FALLS).any(),
        "K_0(x, x) falls too": (start <= FALLS).any(),
    }
    made["diagonal"] = claim(
        "K̄(x, x) falls steadily with the distance from the boundary for the sign, and not for the smooth target or in K_0",
        "holds"
        if not any(misses.values())
        else "holds in part"
        if (distance["sign"] < distance["smooth"]).all() and (distance["sign"] < 0).all()
        else "does not hold",
        refuted_by=f"a rank correlation with the distance above {FALLS:g} for the sign, or below it for the others",
        evidence=f"K̄: {spread(distance['sign'])} (sign), {spread(distance['smooth'])} (smooth); K_0: {spread(start)}",
        why="; ".join(words for words, missed in misses.items() if missed),
    )
    return made


def _monotone(values: Mapping[str, np.ndarray], measure: str, words: str, sign: int) -> dict[str, Any]:
    """A claim that a measure moves one way from K_0 to K̄ and on to K_T, in every seed, for both targets."""
    steps = ("initial", "average", "final")
    moved = {t: sign * np.diff([values[f"{t}.{measure}.{kind}"] for kind in steps], axis=0) > 0 for t in _TARGETS}
    right = float(np.mean([moved[t] for t in _TARGETS]))
    missed = [
        f"{t}, {pair}: {int((~moved[t][k]).sum())} of {moved[t].shape[1]} seeds"
        for t in _TARGETS
        for k, pair in enumerate(("K_0 to K̄", "K̄ to K_T"))
        if not moved[t][k].all()
    ]
    return claim(
        f"Training {'raises' if sign > 0 else 'lowers'} {words} from K_0 to K̄, and further to K_T",
        "holds" if right == 1 else "holds in part" if right >= HALF else "does not hold",
        refuted_by="a target and seed in which one of the two steps goes the other way; outright, most of these steps",
        published="figures of the kernels and, in the first versions, of their spectra",
        evidence="; ".join(
            f"{t}: " + " → ".join(spread(values[f"{t}.{measure}.{kind}"], ".1f" if sign < 0 else ".2f") for kind in steps)
            for t in _TARGETS
        ),
        why=f"not for {'; '.join(missed)}" if missed else "",
    )  # fmt: skip


def _share_of(found: np.ndarray) -> Verdict:
    """Holds if all seeds do, holds in part if some do."""
    return "holds" if found.all() else "holds in part" if found.any() else "does not hold"


def _adapted(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Whether K_M gains what K̄ gains over K_0: in the leading eigenvalue's share, and in its vector's share of y."""
    shares, evidence = [], []
    for t in _TARGETS:
        for measure, words in (("share", "eigenvalue"), ("leading", "target in its vector")):
            start, average, exact = (
                values[f"{t}.{measure}.{kind}"].mean() for kind in ("initial", "average", "adapted")
            )
            shares.append((exact - start) / (average - start) if average > start else 0.0)
            evidence.append(f"{t}, {words}: K_0 {start:.2f}, K_M {exact:.2f}, K̄ {average:.2f}")
    good = np.array(shares) >= HALF
    return claim(
        "The exact two-sided model’s K_M shifts its leading eigenvalue and eigenvector as training does",
        _share_of(good),
        refuted_by="less than half of the gain from K_0 to K̄, means over seeds, in any of the four",
        evidence="; ".join(evidence),
        why="" if good.all() else f"at least half of the gain in {int(good.sum())} of {len(good)}",
        beside=("forecast.task",),
    )
