"""Two inspections in the same numbers: their kernels, the functions they learned, and where in the network they changed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptive_tangents.inspection.class_order import in_order_of, key_of, named_labels
from adaptive_tangents.inspection.judged import WORDS
from adaptive_tangents.inspection.measures import defined
from adaptive_tangents.inspection.places import by_layer, by_place
from adaptive_tangents.inspection.results import STAGES, Inspection
from adaptive_tangents.measures.alignment import cka
from adaptive_tangents.runs.record import versions
from adaptive_tangents.runs.results import Results

NAME = "compare"
SIDES = ("a", "b")
_SAME_DIRECTION = 0.99

Array = NDArray[Any]


def compared(pair: Sequence[Inspection], names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The numbers of a comparison, and the arrays that its figures draw."""
    one, (two, other_classes) = pair[0], in_order_of(*pair)
    pair = (one, two)
    why_not = _other_samples(one, two)
    same = why_not is None
    places = _places(pair)
    layers = _layers(pair, places)
    results = {
        "experiment": NAME,
        "names": list(names),
        "of": [_described(each) for each in pair],
        "numbers": _numbers(pair),
        "same_samples": same,
        "outputs": _outputs(one, two),
        "kernels": _kernels(one, two) if same else None,
        "functions": _functions(one, two) if same and other_classes is None else None,
        "places": places,
        "layers": layers,
        "where": _where(layers if len(layers) > 2 else places, "layers" if len(layers) > 2 else "blocks"),
        "limits": [words for words in (why_not, other_classes or _other_labels(one, two) if same else None) if words],
        "versions": versions(),
    }
    return results, _arrays(pair, same=same)


def _described(each: Inspection) -> dict[str, Any]:
    results = each.results
    first, *_, last = (point["name"] for point in results["trajectory"])
    described = {
        "network": results["network"]["class"],
        "measured parameters": results["network"]["measured"],
        "blocks": results["network"]["blocks"],
        "from": first,
        "to": last,
        "samples": results["data"]["samples"],
        "outputs": ", ".join(results["outputs"]["names"]),
    }
    return described | {
        name: results[key] for name, key in (("data", "data_file"), ("made by", "command")) if key in results
    }


def _other_samples(one: Inspection, two: Inspection) -> str | None:
    """Why kernels and functions cannot be compared sample by sample; None if they can."""
    marks = [each.results["data"].get("fingerprint") for each in (one, two)]
    if None in marks:
        return (
            "An earlier version made one of the two and did not keep what its samples were, so kernels and functions are not "
            "compared sample by sample; inspect it again."
        )
    if marks[0] != marks[1]:
        return (
            "The two were measured on other samples, so kernels and functions are not compared sample by sample; inspect "
            "both on the same data, with the same number of samples and the same seed."
        )
    return None


def _other_labels(one: Inspection, two: Inspection) -> str | None:
    """What numbers of the labels mean where the same samples have others in the two."""
    a, b = (named_labels(each) for each in (one, two))
    if a is None or b is None or np.array_equal(a, b):
        return None
    differ = (
        f"for {int((a != b).reshape(len(a), -1).any(1).sum())} of {len(a)} samples" if a.shape == b.shape else "in kind"
    )
    return f"The labels of the two differ {differ}, so performance and alignment with the labels are of two tasks."


def _outputs(one: Inspection, two: Inspection) -> dict[str, Any]:
    """Whether both kernels are of the same outputs, and the cosine of the directions in output space if they are of one."""
    a, b = (each.results["outputs"] for each in (one, two))
    direction = None
    if a["weights"] and b["weights"] and a["weights"].keys() == b["weights"].keys():
        direction = abs(
            _cosine(*(np.array([each["weights"][name] for name in a["weights"]]) for each in (a, b))) or 0.0
        )
    # Kernels are summed over outputs, whose order does not matter.
    alike = (a["kind"], sorted(map(key_of, a["names"]))) == (b["kind"], sorted(map(key_of, b["names"])))
    return {"same": alike and (a["kind"] != "main" or (direction or 0.0) >= _SAME_DIRECTION), "direction": direction}


def _kernels(one: Inspection, two: Inspection) -> dict[str, dict[str, float | None]]:
    """CKA and cosine of the kernels of A and B at every stage, and of what they changed by."""
    found = {}
    pairs: dict[str, tuple[Array | None, Array | None]] = {
        stage: (one.kernels.get(stage), two.kernels.get(stage)) for stage in STAGES
    }
    pairs["change"] = (_moved(one), _moved(two))
    for stage, (a, b) in pairs.items():
        wide = [None if K is None else torch.from_numpy(K.astype(float)) for K in (a, b)]
        found[stage] = {
            "cka": defined(cka, *wide),
            "cosine": None if a is None or b is None else _cosine(a, b),
        }
    return found


def _moved(each: Inspection) -> Array:
    change: Array = each.kernels["end"].astype(float) - each.kernels["start"].astype(float)
    return change


