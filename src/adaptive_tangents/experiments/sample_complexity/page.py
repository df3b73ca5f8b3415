"""The page of sample-complexity: errors over samples by both protocols, and what the published curve measures."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from adaptive_tangents.experiments.claims import spread
from adaptive_tangents.reporting.drawing import COLORS, MUTED, grid
from adaptive_tangents.reporting.pages import Section, Shown, Story, Table, told
from adaptive_tangents.runs.results import Arrays, Results

_COLORS = {"fixed": COLORS[0], "adaptive": COLORS[1], "network": COLORS[2]}
_TITLES = {"mnist": "MNIST", "mnist5k": "MNIST, 5,000 digits", "cifar10": "CIFAR-10"}
_TEST, _VALIDATION = "test set", "validation split"
_FRESH, _SAME = "fresh subset each epoch", "fixed subset"
_TICKS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def draw_errors(results: Results, arrays: Arrays) -> Figure:
    """Test error against n, one row per data set and one column per protocol; published curves in gray."""
    names = list(results["errors"])
    figure, axes = grid(len(names), 2, 3.9 * len(names), sharex="row", sharey="row")
    for row, name in zip(axes, names, strict=True):
        for axis, protocol in zip(row, (_FRESH, _SAME), strict=True):
            _published(axis, results["published"][name])
            for kind, curve in results["errors"][name][protocol][_TEST].items():
                _curve(axis, curve, _COLORS[kind], kind)
                _curve(axis, results["errors"][name][protocol][_VALIDATION][kind], _COLORS[kind], None)
            if protocol == _SAME:
                _exact(axis, results["exact"][name])
            _log(axis, f"{_TITLES.get(name, name)}: {protocol}")
        row[0].set_ylabel("test error")
    axes[0, 0].legend(loc="lower left")
    if any(results["exact"].values()):
        axes[0, 1].legend(*_last(axes[0, 1], 2), loc="lower left")
    return figure


def _published(axis: Axes, curves: Mapping[str, Mapping[str, float]]) -> None:
    for kind, curve in curves.items():
        sizes = [int(n) for n in curve]
        axis.plot(sizes, list(curve.values()), color=MUTED, lw=1, alpha=0.7)
        axis.annotate(
            f"{kind}, published", (sizes[0], next(iter(curve.values()))), xytext=(-3, 0), textcoords="offset points",
            ha="right", va="center", fontsize=7.5, color=MUTED,
        )  # fmt: skip
        axis.set_xlim(left=sizes[0] / 8)  # leaves space for the names


def _curve(axis: Axes, curve: Mapping[str, list[float]], color: str, label: str | None) -> None:
    """Mean and range over seeds; a curve without a label is for the epoch chosen by the validation split."""
    sizes, values = [int(n) for n in curve], [np.array(of_seeds) for of_seeds in curve.values()]
    means = [v.mean() for v in values]
    if label is None:
        axis.plot(sizes, means, color=color, lw=1, ls="--", marker="o", ms=4, mfc="white")
        return
    axis.plot(sizes, means, color=color, marker="o", ms=4, label=label)
    if len(values[0]) > 1:
        axis.fill_between(sizes, [v.min() for v in values], [v.max() for v in values], color=color, alpha=0.15, lw=0)


def _exact(axis: Axes, exact: Mapping[str, Any]) -> None:
    for (loss, held), marker in zip(exact.items(), ("^", "s"), strict=False):
        sizes = [int(n) for n in held]
        for kind in ("fixed", "adaptive"):
            values = [found["adaptive"] if kind == "adaptive" else found["errors"]["fixed"] for found in held.values()]
            axis.plot(
                sizes, [float(np.mean(v)) if v else np.nan for v in values], marker, ms=6, ls="", color=_COLORS[kind],
                label=f"exact, {loss}" if kind == "fixed" else None,
            )  # fmt: skip


def _last(axis: Axes, count: int) -> tuple[list[Any], list[str]]:
    handles, labels = axis.get_legend_handles_labels()
    return handles[-count:], labels[-count:]


def _log(axis: Axes, title: str) -> None:
    axis.set(xscale="log", yscale="log", xlabel="n", title=title)
    axis.yaxis.set_major_locator(FixedLocator(_TICKS))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _error(values: list[float]) -> str:
    return spread(values, ".3f") if values else "—"


def _error_table(results: Results, name: str) -> Table:
    """Every error: one row per protocol, model and rule for choosing the epoch."""
    errors, published = results["errors"][name], results["published"][name]
    sizes = [str(n) for n in results["data"][name]["sizes"]]
    rows = []
    for protocol, of_protocol in errors.items():
        for kind in of_protocol[_TEST]:
            for selection, curves in of_protocol.items():
                rows.append((protocol, kind, selection, *(_error(curves[kind][n]) for n in sizes)))
            if protocol == _FRESH and published:
                row = (f"{published[kind][n]:.3f}" if n in published[kind] else "—" for n in sizes)
                rows.append((protocol, kind, "published", *row))
    return Table(("protocol", "model", "epoch chosen by", *(f"n = {int(n):,}" for n in sizes)), rows)


def _exact_table(results: Results, name: str) -> Table:
    rows: list[tuple[str, ...]] = []
    sizes: list[str] = []
    for loss, held in results["exact"][name].items():
        sizes = list(held)
        for n, found in held.items():
            for word, values in found["errors"].items():
                model = "fixed" if word == "fixed" else f"two-sided, {word}"
                rows.append((f"{int(n):,}", loss, model, _error(values)))
    trained = results["errors"][name][_SAME][_VALIDATION]
    rows += [(f"{int(n):,}", "trained", kind, _error(curve[n])) for n in sizes for kind, curve in trained.items()]
    note = "Trained: by gradient descent on the same subset, with the epoch chosen by the validation split."
    return Table(("n", "fit", "model", "test error"), rows, note)


def _length_table(results: Results, name: str) -> Table:
    rows: list[tuple[str, ...]] = []
    for protocol, models in results["runs"][name].items():
        for kind, of_model in models.items():
            for n, run in of_model.items():
                epochs = ", ".join(map(str, run["epochs"])) + (" (stopped by the cap)" if run["capped"] else "")
                rows.append((protocol, kind, f"{int(n):,}", epochs, ", ".join(f"{d:,}" for d in run["distinct"])))
    return Table(("protocol", "model", "n", "epochs", "different samples seen"), rows)


def _verdict(results: Results) -> str:
    """The answer in two sentences: whether the published order is reproduced, and what one fixed subset shows."""
    said = []
    for name in results["errors"]:
        title = _TITLES.get(name, name)
        order, subset = (results["claims"].get(f"{name}.{key}") for key in ("order", "subset"))
        if order is not None:
            found = "is found again" if order["holds"] else "is not found again"
            said.append(f"{title}: the published order {found} with fresh subsets ({order['evidence']}).")
        if subset is not None:
            words = {
                "holds": "adaptive features are better too",
                "holds in part": "adaptive features are better at some sizes only",
                "does not hold": "adaptive features are not better than fixed ones",
            }
            said.append(f"With one fixed subset {words[subset['verdict']]}.")
    return " ".join(said) or "Unanswered: the run did not train the models to compare."


def _measures(results: Results) -> tuple[str, ...]:
    """What the published axis counts, in words and in this run's numbers."""
    texts = [
        "The published axis reads “training samples”, but the published code counts samples per epoch. It shuffles the whole "
        "training set and takes n for each epoch, so every epoch is a fresh random subset of size n, out of all 60,000 "
        "(MNIST) or 50,000 (CIFAR-10). Training stops when the accuracy on the test set has not improved for 20 epochs, and "
        "the best accuracy on the test set is reported.",
        "So a small n means short epochs, frequent looks at the test set and an early stop, rather than few samples. Here "
        "that protocol is compared with one that keeps the same subset of n samples, and each number whose epoch was chosen "
        "by the test set is compared with one whose epoch was chosen by a validation split, from the same run.",
    ]
    for name in results["errors"]:
        counts = results["claims"].get(f"{name}.counts")
        if counts is not None:
            texts.append(f"{_TITLES.get(name, name)}, {counts['evidence']}.")
    return tuple(texts)


