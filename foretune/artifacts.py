"""The nouns that travel the road. Each is a folder or a file with a manifest written last; stages meet in these only.

    Config ──prepare──▶ PreparedDataset ──plan──▶ Plan ──train──▶ Checkpoint ──evaluate──▶ EvaluationReport
                                                                      └──────export──▶ ExportedModel

`RunFolder` says where each stands in RUN/. All are frozen pydantic models with `write` and `read`; reading one that is
missing or of another format is a `UserError`. No torch here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from foretune.errors import UserError

#: Label of a token that is no target (torch's cross-entropy default).
IGNORE_INDEX = -100


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it exists whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable (a rename is only on disk once its folder is)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Artifact(BaseModel):
    """Base of the nouns: frozen, JSON on disk, with a format version that a reader checks."""

    # A validator is built when its class is first used: no verb uses them all, and each takes milliseconds.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    version: int = 1
    file_name: ClassVar[str]

    def write(self, path: Path) -> None:
        """Write as JSON, atomically. `path` is the file itself."""
        write_atomically(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote. Raises `UserError` if it is missing, damaged or of another version."""
        noun = cls.__name__
        if not path.is_file():
            raise UserError(noun, str(path), "there is no such file", "run the stage that makes it, or check the path")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("version") != cls.model_fields["version"].default:
                raise UserError(
                    noun,
                    str(path),
                    f"has format version {values.get('version')}, not {cls.model_fields['version'].default}",
                    "make it again with this version of foretune",
                )
            return cls.model_validate(values)
        except (ValueError, ValidationError, AttributeError) as error:
            raise UserError(noun, str(path), f"is damaged ({error})", "delete it and run the stage again") from None


class SourceSummary(Artifact):
    """What one source gave."""

    path: str
    format: str
    weight: float
    rows_read: int
    documents: int
    columns: list[str]


class RenderedSample(Artifact):
    """A document as text, cut into pieces that are targets and pieces that are not."""

    pieces: list[tuple[str, bool]]
    tokens: int
    target_tokens: int


class PreparedDataset(Artifact):
    """RUN/data/: Arrow shards of documents (`documents/*.arrow`: input_ids, labels list<int32>, not shifted),
    the pack index (`packs.npz`: which slices of them are trained on and which are held out), `tokenizer/`, and this
    manifest, written last.

    A *document* is one text or conversation. A *pack* is a list of documents, or pieces of long texts, that share one
    row of `max_length` tokens.
    """

    file_name: ClassVar[str] = "manifest.json"
    fingerprint: str
    fingerprint_parts: dict[str, str]  # what the fingerprint is made of, so that a change can be named
    max_length: int
    max_length_reason: str
    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    stop_token_ids: list[
        int
    ] = []  # what ends an answer: end of sequence, and the token that the chat template closes a turn with
    chat_template: Literal["tokenizer", "fallback", "file", "none"]
    sources: list[SourceSummary]
    rows_read: int
    documents: int  # kept for training, repeats by weight not counted
    validation_documents: int
    dropped: dict[str, int]  # reason → rows
    duplicates: int
    truncated_documents: int
    truncated_tokens: int
    split_documents: int
    tokens: int  # of one epoch, repeats by weight counted
    target_tokens: int
    validation_tokens: int
    validation_target_tokens: int
    packs: int
    fill: float  # tokens / (packs * max_length)
    longest_document: int
    samples: list[RenderedSample]
    notes: list[str]
    seconds: float


