"""Why the winner won and the others lost, in figures. Candidates in, decisions and alternatives out."""

from __future__ import annotations

from dataclasses import replace

from foretune.artifacts import Alternative, Cluster, Decision, Prediction
from foretune.config import Config
from foretune.planning.predict import activations, host, memory
from foretune.planning.predict.updating import starting_seconds
from foretune.planning.search import EQUALLY_FAST, Candidate, best_of_families, family_of
from foretune.planning.search.pins import eight_bits_obstacle, keeping_obstacle, recomputing_obstacle
from foretune.planning.search.space import may_have_bf16_states
from foretune.planning.strategy import Strategy, Workload, gib, sums_apart


def shortfall(one: Candidate, cluster: Cluster) -> str:
    """``needs 93.1 GiB, 72.8 GiB usable of …``: the figure that makes a candidate impossible."""
    accelerator, s = cluster.accelerator, one.strategy
    at = f"with a micro-batch of {s.micro_batch_size} and {s.checkpointed_layers} checkpointed layers"
    if not one.fits_device:
        what = "host memory a rank" if accelerator.kind == "cpu" else accelerator.name
        usable = f"{gib(memory.budget(cluster))} usable of {gib(accelerator.memory_bytes)}"
        return f"needs {gib(one.device.peak)}, {usable} ({what}), {at}"
    usable = f"{gib(host.host_budget(cluster))} usable of {gib(cluster.host_memory_bytes)}"
    return f"needs {gib(one.host_bytes)} of host memory a node, {usable}"


def prediction_of(one: Candidate, *, checkpoint_bytes: int, tokens: float) -> Prediction:
    """The figures of a candidate that is not the winner: what a table of alternatives shows."""
    return Prediction(
        gpu_memory_bytes=one.device.peak,
        gpu_memory_parts=one.device.parts,
        peak_phase=one.device.phase,
        host_memory_bytes_per_node=one.host_bytes,
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=0,
        step_seconds=one.seconds,
        step_parts=one.time.parts,
        tokens_per_second=tokens / one.seconds,
        total_seconds=0.0,
    )


def rejected_families(
    work: Workload, cluster: Cluster, candidates: list[Candidate], best: Candidate, *, tokens: float
) -> list[Alternative]:
    """Every family but the winner's, with the figure that rejected it, the next best first."""
    lost: list[tuple[tuple[bool, float], Alternative]] = []
    for one in best_of_families(candidates):
        if family_of(one) == family_of(best):
            continue
        if not one.fits:
            reason = shortfall(one, cluster)
        elif one.seconds > EQUALLY_FAST * best.seconds:
            reason = f"fits, but takes {one.seconds:.3g} s a step against {best.seconds:.3g}"
        elif one.strategy.optimizer_dtype != "fp32":
            reason = f"as fast ({one.seconds:.3g} s a step), but changes the numerics"
        else:
            reason = f"as fast ({one.seconds:.3g} s a step), but with more machinery"
        figures = prediction_of(one, checkpoint_bytes=host.checkpoint_bytes(work, one.strategy), tokens=tokens)
        lost.append(
            ((not one.fits, one.seconds), Alternative(name=one.strategy.name, reason=reason, prediction=figures))
        )
    return [alternative for _, alternative in sorted(lost, key=lambda item: item[0])]


