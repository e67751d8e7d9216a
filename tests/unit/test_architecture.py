"""The shape of the tree: who may import what, and what pure files may not do."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each part, and the parts it may import: itself and what stands before it.
LAYERS = {
    "cluster": set(),
    "kv_transfer": {"cluster"},
    "prefill_workers": {"cluster", "kv_transfer"},
    "decode_workers": {"cluster", "kv_transfer"},
    "router": {"cluster", "kv_transfer", "prefill_workers", "decode_workers"},
    "autoscaler": {"cluster", "kv_transfer", "prefill_workers", "decode_workers"},
    # Composes them all; `deploy/engines.py` and `deploy/app.py` hand classes down as strings.
    "deploy": {
        "cluster",
        "kv_transfer",
        "prefill_workers",
        "decode_workers",
        "router",
        "autoscaler",
    },
}

VLLM = {
    "cluster/vllm_cpu.py",
    "cluster/vllm_documents.py",
    "cluster/vllm_engine.py",
    "kv_transfer/connector.py",
    "kv_transfer/connector_scheduler.py",
    "kv_transfer/connector_settings.py",
    "kv_transfer/connector_worker.py",
    "kv_transfer/cpu_cells.py",
    "router/app.py",
    "router/engine_client.py",
}

# Payloads on devices, and numbers that numpy has no type for. Whoever has none of these imports
# none of them, `blocks` but for types.
TENSORS = {
    "kv_transfer/blocks.py",
    "kv_transfer/channels.py",
    "kv_transfer/cuda_ipc.py",
    "kv_transfer/cuda_library.py",
    "kv_transfer/gloo.py",
    "kv_transfer/nccl.py",
    "kv_transfer/packed_blocks.py",
    "kv_transfer/tensor_blocks.py",
}

# Decisions: synchronous, from their arguments alone.
PURE = {
    "autoscaler/calibration.py",
    "autoscaler/decision.py",
    "autoscaler/demand.py",
    "autoscaler/gauge.py",
    "autoscaler/laws.py",
    "autoscaler/limits.py",
    "autoscaler/plan.py",
    "autoscaler/policy.py",
    "autoscaler/ratio.py",
    "autoscaler/serve_pools.py",
    "autoscaler/signals.py",
    "autoscaler/windows.py",
    "cluster/action_times.py",
    "cluster/candidates.py",
    "cluster/cores.py",
    "cluster/errors.py",
    "cluster/gate.py",
    "cluster/history.py",
    "cluster/latency.py",
    "cluster/leaks.py",
    "cluster/load.py",
    "cluster/messages.py",
    "cluster/names.py",
    "cluster/overview.py",
    "cluster/packing.py",
    "cluster/pairing.py",
    "cluster/placement.py",
    "cluster/pool_size.py",
    "cluster/pools.py",
    "cluster/preemption.py",
    "cluster/reconcile.py",
    "cluster/reconfigure.py",
    "cluster/roles.py",
    "cluster/service.py",
    "cluster/shortage.py",
    "cluster/snapshot.py",
    "cluster/stages.py",
    "cluster/submissions.py",
    "cluster/tallies.py",
    "cluster/targets.py",
    "cluster/topology.py",
    "cluster/wire.py",
    "cluster/worker_state.py",
    "decode_workers/role.py",
    "deploy/loadtest/chart.py",
    "deploy/loadtest/figures.py",
    "deploy/loadtest/lengths.py",
    "deploy/loadtest/markup.py",
    "deploy/loadtest/measures.py",
    "deploy/loadtest/planned.py",
    "deploy/loadtest/search.py",
    "deploy/loadtest/series.py",
    "deploy/loadtest/spec.py",
    "deploy/loadtest/sse.py",
    "deploy/loadtest/words.py",
    "deploy/report.py",
    "kv_transfer/handoff.py",
    "kv_transfer/layout.py",
    "kv_transfer/leases.py",
    "kv_transfer/progress.py",
    "kv_transfer/protocol.py",
    "prefill_workers/role.py",
    "router/api_keys.py",
    "router/first_token.py",
    "router/ledger.py",
    "router/policy.py",
    "router/rate_limit.py",
    "router/records.py",
    "router/recovery.py",
    "router/spans.py",
    "router/timeline.py",
}
NOT_IN_PURE = {"asyncio", "logging", "ray", "threading", "time", "torch", "vllm", "zmq"}

# Declarations that pure files need: the configuration, the nouns of the engine.
PURE_MAY_IMPORT = {
    "cluster.autoscaler_config",
    "cluster.config",
    "cluster.engine",
    "cluster.section",
}

# Why each of these touches the environment is said where it does.
ENVIRONMENT = {
    "cluster/forked_worker.py": "a forked worker gets its actor's, not the template's",
    "cluster/worker_process.py": "sends the actor's along, and names the template by its mark",
    "cluster/vllm_engine.py": "vLLM's engine processes read their settings from it",
    "deploy/connect.py": "Ray reads the cluster's token from it",
    "deploy/session.py": "Ray and Ray Serve read their settings from it when imported",
}

MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 450
# Longer functions, each with the reason it is one.
LONG_FUNCTIONS: dict[str, str] = {}
BAD_SUFFIXES = ("Manager", "Handler", "Helper", "Util", "Utils", "Base", "Info", "Impl")


@dataclass(frozen=True)
class Source:
    """One file of the tree, parsed."""

    path: str
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(self.tree))

    @property
    def part(self) -> str:
        return self.path.partition("/")[0]

    @cached_property
    def imports(self) -> tuple[str, ...]:
        """Every module imported anywhere in the file, in functions and for types too."""
        modules: list[str] = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                modules += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: relative import"
                modules.append(node.module or "")
        return tuple(modules)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def _parse(path: Path) -> Source:
    text = path.read_text()
    tree = ast.parse(text)
    return Source(str(path.relative_to(ROOT)), text, tree)


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Return every Python file under `folders`."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return tuple(map(_parse, paths))


def ours() -> tuple[Source, ...]:
    return sources(*LAYERS)


def test_the_parts_are_all_there_is() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {*LAYERS, "tests"}


def test_imports_go_one_way() -> None:
    wrong = [
        f"{source.path} imports {module}"
        for source in ours()
        for module in source.imports
        if (part := module.partition(".")[0]) in {*LAYERS, "tests"}
        and part not in LAYERS[source.part] | {source.part}
    ]
    assert not wrong


def _files_importing(package: str) -> set[str]:
    return {
        source.path
        for source in ours()
        for module in source.imports
        if module.partition(".")[0] == package
    }


def test_vllm_is_imported_in_named_places_only() -> None:
    assert _files_importing("vllm") == VLLM


def test_torch_is_imported_only_where_vllm_may_be_and_for_tensors() -> None:
    assert {path for path in _files_importing("torch") if path.startswith("deploy/models/")} <= {
        "deploy/models/bench.py",
        "deploy/models/train.py",
    }
    assert {
        path for path in _files_importing("torch") if not path.startswith("deploy/models/")
    } <= VLLM | TENSORS


@pytest.mark.parametrize("path", sorted(PURE))
def test_pure_files_are_pure(path: str) -> None:
    (source,) = [source for source in ours() if source.path == path]
    impure = {module.partition(".")[0] for module in source.imports} & NOT_IN_PURE
    assert not impure, f"{path} imports {impure}"
    asynchronous = [
        function.name
        for function in source.functions()
        if isinstance(function, ast.AsyncFunctionDef)
    ]
    assert not asynchronous


def test_pure_files_import_pure_files() -> None:
    """What a decision rests on must not bring the impure in by the back door."""
    by_module = {path[:-3].replace("/", ".") for path in PURE} | PURE_MAY_IMPORT
    wrong = [
        f"{source.path} imports {module}"
        for source in ours()
        if source.path in PURE
        for module in source.imports
        if module.partition(".")[0] in LAYERS and module not in by_module
    ]
    assert not wrong


def test_the_environment_is_touched_in_named_places_only() -> None:
    touching = {
        source.path
        for source in ours()
        for node in source.nodes
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}
    }
    assert touching == set(ENVIRONMENT)


def test_nothing_is_unpickled() -> None:
    for package in ("pickle", "cloudpickle", "dill", "marshal", "shelve"):
        assert not _files_importing(package)


def test_vllms_words_are_spelled_once() -> None:
    spelling = {source.path for source in ours() if "do_remote_" in source.text}
    assert spelling == {"kv_transfer/protocol.py"}


def test_functions_are_short() -> None:
    long = {
        f"{source.path}:{function.name}"
        for source in ours()
        for function in source.functions()
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == set(LONG_FUNCTIONS)


def texts() -> Iterator[tuple[str, str]]:
    """Yield path and text of every Python file, those of the tests included."""
    for folder in (*LAYERS, "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()


def test_files_are_short_and_say_what_they_are() -> None:
    for path, text in texts():
        if text or not path.startswith("tests/"):
            assert text.startswith('"""'), f"{path} has no docstring"
        assert text.count("\n") <= MAX_FILE_LINES, f"{path} is too long"


