"""Which kernels compute a layer: choices that change its speed and its rounding, not its mathematics.

Config × Workload × Cluster ──▶ `plan.attention`, `plan.compile`, `plan.fp8`, `plan.sum_in_matmul`,
`plan.fused_mlp`, `plan.fused_qkv`, each with a reason
"""

from __future__ import annotations

from importlib import metadata

from foretune.artifacts import Cluster, Decision
from foretune.config import Config
from foretune.errors import UserError
from foretune.planning.machines import catalogue
from foretune.planning.strategy import Strategy, Workload, fuses_mlp, sums_apart, sums_inside

#: Heads that the packed attention kernels compute: multiples of 8 up to this.
LARGEST_PACKED_HEAD = 256
#: The version that is used where it is installed, and the heads it is used for (`foretune.model.flash_attention_4`).
FLASH_ATTENTION_4, FLASH_ATTENTION_4_HEADS = "4.0.0b36", (64, 128)
#: The versions of QuACK and its compiler that are used where they are installed (`foretune.model.quack_kernels`).
QUACK = {"quack-kernels": "0.6.5", "nvidia-cutlass-dsl": "4.7.1"}
#: Widths that its kernels take are multiples of this.
QUACK_ALIGNMENT = 8
#: Tokens of a micro-batch from which MLPs are fused unasked: with 16,384 a step of the 1.5B shape is 5 % shorter, the
#: loss's softmax included; with 4,096 that of the 3B shape was 9 % longer, in a form that kept the host busier.
FUSED_MLP_TOKENS = 16384
#: What the first step on a machine takes longer where they are fused (1.5B on an H100: 72 s for 22, FlashAttention-4's
#: kernels included in both).
FUSING_SECONDS = 50.0
#: What the first step takes longer where layers are compiled: 12-15 s on an H100 (1.5B), 3 s once it is on disk.
COMPILING_SECONDS = 15.0
#: Columns of key and value together up to which one product for all three is chosen unasked: of the 1.5B shape's 512
#: (two heads of 128 each), a step is 0.6 % shorter on an H200. Wider ones keep a GPU busy by themselves.
NARROW_COLUMNS = 512
#: Families whose attention is known to take it (`foretune.model.fused_qkv`); others try where it is asked for.
ONE_INPUT = {"llama", "mistral", "qwen2", "qwen3"}
NO_SUMS_APART = "gradients have no fp32 sums of their own here, as they have at ZeRO-1 with bf16"
NO_SUMS_INSIDE = "gradients are not summed inside products, which it is written for"
TILES_SUM = "tiles of an MLP sum the gradients of its weights themselves"


def choose_attention(config: Config, work: Workload, cluster: Cluster) -> Decision:
    """Packed where rows are packed and the kernels can: no mask is built, and a row costs what its documents do.

    Raises:
        UserError: (field ``plan.attention``) packed is asked for where it cannot be.
    """
    asked, field, shape = config.plan.attention, "plan.attention", work.shape
    obstacle = None
    if cluster.accelerator.kind != "cuda":
        obstacle = "the packed kernels are CUDA's"
    elif work.precision == "fp32":
        obstacle = "the packed kernels compute in 16 bits"
    elif shape.head_dim % 8 or shape.head_dim > LARGEST_PACKED_HEAD:
        obstacle = f"the packed kernels do not know heads of {shape.head_dim}"
    elif shape.soft_capped_attention:
        obstacle = "the packed kernels have no soft-capping"
    elif config.train.dropout == "model":
        obstacle = "the packed kernels have no dropout"
    if asked == "packed" and obstacle:
        raise UserError(field, asked, obstacle, "use sdpa or auto")
    if asked != "auto":
        return Decision(field=field, value=asked, reason="as set", pinned=True)
    if obstacle is None and not work.packing:
        obstacle = "a row is one document"
    if obstacle is not None:
        return Decision(field=field, value="sdpa", reason=obstacle)
    kernels = "; FlashAttention-4 computes it" if has_flash_attention_4(work, cluster) else ""
    reason = f"documents share rows; no mask, and only what is inside them{kernels}"
    return Decision(field=field, value="packed", reason=reason)


def has_flash_attention_4(work: Workload, cluster: Cluster) -> bool:
    """Whether FlashAttention-4 will compute packed attention: known for this machine alone, where it is probed."""
    card_can = cluster.probed and catalogue.has_flash_attention_4(cluster.accelerator.name)
    known_head = work.shape.head_dim in FLASH_ATTENTION_4_HEADS
    return card_can and known_head and _are_installed({"flash-attn-4": FLASH_ATTENTION_4})


def has_quack(work: Workload, cluster: Cluster) -> bool:
    """Whether QuACK's kernels can be used: known for this machine alone, where it is probed."""
    card_can = cluster.probed and catalogue.is_hopper(cluster.accelerator.name)
    return card_can and work.precision == "bf16" and _are_installed(QUACK)


