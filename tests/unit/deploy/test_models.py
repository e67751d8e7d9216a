"""The bundled model as committed, and the bench model as generated."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from deploy.models import bench

MODELS = Path(__file__).resolve().parents[3] / "deploy" / "models"
TINY = MODELS / "tandem-tiny"
SPECIAL = ["bos", "eos", "pad", "user", "assistant", "system", "tool", "end"]


def read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def fail(message: str) -> None:
    raise ValueError(message)


def render(messages: list[dict[str, Any]], **more: Any) -> str:
    environment = ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = fail
    # Jinja's own filter escapes for HTML; transformers puts this one in its place.
    environment.filters["tojson"] = json.dumps
    template = read_json(TINY / "tokenizer_config.json")["chat_template"]
    return environment.from_string(template).render(messages=messages, bos_token="<|bos|>", **more)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def heldout() -> str:
    return lzma.decompress((MODELS / "corpus" / "heldout.txt.xz").read_bytes()).decode()


def test_heldout_text_round_trips(tokenizer: Tokenizer, heldout: str) -> None:
    text = heldout[:50_000]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 3.5


@pytest.mark.parametrize(
    "text", ["", " \n\t x  ", "naïve café", "日本語 🙂", "\x00\x7f", "a" * 500]
)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_bos_comes_first_by_default(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("In the beginning").ids[0] == 0
    assert tokenizer.encode("In the beginning", add_special_tokens=False).ids[0] != 0


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(f"<|{name}|>") for name in SPECIAL] == list(range(8))


def test_heldout_is_long_enough_for_the_bench_prompts(heldout: str) -> None:
    assert len(heldout) > 200_000


def test_model_files_are_small() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 10_000_000


def test_config_is_the_documented_model() -> None:
    config = read_json(TINY / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 2048
    assert (config["hidden_size"], config["num_hidden_layers"]) == (256, 4)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert config["tie_word_embeddings"] is True


def test_generation_stops_at_eos_and_at_the_end_of_a_turn() -> None:
    assert read_json(TINY / "generation_config.json")["eos_token_id"] == [1, 7]


def test_chat_template_in_use_is_the_one_in_the_repository() -> None:
    source = (MODELS / "chat_template.jinja").read_text(encoding="utf-8")
    assert read_json(TINY / "tokenizer_config.json")["chat_template"] == source.rstrip("\n")


def test_chat_template_renders_every_role() -> None:
    roles = ("system", "user", "assistant", "tool")
    text = render([{"role": role, "content": role.upper()} for role in roles])
    assert text == (
        "<|bos|><|system|>SYSTEM<|end|><|user|>USER<|end|>"
        "<|assistant|>ASSISTANT<|end|><|tool|>TOOL<|end|>"
    )


def test_generation_prompt_opens_the_answer(tokenizer: Tokenizer) -> None:
    text = render([{"role": "user", "content": "Hear me"}], add_generation_prompt=True)
    assert text == "<|bos|><|user|>Hear me<|end|><|assistant|>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids[:2] == [0, 3]
    assert ids[-2:] == [7, 4]


def test_tools_and_tool_calls_render_as_json() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    calls = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
    text = render([{"role": "assistant", "content": None, "tool_calls": calls}], tools=tools)
    head, tail = text.split("<|assistant|>")
    assert (
        json.loads(head.removeprefix("<|bos|><|system|>Tools: ").removesuffix("<|end|>")) == tools
    )
    assert json.loads(tail.removesuffix("<|end|>")) == calls


def test_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown role: narrator"):
        render([{"role": "narrator", "content": "x"}])


def test_bench_model_has_about_80_million_parameters() -> None:
    total = 0
    for _, shape in bench.shapes():
        total += shape[0] * (shape[1] if len(shape) == 2 else 1)
    assert 75_000_000 < total < 85_000_000


def test_bench_model_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def write(path: Path) -> None:
        written.append(path)
        path.write_bytes(b"weights")

    monkeypatch.setattr(bench, "write_weights", write)
    for _ in range(2):
        assert bench.ensure_bench_model(tmp_path / "model") == tmp_path / "model"
    assert len(written) == 1
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        *bench.COPIED,
        "config.json",
        "model.safetensors",
    }


def test_changed_bench_config_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "write_weights", lambda path: path.write_bytes(b"weights"))
    bench.ensure_bench_model(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}', encoding="utf-8")
    bench.ensure_bench_model(tmp_path)
    assert read_json(tmp_path / "config.json") == bench.CONFIG


def test_bench_module_imports_without_torch() -> None:
    code = "import sys, deploy.models.bench; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=MODELS.parents[1])
