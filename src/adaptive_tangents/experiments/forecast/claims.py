"""The claims of forecast: each statement, what would refute it, and its verdict from the numbers of all networks."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from adaptive_tangents.experiments.claims import Verdict, claim, spread
from adaptive_tangents.experiments.forecast.problems import EPOCHS

# Kernels agree if their CKA is at least this; layers are in the same order at this rank correlation.
AGREES, IN_ORDER = 0.94, 0.8
# The most that a forecast of an MLP may cost, in epochs, and that of a larger network, as a share of its training.
MOST_EPOCHS, MOST_SHARE = 30, 0.1
# Effective ranks within this factor count as the same.
FACTOR = 2.0
LARGE = ("cnn", "transformer")
# TwoSided alone, at the strength among which the forecast chooses.
ADAPTIVE = "two_sided_1"

Cases = Mapping[str, Mapping[str, Any]]


def claims(cases: Cases) -> dict[str, dict[str, Any]]:
    """Every claim that the networks of this run can decide."""
    main = {key: case for key, case in cases.items() if not case["varied"]}
    made = {}
    for key, case in main.items():
        made[f"agrees.{key}"] = _agrees(case)
    made["nearer"] = _beats(
        main, "nothing", "The foretold kernel is nearer to the averaged one than the initial kernel is"
    )
    if "mlp-sign" in main:
        made["above_fixed"] = _above_fixed(main["mlp-sign"], "forecast", "the forecast")
        made["adaptive"] = _above_fixed(main["mlp-sign"], ADAPTIVE, "that of TwoSided, without a choice,")
    harder = {key: cases[key] for key in cases if key in ("mlp-smooth", "mlp-sign") or cases[key]["varied"] == "target"}
    if len(harder) > 1:
        made["hard"] = _hard(harder)
    large = {key: main[key] for key in LARGE if key in main}
    for key, case in large.items():
        made[f"cheaper.{key}"] = _cheaper(case)
    made["order"] = _order(main, cases)
    made["task"] = _task(main)
    made["directions"] = _directions(main)
    made["ranks"] = _ranks(main)
    made["chosen"] = _chosen(main)
    made["labels"] = _beats(
        main, "shuffled", "A forecast from the true targets is nearer than one from shuffled targets"
    )
    if any("quadratic" in case["methods"] for case in main.values()):
        made["quadratic"] = _beats(
            main, "quadratic", "The forecast is nearer than the network’s second-order model, trained as the network is"
        )
    mlps = [case for case in main.values() if case["kind"] == "mlp"]
    if mlps:
        made["cost.mlp"] = _cost("an MLP", mlps, MOST_EPOCHS, f"{MOST_EPOCHS} epochs of its training")
    if large:
        most = [MOST_SHARE * case["epochs"] for case in large.values()]
        made["cost.large"] = _cost(
            "the CNN and the transformer", list(large.values()), most, "a tenth of their training"
        )
    for varied, what in (("training", "however the network is trained"), ("width", "at every width")):
        some = [case for case in cases.values() if case["varied"] == varied]
        if some:
            made[f"varied.{varied}"] = _varied(what, some)
    return made


def agreement(case: Mapping[str, Any], method: str = "forecast") -> np.ndarray:
    """CKA of the foretold kernel with the one averaged over training, over seeds."""
    return np.array(case["methods"][method]["average"], dtype=float)


def epochs_to_reach(case: Mapping[str, Any], level: float, nth: int) -> float:
    """Epochs after which the network's own way so far agrees as well, by linear interpolation between those kept."""
    kept = [(float(k), float(case["methods"][f"epoch{k}"]["average"][nth])) for k in EPOCHS if k < case["epochs"]]
    points = [(0.0, float(case["methods"]["nothing"]["average"][nth])), *kept, (float(case["epochs"]), 1.0)]
    for (before, low), (after, high) in pairwise(points):
        if high >= level > low:
            return before + (after - before) * (level - low) / (high - low)
    return 0.0 if points[0][1] >= level else float(case["epochs"])


def epochs_of(case: Mapping[str, Any], method: str = "forecast") -> np.ndarray:
    """A method's cost in epochs of the training, by gradient passes."""
    return np.array(case["methods"][method]["passes"], dtype=float) / float(case["n"])


def _verdict(holding: Sequence[bool]) -> Verdict:
    return "holds" if all(holding) else "holds in part" if any(holding) else "does not hold"


def turned(case: Mapping[str, Any]) -> bool:
    """Whether the foretold kernel is at most half as far from the averaged one as the initial kernel, by 1 − CKA."""
    return bool(1 - agreement(case).mean() <= (1 - agreement(case, "nothing").mean()) / 2)


