"""Prometheus' own tool on the configuration and the rules: valid, and firing when they should."""

import subprocess
from pathlib import Path

import yaml

from tests import monitoring

HERE = Path(__file__).parent
CASES = HERE / "alerts.test.yaml"


def promtool(*words: str | Path) -> str:
    """Return what `promtool` prints; fail with it if it finds a fault."""
    done = subprocess.run(
        ["promtool", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_is_valid_with_the_rules_it_names() -> None:
    said = promtool("check", "config", monitoring.PROMETHEUS / "prometheus.yaml")
    assert "2 rule files found" in said
    promtool("check", "rules", "--lint-fatal", *sorted(monitoring.RULES.glob("*.yaml")))


def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", CASES)


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = yaml.load(CASES.read_text(), yaml.CSafeLoader)["tests"]
    firing = {
        case["alertname"]
        for test in cases
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert firing == {rule["alert"] for _, rule in monitoring.rules() if "alert" in rule}
