import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dstrain.engine.state import FlatShard
from dstrain.errors import UserError
from tests.checkpoint.state import checkpointer, one
from tests.gloo.spawn import spawn

ROOT = Path(__file__).parents[2]

FILL = """
import sys
from pathlib import Path
from dstrain.errors import UserError
from tests.checkpoint.state import checkpointer, differing, one
saver = checkpointer(Path(sys.argv[1]))
saver.save(1, one(1.0, numel=500_000), {})
saver.save(2, one(2.0, numel=3_000_000), {})
try:
    saver.finish()
except UserError as error:
    print(error)
target = one(0.0, numel=500_000)
saver.load(1, target)
print(saver.steps(), differing(target, one(1.0, numel=500_000)), sorted(p.name for p in Path(sys.argv[1]).iterdir()))
"""


def test_a_full_disk_gives_one_message_and_keeps_the_rest(tmp_path: Path) -> None:
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    tmpfs = f"mount -t tmpfs -o size=8m tmpfs {tmp_path} && "
    if subprocess.run([*mount, tmpfs + "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    command = [*mount, tmpfs + 'exec "$0" "$@"', sys.executable, "-c", FILL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    message, state = done.stdout.splitlines()
    assert message.startswith(f"The checkpoint of step 2 could not be written to {tmp_path}: No space left on device")
    assert "needs 12.0 MB and" in message
    assert message.endswith("complete steps: 1.")
    assert state == "[1] [] ['step-00000001']"


def _save_with_a_limit(rank: int, world_size: int, directory: Path) -> list[str]:
    """The second rank may write no file of more than 1 MB; what each save or finish said."""
    saver, said = checkpointer(directory), []
    saver.save(1, {"w": FlatShard((20,), rank * 10, torch.zeros(10))}, {})
    saver.finish()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    numel = 500_000
    for step in (2, 3):
        try:
            saver.save(step, {"w": FlatShard((2 * numel,), rank * numel, torch.zeros(numel))}, {})
        except UserError as error:
            said.append(str(error))
    saver.finish()
    return [*said, str(saver.steps())]


def test_an_error_of_one_rank_surfaces_on_all_at_the_next_call(tmp_path: Path) -> None:
    first, second = spawn(_save_with_a_limit, 2, tmp_path)
    assert first == second
    assert first[0].startswith(f"The checkpoint of step 2 could not be written to {tmp_path}: File too large")
    # The call that reports the failure saves nothing itself.
    assert first[1:] == ["[1]"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    saver = checkpointer(tmp_path)
    saver.save(1, one(1.0), {})
    with pytest.raises(UserError, match="Permission denied"):
        saver.finish()


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    saver = checkpointer(tmp_path / "checkpoints")
    saver.save(1, one(1.0), {})
    with pytest.raises(UserError, match=r"step 1 could not be written .*checkpoints: "):
        saver.finish()
