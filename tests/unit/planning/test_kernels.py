"""Attention and compiling: chosen with a reason, refused where they cannot be."""

from importlib import metadata

import pytest

from foretune.artifacts import Plan
from foretune.config import load_config
from foretune.errors import UserError
from foretune.planning import kernels
from foretune.planning.machines.hardware import parse_hardware
from foretune.planning.planner import make_plan


def plan(hardware: str, *settings: str, tokens: int = 100_000_000, model: str = "Qwen/Qwen2.5-0.5B") -> Plan:
    config = load_config(flags={"model": model, "data": "x.jsonl"}, settings=list(settings))
    return make_plan(config, model_folder=model, cluster=parse_hardware(hardware), prepared=None, tokens=tokens)


def reason_of(made: Plan, field: str) -> str:
    return next(decision.reason for decision in made.decisions if decision.field == field)


def test_a_gpu_gets_packed_attention_and_compiled_layers() -> None:
    made = plan("1xH100-80GB")
    assert made.attention == "packed"
    assert made.compile_layers
    assert "share rows" in reason_of(made, "plan.attention")


def test_gradients_are_summed_inside_the_product_where_fp32_sums_lie_apart() -> None:
    assert plan("1xH100-80GB").sum_in_matmul
    for settings in (["plan.zero_stage=2"], ["plan.gradient_accumulation_dtype=bf16"], ["method=lora"]):
        made = plan("1xH100-80GB", *settings)
        assert not made.sum_in_matmul, settings
        assert reason_of(made, "plan.sum_in_matmul")
    assert not plan("1xH100-80GB", "plan.sum_in_matmul=false").sum_in_matmul


@pytest.mark.parametrize(
    ("version", "probed", "card", "model", "known"),
    [
        ("4.0.0b36", True, "1xH100-80GB", "Qwen/Qwen2.5-1.5B", True),
        ("4.0.0b36", False, "1xH100-80GB", "Qwen/Qwen2.5-1.5B", False),  # a machine that is described, not this one
        ("5.0", True, "1xH100-80GB", "Qwen/Qwen2.5-1.5B", False),
        (None, True, "1xH100-80GB", "Qwen/Qwen2.5-1.5B", False),
        ("4.0.0b36", True, "1xA100-80GB", "Qwen/Qwen2.5-1.5B", False),
        ("4.0.0b36", True, "1xH100-80GB", "microsoft/phi-2", False),  # heads of 80
    ],
)
def test_flash_attention_4_is_counted_where_it_will_be_used(
    version: str | None, *, probed: bool, card: str, model: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if name != "flash-attn-4" or version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(kernels.metadata, "version", installed)
    config = load_config(flags={"model": model, "data": "rows.jsonl"}, settings=["train.max_length=2048"])
    cluster = parse_hardware(card)
    with_it, without = (
        make_plan(config, model_folder=model, cluster=cluster.model_copy(update={"probed": one}), prepared=None)
        for one in (probed, False)
    )
    assert ("FlashAttention-4" in reason_of(with_it, "plan.attention")) == known
    assert (with_it.predicted.step_seconds < without.predicted.step_seconds) == known


def test_the_planner_knows_which_version_and_heads_are_used() -> None:
    from foretune.model import flash_attention_4

    assert kernels.FLASH_ATTENTION_4 == flash_attention_4.VERSION
    assert kernels.FLASH_ATTENTION_4_HEADS == flash_attention_4._HEADS

    from foretune.model import quack_kernels

    assert kernels.QUACK == quack_kernels.VERSIONS
    assert kernels.QUACK_ALIGNMENT == quack_kernels.ALIGNMENT


def with_quack(card: str, *settings: str, model: str = "Qwen/Qwen2.5-1.5B", vectors_apart: bool | None = None) -> Plan:
    """A long run's plan for this machine, were it that card with QuACK installed."""
    rows = ["train.max_length=4096", "train.global_batch_size=32", "train.max_steps=10000"]
    config = load_config(flags={"model": model, "data": "rows.jsonl"}, settings=[*rows, *settings])
    cluster = parse_hardware(card).model_copy(update={"probed": True})
    return make_plan(config, model_folder=model, cluster=cluster, prepared=None, vectors_apart=vectors_apart)


@pytest.fixture
def _quack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.metadata, "version", {**kernels.QUACK, "flash-attn-4": "none"}.__getitem__)


