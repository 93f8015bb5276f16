"""Nodes and a switch on one machine: network namespaces, veth cables, and `tc tbf` for their speed.

    switch namespace     bridge --- port0       port1 ...      a port limits what its node receives
                                      |           |
    node namespaces                 nic0        nic0           a card limits what its node sends

All processes of a node share its namespace, so what they send to each other goes over its loopback: the fast link of
the node, limited as well if asked. Nothing is made outside of these namespaces; no interface, address or route of the
machine is touched. Their names carry the owner, process id and start time: namespaces whose owner is gone were left by
a killed run, and are removed before new ones are made.

A bucket (`burst_bytes`) fills while a link is idle, and that much then passes for nothing: it must be small against a
transfer, or a link seems faster than it is. Below 64 KiB the kernel cuts its large packets before it counts them, and
device counters then hold headers, too.
"""

import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dstrain.errors import UserError

PREFIX = "dstrain"
CARD, BRIDGE = "nic0", "bridge"
# Inside namespaces of their own, so that they can't meet an address of the machine or of another testbed.
ADDRESS, PREFIX_BITS, FIRST_HOST, MAX_NODES = "10.77.0.{}", 24, 10, 64
# How much a limiter holds back before it drops: the windows of all who send to one node, so that nothing is lost.
QUEUE_BYTES = 64 << 20
LOOPBACK_BURST_BYTES = 256 << 10
# A window that survives pauses and stays small, no memory of earlier connections, and one congestion control for all
# kernels: a fabric that loses nothing, the same in every run.
SETTINGS = {
    "ipv4/tcp_congestion_control": "reno",
    "ipv4/tcp_rmem": "4096 131072 1048576",
    "ipv4/tcp_slow_start_after_idle": "0",
    "ipv4/tcp_no_metrics_save": "1",
    "ipv6/conf/all/disable_ipv6": "1",
}
# A bridge may pass every packet through the machine's filters.
BRIDGE_SETTINGS = {"bridge/bridge-nf-call-iptables": "0"}
OWN_NAMESPACE = "unshare -Urnm sh -c 'mount -t tmpfs none /run && exec dstrain bench fabric'"
END_WAIT_S = 5.0
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)
_serial = itertools.count()


@dataclass(frozen=True)
class Fabric:
    """The network of a testbed."""

    nodes: int
    # Line rate of every card, each way; None: as fast as the kernel copies.
    rate_mbit: float | None = None
    burst_bytes: int = 32 << 10
    # Rate of the link inside a node; None: as fast as the kernel copies.
    loopback_mbit: float | None = None
    mtu: int = 1500


@dataclass(frozen=True)
class Counters:
    """Bytes of a node so far."""

    # Sent, by the card: a packet that the kernel cuts later counts its headers once.
    device: int
    # Sent and received, by the limiters: what was on the line, with all headers. 0 where the link isn't limited.
    line_out: int
    line_in: int
    # Sent by the ranks of the node to each other.
    loopback: int

    def __sub__(self, earlier: "Counters") -> "Counters":
        before = astuple(earlier)
        return Counters(*(now - then for now, then in zip(astuple(self), before, strict=True)))


