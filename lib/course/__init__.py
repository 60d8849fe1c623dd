"""How the course is taught: everything that is not taught itself."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder of the course

# The environment of a process that sees no GPU, NVIDIA's or AMD's, and so interprets
# kernels.
WITHOUT_GPU = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "TRITON_INTERPRET": "1",
}
