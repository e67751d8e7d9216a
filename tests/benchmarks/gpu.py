"""`make bench-gpu`: GB/s of blocks in GPUs' memory, beside what a GPU copies within itself.

Gather and scatter in one process, whole hand-offs between two: staged through pinned memory of
the host, and from GPU to GPU by each way that is there.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch

from tests.benchmarks.kv import EndProcess, Stack
from tests.benchmarks.kv_ends import MB, ScatteredBlocks
from tests.benchmarks.peers import Unavailable
from tests.benchmarks.sections import table, write_section

# One chunk, and what prompts have.
SIZES_MB = (4, 64, 256)
REPEATS = {4: 20, 64: 5, 256: 2}
NUM_ROUNDS = 5
COPY = "copy on the device"
# Ways between two processes, by the kind of device; the second end has another GPU if it must.
WAYS = {"cuda": ("shm", "cuda_ipc", "nccl"), "cpu": ("shm", "gloo")}
# NCCL joins no GPU to itself.
ONLY_ACROSS = ("nccl",)

Speeds = Mapping[tuple[str, int], float]
# Moves so many megabytes and returns the seconds that took.
Move = Callable[[int], float]


def devices_of(kind: str) -> list[str]:
    """Return the names of the devices of a kind that are here."""
    return ["cpu"] if kind == "cpu" else [f"cuda:{n}" for n in range(torch.cuda.device_count())]


def within(device: str) -> dict[str, Move]:
    """Return what one process does with its own blocks."""
    size = max(SIZES_MB)
    blocks = ScatteredBlocks(1, size, device)
    flat = torch.zeros(size * MB, dtype=torch.uint8, device=device)
    other, host = torch.ones_like(flat), memoryview(bytearray(size * MB))

    def copy(num_bytes: int) -> None:
        flat[:num_bytes].copy_(other[:num_bytes])
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def timed(move: Callable[[tuple[int, ...], int], None]) -> Move:
        def seconds(megabytes: int) -> float:
            ids = blocks.ids(megabytes)
            began = time.perf_counter()
            move(ids, megabytes * MB)
            return time.perf_counter() - began

        return seconds

    store = blocks.store
    return {
        COPY: timed(lambda _, n: copy(n)),
        "gather": timed(lambda ids, n: store.gather(0, ids, flat[:n])),
        "scatter": timed(lambda ids, n: store.scatter(0, ids, flat[:n])),
        "checksum": timed(lambda _, n: _checksum(blocks, flat[:n])),
        "gather to the host": timed(lambda ids, n: store.gather(0, ids, host[:n])),
        "scatter from the host": timed(lambda ids, n: store.scatter(0, ids, host[:n])),
    }


def _checksum(blocks: ScatteredBlocks, payload: torch.Tensor) -> None:
    blocks.store.checksum(payload)


def between(
    stack: ExitStack, ways: Sequence[str], devices: Sequence[str]
) -> Iterator[tuple[str, Move | str]]:
    """Yield each way between two processes by name: what moves blocks, or why nothing does."""
    for way in ways:
        for target in devices[:2]:
            is_across = target != devices[0]
            name = f"hand-off over {way}" + (", to another GPU" if is_across else "")
            if way in ONLY_ACROSS and not is_across:
                if len(devices) == 1:
                    yield name, "needs two GPUs"
                continue
            try:
                yield name, _handoff(stack, way, (devices[0], target))
            except Unavailable as error:
                yield name, str(error)


def _handoff(stack: ExitStack, way: str, devices: tuple[str, str]) -> Move:
    ends = []
    for seed, device in enumerate(devices, 1):
        ends.append(EndProcess(sys.executable, {}, "tandem", seed, [way, "{}", "", device]))
        stack.callback(ends[-1].close)
    pair = Stack(*ends)
    pair.fetch(1)
    pair.check(1)
    return lambda megabytes: float(pair.fetch(megabytes)["seconds"])


def measure(moves: Mapping[str, Move], rounds: int) -> Speeds:
    """Return the median GB/s of each by size, in interleaved rounds; the first one warms up."""
    speeds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for size in SIZES_MB:
            for name, move in moves.items():
                seconds = statistics.median(move(size) for _ in range(REPEATS[size]))
                if number > 0:
                    speeds[name, size].append(size * MB / seconds / 1e9)
    return {key: statistics.median(values) for key, values in speeds.items()}


def report(speeds: Speeds, missing: Mapping[str, str]) -> str:
    """Return the table, and what is not in it."""
    rows = []
    largest = SIZES_MB[-1]
    for name in dict.fromkeys(name for name, _ in speeds):
        share = speeds[name, largest] / speeds[COPY, largest]
        found = [f"{speeds[name, size]:.1f}" for size in SIZES_MB]
        rows.append([name, *found, f"{share:.2f}"])
    sizes = [f"{size} MB" for size in SIZES_MB]
    absent = "".join(f"\n\nNot measured: {name}: {why}" for name, why in missing.items())
    return (
        f"{table(['GB/s', *sizes, f'of the copy, {sizes[-1]}'], rows)}\n\nPayload over time: a copy"
        " reads and writes each byte of it once. Blocks of 16 x 64 KiB, scattered; hand-offs are"
        " whole: gathered, checksummed, moved, checked and scattered in chunks of 4 MB. Medians"
        f" of interleaved rounds.{absent}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--device", choices=sorted(WAYS), default="cuda", help="cpu: to try this")
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    devices = devices_of(options.device)
    if not devices:
        print("No GPU: torch finds none on this machine, and nothing was measured.")
        return 0
    with ExitStack() as stack:
        found = dict(between(stack, WAYS[options.device], devices))
        missing = {name: why for name, why in found.items() if isinstance(why, str)}
        moves = {name: move for name, move in found.items() if not isinstance(move, str)}
        body = report(measure({**within(devices[0]), **moves}, options.rounds), missing)
    if options.dry or options.device == "cpu":
        print(body)
    else:
        names = {torch.cuda.get_device_name(device) for device in devices}
        write_section("gpu", "make bench-gpu", f"{len(devices)} x {', '.join(names)}\n\n{body}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
