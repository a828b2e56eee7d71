"""Adam with moments of 8 bits: it learns as fp32 states do, skips what is not finite, goes on with the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from foretune.engine.states import eight_bits
from foretune.engine.states.blocks import BLOCK, code


@pytest.fixture(scope="module")
def trained(result_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return result_of("eight_bit_steps.py", tmp_path_factory.mktemp("eight-bits"))


def test_it_learns_as_fp32_states_do(trained: dict[str, dict]) -> None:
    """Where bf16 masters stand still: 400 small steps, each tenth's mean loss."""
    fitted = trained["fitted"]
    for ours, exact in zip(fitted["8bit"], fitted["fp32"], strict=True):
        assert ours == pytest.approx(exact, rel=0.06)
    assert fitted["bf16"][-1] > 1.3 * fitted["8bit"][-1]


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_a_gradient_that_is_not_finite_changes_nothing(trained: dict[str, dict], optimizer: str) -> None:
    run = trained["runs"][optimizer]
    assert run["norms"][2] == float("inf")
    assert run["skip left all"]
    assert run["steps done"] == [2.0, 2.0]  # that one does not count


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_a_checkpoint_goes_on_with_the_same_bits(trained: dict[str, dict], optimizer: str) -> None:
    run = trained["runs"][optimizer]
    assert run["resumed"] == [run["digest"]] * 2
    assert run["other seed"] != run["digest"]
    assert trained["runs"]["adam"]["digest"] != trained["runs"]["adamw"]["digest"]


def test_a_checkpoint_has_the_weights_once(trained: dict[str, dict]) -> None:
    """Weights as the module's; where a master would be there is nothing, whatever torch keeps behind a view."""
    parameters = 64 * 301 + 301 + 301 * 33 + 33
    saved = trained["runs"]["adamw"]["saved bytes"]
    model = next(size for name, size in saved.items() if name.endswith("model_states.pt"))
    optimizer = next(size for name, size in saved.items() if name.endswith("optim_states.pt"))
    moments = next(size for name, size in saved.items() if name.startswith("device-states"))
    archive = 20_000  # of an archive and what DeepSpeed notes beside
    assert 2 * parameters < model < 2 * parameters + archive
    assert optimizer < archive
    assert 2 * parameters < moments < 2.04 * parameters + archive


@pytest.mark.parametrize("decoupled", [True, False])
def test_a_step_is_adams_up_to_rounding(decoupled: bool) -> None:
    """Three steps of a piece beside torch's fused kernel in fp32; the rounding of weights is taken out of it."""
    generator = torch.Generator().manual_seed(1)
    n, family = 64 * BLOCK, torch.optim.AdamW if decoupled else torch.optim.Adam
    exact = torch.nn.Parameter(torch.randn(n, generator=generator).to(torch.bfloat16).float())
    optimizer = family([exact], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, fused=True)
    weights = exact.detach().clone()  # in fp32, so that only the moments are rounded
    moments = [(torch.zeros(n, dtype=torch.uint8), torch.zeros(n // BLOCK)) for _ in range(2)]
    codes = code(weights.device, signed=True), code(weights.device, signed=False)
    keep = eight_bits.round_by_chance
    eight_bits.round_by_chance = lambda wide, noise: wide
    try:
        for step in range(1, 4):
            exact.grad = torch.randn(n, generator=generator)
            numbers = torch.tensor([1e-2, 0.1, 0.9, 0.99, 1e-8, 1.0, 0.0, 1 - 0.9**step, 1 - 0.99**step])
            eight_bits._advance(weights, exact.grad, *moments, torch.zeros(n), numbers, codes, decoupled=decoupled)
            optimizer.step()
    finally:
        eight_bits.round_by_chance = keep
    moved = (exact.detach() - weights).abs() / (3 * 1e-2)  # of what three steps can move
    assert moved.mean() < 0.005
    assert moved.max() < 0.2


@pytest.mark.slow  # compiles C++: some seconds, and needs g++
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it compiles
def test_compiled_gives_the_same_bits() -> None:
    n, codes = 256 * BLOCK, (code(torch.device("cpu"), signed=True), code(torch.device("cpu"), signed=False))
    compiled = torch.compile(eight_bits._advance, dynamic=False, fullgraph=True)
    outcomes = []
    for advance in (eight_bits._advance, compiled):
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn(n, generator=generator).to(torch.bfloat16)
        moments = [(torch.zeros(n, dtype=torch.uint8), torch.zeros(n // BLOCK)) for _ in range(2)]
        for step in range(1, 4):
            gradient = torch.randn(n, generator=generator)
            noise = torch.empty(n, dtype=torch.int16).random_(-(1 << 15), 1 << 15, generator=generator)
            numbers = torch.tensor([1e-3 * step, 0.1, 0.9, 0.99, 1e-8, 1.0, 0.0, 1 - 0.9**step, 1 - 0.99**step])
            advance(weights, gradient, *moments, noise, numbers, codes, decoupled=True)
        outcomes.append([weights, *(part for moment in moments for part in moment)])
    for plain, fused in zip(*outcomes, strict=True):
        assert torch.equal(plain, fused)
