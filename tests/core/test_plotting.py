"""Plots render; doctests check their contents."""

import io
import sys

import numpy as np
import pytest

from ipa_core import fit_projector, plotting
from ipa_core.errors import MissingDependencyError, ShapeError

pytest.importorskip("matplotlib")

RNG = np.random.default_rng(0)
PROJECTORS = {
    "up": fit_projector(RNG.standard_normal((50, 8)), 4),
    "gate": fit_projector(RNG.standard_normal((50, 8)), 2),
    "down": fit_projector(RNG.standard_normal((50, 12)), 3),
}
FIGURES = {
    "scree": lambda: plotting.scree(PROJECTORS),
    "captured": lambda: plotting.captured(PROJECTORS),
    "angles": lambda: plotting.angles(PROJECTORS),
    "heat_map": lambda: plotting.heat_map(np.eye(20).tolist(), [f"task {n}" for n in range(20)]),
    "trade_off": lambda: plotting.trade_off({"LoRA": (10, [1.0]), "IPA": (20, [2.0, 2.5])}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_renders(name):
    buffer = io.BytesIO()
    FIGURES[name]().savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_angles_of_a_projector_with_itself_are_zero_and_other_features_are_blank():
    texts = [text.get_text() for text in plotting.angles(PROJECTORS).axes[0].texts]
    assert len(texts) == 5
    assert all(float(text) < 1e-3 for text in (texts[0], texts[3], texts[4]))


def test_heat_map_needs_a_value_for_each_pair():
    with pytest.raises(ShapeError, match="expected 2 x 2 values"):
        plotting.heat_map([[1.0, 0.0]], ["one", "two"])


@pytest.mark.parametrize("name", FIGURES)
def test_missing_matplotlib_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"ipa-projectors\[plot\]"):
        FIGURES[name]()
