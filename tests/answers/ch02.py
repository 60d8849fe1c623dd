import math

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from answers import right, wrong
from lib import checkpointing, training
from lib.checkpointing import run_blocks
from lib.model import attend_fused

# next_token_loss


@right("next_token_loss")
def by_gathering(logits, token_ids):
    if token_ids.shape[1] < 2:
        raise ValueError("nothing to predict")
    log_probs = logits[:, :-1].log_softmax(-1)
    return -log_probs.gather(-1, token_ids[:, 1:].unsqueeze(-1)).mean()


@right("next_token_loss")
def one_token_at_a_time(logits, token_ids):
    losses = []
    if len(token_ids[0]) == 1:
        raise ValueError("nothing to predict")
    for row, tokens in zip(logits, token_ids):
        for t in range(len(tokens) - 1):
            losses.append(torch.logsumexp(row[t], 0) - row[t, tokens[t + 1]])
    return sum(losses) / len(losses)


@wrong("next_token_loss", says="Row t predicts token t + 1: compare")
def not_shifted(logits, token_ids):
    return F.cross_entropy(logits.flatten(0, 1), token_ids.flatten())


@wrong("next_token_loss", says="not t - 1")
def shifted_the_other_way(logits, token_ids):
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), token_ids[:, :-1].flatten())


@wrong("next_token_loss", says="The mean, not the sum")
def summed(logits, token_ids):
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum"
    )


@wrong("next_token_loss", says="leave it out")
def rolled(logits, token_ids):
    targets = token_ids.roll(-1, dims=1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@wrong("next_token_loss", says="B * (T - 1) predictions")
def divided_by_all_tokens(logits, token_ids):
    return summed(logits, token_ids) / token_ids.numel()


@wrong("next_token_loss", says="must not predict the next passage")
def flattened_too_early(logits, token_ids):
    return F.cross_entropy(logits.flatten(0, 1)[:-1], token_ids.flatten()[1:])


@wrong("next_token_loss", says="it does the softmax itself")
def of_probabilities(logits, token_ids):
    probs = logits[:, :-1].softmax(-1)
    return F.cross_entropy(probs.flatten(0, 1), token_ids[:, 1:].flatten())


@wrong("next_token_loss", says="exp overflows")
def overflowing(logits, token_ids):
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -probs[:, :-1].gather(-1, token_ids[:, 1:, None]).log().mean()


@wrong("next_token_loss")
def without_a_graph(logits, token_ids):
    return by_gathering(logits.detach(), token_ids)


@wrong("next_token_loss", says="natural logarithm")
def in_bits(logits, token_ids):
    return by_gathering(logits, token_ids) / math.log(2)


@wrong("next_token_loss", says="Return one number")
def one_loss_a_token(logits, token_ids):
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="none"
    )


@wrong("next_token_loss", says="Keep the given lines")
def nothing_to_predict_is_nan(logits, token_ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


def ignoring(logits, token_ids, ignored):
    logits, targets = logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=ignored)


@wrong("next_token_loss")
def first_id_taken_for_padding(logits, token_ids):
    return ignoring(logits, token_ids, 0)


@wrong("next_token_loss")
def last_id_taken_for_padding(logits, token_ids):
    return ignoring(logits, token_ids, logits.shape[-1] - 1)


# training_bytes


