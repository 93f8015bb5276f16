"""What a run is, as frozen dataclasses: one class per Hydra group, one field per key.

`load.py` turns YAML and overrides into a `Config`, `check.py` enforces the rules that span fields. Nothing changes a
config afterwards. Units stand in the names; a field without a unit is a count. `None` means "derived", and the comment
says from what.
"""

from dataclasses import dataclass, field

from dstrain.config.hardware import HardwareConfig


@dataclass(frozen=True)
class MeshConfig:
    """Ranks: world size = pp * dp * ep. Every one of the dp * ep ranks of a stage reads its own share of the batch."""

    # Pipeline stages.
    pp: int = 1
    # Ranks over which the routed experts are spread; must divide model.num_experts.
    ep: int = 1
    # Replicas of each expert-parallel group; None: world size / (pp * ep).
    dp: int | None = None
    # Seconds after which a transfer that a peer does not answer ends the run with an error.
    timeout_s: float = 600.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions on the decoupled dimensions; YaRN (arXiv:2309.00071) when yarn_factor > 1."""

    theta: float = 10000.0
    # Context extension s = new length / original_seq_len; 1 switches YaRN off.
    yarn_factor: float = 1.0
    original_seq_len: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # Temperature: the softmax scale is multiplied by (0.1 * mscale_all_dim * ln(yarn_factor) + 1)^2, and cos/sin by the
    # quotient of the two terms (1 when mscale == mscale_all_dim).
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class RouterConfig:
    """DeepSeek-V3 section 2.1.2 by default; softmax scores, group_score=max and no bias give V2."""

    # sigmoid | softmax
    score: str = "sigmoid"
    # Experts form num_groups equal groups (nodes); a token uses experts of at most groups_per_token of them.
    num_groups: int = 1
    groups_per_token: int = 1
    # How a group is ranked: top2_sum (V3: sum of its two best biased scores) | max (V2).
    group_score: str = "top2_sum"
    # Divide the chosen scores by their sum.
    normalize_weights: bool = True
    # Multiplies the routed output.
    scaling_factor: float = 1.0
    # Step of the balancing bias (gamma of the aux-loss-free method) after every training step; 0 keeps the bias fixed.
    bias_update_rate: float = 0.001
    # Weight (alpha) of the sequence-wise balance loss.
    balance_loss_weight: float = 0.0001
    # Weight of the mean squared log-sum-exp of the router logits (ST-MoE, arXiv:2202.08906).
    z_loss_weight: float = 0.0


@dataclass(frozen=True)
class MtpConfig:
    """Multi-token prediction (DeepSeek-V3 section 2.2): `depth` extra modules, each one token further ahead."""

    depth: int = 0
    # Lambda: the mean of the depths' cross entropies is added to the loss with this weight.
    loss_weight: float = 0.3


@dataclass(frozen=True)
class ModelConfig:
    """An MLA/MoE transformer; the defaults of the dimensions are those of conf/model/tiny.yaml."""

    # None: the tokenizer's, rounded up to a multiple of 64.
    vocab_size: int | None = None
    hidden_size: int = 256
    num_layers: int = 4
    # The first layers have a dense feed-forward network instead of experts.
    num_dense_layers: int = 1
    num_heads: int = 4
    # Rank of the compressed queries; None: full-rank queries (V2-Lite).
    q_lora_rank: int | None = None
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    # Width of the dense feed-forward networks.
    intermediate_size: int = 704
    # Width of one expert.
    moe_intermediate_size: int = 192
    num_experts: int = 16
    num_shared_experts: int = 1
    experts_per_token: int = 4
    norm_eps: float = 1e-6
    # Standard deviation of the initial weights.
    init_std: float = 0.006
    tie_embeddings: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)


@dataclass(frozen=True)
class RampConfig:
    """Batch-size ramp: from start_sequences to the full batch in equal increments over the first `tokens` tokens."""

    # 0: no ramp.
    tokens: int = 0
    start_sequences: int = 0
    increment_sequences: int = 0


@dataclass(frozen=True)
class RecipeChange:
    """From `at_tokens` trained tokens on, the given values replace those of the model config."""

    at_tokens: int = 0
    mtp_loss_weight: float | None = None
    bias_update_rate: float | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Give exactly one of `sequences` and `batch_tokens`."""

    # Optimiser steps of the whole run, counted from its beginning (not from a resume).
    steps: int = 1000
    # Tokens a sequence trains on; a sample also carries 1 + model.mtp.depth further tokens as targets.
    seq_len: int = 256
    # Sequences in a global batch.
    sequences: int | None = None
    # Tokens in a global batch: a multiple of seq_len.
    batch_tokens: int | None = None
    # Sequences that go through the model at once on a rank.
    micro_batch: int = 1
    seed: int = 0
    # never | auto (go on if the run directory holds a checkpoint) | must
    resume: str = "never"
    # A run directory whose newest weights (not optimiser state) a new run starts from.
    init_from: str | None = None
    # Any of norm, mla_up, swiglu, attend, experts, layer: computed again in the backward pass instead of kept.
    recompute: tuple[str, ...] = ()
    ramp: RampConfig = field(default_factory=RampConfig)
    changes: tuple[RecipeChange, ...] = ()


