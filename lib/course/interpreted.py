"""To be imported before Triton, where answers are tried on a machine with a GPU too:
from now on kernels are interpreted, and what they load and store can be counted."""

import os

os.environ["TRITON_INTERPRET"] = "1"
