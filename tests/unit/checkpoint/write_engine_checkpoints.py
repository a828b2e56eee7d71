"""A rank's main: trains tiny models for two steps on the real engine and saves them, the truth beside.

in: ``--out FOLDER --cases A,B,…`` (names of `CASES`, or ``all``)   out, per case:

    FOLDER/CASE/base/                          the model that training started from, a Hugging Face folder
    FOLDER/CASE/checkpoints/step-00000002/     a complete checkpoint, laid out as `foretune.checkpoint.layout` says
    FOLDER/CASE/truth.safetensors              the engine's own weights by name, gathered while it lived

One process group serves all cases: starting ranks costs more than all of them together.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STORIES = Path(__file__).parents[2] / "models" / "stories260K"  # its tokenizer has 512 tokens
VOCABULARY = 512
STEP = 2


@dataclass(frozen=True)
class Case:
    family: str
    stage: int
    precision: str = "fp32"
    tied: bool = True
    method: str = "full"
    weight_decay: float = 0.0  # not 0: the optimizer has two parameter groups
    frozen: str | None = None  # part of the names of parameters that do not train
    zero: dict[str, Any] = field(default_factory=dict)
    accumulate_in_fp32: bool = False
    streamed: float = 0.0
    optimizer: str = "adamw"  # sgd: without momentum, so that it has no states


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SHARDED = {"stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
CASES = {
    **{f"llama-fp32-{stage}": Case("llama", stage) for stage in range(4)},
    **{f"llama-bf16-{stage}": Case("llama", stage, "bf16", weight_decay=0.1) for stage in range(4)},
    "llama-bf16-1-fp32-sums": Case("llama", 1, "bf16", accumulate_in_fp32=True),
    "llama-bf16-1-streamed": Case("llama", 1, "bf16", accumulate_in_fp32=True, streamed=0.6),
    "llama-fp32-0-sgd": Case("llama", 0, optimizer="sgd"),
    "llama-fp32-3-sgd": Case("llama", 3, optimizer="sgd", zero=SHARDED),
    "llama-untied-bf16-3": Case("llama", 3, "bf16", tied=False, zero=SHARDED),
    "gpt2-bf16-2": Case("gpt2", 2, "bf16"),
    "gpt2-fp32-3": Case("gpt2", 3, zero=SHARDED, weight_decay=0.1),
    "qwen2-fp32-2-offload": Case("qwen2", 2, zero=OFFLOAD),
    "qwen3-bf16-3-offload": Case("qwen3", 3, "bf16", tied=False, zero={**OFFLOAD, **SHARDED}),
    "frozen-fp32-2": Case("llama", 2, frozen="embed_tokens"),
    "frozen-fp32-3": Case("llama", 3, frozen="mlp", zero=SHARDED),
    "lora-fp32-0": Case("llama", 0, method="lora"),
    "lora-bf16-2": Case("llama", 2, "bf16", method="lora"),
    "lora-bf16-3": Case("llama", 3, "bf16", tied=False, method="lora", zero=SHARDED),
    "lora-gpt2-fp32-3": Case("gpt2", 3, method="lora", zero=SHARDED),
}


def model_config(case: Case) -> Any:
    """A tiny shape whose parts do not divide by three, so that shards are padded."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

    if case.family == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY, n_embd=40, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[case.family]
    shape = {"head_dim": 20} if case.family == "qwen3" else {}
    return kind(
        vocab_size=VOCABULARY, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=case.tied, bos_token_id=1,
        eos_token_id=2, **shape,
    )  # fmt: skip


def deepspeed_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 10_000, **case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if case.accumulate_in_fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def build_engine(case: Case, base: Path, device: Any) -> tuple[Any, Any]:
    """(engine, model) of a case over the weights in `base`."""
    import torch
    from transformers import AutoModelForCausalLM

    from foretune.config.schema import LoraConfig, TrainConfig
    from foretune.engine import DeepSpeedEngine, build_optimizer, partitioned_loading
    from foretune.model.adapters import add_adapters

    config = deepspeed_config(case)
    with partitioned_loading(config):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, DTYPES[case.precision]))
        if case.method == "lora":
            model = add_adapters(model, LoraConfig(r=3, alpha=6.0), seed=5)
    for parameter_name, parameter in model.named_parameters():
        if case.frozen and case.frozen in parameter_name:
            parameter.requires_grad_(False)
    train = TrainConfig(optimizer=case.optimizer, momentum=0.0, weight_decay=case.weight_decay)
    optimizer = build_optimizer(model.parameters(), train, learning_rate=1e-2)
    whole = case.method == "full"
    engine = DeepSpeedEngine(model, optimizer, config, device=device, save_frozen=whole, streamed_share=case.streamed)
    return engine, model


