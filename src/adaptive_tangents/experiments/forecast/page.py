"""The page of forecast: kernels side by side, agreement against cost, layers, directions, ways of training."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptive_tangents.experiments.claims import spread
from adaptive_tangents.experiments.forecast.claims import (
    ADAPTIVE,
    AGREES,
    agreement,
    epochs_of,
    epochs_to_reach,
    turned,
)
from adaptive_tangents.experiments.forecast.figures import (
    draw_course,
    draw_directions,
    draw_kernels,
    draw_layers,
    draw_varied,
    main_cases,
    short_name,
)
from adaptive_tangents.experiments.forecast.run import words_of
from adaptive_tangents.reporting.pages import Section, Shown, Story, Table, counted, fixed, told
from adaptive_tangents.runs.results import Results


def _story(results: Results) -> Story:
    return Story(
        "Can the features of a trained network be foretold before it is trained?",
        "A forecast takes steps of exact adaptive fits, each from the tangent features at the point that the last one "
        "reached, with all choices made by held-out samples. It never trains. Afterwards each network is trained, and the "
        "forecast is compared with what happened: the kernel K̄ averaged over training, the final K_T, and how the weights "
        "of each layer changed.",
        verdict(results),
        (_kernel_section(results), _agreement_section(results), _layer_section(results), _varied_section(results),
         _made_section(results)),
    )  # fmt: skip


def verdict(results: Results) -> str:
    """For how many networks the forecast is close, and how close."""
    cases = main_cases(results)
    told = [
        f"{case['words']} {fixed(float(agreement(case).mean()))} (K_0 {fixed(float(agreement(case, 'nothing').mean()))})"
        for case in cases.values()
    ]
    reached = [agreement(case).mean() >= AGREES and turned(case) for case in cases.values()]
    answer = (
        "Yes" if all(reached) else f"For {sum(reached)} of {len(reached)} networks" if any(reached) else "Not closely"
    )
    return (
        f"{answer}: the CKA of the foretold kernel with the one averaged over training is, for each, {'; '.join(told)}. "
        "Where K_0 is as near, training turns the kernel little."
    )


def _kernel_section(results: Results) -> Section:
    return Section("kernels", "The kernels", (
        "The panels show the kernel before training, the foretold one, those of the trained network, and the task’s. If the "
        "forecast is right, its panel looks like K̄ rather than like K_0.",
        Shown("kernels", "Heat maps of the initial, foretold, average, final and task kernels",
              "Kernels on training samples, sorted by the teacher’s output; the tick in the middle marks its change of "
              "sign. Orange is positive, blue negative, white zero; each panel has its own scale, up to its 99th "
              "percentile. Look for the quadrants of K_y in the forecast that K_0 lacks."),
    ))  # fmt: skip


def _agreement_section(results: Results) -> Section:
    reach = "; ".join(
        f"{case['words']}: {np.mean([epochs_to_reach(case, v, k) for k, v in enumerate(agreement(case))]):.1f} of "
        f"{case['epochs']} epochs"
        for case in main_cases(results).values()
    )
    return Section("agreement", "How close, and at what cost", (
        "The figure plots the agreement of a kernel with K̄ against the cost of making it: above the gray line, a forecast "
        "says more than the training that costs as much. Gray is the network’s own way: the kernel averaged over its first "
        f"epochs, against the kernel averaged over all. It agrees as well as the forecast after these: {reach}.",
        Shown("course", "CKA with the averaged kernel against cost, for the network's own way and for every forecast",
              f"One panel a network, one mark or line a seed; the dashed line is a CKA of {AGREES:g}. The gray lines start "
              "at K_0. A gradient pass is a forward and a backward pass of one output of one sample, a forward pass alone a "
              "third; an epoch is as many passes as there are samples. The fits’ linear algebra is not in it, but in the "
              "seconds below. Look for marks above the gray lines."),
        *(_compared(case) for case in main_cases(results).values()),
        "CKA is of the kernel averaged on the straight way to the foretold parameters with K̄, and of the kernel there with "
        "K_T. Alignment with the task is centered, of the averaged and of the last kernel. The test error is the mean square "
        "of the network at the foretold parameters. The cost is in epochs’ passes and in processor seconds. ± is over seeds.",
    ))  # fmt: skip


def _compared(case: Mapping[str, Any]) -> Table:
    """Every comparison of one network, and the trained network itself."""
    true = case["trained"]
    rows = [
        (words_of(method), _spread(numbers["average"], ".3f"), _spread(numbers["final"], ".3f"), _spread(numbers["aligned"]),
         _spread(numbers["aligned_final"]), _spread(numbers["test"], ".3f"), _spread(epochs_of(case, method), ".1f"),
         _seconds(numbers))
        for method, numbers in case["methods"].items()
    ]  # fmt: skip
    trained = (
        f"trained, {case['training']}", "1", "1", _spread(true["aligned"]), _spread(true["aligned_final"]),
        _spread(true["test"], ".3f"), str(case["epochs"]), _seconds(true),
    )  # fmt: skip
    head = (
        case["words"],
        "CKA with K̄",
        "with K_T",
        "aligned with task",
        "at the end",
        "test error",
        "epochs",
        "seconds",
    )
    return Table(head, [*rows, trained])


def _spread(values: Any, form: str = ".2f") -> str:
    found = np.array([np.nan if v is None else v for v in values], dtype=float)
    return spread(found, form) if np.isfinite(found).all() else "–"


def _seconds(numbers: Mapping[str, Any]) -> str:
    return _spread(numbers.get("seconds", [None]), ".1f").partition(" ±")[0]


def _layer_section(results: Results) -> Section:
    return Section("layers", "Which layers change, and how", (
        "The figures compare each layer’s change of weights with the foretold one: how large a share of the whole it is, and "
        "in which directions it goes.",
        Shown("layers", "Share of the squared change of each layer, foretold and true",
              "Each layer’s share of the squared change of all weights, in training (bars) and foretold (marks), first seed. "
              "Look for marks in the order of the bars."),
        Shown("directions", "Overlap of foretold and true directions of change, by layer",
              f"Overlap of the {results['config']['directions']} leading singular directions of the foretold and the true "
              "change, on the layer’s output side and input side: the mean squared cosine of their principal angles, 1 for "
              "equal spans; sides with few units are left out. First seed. Look for diamonds far beyond the gray of chance "
              "and the rings of shuffled targets."),
        *(_by_layer(case) for case in main_cases(results).values()),
        "Participation rank of the change of each layer’s weights; CKA of the layer’s part of the kernel with that of K̄; "
        "overlaps as above. First seed.",
    ))  # fmt: skip


def _by_layer(case: Mapping[str, Any]) -> Table:
    columns = {
        "share, foretold": ("share", "forecast"), "true": ("share", "trained"), "rank, foretold": ("rank", "forecast"),
        "true ": ("rank", "trained"), "CKA of K_0": ("layer", "nothing"), "of the forecast": ("layer", "forecast"),
        "outputs’ overlap": ("left", "forecast"), "inputs’ overlap": ("right", "forecast"),
    }  # fmt: skip
    rows = [
        (short_name(name), *(fixed(case["by_layer"][method][key][k]) for key, method in columns.values()))
        for k, name in enumerate(case["layers"])
    ]
    return Table((case["words"], *columns), rows)


def _varied_section(results: Results) -> Section:
    rows = [
        (case["words"], case["training"], *(_spread(case["methods"][m]["average"], ".3f") for m in (
            "nothing", "fixed", ADAPTIVE, "forecast")), _spread(case["methods"]["forecast"]["order"]),
         _spread(case["methods"]["forecast"]["length"], ".1f"), _spread(case["trained"]["length"], ".1f"))
        for case in results["cases"].values()
    ]  # fmt: skip
    return Section("varied", "Other targets, trainings and widths", (
        "A forecast knows the network and the targets, but not the optimizer, its rate, or how long it runs. The figure "
        "shows how well it does for networks trained otherwise.",
        Shown("varied", "CKA with the averaged kernel for other targets, optimizers, rates and widths",
              f"One row a network, one mark a seed; the dashed line is a CKA of {AGREES:g}. Look for rows in which the "
              "diamonds fall back to the crosses."),
        Table(("network", "trained by", "CKA of K_0", "of Fixed", "of TwoSided", "of the forecast", "order of layers",
               "length, foretold", "length, true"), rows,
              "The order is the rank correlation of the layers’ shares of the squared change; lengths are of the whole "
              "change of weights."),
    ))  # fmt: skip


def _made_section(results: Results) -> Section:
    config = results["config"]
    left_out = "".join(f" The {kind} was left out: {why}." for kind, why in results["skipped"].items())
    return Section("made-of", "What was measured", (
        "These settings define the numbers above. MLPs, teachers and digits are those of kernel-alignment, with the targets "
        f"of hard-targets. The CNN and the transformer learn {config['samples']} images of {config['classes']} classes of "
        f"{config['images']}; the encoder, pretrained, tunes its last two layers on sentences of two subjects.{left_out} "
        f"Every network has {counted(config['seeds'], 'seed')}, other targets, trainings and widths "
        f"{counted(config['varied_seeds'], 'seed')}; all comparisons are made for {counted(config['controls'], 'seed')}. "
        "The forecast’s first ridge and its rule for choosing were set on seeds 0 to 4 of the MLP, so later seeds judge it "
        f"fairly; these are seeds {config['seed']} to {config['seed'] + config['seeds'] - 1}.",
    ))  # fmt: skip


def _arrays(results: Results) -> list[str]:
    kinds = ("initial", "forecast", "average", "final")
    return [
        f"{key}.{name}" for key in main_cases(results) for name in ("told", "y", *(f"kernel.{kind}" for kind in kinds))
    ]


PAGE = told(
    {
        "kernels": draw_kernels,
        "course": draw_course,
        "layers": draw_layers,
        "directions": draw_directions,
        "varied": draw_varied,
    },
    _arrays,
    _story,
)
