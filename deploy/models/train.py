"""Train the bundled model `tandem-tiny` from the corpus beside this file.

Trains a byte-level BPE tokenizer, then a Llama of about 3.8 M parameters, and writes a folder
that transformers and vLLM load. Seed, step count and thread count are fixed, so that a second
run on the same build of torch gives the same weights. The bundled weights took 38 minutes on
one thread of a busy CPU.

    python -m deploy.models.train
    python -m deploy.models.train --steps 20 --output /tmp/tandem-tiny
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
CHAT_TEMPLATE = HERE / "chat_template.jinja"
OUTPUT = HERE / "tandem-tiny"

SEED = 20240607
THREADS = 1
STEPS = 1200
BATCH_TOKENS = 2048
SHORT_WINDOW = 512
LONG_WINDOW = 2048
LONG_SHARE = 0.15
CHAT_SHARE = 0.15
WARMUP_STEPS = 100
PEAK_LR = 3e-3
FINAL_LR_SHARE = 0.1
WEIGHT_DECAY = 0.1
LOG_EVERY = 25

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
TOOL, END = "<|tool|>", "<|end|>"
# The position in this tuple is the token id.
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, SYSTEM, TOOL, END)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, concise assistant.",
    "Continue the text of the user.",
)
SAMPLE_PROMPTS = (
    "In the beginning",
    "And it came to pass in those days, that",
    "The king said unto the man,",
    "What is wisdom?",
)

Chapter = list[str]
Window = list[int]
Source = Callable[[int], Window]


def read_corpus(part: str) -> list[Chapter]:
    """Chapters of `part` ("train" or "heldout"), each a list of verses."""
    with lzma.open(CORPUS / f"{part}.txt.xz", "rt", encoding="utf-8") as file:
        return [chapter.strip().split("\n") for chapter in file.read().split("\n\n")]


def train_tokenizer(chapters: list[Chapter]) -> Tokenizer:
    """Byte-level BPE, so that any UTF-8 text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(chapter) for chapter in chapters), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, token_id(BOS))]
    )
    return tokenizer


def token_id(token: str) -> int:
    """The id of a special token."""
    return SPECIAL_TOKENS.index(token)


def encode(tokenizer: Tokenizer, text: str) -> Window:
    """Token ids of plain text, without BOS."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def text_stream(tokenizer: Tokenizer, chapters: list[Chapter]) -> Window:
    """All chapters in order, each between BOS and EOS."""
    stream: Window = []
    for chapter in chapters:
        stream += [token_id(BOS), *encode(tokenizer, "\n".join(chapter)), token_id(EOS)]
    return stream


def text_source(stream: Window, rng: random.Random) -> Source:
    """Windows cut anywhere from the stream."""

    def cut(length: int) -> Window:
        start = rng.randrange(len(stream) - length)
        # A completion always starts with BOS, also when its prompt is from mid-chapter.
        return [token_id(BOS), *stream[start + 1 : start + length]]

    return cut


def turn(role: str, text: str) -> str:
    """One message as the chat template writes it."""
    return f"{role}{text}{END}"


def conversation(chapters: list[Chapter], rng: random.Random) -> str:
    """A passage as a chat: the user quotes one or two verses, the assistant goes on."""
    chapter = rng.choice(chapters)
    at = rng.randrange(max(1, len(chapter) - 4))
    text = BOS
    if rng.random() < 0.25:
        text += turn(SYSTEM, rng.choice(SYSTEM_PROMPTS))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        asked, told = rng.randint(1, 2), rng.randint(1, 6)
        if at + asked >= len(chapter):
            break
        text += turn(USER, "\n".join(chapter[at : at + asked]))
        text += turn(ASSISTANT, "\n".join(chapter[at + asked : at + asked + told]))
        at += asked + told
    return text


def chat_source(tokenizer: Tokenizer, chapters: list[Chapter], rng: random.Random) -> Source:
    """Windows packed with whole conversations, the last one cut."""

    def pack(length: int) -> Window:
        window: Window = []
        while len(window) < length:
            window += encode(tokenizer, conversation(chapters, rng))
        return window[:length]

    return pack


def mixed_source(text: Source, chat: Source, rng: random.Random) -> Source:
    """Mostly text, now and then chat."""

    def pick(length: int) -> Window:
        return chat(length) if rng.random() < CHAT_SHARE else text(length)

    return pick


def batches(source: Source, steps: int) -> Iterator[torch.Tensor]:
    """Batches of equal token count: short windows first, long ones at the end."""
    for step in range(steps):
        length = LONG_WINDOW if step >= steps * (1 - LONG_SHARE) else SHORT_WINDOW
        yield torch.tensor([source(length) for _ in range(BATCH_TOKENS // length)])


def model_config() -> LlamaConfig:
    """The architecture of tandem-tiny."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LONG_WINDOW,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=token_id(BOS),
        eos_token_id=token_id(EOS),
        pad_token_id=token_id(PAD),
    )


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays matrices only: decay would pull the norm gains to zero."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))


