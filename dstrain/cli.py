"""The `dstrain` command: a name picks a task, everything after it goes to Hydra.

    dstrain <command> [group=choice ...] [key=value ...] [flags]

What a user can mend is printed as one message and ends with status 2; anything else keeps its traceback.
"""

import atexit
import os
import signal
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module, metadata
from typing import Any, NoReturn

from dstrain.errors import PeerError, SharedError, UserError

# Command: the module in dstrain.tasks, and what it does.
COMMANDS = {
    "train": ("pretrain", "train a model, from one process to many (under torchrun)"),
    "verify": ("verify", "prove that a parallel layout computes what one process computes"),
    "dryrun": ("dryrun", "build every stage of a layout without memory: shapes, parameters, operations, bytes"),
    "generate": ("generate", "continue a prompt with a trained model"),
    "export": ("export", "write a checkpoint as a Hugging Face model directory"),
    "import": ("import_", "start a run from a Hugging Face DeepSeek-V2/V3 directory"),
    "tokenize": ("tokenize", "turn text into memory-mapped token files"),
    "plan": ("plan", "predict memory, step time and cost of a training run, without a GPU"),
    "plan search": ("plan_search", "find the best layouts of a model on a machine"),
    "plan trace": ("plan_trace", "draw a planned step: a timeline for Perfetto, a picture, a report as HTML"),
    "plan validate": ("plan_validate", "compare predictions with what was measured: dstrain plan validate runs.json"),
    "calibrate": ("calibrate", "measure this machine, alone or under torchrun, and write a hardware file for plan"),
    "schedule show": ("schedule_show", "show the table of a pipeline: dstrain schedule show dualpipev mesh.pp=4"),
    "schedule split": ("schedule_split", "show which layers each stage of a pipeline holds, and what they cost"),
    "bench comm": (
        "bench_comm",
        "measure links and collectives of a cluster, and write a hardware file (under torchrun)",
    ),
    "bench fabric": (
        "bench_fabric",
        "compare dispatchers, ours and others', on a network with limited links (needs root)",
    ),
    "completion": ("", 'print shell completion: eval "$(dstrain completion bash)"'),
}

# The key that a word without "=" right after a command is the value of.
FIRST_WORD = {"schedule show": "schedule.pipeline", "plan validate": "runs"}

# How long a rank that leaves the message to rank 0 lives on.
SILENT_RANK_WAIT_S = 5.0

# Bash splits the line at "=" and ":", Hydra answers with whole words: what stands before the part that Bash replaces is
# cut off each answer.
BASH_COMPLETION = r"""_dstrain_completion() {
    local line="${COMP_LINE:0:COMP_POINT}" word cut="" choice
    word="${line##*[[:space:]]}"
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && cut="${word%=*}="
    COMPREPLY=()
    while IFS= read -r choice; do
        [[ -n $choice && $choice == "$word"* ]] || continue
        [[ $choice == *[=./] || -d ${choice#*=} ]] || choice+=" "
        COMPREPLY+=("${choice#"$cut"}")
    done < <(COMP_LINE="$line" "${COMP_WORDS[0]}" -sc query=bash 2>/dev/null | tr ' ' '\n')
}
complete -o nospace -o default -F _dstrain_completion dstrain
"""


def main() -> None:
    """Runs the command line and ends the process, with status 0 or what a failure gives; a bug keeps its traceback."""
    try:
        status = status_of(sys.argv[1:])
    except PeerError as error:
        print(f"dstrain: {error}", file=sys.stderr)
        # Threads and process groups that still wait for the lost rank would hold up an orderly end.
        leave(2)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # What was registered to run at exit still does.
        atexit._run_exitfuncs()
        leave(status)
    raise SystemExit(status)