def _settings(results: Results) -> tuple[str, ...]:
    config = results["config"]
    texts = [
        "These settings, and the lengths of the runs below, say how comparable the errors are with the published ones. All "
        "follow the published code except for the bias (last sentence). Gray images: a dense ReLU "
        f"network of depth {config['depth']} and width {config['width']}, SGD with learning rate 0.01 and momentum "
        "0.9. Color images: four convolutions of width 16 to 128, each with average pooling, two dense layers and the "
        "readout; Adam with learning rate 0.001. Batches of 50, or 25 below n = 250; pixels/255; mean cross-entropy; "
        "weights of variance 1/fan-in, truncated at two standard deviations; biases start at zero. The adaptive model "
        "has one factor for a layer’s outputs and one for its inputs (for a convolution: channels and window). "
        "Factors start at the identity and θ at 0. In dense layers the inputs’ factor includes the bias as one more "
        "input; in the published code it does not.",
        f"A run ends {config['patience']} epochs after its best epoch on the test set or on the validation split, whichever "
        f"is later, or after {config['max_epochs']:,} epochs (published: 1,000) or {config['max_steps']:,} steps, but not "
        f"before 40 epochs. An eighth of the training images, at most {config['validation']:,}, is held out for "
        f"validation. Errors are on at most {config['test']:,} test images, drawn once for each seed.",
    ]
    texts += [f"{part['source']} {part['pool']:,} to train on." for part in results["data"].values()]
    for name, sentences in results["left_out"].items():
        if sentences:
            texts.append(f"Left out of {_TITLES.get(name, name)}: {' '.join(sentences)}")
    return tuple(texts)