@dataclass(frozen=True)
class PlacementConfig:
    """Which rank holds which expert, moved by measured load (EPLB's greedy packing, without replicas)."""

    # Steps between looks at the load since the last one (with few, chance decides); 0: experts stay where they are.
    every_steps: int = 0
    # A layer's new placement is taken if it lowers the load of the busiest rank by at least this share.
    min_gain: float = 0.05


@dataclass(frozen=True)
class DispatchConfig:
    """How tokens reach their experts."""

    # auto | local | alltoall (a row per token and expert) | rank (a row per token and rank) | hierarchical (a row per
    # token and node over the slow link) | deepep (GPU only); where mesh.ep is 1, nothing travels and all are local
    kind: str = "auto"
    # Format of rows and gradients on the way to the experts; back, it is the compute dtype: auto (that of
    # precision.products) | float32 | bfloat16 | fp8 (E4M3, a scale per 128) | mxfp8 (a scale per 32) | fp4 (E2M1, a
    # scale per 32) | logfmt8 | logfmt10 (evenly spaced logarithms per 128); the last three are experiments
    wire: str = "auto"
    # Rows that the experts of a rank take at once; more go through in chunks that are computed again in the backward
    # pass: an expert that takes all tokens costs time, not memory. None: twice as many as come at an even load; 0: all.
    expert_chunk_rows: int | None = None
    placement: PlacementConfig = field(default_factory=PlacementConfig)


@dataclass(frozen=True)
class PartCosts:
    """What a micro-batch costs in each part of the model, in ms, for the planned split; all 0: FLOPs decide.

    `dstrain schedule split measure=true` measures it.
    """

    embedding: float = 0.0
    # A layer with a dense feed-forward network.
    dense: float = 0.0
    # A layer with experts.
    moe: float = 0.0
    # An MTP module with its use of the head.
    mtp: float = 0.0
    head: float = 0.0


@dataclass(frozen=True)
class ScheduleConfig:
    """In which order the micro-batches of a rank run their phases, and how a pipeline is cut and run."""

    # Micro-batches between their forward and their backward pass at once, each with its activations. None: 2 where
    # experts are spread and a step has that many, otherwise 1 (as with engine.zero_stage=2).
    in_flight: int | None = None
    # fixed (planned for transfers as long as the compute) | measured (planned from the phase times of the first steps)
    order: str = "fixed"
    # Where mesh.pp is above 1: 1f1b | interleaved | zb_1p | zb_v | dualpipe | dualpipev
    pipeline: str = "1f1b"
    # Stages that each rank of pipeline=interleaved holds.
    chunks: int = 2
    # Transfers of tokens under compute that the table has beside them: the forward pass of one micro-batch under the
    # backward pass of another (dualpipe, dualpipev), weight gradients (zb_1p, zb_v). None: where experts are spread.
    # true: 1f1b and interleaved get such pairs, too, at about twice the activations; false: one after the other.
    overlap: bool | None = None
    # Layers of each stage, in order; empty: planned, so that the costliest stage costs least.
    split: tuple[int, ...] = ()
    part_ms: PartCosts = field(default_factory=PartCosts)


