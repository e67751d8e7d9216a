"""Flags come from the configuration model; a bad one is one clear line and status 2."""

from pathlib import Path

import pytest

from cluster.config import TandemConfig
from deploy.cli import build_parser
from deploy.flags import ALIASES, config_from, config_paths


def parse(*arguments: str) -> TandemConfig:
    return config_from(build_parser().parse_args(["serve", *arguments]))


def test_no_flags_give_the_defaults() -> None:
    assert parse() == TandemConfig()


def test_every_setting_has_a_flag() -> None:
    sections = TandemConfig.model_fields
    assert {path.partition(".")[0] for path in config_paths()} == set(sections)
    options = build_parser().parse_args(["serve"])
    assert all(hasattr(options, path) for path in config_paths())


def test_every_short_name_is_of_a_setting() -> None:
    assert set(ALIASES) <= set(config_paths())


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        (("--port", "9000"), lambda c: c.router.port == 9000),
        (("--router.port", "9000"), lambda c: c.router.port == 9000),
        (
            ("--prefill", "2", "--decode", "3"),
            lambda c: (c.prefill.workers, c.decode.workers) == (2, 3),
        ),
        (("--simulated",), lambda c: c.model.engine == "simulated"),
        (("--no-cluster.warmup",), lambda c: c.cluster.warmup is False),
        (("--handoff.lease_s", "2.5"), lambda c: c.handoff.lease_s == 2.5),
        (
            ("--model.engine_args", "{enforce_eager: true}"),
            lambda c: c.model.engine_args == {"enforce_eager": True},
        ),
        (("--address", "auto"), lambda c: c.cluster.address == "auto"),
    ],
)
def test_values_reach_the_configuration(arguments: tuple[str, ...], read: object) -> None:
    assert callable(read) and read(parse(*arguments))


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tandem.yaml"
    path.write_text("router: {port: 9000, host: 0.0.0.0}\nprefill: {workers: 4}\n")
    config = parse("--config", str(path), "--port", "9001")
    assert (config.router.port, config.router.host, config.prefill.workers) == (9001, "0.0.0.0", 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "--port", "abc"), "router.port"),
        (("serve", "--port", "0"), "router.port"),
        (("serve", "--prefill", "0"), "prefill.workers"),
        (("serve", "--model.engine", "other"), "model.engine"),
        (("serve", "--model.engine_args", "3"), "is not a mapping"),
        (("serve", "--prt", "3"), "unrecognized arguments: --prt"),
        (("serve", "--config", "/nowhere.yaml"), "/nowhere.yaml"),
        (("sreve",), "sreve"),
        ((), "required"),
    ],
)
def test_a_bad_value_is_one_line_and_status_2(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.cli import main

    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tandem") and said in line


def test_help_shows_defaults_and_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--port PORT, --router.port PORT" in shown
    assert "port the endpoint listens on (default: 8000)" in shown
