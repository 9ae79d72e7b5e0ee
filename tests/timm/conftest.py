from importlib.util import find_spec

import pytest
import torch

# Without timm on the path (see make test-timm), each test file skips with the reason.
if find_spec("timm") is not None:
    import benchmarks.vision  # noqa: F401


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
