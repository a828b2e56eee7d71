"""Laws of the memory model, and its agreement with what DeepSpeed was measured to take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.artifacts import Cluster
from foretune.planning import parse_hardware
from foretune.planning.predict import activations, host, memory
from foretune.planning.search.space import fewest_layers
from foretune.planning.shapes import known_shape
from foretune.planning.strategy import GIB, Strategy, Workload, gib, sums_apart


def work_of(name: str = "qwen2.5-1.5b", **values: object) -> Workload:
    shape = known_shape(name)
    assert shape is not None
    facts = Workload(
        shape=shape, trainable=shape.parameters, frozen=0, lora_rank=0, precision="bf16", accumulation_dtype="fp32",
        optimizer_state_bytes=8, max_length=1024, row_length=1024.0, rows=64, document_length=512.0, packing=True,
    )  # fmt: skip
    return replace(facts, **values)  # type: ignore[arg-type]


def cluster_of(ranks: int = 1, kind: str = "H100") -> Cluster:
    return parse_hardware(f"{ranks}x{kind},ram=2048GB,cores=64")


workloads = st.builds(
    work_of,
    name=st.sampled_from(["gpt2", "smollm2-135m", "qwen3-0.6b", "llama-3.1-8b", "gemma-2-2b", "phi-2"]),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    max_length=st.sampled_from([128, 512, 1024]),
    packing=st.booleans(),
)
strategies = st.builds(
    Strategy,
    zero_stage=st.sampled_from([0, 1, 2, 3]),
    micro_batch_size=st.integers(1, 16),
    accumulation_steps=st.integers(1, 8),
    checkpointed_layers=st.integers(0, 12),
)


@pytest.mark.parametrize(
    ("stage", "accumulation", "resident", "after_backward", "in_step"),
    [
        (0, "bf16", 14, 16, 24),
        (1, "bf16", 14, 16, 22),
        (1, "fp32", 14, 18, 18),  # with the standing fp32 sums, to which gradients are added as they come
        (2, "bf16", 14, 16, 22),
        (2, "fp32", 14, 18, 18),  # no fp64 copy for the norm on a GPU
        (3, "bf16", 14, 16, 16),  # and the norm's fp64 copy of the widest gradient, below
    ],
)
def test_bytes_per_parameter_as_measured(
    stage: int, accumulation: str, resident: float, after_backward: float, in_step: float
) -> None:
    """One rank, bf16, Adam: the figures of the real engine under a storage tracker (module head)."""
    work = work_of("llama-3.1-8b", accumulation_dtype=accumulation, max_length=16, row_length=16.0)
    strategy = Strategy(stage, 1, 2)  # type: ignore[arg-type]
    parts = memory.phases(work, strategy, cluster_of())["step"]
    states = parts["parameters"] + parts["optimizer"]
    assert states / work.trainable == pytest.approx(resident, rel=1e-6)
    assert (states + parts["gradients"]) / work.trainable == pytest.approx(after_backward, rel=1e-6)
    total = states + parts["gradients"] + parts.get("step", 0)
    norm = 8 * work.shape.vocab_size * work.shape.hidden_size if stage == 3 else 0
    assert (total - norm) / work.trainable == pytest.approx(in_step, rel=1e-6)


@given(work=workloads, strategy=strategies, cards=st.sampled_from(["H100", "RTX4090", "V100-16GB", "T4"]))
def test_no_layer_recomputes_without_need(work: Workload, strategy: Strategy, cards: str) -> None:
    cluster, layers = cluster_of(1, cards), work.shape.num_layers

    def fits(checkpointed: int) -> bool:
        one = replace(strategy, checkpointed_layers=checkpointed)
        return memory.device_memory(work, one, cluster).peak <= memory.budget(cluster)

    fewest, chunk_matters = fewest_layers(work, strategy, cluster)
    assert fewest == next((count for count in range(layers + 1) if fits(count)), None)
    smaller = replace(strategy, loss_chunk_tokens=strategy.loss_chunk_tokens // 4)
    assert chunk_matters or fewest_layers(work, smaller, cluster)[0] == fewest


@given(work=workloads, strategy=strategies, ranks=st.integers(1, 64))
def test_parts_sum_to_the_peak_and_are_positive(work: Workload, strategy: Strategy, ranks: int) -> None:
    device = memory.device_memory(work, strategy, cluster_of(ranks))
    assert device.peak == sum(device.parts.values())
    assert all(size > 0 for size in device.parts.values())
    assert device.peak == max(
        sum(phase.values()) for phase in memory.phases(work, strategy, cluster_of(ranks)).values()
    )


@given(work=workloads, strategy=strategies, ranks=st.integers(2, 64))
def test_more_ranks_never_need_more_memory_each(work: Workload, strategy: Strategy, ranks: int) -> None:
    fewer = memory.device_memory(work, strategy, cluster_of(ranks)).peak
    more = memory.device_memory(work, strategy, cluster_of(2 * ranks)).peak
    assert more <= fewer


@given(work=workloads, strategy=strategies, ranks=st.sampled_from([1, 2, 8]))
def test_more_rows_and_fewer_checkpointed_layers_need_more(work: Workload, strategy: Strategy, ranks: int) -> None:
    cluster = cluster_of(ranks)
    wider = replace(strategy, micro_batch_size=strategy.micro_batch_size + 1)
    assert memory.device_memory(work, wider, cluster).peak >= memory.device_memory(work, strategy, cluster).peak
    if 0 < strategy.checkpointed_layers < work.shape.num_layers:
        # From none to one, a layer is saved and recomputed at once: only from one on is it a law.
        deeper = replace(strategy, checkpointed_layers=strategy.checkpointed_layers + 1)
        assert memory.device_memory(work, deeper, cluster).peak <= memory.device_memory(work, strategy, cluster).peak


@given(work=workloads, strategy=strategies, ranks=st.sampled_from([8, 64]))
def test_states_shrink_from_stage_to_stage(work: Workload, strategy: Strategy, ranks: int) -> None:
    states = []
    for stage in (0, 1, 2, 3):
        parts = memory.phases(work, replace(strategy, zero_stage=stage), cluster_of(ranks))["step"]
        states.append(parts["parameters"] + parts["optimizer"] + (parts["gradients"] if stage >= 2 else 0))
    assert states[0] >= states[1]
    assert states[2] >= states[3]


@given(work=workloads, strategy=strategies)
def test_offloading_moves_memory_to_the_host(work: Workload, strategy: Strategy) -> None:
    at_three = replace(strategy, zero_stage=3)
    cluster = cluster_of()
    shares = [
        memory.device_memory(work, replace(at_three, offload_optimizer=share), cluster).peak
        for share in (0.2, 0.6, 1.0)
    ]
    assert shares == sorted(shares, reverse=True)
    hosts = [
        host.host_memory_per_node(work, replace(at_three, offload_optimizer=share), cluster)
        for share in (0.2, 0.6, 1.0)
    ]
    assert hosts == sorted(hosts)


def test_a_cpu_offloads_nothing() -> None:
    work = work_of("smollm2-135m", precision="fp32")
    cluster = cluster_of(2, "cpu")
    plain = memory.device_memory(work, Strategy(2, 1, 1), cluster)
    assert memory.device_memory(work, Strategy(2, 1, 1, offload_optimizer=1.0), cluster).peak >= plain.peak


def test_zero_0_in_fp32_takes_16_bytes_a_parameter() -> None:
    work = work_of("llama-3.1-8b", precision="fp32", max_length=16, row_length=16.0)
    parts = memory.phases(work, Strategy(0, 1, 1), cluster_of(1, "cpu"))["step"]
    assert (parts["parameters"] + parts["optimizer"] + parts["gradients"]) / work.trainable == pytest.approx(16)


def test_lora_trains_little_and_saves_less() -> None:
    full, adapters = (
        work_of("qwen2.5-7b"),
        work_of("qwen2.5-7b", trainable=40_370_176, frozen=7_615_616_512, lora_rank=16),
    )
    assert memory.device_memory(adapters, Strategy(1, 1, 1), cluster_of()).peak < 25 * GIB
    assert activations.activation_bytes_per_token_layer(adapters) < activations.activation_bytes_per_token_layer(full)


def test_the_usual_offload_preset_kills_the_host_of_a_7b_run() -> None:
    """Full 7B on one 80 GB card with 125 GiB: measured, the kernel killed it at 84 + 46 GB of host memory."""
    work, cluster = work_of("qwen2.5-7b"), parse_hardware("1xH100-80GB,ram=125GB,cores=16")
    killed = host.host_memory_per_node(work, Strategy(2, 1, 1, offload_optimizer=1.0), cluster)
    assert killed > 125 * GIB
    ran = host.host_memory_per_node(work, Strategy(3, 4, 4, 28, offload_optimizer=0.7), cluster)
    assert 100 * GIB < ran < 125 * GIB  # it took 112


def test_whole_logits_where_the_head_does_more_than_multiply() -> None:
    capped, plain = work_of("gemma-2-2b"), work_of("gemma-3-1b")
    assert activations.loss_bytes(capped, Strategy(1, 4, 1)) == 4 * activations.loss_bytes(capped, Strategy(1, 1, 1))
    chunked = [activations.loss_bytes(plain, Strategy(1, rows, 1, loss_chunk_tokens=1024)) for rows in (1, 4)]
    assert chunked[1] < 2 * chunked[0]


def test_checkpoints_hold_weights_masters_and_states() -> None:
    work = work_of("gpt2", precision="fp32")
    assert host.checkpoint_bytes(work, Strategy(0, 1, 1)) == 12 * work.trainable
    assert host.checkpoint_bytes(work, Strategy(2, 1, 1)) == 16 * work.trainable
    assert host.checkpoint_bytes(work_of("gpt2"), Strategy(1, 1, 1)) == 14 * work.trainable


def test_bytes_for_people() -> None:
    assert gib(93.1 * GIB) == "93.1 GiB"
    assert gib(0.5 * GIB) == "512 MiB"


def test_sums_apart_are_reduced_where_they_lie_on_gpus() -> None:
    work, apart = work_of(), Strategy(1, 4, 4)
    assert sums_apart(work, apart)
    assert memory.reduced_at_once(work, apart, cluster_of(4)) == 0
    assert memory.reduced_at_once(work, apart, parse_hardware("2xcpu,ram=256GB")) == 4 * memory.REDUCED_AT_ONCE
    assert memory.reduced_at_once(work, Strategy(0, 4, 4), cluster_of(4)) == 2 * memory.REDUCED_AT_ONCE
