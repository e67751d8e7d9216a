"""A real Prometheus with the shipped configuration, pointed at a deployment under test."""

import contextlib
import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from deploy.ports import free_port
from tests import monitoring
from tests.served import wait_until

_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running server."""

    client: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its HTTP API; fail with what it says is wrong."""
        answer = self.client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, expr: str, at: float | None = None) -> dict[tuple[tuple[str, str], ...], float]:
        """Return the values at a time (Unix seconds) by sorted labels, those that are numbers."""
        time = {} if at is None else {"time": str(at)}
        samples = self.get("query", query=expr, **time)["result"]
        values = {tuple(sorted(s["metric"].items())): float(s["value"][1]) for s in samples}
        return {labels: value for labels, value in values.items() if not math.isnan(value)}

    def has(self, expr: str) -> bool:
        """Return whether a query has any value, which a comparison has where it holds."""
        return bool(self.query(expr))

    def value(self, expr: str) -> float | None:
        """Return the only value of a query, None if it has none."""
        values = list(self.query(expr).values())
        assert len(values) <= 1, f"{expr} has {len(values)} series"
        return values[0] if values else None

    def targets(self, job: str) -> dict[str, dict[str, Any]]:
        """Return what is scraped for a job, by address."""
        active = self.get("targets", state="active")["activeTargets"]
        of_job = [target for target in active if target["labels"]["job"] == job]
        return {target["labels"]["instance"]: target for target in of_job}


def configuration(endpoint: str, deployment: str) -> dict[str, Any]:
    """Return the shipped configuration for another endpoint, in a hurry."""
    text = (monitoring.PROMETHEUS / "prometheus.yaml").read_text()
    config: dict[str, Any] = yaml.safe_load(text.replace("127.0.0.1:8000", endpoint))
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(path) for path in sorted(monitoring.RULES.glob("*.yaml"))]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    jobs["tandem"]["http_sd_configs"][0]["refresh_interval"] = "500ms"
    jobs["tandem-endpoint"]["static_configs"][0]["labels"]["deployment"] = deployment
    return config


@contextlib.contextmanager
def prometheus(folder: Path, config: dict[str, Any]) -> Iterator[Prometheus]:
    """Run Prometheus with its data in `folder`; yield once it is ready, leave nothing running."""
    file, log = folder / "prometheus.yaml", folder / "prometheus.log"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    client = httpx.Client(base_url=f"http://{address}", timeout=10.0)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.HTTPError):
            return client.get("/-/ready").status_code == 200
        return False

    try:
        wait_until(is_ready, 20.0, "Prometheus is ready")
        yield Prometheus(client)
    finally:
        client.close()
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