def test_names_are_nouns() -> None:
    classes = re.compile(r"^ *class (\w+)", re.MULTILINE)
    wrong = [
        f"{path}:{name}"
        for path, text in texts()
        for name in classes.findall(text)
        if name.endswith(BAD_SUFFIXES)
    ]
    assert not wrong


def test_what_runs_alone_is_where_make_looks_for_it() -> None:
    """Elsewhere, all that the other files import would be imported again to find a few tests."""
    marked = {path.split("/")[1] for path, text in texts() if "mark.alone" in text}
    assert marked == {"chaos", "e2e", "unit"}, "those, and this file"


_BUILD_SIMULATED = """
import json, sys
from cluster.config import parse_config
from cluster.names import Role, WorkerId
from cluster.worker_spec import WorkerSpec
import cluster.sim_engine, cluster.worker, kv_transfer.host_port, deploy.engines
import decode_workers.role, prefill_workers.role
config = parse_config({"model": {"path": sys.argv[1], "engine": "simulated"}})
spec = WorkerSpec(WorkerId("w"), Role.DECODE, "", {}, config, (), "127.0.0.1")
engine = deploy.engines.simulated_engine(spec)
engine._port.close()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_a_simulated_worker_imports_neither_torch_nor_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"vocab_size": 100, "max_position_embeddings": 512})
    )
    done = subprocess.run(
        [sys.executable, "-c", _BUILD_SIMULATED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"cluster", "kv_transfer", "zmq"} <= imported
    assert not imported & {"torch", "vllm", "ray", "transformers", "numpy"}
