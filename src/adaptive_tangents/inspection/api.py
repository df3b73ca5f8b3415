"""``inspect``: what training did to a network, from Python; and the flow that the command shares."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.inspection.evaluation import in_evaluation
from adaptive_tangents.inspection.given import name_of, opened
from adaptive_tangents.inspection.kept import Kept
from adaptive_tangents.inspection.lora import advised
from adaptive_tangents.inspection.plan import Plan
from adaptive_tangents.inspection.problem import InspectConfig
from adaptive_tangents.inspection.results import Inspection, made
from adaptive_tangents.inspection.run import NAME, run
from adaptive_tangents.loading import Data, as_data, check_runs, fit_data, output_of
from adaptive_tangents.loading.checkpoint_order import doubted
from adaptive_tangents.loading.hugging_face import is_regression
from adaptive_tangents.runtime.progress import Asked, Progress, silent, told, with_bar

State = Mapping[str, Any] | nn.Module | str | os.PathLike[str]
"""Parameters and buffers of a network: a state dict, a module that holds them, or the path of a checkpoint."""


@torch.inference_mode(False)  # what is made on the way is differentiated through
@with_bar
def inspect(
    model: nn.Module | str | None,
    start: State,
    end: State | None = None,
    data: Any = None,
    *,
    held_out: Any = None,
    checkpoints: Mapping[str, State] | Sequence[State] | None = None,
    samples: int = InspectConfig.samples,
    seed: int = 0,
    output: str | Callable[[Any], Tensor] | None = None,
    outputs: str = "auto",
    text: str | None = None,
    label: str | None = None,
    base: str | os.PathLike[str] | None = None,
    merged: bool = False,
    wrt: str | Sequence[str] | None = None,
    nodes: int | None = None,
    quick: bool = False,
    progress: Asked = None,
) -> Inspection:
    """Measure what training did to a network, as ``adaptive-tangents inspect`` does, with the same numbers.

    Tangent kernels K₀ at the start, K̄ of the features averaged along the straight path, and K_T at the end are compared with
    the network's change f_T − f₀ and with the labels, as a whole and block by block.

    Args:
        model: the network, which is left as found; it is measured in evaluation mode. Or "package.module:factory",
            "path/to/file.py:factory" or "timm:NAME", as for the command. None takes the network that start and end describe,
            as folders of transformers and peft do.
        start: the parameters before training: a state dict, a module that holds them, or the path of a checkpoint, a file or
            a folder.
        end: those after training, likewise; None takes the model's present ones.
        data: samples to measure on: a pair (x, y) of inputs and labels or targets, x alone, a Dataset, a DataLoader, a list
            of texts, or the path of a file or folder. Labels are class numbers (n,) or words; targets are real, (n,) or
                (n, c).
        held_out: samples that training did not see, in any of these forms; they are told apart.
        checkpoints: states between start and end in the order of training, by title or in a list.
        samples: how many samples the kernels are of, at least 4; fewer if there are fewer.
        seed: of which samples.
        output: what is measured: "loss" (of each sample), "last-token", "module:function", or a function of what the network
            returns that gives (n, c). None is the network's output, and of a causal language model the loss.
        outputs: "auto", "main", "main:K", "margin", "all", or outputs by number or class name, separated by commas.
            "auto" measures one output as it is, and several along the direction of output space in which training moved the
            samples apart most.
        text: the column of texts of a table, two separated by a comma for pairs; None finds it by its name.
        label: the column of labels, "none" for no labels; None finds it by its name.
        base: the folder of the network that adapters were trained on; None is the one that they name.
        merged: whether adapters are merged into the weights, so that these are measured.
        wrt: patterns of parameter names; None is all that require a gradient. The others must be the same in all states.
        nodes: of the path average; None takes as many as it needs, at most 8.
        quick: few samples and nodes, to see it work.
        progress: called with a stage's name and the share of the expected time that has passed; True shows a bar.

    Returns:
        An ``Inspection``: ``findings`` in sentences, ``blocks``, ``kernels``, ``plot()``, ``save(DIR)``.

    Raises:
        TangentError: when model, states and data do not fit together, or nothing changed; TangentWarning when the network got
            worse, or names of files speak against their order.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> start = {name: value.clone() for name, value in model.state_dict().items()}
    >>> x = torch.randn(12, 3)
    >>> with torch.no_grad():
    ...     _ = model[0].weight.mul_(1.5)
    >>> found = inspect(model, start, data=x)
    >>> found.blocks["0"]["change_norm"] > 0, found.blocks["2"]["change_norm"], found.kernels["end"].shape
    (True, 0.0, (12, 12))
    """
    if data is None:
        raise TangentError(f"{NAME}: no data; give the samples to measure on, data=(x, y) or data=x")
    found = opened(model, start, end, checkpoints, base, merged)
    loaded = as_data(
        data, NAME, held_out=held_out, text=text, label=label, tokenizer=found.tokenizer,
        classes=None if found.causal else found.classes, amounts=is_regression(found.model), most=samples, seed=seed,
    )  # fmt: skip
    named = name_of(data)
    patterns = (wrt,) if isinstance(wrt, str) else tuple(wrt or ())
    config = InspectConfig(samples=samples, seed=seed, outputs=outputs, wrt=found.selected(patterns), nodes=nodes)
    for doubt in found.doubts:
        warnings.warn(f"{NAME}: {doubt}", TangentWarning, stacklevel=2)

    def measured() -> Inspection:
        fitted = fit_data(loaded, found.model)
        check_runs(found.model, fitted, Path(named))
        network, fitted = output_of(output, found.model, fitted, NAME, causal=found.causal or None)
        return inspect_states(
            network, found.states, fitted, config.quick() if quick else config, doubts=found.doubts,
            progress=told(progress) or silent, names=found.names,
            said={"command": _typed(config, quick), "model": found.source, "data_file": named},
        )  # fmt: skip

    return in_evaluation(found.model, measured)


def inspect_states(
    model: nn.Module,
    states: Mapping[str, Mapping[str, Tensor]],
    data: Data,
    config: InspectConfig,
    *,
    said: Mapping[str, str],
    doubts: Sequence[str] = (),
    progress: Progress = silent,
    show: Callable[[Plan], None] = lambda plan: None,
    kept: Kept | None = None,
    names: Mapping[str, str] | None = None,
) -> Inspection:
    """``run``, as an ``Inspection`` that says what it is of: ``said`` holds "command", "model" and "data_file".

    ``doubts`` are sentences on the order of the states, which the limits repeat; ``names`` are shown in place of long ones.
    """
    found = run(model, states, data, config, progress=progress, show=show, kept=kept, names=names or {})
    limits = [*found.results["limits"], *map(doubted, doubts)]
    advice = advised(found.results, found.arrays)
    told = None if advice is None else advice.sentence()
    return made({**found.results, **said, "limits": limits, "adapters": told}, found.arrays)


def _typed(config: InspectConfig, quick: bool) -> str:
    """The call in Python, with the options that are not the default."""
    plain = InspectConfig()
    given = {name: getattr(config, name) for name in ("samples", "seed", "outputs", "wrt", "nodes")}
    words = [f"{name}={value!r}" for name, value in given.items() if value != getattr(plain, name)]
    words += ["quick=True"] if quick else []
    return f"adaptive_tangents.inspect({', '.join(['model', 'start', 'end', 'data', *words])})"
