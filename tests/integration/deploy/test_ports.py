"""Two that ask for a free port at the same time get two."""

import socket
import subprocess
import sys

from deploy.ports import free_port, free_range


def test_a_chosen_port_is_free_and_not_one_that_the_kernel_gives_to_others() -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as limits:
        first_of_the_kernel = int(limits.read().split()[0])
    port = free_port()
    assert port < first_of_the_kernel
    with socket.create_server(("127.0.0.1", port)):
        pass
    chosen = free_range(64)
    assert len(chosen) == 64 and chosen.stop <= first_of_the_kernel


def test_a_port_is_chosen_once_whoever_asks() -> None:
    ask = "from deploy.ports import free_port; print(*(free_port() for _ in range(100)))"
    ours = {free_port() for _ in range(100)}
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    theirs = [int(port) for port in answer.stdout.split()]
    assert len(ours) == len(set(theirs)) == 100
    assert ours.isdisjoint(theirs)