def has_softmax_in_place(work: Workload, cluster: Cluster) -> bool:
    """Whether a compiled loss has its softmax of QuACK's: the head is a linear map, and a row of logits is aligned."""
    return work.shape.plain_head and work.shape.vocab_size % QUACK_ALIGNMENT == 0 and has_quack(work, cluster)


def _are_installed(versions: dict[str, str]) -> bool:
    try:
        return all(metadata.version(name) == version for name, version in versions.items())
    except metadata.PackageNotFoundError:
        return False


def choose_compile(config: Config, cluster: Cluster, *, zero_stage: int | None) -> Decision:
    """Compiled layers on a GPU below stage 3; the planner takes them back where a run is too short to pay for them.

    Args:
        zero_stage: None while it is open.

    Raises:
        UserError: (field ``plan.compile``) asked for where it cannot be.
    """
    asked, field = config.plan.compile, "plan.compile"
    obstacle = None
    if cluster.accelerator.kind != "cuda":
        obstacle = "compiled layers are for GPUs"
    elif not config.data.packing:
        obstacle = "rows that are not packed have many lengths, and each would be compiled anew"
    elif zero_stage == 3:
        obstacle = "ZeRO-3 fetches the parameters of every module as it runs, which breaks compiled code apart"
    if asked is True and obstacle:
        raise UserError(field, asked, obstacle, "remove the key")
    if asked != "auto":
        return Decision(field=field, value=asked, reason="as set", pinned=True)
    if obstacle is not None:
        return Decision(field=field, value=False, reason=obstacle)
    return Decision(field=field, value=True, reason="norms, rotary embeddings and activations become one kernel each")


def choose_fp8(config: Config, work: Workload, cluster: Cluster) -> Decision:
    """Linear maps in 8-bit floats, where they are asked for: never by itself.

    The search then leaves ZeRO-3 out.

    Raises:
        UserError: (field ``plan.fp8``) asked for where it cannot be, or without leave to change numerics.
    """
    asked, field = config.plan.fp8, "plan.fp8"
    if asked is not True:
        reason = "exact" if config.allow_numerics else "exact; --allow-numerics would let it be asked for"
        return Decision(field=field, value=False, reason=reason, pinned=asked is False)
    if not config.allow_numerics:
        raise UserError(field, True, "changes the numerics of training", "add --allow-numerics, or remove the key")
    obstacle = None
    if cluster.accelerator.kind != "cuda":
        obstacle = "8-bit matrix units are in GPUs"
    elif not catalogue.has_fp8(cluster.accelerator.name):
        obstacle = f"{cluster.accelerator.name} is not known to have 8-bit matrix units (Ada, Hopper and later have)"
    elif work.precision != "bf16":
        obstacle = f"it is written for bf16, and the model trains in {work.precision}"
    elif config.plan.zero_stage == 3 or config.plan.offload_param is True:
        obstacle = "ZeRO-3 has no whole weights to cast"
    if obstacle:
        raise UserError(field, True, obstacle, "remove the key")
    reason = "changes numerics (allowed): e4m3 forward, e5m2 gradients; 1.23 times as fast where it was measured (3B)"
    return Decision(field=field, value=True, reason=reason, pinned=True)


def may_sum_in_matmul(config: Config, work: Workload, cluster: Cluster, *, fp8: bool) -> bool:
    """Whether a layout with fp32 sums apart adds to them inside products; the search then knows its time.

    Raises:
        UserError: (field ``plan.sum_in_matmul``) asked for where no layout can.
    """
    asked, obstacle = config.plan.sum_in_matmul, _summing_obstacle(config, work, cluster, fp8=fp8)
    if asked is True and obstacle is None and config.plan.mlp_tile_rows not in ("auto", 0):
        obstacle = TILES_SUM
    if asked is True and obstacle:
        raise UserError("plan.sum_in_matmul", asked, obstacle, "remove the key")
    return asked is not False and obstacle is None


def _summing_obstacle(config: Config, work: Workload, cluster: Cluster, *, fp8: bool) -> str | None:
    """Why products cannot add to sums, whatever the layout."""
    if cluster.accelerator.kind != "cuda":
        return "only a GPU's matrix products add in fp32 what they multiply in 16 bits"
    if config.method != "full":
        return "an adapter's matrices are too small to gain by it"
    if work.shape.family == "gpt2":
        return "this family (gpt2) has transposed weights (Conv1D), whose gradients only autograd makes"
    if fp8:
        return "8-bit linear maps make the gradients of their weights themselves (plan.fp8)"
    return None


def choose_sum_in_matmul(
    config: Config, work: Workload, cluster: Cluster, strategy: Strategy, *, fp8: bool
) -> Decision:
    """Weight gradients added inside the product where their fp32 sums lie apart from them.

    What is asked for has been refused before the search (`may_sum_in_matmul`), or has narrowed it.
    """
    asked, field = config.plan.sum_in_matmul, "plan.sum_in_matmul"
    obstacle = _summing_obstacle(config, work, cluster, fp8=fp8)
    if obstacle is None and not sums_apart(work, strategy):
        obstacle = NO_SUMS_APART
    elif obstacle is None and strategy.mlp_tile_rows:
        obstacle = TILES_SUM
    assert asked is not True or obstacle is None, obstacle
    if asked != "auto":
        return Decision(field=field, value=asked, reason="as set", pinned=True)
    if obstacle is not None:
        return Decision(field=field, value=False, reason=obstacle)
    return Decision(field=field, value=True, reason="no gradient of a weight is written, read again and added")


