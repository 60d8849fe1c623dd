"""One small language model, and every place where its keys and values can live.

The letters, used in every docstring and every shape comment of this package:

    B  sequences             H  query heads             L  layers
    T  query tokens          G  key/value heads         V  vocabulary
    S  key/value tokens      D  head_dim                N  tokens of a flat ragged batch
    C  d_model               F  d_ff                    M  block-table width

Activations are (B, T, C); q is (B, T, H, D); k and v are (B, S, G, D); scores are
(B, H, T, S). Tokens come before heads on purpose: a paged cache then changes the index
and nothing else.

Triton decides when it is first imported whether its kernels are compiled or interpreted,
and parts of torch import it. So the decision is made here, before anything else of this
package runs: without a GPU that they are compiled for they are interpreted.
"""

import os
import sys

import torch


def has_gpu_for_kernels() -> bool:
    """Whether there is a GPU that kernels run well on: AMD's, or NVIDIA's of compute
    capability 8.0 (A100) or more. For a T4, 7.5, Triton uses no tensor cores, and
    registers spill."""
    if not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)


if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):
    os.environ["TRITON_INTERPRET"] = "1"  # of what Triton takes for yes, one from here on
# Once Triton is there it has decided, and `check_interpreter` says so.
if not has_gpu_for_kernels() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
