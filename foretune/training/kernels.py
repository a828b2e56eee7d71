"""The kernels that were planned, put into a model: attention and 8 bits before the engine, the others after it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from foretune.artifacts import Plan
from foretune.engine import DeepSpeedEngine
from foretune.errors import UserError
from foretune.events import EventKind, Journal
from foretune.model import attention, compilation, flash_attention_4, fp8, quack_kernels
from foretune.model.fused_qkv import fuse_qkv
from foretune.model.gated_mlp import fuse_mlps
from foretune.model.layers import decoder_layers
from foretune.model.weight_sums import sum_inside
from foretune.training.assignment import Assignment
from foretune.training.loop import StepReport
from foretune.training.state import TrainState

#: Steps of a launch in which compiling is expected.
_WARM_UP = 2


@contextmanager
def importing_kernels(plan: Plan, device: torch.device) -> Iterator[None]:
    """The libraries of kernels that are planned and that this device takes, imported by the end of it: 2 to 4 s.

    By a thread, while the engine is built, which waits for files and for the device. (Not in the warm spare: they ask
    the device for its kind as they are imported. And nothing that the main thread imports at the time: two threads
    that meet inside modules which import each other find them half made.) At ZeRO-3, which changes what a module is
    while it loads one, before anything is built.

    In any case before random states are set: where jax is installed these libraries import it, and that draws numbers
    from numpy's generator. Imported in the first step, a training that went on would have another state of it than one
    that never stopped.
    """

    def import_all() -> None:
        gc.disable()  # as in `foretune.training.spare`
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            if plan.compile_layers:
                quack_kernels.refusal(device)
            if plan.attention == "packed":
                flash_attention_4.is_there(device)
        finally:
            gc.enable()

    if plan.zero_stage == 3:
        import_all()
        yield
        return
    thread = threading.Thread(target=import_all)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def apply_attention(assignment: Assignment, model: Any, device: torch.device) -> None:
    """Packed attention where it is planned and this model has it; else the model keeps its own, and the run says so."""
    if assignment.plan.attention != "packed":
        return
    reason = attention.refusal(model, device=device)
    if reason is None:
        attention.use_packed_attention(model)
    else:
        assignment.tell(EventKind.NOTE, message=f"attention is sdpa: {reason}")


def apply_fp8(assignment: Assignment, model: Any, device: torch.device) -> None:
    """Linear maps of the layers in 8 bits, which the plan was asked for."""
    if obstacle := fp8.refusal(device):
        raise UserError("plan.fp8", True, obstacle, "remove the key")
    count = fp8.float8_linears(model)
    assignment.tell(EventKind.NOTE, message=f"{count} linear maps compute in 8-bit floats: other numerics than bf16")


def apply_weight_sums(assignment: Assignment, model: Any, engine: DeepSpeedEngine) -> None:
    """Gradients summed inside the product where it is planned. Tiles of an MLP sum their weights' themselves.

    Over these sums, gated MLPs with their activation inside.
    """
    if not assignment.plan.sum_in_matmul or assignment.plan.mlp_tile_rows:
        return
    sum_inside(model, engine.gradient_sums)
    if not assignment.plan.fused_mlp:
        return
    reason = quack_kernels.refusal(engine.device)
    if reason is None:
        layers = len(decoder_layers(model))
        if (left := layers - fuse_mlps(model)) > 0:
            reason = f"{left} of {layers} compute something else than SwiGLU, or not all of their weights are trained"
    if reason is not None:
        assignment.tell(EventKind.NOTE, message=f"MLPs take more memory and time than planned: {reason}")


def may_compile(assignment: Assignment, device: torch.device) -> bool:
    """Whether to compile: where it is planned and this machine can; otherwise the run says why not."""
    if not assignment.plan.compile_layers:
        return False
    reason = compilation.refusal(device)
    if reason is not None:
        assignment.tell(EventKind.NOTE, message=f"layers are not compiled: {reason}")
    return reason is None


def apply_compilation(assignment: Assignment, model: Any) -> None:
    """Compiled layers, which recompute as planned; with query, key and value by one product where that is planned.

    Where attention is not packed after all there is no output to keep, and layers recompute as a whole: inside their
    backward torch 2.11 would keep products that it was to make again.
    """
    plan = assignment.plan
    if plan.fused_qkv:
        layers = len(decoder_layers(model))
        if (left := layers - fuse_qkv(model)) > 0:
            message = f"{left} of {layers} layers compute query, key and value as their family does, not by one product"
            assignment.tell(EventKind.NOTE, message=message)
    keep_attention = plan.keep_attention and attention.takes_bounds(model)
    compilation.compile_layers(model, recompute_pointwise=plan.recompute_pointwise, keep_attention=keep_attention)


class CompileHook:
    """Says when something is compiled after the first steps: the shapes were not what they were thought to be."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._steps = self._graphs = 0

    def after_step(self, report: StepReport, state: TrainState) -> None:
        graphs = compilation.compiled_graphs()
        self._steps += 1
        if self._steps == _WARM_UP:
            found = f"{compilation.found_graphs()} of them found on disk"
            self._journal.write(EventKind.NOTE, message=f"compiled {graphs} graphs in {_WARM_UP} steps, {found}")
        elif self._steps > _WARM_UP and graphs > self._graphs:
            more = graphs - self._graphs
            self._journal.write(EventKind.NOTE, message=f"compiled {more} more graphs in step {report.step}")
        self._graphs = graphs
