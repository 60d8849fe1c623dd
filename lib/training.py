"""Chapter 2: the loss, the loop, and the command that made the weights in data/.

    python -m lib.training    # interrupt it, run it again, and it goes on

A `Trainer` holds all that training carries from one step to the next: weights, optimizer,
random state and loss curve. Save it to a file after any step and load it: on a CPU, the
steps that follow are the same to the bit.
"""

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lib.config import MOBY, ModelConfig
from lib.figures import plotting
from lib.measure.meter import machine_facts
from lib.model import WEIGHTS, Transformer, attend_fused, save_model
from lib.text import DATA, encode, load_book, random_batch, split_book, windows

EVALUATE_EVERY = 250  # steps
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class TrainingConfig:
    num_steps: int = 5000
    batch_size: int = 8  # sequences
    seq_len: int = 512  # tokens
    learning_rate: float = 3e-3  # the peak, after the warm-up
    warmup_steps: int = 100
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    num_parts: int = 1  # of a batch, one after the other: see accumulate_gradients
    seed: int = 0

    def __post_init__(self):
        for name, least in (
            *(("num_steps", 1), ("batch_size", 1), ("seq_len", 2), ("warmup_steps", 0)),
            *(("learning_rate", 0), ("weight_decay", 0), ("max_grad_norm", 0)),
            ("num_parts", 1),
        ):
            value = getattr(self, name)
            is_whole = isinstance(getattr(TrainingConfig, name), int)
            if type(value) not in ((int,) if is_whole else (int, float)) or not (
                least <= value < math.inf
            ):
                kind = "an integer" if is_whole else "a number"
                raise ValueError(
                    f"{name}: expected {kind} of at least {least}, got {value!r}"
                )
        if self.num_parts > self.batch_size:
            raise ValueError(
                f"num_parts: expected 1 to batch_size = {self.batch_size}, "
                f"got {self.num_parts}"
            )


