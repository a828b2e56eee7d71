"""The time model: its laws, and measured step times of real runs on one H100."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.planning import parse_hardware
from foretune.planning.predict import timing, updating
from foretune.planning.predict.timing import attention_flops_per_row, flops_per_row, step_time
from foretune.planning.shapes import known_shape
from foretune.planning.strategy import Strategy, Workload


def work_of(name: str, *, length: int = 4096, lora_rank: int = 0, precision: str = "bf16") -> Workload:
    shape = known_shape(name)
    assert shape is not None
    trainable = shape.lora_parameters(lora_rank) if lora_rank else shape.parameters
    return Workload(
        shape=shape, trainable=trainable, frozen=shape.parameters if lora_rank else 0, lora_rank=lora_rank,
        precision=precision, accumulation_dtype="fp32", optimizer_state_bytes=8, max_length=length, row_length=length,  # type: ignore[arg-type]
        rows=16, document_length=length, packing=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("work", "strategy", "measured_tokens_per_second"),
    [
        # Full fine-tuning of the 1.5B shape, whole rows of 4096, compiled layers, accumulation 8.
        (replace(work_of("qwen2.5-1.5b"), compiled=True), Strategy(1, 4, 8, loss_chunk_tokens=4096), 49_772),
        # The same at ZeRO-3, as another trainer on the same engine runs it: fetching every parameter is the limit.
        (work_of("qwen2.5-1.5b"), Strategy(3, 4, 1), 28_221),
        # The 0.5B shape: too little work to hide Python.
        (work_of("qwen2.5-0.5b", length=1024), Strategy(1, 8, 2), 61_852),
        (work_of("qwen2.5-0.5b", length=1024), Strategy(3, 8, 2), 14_489),
        (work_of("qwen2.5-0.5b", length=1024, lora_rank=16), Strategy(3, 4, 4), 3_450),
        # Full fine-tuning of the 7B shape, 70 % of the optimizer offloaded, all layers checkpointed.
        (work_of("qwen2.5-7b"), Strategy(3, 4, 4, 28, offload_optimizer=0.7), 6_003),
    ],
    ids=["compiled", "zero3", "small", "small-zero3", "small-lora3", "offloaded"],
)
def test_within_a_quarter_of_measured_runs(
    work: Workload, strategy: Strategy, measured_tokens_per_second: float
) -> None:
    cluster = parse_hardware("1xH100-80GB,ram=125GB,cores=16")
    tokens = strategy.micro_batch_size * strategy.accumulation_steps * work.row_length
    predicted = tokens / step_time(work, strategy, cluster).total
    assert predicted == pytest.approx(measured_tokens_per_second, rel=0.25)


def test_the_partial_offload_on_record_where_nothing_else_is_slow() -> None:
    """6,003 tokens/s (7B, 70 %, 16 cores) with fused pointwise kernels and gradients that travel meanwhile."""
    cluster = parse_hardware("1xH100-80GB,ram=125GB,cores=16")
    work = replace(work_of("qwen2.5-7b"), compiled=True)
    layers = step_time(work, Strategy(1, 4, 4, 28), cluster)
    stepping = 0.7 * work.trainable / (updating.CPU_ADAM_PER_CORE["sub-groups"] * 16)
    assert 16 * 4096 / (computing(layers) + stepping) == pytest.approx(6_003, rel=0.05)


def computing(time: timing.StepTime) -> float:
    return time.compute + time.memory_bound


def test_buckets_add_from_the_second_micro_batch_on() -> None:
    """A tensor of the first is copied; those after it are cast and added too."""
    work, cluster = work_of("qwen2.5-0.5b", length=128), parse_hardware("1xH100-80GB")  # the host is the limit
    one, many = (computing(step_time(work, Strategy(2, 1, steps), cluster)) / steps for steps in (1, 16))
    tensors = 24 * (7 + 3 + 2)
    added = tensors * timing.ADDING_CALLS * timing.CALL_SECONDS["cuda"]
    assert many - one == pytest.approx(added * 15 / 16, rel=0.05)


def test_what_zero_3_keeps_costs_less_than_what_it_fetches() -> None:
    work, cluster = work_of("qwen2.5-0.5b", length=128), parse_hardware("1xH100-80GB")
    at_three, at_one = (computing(step_time(work, Strategy(stage, 1, 1), cluster)) for stage in (3, 1))  # type: ignore[arg-type]
    fetched, kept = 24 * 7, 24 * (3 + 2)
    expected = fetched * timing.FETCH_SECONDS + kept * timing.KEPT_SECONDS - (fetched + kept) * timing.SUM_SECONDS
    assert at_three - at_one == pytest.approx(expected, rel=0.05)


def test_flops_are_six_per_multiplied_parameter_and_token() -> None:
    work = work_of("llama-3.1-8b")
    embedding = work.shape.vocab_size * work.shape.hidden_size
    multiplied = work.shape.parameters - embedding  # the token embedding is looked up, norms hardly count
    assert flops_per_row(work) == pytest.approx(6 * multiplied * work.row_length, rel=1e-3)
    again = Strategy(1, 1, 1, checkpointed_layers=32)
    assert flops_per_row(work, again) == pytest.approx(8 * multiplied * work.row_length, rel=0.03)


def test_layers_that_keep_attention_do_all_but_the_last_product_again() -> None:
    work = replace(work_of("llama-3.1-8b"), compiled=True, attention="packed", packing=True)
    again = Strategy(1, 1, 1, checkpointed_layers=32)
    kept = replace(again, keep_attention=True)
    last = 32 * work.shape.intermediate_size * work.shape.hidden_size
    assert flops_per_row(work, again) - flops_per_row(work, kept) == 2 * work.row_length * last
    read = replace(work, shape=replace(work.shape, saved=replace(work.shape.saved, mlp_read=True)))
    assert flops_per_row(read, kept) == flops_per_row(work, again)
    assert attention_flops_per_row(work, again) == pytest.approx(9 / 7 * attention_flops_per_row(work, kept))
    assert attention_flops_per_row(work, kept) == attention_flops_per_row(work)


def test_attention_sees_its_own_document_only() -> None:
    whole = work_of("llama-3.1-8b")
    packed = replace(whole, packing=True, document_length=512.0, attention="packed")
    masked = replace(packed, attention="sdpa")
    assert attention_flops_per_row(masked) == 2 * attention_flops_per_row(whole)  # every product, none left out
    assert attention_flops_per_row(packed) == pytest.approx(attention_flops_per_row(whole) / 8)


works = st.sampled_from(["gpt2", "qwen3-0.6b", "llama-3.1-8b"]).map(work_of)
strategies = st.builds(
    Strategy,
    zero_stage=st.sampled_from([0, 1, 2, 3]),
    micro_batch_size=st.integers(1, 8),
    accumulation_steps=st.integers(1, 8),
)


@given(work=works, strategy=strategies)
def test_work_costs_time(work: Workload, strategy: Strategy) -> None:
    cluster = parse_hardware("8xA100-80GB")
    base = step_time(work, strategy, cluster).total
    larger = step_time(work, replace(strategy, micro_batch_size=strategy.micro_batch_size + 1), cluster).total
    # Where launches bound the step both take the same time, summed from other parts: equal up to rounding.
    assert larger >= base or math.isclose(larger, base, rel_tol=1e-12)
    assert step_time(work, replace(strategy, checkpointed_layers=work.shape.num_layers), cluster).total > base
    assert step_time(work, replace(strategy, zero_stage=3, offload_optimizer=1.0), cluster).offload > 0


@given(work=works, strategy=strategies)
def test_faster_links_never_cost(work: Workload, strategy: Strategy) -> None:
    slow, fast = (step_time(work, strategy, parse_hardware(f"4x8xH100,net={net}Gbps")).total for net in (100, 3200))
    assert fast < slow


def test_a_single_rank_does_not_communicate() -> None:
    assert step_time(work_of("gpt2"), Strategy(3, 1, 1), parse_hardware("1xH100")).communication == 0


def test_fp32_is_slower_than_bf16_on_a_gpu_and_faster_on_a_plain_cpu() -> None:
    fp32, bf16 = work_of("gpt2", length=1024, precision="fp32"), work_of("gpt2", length=1024)
    gpu, cpu = parse_hardware("1xA100-80GB"), parse_hardware("2xcpu")
    assert step_time(fp32, Strategy(1, 8, 1), gpu).total > step_time(bf16, Strategy(1, 8, 1), gpu).total
    assert step_time(fp32, Strategy(1, 1, 1), cpu).total < step_time(bf16, Strategy(1, 1, 1), cpu).total


def test_products_that_add_by_themselves_save_a_pass() -> None:
    """1.5B shape, measured (docs/speed.md): 0.2 ms a layer and micro-batch, 3 ms of a micro-batch at both ends."""
    cluster = parse_hardware("1xH100-80GB")
    work = replace(work_of("qwen2.5-1.5b"), compiled=True)
    apart, inside = (
        step_time(replace(work, sums_inside=inside), Strategy(1, 4, 8), cluster).total for inside in (False, True)
    )
    assert (apart - inside) / 7 == pytest.approx(28 * 0.2e-3 + 3e-3, rel=0.15)
    tiled = Strategy(1, 4, 8, mlp_tile_rows=4096)
    assert step_time(replace(work, sums_inside=True), tiled, cluster) == step_time(work, tiled, cluster)
