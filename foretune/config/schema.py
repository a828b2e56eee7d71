"""What is *wanted*: every key a user may set, with its default and its meaning.

Frozen, strict, unknown keys refused. ``auto`` means "decide for me and say why"; the decision lands in the plan, never
here. Names are DeepSpeed's and Hugging Face's own where they exist.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DataFormat = Literal["auto", "text", "prompt_completion", "instruction", "question_answer", "messages", "conversations"]


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSource(Section):
    """One place that rows come from."""

    path: Annotated[str, Field(min_length=1, description="file, folder, glob, saved data set, or hub data-set id")]
    weight: Annotated[
        float, Field(gt=0, description="how often each document is seen per epoch (0.5 = every other)")
    ] = 1.0
    format: Annotated[DataFormat, Field(description="form of the rows; auto tells it from the columns")] = "auto"
    subset: Annotated[str | None, Field(description="configuration name of a hub data set")] = None
    split: Annotated[str, Field(description="split of a data set")] = "train"


class DataConfig(Section):
    """Where the rows come from and how they become tokens.

    ``data: FILE`` is short for ``data: {sources: [{path: FILE}]}``.
    """

    sources: Annotated[list[DataSource], Field(min_length=1, description="where rows come from")]
    format: Annotated[DataFormat, Field(description="form of the rows of every source that does not say its own")] = (
        "auto"
    )
    train_on_prompt: Annotated[bool, Field(description="also learn the prompt's tokens, not only the answers'")] = False
    chat_template: Annotated[
        str | None, Field(description="path of a Jinja chat template to use instead of the tokenizer's")
    ] = None
    system: Annotated[str | None, Field(description="system message for conversations that have none")] = None
    packing: Annotated[bool, Field(description="pack several documents into a row, isolated from each other")] = True
    deduplicate: Annotated[bool, Field(description="drop documents whose tokens are the same as an earlier one's")] = (
        True
    )
    num_proc: Annotated[PositiveInt | Auto, Field(description="processes that read and tokenise")] = "auto"


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021), used with ``method: lora``."""

    r: Annotated[PositiveInt, Field(description="rank of the adapters")] = 16
    alpha: Annotated[float, Field(gt=0, description="scale of the adapters' output is alpha / r")] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout before the adapters")] = 0.0
    target_modules: Annotated[list[str] | Literal["all-linear"], Field(description="which layers get an adapter")] = (
        "all-linear"
    )


class TrainConfig(Section):
    """The mathematics of training: everything here changes the result, nothing in `plan` does."""

    epochs: Annotated[float, Field(gt=0, description="passes over the data")] = 1.0
    max_steps: Annotated[PositiveInt | None, Field(description="optimizer steps; overrides epochs")] = None
    learning_rate: Annotated[float, Field(gt=0)] | Auto = Field("auto", description="peak learning rate")
    optimizer: Annotated[
        Literal["adamw", "adam", "sgd"], Field(description="adam couples weight decay with the gradient (L2)")
    ] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, description="weight decay of the optimizer")] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of sgd")] = 0.9
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Field(description="learning rate after the warm-up")
    ] = "cosine"
    warmup_ratio: Annotated[
        Fraction, Field(description="share of the steps in which the learning rate rises to its peak")
    ] = 0.03
    max_grad_norm: Annotated[
        float, Field(ge=0, description="clip the global gradient norm to this; 0 does not clip")
    ] = 1.0
    global_batch_size: Annotated[
        PositiveInt | Auto, Field(description="packed rows per optimizer step, over all ranks")
    ] = "auto"
    max_length: Annotated[PositiveInt | Auto, Field(description="tokens per row")] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], Field(description="of forward and backward; master weights are fp32")
    ] = "auto"
    dropout: Annotated[
        Fraction | Literal["model"],
        Field(description="0 by default, so that every layout gives the same update; model keeps the model's own"),
    ] = 0.0
    deterministic: Annotated[bool, Field(description="bit-identical repetition on a GPU, at some cost in speed")] = (
        False
    )


