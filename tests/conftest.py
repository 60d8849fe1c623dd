import pytest
import torch

torch.set_num_threads(1)  # small models: more is slower, and far slower beside other work


@pytest.fixture(autouse=True)
def the_same_random_numbers_in_any_order():
    torch.manual_seed(0)
