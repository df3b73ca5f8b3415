"""Classes of two inspections that are to be compared: known by their names, whatever their order in each network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_tangents.inspection.results import Inspection
from adaptive_tangents.runtime.told import few


def in_order_of(one: Inspection, two: Inspection) -> tuple[Inspection, str | None]:
    """The second with outputs, labels and predictions in the first's order of classes; and why that cannot be, if so.

    Where either has no names for its outputs, they are taken by their places.
    """
    names = [_keys(each) for each in (one, two)]
    if names[0] is None or names[1] is None or names[0] == names[1]:
        return two, None
    if len(names[0]) != len(names[1]):
        return two, None  # other numbers of outputs, which are not compared
    if sorted(names[0]) != sorted(names[1]) or len(set(names[0])) < len(names[0]):
        return two, _sentence(one, two)
    return _reordered(two, [names[1].index(name) for name in names[0]], one.results["data"]["classes"]), None


def named_labels(each: Inspection) -> NDArray[Any] | None:
    """The labels y; class numbers that have names as these, so that other numbers for the same names are the same."""
    y, names = each.arrays.get("y"), each.results["data"].get("classes")
    keys = [key_of(name) for name in names or ()]
    if y is None or len(set(keys)) < len(keys) or not _are_classes(y, len(keys)):
        return y
    found: NDArray[Any] = np.array(keys)[y]
    return found


def _are_classes(numbers: NDArray[Any], count: int) -> bool:
    return numbers.ndim == 1 and numbers.dtype.kind in "iu" and set(numbers.tolist()) <= {*range(count)}


def key_of(name: str) -> str:
    """A class's name without regard to capitals and spaces around it."""
    return str(name).strip().casefold()


def _keys(each: Inspection) -> list[str] | None:
    """What the classes of the outputs are known by; of one output, the two classes below and above zero."""
    names = each.results["data"].get("classes")
    count = each.arrays["outputs.end"].shape[1]
    if names is None or each.results["data"].get("labels") == "real targets":
        return None
    if len(names) != count and (len(names), count) != (2, 1):
        return None
    keys = [key_of(name) for name in names]
    return keys if len(set(keys)) == len(keys) else [str(name) for name in names]


def _sentence(one: Inspection, two: Inspection) -> str:
    shown = [few([str(name) for name in each.results["data"]["classes"]]) for each in (one, two)]
    return (
        f"The classes of the two have other names, or several have one ({shown[0]}; {shown[1]}), so functions, predictions "
        "and labels are not compared; give both the same names of classes, in any order."
    )


def _reordered(two: Inspection, order: Sequence[int], names: Sequence[str]) -> Inspection:
    """The same with output ``order[k]`` in place k."""
    arrays, place = dict(two.arrays), np.argsort(order)
    single = arrays["outputs.end"].shape[1] == 1
    for name in ("outputs.start", "outputs.end"):
        arrays[name] = -arrays[name] if single else arrays[name][:, list(order)]
    if single or (two.results["outputs"]["kind"] == "all" and arrays["change"].shape[1] == len(order)):
        arrays["change"] = -arrays["change"] if single else arrays["change"][:, list(order)]
    for name in ("y", "predicted", "predicted.start"):
        numbers = arrays.get(name)
        if numbers is not None and _are_classes(numbers, len(place)):
            arrays[name] = place[numbers]
    outputs: dict[str, Any] = dict(two.results["outputs"])
    weights: Mapping[str, float] | None = outputs["weights"]
    if weights and len(weights) == len(order):
        values = [*weights.values()]
        outputs["weights"] = {name: values[k] for name, k in zip(names, order, strict=True)}
    data = {**two.results["data"], "classes": list(names)}
    return replace(two, results={**two.results, "data": data, "outputs": outputs}, arrays=arrays)
