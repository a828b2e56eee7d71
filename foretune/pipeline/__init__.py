"""The road and the verbs: `road` goes from data to export, `folder` keeps a run folder whole, `verbs` are the face."""

from foretune.pipeline.demonstration import DEMO_STAGES, DemoResult, demonstrate
from foretune.pipeline.folder import default_out
from foretune.pipeline.proof import prove, soak
from foretune.pipeline.road import STAGES, RunResult, travel
from foretune.pipeline.verbs import (
    NO_DATA,
    chat,
    confirm,
    evaluate,
    export,
    plan,
    plan_for,
    plan_for_deepspeed_alone,
    prepare,
    report,
    run,
    serve,
    served_folder,
    train,
)

__all__ = [
    "DEMO_STAGES",
    "NO_DATA",
    "STAGES",
    "DemoResult",
    "RunResult",
    "chat",
    "confirm",
    "default_out",
    "demonstrate",
    "evaluate",
    "export",
    "plan",
    "plan_for",
    "plan_for_deepspeed_alone",
    "prepare",
    "prove",
    "report",
    "run",
    "serve",
    "served_folder",
    "soak",
    "train",
    "travel",
]
