"""The contenders of `throughput.py`, each the way its own documentation sets it up. A child process runs one.

    python bench/contenders.py SPEC.json RESULT.json      measures one
    python bench/contenders.py --make FOLDER SEED < shape  makes a model of a shape

Rows of tokens come from a noisy counter over 512 tokens: there is something to learn, and losses can be compared.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import assignment_of

from foretune.distributed import leave

_ALPHABET, _PAD = 512, 2
CUDA = torch.cuda.is_available()


def rows_of_tokens(spec: dict[str, Any]) -> np.ndarray:
    """int64 [steps x rows, length]: each token mostly follows from the one before; the same for every contender."""
    generator = np.random.default_rng(spec["seed"])
    count = spec["steps"] * spec["rows"]
    tokens = np.empty((count, spec["length"]), dtype=np.int64)
    tokens[:, 0] = generator.integers(0, _ALPHABET, count)
    # The pad's embedding is zero. At a row's start nothing adds to it, and every norm divides its gradient by √eps:
    # with adapters it overflowed, with Unsloth and foretune alike.
    tokens[tokens[:, 0] == _PAD, 0] = _PAD + 1
    for t in range(1, spec["length"]):
        jumps = generator.random(count) < 0.1
        tokens[:, t] = np.where(jumps, generator.integers(0, _ALPHABET, count), (3 * tokens[:, t - 1] + 7) % _ALPHABET)
    return tokens


def make(folder: Path, seed: int, shape: dict[str, Any]) -> None:
    """Save random bf16 weights (fp32 without a GPU) and a word-level tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    config = Qwen2Config(**shape, max_position_embeddings=32768, rope_theta=1e6, use_sliding_window=False,
                         bos_token_id=0, eos_token_id=1, pad_token_id=_PAD)  # fmt: skip
    torch.manual_seed(seed)
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if CUDA else torch.float32)
    model.save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<pad>": _PAD, "<unk>": 3} | {f"w{i}": i for i in range(4, _ALPHABET)}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                        unk_token="<unk>")  # fmt: skip
    tokenizer.save_pretrained(folder)


def synchronise() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def peaks() -> dict[str, int]:
    """Peak memory that tensors had, and that the allocator held, in bytes."""
    if not CUDA:
        return {}
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": torch.cuda.max_memory_reserved()}


def planned(spec: dict[str, Any]) -> tuple[Any, Any]:
    """(config, plan) of foretune for these rows."""
    from foretune.config import load_config
    from foretune.planning import make_plan
    from foretune.planning.machines.hardware import probe

    settings = [
        f"method={spec['method']}", f"train.max_length={spec['length']}", f"train.global_batch_size={spec['rows']}",
        f"train.max_steps={spec['steps']}", f"train.learning_rate={spec['learning_rate']}", "train.schedule=constant",
        "train.warmup_ratio=0", f"train.seed={spec['seed']}", *spec["settings"],
    ]  # fmt: skip
    if spec["contender"] != "foretune":
        layers = json.loads((Path(spec["model"]) / "config.json").read_text())["num_hidden_layers"]
        settings += [
            f"plan.micro_batch_size_per_gpu={spec['micro_batch']}",
            f"plan.checkpointed_layers={layers if spec['checkpointed'] else 0}",
        ]
    if spec["contender"] == "foretune-bf16":
        settings += ["plan.gradient_accumulation_dtype=bf16"] if CUDA else []
    cluster = within(probe(1), spec["memory_gib"])

    def plan_with(*more: str) -> tuple[Any, Any]:
        config = load_config(flags={"model": spec["model"], "data": "rows.jsonl"}, settings=[*settings, *more])
        tokens = config.train.max_steps * spec["rows"] * spec["length"]
        return config, make_plan(
            config, model_folder=Path(spec["model"]), cluster=cluster, prepared=None, tokens=tokens
        )

    # The few steps stand for a run that is long enough for whatever has to be compiled to pay.
    _, of_long = plan_with("train.max_steps=100000")
    chosen = {"compile": of_long.compile_layers, "fused_mlp": of_long.fused_mlp}
    return plan_with(*(f"plan.{name}=true" for name, is_so in chosen.items() if is_so and CUDA))


