"""Chapter 2: what its exercises are tried on."""

import math

import numpy as np

from lib.course.exercises import Case, Exercise


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
        cases.append(Case(name, {"logits": logits, "token_ids": token_ids}))
    huge = {"logits": 1e3 * rng.normal(size=(1, 4, 5)), "token_ids": np.arange(4)[None]}
    return [*cases, Case("huge logits", huge)]


def next_token_loss_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if not isinstance(got["loss"], np.ndarray):
        return None
    logits, token_ids = inputs["logits"], inputs["token_ids"]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def mean_loss(rows: np.ndarray, targets: np.ndarray) -> float:
        return -np.take_along_axis(rows, targets[..., None], axis=-1).mean()

    if got["loss"].shape:
        return "Return one number, the mean over all predictions"
    if isinstance(got["gradient"], str):
        return "The loss has to be part of the graph, or nothing can be learned from it"
    if np.isnan(got["loss"]) or np.isinf(got["loss"]):
        return "exp overflows: use a function made for logits"
    targets = token_ids[:, 1:]
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
        "That is in bits: take the natural logarithm": mean_loss(
            log_probs[:, :-1], targets
        )
        / np.log(2),
    }
    for text, loss in words.items():
        if np.isclose(got["loss"], loss):
            return text
    return None


def training_bytes_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    shapes = [
        ("one layer, one token", 1, 2, 1, 2, 3, 1, 1),
        ("two layers", 2, 2, 1, 2, 3, 1, 1),
        ("four query heads on two KV heads", 1, 4, 2, 4, 5, 1, 3),
        ("a batch of three", 1, 2, 1, 4, 6, 3, 5),
    ]
    H = int(rng.integers(2, 5))
    random_sizes = [int(n) for n in rng.integers(2, 9, size=5)]
    L, D, F, B, T = random_sizes
    shapes.append(("a random shape", L, H, 1, 2 * D, F, B, T))
    cases = []
    for name, L, H, G, D, F, B, T in shapes:
        config = {
            "vocab_size": 11 + L,
            "num_layers": L,
            "num_heads": H,
            "num_kv_heads": G,
            "d_model": H * D,
            "d_ff": F,
            "max_seq_len": 64,
        }
        cases.append(Case(name, {"config": config, "batch_size": B, "seq_len": T}))
    return cases


def training_bytes_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    for kind in expected:
        if not isinstance(got.get(kind), int):
            return "Give whole numbers, in a dict with those four keys"
    config = inputs["config"]
    C, L, V = config["d_model"], config["num_layers"], config["vocab_size"]
    weights = expected["weights"] - got["weights"]
    if got["weights"] * 4 == expected["weights"]:
        return "A float32 has 4 bytes"
    if weights == 4 * V * C:
        return "Embedding and unembedding are two matrices"
    if weights == 4 * C * (2 * L + 1):
        return "Each norm has a gain for each of C entries: two a block, one at the end"
    if weights:
        return (
            "Count the weights first: `[(n, p.shape) for n, p in lm.named_parameters()]`"
        )
    if got["optimizer"] * 2 == expected["optimizer"]:
        return "AdamW keeps two numbers a parameter"
    if got["activations"] * 4 == expected["activations"]:
        return "A float32 has 4 bytes"
    if got["activations"] * L == expected["activations"]:
        return "That is one layer's activations"
    B, T = inputs["batch_size"], inputs["seq_len"]
    D = C // config["num_heads"]
    missing = expected["activations"] - got["activations"]
    if missing == -4 * L * 2 * D * (B - 1) * T:
        return "Sines and cosines depend on the position alone: all sequences share them"
    if missing == 4 * L * C * B * T:
        return "A block's input is kept too"
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
        edge = 2 * 8 * 16 * 8  # bytes of x: (2, 8, 16) in float64
        # Room for each segment's input, once over: a block's inside is 15 edges.
        limits = {
            "bytes_saved_by_the_forward_pass": 2 * edge * num_segments,
            "bytes_saved_by_the_backward_pass": 20 * edge * num_layers // num_segments,
        }
        cases.append(Case(name, inputs, limits, draws=dropout > 0))
    return cases


def checkpoint_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    num_blocks = inputs["num_layers"]
    if _is_one_missing(got["gradients"]):
        return "A parameter got no gradient: it would never be trained"
    if isinstance(got["gradient of x"], str) and inputs["input_wants_gradient"]:
        return "x got no gradient: the blocks before would never be trained"
    is_other = got["gradients"][0].tolist() != expected["gradients"][0].tolist()
    if inputs["dropout"] and is_other and got["block_calls"] == expected["block_calls"]:
        return (
            "The second run must drop what the first dropped: put the random state back"
        )
    if is_other and not inputs["dropout"]:
        return "Go backward from the new output, with grad_out as its gradient"
    if got["next random number"] != expected["next random number"]:
        return "The second run changed the dice for whoever draws next: put them back"
    if got["block_calls"] == num_blocks:
        return "Nothing was computed again: everything must have been kept"
    if got["block_calls"] > expected["block_calls"]:
        return "Each block runs once forward, and once more in the backward pass"
    key = "bytes_saved_by_the_forward_pass"
    if got[key] > 2 * expected[key]:
        return "Run forward under torch.no_grad(), and save x alone"
    return None