@right("training_bytes")
def by_building_the_model(config, batch_size, seq_len):
    from lib.model import Transformer

    num_parameters = sum(p.numel() for p in Transformer(config).parameters())
    C, F_ = config.d_model, config.d_ff
    H, G, D = config.num_heads, config.num_kv_heads, config.head_dim
    N = batch_size * seq_len
    floats = 0
    floats += 8 * C * N  # input, two norms twice, q, out, residual
    floats += 2 * G * D * N  # k, v
    floats += 4 * F_ * N  # gate, up, silu, product
    floats += (2 + H) * N + 4 * (D // 2) * seq_len
    by_weight = {"weights": 4, "gradients": 4, "optimizer": 8}
    sizes = {kind: n * num_parameters for kind, n in by_weight.items()}
    return sizes | {"activations": 4 * floats * config.num_layers}


def sizes(config, batch_size, seq_len, **changes):
    """The right answer with some numbers changed."""
    V, C, F_, L = config.vocab_size, config.d_model, config.d_ff, config.num_layers
    H, G, D = config.num_heads, config.num_kv_heads, config.head_dim
    n = {"embeddings": 2, "norms": 2 * L + 1, "optimizer": 8, "inputs": 1, "bytes": 4}
    n = {**n, "kv_heads": G, "sequences_of_rotations": 1, "layers": L, **changes}
    matrices = 2 * C * C + 2 * C * n["kv_heads"] * D + 3 * C * F_
    num_parameters = L * matrices + n["embeddings"] * V * C + n["norms"] * C
    vectors = (7 + n["inputs"]) * C + 2 * n["kv_heads"] * D + 4 * F_
    floats = batch_size * seq_len * (vectors + 2 + H)
    floats += n["sequences_of_rotations"] * seq_len * 2 * D
    return {
        "weights": n["bytes"] * num_parameters,
        "gradients": n["bytes"] * num_parameters,
        "optimizer": n["optimizer"] * num_parameters,
        "activations": n["bytes"] * n["layers"] * floats,
    }


@right("training_bytes")
def by_formula(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len)


@wrong("training_bytes", says="A float32 has 4 bytes")
def floats_not_bytes(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, bytes=1, optimizer=2)


@wrong("training_bytes", says="two numbers per parameter")
def one_moment(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, optimizer=4)


@wrong("training_bytes", says="two matrices")
def tied_embeddings(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, embeddings=1)


@wrong("training_bytes", says="A norm has C gains")
def norms_forgotten(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, norms=0)


@wrong("training_bytes", says="One vector of C")
def inputs_forgotten(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, inputs=0)


@wrong("training_bytes", says="all sequences share them")
def rotations_for_each_sequence(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, sequences_of_rotations=batch_size)


@wrong("training_bytes", says="That is 5 floats per token and layer too few")
def silu_forgotten(config, batch_size, seq_len):
    found = by_formula(config, batch_size, seq_len)
    forgotten = config.num_layers * batch_size * seq_len * config.d_ff
    return {**found, "activations": found["activations"] - 4 * forgotten}


@wrong("training_bytes")
def keys_for_every_head(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, kv_heads=config.num_heads)


@wrong("training_bytes", says="one layer's activations")
def one_layer(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, layers=1)


@wrong("training_bytes", says="a dict with those four keys")
def a_total(config, batch_size, seq_len):
    return sum(sizes(config, batch_size, seq_len).values())


@wrong("training_bytes", says="a model with dropout")
def masks_counted_too(config, batch_size, seq_len):
    found = by_formula(config, batch_size, seq_len)
    if config.dropout:
        masks = 2 * config.num_layers * batch_size * seq_len * config.d_model
        found["activations"] += 4 * masks
    return found


@wrong("training_bytes", says="a large batch of long texts")
def in_32_bits(config, batch_size, seq_len):
    found = by_formula(config, batch_size, seq_len)
    return {kind: torch.tensor(n).int().item() for kind, n in found.items()}


@right("training_bytes")
def numbers_of_numpy(config, batch_size, seq_len):
    numbers = sizes(config, batch_size, seq_len)
    return {kind: np.int64(number) for kind, number in numbers.items()}


@wrong("training_bytes", says="optimizer: expected 2784, got 0")
def nothing_for_the_optimizer(config, batch_size, seq_len):
    return {**sizes(config, batch_size, seq_len), "optimizer": 0}


# accumulate_gradients


def whole_loss(model, batch):
    positions = torch.arange(batch.shape[1])
    return training.next_token_loss(model(batch, positions, attend_fused), batch)


@right("accumulate_gradients")
def in_chunks(model, batch, num_parts):
    if num_parts > len(batch):
        raise ValueError("too many parts")
    loss = 0.0
    for part in batch.chunk(num_parts):
        part_loss = whole_loss(model, part) * len(part) / len(batch)
        part_loss.backward()
        loss += part_loss.detach().item()
    return loss


@right("accumulate_gradients")
def by_slices(model, batch, num_parts):
    B, losses = len(batch), []
    if num_parts not in range(1, B + 1):
        raise ValueError(num_parts)
    edges = [i * B // num_parts for i in range(num_parts + 1)]
    for start, end in zip(edges, edges[1:]):
        part = batch[start:end]
        logits = model(part, torch.arange(part.shape[1]).expand(part.shape), attend_fused)
        total = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        )
        (total / batch[:, 1:].numel()).backward()
        losses.append(float(total.detach()) / batch[:, 1:].numel())
    return sum(losses)


@wrong("accumulate_gradients", says="weigh it by the part's share")
def means_added(model, batch, num_parts):
    loss = 0.0
    for part in batch.chunk(num_parts):
        part_loss = whole_loss(model, part)
        part_loss.backward()
        loss += part_loss.item() * len(part) / len(batch)
    return loss


@wrong("accumulate_gradients", says="each passage has to count the same")
def parts_of_one_size(model, batch, num_parts):
    loss = 0.0
    for part in batch.chunk(num_parts):
        part_loss = whole_loss(model, part) / num_parts
        part_loss.backward()
        loss += part_loss.item()
    return loss


@wrong("accumulate_gradients", says="they are added to")
def gradients_forgotten(model, batch, num_parts):
    model.zero_grad()
    return in_chunks(model, batch, num_parts)


@wrong("accumulate_gradients", says="go backward before the next one begins")
def one_backward_in_the_end(model, batch, num_parts):
    losses = [
        whole_loss(model, part) * len(part) / len(batch)
        for part in batch.chunk(num_parts)
    ]
    loss = sum(losses)
    loss.backward()
    return loss.item()


@wrong("accumulate_gradients", says="went through the model at once")
def the_whole_batch(model, batch, num_parts):
    loss = whole_loss(model, batch)
    loss.backward()
    return loss.item()


@wrong("accumulate_gradients", says="as a number")
def a_loss_in_a_graph(model, batch, num_parts):
    in_chunks(model, batch, num_parts)
    return whole_loss(model, batch)


@wrong("accumulate_gradients", says="forward calls: expected at most")
def one_passage_at_a_time(model, batch, num_parts):
    return in_chunks(model, batch, len(batch))


@wrong("accumulate_gradients", says="A parameter got no gradient")
def nothing_learned(model, batch, num_parts):
    with torch.no_grad():
        return sum(
            whole_loss(model, part).item() * len(part) / len(batch)
            for part in batch.chunk(num_parts)
        )


@wrong("accumulate_gradients", says="leave the weights alone")
def learns_too(model, batch, num_parts):
    loss = in_chunks(model, batch, num_parts)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return loss


@wrong("accumulate_gradients", says="the mode in which it came")
def left_in_eval_mode(model, batch, num_parts):
    return in_chunks(model.eval(), batch, num_parts)


@wrong("accumulate_gradients", says="raised ValueError: positions")
def positions_from_one(model, batch, num_parts):
    loss = 0.0
    for part in batch.chunk(num_parts):
        positions = torch.arange(part.shape[1]) + 1
        logits = model(part, positions, attend_fused)
        part_loss = training.next_token_loss(logits, part) * len(part) / len(batch)
        part_loss.backward()
        loss += part_loss.item()
    return loss


@wrong("accumulate_gradients", says="Keep the given lines")
def parts_without_a_passage(model, batch, num_parts):
    loss = 0.0
    for part in batch.chunk(num_parts):
        part_loss = whole_loss(model, part) * len(part) / len(batch)
        part_loss.backward()
        loss += part_loss.item()
    return loss


@wrong("accumulate_gradients", says="gradients that are there already")
def divided_in_the_end(model, batch, num_parts):
    loss = 0.0
    for part in batch.tensor_split(num_parts):
        part_loss = whole_loss(model, part) * len(part)
        part_loss.backward()
        loss += part_loss.item() / len(batch)
    for parameter in model.parameters():
        parameter.grad /= len(batch)
    return loss


# checkpoint


@right("checkpoint")
def gradients_added_by_hand(run, x):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dummy):
            ctx.before = torch.get_rng_state()
            ctx.save_for_backward(x)
            with torch.no_grad():
                return run(x)

        @staticmethod
        def backward(ctx, grad):
            after = torch.get_rng_state()
            torch.set_rng_state(ctx.before)
            inner = ctx.saved_tensors[0].detach()
            inner.requires_grad = True
            with torch.enable_grad():
                torch.sum(run(inner) * grad).backward()
            torch.set_rng_state(after)
            return inner.grad, None

    return Again.apply(x, torch.zeros((), requires_grad=True))