def within(cluster: Any, gib: float | None) -> Any:
    """The machine, with a device so small that a plan's tensors take at most so much of it."""
    from foretune.planning.predict.memory import CUDA_CONTEXT_BYTES, USABLE_SHARE

    if gib is None:
        return cluster
    memory = int((gib * 2**30 + CUDA_CONTEXT_BYTES) / USABLE_SHARE)
    smaller = min(memory, cluster.accelerator.memory_bytes)
    return cluster.model_copy(update={"accelerator": cluster.accelerator.model_copy(update={"memory_bytes": smaller})})


class Rows:
    """The rows as foretune's loader hands them out."""

    def __init__(self, spec: dict[str, Any], micro_batch: int) -> None:
        self._tokens, self._rows = rows_of_tokens(spec), spec["rows"]
        self._positions = np.broadcast_to(np.arange(spec["length"]), (micro_batch, spec["length"])).copy()

    def step(self, step: int) -> Any:
        from foretune.artifacts import IGNORE_INDEX
        from foretune.data import MicroBatch, StepBatch

        rows = self._tokens[step * self._rows : (step + 1) * self._rows]
        batches = []
        for start in range(0, len(rows), len(self._positions)):
            ids = np.zeros_like(self._positions)
            labels = np.full_like(ids, IGNORE_INDEX)
            piece = rows[start : start + len(ids)]
            ids[: len(piece)] = piece
            labels[: len(piece), :-1] = piece[:, 1:]
            batches.append(MicroBatch(ids, labels, self._positions, np.zeros_like(ids)))
        return StepBatch(batches, rows.size - len(rows), rows.size, len(rows), [])


def run_foretune(spec: dict[str, Any]) -> dict[str, Any]:
    """Planner, engine and loop as a rank's main puts them together; only the rows come from here."""
    from foretune.distributed import rank_info
    from foretune.engine import close_group, open_group
    from foretune.training.build import build_engine
    from foretune.training.loop import train
    from foretune.training.state import TrainState

    config, plan = planned(spec)
    assignment = assignment_of(config=config, plan=plan, rank=rank_info())
    times: list[float] = []
    losses: list[float] = []
    profile = KernelProfile()

    class Note:
        def after_step(self, report: Any, state: Any) -> None:
            times.append(report.seconds)  # the loop has waited for the device when it reports
            losses.append(report.loss)
            if spec["profile"] and report.step == spec["steps"] - 1:
                profile.start()

    device = open_group(assignment.rank)
    engine, _ = build_engine(assignment, device)
    train(
        engine, Rows(spec, plan.micro_batch_size_per_gpu), TrainState(),  # type: ignore[arg-type]
        total_steps=plan.total_steps, learning_rate=lambda step: spec["learning_rate"], hooks=[Note()],
    )  # fmt: skip
    kernels = profile.stop() if spec["profile"] else {}
    close_group()
    chosen = (
        "zero_stage", "micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_accumulation_dtype",
        "checkpointed_layers", "loss_chunk_tokens", "attention", "recompute_pointwise", "keep_attention",
        "compile_layers", "sum_in_matmul", "fused_mlp", "fused_qkv", "offload_optimizer",
    )  # fmt: skip
    return {
        "step_seconds": times,
        "losses": losses,
        "plan": {name: getattr(plan, name) for name in chosen},
        "predicted_step_seconds": plan.predicted.step_seconds,
        "predicted_peak_bytes": plan.predicted.gpu_memory_bytes,
        "kernels": kernels,
        **peaks(),
    }


def wide_copy(weights: list[torch.nn.Parameter]) -> tuple[torch.Tensor, dict[Any, Any], torch.Tensor]:
    """(flat fp32 master weights, whose gradient is the flat sum; each weight's sum; which sums have something).

    The weights come to lie side by side, as ZeRO-1 has them.
    """
    from foretune.model.weight_sums import sums_over

    flat, sizes = torch.cat([p.detach().reshape(-1) for p in weights]), [p.numel() for p in weights]
    for weight, piece in zip(weights, flat.split(sizes), strict=True):
        weight.data = piece.view(weight.shape)
    master = flat.to(torch.float32, copy=True)
    master.grad = torch.zeros_like(master)
    totals, filled = sums_over(weights, master.grad.split(sizes))
    for weight, into in zip(weights, totals, strict=True):
        weight.register_post_accumulate_grad_hook(into.take)
    return master, dict(zip(weights, totals, strict=True)), filled


