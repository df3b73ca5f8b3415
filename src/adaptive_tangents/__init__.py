"""How a network's tangent features change when it learns, and the exact model of that change.

The public names, in the order data flows: a model and a batch become tangent features, at one set of parameters or
averaged along a path; features give kernels; penalties and structures say how features may be transformed; ``fit`` solves
for coefficients and transform together; measures compare kernels with targets and features with features. Records and
rarely used functions are in the wings: ``at.features``, ``at.structures``, ``at.solvers`` and the others.

>>> import torch, adaptive_tangents as at
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
>>> x, y = torch.randn(30, 4), torch.randn(30, 1)
>>> feats = at.tangent_features(model, x)
>>> fit = at.fit(feats, y - model(x).detach(), structure=at.TwoSided(at.Quadratic(0.1)))
>>> fit.converged
True
>>> at.alignment(fit.transform(feats).kernel(), y) > at.alignment(feats.kernel(), y)
True
"""

from pathlib import Path

import lazy_loader

from adaptive_tangents._version import __version__ as __version__

# Each name is imported from its wing when it is first used: the stub beside this file says from which.
__getattr__, _, _known = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in _known if not Path(__file__).with_name(name).is_dir()]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
