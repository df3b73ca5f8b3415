"""Writes docs/results.md from the results kept in docs/results/, one small file an experiment.

python docs/make_results.py           # or: make results
python docs/make_results.py RUNS      # keep the results of RUNS/NAME first, made by reproduce all --out RUNS, and of
                                      # RUNS/NAME-more, another run of the same experiment
python docs/make_results.py --check   # say whether the page is up to date, write nothing
"""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "results.md"
NOTICE = "<!-- Made by docs/make_results.py from docs/results/: run make results. -->\n\n"
INTRODUCTION = """# Results

This page lists every claim that this project makes or repeats: what would refute it, what was published, what was measured,
and the verdict of the numbers (*holds*, *holds in part*, *does not hold*). Most claims are from LeJeune & Alemohammad, *An
Adaptive Tangent Feature Perspective of Neural Networks* (CPAL 2024, arXiv:2308.15478) and its first versions. ± is the
standard deviation over seeds.
`adaptive-tangents reproduce all` makes this table, and a page with figures for every experiment, from your data.
"""


def keep(runs: Path) -> None:
    """Keep of every experiment in a folder of runs what the page needs."""
    from adaptive_tangents.experiments.registry import STUDIES
    from adaptive_tangents.runs.summary import summary

    KEPT.mkdir(exist_ok=True)
    for source in sorted(path for name in STUDIES for path in runs.glob(f"{name}*/results.json")):
        kept = summary(json.loads(source.read_text("utf-8")))
        text = json.dumps(kept | {"command": anywhere(kept["command"])}, indent=1, ensure_ascii=False, sort_keys=True)
        (KEPT / f"{source.parent.name}.json").write_text(text + "\n", "utf-8")


def anywhere(command: str) -> str:
    """The command without the folders of one machine.

    >>> anywhere("adaptive-tangents reproduce all --data mnist --data-dir /a/b --out /c --resume")
    'adaptive-tangents reproduce all --data mnist --data-dir DIR'
    """
    command = re.sub(r"--data-dir[ =]\S+", "--data-dir DIR", command)
    words = shlex.split(re.sub(r" --out[ =]\S+", "", command))
    return shlex.join(word for word in words if word != "--resume")


def page() -> str:
    """The whole page."""
    runs: dict[str, dict[str, Any]] = {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(KEPT.glob("*.json"))
    }
    claims = [claim for run in runs.values() for claim in run["claims"].values()]
    verdicts = [claim["verdict"] for claim in claims]
    text = [
        INTRODUCTION,
        f"**Of {len(claims)} claims {verdicts.count('holds')} hold, {verdicts.count('holds in part')} hold in part and "
        f"{verdicts.count('does not hold')} do not hold.**\n",
    ]
    for name, run in runs.items():
        text.append(f"## {name}\n")
        text.append("| claim | what would refute it | published | measured | verdict |\n|---|---|---|---|---|")
        for claim in run["claims"].values():
            verdict = claim["verdict"] if claim["holds"] else f"**{claim['verdict']}**"
            if claim["why"]:
                verdict += f": {claim['why']}"
            for name_of in claim.get("beside", ()):
                study, _, key = name_of.partition(".")
                other = runs.get(study, {"claims": {}})["claims"].get(key)
                if other:
                    verdict += (
                        f". Beside it, what the coefficients foretell ({study}): {other['claim']}: {other['evidence']}"
                    )
            cells = (claim["claim"], claim["refuted_by"], claim["published"] or "–", claim["evidence"], verdict)
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        text.append("")
    text.append("## How these were made\n")
    text.append("| experiment | command | minutes | device | cores | threads | torch |\n|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        text.append(
            f"| {name} | `{run['command']}` | {run['wall_seconds']['total'] / 60:.1f} | {run['device']} | {run['cores']} | "
            f"{run['threads']} | {run['versions']['torch']} |"
        )
    return NOTICE + "\n".join(text) + "\n"


def main(arguments: list[str]) -> int:
    """Keep, write or check; the exit status."""
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text("utf-8") == page():
            return 0
        print("docs/results.md is not what docs/results/ says: run make results", file=sys.stderr)
        return 1
    for runs in arguments:
        keep(Path(runs))
    PAGE.write_text(page(), "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
