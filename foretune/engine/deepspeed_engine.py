"""The real engine. Everything that must be known about DeepSpeed to train right is in this file.

in: a model, an optimizer over its trainable parameters, a DeepSpeed configuration   out: `Engine`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import GatheredParameters

from foretune.artifacts import Checkpoint, layout_name
from foretune.checkpoint import layout
from foretune.checkpoint.snapshot import StateWriter
from foretune.checkpoint.whole_states import whole_states
from foretune.engine.communication import CommunicationClock, gather_in_place
from foretune.engine.protocol import StepResult
from foretune.engine.reduction import ReductionAtStep
from foretune.engine.saves import mapped_loads, redirected_saves
from foretune.engine.shortcuts import apply_shortcuts
from foretune.engine.states.eight_bits import EightBits, EightBitStates
from foretune.engine.states.masters import WithoutMasters, can_do_without
from foretune.engine.states.partial_offload import PartialOffload
from foretune.engine.states.relayout import load_whole
from foretune.engine.states.streaming import StreamedStates
from foretune.engine.sums import WideSums
from foretune.errors import MachineFault, UserError
from foretune.model.weight_sums import GradientSum

#: DeepSpeed keeps a checkpoint in a folder named by a tag; ours is always this one.
ENGINE_TAG = "engine"
_NCCL_OUT_OF_MEMORY = ("Failed to CUDA calloc", "Failed to CUDA malloc", "Cuda failure 'out of memory'")


class DeepSpeedEngine:
    """`Engine` on DeepSpeed, ZeRO stages 0-3.

    Args:
        module: the model; at stage 3 loaded within `partitioned_loading`.
        optimizer: a torch optimizer over the trainable parameters.
        deepspeed_config: DeepSpeed's configuration, with ``managed_gradient_accumulation: false``: `step` is the
            boundary, so that a global batch may have any number of micro-batches.
        device: this rank's device.
        save_frozen: whether a checkpoint also holds the parameters that are not trained.
        streamed_share: of master weights and Adam's states, that lies in host memory and passes through the device at
            every step (see `foretune.engine.states.streaming`). ZeRO 1, 16-bit weights, fp32 sums.
        eight_bits: moments of 8 bits and no master weights: other numerics (see `foretune.engine.states.eight_bits`).
            ZeRO 1, 16-bit weights, fp32 sums.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        deepspeed_config: dict[str, Any],
        *,
        device: torch.device,
        save_frozen: bool = True,
        streamed_share: float = 0.0,
        eight_bits: EightBits | None = None,
    ) -> None:
        self._groups = [list(group["params"]) for group in optimizer.param_groups]  # DeepSpeed puts its own there
        without_masters = WithoutMasters() if streamed_share or eight_bits else None
        if eight_bits:  # the weights are all there is: a checkpoint has them once, as the module's
            zero_section = {**deepspeed_config["zero_optimization"], "load_from_fp32_weights": False}
            deepspeed_config = {**deepspeed_config, "zero_optimization": zero_section}
        with translated_errors(), without_masters or nullcontext():
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config)
        if isinstance(self._engine.optimizer, FP16_UnfusedOptimizer):
            _undo_empty_step(self._engine.optimizer)
        self.module: torch.nn.Module = self._engine.module
        self.device = device
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.zero_stage = int(self._engine.zero_optimization_stage())
        self._save_frozen = save_frozen
        self._torch_optimizer = optimizer
        self._communication = CommunicationClock()
        self._reduction: ReductionAtStep | None = None
        if device.type == "cpu":
            gather_in_place(deepspeed.comm.comm.cdb)
            self._communication.watch(deepspeed.comm.comm.cdb)
            if ReductionAtStep.applies(self._engine):
                self._reduction = ReductionAtStep(self._engine)
        self._plain_grad_norm: torch.Tensor | None = None
        zero = self._engine.optimizer
        if without_masters is not None:
            assert can_do_without(zero, optimizer), "not planned for this layout"
            without_masters.check(zero)
        self._partial_offload = PartialOffload.of(zero)
        self._streamed = StreamedStates(zero, optimizer, share=streamed_share) if streamed_share else None
        self._eight_bits = EightBitStates(zero, optimizer, eight_bits) if eight_bits else None
        #: Where gradients are added up, of every trainable parameter, where that is ours to know.
        self.gradient_sums: dict[torch.nn.Parameter, GradientSum] = {}
        if device.type == "cuda":
            self._take_shortcuts()
        if self._engine.optimizer is optimizer:  # stage 0 in fp32: no wrapper, and DeepSpeed reports no norm
            self._measure_plain_grad_norm(optimizer)

    def __call__(self, **inputs: Any) -> Any:
        with translated_errors():
            return self._engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        # Unscaled: the caller has already divided by the target tokens of the whole global batch.
        held_back = self._reduction.held_back() if self._reduction else nullcontext()
        with translated_errors(), held_back:
            self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        for group in self._param_groups():
            group["lr"] = learning_rate
        with translated_errors():
            self._engine.step()
        norm = self._plain_grad_norm if self._plain_grad_norm is not None else self._engine.get_global_grad_norm()
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        scale = getattr(self._engine.optimizer, "cur_scale", 1.0)  # fp16's dynamic scaler
        return StepResult(
            grad_norm=float(norm) if norm is not None else float("nan"),
            applied=not overflow,
            loss_scale=float(scale),
        )

    def sum_over_ranks(self, values: list[float | torch.Tensor]) -> list[float]:
        # One copy to the device, one back: what is on the device already is not fetched first.
        known = [0.0 if isinstance(value, torch.Tensor) else value for value in values]
        tensor = torch.tensor(known, dtype=torch.float64, device=self.device)
        for index, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                tensor[index] = value
        if self.world_size > 1:
            with translated_errors():
                torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def take_communication(self) -> float:
        return self._communication.take()

    def on_collective(self, callback: Callable[[], None]) -> None:
        """Call `callback` on entering each of DeepSpeed's collectives (on a CPU only, where they are watched)."""
        self._communication.on_enter = callback

    def before_update(self, callback: Callable[[], None]) -> None:
        """Call `callback` inside each optimizer step, right before weights change."""
        self._torch_optimizer.register_step_pre_hook(lambda *_: callback())

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def save(self, write: StateWriter) -> None:
        # save_latest=False: the tag file is written before DeepSpeed's last barrier and has no meaning for us.
        with translated_errors(), self._whole_partitions(), redirected_saves(self._engine, write) as root:
            self._engine.save_checkpoint(
                root, tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=not self._save_frozen
            )
        if self._states_apart is not None:
            write(layout.device_states_file(self.rank), self._states_apart.state_dict())

    def load(self, folder: Path, manifest: Checkpoint | None = None) -> None:
        if manifest is not None:
            self._refuse_other_states(manifest)
            if (manifest.world_size, manifest.zero_stage) != (self.world_size, self.zero_stage):
                self._load_other_layout(folder, manifest)
                return
        # On a CPU states would stay mapped from the checkpoint, and its room on the disk taken, for good.
        mapped = mapped_loads(self._engine) if self.device.type == "cuda" or self._streamed else nullcontext()
        with translated_errors(), self._whole_partitions(), mapped:
            path, _ = self._engine.load_checkpoint(
                str(folder),
                tag=ENGINE_TAG,
                load_module_strict=self._save_frozen,
                load_lr_scheduler_states=False,
            )
        if path is None:
            raise MachineFault(f"DeepSpeed could not load {folder}", rank=self.rank)
        if self._states_apart is not None:
            self._states_apart.load_state_dict(
                torch.load(folder / layout.device_states_file(self.rank), map_location="cpu", weights_only=False)
            )

    def _load_other_layout(self, folder: Path, manifest: Checkpoint) -> None:
        names = {parameter: name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        groups = [[names[parameter] for parameter in group] for group in self._groups]
        whole = whole_states(folder, manifest, groups=groups)
        with translated_errors(), self._whole_partitions():
            load_whole(self._engine.optimizer, self.module, names, whole, stage=self.zero_stage)

    def _refuse_other_states(self, manifest: Checkpoint) -> None:
        """States in a file of ours (8 bits, a partial offload) are read by an engine of the same layout alone."""
        theirs, ours = layout.device_states_file(0) in manifest.files, self._states_apart is not None
        same_layout = (manifest.world_size, manifest.zero_stage) == (self.world_size, self.zero_stage)
        if theirs != ours or (ours and not same_layout):
            which = "8 bits, or offloaded in part" if theirs else "fp32 or bf16, and not offloaded in part"
            problem = f"the checkpoints are of {manifest.layout}, with optimizer states in {which}"
            mend = "go on with the command that began this run, or give another --out"
            raise UserError("plan", layout_name(self.world_size, self.zero_stage), problem, mend)

    @contextmanager
    def whole_parameters(self, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        """Within this, the given parameters are whole on every rank (they already are below stage 3)."""
        with GatheredParameters(parameters, enabled=self.zero_stage == 3):
            yield

    def _take_shortcuts(self) -> None:
        zero = self._engine.optimizer
        if WideSums.applies(zero):
            self.gradient_sums = WideSums(zero, self._torch_optimizer).of
        else:
            apply_shortcuts(zero, self._torch_optimizer)

    def _whole_partitions(self) -> AbstractContextManager[None]:
        return self._streamed.whole() if self._streamed else nullcontext()

    @property
    def _states_apart(self) -> PartialOffload | EightBitStates | None:
        """Those that are in none of DeepSpeed's files."""
        return self._partial_offload or self._eight_bits

    def _param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups if self._partial_offload is None else [*groups, *self._partial_offload.param_groups]

    def _measure_plain_grad_norm(self, optimizer: torch.optim.Optimizer) -> None:
        """Let stage 0 in fp32 report the norm that every other stage reports: whole, before clipping.

        DeepSpeed reduces, clips and steps inside its ``step()``, so the norm is taken where it clips, or right before
        the optimizer steps when clipping is off.
        """
        max_norm = float(self._engine.gradient_clipping())
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def clip() -> None:
            self._plain_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)

        def measure(*_: Any) -> None:
            if max_norm <= 0:
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                self._plain_grad_norm = torch.nn.utils.get_total_norm(gradients)

        self._engine.clip_fp32_gradients = clip
        optimizer.register_step_pre_hook(measure)


@torch.no_grad()
def _undo_empty_step(wrapper: FP16_UnfusedOptimizer) -> None:
    """Stage 0 in 16 bits: DeepSpeed makes the optimizer's states by a step with gradients of zero.

    That step decays the master weights, and Adam counts it, which takes a quarter off the first real step.
    """
    for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for weight, master in zip(weights, masters, strict=True):
            master.copy_(weight)
    for state in wrapper.optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


@contextmanager
def translated_errors() -> Iterator[None]:
    """Foreign errors become ours at this door: out of memory and broken communication are the machine's faults."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        cause = f"device out of memory: {str(error).splitlines()[0]}"
        raise MachineFault(cause, kind="device_out_of_memory") from error
    except torch.distributed.DistError as error:
        if any(words in str(error) for words in _NCCL_OUT_OF_MEMORY):  # it makes its buffers at its first collective
            cause = f"device out of memory: {str(error).splitlines()[-1]}"
            raise MachineFault(cause, kind="device_out_of_memory") from error
        raise MachineFault(f"communication failed: {str(error).splitlines()[0]}", kind="communication") from error
    except RuntimeError as error:
        text = str(error)
        if "CUDA out of memory" in text:  # some paths raise it as a plain RuntimeError
            raise MachineFault(f"device out of memory: {text.splitlines()[0]}", kind="device_out_of_memory") from error
        if "Connection closed by peer" in text or "Connection reset by peer" in text or "gloo" in text.lower():
            raise MachineFault(f"communication failed: {text.splitlines()[0]}", kind="communication") from error
        raise
