"""`forecast`: what training will do to a user's network."""

import warnings
from pathlib import Path

import torch

from adaptive_tangents.commands.checks import check_device, check_exists, check_folder, tell_earlier
from adaptive_tangents.commands.console import errors, one_bar, print_plan, typed
from adaptive_tangents.commands.reading import Reading, check_trained, opened, read_data
from adaptive_tangents.commands.report import PAGES, finish
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.inspection.foretold import KIND, LOSSES, NAME, run_forecast
from adaptive_tangents.inspection.lora import advised, write_advice
from adaptive_tangents.inspection.names import renamed
from adaptive_tangents.inspection.problem import InspectConfig
from adaptive_tangents.loading import as_state
from adaptive_tangents.runs.own_files import LORA_FILE
from adaptive_tangents.runs.results import write_results


def forecast(
    model: str | None,
    data: Path,
    out: Path,
    *,
    weights: Path | None,
    end: Path | None,
    base: Path | None,
    merged: bool,
    loss: str,
    steps: int | None,
    max_epochs: float | None,
    samples: int | None,
    seed: int,
    outputs: str,
    wrt: list[str] | None,
    device: str,
    quick: bool,
    reading: Reading,
) -> None:
    """Foretell, measure, write the results and print the findings."""
    check_device(NAME, device)
    if loss not in LOSSES:
        raise TangentError(f"{NAME}: --loss is one of {', '.join(LOSSES)}, got {loss!r}")
    if samples is not None and samples < 4:
        raise TangentError(f"{NAME}: --samples must be at least 4, got {samples}")
    if weights is not None and end is not None and weights.resolve() == end.resolve():
        raise TangentError(f"{NAME}: --weights and --end are the same file, {end}; give two different files")
    check_folder(NAME, out, PAGES[KIND]().figures, (LORA_FILE,))
    check_exists(NAME, data)
    tell_earlier(out)
    series = opened(NAME, model=model, start=weights, end=end, base=base, merged=merged, device=device)
    states = list(series.states.values())
    after = states.pop() if end is not None else None
    start = states[0] if states else as_state(series.model, series.model, NAME)
    for doubt in series.doubts:
        errors.print(f"warning: {doubt}", soft_wrap=True, highlight=False, markup=False)
    network, loaded = read_data(data, series, NAME, reading)
    check_trained(loaded, NAME)
    config = InspectConfig(
        samples=InspectConfig.samples if samples is None else samples,
        seed=seed,
        outputs=outputs,
        wrt=series.selected(wrt),
    )
    if quick:
        config, steps = config.quick(), 2 if steps is None else steps
        chosen = (
            torch.randperm(loaded.n, generator=torch.Generator().manual_seed(seed), device="cpu")[:64].sort().values
        )
        loaded = loaded.take(chosen)
    with one_bar(timed=True) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", TangentWarning)
        result = run_forecast(
            network, start, loaded, config, end=after, loss=loss, steps=steps, max_epochs=max_epochs, show=print_plan,
            progress=progress,
        )  # fmt: skip
    result = renamed(result, series.names)
    advice = advised(result.results, result.arrays)
    said = {"command": typed(), "model": series.source, "data_file": data.name}
    results = result.results | said | {"adapters": None if advice is None else advice.sentence()}
    write_results(results, result.arrays, out)
    write_advice(results, result.arrays, out)
    finish(out)
