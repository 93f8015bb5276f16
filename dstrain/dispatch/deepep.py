"""DeepSeek's own kernels (github.com/deepseek-ai/DeepEP) as a transport: V2's ElasticBuffer, or V1's Buffer.

Written after the signatures of DeepEP 2.0 and 1.2.1. **It has not been run on a GPU**: what surrounds the kernels is
tested on CPU with a stand-in for them, the calls of the kernels are not.

    dispatch              buffer.dispatch                     keeps a handle
    combine               buffer.combine(handle)
    gradient of combine   buffer.dispatch(handle)             on the same routes
    gradient of dispatch  buffer.combine(handle, numbers)     with the gradients of the weights

A row travels once to each rank, over the network once to each node. Rows out are BF16, or FP8 with FP32 scales that are
powers of two; rows home are BF16. As with the other transports the weights are the experts' to apply. The kernels
are issued from a lane: the host waits there, not in the main thread, for the number of rows that arrive. On V2 rows
arrive in an order that changes from run to run, and with it the last bits of weight gradients. The trace gets the times
of transfers, not their bytes.

Shapes: T tokens, K experts per token, D hidden, R arrived rows, N pairs, S tiles of a row.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dstrain.comm.agreement import together
from dstrain.comm.collectives import Peers
from dstrain.comm.lane import Lane
from dstrain.comm.trace import Label
from dstrain.config.schema import Config
from dstrain.dispatch.carrier import Carrier, Ticket
from dstrain.dispatch.contract import Route
from dstrain.dispatch.permute import Expansion, Pairs
from dstrain.dispatch.transfer import Flying, as_quantised
from dstrain.dispatch.wire import Fp8
from dstrain.errors import ConfigError
from dstrain.mesh.groups import Groups
from dstrain.precision.quantize import Quantized

# Of V1 (Buffer.get_dispatch_config).
GROUP_SIZES_V1 = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
MOST_EXPERTS_PER_TOKEN = 32
HOPPER = (9, 0)

# BF16 rows, or E4M3 values and FP32 scales.
Wired = Tensor | tuple[Tensor, Tensor]


class Port(Protocol):
    """A buffer of DeepEP, used on the current stream."""

    def dispatch(self, x: Wired, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Wired, Tensor, Tensor, int, Any]:
        """Rows, their local experts [R, K] (-1: not here), their weights [R, K], the number of pairs, and a handle."""
        ...

    def dispatch_again(self, x: Wired, handle: Any) -> Wired:
        """The rows of other values on the routes of a handle."""
        ...

    def combine(self, rows_RD: Tensor, handle: Any) -> Tensor:
        """The sum of each token's rows, [T, D]."""
        ...

    def combine_numbers(self, rows_RD: Tensor, numbers_RK: Tensor, handle: Any) -> tuple[Tensor, Tensor]:
        """As `combine`, and the sum of FP32 numbers that belong to rows, [T, K]."""
        ...


@dataclass(frozen=True)
class Shape:
    """What a buffer is made for."""

    tokens: int
    hidden: int
    experts: int
    experts_per_token: int
    is_fp8: bool

    @staticmethod
    def of(config: Config, wire: str) -> "Shape":
        tokens = config.train.micro_batch * config.train.seq_len
        model = config.model
        return Shape(tokens, model.hidden_size, model.num_experts, model.experts_per_token, wire == "fp8")


class ElasticPort:
    """V2: NCCL; it finds out about routes and sizes by itself."""

    def __init__(self, library: Any, peers: Peers, shape: Shape, timeout_s: float):
        self.index_dtype, self.experts = library.topk_idx_t, shape.experts
        self.buffer = library.ElasticBuffer(
            peers.group,
            num_max_tokens_per_rank=shape.tokens,
            hidden=shape.hidden,
            num_topk=shape.experts_per_token,
            use_fp8_dispatch=shape.is_fp8,
            num_cpu_timeout_secs=round(timeout_s),
            num_gpu_timeout_secs=round(timeout_s),
        )

    def dispatch(self, x: Wired, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Wired, Tensor, Tensor, int, Any]:
        rows, experts_RK, weights_RK, handle, _ = self.buffer.dispatch(
            x, topk_idx=experts_TK.to(self.index_dtype), topk_weights=weights_TK, num_experts=self.experts
        )
        return rows, experts_RK, weights_RK, sum(handle.num_recv_tokens_per_expert_list), handle

    def dispatch_again(self, x: Wired, handle: Any) -> Wired:
        rows, *_ = self.buffer.dispatch(x, handle=handle, num_sms=handle.num_sms)
        return rows

    def combine(self, rows_RD: Tensor, handle: Any) -> Tensor:
        y_TD, *_ = self.buffer.combine(rows_RD, handle=handle)
        return y_TD

    def combine_numbers(self, rows_RD: Tensor, numbers_RK: Tensor, handle: Any) -> tuple[Tensor, Tensor]:
        y_TD, numbers_TK, _ = self.buffer.combine(rows_RD, handle=handle, topk_weights=numbers_RK)
        return y_TD, numbers_TK


