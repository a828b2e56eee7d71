"""The space that is searched: layouts, and for each the batches, chunks, tiles, layers and shares worth looking at.

For each layout, micro-batch and chunk the fewest checkpointed layers that fit are computed: each costs time and frees
memory, so nothing between is worth looking at. A streamed optimizer costs time for every byte that leaves the
device, a kept layer saves time for bytes that stay: both are linear, so one of them goes as far as it can and the other
follows. Pins narrow the space. Buckets and sub-groups are derived from the model (`buckets_for`) unless they are
pinned.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from math import ceil, floor, inf

from foretune.artifacts import Cluster
from foretune.config import Config
from foretune.errors import UserError
from foretune.planning.predict import host, memory
from foretune.planning.search.candidates import EQUALLY_FAST, Candidate, evaluate, work_for
from foretune.planning.search.pins import (
    eight_bits_obstacle,
    keeping_obstacle,
    pinned_share,
    recomputing_obstacle,
    streaming_obstacle,
    tiling_obstacle,
)
from foretune.planning.strategy import Stage, Strategy, Workload, sums_apart

#: Tokens of one micro-batch on a CPU beyond which nothing gets faster and only memory is spent.
CPU_MICRO_BATCH_TOKENS = 4096
#: Shares of the optimizer that may be offloaded at stage 3 by DeepSpeed.
OFFLOAD_RATIOS = tuple(round(0.1 * tenth, 1) for tenth in range(1, 11))
#: Steps of the share that is streamed: any will do, a hundredth is close enough to what just fits.
STREAMED_STEPS = 100
#: Rows of a tile, where MLPs are computed in tiles: enough work for a device, little to hold.
TILE_ROWS = 4096
#: Rows are long from here on: shorter ones have MLPs in one piece, or recompute.
LONG_ROWS = 32768
#: Tokens whose logits may exist at the same time: more is faster up to about 4096, less needs less memory.
LOSS_CHUNKS = (4096, 2048, 1024, 512)


def search_space(config: Config, work: Workload, cluster: Cluster) -> Iterator[Candidate]:
    """Every combination worth looking at, with its figures and with pins kept."""
    batches = list(_batches(config, work, cluster))
    for layout in _layouts_with_kernels(config, work, cluster):
        roomy, least = False, inf  # whether a larger micro-batch fitted with all layers kept; the fastest of those
        for micro_batch, steps in _that_may_fit(config, work, layout, batches, cluster):
            batch = layout.but(micro_batch_size=micro_batch, accumulation_steps=steps)
            largest = _chunks(config, work, batch)[0]
            pairs = [(largest, 0)] if roomy else _chunks_and_layers(config, work, batch, cluster)
            roomy = config.plan.checkpointed_layers == "auto" and pairs[0] == (largest, 0)
            found = [evaluate(work, one, cluster) for one in _of_one_batch(config, work, batch, cluster, pairs=pairs)]
            yield from found
            if pairs[0][1] or layout.streamed:
                continue  # a smaller micro-batch lets fewer layers recompute, or less of the optimizer leave the device
            # Rows that only fill up the last micro-batch are not the fault of its size.
            of_rows = batches[-1][1] / (micro_batch * steps)
            seconds = of_rows * min((one.seconds for one in found if one.fits), default=inf)
            if seconds > EQUALLY_FAST * least:
                break  # smaller ones take longer still
            least = min(least, seconds)


def _of_one_batch(
    config: Config, work: Workload, batch: Strategy, cluster: Cluster, *, pairs: list[tuple[int, int]]
) -> Iterator[Strategy]:
    """Ways to compute one micro-batch: with `pairs` of a chunk and of layers that recompute, and with less inside."""
    variants = [(batch, pairs)]
    if pairs[0][1]:
        less = _with_less_inside(config, work, batch)
        variants += [(one, _chunks_and_layers(config, work, one, cluster)) for one in less]
    for one, of_this in variants:
        for chunk, layers in of_this:
            fitted = one.but(loss_chunk_tokens=chunk, checkpointed_layers=layers)
            yield from _with_shares(config, work, fitted, cluster)


def _with_less_inside(config: Config, work: Workload, batch: Strategy) -> Iterator[Strategy]:
    """Where layers recompute: with attention's output kept then, and with MLPs in tiles, inside which nothing is kept.

    8-bit maps have never been measured with the former.
    """
    keeping = batch.but(keep_attention=True)
    if config.plan.keep_attention == "auto" and not work.fp8 and not keeping_obstacle(work, keeping):
        yield keeping
    if _may_tile(config, work, batch):
        yield batch.but(mlp_tile_rows=TILE_ROWS, recompute_pointwise=False, keep_attention=False)


def _chunks(config: Config, work: Workload, strategy: Strategy) -> list[int]:
    """Tokens whose logits may exist at a time, the most first; more than a micro-batch has are as many as it has."""
    pinned, tokens = config.plan.loss_chunk_tokens, strategy.micro_batch_size * work.max_length
    return [pinned] if pinned != "auto" else sorted({min(chunk, tokens) for chunk in LOSS_CHUNKS}, reverse=True)


def _chunks_and_layers(config: Config, work: Workload, strategy: Strategy, cluster: Cluster) -> list[tuple[int, int]]:
    """Chunks of the loss worth looking at, the largest first, and the fewest layers that recompute with each.

    Small chunks are slower: they are for what does not fit with larger ones, or only if more layers recompute. If it
    fits with none, the smallest is enough to say why.
    """
    chunks, pinned_layers = _chunks(config, work, strategy), config.plan.checkpointed_layers
    if pinned_layers != "auto":
        return [(chunk, pinned_layers) for chunk in chunks]

    def needed(chunk: int) -> tuple[int | None, bool]:
        one = strategy.but(loss_chunk_tokens=chunk)
        return fewest_layers(work_for(work, one), one, cluster)

    all_layers, (first, chunk_matters) = work.shape.num_layers, needed(chunks[0])
    pairs = [] if first is None else [(chunks[0], first)]
    if len(chunks) == 1 or not chunk_matters:
        return pairs or [(chunks[-1], all_layers)]
    least, _ = needed(chunks[-1])
    if least is None:
        return pairs or [(chunks[-1], all_layers)]
    for chunk in chunks[1:-1]:
        before = pairs[-1][1] if pairs else inf
        if before > least and (layers := needed(chunk)[0]) is not None and layers < before:
            pairs.append((chunk, layers))
    return pairs if pairs and pairs[-1][1] <= least else [*pairs, (chunks[-1], least)]


def _that_may_fit(
    config: Config, work: Workload, layout: Strategy, batches: list[tuple[int, int]], cluster: Cluster
) -> list[tuple[int, int]]:
    """Of batches, the largest micro-batch first, those that may fit; if none does, the last is enough to say why."""
    first = bisect_left(
        batches, True, key=lambda batch: _may_fit(config, work, layout.but(micro_batch_size=batch[0]), cluster)
    )
    return batches[min(first, len(batches) - 1) :]


def _may_fit(config: Config, work: Workload, strategy: Strategy, cluster: Cluster) -> bool:
    """Whether a layout can fit with this micro-batch, whatever else is chosen."""
    plan, layers = config.plan, work.shape.num_layers
    chunk = LOSS_CHUNKS[-1] if plan.loss_chunk_tokens == "auto" else plan.loss_chunk_tokens
    depths = (0, layers) if plan.checkpointed_layers == "auto" else (plan.checkpointed_layers,)
    tiles = (0, TILE_ROWS) if _may_tile(config, work, strategy) else (strategy.mlp_tile_rows,)
    small = [
        strategy.but(loss_chunk_tokens=chunk, checkpointed_layers=depth, mlp_tile_rows=rows)
        for depth in depths
        for rows in tiles
    ]
    did = work_for(work, strategy)
    if all(host.host_memory_per_node(did, one, cluster) > host.host_budget(cluster) for one in small):
        return False
    return any(memory.device_memory(did, one, cluster).peak <= memory.budget(cluster) for one in small)


def _may_tile(config: Config, work: Workload, strategy: Strategy) -> bool:
    """Whether MLPs in tiles are worth a look where not all layers can keep what they compute."""
    plan = config.plan
    pins = plan.sum_in_matmul, plan.fused_mlp, plan.fused_qkv, plan.recompute_pointwise, plan.keep_attention
    free = plan.mlp_tile_rows == "auto" and True not in pins
    return free and work.max_length >= LONG_ROWS and not tiling_obstacle(config, work, strategy.zero_stage)


def _with_shares(config: Config, work: Workload, strategy: Strategy, cluster: Cluster) -> Iterator[Strategy]:
    """A strategy as it is; streamed, with the least share that fits it, and that which fits all layers recomputed."""
    if not strategy.streamed or pinned_share(config) is not None:
        yield strategy
        return
    depths = {strategy.checkpointed_layers}
    if config.plan.checkpointed_layers == "auto":
        depths.add(work.shape.num_layers)
    for layers in depths:
        one = strategy.but(checkpointed_layers=layers)
        if share := _least_share(work, one, cluster):
            yield one.but(offload_optimizer=share)


def _least_share(work: Workload, strategy: Strategy, cluster: Cluster) -> float:
    """The least share of a streamed optimizer with which the device is large enough; 1 if none is, 0 if all stays."""
    whole = strategy.state_bytes(work) * memory.shard_of(work, strategy, cluster)
    by_phase = memory.phases(work, strategy, cluster)
    left = memory.budget(cluster) - max(sum(parts.values()) for parts in by_phase.values())
    stays = floor(STREAMED_STEPS * max(0, left) / whole) / STREAMED_STEPS
    return round(1.0 - min(1.0, stays), 2)


def _layouts_with_kernels(config: Config, work: Workload, cluster: Cluster) -> Iterator[Strategy]:
    """Layouts, with what their layers make again; where sums inside products are pinned, those that can have them."""
    pinned_rows = config.plan.mlp_tile_rows
    fusing = config.plan.fused_mlp, config.plan.fused_qkv
    if True in fusing and not work.compiled:
        return
    for one in _layouts(config, work, cluster):
        if True in (config.plan.sum_in_matmul, *fusing) and not sums_apart(work, one):
            continue
        layout = one.but(mlp_tile_rows=0 if pinned_rows == "auto" else pinned_rows)
        if config.plan.keep_attention is True:
            layout = layout.but(keep_attention=True)
            if keeping_obstacle(work, layout):
                continue
        for again in _recomputing(config, work, layout):
            yield layout.but(recompute_pointwise=again)


def _recomputing(config: Config, work: Workload, layout: Strategy) -> tuple[bool, ...]:
    """Whether compiled layers make pointwise values again; nothing where that is asked of layers that can't.

    With adapters it takes no time that could be measured.
    """
    asked = config.plan.recompute_pointwise
    if recomputing_obstacle(config, work, layout):
        return () if asked is True else (False,)
    if asked != "auto":
        return (asked,)
    return (True,) if work.lora_rank else (False, True)


def _layouts(config: Config, work: Workload, cluster: Cluster) -> Iterator[Strategy]:
    """Stage, what is offloaded and where to, the format of the optimizer's states; one row a micro-batch."""
    plan, pinned, base = config.plan, pinned_share(config), Strategy(0, 1, 1).sized_for(work)
    if plan.reduce_bucket_size != "auto":
        base = base.but(reduce_bucket_size=plan.reduce_bucket_size)
    if plan.sub_group_size != "auto":
        base = base.but(sub_group_size=plan.sub_group_size)
    stages: tuple[Stage, ...] = (0, 1, 2, 3) if plan.zero_stage == "auto" else (plan.zero_stage,)
    for stage in stages:
        if stage == 3 and (plan.mlp_tile_rows not in ("auto", 0) or plan.fp8 is True):
            continue
        if stage == 0 and work.accumulation_dtype != work.precision:
            continue  # DeepSpeed has no ZeRO-0 with 16-bit weights and fp32 accumulation
        if plan.optimizer_dtype in ("auto", "bf16") and may_have_bf16_states(config, work, stage):
            yield base.but(zero_stage=stage, optimizer_dtype="bf16")
        if plan.optimizer_dtype in ("auto", "8bit") and stage == 1 and not eight_bits_obstacle(config, work):
            yield base.but(zero_stage=stage, optimizer_dtype="8bit")
        if plan.optimizer_dtype not in ("auto", "fp32"):
            continue
        for share in _streamed(config, work, cluster, stage):
            yield base.but(zero_stage=stage, offload_optimizer=share, streamed=True)
        for share in _shares(config, cluster, stage, pinned):
            if (share and stage == 0) or (0 < share < 1 and stage != 3):
                continue
            if plan.offload_optimizer_step == "device" and share:
                continue
            for offload_param in _param_offloads(config, cluster, stage, share):
                one = base.but(zero_stage=stage, offload_optimizer=share, offload_param=offload_param)
                yield one
                if plan.nvme_path is not None and stage == 3 and share == 1:
                    yield one.but(nvme=True)