def fuses_mlp_from(config: Config, work: Workload, cluster: Cluster) -> int | None:
    """Tokens of a micro-batch from which MLPs are fused where gradients are summed inside products; None: never.

    Raises:
        UserError: (field ``plan.fused_mlp``) asked for where no layout can.
    """
    asked, obstacle = config.plan.fused_mlp, _fusing_obstacle(work, cluster)
    if asked is True and obstacle:
        raise UserError("plan.fused_mlp", asked, obstacle, "remove the key")
    if asked is False or obstacle is not None:
        return None
    return 0 if asked is True else FUSED_MLP_TOKENS


def _fusing_obstacle(work: Workload, cluster: Cluster) -> str | None:
    """Why MLPs cannot be fused, whatever the layout."""
    if not work.shape.swiglu:
        return "this model's MLPs are not SwiGLU of three maps without biases"
    if work.shape.hidden_size % QUACK_ALIGNMENT or work.shape.intermediate_size % QUACK_ALIGNMENT:
        return f"QuACK's kernels take widths in multiples of {QUACK_ALIGNMENT}"
    if not work.sums_inside:
        return NO_SUMS_INSIDE
    if not has_quack(work, cluster):
        return "QuACK's kernels (Hopper, the flash extra, on this machine) are not there"
    return None


def choose_fused_mlp(config: Config, work: Workload, cluster: Cluster, strategy: Strategy) -> Decision:
    """SwiGLU inside the MLP's products where gradients are summed inside them; asked for, as `fuses_mlp_from` says."""
    asked, field = config.plan.fused_mlp, "plan.fused_mlp"
    obstacle = _fusing_obstacle(work, cluster)
    if obstacle is None and not work.compiled:
        obstacle = "layers are not compiled, and a run too short for that is too short for these kernels"
    if obstacle is None and not sums_inside(work, strategy):
        obstacle = NO_SUMS_INSIDE
    if asked is True and obstacle:
        raise UserError(field, asked, obstacle, "remove the key")
    if asked != "auto":
        return Decision(field=field, value=asked, reason="as set", pinned=True)
    if obstacle is None and work.fused_mlp_from is None:
        obstacle = f"its kernels take {FUSING_SECONDS:.0f} s to compile, once, and this run would save less"
    if obstacle is None and not fuses_mlp(work, strategy):
        obstacle = f"not chosen below {FUSED_MLP_TOKENS:,} tokens a micro-batch: with 4,096 it was slower"
    if obstacle is not None:
        return Decision(field=field, value=False, reason=obstacle)
    return Decision(
        field=field, value=True, reason="SwiGLU is computed where its inputs are summed, by QuACK's kernels"
    )


def refuse_fused_qkv(config: Config, work: Workload) -> None:
    """Say before the search that no layout can have query, key and value by one product.

    Raises:
        UserError: (field ``plan.fused_qkv``) asked for where gradients are not summed inside products.
    """
    if config.plan.fused_qkv is True and not work.sums_inside:
        raise UserError("plan.fused_qkv", True, NO_SUMS_INSIDE, "remove the key")


def choose_fused_qkv(config: Config, work: Workload, strategy: Strategy, *, vectors_apart: bool | None) -> Decision:
    """Query, key and value by one product, where key and value are narrow; asked for, wherever it can be.

    What is asked for has been refused before the search (`refuse_fused_qkv`), or has narrowed it.

    Args:
        vectors_apart: `Checkpoint.vectors_apart` of a training that has begun; None before.

    Raises:
        UserError: (field ``plan.fused_qkv``) asked for where it cannot be.
    """
    asked, field, shape = config.plan.fused_qkv, "plan.fused_qkv", work.shape
    obstacle = None if work.compiled else "layers are not compiled"
    if obstacle is None and not sums_inside(work, strategy):
        obstacle = NO_SUMS_INSIDE
    if obstacle is None and vectors_apart is False and not config.train.weight_decay:
        obstacle = "this training began with biases between the weights in the optimizer's memory, and keeps them there"
    if asked is True and obstacle:
        raise UserError(field, asked, obstacle, "remove the key")
    if asked != "auto":
        return Decision(field=field, value=asked, reason="as set", pinned=True)
    columns = 2 * shape.num_key_value_heads * shape.head_dim
    if obstacle is None and shape.family not in ONE_INPUT:
        obstacle = f"not tried with this family ({shape.family})"
    if obstacle is None and columns > NARROW_COLUMNS:
        obstacle = f"key and value are wide enough by themselves: {columns:,} columns"
    if obstacle is not None:
        return Decision(field=field, value=False, reason=obstacle)
    reason = f"key and value are narrow ({columns:,} columns): one product for all three keeps the GPU busier"
    return Decision(field=field, value=True, reason=reason)