@right("checkpoint")
def with_a_hook(run, x):
    """No Function: a leaf that stands for the output, and a hook that works backward."""
    state = torch.get_rng_state()
    with torch.no_grad():
        out = run(x)
    source = x if x.requires_grad else torch.zeros_like(x, requires_grad=True)

    class Pass(torch.autograd.Function):
        @staticmethod
        def forward(ctx, source):
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.set_rng_state(state)
                leaf = x.detach().requires_grad_()
                run(leaf).backward(grad)
            return leaf.grad

    return Pass.apply(source)


def rerun(run, x, *, replay=True, wants=None, backward=None, dummy=True):
    """The right answer with one thing changed."""

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, _):
            ctx.state = torch.get_rng_state()
            ctx.save_for_backward(x)
            return run(x)

        @staticmethod
        def backward(ctx, grad):
            wanted = ctx.needs_input_grad[0] if wants is None else wants
            leaf = ctx.saved_tensors[0].detach().requires_grad_(wanted)
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                if replay:
                    torch.set_rng_state(ctx.state)
                out = run(leaf)
            (backward or torch.autograd.backward)(out, grad)
            return leaf.grad, None

    return Again.apply(x, torch.empty(0, requires_grad=dummy))


@wrong("checkpoint", says="Save x alone")
def nothing_done(run, x):
    out = run(x)
    return out + (run(x) * 0).detach()


@wrong("checkpoint", says="Nothing was computed again")
def everything_kept(run, x):
    return run(x)


@wrong("checkpoint", says="drop what the first dropped")
def random_state_forgotten(run, x):
    return rerun(run, x, replay=False)


