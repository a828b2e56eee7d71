"""Which kernels compute a layer: choices that change its speed and its rounding, not its mathematics.

Config × Workload × Cluster × the strategy's figures ──▶ `plan.attention`, `plan.compile`, each with a reason
"""

from __future__ import annotations

from foretune.artifacts import Cluster, Decision
from foretune.config import Config
from foretune.errors import UserError
from foretune.planning.strategy import Workload

#: Heads that the packed attention kernels compute: multiples of 8 up to this.
LARGEST_PACKED_HEAD = 256
#: A run that is predicted to be shorter than this is not compiled: the first compilation takes about a minute.
COMPILING_PAYS_SECONDS = 300.0


def choose_attention(config: Config, work: Workload, cluster: Cluster) -> Decision:
    """Packed where documents share rows and the kernels exist.

    Raises:
        UserError: (field ``plan.attention``) packed is asked for where it cannot be.
    """
    asked, field, shape = config.plan.attention, "plan.attention", work.shape
    obstacle = None
    if cluster.accelerator.kind != "cuda":
        obstacle = "the packed kernels are CUDA's"
    elif work.precision == "fp32":
        obstacle = "the packed kernels compute in 16 bits"
    elif shape.head_dim % 8 or shape.head_dim > LARGEST_PACKED_HEAD:
        obstacle = f"the packed kernels do not know heads of {shape.head_dim}"
    elif shape.soft_capped_attention:
        obstacle = "the packed kernels have no soft-capping"
    elif config.train.dropout == "model":
        obstacle = "the packed kernels have no dropout"
    if asked == "packed" and obstacle:
        raise UserError(field, asked, obstacle, "use sdpa or auto")
    if asked != "auto":
        return Decision(field=field, value=asked, reason="as set", pinned=True)
    if obstacle:
        return Decision(field=field, value="sdpa", reason=obstacle)
    reason = "documents of a row are computed apart, without a mask" if work.packing else "no mask has to be built"
    return Decision(field=field, value="packed", reason=reason)


def choose_compile(
    config: Config, work: Workload, cluster: Cluster, *, zero_stage: int, total_seconds: float
) -> Decision:
    """Compiled where every row has the same length and the run is long enough to pay for it.

    Raises:
        UserError: (field ``plan.compile``) asked for where it cannot be.
    """
    asked, field = config.plan.compile, "plan.compile"
    obstacle = None
    if cluster.accelerator.kind != "cuda":
        obstacle = "compiled layers are for GPUs"
    elif zero_stage == 3:
        obstacle = "ZeRO-3 fetches the parameters of every module as it runs, which breaks compiled code apart"
    if asked is True and obstacle:
        raise UserError(field, asked, obstacle, "remove the key")
    if asked != "auto":
        return Decision(field=field, value=asked, reason="as set", pinned=True)
    if obstacle is None and not work.packing:
        obstacle = "rows differ in length, and each length would be compiled anew"
    if obstacle is None and total_seconds < COMPILING_PAYS_SECONDS:
        obstacle = f"a run of {total_seconds:.0f} s ends before compiling has paid"
    if obstacle:
        return Decision(field=field, value=False, reason=obstacle)
    return Decision(field=field, value=True, reason="norms, activations and residual sums become few kernels")