def leave(status: int) -> NoReturn:
    """Ends the process without the interpreter's own end.

    A thread of gloo that drops its last tensor in a half-ended interpreter aborts the process, and with it the status.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def status_of(arguments: Sequence[str]) -> int:
    """The status with which the process is to end; what a user can mend is printed."""
    try:
        dispatch(arguments)
    except PeerError:
        raise
    except UserError as error:
        if not isinstance(error, SharedError) or os.environ.get("RANK", "0") == "0":
            print(f"dstrain: {error}", file=sys.stderr)
        else:
            # torchrun ends all processes as soon as one has failed: let it be the one that has printed.
            time.sleep(SILENT_RANK_WAIT_S)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if "--help" not in arguments:
            raise
        # A reader such as `head` has seen enough; at the end, nothing must be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def dispatch(arguments: Sequence[str]) -> None:
    """Runs `arguments`, the words after `dstrain`. Raises UserError for a mistake in them."""
    command, rest = split(arguments or ["--help"])
    if command in ("-h", "--help", "help"):
        print(usage())
    elif command == "--version":
        print(f"dstrain {installed_version()}")
    elif command == "completion" or "install=bash" in arguments:
        print_completion(rest)
    elif command in ("-sc", "--shell-completion"):
        complete(os.environ.get("COMP_LINE", ""))
    elif command in COMMANDS:
        run(command, rest)
    else:
        raise UserError(f"There is no command {command!r}. {_suggestion(command)}")


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command, of one word or two, and what follows it."""
    length = 2 if " ".join(words[:2]) in COMMANDS else 1
    return " ".join(words[:length]), list(words[length:])


def run(command: str, arguments: Sequence[str]) -> None:
    # Hydra takes a third of a second, which --help and --version need not wait for.
    from dstrain.config import load

    def task(config: Any) -> None:
        import_module(f"dstrain.tasks.{COMMANDS[command][0]}").run(config)

    # The files of a command of two words have one name.
    load.run(command.replace(" ", "_"), keyed(command, arguments), task)


def keyed(command: str, arguments: Sequence[str]) -> list[str]:
    """`schedule show dualpipev` is `schedule show schedule.pipeline=dualpipev`."""
    first = arguments[0] if arguments else ""
    is_word = bool(first) and "=" not in first and not first.startswith("-")
    if is_word and command in FIRST_WORD:
        return [f"{FIRST_WORD[command]}={first}", *arguments[1:]]
    if is_word and any(name.startswith(f"{command} ") for name in COMMANDS):
        raise UserError(f"There is no command {f'{command} {first}'!r}. {_suggestion(f'{command} {first}')}")
    return list(arguments)


def installed_version() -> str:
    try:
        return metadata.version("dstrain")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "dstrain <command> [group=choice ...] [key=value ...] [flags]",
            "",
            *lines,
            "",
            "`dstrain <command> --help` lists a command's groups, keys and flags; --cfg job shows the config,",
            "--multirun sweeps. A first run: dstrain train +experiment=tiny_cpu data.path=<a text file>",
        ]
    )


def print_completion(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print('Prints what bash needs to complete commands, groups and keys: eval "$(dstrain completion bash)"')
        return
    if arguments and arguments[-1] not in ("bash", "install=bash"):
        raise UserError(f"There is no completion for {arguments[-1]!r}. Bash is supported: dstrain completion bash.")
    print(BASH_COMPLETION, end="")


def complete(line: str) -> None:
    """Prints what could follow `line`, the command line up to the cursor: commands, then whatever Hydra proposes."""
    words = line.split()[1:]
    whole = words if line.endswith(" ") else words[:-1]
    command, _ = split(whole)
    longer = [name.split() for name in COMMANDS if name.split()[: len(whole)] == whole]
    further = dict.fromkeys(name[len(whole)] for name in longer if len(name) > len(whole))
    if further:
        print(*further)
    if command in COMMANDS and command != "completion":
        _, rest = split(words)
        typed = len(rest) if line.endswith(" ") else len(rest) - 1
        rest = keyed(command, rest[:typed]) + rest[typed:]
        # Hydra expects the overrides right after the name of the program.
        os.environ["COMP_LINE"] = " ".join(["dstrain", *rest]) + (" " if line.endswith(" ") else "")
        run(command, ["-sc", "query=bash"])


def _suggestion(command: str) -> str:
    longer = [name for name in COMMANDS if name.startswith(f"{command} ")]
    close = longer or get_close_matches(command, COMMANDS, n=1)
    meant = f"Did you mean {' or '.join(f'`dstrain {name}`' for name in close)}? " if close else ""
    return f"{meant}`dstrain --help` lists the commands."
