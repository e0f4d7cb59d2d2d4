"""The direction of D2-Align: guided vectors, reward, loss and gradients of every switch, and a run of stage 1."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from generation.rewards.direction import DirectionFit
from generation.rewards.guided_texts import guided_reward, guided_text_embeds

# None is stated for float32: a few dozen roundings on values of the order of 1.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}


def tensor(array: np.ndarray, dtype: str, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype)).requires_grad_(grad)


def compare(golden, name: str, actual: Tensor | float, dtype: str, where=...) -> None:
    expected = golden[name][where]
    limits = golden.tolerance() | {"atol": 1e-14} if dtype == "float64" else FLOAT32  # atol: gradients that are 0
    np.testing.assert_allclose(
        torch.as_tensor(actual, dtype=torch.float64).detach(), expected, err_msg=f"{name} {where}", **limits
    )


@pytest.mark.golden("d2_direction")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_direction(golden, dtype):
    plain = torch.nn.functional.cosine_similarity(
        *(tensor(golden[name], dtype) for name in ("image_emb", "text_emb")), dim=1
    )
    compare(golden, "reward_uncorrected", plain, dtype)
    switches = sorted(name.removeprefix("reward_") for name in golden.names if re.match(r"reward_pre\d_renorm\d", name))
    assert switches
    for switch in switches:
        pre, renorm = re.fullmatch(r"(pre\d)_(renorm\d)", switch).groups()
        how = {"normalize_text": pre == "pre1", "renormalize": renorm == "renorm1"}
        for m, b_row in enumerate(golden["b"]):
            for o, omega in enumerate(golden["omegas"].tolist()):
                images, b = tensor(golden["image_emb"], dtype, grad=True), tensor(b_row, dtype, grad=True)
                texts = tensor(golden["text_emb"], dtype)
                guided = guided_text_embeds(texts, b, omega, normalize_text=how["normalize_text"])
                compare(golden, f"e_plus_{pre}", guided.e_plus, dtype, m)
                compare(golden, f"e_minus_{pre}", guided.e_minus, dtype, m)
                compare(golden, f"e_tilde_{pre}", guided.e_tilde, dtype, (m, o))
                rewards = guided_reward(images, texts, b, omega, **how)
                loss = -rewards.mean()
                loss.backward()
                compare(golden, f"reward_{switch}", rewards, dtype, (m, o))
                compare(golden, f"loss_{switch}", loss, dtype, (m, o))
                compare(golden, f"grad_b_{switch}", b.grad, dtype, (m, o))
                compare(golden, f"grad_image_{switch}", images.grad, dtype, (m, o))
                if not b_row.any() and how["renormalize"]:
                    torch.testing.assert_close(rewards, plain)

    stage = golden.hyper["stage1"]
    assert (stage["init"], "AdamW betas (0.9,0.999) eps 1e-8" in stage["optimizer"]) == ("zeros", True), stage
    images, texts = (tensor(golden[name], dtype) for name in ("image_emb", "text_emb"))
    fit = DirectionFit(
        images[0],
        omega=stage["omega"],
        lr=stage["lr"],
        weight_decay=float(re.search(r"weight_decay (\S+)", stage["optimizer"]).group(1)),
        max_grad_norm=stage["clip_norm"],
        normalize_text=bool(stage["pre"]),
        renormalize=bool(stage["renorm"]),
    )
    compare(golden, "stage1_b", fit.b, dtype, 0)
    for step in range(stage["steps"]):
        rows = torch.arange(step * stage["batch"], (step + 1) * stage["batch"]) % len(images)
        loss, norm = fit.step(images[rows], texts[rows])
        compare(golden, "stage1_loss", loss, dtype, step)
        compare(golden, "stage1_gradnorm", norm, dtype, step)
        compare(golden, "stage1_b", fit.b, dtype, step + 1)
