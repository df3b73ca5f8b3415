"""The rules of torch layers: how the features of their parameters are made. The only file that knows layer types.

A rule makes the features of a layer's weight and bias from the layer's input and the gradients at its output. Where the
weight acts on shared inputs, features are factors δ and h over positions; where it does not (norm scales, grouped
convolutions), they are materialized. To support a layer type, add its rule here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from adaptive_tangents.features.summands import Dense, Lookup, Outer
from adaptive_tangents.runtime.memory import empty

_Gradients = Float[Tensor, "c n *rest"]


@dataclass(frozen=True)
class LayerRule:
    """How the features of one layer type are made, from its input x and the gradients g (c, n, ...) at its output.

    Attributes:
        layers: the layer types.
        matrix: (module) -> shape (o, i) of the weight's matrix.
        weight: (module, x, g, ones) -> the weight's features; ``ones`` adds an input column for a joined bias.
        bias: (module, g) -> the bias's own features Σ_t δ_t (n, c, o).
        joined: whether the bias is one more input column of the weight's block.
        transposed: whether the weight is stored inputs first.
        accepts: (module, x) -> whether the rule holds for this input.
        keep: (module, x) -> what to remember of the input.
        tokens: whether other dimensions may come before the samples in x.
        table: whether x holds indices of rows.
        alone: whether the rule holds only for calls with no argument but x.
        summed: whether features are sums over positions, made output by output.
        modes: (module) -> names and sizes of the modes of the input side.
    """

    layers: tuple[type[nn.Module], ...]
    matrix: Callable[[nn.Module], tuple[int, int]]
    weight: Callable[[nn.Module, Tensor, Tensor, bool], Outer | Lookup | Dense]
    bias: Callable[[nn.Module, Tensor], Float[Tensor, "n c o"]]
    joined: bool
    transposed: bool = False
    accepts: Callable[[nn.Module, Tensor], bool] = lambda module, x: x.ndim > 1
    keep: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: x
    tokens: bool = False
    table: bool = False
    alone: bool = False
    summed: bool = False
    modes: Callable[[nn.Module], tuple[tuple[str, int], ...]] = lambda module: ()


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule that describes ``module``'s forward exactly; None for a module with a forward of its own."""
    if "forward" in vars(module):
        return None
    for rule in RULES:
        for layer in rule.layers:
            if isinstance(module, layer) and type(module).forward is layer.forward:
                return rule
    forward = getattr(type(module), "forward", None)  # a traced module's class has none
    named = (getattr(forward, "__module__", None), getattr(forward, "__qualname__", None))
    return _HUGGING_FACE_CONV1D if named == ("transformers.pytorch_utils", "Conv1D.forward") else None


