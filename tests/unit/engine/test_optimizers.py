"""The optimizers against their formulas, ten steps in numpy float64."""

import numpy as np
import pytest
import torch

from foretune.config.schema import TrainConfig
from foretune.engine import build_optimizer

STEPS, RATE = 10, 1e-2


def run(train: TrainConfig, start: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = build_optimizer([parameter], train, learning_rate=RATE)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    return parameter.detach().numpy()


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(5, 4)), generator.normal(size=(STEPS, 5, 4))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_with_bias_correction(kind: str, weight_decay: float, problem: tuple[np.ndarray, np.ndarray]) -> None:
    """m = β1 m + (1-β1) g,  v = β2 v + (1-β2) g²,  m̂ = m/(1-β1ᵗ),  v̂ = v/(1-β2ᵗ),  θ -= lr m̂/(√v̂ + ε)."""
    start, gradients = problem
    train = TrainConfig(optimizer=kind, weight_decay=weight_decay, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    theta, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, gradient in enumerate(gradients, 1):
        if kind == "adamw":
            theta -= RATE * weight_decay * theta
            g = gradient
        else:
            g = gradient + weight_decay * theta
        m = 0.8 * m + 0.2 * g
        v = 0.95 * v + 0.05 * g**2
        theta -= RATE * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
    np.testing.assert_allclose(run(train, start, gradients), theta, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum: float, problem: tuple[np.ndarray, np.ndarray]) -> None:
    """b = μ b + g,  θ -= lr b."""
    start, gradients = problem
    theta, buffer = start.copy(), np.zeros_like(start)
    for gradient in gradients:
        buffer = momentum * buffer + gradient
        theta -= RATE * buffer
    found = run(TrainConfig(optimizer="sgd", momentum=momentum), start, gradients)
    np.testing.assert_allclose(found, theta, rtol=1e-12)


def test_vectors_are_not_decayed() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = build_optimizer(parameters, TrainConfig(weight_decay=0.1), learning_rate=RATE)
    assert [(group["weight_decay"], group["params"][0].ndim) for group in optimizer.param_groups] == [
        (0.1, 2),
        (0.0, 1),
    ]


def test_vectors_are_apart_if_asked() -> None:
    """Without decay too; the steps are the same."""
    parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    apart = build_optimizer(parameters, TrainConfig(), learning_rate=RATE, vectors_apart=True)
    assert [[one.ndim for one in group["params"]] for group in apart.param_groups] == [[2], [1]]
    assert {group["weight_decay"] for group in apart.param_groups} == {0.0}
    together = build_optimizer(parameters, TrainConfig(), learning_rate=RATE)
    assert [[one.ndim for one in group["params"]] for group in together.param_groups] == [[2, 1]]
