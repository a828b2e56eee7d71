"""The mathematics that was left to us: precision, learning rate, global batch, length, steps. Each with its reason.

None of it depends on how many devices there are: a plan may change the layout, never the update (precision excepted,
which the hardware decides). What a user has set is checked and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from foretune.artifacts import Cluster, Decision, PreparedDataset
from foretune.config import Config
from foretune.errors import UserError
from foretune.model.shape import ModelShape
from foretune.planning.strategy import Precision

#: Without data: a number of tokens that is stated, not known.
ASSUMED_TOKENS = 10_000_000
ASSUMED_MAX_LENGTH = 2048
STEPS_PER_EPOCH_AIM = 100
MOST_ROWS = 64
FEWEST_DOCUMENTS = 8


@dataclass(frozen=True)
class DataFacts:
    """What the plan knows of the data: measured where there is a prepared set, assumed (and said so) where not."""

    max_length: int
    rows: int  # packed rows of one epoch, or documents when not packed
    documents: int
    tokens: int
    document_length: float
    source: str


def decide(config_field: str, value: Any, reason: str, *, pinned: bool = False) -> Decision:
    """A decision about a dotted key."""
    return Decision(field=config_field, value=value, reason=reason, pinned=pinned)


def data_facts(config: Config, shape: ModelShape, prepared: PreparedDataset | None, tokens: int | None) -> DataFacts:
    """Lengths and counts, from the prepared set or assumed.

    Raises:
        UserError: (field ``train.max_length``) longer than learned positions reach, or not what the data was prepared for.
    """
    asked = config.train.max_length
    learned_positions = shape.position_parameters > 0
    if asked != "auto" and asked > shape.context_length and learned_positions:
        raise UserError(
            "train.max_length",
            asked,
            f"this model has learned positions for {shape.context_length} tokens only",
            f"use at most {shape.context_length}",
        )
    if prepared is not None:
        if asked not in ("auto", prepared.max_length):
            raise UserError(
                "train.max_length",
                asked,
                f"the data was prepared with rows of {prepared.max_length} tokens",
                "run prepare again, or remove the key",
            )
        documents = max(1, prepared.documents)
        rows = prepared.packs if config.data.packing else max(prepared.packs, documents)
        length = min(float(prepared.max_length), max(1.0, prepared.tokens / documents))
        return DataFacts(prepared.max_length, max(1, rows), documents, prepared.tokens, length, "the prepared data")
    max_length = asked if asked != "auto" else min(ASSUMED_MAX_LENGTH, shape.context_length)
    count = tokens if tokens is not None else ASSUMED_TOKENS
    rows = max(1, ceil(count / max_length))
    source = f"{count:,} tokens as given" if tokens is not None else f"no data given: {count:,} tokens assumed"
    return DataFacts(max_length, rows, rows, count, float(max_length), source)


def choose_precision(config: Config, cluster: Cluster) -> Decision:
    """fp32 on a CPU, bf16 on a GPU that has it, else fp16.

    Raises:
        UserError: (field ``train.precision``) what the hardware cannot compute.
    """
    asked, accelerator = config.train.precision, cluster.accelerator
    if asked == "auto":
        if accelerator.kind == "cpu":
            return decide("train.precision", "fp32", "CPUs are fastest and exact in fp32")
        if accelerator.bf16:
            return decide(
                "train.precision",
                "bf16",
                f"{accelerator.name} has bf16: half the memory, fp32's range, no loss scaling",
            )
        return decide("train.precision", "fp16", f"{accelerator.name} has no bf16; fp16 with dynamic loss scaling")
    if asked == "fp16" and not accelerator.fp16:
        raise UserError("train.precision", asked, "DeepSpeed refuses fp16 on a CPU", "use fp32 or auto")
    if asked == "bf16" and accelerator.kind == "cuda" and not accelerator.bf16:
        raise UserError("train.precision", asked, f"{accelerator.name} has no bf16", "use fp16 or auto")
    reason = "as set"
    if asked == "bf16" and accelerator.kind == "cpu" and not accelerator.bf16:
        reason = "as set; this CPU has neither AVX-512 BF16 nor AMX, so expect about 20 times the time of fp32"
    return decide("train.precision", asked, reason, pinned=True)


def choose_accumulation_dtype(config: Config, precision: Precision) -> Decision:
    """fp32 unless set: many small 16-bit gradients added up in 16 bits lose the small ones.

    Raises:
        UserError: (field ``plan.gradient_accumulation_dtype``) a 16-bit format that is not the model's.
    """
    asked, field = config.plan.gradient_accumulation_dtype, "plan.gradient_accumulation_dtype"
    if asked == "auto":
        if precision != "fp32" and config.plan.zero_stage == 0:
            return decide(field, precision, f"ZeRO-0 can only add gradients up in {precision}")
        reason = (
            "sums of many gradients lose their small terms in 16 bits"
            if precision != "fp32"
            else "the gradients are fp32"
        )
        return decide(field, "fp32", reason)
    if asked != "fp32" and asked != precision:
        raise UserError(
            field, asked, f"gradients computed in {precision} cannot be added up in {asked}", f"use fp32 or {precision}"
        )
    return decide(field, asked, "as set", pinned=True)


def choose_global_batch(config: Config, data: DataFacts) -> Decision:
    """Rows per update: about 100 updates an epoch, a power of two, 1 to 64 rows, at least 8 documents."""
    asked, field = config.train.global_batch_size, "train.global_batch_size"
    if asked != "auto":
        return decide(field, asked, "as set", pinned=True)
    documents_per_row = data.documents / data.rows
    wanted = max(data.rows / STEPS_PER_EPOCH_AIM, FEWEST_DOCUMENTS / documents_per_row)
    rows = 1
    while rows * 2 <= wanted and rows < MOST_ROWS:
        rows *= 2
    if rows * documents_per_row < FEWEST_DOCUMENTS and rows < min(MOST_ROWS, data.rows):
        rows *= 2
    rows = max(1, min(rows, MOST_ROWS, data.rows))
    steps = ceil(data.rows / rows)
    return decide(
        field,
        rows,
        f"{steps:,} updates an epoch of {data.rows:,} rows, each of about {rows * documents_per_row:,.0f} documents",
    )


def steps_of(config: Config, data: DataFacts, global_batch_size: int) -> tuple[int, int]:
    """(steps of one epoch, steps of the run)."""
    per_epoch = max(1, ceil(data.rows / global_batch_size))
    total = config.train.max_steps or max(1, ceil(config.train.epochs * data.rows / global_batch_size))
    return per_epoch, total


def choose_learning_rate(config: Config, parameters: int) -> Decision:
    """Peak learning rate by method and size.

    Full fine-tuning with Adam: the larger the model, the smaller the step that does not destroy what it knows
    (5e-4 below 50M, 1e-4 below 300M, 2e-5 below 2B as in Alpaca and the Llama 2 SFT, 1e-5 above as in Tülu and most SFT of
    7B-70B). LoRA takes about ten times as much ("LoRA Without Regret", 2025), 2e-4 being the field's practice at 1-13B and
    1e-4 above (QLoRA, Dettmers et al. 2023, table 9). From random weights: GPT-3's table (Brown et al. 2020, table 2.1).
    SGD has no per-parameter scale: with the gradient's norm clipped to 1 and momentum 0.9, 5e-2 moves the weights about as
    far as Adam does with the values above.
    """
    train, field = config.train, "train.learning_rate"
    if train.learning_rate != "auto":
        return decide(field, train.learning_rate, "as set", pinned=True)
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
    if train.optimizer == "sgd":
        return decide(
            field, 5e-2, "SGD has no per-parameter scale: with clipped gradients it needs a far larger step than Adam"
        )
    if config.from_scratch:
        table = [(50e6, 1e-3), (300e6, 6e-4), (1e9, 3e-4), (5e9, 2e-4), (float("inf"), 1.2e-4)]
        why = "random weights of"
    elif config.method == "lora":
        table = [(50e6, 2e-3), (300e6, 1e-3), (20e9, 2e-4), (float("inf"), 1e-4)]
        why = "LoRA on"
    else:
        table = [(50e6, 5e-4), (300e6, 1e-4), (2e9, 2e-5), (float("inf"), 1e-5)]
        why = "full fine-tuning of"
    rate = next(rate for limit, rate in table if parameters < limit)
    return decide(field, rate, f"{why} {size} parameters; the larger the model, the smaller the step")


def warmup_steps_of(config: Config, total_steps: int) -> int:
    """Steps in which the learning rate rises."""
    return min(total_steps, ceil(config.train.warmup_ratio * total_steps))


def choose_checkpoint_every(config: Config, total_steps: int, step_seconds: float) -> Decision:
    """A bound on lost work: a tenth of the run, or 15 minutes, whichever comes first."""
    asked, field = config.checkpoint.every, "checkpoint.every"
    if asked != "auto":
        return decide(field, asked, "as set", pinned=True)
    by_time = int(15 * 60 / max(step_seconds, 1e-6))
    every = max(1, min(ceil(total_steps / 10), by_time))
    return decide(
        field, every, f"at most {min(every * step_seconds, every * step_seconds) / 60:.1f} minutes of work can be lost"
    )
