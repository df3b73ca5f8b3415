"""What new users meet first is told with the next step: names of samples, class numbers, whole modules, new norms."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptive_tangents as at
from adaptive_tangents import TangentError
from adaptive_tangents.inspection import page
from adaptive_tangents.loading.checkpoints import load_checkpoint
from adaptive_tangents.loading.data import Data
from adaptive_tangents.loading.models import check_runs


@pytest.fixture
def classifier() -> Iterator[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


def test_class_numbers_given_as_amounts_are_told_of_the_loss_they_need(classifier: nn.Module) -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(TangentError, match=r"class numbers need loss='cross-entropy'$"):
        at.forecast(classifier, x, y)
    with pytest.raises(TangentError, match=r"class numbers need loss='cross-entropy', offset=f\(x;θ₀\) and a ridge$"):
        at.fit(at.tangent_features(classifier, x), y)
    with pytest.raises(TangentError, match=r"c = 3 outputs$"):
        at.fit(at.tangent_features(classifier, x), y.double())
    kernel = at.tangent_kernel(classifier, x)
    for call in (lambda: at.fit(kernel, y, structure=at.Fixed()), lambda: at.kernel_regression(kernel, y)):
        with pytest.raises(TangentError, match=r"of class numbers y those of torch\.nn\.functional\.one_hot\(y\)$"):
            call()


def test_arrays_of_other_names_are_told_the_names_to_take(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    named = Data({"images": torch.randn(5, 4)}, None)
    with pytest.raises(TangentError, match=r"'images'.*; name them x, or as the network's forward names its arguments"):
        check_runs(Net(), named, tmp_path / "val.npz")


def test_of_a_whole_module_in_a_file_the_remedy_works(tmp_path: Path, classifier: nn.Module) -> None:
    torch.save(classifier, tmp_path / "whole.pt")
    with pytest.raises(TangentError, match=r"of a whole module, \.state_dict\(\) in place of \['state_dict'\]"):
        load_checkpoint(tmp_path / "whole.pt", classifier)
    torch.save(torch.load(tmp_path / "whole.pt", weights_only=False).state_dict(), tmp_path / "weights.pt")
    assert load_checkpoint(tmp_path / "weights.pt", classifier).keys() == classifier.state_dict().keys()


def test_growth_from_uncalibrated_norms_is_said_among_the_first_findings(classifier: nn.Module) -> None:
    x, y = torch.randn(40, 4) * 3 + 1, torch.arange(40) % 3
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.train()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    for k in range(4):
        nn.functional.cross_entropy(classifier(x), y).backward()
        if k == 1:
            calibrated = {name: value.clone() for name, value in classifier.state_dict().items()}
        optimizer.step() if k else None
        optimizer.zero_grad()
    y = classifier.eval()(x).argmax(1)
    new = at.inspect(classifier, start, data=(x, y), samples=16, nodes=2)
    assert new.findings[1].startswith("Part of this change is calibration, not training: a norm starts with")
    known = at.inspect(classifier, calibrated, data=(x, y), samples=16, nodes=2)
    assert not any("calibration" in finding for finding in known.findings)
    trained = {name: start[name] if "running" in name else value for name, value in classifier.state_dict().items()}
    never = at.inspect(classifier, start, trained, data=(x, None), samples=16, nodes=2)
    assert not any("calibration" in finding for finding in never.findings), "nothing was calibrated on the way"


def test_a_kernel_that_shrank_everywhere_is_said_to_have_shrunk_least_somewhere(classifier: nn.Module) -> None:
    x = torch.randn(16, 4)
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter *= 0.3
    found = at.inspect(classifier, start, data=(x, classifier(x).argmax(1)), samples=16, nodes=2)
    (growth,) = [finding for finding in found.findings if finding.startswith("The kernel shrank")]
    assert "shrank least" in growth
    assert "grew most" not in growth
    assert "+ −" not in " ".join(page.findings(found.results))
