"""Endpoints under test as their users start them: `tandem serve`, and vLLM's own server."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from cluster.config import BUNDLED_MODEL
from deploy.ports import free_port

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 30.0

Value = TypeVar("Value")


def wait_until(
    read: Callable[[], Value | None], timeout_s: float, what: str, poll_s: float = 0.05
) -> Value:
    """Return the first value of `read` that is not None or False; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = read()
        if value is not None and value is not False:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(poll_s)


@dataclass
class Served:
    """A running endpoint: its process, its URL, its model's name; a router has engines behind."""

    process: subprocess.Popen[bytes]
    url: str
    model: str
    log: Path
    engines: Sequence["Served"] = ()
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        # Serve's proxy closes idle connections when its replicas change, and one reused just then
        # ends without an answer, as RFC 9112, 9.3.1 lets it: every request gets its own.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=120.0, limits=limits)

    def is_healthy(self) -> bool:
        """Return whether `/health` answers 200 now; an endpoint that does not answer is not."""
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/health", timeout=5.0).status_code == 200
        return False

    def complete(self, prompt: str | Sequence[int], **parameters: Any) -> dict[str, Any]:
        """Return the body of a completion; raise for an error status."""
        body = {"model": self.model, "prompt": prompt, "temperature": 0.0, **parameters}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, f"{response.status_code}: {response.text}"
        return {**response.json(), "headers": response.headers}

    def tokens(self, prompt: Sequence[int], **parameters: Any) -> list[int]:
        """Return the token ids of a greedy completion of token ids."""
        answer = self.complete(list(prompt), return_token_ids=True, **parameters)
        token_ids: list[int] = answer["choices"][0]["token_ids"]
        return token_ids

    def record(self, request_id: str) -> dict[str, Any]:
        """Return the request's record."""
        response = self.client.get(f"/admin/requests/{request_id}")
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    def state(self) -> dict[str, Any]:
        """Return what the controller says of the deployment, empty while it does not answer."""
        with contextlib.suppress(httpx.HTTPError):
            answer = self.client.get("/admin/state")
            if answer.status_code == 200:
                document: dict[str, Any] = answer.json()
                return document
        return {}

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return what the router knows of each worker, by id."""
        document = self.client.get("/debug/pinned").json()
        return {worker["worker_id"]: worker for worker in document["workers"]}

    def free_blocks(self) -> dict[str, int]:
        """Return the free blocks of each worker's engine, once every worker has reported."""

        def read() -> dict[str, int] | None:
            blocks = {key: worker["free_blocks"] for key, worker in self.workers().items()}
            return None if None in blocks.values() else blocks

        return wait_until(read, 10, "every worker reports its blocks")

    def tail(self) -> str:
        return self.log.read_text()[-4000:]


def start(command: Sequence[str], url: str, model: str, env: Mapping[str, str] = {}) -> Served:
    """Start `command` and return when `/health` answers 200; fail with its log if it ends.

    Whatever keeps it from serving, it is stopped as `stop` does it: killed, it would leave behind
    what it has started.
    """
    log = Path(tempfile.mkstemp(prefix="tandem-test-", suffix=".log")[1])
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
    served = Served(process, url, model, log)

    def is_up() -> bool:
        assert process.poll() is None, f"{command[0]} ended: {served.tail()}"
        return served.is_healthy()

    try:
        wait_until(is_up, START_TIMEOUT_S, f"{url} serves; log: {served.tail()}")
    except BaseException:
        try:
            stop(served)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    return served


def stop(served: Served, by: signal.Signals = signal.SIGINT) -> int:
    """End the process by signal and return its exit status; fail if it takes too long."""
    served.client.close()
    served.process.send_signal(by)
    return served.process.wait(STOP_TIMEOUT_S)


def tandem_command(name: str, port: int, flags: Mapping[str, Any], verb: str) -> list[str]:
    """Return the command line of `tandem VERB` with `flags` by configuration path."""
    command = [sys.executable, "-m", "deploy.cli", verb, "--name", name, "--port", str(port)]
    for path, value in flags.items():
        if isinstance(value, bool):
            command.append(f"--{path}" if value else f"--no-{path}")
        else:
            command += [f"--{path}", value if isinstance(value, str) else json.dumps(value)]
    return command


@contextlib.contextmanager
def tandem(name: str, model: Path = BUNDLED_MODEL, **flags: Any) -> Iterator[Served]:
    """Run `tandem serve`; keyword `model__dtype` is `--model.dtype`. Checks the exit status."""
    port = free_port()
    paths = {key.replace("__", "."): value for key, value in flags.items()}
    command = tandem_command(name, port, {"model.path": str(model), **paths}, "serve")
    served = start(command, f"http://127.0.0.1:{port}", model.name)
    try:
        yield served
    finally:
        status = stop(served)
    assert status == 0, served.tail()


@contextlib.contextmanager
def monolith(
    model: Path = BUNDLED_MODEL, cpus: str = "", env: Mapping[str, str] = {}, **arguments: Any
) -> Iterator[Served]:
    """Run vLLM's own OpenAI server on one engine, pinned to `cpus` if any are named."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", model.name]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    settings = {
        "VLLM_CPU_OMP_THREADS_BIND": cpus or "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    served = start(command, f"http://127.0.0.1:{port}", model.name, {**settings, **env})
    try:
        yield served
    finally:
        children = psutil.Process(served.process.pid).children(recursive=True)
        stop(served)
        psutil.wait_procs(children, timeout=STOP_TIMEOUT_S)
