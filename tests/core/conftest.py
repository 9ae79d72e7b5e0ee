"""Fixtures: the array libraries and the learners of the laws."""

import importlib
import sys
from functools import partial

import pytest

from ipa_core import (
    ExactCovariance,
    HebbianRule,
    IncrementalPCA,
    RandomizedSVD,
    ReconstructionAutoencoder,
)
from ipa_core._array import as_namespace

LEARNERS = [
    ExactCovariance,
    HebbianRule,
    IncrementalPCA,
    RandomizedSVD,
    ReconstructionAutoencoder,
]


def pytest_runtest_teardown():
    """Drop what JAX has compiled: hundreds of megabytes in a law, as each shape is new."""
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


def _library(name):
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    if name == "cupy" and not _cuda_works(module):
        pytest.skip("CuPy is installed but finds no CUDA device")
    if name == "jax.numpy":
        # The float64 laws need it; tests/core/test_jax.py has JAX as it comes, without.
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    return as_namespace(module)


def _cuda_works(cupy):
    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


@pytest.fixture(scope="session", params=["numpy", "array_api_strict", "torch", "jax.numpy", "cupy"])
def xp(request):
    """Every array library that is importable here, as an array-API namespace."""
    return _library(request.param)


class DeviceNamespace:
    """A namespace whose `asarray` puts arrays on a device."""

    def __init__(self, library, device):
        self._library, self.device = library, device
        self.dtypes = library.__array_namespace_info__().dtypes(device=device)

    def __getattr__(self, name):
        return getattr(self._library, name)

    def asarray(self, values, **kwargs):
        return self._library.asarray(values, **{"device": self.device, **kwargs})

    def dtype(self, name):
        """Return the name of a floating dtype, or float32 where the device does not have it."""
        return name if name in self.dtypes else "float32"


@pytest.fixture(scope="session", params=["device1", "no_float64"])
def device_xp(request):
    """The devices of array-api-strict: one other than the host, and one without float64."""
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    return DeviceNamespace(strict, strict.Device(request.param))


@pytest.fixture(scope="session", params=LEARNERS, ids=lambda cls: cls.__name__)
def learner_class(request):
    """Every learner class."""
    return request.param


@pytest.fixture(scope="session", params=[False, True], ids=["origin", "center"])
def factory(request, learner_class):
    """Every learner, about the origin and about the mean."""
    return partial(learner_class, center=request.param)
