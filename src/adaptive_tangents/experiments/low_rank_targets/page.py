"""The page of low-rank-targets: samples saved by adapting features, over sizes and dimensions, beside peers."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adaptive_tangents.reporting.drawing import (
    COLORS,
    DASHES,
    INK,
    MUTED,
    RULE,
    grid,
    label,
    legend_above,
    real,
    short,
)
from adaptive_tangents.reporting.pages import Section, Shown, Story, Table, given, number, told
from adaptive_tangents.runs.results import Arrays, Results

NAMES = {"Network": "network", "RFM": "feature machine"}
_LOOKS: dict[str, dict[str, Any]] = {
    "Fixed": {"color": COLORS[0], "lw": 2},
    "Right": {"color": COLORS[1], "lw": 2},
    # Left coincides with Right, so it is drawn thin and dashed over it.
    "Left": {"color": INK, "lw": 1.2, "ls": DASHES, "zorder": 3},
    "TwoSided": {"color": COLORS[2], "lw": 2.4},
    "Network": {"color": MUTED, "lw": 1.6, "ls": DASHES},
    "RFM": {"color": COLORS[3], "lw": 1.6},
}
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


def _curves(axes: Axes, names: list[str], arrays: Arrays, prefix: str) -> None:
    """Mean error and range over seeds of each model, against the number of samples."""
    sizes = arrays["sizes"]
    for name in names:
        errors = arrays[f"{prefix}{name}"]
        told = ~_missing(errors)
        axes.plot(sizes[told], errors.mean(0)[told], marker="o", ms=3, label=NAMES.get(name, name), **_LOOKS[name])
        color = _LOOKS[name]["color"]
        axes.fill_between(sizes[told], errors.min(0)[told], errors.max(0)[told], color=color, alpha=0.1, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="training samples $n$")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axes.minorticks_off()
    axes.grid(color=RULE, lw=0.5)


def _missing(errors: NDArray[Any]) -> NDArray[Any]:
    missing: NDArray[Any] = (errors != errors).any(0)
    return missing


def draw_errors(results: Results, arrays: Arrays) -> Figure:
    """Test error over samples, one panel per target and one curve per model; earlier figures are rings."""
    targets = results["targets"]
    rows = -(-len(targets) // 2)
    figure, panels = grid(rows, min(2, len(targets)), 3.7 * rows, sharey=True)
    for axes in panels.flat[len(targets) :]:
        axes.set_visible(False)
    for axes, (target, found) in zip(panels.flat, targets.items(), strict=False):
        _curves(axes, list(found["errors"]), arrays, f"{target}.")
        for name in found["errors"]:
            rings = [(int(key.rpartition(" ")[2]), p["earlier"]) for key, p in found["earlier"].items() if name in key]
            if rings:
                look = {"mfc": "none", "mec": _LOOKS[name]["color"], "mew": 1.5}
                axes.plot(*zip(*rings, strict=True), ls="", marker="o", ms=9, **look)
        axes.set_title(f"{label(target)}: {found['formula']}, λ = {short(found['strength'])}", loc="left")
    first = panels.flat[0]
    first.plot([], [], ls="", marker="o", ms=9, mfc="none", mec=MUTED, mew=1.5, label="measured earlier")
    # The range over seeds reaches lower than any mean.
    means = [error for found in targets.values() for errors in found["errors"].values() for error in errors.values()]
    first.set_ylim(min(0.003, min(means, default=1) / 2), max([3.0, *means]))
    legend_above(figure, first, columns=7)
    for row in panels:
        row[0].set_ylabel("relative test error")
    return figure


def draw_dimensions(results: Results, arrays: Arrays) -> Figure:
    """Test error for two directions at each dimension, and the factor of samples saved over dimensions."""
    dimensions = results["dimensions"]
    figure, (row,) = grid(1, len(dimensions) + 1, 3.6)
    for axes, (d, found) in zip(row, dimensions.items(), strict=False):
        prefix = "product." if int(d) == results["config"]["inputs"] else f"inputs{d}.product."
        _curves(axes, [name for name in found["errors"] if name not in ("Left", "Right")], arrays, prefix)
        axes.set_ylim(0.01, 2)
        axes.tick_params(axis="x", rotation=60)
        axes.set_title(f"{d} inputs", loc="left")
    row[0].set_ylabel("relative test error")
    legend_above(figure, row[0], columns=4)
    levels = list(next(iter(dimensions.values()))["saved"].get("TwoSided", {}))
    for k, level in enumerate(levels):
        factors = [real(found["saved"]["TwoSided"][level]) for found in dimensions.values()]
        look: dict[str, Any] = {"ls": "-"} if k < len(COLORS) else {"ls": DASHES, "mfc": "white"}
        look |= {"color": COLORS[k % len(COLORS)], "marker": "o", "ms": 4}
        row[-1].plot([int(d) for d in dimensions], factors, label=f"error {level}", **look)
    row[-1].set(xscale="log", yscale="log", xlabel="input dimension $d$", ylabel="times fewer samples than Fixed")
    row[-1].set_xticks([int(d) for d in dimensions], list(dimensions))
    row[-1].set_yticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
    row[-1].minorticks_off()
    row[-1].grid(color=RULE, lw=0.5)
    row[-1].set_title("TwoSided", loc="left")
    row[-1].set_ylim(bottom=0.8)
    row[-1].legend(loc="lower right", fontsize=7.5, ncols=2, columnspacing=1.0)
    return figure


def _arrays(results: Results) -> list[str]:
    own = [f"{t}.{name}" for t, found in results["targets"].items() for name in found["errors"]]
    others = [
        f"inputs{d}.product.{name}"
        for d, found in results["dimensions"].items()
        if int(d) != results["config"]["inputs"]
        for name in found["errors"]
    ]
    return ["sizes", *own, *others]


def _story(results: Results) -> Story:
    config = results["config"]
    return Story(
        "Does adapting features save samples?",
        f"Targets depend on a few of {config['inputs']} directions of the inputs. They are fitted with the tangent "
        f"features of the first layer of a ReLU network of {config['units']} units at initialization: unchanged "
        "(Fixed), or with the best transform of that layer’s inputs (Right), backward signals (Left), or both "
        "(TwoSided). For comparison, the network itself is trained, and recursive feature machines (Radhakrishnan and "
        "others, Science 2024) are fitted. The model is that of LeJeune and Alemohammad, An Adaptive Tangent Feature "
        "Perspective of Neural Networks, CPAL 2024, arXiv:2308.15478.",
        verdict(results),
        (
            _error_section(results),
            *([_dimension_section(results)] if len(results["dimensions"]) > 1 else []),
            _saved_section(results),
            *([_earlier_section(results)] if any(t["earlier"] for t in results["targets"].values()) else []),
            _made_section(results),
        ),
    )


def verdict(results: Results) -> str:
    """The answer, how many earlier figures are reproduced, and how the peers compare."""
    targets, claims = results["targets"], results["claims"]
    lower = [claim["verdict"] for name, claim in claims.items() if name.endswith(".lower")]
    pairs = [abs(pair["difference"]) for found in targets.values() for pair in found["earlier"].values()]
    met = sum(claim["holds"] for name, claim in claims.items() if ", n = " in name)
    if not lower:
        answer = "Unanswered: the run did not fit both the fixed and the two-sided model."
    elif all(each == "holds" for each in lower):
        answer = "Yes: adapting both sides lowers the test error of every target at every number of samples."
    else:
        answer = "Only in part: at some number of samples adapting both sides does not lower the test error."
    if "dimension" in claims:
        grows = {"holds": "grows", "holds in part": "grows at some errors only"}
        how = grows.get(claims["dimension"]["verdict"], "does not grow")
        answer += f" The factor of samples saved {how} with the dimension."
    for peer, name in (("RFM", "recursive feature machines"), ("Network", "the trained network")):
        if f"beside.{peer}" in claims:
            beats = {"holds": "everywhere", "holds in part": "in part"}
            answer += f" It beats {name} {beats.get(claims[f'beside.{peer}']['verdict'], 'nowhere')}."
    if pairs:
        answer += f" {met} of {len(pairs)} errors measured earlier are reproduced within 20 %"
        answer += f"; the largest difference is {100 * max(pairs):.0f} %." if met < len(pairs) else "."
    return answer


def _error_section(results: Results) -> Section:
    config = results["config"]
    sizes = [*config["sizes"], *config["beyond"]]
    rows = [
        (found["formula"], NAMES.get(name, name), *(_error(found, name, str(n)) for n in sizes))
        for found in results["targets"].values()
        for name in found["errors"]
    ]
    several = config["seeds"] > 1
    return Section("errors", "Test error over samples", (
        "The curves show how fast each model’s test error falls with the number of samples: the lower a curve, the "
        "fewer samples the model needs.",
        Shown("errors", "Relative test error of each model against the number of training samples, for every target",
              f"Relative test error, the mean of {config['seeds']} "
              f"seed{'s and their range (shaded)' if several else ''}; rings were measured earlier. Left and "
              "Right coincide: they induce the same penalty, so their fits are the same. Look for the fixed kernel’s "
              "slow fall (it needs of the order of d² samples for a quadratic target), and for how early the "
              "two-sided curve falls below it."),
        Table(("target", "model", *(f"n = {n}" for n in sizes)), rows,
              "± is the standard deviation over seeds. A dash means not fitted at this size." if several else ""),
        *(f"Left out: {name}; {why}." for name, why in results["skipped"].items()),
    ))  # fmt: skip


def _error(found: Mapping[str, Any], name: str, n: str) -> str:
    error, scatter = found["errors"][name].get(n), found["scatter"][name].get(n)
    return "–" if error is None else f"{error:.3f}" + ("" if scatter is None else f" ± {scatter:.3f}")


def _dimension_section(results: Results) -> Section:
    dimensions = results["dimensions"]
    names = [n for n in next(iter(dimensions.values()))["errors"] if n not in ("Left", "Right")]
    rows = [(f"{d} inputs", NAMES.get(name, name), *_samples(found["samples"][name]))
            for d, found in dimensions.items() for name in names]  # fmt: skip
    levels = list(next(iter(dimensions.values()))["samples"][names[0]])
    return Section("dimensions", "Over the input dimension", (
        "The figure shows whether adaptation saves more samples in higher dimensions: the target always depends on two "
        "directions, while the number of inputs grows and width, strength and ridge stay the same. The samples needed "
        "for an error are interpolated in log n and log error.",
        Shown("dimensions", "Test error at each input dimension, and the factor of samples saved against the dimension",
              "Errors on (u·x)(u₂·x) at each dimension; on the right, how many times fewer samples TwoSided needs than "
              "Fixed for the same error. Axes are logarithmic. Look for rising lines: the fixed kernel needs of the "
              "order of d² samples, a model that finds the two directions of the order of d."),
        Table(("inputs", "model", *(f"error {level}" for level in levels)), rows,
              "Samples needed for each error. A dash means outside the sizes tried."),
    ))  # fmt: skip


def _samples(levels: Mapping[str, float | None]) -> tuple[str, ...]:
    return tuple("–" if n is None else f"{n:.0f}" for n in levels.values())


def _saved_section(results: Results) -> Section:
    targets = results["targets"]
    levels = list(next(iter(next(iter(targets.values()))["samples"].values())))
    rows = [
        (found["formula"], NAMES.get(name, name), *("–" if f is None else f"{f:.1f}" for f in of_levels.values()))
        for found in targets.values()
        for name, of_levels in found["saved"].items()
    ]
    return Section("saved", "Samples saved", (
        "The table says how many times more samples the fixed kernel needs for the same error; a factor above 1 is a "
        "saving. Sizes are interpolated in log n and log error. A dash means that one of the two reaches the error "
        "outside the sizes tried.",
        Table(("target", "model", *(f"error {level}" for level in levels)), rows),
    ))  # fmt: skip


def _earlier_section(results: Results) -> Section:
    config = results["config"]
    rows: list[tuple[str, ...]] = [
        (found["formula"], name, given(pair["earlier"]), number(pair["measured"]),
         f"{100 * pair['difference']:+.0f} %".replace("-", "−"))
        for found in results["targets"].values() for name, pair in found["earlier"].items()
    ]  # fmt: skip
    return Section("earlier", "Comparison with earlier figures", (
        "The table compares this run with figures that the project measured before this experiment existed. Agreement "
        "is no independent confirmation: only the network’s width, the inputs, the targets and the strengths of the "
        f"earlier set-up were recorded. The rest is chosen here: readout weights ±1/√{config['units']}, no biases, "
        f"unit directions drawn independently, ridge {given(config['ridge'])}. Readout and ridge were chosen among "
        "several because they agree with these figures. With normal or uniform readout weights, two-sided errors are "
        "1.1 to 1.7 times as large (6 seeds, without a ridge). Without a ridge, the fixed kernel’s error for the "
        "square at n = 800 is 0.46 over 20 seeds, 20 % below the 0.58.",
        Table(("target", "model", "earlier", "this run", "difference"), rows),
    ))  # fmt: skip


def _made_section(results: Results) -> Section:
    config = results["config"]
    return Section("rules", "What each model was allowed", (
        "These rules say what each model could choose: the exact fits tune nothing on data, both peers do. Exact fits "
        "use float64, all n samples, and the strength and ridge above at every size, dimension and seed. Each seed "
        "draws its own network, directions and samples.",
        "The network starts from the same weights. Adam trains both layers on batches of 50 from four fifths of the "
        f"samples, for at most {config['epochs']} epochs, and fits the network’s change to the target. The last fifth "
        "chooses the learning rate (0.01 or 0.03) and when to stop (no improvement for "
        f"{config['patience']} epochs).",
        "Recursive feature machines are those of the package xrfm, with Laplace and Gaussian kernels, three bandwidths "
        f"in units of the median distance, two ridges and up to {config['repetitions']} repetitions. The last fifth "
        "chooses among them, and the chosen machine is fitted again to all n samples.",
    ))  # fmt: skip


PAGE = told({"errors": draw_errors, "dimensions": draw_dimensions}, _arrays, _story)
