"""`make fuzz`: a coverage-guided fuzzer at the decoders of all three protocols.

Whatever bytes come, a decoder returns a message that survives its own encoding, or raises
`WireError`. It begins with the messages that `tests/integration/test_fuzz.py` changes at random;
what reaches new lines is kept in the corpus and changed further. Arguments are libFuzzer's. A
frame that fails is written to `.cache/fuzz/crash-<hash>`; name that file to decode it alone.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["cluster.wire"]):
    from cluster.wire import WireError
    from tests.wire_seeds import PROTOCOLS

FOLDER = Path(".cache/fuzz")
DEFAULTS = [
    "-max_total_time=60",
    "-max_len=4096",
    "-timeout=5",
    "-rss_limit_mb=1024",
    f"-artifact_prefix={FOLDER}/",
]


def decode(frame: bytes) -> None:
    """Try one frame on every decoder."""
    for codec, _ in PROTOCOLS.values():
        try:
            message = codec.decode(frame)
        except WireError:
            continue
        # By their bytes: what is not a number is not equal to itself.
        encoded = codec.encode(message)
        assert codec.encode(codec.decode(encoded)) == encoded, message


def main() -> None:
    corpus = FOLDER / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, (codec, kinds) in PROTOCOLS.items():
        for number, message in enumerate(kinds):
            seed = corpus / f"seed-{name.replace(' ', '-')}-{number}"
            seed.write_bytes(codec.encode(message))
    given = sys.argv[1:]
    folders = [] if any(not each.startswith("-") for each in given) else [str(corpus)]
    atheris.Setup([sys.argv[0], *DEFAULTS, *given, *folders], decode)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
