"""Train the embedded example model on CPython's own standard library.

In: the text of `frugal_bonsai.text.stdlib`, less its held-out modules. Out: a tokenizer and a Llama
of 3.4 M parameters in a folder that plain `transformers` loads, and a log of held-out perplexity.
One thread, one process, no network. Memory: about 1 GB.

The schedule is warm-up, stable, decay. With `--minutes` the decay begins when 70 % of the budget
are spent, and gets as many steps as fit the rest at the speed measured so far; the log's last line
tells the steps of both phases, and `--steps STABLE DECAY` replays that run at any speed.

    python tools/train_example_model.py --minutes 75 --compile --work WORK --out OUT
    python tools/train_example_model.py --evaluate OUT
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from frugal_bonsai.text import stdlib

SEPARATOR = "<|endoftext|>"
VOCABULARY = 4096
WINDOW_TOKENS = 256
LONG_WINDOW_TOKENS = 512
LONG_EVERY = 4  # one step in four has long windows, so that all 512 positions are trained
STEP_TOKENS = 4096
WARM_UP_STEPS = 100
DECAY_SHARE = 0.3


@dataclass
class Windows:
    """Windows of one length over one token stream; each epoch has its own phase and order."""

    stream: torch.Tensor
    length: int
    generator: torch.Generator
    _starts: list[int] = field(default_factory=list)

    def take(self, count: int) -> torch.Tensor:
        """Return the next `count` windows, each with one more token than `length`, as a target."""
        while len(self._starts) < count:
            phase = int(torch.randint(self.length, (1,), generator=self.generator))
            starts = torch.arange(phase, len(self.stream) - self.length - 1, self.length)
            order = torch.randperm(len(starts), generator=self.generator)
            self._starts += starts[order].tolist()
        taken, self._starts = self._starts[:count], self._starts[count:]
        return torch.stack([self.stream[start : start + self.length + 1] for start in taken])


def training_documents() -> tuple[list[str], list[str]]:
    """Return the documentation documents and the module sources that are trained on."""
    documentation = list(stdlib.documentation_documents())
    return documentation, [source for _, source in stdlib.stdlib_sources()]


def train_tokenizer(documents: list[str]) -> FastTokenizer:
    """Train a lossless byte-level BPE tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return FastTokenizer(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        model_max_length=LONG_WINDOW_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def encode_stream(tokenizer: FastTokenizer, documents: list[str]) -> torch.Tensor:
    """Return all documents as one int64 stream, each preceded by the separator."""
    encodings = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    stream: list[int] = []
    for encoding in encodings:
        stream += [tokenizer.bos_token_id, *encoding.ids]
    return torch.tensor(stream)


def held_out_stream(tokenizer: FastTokenizer) -> torch.Tensor:
    """Return `held_out_text` as one int64 stream."""
    return encode_stream(tokenizer, [stdlib.held_out_text()])


def evaluation_windows(stream: torch.Tensor) -> torch.Tensor:
    """Cut a stream into whole windows of 256 tokens, without overlap; the rest is dropped."""
    count = len(stream) // WINDOW_TOKENS
    return stream[: count * WINDOW_TOKENS].view(count, WINDOW_TOKENS)


@torch.no_grad()
def mean_nll(model: LlamaForCausalLM, windows_WT: torch.Tensor) -> float:
    """Return nats per token over tokens 2..256 of each window, given those before in the window."""
    total = 0.0
    for windows in windows_WT.split(8):
        logits = model(windows[:, :-1], use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
        total += loss.item()
    return total / (windows_WT.shape[0] * (windows_WT.shape[1] - 1))


def new_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=LONG_WINDOW_TOKENS,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def batches(
    documentation: torch.Tensor, sources: torch.Tensor, share: float, seed: int
) -> Iterator[torch.Tensor]:
    """Yield batches of `STEP_TOKENS`; `share` of each batch is documentation."""
    generator = torch.Generator().manual_seed(seed)
    short, long = [
        [Windows(stream, length, generator) for stream in (documentation, sources)]
        for length in (WINDOW_TOKENS, LONG_WINDOW_TOKENS)
    ]
    step = 0
    while True:
        step += 1
        pools = long if step % LONG_EVERY == 0 else short
        rows = STEP_TOKENS // pools[0].length
        from_documentation = round(rows * share)
        yield torch.cat(
            [pools[0].take(from_documentation), pools[1].take(rows - from_documentation)]
        )


def save(model: LlamaForCausalLM, tokenizer: FastTokenizer, folder: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder, weights in bf16."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The name that transformers 4 and 5 both know; 5 writes one that 4 does not.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)


class Log:
    """Writes one JSON object a line to a file and to the terminal."""

    def __init__(self, path: Path) -> None:
        """Start an empty log at `path`."""
        self._path = path
        self._begin = time.monotonic()
        path.write_text("", encoding="utf-8")

    def seconds(self) -> float:
        """Return the seconds since the log began."""
        return time.monotonic() - self._begin

    def write(self, **entry: object) -> None:
        """Append an entry, with the seconds so far."""
        line = json.dumps({"seconds": round(self.seconds()), **entry})
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclass
class Schedule:
    """Learning rate: linear warm-up, stable, linear decay to zero."""

    peak: float
    minutes: float | None
    stable_steps: int | None
    decay_steps: int | None

    def rate(self, step: int, seconds: float) -> float | None:
        """Return the learning rate of a step, counted from 0; None after the last one."""
        if self.stable_steps is None and self.minutes is not None:
            if seconds >= (1 - DECAY_SHARE) * self.minutes * 60:
                remaining = self.minutes * 60 - seconds
                self.stable_steps, self.decay_steps = step, int(step / seconds * remaining)
        if self.stable_steps is None or step < self.stable_steps:
            return self.peak * min(1.0, (step + 1) / WARM_UP_STEPS)
        assert self.decay_steps is not None
        left = 1 - (step - self.stable_steps) / self.decay_steps
        return self.peak * left if left > 0 else None


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )


def train(options: argparse.Namespace) -> None:
    """Train as the options say; write checkpoints to `work` and the result to `out`."""
    options.work.mkdir(parents=True, exist_ok=True)
    log = Log(options.work / "log.jsonl")
    documentation, sources = training_documents()
    tokenizer = train_tokenizer(documentation + sources)
    streams = [encode_stream(tokenizer, documents) for documents in (documentation, sources)]
    held_out_WT = evaluation_windows(held_out_stream(tokenizer))
    model = new_model(options.seed)
    log.write(
        options={name: str(value) for name, value in vars(options).items()},
        python=platform.python_version(),
        torch=torch.__version__,
        characters=[sum(map(len, documents)) for documents in (documentation, sources)],
        tokens=[len(stream) for stream in streams],
        held_out_windows=len(held_out_WT),
        parameters=sum(p.numel() for p in model.parameters()),
    )

    def loss_of(batch_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = model.model(batch_BT[:, :-1], use_cache=False).last_hidden_state
        logits_BTV = model.lm_head(hidden_BTD)
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten())

    loss_function = torch.compile(loss_of, dynamic=False) if options.compile else loss_of
    optimizer = new_optimizer(model)
    schedule = Schedule(options.learning_rate, options.minutes, *(options.steps or (None, None)))
    next_save_seconds = 300.0
    step = 0
    recent: list[float] = []
    for batch in batches(streams[0], streams[1], options.documentation_share, options.seed):
        rate = schedule.rate(step, log.seconds())
        if rate is None:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_function(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        step += 1
        if step % 50 == 0:
            log.write(step=step, rate=rate, loss=round(sum(recent) / len(recent), 4))
            recent = []
        if log.seconds() > next_save_seconds:
            next_save_seconds += 300.0
            nll = mean_nll(model, held_out_WT[::8])
            log.write(step=step, held_out_perplexity_of_every_8th=round(math.exp(nll), 3))
            save(model, tokenizer, options.work / "checkpoint")
    save(model, tokenizer, options.out)
    log.write(
        done=True,
        stable_steps=schedule.stable_steps,
        decay_steps=schedule.decay_steps,
        tokens_seen=step * STEP_TOKENS,
        perplexity_fp32=round(math.exp(mean_nll(model, held_out_WT)), 3),
    )


def evaluate(folder: Path) -> None:
    """Print the held-out perplexity of a finished model, as stored."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows_WT = evaluation_windows(held_out_stream(tokenizer))
    nll = mean_nll(model, windows_WT)
    print(f"windows {len(windows_WT)} of {WINDOW_TOKENS} tokens, perplexity {math.exp(nll):.3f}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded example model.")
    parser.add_argument("--minutes", type=float, help="time budget, decay included")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("STABLE", "DECAY"))
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--documentation-share", type=float, default=0.375)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; faster")
    parser.add_argument("--work", type=Path, help="folder for the log and the checkpoints")
    parser.add_argument("--out", type=Path, help="folder for the finished model")
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help="only evaluate this model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.evaluate:
        evaluate(options.evaluate)
        return
    if not (options.work and options.out and (options.minutes or options.steps)):
        parser.error("give --work, --out, and either --minutes or --steps")
    train(options)


if __name__ == "__main__":
    main()
