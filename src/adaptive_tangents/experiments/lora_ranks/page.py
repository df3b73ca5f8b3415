"""The page of lora-ranks: held-out losses at the same number of parameters, and where each advice puts the ranks."""

import numpy as np
from matplotlib.figure import Figure

from adaptive_tangents.experiments.claims import spread
from adaptive_tangents.experiments.lora_ranks.claims import ADVISED, agreements, differences, median_ranks, standing
from adaptive_tangents.reporting.drawing import COLORS, INK, MUTED, RULE, grid, legend_above
from adaptive_tangents.reporting.pages import Section, Shown, Story, Table, told
from adaptive_tangents.runs.results import Arrays, Results

ARMS = {"uniform": "uniform", **dict(zip(ADVISED, ("by weights", "by outputs", "by forecast"), strict=True))}
_LOOKS = dict(zip(ARMS, (MUTED, *COLORS[:3]), strict=True))


def draw_losses(results: Results, arrays: Arrays) -> Figure:
    """Held-out loss of each advice at each budget, a line a seed."""
    budgets = results["config"]["budgets"]
    figure, (row,) = grid(1, len(budgets), 3.2, sharey=True)
    for axes, budget in zip(row, budgets, strict=True):
        losses = np.stack([arrays[f"loss.{arm}.{budget}"] for arm in ARMS])
        axes.plot(losses, color=RULE, lw=1, zorder=1)
        for k, arm in enumerate(ARMS):
            axes.scatter(np.full(losses.shape[1], k), losses[k], color=_LOOKS[arm], s=18, zorder=2)
            axes.plot([k - 0.25, k + 0.25], [losses[k].mean()] * 2, color=INK, lw=2, zorder=3)
        axes.axhline(arrays["loss.full"].mean(), color=MUTED, lw=1, ls=":")
        axes.set_xticks(range(len(ARMS)), [words.replace("by ", "by\n") for words in ARMS.values()])
        axes.set_title(f"parameters of rank {budget} in every layer", loc="left")
    row[0].set_ylabel("held-out loss")
    return figure


def draw_ranks(results: Results, arrays: Arrays) -> Figure:
    """The rank of every layer at each budget, the mean over seeds of each advice."""
    budgets, layers = results["config"]["budgets"], results["seeds"][0]["layers"]
    figure, rows = grid(len(budgets), 1, 2.6 * len(budgets), sharex=True)
    for (axes,), budget in zip(rows, budgets, strict=True):
        for arm in ADVISED:
            axes.plot(
                arrays[f"ranks.{arm}.{budget}"].mean(0), color=_LOOKS[arm], lw=1.6, marker="o", ms=3, label=ARMS[arm]
            )
        axes.axhline(budget, color=MUTED, lw=1.2, ls=":", label="uniform")
        axes.set_ylabel("rank")
        axes.set_title(f"parameters of rank {budget} in every layer", loc="left")
    last = rows[-1][0]
    firsts = [k for k, name in enumerate(layers) if k == 0 or _depth(name) != _depth(layers[k - 1])]
    last.set_xticks(firsts, [f"layer {_depth(layers[k])}" for k in firsts])
    legend_above(figure, rows[0][0], columns=4)
    return figure


def _depth(name: str) -> str:
    return name.removeprefix("body.encoder.layer.").partition(".")[0]


def _arrays(results: Results) -> list[str]:
    if not results.get("seeds"):
        return []
    budgets = results["config"]["budgets"]
    ranks = [f"ranks.{arm}.{budget}" for arm in ADVISED for budget in budgets]
    return ["loss.full", *(f"loss.{arm}.{budget}" for arm in ARMS for budget in budgets), *ranks]


def verdict(results: Results) -> str:
    """Which ranks win at each budget, and by how much."""
    if not results.get("seeds"):
        return f"Unanswered: {'; '.join(results['skipped'].values())}."
    said = []
    for budget in results["config"]["budgets"]:
        gains = {arm: differences(results["seeds"], arm, budget) for arm in ADVISED}
        best = max(gains, key=lambda arm: float(gains[arm].mean()))
        gain = gains[best]
        if gain.mean() <= 0:
            said.append(f"with the parameters of rank {budget}, uniform rank has the lowest mean held-out loss")
            continue
        sure = "more than" if standing(gain) == "holds" else "within"
        said.append(
            f"with the parameters of rank {budget}, ranks {ARMS[best]} have the lowest mean held-out loss, "
            f"{spread(gain, '.3f')} below uniform rank, {sure} the scatter over seeds"
        )
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}."


