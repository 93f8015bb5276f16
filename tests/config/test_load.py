"""What a command line gives: the typed tree, or one message."""

import logging
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dstrain.config import load
from dstrain.config.schema import Config, Corpus, EngineConfig, LrPhase, RecipeChange
from dstrain.engine.recipe import batch_sequences
from dstrain.errors import ConfigError, UserError

RECIPES = sorted(path.stem for path in (load.conf_dir() / "experiment").glob("*.yaml"))
WORLD = {"tiny_cpu": 4, "a100_8": 8, "rtx4090_8": 8, "deepseek_v2_lite": 64, "h100_4x8": 32, "deepseek_v3": 2048}


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # `load.run` sets these for Hydra.
    monkeypatch.setattr("sys.argv", ["dstrain"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")


def run(command: str, *arguments: str) -> list[Any]:
    """The configs that the jobs of a command line get."""
    got: list[Any] = []
    load.run(command, arguments, got.append)
    return got


def entries() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def test_defaults_and_overrides():
    (config,) = run("train", "data.path=corpus.txt", "train.steps=7", "optim.lr=1e-3", "model=small")
    assert isinstance(config, Config)
    assert (config.train.steps, config.optim.lr, config.model.num_layers) == (7, 1e-3, 12)
    assert config.mesh.dp == 1
    assert config.run.dir == ""


def test_lists_become_tuples_of_dataclasses():
    config = load.compose(
        "train",
        [
            "train.changes=[{at_tokens: 5, mtp_loss_weight: 0.1}]",
            "optim.phases=[{shape: linear, tokens: 10, lr_end: 1e-4}, {shape: cosine}]",
            "data.blend=[{path: a, weight: 2}, {path: b}]",
            "train.recompute=[norm, experts]",
        ],
    )
    assert config.train.changes == (RecipeChange(5, 0.1),)
    assert config.optim.phases == (LrPhase("linear", 10, 1e-4), LrPhase("cosine"))
    assert config.data.blend == (Corpus("a", 2.0), Corpus("b"))
    assert config.train.recompute == ("norm", "experts")
    hash(config)


def test_hydra_does_not_print_what_others_log():
    before, level = set(logging.root.handlers), logging.root.level
    run("train", "data.path=corpus.txt")
    assert set(logging.root.handlers) <= before
    assert logging.root.level == level


def test_hydra_writes_nothing():
    run("train", "data.path=corpus.txt")
    assert entries() == []


REFUSED = [
    (["model.n_exprts=3"], "model.n_exprts=3: there is no such key. Did you mean model.num_experts?"),
    (["+model.foo=1"], "model.foo=1: there is no such key."),
    (["++model.num_expert=1"], "Did you mean model.num_experts?"),
    (["+foo=1"], "foo=1: there is no such key."),
    (["steps=5"], "steps=5: there is no such key. Did you mean train.steps?"),
    (["train.steps=abc"], "train.steps=abc: must be a whole number. Optimiser steps"),
    (["train.steps=1.5"], "train.steps=1.5: must be a whole number."),
    (["train.sequences=many"], "train.sequences=many: must be a whole number or null."),
    (["model.tie_embeddings=maybe"], "model.tie_embeddings=maybe: must be true or false."),
    (["train.recompute=norm"], "train.recompute=norm: must be a list: [text, ...]."),
    (
        ["optim.phases=[{shpe: linear}]"],
        "optim.phases[].shpe=...: there is no such key. Did you mean optim.phases[].shape?",
    ),
    (["optim.phases=[{tokens: x}]"], "optim.phases[].tokens=x: must be a whole number."),
    (["model.rope=3"], "model.rope=3: "),
    (["model=foo"], "model=foo: there is no such choice. Choose one of deepseek_v2, deepseek_v2_lite"),
    (["model=3"], "model=3: there is no such choice."),
    (["+experiment=tiny"], "experiment=tiny: there is no such choice. Choose one of a100_8"),
    (["experiment=tiny_cpu"], "experiment=tiny_cpu: it is not part of the defaults. Add it with a plus: +experiment"),
    (["train.steps=[1"], "train.steps=[1: this is not a valid override."),
    (["word"], "word: this is not a valid override."),
    (["mesh.ep=3"], "mesh.ep=3: it must divide model.num_experts=16."),
    (["data.path=null"], "data.path=None: training needs text."),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refused(arguments: list[str], message: str):
    with pytest.raises(UserError) as caught:
        load.compose("train", ["data.path=corpus.txt", *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_the_same_way_by_the_command():
    with pytest.raises(UserError, match="train.steps=abc: must be a whole number"):
        run("train", "data.path=x", "train.steps=abc")
    with pytest.raises(UserError, match="mesh.ep=3: it must divide"):
        run("train", "data.path=x", "mesh.ep=3")


def test_unknown_key_is_refused_before_it_is_shown():
    with pytest.raises(ConfigError, match=r"model\.foo"):
        run("train", "+model.foo=1", "--cfg", "job")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {hiden_size: 3}", r"model\.hiden_size=.*\(in experiment/mine\).*model\.hidden_size"),
        ("train: {steps: soon}", r"train\.steps=soon: must be a whole number \(in experiment/mine\)"),
        ("model: {hidden_size: [", "not valid YAML.*mine.yaml"),
    ],
)
def test_mistakes_in_files(content: str, message: str):
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/mine.yaml").write_text(f"# @package _global_\n{content}\n")
    with pytest.raises(UserError, match=message):
        run("train", "--config-dir", "mine", "+experiment=mine", "data.path=x")


def test_own_config_directory():
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/mine.yaml").write_text("# @package _global_\nmodel: {hidden_size: 96}\n")
    (config,) = run("train", "-cd", "mine", "+experiment=mine", "data.path=x")
    assert config.model.hidden_size == 96


TEXTS = [
    "def main(a, b): return {a: 'b'}",
    r"C:\temp\ 'quoted' \'",
    'say "hi", (please) [now] = 1',
    "123",
    "1e3",
    "true",
    "a=b,c",
    "two\nlines",
    "trailing\\",
    "ünïcödé – 你好",
    " ",
    "'half",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_taken_literally(text: str):
    config = load.compose("generate", ["run.dir=runs/sweep/0-train.seed=1,optim.lr=0.1", f"prompt={text}"])
    assert config.prompt == text
    assert config.run.dir == "runs/sweep/0-train.seed=1,optim.lr=0.1"


def test_quoted_and_empty_texts():
    quoted = load.compose("generate", ["run.dir=a", "prompt='as Hydra users write it'"])
    assert quoted.prompt == "as Hydra users write it"
    assert load.compose("generate", ["run.dir=a", "prompt="]).prompt == ""
    assert load.compose("train", ["data.path=x", "train.init_from=null"]).train.init_from is None


def test_world_size_of_torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run("train", "data.path=x", "mesh.ep=2")[0].mesh.dp == 2
    with pytest.raises(ConfigError, match="Start 8, 16, 24"):
        run("train", "data.path=x", "mesh.ep=8")


def test_multirun_gives_each_job_a_directory():
    jobs = run("train", "--multirun", "data.path=a/b.txt", "train.seed=0,1", "hydra.sweep.dir=runs/sweep")
    assert [job.train.seed for job in jobs] == [0, 1]
    assert [os.path.relpath(job.run.dir) for job in jobs] == ["runs/sweep/0-train.seed=0", "runs/sweep/1-train.seed=1"]


def test_multirun_over_run_dirs_and_groups():
    jobs = run("train", "-m", "data.path=x", "run.dir=runs/a,runs/b", "optim=adamw", "model=tiny,small")
    assert {(job.run.dir, job.model.num_layers) for job in jobs} == {
        (directory, layers) for directory in ("runs/a", "runs/b") for layers in (4, 12)
    }


def test_multirun_under_torchrun_needs_a_common_directory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir"):
        run("train", "-m", "data.path=x", "train.seed=0,1")
    assert len(run("train", "-m", "data.path=x", "train.seed=0,1", "hydra.sweep.dir=sweep")) == 2


def test_errors_of_a_task_pass_through():
    def broken(config: Config) -> None:
        raise ZeroDivisionError("a bug")

    def refusing(config: Config) -> None:
        raise UserError("The corpus is empty.")

    def stopping(config: Config) -> None:
        raise SystemExit(75)

    for task, error in ((broken, ZeroDivisionError), (refusing, UserError), (stopping, SystemExit)):
        with pytest.raises(error):
            load.run("train", ["data.path=x"], task)


def test_save_and_read(tmp_path: Path):
    config = load.compose("train", ["+experiment=deepseek_v3", "mesh.pp=1", "data.path=a, b.txt"], world_size=128)
    load.save(config, tmp_path / "config.yaml")
    assert load.read(tmp_path / "config.yaml") == config
    assert entries() == ["config.yaml"]


def test_read_is_strict(tmp_path: Path):
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match="There is no config"):
        load.read(path)
    path.write_text("model: {hiden_size: 3}")
    with pytest.raises(ConfigError, match=r"hiden_size.*config\.yaml.*hidden_size"):
        load.read(path)
    path.write_text("train: {steps: soon}")
    with pytest.raises(ConfigError, match=r"train\.steps=soon: must be a whole number"):
        load.read(path)


@pytest.fixture
def kept() -> Config:
    """A run that runs/a keeps, on two processes."""
    config = load.compose(
        "train",
        ["+experiment=tiny_cpu", "data.path=a.txt", "run.dir=runs/a", "mesh.ep=2", "train.seed=3"],
        world_size=2,
    )
    Path("runs/a").mkdir(parents=True)
    load.save(config, "runs/a/config.yaml")
    return config


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_resume_needs_nothing_repeated(kept: Config, resume: str):
    config = load.compose("train", ["run.dir=runs/a", f"train.resume={resume}", "train.steps=900"], world_size=4)
    assert config.optim == kept.optim
    assert (config.train.steps, config.train.seed, config.data.path) == (900, 3, "a.txt")
    assert (config.mesh.ep, config.mesh.dp) == (2, 2)


def test_resume_shows_the_kept_config(kept: Config, capsys: pytest.CaptureFixture):
    run("train", "run.dir=runs/a", "train.resume=auto", "--cfg", "job", "-p", "data.path")
    assert capsys.readouterr().out == "a.txt\n"


def test_resume_is_strict(kept: Config):
    resume = ["run.dir=runs/a", "train.resume=auto", "mesh.ep=1"]
    with pytest.raises(ConfigError, match=r"the run there has train\.seed=3, not 4"):
        run("train", *resume, "train.seed=4")
    with pytest.raises(ConfigError, match=r"model\.foo"):
        run("train", *resume, "+model.foo=4")
    with pytest.raises(ConfigError, match=r"train\.steps=x: must be a whole number"):
        run("train", *resume, "train.steps=x")


def test_resume_with_an_experiment_composes_anew_and_compares(kept: Config):
    resume = ["run.dir=runs/a", "train.resume=auto", "+experiment=tiny_cpu"]
    with pytest.raises(ConfigError, match="data.path=a.txt, not python-stdlib"):
        run("train", *resume)
    with pytest.raises(ConfigError, match=r"train\.seed=3, not 0"):
        run("train", *resume, "data.path=a.txt")
    (config,) = run("train", *resume, "data.path=a.txt", "train.seed=3")
    assert config.train.steps == kept.train.steps


def test_resume_with_a_group_replaces_that_section_alone(kept: Config):
    """Precision, batch and learning rate stay those of the run, which are not the defaults."""
    (config,) = run("train", "run.dir=runs/a", "train.resume=auto", "mesh.ep=1", "engine=deepspeed")
    expected = replace(kept, engine=EngineConfig("deepspeed"), train=replace(kept.train, resume="auto"))
    assert replace(config, mesh=kept.mesh) == expected
    (again,) = run("train", "run.dir=runs/a", "train.resume=auto", "mesh.ep=1", "engine=torch", "engine=deepspeed")
    assert again == config
    with pytest.raises(ConfigError, match="engine=foo: there is no such choice. Choose one of deepspeed, torch"):
        run("train", "run.dir=runs/a", "train.resume=auto", "mesh.ep=1", "engine=foo")


def test_resume_of_nothing_starts_with_the_defaults():
    (config,) = run("train", "run.dir=runs/new", "train.resume=auto", "data.path=x")
    assert config.train.steps == 1000


def test_default_run_dir():
    assert load.default_run_dir(datetime(2026, 5, 4, 3, 2, 1)) == "runs/2026-05-04_03-02-01"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str):
    """Every recipe passes all rules on the machine it names."""
    config = load.compose("train", [f"+experiment={name}", "data.path=x"], world_size=WORLD[name])
    mesh = config.mesh
    assert mesh.pp * mesh.ep * mesh.dp == WORLD[name]
    text = (load.conf_dir() / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# Machine: ")
    assert name == "tiny_cpu" or "not been run on" in " ".join(text.replace("#", " ").split())


def test_deepseek_v3_recipe():
    config = load.compose("train", ["+experiment=deepseek_v3", "data.path=x"], world_size=2048)
    assert (config.mesh.pp, config.mesh.ep, config.mesh.dp) == (16, 64, 2)
    assert config.schedule.pipeline == "dualpipe"
    tokens, steps = 0, 0
    while tokens < 469_000_000_000:
        tokens, steps = tokens + batch_sequences(config.train, tokens) * 4096, steps + 1
    # Published: 3072, of which 24 micro-batches would come to a rank, where DualPipe needs 32.
    assert batch_sequences(config.train, 0) == 4096
    assert batch_sequences(config.train, tokens) == 15360
    assert tokens + (config.train.steps - steps) * 15360 * 4096 == pytest.approx(14.8e12, rel=1e-5)
    assert sum(phase.tokens for phase in config.optim.phases) == 14_633_000_000_000
    published = ["train.ramp.start_sequences=3072", "train.ramp.increment_sequences=768"]
    with pytest.raises(ConfigError, match="it gives every rank 24, but dualpipe .* needs at least 32.* Set it to 4096"):
        load.compose("train", ["+experiment=deepseek_v3", "data.path=x", *published], world_size=2048)


GROUPS = {group: sorted((load.conf_dir() / group).glob("*.yaml")) for group in load.conf_groups()}


@pytest.mark.parametrize("turn", range(max(map(len, GROUPS.values()))))
def test_every_choice_of_every_group_composes(turn: int):
    """As many configs as the largest group has choices, each with another choice of every group."""
    chosen = {group: files[turn % len(files)] for group, files in GROUPS.items() if files}
    load.compose(
        "verify",
        [*(f"{group}={file.stem}" for group, file in chosen.items()), "mesh.ep=1", "mesh.pp=1", "dispatch.kind=auto"],
    )
    assert all(file.read_text().startswith("# ") for file in chosen.values())


def test_flags_may_stand_behind_or_before_a_named_alternative(capsys: pytest.CaptureFixture) -> None:
    for arguments in (
        ["train.batch_tokens=4096", "--cfg", "job", "-p", "train"],
        ["--cfg", "job", "-p", "train", "train.batch_tokens=4096"],
        ["train.seed=1", "--cfg", "job", "-p", "train", "train.batch_tokens=4096"],
    ):
        run("train", *arguments)
        assert "sequences: null\nbatch_tokens: 4096\n" in capsys.readouterr().out


def test_naming_one_alternative_drops_the_other() -> None:
    config = load.compose("train", ["data.path=a", "train.batch_tokens=8192"])
    assert (config.train.sequences, config.train.batch_tokens) == (None, 8192)
    config = load.compose(
        "train",
        ["data.blend=[{path: a}]", "+experiment=deepseek_v3", "mesh.pp=1", "train.sequences=5120"],
        world_size=128,
    )
    assert (config.train.sequences, config.train.batch_tokens) == (5120, None)
    assert (config.data.path, [corpus.path for corpus in config.data.blend]) == (None, ["a"])
