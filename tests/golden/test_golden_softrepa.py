"""SoftREPA against the numbers of the released code: the loss, tokens in a UNet's stages and in an MMDiT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from generation.objectives import denoising_matrix, softrepa_loss
from generation.soft_tokens import STAGES, SoftTokens

# The card's for float64; float32 rounds sums of some hundred products, and gradients of differences of such.
RTOL = {"float64": 1e-9, "float32": 1e-4}
DTYPES = tuple(RTOL)


def tensor(array: np.ndarray, dtype: str, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype)).requires_grad_(grad)


def close(golden: Any, name: str, actual: Tensor, dtype: str) -> None:
    """Within the stated tolerance; entries that are nearly nothing are measured by the largest."""
    expected = np.asarray(golden[name])
    assert tuple(actual.shape) == expected.shape, name
    limits = {"rtol": RTOL[dtype], "atol": RTOL[dtype] * float(np.abs(expected).max(initial=0))}
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, err_msg=f"{name} {dtype}", **limits)


@pytest.mark.golden("softrepa_loss")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_and_its_gradients(golden: Any, dtype: str) -> None:
    settings = {"scale": float(golden["scale"]), "temperature": float(golden["temp"])}
    weight = float(golden["dweight"])
    stated = golden.hyper
    assert (settings["scale"], settings["temperature"], weight) == tuple(
        stated[name] for name in ("scale", "temp", "dweight")
    )
    pred, target = tensor(golden["pred"], dtype, grad=True), tensor(golden["target"], dtype)
    errors = denoising_matrix(pred, target)
    assert errors.shape == (stated["B"], stated["P"])
    errors.retain_grad()
    terms = softrepa_loss(errors, denoising_weight=weight, **settings)
    terms.loss.backward()
    close(golden, "errors", errors, dtype)
    close(golden, "logits", terms.logits, dtype)
    close(golden, "loss", terms.loss, dtype)
    close(golden, "loss_contrastive_only", terms.contrastive.mean(), dtype)
    close(golden, "loss_contrastive_only", softrepa_loss(errors, **settings).loss, dtype)
    close(golden, "grad_errors", errors.grad, dtype)
    close(golden, "grad_pred", pred.grad, dtype)


@pytest.mark.golden("softrepa_unet_tokens")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_unets_stages_see(golden: Any, dtype: str) -> None:
    from diffusers import UNet2DConditionModel

    stated = golden.hyper
    table = golden["time_table"] if stated["use_dc_t"] else None
    golden.ignore("time_table")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=stated["D"],
    ).to(getattr(torch, dtype))  # fmt: skip
    tokens = SoftTokens(
        tensor(golden["tokens"], dtype),
        None if table is None else tensor(table, dtype),
        stages=[stage for stage, on in zip(STAGES, stated["apply_dc"], strict=True) if on],
    )
    assert tokens.count == stated["m"]
    seen: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            stage = name.split("_")[0]
            module.register_forward_pre_hook(
                lambda _, args, kwargs, stage=stage: seen[stage].append(kwargs["encoder_hidden_states"]),
                with_kwargs=True,
            )
    text = tensor(golden["text_hidden"], dtype)
    assert text.shape == (stated["B"], stated["S"], stated["D"])
    with tokens.attach(unet), torch.no_grad():
        unet(torch.zeros(len(text), 4, 8, 8, dtype=text.dtype), torch.from_numpy(golden["timesteps"]), text)
    for stage in STAGES:
        assert seen[stage]
        for states in seen[stage]:
            close(golden, stage, states, dtype)


@pytest.mark.golden("softrepa_sd3_tiny")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_mmdit_end_to_end(golden: Any, dtype: str, checkpointing: bool) -> None:
    from diffusers import SD3Transformer2DModel

    stated = dict(golden.hyper)
    layers, count = stated.pop("n_soft_layers"), stated.pop("m")
    precision = getattr(torch, dtype)
    model: nn.Module = SD3Transformer2DModel(**stated).to(precision)
    names = [name for name in golden.names if name.startswith("w/")]
    model.load_state_dict({name[2:]: tensor(golden[name], dtype) for name in names})
    model.requires_grad_(False)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    table = torch.zeros(100, golden["time_table_rows"].shape[1], dtype=precision)
    table[torch.from_numpy(golden["rows"])] = tensor(golden["time_table_rows"], dtype)
    tokens = SoftTokens(tensor(golden["tokens"], dtype), table)
    assert (tokens.layers, tokens.count) == (layers, count)
    inputs = {
        "hidden_states": tensor(golden["x"], dtype),
        "encoder_hidden_states": tensor(golden["text"], dtype),
        "pooled_projections": tensor(golden["pooled"], dtype),
        "timestep": tensor(golden["timesteps"], dtype),
    }
    with tokens.attach(model):
        out = model(**inputs).sample
        model(**inputs | {"timestep": inputs["timestep"] * 0 + 1})  # a call between forward and backward pass
        out.square().mean().backward()
    assert tokens.time_table is not None
    close(golden, "out_soft", out, dtype)
    close(golden, "grad_tokens", tokens.tokens.grad, dtype)
    close(golden, "grad_time_rows", tokens.time_table.grad[torch.from_numpy(golden["rows"])], dtype)
    close(golden, "out_base", model(**inputs).sample, dtype)
