"""The optimizer that DeepSpeed shards: always torch's own, so that nothing has to be compiled."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from foretune.config.schema import TrainConfig
from foretune.engine.states.partial_offload import build_cpu_adam


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    train: TrainConfig,
    *,
    learning_rate: float,
    offload_optimizer: float = 0.0,
    vectors_apart: bool = False,
) -> torch.optim.Optimizer:
    """Build the configured optimizer over the trainable parameters.

    AdamW: Loshchilov and Hutter 2019. Adam: Kingma and Ba 2015, algorithm 1, weight decay as an L2 term. SGD with
    momentum: Sutskever et al. 2013 as in torch. Vectors (biases, norms) are not decayed, as is the field's practice.

    The fused kernels exist for CUDA and CPU and need no compiler; DeepSpeed's own FusedAdam and CPUAdam need one. Only
    a partial offload (0 < `offload_optimizer` < 1) is left to DeepSpeed's CPUAdam, which DeepSpeed insists on there.

    Args:
        vectors_apart: in a group of their own without decay too. ZeRO lays the weights of a group side by side, then
            without biases between them (`foretune.model.fused_qkv`).

    Raises:
        UserError: a partial offload with no compiler to build CPUAdam, or with SGD.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    assert trainable, "nothing to train"
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]  # ds_shape: sharded, p is empty
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
    if train.weight_decay or vectors_apart:
        groups = [
            {"params": matrices, "weight_decay": train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": trainable, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if 0 < offload_optimizer < 1:
        return build_cpu_adam(groups, train, learning_rate=learning_rate, offload_optimizer=offload_optimizer)
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=train.momentum)
    family = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return family(
        groups,
        lr=learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,
    )
