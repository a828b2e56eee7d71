"""What is to be computed, decided: precision, batch, rates, steps, and how often to save. Each with its reason.

None of it depends on how many devices there are (the precision excepted, which the hardware decides): a plan may change
the layout, never the update. What a user has set is checked and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from foretune.artifacts import Cluster, Decision, PreparedDataset
from foretune.checkpoint.interval import SAVING_SHARE
from foretune.config import Config
from foretune.errors import UserError
from foretune.model.shape import ModelShape
from foretune.planning.strategy import Precision, Workload

#: Without data: a number of tokens that is stated, not known.
ASSUMED_TOKENS = 10_000_000
ASSUMED_MAX_LENGTH = 2048
STEPS_PER_EPOCH_AIM = 100
MOST_ROWS = 64
FEWEST_DOCUMENTS = 8
#: Documents are of one length if the longest is no longer than the mean, up to this.
_EQUAL = 0.01

#: Rows that are not packed are padded to the longest of their micro-batch.
_PADDED = 1.25

#: A checkpoint is written, synced and hashed at about this rate (measured: 0.1 to 0.4 GB/s on virtual disks).
SAVING_BYTES_PER_SECOND = 0.3e9


@dataclass(frozen=True)
class DataEstimate:
    """Of data that is not prepared, from a sample of its rows."""

    tokens: int
    documents: int
    longest: int  # of the sampled documents
    sampled: int
    source: str  # how it was estimated


@dataclass(frozen=True)
class DataFacts:
    """What the plan knows of the data: measured where there is a prepared set, assumed (and said so) where not."""

    max_length: int
    packs: int  # rows of one epoch when packed; a global batch is counted in these, packed or not
    documents: int
    tokens: int
    document_length: float  # mean, at most max_length
    length_reason: str
    source: str
    equal_documents: bool = False


@dataclass(frozen=True)
class Mathematics:
    """What is to be computed: it gives the same update on any number of devices."""

    data: DataFacts
    precision: Decision
    accumulation: Decision  # the format gradients are summed in
    batch: Decision  # rows of a step
    rate: Decision
    steps_per_epoch: int
    total_steps: int

    @property
    def decisions(self) -> list[Decision]:
        length = decide("train.max_length", self.data.max_length, self.data.length_reason)
        return [self.precision, self.accumulation, self.batch, length, self.rate]

    @property
    def tokens_of_step(self) -> float:
        tokens: float = self.batch.value * self.data.tokens / self.data.packs
        return tokens

    def with_16_bit_sums(self) -> Mathematics:
        """For masters in bf16."""
        reason = "a bf16 master is stepped with bf16 gradients"
        return replace(self, accumulation=decide(self.accumulation.field, self.precision.value, reason))

    def plan_fields(self, config: Config) -> dict[str, Any]:
        """Fields of `Plan` that say what."""
        return {
            "precision": self.precision.value,
            "gradient_accumulation_dtype": self.accumulation.value,
            "global_batch_size": self.batch.value,
            "max_length": self.data.max_length,
            "packing": config.data.packing,
            "learning_rate": self.rate.value,
            "optimizer": config.train.optimizer,
            "schedule": config.train.schedule,
            "warmup_steps": warmup_steps_of(config, self.total_steps),
            "total_steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
        }


def decide_mathematics(
    config: Config,
    shape: ModelShape,
    cluster: Cluster,
    prepared: PreparedDataset | None,
    *,
    tokens: int | None,
    estimate: DataEstimate | None,
) -> Mathematics:
    """Everything that changes the result. Raises: UserError, as the functions below."""
    data = data_facts(config, shape, prepared, tokens, estimate)
    precision = choose_precision(config, cluster)
    batch = choose_global_batch(config, data)
    per_epoch, total = steps_of(config, data, batch.value)
    return Mathematics(
        data=data,
        precision=precision,
        accumulation=choose_accumulation_dtype(config, precision.value),
        batch=batch,
        rate=choose_learning_rate(config, shape.parameters),
        steps_per_epoch=per_epoch,
        total_steps=total,
    )


def workload_of(config: Config, shape: ModelShape, wanted: Mathematics) -> Workload:
    """The work of one step."""
    precision, accumulation = wanted.precision.value, wanted.accumulation.value
    return workload(
        config, shape, wanted.data, precision=precision, accumulation=accumulation, packs=wanted.batch.value
    )


def workload(
    config: Config, shape: ModelShape, data: DataFacts, *, precision: Precision, accumulation: Precision, packs: int
) -> Workload:
    """The work of one step of this configuration."""
    if config.method == "lora":
        trainable, frozen = shape.lora_parameters(config.lora.r, config.lora.target_modules), shape.parameters
    else:
        trainable, frozen = shape.parameters, 0
    packing = config.data.packing
    states = 8 if config.train.optimizer != "sgd" else (4 if config.train.momentum else 0)
    return Workload(
        shape=shape,
        trainable=trainable,
        frozen=frozen,
        lora_rank=config.lora.r if frozen else 0,
        precision=precision,
        accumulation_dtype=accumulation,
        optimizer_state_bytes=states,
        max_length=data.max_length,
        row_length=float(data.max_length) if packing else min(data.max_length, _PADDED * data.document_length),
        rows=packs if packing else ceil(packs * data.documents / data.packs),
        document_length=data.document_length,
        packing=packing,
        equal_documents=data.equal_documents,
    )


def decide(config_field: str, value: Any, reason: str, *, pinned: bool = False) -> Decision:
    """A decision about a dotted key."""
    return Decision(field=config_field, value=value, reason=reason, pinned=pinned)


def data_facts(
    config: Config,
    shape: ModelShape,
    prepared: PreparedDataset | None,
    tokens: int | None,
    estimate: DataEstimate | None = None,
) -> DataFacts:
    """Lengths and counts, from the prepared set or assumed.

    Raises:
        UserError: (field ``train.max_length``) longer than learned positions reach, or not what the data has.
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
        length = min(float(prepared.max_length), max(1.0, prepared.tokens / documents))
        source = f"measured: {prepared.tokens:,} tokens in {documents:,} documents"
        reason = prepared.max_length_reason
        equal = length >= (1 - _EQUAL) * prepared.max_length
        return DataFacts(
            prepared.max_length, max(1, prepared.packs), documents, prepared.tokens, length, reason, source, equal
        )
    max_length = asked if asked != "auto" else min(ASSUMED_MAX_LENGTH, shape.context_length)
    if estimate is not None:
        return _estimated_facts(estimate, max_length, as_set=asked != "auto")
    count = tokens if tokens is not None else ASSUMED_TOKENS
    packs = max(1, ceil(count / max_length))
    source = "as given" if tokens is not None else "no data given: assumed"
    reason = "as set" if asked != "auto" else f"no data given: {ASSUMED_MAX_LENGTH}, or the model's context if shorter"
    told = f"{count:,} tokens an epoch, {source}"
    return DataFacts(max_length, packs, packs, count, float(max_length), reason, told, equal_documents=True)


