import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from answers import right, wrong
from lib import checkpointing
from lib.checkpointing import run_blocks

# next_token_loss


@right("next_token_loss")
def by_gathering(logits, token_ids):
    log_probs = logits[:, :-1].log_softmax(-1)
    return -log_probs.gather(-1, token_ids[:, 1:].unsqueeze(-1)).mean()


@right("next_token_loss")
def one_token_at_a_time(logits, token_ids):
    losses = []
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


@wrong("training_bytes", says="two numbers a parameter")
def one_moment(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, optimizer=4)


@wrong("training_bytes", says="two matrices")
def tied_embeddings(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, embeddings=1)


@wrong("training_bytes", says="Each norm has a gain")
def norms_forgotten(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, norms=0)


@wrong("training_bytes", says="input is kept too")
def inputs_forgotten(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, inputs=0)


@wrong("training_bytes", says="all sequences share them")
def rotations_for_each_sequence(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, sequences_of_rotations=batch_size)


@wrong("training_bytes")
def keys_for_every_head(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, kv_heads=config.num_heads)


@wrong("training_bytes", says="one layer's activations")
def one_layer(config, batch_size, seq_len):
    return sizes(config, batch_size, seq_len, layers=1)


@wrong("training_bytes", says="a dict with those four keys")
def a_total(config, batch_size, seq_len):
    return sum(sizes(config, batch_size, seq_len).values())


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


@wrong("checkpoint", says="save x alone")
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


@wrong("checkpoint", says="save x alone")
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


@wrong("best_num_segments")
def upside_down(num_layers, edge_bytes, block_bytes):
    return by_trying_all(num_layers, block_bytes, edge_bytes)


@wrong("best_num_segments")
def segments_not_rounded_up(num_layers, edge_bytes, block_bytes):
    return min(
        range(1, num_layers + 1),
        key=lambda k: k * edge_bytes + num_layers / k * block_bytes,
    )


# blocks_to_keep


@right("blocks_to_keep")
def counting_down(num_layers, edge_bytes, block_bytes, budget_bytes):
    for num_kept in range(num_layers, 0, -1):
        held = (num_layers - num_kept) * edge_bytes + num_kept * block_bytes
        if held <= budget_bytes:
            return num_kept
    raise ValueError("too small a budget")


@right("blocks_to_keep")
def by_division(num_layers, edge_bytes, block_bytes, budget_bytes):
    spare = budget_bytes - num_layers * edge_bytes
    num_kept = spare // (block_bytes - edge_bytes)
    if num_kept < 1:
        raise ValueError(budget_bytes)
    return num_kept if num_kept < num_layers else num_layers


@wrong("blocks_to_keep", says="There is room for more")
def edges_of_all(num_layers, edge_bytes, block_bytes, budget_bytes):
    num_kept = (budget_bytes - num_layers * edge_bytes) // block_bytes
    if num_kept < 0:
        raise ValueError(budget_bytes)
    return min(num_kept, num_layers)


@wrong("blocks_to_keep", says="Raise ValueError")
def edges_forgotten(num_layers, edge_bytes, block_bytes, budget_bytes):
    num_kept = budget_bytes // block_bytes
    if num_kept < 1:
        raise ValueError(budget_bytes)
    return min(num_kept, num_layers)


@wrong("blocks_to_keep", says="There is room for more")
def room_to_recompute_beside(num_layers, edge_bytes, block_bytes, budget_bytes):
    return max(
        0,
        by_division(num_layers, edge_bytes, block_bytes, budget_bytes) - 1,
    )


@wrong("blocks_to_keep", says="Raise ValueError")
def zero_instead_of_an_error(num_layers, edge_bytes, block_bytes, budget_bytes):
    try:
        return by_division(num_layers, edge_bytes, block_bytes, budget_bytes)
    except ValueError:
        return 0


@wrong("blocks_to_keep", says="not that many blocks")
def more_blocks_than_there_are(num_layers, edge_bytes, block_bytes, budget_bytes):
    counting_down(num_layers, edge_bytes, block_bytes, budget_bytes)
    spare = budget_bytes - num_layers * edge_bytes
    return spare // (block_bytes - edge_bytes)


@wrong("blocks_to_keep", says="give an int")
def blocks_as_a_float(num_layers, edge_bytes, block_bytes, budget_bytes):
    return float(counting_down(num_layers, edge_bytes, block_bytes, budget_bytes))


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


@wrong("checkpoint_recursive", says="one edge a halving")
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


@wrong("checkpoint_recursive", says="from what the first gives")
def second_half_first(blocks, x, positions, attend):
    return larger_half_first(list(blocks)[::-1], x, positions, attend)


@wrong("checkpoint_recursive", says="raised RecursionError")
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
