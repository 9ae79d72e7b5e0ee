"""Results do not depend on torch's autocast, inference mode or gradient mode."""

import numpy as np
import pytest

from ipa_core import (
    RandomizedSVD,
    _torch_modes,
    excess_error,
    fit_projector,
    load,
    load_state,
    principal_angles,
    save,
)

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
X = torch.as_tensor((RNG.standard_normal((3000, 64)) / np.arange(1, 65)).astype("float32"))
WEIGHTS = torch.as_tensor(RNG.random(3000).astype("float32"))

MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.fixture(params=MODES)
def mode(request):
    """A mode of torch that is left again after the core's calls."""
    return MODES[request.param]


def learned(factory):
    """Use every method of a learner, in two parts that are merged."""
    parts = [factory(3), factory(3)]
    for learner, rows in zip(parts, (slice(1800), slice(1800, 3000)), strict=True):
        for start in range(0, 1800, 700):
            learner.update(X[rows][start : start + 700], WEIGHTS[rows][start : start + 700])
    merged = parts[0].merge(parts[1]).compact()
    resumed = factory(3).load_state_dict(merged.state_dict()).update(X[:500])
    return resumed


def test_learning_is_the_same_in_every_mode(factory, mode):
    expected = learned(factory).finalize()
    with mode():
        learner = learned(factory)
        projector = learner.finalize()
    assert torch.equal(projector.components, expected.components)
    assert torch.equal(projector.energies, expected.energies)
    assert projector.total_energy == expected.total_energy
    assert torch.equal(
        learner.update(X).finalize().mean, learned(factory).update(X).finalize().mean
    )


def test_projectors_can_be_used_in_training(factory, mode, tmp_path):
    with mode():
        learner = learned(factory)
        projector = learner.finalize()
        save(projector, tmp_path / "p.safetensors")
        projectors = [
            projector,
            projector.to(torch, dtype=torch.float64).to(torch, dtype=torch.float32),
            load(tmp_path / "p.safetensors", library=torch),
        ]
    arrays = [array for array in learner.state_dict().values() if isinstance(array, torch.Tensor)]
    for p in projectors:
        arrays += [p.components, p.mean, p.energies]
        weight = torch.zeros(3, 64, requires_grad=True)
        ((weight + p.components) * X[0]).sum().backward()
        (p.project(X.clone().requires_grad_()).sum()).backward()
        assert weight.grad is not None
    assert not any(array.is_inference() or array.requires_grad for array in arrays)


def test_metrics_are_the_same_in_every_mode(mode):
    first, second = fit_projector(X, 4), fit_projector(X[:100], 3)

    def metrics():
        return (
            excess_error(second, X),
            first.reconstruction_error(X, WEIGHTS),
            first.captured(2),
            principal_angles(first, second).tolist(),
            first.project(X).tolist(),
            first.reconstruct(first.project(X)).tolist(),
        )

    expected = metrics()
    with mode():
        assert metrics() == expected


def test_states_loaded_in_inference_mode_go_on(factory, tmp_path):
    from ipa_core import save_state

    save_state(learned(factory).state_dict(), tmp_path / "s.safetensors")
    with torch.inference_mode():
        state = load_state(tmp_path / "s.safetensors", library=torch)
    learner = factory(3).load_state_dict(state).update(X)
    assert not learner.finalize().components.is_inference()


def test_an_update_in_two_halves_across_a_mode(factory, mode):
    expected = factory(3).update(X).update(X).finalize()
    learner = factory(3).update(X)
    with mode():
        pending = learner.begin_update(X)
    pending.finish()
    assert torch.equal(learner.finalize().components, expected.components)


def test_projecting_keeps_gradients():
    projector = fit_projector(X, 4)
    x = X.clone().requires_grad_()
    projector.reconstruct(projector.project(x)).square().sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_error_at_the_beginning_of_an_update_leaves_autograd_on(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_torch_modes, "no_autocast", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RandomizedSVD(2).update(torch.ones(4, 8))
    assert torch.is_grad_enabled()