def lr_share(step: int, steps: int) -> float:
    """Linear warm-up, then cosine, as a share of the peak."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine


@dataclass
class Progress:
    """Prints the mean loss of the last few steps."""

    steps: int
    started: float
    total: float = 0.0

    def add(self, step: int, loss: float) -> None:
        self.total += loss
        if (step + 1) % LOG_EVERY == 0:
            seconds = time.monotonic() - self.started
            mean = self.total / LOG_EVERY
            print(f"step {step + 1}/{self.steps} loss {mean:.3f} {seconds:.0f} s", flush=True)
            self.total = 0.0


def train_model(model: LlamaForCausalLM, source: Source, steps: int) -> None:
    """Optimise the model in place."""
    optimizer = optimizer_for(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, steps))
    progress = Progress(steps, time.monotonic())
    model.train()
    for step, batch in enumerate(batches(source, steps)):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.add(step, loss.item())


def window_losses(model: LlamaForCausalLM, window: Window) -> torch.Tensor:
    """Mean loss of each quarter of one window."""
    ids = torch.tensor(window)
    with torch.inference_mode():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return torch.stack([part.mean() for part in losses.chunk(4)])


def heldout_loss(model: LlamaForCausalLM, stream: Window) -> list[float]:
    """Mean loss of each quarter of the context, over the held-out text."""
    starts = range(0, len(stream) - LONG_WINDOW, LONG_WINDOW)
    windows = ([token_id(BOS), *stream[at + 1 : at + LONG_WINDOW]] for at in starts)
    quarters = torch.stack([window_losses(model, window) for window in windows])
    return [float(loss) for loss in quarters.mean(dim=0)]


def print_samples(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Greedy continuations, as text and as chat."""
    for prompt in SAMPLE_PROMPTS:
        for text in (BOS + prompt, BOS + turn(USER, prompt) + ASSISTANT):
            ids = torch.tensor([encode(tokenizer, text)])
            output = model.generate(ids, max_new_tokens=80, do_sample=False)
            print("---", tokenizer.decode(output[0].tolist(), skip_special_tokens=False))


def save_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """tokenizer.json, and the config that AutoTokenizer and vLLM read."""
    tokenizer.save(str(output / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": list(SPECIAL_TOKENS[3:]),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE.read_text(encoding="utf-8").rstrip("\n"),
    }
    text = json.dumps(config, indent=2) + "\n"
    (output / "tokenizer_config.json").write_text(text, encoding="utf-8")


def save_model(model: LlamaForCausalLM, output: Path) -> None:
    """Weights as bfloat16, with both configs."""
    model.generation_config = GenerationConfig(
        bos_token_id=token_id(BOS),
        eos_token_id=[token_id(EOS), token_id(END)],
        pad_token_id=token_id(PAD),
    )
    model.to(torch.bfloat16)
    model.save_pretrained(output)
    # Written readable by its owner alone, and containers run as other users.
    (output / "model.safetensors").chmod(0o644)


def make_deterministic() -> None:
    """Same seed, same threads, same weights."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)


def train(output: Path, steps: int) -> None:
    """The whole run: tokenizer, model, held-out loss, samples."""
    make_deterministic()
    rng = random.Random(SEED)
    chapters = read_corpus("train")
    tokenizer = train_tokenizer(chapters)
    stream = text_stream(tokenizer, chapters)
    print(f"{len(chapters)} chapters, {len(stream)} tokens")
    model = LlamaForCausalLM(model_config())
    print(f"{model.num_parameters()} parameters", flush=True)
    chat = chat_source(tokenizer, chapters, rng)
    train_model(model, mixed_source(text_source(stream, rng), chat, rng), steps)
    output.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, output)
    save_model(model, output)
    model.float().eval()
    losses = heldout_loss(model, text_stream(tokenizer, read_corpus("heldout")))
    print("held-out loss by quarter of the context:", *(f"{loss:.3f}" for loss in losses))
    print_samples(model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model from its corpus.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    train(args.output, args.steps)


if __name__ == "__main__":
    main()
