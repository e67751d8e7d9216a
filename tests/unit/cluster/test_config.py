"""The configuration tree: strict, with faults that name the place and the way out."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import (
    BUNDLED_MODEL,
    TandemConfig,
    load_config,
    merge,
    parse_config,
    section_of,
)
from cluster.errors import ConfigError
from cluster.section import Section


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config(path) == parse_config({}) == parse_config(None) == TandemConfig()


def test_defaults_of_the_two_commands() -> None:
    config = TandemConfig()
    assert (config.prefill.workers, config.decode.workers) == (1, 1)
    assert (config.router.host, config.router.port) == ("127.0.0.1", 8000)
    assert config.model.path == str(BUNDLED_MODEL) and config.model.name == "tandem-tiny"
    assert config.router.recovery == "elsewhere"


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"routr": {}}, "unknown key routr (nearest valid key: router)"),
        ({"router": {"prot": 1}}, "unknown key router.prot (nearest valid key: router.port)"),
        (
            {"handoff": {"chunk_byte": 1}},
            "unknown key handoff.chunk_byte (nearest valid key: handoff.chunk_bytes)",
        ),
        ({"prefill": {7: 1}}, "unknown key prefill.7 (nearest valid key: prefill."),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest(
    document: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    assert says in str(caught.value)


def test_every_unknown_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"modle": {}, "router": {"hots": "x", "prot": 1}})
    assert all(word in str(caught.value) for word in ("modle", "router.hots", "router.prot"))


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"router": {"port": 0}}, "router.port"),
        ({"router": {"port": 70000}}, "router.port"),
        ({"router": {"port": "http"}}, "router.port"),
        ({"router": {"recovery": "maybe"}}, "router.recovery"),
        ({"router": {"request_deadline_s": 0}}, "router.request_deadline_s"),
        ({"router": {"max_queued": -1}}, "router.max_queued"),
        ({"prefill": {"workers": 0}}, "prefill.workers"),
        ({"decode": {"workers": 1.5}}, "decode.workers"),
        ({"decode": {"gpus_per_worker": -1}}, "decode.gpus_per_worker"),
        ({"model": {"engine": "magic"}}, "model.engine"),
        ({"model": {"kv_cache_gib": 0}}, "model.kv_cache_gib"),
        ({"cluster": {"name": "Not A Name"}}, "cluster.name"),
        ({"handoff": {"lease_s": "soon"}}, "handoff.lease_s"),
        ({"router": 5}, "router"),
        ({"router": None}, "router"),
    ],
)
def test_a_bad_value_is_refused_with_its_path_and_what_was_given(
    document: dict[str, Any], path: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    assert str(caught.value).startswith(f"{path}: ") and "(got " in str(caught.value)


@pytest.mark.parametrize("document", [[], [1], "text", 7])
def test_a_document_that_is_no_mapping_is_refused(document: object) -> None:
    if document == []:
        assert parse_config(document) == TandemConfig()
        return
    with pytest.raises(ConfigError, match="mapping"):
        parse_config(document)


@pytest.mark.parametrize(
    ("text", "says"), [("router: [", "not YAML"), ("router: {prot: 1}", "router.port")]
)
def test_faults_of_a_file_name_the_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "tandem.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tandem\.yaml: No such file"):
        load_config(tmp_path / "tandem.yaml")


def test_the_tree_survives_yaml(tmp_path: Path) -> None:
    path = tmp_path / "tandem.yaml"
    changed = parse_config({"router": {"port": 9000}, "model": {"engine_args": {"seed": 1}}})
    path.write_text(yaml.safe_dump(changed.model_dump()))
    assert load_config(path) == changed


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TandemConfig().router.port = 1  # type: ignore[misc]  # the point of the test


def test_merge_lays_sections_over_each_other() -> None:
    base: dict[str, Any] = {"router": {"port": 1, "host": "a"}, "model": {"path": "m"}}
    merged = merge(base, {"router": {"port": 2}, "decode": {"workers": 3}})
    assert merged == {
        "router": {"port": 2, "host": "a"},
        "model": {"path": "m"},
        "decode": {"workers": 3},
    }
    assert base["router"]["port"] == 1


def test_every_leaf_that_an_operator_sets_says_what_it_is() -> None:
    for name, field in TandemConfig.model_fields.items():
        section = section_of(field.annotation)
        assert section is not None and issubclass(section, Section), name