def packed_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of weights with their biases that a layer without a rule applies as Linear does."""
    if isinstance(module, nn.MultiheadAttention):
        return [("in_proj_weight", "in_proj_bias")]
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        weights = [name for name in module._parameters if name.startswith(("weight_ih", "weight_hh"))]
        return [(name, name.replace("weight", "bias")) for name in weights]
    return [("weight", "bias")] if isinstance(module, nn.Bilinear) else []


def bias_alone(rule: LayerRule, module: nn.Module, gradient: _Gradients, matrix: tuple[int, int]) -> Outer | Dense:
    """Features of a bias with a block of its own: (o, 1), except for norms over several dimensions."""
    total = rule.bias(module, gradient)
    if rule.joined:
        return Outer(total[:, None], torch.ones_like(total[:, None, 0, :1]))
    return Dense(total.reshape(*total.shape[:2], *matrix))


def _shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[0], prod(module.weight.shape[1:])


# Linear: all dimensions between samples and units are positions.


def _linear(module: nn.Module, x: Tensor, gradient: _Gradients, ones: bool) -> Outer:
    inputs = x.reshape(x.shape[0], prod(x.shape[1:-1]), x.shape[-1])
    inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1) if ones else inputs
    return Outer(_linear_backward(module, gradient), inputs)


def _linear_backward(module: nn.Module, gradient: _Gradients) -> Float[Tensor, "n t c o"]:
    c, n, *middle, o = gradient.shape
    return gradient.reshape(c, n, prod(middle), o).permute(1, 2, 0, 3).contiguous()


def _linear_bias(module: nn.Module, gradient: _Gradients) -> Float[Tensor, "n c o"]:
    c, n, *middle, o = gradient.shape
    return gradient.reshape(c, n, prod(middle), o).sum(2).transpose(0, 1).contiguous()


# Convolutions: output pixels are positions, unfolded patches are the inputs. Groups have different inputs, so their
# features are materialized.


def _convolution(module: Any, x: Tensor, gradient: _Gradients, ones: bool) -> Outer | Dense:
    patches, backward = _patches(module, x, ones and module.groups == 1), _channels_backward(module, gradient)
    g = module.groups
    if g == 1:
        return Outer(backward, patches)
    n, t, c, o = backward.shape
    signals = backward.permute(0, 2, 3, 1).reshape(n, c, g, o // g, t).transpose(1, 2).reshape(n * g, c * (o // g), t)
    values = (signals @ patches.mT.reshape(n * g, -1, t).mT).reshape(n, g, c, o // g, -1)
    values = values.transpose(1, 2).reshape(n, c, o, -1)
    return Dense(torch.cat([values, _channels_bias(module, gradient)[..., None]], -1) if ones else values)


def convolution_of(node: Any, x: Tensor, gradient: _Gradients, kernel: tuple[int, ...]) -> Outer | Dense:
    """The weight's features of a convolution in the autograd graph."""
    padding = [size for size in reversed(node._saved_padding) for _ in range(2)]
    layer = SimpleNamespace(
        kernel_size=kernel, stride=node._saved_stride, dilation=node._saved_dilation, groups=node._saved_groups,
        padding_mode="zeros", _reversed_padding_repeated_twice=padding,
    )  # fmt: skip
    return _convolution(layer, x, gradient, False)


