"""Chapter 2: what its exercises are tried on."""

import math

import numpy as np
import torch.utils.checkpoint

from lib.course.cases.ch01 import _reproduced
from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference

RANDOM = 6000  # bytes of a random state of torch, and some more
# Of the drivers' blocks: an edge x, (2, 8, 32) in float64, and what autograd keeps in a
# block, in edges: 4, and one more for a mask of dropout.
EDGE = 2 * 8 * 32 * 8
INSIDE = 5
# The public one, and what others in torch that call a function again are made of; the
# last is of torch 2.15.
TORCHS_CHECKPOINTS = tuple(
    f"torch.utils.checkpoint.{name}"
    for name in (
        *("checkpoint", "CheckpointFunction.forward"),
        "_checkpoint_without_reentrant_generator",
        "_checkpoint_without_reentrant_generator_impl",
    )
    if hasattr(torch.utils.checkpoint, name.partition(".")[0])
)
ORDER = "Gradients come in the order of forward's inputs, each of its input's shape"


def next_token_loss_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, shape in (
        ("two tokens", (1, 2, 3)),
        ("three tokens of two", (1, 3, 2)),
        ("a batch of three", (3, 5, 7)),
        ("a longer batch", (4, 33, 19)),
    ):
        logits = 2 * rng.normal(size=shape)
        token_ids = rng.integers(0, shape[-1], size=shape[:-1])
        # Equal tokens would hide a shift by one.
        token_ids[:, 1] = (token_ids[:, 0] + 1) % shape[-1]
        if shape[1] > 3:  # no id is left out, neither the first nor the last
            token_ids[0, -2:] = 0, shape[-1] - 1
        cases.append(Case(name, {"logits": logits, "token_ids": token_ids}))
    huge = {"logits": 1e3 * rng.normal(size=(1, 4, 5)), "token_ids": np.arange(4)[None]}
    alone = {"logits": rng.normal(size=(2, 1, 3)), "token_ids": np.array([[0], [2]])}
    name = "passages of one token, in which there is nothing to predict"
    return [*cases, Case("huge logits", huge), Case(name, alone)]


