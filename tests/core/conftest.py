"""Fixtures: the array libraries and the learners of the laws."""

import importlib
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


@pytest.fixture(scope="session", params=LEARNERS, ids=lambda cls: cls.__name__)
def learner_class(request):
    """Every learner class."""
    return request.param


@pytest.fixture(scope="session", params=[False, True], ids=["origin", "center"])
def factory(request, learner_class):
    """Every learner, about the origin and about the mean."""
    return partial(learner_class, center=request.param)