def _streamed(config: Config, work: Workload, cluster: Cluster, stage: Stage) -> tuple[float, ...]:
    """Shares of a streamed optimizer to begin with: the pinned one, or all, of which `_with_shares` takes back."""
    if stage != 1 or streaming_obstacle(config, work, cluster):
        return ()
    pinned = pinned_share(config)
    return (1.0,) if pinned is None else (pinned,)


def may_have_bf16_states(config: Config, work: Workload, stage: Stage) -> bool:
    """Whether DeepSpeed's bf16 masters and states may be looked at, at this stage."""
    plan = config.plan
    offloads = bool(pinned_share(config)) or plan.offload_param is True
    sums_may_change = plan.gradient_accumulation_dtype != "fp32"
    return config.allow_numerics and work.precision == "bf16" and stage > 0 and not offloads and sums_may_change


def _shares(config: Config, cluster: Cluster, stage: Stage, pinned: float | None) -> tuple[float, ...]:
    if pinned is not None:
        # DeepSpeed's Adam for a part has decoupled weight decay; what is streamed is torch's own.
        by_part = 0 < pinned < 1 and config.train.optimizer != "adamw"
        return () if by_part else (pinned,)
    if cluster.accelerator.kind == "cpu" or stage <= 1:
        return (0.0,)  # ZeRO-1 keeps whole gradients on the device: ZeRO-2 offloads the same with less
    if stage == 3 and config.train.optimizer == "adamw":
        return (0.0, *OFFLOAD_RATIOS)
    return (0.0, 1.0)


