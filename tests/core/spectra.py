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


def sparse_rows(rng, rows, features):
    """Independent rows with one entry each; a few rare ones are large and share 4 directions."""
    x = np.zeros((rows, features))
    rare = rng.random(rows) < 0.01
    column = np.where(rare, rng.integers(0, 4, rows), rng.integers(4, features, rows))
    x[np.arange(rows), column] = np.where(rare, 30.0, 1.0)
    return x


def late_directions(rng, rows, features):
    """Flat rows; in the last tenth, 4 directions ten times as large appear."""
    x = np.zeros((rows, features))
    half = features // 2
    x[:, :half] = rng.standard_normal((rows, half))
    late = rows - rows // 10
    x[late:, half : half + 4] = 10 * rng.standard_normal((rows - late, 4))
    return x


def outlier_dimension(rng, rows, features):
    """Decaying rows with a dimension 3,000 times the rest, as language models have it."""
    x = rng.standard_normal((rows, features)) * np.arange(1, features + 1) ** -0.3
    x[:, 5] = 3000 * (1 + 0.1 * rng.standard_normal(rows))
    return x


def common_mean(rng, rows, features):
    """Decaying rows about a mean of length 2,000 that no coordinate shows."""
    mean = rng.standard_normal(features)
    x = rng.standard_normal((rows, features)) * np.arange(1, features + 1) ** -0.3
    return x + 2000 * mean / np.linalg.norm(mean)


def heavy_tails(rng, rows, features):
    """Rows whose lengths have no variance."""
    x = rng.standard_normal((rows, features)) * np.arange(1, features + 1) ** -0.5
    return x * rng.standard_cauchy((rows, 1))


def cauchy_entries(rng, rows, features):
    """Entries without a mean."""
    return rng.standard_cauchy((rows, features))


def drifting_scale(rng, rows, features):
    """Decaying rows that grow a thousandfold along the stream."""
    x = rng.standard_normal((rows, features)) * np.arange(1, features + 1) ** -0.5
    return x * np.logspace(0, 3, rows)[:, None]


#: Streams on which a learner that looks at shares of the energy, or squares its state, fails.
FAMILIES = [
    sparse_rows,
    late_directions,
    outlier_dimension,
    common_mean,
    heavy_tails,
    cauchy_entries,
    drifting_scale,
]


@st.composite
def hard_streams(draw):
    """Draw rows of a family, float32, and a cutting into batches."""
    family = draw(st.sampled_from(FAMILIES))
    rows, features = draw(st.integers(1500, 9000)), draw(st.integers(120, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    scale = 10.0 ** draw(st.integers(-3, 3))
    x = (scale * family(rng, rows, features)).astype("float32")
    borders = sorted(int(cut * rows) for cut in draw(st.lists(st.floats(0, 1), max_size=6)))
    return family.__name__, np.split(x, borders)