class Accelerator(Artifact):
    """One device of a rank. `memory_bytes` is what a process can use; a CPU's is its share of the host's."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    bf16: bool
    fp16: bool
    peak_flops: float  # dense, per second, in the best 16-bit format (fp32 on a CPU)
    memory_bandwidth: float  # bytes per second
    watts: float = 0.0  # board power; 0 where nobody says


class Cluster(Artifact):
    """The machines that train."""

    accelerator: Accelerator
    nodes: int
    devices_per_node: int  # ranks per node
    host_memory_bytes: int  # of one node, what may be used
    cores_per_node: int
    link_bandwidth: float  # bytes per second between devices of a node
    network_bandwidth: float  # bytes per second between nodes
    host_link_bandwidth: float = 22e9  # bytes per second between a device and its host, each way
    disk_bandwidth: float = 3e9  # bytes per second of a node's disk, for what is offloaded to NVMe
    price_per_hour: float | None = None  # of one device, in whatever currency it was given
    notes: list[str] = []  # what was assumed, or is odd about these machines
    probed: bool

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices_per_node


class Decision(Artifact):
    """One thing that was decided, and why."""

    field: str  # dotted configuration key where there is one
    value: Any
    reason: str
    pinned: bool = False


class Prediction(Artifact):
    """What a strategy is expected to take. Bytes and seconds; per rank unless the name says node."""

    gpu_memory_bytes: int  # peak; on a CPU, of the rank's share of host memory
    gpu_memory_parts: dict[str, int]
    host_memory_bytes_per_node: int
    checkpoint_bytes: int
    disk_bytes: int
    step_seconds: float
    tokens_per_second: float
    total_seconds: float
    peak_phase: str = ""  # of a step, in which the device holds most
    host_memory_parts: dict[str, int] = {}  # of a node; sum to host_memory_bytes_per_node
    step_parts: dict[str, float] = {}  # seconds; sum to step_seconds
    mfu: float | None = None  # model FLOP (no recomputation) over the devices' peak
    energy_kwh: float | None = None  # of the whole training at board power; with a price only
    cost: float | None = None  # of the whole training, in the currency of the price


class Derivation(Artifact):
    """One line of arithmetic: ``4ψt/N = 4 · 494,032,768 / 8 = 247,016,384 bytes``."""

    part: str  # of the prediction that it adds to
    formula: str
    numbers: str
    value: int  # bytes
    source: str = ""  # paper and section, or where it was measured


class Alternative(Artifact):
    """A strategy that lost, with the figure that made it lose."""

    name: str
    reason: str
    prediction: Prediction | None = None


def layout_name(world_size: int, zero_stage: int) -> str:
    """``2 ranks at ZeRO-3``."""
    return f"{world_size} rank{'s' if world_size != 1 else ''} at ZeRO-{zero_stage}"


def strategy_name(
    zero_stage: int, *, offload_optimizer: float, streamed: bool, offload_param: bool, nvme: bool, optimizer_dtype: str
) -> str:
    """A strategy as people say it, without the batch: ``ZeRO-1 + 85% of the optimizer streamed from host memory``."""
    parts, place = [f"ZeRO-{zero_stage}"], "NVMe" if nvme else "host memory"
    if offload_optimizer:
        share = "" if offload_optimizer == 1 else f"{offload_optimizer:.0%} of the "
        parts.append(f"{share}optimizer {'streamed from' if streamed else 'in'} {place}")
    if offload_param:
        parts.append(f"parameters in {place}")
    if optimizer_dtype != "fp32":
        parts.append({"bf16": "bf16 optimizer", "8bit": "8-bit optimizer"}[optimizer_dtype])
    return " + ".join(parts)


class Plan(Artifact):
    """Everything decided before anything runs. The worker reads this and decides nothing."""

    file_name: ClassVar[str] = "plan.json"
    model: str  # resolved folder
    method: Literal["full", "lora"]
    parameters: int
    trainable_parameters: int
    cluster: Cluster
    world_size: int
    precision: Literal["fp32", "bf16", "fp16"]
    zero_stage: Literal[0, 1, 2, 3]
    offload_optimizer: float  # share of the optimizer states in host memory, 0 to 1
    offload_optimizer_step: Literal["device", "host"] = "host"  # who steps them: device: they pass through it (ZeRO-1)
    offload_param: bool
    micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    gradient_accumulation_dtype: Literal["fp32", "bf16", "fp16"]
    checkpointed_layers: int
    loss_chunk_tokens: int  # tokens per piece of the linear cross-entropy; logits never whole
    attention: Literal["packed", "sdpa"] = "sdpa"  # packed: kernels that know where documents end
    compile_layers: bool = False
    sum_in_matmul: bool = False  # weight gradients are added to their fp32 sums inside the product
    fused_mlp: bool = False  # gated MLPs with their activation inside the products
    fused_qkv: bool = False  # query, key and value by one product
    vectors_apart: bool = False  # the optimizer has a group for vectors, decay or not; a training keeps its groups
    mlp_tile_rows: int = 0  # rows of an MLP that exist at a time; 0: all
    recompute_pointwise: bool = False  # compiled layers make norms' outputs and gated products again in backward
    keep_attention: bool = False  # compiled layers that recompute keep attention's output
    fp8: bool = False  # linear maps of the layers in 8-bit floats: other numerics
    global_batch_size: int
    max_length: int
    packing: bool
    learning_rate: float
    optimizer: Literal["adamw", "adam", "sgd"]
    schedule: Literal["cosine", "linear", "constant"]
    warmup_steps: int
    total_steps: int
    steps_per_epoch: int
    checkpoint_every: int
    deepspeed_config: dict[str, Any]
    decisions: list[Decision]
    predicted: Prediction
    rejected: list[Alternative]
    optimizer_dtype: Literal["fp32", "bf16", "8bit"] = "fp32"  # of optimizer states, and of master weights if any
    arithmetic: list[Derivation] = []  # how the predicted memory comes about, symbol by symbol
    replanned: bool = False  # changed after the device ran out of memory: what is predicted is of the plan before

    @property
    def streams_optimizer(self) -> bool:
        """Whether states in host memory pass through the device to be stepped (`foretune.engine.states.streaming`)."""
        return self.offload_optimizer > 0 and self.offload_optimizer_step == "device"

    @property
    def keeps_states_apart(self) -> bool:
        """Whether a checkpoint has optimizer states in files of ours, which only the layout that saved them reads."""
        in_part = 0 < self.offload_optimizer < 1 and not self.streams_optimizer
        return self.optimizer_dtype == "8bit" or in_part

    @property
    def strategy_name(self) -> str:
        """As people say it: `strategy_name`."""
        return strategy_name(
            self.zero_stage,
            offload_optimizer=self.offload_optimizer,
            streamed=self.streams_optimizer,
            offload_param=self.offload_param,
            nvme=self.swaps_to_nvme,
            optimizer_dtype=self.optimizer_dtype,
        )

    @property
    def swaps_to_nvme(self) -> bool:
        """Whether what is offloaded lies on NVMe, not in host memory."""
        zero = self.deepspeed_config.get("zero_optimization", {})
        return bool(zero.get("offload_optimizer", {}).get("device") == "nvme")


class RankFile(Artifact):
    """One file of a checkpoint."""

    sha256: str
    bytes: int


class Checkpoint(Artifact):
    """RUN/checkpoints/step-00000120/: per-rank files and this manifest, written before the folder is renamed."""

    file_name: ClassVar[str] = "manifest.json"
    step: int
    world_size: int
    zero_stage: int
    precision: str
    method: str
    fingerprint: str  # of the prepared data the step count refers to
    train_state: dict[str, Any]
    files: dict[str, RankFile]  # relative path → hash and size
    held_out_loss: float | None = None  # nats per target token; with checkpoint.keep_best only
    held_out_rows: int | None = None  # that it is of
    vectors_apart: bool = False  # as in `Plan`

    @property
    def layout(self) -> str:
        """What the engine's files are cut for, for people: `layout_name`."""
        return layout_name(self.world_size, self.zero_stage)