def run_torch(spec: dict[str, Any]) -> dict[str, Any]:
    """foretune's model, kernels and loss in a plain torch loop, without DeepSpeed.

    The same numerics: 16-bit weights, fp32 master weights and sums of gradients, the norm clipped, fused AdamW. One
    flat master, one flat sum.
    """
    from foretune.model import loading
    from foretune.model.attention import use_packed_attention
    from foretune.model.compilation import compile_layers
    from foretune.model.fused_qkv import fuse_qkv
    from foretune.model.gated_mlp import fuse_mlps
    from foretune.model.layers import decoder_layers
    from foretune.model.loss import attach_loss
    from foretune.model.weight_sums import sum_inside
    from foretune.training.objective import to_device

    config, plan = planned(spec)
    device = torch.device("cuda" if CUDA else "cpu")
    folder = Path(spec["model"])
    model_config = loading.load_config(folder, trust_remote_code=False)
    model = loading.load_model(folder, config=model_config, precision=plan.precision)
    loading.checkpoint_layers(model, plan.checkpointed_layers)
    if plan.attention == "packed":
        use_packed_attention(model)
    attach_loss(model, chunk_tokens=plan.loss_chunk_tokens, fused=plan.compile_layers)
    model.to(device).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    weights.sort(key=lambda weight: weight.ndim < 2)  # side by side as in ours, where vectors are not decayed
    master, sums, filled = wide_copy(weights)
    if plan.sum_in_matmul:
        sum_inside(model, sums)
    for wanted, fuse in ((plan.fused_mlp, fuse_mlps), (plan.fused_qkv, fuse_qkv)):
        assert not wanted or fuse(model) == len(decoder_layers(model)), "kernels are not the same"
    if plan.compile_layers:
        compile_layers(model, recompute_pointwise=plan.recompute_pointwise, keep_attention=plan.keep_attention)
    train = config.train
    optimizer = torch.optim.AdamW([master], lr=spec["learning_rate"], betas=(train.adam_beta1, train.adam_beta2),
                                  eps=train.adam_epsilon, weight_decay=train.weight_decay, fused=True)  # fmt: skip
    rows = Rows(spec, plan.micro_batch_size_per_gpu)
    times, losses = [], []
    for step in range(spec["steps"]):
        batch = rows.step(step)
        synchronise()
        start = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for micro_batch in batch.micro_batches:
            loss = model(**to_device(micro_batch, device), gradient_scale=1 / batch.target_tokens)
            (loss / batch.target_tokens).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_([master], train.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            pieces = zip(master.split([p.numel() for p in weights]), weights, strict=True)
            torch._foreach_copy_(weights, [piece.view_as(p) for piece, p in pieces])
        filled.fill_(False)  # the next gradients overwrite
        losses.append(float(total) / batch.target_tokens)
        synchronise()
        times.append(time.perf_counter() - start)
    return {"step_seconds": times, "losses": losses, **peaks()}


#: What a kernel's name says it does; the first that matches counts.
_KINDS = {
    "softmax of the loss": ("crossentropy", "logsumexp"),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk"),
    "optimizer": ("adam",),
    "compiled pointwise": ("triton",),
    "copies": ("copy", "memcpy", "memset", "fill"),
    "reductions": ("reduce", "norm"),
}


class KernelProfile:
    """Seconds of the device by kind of kernel, and the longest kernels, between start and stop."""

    def start(self) -> None:
        """Begin."""
        synchronise()
        kind = torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU
        self._profile = torch.profiler.profile(activities=[kind])
        self._profile.start()
        self._from = time.perf_counter()

    def stop(self) -> dict[str, Any]:
        """End: ``{"wall_seconds", "by_kind": {kind: seconds}, "longest": [[name, seconds, calls], …]}``."""
        synchronise()
        wall = time.perf_counter() - self._from
        self._profile.stop()
        by_kind: dict[str, float] = {}
        longest = []
        for event in self._profile.key_averages():
            seconds = (event.self_device_time_total if CUDA else event.self_cpu_time_total) / 1e6
            name = event.key.lower()
            kind = next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), "other")
            by_kind[kind] = by_kind.get(kind, 0.0) + seconds
            longest.append([event.key[:150], seconds, event.count])
        longest.sort(key=lambda one: -one[1])
        return {"wall_seconds": wall, "by_kind": by_kind, "longest": longest[:40]}


