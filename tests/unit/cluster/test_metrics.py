"""The declarations: names, units, that they are all there is, and that each is used."""

import re
from pathlib import Path

from prometheus_client import generate_latest

from cluster import metrics
from cluster.exporter import exported
from cluster.metrics import DECLARED, REGISTRIES, TARGET_LABELS, Declaration
from cluster.names import Component
from cluster.stages import TimeCounts
from deploy.metric_table import DOCUMENT, renewed

ROOT = Path(__file__).resolve().parents[3]
LAYERS = [path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
_NAMES = [
    name
    for name, value in vars(metrics).items()
    if name.isupper() and hasattr(value, "collect") and not name.startswith("_")
]
# What a unit is called at the end of a name, where it is one Prometheus knows.
_SUFFIXES = {"seconds": "_seconds", "bytes": "_bytes", "ratio": "_ratio"}


def test_names_follow_the_conventions() -> None:
    for declared in DECLARED:
        hold_to_the_conventions(declared.name, declared)


def hold_to_the_conventions(name: str, declared: Declaration) -> None:
    assert re.fullmatch(r"tandem(_[a-z0-9]+)+", name)
    assert name.endswith("_total") == (declared.kind == "counter")
    suffix = _SUFFIXES.get(declared.unit)
    assert suffix is None or name.removesuffix("_total").endswith(suffix)
    assert not re.search(r"_(ms|us|milliseconds|kb|mb|percent|count|sum|bucket)(_|$)", name)
    assert declared.help[0].isupper() or declared.help[0].isdigit()
    assert not declared.help.endswith(".") and "|" not in declared.help and declared.unit


def test_labels_leave_room_for_those_of_the_target() -> None:
    taken = TARGET_LABELS | {"le", "job", "instance"}
    assert not [declared.name for declared in DECLARED if taken & {*declared.labels}]


def test_names_are_told_apart() -> None:
    names = [declared.name for declared in DECLARED]
    assert len(names) == len(set(names)) == len(_NAMES)


def test_what_is_scraped_is_what_is_declared() -> None:
    for component, registry in REGISTRIES.items():
        text = generate_latest(registry).decode()
        types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
        assert types == {d.name: d.kind for d in DECLARED if d.component is component}


def test_a_process_shows_its_component_and_itself() -> None:
    text = generate_latest(exported(Component.WORKER)).decode()
    assert "tandem_free_blocks" in text and "tandem_malformed_frames_total" in text
    assert "process_resident_memory_bytes" in text
    assert "tandem_ttft_seconds" not in text and "tandem_healthy" not in text


def texts() -> dict[str, str]:
    """Return every file of the code, by its path."""
    paths = (path for part in LAYERS for path in (ROOT / part).rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def test_metrics_are_declared_nowhere_else() -> None:
    imported = re.compile(r"from prometheus_client\S* import (\([^)]*\)|[^\n]*)")
    kinds = {"Counter", "Gauge", "Histogram", "Summary", "Enum", "Info", "Metric"}
    making = {
        path
        for path, text in texts().items()
        for names in imported.findall(text)
        if any(name in kinds or name.endswith("Family") for name in re.findall(r"\w+", names))
    }
    assert making == {"cluster/metrics.py"}


def test_every_metric_is_used() -> None:
    words = {
        word
        for path, text in texts().items()
        if path != "cluster/metrics.py"
        for word in re.findall(r"\b[A-Z0-9_]{4,}\b", text)
    }
    assert not set(_NAMES) - words


def test_the_document_is_current() -> None:
    text = DOCUMENT.read_text()
    assert renewed(text) == text, "run `python -m deploy.metric_table`"


def test_counts_kept_elsewhere_are_shown_as_they_are() -> None:
    metrics.PULLS.set({"loaded": 3})
    metrics.HANDOFF_STAGE_SECONDS.set({"pull": TimeCounts((1, 0, 2, *[0] * 13), 0.5)})
    sample = REGISTRIES[Component.WORKER].get_sample_value
    assert sample("tandem_pulls_total", {"end": "loaded"}) == 3
    buckets = [
        sample("tandem_handoff_stage_seconds_bucket", {"stage": "pull", "le": bound})
        for bound in ("0.0001", "0.00025", "0.0005", "+Inf")
    ]
    assert buckets == [1, 1, 3, 3]
    assert sample("tandem_handoff_stage_seconds_sum", {"stage": "pull"}) == 0.5
    metrics.PULLS.set({})
    metrics.HANDOFF_STAGE_SECONDS.set({})
    assert sample("tandem_pulls_total", {"end": "loaded"}) is None
