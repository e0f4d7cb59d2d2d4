"""The reward-gradient engine against published gradients: a toy denoiser in a pipeline as diffusers' are written."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from generation.noise_levels import Level
from generation.objectives.reward_losses import reward_loss
from generation.reward_gradient import GradedLatents, RewardGradientOptions, graded_latents

LORA = ("A1", "B1", "A2", "B2")
DTYPES = ("float64", "float32")


class ToyDenoiser(nn.Module):
    def __init__(self, golden: Any, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("W1", "U", "v", "b1", "W2", "b2", *LORA):
            value = torch.from_numpy(golden[name].copy()).to(dtype)
            setattr(self, name, nn.Parameter(value, requires_grad=name in LORA))
        self.scale = golden.hyper["lora_scale"]
        self.calls: list[bool] = []

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        self.calls.append(torch.is_grad_enabled())
        time = (torch.as_tensor(timestep).to(sample.dtype) / 1000).reshape(-1, 1)
        first = self.W1 + self.scale * self.B1 @ self.A1
        hidden = sample.flatten(1) @ first.T + encoder_hidden_states @ self.U.T + time * self.v + self.b1
        second = self.W2 + self.scale * self.B2 @ self.A2
        return ((hidden.tanh() @ second.T + self.b2).view_as(sample),)


class FlowMatchToyScheduler:
    """The rectified-flow step in the precision of its input: diffusers' own always computes in float32."""

    config = FrozenDict({"num_train_timesteps": 1000})

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas, self.timesteps = sigmas, sigmas[:-1] * 1000

    def set_timesteps(self, count: int) -> None:
        assert count == len(self.timesteps)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        step = int((self.timesteps == timestep).nonzero())
        return (sample + (self.sigmas[step + 1] - self.sigmas[step]) * model_output,)


class ToyPipeline:
    """The loop of a text-to-image pipeline with guidance in one doubled batch."""

    def __init__(self, unet: ToyDenoiser, scheduler: Any, golden: Any) -> None:
        self.unet, self.scheduler = unet, scheduler
        dtype = unet.W1.dtype
        read = lambda name: torch.from_numpy(golden[name].copy()).to(dtype)  # noqa: E731
        self.start, self.condition, self.unconditional = read("xT"), read("c"), read("uc")
        self.guidance = golden.hyper["guidance"]

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Tensor,
        num_inference_steps: int,
        latents: Tensor | None = None,
        variance: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
    ) -> tuple[Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = self.start if latents is None else latents
        texts = torch.cat([self.unconditional.expand_as(prompt_embeds), prompt_embeds])
        for number, time in enumerate(self.scheduler.timesteps):
            doubled = self.unet(torch.cat([latents] * 2), time, encoder_hidden_states=texts)[0]
            without, told = doubled.chunk(2)
            guided = without + self.guidance * (told - without)
            more = {} if variance is None else {"eta": eta, "variance_noise": variance[number]}
            latents = self.scheduler.step(guided, time, latents, **more, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, number, time, {"latents": latents})["latents"]
        return (latents,)


class Toy:
    """A golden file's toy with everything that its assertions need."""

    def __init__(self, golden: Any, dtype: str, *, flow: bool) -> None:
        self.golden, self.name, self.dtype = golden, dtype, getattr(torch, dtype)
        self.hyper = golden.hyper
        self.unet = ToyDenoiser(golden, self.dtype)
        if flow:
            scheduler: Any = FlowMatchToyScheduler(self.tensor("sigmas"))
        else:
            scheduler = DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
            )  # fmt: skip
            scheduler.alphas_cumprod = self.tensor("alphas_cumprod")
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        self.pipeline: Any = ToyPipeline(self.unet, scheduler, golden)
        self.flow = flow

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.golden[name]).copy()).to(self.dtype)

    def run(self, options: RewardGradientOptions, call: dict[str, Any] | None = None, **given: Any) -> GradedLatents:
        arguments = {"prompt_embeds": self.pipeline.condition, "num_inference_steps": self.hyper["T"], **(call or {})}
        return graded_latents(self.pipeline, arguments, options, generator=torch.Generator(), **given)

    def image(self, latents: Tensor) -> Tensor:
        scaled = latents / 1.5305 + 0.0609 if self.flow else latents / self.hyper["vae_scaling"]
        decoded = scaled.flatten(1) @ self.tensor("Dm").T + self.tensor("dm")
        return (decoded / 2 + 0.5).clamp(0, 1).view(len(latents), 3, *latents.shape[2:])

    def reward(self, latents: Tensor) -> Tensor:
        return cosine_similarity(self.image(latents).flatten(1) @ self.tensor("E").T, self.tensor("txt"), dim=1)

    def close(self, name: str, actual: Any, where: Any = ...) -> None:
        if self.name == "float64" or "float32" in str(self.golden.meta["tolerance"]):
            limits = self.golden.tolerance(self.name)
        else:
            limits = {"rtol": 1e-3, "atol": 0.0}  # none is stated: as that of the DDIM file
        if self.name == "float32" or limits["atol"] == 0:  # entries that are nearly nothing are differences of others
            limits["atol"] = limits["rtol"] * float(np.abs(self.golden[name]).max())
        expected = self.golden[name][where]
        np.testing.assert_allclose(actual.detach().numpy(), expected, err_msg=f"{name} {self.name}", **limits)

    def gradients(self, loss: Tensor, prefix: str, mode: str) -> None:
        """Compare the gradients of `loss` with `<prefix>_<weight>_<mode>`."""
        self.unet.zero_grad()
        loss.backward()
        for weight in LORA:
            self.close(f"{prefix}_{weight}_{mode}", getattr(self.unet, weight).grad)
        assert all(p.grad is None for name, p in self.unet.named_parameters() if name not in LORA)