def _param_offloads(config: Config, cluster: Cluster, stage: Stage, share: float) -> tuple[bool, ...]:
    asked = config.plan.offload_param
    if asked != "auto":
        return (asked,) if stage == 3 or not asked else ()
    return (False, True) if stage == 3 and share == 1 and cluster.accelerator.kind == "cuda" else (False,)


def _batches(config: Config, work: Workload, cluster: Cluster) -> Iterator[tuple[int, int]]:
    """(micro-batch, accumulation): rows of a rank's share in equal pieces; empty rows fill up what does not divide."""
    plan, ranks = config.plan, cluster.world_size
    share = ceil(work.rows / ranks)
    most = share
    if cluster.accelerator.kind == "cpu":
        most = min(share, max(1, CPU_MICRO_BATCH_TOKENS // work.max_length))
    if plan.micro_batch_size_per_gpu != "auto":
        sizes = [plan.micro_batch_size_per_gpu]
    elif plan.gradient_accumulation_steps != "auto":
        sizes = [ceil(share / plan.gradient_accumulation_steps)]
    else:
        sizes = sorted(
            {ceil(share / pieces) for pieces in range(1, share + 1) if ceil(share / pieces) <= most}, reverse=True
        )
    for size in sizes:
        needed = ceil(share / size)
        steps = needed if plan.gradient_accumulation_steps == "auto" else plan.gradient_accumulation_steps
        if steps < needed:
            raise UserError(
                "plan.gradient_accumulation_steps",
                steps,
                f"{ranks} ranks × {size} rows × {steps} are fewer than the {work.rows} rows of a batch",
                f"use {needed}, a larger plan.micro_batch_size_per_gpu or a smaller train.global_batch_size",
            )
        yield size, steps


def fewest_layers(work: Workload, strategy: Strategy, cluster: Cluster) -> tuple[int | None, bool]:
    """The fewest checkpointed layers that fit the device, None if no number of them does; and whether a smaller chunk
    of the loss could change that: one phase of a step alone depends on it.

    From the first layer on, every phase grows by the same for each.
    """
    limit, most = memory.budget(cluster), work.shape.num_layers

    def sizes(layers: int) -> dict[str, int]:
        by_phase = memory.phases(work, strategy.but(checkpointed_layers=layers), cluster)
        return {name: sum(parts.values()) for name, parts in by_phase.items()}

    too_large = {name for name, size in sizes(0).items() if size > limit}
    if not too_large:
        return 0, False
    with_all = sizes(most)
    if never := {name for name, size in with_all.items() if size > limit}:
        return None, never == {"loss"}
    by_phase = {
        name: 1 + ceil((size - limit) * (most - 1) / (size - with_all[name])) if size > limit else 1
        for name, size in sizes(1).items()
    }
    others = max(layers for name, layers in by_phase.items() if name != "loss") if too_large != {"loss"} else 0
    return max(by_phase.values()), by_phase["loss"] > others