class LegacyPort:
    """V1: NVLink inside a node, NVSHMEM between nodes."""

    def __init__(self, library: Any, peers: Peers, shape: Shape):
        self.index_dtype, self.experts = getattr(library, "topk_idx_t", torch.int64), shape.experts
        buffer, row_bytes = library.Buffer, shape.hidden * torch.bfloat16.itemsize
        configs = buffer.get_dispatch_config(peers.size), buffer.get_combine_config(peers.size)
        self.buffer = buffer(
            peers.group,
            max(config.get_nvl_buffer_size_hint(row_bytes, peers.size) for config in configs),
            max(config.get_rdma_buffer_size_hint(row_bytes, peers.size) for config in configs),
        )

    def dispatch(self, x: Wired, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Wired, Tensor, Tensor, int, Any]:
        experts_TK = experts_TK.to(self.index_dtype)
        per_rank, per_node, per_expert, is_in_rank, _ = self.buffer.get_dispatch_layout(experts_TK, self.experts)
        rows, experts_RK, weights_RK, counts, handle, _ = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=experts_TK,
            topk_weights=weights_TK,
        )
        return rows, experts_RK, weights_RK, sum(counts), handle

    def dispatch_again(self, x: Wired, handle: Any) -> Wired:
        rows, *_ = self.buffer.dispatch(x, handle=handle)
        return rows

    def combine(self, rows_RD: Tensor, handle: Any) -> Tensor:
        y_TD, *_ = self.buffer.combine(rows_RD, handle)
        return y_TD

    def combine_numbers(self, rows_RD: Tensor, numbers_RK: Tensor, handle: Any) -> tuple[Tensor, Tensor]:
        y_TD, numbers_TK, _ = self.buffer.combine(rows_RD, handle, topk_weights=numbers_RK)
        return y_TD, numbers_TK


# -- Whether it can work ----------------------------------------------------------------------------------------------


