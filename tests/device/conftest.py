import os

import pytest
import torch

# On a GPU, two: what is written for the current one alone fails on the other.
DEVICES = {"cpu": ["cpu"], "cuda": ["cuda:0", "cuda:1"]}


@pytest.fixture(params=DEVICES[os.environ.get("TEST_DEVICE", "cpu")])
def device(request) -> torch.device:
    """Where a test runs: TEST_DEVICE says cpu, where kernels are interpreted, or cuda."""
    device = torch.device(request.param)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        pytest.skip(f"needs a GPU {device}")
    return device
