import copy
import functools
import importlib
import inspect
import pkgutil

import answers
import pytest
import torch
from answers import RIGHT, WRONG

import lib.course.check as check
from lib.course.compare import is_same
from lib.course.exercises import exercises, library_answer
from lib.interpreter import HAS_TRITON

for module in pkgutil.iter_modules(answers.__path__):
    importlib.import_module(f"answers.{module.name}")

pytestmark = pytest.mark.usefixtures("warm_compiler")

SEEDS = [0, 1, 2]
NIGHTLY_SEEDS = pytest.param(range(1, 23), marks=pytest.mark.nightly, id="nightly")


NAMES = [
    name for name, exercise in exercises().items() if HAS_TRITON or not exercise.is_kernel
]


def pairs(table):
    return [
        pytest.param(name, *(answer if isinstance(answer, tuple) else (answer,)))
        for name in NAMES
        for answer in table[name]
    ]


def in_ci(name, seeds):
    """Of a kernel a seed takes seconds: one is a sample, but for the nightly run."""
    return seeds[:1] if exercises()[name].is_kernel and seeds is SEEDS else seeds


@functools.cache
def expected_by_case(name, seed):
    """What the library gives, which many answers are compared with."""
    exercise = exercises()[name]
    return [(case.inputs, give(exercise, case)) for case in exercise.cases(seed)]


give = check.expected_outputs


def judge(name, answer, seed, monkeypatch):
    """The check's result, with what the library gives looked up; slowness has tests of
    its own."""
    expected = expected_by_case(name, seed)  # here, before a kernel is tried in a fork

    def look_up(exercise, case):
        return next(o for inputs, o in expected if is_same(inputs, case.inputs))

    monkeypatch.setattr(check, "expected_outputs", look_up)
    monkeypatch.setattr(check, "_slowdown", lambda *_: 1.0)
    return check.judge(exercises()[name], answer, seed)


def identify(value):
    is_answer = inspect.isfunction(value) or hasattr(value, "arg_names")
    return value.__name__ if is_answer else str(value)


@pytest.mark.parametrize("name", exercises())
def test_there_are_enough_answers_to_try_a_check_with(name):
    assert len(WRONG[name]) >= 4 and len(RIGHT[name]) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_library_passes_its_own_checks(name, monkeypatch):
    for seed in in_ci(name, SEEDS):
        result = judge(name, library_answer(name), seed, monkeypatch)
        assert result.message == "passed"


@pytest.mark.parametrize("seeds", [SEEDS, NIGHTLY_SEEDS])
@pytest.mark.parametrize("name, answer", pairs(RIGHT), ids=identify)
def test_answers_written_differently_pass(name, answer, seeds, monkeypatch):
    for seed in in_ci(name, seeds):
        result = judge(name, answer, seed, monkeypatch)
        assert result.passed, f"seed {seed}: {result.message}"


@pytest.mark.parametrize("seeds", [SEEDS, NIGHTLY_SEEDS])
@pytest.mark.parametrize("name, answer, says", pairs(WRONG), ids=identify)
def test_wrong_answers_fail_and_are_told_why(name, answer, says, seeds, monkeypatch):
    for seed in in_ci(name, seeds):
        result = judge(name, answer, seed, monkeypatch)
        assert not result.passed, f"seed {seed}: passed"
        assert "\n" not in result.message and says in result.message, result.message


class LookedError(Exception):
    """What is around a call of an answer."""


def around_the_call(name, case):
    """The variables that an answer finds in the frames of its driver and of who calls
    that, the inputs of the case among them."""

    def answer(*args, **kwargs):
        found, frame = {}, inspect.currentframe().f_back
        while frame.f_code is not around_the_call.__code__:
            found.update(frame.f_locals)
            frame = frame.f_back
        raise LookedError(found)

    inputs = copy.deepcopy(case.inputs)
    with pytest.raises(LookedError) as looked:
        exercises()[name].driver()(answer, **inputs)
    return {**inputs, **looked.value.args[0]}


REFUSE = ["generate_recompute", "accumulate_gradients", "generate_cached"]


