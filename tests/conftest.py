"""Profiles of Hypothesis, the same examples everywhere by default; torch's device and seed."""

import sys

from hypothesis import HealthCheck, settings

# A shared machine makes any deadline a coin toss.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search", deadline=None, derandomize=False, max_examples=1000, print_blob=True
)
# JAX compiles every operation for every new shape: a law takes seconds a case.
settings.register_profile("jax", settings.get_profile("default"), max_examples=4)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--torch-device", help="device of the tensors that torch makes")


def pytest_runtest_setup():
    """Start each test at the same state of torch's random numbers, whatever ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_configure(config):
    device = config.getoption("--torch-device")
    if device is not None:
        import torch

        torch.set_default_device(device)
