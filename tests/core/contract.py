"""Laws of a learner: functions that raise AssertionError, for the tests and the mutants.

A law takes an array library, a factory rank -> Learner, a stream and a dtype name. Where the
learner's guarantee is exact, two results must agree to rounding; where it is bounded, both must
lie within the declared excess of the optimum; where it is statistical, a short stream must give a
valid projector that never falls behind the worst one, and `law_statistical` does the rest.
"""

import copy

import numpy as np

from ipa_core import load_state, save_state
from tests.core import oracle


def rounding(dtype):
    """Return the one tolerance, relative to the mean squared length of the rows."""
    return 200 * float(np.finfo(dtype).eps)


def learn(xp, factory, rank, batches, dtype="float64", weights=None):
    """Return a learner that has seen the batches."""
    learner = factory(rank)
    for number, batch in enumerate(batches):
        w = None if weights is None else xp.asarray(np.array(weights[number], dtype=dtype))
        learner.update(xp.asarray(np.array(batch, dtype=dtype)), w)
    return learner


class Judge:
    """Check of projectors against the guarantee of a learner on a stream of rows."""

    def __init__(self, factory, rank, x, dtype, weights=None):
        learner = factory(rank)
        self.guarantee, self.rank, self.dtype = learner.guarantee, rank, dtype
        x = np.array(x, dtype=dtype)
        self.c = oracle.moment(x, weights, learner.center)
        self.total = np.trace(oracle.moment(x, weights))
        self.noise = rounding(dtype) * self.total
        self.best = oracle.optimum(self.c, rank)

    def valid(self, projector):
        """Check the form: orthonormal rows, decreasing energies that do not exceed the total."""
        p, energies = oracle.host(projector.components), oracle.host(projector.energies)
        assert p.shape == (self.rank, len(self.c))
        assert str(projector.components.dtype).split(".")[-1] == self.dtype
        eps = float(np.finfo(self.dtype).eps)
        assert np.abs(p @ p.T - np.eye(self.rank)).max() < 100 * eps
        assert (np.diff(energies) <= self.noise).all()
        assert (energies >= 0).all()
        if self.guarantee.kind == "statistical":
            return
        assert abs(projector.total_energy - np.trace(self.c)) <= self.noise
        assert energies.sum() <= np.trace(self.c) + self.noise

    def keeps_guarantee(self, projector):
        """Check the residual against the optimum."""
        self.valid(projector)
        residual = oracle.residual(self.c, projector.components)
        assert residual >= self.best - self.noise
        assert residual <= np.trace(self.c) + self.noise
        if self.guarantee.kind != "statistical":
            assert residual <= (1 + self.guarantee.excess) * self.best + self.noise

    def same(self, first, second):
        """Check that two projectors have equal residuals to rounding."""
        residuals = [oracle.residual(self.c, p.components) for p in (first, second)]
        assert abs(residuals[0] - residuals[1]) <= self.noise

    def agree(self, first, second):
        """Check two results that the guarantee makes equivalent."""
        self.keeps_guarantee(first)
        self.keeps_guarantee(second)
        if self.guarantee.kind == "exact":
            self.same(first, second)


def law_optimality(xp, factory, stream, dtype):
    """The residual is the Eckart-Young one, within the guarantee."""
    learner = learn(xp, factory, stream.rank, stream.cut(stream.x), dtype)
    Judge(factory, stream.rank, stream.x, dtype).keeps_guarantee(learner.finalize())


def law_partition(xp, factory, stream, dtype):
    """Any cutting of the stream, empty batches included, gives the same result."""
    whole = learn(xp, factory, stream.rank, [stream.x], dtype)
    parts = learn(xp, factory, stream.rank, stream.cut(stream.x), dtype)
    Judge(factory, stream.rank, stream.x, dtype).same(whole.finalize(), parts.finalize())


def law_merge(xp, factory, stream, dtype):
    """Merged parts are as good as the whole in any order; the last part dominates."""
    x = stream.x
    third = (len(x) + 2) // 3
    x[2 * third :] = 5 * x[2 * third :, ::-1]
    a, b, c = (
        learn(xp, factory, stream.rank, [part], dtype)
        for part in (x[:third], x[third : 2 * third], x[2 * third :])
    )
    judge = Judge(factory, stream.rank, x, dtype)
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    judge.agree(left.finalize(), right.finalize())
    judge.agree(left.finalize(), learn(xp, factory, stream.rank, [x], dtype).finalize())
    assert left.samples == right.samples == len(x)


def law_neutral(xp, factory, stream, dtype):
    """Merging with a learner that has seen nothing changes nothing."""
    learner = learn(xp, factory, stream.rank, stream.cut(stream.x), dtype)
    judge = Judge(factory, stream.rank, stream.x, dtype)
    for merged in (
        learner.merge(factory(stream.rank)),
        factory(stream.rank).merge(learner),
    ):
        judge.same(merged.finalize(), learner.finalize())


def law_purity(xp, factory, stream, dtype):
    """Later calls change no batch, no operand and no snapshot."""
    x = xp.asarray(np.array(stream.x, dtype=dtype))
    before = oracle.host(x).copy()
    learner = factory(stream.rank).update(x)
    snapshot, image = copy.copy(learner), frozen(learner)
    learner.finalize()
    learner.merge(learn(xp, factory, stream.rank, [3 * stream.x], dtype))
    assert_frozen(learner, image)
    learner.update(2 * x)
    assert_frozen(snapshot, image)
    assert np.array_equal(oracle.host(x), before)


