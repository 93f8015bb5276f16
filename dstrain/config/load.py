"""From YAML and overrides to one frozen, strictly typed tree: the only file that knows Hydra.

    arguments -> refuse unknown keys, quote texts -> Hydra composes against the typed schema -> dataclasses -> check

Hydra alone is not strict enough (`+model.foo=1` passes), reads commas and brackets inside texts as its own grammar, and
answers mistakes with several lines about itself. What stands around it here mends these three things and nothing else:
every flag of Hydra works as its users know it.

A run directory keeps its config in config.yaml. Resuming starts from that file instead of the defaults, so that
`dstrain train run.dir=runs/a train.resume=auto` needs nothing repeated. A group named anew (`engine=deepspeed`)
replaces that section alone; an experiment is a whole recipe and starts from the defaults again.
"""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from textwrap import fill
from typing import Any, get_args, get_origin, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError  # type: ignore[import-untyped]

from dstrain.config import bench, check, commands, plan
from dstrain.config.directory import choices, conf_dir
from dstrain.config.keys import Key, is_node, keys, nearest, sections
from dstrain.config.schema import Config
from dstrain.errors import ConfigError, UserError

# By command; of two words, with "_" between them.
SCHEMAS: dict[str, type] = {
    "train": Config,
    "verify": commands.VerifyRoot,
    "dryrun": commands.DryrunRoot,
    "generate": commands.GenerateRoot,
    "export": commands.ExportRoot,
    "import": commands.ImportRoot,
    "tokenize": commands.TokenizeRoot,
    "schedule_show": commands.ShowRoot,
    "schedule_split": commands.SplitRoot,
    "calibrate": bench.CalibrateRoot,
    "bench_comm": bench.CommRoot,
    "bench_fabric": bench.FabricRoot,
    **plan.ROOTS,
}

# Who names the first means it instead of the second, which a YAML file may have set.
INSTEAD = {
    "train.sequences": "train.batch_tokens",
    "train.batch_tokens": "train.sequences",
    "data.blend": "data.path",
}

_OVERRIDE = re.compile(r"(?P<sign>\+{0,2}|~)(?P<key>[\w.]+)=(?P<value>.*)", re.DOTALL)
_VERSION_BASE = "1.3"


def run(command: str, arguments: Sequence[str], task: Callable[[Any], None]) -> None:
    """Runs `dstrain <command> <arguments>`: overrides and any flags of Hydra, which decide what is done.

    `task` gets the finished config, once for each job of a sweep. Raises UserError for every mistake in the arguments
    or the YAML files, before `task` is called.
    """
    schema, arguments = SCHEMAS[command], _prepare(SCHEMAS[command], arguments)
    saved = _saved_base(command, arguments)
    arguments = _onto_saved(arguments) if saved else arguments
    _register(command, saved, arguments)

    @hydra.main(version_base=_VERSION_BASE, config_path=str(conf_dir()), config_name="resume" if saved else command)
    def job(composed: DictConfig) -> None:
        with _past_hydra(), _explained(schema, arguments):
            task(_finish(command, composed))

    sys.argv = [f"dstrain {_spoken(command)}", *arguments]
    with _explained(schema, arguments):
        job()


def compose(command: str, overrides: Sequence[str] = (), *, world_size: int = 1) -> Any:
    """The finished config of `dstrain <command> <overrides>`, as a task would get it; for use from Python."""
    schema, prepared = SCHEMAS[command], _prepare(SCHEMAS[command], overrides)
    saved = _saved_base(command, prepared)
    prepared = _onto_saved(prepared) if saved else prepared
    _register(command, saved, prepared)
    with _explained(schema, prepared), hydra.initialize_config_dir(str(conf_dir()), version_base=_VERSION_BASE):
        composed = hydra.compose("resume" if saved else command, overrides=prepared)
        return _checked(command, _build(schema, composed), world_size)


def read(path: str | Path) -> Config:
    """The config that `save` wrote. Raises UserError if it is missing or not a valid config."""
    if not Path(path).is_file():
        raise UserError(f"There is no config at {path}. A run directory holds one as config.yaml: check run.dir.")
    with _explained(Config, [], where=str(path)):
        return _build(Config, OmegaConf.merge(_typed(Config), OmegaConf.load(path)))