def _estimated_facts(estimate: DataEstimate, max_length: int, *, as_set: bool) -> DataFacts:
    """Rows are taken to be packed full, long texts to be cut into rows; the mean length is that of the sample."""
    packs = max(1, ceil(estimate.tokens / max_length))
    documents = max(packs if estimate.tokens > estimate.documents * max_length else 1, estimate.documents)
    length = min(float(max_length), max(1.0, estimate.tokens / documents))
    reason = "as set" if as_set else f"the model's context, {ASSUMED_MAX_LENGTH} at most, until the data is prepared"
    equal = estimate.longest <= (1 + _EQUAL) * length
    return DataFacts(max_length, packs, documents, estimate.tokens, length, reason, estimate.source, equal)


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
    if asked not in ("fp32", precision):
        raise UserError(
            field, asked, f"gradients computed in {precision} cannot be added up in {asked}", f"use fp32 or {precision}"
        )
    return decide(field, asked, "as set", pinned=True)


def choose_global_batch(config: Config, data: DataFacts) -> Decision:
    """Rows per update: about 100 updates an epoch, a power of two, 1 to 64 rows, at least 8 documents."""
    asked, field = config.train.global_batch_size, "train.global_batch_size"
    if asked != "auto":
        return decide(field, asked, "as set", pinned=True)
    documents_per_row = data.documents / data.packs
    wanted = max(data.packs / STEPS_PER_EPOCH_AIM, FEWEST_DOCUMENTS / documents_per_row)
    rows = 1
    while 2 * rows <= min(MOST_ROWS, data.packs):
        if 2 * rows > wanted and rows * documents_per_row >= FEWEST_DOCUMENTS:
            break
        rows *= 2
    steps = ceil(data.packs / rows)
    return decide(
        field,
        rows,
        f"{steps:,} updates an epoch of {data.packs:,} packed rows, each {rows * documents_per_row:,.0f} documents",
    )


