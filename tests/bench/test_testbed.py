"""Namespaces as nodes: they reach each other, they count, and nothing of them stays behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dstrain.bench.testbed import Fabric, Testbed, remove_leftovers
from dstrain.errors import UserError
from tests.bench.lab import namespaces, needs_testbed, python

pytestmark = needs_testbed

SERVER = """
import socket
server = socket.create_server(("", 9000))
print("ready", flush=True)
while True:
    client, _ = server.accept()
    while client.recv(1 << 20):
        pass
    client.close()
"""
# Half-closed, so that the server has read everything once its own end closes.
CLIENT = """
import socket, sys
client = socket.create_connection((sys.argv[1], 9000), timeout=float(sys.argv[3]))
client.sendall(bytes(int(sys.argv[2])))
client.shutdown(socket.SHUT_WR)
client.recv(1)
"""
# A grandchild that has left the process group of its parent.
RUNAWAY = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
SLEEP = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"]
# A shell's background jobs ignore SIGINT, and so do their children.
OWNER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from dstrain.bench.testbed import Fabric, Testbed
with Testbed(Fabric(nodes=1)) as testbed:
    sleeper = testbed.start(0, [sys.executable, "-c", "import time; time.sleep(600)"])
    print(testbed.name, sleeper.pid, flush=True)
    time.sleep(600)
"""


def send(testbed: Testbed, num_bytes: int, timeout_s: float = 30) -> int:
    """The status of a client on node 1 that sends to the server on node 0."""
    client = testbed.start(1, python(CLIENT, testbed.address(0), str(num_bytes), str(timeout_s)))
    return client.wait()


def serve(testbed: Testbed) -> None:
    server = testbed.start(0, python(SERVER), stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, timeout_s: float = 20) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_counters_see_what_crosses_the_line():
    with Testbed(Fabric(nodes=2, rate_mbit=400, burst_bytes=128 << 10)) as testbed:
        serve(testbed)
        before = testbed.counters(1)
        assert send(testbed, 2_000_000) == 0
        sent = testbed.counters(1) - before
        assert sent.device == pytest.approx(2_000_000, rel=0.005)
        # A payload of 1448 bytes in 1514 on the line.
        assert sent.line_out == pytest.approx(2_000_000 * 1514 / 1448, rel=0.005)
        assert sent.loopback == 0
        received = testbed.counters(0).line_in
        assert received == pytest.approx(sent.line_out, rel=0.005)


def test_an_unlimited_link_has_no_line_counters():
    with Testbed(Fabric(nodes=2)) as testbed:
        serve(testbed)
        assert send(testbed, 1_000_000) == 0
        assert (testbed.counters(1).line_out, testbed.counters(1).line_in) == (0, 0)
        assert testbed.counters(1).device > 1_000_000


def test_a_cut_cable_is_silent_until_it_is_mended():
    with Testbed(Fabric(nodes=2)) as testbed:
        serve(testbed)
        testbed.cut(1)
        assert send(testbed, 1, timeout_s=0.5) != 0
        testbed.mend(1)
        assert send(testbed, 1) == 0


def test_two_stand_side_by_side():
    with Testbed(Fabric(nodes=2)) as one, Testbed(Fabric(nodes=2)) as other:
        serve(one)
        assert send(one, 1) == 0
        assert send(other, 1, timeout_s=0.5) != 0


def test_nothing_is_left_after_an_error():
    remove_leftovers()
    before, inside = namespaces(), []

    def fail() -> None:
        with Testbed(Fabric(nodes=2, rate_mbit=100, loopback_mbit=320)) as testbed:
            child = testbed.start(0, python(RUNAWAY, *SLEEP), stdout=subprocess.PIPE, text=True)
            assert child.stdout.readline() == "ready\n"
            inside.extend(map(int, _pids(testbed.name)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert namespaces() == before
    assert inside
    assert until(lambda: not any(runs(pid) for pid in inside))


def test_a_failure_while_building_leaves_nothing():
    remove_leftovers()
    before = namespaces()
    with pytest.raises(UserError, match="tbf"), Testbed(Fabric(nodes=1, rate_mbit=100, burst_bytes=0)):
        pass
    assert namespaces() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_nothing_is_left_after_a_signal(number):
    with subprocess.Popen(python(OWNER), stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as owner:
        name, sleeper = owner.stdout.readline().split()
        owner.send_signal(number)
        try:
            assert owner.wait(20) != 0
        finally:
            owner.kill()
    assert not any(namespace.startswith(name) for namespace in namespaces())
    assert until(lambda: not runs(int(sleeper)))


def test_what_a_killed_owner_left_is_removed_and_nothing_else():
    with Testbed(Fabric(nodes=1)) as mine, subprocess.Popen(python(OWNER), stdout=subprocess.PIPE, text=True) as owner:
        name, sleeper = owner.stdout.readline().split()
        owner.kill()
        owner.wait()
        assert until(lambda: not runs(int(sleeper)))
        remove_leftovers()
        assert not any(namespace.startswith(name) for namespace in namespaces())
        assert any(namespace.startswith(mine.name) for namespace in namespaces())


def test_without_root_it_says_what_to_do():
    source = "import os; from dstrain.bench.testbed import require_root; os.setuid(65534); require_root()"
    done = subprocess.run(python(source), capture_output=True, text=True, check=False)
    assert "only root may" in done.stderr
    assert "sudo" in done.stderr


def test_a_user_namespace_will_do():
    source = "from dstrain.bench.testbed import Fabric, Testbed\nwith Testbed(Fabric(2, 100)): print('built')"
    inner = 'mount -t tmpfs none /run && exec "$@"'
    command = ["unshare", "-Urnm", "sh", "-c", inner, "sh", *python(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "built\n", done.stderr


def _pids(name: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "pids", f"{name}-node0"], capture_output=True, text=True, check=True)
    return listed.stdout.split()


# A request to end that comes while a process of the testbed is being forked, where Python ignores what is raised.
ASKED = """
import os, signal
from dstrain.bench.testbed import Fabric, Testbed

def ask():
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        pass

with Testbed(Fabric(nodes=1)) as testbed:
    os.register_at_fork(before=ask)
    testbed.start(0, ["sleep", "60"])
    print("not heard")
"""


def test_a_request_in_the_middle_of_a_fork_is_heard():
    remove_leftovers()
    before = namespaces()
    done = subprocess.run(python(ASKED), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, ""), done.stderr
    assert "Exception ignored" in done.stderr
    assert namespaces() == before
