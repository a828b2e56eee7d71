"""The door to DeepSpeed.

`Engine` is what the loop sees, `DeepSpeedEngine` the real one, `FakeEngine` plain PyTorch in one process.
"""

from foretune.engine.deepspeed_engine import DeepSpeedEngine
from foretune.engine.fake import FakeEngine
from foretune.engine.group import close_group, import_late_modules, open_group, without_compiler
from foretune.engine.optimizers import build_optimizer
from foretune.engine.partitioned import partitioned_loading
from foretune.engine.protocol import Engine, StepResult
from foretune.engine.states.eight_bits import EightBits

__all__ = [
    "DeepSpeedEngine",
    "EightBits",
    "Engine",
    "FakeEngine",
    "StepResult",
    "build_optimizer",
    "close_group",
    "import_late_modules",
    "open_group",
    "partitioned_loading",
    "without_compiler",
]