def save(config: Config, path: str | Path) -> None:
    """Writes the config as YAML, complete or not at all."""
    fresh = Path(f"{path}.new")
    OmegaConf.save(OmegaConf.structured(config), fresh)
    os.replace(fresh, path)


def default_run_dir(now: datetime) -> str:
    """Where a new run goes if run.dir is "". Ranks must agree on it: rank 0 decides and tells the others."""
    return f"runs/{now:%Y-%m-%d_%H-%M-%S}"


def _finish(command: str, composed: DictConfig) -> Any:
    config, job = _build(SCHEMAS[command], composed), HydraConfig.get()
    named = any(str(override).startswith("run.dir=") for override in job.overrides.task)
    if command == "train" and job.mode == RunMode.MULTIRUN and not named:
        config = replace(config, run=replace(config.run, dir=job.runtime.output_dir))
    return _checked(command, config, _world_size())


def _checked(command: str, config: Any, world_size: int) -> Any:
    if command in check.MEASURING:
        check.MEASURING[command](config, world_size)
        return check.resolve(config, world_size)
    if command != "train":
        (check.CHECKS | plan.CHECKS)[command](config)
        return config
    check.check_training(config, world_size)
    config = check.resolve(config, world_size)
    kept = Path(config.run.dir) / "config.yaml"
    if config.train.resume != "never" and kept.is_file():
        check.check_same_run(read(kept), config)
    return config


def _prepare(schema: type, arguments: Sequence[str]) -> list[str]:
    """Refuses unknown dotted keys and quotes texts, so that commas, brackets and equal signs in them are just that."""
    leaves, inner = keys(schema), sections(schema)
    multirun = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))
    if multirun and _world_size() > 1 and not _values(arguments).get("hydra.sweep.dir"):
        cure = "Add hydra.sweep.dir=<directory>, the same on every rank."
        raise ConfigError("hydra.sweep.dir", "<time of start>", "ranks of a sweep must agree on one directory", cure)
    prepared = []
    for argument in arguments:
        override = _OVERRIDE.fullmatch(argument)
        dotted = override and "." in override["key"] and not override["key"].startswith("hydra.")
        if override and dotted and override["key"] not in leaves and override["key"] not in inner:
            raise _unknown(override["key"], override["value"], schema)
        prepared.append(_as_text(override, leaves, multirun) if override else argument)
        if override and override["key"] in leaves:
            prepared += _dropped(override["key"], _values(arguments))
    # Hydra's parser wants overrides in one row, flags before or after them.
    return sorted(prepared, key=lambda argument: _OVERRIDE.fullmatch(argument) is None)


def _dropped(key: str, values: dict[str, str]) -> list[str]:
    """The override that empties the alternative to `key`, unless it is given as well."""
    other = INSTEAD.get(key)
    return [f"{other}=null"] if other and other not in values and values[key] not in ("null", "[]") else []


def _as_text(override: re.Match[str], leaves: dict[str, Key], multirun: bool) -> str:
    """The override with its value quoted, where the value is meant to be a text."""
    leaf, value = leaves.get(override["key"]), override["value"]
    if leaf and leaf.is_text and not multirun:
        value = _quoted(value, leaf.type)
    elif "." not in override["key"] and not leaf and re.fullmatch(r"[\d.]+", value):
        # A group takes the name of a file; Hydra crashes on a number.
        value = f"'{value}'"
    return f"{override['sign']}{override['key']}={value}"


def _quoted(value: str, type_: str) -> str:
    if (value == "null" and "None" in type_) or re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL):
        return value
    # Hydra's grammar: a backslash counts only before a quote, where it has to be doubled.
    value = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    return "'" + re.sub(r"\\+$", lambda found: found[0] * 2, value) + "'"


def _values(arguments: Sequence[str]) -> dict[str, str]:
    overrides = (_OVERRIDE.fullmatch(argument) for argument in arguments)
    return {override["key"]: override["value"].strip("'\"") for override in overrides if override}