def zero_config(stage: int) -> dict[str, Any]:
    """The DeepSpeed section as LLaMA-Factory ships it."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 2:
        zero |= {"allgather_partitions": True, "allgather_bucket_size": 5e8, "reduce_scatter": True,
                 "reduce_bucket_size": 5e8, "round_robin_gradients": True}  # fmt: skip
    else:
        zero |= {"sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
                 "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
                 "stage3_max_reuse_distance": 1e9,
                 "stage3_gather_16bit_weights_on_model_save": True}  # fmt: skip
    return {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"},
            "zero_optimization": zero}  # fmt: skip


def trainer_options(spec: dict[str, Any]) -> dict[str, Any]:
    """What the peers' trainers are told, the same for all."""
    return {
        "output_dir": str(Path(spec["model"]) / "out"), "max_length": spec["length"], "packing": False,
        "per_device_train_batch_size": spec["micro_batch"],
        "gradient_accumulation_steps": max(1, spec["rows"] // spec["micro_batch"]), "max_steps": spec["steps"],
        "learning_rate": spec["learning_rate"], "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "logging_steps": 1, "report_to": [], "save_strategy": "no", "bf16": CUDA,
        "use_cpu": not CUDA, "optim": "adamw_torch_fused", "seed": spec["seed"], "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }  # fmt: skip


def train_with(spec: dict[str, Any], trainer_class: Any, **arguments: Any) -> dict[str, Any]:
    """Run a Hugging Face trainer over the rows in their order and time its steps."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    times: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronise()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise()
            times.append(time.perf_counter() - self.start)

    class InOrder(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    dataset = datasets.Dataset.from_dict({"input_ids": rows_of_tokens(spec).tolist()})
    trainer = InOrder(train_dataset=dataset, callbacks=[Timer()], **arguments)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"step_seconds": times, "losses": losses, **peaks()}


def run_trl(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer with Liger's kernels, alone or on DeepSpeed."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    options = trainer_options(spec) | {"use_liger_kernel": CUDA, "gradient_checkpointing": spec["checkpointed"]}
    if spec["contender"] != "trl":
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": "29511"}  # fmt: skip
        options["deepspeed"] = zero_config(int(spec["contender"][-1]))
    arguments = SFTConfig(**options)  # before the model: ZeRO-3 partitions as it loads
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=torch.bfloat16 if CUDA else torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    extra = {"peft_config": lora} if spec["method"] == "lora" else {}
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    return train_with(spec, SFTTrainer, model=model, args=arguments, processing_class=tokenizer, **extra)


def run_unsloth(spec: dict[str, Any]) -> dict[str, Any]:
    """Unsloth's model and its patched trainer."""
    from unsloth import FastLanguageModel  # isort: skip  # it patches what is imported after it
    from trl import SFTConfig, SFTTrainer

    full = spec["method"] == "full"
    model, tokenizer = FastLanguageModel.from_pretrained(
        spec["model"], max_seq_length=spec["length"], dtype=torch.bfloat16, load_in_4bit=False, full_finetuning=full
    )
    recompute = "unsloth" if spec["checkpointed"] else False
    if not full:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets, use_gradient_checkpointing=recompute
        )
    options = trainer_options(spec) | {"gradient_checkpointing": bool(spec["checkpointed"])}
    return train_with(spec, SFTTrainer, model=model, args=SFTConfig(**options), processing_class=tokenizer)


def main() -> None:
    """Run what the arguments name."""
    if sys.argv[1] == "--make":
        make(Path(sys.argv[2]), int(sys.argv[3]), json.load(sys.stdin))
        return
    spec = json.loads(Path(sys.argv[1]).read_text())
    name = spec["contender"]
    runs = {"torch": run_torch, "unsloth": run_unsloth}
    run = runs.get(name) or (run_foretune if name.startswith("foretune") else run_trl)
    Path(sys.argv[2]).write_text(json.dumps(run(spec)))


if __name__ == "__main__":
    main()
    leave()
