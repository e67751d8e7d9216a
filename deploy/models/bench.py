"""Write the bench model: a Llama of about 80 M parameters with random weights.

Large enough that a prefill costs something on a CPU, and generated, so that it need not be in
the repository. It shares the tokenizer of tandem-tiny. Does nothing where the same model is
already there.

    python -m deploy.models.bench
    python -m deploy.models.bench --output DIR
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BUNDLED = Path(__file__).resolve().parent / "tandem-tiny"
OUTPUT = Path(".cache/bench-model")
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

SEED = 20240607
STD = 0.02
VOCAB_SIZE = 4096
LAYERS = 12
HIDDEN = 768
HEADS = 12
KV_HEADS = 4
HEAD_DIM = 64
INTERMEDIATE = 2048

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "initializer_range": STD,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def layer_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's weights, by their names in the checkpoint."""
    return {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight of the checkpoint. Embeddings are tied, so there is no lm_head."""
    yield "model.embed_tokens.weight", (VOCAB_SIZE, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in layer_shapes().items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)


def random_weights() -> dict[str, torch.Tensor]:
    """Normal matrices and unit norm gains, the same on every call."""
    import torch

    generator = torch.Generator().manual_seed(SEED)

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=generator) * STD).to(torch.bfloat16)

    return {name: weight(shape) for name, shape in shapes()}


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` and rename: a concurrent reader never sees half a file."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write(unfinished)
    unfinished.replace(path)


def write_weights(path: Path) -> None:
    """model.safetensors, with the metadata that transformers asks for."""
    from safetensors.torch import save_file

    save_file(random_weights(), path, metadata={"format": "pt"})
    path.chmod(0o644)


def is_current(path: Path) -> bool:
    """Whether `path` holds this model with today's tokenizer."""
    names = (*COPIED, "config.json", "model.safetensors")
    if not all((path / name).is_file() for name in names):
        return False
    same = [(path / name).read_bytes() == (BUNDLED / name).read_bytes() for name in COPIED]
    return all(same) and json.loads((path / "config.json").read_text("utf-8")) == CONFIG


def write_bench_model(path: Path) -> None:
    """All files, config.json last: its presence says that the others are complete."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").unlink(missing_ok=True)
    for name in COPIED:
        replace_file(path / name, partial(shutil.copyfile, BUNDLED / name))
    replace_file(path / "model.safetensors", write_weights)
    text = json.dumps(CONFIG, indent=2) + "\n"
    replace_file(path / "config.json", lambda file: file.write_text(text, "utf-8"))


def ensure_bench_model(path: Path) -> Path:
    """Write the bench model to `path` unless it is already there, and return `path`."""
    if not is_current(path):
        write_bench_model(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the random-weight bench model.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    print(ensure_bench_model(parser.parse_args().output))


if __name__ == "__main__":
    main()
