"""A tracker as a callback of Hugging Face's Trainer."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.integrations.bases import base_class, check_options, joined
from adaptive_tangents.integrations.samples import columns_of, drawn_count, samples_of
from adaptive_tangents.tracking.tracker import MOST_SAMPLES, Tracker

CALL, FILE = "HuggingFaceTracker", "tangents.safetensors"


class HuggingFaceTracker:
    """A ``TrainerCallback`` that records the tangent kernel while a Hugging Face Trainer trains.

    The numbers go where the Trainer's own go, by ``Trainer.log``: to ``state.log_history`` and to TensorBoard, W&B or
    whatever it reports to. Each checkpoint keeps the records beside its weights (``tangents.safetensors``), so that a
    training that is resumed goes on with its curves.

    Args:
        x: a batch as the model takes it, or a data set from which samples are drawn and put together by the Trainer's own
            collator; None draws from the training set.
        y: labels, as ``at.Tracker`` takes them; None takes "labels" of the batch.
        prefix: of the names under which numbers are logged.
        log_groups: whether numbers of groups of blocks are logged, too.
        resume: a file that ``Tracker.save`` wrote, to go on with; None finds that of the checkpoint.
        options: of ``at.Tracker``, such as ``samples``, ``budget``, ``groups`` and ``output_fn``.

    Raises:
        TangentError: when transformers is not installed, or an option is not one of ``at.Tracker``.

    Attributes:
        tracker: the tracker of the training in progress, or of the last one; None before any.

    Use it so::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[at.integrations.HuggingFaceTracker()])
        trainer.train()
    """

    tracker: Tracker | None

    def __new__(cls, *arguments: Any, **options: Any) -> "HuggingFaceTracker":
        base = base_class(CALL, ("transformers",), "TrainerCallback", "transformers")
        made: HuggingFaceTracker = object.__new__(cls if issubclass(cls, base) else joined(cls, base))
        return made

    def __init__(
        self, x: Any = None, y: Any = None, *, prefix: str = "tangents", log_groups: bool = True,
        resume: str | Path | None = None, **options: Any,
    ) -> None:  # fmt: skip
        check_options(CALL, options)
        self._data, self._y, self._options = x, y, options
        self._prefix, self._log_groups, self._resume = prefix, log_groups, resume
        self._trainer: Any = None
        self.tracker = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin a curve, or go on with that of the checkpoint."""
        if not state.is_world_process_zero:
            return
        self._trainer = next((frame.f_locals["self"] for frame in _training(self)), None)
        if self._trainer is None:
            warnings.warn(
                f"{CALL}: the Trainer that called is not found, so its loggers get no numbers; state.log_history does",
                TangentWarning,
                stacklevel=2,
            )
        self.tracker = self._made(given["model"], given.get("train_dataloader"))
        if state.global_step > 0:
            self._go_on(self.tracker, args, state)
        if not self.tracker.records:
            self._record(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Record if it is due; the last step always."""
        if self.tracker is not None and state.is_world_process_zero:
            self._record(state, control, last=control.should_training_stop or state.global_step >= state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Record where training stopped early, unless the model is another one by now: the best."""
        if self.tracker is not None and state.is_world_process_zero and not args.load_best_model_at_end:
            self._record(state, control, last=True)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep the records in the checkpoint that was written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.tracker is not None and state.is_world_process_zero and folder.is_dir():
            self.tracker.save(folder / FILE)

    def _made(self, model: nn.Module, loader: Any) -> Tracker:
        data = loader if self._data is None else self._data
        if data is None:
            raise TangentError(f"{CALL}: the Trainer has no training set to draw samples from; give a batch x")
        x, y = samples_of(
            CALL, data, self._y, collate=getattr(loader, "collate_fn", None),
            count=drawn_count(self._options, MOST_SAMPLES), seed=self._options.get("seed", 0), columns=columns_of(model),
        )  # fmt: skip
        return Tracker(model, x, y, **self._options)

    def _go_on(self, tracker: Tracker, args: Any, state: Any) -> None:
        # The Trainer tells callbacks of no folder but its own, which may hold the checkpoint of another training.
        given = [found for frame in _training(self) if (found := frame.f_locals.get("resume_from_checkpoint"))]
        folders = [found for found in (*given, args.resume_from_checkpoint) if isinstance(found, str | Path)]
        folder = Path(next(iter(folders), Path(args.output_dir) / f"checkpoint-{state.global_step}"))
        file = folder / FILE if self._resume is None else Path(self._resume)
        if self._resume is not None or file.is_file():
            tracker.load(file)
            return
        warnings.warn(
            f"{CALL}: training goes on at step {state.global_step}, and {folder} holds no {FILE}; the curves begin here; "
            "give resume=, the file to go on with",
            TangentWarning,
            stacklevel=3,
        )

    def _record(self, state: Any, control: Any, *, last: bool = False) -> None:
        assert self.tracker is not None
        step = state.global_step
        record = self.tracker.close(step) if last else self.tracker.record(step)
        if record is not None:
            self._log(record.scalars(self._prefix, groups=self._log_groups), state, control)

    def _log(self, scalars: Mapping[str, float], state: Any, control: Any) -> None:
        if self._trainer is None:
            state.log_history.append({**scalars, "epoch": state.epoch, "step": state.global_step})
            return
        wanted = control.should_log  # logging clears it, and the Trainer would not log its loss
        self._trainer.log(dict(scalars))
        control.should_log = wanted


def _training(callback: object) -> Iterator[FrameType]:
    """The frames of the Trainer that is calling: callbacks get no reference to it, and only its ``log`` reaches loggers."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        handler = getattr(caller, "callback_handler", None) if hasattr(type(caller), "train") else None
        if any(each is callback for each in getattr(handler, "callbacks", ())):
            yield frame
        frame = frame.f_back