def explain_strategy(
    config: Config, work: Workload, cluster: Cluster, best: Candidate, candidates: list[Candidate]
) -> list[Decision]:
    """One reason per choice of the winner."""
    s, layers = best.strategy, work.shape.num_layers
    fill = f"{gib(best.device.peak)} of {gib(cluster.accelerator.memory_bytes)} a rank, most in the {best.device.phase}"
    recompute = (
        f"{s.checkpointed_layers} of {layers} layers, the fewest that fit" if s.checkpointed_layers else "all fit"
    )
    offloaded = _explain_offload(config, work, cluster, best, candidates)
    batch = _explain_batch(work, cluster, s)
    reasons: dict[str, tuple[object, str]] = {
        "zero_stage": (s.zero_stage, _explain_stage(cluster, best, candidates)),
        "offload_optimizer": (
            s.offload_optimizer,
            offloaded if s.offload_optimizer else "the optimizer fits on the device",
        ),
        "offload_optimizer_step": (_stepped_by(config, s), _explain_step(s)),
        "offload_param": (s.offload_param, offloaded if s.offload_param else "the parameters fit on the device"),
        "optimizer_dtype": (s.optimizer_dtype, _explain_states(config, work, s)),
        "micro_batch_size_per_gpu": (s.micro_batch_size, batch),
        "gradient_accumulation_steps": (s.accumulation_steps, batch),
        "checkpointed_layers": (s.checkpointed_layers, f"activations: {recompute}; {fill}"),
        "loss_chunk_tokens": (s.loss_chunk_tokens, _explain_chunk(work, s)),
        "mlp_tile_rows": (s.mlp_tile_rows, _explain_tiles(work, s)),
        "recompute_pointwise": (s.recompute_pointwise, _explain_recomputing(config, work, s)),
        "keep_attention": (s.keep_attention, _explain_keeping(work, s)),
        "reduce_bucket_size": (s.reduce_bucket_size, _explain_bucket(work, s)),
        "sub_group_size": (s.sub_group_size, _explain_sub_group(s)),
    }
    decisions = []
    for name, (value, reason) in reasons.items():
        pinned = getattr(config.plan, name) != "auto"
        text = f"as set; {reason}" if pinned else reason
        decisions.append(Decision(field=f"plan.{name}", value=value, reason=text, pinned=pinned))
    if config.plan.nvme_path is not None:
        used = "used" if s.nvme else "not needed: " + ("memory is enough" if best.fits else "nothing fits")
        decisions.append(Decision(field="plan.nvme_path", value=config.plan.nvme_path, reason=used, pinned=True))
    return decisions


def _explain_offload(
    config: Config, work: Workload, cluster: Cluster, best: Candidate, candidates: list[Candidate]
) -> str:
    s = best.strategy
    without = [one for one in candidates if one.fits and not one.strategy.offload_optimizer]
    if without:
        least = min(without, key=lambda one: one.seconds)
        why = f"{best.seconds:.3g} s a step; {least.strategy.name} takes {least.seconds:.3g}"
    else:
        why = "the device alone is too small"
    where = f"to {config.plan.nvme_path}" if s.nvme else f"{gib(best.host_bytes)} of host memory a machine"
    if s.streamed:
        where += f", whose pages are locked once, in {starting_seconds(work, s, cluster):.0f} s"
    return f"{why}; {where}"


def _stepped_by(config: Config, s: Strategy) -> str:
    """Who steps what is offloaded; where nothing is, what was asked for."""
    asked = config.plan.offload_optimizer_step
    if not s.offload_optimizer and asked != "auto":
        return asked
    return "device" if s.streamed else "host"


def _explain_step(s: Strategy) -> str:
    if not s.offload_optimizer:
        return "no effect: nothing is offloaded"
    if s.streamed:
        return "states pass through the device, up and down at once, and the device steps them: the bits of no offload"
    return "the host's cores step what lies there"


def _explain_states(config: Config, work: Workload, s: Strategy) -> str:
    if s.optimizer_dtype == "bf16":
        return "changes numerics (allowed): bf16 master weights round small updates away, and take half the memory"
    if s.optimizer_dtype == "8bit":
        moments = "8-bit moments in blocks of 256, a sixth of the memory"
        return f"changes numerics (allowed): {moments}; no master weights, bf16 weights are rounded by chance"
    with_leave = config.model_copy(update={"allow_numerics": True})
    others = [] if eight_bits_obstacle(with_leave, work) else ["8 bits"]
    others += ["bf16"] if any(may_have_bf16_states(with_leave, work, stage) for stage in (1, 2, 3)) else []
    if config.allow_numerics or not others:
        return "exact"
    return f"exact; --allow-numerics would let {' or '.join(others)} be proposed"


