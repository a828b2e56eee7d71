"""Another plan after the device's memory did not do: the same mathematics, less memory at a time.

smaller micro-batches, more of them ──▶ pointwise values made again ──▶ attention's outputs not kept
──▶ layers recompute ──▶ all is streamed ──▶ None
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

from foretune.artifacts import Decision, Plan
from foretune.model.shape import read_shape
from foretune.planning.shapes import known_shape


def after_out_of_memory(plan: Plan) -> Plan | None:
    """Half the micro-batch at the same global batch; at one row, the next rung of those above; None after the last.

    The update stays the same up to floating-point order. Predictions stay those of the first plan: `Plan.replanned`.
    """
    if plan.micro_batch_size_per_gpu > 1:
        micro = plan.micro_batch_size_per_gpu // 2
        steps = ceil(plan.global_batch_size / (plan.world_size * micro))
        reason = f"the device ran out of memory with {plan.micro_batch_size_per_gpu} rows; the global batch is the same"
        return _changed(
            plan,
            Decision(field="plan.micro_batch_size_per_gpu", value=micro, reason=reason),
            micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=steps,
            deepspeed_config={
                **plan.deepspeed_config,
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": steps,
                "train_batch_size": micro * steps * plan.world_size,
            },
        )
    if plan.compile_layers and not (plan.recompute_pointwise or plan.mlp_tile_rows or plan.fp8):
        reason = "the device ran out of memory with norms' outputs and gated products kept"
        decision = Decision(field="plan.recompute_pointwise", value=True, reason=reason)
        return _changed(plan, decision, recompute_pointwise=True)
    layers = _layers(plan.model)
    if plan.keep_attention and plan.checkpointed_layers:
        reason = "the device ran out of memory with attention's outputs kept by layers that recompute"
        decision = Decision(field="plan.keep_attention", value=False, reason=reason)
        return _changed(plan, decision, keep_attention=False)
    if plan.checkpointed_layers < layers:
        reason = f"the device ran out of memory with {plan.checkpointed_layers} of {layers} layers recomputed"
        decision = Decision(field="plan.checkpointed_layers", value=layers, reason=reason)
        return _changed(plan, decision, checkpointed_layers=layers)
    if plan.streams_optimizer and plan.offload_optimizer < 1:
        reason = f"the device ran out of memory with {1 - plan.offload_optimizer:.0%} of the optimizer on it"
        decision = Decision(field="plan.offload_optimizer", value=1.0, reason=reason)
        return _changed(plan, decision, offload_optimizer=1.0)
    return None


def _layers(model: str) -> int:
    shape = known_shape(model) if not Path(model).exists() else None
    return (shape or read_shape(model)).num_layers


def _changed(plan: Plan, decision: Decision, **changes: Any) -> Plan:
    kept = [one for one in plan.decisions if one.field != decision.field]
    said = decision.model_copy(update={"reason": f"{decision.reason}; what this takes was not predicted"})
    return plan.model_copy(update={**changes, "replanned": True, "decisions": [*kept, said]})