def _saved_base(command: str, arguments: Sequence[str]) -> Config | None:
    """The config of the run to go on with, if these arguments resume one; sections that they choose anew are fresh."""
    values = _values(arguments)
    groups = {key for key in values if "." not in key}
    path = Path(values.get("run.dir", "")) / "config.yaml"
    resumes = command == "train" and values.get("train.resume") in ("auto", "must")
    if not resumes or not groups <= set(conf_groups()) or not values.get("run.dir") or not path.is_file():
        return None
    saved = read(path)
    saved = replace(saved, **{group: type(getattr(saved, group))() for group in groups})
    # The world may have another size this time.
    return replace(saved, mesh=replace(saved.mesh, dp=None))


def _onto_saved(arguments: Sequence[str]) -> list[str]:
    """Groups are added, each once: the defaults of a resumed run are its own config and list none."""
    last = {name: n for n, argument in enumerate(arguments) if (name := argument.partition("=")[0]) in conf_groups()}
    added = (f"+{argument}" if n in last.values() else argument for n, argument in enumerate(arguments))
    return [argument for argument in added if argument.partition("=")[0] not in last]


def conf_groups() -> list[str]:
    """The groups that fill one section of a training config."""
    return [entry.name for entry in fields(Config) if (conf_dir() / entry.name).is_dir()]


def _register(command: str, saved: Config | None, arguments: Sequence[str]) -> None:
    """Makes the schema, the saved config and the help text known to Hydra, under the names that conf/ lists."""
    store, schema = ConfigStore.instance(), SCHEMAS[command]
    store.store(name=f"{command}_schema", node=_typed(schema))
    if saved:
        store.store(name="saved_run", node=_typed(saved))
    node = {"app_name": "dstrain", "template": _help(command, schema, arguments)}
    store.store(group="hydra/help", name="dstrain", node=node)


def _typed(schema: Any) -> DictConfig:
    """The schema as OmegaConf validates it. It takes "frozen" for "can't be overridden", which is undone here."""
    node = OmegaConf.structured(schema)
    _thaw(node)
    return node


def _thaw(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, None)
    for child in node.values():
        if isinstance(child, DictConfig):
            _thaw(child)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _build(schema: Any, composed: Any) -> Any:
    """The dataclass tree of a composed config; lists become tuples."""
    return _convert(schema, OmegaConf.to_container(composed, resolve=True), "")


def _convert(hint: Any, value: Any, name: str) -> Any:
    if is_node(hint):
        hints, prefix = get_type_hints(hint), f"{name}." if name else ""
        for key in value:
            if key not in hints:
                raise _unknown(key, value[key], hint, prefix)
        return hint(**{key: _convert(hints[key], value[key], prefix + key) for key in value})
    if get_origin(hint) is tuple:
        return tuple(_convert(get_args(hint)[0], element, f"{name}[{i}]") for i, element in enumerate(value))
    return value


def _unknown(name: str, value: Any, schema: type, prefix: str = "", source: str = "") -> ConfigError:
    meant = nearest(name, [*keys(schema), *sections(schema)])
    hint = f"Did you mean {prefix}{meant}? " if meant else ""
    return ConfigError(prefix + name, value, f"there is no such key{source}", f"{hint}`--help` lists all keys.")


class _Stopped(BaseException):
    """Carries a UserError past Hydra, which would print lines of its own about an Exception."""

    def __init__(self, error: UserError):
        super().__init__(str(error))
        self.error = error


@contextmanager
def _past_hydra() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise _Stopped(error) from error


@contextmanager
def _explained(schema: type, arguments: Sequence[str], where: str = "") -> Iterator[None]:
    """Turns the errors of Hydra and OmegaConf into one ConfigError in our words."""
    # Hydra would print its errors itself and leave with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except _Stopped as stopped:
        raise stopped.error from None
    except YAMLError as error:
        raise UserError(f"This is not valid YAML: {' '.join(str(error).split())}.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, schema, arguments, where) from error


def _explain(error: Exception, schema: type, arguments: Sequence[str], where: str) -> UserError:
    if isinstance(error, OverrideParseException):
        cure = "Write key=value; quote values with brackets, commas or braces twice: 'key=\"a (b)\"'."
        return UserError(f"{error.override}: this is not a valid override. {cure}")
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return ConfigError(group, choice, "there is no such choice", f"Choose one of {', '.join(error.options)}.")
    cause: BaseException | None = error
    while cause and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OmegaConfBaseException):
        return _explain_value(error, cause, schema, arguments, where)
    return _explain_choice(error, schema, arguments)


