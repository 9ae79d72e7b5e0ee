"""Hypothesis strategy of streams: spectrum, seed and cutting are drawn, never entries."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True)
class Stream:
    """A stream of rows with a prescribed spectrum, and a cutting into batches, empty ones too."""

    features: int
    rank: int
    rows: int
    decay: float
    scale: float
    offset: float
    effective: int
    seed: int
    cuts: tuple[float, ...]

    @property
    def x(self):
        """The rows, in float64."""
        rng = np.random.default_rng(self.seed)
        basis = np.linalg.qr(rng.standard_normal((self.features, self.features)))[0]
        spectrum = np.arange(1, self.features + 1) ** (-self.decay / 2)
        spectrum[self.effective :] = 0.0
        x = (rng.standard_normal((self.rows, self.features)) * spectrum) @ basis
        return self.scale * (x + self.offset * basis[0])

    def cut(self, x):
        """Cut ``x`` along its first axis as this stream is cut."""
        borders = sorted(int(cut * len(x)) for cut in self.cuts)
        return [x[a:b] for a, b in zip([0, *borders], [*borders, len(x)], strict=True)]


@st.composite
def streams(draw, max_features=24, full_rank=False, offset=True, wide=False):
    """Draw a stream; ``full_rank`` ones have a tail beyond the rank, so that excess is defined.

    ``wide`` ones have so many features beside their rank that `RandomizedSVD` has to sketch them.
    """
    if wide:
        features, rank = draw(st.integers(33, 64)), draw(st.integers(1, 4))
    else:
        features = draw(st.integers(2, max_features))
        rank = draw(st.integers(1, max(1, features // 2)))
    least = features if full_rank else 1
    return Stream(
        features=features,
        rank=rank,
        rows=draw(st.integers(1, 700)) if not full_rank else draw(st.integers(300, 1500)),
        decay=draw(st.floats(0.3, 3.0)),
        scale=10.0 ** draw(st.integers(-3, 3)),
        offset=draw(st.sampled_from([0.0, 1.0, 30.0])) if offset else 0.0,
        effective=draw(st.integers(least, features)),
        seed=draw(st.integers(0, 2**16)),
        cuts=tuple(draw(st.lists(st.floats(0, 1), max_size=8))),
    )