class LossEstimate(Artifact):
    """Mean loss over target tokens (nats), its perplexity, and a 95 % bootstrap interval of the loss."""

    loss: float
    perplexity: float
    interval: tuple[float, float]


class GenerationSample(Artifact):
    """The same prompt answered before and after."""

    prompt: str
    reference: str
    base: str | None
    tuned: str


class EvaluationReport(Artifact):
    """RUN/evaluation.json: base against tuned on the same tokens."""

    file_name: ClassVar[str] = "evaluation.json"
    data: str
    documents: int
    target_tokens: int
    base: LossEstimate | None
    tuned: LossEstimate
    difference: float | None  # tuned - base loss; negative is better
    difference_interval: tuple[float, float] | None  # paired bootstrap over documents, 95 %
    tasks: dict[str, dict[str, float]]
    samples: list[GenerationSample]
    step: int | None = None  # of the checkpoint that was evaluated; None for a model that is no run's
    documents_available: int | None = None  # more than `documents` if only some were scored
    notes: list[str] = []  # what a reader of the figures must know


class ExportedModel(Artifact):
    """RUN/export/: a Hugging Face folder; this manifest (written last) says that it was verified, and how."""

    file_name: ClassVar[str] = "foretune.json"
    kind: Literal["full", "merged", "adapter"]
    step: int
    parameters: int
    dtype: str
    max_logit_difference: float
    logit_tolerance: float
    mean_divergence: float = 0.0  # KL(training ‖ export) over the reference positions, nats
    divergence_tolerance: float = 0.0
    eos_token_ids: list[int] = []
    chat_template_sha256: str | None
    files: dict[str, RankFile]