@pytest.mark.parametrize("name", REFUSE)
def test_nothing_around_a_call_says_whether_it_is_to_be_refused(name):
    told, refused = {}, []
    for case in exercises()[name].cases(0):
        outputs = check.expected_outputs(exercises()[name], case)
        refused.append(outputs["raised"] != "nothing")
        for variable, value in around_the_call(name, case).items():
            if value is None or isinstance(value, (bool, int, list, tuple)):
                told.setdefault(variable, []).append(bool(value))
    assert (
        any(refused) and not all(refused) and "num_new_tokens" in told or "seed" in told
    )
    assert [variable for variable, values in told.items() if values == refused] == []


def test_nothing_around_a_call_says_what_is_expected():
    for name in ("generate_recompute", "generate_cached"):
        for case in exercises()[name].cases(0):
            if not case.inputs["behind"]:
                continue
            outputs = check.expected_outputs(exercises()[name], case)
            text = outputs["token_ids"] if "token_ids" in outputs else outputs["texts"][0]
            text = text[0] if isinstance(text[0], list) else text
            new = f"{text[3:]}".strip("[]")  # behind "sea"
            assert new not in f"{[*around_the_call(name, case).values()]}"
    for case in exercises()["accumulate_gradients"].cases(0):
        values = around_the_call("accumulate_gradients", case).values()
        numbers = [x for value in values if isinstance(value, list) for x in value]
        assert not any(torch.is_tensor(number) and not number.dim() for number in numbers)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name, answer",
    [
        pytest.param(name, answer, id=f"{name}-{identify(answer)}")
        for name in NAMES
        if exercises()[name].is_kernel
        for answer in [*RIGHT[name], *(answer for answer, _ in WRONG[name])]
    ],
)
def test_where_kernels_are_compiled_they_are_told_the_same(name, answer, monkeypatch):
    expected = judge(name, answer, 0, monkeypatch).message
    monkeypatch.setattr("lib.interpreter.IS_INTERPRETED", False)
    assert check.judge(exercises()[name], answer, 0).message == expected