def contiguous_modes(golden: Any) -> list[tuple[str, str]]:
    """Modes "K<k>" and "full" of a file, as the engine's forms."""
    found = {name.rpartition("_")[2] for name in golden.names if name.startswith(("grad_A1", "gradni_A1"))}
    return [
        (mode, f"last:{mode[1:]}" if mode[0] == "K" else "all") for mode in found if mode[0] == "K" or mode == "full"
    ]


def check_chains(toy: Toy, checkpointing: bool) -> None:
    """Every mode in which the gradient goes through the sampler, with and without the network's input."""
    golden, hyper = toy.golden, toy.hyper
    modes = dict(contiguous_modes(golden))
    for name, key in (("randmask", "randmask"), ("sparse", "sparse_mask")):
        if key in hyper:
            modes[name] = ",".join(map(str, hyper[key]))
    for mode, form in modes.items():
        for prefix, input_grad in (("grad", True), ("gradni", False)):
            if f"{prefix}_A1_{mode}" not in golden:
                continue
            options = RewardGradientOptions(form, input_grad=input_grad, checkpointing=checkpointing)
            run = toy.run(options)
            toy.close("x0", run.sample)
            toy.close("image01", toy.image(run.scored[0]))
            toy.close("reward", toy.reward(run.scored[0]))
            toy.gradients(toy.reward(run.scored[0]).mean(), prefix, mode)
    image = toy.image(toy.run(RewardGradientOptions()).sample)
    toy.close("sat_fraction", ((image == 0) | (image == 1)).to(toy.dtype).mean())
    latents = [toy.pipeline.start]
    for end in range(1, hyper["T"] + 1):
        mask = ",".join(str(int(i == end - 1)) for i in range(hyper["T"]))
        latents.append(toy.run(RewardGradientOptions(mask, reward_input="estimate")).sample)
    toy.close("latents", torch.stack(latents))


def check_last_step_repeated(toy: Toy) -> None:
    options = RewardGradientOptions("last:1", reward_input="renoise", copies=toy.hyper["n_lv"])
    run = toy.run(options, noise=list(toy.tensor("lv_noise")))
    rewards = torch.stack([toy.reward(latents) for latents in run.scored])
    toy.close("lv_rewards", rewards)
    toy.gradients(rewards.mean(dim=1).sum(), "grad", "lv_sum")


def refl(toy: Toy) -> Tensor:
    step = toy.hyper["refl_step_index"]
    run = toy.run(RewardGradientOptions(f"one:{step}:{step}", input_grad=False, reward_input="estimate"))
    toy.close("refl_x0hat", run.scored[0])
    rewards = toy.reward(run.scored[0])
    toy.close("refl_reward", rewards)
    return rewards