def _explain_value(
    error: Exception, cause: OmegaConfBaseException, schema: type, arguments: Sequence[str], where: str
) -> UserError:
    """A value that does not fit the schema, in an override or a YAML file."""
    name, message = cause.full_key or str(cause.key), str(cause).splitlines()[0]
    found = re.match(r"In '(.+)'", str(error))
    where = where or (found[1] if found else "")
    source = f" (in {where})" if where else ""
    shown = re.search(r"[Vv]alue:? '?(.*?)'?(?: of type .*|$)", message)
    value = _values(arguments).get(name, shown[1] if shown else "...")
    prefix = _element_of(cause.object_type, schema)
    kind: Any = cause.object_type if prefix else schema
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        return _unknown(name, value, kind, prefix, source)
    leaf = keys(kind).get(name)
    if isinstance(cause, ValidationError) and leaf:
        return ConfigError(prefix + name, value, leaf.rule + source, leaf.comment or "`--help` describes the keys.")
    return ConfigError(prefix + name, value, message + source, "`--help` lists the keys and their types.")


def _element_of(kind: Any, schema: type) -> str:
    """For LrPhase "optim.phases[].", as errors inside the elements of a list name the key alone."""
    lists = (leaf for leaf in keys(schema).values() if is_node(kind) and f"[{kind.__name__}," in leaf.type)
    return next((f"{leaf.name}[]." for leaf in lists), "")


def _explain_choice(error: Exception, schema: type, arguments: Sequence[str]) -> UserError:
    """A word without a dot that is neither a key nor a group in the defaults."""
    found = re.search(r"Could not override '(.+?)'", str(error))
    if not found:
        return UserError(" ".join(line.strip() for line in str(error).splitlines() if line.strip()))
    name, value = found[1], _values(arguments).get(found[1], "")
    if name in ("experiment", "routing") and issubclass(schema, Config):
        return ConfigError(name, value, "it is not part of the defaults", f"Add it with a plus: +{name}={value}.")
    return _unknown(name, value, schema)


def _help(command: str, schema: type, arguments: Sequence[str]) -> str:
    """The text of `dstrain <command> --help`; groups are those of the commands that have them."""
    about, listed = sections(schema), defaultdict[str, list[str]](list)
    for key in keys(schema).values():
        section, _, last = key.name.rpartition(".")
        text = f"  {last:<26} {key.comment} ({key.type})" if key.comment else f"  {last:<26} ({key.type})"
        listed[section].append(fill(text, 120, subsequent_indent=29 * " ", break_on_hyphens=False))
    heads = {name: f"{name}. {about[name]}\n" if name else "" for name in listed}
    text = "\n\n".join(heads[name] + "\n".join(lines) for name, lines in listed.items())
    composed = issubclass(schema, (Config, bench.FabricRoot))
    usage, groups = (" [group=choice ...]", _GROUPS[issubclass(schema, Config)]) if composed else ("", "")
    filled = re.sub(r"\bNone\b", "null", text).replace("$", "$$")
    groups = groups.format(choices=choices(arguments))
    return _HELP.format(command=_spoken(command), usage=usage, groups=groups, keys=filled)


def _spoken(command: str) -> str:
    """As it is typed: two words for the files of `bench fabric`."""
    return command.replace("_", " ")


# Whether a model is trained.
_GROUPS = {
    True: "Groups (+experiment=... adds a complete recipe, the others have a default):\n\n{choices}\n\n",
    False: "Groups: suite=quick (the default), standing, bytes or release sets many keys at once.\n\n",
}

_HELP = """\
dstrain {command}{usage} [key=value ...] [flags]

{groups}Keys (a list is written key='[a, b]'):

{keys}

Flags:

  --cfg job                  Print the config that these arguments give, and end; -p model: only that part of it.
  --multirun, -m             One run for each combination of comma-separated values: train.seed=0,1 optim.lr=1e-3,3e-4
  --config-dir, -cd          A directory with groups of your own: <directory>/experiment/mine.yaml
  --info                     What the config was composed of.
  --hydra-help               All flags, and what else Hydra can do.
"""
