"""What a user has fixed, and what no amount of memory would make right."""

from __future__ import annotations

from foretune.artifacts import Cluster
from foretune.config import Config
from foretune.errors import UserError
from foretune.planning.predict.activations import is_compiled
from foretune.planning.strategy import Strategy, Workload

#: Families whose MLPs treat every row alike under a name that `foretune.model.tiling` finds.
TILED_FAMILIES = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "gemma", "gemma2", "gemma3_text", "phi",
    "phi3", "gpt2", "gpt_neox", "starcoder2",
})  # fmt: skip
#: Why layers cannot make pointwise values again.
NOT_COMPILED = "only compiled layers can"
_IN_TILES, _IN_8_BITS = "MLPs in tiles compute themselves again", "8-bit linear maps keep what they multiply"
#: Why layers that recompute cannot keep attention's output.
NOT_PACKED, _BROKEN = "only packed attention's can be kept", "layers with MLPs in tiles recompute as a whole"


def refuse_impossible_pins(config: Config, work: Workload, cluster: Cluster) -> None:
    """What no amount of memory would make right."""
    plan, layers, on_cpu = config.plan, work.shape.num_layers, cluster.accelerator.kind == "cpu"
    share, field = pinned_share(config), "plan.offload_optimizer"
    if plan.checkpointed_layers != "auto" and plan.checkpointed_layers > layers:
        problem = f"the model has {layers} layers"
        raise UserError("plan.checkpointed_layers", plan.checkpointed_layers, problem, f"use at most {layers}")
    if plan.offload_param is True and plan.zero_stage not in ("auto", 3):
        problem = f"ZeRO-{plan.zero_stage} keeps whole parameters on the device"
        raise UserError("plan.offload_param", True, problem, "set plan.zero_stage to 3")
    if share is not None and 0 < share < 1 and on_cpu:
        raise UserError(field, share, "on a CPU there is no device to share the optimizer with", "remove the key")
    if share and plan.zero_stage == 0:
        raise UserError(field, plan.offload_optimizer, "ZeRO-0 cannot offload", "set plan.zero_stage to 1, 2 or 3")
    obstacle = streaming_obstacle(config, work, cluster)
    if plan.offload_optimizer_step == "device" and obstacle:
        problem = f"states cannot pass through the device: {obstacle}"
        raise UserError("plan.offload_optimizer_step", "device", problem, "use auto or host")
    if share is not None and 0 < share < 1 and obstacle:
        if plan.zero_stage not in ("auto", 3):
            problem = f"only ZeRO-3 offloads a part of the optimizer, or ZeRO-1 where it can be streamed ({obstacle})"
            raise UserError(field, share, problem, "set plan.zero_stage to 3")
        if config.train.optimizer != "adamw":
            problem = "DeepSpeed offloads a part of the optimizer for AdamW only"
            raise UserError(field, share, problem, "use true or false")
    if plan.zero_stage == 0 and work.accumulation_dtype != work.precision:
        raise UserError(
            "plan.gradient_accumulation_dtype",
            work.accumulation_dtype,
            f"ZeRO-0 can only add gradients up in {work.precision}",
            f"use {work.precision}, or plan.zero_stage 1",
        )
    stage = None if plan.zero_stage == "auto" else plan.zero_stage
    if plan.mlp_tile_rows not in ("auto", 0) and (obstacle := tiling_obstacle(config, work, stage)):
        raise UserError("plan.mlp_tile_rows", plan.mlp_tile_rows, obstacle, "use auto or 0")
    if plan.recompute_pointwise is True and (obstacle := _pinned_recomputing(config, cluster)):
        raise UserError("plan.recompute_pointwise", True, obstacle, "use auto or false")
    if plan.keep_attention is True and (obstacle := _pinned_keeping(config, cluster)):
        raise UserError("plan.keep_attention", True, obstacle, "use auto or false")
    if plan.nvme_path is not None and on_cpu:
        raise UserError("plan.nvme_path", plan.nvme_path, "DeepSpeed swaps a GPU's states only", "remove the key")
    if plan.optimizer_dtype not in ("auto", "fp32") and not config.allow_numerics:
        problem, mend = "changes the numerics of training", "add --allow-numerics, or use fp32"
        raise UserError("plan.optimizer_dtype", plan.optimizer_dtype, problem, mend)
    if plan.optimizer_dtype == "bf16":
        _refuse_bf16_states(config, work, share)
    if plan.optimizer_dtype == "8bit" and (obstacle := eight_bits_obstacle(config, work)):
        raise UserError("plan.optimizer_dtype", "8bit", obstacle, "use auto or fp32, or change that")