def next_token_loss(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats per token, of predicting each token from those before
    it.

    logits (B, T, V), where logits[:, t] predicts the token after t; token_ids (B, T).
    The last logits predict a token that is not there, so the mean is over B * (T - 1)
    predictions. Returns a scalar. Raises ValueError where there is nothing to predict.

    >>> logits = torch.tensor([[[0.0, 9.0], [9.0, 0.0], [0.0, 0.0]]])  # 1, 0, no idea
    >>> round(next_token_loss(logits, torch.tensor([[0, 1, 0]])).item(), 4)
    0.0001
    """
    shape = token_ids.shape
    if logits.shape[:-1] != shape or len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise ValueError(
            f"expected logits (B, T, V) and token_ids (B, T), with T of at least 2, "
            f"got {tuple(logits.shape)} and {tuple(shape)}"
        )

    return cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


def training_bytes(config: ModelConfig, batch_size: int, seq_len: int) -> dict[str, int]:
    """What training holds, in bytes of float32, by kind, of a model as ours: without
    biases, norms of queries and keys, or tied embeddings.

    weights, gradients: 4 per parameter. optimizer: AdamW's two running means, of the
    gradient and of its square. (Its step counters, 4 bytes per tensor, are left out.)
    activations: what autograd saves on a CPU for the backward pass of all blocks, each
    block's input included, with fused attention and without dropout. (On a GPU torch has
    a fused RMSNorm, which saves one vector less.)

    >>> config = ModelConfig(256, 1, 1, 1, d_model=2, d_ff=3, max_seq_len=8)
    >>> training_bytes(config, batch_size=1, seq_len=1)["weights"]  # 1,064 parameters
    4256
    """
    C, F = config.d_model, config.d_ff
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim

    # parameters: the matrices of a block and its two norms; embedding, norm, unembedding
    block = 2 * C * q_size + 2 * C * kv_size + 3 * C * F + 2 * C
    num_parameters = config.num_layers * block + 2 * config.vocab_size * C + C

    # activations: of each token in each block ...
    vectors = 7 * C + q_size + 2 * kv_size + 4 * F
    scalars = 2 + config.num_heads  # two norms, and attention's logsumexp
    # ... and of each position: sines and cosines, for queries and for keys
    rotations = 2 * config.head_dim
    num_floats = seq_len * (batch_size * (vectors + scalars) + rotations)
    return {
        "weights": 4 * num_parameters,
        "gradients": 4 * num_parameters,
        "optimizer": 8 * num_parameters,
        "activations": 4 * config.num_layers * num_floats,
    }


def step_bytes(config: ModelConfig, batch_size: int, seq_len: int) -> dict[str, int]:
    """What a training step holds at its peak beside weights, gradients and optimizer.

    In bytes, by kind, in float32 on a CPU, at the moment when the loss has been computed
    and nothing has been given back yet. For the course's model and 200 predictions or
    more that is the peak, to the byte. Where the loss weighs little beside the gradients
    inside the last MLP (few tokens, a small vocabulary, a wide MLP), the peak comes later
    and is higher, by up to some gradients of F floats per token. There are then, beside
    the blocks' activations,

    - two dropout masks in each block, C floats per token, if there is dropout (on a GPU
      a mask is one byte per number);
    - the last norm's input, its output and a vector between, C floats per token each, and
      one float per token;
    - the logits, V floats per token; a copy of them without each passage's last row;
      their log-softmax, which cross entropy saves; a copy of the targets; and two single
      floats, the loss and the number of its terms.
    """
    C, V = config.d_model, config.vocab_size
    num_tokens, num_predictions = batch_size * seq_len, batch_size * (seq_len - 1)
    num_masks = 2 * config.num_layers if config.dropout else 0
    logits, log_probs = 4 * num_tokens * V, 4 * num_predictions * V
    if batch_size > 1:
        loss = logits + 2 * log_probs + 8 * num_predictions + 8
    else:  # one passage: nothing is copied; the peak is one step on, with two gradients
        loss = 3 * log_probs + 8
    return {
        "activations": training_bytes(config, batch_size, seq_len)["activations"],
        "dropout masks": 4 * num_tokens * C * num_masks,
        "last norm": 4 * num_tokens * (3 * C + 1),
        "logits and loss": loss,
    }


def accumulate_gradients(
    model: Transformer, batch: torch.Tensor, num_parts: int
) -> float:
    """The loss of a batch and, added to each parameter's .grad, its gradient, in parts.

    batch (B, T) is cut along B into num_parts nearly equal parts, which go forward and
    backward one after the other: the activations of one part are in memory at a time. The
    gradients are those of the mean over the whole batch, `next_token_loss`, up to
    rounding (and to dropout, which is drawn for each part). Raises ValueError unless
    1 <= num_parts <= B.
    """
    B, T = batch.shape
    if type(num_parts) is not int or not 1 <= num_parts <= B:
        raise ValueError(
            f"num_parts: expected 1 to {B}, the size of the batch, got {num_parts!r}"
        )
    positions = torch.arange(T, device=batch.device)

    total = 0.0
    for part in batch.tensor_split(num_parts):
        loss = next_token_loss(model(part, positions, attend_fused), part)
        share = len(part) / B
        (loss * share).backward()
        total += loss.item() * share
    return total


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine from the peak down to zero, where it stays."""
    if step >= config.num_steps:
        return 0.0
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    num_steps_after = config.num_steps - config.warmup_steps
    done = (step - config.warmup_steps) / num_steps_after  # from 0 to 1
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def adamw(model: Transformer, config: TrainingConfig) -> torch.optim.AdamW:
    """The optimizer: matrices are decayed towards zero, gains of RMSNorm are not."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay)


class Trainer:
    """A training run, one `step()` at a time."""

    def __init__(
        self, model: Transformer, token_ids: torch.Tensor, config: TrainingConfig
    ):
        """token_ids (T,): the text to train on."""
        if not 2 <= config.seq_len <= model.config.max_seq_len:
            raise ValueError(
                f"seq_len: expected 2 to max_seq_len = {model.config.max_seq_len} "
                f"of the model, got {config.seq_len}"
            )
        self.model, self.token_ids, self.config = model, token_ids, config
        self.num_steps_done = 0
        self.losses = []  # nats per token, one per step
        self.generator = torch.Generator().manual_seed(config.seed)  # draws the batches
        self.optimizer = adamw(model, config)

    def step(self) -> float:
        """One batch: forward, backward, update. Returns the loss in nats per token."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.num_steps_done, self.config)
        batch = random_batch(
            self.token_ids, self.config.batch_size, self.config.seq_len, self.generator
        )

        loss = accumulate_gradients(self.model, batch, self.config.num_parts)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

        self.num_steps_done += 1
        self.losses.append(loss)
        return self.losses[-1]

    def state_dict(self) -> dict:
        return {
            "settings": self.settings(),
            "num_steps_done": self.num_steps_done,
            "losses": list(self.losses),
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batch_rng": self.generator.get_state(),
            "dropout_rng": torch.get_rng_state(),
        }

    def settings(self) -> dict:
        """What has to be the same for a saved run to go on."""
        return {"model": asdict(self.model.config), "training": asdict(self.config)}

    def load_state_dict(self, state: dict):
        """Go on from a `state_dict()`. Raises ValueError when it is of another run."""
        if state["settings"] != self.settings():
            raise ValueError(
                f"training state: expected a run of {self.settings()}, "
                f"got {state['settings']}"
            )
        self.num_steps_done, self.losses = state["num_steps_done"], list(state["losses"])
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["batch_rng"])
        torch.set_rng_state(state["dropout_rng"])