def _functions(one: Inspection, two: Inspection) -> dict[str, float | None] | None:
    """How alike the changes f_T − f₀ are, and what the networks say at the end; None if their outputs differ in number."""
    (start_a, end_a), (start_b, end_b) = (
        tuple(each.arrays[f"outputs.{stage}"].astype(float) for stage in ("start", "end")) for each in (one, two)
    )
    if end_a.shape != end_b.shape:
        return None
    a, b = end_a - start_a, end_b - start_b
    size = math.sqrt((float((a**2).sum()) + float((b**2).sum())) / 2)
    predicted = [each.arrays.get("predicted") for each in (one, two)]
    return {
        "cosine": _cosine(a, b),
        "cosine_centered": _cosine(a - a.mean(0), b - b.mean(0)),
        "distance": float(np.linalg.norm(end_a - end_b)) / size if size > 0 else None,
        "start_distance": float(np.linalg.norm(start_a - start_b)) / size if size > 0 else None,
        "same_prediction": (
            float((predicted[0] == predicted[1]).mean())
            if predicted[0] is not None and predicted[1] is not None
            else None
        ),
    }


def _cosine(a: Array, b: Array) -> float | None:
    flat = [each.astype(float).ravel() for each in (a, b)]
    sizes = [float(np.linalg.norm(each)) for each in flat]
    if min(sizes) == 0 or not all(map(math.isfinite, sizes)):
        return None
    return float((flat[0] / sizes[0]) @ (flat[1] / sizes[1]))


# Where in the network


def _places(pair: Sequence[Inspection]) -> list[dict[str, Any]]:
    """One row for every place of either network: parts of the change and the trace, growth, and what one block has."""
    found = [by_place(each.results["blocks"]) for each in pair]
    order = list(dict.fromkeys(place for names in found for place in names))
    rows = []
    for place in order:
        row: dict[str, Any] = {"place": place}
        for side, each, names in zip(SIDES, pair, found, strict=True):
            row |= {f"{key}_{side}": value for key, value in _at(each, names.get(place, [])).items()}
        rows.append(row)
    return rows


