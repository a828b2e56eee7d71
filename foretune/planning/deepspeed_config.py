"""A strategy as DeepSpeed's JSON. The only place that knows DeepSpeed's keys (0.19.8, `deepspeed/runtime/config.py`).

Workload × Strategy ──▶ dict for `deepspeed.initialize(config=…)`, or, standalone, a file that others can use as it is
"""

from __future__ import annotations

from typing import Any

from foretune.artifacts import Cluster
from foretune.config.schema import TrainConfig
from foretune.planning.predict.memory import persistence_threshold
from foretune.planning.strategy import Strategy, Workload, buckets_for, sums_apart

#: DeepSpeed prints a line every so many steps; the journal already does.
_NEVER = 1_000_000_000


def deepspeed_config(
    work: Workload,
    strategy: Strategy,
    cluster: Cluster,
    *,
    train: TrainConfig,
    standalone: bool = False,
    learning_rate: float | None = None,
    warmup_steps: int = 0,
    total_steps: int = 0,
    managed_gradient_accumulation: bool = False,
    nvme_path: str | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration of a strategy.

    Args:
        standalone: add the optimizer and scheduler sections, for people who take the file elsewhere. foretune itself
            builds the optimizer and sets the learning rate, and hands both over.
        learning_rate, warmup_steps, total_steps: for the standalone sections only.
        managed_gradient_accumulation: whether DeepSpeed counts micro-batches itself; foretune's engine does, so that a
            step may have any number of them. A standalone file leaves it to DeepSpeed.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": strategy.micro_batch_size,
        "gradient_accumulation_steps": strategy.accumulation_steps,
        "train_batch_size": strategy.micro_batch_size * strategy.accumulation_steps * cluster.world_size,
        "gradient_clipping": train.max_grad_norm,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        # Its throughput timer waits for the device at every forward pass; the journal has the figures.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_section(work, strategy, cluster, nvme_path),
        "data_types": {"grad_accum_dtype": work.accumulation_dtype},
    }
    if sums_apart(work, strategy):
        # fp32 sums are of no use if they are rounded to bf16 to be reduced, which DeepSpeed does even with one rank.
        config["communication_data_type"] = "fp32"
    if work.precision == "bf16":
        # Immediately: a gradient is added to its fp32 sum and freed as soon as backward has made it.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        if strategy.optimizer_dtype == "bf16":
            config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    elif work.precision == "fp16":
        # loss_scale 0 is DeepSpeed's word for dynamic loss scaling.
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
    if standalone:
        assert learning_rate is not None, "a standalone file needs a learning rate"
        config["optimizer"] = _optimizer_section(train, learning_rate, strategy)
        config["scheduler"] = _scheduler_section(train, learning_rate, warmup_steps, total_steps)
    elif not managed_gradient_accumulation:
        config["managed_gradient_accumulation"] = False
    return config


def _zero_section(work: Workload, strategy: Strategy, cluster: Cluster, nvme_path: str | None) -> dict[str, Any]:
    stage = strategy.zero_stage
    if stage == 0:
        return {"stage": 0}
    sizes = buckets_for(work.shape, work.trainable)
    pinned = (
        cluster.accelerator.kind == "cuda"
    )  # page-locked memory is for copies to a GPU; there is none here otherwise
    section: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,  # open reports of wrong gradients
        "contiguous_gradients": True,
        "reduce_bucket_size": strategy.reduce_bucket_size,
        "allgather_bucket_size": strategy.reduce_bucket_size,
    }
    if stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": sizes.prefetch,
            "stage3_param_persistence_threshold": persistence_threshold(work),
            "stage3_max_live_parameters": sizes.max_live,
            "stage3_max_reuse_distance": sizes.max_live,
            "sub_group_size": strategy.sub_group_size,
            "stage3_gather_16bit_weights_on_model_save": False,  # weights are consolidated from the checkpoint, offline
        }
    if strategy.offload_optimizer and not strategy.streamed:  # DeepSpeed knows nothing of what is streamed
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        if stage == 3:
            section["offload_optimizer"]["ratio"] = strategy.offload_optimizer
    if strategy.offload_param:
        section["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    if strategy.nvme:
        for name in ("offload_optimizer", "offload_param"):
            if name in section:
                section[name] |= {"device": "nvme", "nvme_path": nvme_path}
    return section


def _optimizer_section(train: TrainConfig, learning_rate: float, strategy: Strategy) -> dict[str, Any]:
    if train.optimizer == "sgd":
        return {
            "type": "SGD",
            "params": {"lr": learning_rate, "momentum": train.momentum, "weight_decay": train.weight_decay},
        }
    params: dict[str, Any] = {
        "lr": learning_rate,
        "betas": [train.adam_beta1, train.adam_beta2],
        "eps": train.adam_epsilon,
        "weight_decay": train.weight_decay,
        "adam_w_mode": train.optimizer == "adamw",  # DeepSpeed's "Adam" is AdamW unless told otherwise
    }
    if not strategy.offload_optimizer:
        params |= {"torch_adam": True, "fused": True}  # torch's kernel: needs no nvcc
    return {"type": "Adam", "params": params}


def _scheduler_section(train: TrainConfig, learning_rate: float, warmup_steps: int, total_steps: int) -> dict[str, Any]:
    if train.schedule == "cosine":
        return {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": total_steps,
                "warmup_num_steps": max(warmup_steps, 1),
                "warmup_min_ratio": 0.0,
                "cos_min_ratio": 0.0,
                "warmup_type": "linear",
            },
        }
    warmup = {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": learning_rate,
        "warmup_num_steps": max(warmup_steps, 1),
        "warmup_type": "linear",
    }
    if train.schedule == "linear":
        return {"type": "WarmupDecayLR", "params": {"total_num_steps": total_steps, **warmup}}
    return {"type": "WarmupLR", "params": warmup}
