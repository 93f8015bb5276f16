import io
import os
import pty
import subprocess
import sys

import rich.console

from dstrain.metrics.console import Console

LOOP = """
from dstrain.metrics.console import Console
console = Console(total_steps=20, start_step=10)
for step in range(11, 21):
    console.log({"step": step, "loss": 2.5, "lr": 1e-3, "mfu": 0.25, "tokens_per_s": 1234.0, "comm_exposed_ms": 2.0})
    if step == 15:
        console.say("checkpoint [15] written")
console.close()
print("after")
"""


def plain(**record) -> list[str]:
    """Lines that a pipe receives for 20 steps."""
    out = io.StringIO()
    console = Console(total_steps=20, every_steps=10, console=rich.console.Console(file=out))
    for step in range(1, 21):
        console.log({"step": step, **record})
    console.close()
    return out.getvalue().splitlines()


def test_a_pipe_gets_aligned_lines_at_the_interval():
    lines = plain(loss=2.5, lr=1e-3, tokens_per_s=1234.5, mfu=0.25)
    assert [line.split("  loss")[0] for line in lines] == ["step  1/20", "step 10/20", "step 20/20"]
    assert lines[1].startswith("step 10/20  loss  2.5000  lr 1.0e-03     1,234 tok/s  MFU 25.0 %")
    assert lines[2].endswith("0:00:00 left")
    assert len({len(line) for line in lines}) == 1


def test_unknown_figures_are_left_out():
    assert "MFU" not in plain(loss=1.0, mfu=None)[0]


def test_a_number_that_is_not_finite_is_shown():
    assert "loss     nan" in plain(loss=float("nan"))[0]


def test_a_terminal_gets_one_live_display():
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", LOOP], stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        screen = read_all(leader)
    assert process.returncode == 0
    for text in ("20/20", "0:00:00 left", "loss  2.5000", "MFU 25.0 %", "checkpoint [15] written"):
        assert text in screen
    assert "step 20/20" not in screen  # no plain lines as well
    assert screen.rindex("\x1b[?25h") < screen.index("after")  # the cursor is back before anything else is printed


def read_all(leader: int) -> str:
    """What a program writes to a pseudo-terminal until it ends, which Linux reports as an input error."""
    parts = []
    while True:
        try:
            parts.append(os.read(leader, 65536))
        except OSError:
            os.close(leader)
            return b"".join(parts).decode()
