"""Policy gradients against the numbers of the released code: steps, densities, advantages, losses, trees."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from generation.stochastic_steps import (
    StochasticStep,
    constant_free_log_prob,
    cps_step,
    dance_sde_step,
    ddim_step,
    flow_sde_step,
    gaussian_log_prob,
    stochastic_steps,
    take_step,
)

DTYPES = ("float64", "float32")
# The card's; no file states one. The released code rounds log(2 pi) to float32, by 2e-8. An entry that is nearly nothing
# is a difference of others, and is measured by the largest.
RTOL = {"float64": 1e-7, "float32": 1e-4}


def tensor(array: np.ndarray, dtype: str, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype)).requires_grad_(grad)


def close(golden: Any, name: str, actual: Any, dtype: str, where: Any = ..., factor: float = 1.0) -> None:
    expected = np.asarray(golden[name][where])
    actual = actual.detach().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    rtol = RTOL[dtype] * factor
    limits = {"rtol": rtol, "atol": rtol * float(np.abs(expected).max(initial=0))}
    np.testing.assert_allclose(actual, expected, err_msg=f"{name} {dtype}", **limits)


def taken(golden: Any, steps: list[StochasticStep], dtype: str, output: str) -> tuple[list, Tensor]:
    """The transition of row i by step i, and the network's outputs, which take gradients."""
    outputs = tensor(golden[output], dtype, grad=True)
    x, z = tensor(golden["x"], dtype), tensor(golden["z"], dtype)
    return [take_step(step, *(row[i : i + 1] for row in (x, outputs, z))) for i, step in enumerate(steps)], outputs


@pytest.mark.golden("grpo_flow_sde_step")
def test_flow_sde_and_cps_steps(golden: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    hyper, sigmas = golden.hyper, golden["sigmas"].tolist()
    assert golden["step_index"].tolist() == list(range(hyper["num_steps"]))
    levels = {"sde": hyper["noise_level_sde"], "cps": hyper["noise_level_cps"]}
    pairs = list(pairwise(sigmas))
    steps = {
        "sde": [flow_sde_step(*pair, level=levels["sde"], second_sigma=sigmas[1]) for pair in pairs],
        "cps": [cps_step(*pair, level=levels["cps"]) for pair in pairs],
    }
    for dtype in DTYPES:
        for kind, row in steps.items():
            took, v = taken(golden, row, dtype, "v")
            mean, sample = (torch.cat([getattr(step, name) for step in took]) for name in ("mean", "sample"))
            if kind == "sde":
                log_prob = gaussian_log_prob(sample, mean, torch.tensor([step.std for step in row]))
            else:
                log_prob = constant_free_log_prob(sample, mean)
            log_prob.sum().backward()
            close(golden, f"{kind}_x_prev", sample, dtype)
            close(golden, f"{kind}_mean", mean, dtype)
            close(golden, f"{kind}_std_dev_t", [step.kl_std for step in row], dtype)
            close(golden, f"{kind}_noise_scale", [step.std for step in row], dtype)
            close(golden, f"{kind}_logprob", log_prob, dtype)
            close(golden, f"{kind}_grad_v", v.grad, dtype)
            close(golden, f"{kind}_logprob_f32", log_prob, "float32")
            close(golden, f"{kind}_mean_f32", mean, "float32")
        took, _ = taken(golden, [flow_sde_step(*p, level=0.0, second_sigma=sigmas[1]) for p in pairs], dtype, "v")
        close(golden, "ode_next", torch.cat([step.sample for step in took]), dtype)

    scheduler = FlowMatchEulerDiscreteScheduler(shift=hyper["shift"])
    scheduler.set_timesteps(hyper["num_steps"])
    np.testing.assert_allclose(scheduler.timesteps, golden["timesteps"], rtol=1e-6)
    for kind, name in (("sde", "flow-sde"), ("cps", "cps")):
        ours = stochastic_steps(scheduler, name, level=levels[kind])
        close(golden, f"{kind}_noise_scale", [step.std for step in ours], "float32")


@pytest.mark.golden("grpo_dance_sde_step")
def test_dance_sde_step(golden: Any) -> None:
    hyper, sigmas = golden.hyper, golden["sigmas"].tolist()
    even = np.linspace(1, 0, hyper["num_steps"] + 1)
    np.testing.assert_allclose(sigmas, hyper["shift"] * even / (1 + (hyper["shift"] - 1) * even), atol=1e-12)
    steps = [dance_sde_step(*pair, level=hyper["eta"]) for pair in pairwise(sigmas)]
    for dtype in DTYPES:
        took, v = taken(golden, steps, dtype, "v")
        mean, sample = (torch.cat([getattr(step, name) for step in took]) for name in ("mean", "sample"))
        log_prob = torch.cat([gaussian_log_prob(step.sample, step.mean, step.std) for step in took])
        log_prob.sum().backward()
        close(golden, "mean", mean, dtype)
        close(golden, "x_prev", sample, dtype)
        close(golden, "noise_scale", [step.std for step in steps], dtype)
        close(golden, "logprob", log_prob, dtype)
        close(golden, "grad_v", v.grad, dtype)
        # The estimate of the image is where the deterministic step to sigma = 0 goes.
        whole, _ = taken(golden, [dance_sde_step(sigma, 0.0, level=0.0) for sigma in sigmas[:-1]], dtype, "v")
        close(golden, "x0_pred", torch.cat([step.sample for step in whole]), dtype)


def ddim_pairs(golden: Any, final: float | None) -> list[tuple[float, float]]:
    """Cumulative alphas before and after the steps; what follows t = 0 is `final`, or the first of the table."""
    table = golden["alphas_cumprod"].tolist()
    length = len(table) // golden.hyper["num_inference_steps"]
    end = table[0] if final is None else final
    return [(table[t], table[t - length] if t >= length else end) for t in golden["timesteps"].tolist()]


@pytest.mark.golden("grpo_ddim_logprob")
def test_ddim_step(golden: Any) -> None:
    hyper = golden.hyper
    rule = {"level": hyper["eta"], "prediction": hyper["prediction_type"]}
    steps = [ddim_step(*pair, **rule) for pair in ddim_pairs(golden, None)]  # DDPO's
    diffusers = [ddim_step(*pair, **rule) for pair in ddim_pairs(golden, float(golden["final_alpha_cumprod"]))]
    for dtype in DTYPES:
        x, z = tensor(golden["x"], dtype), tensor(golden["z"], dtype)
        output = tensor(golden["model_output"], dtype, grad=True)
        total = torch.zeros(())
        for number, step in enumerate(steps):
            mean, std, sample = take_step(step, x[number], output[number], z[number])
            close(golden, "mean", mean, dtype, number)
            close(golden, "std", std, dtype, number)
            close(golden, "x_prev", sample, dtype, number)
            log_prob = gaussian_log_prob(sample, mean, std)
            close(golden, "logprob", log_prob, dtype, number)
            total = total + log_prob.sum()
            there = take_step(diffusers[number], x[number], output[number], z[number]).sample
            close(golden, "diffusers_prev", there, dtype, number)
        total.backward()
        close(golden, "grad_model_output", output.grad, dtype)
