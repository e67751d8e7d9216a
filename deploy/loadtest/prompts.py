"""Prompts of exact token counts, cut out of a text with the served model's tokenizer."""

import lzma
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from cluster.errors import ConfigError
from deploy.loadtest.planned import Part
from deploy.loadtest.words import Tokenizer

HELD_OUT_TEXT = Path(__file__).parents[1] / "models" / "corpus" / "heldout.txt.xz"

# As many different beginnings as bits can tell apart.
_BEGINNING_BITS = 30
_BEGINS_A_WORD = re.compile(r" [A-Za-z]")
_FEWEST_WORDS = 8


def read_text(path: Path = HELD_OUT_TEXT) -> str:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


class PromptSource:
    """Turns parts into tokens: the same for equal keys, other ones for other keys.

    Everything is cut where a word begins with its space, which tokenizers keep apart from what is
    before it. So the text of a prompt becomes the very same tokens again, wherever parts meet.
    A part is some words that only its key has, a stretch of the text, and words of one token
    each that fill it up to its exact length.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, seed: int) -> None:
        token_ids = tokenizer.encode(text)
        begins = _word_begins(tokenizer, token_ids)
        places = [place for place, is_begin in enumerate(begins) if is_begin]
        words = {token_ids[p] for p in places if p + 1 < len(begins) and begins[p + 1]}
        if len(words) < _FEWEST_WORDS:
            raise ConfigError(
                f"the tokenizer has a single token for {len(words)} words of the text only: "
                "prompts of exact lengths cannot be built with it"
            )
        self._words = sorted(words)
        # From a begin to a begin, so that the end can be followed by the start again.
        self._token_ids = token_ids[places[0] : places[-1]]
        self._begins = [place - places[0] for place in places[:-1]]
        self._last_begin = _last_begins(begins[places[0] : places[-1]])
        self._beginning = math.ceil(_BEGINNING_BITS / math.log2(len(words)))
        self._seed = seed
        self._num_made = 0

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        """Return a prompt that no other one shares its beginning with."""
        self._num_made += 1
        return self.prompt_of((Part(f"prompt {self._num_made}", num_tokens),))

    def prompt_of(self, parts: Iterable[Part]) -> tuple[int, ...]:
        """Return the tokens of all parts, one after the other."""
        token_ids: list[int] = []
        for part in parts:
            self._add(part, token_ids)
        return tuple(token_ids)

    def _add(self, part: Part, token_ids: list[int]) -> None:
        digest = xxhash.xxh3_64_intdigest(f"{self._seed}/{part.key}".encode())
        beginning = min(self._beginning, part.num_tokens)
        rest = digest
        for _ in range(beginning):
            rest, index = divmod(rest, len(self._words))
            token_ids.append(self._words[index])
        place = self._begins[digest % len(self._begins)]
        wanted = part.num_tokens - beginning
        while wanted:
            taken = self._taken(place, wanted)
            if not taken:
                break
            token_ids += taken
            wanted -= len(taken)
            place = 0
        for number in range(wanted):
            token_ids.append(self._words[(digest + number) % len(self._words)])

    def _taken(self, place: int, wanted: int) -> list[int]:
        """Return tokens from a word's begin to a word's begin, at most `wanted`."""
        end = place + wanted
        if end >= len(self._token_ids):
            return self._token_ids[place:]
        return self._token_ids[place : self._last_begin[end]]


def _word_begins(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[bool]:
    """Return for each token whether it begins a word, with the space before it."""
    if not token_ids:
        return []
    # Behind another token, as decoders drop the space of a text's first one.
    before = token_ids[0]
    length = len(tokenizer.decode([before]))
    verdict = {
        each: _BEGINS_A_WORD.match(tokenizer.decode([before, each])[length:]) is not None
        for each in set(token_ids)
    }
    return [verdict[each] for each in token_ids]


def _last_begins(begins: Sequence[bool]) -> list[int]:
    """Return for each place the last begin at or before it."""
    last, found = 0, []
    for place, is_begin in enumerate(begins):
        last = place if is_begin else last
        found.append(last)
    return found


def text_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return a prompt as text; raise `ConfigError` if it would not be these tokens again."""
    text = tokenizer.decode(token_ids)
    again = tokenizer.encode(text)
    if again != list(token_ids):
        raise ConfigError(
            f"a prompt of {len(token_ids)} tokens is {len(again)} tokens as text: this tokenizer "
            "needs an endpoint that takes token ids"
        )
    return text


class FileTokenizer:
    """A model folder's or Hugging Face name's own tokenizer."""

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
        self.num_added_specials: int = self._tokenizer.num_special_tokens_to_add(False)

    def encode(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text
