"""Devices without float64, played by an accelerator of fake tensors and by the host."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ipa_torch
from ipa_core import fit_projector
from ipa_torch import DampedGradientSketch, GradientSketch
from ipa_torch import _float64 as float64
from ipa_torch.extension import energy_scale, in_float64

from .models import angle, decaying

PACKAGE = Path(ipa_torch.__file__).parent


@pytest.fixture
def without_float64(monkeypatch):
    """Let tensors of the device MPS refuse float64, as the device does."""
    double = torch.Tensor.double

    def refuse(tensor):
        if tensor.device.type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "double", refuse)
    monkeypatch.setattr(float64, "_has_float64", lambda device: device.type != "mps")


def test_a_device_without_it_leaves_it_to_the_host(without_float64):
    with FakeTensorMode():
        there = torch.ones(2, 3, device="mps")
        with pytest.raises(TypeError):
            there.double()
        wide = in_float64(there)
    assert (wide.device.type, wide.dtype) == ("cpu", torch.float64)


def test_devices_are_asked():
    assert float64._has_float64(torch.device("cpu"))
    if not torch.backends.mps.is_available():  # nor is there a device that could have it
        assert not float64._has_float64(torch.device("mps"))


def test_a_sketch_ends_on_the_device_of_the_gradients(without_float64, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: 1.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        learner = GradientSketch(2)
        learner._image = torch.ones(9, 12, device="mps")
        learner._sampled_rows = (torch.ones(5, 12, device="mps"),)
        projector = learner.finalize()
    assert projector.components.device.type == "mps"


def test_results_are_those_of_float64(monkeypatch):
    """The host in the place of the device changes nothing."""
    x, g = decaying(60, 12)[:, None], torch.randn(60, 1, 4)

    def results():
        learner = DampedGradientSketch(3)
        learner.update(x, g)
        return learner.finalize(), energy_scale(fit_projector(x, 3))

    expected = results()
    monkeypatch.setattr(float64, "_has_float64", lambda device: False)
    found = results()
    assert angle(expected[0], found[0]) < 1e-6 and expected[1] == found[1]


@pytest.mark.parametrize("package", ["ipa_torch", "ipa_hf", "ipa_timm"])
def test_tensors_become_float64_in_one_file(package):
    """All others ask `in_float64`, or make tensors of the host."""
    found = {}
    for path in (PACKAGE.parent / package).rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"\.double\(|torch\.float64", line) and 'device="cpu"' not in line:
                found.setdefault(path.relative_to(PACKAGE.parent).as_posix(), []).append(line)
    allowed = {"ipa_torch/_float64.py", "ipa_hf/fused_parameters.py"}  # a set of dtypes
    assert set(found) <= allowed, found
