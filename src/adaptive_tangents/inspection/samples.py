"""The samples whose outputs training moved most and least, as the page shows them."""

from dataclasses import dataclass

import numpy as np

from adaptive_tangents.inspection.figures import class_name
from adaptive_tangents.inspection.sampling import order_of
from adaptive_tangents.reporting.pages import number
from adaptive_tangents.reporting.pictures import image
from adaptive_tangents.runs.results import Arrays, Results

_SHORT = 280


@dataclass(frozen=True)
class Sample:
    """A sample: its text or image (a data URI), its label, predictions or outputs, and how far it moved, as words."""

    title: str
    text: str | None
    image: str | None
    label: str
    before: str
    after: str
    right: bool | None
    moved: str
    kernel: str


def moved(results: Results, arrays: Arrays) -> tuple[list[Sample], list[Sample]]:
    """The samples that moved most and least."""
    most, least = order_of(arrays["change"])
    return [_sample(results, arrays, k) for k in most], [_sample(results, arrays, k) for k in least]


def _sample(results: Results, arrays: Arrays, k: int) -> Sample:
    data = results["data"]
    texts = dict(zip(data.get("texts_of") or [], data.get("texts") or [], strict=False))
    text = texts.get(k)
    places = {int(sample): place for place, sample in enumerate(arrays.get("images.index", ()))}
    start, end = (float(arrays[f"kernel.{stage}"][k, k]) for stage in ("initial", "final"))
    label, before, after, right = _told(results, arrays, k)
    return Sample(
        title=_title(arrays, k),
        text=None if text is None else text if len(text) <= _SHORT else text[: _SHORT - 1].rstrip() + "…",
        image=image(arrays["images"][places[k]]) if k in places else None,
        label=label, before=before, after=after, right=right,
        moved=number(float(np.linalg.norm(arrays["change"][k].astype(float)))),
        kernel=f"{number(end / start)}×" if start > 1e-6 * end else "from almost nothing",
    )  # fmt: skip


def _title(arrays: Arrays, k: int) -> str:
    """Its number in the file that it is of."""
    held = "held_out" in arrays and bool(arrays["held_out"][k])
    return f"{'held-out ' if held else ''}sample {int(arrays['sample'][k]) if 'sample' in arrays else k}"


def _told(results: Results, arrays: Arrays, k: int) -> tuple[str, str, str, bool | None]:
    """Label, prediction before and after, and whether the last is right; or target and outputs."""
    outputs = [arrays.get("outputs.start"), arrays.get("outputs.end")]
    if results["data"]["labels"] == "classes" and "predicted" in arrays:
        true, guess = int(arrays["y"][k]), int(arrays["predicted"][k])
        first = arrays.get("predicted.start")
        if first is None and outputs[0] is not None and outputs[0].shape[1] > 1:
            first = outputs[0].argmax(1)
        before = "" if first is None else class_name(results, int(first[k]))
        return class_name(results, true), before, class_name(results, guess), guess == true
    label = ""
    if "y" in arrays:
        y = arrays["y"].reshape(len(arrays["y"]), -1)
        label = class_name(results, int(y[k, 0])) if results["data"]["labels"] == "classes" else number(float(y[k, 0]))
    if any(out is None or out.shape[1] != 1 for out in outputs):
        return label, "", "", None
    before, after = (number(float(out[k, 0])) for out in outputs if out is not None)
    return label, before, after, None