def _convolution_modes(module: nn.Module) -> tuple[tuple[str, int], ...]:
    assert isinstance(module, _ConvNd)
    return ("in", module.in_channels // module.groups), ("spatial", prod(module.kernel_size))


def _patches(module: Any, x: Tensor, ones: bool) -> Float[Tensor, "n t i"]:
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    windows = _windows(module, x)
    n, pixels = x.shape[0], 2 + len(module.kernel_size)
    width, t = prod(windows.shape[1:pixels]), prod(windows.shape[pixels:])
    # Pixels innermost in memory, here and in the signals: whole rows of an image are copied at once.
    patches = empty((n, width + ones, t), x)
    patches[:, :width].view(windows.shape).copy_(windows)
    patches[:, width:] = 1
    return patches.mT


def _windows(module: Any, x: Tensor) -> Float[Tensor, "n channels *kernel_pixels"]:
    """The windows of a layer's kernel, stride and dilation: the pixels for each channel and place in the kernel."""
    for d, (k, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + d, (k - 1) * dilation + 1, stride)[..., ::dilation]
    dimensions = len(module.kernel_size)
    return x.permute(0, 1, *range(2 + dimensions, 2 + 2 * dimensions), *range(2, 2 + dimensions))


# Transposed convolutions store weights inputs first: input pixels are positions, patches of the gradient are the signals.


def _transposed_convolution(module: nn.Module, x: Tensor, gradient: _Gradients, ones: bool) -> Outer | Dense:
    assert isinstance(module, _ConvTransposeNd)
    c, n = gradient.shape[:2]
    padding = [int(size) for size in module._reversed_padding_repeated_twice]
    images = gradient.transpose(0, 1).flatten(0, 1)
    windows = _windows(module, F.pad(images, padding) if any(padding) else images)
    for d, size in enumerate(reversed(x.shape[2:])):
        windows = windows.narrow(-1 - d, 0, size)  # output_padding may add windows that belong to no input
    g, t, i = module.groups, prod(x.shape[2:]), x.shape[1]
    signals = windows.reshape(n, c, g, -1, t)
    inputs = x.reshape(n, g, i // g, t)
    if g == 1:
        return Outer(signals[:, :, 0].permute(0, 3, 1, 2), inputs[:, 0].mT)
    return Dense(torch.einsum("ncgot,ngit->ncogi", signals, inputs).flatten(3))


def _transposed_shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module.weight, Tensor)
    return module.weight[0].numel(), module.weight.shape[0]


def _channels_backward(module: Any, gradient: _Gradients) -> Float[Tensor, "n t c o"]:
    c, n, o, *pixels = gradient.shape
    # Pixels stay innermost in memory: copying whole images is many times faster than copying single numbers.
    return gradient.reshape(c, n, o, prod(pixels)).transpose(0, 1).contiguous().permute(0, 3, 1, 2)


def _channels_bias(module: nn.Module, gradient: _Gradients) -> Float[Tensor, "n c o"]:
    c, n, o, *pixels = gradient.shape
    return gradient.reshape(c, n, o, prod(pixels)).sum(-1).transpose(0, 1).contiguous()


# Norms: the scale multiplies normalized inputs entry by entry, so its feature is Σ_t δ_t ⊙ x̂_t.


def _last_normalized(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    shape = list(module.normalized_shape)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, shape, None, None, module.eps)
    return F.rms_norm(x, shape, None, module.eps)


def _channels_normalized(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    assert isinstance(module, _BatchNorm | _InstanceNorm)
    if isinstance(module, _BatchNorm) or (module.track_running_stats and not module.training):
        return F.batch_norm(x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
    return F.instance_norm(x, eps=module.eps)


def normalized_channels(node: Any, operation: str) -> Tensor:
    """The normalized input, which is multiplied by the scale, of a norm over channels in the autograd graph."""
    x = node._saved_input
    if operation == "NativeGroupNorm":
        return F.group_norm(x, node._saved_group, None, None, node._saved_eps)
    return F.batch_norm(x, node._saved_running_mean, node._saved_running_var, None, None, False, 0.0, node._saved_eps)


def _last_scale(module: nn.Module, normalized: Tensor, gradient: _Gradients, ones: bool) -> Dense:
    total = _last_bias(module, gradient * normalized)
    return Dense(total.reshape(*total.shape[:2], *_shape(module)))


def _last_bias(module: nn.Module, gradient: _Gradients) -> Float[Tensor, "n c o"]:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    c, n = gradient.shape[:2]
    o = prod(module.normalized_shape)
    return gradient.reshape(c, n, gradient[0, 0].numel() // o, o).sum(2).transpose(0, 1).contiguous()


def _channels_scale(module: nn.Module, normalized: Tensor, gradient: _Gradients, ones: bool) -> Dense:
    c, n, o, *pixels = gradient.shape
    # One product per channel image, (c, pixels) with (pixels,): this allocates nothing of the gradients' size.
    signals = gradient.reshape(c, n * o, prod(pixels)).transpose(0, 1)
    total = signals @ normalized.reshape(n * o, prod(pixels), 1)
    return Dense(total.reshape(n, o, c).transpose(1, 2).contiguous()[..., None])


def _batched(module: nn.Module, x: Tensor, *, dimensions: tuple[int, ...]) -> bool:
    return x.ndim in dimensions


def _convolution_rule(layer: type[nn.Module], dimensions: int) -> LayerRule:
    batched = partial(_batched, dimensions=(dimensions + 2,))
    return LayerRule(
        (layer,), _shape, _convolution, _channels_bias, joined=True, accepts=batched, modes=_convolution_modes
    )


def _transposed_convolution_rule(layer: type[nn.Module], dimensions: int) -> LayerRule:
    batched = partial(_batched, dimensions=(dimensions + 2,))
    return LayerRule(
        (layer,), _transposed_shape, _transposed_convolution, _channels_bias, joined=False, transposed=True,
        accepts=batched,
    )  # fmt: skip


def _channel_norm_rule(layers: tuple[type[nn.Module], ...], dimensions: tuple[int, ...]) -> LayerRule:
    return LayerRule(
        layers, _shape, _channels_scale, _channels_bias, joined=False,
        accepts=partial(_batched, dimensions=dimensions), keep=_channels_normalized, summed=True,
    )  # fmt: skip


# Embeddings: a table that is stored inputs first; indices select its rows.


def lookup(backward: Float[Tensor, "n t c o"], index: Tensor, width: int, weights: Float[Tensor, "n t"]) -> Lookup:
    """Features of a table (width, o) in which every position looks up one row, times a weight."""
    n, t = index.shape
    return Lookup(backward, index.long(), weights, backward.new_zeros(n, t, 0), backward.new_zeros(0, width))


def learning(index: Tensor, padding: int | None, like: Tensor) -> Float[Tensor, "n t"]:
    """One for each looked-up row, zero for the padding row, which never learns."""
    rows = torch.ones(index.shape, dtype=like.dtype, device=like.device)
    return rows if padding is None or padding < 0 else rows * (index != padding)


def _embedding(module: nn.Module, x: Tensor, gradient: _Gradients, ones: bool) -> Lookup:
    assert isinstance(module, nn.Embedding)
    index = x.reshape(x.shape[0], -1)
    return lookup(
        _linear_backward(module, gradient), index, module.num_embeddings, learning(index, module.padding_idx, gradient)
    )


def _bag(module: nn.Module, x: Tensor, gradient: _Gradients, ones: bool) -> Lookup:
    assert isinstance(module, nn.EmbeddingBag)
    weights = learning(x, module.padding_idx, gradient)
    if module.mode == "mean":
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    backward = gradient.permute(1, 0, 2)[:, None].expand(-1, x.shape[1], -1, -1)
    return lookup(backward, x, module.num_embeddings, weights)


def _table(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return module.embedding_dim, module.num_embeddings


def _plain_table(module: nn.Module, x: Tensor) -> bool:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return module.max_norm is None and not module.scale_grad_by_freq and not x.is_floating_point()


def _plain_bag(module: nn.Module, x: Tensor) -> bool:
    assert isinstance(module, nn.EmbeddingBag)
    return _plain_table(module, x) and x.ndim == 2 and module.mode in ("sum", "mean")


def _no_bias(module: nn.Module, gradient: _Gradients) -> Float[Tensor, "n c o"]:
    raise NotImplementedError


def _stored_inputs_first(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[1], module.weight.shape[0]


_HUGGING_FACE_CONV1D = LayerRule(
    (), _stored_inputs_first, _linear, _linear_bias, joined=True, transposed=True, tokens=True
)

RULES: tuple[LayerRule, ...] = (
    LayerRule((nn.Linear,), _shape, _linear, _linear_bias, joined=True, tokens=True),
    LayerRule(
        (nn.Embedding,),
        _table,
        _embedding,
        _no_bias,
        joined=False,
        transposed=True,
        accepts=_plain_table,
        tokens=True,
        table=True,
    ),
    LayerRule(
        (nn.EmbeddingBag,),
        _table,
        _bag,
        _no_bias,
        joined=False,
        transposed=True,
        accepts=_plain_bag,
        alone=True,
        table=True,
    ),
    _convolution_rule(nn.Conv1d, 1),
    _convolution_rule(nn.Conv2d, 2),
    _convolution_rule(nn.Conv3d, 3),
    _transposed_convolution_rule(nn.ConvTranspose1d, 1),
    _transposed_convolution_rule(nn.ConvTranspose2d, 2),
    _transposed_convolution_rule(nn.ConvTranspose3d, 3),
    LayerRule(
        (nn.LayerNorm, nn.RMSNorm),
        _shape,
        _last_scale,
        _last_bias,
        joined=False,
        keep=_last_normalized,
        tokens=True,
        summed=True,
    ),
    _channel_norm_rule((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm), (2, 3, 4, 5)),
    _channel_norm_rule((nn.InstanceNorm1d,), (3,)),
    _channel_norm_rule((nn.InstanceNorm2d,), (4,)),
    _channel_norm_rule((nn.InstanceNorm3d,), (5,)),
)