def best_num_segments_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    shapes = [
        ("one layer", 1, 1, 5),
        ("edges as large as insides", 16, 1, 1),
        ("insides of 4 edges", 16, 1, 4),
        ("insides so large that one block a segment wins", 16, 1, 20),
        ("a number of layers that is no square", 12, 1, 1),
        ("two that are equally good: the fewest", 6, 1, 1),
        ("tiny insides", 9, 100, 1),
        ("segments of unequal length", 76, 58, 46),
    ]
    shapes += [("a random shape", *(int(n) for n in rng.integers(2, 90, size=3)))]
    names = ("num_layers", "edge_bytes", "block_bytes")
    return [Case(name, dict(zip(names, shape))) for name, *shape in shapes]


def best_num_segments_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    L, b, A = inputs["num_layers"], inputs["edge_bytes"], inputs["block_bytes"]
    theirs = got["segments"]
    if isinstance(theirs, float):
        return "Segments are counted: give an int"
    if not isinstance(theirs, int):
        return None
    if not 1 <= theirs <= L:
        return f"There are from 1 to {L} segments"
    if theirs == round(math.sqrt(L)):
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
    shapes = [
        ("a budget for one inside and the other edges", 4, 1, 10, 13),
        ("one byte less than that", 4, 1, 10, 12),
        ("room for two", 4, 1, 10, 22),
        ("one byte less than for two", 4, 1, 10, 21),
        ("room for all", 4, 1, 10, 40),
        ("room for more than there are", 4, 1, 10, 4000),
        ("one layer", 1, 7, 30, 30),
    ]
    L, b, A = (int(n) for n in rng.integers([3, 2, 30], [20, 20, 90]))
    budget = int(rng.integers((L - 1) * b + A, L * A))
    shapes.append(("a random shape", L, b, A, budget))
    names = ("num_layers", "edge_bytes", "block_bytes", "budget_bytes")
    return [Case(name, dict(zip(names, shape))) for name, *shape in shapes]


def blocks_to_keep_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = expected["kept"], got["kept"]
    if ours == "ValueError":
        return "Raise ValueError where not even one inside fits beside the edges"
    if theirs == "ValueError":
        return "That fits"
    if not isinstance(theirs, int) or isinstance(theirs, bool):
        return "Blocks are counted: give an int"
    if theirs > inputs["num_layers"]:
        return "There are not that many blocks"
    if theirs > ours:
        return "Too many: over budget"
    return "There is room for more: one inside is free, and a kept block saves its edge"


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
        halvings = math.ceil(math.log2(num_layers)) if num_layers > 1 else 0
        edge = 2 * 8 * 16 * 8  # bytes of x: (2, 8, 16) in float64
        limits = {
            # The last block may keep its inside, of 15 edges or so.
            "bytes_saved_by_the_forward_pass": (halvings + 20) * edge,
            "bytes_saved_by_the_backward_pass": (halvings + 20) * edge,
            # Once forward, once with autograd, and half of them again a halving.
            "block_calls": 2 * num_layers + math.ceil(num_layers * halvings / 2),
        }
        cases.append(Case(name, inputs, limits, draws=dropout > 0))
    return cases


def checkpoint_recursive_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if _is_one_missing(got["gradients"]):
        return "A block was left out: it got no gradient"
    if not np.allclose(got["out"], expected["out"]):
        return "The second half goes on from what the first gives"
    key = "bytes_saved_by_the_forward_pass"
    if got[key] > expected[key]:
        return "Keep one edge a halving, not one a block, and one inside at most"
    key = "bytes_saved_by_the_backward_pass"
    if got[key] > 1.5 * expected[key]:
        return "When the first half runs again it has to halve too"
    if got["block_calls"] > expected["block_calls"]:
        return "Only the first half needs a checkpoint: the second is next in line"
    return None


def _is_one_missing(gradients: list) -> bool:
    return any(isinstance(gradient, str) for gradient in gradients)


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
        "lib.checkpointing.checkpoint",
        3,
        checkpoint_cases,
        checkpoint_explain,
        forbidden=("torch.utils.checkpoint.checkpoint",),
        parts=("Checkpoint",),
        errors={
            "backward through the graph a second time": (
                "x still belongs to the graph before: begin from x.detach()"
            ),
            "does not require grad": (
                "Autograd is off in here, and x may want no gradient: run again inside "
                "torch.enable_grad(), and go backward from the output"
            ),
        },
    ),
    Exercise(
        "lib.checkpointing.best_num_segments",
        2,
        best_num_segments_cases,
        best_num_segments_explain,
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
        forbidden=("torch.utils.checkpoint.checkpoint",),
    ),
]