@reference
def _other_losses(logits: np.ndarray, token_ids: np.ndarray) -> tuple[float, dict]:
    """What comes of exp without care, and of each slip."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def mean_loss(rows: np.ndarray, targets: np.ndarray) -> float:
        return -np.take_along_axis(rows, targets[..., None], axis=-1).mean()

    targets = token_ids[:, 1:]
    with np.errstate(all="ignore"):
        rows = np.log(np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True))
        overflown = mean_loss(rows[:, :-1], targets)
    probs = np.exp(log_probs)
    flat = logits.reshape(-1, logits.shape[-1])[:-1]
    flat = flat - np.log(np.exp(flat - flat.max()).sum(-1, keepdims=True)) - flat.max()
    words = {
        "The mean is over B * (T - 1) predictions": mean_loss(log_probs[:, :-1], targets)
        * (targets.size / token_ids.size),
        "Give cross_entropy logits: it does the softmax itself": mean_loss(
            (probs - np.log(np.exp(probs).sum(-1, keepdims=True)))[:, :-1], targets
        ),
        "The last row of a passage must not predict the next passage": mean_loss(
            flat, token_ids.reshape(-1)[1:]
        ),
        "Row t predicts token t + 1: leave out the first target": mean_loss(
            log_probs[:, :-1], token_ids[:, :-1]
        ),
        "Row t predicts token t + 1: compare it with that one": mean_loss(
            log_probs, token_ids
        ),
        "Row t predicts token t + 1, not t - 1": mean_loss(
            log_probs[:, 1:], token_ids[:, :-1]
        ),
        "The last row predicts nothing that is there: leave it out": mean_loss(
            log_probs, np.roll(token_ids, -1, axis=1)
        ),
        "The mean, not the sum": mean_loss(log_probs[:, :-1], targets) * targets.size,
        "Minus the logarithm: a loss is not negative": -mean_loss(
            log_probs[:, :-1], targets
        ),
        "That is in bits: take the natural logarithm": mean_loss(
            log_probs[:, :-1], targets
        )
        / np.log(2),
    }
    return overflown, words


def next_token_loss_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if isinstance(expected["loss"], str):
        return "Keep the given lines: they refuse this"
    if not isinstance(got["loss"], np.ndarray):
        return None
    if got["loss"].shape:
        return "Return one number, the mean over all predictions"
    if isinstance(got["gradient"], str):
        return "The loss has to be part of the graph, or nothing can be learned from it"
    overflown, words = _other_losses(inputs["logits"], inputs["token_ids"])
    if not np.isfinite(overflown) and not np.isfinite(got["loss"]):
        return "exp overflows: use a function made for logits"
    right = expected["loss"]
    return _reproduced(
        {
            text: np.isclose(got["loss"], loss) and not np.isclose(right, loss)
            for text, loss in words.items()
        }
    )


def training_bytes_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    shapes = [
        ("one layer, one token", 1, 3, 1, 2, 5, 1, 1),
        ("two layers", 2, 2, 1, 2, 3, 1, 1),
        ("four query heads on two KV heads", 1, 4, 2, 4, 5, 1, 3),
        ("a batch of three", 1, 2, 1, 4, 6, 3, 5),
    ]
    H = int(rng.integers(2, 5))
    random_sizes = [int(n) for n in rng.integers(2, 9, size=5)]
    L, D, F, B, T = random_sizes
    shapes.append(("a random shape", L, H, 1, 2 * D, F, B, T))
    shapes.append(("a large batch of long texts", 4, 4, 2, 16, 192, 64, 4096))
    cases = []
    for name, L, H, G, D, F, B, T in shapes:
        config = {
            "vocab_size": 11 + L,
            "num_layers": L,
            "num_heads": H,
            "num_kv_heads": G,
            "d_model": H * D,
            "d_ff": F,
            "max_seq_len": 4096,
        }
        cases.append(Case(name, {"config": config, "batch_size": B, "seq_len": T}))
    first = cases[1].inputs
    with_dropout = {**first, "config": {**first["config"], "dropout": 0.1}}
    name = "a model with dropout, whose masks are not asked for"
    return [*cases, Case(name, with_dropout)]


def training_bytes_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    for kind in expected:
        if not isinstance(got.get(kind), int):
            return "Give whole numbers, in a dict with those four keys"
    config, missing = inputs["config"], {k: expected[k] - got[k] for k in expected}
    C, L, V = config["d_model"], config["num_layers"], config["vocab_size"]
    B, T = inputs["batch_size"], inputs["seq_len"]
    D = C // config["num_heads"]
    wrong = next((kind for kind in expected if missing[kind]), None)
    per_token = missing["activations"] / (4 * L * B * T)
    is_vector = missing["activations"] == 4 * L * C * B * T
    found = {
        "A float32 has 4 bytes": wrong and got[wrong] * 4 == expected[wrong],
        "Embedding and unembedding are two matrices": missing["weights"] == 4 * V * C,
        "A norm has C gains: there are two norms per block, and one at the end": missing[
            "weights"
        ]
        == 4 * C * (2 * L + 1),
        "Gradients are as large as the weights": wrong == "gradients",
        "AdamW keeps two numbers per parameter": wrong == "optimizer"
        and got["optimizer"] * 2 == expected["optimizer"],
        "That is one layer's activations": wrong == "activations"
        and got["activations"] * L == expected["activations"],
        "Sines and cosines depend on the position alone: all sequences share them": wrong
        == "activations"
        and missing["activations"] == -4 * L * 2 * D * (B - 1) * T,
        "One vector of C per token and layer is missing": wrong == "activations"
        and is_vector,
    }
    if any(found.values()):
        return _reproduced(found)
    if wrong == "activations" and per_token == round(per_token):
        much = "few" if per_token > 0 else "many"
        return f"That is {abs(round(per_token))} floats per token and layer too {much}"
    return None


def accumulate_gradients_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, batch_size, num_parts, has_gradients in (
        ("two passages in one part", 2, 1, False),
        ("two passages in two parts", 2, 2, False),
        ("gradients that are there already", 2, 2, True),
        ("three passages in two parts", 3, 2, False),
        ("twelve passages in four parts", 12, 4, False),
        ("seven passages in three parts", 7, 3, True),
        ("more parts than passages", 2, 3, False),
    ):
        inputs = {
            "seed": int(rng.integers(1000)),
            "token_ids": rng.integers(0, 32, size=(batch_size, 6)).tolist(),
            "num_parts": num_parts,
            "has_gradients": has_gradients,
        }
        passages = math.ceil(batch_size / num_parts)
        # The library's answer keeps 16,120 bytes for one passage, 15,424 for each more.
        limits = {
            "bytes_kept_for_the_backward_pass": 16_500 * passages + 3_000,
            "forward_calls": num_parts,
        }
        cases.append(Case(name, inputs, limits))
    return cases


def accumulate_gradients_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return "Keep the given lines: they refuse this before the first part"
    num_parts, ours = inputs["num_parts"], expected["gradients"][0]
    if isinstance(got["loss"], str):
        return "Return the loss as a number: `.item()`"
    if not got["weights_are_as_before"]:
        return "Add to the gradients, and leave the weights alone"
    if not got["model_is_in_training_mode_as_before"]:
        return "Leave the model in the mode in which it came"
    if _is_one_missing(got["gradients"]):
        return "A parameter got no gradient"
    theirs = got["gradients"][0]
    if inputs["has_gradients"] and np.allclose(theirs + 1, ours):
        return "Gradients that are there already stay: they are added to"
    if (
        num_parts > 1
        and not inputs["has_gradients"]
        and np.allclose(theirs, num_parts * ours)
    ):
        return "The loss of a part is a mean over it: weigh it by the part's share"
    of_equals = got["loss if each part counted the same"]
    if not np.isclose(of_equals, expected["loss"]) and np.isclose(got["loss"], of_equals):
        return "Parts may differ in size: each passage has to count the same"
    # Nothing is wrong but what it keeps.
    is_right = np.isclose(got["loss"], expected["loss"]) and np.allclose(theirs, ours)
    key = "bytes_kept_for_the_backward_pass"
    if is_right and got[key] > 1.5 * expected[key]:
        if got["forward_calls"] == num_parts:
            return (
                "Several parts are kept at once: go backward before the next one begins"
            )
        if got["forward_calls"] == 1:
            return "The whole batch went through the model at once"
    return None


def checkpoint_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, num_layers, num_segments, dropout, input_wants_gradient in (
        ("one block", 1, 1, 0.0, True),
        ("two blocks in two segments", 2, 2, 0.0, True),
        ("four blocks in two segments", 4, 2, 0.0, True),
        ("an input that wants no gradient", 2, 1, 0.0, False),
        ("dropout", 2, 2, 0.5, True),
        ("dropout in three segments of two", 6, 3, 0.3, True),
    ):
        inputs = {
            "seed": int(rng.integers(1000)),
            "num_layers": num_layers,
            "num_segments": num_segments,
            "dropout": dropout,
            "input_wants_gradient": input_wants_gradient,
        }
        # Room for each segment's input, once over; and backward for one segment.
        inside = (INSIDE + 2) * EDGE
        limits = {
            "bytes_saved_by_the_forward_pass": 2 * EDGE * num_segments,
            "bytes_held_after_the_forward_pass": (2 * EDGE + RANDOM) * num_segments,
            "bytes_saved_by_the_backward_pass": inside * num_layers // num_segments,
        }
        cases.append(Case(name, inputs, limits, draws=dropout > 0))
    return cases


def checkpoint_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    num_blocks = inputs["num_layers"]
    if _is_one_missing(got["gradients"]):
        return "A parameter got no gradient: it would never be trained"
    if isinstance(got["gradient of x"], str) and inputs["input_wants_gradient"]:
        return "x got no gradient: the blocks before would never be trained"
    if not _is_same(got["out"], expected["out"]):
        return None
    is_other = not _is_same(got["gradients"][0], expected["gradients"][0])
    # Without dropout the same gradients have been right before.
    if inputs["dropout"] and is_other and got["block_calls"] == expected["block_calls"]:
        return (
            "The second run must drop what the first dropped: put the random state back"
        )
    of_a_sum = got["first gradient if the loss were a sum"]
    if is_other and np.array_equal(got["gradients"][0], of_a_sum):
        return "Go backward from the new output, with grad_out as its gradient"
    if is_other:
        return None
    if got["next random number"] != expected["next random number"]:
        return "The second run changed the dice for whoever draws next: put them back"
    if got["block_calls"] == num_blocks:
        return "Nothing was computed again: everything must have been kept"
    if got["block_calls"] > expected["block_calls"]:
        return "Each block runs once forward, and once more in the backward pass"
    for key in ("bytes_saved_by_the_forward_pass", "bytes_held_after_the_forward_pass"):
        if got[key] > 2 * expected[key]:
            return "Save x alone: what `run` makes inside is made again"
    return None


def best_num_segments_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    shapes = [
        ("one layer", 1, 1, 5),
        ("edges as large as insides", 16, 1, 1),
        ("400 layers of small insides", 400, 3, 1),
        ("insides of 4 edges", 16, 1, 4),
        ("insides so large that one block per segment wins", 16, 1, 20),
        ("a number of layers that is no square", 12, 1, 1),
        ("two that are equally good: the fewest", 6, 1, 1),
        ("tiny insides", 9, 100, 1),
        ("segments of unequal length", 76, 58, 46),
        ("400 layers, where the best is far from the root", 400, 1, 70),
        ("400 layers, each a segment of its own", 400, 1, 1000),
        ("five layers in three segments", 5, 2, 3),
    ]
    shapes += [("a random shape", *(int(n) for n in rng.integers(2, 90, size=3)))]
    names = ("num_layers", "edge_bytes", "block_bytes")
    return [Case(name, dict(zip(names, shape))) for name, *shape in shapes]


def best_num_segments_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    L, b, A = inputs["num_layers"], inputs["edge_bytes"], inputs["block_bytes"]
    theirs = got["segments"]
    if not isinstance(theirs, int):
        return "Segments are counted: give an int"
    if not 1 <= theirs <= L:
        return f"There are from 1 to {L} segments"
    if L > 100 and theirs == round(math.sqrt(L)):  # no other way comes to that
        return "√L is how the peak grows; where the minimum is depends on A/b too"

    def peak(k: int) -> int:
        return k * b + math.ceil(L / k) * A

    if peak(theirs) == peak(expected["segments"]):
        return "As low, but with more segments than needed"
    return (
        f"Its peak is {peak(theirs):,}, that of the best {peak(expected['segments']):,}"
    )


def blocks_to_keep_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    huge = 10**17 + 1  # a float would round it
    shapes = [
        ("a budget for one inside and the other edges", 4, 1, 10, 0, 13),
        ("one byte less than that", 4, 1, 10, 0, 12),
        ("room for two", 4, 1, 10, 0, 22),
        ("one byte less than for two", 4, 1, 10, 0, 21),
        ("room for two, and to work", 4, 1, 10, 7, 29),
        ("one byte too little to work with two", 4, 1, 10, 7, 28),
        ("too little to work with one", 4, 1, 10, 7, 19),
        ("room for all", 4, 1, 10, 2, 42),
        ("one byte less than for all", 4, 1, 10, 2, 41),
        ("room for more than there are", 4, 1, 10, 2, 4000),
        ("one layer", 1, 7, 30, 5, 35),
        ("insides that are their edges", 8, 3, 3, 1, 25),
        ("bytes beyond what a float tells apart", 9, 3, huge, 2, 5 * huge + 14),
        ("one byte less of them", 9, 3, huge, 2, 5 * huge + 13),
    ]
    L, b, A, W = (int(n) for n in rng.integers([3, 2, 30, 1], [20, 20, 90, 50]))
    budget = int(rng.integers((L - 1) * b + A + W, L * A + W))
    shapes.append(("a random shape", L, b, A, W, budget))
    names = "num_layers", "edge_bytes", "block_bytes", "working_bytes", "budget_bytes"
    return [Case(name, dict(zip(names, shape))) for name, *shape in shapes]


def blocks_to_keep_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    L, b, A, W, budget = inputs.values()
    ours, theirs = expected["kept"], got["kept"]
    if ours == "ValueError":
        return f"Raise ValueError: even one kept block takes {(L - 1) * b + A + W} bytes"
    if theirs == "ValueError":
        return f"That fits: one kept block takes {(L - 1) * b + A + W} bytes"
    if not isinstance(theirs, int):
        return "Blocks are counted: give an int"
    if theirs > L:
        return "There are not that many blocks"
    if theirs < 1:
        return "One can always be kept"

    def held(n: int) -> int:
        return (L - n) * b + n * A + W

    if theirs > ours:
        return f"Over budget: {theirs} kept blocks take {held(theirs):,} bytes"
    return f"There is room for more: {ours} kept blocks take {held(ours):,} bytes"


def checkpoint_recursive_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, num_layers, dropout in (
        ("one block", 1, 0.0),
        ("two blocks", 2, 0.0),
        ("three blocks", 3, 0.0),
        ("eight blocks with dropout", 8, 0.2),
        ("32 blocks", 32, 0.0),
    ):
        inputs = {
            "seed": int(rng.integers(1000)),
            "num_layers": num_layers,
            "dropout": dropout,
        }
        limits = _recursive_limits(num_layers, dropout)
        cases.append(Case(name, inputs, limits, draws=dropout > 0))
    return cases


def _recursive_limits(num_layers: int, dropout: float) -> dict[str, float]:
    """Room for an edge for each halving, and the inside of one block."""
    halvings = math.ceil(math.log2(num_layers))
    num_edges = halvings + INSIDE + (dropout > 0)
    return {
        "bytes_saved_by_the_forward_pass": num_edges * EDGE,
        "bytes_held_after_the_forward_pass": num_edges * (EDGE + RANDOM),
        "bytes_saved_by_the_backward_pass": num_edges * EDGE,
        # Forward, with autograd, and for each halving half of them again.
        "block_calls": 2 * num_layers + math.ceil(num_layers * halvings / 2),
    }


def checkpoint_recursive_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    L, calls = inputs["num_layers"], got["block_calls"]
    if not got["layers that attended, forward"]:
        return "Hand each block the `attend` that you were given"
    if len(got["layers that attended, forward"]) > L:
        return "Going forward, each block runs once"
    if got["positions of the first block"] != expected["positions of the first block"]:
        return "Hand each block the positions that you were given"
    if _is_one_missing(got["gradients"]):
        return "A parameter got no gradient: it would never be trained"
    if isinstance(got["gradient of x"], str):
        return "x got no gradient: the blocks before would never be trained"
    pairs = zip(got["gradients"], expected["gradients"])
    if not _is_same(got["out"], expected["out"]) or not all(_is_same(*p) for p in pairs):
        return None
    limits = _recursive_limits(L, inputs["dropout"])
    too_much = [key for key in limits if got[key] > limits[key]]
    if (
        any("backward" not in key for key in too_much[:1])
        and too_much[0] != "block_calls"
    ):
        return "Going forward keep one edge per halving, and the inside of one block"
    if too_much[:1] == ["bytes_saved_by_the_backward_pass"]:
        return (
            "Going backward, the insides of several blocks are held at once: a half that "
            "runs again has to halve too"
        )
    # Both halves checkpointed, at each level, without a checkpoint of the last block, or
    # with one.
    if calls in (L * (1 + math.log2(L)), L * (2 + math.log2(L))):
        return "Only the first half needs a checkpoint: the second is next in line"
    return None


def checkpoint_selective_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, kind, shape, size, sizes in (
        ("one input and one weight", "square", (3,), 4, [2]),
        ("three weights", "square", (3,), 4, [2, 5, 3]),
        ("two inputs", "gate", (4,), 6, [3]),
        ("a norm, whose gain is learned too", "norm", (5,), 8, [4, 4]),
        ("a batch", "norm", (2, 7), 8, [6, 3]),
        ("a batch of two inputs", "gate", (3, 50), 64, [8]),
    ):
        num_inputs = 2 if kind == "gate" else 1
        inputs = {
            "kind": kind,
            "inputs": [rng.normal(size=(*shape, size)) for _ in range(num_inputs)],
            "weights": [rng.normal(size=(out, size)) for out in sizes],
            "gain": rng.normal(size=size),
        }
        num_tokens = math.prod(shape)
        limits = {
            # What `run` made has this many bytes, and it makes more on its way.
            "bytes_saved_beside_inputs_and_weights": 8 * num_tokens * size // 2,
            "bytes_held_beside_inputs_and_weights": 8 * num_tokens * size // 2 + RANDOM,
            "flops_of_products": 3 * sum(2 * num_tokens * size * out for out in sizes),
            "times_run_was_called": 2,
        }
        cases.append(Case(name, inputs, limits))
    return cases


def checkpoint_selective_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if not isinstance(got["outs"], list) or len(got["outs"]) != len(expected["outs"]):
        return "Return a tuple of products, one per weight"
    for which in ("inputs", "weights"):
        if _is_one_missing(got[f"gradients of {which}"]):
            return f"Return a gradient for each of the {which}"
    if isinstance(got["gradient of the gain"], str) and inputs["kind"] == "norm":
        return "What `run` learns gets no gradient: go backward through it"
    for key in ("outs", "gradients of inputs", "gradients of weights"):
        if not all(_is_same(*pair) for pair in zip(got[key], expected[key])):
            return None
    limits = (
        "bytes_saved_beside_inputs_and_weights",
        "bytes_held_beside_inputs_and_weights",
    )
    if any(got[key] > 2 * expected[key] for key in limits):
        return "Keep the inputs and the weights, and nothing that `run` made"
    if got["flops_of_products"] > expected["flops_of_products"]:
        return "A product was computed again: only `run` is to be"
    return None


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other)


def _is_one_missing(gradients: list) -> bool:
    return any(isinstance(gradient, str) for gradient in gradients)


# What torch says of a backward, and what to look at.
BACKWARD_ERRORS = {
    "backward through the graph a second time": (
        "That graph was gone through before: a new one has to begin from x.detach()"
    ),
    "does not require grad": (
        "Autograd is off in a backward: run again inside `with torch.enable_grad():`, "
        "from a tensor that requires a gradient, and go backward from the new output "
        "with the gradient that came in"
    ),
    "'tuple' object has no attribute": (
        "`ctx.saved_tensors` is a tuple, of one tensor too: `(x,) = ctx.saved_tensors`"
    ),
    "grad can be implicitly created only for scalar outputs": (
        "The output is no single number, so say what its gradient is: it came in"
    ),
    "incorrect number of gradients": (
        "backward returns one gradient for each input of forward, or None for it"
    ),
    "returned an invalid gradient at index": ORDER,
    "returned a gradient different than None": ORDER,
    "expected Variable or None": ORDER,
}
NO_K = "There is at least one k to try: they go from 1 to L, and L is one of them"

EXERCISES = [
    Exercise(
        "lib.training.next_token_loss",
        1,
        next_token_loss_cases,
        next_token_loss_explain,
    ),
    Exercise(
        "lib.training.training_bytes",
        2,
        training_bytes_cases,
        training_bytes_explain,
    ),
    Exercise(
        "lib.training.accumulate_gradients",
        2,
        accumulate_gradients_cases,
        accumulate_gradients_explain,
    ),
    Exercise(
        "lib.checkpointing.checkpoint",
        3,
        checkpoint_cases,
        checkpoint_explain,
        forbidden=TORCHS_CHECKPOINTS,
        parts=("Checkpoint",),
        errors=BACKWARD_ERRORS,
    ),
    Exercise(
        "lib.checkpointing.best_num_segments",
        2,
        best_num_segments_cases,
        best_num_segments_explain,
        errors={"iterable argument is empty": NO_K, "empty sequence": NO_K},
    ),
    Exercise(
        "lib.checkpointing.blocks_to_keep",
        2,
        blocks_to_keep_cases,
        blocks_to_keep_explain,
    ),
    Exercise(
        "lib.checkpointing.checkpoint_recursive",
        3,
        checkpoint_recursive_cases,
        checkpoint_recursive_explain,
        forbidden=TORCHS_CHECKPOINTS,
        errors={"maximum recursion depth": "It never ends: what of a single block?"},
    ),
    Exercise(
        "lib.checkpointing.checkpoint_selective",
        3,
        checkpoint_selective_cases,
        checkpoint_selective_explain,
        forbidden=TORCHS_CHECKPOINTS,
        parts=("SelectiveCheckpoint",),
        errors=BACKWARD_ERRORS,
    ),
]
