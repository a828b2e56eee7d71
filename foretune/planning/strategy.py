"""What is to be trained (`Workload`) and one way of doing it (`Strategy`): the two inputs of memory and timing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, Literal

from foretune.artifacts import strategy_name
from foretune.model.shape import ModelShape

Stage = Literal[0, 1, 2, 3]
Precision = Literal["fp32", "bf16", "fp16"]
OptimizerDtype = Literal["fp32", "bf16", "8bit"]
BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """The work of one optimizer step, whatever the layout. None of it is the planner's to change."""

    shape: ModelShape
    trainable: int  # parameters that are trained
    frozen: int  # parameters that are not (LoRA's base)
    lora_rank: int  # 0 where every parameter is trained
    precision: Precision
    accumulation_dtype: Precision
    optimizer_state_bytes: int  # per trainable parameter, fp32: Adam 8, SGD with momentum 4
    max_length: int  # of the longest row: what memory must hold
    row_length: float  # of the mean row, padding included: what time is spent on
    rows: int  # per optimizer step: packs of a global batch, or their documents where these are not packed
    document_length: float  # mean length that attention sees
    packing: bool
    equal_documents: bool = False  # all of one length: attention is a batch, for faster kernels
    attention: Literal["packed", "sdpa"] = "sdpa"  # packed: the kernel knows where documents end, so there is no mask
    flash_attention_4: bool = False  # packed attention is computed by it
    softmax_in_place: bool = False  # where it is compiled, the loss writes its gradient over the logits (QuACK)
    fused_mlp_from: int | None = None  # tokens of a micro-batch from which SwiGLU is inside the MLP's products
    fp8: bool = False  # the layers' linear maps multiply in 8-bit floats
    sums_inside: bool = False  # a GPU's products add to fp32 sums where these are apart from 16-bit gradients
    compiled: bool = False  # layers, and the softmax of the loss; not at stage 3
    pace: tuple[float, float] = (1.0, 1.0)  # measured / predicted step time on this machine, below stage 3 and at it

    @property
    def parameters(self) -> int:
        """All parameters that a rank must have in some form."""
        return self.trainable + self.frozen

    @cached_property
    def parameter_bytes(self) -> int:
        """Bytes of one parameter in forward and backward."""
        return BYTES[self.precision]

    @cached_property
    def gradient_bytes(self) -> int:
        """Bytes of one accumulated gradient."""
        return BYTES[self.accumulation_dtype]


@dataclass(frozen=True)
class Strategy:
    """One way to lay the work out.

    `offload_optimizer` is the share of the optimizer that lives in host memory. DeepSpeed lets the host step it; where
    it is `streamed`, it passes through the device, which does (`foretune.engine.states.streaming`).
    """

    zero_stage: Stage
    micro_batch_size: int
    accumulation_steps: int
    checkpointed_layers: int = 0
    offload_optimizer: float = 0.0
    offload_param: bool = False
    loss_chunk_tokens: int = 2048
    reduce_bucket_size: int = 100_000_000
    sub_group_size: int = 100_000_000
    optimizer_dtype: OptimizerDtype = "fp32"  # of states; bf16: of master weights too, 8bit: there are none
    nvme: bool = False  # what is offloaded lies on NVMe, not in host memory
    streamed: bool = False
    mlp_tile_rows: int = 0  # rows of an MLP that exist at a time; 0 is all of them
    recompute_pointwise: bool = False  # compiled layers make norms' outputs and gated products again in backward
    keep_attention: bool = False  # compiled layers that recompute keep attention's output

    def but(self, **changes: Any) -> Strategy:
        """`dataclasses.replace` in a third of its time: a search makes tens of thousands of strategies."""
        assert changes.keys() <= self.__dict__.keys(), changes
        other = object.__new__(Strategy)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def sized_for(self, work: Workload) -> Strategy:
        """With buckets and sub-groups as they are derived from the model."""
        sizes = buckets_for(work.shape, work.trainable)
        return self.but(reduce_bucket_size=sizes.reduce, sub_group_size=sizes.sub_group)

    def state_bytes(self, work: Workload) -> float:
        """Bytes per trained parameter of master weight and optimizer states."""
        if self.optimizer_dtype == "8bit":  # a byte for each number, and an fp32 scale for each 256 of them
            return work.optimizer_state_bytes / 4 * (1 + 4 / 256)
        whole = 4 + work.optimizer_state_bytes
        return whole / 2 if self.optimizer_dtype == "bf16" else whole

    @property
    def name(self) -> str:
        """As people say it: `foretune.artifacts.strategy_name`."""
        return strategy_name(
            self.zero_stage,
            offload_optimizer=self.offload_optimizer,
            streamed=self.streamed,
            offload_param=self.offload_param,
            nvme=self.nvme,
            optimizer_dtype=self.optimizer_dtype,
        )


def sums_apart(work: Workload, strategy: Strategy) -> bool:
    """Whether DeepSpeed sums in fp32 beside bf16 weights at stage 1, for which it has another class (BF16_Optimizer).

    That one keeps whole fp32 gradients at all times, needs no bucket, and steps on those gradients as they are.
    """
    different = work.precision == "bf16" and work.accumulation_dtype == "fp32"
    by_deepspeed = strategy.offload_optimizer and not strategy.streamed
    return strategy.zero_stage == 1 and different and not by_deepspeed and strategy.optimizer_dtype != "bf16"


def sums_inside(work: Workload, strategy: Strategy) -> bool:
    """Whether weights' gradients are added to their fp32 sums where they are made (`foretune.model.weight_sums`).

    Tiles of an MLP sum by themselves; of adapters the sums are small.
    """
    return work.sums_inside and sums_apart(work, strategy) and not work.lora_rank and not strategy.mlp_tile_rows


def fuses_mlp(work: Workload, strategy: Strategy) -> bool:
    """Whether MLPs compute their activation inside their products (`foretune.model.gated_mlp`).

    Only where layers are compiled: a run that is too short to pay for that does not pay for these kernels either.
    """
    least, tokens = work.fused_mlp_from, strategy.micro_batch_size * work.max_length
    return least is not None and tokens >= least and work.compiled and sums_inside(work, strategy)


@dataclass(frozen=True)
class Buckets:
    """DeepSpeed's buffers in elements, sized to the model: its own defaults (5e8) take gigabytes for any model."""

    reduce: int
    prefetch: int
    persistence: int
    max_live: int
    sub_group: int


def buckets_for(shape: ModelShape, trainable: int) -> Buckets:
    """Sizes of DeepSpeed's buffers.

    A bucket beyond 1e8 elements (200 MB in 16 bits) no longer makes a collective faster; one below a sixteenth of the
    model only makes more of them. Prefetch reaches one layer ahead, 10·h elements stay whole (norms and biases), as in
    transformers' own integration. At most three layers, the embedding and the head are gathered at a time.
    """
    layer = shape.layer_parameters
    reduce = min(100_000_000, max(1_000_000, ceil(trainable / 4)))
    widest = shape.vocab_size * shape.hidden_size
    return Buckets(
        reduce=reduce,
        prefetch=min(50_000_000, max(1_000_000, layer)),
        persistence=10 * shape.hidden_size,
        max_live=min(1_000_000_000, max(10_000_000, 3 * layer + 2 * widest)),
        sub_group=100_000_000,
    )


def gib(value: float) -> str:
    """Bytes for people: ``93.1 GiB``, ``820 MiB``."""
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / 2**20:.0f} MiB"
