"""Planning: from a model's shape, a cluster and a configuration to a `Plan` with a reason for every choice. No torch.

config.json ──shape──┐
nvidia-smi | SPEC ──▶ Cluster ──┐
Config, PreparedDataset ────────┴──search memory and time──▶ Plan, deepspeed.json
"""

from foretune.planning.machines.hardware import parse_hardware, probe
from foretune.planning.planner import make_plan
from foretune.planning.predict.calibration import Calibration
from foretune.planning.replan import after_out_of_memory

__all__ = ["Calibration", "after_out_of_memory", "make_plan", "parse_hardware", "probe"]
