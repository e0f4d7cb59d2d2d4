"""Policy gradients against the numbers of the released code: steps, densities, advantages, losses, trees."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from generation.objectives.branch_tree import BranchTree, depth_advantages, fuse_rewards, grow_tree, keep_edges
from generation.objectives.group_advantages import group_advantages, median_advantages
from generation.objectives.policy_gradient import (
    PolicyTerms,
    gaussian_divergence,
    guarded_ratio,
    guarded_ratio_from_noise,
    plain_ratio,
    policy_loss,
    step_weights,
)
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
# No file states one. An entry that is nearly nothing is a difference of others, and is measured by the largest.
RTOL = {"float64": 1e-10, "float32": 1e-4}
LOG_PROB_RTOL = 1e-7  # the released code has log(2 pi) in float32, which is off by 2e-8


def tensor(array: np.ndarray, dtype: str, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype)).requires_grad_(grad)


def close(golden: Any, name: str, actual: Any, dtype: str, where: Any = ...) -> None:
    expected = np.asarray(golden[name][where])
    actual = actual.detach().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    rtol = max(RTOL[dtype], LOG_PROB_RTOL if "logprob" in name else 0)
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
                log_prob = gaussian_log_prob(
                    sample, mean, torch.tensor([step.std for step in row], dtype=torch.float64)
                )
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


@pytest.mark.golden("grpo_advantages")
def test_group_advantages(golden: Any) -> None:
    hyper, groups = golden.hyper, torch.from_numpy(golden["prompt_id"])
    flow, dance = {"eps": hyper["eps_flow"]}, {"eps": hyper["eps_dance"], "ddof": 1}
    assert (len(groups), len(groups.unique())) == (hyper["N"], hyper["groups"])
    for dtype in DTYPES:
        rewards = tensor(golden["rewards"], dtype)
        close(golden, "adv_group_std", group_advantages(rewards, groups, **flow), dtype)
        close(golden, "adv_global_std", group_advantages(rewards, groups, scale="global", **flow), dtype)
        close(golden, "adv_dance_group", group_advantages(rewards, groups, **dance), dtype)
        close(golden, "adv_dance_batch", group_advantages(rewards, torch.zeros_like(groups), **dance), dtype)


@pytest.mark.golden("grpo_mc_advantages")
def test_median_advantages(golden: Any) -> None:
    eps = golden.hyper["eps"]
    cases = [name.removesuffix("_rewards") for name in golden.names if name.endswith("_rewards")]
    sizes = [golden[f"{case}_rewards"].shape[1] for case in cases]
    assert sorted(sizes) == sorted(golden.hyper["group_sizes"])
    for case in cases:
        shape = golden[f"{case}_rewards"].shape
        groups = torch.arange(shape[0]).repeat_interleave(shape[1])
        for dtype in DTYPES:
            rewards = tensor(golden[f"{case}_rewards"].ravel(), dtype)
            advantages, excluded = median_advantages(rewards, groups, eps=eps)
            rescaled, again = median_advantages(rewards, groups, eps=eps, rescale=True)
            centred, _ = median_advantages(rewards, groups, scale="none")
            median = (rewards - centred).view(shape)
            close(golden, f"{case}_adv", advantages.view(shape), dtype)
            close(golden, f"{case}_adv_rescaled", rescaled.view(shape), dtype)
            close(golden, f"{case}_median", median[:, 0], dtype)
            close(golden, f"{case}_mad", centred.view(shape).abs().median(dim=1).values, dtype)
            # Which of tied entries is left out is nobody's contract.
            assert torch.equal(again, excluded)
            assert excluded.view(shape).sum(dim=1).tolist() == golden[f"{case}_excluded"].sum(axis=1).tolist()
            assert (advantages[excluded] == 0).all()
            assert not golden[f"{case}_adv"][golden[f"{case}_excluded"]].any()


def loss_of(terms: PolicyTerms) -> Tensor:
    return terms.losses.mean()


def under(step: StochasticStep, x: Tensor, x_prev: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v = v.clone().requires_grad_()
    mean = step.mean(x, v)
    return v, mean, gaussian_log_prob(x_prev, mean, step.std)


@pytest.mark.golden("grpo_guard_loss")
def test_guard_and_flow_losses(golden: Any) -> None:
    hyper, sigmas = golden.hyper, golden["sigmas"].tolist()
    numbers, clip = golden["steps"].tolist(), float(golden["clip_range"])
    assert (numbers, clip, float(golden["noise_level"])) == (
        hyper["steps"], hyper["clip_range"], hyper["noise_level"],
    )  # fmt: skip
    steps = [
        flow_sde_step(sigmas[i], sigmas[i + 1], level=hyper["noise_level"], second_sigma=sigmas[1]) for i in numbers
    ]
    weights = step_weights(steps, "guard", normalize=False)
    for dtype in DTYPES:
        rows = {name: tensor(golden[name], dtype) for name in ("x", "v_old", "v_new", "v_ref", "z", "x_prev", "adv")}
        rows["adv"] = rows["adv"].clamp(-hyper["adv_clip_max"], hyper["adv_clip_max"])
        for k, step in enumerate(steps):
            x, v_old, v_new, v_ref, z, x_prev, advantages = (row[k] for row in rows.values())
            close(golden, "std_dev_t", step.kl_std, dtype, k)
            close(golden, "sqrt_dt", step.std / step.kl_std, dtype, k)
            old = take_step(step, x, v_old, z)
            old_log_prob = gaussian_log_prob(x_prev, old.mean, step.std)
            close(golden, "x_prev", old.sample, dtype, k)
            close(golden, "mean_old", old.mean, dtype, k)
            close(golden, "logprob_old", old_log_prob, dtype, k)

            v, mean, log_prob = under(step, x, x_prev, v_new)
            close(golden, "mean_new", mean, dtype, k)
            close(golden, "logprob_new", log_prob, dtype, k)
            ratio = plain_ratio(log_prob, old_log_prob)
            loss = loss_of(policy_loss(ratio, advantages, clip=clip))
            loss.backward()
            close(golden, "ratio_flow", ratio, dtype, k)
            close(golden, "loss_flow", loss, dtype, k)
            close(golden, "grad_flow", v.grad, dtype, k)

            for exact in (False, True):
                v, mean, log_prob = under(step, x, x_prev, v_new)
                if exact:
                    ratio = guarded_ratio_from_noise(mean, old.mean, z)
                else:
                    std = torch.full((len(x),), step.std, dtype=torch.float64) if k % 2 else step.std
                    ratio = guarded_ratio(mean, old.mean, std, log_prob=log_prob, old_log_prob=old_log_prob)
                terms = policy_loss(ratio, advantages, clip=(clip, clip), weight=weights[k])
                loss_of(terms).backward()
                close(golden, "ratio_guard", ratio, dtype, k)
                close(golden, "loss_guard", loss_of(terms), dtype, k)
                close(golden, "grad_guard", v.grad, dtype, k)
                assert (terms.clipped_high | terms.clipped_low).tolist() == golden["clipped_guard"][k].tolist()

            # Released: one divergence, of the whole batch, for all. Not offered; it is what ours would be with it.
            v, mean, log_prob = under(step, x, x_prev, v_new)
            drift = gaussian_divergence(mean, old.mean, step.std).mean()
            ratio = (step.std * (log_prob - old_log_prob + drift)).exp()
            loss = loss_of(policy_loss(ratio, advantages, clip=clip, weight=weights[k]))
            loss.backward()
            close(golden, "ratio_released", ratio, dtype, k)
            close(golden, "loss_released", loss, dtype, k)
            close(golden, "grad_released", v.grad, dtype, k)

            divergence = gaussian_divergence(mean, step.mean(x, v_ref), step.kl_std)
            close(golden, "kl_released", divergence.mean(), dtype, k)


@pytest.mark.golden("grpo_guard_ddim")
def test_guard_with_ddim(golden: Any) -> None:
    hyper, clip = golden.hyper, golden.hyper["clip_range"]
    steps = [
        ddim_step(*pair, level=hyper["eta"], prediction=hyper["prediction_type"]) for pair in ddim_pairs(golden, None)
    ]
    weights = step_weights(steps, "guard", normalize=False)
    for name, values in {
        "std": [step.std for step in steps], "coef_out": [step.output for step in steps],
        "coef_x": [step.sample for step in steps], "weight": weights,
    }.items():  # fmt: skip
        close(golden, name, values, "float64")
    for dtype in DTYPES:
        x, z = tensor(golden["x"], dtype), tensor(golden["z"], dtype)
        old_output, output = tensor(golden["out_old"], dtype), tensor(golden["out_new"], dtype, grad=True)
        advantages = tensor(golden["adv"], dtype).clamp(-hyper["adv_clip"], hyper["adv_clip"])
        for exact in (False, True):
            output.grad = None
            for k, step in enumerate(steps):
                old, mean = take_step(step, x[k], old_output[k], z[k]), step.mean(x[k], output[k])
                log_probs = [gaussian_log_prob(old.sample, other, step.std) for other in (mean, old.mean)]
                if exact:
                    ratio = guarded_ratio_from_noise(mean, old.mean, z[k])
                else:
                    ratio = guarded_ratio(mean, old.mean, step.std, log_prob=log_probs[0], old_log_prob=log_probs[1])
                terms = policy_loss(ratio, advantages[k], clip=clip, weight=weights[k])
                loss_of(terms).backward()
                close(golden, "x_prev", old.sample, dtype, k)
                close(golden, "mean_old", old.mean, dtype, k)
                close(golden, "mean_new", mean, dtype, k)
                close(golden, "log_ratio", plain_ratio(*log_probs).log(), dtype, k)
                close(golden, "ratio_guard", ratio, dtype, k)
                close(golden, "loss", loss_of(terms), dtype, k)
                assert (terms.clipped_high | terms.clipped_low).tolist() == golden["clip_active"][k].tolist()
            close(golden, "grad_out_new", output.grad, dtype)


def child_softmax(tree: BranchTree, leaf_rewards: Tensor, edges: Tensor) -> Tensor:
    """The released fusion, which is not offered: over the children of a node, each as good as its own fused reward."""
    fused = torch.zeros(len(tree.parent), dtype=leaf_rewards.dtype)
    fused[tree.leaves] = leaf_rewards
    for node in reversed(range(len(tree.parent))):
        children = (tree.parent == node).nonzero()[:, 0]
        if len(children):
            fused[node] = edges[children].softmax(0) @ fused[children]
    return fused


@pytest.mark.golden("grpo_branch_tree")
def test_branch_tree(golden: Any) -> None:
    hyper, splits = golden.hyper, golden["split_steps"].tolist()
    pruned = golden["pruned_depths"].tolist()
    assert (splits, pruned) == (hyper["split_steps"], hyper["pruned_depths"])
    tree = grow_tree(hyper["steps"], splits, hyper["branching"])
    assert tree.parent.tolist() == golden["parent"].tolist()
    assert tree.depth.tolist() == golden["depth"].tolist()
    assert tree.leaves.tolist() == golden["leaf_index"].tolist()
    for dtype in DTYPES:
        rewards, edges = tensor(golden["leaf_reward"], dtype), tensor(golden["edge_logprob"], dtype)
        fused = {
            "uniform": fuse_rewards(tree, rewards),
            "pathsoftmax": fuse_rewards(tree, rewards, edges, beta=1.0),
            "childsoftmax": child_softmax(tree, rewards, edges),
        }
        for name, values in fused.items():
            close(golden, f"reward_{name}", values, dtype)
            close(golden, f"adv_{name}", depth_advantages(tree, values), dtype)
        for advantages in (depth_advantages(tree, fused["uniform"]), tensor(golden["adv_uniform"], dtype)):
            for name, how in {
                "keep_none": {},
                "keep_depth": {"pruned_depths": pruned},
                "keep_width1": {"width": "best"},
                "keep_width2": {"width": "extremes"},
                "keep_depth_width2": {"pruned_depths": pruned, "width": "extremes"},
            }.items():
                ratio = hyper["width_pruning_ratio"]
                kept = keep_edges(tree, advantages, split_steps=splits, ratio=ratio, **how)
                assert kept.tolist() == golden[name].tolist(), name
