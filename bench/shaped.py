"""An engine on random weights of a shape, built on the device, as a rank's main builds it: no model folder needed."""

from __future__ import annotations

from typing import Any

import torch


def bf16_config(micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's section for ZeRO-1 with 16-bit weights and fp32 sums, as the planner writes it for one GPU."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation, "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0, "steps_per_print": 10**9, "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}}, "zero_optimization": {"stage": 1, "overlap_comm": False},
        "bf16": {"enabled": True, "immediate_grad_update": True}, "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }  # fmt: skip


def build(
    shape: dict[str, Any],
    config: dict[str, Any],
    *,
    device: torch.device,
    learning_rate: float,
    length: int = 32768,
    compiled: bool = True,
    checkpointed: int | None = None,
    chunk_tokens: int = 2048,
    mlp_rows: int = 0,
    float8: bool = False,
    deepspeed_ratio: float = 0.0,
    streamed_share: float = 0.0,
    eight_bits: bool = False,
    summed: bool = False,
    recompute_pointwise: bool = False,
    keep_attention: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """(engine, what was put in): packed attention and compiled layers where there is a GPU.

    Args:
        checkpointed: layers that recompute their activations; None is all of them.
        chunk_tokens: of the loss.
        mlp_rows: rows of a tile of the MLPs; 0 leaves them whole.
        float8: linear maps of the layers in 8 bits.
        eight_bits: Adam's moments, with no master weights.
        deepspeed_ratio: of the optimizer, for DeepSpeed's own offload in `config`.
        recompute_pointwise: compiled layers make norms' outputs and gated products again.
        keep_attention: compiled layers that recompute keep attention's output.
        summed: weight gradients are added to their fp32 sums inside the product.
    """
    from transformers import AutoModelForCausalLM, Qwen2Config

    from foretune.config.schema import TrainConfig
    from foretune.engine import DeepSpeedEngine, EightBits, build_optimizer
    from foretune.model import attention, compilation, fp8, loading, tiling
    from foretune.model.loss import attach_loss
    from foretune.model.weight_sums import sum_inside

    model_config = Qwen2Config(**shape, max_position_embeddings=length, rope_theta=1e6, use_sliding_window=False)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    layers = model_config.num_hidden_layers if checkpointed is None else checkpointed
    loading.checkpoint_layers(model, layers)
    packed = attention.refusal(model, device=device) is None
    if packed:
        attention.use_packed_attention(model)
    linears = fp8.float8_linears(model) if float8 else 0
    tiles = tiling.tile_mlps(model, mlp_rows) if mlp_rows else 0
    compiled = compiled and compilation.refusal(device) is None
    attach_loss(model, chunk_tokens=chunk_tokens, fused=compiled)
    optimizer = build_optimizer(model.parameters(), TrainConfig(), learning_rate=learning_rate,
                                offload_optimizer=deepspeed_ratio)  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = DeepSpeedEngine(model, optimizer, config, device=device, streamed_share=streamed_share,
                             eight_bits=EightBits(0, compiled=compiled) if eight_bits else None)  # fmt: skip
    summing = sum_inside(model, engine.gradient_sums) if summed else 0
    if compiled:
        compilation.compile_layers(model, recompute_pointwise=recompute_pointwise, keep_attention=keep_attention)
    facts = {"parameters": parameters, "packed_attention": packed, "compiled": compiled, "tiled_mlps": tiles,
             "float8_linears": linears, "checkpointed_layers": layers, "summed_linears": summing}  # fmt: skip
    return engine, facts