def steps_of(config: Config, data: DataFacts, global_batch_size: int) -> tuple[int, int]:
    """(steps of one epoch, steps of the run). The last batch of an epoch may be smaller: batches never span epochs."""
    per_epoch = max(1, ceil(data.packs / global_batch_size))
    total = config.train.max_steps or max(1, ceil(config.train.epochs * per_epoch))
    return per_epoch, total


def choose_learning_rate(config: Config, parameters: int) -> Decision:
    """Peak learning rate by method and size.

    Full fine-tuning with Adam: the larger the model, the smaller the step that does not destroy what it knows. 5e-4
    below 50M and 1e-4 below 300M (small models forget little and learn slowly), 2e-5 below 2B (Alpaca; Llama 2's SFT),
    1e-5 above (most SFT of 7B-70B). LoRA wants about ten times as much (Schulman et al. 2025, "LoRA Without Regret"):
    2e-4 is the field's practice up to 20B, 1e-4 above (QLoRA, Dettmers et al. 2023). From random weights: GPT-3's table
    (Brown et al. 2020, table 2.1). SGD has no scale per parameter: with the gradient's norm clipped to 1 and momentum
    0.9, 5e-2 moves the weights about as far per step as Adam does with the values above (lr · sqrt(parameters) / 10).
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


def choose_checkpoint_every(
    config: Config, total_steps: int, *, step_seconds: float, checkpoint_bytes: int
) -> Decision:
    """A bound on lost work, as far as it is worth its price; training adapts it to what its saves and failures cost.

    A tenth of the run or `checkpoint.max_lost_minutes`, whichever comes first, but never so often that saving takes
    more than `SAVING_SHARE` of the time. (A 0.5B model's 8 GB, saved every third step of 0.3 s, took 99 % of a run on
    an H100.)
    """
    asked, field = config.checkpoint.every, "checkpoint.every"
    if asked != "auto":
        return decide(field, asked, "as set", pinned=True)
    step_seconds = max(step_seconds, 1e-6)
    minutes = config.checkpoint.max_lost_minutes
    by_loss = max(1, min(ceil(total_steps / 10), int(minutes * 60 / step_seconds)))
    save_seconds = checkpoint_bytes / SAVING_BYTES_PER_SECOND
    by_price = ceil(save_seconds / (SAVING_SHARE * step_seconds))
    every = min(total_steps, max(by_loss, by_price))
    lost = every * step_seconds
    bound = f"{lost / 60:.0f} minutes" if lost >= 120 else f"{lost:.0f} seconds"
    if by_price > by_loss:
        why = f"saving {checkpoint_bytes / 1e9:.1f} GB takes about {save_seconds:.0f} s"
        limit = f"is to take {SAVING_SHARE:.0%} of the time at most"
        return decide(field, every, f"{why}, and {limit}: up to {bound} of work can be lost")
    return decide(
        field,
        every,
        f"a tenth of the run or {minutes:g} minutes, whichever is less: at most {bound} of work can be lost",
    )