def write_case(name: str, folder: Path, device: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from foretune.checkpoint import layout
    from foretune.checkpoint.snapshot import FolderWriter
    from foretune.model.adapters import save_adapter_config

    case = CASES[name]
    rank = torch.distributed.get_rank()
    if rank == 0:
        torch.manual_seed(11)
        dtype = getattr(torch, DTYPES[case.precision])
        AutoModelForCausalLM.from_config(model_config(case), dtype=dtype).save_pretrained(folder / "base")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy2(STORIES / file, folder / "base" / file)
    torch.distributed.barrier()
    engine, model = build_engine(case, folder / "base", device)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        rows = torch.randint(3, VOCABULARY, (2, 16), generator=generator)
        engine.backward(engine(input_ids=rows, labels=rows, use_cache=False).loss)
        engine.step(1e-2)
    partial = layout.partial_folder_of(folder / "checkpoints", STEP)
    engine.save(FolderWriter(partial))
    if case.method == "lora" and rank == 0:
        save_adapter_config(model, partial)
    write_reference(engine, partial)
    write_truth(engine, folder)
    torch.distributed.barrier()
    if rank == 0:
        write_manifest(case, partial)
    torch.distributed.barrier()
    del engine, model
    gc.collect()


def write_reference(engine: Any, folder: Path) -> None:
    """What the training engine says about fixed rows, in the form that an export must reproduce."""
    import torch
    from safetensors.torch import save_file

    rows = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(rows)
    mask[1, 20:] = 0
    positions = torch.tensor([[0, 5, 11, 19]] * 8)
    with torch.no_grad():
        logits = engine(input_ids=rows, attention_mask=mask, use_cache=False).logits.float()
    picked = torch.gather(logits, 1, positions[:, :, None].expand(-1, -1, logits.shape[-1]))
    if engine.rank == 0:
        tensors = {"input_ids": rows, "attention_mask": mask, "positions": positions, "logits": picked.contiguous()}
        save_file(tensors, folder / "reference.safetensors")


def write_truth(engine: Any, folder: Path) -> None:
    """Every parameter by its first name, as the forward pass uses it; and ``fp32.NAME``, its master at stage 3."""
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors.torch import save_file

    truth = {}
    for name, parameter in engine.module.named_parameters():
        with engine.whole_parameters([parameter]):
            truth[name] = parameter.detach().clone()
        if engine.zero_stage == 3 and parameter.requires_grad:
            truth[f"fp32.{name}"] = safe_get_full_fp32_param(parameter).detach().clone()
    if engine.rank == 0:
        save_file({name: tensor.cpu().contiguous() for name, tensor in truth.items()}, folder / "truth.safetensors")


def write_manifest(case: Case, folder: Path) -> None:
    import torch

    from foretune.artifacts import Checkpoint
    from foretune.checkpoint.store import commit

    world_size = torch.distributed.get_world_size()
    manifest = Checkpoint(
        step=STEP, world_size=world_size, zero_stage=case.stage, precision=case.precision, method=case.method,
        fingerprint="0" * 64, train_state={}, files={},
    )  # fmt: skip
    commit(folder, manifest)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", required=True)
    arguments = parser.parse_args()

    from foretune.distributed import die_with_parent, leave, rank_info
    from foretune.engine import close_group, open_group

    die_with_parent()
    device = open_group(rank_info())
    try:
        for name in CASES if arguments.cases == "all" else arguments.cases.split(","):
            print(f"case {name}", file=sys.stderr, flush=True)
            write_case(name, arguments.out / name, device)
    finally:
        close_group()
    leave()


if __name__ == "__main__":
    main()