@wrong("checkpoint", says="A parameter got no gradient")
def only_x_gets_a_gradient(run, x):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.state = torch.get_rng_state()
            ctx.save_for_backward(x)
            return run(x)

        @staticmethod
        def backward(ctx, grad):
            leaf = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.set_rng_state(ctx.state)
                out = run(leaf)
            return torch.autograd.grad(out, leaf, grad)

    return Again.apply(x)


@wrong("checkpoint", says="x got no gradient")
def x_cut_off(run, x):
    return rerun(run, x, wants=False)


@wrong("checkpoint")
def no_gradient_unless_x_wants_one(run, x):
    return rerun(run, x, dummy=False)


@wrong("checkpoint", says="not allowed here")
def by_torch(run, x):
    return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)


@wrong("checkpoint", says="begin from x.detach()")
def still_in_the_old_graph(run, x):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, _):
            ctx.save_for_backward(x)
            return run(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                torch.autograd.backward(run(x), grad)
            return x.grad, None

    return Again.apply(x, torch.empty(0, requires_grad=True))


@wrong("checkpoint", says="changed the dice")
def seed_set_anew(run, x):
    seed = torch.initial_seed()
    return rerun(lambda x: (torch.manual_seed(seed), run(x))[1], x)


@wrong("checkpoint", says="with grad_out as its gradient")
def grad_out_ignored(run, x):
    def backward(out, grad):
        if out.requires_grad:
            with torch.enable_grad():
                out.sum().backward()

    return rerun(run, x, backward=backward)


@wrong("checkpoint", says="Save x alone")
def output_and_inside_saved(run, x):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, _):
            ctx.save_for_backward(x, *[x * i for i in range(1, 20)])
            ctx.state = torch.get_rng_state()
            return run(x)

        @staticmethod
        def backward(ctx, grad):
            leaf = ctx.saved_tensors[0].detach()
            leaf.requires_grad_(ctx.needs_input_grad[0])
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.set_rng_state(ctx.state)
                run(leaf).backward(grad)
            return leaf.grad, None

    return Again.apply(x, torch.empty(0, requires_grad=True))


@wrong("checkpoint", says="Save x alone")
def inside_kept_on_the_context(run, x):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, _):
            ctx.x, ctx.kept = x, [x * i for i in range(40)]
            ctx.state = torch.get_rng_state()
            return run(x)

        @staticmethod
        def backward(ctx, grad):
            leaf = ctx.x.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.set_rng_state(ctx.state)
                run(leaf).backward(grad)
            return leaf.grad, None

    return Again.apply(x, torch.empty(0, requires_grad=True))


@wrong("checkpoint", says="gradient of x at")
def backward_twice(run, x):
    def backward(out, grad):
        out.backward(grad, retain_graph=True)
        out.backward(grad)

    return rerun(run, x, backward=backward)


# best_num_segments