@torch.no_grad()
def held_out_loss(
    model: Transformer, token_ids: torch.Tensor, seq_len: int, batch_size: int = 8
) -> float:
    """Mean loss over the `windows` of token_ids (T,), in nats per token, each predicted
    from at most seq_len - 1 before it. Raises ValueError as `text.windows` does."""
    model.eval()
    total, count = 0.0, 0
    for batch in windows(token_ids, batch_size, seq_len):
        loss = next_token_loss(model(batch, torch.arange(seq_len), attend_fused), batch)
        total, count = total + loss.item() * len(batch), count + len(batch)
    return total / count


def main():
    parser = argparse.ArgumentParser(
        prog="python -m lib.training", description="Train the weights of data/."
    )
    parser.add_argument("--steps", type=int, default=TrainingConfig.num_steps)
    parser.add_argument("--seed", type=int, default=TrainingConfig.seed)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="more is rarely faster for a model this small",
    )
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help="the weights; default %(default)s"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=DATA / "results",
        help="loss curve, json and picture",
    )
    args = parser.parse_args()
    train(
        TrainingConfig(num_steps=args.steps, seed=args.seed),
        args.threads,
        args.out,
        args.results,
    )


def train(config: TrainingConfig, num_threads: int, out: Path, results: Path):
    """Train MOBY on the book; write weights to `out`, the curve (json, picture) to
    `results`.

    Its state is written beside `out` every SAVE_EVERY steps, and found there by the
    next call.
    """
    torch.set_num_threads(num_threads)
    torch.manual_seed(config.seed)
    train_ids, held_out_ids = split_book(encode(load_book()))
    trainer = Trainer(Transformer(MOBY), train_ids, config)
    held_out, seconds = [], 0.0  # [step, nats per byte] each; of all sessions together
    state_path = out.with_suffix(".state.pt")
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        trainer.load_state_dict(state["trainer"])
        held_out, seconds = state["held_out"], state["seconds"]
    start = time.perf_counter() - seconds

    bar = tqdm(
        range(trainer.num_steps_done, config.num_steps), file=sys.stdout, mininterval=5
    )
    for step in bar:
        if step % EVALUATE_EVERY == 0:
            held_out.append(
                [step, held_out_loss(trainer.model, held_out_ids, config.seq_len)]
            )
        loss = trainer.step()
        bar.set_postfix(
            train=f"{loss:.3f}", held_out=f"{held_out[-1][1]:.3f}", refresh=False
        )
        if (step + 1) % SAVE_EVERY == 0:
            seconds = time.perf_counter() - start
            state = {
                "trainer": trainer.state_dict(),
                "held_out": held_out,
                "seconds": seconds,
            }
            partial = state_path.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(state_path)
    loss = held_out_loss(trainer.model, held_out_ids, config.seq_len)
    held_out.append([config.num_steps, loss])
    seconds = time.perf_counter() - start

    save_model(trainer.model, out)
    result = {
        "command": shlex.join(["python", "-m", "lib.training", *sys.argv[1:]]),
        "machine": machine_facts(),
        "model": asdict(trainer.model.config),
        "training": asdict(config),
        "seconds": round(seconds),
        "held_out_nats_per_byte": held_out,
        "train_nats_per_byte": [round(loss, 4) for loss in trainer.losses],
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "training.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    plotting.use_course_style()
    plotting.plot_loss_curve(result).figure.savefig(results / "training.png")
    state_path.unlink(missing_ok=True)
    print(
        f"held-out loss {loss:.3f} nats per byte after {seconds / 60:.0f} minutes: {out}"
    )


if __name__ == "__main__":
    main()