def _agrees(case: Mapping[str, Any]) -> dict[str, Any]:
    found = agreement(case)
    mean = float(found.mean())
    reached = bool((found >= AGREES).any())
    verdict: Verdict = "holds" if mean >= AGREES and turned(case) else "holds in part" if reached else "does not hold"
    why = f"at least {AGREES:g} in {int((found >= AGREES).sum())} of {len(found)} seeds" if mean < AGREES else ""
    if mean >= AGREES and not turned(case):
        why = "it is near, but training turns this kernel so little that K_0 is about as near, or nearer"
    return claim(
        f"{case['words'][0].upper()}{case['words'][1:]}: the foretold kernel is the one averaged over training",
        verdict,
        refuted_by=f"a CKA of the two below {AGREES:g}, or more than half as far from 1 as that of K_0, means over seeds",
        evidence=f"{spread(found, '.3f')}; K_0 {spread(agreement(case, 'nothing'), '.3f')}, Fixed "
        f"{spread(agreement(case, 'fixed'), '.3f')}, TwoSided {spread(agreement(case, ADAPTIVE), '.3f')}; final "
        f"kernels {spread(case['methods']['forecast']['final'], '.3f')}",
        why=why,
    )


def _above_fixed(case: Mapping[str, Any], method: str, words: str) -> dict[str, Any]:
    found = agreement(case, method)
    gain = found - agreement(case, "fixed")
    return claim(
        f"For the sign {words} is nearer than that of kernel regression (Fixed)",
        _verdict([bool(v > 0) for v in gain]),
        refuted_by="a seed in which its CKA is not above",
        evidence=f"{spread(found, '.3f')} against {spread(agreement(case, 'fixed'), '.3f')}",
        why="" if (gain > 0).all() else f"above in {int((gain > 0).sum())} of {len(gain)} seeds",
    )


def _hard(cases: Cases) -> dict[str, Any]:
    gains = {key: agreement(case, ADAPTIVE) - agreement(case, "fixed") for key, case in cases.items()}
    sign, smooth = (float(gains[key].mean()) for key in ("mlp-sign", "mlp-smooth"))
    return claim(
        "Adapting helps a forecast more where the target is hard: more for the sign than for the smooth target",
        sign > smooth,
        refuted_by="a mean gain in CKA of TwoSided over Fixed that is not larger for the sign",
        evidence="; ".join(f"{cases[key]['words']}: {_signed(values)}" for key, values in gains.items()),
    )


def _signed(values: np.ndarray) -> str:
    text = spread(values, "+.3f")
    head, separator, tail = text.partition(" ± ")
    return head + separator + tail.lstrip("+")


def _cheaper(case: Mapping[str, Any]) -> dict[str, Any]:
    costs = epochs_of(case)
    needed = np.array([epochs_to_reach(case, level, k) for k, level in enumerate(agreement(case))])
    return claim(
        f"The {case['words']}’s forecast costs less than the epochs of training that agree as well",
        _verdict([bool(a < b) for a, b in zip(costs, needed, strict=True)]),
        refuted_by="a seed in which its gradient passes are those of as many epochs, or more",
        evidence=f"{spread(costs, '.1f')} epochs against {spread(needed, '.1f')} of {case['epochs']}",
    )


def _order(cases: Cases, every: Cases) -> dict[str, Any]:
    found = {key: float(np.nanmean(case["methods"]["forecast"]["order"])) for key, case in cases.items()}
    first = [float(np.nanmean(case["methods"]["epoch1"]["order"])) for case in cases.values()]
    others = [case for case in every.values() if case["varied"] == "training" and case["kind"] in LARGE]
    mean = float(np.mean(list(found.values())))
    high = [value >= IN_ORDER for value in found.values()]
    verdict: Verdict = "holds" if mean >= IN_ORDER else "holds in part" if any(high) else "does not hold"
    return claim(
        "The forecast puts the layers in the order in which training will change them",
        verdict,
        refuted_by=f"a rank correlation of the layers’ shares of the squared change below {IN_ORDER:g}, mean over networks",
        evidence="; ".join(
            f"{cases[k]['words']} ({len(cases[k]['layers'])} layers): {_two(v)}" for k, v in found.items()
        )
        + f"; mean {_two(mean)}, of the network after one epoch {_two(float(np.mean(first)))}"
        + "".join(f"; {c['words']}: {_two(float(np.nanmean(c['methods']['forecast']['order'])))}" for c in others),
    )


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _task(cases: Cases) -> dict[str, Any]:
    parts, holding = [], []
    for case in cases.values():
        start, told = (np.mean(case["methods"][m]["aligned_final"]) for m in ("nothing", "forecast"))
        true = np.mean(case["trained"]["aligned_final"])
        holding.append(bool(abs(told - true) < abs(start - true) / 2))
        parts.append(f"{case['words']}: K_0 {_two(start)}, forecast {_two(told)}, K_T {_two(true)}")
    return claim(
        "The foretold final kernel aligns with the task as the trained network’s does",
        _verdict(holding),
        refuted_by="a network of which K_0’s centered alignment is not at least twice as far away, mean over seeds",
        evidence="; ".join(parts),
    )


