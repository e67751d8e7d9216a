"""API keys: what a file may say, whose a key is, and that no fault quotes one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from router.api_keys import (
    MAX_KEY_CHARS,
    ApiKey,
    ApiKeys,
    KeyRole,
    digest_of,
    parse_api_keys,
    presented_key,
)

SECRET = "tandem-" + "s" * 43


def entry(name: str, key: str, more: str = "") -> str:
    return f"  - {{name: {name}, sha256: {digest_of(key)}{more}}}\n"


def test_a_key_is_found_under_its_name_and_role() -> None:
    text = "keys:\n" + entry("alice", "a" * 30) + entry("bob", "b" * 30, ", role: admin")
    keys = parse_api_keys(text.encode())
    alice, bob = keys.find("a" * 30), keys.find("b" * 30)
    assert alice is not None and (alice.name, alice.role) == ("alice", KeyRole.CLIENT)
    assert bob is not None and (bob.name, bob.role) == ("bob", KeyRole.ADMIN)
    assert keys.find("a" * 29) is None
    assert SECRET not in repr(keys) and digest_of("a" * 30) not in repr(keys)


@given(st.text(max_size=MAX_KEY_CHARS + 50))
def test_whatever_is_presented_only_the_key_itself_is_found(presented: str) -> None:
    keys = ApiKeys([ApiKey(name="k", sha256=digest_of(SECRET))])
    assert (keys.find(presented) is not None) == (presented == SECRET)


def test_a_key_that_is_too_long_is_nobodys_even_if_its_hash_is_there() -> None:
    long = "x" * (MAX_KEY_CHARS + 1)
    assert ApiKeys([ApiKey(name="k", sha256=digest_of(long))]).find(long) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "valid dictionary"),
        ("keys: []", "keys: Tuple should have at least 1 item"),
        (f"keys: [{{name: k, sha256: {SECRET}}}]", "keys.0.sha256: String should match"),
        (f"keys: [{{name: k, key: {SECRET}}}]", "keys.0.key: Extra inputs"),
        (f"keys:\n{entry('k', SECRET)}{entry('k', 'other')}", "two keys have the same name"),
        (f"keys:\n{entry('k', SECRET)}{entry('l', SECRET)}", "one key is there under two names"),
        (f"keys:\n{entry('k', SECRET, ', requests_per_minute: 0')}", "greater than 0"),
        (f"{SECRET}: [", "not YAML"),
    ],
)
def test_a_fault_names_its_place_and_no_secret(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_api_keys(text.encode())
    assert says in str(caught.value)
    assert SECRET not in str(caught.value) and digest_of(SECRET) not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([], None),
        ([(b"authorization", b"Bearer abc")], "abc"),
        ([(b"authorization", b"bearer  abc ")], "abc"),
        ([(b"authorization", b"Basic abc")], None),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"x-api-key", b"abc")], "abc"),
        ([(b"authorization", b"Basic x"), (b"x-api-key", b"abc")], "abc"),
        ([(b"authorization", b"Bearer \xff\xfe")], "\xff\xfe"),
    ],
)
def test_keys_come_as_clients_of_both_kinds_send_them(
    headers: list[tuple[bytes, bytes]], key: str | None
) -> None:
    assert presented_key(headers) == key
