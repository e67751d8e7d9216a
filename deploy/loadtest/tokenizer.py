"""The served model's own tokenizer, read from its folder or by its Hugging Face name."""

from collections.abc import Sequence
from pathlib import Path

from cluster.errors import ConfigError


class FileTokenizer:
    """Texts to token ids and back; special tokens are neither added nor left out."""

    def __init__(self, model: str) -> None:
        import tokenizers

        path = Path(model) / "tokenizer.json"
        try:
            self._tokenizer = (
                tokenizers.Tokenizer.from_file(str(path))
                if Path(model).is_dir()
                else tokenizers.Tokenizer.from_pretrained(model)
            )
        except Exception as error:
            # The library raises bare `Exception`s.
            raise ConfigError(f"{path}: no tokenizer to build prompts with: {error}") from None

    def encode(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text
