"""Tests of the number of threads of small decompositions."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ipa_core import RandomizedSVD, _threads

pytest.importorskip("threadpoolctl")


BLAS = _threads._blas().lib_controllers[0]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    was = BLAS.get_num_threads()
    BLAS.set_num_threads(2)
    yield
    BLAS.set_num_threads(was)
    torch.set_num_threads(before)


NUMPY = (lambda *shape: np.broadcast_to(np.float32(1), shape), BLAS.get_num_threads)
TORCH = (lambda *shape: torch.ones(()).expand(shape), torch.get_num_threads)


@pytest.mark.parametrize(("ones", "threads"), [NUMPY, TORCH], ids=["numpy", "torch"])
def test_small_matrices_have_one_thread_and_large_ones_all(ones, threads):
    inside = _threads.on_one_thread(lambda xp, matrix: threads())
    assert inside(None, ones(1536, 48)) == 1
    assert inside(None, ones(2000, 2000)) == 2
    assert threads() == 2


@pytest.mark.parametrize("matrix", [np.eye(3), torch.eye(3)], ids=["numpy", "torch"])
def test_threads_are_restored_after_an_error(matrix):
    @_threads.on_one_thread
    def fail(xp, matrix):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(None, matrix)
    assert BLAS.get_num_threads() == 2 and torch.get_num_threads() == 2


def test_threads_of_a_program_do_not_leave_the_limit_behind():
    @_threads.on_one_thread
    def compute(xp, matrix):
        return np.linalg.eigvalsh(matrix).sum()

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(compute, None, np.eye(30)) for _ in range(200)]
        assert {run.result() for run in runs} == {30.0}
    assert BLAS.get_num_threads() == 2


def test_without_threadpoolctl_the_number_stays(monkeypatch):
    monkeypatch.setattr(_threads, "_blas", lambda: None)
    assert _threads.on_one_thread(lambda xp, matrix: BLAS.get_num_threads())(None, np.eye(3)) == 2


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_learner_leaves_the_number_of_threads_as_it_was(library):
    x = np.random.default_rng(0).standard_normal((2000, 200)).astype(np.float32)
    rows = x if library == "numpy" else torch.from_numpy(x)
    RandomizedSVD(rank=4).update(rows).finalize()
    assert BLAS.get_num_threads() == 2 and torch.get_num_threads() == 2