@dataclass(frozen=True)
class PrecisionConfig:
    """Dtypes, and products in FP8; router, norms, embedding, head and the core of attention never compute in FP8."""

    # Dtype of parameters and activations in the forward and backward pass: float32 | bfloat16
    compute_dtype: str = "bfloat16"
    # AdamW's two moments: float32 | bfloat16 | int8 (blocks of 256 with a scale each; needs torchao, engine.name=torch)
    moments_dtype: str = "bfloat16"
    # Dtype of gradients on the wire; they are summed in FP32 after arrival: float32 | bfloat16
    grad_wire_dtype: str = "float32"
    # The three products of every Linear and of the experts: compute (in compute_dtype) | fp8 (DeepSeek-V3 section 3.3:
    # E4M3, scales for 1x128 of activations and 128x128 of weights) | mxfp8 (E4M3, a scale per 32 of both; Blackwell)
    products: str = "compute"
    # Scales of fp8: power_of_two (UE8M0: DeepSeek-V3.1 and later; mxfp8 has no others) | plain (FP32, V3 as published)
    scales: str = "power_of_two"
    # What computes them: auto | reference (anything) | bf16 (SM 8.0 and up: operands in FP8, multiplied in BF16) |
    # triton (SM 8.9 and up) | scaled_mm (torch, SM 9.0) | deepgemm (SM 9.0 and up) | mxfp8 (torch, SM 10.0)
    backend: str = "auto"
    # Names of modules that keep the compute dtype, as shell patterns: "layers.0.*", "*.attn.o", "*.experts"
    exclude: tuple[str, ...] = ()
    # Tiles of activation gradients: rows (1x128) | blocks (128x128, which diverged in DeepSeek-V3 appendix B.2)
    gradient_tiles: str = "rows"
    # What ranks gather of the weights of such products after an update: compute (in compute_dtype) | fp8 (half the
    # bytes; needs products=fp8, scales=power_of_two, engine.name=torch) | auto (fp8 where it can be, otherwise compute)
    gather: str = "compute"
    # Steps between records of amax and of what is lost by underflow and overflow; 0: none.
    watch_every_steps: int = 0


@dataclass(frozen=True)
class EngineConfig:
    """Who shards, reduces and updates."""

    # torch | deepspeed
    name: str = "torch"
    # torch: 1; deepspeed: 1 or 2.
    zero_stage: int = 1
    # Size of a gradient bucket in MiB of FP32.
    bucket_mib: int = 32
    # deepspeed only: optimiser states and update on the CPU.
    offload_optimizer: bool = False


@dataclass(frozen=True)
class LrPhase:
    """A stretch of the learning rate, from the rate before it to `lr_end`; the first one includes the warm-up."""

    # constant (jumps to lr_end at its start) | linear | cosine
    shape: str = "cosine"
    # Length; 0: the rest of the run (last phase only).
    tokens: int = 0
    lr_end: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101) with the learning rate of DeepSeek-V3 section 4.2."""

    # Peak, reached after warm-up.
    lr: float = 3e-4
    warmup_steps: int = 100
    # What follows the warm-up, in order; empty: constant.
    phases: tuple[LrPhase, ...] = ()
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    # Applied to matrices only: not to norms, biases and embeddings.
    weight_decay: float = 0.1
    # Largest norm of the whole gradient; 0 switches clipping off.
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Corpus:
    """One part of a blend."""

    path: str = ""
    # Share of the samples, relative to the sum of all weights.
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Give either `path` or `blend`."""

    # Text (.txt, .md ...), .jsonl, .parquet, a directory of these, a Hugging Face dataset, a prefix of .bin/.idx files.
    path: str | None = None
    blend: tuple[Corpus, ...] = ()
    # "bytes" (256 byte values and one end-of-document token) or the path of a `tokenizers` JSON file.
    tokenizer: str = "bytes"
    # Column or key of the text in JSONL, parquet and datasets.
    text_key: str = "text"
    # Where token files made from text are kept; None: ~/.cache/dstrain/tokens (XDG_CACHE_HOME is obeyed).
    cache_dir: str | None = None
    # Share of documents rearranged for fill-in-the-middle (prefix-suffix-middle, DeepSeek-V3 section 4.1).
    fim_rate: float = 0.0
    # Samples prepared ahead of the step, in a background thread.
    prefetch_batches: int = 2


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints are written in the background; the last step is always saved."""

    # Steps between checkpoints; 0: only at the end.
    every_steps: int = 100
    # The newest this many stay, and for ever those whose step is a multiple of keep_every_steps (0: none).
    keep_last: int = 2
    keep_every_steps: int = 0


@dataclass(frozen=True)
class MetricsConfig:
    """What is reported, and how often; metrics.jsonl gets a record every step."""

    # Steps between lines when the console is not a live display.
    console_every_steps: int = 10
    # Steps between records of the per-layer MoE figures in metrics.jsonl and W&B.
    moe_every_steps: int = 10
    # W&B: disabled | offline | online
    wandb: str = "disabled"
    wandb_project: str = "dstrain"
    # Steps whose transfers and phases are written as a timeline for Perfetto (trace-step-N.json in the run directory).
    trace_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    # Everything a run writes goes here; "": runs/<date-time> for a new run.
    dir: str = ""


@dataclass(frozen=True)
class Config:
    """A training run."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    run: RunConfig = field(default_factory=RunConfig)
