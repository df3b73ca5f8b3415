"""Samples and labels in the form that a network takes."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, mapped, take, tensors
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.draws import sampled, shuffled
from adaptive_tangents.loading.words import INSPECT, continuous

# Inputs that tokenizers add, and that a network without an argument for them has no use of.
_SPARE = ("token_type_ids",)


@dataclass(frozen=True, eq=False)
class Data:
    """A batch x of n samples, their labels or targets y (n,) or (n, k), and the class names, each if given.

    ``texts`` are what x was made from, ``held_out`` (n,) marks samples that training did not see, and ``notes`` are sentences
    on how the source was read. With ``loss``, the network's output is the loss of each sample.

    ``rows`` (n,) are the samples' numbers in their source, and ``sizes`` how many it has, then those of the second one, whose
    samples are held out; None are all samples in order. With ``leading``, they are the first that a DataLoader gave.
    ``whole_numbers`` says that y holds more than two whole numbers of a table: amounts, if the network has one output.
    """

    x: Batch
    y: Tensor | None = None
    classes: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None
    held_out: Tensor | None = None
    notes: tuple[str, ...] = ()
    loss: bool = False
    rows: Tensor | None = None
    sizes: tuple[int, ...] | None = None
    leading: bool = False
    whole_numbers: bool = False

    @property
    def n(self) -> int:
        """Number of samples."""
        return tensors(self.x)[0].shape[0]

    @property
    def size(self) -> int:
        """Number of samples that there are, read or not."""
        return self.n if self.sizes is None else sum(self.sizes)

    @property
    def numbers(self) -> Int[Tensor, " n"]:
        """Every sample's number in the source that it is of."""
        return torch.arange(self.n, device="cpu") if self.rows is None else self.rows

    def told(self, k: int) -> str:
        """A sample in words."""
        held = self.held_out is not None and bool(self.held_out[k])
        return f"{'held-out ' if held else ''}sample {int(self.numbers[k])}"

    def drawn(self, count: int, seed: int) -> Int[Tensor, " count"]:
        """Places of ``count`` samples, the same samples whether all were read or only more than these."""
        places, share = self.numbers, None
        if self.held_out is not None and self.sizes is not None and len(self.sizes) > 1:
            places = places + self.sizes[0] * self.held_out.to(places)
            share = sum(self.sizes[1:]) / self.size
        rank = torch.empty(self.size, dtype=torch.int64, device="cpu")
        rank[shuffled(self.size, seed)] = torch.arange(self.size, device="cpu")
        return sampled(count, self.held_out, rank[places].argsort(stable=True), share)

    @property
    def labels(self) -> Tensor | None:
        """``y`` if it holds class numbers (n,), else None."""
        return self.y if self.y is not None and self.y.ndim == 1 and not self.y.is_floating_point() else None

    def take(self, index: Tensor) -> "Data":
        """Some of the samples."""
        places = torch.arange(self.n, device="cpu")[index.cpu()].tolist()
        return replace(
            self,
            x=take(self.x, index),
            y=None if self.y is None else self.y[index],
            texts=None if self.texts is None else tuple(self.texts[k] for k in places),
            held_out=None if self.held_out is None else self.held_out[index.to(self.held_out.device)],
            rows=self.numbers[index.cpu()],
            sizes=(self.n,) if self.sizes is None else self.sizes,
        )


def fit_data(data: Data, model: nn.Module, call: str = INSPECT) -> Data:
    """The data in the model's precision and on its device: floats are converted, integers become indices.

    Real targets y are in float64, whatever the network's precision.

    Raises TangentError if x holds integers but the network has no embedding, so that they are probably pixels.
    """
    parameters = [p for p in model.parameters() if continuous(p)]
    if not parameters:
        raise TangentError(f"{call}: the model has no parameters; give the factory of a network")
    dtype, device = parameters[0].dtype.to_real(), parameters[0].device
    embeds = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
    if not embeds and not any(continuous(t) for t in tensors(data.x)):
        first = tensors(data.x)[0]
        raise TangentError(
            f"{call}: x holds integers ({first.dtype}, {int(first.min())} to {int(first.max())}) and the network has no "
            "embedding for them; convert x to float and normalize it as in training, e.g. (x / 255 - mean) / deviation; if "
            "they are indices, give x.double() and let the network take index.long()"
        )

    def fitted(value: Tensor) -> Tensor:
        if value.is_complex():
            return value.to(device=device, dtype=dtype.to_complex())
        return value.to(device=device, dtype=dtype if value.is_floating_point() else torch.int64)

    y = data.y
    if y is not None:
        y = y.to(device, torch.float64) if y.is_floating_point() else fitted(y)
    return replace(data, x=mapped(_wanted(data.x, model), fitted), y=y)


def _wanted(x: Batch, model: nn.Module) -> Batch:
    """The batch without what tokenizers add and the network has no argument for."""
    if not isinstance(x, Mapping) or not any(name in x for name in _SPARE):
        return x
    takes = inspect.signature(model.forward).parameters
    if any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        return x
    return {name: value for name, value in x.items() if name not in _SPARE or name in takes}
