"""`make bench-loadtest`: is the load test's client fast, honest and right?

1. Against the bare source: 200 requests/s and 20,000 streamed tokens/s, one core each.
2. Against a simulated deployment of fixed timing: the same figures as `vllm bench serve`.
3. What the router and HAProxy sustain, apart and together, by the load test's own search.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster.config import BUNDLED_MODEL
from deploy import haproxy
from deploy.ports import free_port
from deploy.state import DeploymentState
from tests.benchmarks.sections import table, write_section
from tests.served import Served, start, stop, tandem_command, wait_until

NAME = "bench-loadtest"
CLIENT_CORE, SERVER_CORE = 0, 1

RATE, OUTPUT_TOKENS, SECONDS = 200, 100, 30
LATE_LIMIT_S = 0.002

PAIRS, PAIR_REQUESTS, APART_S = 5, 40, 0.5
PAIR_INPUT, PAIR_OUTPUT = 256, 32
# A prompt takes 256 ms and the next one comes 500 ms later: nobody ever waits for anybody.
FIXED = {"simulated.prefill_tokens_per_s": "1000", "simulated.decode_step_s": "0.02"}
AGREE_WITHIN = 0.03
# What `vllm bench serve` runs; the command itself asks for a distribution that the CPU one is not.
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""

QUICK = {"simulated.prefill_tokens_per_s": "1000000", "simulated.decode_step_s": "0.01"}
EVERY = {"simulated.decode_step_per_request_s": "0", "simulated.num_blocks": "4096"}
OBJECTIVES = ("--slo-ttft", "0.25", "--slo-tpot", "0.02")


def on_core(core: int) -> Callable[[], None]:
    """Return what a child process calls to stay on one core."""
    return lambda: os.sched_setaffinity(0, {core})


@contextlib.contextmanager
def bare_source(ttft_s: float = 0.05, itl_s: float = 0.01) -> Iterator[tuple[str, psutil.Process]]:
    """Run the bare source on the server's core; yield its address and process."""
    command = [sys.executable, "-m", "deploy.loadtest.source"]
    command += ["--ttft", str(ttft_s), "--itl", str(itl_s)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=on_core(SERVER_CORE)
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


def loadtest(url: str, *flags: str) -> tuple[dict[str, Any], float]:
    """Run the load test on the client's core; return its document and its CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        command = [sys.executable, "-m", "deploy.cli", "loadtest", "--url", url]
        command += ["--tokenizer", str(BUNDLED_MODEL), "--context", "2048"]
        command += ["--output", str(output), "--late-limit", "1", *flags]
        before = os.times()
        done = subprocess.run(command, preexec_fn=on_core(CLIENT_CORE), check=False)
        after = os.times()
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}"
        spent = after.children_user + after.children_system
        document: dict[str, Any] = json.loads(output.read_text())
        return document, spent - before.children_user - before.children_system


def bare(seconds: int) -> tuple[str, bool]:
    """Return what the client keeps up with, and whether that is enough."""
    shape = f"poisson:rate={RATE},input=128,output={OUTPUT_TOKENS},duration={seconds}"
    with bare_source() as (url, server):
        document, spent_s = loadtest(url, "--workload", shape)
        times = server.cpu_times()
    late, summary = document["scheduling"], document["summary"]
    stamps = sorted(moment for each in document["requests"] for moment in each["token_s"])
    # The middle of the run, without the first second's rise and the last one's fall.
    inside = sum(2.0 <= moment < seconds - 1.0 for moment in stamps) / (seconds - 3.0)
    is_kept = late["p99_s"] < LATE_LIMIT_S and summary["completed"] == summary["requests"]
    rows = [
        ["requests/s as due", f"{summary['offered_rate']:.1f}"],
        ["tokens/s received", f"{inside:.0f}"],
        ["completed", f"{summary['completed']} of {summary['requests']}"],
        [
            "sent late, ms: p50 / p99 / max",
            " / ".join(f"{late[key] * 1e3:.3f}" for key in ("p50_s", "p99_s", "max_s")),
        ],
        ["TTFT ms, mean / p99 (source: 50)", _ms(summary["ttft_s"], "mean", "p99")],
        ["ITL ms, p50 / p99 (source: 10)", _ms(summary["itl_s"], "p50", "p99")],
        [
            "CPU seconds, client with start and report / source",
            f"{spent_s:.1f} / {sum(times[:2]):.1f}",
        ],
    ]
    verdict = (
        f"p99 below {LATE_LIMIT_S * 1e3:g} ms, nothing lost: {'held' if is_kept else 'NOT held'}"
    )
    title = f"Client on core {CLIENT_CORE}, bare source on core {SERVER_CORE}, {seconds} s"
    return f"{title}:\n\n{table(['', ''], rows)}\n\nLimit: {verdict}.", is_kept


def _ms(figures: dict[str, float], *keys: str) -> str:
    return " / ".join(f"{figures[key] * 1e3:.2f}" for key in keys)


@contextlib.contextmanager
def deployment(settings: dict[str, str]) -> Iterator[Served]:
    """Run `tandem serve` on the server's core with simulated engines."""
    port = free_port()
    flags = {"model.path": str(BUNDLED_MODEL), "model.engine": "simulated", **EVERY, **settings}
    command = tandem_command(NAME, port, flags, "serve")
    pinned = ["taskset", "-c", str(SERVER_CORE), *command]
    served = start(pinned, f"http://127.0.0.1:{port}", BUNDLED_MODEL.name)
    try:
        yield served
    finally:
        stop(served)


def write_trace(path: Path) -> None:
    """Write the workload that both clients replay: no prompt shares anything with another."""
    with path.open("w") as file:
        for number in range(PAIR_REQUESTS):
            line = {
                "timestamp": round(number * APART_S * 1000),
                "input_length": PAIR_INPUT,
                "output_length": PAIR_OUTPUT,
                "hash_ids": [number],
            }
            file.write(json.dumps(line) + "\n")


def theirs(url: str, model: str, trace: Path, folder: Path) -> tuple[float, float]:
    """Return mean TTFT and median ITL in ms as `vllm bench serve` sees them."""
    command = [sys.executable, "-c", BENCH_SERVE]
    command += ["--backend", "vllm", "--base-url", url, "--model", model]
    command += ["--tokenizer", str(BUNDLED_MODEL), "--dataset-name", "timed_trace"]
    command += ["--dataset-path", str(trace), "--num-prompts", str(PAIR_REQUESTS)]
    command += ["--timed-trace-chunk-hash-size", "512", "--timed-trace-sec-multiplier", "0.001"]
    command += ["--disable-tqdm", "--save-result", "--result-dir", str(folder)]
    command += ["--result-filename", "theirs.json"]
    subprocess.run(command, preexec_fn=on_core(CLIENT_CORE), check=True, stdout=subprocess.DEVNULL)
    found = json.loads((folder / "theirs.json").read_text())
    assert found["completed"] == PAIR_REQUESTS, found
    return float(found["mean_ttft_ms"]), float(found["median_itl_ms"])


def ours(url: str, trace: Path) -> tuple[float, float]:
    summary = loadtest(url, "--workload", f"mooncake:path={trace}")[0]["summary"]
    return summary["ttft_s"]["mean"] * 1e3, summary["itl_s"]["p50"] * 1e3


def agree(pairs: int) -> tuple[str, bool]:
    """Return both clients' figures in interleaved pairs, and whether they agree."""
    taken: list[tuple[tuple[float, float], tuple[float, float]]] = []
    with tempfile.TemporaryDirectory() as name, deployment(FIXED) as served:
        folder = Path(name)
        write_trace(folder / "trace.jsonl")
        for number in range(pairs + 1):
            pair = (
                ours(served.url, folder / "trace.jsonl"),
                theirs(served.url, served.model, folder / "trace.jsonl", folder),
            )
            if number > 0:  # The first pair warms everything up.
                taken.append(pair)
    rows, ratios = [], []
    for index, what in enumerate(("mean TTFT ms", "p50 ITL ms")):
        mine, other = ([pair[side][index] for pair in taken] for side in (0, 1))
        ratios.append(statistics.median(a / b for a, b in zip(mine, other, strict=True)))
        shown = (f"{statistics.median(values):.2f}" for values in (mine, other))
        rows.append([what, *shown, f"{ratios[-1]:.4f}"])
    is_close = all(abs(ratio - 1) <= AGREE_WITHIN for ratio in ratios)
    head = ["", "tandem loadtest", "vllm bench serve", "ratio, median of pairs"]
    return (
        f"{PAIR_REQUESTS} requests of {PAIR_INPUT} + {PAIR_OUTPUT} tokens, one every {APART_S} s, "
        f"against a simulated 1P1D deployment without backlog; {pairs} interleaved pairs:\n\n"
        f"{table(head, rows)}\n\nLimit: within {AGREE_WITHIN:.0%}: "
        f"{'held' if is_close else 'NOT held'}.",
        is_close,
    )


@contextlib.contextmanager
def bare_haproxy(target: str) -> Iterator[str]:
    """Run HAProxy alone before `target`; yield its address."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "haproxy.cfg"
        path.write_text(
            "global\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 5s\n"
            "  timeout client 60s\n  timeout server 60s\n"
            f"listen all\n  bind 127.0.0.1:{port}\n  server one {target.removeprefix('http://')}\n"
        )
        command = [str(haproxy._binary()), "-db", "-f", str(path)]
        with subprocess.Popen(command, preexec_fn=on_core(SERVER_CORE)) as process:
            try:
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


def router_of(name: str) -> str:
    """Return the address of the router itself, behind the deployment's HAProxy."""
    state = DeploymentState.read(name)
    assert state is not None and state.temp_dir is not None
    folder = Path(state.temp_dir) / "haproxy"

    def replicas() -> list[str]:
        # Serve keeps one configuration per node, and at first it names only a fallback.
        (path,) = folder.rglob("haproxy.cfg")
        return re.findall(r"^\s*server SERVE_REPLICA\S* (\S+)", path.read_text(), re.MULTILINE)

    (address,) = wait_until(lambda: replicas() or None, 30.0, "HAProxy knows the router")
    return f"http://{address}"


def sustained(url: str, probe_s: float) -> list[object]:
    """Return the highest rate with which 90 % of requests meet the objectives, and its tokens."""
    # What has just started is slow once, and a search does not come back to a rate it gave up.
    loadtest(url, "--workload", f"poisson:rate=20,input=64,output={OUTPUT_TOKENS},duration=5")
    shape = f"poisson:rate=20,input=64,output={OUTPUT_TOKENS}"
    search = ("--find-goodput", "--start-rate", "20", "--probe", str(probe_s), "--precision", "0.1")
    document, _ = loadtest(url, "--workload", shape, *search, *OBJECTIVES)
    rate = document["goodput"]["rate"]
    summary = document["summary"]
    ttft = _ms(summary["ttft_s"], "p50", "p99") if summary["ttft_s"] else "-"
    return [f"{rate:.0f}", f"{rate * OUTPUT_TOKENS:.0f}", ttft]


def sustain(probe_s: float) -> str:
    """Return what each part of the way in carries, alone and together."""
    rows: list[Sequence[object]] = []
    with bare_source() as (url, _):
        rows.append(["bare source (the client's own ceiling)", *sustained(url, probe_s)])
        with bare_haproxy(url) as proxied:
            rows.append(["HAProxy before the bare source", *sustained(proxied, probe_s)])
    with deployment(QUICK) as served:
        rows.append(["router with simulated engines", *sustained(router_of(NAME), probe_s)])
        rows.append(["HAProxy before the router", *sustained(served.url, probe_s)])
    head = ["what", "requests/s", "tokens/s", "TTFT ms there, p50 / p99"]
    return (
        f"Highest rate at which 90 % of requests (64 + {OUTPUT_TOKENS} tokens, Poisson) have TTFT "
        f"within 250 ms and TPOT within 20 ms; client on core {CLIENT_CORE}, everything else on "
        f"core {SERVER_CORE}:\n\n{table(head, rows)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="bare,agree,sustain", help="which of the three")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of part 1")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of part 2")
    parser.add_argument("--probe", type=float, default=5.0, help="seconds per rate of part 3")
    flags = parser.parse_args()
    assert {CLIENT_CORE, SERVER_CORE} <= os.sched_getaffinity(0), "needs two cores"
    parts, texts, is_good = flags.parts.split(","), [], True
    if "bare" in parts:
        text, is_good = bare(flags.seconds)
        texts.append(text)
    if "agree" in parts:
        text, is_close = agree(flags.pairs)
        texts.append(text)
        is_good = is_good and is_close
    if "sustain" in parts:
        texts.append(sustain(flags.probe))
    write_section("loadtest", "make bench-loadtest", "\n\n".join(texts))
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
