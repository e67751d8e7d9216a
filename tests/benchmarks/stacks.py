"""Three ways to serve one model on two cores, each behind one address, with equal engines.

Ours and vLLM's own P/D have a prefill and a decode engine; the third has two engines that do
both. Engine 1 computes on core 0, engine 2 on core 1. Everything else floats over both cores:
routers, proxies, front-ends, vLLM's scheduler processes (ours runs inside the pinned engine).
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil

from deploy.ports import free_port
from tests.benchmarks.engine_settings import tandem_settings, vllm_settings
from tests.benchmarks.peers import Unavailable, install, make_python, marked
from tests.served import Served, monolith, start, stop, tandem

NAME = "bench-goodput"
ROUTER = "vllm-router==0.1.17"
NIXL = ("nixl", "nixl-cu12")

TITLES = {
    "tandem": "Tandem 1P1D",
    "nixl": "vLLM NixlConnector 1P1D",
    "colocated": "2 colocated vLLM",
}
_WARM_LENGTHS = (64, 256)
_WARM_REQUESTS, _WARM_TOKENS = 3, 8


@dataclass(frozen=True)
class Stack:
    """One of the three, by its name in `TITLES`, and how it is run."""

    name: str
    run: Callable[[], AbstractContextManager[Served]]

    @property
    def title(self) -> str:
        return TITLES[self.name]


@dataclass(frozen=True)
class Tools:
    """What the peers need beside vLLM; `missing` says why something could not be installed."""

    router: str
    nixl: str
    missing: dict[str, str]
    versions: str


def install_tools(folder: Path) -> Tools:
    """Install the peers' router and transport into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    python = make_python(folder / "venv")
    nixl = folder / "nixl"
    missing = {}
    wanted = {
        "router": (ROUTER,),
        # Without their dependencies: they would bring a CUDA build of torch.
        "nixl": ("--no-deps", "--target", str(nixl), *NIXL),
    }
    for name, arguments in wanted.items():
        try:
            install(python, *arguments)
        except Unavailable as error:
            missing[name] = str(error)
    found = [each.name.removesuffix(".dist-info") for each in sorted(nixl.glob("nixl*.dist-info"))]
    versions = ", ".join([ROUTER.replace("==", " "), *(name.replace("-", " ") for name in found)])
    return Tools(str(folder / "venv" / "bin" / "vllm-router"), str(nixl), missing, versions)


def stacks(tools: Tools, model: Path, chunk_tokens: int) -> list[Stack]:
    """Return the stacks in the order in which they take turns."""
    engines = _Engines(model, chunk_tokens)
    return [
        Stack("tandem", engines.ours),
        Stack("nixl", partial(engines.nixl, tools)),
        Stack("colocated", partial(engines.colocated, tools)),
    ]


@dataclass(frozen=True)
class _Engines:
    """Engines of one model, the same settings whoever runs them."""

    model: Path
    chunk_tokens: int

    @contextmanager
    def ours(self) -> Iterator[Served]:
        with tandem(NAME, model=self.model, **tandem_settings(self.chunk_tokens)) as served:
            warm_up(served)
            yield served

    @contextmanager
    def nixl(self, tools: Tools) -> Iterator[Served]:
        """Run vLLM's own disaggregation; its router sends to the prefill engine, then on."""
        _require(tools, "nixl", "router")
        with marked() as mark, ExitStack() as stack:
            engines = []
            for core, role in enumerate(("kv_producer", "kv_consumer")):
                transfer = {
                    "kv_connector": "NixlConnector",
                    "kv_role": role,
                    "kv_buffer_device": "cpu",
                }
                env = {
                    "PYTHONPATH": tools.nixl,
                    "NIXL_LOG_LEVEL": "ERROR",
                    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                    "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                }
                config = json.dumps(transfer)
                engines.append(self._vllm(core, mark | env, kv_transfer_config=config))
            prefill, decode = _enter(stack, engines)
            flags = ["--vllm-pd-disaggregation", "--kv-connector", "nixl"]
            flags += ["--prefill", prefill.url, "--decode", decode.url]
            router = stack.enter_context(self._router(tools, flags, mark))
            router.engines = (prefill, decode)
            yield router

    @contextmanager
    def colocated(self, tools: Tools) -> Iterator[Served]:
        """Run two whole engines; every other request goes to each."""
        _require(tools, "router")
        with marked() as mark, ExitStack() as stack:
            engines = _enter(stack, [self._vllm(core, mark) for core in (0, 1)])
            flags = ["--worker-urls", *(engine.url for engine in engines)]
            yield stack.enter_context(self._router(tools, flags, mark))

    @contextmanager
    def _vllm(self, core: int, env: dict[str, str], **arguments: Any) -> Iterator[Served]:
        with monolith(
            self.model,
            str(core),
            env,
            disable_uvicorn_access_log=True,
            **vllm_settings(self.chunk_tokens),
            **arguments,
        ) as served:
            pin(served, core)
            # CPUs with AMX kill a decode engine that has never prefilled.
            warm_up(served)
            yield served

    @contextmanager
    def _router(self, tools: Tools, flags: Sequence[str], env: dict[str, str]) -> Iterator[Served]:
        port = free_port()
        command = [tools.router, "--host", "127.0.0.1", "--port", str(port), *flags]
        command += ["--policy", "round_robin", "--prometheus-port", str(free_port())]
        served = start(command, f"http://127.0.0.1:{port}", self.model.name, env)
        try:
            warm_up(served)
            yield served
        finally:
            stop(served)


def _enter(stack: ExitStack, engines: Sequence[AbstractContextManager[Served]]) -> list[Served]:
    """Start the engines together: each takes half a minute of imports."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(stack.enter_context, engines))


def _require(tools: Tools, *names: str) -> None:
    for name in names:
        if name in tools.missing:
            raise Unavailable(tools.missing[name])


def pin(served: Served, core: int) -> None:
    """Keep every thread of the engine's computing process on `core`.

    vLLM binds them itself, but its NixlConnector moves the computing thread to the last core of
    the machine, whatever it is bound to: two such engines would share that one.
    """
    workers = [
        child
        for child in psutil.Process(served.process.pid).children(recursive=True)
        if child.name().startswith("VLLM::Worker")
    ]
    assert workers, f"no computing process below {served.process.pid}"
    for thread in workers[0].threads():
        os.sched_setaffinity(thread.id, {core})


def warm_up(served: Served) -> None:
    """Send a few prompts of the lengths to come, one after the other."""
    rng = Random(os.getpid())
    for length in _WARM_LENGTHS:
        for _ in range(_WARM_REQUESTS):
            prompt = [rng.randrange(300, 4000) for _ in range(length)]
            served.complete(prompt, max_tokens=_WARM_TOKENS, ignore_eos=True)
