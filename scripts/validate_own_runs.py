"""Steps of small models on this machine's processors, over limited links, against what the planner says of them.

    sudo python scripts/validate_own_runs.py [--only grid100/ep4_rank ...] [--steps 24] [--out own_runs.json]

For each network of namespaces (dstrain/bench/testbed.py), `dstrain calibrate` first: all ranks at once, so that what
they share is shared as in training. Then `dstrain train` for every layout, all planned with that one hardware file;
compared are medians of steps. Everything that runs is a command as a user types it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from dstrain.bench.testbed import Fabric, Testbed
from dstrain.config import load
from dstrain.data.tokenizer import embedding_rows, load_tokenizer
from dstrain.hardware import named
from dstrain.plan.job import job_of
from dstrain.plan.simulation import simulate
from dstrain.plan.step import Prediction

PORT = 29600
# Steps at whose beginning libraries still compile what later ones reuse.
WARM_UP = 6
TIMEOUT_S = 600.0
# Loads in every record; a slow start, in which the router prefers no expert yet.
WATCHED = ("checkpoint.every_steps=0", "metrics.moe_every_steps=1", "optim.lr=1e-4")


@dataclass(frozen=True)
class Network:
    """Nodes of `per_node` ranks, and what is run on them: overrides of +experiment=tiny_cpu, by name."""

    name: str
    nodes: int
    per_node: int
    rate_mbit: float | None
    # Of all layouts, and beside them of the calibration.
    common: tuple[str, ...]
    calibration: tuple[str, ...]
    layouts: dict[str, tuple[str, ...]]

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


# A packet costs the cores the same, whatever its size.
MTU = 9000
FOUR_LAYERS = ("model.num_layers=4", "train.sequences=32", "train.micro_batch=2")
TWO_RANKS = {
    "ep2_rank": ("mesh.ep=2", "dispatch.kind=rank"),
    "ep2_alltoall": ("mesh.ep=2", "dispatch.kind=alltoall"),
    "ep2_sequential": ("mesh.ep=2", "dispatch.kind=rank", "schedule.in_flight=1"),
    "dp2": (),
    "pp2_1f1b": ("mesh.pp=2", "schedule=1f1b"),
    "pp2_zb_v": ("mesh.pp=2", "schedule=zb_v"),
    "pp2_dualpipev": ("mesh.pp=2", "schedule=dualpipev"),
}
# On this many ranks two share a core each, and wait for each other's turn as well as for the link: the link must be
# what takes longest.
FOUR_RANKS = {
    "ep4_rank": ("mesh.ep=4", "dispatch.kind=rank"),
    "ep4_alltoall": ("mesh.ep=4", "dispatch.kind=alltoall"),
    "ep4_hierarchical": ("mesh.ep=4", "dispatch.kind=hierarchical"),
    "ep4_rank_bf16_wire": ("mesh.ep=4", "dispatch.kind=rank", "dispatch.wire=bfloat16"),
    "ep4_rank_sequential": ("mesh.ep=4", "dispatch.kind=rank", "schedule.in_flight=1"),
    "pp2_ep2_1f1b": ("mesh.pp=2", "mesh.ep=2", "dispatch.kind=rank", "schedule=1f1b"),
}
ONE_RANK: dict[str, tuple[str, ...]] = {
    "tiny": (),
    "micro_batch_2": ("train.micro_batch=2",),
    "seq_512": ("train.seq_len=512", "train.micro_batch=2"),
}
NETWORKS = (
    Network("one", 1, 1, None, (), (), ONE_RANK),
    Network("node", 1, 2, None, FOUR_LAYERS, ("mesh.ep=2",), TWO_RANKS),
    *(Network(f"pair{rate}", 2, 1, rate, FOUR_LAYERS, ("mesh.ep=2",), TWO_RANKS) for rate in (100, 400)),
    Network("grid100", 2, 2, 100, FOUR_LAYERS, ("mesh.ep=4",), FOUR_RANKS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="networks, or network/layout; all without it")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument(
        "--out", type=Path, default=None, help="a JSON file of rows: id, predicted, measured, error_pct"
    )
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dstrain-own-") as folder:
        for network in NETWORKS:
            layouts = [name for name in network.layouts if _is_asked(options.only, network, name)]
            if layouts:
                rows += list(validate(network, layouts, options.steps, Path(folder)))
    errors = sorted(abs(row["error_pct"]) for row in rows)
    print(f"{len(rows)} runs: median error {median(errors):.1f} %, largest {errors[-1]:.1f} %")
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def _is_asked(only: Sequence[str], network: Network, layout: str) -> bool:
    return not only or network.name in only or f"{network.name}/{layout}" in only


def validate(network: Network, layouts: Sequence[str], steps: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Calibrates and runs on one network; a row for every layout, printed as it comes."""
    with Testbed(Fabric(network.nodes, network.rate_mbit, mtu=MTU)) as testbed:
        out = folder / "hardware" / f"{network.name}.yaml"
        recipe = ["+experiment=tiny_cpu", *network.common]
        print(run(testbed, network, ["calibrate", *recipe, *network.calibration, f"calibrate.out={out}"]))
        for name in layouts:
            run_dir = folder / network.name / name
            words = [*recipe, *network.layouts[name], f"train.steps={steps}", f"run.dir={run_dir}"]
            run(testbed, network, ["train", *words, *WATCHED])
            records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
            measured_s = median(record["step_ms"] for record in records) / 1e3
            planned = predicted(words, network.ranks, out, skew(records))
            row = {
                "id": f"{network.name}/{name}",
                "predicted": planned.step_s,
                "measured": measured_s,
                "error_pct": 100 * (planned.step_s / measured_s - 1),
            }
            print("{id:<28} predicted {predicted:.3f} s, measured {measured:.3f} s, {error_pct:+.1f} %".format(**row))
            parts = ("compute_s", "bubble_s", "exposed_s", "reduce_s", "update_s")
            print(f"{'':<28}", ", ".join(f"{part} {getattr(planned, part):.3f}" for part in parts), flush=True)
            yield row


def predicted(words: Sequence[str], ranks: int, hardware: Path, skew: float) -> Prediction:
    config = load.compose("train", words, world_size=ranks)
    model = replace(config.model, vocab_size=embedding_rows(load_tokenizer(config.data.tokenizer)))
    machine = named(hardware.stem, hardware.parent)
    job = job_of(replace(config, model=model, hardware=machine))
    return simulate(replace(job, skew=skew), machine).prediction


def skew(records: Sequence[dict[str, float]]) -> float:
    """Load of the busiest rank over the mean, on average over layers and steps."""
    loads = [value for record in records for name, value in record.items() if name.endswith("rank_load_max_over_mean")]
    return sum(loads) / len(loads)


def run(testbed: Testbed, network: Network, words: Sequence[str]) -> str:
    """`dstrain <words>` as all ranks of the network; what the first one prints. RuntimeError if one fails."""
    place = {"WORLD_SIZE": network.ranks, "MASTER_PORT": PORT, "OMP_NUM_THREADS": 1}
    ranks = []
    for rank in range(network.ranks):
        env = {name: str(value) for name, value in place.items()}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank % network.per_node), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "dstrain", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks.append(testbed.start(rank // network.per_node, command, env, **pipes))
    said = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    failed = [text for rank, text in zip(ranks, said, strict=True) if rank.returncode]
    if failed:
        raise RuntimeError(f"dstrain {' '.join(words)} failed:\n" + "\n".join(failed))
    return said[0]


if __name__ == "__main__":
    main()