@pytest.mark.usefixtures("_quack")
def test_mlps_are_fused_where_quack_is_and_sums_are_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the plan knows what it saves: time; the MLP's product; the second copy of a chunk's logits."""
    rows = "plan.micro_batch_size_per_gpu=4"
    made = with_quack("1xH100-80GB", rows)
    apart = with_quack("1xH100-80GB", rows, "plan.fused_mlp=false")
    assert (made.fused_mlp, made.sum_in_matmul, apart.fused_mlp) == (True, True, False)
    assert "QuACK" in reason_of(made, "plan.fused_mlp")
    assert made.predicted.step_seconds < 0.97 * apart.predicted.step_seconds
    assert made.predicted.gpu_memory_bytes < apart.predicted.gpu_memory_bytes
    monkeypatch.setattr(kernels, "QUACK", {"quack-kernels": "0"})
    without = with_quack("1xH100-80GB", rows)
    assert not without.fused_mlp
    assert "flash extra" in reason_of(without, "plan.fused_mlp")
    assert apart.predicted.step_seconds < without.predicted.step_seconds  # the softmax of the loss


@pytest.mark.usefixtures("_quack")
@pytest.mark.parametrize(
    ("card", "model", "settings", "why"),
    [
        ("1xA100-80GB", "Qwen/Qwen2.5-1.5B", [], "Hopper"),
        ("1xH100-80GB", "gpt2", ["train.max_length=1024"], "not SwiGLU"),
        ("1xH100-80GB", "Qwen/Qwen2.5-1.5B", ["plan.sum_in_matmul=false"], "not summed inside"),
        ("1xH100-80GB", "Qwen/Qwen2.5-1.5B", ["plan.zero_stage=2"], "not summed inside"),
        ("1xH100-80GB", "Qwen/Qwen2.5-1.5B", ["method=lora"], "not summed inside"),
        ("1xH100-80GB", "Qwen/Qwen2.5-1.5B", ["plan.compile=false"], "not compiled"),
        ("1xH100-80GB", "Qwen/Qwen2.5-1.5B", ["plan.mlp_tile_rows=1024"], "not summed inside"),
    ],
)
def test_mlps_that_are_not_fused(card: str, model: str, settings: list[str], why: str) -> None:
    made = with_quack(card, *settings, model=model)
    assert not made.fused_mlp
    assert why in reason_of(made, "plan.fused_mlp")
    with pytest.raises(UserError) as caught:
        with_quack(card, *settings, "plan.fused_mlp=true", model=model)
    assert caught.value.field == "plan.fused_mlp"
    assert caught.value.mend


@pytest.mark.usefixtures("_quack")
def test_mlps_of_small_micro_batches_are_fused_if_asked() -> None:
    small = ["plan.micro_batch_size_per_gpu=1", "plan.checkpointed_layers=0"]
    made = with_quack("1xH100-80GB", *small)
    assert not made.fused_mlp
    assert "16,384 tokens" in reason_of(made, "plan.fused_mlp")
    assert with_quack("1xH100-80GB", *small, "plan.fused_mlp=true").fused_mlp


@pytest.mark.usefixtures("_quack")
def test_runs_too_short_for_these_kernels_go_without() -> None:
    """50 s to compile them, once, beside 15 s for the layers; what is asked for is done."""
    long, short = with_quack("1xH100-80GB"), with_quack("1xH100-80GB", "train.max_steps=200")
    shortest = with_quack("1xH100-80GB", "train.max_steps=5")
    assert (long.compile_layers, long.fused_mlp) == (True, True)
    assert (short.compile_layers, short.fused_mlp) == (True, False)
    assert "50 s to compile" in reason_of(short, "plan.fused_mlp")
    assert (shortest.compile_layers, shortest.fused_mlp) == (False, False)
    assert "too short" in reason_of(shortest, "plan.fused_mlp")
    asked = with_quack("1xH100-80GB", "train.max_steps=5", "plan.fused_mlp=true")
    assert (asked.compile_layers, asked.fused_mlp) == (True, True)
    # Its figures are those of what it does, however short the run.
    assert asked.predicted.step_seconds == with_quack("1xH100-80GB", "plan.fused_mlp=true").predicted.step_seconds


@pytest.mark.usefixtures("_quack")
def test_fused_mlps_that_are_asked_for_narrow_the_search() -> None:
    made = with_quack("4xH100-80GB", "plan.fused_mlp=true", model="Qwen/Qwen2.5-7B")
    assert (made.zero_stage, made.sum_in_matmul, made.fused_mlp) == (1, True, True)


def test_what_does_not_pay_is_not_done() -> None:
    short = plan("1xH100-80GB", tokens=1_000_000)
    assert not short.compile_layers
    assert "would save" in reason_of(short, "plan.compile")
    apart = plan("1xH100-80GB", "data.packing=false")
    assert apart.attention == "sdpa"
    sharded = plan("1xH100-80GB", "plan.zero_stage=3")
    assert not sharded.compile_layers
    assert "ZeRO-3" in reason_of(sharded, "plan.compile")


def test_what_is_asked_for_is_kept() -> None:
    made = plan("1xH100-80GB", "plan.attention=sdpa", "plan.compile=true", tokens=1_000_000)
    assert made.attention == "sdpa"
    assert made.compile_layers


def test_a_cpu_gets_neither() -> None:
    made = plan("2xcpu,ram=64GB", tokens=100_000)
    assert made.attention == "sdpa"
    assert not made.compile_layers
    assert "CUDA" in reason_of(made, "plan.attention")


@pytest.mark.parametrize(
    ("hardware", "settings", "field"),
    [
        ("2xcpu,ram=64GB", ["plan.attention=packed"], "plan.attention"),
        ("1xH100-80GB", ["plan.attention=packed", "train.precision=fp32"], "plan.attention"),
        ("1xH100-80GB", ["plan.attention=packed", "train.dropout=model"], "plan.attention"),
        ("2xcpu,ram=64GB", ["plan.compile=true"], "plan.compile"),
        ("2xcpu,ram=64GB", ["plan.sum_in_matmul=true"], "plan.sum_in_matmul"),
        ("1xH100-80GB", ["plan.sum_in_matmul=true", "plan.zero_stage=2"], "plan.sum_in_matmul"),
        ("1xH100-80GB", ["plan.compile=true", "plan.zero_stage=3"], "plan.compile"),
    ],
)
def test_what_cannot_be_is_refused(hardware: str, settings: list[str], field: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(hardware, *settings, tokens=1_000_000)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("hardware", "model", "settings"),
    [
        ("1xH100-80GB", "gpt2", []),
        ("1xH100-80GB", "Qwen/Qwen2.5-0.5B", ["allow_numerics=true", "plan.fp8=true", "plan.zero_stage=1"]),
    ],
    ids=["Conv1D", "fp8"],
)
def test_nothing_is_summed_inside_products_that_do_not_sum(hardware: str, model: str, settings: list[str]) -> None:
    made = plan(hardware, *settings, model=model)
    assert made.zero_stage == 1
    assert not made.sum_in_matmul
    apart = plan(hardware, *settings, "plan.sum_in_matmul=false", model=model)
    assert made.predicted.step_seconds == apart.predicted.step_seconds
    with pytest.raises(UserError, match=r"Conv1D|plan\.fp8") as caught:
        plan(hardware, *settings, "plan.sum_in_matmul=true", model=model)
    assert (caught.value.field, caught.value.value) == ("plan.sum_in_matmul", True)
    assert caught.value.mend


def test_sums_that_are_asked_for_narrow_the_search() -> None:
    made = plan("4xH100-80GB", "plan.sum_in_matmul=true", model="Qwen/Qwen2.5-7B")
    assert (made.zero_stage, made.sum_in_matmul) == (1, True)
    rows = ["train.max_length=262144", "train.global_batch_size=1"]
    assert plan("1xH100-80GB", *rows, model="Qwen/Qwen2.5-1.5B").mlp_tile_rows
    untiled = plan("1xH100-80GB", *rows, "plan.sum_in_matmul=true", model="Qwen/Qwen2.5-1.5B")
    assert (untiled.mlp_tile_rows, untiled.sum_in_matmul) == (0, True)
    with pytest.raises(UserError, match="tiles") as caught:
        plan("1xH100-80GB", "plan.sum_in_matmul=true", "plan.mlp_tile_rows=4096")
    assert caught.value.field == "plan.sum_in_matmul"


def test_eight_bits_that_are_asked_for_narrow_the_search() -> None:
    machine, model = "8xRTX4090,ram=512GB", "Qwen/Qwen2.5-7B"
    free = plan(machine, model=model)
    assert free.zero_stage == 3
    made = plan(machine, "allow_numerics=true", "plan.optimizer_dtype=fp32", "plan.fp8=true", model=model)
    assert made.zero_stage < 3
    assert made.fp8
    for pins in (["plan.offload_param=true"], ["plan.offload_optimizer=0.5", "plan.offload_optimizer_step=host"]):
        with pytest.raises(UserError, match="whole weights") as caught:
            plan(machine, "allow_numerics=true", "plan.fp8=true", *pins, model=model)
        assert caught.value.field == "plan.fp8"


def test_pointwise_values_made_again_are_planned_where_they_pay() -> None:
    free = plan("1xH100-80GB", model="Qwen/Qwen2.5-1.5B")
    assert (free.checkpointed_layers, free.recompute_pointwise) == (0, False)
    assert "fits" in reason_of(free, "plan.recompute_pointwise")
    assert plan("1xH100-80GB", "method=lora").recompute_pointwise
    small = plan("1xRTX4090,ram=64GB", "method=lora", model="Qwen/Qwen2.5-7B")
    kept = plan("1xRTX4090,ram=64GB", "method=lora", "plan.recompute_pointwise=false", model="Qwen/Qwen2.5-7B")
    assert small.checkpointed_layers < kept.checkpointed_layers
    assert small.predicted.step_seconds < kept.predicted.step_seconds


def test_attention_is_kept_where_documents_are_long() -> None:
    rows = ["train.max_length=65536", "train.global_batch_size=1"]
    made = plan("1xH100-80GB", *rows, model="Qwen/Qwen2.5-1.5B")
    other = plan("1xH100-80GB", *rows, "plan.keep_attention=false", model="Qwen/Qwen2.5-1.5B")
    assert made.keep_attention
    assert made.checkpointed_layers
    assert not other.keep_attention
    assert made.predicted.step_seconds < other.predicted.step_seconds
    assert "not computed again" in reason_of(made, "plan.keep_attention")
    free = plan("1xH100-80GB", model="Qwen/Qwen2.5-1.5B")
    assert (free.checkpointed_layers, free.keep_attention) == (0, False)
    assert "no layer recomputes" in reason_of(free, "plan.keep_attention")


def test_kept_attention_that_is_asked_for_is_kept_to_or_refused() -> None:
    asked = "plan.keep_attention=true"
    made = plan("1xH100-80GB", asked, "plan.checkpointed_layers=4", tokens=1_000_000)
    assert (made.keep_attention, made.compile_layers, made.attention) == (True, True, "packed")
    impossible = (
        ["plan.zero_stage=3"], ["plan.compile=false"], ["plan.offload_param=true"], ["plan.mlp_tile_rows=4096"],
        ["plan.attention=sdpa"], ["data.packing=false"], ["train.precision=fp32"],
    )  # fmt: skip
    for pins in impossible:
        with pytest.raises(UserError) as caught:
            plan("1xH100-80GB", asked, *pins)
        assert caught.value.field == "plan.keep_attention", pins
    with pytest.raises(UserError) as caught:
        plan("2xcpu,ram=64GB", asked, tokens=100_000)
    assert caught.value.field == "plan.keep_attention"


def test_pointwise_values_that_are_asked_for_are_kept_to_or_refused() -> None:
    asked = "plan.recompute_pointwise=true"
    short = plan("1xH100-80GB", asked, tokens=1_000_000)
    assert (short.compile_layers, short.recompute_pointwise) == (True, True)
    long = plan("1xH100-80GB", "train.max_length=131072", "train.global_batch_size=1", asked)
    assert (long.mlp_tile_rows, long.recompute_pointwise) == (0, True)
    impossible = (
        ["plan.zero_stage=3"], ["plan.compile=false"], ["plan.offload_param=true"], ["plan.mlp_tile_rows=4096"],
        ["allow_numerics=true", "plan.fp8=true"], ["data.packing=false"],
    )  # fmt: skip
    for pins in impossible:
        with pytest.raises(UserError) as caught:
            plan("1xH100-80GB", asked, *pins)
        assert caught.value.field == "plan.recompute_pointwise", pins
    with pytest.raises(UserError) as caught:
        plan("2xcpu,ram=64GB", asked, tokens=100_000)
    assert caught.value.field == "plan.recompute_pointwise"


def test_query_key_and_value_are_one_product_where_two_are_narrow() -> None:
    narrow, wide = with_quack("1xH100-80GB"), with_quack("8xH100-80GB", model="Qwen/Qwen2.5-7B")
    assert (narrow.fused_qkv, narrow.vectors_apart) == (True, True)
    assert (wide.fused_qkv, wide.vectors_apart, wide.sum_in_matmul) == (False, False, True)
    assert "1,024 columns" in reason_of(wide, "plan.fused_qkv")
    asked = with_quack("8xH100-80GB", "plan.fused_qkv=true", model="Qwen/Qwen2.5-7B")
    assert (asked.fused_qkv, asked.vectors_apart) == (True, True)
    left = with_quack("1xH100-80GB", "plan.fused_qkv=false")
    assert (left.fused_qkv, left.vectors_apart) == (False, False)
    for setting, why in (
        ("plan.compile=false", "not compiled"),
        ("method=lora", "not summed inside"),
        ("plan.mlp_tile_rows=4096", "not summed inside"),
    ):
        assert why in reason_of(with_quack("1xH100-80GB", setting), "plan.fused_qkv")
        with pytest.raises(UserError) as caught:
            with_quack("1xH100-80GB", setting, "plan.fused_qkv=true")
        assert caught.value.field == "plan.fused_qkv"


def test_a_training_keeps_its_optimizers_groups() -> None:
    """It leaves one product, and takes it up again, as the machine has it; it has none that it did not begin with."""
    apart = with_quack("1xH100-80GB", "plan.compile=false", vectors_apart=True)
    assert (apart.fused_qkv, apart.vectors_apart) == (False, True)
    again = with_quack("1xH100-80GB", vectors_apart=True)
    assert (again.fused_qkv, again.vectors_apart) == (True, True)
    together = with_quack("1xH100-80GB", vectors_apart=False)
    assert (together.fused_qkv, together.vectors_apart) == (False, False)
    assert "began with biases between" in reason_of(together, "plan.fused_qkv")
    with pytest.raises(UserError) as caught:
        with_quack("1xH100-80GB", "plan.fused_qkv=true", vectors_apart=False)
    assert caught.value.field == "plan.fused_qkv"
    decayed = with_quack("1xH100-80GB", "train.weight_decay=0.1", vectors_apart=False)  # groups are two anyway
    assert (decayed.fused_qkv, decayed.vectors_apart) == (True, False)


@pytest.mark.parametrize(
    ("card", "model", "settings"),
    [
        ("1xH100-80GB", "Qwen/Qwen2.5-1.5B", ["train.max_steps=5"]),  # else too short for compiled layers
        ("1xH100-80GB", "Qwen/Qwen2.5-3B", ["train.max_length=131072"]),  # else ZeRO-2
        ("8xH100-80GB", "Qwen/Qwen2.5-7B", ["train.max_length=32768"]),
    ],
)
def test_one_product_that_is_asked_for_narrows_the_search(card: str, model: str, settings: list[str]) -> None:
    made = with_quack(card, *settings, "train.global_batch_size=8", "plan.fused_qkv=true", model=model)
    assert (made.fused_qkv, made.zero_stage, made.compile_layers, made.mlp_tile_rows) == (True, 1, True, 0)


def test_one_product_is_refused_where_only_tiles_fit() -> None:
    with pytest.raises(UserError, match="GiB") as caught:
        with_quack("1xA100-40GB", "train.max_length=163840", "train.global_batch_size=8", "plan.fused_qkv=true")
    assert caught.value.field == "plan.fused_qkv"
    assert "without it a plan fits" in caught.value.mend
