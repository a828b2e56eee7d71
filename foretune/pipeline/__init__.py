"""The road and the verbs: `road` goes from data to export, `folder` keeps a run folder whole, `verbs` are the face."""

from foretune.pipeline.folder import default_out
from foretune.pipeline.road import STAGES, RunResult, travel
from foretune.pipeline.verbs import (
    NO_DATA,
    chat,
    evaluate,
    export,
    plan,
    plan_for,
    prepare,
    run,
    serve,
    served_folder,
    train,
)

__all__ = [
    "NO_DATA",
    "STAGES",
    "RunResult",
    "chat",
    "default_out",
    "evaluate",
    "export",
    "plan",
    "plan_for",
    "prepare",
    "run",
    "serve",
    "served_folder",
    "train",
    "travel",
]
