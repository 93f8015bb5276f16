"""`dstrain plan search`: the best layouts of a model on a machine, as a table, and why the first one is the best."""

from collections.abc import Iterator
from dataclasses import replace

from rich.table import Table

from dstrain.config.plan import VARIABLE, SearchRoot, check_plan, devices, unspread
from dstrain.config.schema import Config
from dstrain.engine.recipe import steps_by_batch
from dstrain.errors import ConfigError
from dstrain.plan.job import Job, job_of
from dstrain.plan.report import short
from dstrain.plan.search import Entry, Found, search
from dstrain.tasks.plan import open_console, prepare


def run(config: SearchRoot) -> None:
    """Prints the table. Raises ConfigError if no layout takes the batch."""
    console = open_console()
    given, broken = own_layout(config)
    batches = steps_by_batch(config.train)
    with console.status("looking at layouts"):
        found = search(job_of(given), config.hardware, config.top, batches=batches, vary=config.vary)
    if found.entries:
        console.print(layout_table(found))
    for line in (*about(found, config), *own_place(found, broken)):
        console.print(line, soft_wrap=True, markup=False)


def own_layout(config: SearchRoot) -> tuple[Config, str]:
    """The config to begin with: as it is if it could run on these devices, otherwise without its layout; and then what
    is wrong with that."""
    try:
        check_plan(config)
        return prepare(config), ""
    except ConfigError as error:
        bare = unspread(config)
        return prepare(replace(bare, mesh=replace(bare.mesh, dp=devices(config)))), str(error)


def layout_table(found: Found) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "pp", "ep", "dp", "micro", "s", "tok/s/GPU", "MFU %", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("schedule", "recomputed", "tokens by"):
        table.add_column(name, no_wrap=True)
    jobs = [entry.job for entry in found.entries]
    varied = [name for name, of in VARIED.items() if len(set(map(of, jobs))) > 1]
    for name in varied:
        table.add_column(name, no_wrap=True)
    for place, entry in enumerate(found.entries, 1):
        table.add_row(str(place), *figures(entry), *words(entry.job), *(VARIED[name](entry.job) for name in varied))
    return table


# What is shown where it differs.
VARIED = {
    "products": lambda job: job.products,
    "nodes": lambda job: f"{job.model.groups_per_token} of {job.model.groups}",
}


def figures(entry: Entry) -> tuple[str, ...]:
    job, played = entry.job, entry.prediction
    degrees = (job.pp, job.ep, job.gpus // (job.pp * job.ep), job.micro_batch)
    mfu = f"{100 * played.mfu:.1f}" if played.mfu else ""
    speed = f"{played.tokens_per_s_per_gpu:,.0f}"
    return (*map(str, degrees), short(played.step_s), speed, mfu, f"{entry.memory_gib:.1f}")


def words(job: Job) -> tuple[str, str, str]:
    schedule = job.pipeline if job.pp > 1 else f"{job.in_flight} in flight"
    schedule += f" x{job.chunks}" if job.pp > 1 and job.chunks > 1 else ""
    schedule += " overlapped" if job.overlap and job.pp > 1 else ""
    return schedule, " ".join(sorted(job.recompute)) or "nothing", job.dispatcher


def about(found: Found, config: SearchRoot) -> Iterator[str]:
    yield ""
    yield f"{found.looked_at:,} layouts looked at, {found.fitting:,} fit {config.hardware.memory_gib:g} GiB."
    if not found.entries:
        yield found.why
        return
    yield "Beside the best:"
    yield from (f"  {family}" for family in found.why.split("; "))
    yield cost(found.entries[0], config)
    yield f"Train it with: {' '.join(quoted(key) for key in found.keys)}"
    more = [name for name in VARIABLE if name not in config.vary]
    if more:
        yield f"Looks further with: vary='[{', '.join(VARIABLE)}]'"


def cost(best: Entry, config: SearchRoot) -> str:
    """What the whole run takes, at that speed."""
    tokens = sum(steps * sequences for sequences, steps in steps_by_batch(config.train).items()) * config.train.seq_len
    hours = tokens / best.prediction.tokens_per_s_per_gpu / 3600
    price = config.hardware.price_per_hour
    paid = f", {hours * price:,.0f} US dollars" if price else ""
    return f"The run with the best: {hours / best.job.gpus / 24:,.3g} days, {hours:,.0f} device-hours{paid}"


def quoted(key: str) -> str:
    """As a shell wants it."""
    return f"'{key}'" if "[" in key else key


def own_place(found: Found, broken: str) -> Iterator[str]:
    """What has become of the config's own layout."""
    if broken:
        yield f"The config's own layout can't run: {broken}"
    elif found.place is None:
        yield "The config's own layout does not fit."
    else:
        yield f"The config's own layout is number {found.place:,} of those that fit (in closed form)."
