"""Weights & Biases as a sink, on rank 0 only.

W&B numbers its own steps and drops what arrives "out of order", which a resumed run always does. So every record
carries our `step` and `tokens` as plain figures, and `step` is declared to be everybody's x-axis. The id of the W&B run
lies in the run directory: whoever goes on with the run goes on under that id, and `wandb sync` joins offline pieces.
"""

import secrets
from collections.abc import Mapping
from typing import Any

from dstrain.errors import UserError
from dstrain.metrics.run_directory import RunDirectory
from dstrain.metrics.sinks import Record

# Section of the W&B page in which a figure appears; `step`, `tokens` and moe/... keep their names.
SECTIONS = {
    "train": ("loss", "loss_main", "loss_mtp", "loss_balance", "loss_z", "lr", "grad_norm"),
    "perf": ("tokens_per_s", "tokens_per_s_per_gpu", "mfu", "step_ms", "comm_exposed_ms", "memory_gib"),
}
NAMES = {field: f"{section}/{field}" for section, fields in SECTIONS.items() for field in fields}


class WandbSink:
    """`offline` needs neither account nor network and asks nothing; `online` needs a login."""

    def __init__(self, run: RunDirectory, mode: str, project: str, config: Mapping[str, Any]):
        """Starts or continues the W&B run of a run directory; `config` is what its page shows as the configuration."""
        wandb = _import_wandb()
        run_id = run.wandb_id.read_text().strip() if run.wandb_id.exists() else secrets.token_hex(4)
        with run.writing():
            run.wandb_id.write_text(run_id + "\n")
        # Its own capture of the terminal would fight with the live display.
        settings = wandb.Settings(silent=True, console="off")
        try:
            self._run = wandb.init(
                project=project,
                name=run.path.name,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=run.path,
                config=dict(config),
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"metrics.wandb={mode}: W&B refused to start: {error}. "
                "Run `wandb login`, or set metrics.wandb=offline and send the files later with `wandb sync`."
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self._run.log({NAMES.get(key, key): value for key, value in record.items() if value is not None})

    def close(self) -> None:
        self._run.finish()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "metrics.wandb needs the wandb package, which is not installed. "
            "Run `pip install 'dstrain[wandb]'` or set metrics.wandb=disabled."
        ) from error
    return wandb