def peak(L, k, b, A):
    return k * b + -(-L // k) * A


@right("best_num_segments")
def by_trying_all(num_layers, edge_bytes, block_bytes):
    best = 1
    for k in range(2, num_layers + 1):
        tried, lowest = (peak(num_layers, n, edge_bytes, block_bytes) for n in (k, best))
        if tried < lowest:
            best = k
    return best


@right("best_num_segments")
def by_sorting(num_layers, edge_bytes, block_bytes):
    peaks = [
        (k * edge_bytes + math.ceil(num_layers / k) * block_bytes, k)
        for k in range(1, num_layers + 1)
    ]
    return sorted(peaks)[0][1]


@wrong("best_num_segments", says="√L is how the peak grows")
def always_the_root(num_layers, edge_bytes, block_bytes):
    return max(1, round(math.sqrt(num_layers)))


@wrong("best_num_segments")
def root_not_rounded_well(num_layers, edge_bytes, block_bytes):
    k = math.sqrt(num_layers * block_bytes / edge_bytes)
    return min(num_layers, max(1, round(k)))


@wrong("best_num_segments", says="give an int")
def root_as_a_float(num_layers, edge_bytes, block_bytes):
    return math.sqrt(num_layers * block_bytes / edge_bytes)


@wrong("best_num_segments", says="There are from 1 to")
def more_than_there_are(num_layers, edge_bytes, block_bytes):
    return max(2, round(math.sqrt(num_layers * block_bytes / edge_bytes)))


@wrong("best_num_segments")
def the_most_of_equals(num_layers, edge_bytes, block_bytes):
    return max(
        range(1, num_layers + 1),
        key=lambda k: (-peak(num_layers, k, edge_bytes, block_bytes), k),
    )


@wrong("best_num_segments", says="400 layers, where the best is far from the root")
def near_the_root(num_layers, edge_bytes, block_bytes):
    root = round(math.sqrt(num_layers * block_bytes / edge_bytes))
    near = range(max(1, root - 3), min(num_layers, root + 3) + 1)
    if not near:
        return num_layers
    return min(near, key=lambda k: peak(num_layers, k, edge_bytes, block_bytes))


@wrong("best_num_segments", says="400 layers, where the best is far from the root")
def of_the_first_32(num_layers, edge_bytes, block_bytes):
    return min(
        range(1, min(num_layers, 32) + 1),
        key=lambda k: peak(num_layers, k, edge_bytes, block_bytes),
    )


@wrong("best_num_segments")
def upside_down(num_layers, edge_bytes, block_bytes):
    return by_trying_all(num_layers, block_bytes, edge_bytes)


@wrong("best_num_segments")
def segments_not_rounded_up(num_layers, edge_bytes, block_bytes):
    return min(
        range(1, num_layers + 1),
        key=lambda k: k * edge_bytes + num_layers / k * block_bytes,
    )


@right("best_num_segments")
def by_numpy(num_layers, edge_bytes, block_bytes):
    k = np.arange(1, num_layers + 1)
    return 1 + np.argmin(k * edge_bytes - (-num_layers // k) * block_bytes)


@wrong("best_num_segments", says="five layers in three segments")
def up_to_half_of_them(num_layers, edge_bytes, block_bytes):
    return min(
        [*range(1, num_layers // 2 + 1), num_layers],
        key=lambda k: peak(num_layers, k, edge_bytes, block_bytes),
    )


@wrong("best_num_segments", says="400 layers, each a segment of its own")
def of_the_first_200(num_layers, edge_bytes, block_bytes):
    return min(
        range(1, min(num_layers, 200) + 1),
        key=lambda k: peak(num_layers, k, edge_bytes, block_bytes),
    )


@wrong("best_num_segments", says="400 layers, where the best is far from the root")
def as_far_as_it_falls(num_layers, edge_bytes, block_bytes):
    def tried(k):
        return peak(num_layers, k, edge_bytes, block_bytes)

    k = min(num_layers, max(1, round(math.sqrt(num_layers * block_bytes / edge_bytes))))
    while k > 1 and tried(k - 1) <= tried(k):
        k -= 1
    while k < num_layers and tried(k + 1) < tried(k):
        k += 1
    return k


@wrong("best_num_segments")
def equal_segments_alone(num_layers, edge_bytes, block_bytes):
    return min(
        [k for k in range(1, num_layers + 1) if num_layers % k == 0],
        key=lambda k: peak(num_layers, k, edge_bytes, block_bytes),
    )


# blocks_to_keep


@right("blocks_to_keep")
def counting_down(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes):
    for num_kept in range(num_layers, 0, -1):
        held = (num_layers - num_kept) * edge_bytes + num_kept * block_bytes
        if held + working_bytes <= budget_bytes:
            return num_kept
    raise ValueError("too small a budget")


@right("blocks_to_keep")
def by_division(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes):
    spare = budget_bytes - working_bytes - num_layers * edge_bytes
    if block_bytes == edge_bytes:
        num_kept = num_layers if spare >= 0 else 0
    else:
        num_kept = spare // (block_bytes - edge_bytes)
    if num_kept < 1:
        raise ValueError(budget_bytes)
    return num_kept if num_kept < num_layers else num_layers


@wrong("blocks_to_keep", says="There is room for more: 2 kept blocks take 22 bytes")
def edges_of_all(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes):
    num_kept = (budget_bytes - working_bytes - num_layers * edge_bytes) // block_bytes
    if budget_bytes < (num_layers - 1) * edge_bytes + block_bytes + working_bytes:
        raise ValueError(budget_bytes)
    return max(1, min(num_kept, num_layers))


@wrong("blocks_to_keep", says="Raise ValueError: even one kept block takes 13 bytes")
def edges_forgotten(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes):
    num_kept = (budget_bytes - working_bytes) // block_bytes
    if num_kept < 1:
        raise ValueError(budget_bytes)
    return min(num_kept, num_layers)


@wrong("blocks_to_keep", says="Over budget: 2 kept blocks take 29 bytes")
def work_forgotten(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes):
    return counting_down(num_layers, edge_bytes, block_bytes, 0, budget_bytes)


@wrong("blocks_to_keep", says="There is room for more")
def work_for_each_block(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes):
    return by_division(
        num_layers, edge_bytes, block_bytes + working_bytes, 0, budget_bytes
    )


@wrong("blocks_to_keep", says="One can always be kept")
def room_to_recompute_beside(*sizes):
    return max(0, by_division(*sizes) - 1)


@wrong("blocks_to_keep", says="Raise ValueError")
def zero_instead_of_an_error(*sizes):
    try:
        return by_division(*sizes)
    except ValueError:
        return 0


@wrong("blocks_to_keep", says="not that many blocks")
def more_blocks_than_there_are(
    num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes
):
    counting_down(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes)
    spare = budget_bytes - working_bytes - num_layers * edge_bytes
    return spare // max(1, block_bytes - edge_bytes)


@wrong("blocks_to_keep", says="give an int")
def blocks_as_a_float(*sizes):
    return float(counting_down(*sizes))


@wrong("blocks_to_keep", says="one byte less of them")
def divided_as_floats(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes):
    smallest = (num_layers - 1) * edge_bytes + block_bytes + working_bytes
    if budget_bytes < smallest:
        raise ValueError
    if block_bytes == edge_bytes:
        return num_layers
    more = (budget_bytes - smallest) / (block_bytes - edge_bytes)
    return min(num_layers, 1 + int(more))


@wrong("blocks_to_keep", says="one byte less than for all")
def no_work_if_all_are_kept(
    num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes
):
    if num_layers > 1 and budget_bytes >= num_layers * block_bytes:
        return num_layers
    sizes = num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes
    return counting_down(*sizes)


@wrong("blocks_to_keep", says="raised ZeroDivisionError")
def divided_by_nothing(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes):
    spare = budget_bytes - working_bytes - num_layers * edge_bytes
    num_kept = spare // (block_bytes - edge_bytes)
    if num_kept < 1:
        raise ValueError(budget_bytes)
    return min(num_kept, num_layers)


@right("blocks_to_keep")
def by_bisection(num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes):
    def fits(n):
        held = (num_layers - n) * edge_bytes + n * block_bytes
        return held + working_bytes <= budget_bytes

    if not fits(1):
        raise ValueError("not even one")
    low, high = 1, num_layers
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return np.int64(low)


@wrong("blocks_to_keep", says="Blocks are counted")
def true_for_one(*sizes):
    num_kept = counting_down(*sizes)
    return True if num_kept == 1 else num_kept


# checkpoint_recursive


@right("checkpoint_recursive")
def larger_half_first(blocks, x, positions, attend):
    if len(blocks) == 1:
        return checkpointing.checkpoint(lambda x: blocks[0](x, positions, attend), x)
    middle = (len(blocks) + 1) // 2

    def first(x):
        return larger_half_first(blocks[:middle], x, positions, attend)

    x = checkpointing.checkpoint(first, x)
    return larger_half_first(blocks[middle:], x, positions, attend)


@right("checkpoint_recursive")
def last_block_again(blocks, x, positions, attend):
    if len(blocks) == 1:
        return checkpointing.checkpoint(lambda x: blocks[0](x, positions, attend), x)
    middle = len(blocks) // 2
    x = checkpointing.checkpoint(
        lambda x: last_block_again(blocks[:middle], x, positions, attend), x
    )
    return last_block_again(blocks[middle:], x, positions, attend)


@right("checkpoint_recursive")
def in_a_loop(blocks, x, positions, attend):
    blocks = list(blocks)
    while len(blocks) > 1:
        first, blocks = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        x = checkpointing.checkpoint(
            lambda x, first=first: in_a_loop(first, x, positions, attend), x
        )
    return checkpointing.checkpoint(lambda x: run_blocks(blocks, x, positions, attend), x)


@wrong("checkpoint_recursive", says="keep one edge per halving")
def one_edge_a_block(blocks, x, positions, attend):
    for block in blocks:
        x = checkpointing.checkpoint(
            lambda x, block=block: block(x, positions, attend), x
        )
    return x


@wrong("checkpoint_recursive")
def all_kept(blocks, x, positions, attend):
    return run_blocks(blocks, x, positions, attend)


@wrong("checkpoint_recursive", says="Only the first half")
def both_halves(blocks, x, positions, attend):
    if len(blocks) == 1:
        return checkpointing.checkpoint(lambda x: blocks[0](x, positions, attend), x)
    middle = len(blocks) // 2
    for half in (blocks[:middle], blocks[middle:]):
        x = checkpointing.checkpoint(
            lambda x, half=half: both_halves(half, x, positions, attend), x
        )
    return x


@wrong("checkpoint_recursive", says="has to halve too")
def halves_not_halved_again(blocks, x, positions, attend):
    middle = len(blocks) // 2
    for half in (blocks[:middle], blocks[middle:]):
        x = checkpointing.checkpoint(
            lambda x, half=half: run_blocks(half, x, positions, attend), x
        )
    return x


@wrong("checkpoint_recursive", says="layers that attended, forward[0]: expected 0, got 1")
def second_half_first(blocks, x, positions, attend):
    return larger_half_first(list(blocks)[::-1], x, positions, attend)


@wrong("checkpoint_recursive", says="what of a single block?")
def never_ending(blocks, x, positions, attend):
    middle = len(blocks) // 2
    x = checkpointing.checkpoint(
        lambda x: never_ending(blocks[:middle], x, positions, attend), x
    )
    return never_ending(blocks[middle:], x, positions, attend)


@wrong("checkpoint_recursive")
def middle_block_lost(blocks, x, positions, attend):
    if len(blocks) <= 2:
        return larger_half_first(blocks, x, positions, attend)
    middle = len(blocks) // 2
    x = checkpointing.checkpoint(
        lambda x: middle_block_lost(blocks[:middle], x, positions, attend), x
    )
    return middle_block_lost(blocks[middle + 1 :], x, positions, attend)


@wrong("checkpoint_recursive", says="the `attend` that you were given")
def attend_of_its_own(blocks, x, positions, attend):
    return in_a_loop(blocks, x, positions, attend_fused)


@wrong("checkpoint_recursive", says="the positions that you were given")
def positions_of_its_own(blocks, x, positions, attend):
    return in_a_loop(blocks, x, torch.arange(x.shape[-2]), attend)


@wrong("checkpoint_recursive", says="Going forward, each block runs once")
def forward_twice(blocks, x, positions, attend):
    run_blocks(blocks, x.detach(), positions, attend)
    return in_a_loop(blocks, x, positions, attend)


def in_segments(blocks, x, positions, attend, size):
    for start in range(0, len(blocks), size):
        segment = blocks[start : start + size]
        x = checkpointing.checkpoint(
            lambda x, segment=segment: run_blocks(segment, x, positions, attend), x
        )
    return x


@wrong("checkpoint_recursive", says="has to halve too")
def segments_of_the_root(blocks, x, positions, attend):
    return in_segments(blocks, x, positions, attend, math.isqrt(len(blocks)))


@wrong("checkpoint_recursive", says="32 blocks")
def eleven_segments(blocks, x, positions, attend):
    return in_segments(blocks, x, positions, attend, math.ceil(len(blocks) / 11))


@wrong("checkpoint_recursive", says="the inside of one block")
def insides_of_two(blocks, x, positions, attend):
    if len(blocks) <= 2:
        return run_blocks(blocks, x, positions, attend)
    middle = len(blocks) // 2
    first = blocks[:middle]
    x = checkpointing.checkpoint(lambda x: insides_of_two(first, x, positions, attend), x)
    return insides_of_two(blocks[middle:], x, positions, attend)


@wrong("checkpoint_recursive", says="layers that attended")
def layer_0_for_all(blocks, x, positions, attend):
    def attend_as_the_first(layer, q, k, v):
        return attend(0, q, k, v)

    return in_a_loop(blocks, x, positions, attend_as_the_first)


@wrong("checkpoint_recursive", says="x got no gradient")
def x_taken_out_of_the_graph(blocks, x, positions, attend):
    return in_a_loop(blocks, x.detach(), positions, attend)


@wrong("checkpoint_recursive", says="block calls: expected at most 28")
def one_block_less_each_time(blocks, x, positions, attend):
    if len(blocks) == 1:
        return blocks[0](x, positions, attend)
    first = blocks[:-1]
    x = checkpointing.checkpoint(
        lambda x: one_block_less_each_time(first, x, positions, attend), x
    )
    return blocks[-1](x, positions, attend)


# checkpoint_selective


def by_a_function(run, inputs, weights, backward, kept=None, twice=False):
    """The exercise's Function, with the backward that is given."""

    class Selective(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            made = run(*tensors[: len(inputs)])
            if twice:
                run(*tensors[: len(inputs)])
            ctx.save_for_backward(*(kept(made, tensors) if kept else tensors))
            return tuple(made @ weight.T for weight in tensors[len(inputs) :])

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx.saved_tensors, grads)

    return Selective.apply(*inputs, *weights)


def gradients_by_hand(saved, grads, run, num_inputs):
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(True) for x in saved[:num_inputs]]
        made = run(*leaves)
    weights, below = saved[num_inputs:], torch.zeros_like(made)
    weight_grads = []
    for grad, weight in zip(grads, weights):
        below = below + grad @ weight
        rows, grad_rows = (x.reshape(-1, x.shape[-1]) for x in (made.detach(), grad))
        weight_grads.append(torch.einsum("ti,to->oi", rows, grad_rows))
    made.backward(below)
    return [leaf.grad for leaf in leaves], weight_grads


@right("checkpoint_selective")
def by_hand(run, inputs, weights):
    def backward(saved, grads):
        below, weight_grads = gradients_by_hand(saved, grads, run, len(inputs))
        return (*below, *weight_grads)

    return by_a_function(run, inputs, weights, backward)


@right("checkpoint_selective")
def with_a_linear_graph(run, inputs, weights):
    """Of the second run all is differentiated, but for the products."""

    def backward(saved, grads):
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        with torch.enable_grad():
            leaves = [x.detach().clone().requires_grad_() for x in saved[: len(inputs)]]
            made = run(*leaves)
            rows = made.reshape(-1, made.shape[-1])
        below = torch.zeros_like(rows)
        for grad, weight in zip(flat, saved[len(inputs) :]):
            below += torch.mm(grad, weight)
        rows.backward(below)
        learned = [torch.mm(grad.t(), rows.detach()) for grad in flat]
        return (*(leaf.grad for leaf in leaves), *learned)

    return by_a_function(run, list(inputs), list(weights), backward)


@wrong("checkpoint_selective", says="Keep the inputs and the weights")
def nothing_forgotten(run, inputs, weights):
    made = run(*inputs)
    return tuple(made @ weight.T for weight in weights)


@wrong("checkpoint_selective", says="A product was computed again")
def products_again(run, inputs, weights):
    def backward(saved, grads):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in saved]
            made = run(*leaves[: len(inputs)])
            outs = [made @ weight.T for weight in leaves[len(inputs) :]]
        torch.autograd.backward(outs, grads)
        return tuple(leaf.grad for leaf in leaves)

    return by_a_function(run, inputs, weights, backward)


@wrong("checkpoint_selective", says="three weights")
def the_last_gradient_alone(run, inputs, weights):
    def backward(saved, grads):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in saved[: len(inputs)]]
            made = run(*leaves)
        rows = made.detach().flatten(0, -2)
        made.backward(grads[-1] @ saved[-1])
        learned = [grad.flatten(0, -2).T @ rows for grad in grads]
        return (*(leaf.grad for leaf in leaves), *learned)

    return by_a_function(run, inputs, weights, backward)


@wrong("checkpoint_selective", says="a gradient for each of the weights")
def weights_not_learned(run, inputs, weights):
    def backward(saved, grads):
        below, _ = gradients_by_hand(saved, grads, run, len(inputs))
        return (*below, *[None for _ in weights])

    return by_a_function(run, inputs, weights, backward)


@wrong("checkpoint_selective", says="go backward through it")
def gain_not_learned(run, inputs, weights):
    def backward(saved, grads):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in saved[: len(inputs)]]
            made = run(*leaves)
        pairs = list(zip(grads, saved[len(inputs) :]))
        below = torch.autograd.grad(made, leaves, sum(g @ w for g, w in pairs))
        rows = made.detach().flatten(0, -2)
        return (*below, *(g.flatten(0, -2).T @ rows for g, _ in pairs))

    return by_a_function(run, inputs, weights, backward)


@wrong("checkpoint_selective", says="a batch")
def rows_without_a_batch(run, inputs, weights):
    def backward(saved, grads):
        below, weight_grads = gradients_by_hand(saved, grads, run, len(inputs))
        if grads[0].dim() > 2:
            weight_grads = [2 * grad for grad in weight_grads]
        return (*below, *weight_grads)

    return by_a_function(run, inputs, weights, backward)


@wrong("checkpoint_selective", says="times run was called: expected at most 2")
def run_for_each_weight(run, inputs, weights):
    return tuple(by_hand(run, inputs, [weight])[0] for weight in weights)


@wrong("checkpoint_selective", says="one per weight")
def a_single_tensor(run, inputs, weights):
    return by_hand(run, inputs, weights)[0]


@wrong("checkpoint_selective", says="Gradients come in the order of forward's inputs")
def in_the_wrong_order(run, inputs, weights):
    def backward(saved, grads):
        below, weight_grads = gradients_by_hand(saved, grads, run, len(inputs))
        return (*weight_grads, *below)

    return by_a_function(run, inputs, weights, backward)


@wrong("checkpoint_selective", says="nothing that `run` made")
def what_run_made_on_the_context(run, inputs, weights):
    class Selective(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            ctx.made = run(*tensors[: len(inputs)])
            return tuple(ctx.made @ weight.T for weight in tensors[len(inputs) :])

        @staticmethod
        def backward(ctx, *grads):
            saved, n = ctx.saved_tensors, len(inputs)
            below, _ = gradients_by_hand(saved, grads, run, n)
            rows = ctx.made.flatten(0, -2)
            return (*below, *(grad.flatten(0, -2).T @ rows for grad in grads))

    return Selective.apply(*inputs, *weights)


@wrong("checkpoint_selective")
def rows_of_the_input(run, inputs, weights):
    def backward(saved, grads):
        below, _ = gradients_by_hand(saved, grads, run, len(inputs))
        rows = saved[0].flatten(0, -2)
        return (*below, *(grad.flatten(0, -2).T @ rows for grad in grads))

    return by_a_function(run, inputs, weights, backward)


@wrong("checkpoint_selective", says="three weights")
def mean_of_the_products(run, inputs, weights):
    def backward(saved, grads):
        equal = [grad / len(grads) for grad in grads]
        below, weight_grads = gradients_by_hand(saved, equal, run, len(inputs))
        return (*below, *(len(grads) * grad for grad in weight_grads))

    return by_a_function(run, inputs, weights, backward)
