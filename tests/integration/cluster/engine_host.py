"""A process that owns one vLLM engine, to be stopped or killed by a test; the engine's processes
are forked from it, as a worker's are.

Says in JSON lines on stdout which processes its engine has, then, after any line on stdin, what
stopping it took.
"""

import asyncio
import json
import resource
import sys
import time

import psutil

from cluster import config as tree
from cluster.config import TandemConfig, parse_config
from cluster.names import Role, WorkerId
from cluster.vllm_engine import import_engine, settle_fork
from cluster.worker_spec import WorkerSpec
from deploy.engines import vllm_engine


def _children() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def _living_cpu_s(processes: list[psutil.Process]) -> float:
    """Return what they have used, with what their own ended children did."""
    times = [process.cpu_times() for process in processes]
    own = sum(spent.user + spent.system for spent in times)
    return own + sum(spent.children_user + spent.children_system for spent in times)


def _ended_cpu_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _config() -> TandemConfig:
    model = {"path": str(tree.BUNDLED_MODEL), "max_model_len": 512, "kv_cache_gib": 0.0625}
    return parse_config({"model": {**model, "engine_args": {"skip_tokenizer_init": True}}})


async def _host(config: TandemConfig) -> None:
    spec = WorkerSpec(WorkerId("w"), Role.PREFILL, "", {}, config, (0,), "127.0.0.1")
    engine = vllm_engine(spec)
    await engine.start()
    children = _children()
    print(json.dumps({"pids": [child.pid for child in children]}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    spent, started = _living_cpu_s(children) + _ended_cpu_s(), time.monotonic()
    await engine.stop()
    wall_s = time.monotonic() - started
    cpu_s = _ended_cpu_s() - spent
    print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s}), flush=True)
    await engine.stop()


if __name__ == "__main__":
    hosted = _config()
    # Imported once, and not again in each of the engine's processes.
    import_engine(hosted.model)
    settle_fork("engine host")
    asyncio.run(_host(hosted))