class Outcome(Artifact):
    """RUN/launch/outcome-00000.json: how one rank ended. Ranks speak by file, since torchrun knows 0 and 1 only."""

    status: Literal["done", "preempted", "user_error", "machine_fault", "bug"]
    step: int | None = None
    cause: str | None = None
    kind: str | None = None  # of a machine's fault: a `foretune.launch.failures.Cause`
    field: str | None = None  # of a user error, as are the next three
    value: str | None = None
    problem: str | None = None
    mend: str | None = None
    traceback: str | None = None

    @classmethod
    def of_user_error(cls, error: UserError) -> Outcome:
        """The outcome of a rank that met a user's mistake."""
        return cls(
            status="user_error", field=error.field, value=str(error.value), problem=error.problem, mend=error.mend
        )


class RunFolder:
    """Where each artifact of a run stands. Private to its owner: data and logs may hold what is not for everyone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.model = path / "model"  # only for a model that had to be converted (a .gguf file)
        self.data = path / "data"
        self.plan = path / Plan.file_name
        self.deepspeed_config = path / "deepspeed.json"
        self.events = path / "events.jsonl"
        self.checkpoints = path / "checkpoints"
        self.evaluation = path / EvaluationReport.file_name
        self.export = path / "export"
        self.report = path / "report.html"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.launch = path / "launch"  # of the present launch: outcomes of ranks, the stop request
        self.saving = self.launch / "saving"  # a snapshot in memory that is to be written to disk
        self.passed_over = path / "passed_over.json"  # steps whose data went wrong; a decision that outlives a launch
        self.packing = self.launch / "packing"  # what a launch of this command found out about the model
        self.stop_request = self.launch / "stop"  # its existence asks the ranks to finish their step, save and end

    def outcome_of(self, rank: int) -> Path:
        """The file in which a rank says how it ended."""
        return self.launch / f"outcome-{rank:05d}.json"

    def log_of(self, rank: int) -> Path:
        """What a rank printed."""
        return self.logs / f"rank-{rank:05d}.log"

    def passed_over_steps(self) -> frozenset[int]:
        """Step numbers (from 0) whose data is not trained on."""
        return frozenset(json.loads(self.passed_over.read_text()) if self.passed_over.is_file() else ())

    def pass_over(self, step: int) -> None:
        """Decide that the data of step number `step` is never trained on."""
        write_atomically(self.passed_over, json.dumps(sorted({*self.passed_over_steps(), step})) + "\n")

    def packing_found(self) -> bool | None:
        """Whether rows may be packed, if an earlier launch of this command has tried it."""
        return self.packing.read_text() == "yes" if self.packing.is_file() else None

    def write_plan(self, plan: Plan) -> None:
        """Write the plan, and before it DeepSpeed's configuration as a file of its own."""
        write_atomically(self.deepspeed_config, json.dumps(plan.deepspeed_config, indent=2) + "\n")
        plan.write(self.plan)

    def heartbeat_of(self, rank: int) -> Path:
        """Where a rank says what it is doing."""
        return self.launch / f"heartbeat-{rank:05d}"

    def stack_of(self, rank: int) -> Path:
        """Python stacks of a rank, written when it hangs."""
        return self.logs / f"stack-{rank:05d}.txt"

    def create(self) -> None:
        """Make the folder, readable by its owner alone."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)

    @classmethod
    def is_run(cls, path: Path) -> bool:
        """Whether a path is a run folder (rather than a model)."""
        return (path / "config.yaml").is_file()
