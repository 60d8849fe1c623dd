import os

import pytest
import torch

# Small models: more threads are slower, and far slower beside other work.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start


@pytest.fixture(autouse=True)
def the_same_random_numbers_in_any_order():
    torch.manual_seed(0)