def _directions(cases: Cases) -> dict[str, Any]:
    parts, holding = [], []
    for case in cases.values():
        if "shuffled" not in case["methods"]:
            continue
        for side, words in (("left", "outputs"), ("right", "inputs")):
            told, fixed, other, chance = (
                float(case["methods"][m][key][0] or np.nan)
                for m, key in (("forecast", side), ("fixed", side), ("shuffled", side), ("forecast", f"chance_{side}"))
            )
            if np.isnan(told):
                continue
            holding.append(bool(told > max(other, chance)))
            parts.append(
                f"{case['words']}, {words}: {_two(told)}, Fixed {_two(fixed)}, shuffled {_two(other)}, chance {_two(chance)}"
            )
    return claim(
        "The forecast changes each layer in the directions in which training will",
        _verdict(holding),
        refuted_by="a network and a side of its layers where the leading directions overlap no more than by chance, or than "
        "those of shuffled targets do (first seed)",
        evidence="; ".join(parts),
    )


def _ranks(cases: Cases) -> dict[str, Any]:
    parts, near = [], []
    for case in cases.values():
        told, true = (np.array(case["by_layer"][m]["rank"], dtype=float) for m in ("forecast", "trained"))
        ratio = told / np.maximum(true, 1e-30)
        inside = (ratio <= FACTOR) & (ratio >= 1 / FACTOR)
        near.append(bool(inside.all()))
        parts.append(
            f"{case['words']}: {int(inside.sum())} of {len(inside)} layers, {_ranked(told)} for {_ranked(true)}"
        )
    return claim(
        "The foretold change of each layer has the effective rank of the true one",
        _verdict(near),
        refuted_by=f"a layer whose participation ranks differ by more than {FACTOR:g} times (first seed)",
        evidence="; ".join(parts),
    )


def _ranked(values: np.ndarray) -> str:
    return f"median {float(np.median(values)):.1f}"


def _beats(cases: Cases, other: str, text: str) -> dict[str, Any]:
    parts, holding = [], []
    for case in cases.values():
        if other not in case["methods"]:
            continue
        against = agreement(case, other)
        found = agreement(case)[: len(against)]
        if np.isnan(against).all():
            parts.append(f"{case['words']}: {spread(found, '.3f')}, the other diverged")
            continue
        holding.append(bool((found > against).all()))
        parts.append(f"{case['words']}: {spread(found, '.3f')} against {spread(against, '.3f')}")
    return claim(
        text,
        _verdict(holding),
        refuted_by="a network and seed in which its CKA is not above",
        evidence="; ".join(parts),
    )


def _cost(whose: str, cases: Sequence[Mapping[str, Any]], most: float | list[float], words: str) -> dict[str, Any]:
    limits = most if isinstance(most, list) else [most] * len(cases)
    costs = [epochs_of(case) for case in cases]
    return claim(
        f"A forecast of {whose} costs at most {words}",
        _verdict([bool((cost <= limit).all()) for cost, limit in zip(costs, limits, strict=True)]),
        refuted_by="a network and seed with more gradient passes",
        evidence="; ".join(
            f"{case['words']}: {spread(cost, '.1f')} of {case['epochs']} epochs"
            for case, cost in zip(cases, costs, strict=True)
        ),
    )


def _chosen(cases: Cases) -> dict[str, Any]:
    parts, holding = [], []
    for case in cases.values():
        found, fixed = agreement(case), agreement(case, "fixed")
        adapts = np.array(case["methods"]["forecast"]["adapts"])
        holding.append(bool((found >= fixed - 1e-6).all()))
        parts.append(
            f"{case['words']}: {int(adapts.sum())} of {len(adapts)} seeds adapt, {spread(found, '.3f')} against "
            f"{spread(fixed, '.3f')}"
        )
    return claim(
        "Held-out samples choose between Fixed and TwoSided so that the forecast is no farther than that of Fixed",
        _verdict(holding),
        refuted_by="a network and seed in which Fixed is nearer",
        evidence="; ".join(parts),
    )


def _varied(what: str, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    low = [case["words"] for case in cases if float(agreement(case).mean()) < AGREES]
    return claim(
        f"The forecast is as good {what}",
        _verdict([case["words"] not in low for case in cases]),
        refuted_by=f"one with a CKA below {AGREES:g}, mean over seeds",
        evidence="; ".join(
            f"{case['words']}: {spread(agreement(case), '.3f')} (K_0 {spread(agreement(case, 'nothing'), '.3f')}, Fixed "
            f"{spread(agreement(case, 'fixed'), '.3f')}, TwoSided {spread(agreement(case, ADAPTIVE), '.3f')})"
            for case in cases
        ),
        why=f"not for {'; '.join(low)}" if low else "",
    )
