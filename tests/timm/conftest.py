from importlib.util import find_spec

import pytest
import torch

# Where timm is not on the path (make test-timm puts it there), each test file skips and says so.
if find_spec("timm") is not None:
    import benchmarks.vision  # noqa: F401


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