def frozen(learner):
    """Return a deep image of a learner's state."""
    return {
        key: oracle.host(value).copy() if hasattr(value, "shape") else value
        for key, value in learner.state_dict().items()
    }


def assert_frozen(learner, image):
    now = frozen(learner)
    assert now.keys() == image.keys()
    for key, value in image.items():
        assert np.array_equal(now[key], value), key


def law_absence(xp, factory, stream, dtype):
    """A row of weight 0 is absent, even if it holds NaN."""
    x = stream.x
    rng = np.random.default_rng(stream.seed)
    keep = rng.random(len(x)) < 0.7
    keep[0] = True
    holes = np.where(keep[:, None], x, np.nan)
    padded = learn(xp, factory, stream.rank, [holes], dtype, [keep])
    plain = learn(xp, factory, stream.rank, [x[keep]], dtype)
    Judge(factory, stream.rank, x[keep], dtype).same(padded.finalize(), plain.finalize())
    assert padded.samples == plain.samples == keep.sum()


def law_weights(xp, factory, stream, dtype):
    """A row of weight 2 counts twice; weights between count in proportion."""
    x = stream.x
    weights = np.random.default_rng(stream.seed).integers(1, 4, size=len(x))
    weighted = learn(xp, factory, stream.rank, [x], dtype, [weights])
    repeated = learn(xp, factory, stream.rank, [np.repeat(x, weights, axis=0)], dtype)
    judge = Judge(factory, stream.rank, x, dtype, weights)
    judge.agree(weighted.finalize(), repeated.finalize())


def law_equivariance(xp, factory, stream, dtype):
    """Rotating and scaling the data rotates and scales the result."""
    x = stream.x
    rng = np.random.default_rng(stream.seed)
    rotation = np.linalg.qr(rng.standard_normal((stream.features,) * 2))[0]
    plain = learn(xp, factory, stream.rank, stream.cut(x), dtype).finalize()
    turned = learn(xp, factory, stream.rank, stream.cut(x @ rotation), dtype).finalize()
    scaled = learn(xp, factory, stream.rank, stream.cut(4096 * x), dtype).finalize()
    judge = Judge(factory, stream.rank, x, dtype)
    judge.same(plain, scaled)
    judge.keeps_guarantee(plain)
    residual = oracle.residual(judge.c, oracle.host(turned.components) @ rotation.T)
    if judge.guarantee.kind != "statistical":
        assert residual <= (1 + judge.guarantee.excess) * judge.best + judge.noise
    energies = oracle.host(scaled.energies) / 4096**2
    assert np.abs(energies - oracle.host(plain.energies)).max() <= judge.noise


def law_library(xp, factory, stream, dtype):
    """The same seed gives the same subspace on every array library."""
    here = learn(xp, factory, stream.rank, stream.cut(stream.x), dtype).finalize()
    numpy = learn(np, factory, stream.rank, stream.cut(stream.x), dtype).finalize()
    Judge(factory, stream.rank, stream.x, dtype).same(here, numpy)


def law_resume(xp, factory, stream, dtype, path):
    """A state saved in mid-stream, loaded into another library, goes on as if never stopped."""
    batches = stream.cut(stream.x)
    half = len(batches) // 2
    straight = learn(xp, factory, stream.rank, batches, dtype).finalize()
    stopped = learn(xp, factory, stream.rank, batches[:half], dtype)
    save_state(stopped.state_dict(), path)
    resumed = factory(stream.rank).load_state_dict(load_state(path, library=np))
    for batch in batches[half:]:
        resumed.update(np.array(batch, dtype=dtype))
    Judge(factory, stream.rank, stream.x, dtype).same(straight, resumed.finalize())


def law_continuation(xp, factory, stream, dtype):
    """Finalizing is repeatable and does not end learning."""
    batches = stream.cut(stream.x)
    straight = learn(xp, factory, stream.rank, batches, dtype)
    looked = factory(stream.rank)
    for batch in batches:
        looked.update(xp.asarray(np.array(batch, dtype=dtype)))
        if looked.samples:
            looked.finalize()
    judge = Judge(factory, stream.rank, stream.x, dtype)
    judge.same(straight.finalize(), looked.finalize())
    judge.same(straight.finalize(), straight.finalize())


def law_statistical(xp, factory, stream, dtype):
    """On a long stream without drift the residual, merged too, is within the declared excess.

    The first rows may mislead a rule by chance, but not the last ones as well.
    """
    x = stream.x
    judge = Judge(factory, stream.rank, x, dtype)
    bound = (1 + judge.guarantee.excess) * judge.best + judge.noise
    whole, merged = [], []
    for rows in (x, x[::-1]):
        parts = [learn(xp, factory, stream.rank, [part], dtype) for part in np.split(rows, 4)]
        whole.append(learn(xp, factory, stream.rank, [rows], dtype))
        merged.append(parts[0].merge(parts[1]).merge(parts[2].merge(parts[3])))
    for learners in (whole, merged):
        projectors = [learner.finalize() for learner in learners]
        for projector in projectors:
            judge.valid(projector)
        assert min(oracle.residual(judge.c, p.components) for p in projectors) <= bound


#: Laws of every learner on every stream.
LAWS = [
    law_optimality,
    law_partition,
    law_merge,
    law_neutral,
    law_purity,
    law_absence,
    law_weights,
    law_equivariance,
    law_library,
    law_continuation,
]
