"""Training runs, interrupted and not: what they leave behind, and that going on changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dstrain.config.schema import Config
from dstrain.errors import ConfigError, SharedError, UserError
from dstrain.metrics.run_directory import RunDirectory
from dstrain.tasks import pretrain
from tests.gloo.spawn import spawn
from tests.tasks.training import (
    arguments,
    assert_same_tensors,
    checkpointer,
    config,
    losses,
    records,
    steps,
    tensors,
    train,
    write_corpus,
)

ROOT = Path(pretrain.__file__).parents[2]
RAMP = ("train.ramp.tokens=1280", "train.ramp.start_sequences=4", "train.ramp.increment_sequences=2")
EVERYTHING = (
    "precision=bf16",
    "model.mtp.depth=1",
    "data.fim_rate=0.5",
    "train.recompute=[attend,experts]",
    "train.micro_batch=1",
    "optim.phases=[{shape: cosine, tokens: 1000, lr_end: 5e-3}, {shape: linear, tokens: 0, lr_end: 0}]",
    *RAMP,
)
# Checkpoints at steps 6 and 12 lie between looks and on one.
MOVING = ("dispatch.placement.every_steps=4", "dispatch.placement.min_gain=0")


def test_loss_falls(tmp_path: Path):
    found = losses(train(tmp_path, "run"))
    assert len(found) == 12
    assert found[0] > 5
    assert found[-1] < 0.75 * found[0]


def test_records(tmp_path: Path):
    """The figures that the README promises, of each step and each MoE layer."""
    run = train(tmp_path, "run", "model.mtp.depth=1", "hardware.peak_bf16_tflops=1", "train.steps=2")
    for number, record in enumerate(records(run), start=1):
        assert record["step"] == number
        assert record["tokens"] == number * 8 * 32
        for key in ("loss", "lr", "grad_norm", "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "step_ms", "memory_gib"):
            assert record[key] > 0, key
        assert record["comm_exposed_ms"] == 0
        for layer in ("layer01", "mtp0"):
            assert 1 <= record[f"moe/{layer}/load_max_over_mean"] <= 4
            assert 0 < record[f"moe/{layer}/entropy"] <= 1.3863
            assert record[f"moe/{layer}/bias_range"] > 0


def test_what_is_run_stands_beside_it(tmp_path: Path):
    run = train(tmp_path, "run", "train.steps=1")
    kept = yaml.safe_load((run / "config.yaml").read_text())
    # Bytes and special tokens, rounded up.
    assert kept["model"]["vocab_size"] == 320
    assert kept["run"]["dir"] == str(run)
    (start,) = json.loads((run / "environment.json").read_text())
    assert start["packages"]["torch"]
    assert len(start["git"]["commit"]) == 40
    assert start["world_size"] == 1


def test_console(tmp_path: Path, capfd: pytest.CaptureFixture):
    train(tmp_path, "run")
    out, err = capfd.readouterr()
    first, second, *lines, last = out.splitlines()
    assert first.startswith("starting: 0.0M parameters on 1 x ")
    assert second.endswith(f"run directory {tmp_path / 'run'}")
    assert [line[:10] for line in lines] == ["step  1/12", "step 10/12", "step 12/12"]
    assert all("loss " in line and " tok/s" in line and line.endswith(" left") for line in lines)
    assert last == f"12 steps done; everything is in {tmp_path / 'run'}"
    assert err == ""


# -- going on ---------------------------------------------------------------------------------------------------------


def forget_the_second_half(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000012")


@pytest.mark.parametrize("overrides", [(), ("precision=bf16",), EVERYTHING], ids=["fp32", "bf16", "everything"])
def test_resume_is_exact(tmp_path: Path, overrides: tuple[str, ...]):
    run = train(tmp_path, "run", *overrides)
    uninterrupted, end = losses(run), tensors(run, 12)
    forget_the_second_half(run)
    train(tmp_path, "run", *overrides, "train.resume=must")
    assert losses(run) == uninterrupted
    assert_same_tensors(tensors(run, 12), end)


def test_resume_is_exact_with_a_blend(tmp_path: Path):
    one = write_corpus(tmp_path / "one.txt", "One sheep, {} sheep.")
    two = write_corpus(tmp_path / "two.jsonl", '{{"text": "Now {} goats."}}')
    blend = f'data.blend=[{{path: "{one}", weight: 3}}, {{path: "{two}", weight: 1}}]'
    run = train(tmp_path, "run", blend)
    uninterrupted = losses(run)
    forget_the_second_half(run)
    train(tmp_path, "run", blend, "train.resume=must")
    assert losses(run) == uninterrupted


@pytest.mark.parametrize(
    "overrides", [("mesh.ep=2", *MOVING), ("mesh.ep=1", *EVERYTHING)], ids=["ep2-moving", "dp2-everything"]
)
def test_resume_is_exact_with_two_processes(tmp_path: Path, overrides: tuple[str, ...]):
    run = train(tmp_path, "run", *overrides, world=2)
    uninterrupted, end = losses(run), tensors(run, 12)
    forget_the_second_half(run)
    train(tmp_path, "run", *overrides, "train.resume=must", world=2)
    assert losses(run) == uninterrupted
    assert_same_tensors(tensors(run, 12), end)


# With experts spread, with a stage per rank, and with every stage on both ranks; and their processes.
ALONE, SPREAD = (("mesh.ep=1",), 1), (("mesh.ep=4",), 4)
STAGES = (("mesh.pp=2", "schedule.pipeline=zb_1p"), 2)
MIRRORED = (("mesh.pp=2", "mesh.ep=2", "schedule.pipeline=dualpipe", "train.micro_batch=1"), 4)
Layout = tuple[tuple[str, ...], int]


@pytest.mark.parametrize(
    ("before", "after"),
    [(ALONE, SPREAD), (SPREAD, ALONE), (STAGES, ALONE), (ALONE, MIRRORED)],
    ids=["ep1-to-ep4", "ep4-to-ep1", "pp2-to-pp1", "pp1-to-pp2-ep2"],
)
def test_another_layout_goes_on(tmp_path: Path, before: Layout, after: Layout):
    words = ("model.mtp.depth=1", *MOVING)
    run = train(tmp_path, "run", *words, *before[0], world=before[1])
    uninterrupted = losses(run)
    forget_the_second_half(run)
    # What is not named stays as it was.
    train(tmp_path, "run", *words, "mesh.pp=1", *after[0], "train.resume=must", world=after[1])
    assert losses(run)[:6] == uninterrupted[:6]
    assert losses(run)[6:] == pytest.approx(uninterrupted[6:], rel=1e-5)


@pytest.mark.parametrize("words", [("mesh.ep=4",), ("mesh.pp=2", "mesh.ep=2")], ids=" ".join)
def test_another_layout_saves_what_it_loaded(tmp_path: Path, words: tuple[str, ...]):
    """Bit by bit, through four processes and back."""
    common = ("precision=bf16", "model.mtp.depth=1")
    run = train(tmp_path, "run", *common, "train.steps=6")
    again = config(tmp_path, "run", *common, *words, "train.resume=must", world=4)
    spawn(load_and_save_rank, 4, again)
    assert_same_tensors(tensors(run, 7), tensors(run, 6))


def load_and_save_rank(rank: int, world_size: int, made: Config) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    loader = pretrain.open_loader(made)
    made = pretrain.with_vocabulary(made, loader)
    groups = pretrain.connect(pretrain.mesh_of(made), pretrain.Place.from_environment())
    trainer = pretrain.make_trainer(made, groups)
    trainer.corpus_tokens = loader.num_tokens
    directory = RunDirectory(made.run.dir).checkpoints
    checkpoints = pretrain.Checkpointer(directory, keep_last=9, keep_every_steps=0, group=groups.background)
    pretrain.restore(trainer, checkpoints, made)
    checkpoints.save(7, trainer.state(), {})
    checkpoints.finish()


def test_a_torn_record_is_computed_again(tmp_path: Path):
    """A kill in the middle of a line, after steps that no checkpoint holds."""
    run = train(tmp_path, "run")
    uninterrupted = losses(run)
    forget_the_second_half(run)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: text.index('{"step": 9') + 30])
    (run / "checkpoints" / "step-00000012.partial").mkdir()
    train(tmp_path, "run", "train.resume=auto")
    assert losses(run) == uninterrupted
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000012"]


@pytest.mark.slow
def test_nothing_is_lost_when_killed():
    """While saving, and in the middle of the steps; `scripts/kill_test.py` alone does more."""
    words = [sys.executable, str(ROOT / "scripts" / "kill_test.py"), "--kills", "2", "--world", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equals bit by bit" in done.stdout


# -- beginnings and ends ----------------------------------------------------------------------------------------------


def test_no_steps_save_the_initial_weights(tmp_path: Path):
    run = train(tmp_path, "run", "train.steps=0")
    assert steps(run) == [0]
    train(tmp_path, "run", "train.resume=must", "train.steps=12")
    assert losses(run) == losses(train(tmp_path, "other"))


def test_init_from_takes_the_weights_along(tmp_path: Path):
    first = train(tmp_path, "first", "train.steps=6", "precision=bf16")
    second = train(tmp_path, "second", "train.steps=0", f"train.init_from={first}", "train.seed=7")
    before, after = tensors(first, 6), tensors(second, 0)
    for name, tensor in before.items():
        if name.startswith(("master/", "buffer/")):
            assert tensor.equal(after[name]), name
        else:
            assert not after[name].any(), name
    with pytest.raises(UserError, match="train.init_from=.*nowhere: there is no complete checkpoint"):
        train(tmp_path, "third", f"train.init_from={tmp_path / 'nowhere'}")


def test_retention(tmp_path: Path):
    keep = ("checkpoint.every_steps=2", "checkpoint.keep_last=2", "checkpoint.keep_every_steps=4", "train.steps=11")
    assert steps(train(tmp_path, "run", *keep)) == [4, 8, 10, 11]


def test_a_requested_stop_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """SIGTERM twice in a row, as torchrun passes on what the terminal has sent already."""
    uninterrupted = losses(train(tmp_path, "whole"))
    log = pretrain.log

    def log_and_stop(report, *rest):
        if report.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return log(report, *rest)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pretrain, "log", log_and_stop)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "run")
    monkeypatch.setattr(pretrain, "log", log)
    assert stop.value.code == 75
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("stopped and saved after step 4 of ")
    assert last.endswith(f"dstrain train run.dir={tmp_path / 'run'} train.resume=auto")
    assert signal.getsignal(signal.SIGTERM) == before
    # The ranks agree on the stop in the step after the signal.
    assert steps(tmp_path / "run") == [4]
    assert losses(train(tmp_path, "run", "train.resume=auto")) == uninterrupted


def test_a_later_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrain.StopRequest, "SAME_REQUEST_S", 0.0)
    with pretrain.StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves(tmp_path: Path):
    """The terminal signals every process of the group, and torchrun its processes once more."""
    write_corpus(tmp_path / "corpus.txt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dstrain"]
    words = ["train", *arguments(tmp_path, "run", "mesh.ep=2", "train.steps=100000", "checkpoint.every_steps=0")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *words], env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() or len(records_so_far(tmp_path / "run")) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (saved,) = steps(tmp_path / "run")
    assert saved == len(records(tmp_path / "run"))


def records_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_run_directory_in_use(tmp_path: Path):
    made = config(tmp_path, "run")
    holder = RunDirectory(tmp_path / "run")
    holder.create()
    holder.lock()
    with pytest.raises(SharedError, match=f"run is in use by process {os.getpid()} on "):
        pretrain.run(made)
    holder.unlock()
    pretrain.run(made)


def test_an_earlier_run_is_not_mixed_with_a_new_one(tmp_path: Path):
    before = losses(train(tmp_path, "run", "train.steps=2"))
    with pytest.raises(SharedError, match="holds an earlier run, and train.resume is never. Go on with"):
        train(tmp_path, "run")
    assert losses(tmp_path / "run") == before


def test_a_changed_model_is_not_resumed(tmp_path: Path):
    train(tmp_path, "run", "train.steps=1")
    with pytest.raises(ConfigError, match="the run there has model.num_layers=2, not 3"):
        config(tmp_path, "run", "train.resume=auto", "model.num_layers=3")


def test_a_changed_corpus_is_not_resumed(tmp_path: Path):
    train(tmp_path, "run", "train.steps=1")
    write_corpus(tmp_path / "corpus.txt", count=500)
    with pytest.raises(SharedError, match="data.path: the corpus holds .* tokens, but .* when step 1 was saved"):
        train(tmp_path, "run", "train.resume=auto", "train.steps=2")


def test_figures_without_a_checkpoint_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = train(tmp_path, "run", "train.steps=2")
    before = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints")
    train(tmp_path, "run", "train.resume=auto", "train.steps=1")
    assert (run / "metrics.before-1.jsonl").read_text() == before
    assert "starting at step 0" in capfd.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_nothing_to_resume(tmp_path: Path):
    with pytest.raises(SharedError, match="train.resume=must: .* holds no complete checkpoint"):
        train(tmp_path, "run", "train.resume=must")


def test_refusals_free_the_directory(tmp_path: Path):
    with pytest.raises(SharedError):
        train(tmp_path, "run", "train.resume=must")
    train(tmp_path, "run", "train.resume=auto", "train.steps=1")
    assert checkpointer(tmp_path / "run").steps() == [1]


# -- weights & biases -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wandb_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "")
    run = train(tmp_path, "run", "metrics=wandb_offline", "train.steps=2")
    run_id = (run / "wandb_id").read_text().strip()
    train(tmp_path, "run", "metrics=wandb_offline", "train.steps=4", "train.resume=must")
    assert (run / "wandb_id").read_text().strip() == run_id
    # Two pieces would have one name if both began within a second.
    pieces = list((run / "wandb").glob("offline-run-*"))
    assert pieces
    assert all(piece.name.endswith(run_id) for piece in pieces)
