"""Each chapter is run once, and shows whether it runs untouched, and on the reader's code
where that passes. tracing.py says how."""

import os

import pytest
import tracing

from lib.course.attempt import NOT_WRITTEN
from lib.course.build import BuildError, chapter_texts, marked_exercises

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

WITHOUT_TRITON = """
import sys, warnings
sys.modules["triton"] = None
# What a warning writes to stderr would fail the chapter.
warnings.showwarning = lambda message, *_: print("a warning:", message)
from lib.measure import columns  # of the table the fastest column is enough
cheap = columns.COLUMNS["training"]
columns.COLUMNS.update(recompute=cheap, contiguous=cheap)
"""


@pytest.mark.parametrize("text", chapter_texts(), ids=lambda path: path.stem)
def test_a_chapter_runs_untouched_and_on_the_readers_code(text):
    is_called, printed = tracing.run(text)
    names = [mark.exercise for mark in marked_exercises(text)]
    assert len(names) >= 5 or text.stem == "10_real_model"  # which has none
    assert is_called == dict.fromkeys(names, True)
    for name in names:
        for line in (f"{name}: {NOT_WRITTEN}", f"{name}: passed"):
            assert printed.splitlines().count(line) == 1, line


def test_chapter_5_runs_without_triton_and_says_what_its_checks_need():
    (text,) = (path for path in chapter_texts() if path.stem == "05_paged_attention")
    is_called, printed = tracing.run(text, WITHOUT_TRITON)
    assert list(is_called.values()) == [True, True, True]
    # Of the stub and of the answer, for each of four kernels.
    assert printed.count("_kernel: needs Triton, which is for Linux") == 8
    assert printed.count("a warning: no Triton here") == 1


START = """# %%
import torch
import torch.nn.functional as F
from lib import generate, sampling, text
from lib.config import LLAMA3_8B, ModelConfig
from lib.course.check import check
from lib.sampling import check_sampling, subtract_largest

# %% exercise="decode"
from lib.text import decode

# %%
check(decode)
"""
MORE = """
# %%
theirs = generate.attention_flops

# %% exercise="attention_flops"
from lib.generate import attention_flops

# %%
check(attention_flops)

# %% exercise="next_token_probs"
from lib.sampling import next_token_probs

# %%
check(next_token_probs)

# %%
print(text.decode(torch.tensor([65])))
theirs(LLAMA3_8B, 1, 2)
check(sampling.next_token_probs)
"""


def test_a_page_that_goes_on_with_the_librarys_code_or_without_any_is_found(tmp_path):
    text = tmp_path / "09_small.py"
    text.write_text(START + MORE)
    is_called, printed = tracing.run(text)
    assert printed.startswith(f"decode: {NOT_WRITTEN}\ndecode: passed\n")
    assert is_called == {
        "decode": True,
        "attention_flops": False,  # but the library's, by another name
        "next_token_probs": False,  # but where it is tried
    }


def test_a_page_that_calls_its_own_stub_is_found(tmp_path):
    text = tmp_path / "09_small.py"
    text.write_text(START + "\n# %%\ndecode(torch.tensor([65]))\n")
    with pytest.raises(BuildError, match="NotImplementedError"):
        tracing.run(text)
