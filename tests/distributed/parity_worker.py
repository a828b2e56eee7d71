"""One rank of the parity test: trains the same data through every layout in one process group.

Started by test_parity.py as ``parity_worker.py FOLDER``: reads FOLDER/model and FOLDER/data, rank 0
writes FOLDER/world-N.json (losses, gradient norms) and FOLDER/world-N.npz (weights before and after).
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

from foretune.config.schema import TrainConfig
from foretune.data import open_loader
from foretune.distributed import die_with_parent, leave, rank_info
from foretune.engine import DeepSpeedEngine, build_optimizer, close_group, open_group, partitioned_loading
from foretune.model.fused_qkv import fuse_qkv
from foretune.model.gated_mlp import fuse_mlps
from foretune.model.loading import load_model
from foretune.model.loss import attach_loss
from foretune.model.weight_sums import sum_inside
from foretune.training.loop import train
from foretune.training.state import TrainState

STEPS, LEARNING_RATE, BATCH_ROWS, SEED = 5, 1e-3, 8, 3
STAGES, ACCUMULATIONS, PACKED = (0, 1, 2, 3), (1, 4), (True, False)
SUMS = {0: ("bf16",), 1: ("bf16", "fp32"), 2: ("bf16", "fp32"), 3: ("bf16", "fp32")}  # of gradients, in bf16 training
DECAY = 0.1  # in bf16 training


def deepspeed_config(stage: int, micro_batch_size: int, world_size: int, sums: str | None) -> dict:
    zero = {"stage": stage, "overlap_comm": False}
    if stage == 3:  # small enough that parameters really are partitioned and gathered
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 5000, "stage3_prefetch_bucket_size": 1000}
    apart = {"communication_data_type": "fp32"} if sums == "fp32" else {}
    return apart | {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch_size * world_size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": sums or "fp32"},
        "bf16": {"enabled": sums is not None, "immediate_grad_update": True},
    }


def run_case(
    folder: Path,
    device: torch.device,
    *,
    stage: int,
    accumulation: int,
    packed: bool,
    sums: str | None = None,
    as_on_gpu: bool = False,
) -> dict:
    """One layout; in bf16 with fp32 master weights where `sums` says in what gradients are summed."""
    rank = rank_info()
    micro_batch_size = max(1, BATCH_ROWS // (rank.world_size * accumulation))
    config = deepspeed_config(stage, micro_batch_size, rank.world_size, sums)
    with partitioned_loading(config):
        model = load_model(folder / "model", precision="bf16" if sums else "fp32")
    attach_loss(model, chunk_tokens=50)
    decay = TrainConfig(weight_decay=DECAY if sums else 0.0)
    optimizer = build_optimizer(model.parameters(), decay, learning_rate=LEARNING_RATE)
    engine = DeepSpeedEngine(model, optimizer, config, device=device)
    if as_on_gpu:
        engine._take_shortcuts()
        sum_inside(model, engine.gradient_sums)
    loader = open_loader(
        folder / "data",
        seed=SEED,
        global_batch_size=BATCH_ROWS,
        rank=rank.rank,
        world_size=rank.world_size,
        micro_batch_size=micro_batch_size,
        packing=packed,
    )
    reports = []

    class Collect:
        def after_step(self, report, state) -> None:
            reports.append(report)

    train(engine, loader, TrainState(), total_steps=STEPS, learning_rate=lambda step: LEARNING_RATE, hooks=[Collect()])
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with engine.whole_parameters([parameter]):
            weights[name] = parameter.detach().float().numpy().copy()
    return {
        "losses": [report.loss for report in reports],
        "grad_norms": [report.grad_norm for report in reports],
        "weights": weights,
        # In DeepSpeed's own buffers, of all ranks; where weights and sums lie side by side.
        "fused": [fuse_mlps(model), fuse_qkv(model)] if as_on_gpu else [0, 0],
    }


def main() -> None:
    die_with_parent()
    folder = Path(sys.argv[1])
    rank = rank_info()
    device = open_group(rank)
    results, arrays = {}, {}
    for stage, accumulation, packed in itertools.product(STAGES, ACCUMULATIONS, PACKED):
        name = f"zero{stage}-accumulation{accumulation}-{'packed' if packed else 'alone'}"
        result = run_case(folder, device, stage=stage, accumulation=accumulation, packed=packed)
        weights = result.pop("weights")
        results[name] = result
        arrays |= {f"{name}/{key}": value for key, value in weights.items()}
    for stage, every in SUMS.items():
        for sums in every:
            for as_on_gpu in (False, True) if stage in (1, 2) else (False,):
                result = run_case(
                    folder, device, stage=stage, accumulation=4, packed=True, sums=sums, as_on_gpu=as_on_gpu
                )
                del result["weights"]
                results[f"bf16-zero{stage}-{sums}" + ("-as-on-gpu" if as_on_gpu else "")] = result
    if rank.is_main:
        np.savez(folder / f"world-{rank.world_size}.npz", **arrays)
        (folder / f"world-{rank.world_size}.json").write_text(json.dumps(results))
    close_group()


if __name__ == "__main__":
    main()
    leave()