def _story(results: Results) -> Story:
    config = results["config"]
    names = {
        "minilm": "MiniLM, a pretrained sentence encoder of six layers,",
        "tiny": "A tiny encoder with random weights",
    }
    lead = (
        f"{names[config['encoder']]} with a new head learns which of scipy’s packages ({', '.join(config['packages'])}) a "
        "sentence is about: the first sentences of their own documentation. It is fine-tuned whole, and by adapters of low "
        "rank (LoRA) in all of its linear layers: of one rank, or of advised ranks with as many parameters."
    )
    sections = (_losses(results), _where(results), _rules(results)) if results.get("seeds") else (_rules(results),)
    return Story("Where should adapters have their ranks?", lead, verdict(results), sections)


def _losses(results: Results) -> Section:
    seeds = results["seeds"]
    rows: list[tuple[str, ...]] = [("all parameters", "full fine-tuning", *_row([each["full"] for each in seeds]), "–")]
    for budget in results["config"]["budgets"]:
        for arm, words in ARMS.items():
            of = [each["arms"][f"{arm}.{budget}"] for each in seeds]
            gain = "–" if arm == "uniform" else spread(differences(seeds, arm, budget), ".3f")
            rows.append((f"rank {budget}, {of[0]['adapters']:,.0f}", words, *_row(of), gain))
    return Section("losses", "Held-out loss at the same number of parameters", (
        "The figure compares adapters with the same number of parameters on sentences that were not trained on.",
        Shown("losses", "Held-out loss of uniform and advised ranks at each budget, one point a seed",
              "Held-out cross-entropy; a thin line joins the results of a seed, bars are means, and the dotted line is full "
              "fine-tuning. Look for lines that fall from left to right in every seed."),
        Table(("parameters", "ranks", "held-out loss", "accuracy", "training loss", "below uniform"), rows,
              "± is the standard deviation over seeds; the last column is the difference within each seed."),
    ))  # fmt: skip


def _row(of: list[dict[str, float]]) -> tuple[str, str, str]:
    return (
        spread([each["loss"] for each in of], ".3f"),
        spread([100 * each["accuracy"] for each in of], lambda v: f"{v:.1f} %"),
        spread([each["last_loss"] for each in of], ".3f"),
    )


def _where(results: Results) -> Section:
    seeds, config = results["seeds"], results["config"]
    rows: list[tuple[str, ...]] = [(words, spread(median_ranks(seeds, arm), ".0f")) for arm, words in ADVISED.items()]
    agreed = "; ".join(
        f"{spread([v for v in agreements(seeds, budget) if v == v] or [float('nan')])} at rank {budget}"
        for budget in config["budgets"]
    ).replace("nan", "–")
    return Section("ranks", "Where each advice puts the ranks", (
        "The figure shows the ranks by layer, from the first to the last: attention’s query, key, value and output, then the "
        f"two layers of the feed-forward part. The ranks of forecast and outputs correlate over layers by {agreed}.",
        Shown("ranks", "The rank of every linear layer under each advice",
              "Ranks, means over seeds. The dotted line is uniform rank. Look for the depth at which ranks are spent, and "
              "for whether the forecast, made before training, spends them there too."),
        Table(("90 % of …", "rank in the median layer"), rows),
    ))  # fmt: skip


def _rules(results: Results) -> Section:
    config = results["config"]
    rate = f" {results['rate']:g} was the best of {', '.join(results['rates'])}" if results.get("seeds") else ""
    return Section("rules", "What was the same, and what was chosen", (
        f"Each seed draws {config['train']} sentences of each package to train on and {config['test']} to test on, a head, "
        f"and batches of {config['batch']}. Training takes {config['epochs']} epochs of Adam without dropout, with a rate "
        "that falls to 0. Adapters are those of PEFT with α = r, and the head is trained whole in all cases.",
        "One learning rate for adapters was chosen for uniform rank, on a draw that is not measured;"
        f"{rate or ' it depends on the run'}. Advised ranks use the same rate.",
        f"The forecast is one step of the fixed kernel at the start, from {config['told']} of the training sentences. The "
        "features that weigh the change by what it does to the outputs are those halfway between start and end, of the same "
        "sentences.",
    ))  # fmt: skip


PAGE = told({"losses": draw_losses, "ranks": draw_ranks}, _arrays, _story)
