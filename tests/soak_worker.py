"""A worker with a simulated engine as a process of its own, to be killed by whoever started it.

Reads nothing but its one argument; says what the controller would list of it in one line of JSON,
and ends with its parent.
"""

import asyncio
import json
import sys

from cluster.config import parse_config
from cluster.names import Role, WorkerId
from cluster.process_guard import die_with_parent
from cluster.worker import Worker
from cluster.worker_spec import WorkerSpec
from deploy.engines import ENGINES, ROLES


async def _serve(worker_id: str, role: str, config: dict[str, object], keys: str) -> None:
    engine = ENGINES["simulated"]
    spec = WorkerSpec(
        WorkerId(worker_id), Role(role), engine, ROLES, parse_config(config), (), "127.0.0.1", keys
    )
    worker = Worker(spec)
    entry = await worker.start()
    print(json.dumps(entry.as_document()), flush=True)
    await worker.run()


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(_serve(**json.loads(sys.argv[1])))