def _at(each: Inspection, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of one or several blocks at a place; None if they have none in common, or there is no block."""
    blocks = [each.results["blocks"][name] for name in names]
    growth = each.results["growth"]["final"]
    start, end = (_sum([b["trace_share"][stage] for b in blocks]) for stage in ("initial", "final"))
    only = blocks[0] if len(blocks) == 1 else None
    return {
        "blocks": len(blocks),
        "change_share": _sum([b.get("change_share") for b in blocks]),
        "trace_share": end,
        "growth": None if growth is None or end is None or not start else growth * end / start,
        "alignment": None if only is None else only["alignment"]["final"],
        "change_norm": _root([b["change_norm"] for b in blocks]),
        "change_relative": None if only is None else only["change_relative"],
        "effective_rank": None if only is None else only["effective_rank"]["participation"],
    }


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known and len(known) == len(values) else None


def _root(values: Sequence[float]) -> float | None:
    return math.sqrt(math.fsum(value**2 for value in values)) if values else None


def _layers(pair: Sequence[Inspection], places: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The parts of the change by layer; None where one network does not have the layer."""
    told = [{row["name"]: row for row in each.results.get("layers", ())} for each in pair]
    if all(told):
        rows = []
        for layer in dict.fromkeys((*told[0], *told[1])):
            row: dict[str, Any] = {"layer": layer}
            for side, known in zip(SIDES, told, strict=True):
                found = known.get(layer)
                row[f"change_share_{side}"] = None if found is None else found["change_share"]
                row[f"trace_share_{side}"] = None if found is None else found["trace_share"]["final"]
            rows.append(row)
        return rows
    by_name = {row["place"]: row for row in places}
    return [
        {"layer": layer} | {f"{key}_{side}": _known([by_name[name][f"{key}_{side}"] for name in names])
                            for key in ("change_share", "trace_share") for side in SIDES}
        for layer, names in by_layer(list(by_name)).items()
    ]  # fmt: skip


def _known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _where(rows: Sequence[Mapping[str, Any]], of: str) -> dict[str, Any]:
    """The correlation of the parts of the change, over what both networks have."""
    pairs = np.array([
        (row["change_share_a"], row["change_share_b"])
        for row in rows if row["change_share_a"] is not None and row["change_share_b"] is not None
    ], float)  # fmt: skip
    none = {"of": of, "count": len(pairs), "correlation": None}
    if len(pairs) < 3 or min(np.ptp(pairs, axis=0)) == 0:
        return none
    centered = pairs - pairs.mean(0)
    return none | {"correlation": _cosine(centered[:, 0], centered[:, 1])}


# The numbers of each


def _numbers(pair: Sequence[Inspection]) -> list[dict[str, Any]]:
    """One row for every number that either has."""
    each = [_scalars(side) for side in pair]
    rows = []
    for key in dict.fromkeys((*each[0], *each[1])):
        words = next(side[key][0] for side in each if key in side)
        a, b = (side[key][1] if key in side else None for side in each)
        if a is not None or b is not None:
            rows.append({"number": key, "words": words, "a": a, "b": b})
    return rows


def _scalars(each: Inspection) -> dict[str, tuple[str, float | None]]:
    """The numbers of an inspection, each with what it is."""
    results = each.results
    start = each.kernels["start"].astype(float)
    size = float(np.linalg.norm(start))
    moved = float(np.linalg.norm(_moved(each)))
    gained = each.arrays["outputs.end"].astype(float) - each.arrays["outputs.start"].astype(float)
    found: dict[str, tuple[str, float | None]] = {
        "growth": ("trace of K_T over that of K₀", results["growth"]["final"]),
        "kernel_moved": ("‖K_T − K₀‖/n, n samples", moved / len(start)),
        "kernel_change": ("‖K_T − K₀‖/‖K₀‖", moved / size if size > 0 else None),
        "function_moved": ("‖f_T − f₀‖/√n", float(np.linalg.norm(gained) / math.sqrt(len(gained)))),
        "cka": ("CKA of K₀ and K_T", results["cka"]["final"]),
    }
    for goal, words in (("change", "the network’s change"), ("labels", "the labels")):
        sims = results["alignment_centered"].get(goal, {})
        for stage, symbol in (("initial", "K₀"), ("average", "K̄"), ("final", "K_T")):
            key = f"alignment_{goal}_{next(name for name, held in STAGES.items() if held == stage)}"
            found[key] = (f"centered sim of {symbol} with {words}", sims.get(stage))
    along = results["decomposition"]["final"]["change_along_target"]
    found["change_along_target"] = ("share of K_T − K₀ along the kernel of the network’s change", along)
    for stage, symbol in (("initial", "K₀"), ("final", "K_T")):
        found[f"rank_{stage}"] = (f"effective rank of {symbol}", results["spectrum"][stage]["participation"])
    blocks = [b for b in results["blocks"].values() if min(b["shape"]) > 1 and b["change_norm"] > 0]
    shares = [b["effective_rank"]["participation"] / min(b["shape"]) for b in blocks]
    found["weight_rank"] = (
        "effective rank of Δθ over the full rank, median over blocks", float(np.median(shares)) if shares else None
    )  # fmt: skip
    found["weight_change"] = ("‖Δθ‖", _root([b["change_norm"] for b in results["blocks"].values()]))
    found["r2_two_sided"] = (
        "R² of the feature change by two-sided transforms, held out", results["explain"]["two_sided"]["total"]
    )  # fmt: skip
    for when, words in (("start", "at the start"), ("end", "at the end")):
        for kind, value in (results["performance"][when] or {}).items():
            found[f"{kind}_{when}"] = (f"{WORDS.get(kind, kind)} {words}, on the samples measured", value)
    found |= _held_out(results)
    found["parameters"] = ("parameters measured", float(results["network"]["measured"]))
    return found


def _held_out(results: Results) -> dict[str, tuple[str, float | None]]:
    """The numbers on samples that training did not see, if there are some."""
    held = (results.get("held_out") or {}).get("held_out")
    if held is None:
        return {}
    found: dict[str, tuple[str, float | None]] = {}
    for when, words in (("end", "at the end"), ("start", "at the start")):
        for kind, value in (held["performance"][when] or {}).items():
            found[f"held_out.{kind}_{when}"] = (f"{WORDS.get(kind, kind)} {words}, on samples held out", value)
    found["held_out.growth"] = ("trace of K_T over that of K₀, on samples held out", held["growth"]["final"])
    for goal, words in (("change", "the network’s change"), ("labels", "the labels")):
        sims = held["alignment_centered"].get(goal, {})
        found[f"held_out.alignment_{goal}"] = (
            f"centered sim of K_T with {words}, on samples held out",
            sims.get("final"),
        )
    return found


def _arrays(pair: Sequence[Inspection], *, same: bool) -> dict[str, Array]:
    found: dict[str, Array] = {}
    first = _order(pair[0])
    for side, each in zip(SIDES, pair, strict=True):
        found |= {f"{side}.kernel.{stage}": K for stage, K in each.kernels.items()}
        found[f"{side}.order"] = first if same else _order(each)
        found[f"{side}.gained"] = each.arrays["outputs.end"] - each.arrays["outputs.start"]
    return found


def _order(each: Inspection) -> Array:
    """The samples by class, and within a class by how far training moved them."""
    change = each.arrays["change"][:, 0]
    y = each.arrays.get("y")
    if y is None or y.ndim != 1 or y.dtype.kind == "f":
        return np.argsort(change, kind="stable")
    means = {kind: float(change[y == kind].mean()) for kind in np.unique(y)}
    return np.lexsort((change, np.array([means[kind] for kind in y])))
