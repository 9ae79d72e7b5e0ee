import pytest
import torch

from . import models


def pytest_configure(config):
    # PEFT looks for the base model's configuration, which a random model does not have on disk.
    config.addinivalue_line("filterwarnings", "ignore:Could not find a config file:UserWarning")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["bert", "llama", "gpt2"])
def family(request):
    """Return the name of a tiny random model for `models.make`."""
    return request.param


@pytest.fixture
def llama():
    return models.make("llama")


@pytest.fixture
def batches():
    return models.text_batches()