@pytest.mark.golden("ap_truncated_gradient")
def test_gradients_through_ddim(golden: Any) -> None:
    for dtype in DTYPES:
        toy = Toy(golden, dtype, flow=False)
        for checkpointing in (False, True):
            check_chains(toy, checkpointing)
        toy.pipeline.scheduler.set_timesteps(toy.hyper["T"])
        assert toy.pipeline.scheduler.timesteps.tolist() == golden["timesteps"].tolist()
        check_last_step_repeated(toy)

        rewards = refl(toy)
        # The threshold is one of the rewards itself, where rounding decides whether its gradient counts.
        rewards = rewards + (toy.tensor("refl_reward") - rewards).detach()
        loss = reward_loss(rewards, "hinge", threshold=toy.hyper["refl_threshold"], scale=1e-3).mean()
        toy.close("refl_loss", loss)
        toy.gradients(loss, "grad", "refl")

        stochastic = {"variance": toy.tensor("eta_noise"), "eta": toy.hyper["eta"]}
        (mode,) = {name.rpartition("eta_")[2] for name in golden.names if name.startswith("grad_A1_eta_")}
        run = toy.run(RewardGradientOptions(f"last:{mode[1:]}"), stochastic)
        toy.close("eta_x0", run.sample)
        toy.close("eta_reward", toy.reward(run.scored[0]))
        toy.gradients(toy.reward(run.scored[0]).mean(), "grad", f"eta_{mode}")

        rewards = toy.reward(toy.run(RewardGradientOptions()).sample)
        toy.close("loss_hps", reward_loss(rewards, scale=0.01).mean() + 0.01)
        toy.close("loss_aes_l1", reward_loss(10 * rewards, "target", threshold=10.0, scale=0.01).mean())
        toy.close("loss_trl", reward_loss(10 * rewards).mean() + 10)


@pytest.mark.golden("ap_flow_gradient")
def test_gradients_through_a_rectified_flow(golden: Any) -> None:
    for dtype in DTYPES:
        toy = Toy(golden, dtype, flow=True)
        for checkpointing in (False, True):
            check_chains(toy, checkpointing)
        check_last_step_repeated(toy)
        toy.gradients(refl(toy).mean(), "grad", "refl")
        for number, (here, there) in enumerate(golden["da_pairs"].tolist()):
            direct = tuple(Level(1 - sigma, sigma, 1000 * sigma) for sigma in (here, there))
            options = RewardGradientOptions(reward_input="direct-align")
            run = toy.run(options, noise=[toy.tensor("da_noise")], direct=direct)
            toy.close(f"da_x0hat_{number}", run.scored[0])
            toy.close(f"da_reward_{number}", toy.reward(run.scored[0]))
            toy.gradients(toy.reward(run.scored[0]).mean(), "grad", f"da_{number}")


def test_the_toy_runs_without_gradient_where_none_is_asked_for() -> None:
    """Steps that are not graded must not only be detached: they would cost memory."""
    rng = np.random.default_rng(0)
    shapes = {"W1": (6, 4), "U": (6, 3), "v": (6,), "b1": (6,), "W2": (4, 6), "b2": (4,), "A1": (2, 4), "B1": (6, 2)}
    shapes |= {"A2": (2, 6), "B2": (4, 2), "xT": (1, 1, 2, 2), "c": (1, 3), "uc": (3,)}
    fake: Any = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    class Holder:
        hyper: ClassVar[dict[str, float]] = {"lora_scale": 1.0, "guidance": 2.0}

        def __getitem__(self, name: str) -> np.ndarray:
            return fake[name]

    holder = Holder()
    unet = ToyDenoiser(holder, torch.float64)
    pipeline: Any = ToyPipeline(unet, FlowMatchToyScheduler(torch.linspace(1, 0, 6).double()), holder)
    call = {"prompt_embeds": pipeline.condition, "num_inference_steps": 5}
    graded_latents(pipeline, call, RewardGradientOptions("0,1,0,0,1", checkpointing=False), generator=torch.Generator())
    assert unet.calls == [False, True, False, False, True]