def connect(config: Config, wire: str, groups: Groups, peers: Peers) -> "DeepEPDispatcher":
    """The transport of an expert-parallel group; all ranks call this. SharedError where DeepEP can't work."""
    check_config(config, wire)
    library = together(lambda: find_library(peers.size, peers.trace.device), groups.background)
    shape = Shape.of(config, wire)
    port: Port
    if hasattr(library, "ElasticBuffer"):
        port = ElasticPort(library, peers, shape, config.mesh.timeout_s)
    else:
        port = LegacyPort(library, peers, shape)
    keeps = wire == config.precision.products
    return DeepEPDispatcher(shape.experts // peers.size, port, wire, Lane(peers.trace), keeps)


def check_config(config: Config, wire: str) -> None:
    """What DeepEP can't carry, wherever it runs."""
    model, dtype = config.model, config.precision.compute_dtype
    if dtype != "bfloat16":
        raise ConfigError("precision.compute_dtype", dtype, "dispatch.kind=deepep sums in bfloat16", "Set bfloat16.")
    if wire not in ("bfloat16", "fp8"):
        rule = "dispatch.kind=deepep carries bfloat16 and fp8"
        raise ConfigError("dispatch.wire", wire, rule, "Set dispatch.wire=bfloat16 or fp8.")
    if wire == "fp8" and model.hidden_size % Fp8.tile:
        rule = f"dispatch.kind=deepep with dispatch.wire=fp8 needs a multiple of {Fp8.tile}"
        raise ConfigError("model.hidden_size", model.hidden_size, rule, "Set dispatch.wire=bfloat16.")
    if model.experts_per_token > MOST_EXPERTS_PER_TOKEN:
        rule = f"dispatch.kind=deepep takes at most {MOST_EXPERTS_PER_TOKEN}"
        raise ConfigError("model.experts_per_token", model.experts_per_token, rule, "Set dispatch.kind=auto.")


def find_library(ranks: int, device: torch.device) -> Any:
    """The package deep_ep, if it works for a group of so many ranks on this device."""
    if device.type != "cuda" or torch.version.hip:
        raise _refusal("it needs NVIDIA GPUs")
    if (capability := torch.cuda.get_device_capability(device)) < HOPPER:
        found = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        raise _refusal(f"it needs compute capability 9.0 (Hopper) or higher; {found}")
    try:
        library = importlib.import_module("deep_ep")
    except ImportError as error:
        install = "Install it (github.com/deepseek-ai/DeepEP), or set"
        raise _refusal(f"the package deep_ep can't be imported ({error})", install) from None
    if not hasattr(library, "ElasticBuffer") and ranks not in GROUP_SIZES_V1:
        sizes = ", ".join(map(str, GROUP_SIZES_V1))
        raise _refusal(f"DeepEP 1 takes expert-parallel groups of {sizes} ranks; here are {ranks}", "Set mesh.ep, or")
    return library


def _refusal(rule: str, cure: str = "Set") -> ConfigError:
    return ConfigError("dispatch.kind", "deepep", rule, f"{cure} dispatch.kind=auto.")


# -- The transport ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Ticket(Ticket):
    # Known once the tokens have arrived: DeepEP's handle, and which of the slots [R, K] hold pairs.
    handle: Any = None
    slots_N: Any = None
    shape_RK: Any = None


class DeepEPDispatcher(Carrier[_Ticket]):
    """`experts` experts of this rank, behind a port; `wire` is bfloat16 or fp8.

    `keeps_quantised`: what arrives in fp8 is given on as QuantizedTensors.
    """

    lane: Lane

    def __init__(self, experts: int, port: Port, wire: str, lane: Lane, keeps_quantised: bool = False):
        super().__init__(lane)
        self.experts, self.port, self.wire = experts, port, wire
        self.keeps_quantised = keeps_quantised and wire == Fp8.name

    def _ticket(self, x_TD: Tensor, route: Route, label: Label) -> _Ticket:
        return _Ticket(label=label)

    def _dispatch(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, ticket: _Ticket) -> Flying:
        def work() -> tuple[Tensor, ...]:
            sent = self._encode(x_TD)
            wired, experts_RK, weights_RK, number, handle = self.port.dispatch(sent, experts_TK, weights_TK)
            slots_N, pairs = find_pairs(experts_RK, weights_RK, number)
            ticket.handle, ticket.slots_N, ticket.shape_RK = handle, slots_N, experts_RK.shape
            ticket.expansion = to = Expansion.of(pairs, self.experts)
            return *self._expanded(wired, to, x_TD.dtype), to.by_expert(pairs.weight_N), to.counts_E

        flight = self._fly("dispatch", "forward", ticket, work, x_TD, experts_TK, weights_TK)
        return as_quantised(flight, x_TD.dtype) if self.keeps_quantised else flight

    def _dispatch_back(self, grad_ND: Tensor, weight_grad_N: Tensor, ticket: _Ticket) -> Flying:
        def work() -> tuple[Tensor, ...]:
            numbers_RK = torch.zeros(ticket.shape_RK, device=grad_ND.device)
            numbers_RK.view(-1).scatter_(0, ticket.slots_N, ticket.arrived.by_pair(weight_grad_N))
            return self.port.combine_numbers(ticket.arrived.sum(grad_ND), numbers_RK, ticket.handle)

        return self._fly("dispatch", "backward", ticket, work, grad_ND, weight_grad_N)

    def _combine(self, rows_ND: Tensor, ticket: _Ticket) -> Flying:
        def work() -> tuple[Tensor, ...]:
            return (self.port.combine(ticket.arrived.sum(rows_ND), ticket.handle),)

        return self._fly("combine", "forward", ticket, work, rows_ND)

    def _combine_back(self, grad_TD: Tensor, ticket: _Ticket) -> Flying:
        def work() -> tuple[Tensor, ...]:
            wired = self.port.dispatch_again(self._encode(grad_TD), ticket.handle)
            return self._expanded(wired, ticket.arrived, grad_TD.dtype)

        flight = self._fly("combine", "backward", ticket, work, grad_TD)
        return as_quantised(flight, grad_TD.dtype) if self.keeps_quantised else flight

    def _fly(
        self, kind: str, direction: str, ticket: _Ticket, work: Callable[[], tuple[Tensor, ...]], *reads: Tensor
    ) -> Flying:
        transfer = self.lane.trace.begin(kind, "ep", replace(ticket.label, direction=direction))
        return self.lane.submit([lambda _: work()], transfer, reads)

    def _encode(self, rows_TD: Tensor) -> Wired:
        return to_fp8(rows_TD) if self.wire == "fp8" else rows_TD.contiguous()

    def _expanded(self, wired: Wired, to: Expansion, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Rows, each once for each of its experts; if they stay quantised, their values and their scales."""
        if isinstance(wired, Tensor):
            return (to.expand(wired),)
        return to.expand_quantised(Quantized(*wired)) if self.keeps_quantised else (to.expand(from_fp8(*wired, dtype)),)


def to_fp8(rows_TD: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values [T, D] and FP32 scales [T, S], those of the fp8 wire format; D is a multiple of 128."""
    values_TD, scale_TS = Fp8().unpack(Fp8().encode(rows_TD), rows_TD.shape[1])
    return values_TD.contiguous(), scale_TS.float()


def from_fp8(values_RD: Tensor, scale_RS: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows. The scale of a tile that holds NaN is NaN."""
    tiles_RSV = values_RD.float().unflatten(1, (-1, Fp8.tile))
    return tiles_RSV.mul_(scale_RS[:, :, None]).flatten(1).to(dtype)


def find_pairs(experts_RK: Tensor, weights_RK: Tensor, pairs: int) -> tuple[Tensor, Pairs]:
    """The slots (r * K + k) whose expert is here, int64 [N], and their pairs in the order of rows."""
    flat = experts_RK.flatten()
    slots_N = torch.nonzero_static(flat >= 0, size=pairs).squeeze(1)
    row_N = slots_N // max(1, experts_RK.shape[1])
    return slots_N, Pairs(len(experts_RK), row_N, flat[slots_N].long(), weights_RK.flatten()[slots_N])