def _refuse_bf16_states(config: Config, work: Workload, share: float | None) -> None:
    """What bf16 masters need (DeepSpeed 0.19.8: runtime/config.py, base_optimizer.py): bf16, a stage, no CPUAdam."""
    plan, field = config.plan, "plan.optimizer_dtype"
    if work.precision != "bf16":
        raise UserError(field, "bf16", f"the model trains in {work.precision}", "use fp32, or train.precision bf16")
    if plan.zero_stage == 0:
        raise UserError(field, "bf16", "ZeRO-0 keeps fp32 states", "set plan.zero_stage to 1, 2 or 3")
    if share or plan.offload_param is True:
        raise UserError(field, "bf16", "offloaded states are fp32 here", "set plan.offload_optimizer to false")
    if plan.gradient_accumulation_dtype == "fp32":
        raise UserError(field, "bf16", "a bf16 master is stepped with bf16 gradients", "do not pin the sums to fp32")


def eight_bits_obstacle(config: Config, work: Workload) -> str | None:
    """Why Adam cannot have 8-bit moments and no masters (`foretune.engine.states.eight_bits`); None if it can."""
    plan = config.plan
    if not config.allow_numerics:
        return "it changes the numerics of training"
    if obstacle := _own_step_obstacle(config, work):
        return obstacle
    if pinned_share(config) or plan.offload_param is True:
        return "what is offloaded is fp32"
    return None


def streaming_obstacle(config: Config, work: Workload, cluster: Cluster) -> str | None:
    """Why an offloaded optimizer cannot be streamed (`foretune.engine.states.streaming`); None if it can."""
    plan = config.plan
    if cluster.accelerator.kind != "cuda":
        return "there is no device to pass through"
    if plan.offload_optimizer_step == "host":
        return "plan.offload_optimizer_step is host"
    if obstacle := _own_step_obstacle(config, work):
        return obstacle
    if plan.optimizer_dtype not in ("auto", "fp32"):
        return "its states are fp32"
    if plan.offload_param is True:
        return "parameters are offloaded at ZeRO-3 only"
    if pinned_share(config) == 0:
        return "plan.offload_optimizer is false"
    return None


def _own_step_obstacle(config: Config, work: Workload) -> str | None:
    """Why the optimizer's step cannot be ours, not DeepSpeed's (`foretune.engine.states.masters`); None if it can."""
    if work.lora_rank:
        return "the states of adapters are small"
    if work.precision != "bf16" or work.accumulation_dtype != "fp32":
        return f"it takes bf16 weights and fp32 sums, not {work.precision} and {work.accumulation_dtype}"
    if config.train.optimizer == "sgd":
        return "it is written for Adam"
    if config.plan.zero_stage not in ("auto", 1):
        return f"it is written for ZeRO-1, and plan.zero_stage is {config.plan.zero_stage}"
    return None


def recomputing_obstacle(config: Config, work: Workload, strategy: Strategy) -> str | None:
    """Why the layers of a strategy cannot make pointwise values again; None if they can."""
    if not is_compiled(work, strategy):
        return NOT_COMPILED
    if strategy.mlp_tile_rows:
        return _IN_TILES
    return _IN_8_BITS if config.plan.fp8 is True else None


def _pinned_recomputing(config: Config, cluster: Cluster) -> str | None:
    """The same of what is pinned, before there is a strategy."""
    plan = config.plan
    if _cannot_compile(config, cluster):
        return NOT_COMPILED
    if plan.fp8 is True:
        return _IN_8_BITS
    return _IN_TILES if plan.mlp_tile_rows not in ("auto", 0) else None


def keeping_obstacle(work: Workload, strategy: Strategy) -> str | None:
    """Why layers that recompute cannot keep attention's output; None if they can."""
    if not is_compiled(work, strategy):
        return NOT_COMPILED
    if work.attention != "packed":
        return NOT_PACKED
    return _BROKEN if strategy.mlp_tile_rows else None


def _pinned_keeping(config: Config, cluster: Cluster) -> str | None:
    """The same of what is pinned, before there is a strategy."""
    if _cannot_compile(config, cluster):
        return NOT_COMPILED
    if config.plan.attention == "sdpa":
        return NOT_PACKED
    return _BROKEN if config.plan.mlp_tile_rows not in ("auto", 0) else None


def _cannot_compile(config: Config, cluster: Cluster) -> bool:
    plan = config.plan
    at_stage_3 = plan.zero_stage == 3 or plan.offload_param is True
    return cluster.accelerator.kind != "cuda" or plan.compile is False or at_stage_3 or not config.data.packing


def tiling_obstacle(config: Config, work: Workload, stage: int | None) -> str | None:
    """Why MLPs cannot be in tiles; None if they can. `stage`: None while it is open."""
    if stage == 3:
        return "ZeRO-3 has no whole weights to sum gradients for"
    if work.shape.family not in TILED_FAMILIES:
        return f"the MLPs of this family ({work.shape.family}) are not known to treat every row alike"
    return "dropout would differ from tile to tile" if config.train.dropout else None


def pinned_share(config: Config) -> float | None:
    asked = config.plan.offload_optimizer
    return None if asked == "auto" else float(asked)
