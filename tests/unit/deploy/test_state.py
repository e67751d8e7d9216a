"""The state file: what it keeps, and that a damaged one is no state rather than a crash."""

from pathlib import Path

import pytest

from deploy.processes import ProcessId
from deploy.state import DeploymentState, known_names

STATE = DeploymentState(
    name="blue",
    mark="blue:0123",
    launcher=ProcessId(42, 4711),
    url="http://127.0.0.1:8000",
    ray_address="127.0.0.1:6379",
    temp_dir="/tmp/td-0123",
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "tandem"
    STATE.write(folder)
    assert DeploymentState.read("blue", folder) == STATE
    assert known_names(folder) == ["blue"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_removing_is_final_and_repeatable(tmp_path: Path) -> None:
    STATE.write(tmp_path)
    STATE.remove(tmp_path)
    STATE.remove(tmp_path)
    assert DeploymentState.read("blue", tmp_path) is None
    assert known_names(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "blue", "launcher": {}}'])
def test_a_damaged_file_is_no_state(tmp_path: Path, text: str) -> None:
    (tmp_path / "blue.json").write_text(text)
    assert DeploymentState.read("blue", tmp_path) is None
