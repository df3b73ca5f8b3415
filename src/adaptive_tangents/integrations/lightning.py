"""A tracker as a callback of Lightning's Trainer."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.integrations.bases import base_class, check_options, joined
from adaptive_tangents.integrations.samples import columns_of, drawn_count, first_loader, samples_of
from adaptive_tangents.tracking.records import Record
from adaptive_tangents.tracking.tracker import MOST_SAMPLES, Tracker

CALL = "LightningTracker"


class LightningTracker:
    """A Lightning ``Callback`` that records the tangent kernel while a Lightning Trainer trains.

    The numbers go to all of the trainer's loggers: TensorBoard, CSV, W&B and others. Checkpoints keep the records, so that a
    training that is resumed goes on with its curves.

    Args:
        x: a batch as the module's ``forward`` takes it, a pair (x, y), or a data set or loader from which samples are
            drawn; None draws from the training set.
        y: labels, as ``at.Tracker`` takes them; None takes those of the pair, or "labels" of the batch.
        module: the name of the network in the module, if its own ``forward`` does not give outputs.
        prefix: of the names under which numbers are logged.
        log_groups: whether numbers of groups of blocks are logged, too.
        options: of ``at.Tracker``, such as ``samples``, ``budget``, ``groups`` and ``output_fn``.

    Raises:
        TangentError: when lightning is not installed, or an option is not one of ``at.Tracker``.

    Attributes:
        tracker: the tracker of the training in progress, or of the last one; None before any.

    Use it so::

        trainer = pl.Trainer(max_epochs=10, callbacks=[at.integrations.LightningTracker()])
        trainer.fit(module, loader)
    """

    tracker: Tracker | None

    def __new__(cls, *arguments: Any, **options: Any) -> "LightningTracker":
        base = base_class(CALL, ("lightning.pytorch", "pytorch_lightning"), "Callback", "lightning")
        made: LightningTracker = object.__new__(cls if issubclass(cls, base) else joined(cls, base))
        return made

    def __init__(
        self, x: Any = None, y: Any = None, *, module: str | None = None, prefix: str = "tangents",
        log_groups: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        check_options(CALL, options)
        self._data, self._y, self._module, self._options = x, y, module, options
        self._prefix, self._log_groups = prefix, log_groups
        self._pending: Mapping[str, Any] | None = None
        self.tracker = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Begin a curve, or go on with that of the checkpoint."""
        if not trainer.is_global_zero:
            return
        self.tracker = self._made(trainer, self._network(pl_module))
        if self._pending is not None:
            self.tracker.load_state_dict(self._pending)
            self._pending = None
        if not self.tracker.records:
            self._log(trainer, self.tracker.record(trainer.global_step))

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record if it is due, after a step of the optimizer."""
        if self.tracker is not None and trainer.global_step != self.tracker.step:
            self._log(trainer, self.tracker.record(trainer.global_step))

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Record the last step."""
        if self.tracker is not None:
            self._log(trainer, self.tracker.close(trainer.global_step))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the records."""
        if self.tracker is not None:
            return self.tracker.state_dict()
        return {} if self._pending is None else dict(self._pending)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the records of a checkpoint when training starts."""
        self._pending = state_dict

    def _network(self, pl_module: nn.Module) -> nn.Module:
        if self._module is None:
            return pl_module
        try:
            return pl_module.get_submodule(self._module)
        except AttributeError as error:
            held = ", ".join(name for name, _ in pl_module.named_children())
            raise TangentError(
                f"{CALL}: {type(pl_module).__name__} holds no module {self._module!r}; it holds {held}"
            ) from error

    def _made(self, trainer: Any, network: nn.Module) -> Tracker:
        data = first_loader(trainer.train_dataloader) if self._data is None else self._data
        if data is None:
            raise TangentError(
                f"{CALL}: the trainer has no single DataLoader to draw samples from; give a batch x and labels y"
            )
        if not hasattr(network, "forward") or _unwritten(network):
            raise TangentError(
                f"{CALL}: {type(network).__name__} has no forward that gives outputs; write one, or name the network in it, "
                "such as module='net'"
            )
        x, y = samples_of(
            CALL, data, self._y, collate=None, count=drawn_count(self._options, MOST_SAMPLES),
            seed=self._options.get("seed", 0), columns=columns_of(network),
        )  # fmt: skip
        return Tracker(network, x, y, **self._options)

    def _log(self, trainer: Any, record: Record | None) -> None:
        if record is None:
            return
        scalars = record.scalars(self._prefix, groups=self._log_groups)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=record.step)


def _unwritten(network: nn.Module) -> bool:
    """Whether a module leaves ``forward`` to a class of torch or Lightning, which only raises."""
    owner = next(kind for kind in type(network).__mro__ if "forward" in vars(kind))
    return owner is nn.Module or owner.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