class Testbed:
    """A context: `with Testbed(Fabric(nodes=2, rate_mbit=200)) as testbed: testbed.start(0, [sys.executable, ...])`.

    Leaving it ends every process in it and removes it, whatever happened: SIGTERM and SIGHUP become SystemExit inside,
    SIGINT is KeyboardInterrupt as ever.
    """

    # For pytest, which would collect the class by its name.
    __test__ = False

    def __init__(self, fabric: Fabric):
        self.fabric = fabric
        self.name = f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}-{next(_serial)}"
        self._processes: list[subprocess.Popen[Any]] = []
        self._stack = ExitStack()
        self._requests: list[BaseException] = []

    def __enter__(self) -> "Testbed":
        require_root()
        remove_leftovers()
        with ExitStack() as stack:
            self._requests = stack.enter_context(_ending_by_signal())
            stack.callback(self._remove)
            self._build()
            self._heed()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def address(self, node: int) -> str:
        return ADDRESS.format(FIRST_HOST + node)

    def environment(self) -> dict[str, str]:
        """What gloo and NCCL need: neither finds the card by itself, as the host's name means the loopback."""
        return {"GLOO_SOCKET_IFNAME": CARD, "NCCL_SOCKET_IFNAME": CARD, "MASTER_ADDR": self.address(0)}

    def start(
        self, node: int, command: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Starts a command on a node, in a process group of its own; it ends with the testbed, or with this process."""
        # `ip netns exec` becomes the command: one process, whose number is known.
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._node(node), *command],
            env={**os.environ, **self.environment(), **(env or {})},
            start_new_session=True,
            preexec_fn=_die_with_parent,
            **popen,
        )
        self._processes.append(process)
        self._heed()
        return process

    def _heed(self) -> None:
        """A request to end that comes in the middle of a fork is swallowed: Python ignores what its hooks raise."""
        if self._requests:
            raise self._requests[0]

    def counters(self, node: int) -> Counters:
        links = json.loads(_ip("-n", self._node(node), "-s", "-j", "link"))
        sent = {link["ifname"]: link["stats64"]["tx"]["bytes"] for link in links}
        line = _limited_bytes(self._node(node), CARD), _limited_bytes(self._switch, f"port{node}")
        return Counters(sent[CARD], *line, sent["lo"])

    def cut(self, node: int) -> None:
        """Pulls the cable of a node: nothing gets in or out, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{node}", "down")

    def mend(self, node: int) -> None:
        _ip("-n", self._switch, "link", "set", f"port{node}", "up")

    @property
    def _switch(self) -> str:
        return f"{self.name}-switch"

    def _node(self, node: int) -> str:
        return f"{self.name}-node{node}"

    def _build(self) -> None:
        _namespace(self._switch)
        _ip("-n", self._switch, "link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0")
        _set(self._switch, BRIDGE_SETTINGS)
        _ip("-n", self._switch, "link", "set", BRIDGE, "up")
        for node in range(self.fabric.nodes):
            self._add_node(node)

    def _add_node(self, node: int) -> None:
        name, port = self._node(node), f"port{node}"
        _namespace(name)
        mtu = ("mtu", str(self.fabric.mtu))
        _ip("-n", self._switch, "link", "add", port, *mtu, "type", "veth", "peer", "name", CARD, *mtu, "netns", name)
        _ip("-n", self._switch, "link", "set", port, "master", BRIDGE, "up")
        _ip("-n", name, "address", "add", f"{self.address(node)}/{PREFIX_BITS}", "dev", CARD)
        _ip("-n", name, "link", "set", CARD, "up")
        if self.fabric.rate_mbit is not None:
            _limit(name, CARD, self.fabric.rate_mbit, self.fabric.burst_bytes)
            _limit(self._switch, port, self.fabric.rate_mbit, self.fabric.burst_bytes)
        if self.fabric.loopback_mbit is not None:
            _limit(name, "lo", self.fabric.loopback_mbit, LOOPBACK_BURST_BYTES)

    def _remove(self) -> None:
        # A second Ctrl-C must not leave half of it behind.
        with _deaf():
            _end(self._processes)
            for name in _namespaces():
                if name.startswith(f"{self.name}-"):
                    _delete(name)


def require_root() -> None:
    """Raises UserError, with the cure, where namespaces can't be made."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise UserError(f"The testbed needs `{tool}`, which is not installed. Install iproute2.")
    if sys.platform != "linux" or os.geteuid() != 0:
        raise UserError(
            "The testbed makes network namespaces, which only root may. Run it with sudo, in a container with "
            f"--cap-add NET_ADMIN --cap-add SYS_ADMIN, or as root of a user namespace of your own: {OWN_NAMESPACE}"
        )


def remove_leftovers() -> None:
    """Removes the namespaces of runs that were killed, with what still runs in them."""
    for name in _namespaces():
        owner = name.split("-")[1:3]
        if name.startswith(f"{PREFIX}-") and len(owner) == 2 and not _lives(*owner):
            _delete(name)


def _namespace(name: str) -> None:
    _ip("netns", "add", name)
    _ip("-n", name, "link", "set", "lo", "up")
    _set(name, SETTINGS)


def _set(namespace: str, settings: Mapping[str, str]) -> None:
    """Settings under /proc/sys/net, as far as this kernel has them."""
    paths = {f"/proc/sys/net/{key}": value for key, value in settings.items()}
    write = "; ".join(f"if [ -e {path} ]; then echo '{value}' > {path}; fi" for path, value in paths.items())
    _ip("netns", "exec", namespace, "sh", "-ec", write)


def _limit(namespace: str, device: str, rate_mbit: float, burst_bytes: int) -> None:
    rate = f"{round(rate_mbit * 1e6)}bit"
    shape = ("rate", rate, "burst", f"{burst_bytes}b", "limit", f"{QUEUE_BYTES}b")
    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *shape)


def _limited_bytes(namespace: str, device: str) -> int:
    """What a limiter has let pass."""
    qdiscs = json.loads(_run("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device))
    return sum(qdisc["bytes"] for qdisc in qdiscs if qdisc["kind"] == "tbf")


def _namespaces() -> list[str]:
    return [entry["name"] for entry in json.loads(_ip("-j", "netns", "list") or "[]")]


def _delete(name: str) -> None:
    """Ends what runs in a namespace of ours, and removes it: processes that outlive their links would hang."""
    try:
        deadline = time.monotonic() + END_WAIT_S
        while time.monotonic() < deadline and (pids := _ip("netns", "pids", name).split()):
            for pid in pids:
                _signal(os.kill, int(pid), signal.SIGKILL)
            time.sleep(0.01)
        _ip("netns", "delete", name)
    except UserError:
        # Another run may be removing the same leftovers.
        if name in _namespaces():
            raise


def _end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    for process in processes:
        if process.poll() is None:
            _signal(os.killpg, process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _signal(send: Callable[[int, int], None], pid: int, number: int) -> None:
    """Sends a signal to what may have ended meanwhile."""
    try:
        send(pid, number)
    except ProcessLookupError:
        return


def _lives(pid: str, started: str) -> bool:
    """Whether the process of that number is still the one that started then."""
    return pid.isdecimal() and str(_started(int(pid))) == started


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None: there is none of this number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in brackets, may hold spaces.
    return int(stat.rpartition(")")[2].split()[19])


def _die_with_parent() -> None:
    """In a new process: it ends when its parent does, however that ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _ending_by_signal() -> Iterator[list[BaseException]]:
    """Polite requests to end become exceptions, so that contexts are left in order; only the main thread can ask.

    Yields those that have come.
    """
    requests: list[BaseException] = []

    def leave(number: int, frame: Any) -> None:
        requests.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        raise requests[-1]

    # A job in the background ignores Ctrl-C, and goes on ignoring it.
    hears_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with _handling(leave, signal.SIGTERM, signal.SIGHUP, *[signal.SIGINT] * hears_ctrl_c):
        yield requests


@contextmanager
def _deaf() -> Iterator[None]:
    with _handling(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def _handling(handler: Any, *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with ExitStack() as stack:
        for number in numbers:
            stack.callback(partial(signal.signal, number, signal.signal(number, handler)))
        yield


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"status {done.returncode}"
        raise UserError(
            f"`{' '.join(command)}` failed: {said}. The testbed needs network namespaces, veth, bridge and tbf of the "
            "kernel, and the right to use them (root, or NET_ADMIN and SYS_ADMIN in a container)."
        )
    return done.stdout