def _named(results: Results, names: list[str], table: Callable[[Results, str], Table]) -> Iterator[str | Table]:
    """The table of each data set, with its name if there are several."""
    for name in names:
        if len(results["errors"]) > 1:
            yield f"{_TITLES.get(name, name)}:"
        yield table(results, name)


def _story(results: Results) -> Story:
    names = list(results["errors"])
    caption = (
        "Error on the test set over n. Filled marks: the epoch is the best on the test set, as published. Hollow, dashed: "
        "the best on a validation split. Gray: published curves, from fresh subsets, in both columns. Shaded: range over "
        "seeds. Triangles and squares: exact fits to the same subset, fixed and two-sided."
    )
    exact = [*_named(results, [name for name in names if results["exact"][name]], _exact_table)]
    sections = [
        Section("errors", "Error over samples", (
            "The curves show the test error of each model over n by both protocols: adaptive features save samples where "
            "their curve lies below that of fixed ones.",
            Shown("errors", "Test error against the number of samples, by model and protocol", caption),
            *_named(results, names, _error_table),
        )),
        Section("measures", "What the published curve measures", _measures(results)),
    ]  # fmt: skip
    if exact:
        text = (
            "The table compares trained models with exact fits to the same subset: differences come from training, not from "
            "the model. Exact fits use squared error or cross-entropy with a small ridge, and strength λ of the "
            "penalty in the two-sided model. They are certified minima of the joint problem."
        )
        sections.append(Section("exact", "Exact fits beside trained models", (text, *exact)))
    training = (*_settings(results), *_named(results, names, _length_table))
    sections.append(Section("training", "How the models were trained", training))
    return Story(
        "Do adaptive tangent features need fewer samples?",
        "Three models are trained alike: a network, its linearization at the start (fixed features), and the linear model "
        "that learns a transform of its features (adaptive). Their test errors are compared with the curves of the paper’s "
        "first versions.",
        _verdict(results),
        tuple(sections),
    )


PAGE = told({"errors": draw_errors}, lambda results: [f"sizes.{name}" for name in results["errors"]], _story)