# A cause that these answers do not have, though the numbers look a little like it.
NOT_THE_CAUSE = [
    ("decode", "latin_1_where_utf_8_fails", "A byte is not a character"),
    ("decode", "a_mark_for_each_broken_byte", "Decode all bytes together"),
    ("decode", "one_mark_for_many", "not vanish"),
    ("decode", "words_alone", "White space at its ends"),
    ("attend_causal", "always_in_single_precision", "neighbours share"),
    ("attend_causal", "always_in_single_precision", "Divide"),
    ("attend_causal", "a_batch_as_one_text", "mask"),
    ("attend_causal", "softmax_of_integers", "not written yet"),
    ("next_token_probs", "one_too_few_of_top_k", "top_p"),
    ("next_token_probs", "temperature_squared", "Divide the logits"),
    ("next_token_probs", "larger_ids_first", "order of the vocabulary"),
    ("next_token_probs", "one_row_only", "order of the vocabulary"),
    ("next_token_probs", "one_largest_logit_for_all_rows", "order of the vocabulary"),
    ("next_token_probs", "nothing_kept_is_not_divided", "sum to 1 again"),
    ("next_token_probs", "cube_of_the_logits", "Divide the logits"),
    ("generate_recompute", "row_before_the_last", "all of the text"),
    ("generate_recompute", "row_before_the_last", "all three settings"),
    ("generate_recompute", "one_largest_for_all_rows", "all of the text"),
    ("generate_recompute", "rows_that_end_are_padded", "exactly num_new_tokens"),
    ("generate_recompute", "one_too_few", "no byte ends a text"),
    ("generate_recompute", "temperature_twice", "all three settings"),
    ("generate_recompute", "dice_of_its_own", "all three settings"),
    ("generate_recompute", "torch_seeded_without_a_generator", "hand None on"),
    ("attention_flops", "no_more_than_fit", "T goes from"),
    ("attention_flops", "squares_in_32_bits_of_numpy", "Two products"),
    ("training_bytes", "keys_for_every_head", "the block's own input"),
    ("accumulate_gradients", "parts_of_one_size", "weigh it by the part's share"),
    ("checkpoint", "still_in_the_old_graph", "with grad_out as its gradient"),
    ("checkpoint", "random_state_forgotten", "with grad_out as its gradient"),
    ("kv_cache_bytes", "counted_twice", "whatever the default is"),
    ("kv_cache_bytes", "without_head_dim", "a key and a value"),
    ("kv_cache_bytes", "default_of_one", "numbers, not bytes"),
    ("kv_cache_bytes", "keys_alone", "is not given"),
    ("append_kv", "rounded_to_half", "the tokens are others'"),
    ("append_kv", "heads_in_reverse", "the tokens are others'"),
    ("append_kv", "values_alone", "Nothing was written"),
    ("append_kv", "values_alone", "Keys go to"),
    ("append_kv", "the_rest_is_cleared", "seq_lens"),
    ("append_kv", "in_double_precision", "copies the cache"),
    ("attend_cached", "cache_in_single_precision", "a copy of the keys"),
    ("attend_cached", "noisy", "mixed up"),
    ("attend_cached", "does_not_see_itself", "keys was read"),
    ("attend_cached", "one_query_each", "later positions"),
    ("generate_cached", "logits_turned_around", "where do its rows end"),
    ("generate_cached", "one_draw_for_all", "where do its rows end"),
    ("generate_cached", "an_empty_cache_first", "where do its rows end"),
    ("generate_cached", "greedy_for_the_first_row_alone", "where do its rows end"),
    ("generate_cached", "logits_halved", "all three settings"),
    ("generate_cached", "generator_seeded_again", "all three settings"),
    ("generate_cached", "torch_seeded_where_no_generator_is", "all three settings"),
    ("generate_cached", "torch_seeded_first", "Draw with"),
    ("generate_cached", "one_too_few", "no byte ends a text"),
    ("generate_cached", "a_text_that_ends_is_filled_up", "exactly num_new_tokens"),
    ("generate_cached", "prompts_one_by_one", "new ones alone"),
    ("generate_cached", "all_but_the_last_token_first", "All requests"),
    ("generate_cached", "in_chunks_of_four", "All requests"),
    ("generate_cached", "dice_of_its_own_for_a_batch", "draws tokens of its own"),
    ("kv_utilization", "never_more_than_half", "reserved"),
    ("kv_utilization", "no_number", "A share"),
    ("allocate", "allocate_some_tokens_or_refuse", "enough free blocks"),
    ("allocate", "allocate_counting_what_is_missing", "before any is taken"),
    ("allocate", "allocate_with_a_value_error", "enough free blocks"),
    ("append", "append_one_block_at_most", "filled in part"),
    ("append", "append_into_new_blocks_alone", "needed counts the copy too"),
    ("append", "append_as_many_as_needed", "not before"),
    ("append", "append_without_counting_tokens", "no number is given"),
    ("append", "append_copying_before_it_counts", "Others use the last block"),
    ("free", "free_all_who_share", "A request that has ended"),
    ("free", "free_keeping_the_table", "The other requests"),
    ("slot_mapping", "three_slots_too_early", "behind the end"),
    ("slot_mapping", "three_slots_too_early", "position % block_size"),
    ("slot_mapping", "position_beside_the_block", "last ones"),
    ("slot_mapping", "slots_in_single_precision", "int64"),
    ("slot_mapping", "slots_in_single_precision", "in its own row"),
    ("gather_kv", "gather_the_last_first", "order of the table"),
    ("gather_kv", "gather_negative_values", "Values come from"),
    ("gather_kv", "gather_full_blocks_alone", "one dimension"),
    ("gather_kv", "gather_a_view_of_one_block", "not the pool"),
    ("gather_kv", "gather_all_and_cut", "not the pool"),
    ("paged_utilization", "share_that_is_never_small", "places"),
    ("paged_utilization", "share_with_a_block_for_all", "needs no other"),
    ("fork", "fork_of_full_blocks", "copy of the list"),
    ("fork", "fork_the_other_way_round", "copy of the list"),
    ("fork", "fork_the_other_way_round", "Others use"),
    ("copy_on_write", "copy_in_every_table", "Others use the last block"),
    ("copy_on_write", "copy_the_first_block", "last entry"),
    ("copy_on_write", "copy_the_first_block", "Others use the last block"),
    ("checkpoint_recursive", "second_half_first", "the `attend` that you were given"),
    ("checkpoint_recursive", "all_kept", "Only the first half"),
    ("checkpoint_selective", "the_last_gradient_alone", "computed again"),
    ("attend_online", "attend_online_noisy", "rescale both"),
    ("attend_online", "attend_online_noisy", "Tiles do not weigh"),
    ("attend_online", "attend_online_last_tile", "rescale both"),
    ("attend_online", "attend_online_with_math", "q is scaled already"),
    ("attend_online", "attend_online_without_rescaling_the_sum", "acc is not"),
    ("attend_online", "attend_online_with_nan_for_a_tile_without_keys", "divide by"),
    ("merge_splits", "merge_splits_noisy", "Divide by the sum"),
    ("merge_splits", "merge_splits_noisy", "Parts do not weigh"),
    ("merge_splits", "merge_splits_noisy", "of its own"),
    ("merge_splits", "merge_splits_with_one_maximum", "the weights"),
    ("bytes_moved", "bytes_moved_and_the_table", "a key and a value"),
    ("bytes_moved", "bytes_moved_and_the_table", "outputs"),
    ("bytes_moved", "bytes_moved_with_one_query", "outputs are written"),
    ("blocks_to_keep", "work_forgotten", "One can always be kept"),
    ("quantize", "quantize_noisy", "size of one step"),
    ("quantize", "quantize_noisy", "2^bits - 1"),
    ("quantize", "quantize_every_code_one_higher", "2^bits - 1"),
    ("quantize", "quantize_every_code_one_higher", "smallest number"),
    ("quantize", "quantize_rounding_in_half_precision", "round"),
    ("quantize", "quantize_with_a_least_scale", "smallest number"),
    ("quantize", "quantize_giving_scale_1_to_equal_numbers", "size of one step"),
    ("dequantize", "dequantize_noisy", "size of one step"),
    ("dequantize", "dequantize_two_to_a_byte_always", "mask"),
    ("dequantize", "dequantize_two_to_a_byte_always", "flatten"),
    ("attend_latent", "attend_latent_noisy", "root of D"),
    ("attend_latent", "attend_latent_noisy", "v_basis"),
    ("attend_latent", "attend_latent_with_an_orthonormal_basis", "v_basis"),
    ("attend_latent", "attend_latent_with_codes_for_each_head", "keys or values"),
    ("attend_latent", "attend_latent_in_tiles_of_16_keys", "room for"),
    ("next_token_probs", "as_half_as_the_logits", "those that came in"),
    ("next_token_loss", "last_id_taken_for_padding", "exp overflows"),
    ("training_bytes", "nothing_for_the_optimizer", "two"),
    ("accumulate_gradients", "divided_in_the_end", "are added to"),
    ("checkpoint", "backward_twice", "grad_out"),
    ("best_num_segments", "equal_segments_alone", "√L"),
    ("checkpoint_recursive", "layer_0_for_all", "runs once"),
    ("checkpoint_recursive", "x_taken_out_of_the_graph", "halve"),
    ("checkpoint_selective", "rows_of_the_input", "computed again"),
    ("append", "append_without_saying_what_was_copied", "still the source"),
    ("merge_splits", "merge_splits_keeping_a_dimension", "that of the parts'"),
    ("merge_splits", "merge_splits_with_a_very_small_logsumexp", "that of the parts'"),
    ("bytes_moved", "bytes_moved_of_those_with_keys", "outputs are written"),
    ("bytes_per_token", "a_byte_per_code", "divide by 8"),
    ("bytes_per_token", "codes_alone", "of its own"),
    ("bytes_per_token", "ranks_before_bits_of_one", "nothing stands beside"),
    ("pool_kv_heads", "in_single", "mean"),
    ("pool_kv_heads", "pairs_again_and_again", "divides by"),
    ("rank_for", "almost_the_share", "Exactly the share"),
    ("rank_for", "sums_in_half_precision", "index"),
    ("rank_for", "refuses_zeros", "zeros add nothing"),
    ("factorize", "by_random_svd", "Compute in"),
    ("factorize", "few_power_iterations", "Compute in"),
    ("factorize", "first_numbers", "rows of Vh"),
    ("keep_recent", "short_texts_without_what_is_between", "No token twice"),
    ("attention_received", "received_in_half", "not divided"),
    ("attention_received", "sum_over_the_group", "divides by its size"),
    ("snap_scores", "snap_in_steps_of_width", "no token loses"),
    ("snap_scores", "snap_by_sum_over_heads", "neighbours, not their sum"),
    ("snap_scores", "snap_across_heads", "leave them out"),
    ("evict_tokens", "evict_with_scores_of_one", "[-0:]"),
    ("evict_tokens", "evict_and_rotate_again", "order of `kept`"),
    ("evict_tokens", "evict_other_values_than_keys", "moved, not computed"),
    ("pyramid_budgets", "pyramid_with_the_rest_to_the_last", "1 / beta"),
    ("spread_budgets", "spread_with_ties_to_the_later", "lost most"),
    ("spread_budgets", "spread_by_divisors", "as large as the need"),
    ("blocks_freed", "freed_by_the_mean_head", "begun"),
    ("blocks_freed", "freed_of_each_head", "not when one of them"),
    ("linear_step", "step_noisy", "not faded yet"),
    ("linear_step", "step_with_noise_in_the_answer", "a token sees itself"),
    ("linear_step", "step_in_single_precision", "decay of its own"),
    ("linear_step", "step_with_heads_permuted", "neighbours share"),
    ("decay_mask", "mask_noisy", "s <= t"),
    ("decay_mask", "mask_of_the_logarithm_in_half", "as many times"),
    ("decay_mask", "mask_with_negative_powers", "∞ times 0"),
    ("decay_mask", "mask_for_a_softmax", "0 / 0"),
    ("linear_parallel", "parallel_noisy", "root of D"),
    ("linear_parallel", "parallel_flattened_the_other_way", "neighbours share"),
    ("linear_parallel", "parallel_with_view", "gradients are not"),
    ("linear_chunked", "chunked_noisy", "fades n times"),
    ("linear_chunked", "chunked_with_noise_in_the_answer", "what it says to each"),
    ("linear_chunked", "chunked_always_by_64", "all tokens with all"),
    ("linear_chunked", "chunked_reading_the_whole_past", "a state for each token"),
    ("linear_chunked", "chunked_without_gradients", "as it was"),
    ("delta_step", "delta_noisy", "not written again"),
    ("delta_step", "delta_said_by_the_query", "its own key"),
    ("state_bytes", "bytes_of_one_layer", "KV head"),
    ("state_bytes", "bytes_always_four", "numbers, not bytes"),
]
if HAS_TRITON:
    NOT_THE_CAUSE += [
        ("load_row_kernel", "load_row_zero", "x_stride"),
        ("load_row_kernel", "load_row_noisy", "x_stride"),
        ("load_row_kernel", "load_row_noisy", "`other`"),
        ("load_row_kernel", "load_row_from_nowhere", "int64"),
        ("gather_kernel", "gather_one_number_a_token", "Look up the block"),
        ("gather_kernel", "gather_noisy", "Look up the block"),
        ("gather_kernel", "gather_noisy", "A token has a place"),
        ("paged_decode_kernel", "paged_decode_kernel_noisy", "rescale both"),
        (
            "paged_decode_kernel",
            "paged_decode_kernel_every_share_reads_all",
            "rescale both",
        ),
        (
            "paged_decode_kernel",
            "paged_decode_kernel_rescaled_by_exp_weighed_by_exp2",
            "Store each",
        ),
        ("paged_decode_kernel", "paged_decode_kernel_no_other_for_k", "rescal"),
        ("paged_decode_kernel", "paged_decode_kernel_v_unmasked", "rescal"),
        ("paged_decode_kernel", "paged_decode_kernel_noisy", "NaN"),
        ("paged_decode_kernel", "paged_decode_kernel_noisy", "scale_log2_e"),
        ("paged_prefill_kernel", "paged_prefill_kernel_noisy", "scale_log2_e"),
        ("paged_prefill_kernel", "paged_prefill_kernel_noisy", "mask of its own"),
        ("paged_prefill_kernel", "paged_prefill_kernel_its_own_scale", "scale_log2_e"),
        ("paged_prefill_kernel", "paged_prefill_kernel_rows_of_decoding", "begins at"),
        ("paged_prefill_kernel", "paged_prefill_kernel_end_at_seq_len", "no row"),
        ("paged_prefill_kernel", "paged_prefill_kernel_any_row", "seen by nobody"),
    ]


@pytest.mark.parametrize("name, answer, words", NOT_THE_CAUSE)
def test_a_wrong_answer_is_not_told_a_cause_that_it_does_not_have(
    name, answer, words, monkeypatch
):
    (function,) = (wrong for wrong, _ in WRONG[name] if wrong.__name__ == answer)
    for seed in in_ci(name, SEEDS):
        result = judge(name, function, seed, monkeypatch)
        assert not result.passed and words not in result.message, result.message