def _explain_chunk(work: Workload, s: Strategy) -> str:
    if not work.shape.plain_head:
        return "no effect: this head does more than multiply, so its logits are whole"
    tokens = s.micro_batch_size * work.max_length
    if s.loss_chunk_tokens >= tokens:
        return f"all {tokens:,} at once: {gib(4 * tokens * work.shape.vocab_size)} of fp32 logits"
    logits = gib(4 * s.loss_chunk_tokens * work.shape.vocab_size)
    return (
        f"of {tokens:,} tokens; {logits} of fp32 logits at a time instead of {gib(4 * tokens * work.shape.vocab_size)}"
    )


def _explain_tiles(work: Workload, s: Strategy) -> str:
    tokens = s.micro_batch_size * work.max_length
    inner = work.shape.saved.mlp * work.parameter_bytes * work.shape.intermediate_size
    if not s.mlp_tile_rows:
        return f"MLPs in one piece, {gib(tokens * inner)} of inner values a layer: tiles would compute them again"
    kept = gib(s.mlp_tile_rows * inner)
    return f"{kept} of an MLP's inner values at a time instead of {gib(tokens * inner)}; computed again in backward"


def _explain_recomputing(config: Config, work: Workload, s: Strategy) -> str:
    if obstacle := recomputing_obstacle(config, work, s):
        return obstacle
    other = replace(s, recompute_pointwise=not s.recompute_pointwise)
    tokens = s.micro_batch_size * work.max_length
    here, there = (gib(tokens * activations.layer_bytes_per_token(work, one)) for one in (s, other))
    if s.recompute_pointwise:
        return f"norms and gated products are made again: {here} a layer instead of {there}"
    return f"{here} a layer fits; to make norms and gated products again would keep {there}, and take time"


def _explain_keeping(work: Workload, s: Strategy) -> str:
    if obstacle := keeping_obstacle(work, s):
        return obstacle
    if not s.checkpointed_layers:
        return "no effect: no layer recomputes"
    tokens = s.micro_batch_size * work.max_length
    size = gib(tokens * s.checkpointed_layers * activations.attention_output_bytes_per_token(work))
    if s.keep_attention:
        return f"{size} of outputs, and attention is not computed again"
    if work.fp8:
        return "not chosen with 8-bit floats, with which it was never measured"
    return f"to keep its outputs would take {size}, or save too little"


def _explain_bucket(work: Workload, s: Strategy) -> str:
    if s.zero_stage == 0 or sums_apart(work, s):
        return "no effect: gradients are not bucketed here"
    size = gib(work.parameter_bytes * s.reduce_bucket_size)
    return f"a quarter of the trained parameters, 1e8 at most: {size}, where DeepSpeed's default takes 953 MiB"


def _explain_sub_group(s: Strategy) -> str:
    if s.zero_stage < 3:
        return "no effect below ZeRO-3"
    return f"parameters that ZeRO-3 steps at a time: {gib(4 * s.sub_group_size)} of fp32 gradients at most"


def _explain_stage(cluster: Cluster, best: Candidate, candidates: list[Candidate]) -> str:
    """Why not the stage below: it does not fit, or it is slower."""
    lower = [one for one in best_of_families(candidates) if one.strategy.zero_stage < best.strategy.zero_stage]
    plain = [one for one in lower if not one.strategy.offload_optimizer and one.strategy.optimizer_dtype == "fp32"]
    if not plain:
        return "the lowest stage that is possible here: the least communication"
    below = plain[-1]
    if below.fits:
        return f"{best.seconds:.3g} s a step; {below.strategy.name} takes {below.seconds:.3g}"
    return f"{below.strategy.name} {shortfall(below, cluster)}"


def _explain_batch(work: Workload, cluster: Cluster, s: Strategy) -> str:
    ranks, rows = cluster.world_size, work.rows
    places = ranks * s.micro_batch_size * s.accumulation_steps
    product = f"{ranks} ranks × {s.micro_batch_size} × {s.accumulation_steps}"
    if places == rows:
        return f"{product} = the {rows} rows of a batch"
    return f"{product} hold the {rows} rows of a batch; {places - rows} places stay empty"
