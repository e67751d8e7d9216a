"""`tandem keys`: what it prints, what it writes, and what it refuses."""

import io
import stat
from pathlib import Path

import pytest
import yaml

from cluster.errors import ConfigError
from cluster.keyring import parse_keyring
from deploy.cli import main
from deploy.private_file import read_secret, write_private
from router.api_keys import KeyRole, parse_api_keys


def keys(*arguments: object) -> int:
    return main(["keys", *map(str, arguments)])


def test_a_key_is_printed_once_and_only_its_hash_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"
    assert keys("api", "ops", "--admin", "--file", file) == 0
    ops = capsys.readouterr().out.strip()
    assert keys("api", "app", "--requests-per-minute", 60, "--burst", 5, "--file", file) == 0
    app = capsys.readouterr().out.strip()
    assert len(ops) > 40 and ops != app and ops.isascii()
    assert ops not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    made = parse_api_keys(file.read_bytes())
    found = made.find(ops), made.find(app)
    assert found[0] is not None and found[0].role is KeyRole.ADMIN
    assert found[1] is not None and (found[1].requests_per_minute, found[1].burst) == (60, 5)
    assert keys("list", "--file", file) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ops  admin  no limit",
        "app  client  60 requests per minute",
    ]
    assert keys("drop", "app", "--file", file) == 0
    assert parse_api_keys(file.read_bytes()).find(app) is None
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


def test_a_key_that_exists_comes_by_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = tmp_path / "keys.yaml", "sk-" + "x" * 30
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{key}\n"))
    assert keys("api", "app", "--stdin", "--file", file) == 0
    printed = capsys.readouterr()
    assert key not in printed.out + printed.err
    assert parse_api_keys(file.read_bytes()).find(key) is not None
    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    assert keys("api", "other", "--stdin", "--file", file) == 1
    assert "20 to 512 printable characters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("api", "app"), "two keys have the same name"),
        (("api", "no name"), "name: String should match"),
        (("api", "b", "--requests-per-minute", "-1"), "greater than 0"),
        (("drop", "nobody"), "has no key of 'nobody'"),
        (("drop", "app"), "has the last key"),
    ],
)
def test_what_makes_no_sense_leaves_the_file_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    file = tmp_path / "keys.yaml"
    keys("api", "app", "--file", file)
    before = file.read_bytes()
    capsys.readouterr()
    assert keys(*arguments, "--file", file) == 1
    printed = capsys.readouterr()
    assert says in printed.err and printed.out == ""
    assert file.read_bytes() == before


def test_a_ring_in_a_file_changes_step_by_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "curve"
    assert keys("curve", "--file", file) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    first = parse_keyring(file.read_bytes())
    assert keys("curve", "--file", file) == 1, "never over one that is there"
    assert "is there already" in capsys.readouterr().err
    sizes = []
    for step in ("add", "use", "drop"):
        assert keys("rotate", "--file", file, "--step", step) == 0
        sizes.append(len(parse_keyring(file.read_bytes()).pairs))
    last = parse_keyring(file.read_bytes())
    assert sizes == [2, 2, 1] and last.used != first.used
    for secret in yaml.safe_load(file.read_text())["secrets"]:
        assert secret not in capsys.readouterr().err
    assert keys("rotate", "--file", file) == 1
    assert keys("rotate", "--name", "nobody", "--step", "use") == 1


def test_a_file_that_cannot_be_written_leaves_no_part_of_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        write_private(tmp_path / "nowhere" / "file", "secret")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError):
        write_private(tmp_path / "folder", "secret")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff", "ä".encode()])
def test_a_file_with_no_key_in_it_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        read_secret(path)
