"""Adapters: exact at the start, float32, a function of the seed, and switched off without a trace."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from generation.lora import add_lora, load_lora_state, lora_config, lora_disabled, lora_state
from generation.tiny import tiny_pipeline
from mmalign.errors import InputError


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny_pipeline("sdxl").unet.requires_grad_(False)


@pytest.fixture
def unet(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base)


def forward(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    parameter = next(unet.parameters())
    config = getattr(unet, "module", unet).config

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(parameter.dtype)

    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    conditions = {"text_embeds": noise(2, pooled), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    latents, prompts = noise(2, 4, 8, 8), noise(2, 77, config.cross_attention_dim)
    return unet(latents, torch.tensor([10, 900]), prompts, added_cond_kwargs=conditions).sample


def fill(unet: nn.Module) -> nn.Module:
    """Random values in all of the adapter, so that it does something."""
    generator = torch.Generator().manual_seed(2)
    state = lora_state(unet)
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        state[key] = value * (1 + 0.3 * noise) if "magnitude" in key else 0.3 * noise
    load_lora_state(unet, state)
    return unet


def test_the_start_is_the_model_itself(base: nn.Module, unet: nn.Module) -> None:
    parameters = add_lora(unet, rank=4, seed=0)
    assert torch.equal(forward(unet), forward(base))
    assert {id(parameter) for parameter in parameters} == {id(p) for p in unet.parameters() if p.requires_grad}
    blocks = 2 * 1 + 2 * 2 + 2 + 3 * 2 + 3 * 1  # down, down, middle, up, up
    assert len(parameters) == blocks * 2 * 4 * 2  # attentions, their layers, A and B
    # in + out for every rank, counted on the model without adapter
    linear = [m for name, m in base.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert sum(p.numel() for p in parameters) == 4 * sum(m.in_features + m.out_features for m in linear)


def test_sdxl_has_as_many_parameters_as_counted() -> None:
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    parameters = add_lora(unet, rank=2, seed=0)
    assert len(parameters) == 1_120
    assert sum(parameter.numel() for parameter in parameters) == 2 * 1_451_520


def test_initialisation_is_a_function_of_the_seed(base: nn.Module) -> None:
    def start(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        unet = copy.deepcopy(base).to(dtype)
        add_lora(unet, rank=8, seed=seed)
        return lora_state(unet)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = start(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    for other in (start(3), start(3, torch.bfloat16)):
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert not torch.equal(*(state["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"]
                             for state in (first, start(4))))  # fmt: skip
    downs = [value for key, value in first.items() if "lora_A" in key]
    assert all((value == 0).all() for key, value in first.items() if "lora_B" in key)
    assert len({tuple(value.flatten().tolist()) for value in downs}) == len(downs)
    for value in downs:
        assert value.std().item() == pytest.approx(1 / 8, rel=0.25)


@pytest.mark.parametrize("dora", [False, True])
def test_half_precision_base_keeps_float32_adapters(base: nn.Module, dora: bool) -> None:
    unet = copy.deepcopy(base).to(torch.bfloat16)
    plain = forward(unet)
    parameters = add_lora(unet, rank=4, dora=dora, seed=0)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    if dora:
        name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
        weight = unet.get_submodule(name).base_layer.weight.double().numpy()
        magnitude = lora_state(unet)[f"{name}.lora_magnitude_vector"]
        np.testing.assert_allclose(magnitude, np.sqrt((weight**2).sum(1)), rtol=1e-6)
    torch.testing.assert_close(forward(unet), plain)
    fill(unet)
    forward(unet).float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)
    assert {parameter.grad.dtype for parameter in parameters} == {torch.float32}


@pytest.mark.parametrize("option", ["plain", "rslora", "dora"])
def test_a_layer_computes_what_the_papers_say(unet: nn.Module, option: str) -> None:
    options = {} if option == "plain" else {option: True}
    add_lora(unet, rank=4, alpha=6, seed=0, **options)
    fill(unet)
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_v")
    state = {key.rpartition("lora_")[2]: value.double().numpy() for key, value in lora_state(unet).items()
             if key.startswith("mid_block.attentions.0.transformer_blocks.0.attn1.to_v.")}  # fmt: skip
    weight = layer.base_layer.weight.double().numpy()
    merged = weight + (6 / 2 if option == "rslora" else 6 / 4) * state["B.weight"] @ state["A.weight"]
    if option == "dora":
        merged *= (state["magnitude_vector"] / np.linalg.norm(merged, axis=1))[:, None]
    inputs = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(layer(inputs).detach(), inputs.double().numpy() @ merged.T, rtol=1e-4, atol=1e-5)


def test_disabled_is_the_model_itself_and_restored(base: nn.Module, unet: nn.Module) -> None:
    parameters = add_lora(unet, rank=4, seed=0)
    plain, adapted = forward(base), forward(fill(unet)).detach()
    assert (adapted - plain).abs().max() > 0.01
    with lora_disabled(unet):
        assert torch.equal(forward(unet), plain)
        with lora_disabled(unet):
            pass
        assert torch.equal(forward(unet), plain)
    assert torch.equal(forward(unet), adapted)
    with pytest.raises(RuntimeError, match="in between"), lora_disabled(unet):
        raise RuntimeError("in between")
    assert torch.equal(forward(unet), adapted)
    assert all(parameter.requires_grad for parameter in parameters)


def test_disabled_follows_a_change_of_adapter(base: nn.Module, unet: nn.Module) -> None:
    for seed in (0, 1):
        add_lora(unet, rank=4, seed=seed, targets=("to_q",) if seed else ("to_k",))
        fill(unet)
        twin = copy.deepcopy(unet)
        for model in (unet, twin):
            with lora_disabled(model):
                assert torch.equal(forward(model), forward(base))
            assert not torch.equal(forward(model), forward(base))
        unet.unload_lora()


def test_a_reference_pass_before_the_backward_pass_changes_no_gradient(unet: nn.Module) -> None:
    parameters = add_lora(unet, rank=4, seed=0)
    fill(unet).enable_gradient_checkpointing()
    unet.train()
    forward(unet).square().mean().backward()
    alone = [parameter.grad for parameter in parameters]
    unet.zero_grad()
    loss = forward(unet).square().mean()
    with torch.no_grad(), lora_disabled(unet):
        forward(unet)
    loss.backward()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, alone, strict=True))


def test_wrapped_for_distributed_training(base: nn.Module, unet: nn.Module, tmp_path: Path) -> None:
    add_lora(unet, rank=4, seed=0)
    fill(unet)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(unet)
        state = lora_state(wrapped)
        assert state.keys() == lora_state(unet).keys()
        with lora_disabled(wrapped):
            assert torch.equal(forward(wrapped), forward(base))
        load_lora_state(wrapped, {key: torch.zeros_like(value) for key, value in state.items()})
        assert torch.equal(forward(unet), forward(base))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dora", [False, True])
def test_state_is_a_copy_that_restores(base: nn.Module, unet: nn.Module, dora: bool) -> None:
    parameters = add_lora(unet, rank=4, dora=dora, seed=0)
    state, output = lora_state(fill(unet)), forward(unet)
    assert {(value.dtype, value.device.type) for value in state.values()} == {(torch.float32, "cpu")}
    kept = {key: value.clone() for key, value in state.items()}
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    other = copy.deepcopy(base)
    theirs = add_lora(other, rank=4, dora=dora, seed=9)
    load_lora_state(other, state)
    assert torch.equal(forward(other), output)
    load_lora_state(unet, state)
    assert torch.equal(forward(unet), output)
    # in place, as an optimiser holds the parameters
    assert [id(parameter) for parameter in theirs] == [id(p) for p in other.parameters() if p.requires_grad]


def test_state_of_another_adapter_is_refused(base: nn.Module, unet: nn.Module) -> None:
    add_lora(unet, rank=4, seed=0)
    state = lora_state(unet)
    first = next(iter(state))
    with pytest.raises(InputError, match=f"{first}' is missing"):
        load_lora_state(unet, {key: value for key, value in state.items() if key != first})
    with pytest.raises(InputError, match="'extra' is unexpected"):
        load_lora_state(unet, {**state, "extra": torch.zeros(1)})
    narrow = copy.deepcopy(base)
    add_lora(narrow, rank=2, seed=0)
    with pytest.raises(InputError, match="has the shape"):
        load_lora_state(unet, lora_state(narrow))
    assert all(torch.equal(value, state[key]) for key, value in lora_state(unet).items())


def test_targets_and_alpha(unet: nn.Module) -> None:
    add_lora(unet, rank=2, targets=("ff.net.0.proj", "conv_in", "proj_out"), seed=0)
    layers = {key.partition(".lora_")[0] for key in lora_state(unet)}
    assert sum(name.endswith(".ff.net.0.proj") for name in layers) == len(layers) - 12 == 17
    assert "conv_in" in layers
    assert sum(name.endswith("proj_out") for name in layers) == 11
    assert lora_config(unet).lora_alpha == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"targets": ("to_q", "attn1")}, "named 'attn1'; there are: .*to_k.*to_out.0"),
        ({"targets": "to_q"}, "must be a list"),
        ({"targets": ()}, "must be a list"),
    ],
)
def test_refusals(unet: nn.Module, options: dict, message: str) -> None:
    before = [name for name, _ in unet.named_parameters()]
    with pytest.raises(InputError, match=message) as caught:
        add_lora(unet, seed=0, **options)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in unet.named_parameters()] == before


def test_one_adapter_only(unet: nn.Module) -> None:
    for call in (lora_state, lora_config, lambda model: load_lora_state(model, {})):
        with pytest.raises(InputError, match="no adapter"):
            call(unet)
    with pytest.raises(InputError, match="no adapter"), lora_disabled(unet):
        pass
    add_lora(unet, rank=1, seed=0)
    with pytest.raises(InputError, match="already has the adapter 'default'"):
        add_lora(unet, rank=1, seed=0)


def test_on_a_half_precision_base_the_adapter_multiplies_in_half_precision_without_autocast() -> None:
    """The gradients are float32, and those that peft's own layers have under autocast."""
    from generation.tiny import tiny_pipeline

    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 64, generator=generator)
    pooled, sizes = torch.randn(2, 32, generator=generator), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    half = torch.bfloat16

    def gradients(as_peft_has_them: bool) -> tuple[Tensor, set[torch.dtype]]:
        unet = tiny_pipeline("sdxl").unet.to(half)
        parameters = add_lora(unet, rank=4, targets=["to_q", "to_v", "conv1"], seed=0)
        seen: set[torch.dtype] = set()
        for name, module in unet.named_modules():
            if as_peft_has_them and hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = True
            if name.endswith(("lora_A.default", "lora_B.default")):
                if as_peft_has_them:
                    module.__class__ = type(module).__mro__[1]
                module.register_forward_hook(lambda _, args, out: seen.update((args[0].dtype, out.dtype)))
        with torch.autocast("cpu", half, enabled=as_peft_has_them):
            added = {"text_embeds": pooled.to(half), "time_ids": sizes}
            output = unet(sample.to(half), 500, text.to(half), added_cond_kwargs=added).sample
        output.float().square().mean().backward()
        assert {p.grad.dtype for p in parameters if p.grad is not None} == {torch.float32}
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), seen

    (ours, seen), (peft, seen_by_peft) = gradients(False), gradients(True)
    assert seen == {half}
    assert torch.float32 in seen_by_peft  # the copies that are spared
    torch.testing.assert_close(ours, peft, rtol=1e-2, atol=1e-3 * peft.abs().max().item())
