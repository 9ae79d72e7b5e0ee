"""JAX as it comes, without float64: float32 cores, with wider bounds; and on two devices."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import numpy as np, jax.numpy as jnp
from ipa_core import ExactCovariance, IncrementalPCA, RandomizedSVD

rng = np.random.default_rng(0)
x = (rng.standard_normal((3000, 40)) * np.arange(1, 41) ** -0.7).astype("float32")
outlier = x.copy()
outlier[:, 7] *= 1000
for cls in (ExactCovariance, IncrementalPCA, RandomizedSVD):
    for rows, bound in ((x, 0.01), (outlier, 0.05)):
        p = cls(4).update(jnp.asarray(rows)).finalize()
        assert p.components.dtype == jnp.float32
        c = rows.astype("float64").T @ rows.astype("float64")
        q = np.linalg.qr(np.asarray(p.components, dtype="float64").T)[0]
        best = np.linalg.eigvalsh(c)[:-4].sum()
        excess = (np.trace(c) - np.trace(q.T @ c @ q)) / best - 1
        assert -1e-9 < excess < bound, (cls, excess)
"""


def test_without_float64():
    pytest.importorskip("jax", reason="jax is not installed")
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


ON_TWO_DEVICES = """
import numpy as np, jax, jax.numpy as jnp, tempfile
from ipa_core import ExactCovariance, IncrementalPCA, RandomizedSVD
from ipa_core import load, load_state, save, save_state
from ipa_core.errors import ArrayTypeError

first, second = jax.devices()
rng = np.random.default_rng(0)
x = (rng.standard_normal((3072, 60)) / np.arange(1, 61)).astype("float32")
weights = rng.integers(1, 3, 3072).astype("float32")
for cls in (ExactCovariance, IncrementalPCA, RandomizedSVD):
    results = []
    for device in (first, second):
        learner = cls(4)
        for start in range(0, 3072, 1024):
            batch, w = x[start : start + 1024], weights[start : start + 1024]
            learner.update(jax.device_put(batch, device), jax.device_put(w, device))
        state = learner.state_dict()
        arrays = [value for value in state.values() if isinstance(value, jax.Array)]
        assert arrays and all(array.devices() == {device} for array in arrays), cls
        projector = learner.finalize()
        assert projector.components.devices() == projector.mean.devices() == {device}
        with tempfile.TemporaryDirectory() as folder:
            save_state(state, f"{folder}/state.safetensors")
            state = load_state(f"{folder}/state.safetensors", library=jnp, device=device)
            resumed = cls(4).load_state_dict(state).update(jax.device_put(x[:1024], device))
            assert resumed.finalize().components.devices() == {device}
            save(projector, f"{folder}/p.safetensors")
            again = load(f"{folder}/p.safetensors", library=jnp, device=device)
            assert again.components.devices() == {device}
        results.append((learner, np.asarray(projector.components)))
    (here, p), (there, q) = results
    assert np.array_equal(p, q), cls
    try:
        here.update(jax.device_put(x[:1024], second))
    except ArrayTypeError as error:
        assert "batches like the first one" in str(error), error
    else:
        raise AssertionError(f"{cls}: a batch of another device was taken")
    try:
        here.merge(there)
    except ArrayTypeError:
        pass
    else:
        raise AssertionError(f"{cls}: a learner of another device was merged")
    # Weights lie anywhere.
    here.update(jax.device_put(x[:1024], first), jax.device_put(weights[:1024], second))
"""


def test_on_two_devices():
    """The process has two devices of the host, and what is learned on one stays there."""
    pytest.importorskip("jax", reason="jax is not installed")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", ON_TWO_DEVICES], check=True, env=environment)
