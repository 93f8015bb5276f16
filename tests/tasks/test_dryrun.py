"""`dstrain dryrun` as a user meets it, and DeepSeek-V3's layout through it."""

import json
import time
from pathlib import Path

import pytest

from dstrain import cli


@pytest.fixture
def dryrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Runs `dstrain dryrun ...` in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.status_of(["dryrun", *arguments])
        return status, *capsys.readouterr()

    return run


PIPELINE = ("+experiment=tiny_cpu", "mesh.pp=2", "mesh.ep=2", "schedule.pipeline=zb_v", "model.num_layers=5")


def test_a_pipeline(dryrun):
    status, out, _ = dryrun(*PIPELINE, "ranks=8", "train.micro_batch=1", "out=found.json")
    assert status == 0
    assert out.startswith("8 ranks, 1 to a node: pp=2 ep=2 dp=2; 4 micro-batches of 1 x 256 tokens for every rank")
    assert "schedule: zb_v, 4 micro-batches over 4 stages" in out
    assert "Balanced routing: equally many rows come to every expert." in out
    assert "Written: found.json" in out
    found = json.loads(Path("found.json").read_text())
    assert found["mesh"] == {"pp": 2, "ep": 2, "dp": 2, "ranks": 8}
    assert [[stage["number"] for stage in rank["stages"]] for rank in found["ranks"]] == [[0, 3], [1, 2]]
    assert [rank["rank"] for rank in found["ranks"]] == [0, 4]
    # Four micro-batches twice there and back; between the stages of rank 1 they stay where they are.
    between = 4 * 256 * 128
    assert [rank["sent_bytes"]["pipe"] for rank in found["ranks"]] == [{"node": 0, "network": 2 * 4 * between}] * 2
    assert 0 < found["bubble_share"] < 1


def test_a_narrow_terminal_cuts_no_figures_off(dryrun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = dryrun(*PIPELINE)
    assert "optimizer GiB" in out
    assert "…" not in out


def test_a_single_rank(dryrun):
    status, out, _ = dryrun("+experiment=tiny_cpu")
    assert status == 0
    assert out.startswith("1 rank, 1 to a node: pp=1 ep=1 dp=1; 4 micro-batches")
    assert "nothing is sent" in out
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ranks=6"], "ranks=6: it must be a multiple of mesh.pp*mesh.ep=4. Set ranks=4"),
        (["ranks=8", "mesh.dp=1"], "ranks=8: it must be mesh.pp*mesh.ep*mesh.dp=4. Set ranks=4"),
        (["mesh.pp=3", "schedule.pipeline=dualpipe"], "mesh.pp=3: dualpipe feeds both ends and needs an even number"),
        (["schedule.split=[3,2]"], "schedule.split=[3, 2]: pipeline=zb_v on mesh.pp=2 has 4 stages"),
        (["engine=deepspeed"], "engine.name=deepspeed: only the shares of engine=torch are known. Set engine=torch."),
        (["dispatch=deepep"], "dispatch.kind=deepep: the bytes that its kernels send are not known."),
        (["dispatch=hierarchical"], "dispatch.kind=hierarchical: it needs several equally large nodes"),
    ],
)
def test_wrong_input(dryrun, arguments: list[str], said: str):
    status, out, err = dryrun(*PIPELINE, "train.micro_batch=1", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dstrain: {said}")
    assert err.count("\n") == 1


def test_a_file_that_is_there_stays(dryrun):
    Path("found.json").write_text("mine")
    status, out, err = dryrun(*PIPELINE, "out=found.json")
    assert (status, out) == (2, "")
    assert err == "dstrain: out=found.json: it is there already. Choose another name, or remove it.\n"
    assert Path("found.json").read_text() == "mine"


def test_torchrun_is_not_needed(dryrun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, _, err = dryrun(*PIPELINE)
    assert "dstrain dryrun plays all ranks itself" in err


def test_deepseek_v3_on_2048_ranks(dryrun):
    """16 pipeline ranks x 64-way experts x 2 replicas, every stage of it; in under a minute of one core."""
    began = time.process_time()
    status, out, _ = dryrun("+experiment=deepseek_v3", "out=v3.json")
    assert time.process_time() - began < 60
    assert status == 0
    assert out.startswith("2048 ranks, 8 to a node: pp=16 ep=64 dp=2; 120 micro-batches of 1 x 4096 tokens")
    found = json.loads(Path("v3.json").read_text())
    assert (found["pipeline"], found["parameters"]["total"]) == ("dualpipe", 671_026_404_352)
    assert [[s["number"] for s in rank["stages"]] for rank in found["ranks"]] == [[p, 15 - p] for p in range(16)]
    # Half of the micro-batches begin at each end, so every rank sees half of them in each of its stages.
    assert {stage["micro_batches"] for rank in found["ranks"] for stage in rank["stages"]} == {60}
    assert {rank["peak_live"] for rank in found["ranks"]} == {17}
    shapes = [stage["output_shape"] for rank in found["ranks"] for stage in rank["stages"] if stage["number"] < 15]
    assert shapes == [[1, 4096, 7168]] * 30
    layers = {stage["number"]: stage["layers"] for rank in found["ranks"] for stage in rank["stages"]}
    assert [layer for number in sorted(layers) for layer in layers[number]] == list(range(61))
    # BF16, there and back, at two ends for all ranks but the outermost.
    sent = [rank["sent_bytes"]["pipe"]["network"] for rank in found["ranks"]]
    assert sent == [120 * 2 * 4096 * 7168] + [240 * 2 * 4096 * 7168] * 14 + [120 * 2 * 4096 * 7168]
    # Four experts of every MoE layer and 44.04M parameters each: rank 1 has eight layers.
    assert found["ranks"][1]["expert_parameters"] == 8 * 4 * 3 * 7168 * 2048
