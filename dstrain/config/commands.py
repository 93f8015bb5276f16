"""The keys of the commands around a training run; those of `dstrain bench` are in bench.py."""

from dataclasses import dataclass, field

from dstrain.config.schema import Config, DataConfig, PrecisionConfig, RunConfig


@dataclass(frozen=True)
class VerifyConfig:
    """`dstrain verify`: what is compared, and how closely it must agree."""

    # Optimiser steps after which parameters are compared.
    steps: int = 3
    # Largest relative error of the loss and of any gradient. None: 1e-5, or what dispatch.wire can do if that rounds.
    tolerance: float | None = None
    # Nodes to play: runs of that many ranks count as one. None: all ranks are on this machine.
    ranks_per_node: int | None = None
    # Seconds until a run that hangs is ended.
    timeout_s: int = 600


@dataclass(frozen=True)
class VerifyRoot(Config):
    verify: VerifyConfig = field(default_factory=VerifyConfig)


@dataclass(frozen=True)
class ShowRoot(Config):
    """`dstrain schedule show <pipeline>`: the table of a pipeline, and its figures."""

    # Of a rank in a step; None: as many as the batch of the config gives it.
    micro_batches: int | None = None
    # Times of a stage, in any unit: forward pass, input gradients, weight gradients.
    times: tuple[float, ...] = (1.0, 1.0, 1.0)
    # Time of an overlapped pair, as a share of its two parts one after the other.
    pair: float = 1.0
    # Prefix of a picture (.png) and a timeline for Perfetto (.json), or one file: .png, .json, .txt (the table), or
    # .csv (for torch.distributed.pipelining). Of a directory and "", the prefix is <pipeline>-<ranks>x<micro-batches>.
    out: str = ""


@dataclass(frozen=True)
class SplitRoot(Config):
    """`dstrain schedule split`: which layers each stage of a pipeline holds, and what they cost."""

    # Time the parts of the model on this machine first, and plan the split with that.
    measure: bool = False
    # Passes of which the median counts, after one that warms up.
    rounds: int = 5


@dataclass(frozen=True)
class DryrunRoot(Config):
    """`dstrain dryrun`: what every pipeline rank of a layout holds, computes and sends, without running it."""

    # Processes of the run; None: mesh.pp * mesh.ep * mesh.dp, where a dp of null counts as 1.
    ranks: int | None = None
    # A JSON file with all figures; "": none is written.
    out: str = ""


@dataclass(frozen=True)
class GenerateRoot:
    """`dstrain generate`."""

    run: RunConfig = field(default_factory=RunConfig)
    prompt: str = ""
    # Checkpoint step; None: the newest.
    step: int | None = None
    max_tokens: int = 200
    # 0: always the likeliest token.
    temperature: float = 0.8
    # Sample from the smallest set of tokens that holds this probability.
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class ExportRoot:
    """`dstrain export`: a checkpoint of a run as a Hugging Face model directory."""

    run: RunConfig = field(default_factory=RunConfig)
    out: str = ""
    step: int | None = None
    # Of the weights: precision=bf16 | fp32 | fp8 (E4M3 with 128x128 block scales, `weight_scale_inv`); of its keys
    # only products and compute_dtype matter here.
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    # Largest size of one safetensors file in GiB.
    shard_gib: float = 4.0


@dataclass(frozen=True)
class ImportRoot:
    """`dstrain import`: a Hugging Face DeepSeek-V2/V3 directory as step 0 of a new run."""

    path: str = ""
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class TokenizeRoot:
    """`dstrain tokenize`: text into a .bin/.idx pair."""

    data: DataConfig = field(default_factory=DataConfig)
    # Prefix of the two files.
    out: str = ""
    # None: one process per core.
    workers: int | None = None