class PlanConfig(Section):
    """Pins: any choice fixed here is kept, and the rest is planned around it."""

    zero_stage: Annotated[Literal["auto", 0, 1, 2, 3], Field(description="ZeRO stage")] = "auto"
    offload_optimizer: Annotated[bool, Field()] | Annotated[float, Field(ge=0, le=1)] | Auto = Field(
        "auto", description="keep optimizer states in host memory: true, false or a ratio"
    )
    offload_optimizer_step: Annotated[
        Literal["auto", "device", "host"],
        Field(description="who steps an offloaded optimizer: device, through which it passes (ZeRO-1), or host"),
    ] = "auto"
    offload_param: Annotated[bool | Auto, Field(description="keep parameters in host memory (stage 3)")] = "auto"
    micro_batch_size_per_gpu: Annotated[PositiveInt | Auto, Field(description="rows per forward pass on one rank")] = (
        "auto"
    )
    gradient_accumulation_steps: Annotated[
        PositiveInt | Auto, Field(description="forward passes per optimizer step")
    ] = "auto"
    gradient_accumulation_dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], Field(description="dtype gradients are summed in")
    ] = "auto"
    checkpointed_layers: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="layers that recompute their activations"
    )
    attention: Annotated[
        Literal["auto", "packed", "sdpa"],
        Field(description="packed: kernels that know where documents end; sdpa: torch's, with a mask"),
    ] = "auto"
    loss_chunk_tokens: Annotated[
        PositiveInt | Auto, Field(description="tokens whose logits exist at the same time")
    ] = "auto"
    mlp_tile_rows: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="rows of an MLP that exist at a time, for long rows; 0 is all of them (not at ZeRO-3)"
    )
    recompute_pointwise: Annotated[
        bool | Auto,
        Field(description="compiled layers make norms' outputs and gated products again instead of keeping them"),
    ] = "auto"
    keep_attention: Annotated[
        bool | Auto,
        Field(description="compiled layers that recompute keep attention's output instead of computing it again"),
    ] = "auto"
    reduce_bucket_size: Annotated[PositiveInt | Auto, Field(description="gradients that are reduced at a time")] = (
        "auto"
    )
    sub_group_size: Annotated[PositiveInt | Auto, Field(description="parameters that ZeRO-3 steps at a time")] = "auto"
    optimizer_dtype: Annotated[
        Literal["auto", "fp32", "bf16", "8bit"],
        Field(
            description="of optimizer states: fp32; or, with allow_numerics, bf16 (master weights too), "
            "8bit (Adam at ZeRO-1, no master weights, bf16 weights rounded by chance)"
        ),
    ] = "auto"
    nvme_path: Annotated[
        str | None, Field(description="folder on a fast disk that may be offloaded to; without it none is")
    ] = None
    fp8: Annotated[
        bool | Auto,
        Field(description="linear maps of the layers in 8-bit floats: other numerics, needs allow_numerics; auto: no"),
    ] = "auto"
    compile: Annotated[bool | Auto, Field(description="compile the layers (GPU; not at ZeRO-3)")] = "auto"
    sum_in_matmul: Annotated[
        bool | Auto,
        Field(description="add weight gradients to their fp32 sums inside the product (GPU, ZeRO-1, full)"),
    ] = "auto"
    fused_mlp: Annotated[
        bool | Auto,
        Field(description="SwiGLU inside the products of MLPs (Hopper with the flash extra; where sums are inside)"),
    ] = "auto"
    fused_qkv: Annotated[
        bool | Auto,
        Field(description="query, key and value by one product (compiled layers; where sums are inside)"),
    ] = "auto"


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: Annotated[
        PositiveInt | Auto, Field(description="steps between checkpoints; auto adapts to what saves and failures cost")
    ] = "auto"
    max_lost_minutes: Annotated[
        float, Field(gt=0, description="of work that a failure may cost, where every is auto")
    ] = 15.0
    keep: Annotated[PositiveInt, Field(description="newest checkpoints to keep")] = 3
    keep_every: Annotated[
        PositiveInt | None, Field(description="also keep every checkpoint whose step is a multiple of this")
    ] = None
    keep_best: Annotated[
        bool, Field(description="also keep the checkpoint with the least held-out loss, which is measured at each save")
    ] = False
    background: Annotated[
        bool, Field(description="copy to host memory and write from there, where it has room for a copy")
    ] = True


class RecoverConfig(Section):
    """What is done when something fails, and how often."""

    restarts_per_hour: Annotated[int, Field(ge=0, description="more failures than this within an hour stop it")] = 10
    hang_seconds: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="no rank moved for so long: a hang; auto adapts to the time of a step"
    )
    passed_over_windows: Annotated[
        int, Field(ge=0, description="data windows with a non-finite or spiking loss to pass over")
    ] = 3
    loss_spike: Annotated[
        float,
        Field(ge=0, description="robust z-score above which a loss, 1.5 times the median too, is a spike; 0 is off"),
    ] = 25.0


class EvaluateConfig(Section):
    """What is measured before and after."""

    validation: Annotated[Fraction, Field(description="share of the documents held out from training")] = 0.02
    tasks: Annotated[list[str], Field(description="names of evaluation tasks beside loss and perplexity")] = []


class Config(Section):
    """A whole run. `model` and `data` are required; everything else has a default."""

    model: Annotated[str, Field(min_length=1, description="hub id, folder, or .gguf file")]
    data: DataConfig
    method: Annotated[Literal["full", "lora"], Field(description="train every weight, or low-rank adapters")] = "full"
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    plan: PlanConfig = PlanConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recover: RecoverConfig = RecoverConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    from_scratch: Annotated[bool, Field(description="random weights in the model's shape")] = False
    trust_remote_code: Annotated[bool, Field(description="run Python code that comes with the model")] = False
    allow_numerics: Annotated[bool, Field(description="let the plan propose choices that change numerics")] = False
