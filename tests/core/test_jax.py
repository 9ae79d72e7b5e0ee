"""JAX without float64 (its default): float32 cores, with wider bounds."""

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
