"""Every law for every learner, about the origin and the mean, on every array library."""

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from array_api_compat import is_torch_namespace
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_core import (
    ExactCovariance,
    HebbianRule,
    IncrementalPCA,
    RandomizedSVD,
    ReconstructionAutoencoder,
)
from ipa_core._array import dtypes as array_dtypes
from tests.core import contract, oracle
from tests.core.spectra import hard_streams, streams

dtypes = st.sampled_from(["float32", "float64"])


@pytest.fixture(scope="session", params=contract.LAWS, ids=lambda law: law.__name__)
def law(request):
    """Every law."""
    return request.param


@given(stream=streams(), dtype=dtypes)
def test_law(xp, factory, law, stream, dtype):
    law(xp, factory, stream, dtype)


# Few cases by default, as on the host; all of them in a search.
searching = settings.default.max_examples > 30


def cases(count):
    """Settings of ``count`` cases, and of as many as the profile has when it searches."""
    return settings(max_examples=settings.default.max_examples if searching else count)


on_device = cases(8)


@given(stream=streams(), dtype=dtypes)
@on_device
def test_law_on_device(device_xp, factory, law, stream, dtype):
    law(device_xp, factory, stream, device_xp.dtype(dtype))


@pytest.mark.parametrize("center", [False, True])
@given(stream=streams(wide=True), dtype=dtypes)
@on_device
def test_law_of_the_sketch_on_device(device_xp, center, law, stream, dtype):
    factory = partial(RandomizedSVD, center=center)
    law(device_xp, factory, stream, device_xp.dtype(dtype))


@given(stream=streams(), dtype=dtypes)
@on_device
def test_resume_on_device(device_xp, factory, tmp_path_factory, stream, dtype):
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    contract.law_resume(device_xp, factory, stream, device_xp.dtype(dtype), path)


@pytest.mark.parametrize("half_products", [False, True])
@pytest.mark.parametrize("center", [False, True])
@given(stream=streams(wide=True), dtype=dtypes)
def test_law_of_the_sketch(xp, center, half_products, law, stream, dtype):
    if half_products and not is_torch_namespace(xp):
        pytest.skip("no products in half precision in this library")
    with patch.object(array_dtypes, "_is_fast_in_half", lambda torch, on: True):
        law(xp, partial(RandomizedSVD, center=center, half_products=half_products), stream, dtype)


@given(stream=streams(), dtype=dtypes)
def test_resume(xp, factory, tmp_path_factory, stream, dtype):
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    contract.law_resume(xp, factory, stream, dtype, path)


@pytest.mark.parametrize("rule", [HebbianRule, ReconstructionAutoencoder])
@pytest.mark.parametrize("center", [False, True])
@given(stream=streams(full_rank=True, offset=False))
@cases(10)
def test_statistical_law(xp, center, rule, stream):
    stream = replace(stream, rows=20_000)
    contract.law_statistical(xp, partial(rule, center=center), stream, "float32")


@pytest.mark.parametrize("learner_class", [ExactCovariance, IncrementalPCA, RandomizedSVD])
@given(stream=hard_streams(), rank=st.integers(4, 8))
@cases(25)
def test_guarantee_on_hard_streams(xp, learner_class, stream, rank):
    _, batches = stream
    learner = learner_class(rank)
    for batch in batches:
        learner.update(xp.asarray(batch))
    moment = oracle.moment(np.concatenate(batches))
    excess = oracle.excess(moment, oracle.span(learner.finalize().components))
    assert excess <= max(learner_class.guarantee.excess, 1e-4)
