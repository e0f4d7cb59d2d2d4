"""Where a training step spends its time, and what the trainer costs beside the model.

    python scripts/bench_training.py                        tiny SDXL without a GPU, SDXL's own UNet with one
    python scripts/bench_training.py --model sdxl --checkpointing --batch-size 8 --method diffusion-dpo
    python scripts/bench_training.py --method grpo          one step: rollout, decoding and reward, training
    python scripts/bench_training.py --method softrepa      one step: every image under every caption

`sdxl` is SDXL's UNet configuration with random weights in bfloat16 at 1024 px: speed does not depend on what weights
say. Data are sample photographs through the trainer's own check, cache and loader; for `sdxl` random tensors of SDXL's
shapes stand in for what VAE and text encoders say, as those are not run while training from a cache.

Three loops over the same network take turns, step by step, so that a noisy neighbour disturbs all alike: the trainer
undisturbed, the trainer with a clock around its parts, and a bare loop written here (noise, network, loss, backward,
clip, AdamW) on a batch that is already in memory. Clocks wait for the GPU, so the parts add up to more than a step.

For grpo (ten steps, no guidance, groups of the batch size) the bare loops are as many forward passes of the network
without gradient as the rollout takes, and as many forward and backward passes as training takes, in the same batches.
For softrepa (sdxl at 512 px) the bare loop is the network's forward and backward pass to the tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from generation import GRPOTrainer
    from generation.training import DenoisingTrainer, Trainer
    from generation.training.denoiser import Batch
    from generation.training.training_set import EncodedSet

# SDXL base 1.0's unet/config.json, and what it comes to.
SDXL_UNET = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SDXL_PARAMETERS = 2_567_463_684
PARTS = ("data", "forward", "loss", "backward", "optimiser", "shell")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "sdxl"), help="default: sdxl with a GPU, else tiny")
    parser.add_argument("--method", choices=("mapo", "diffusion-dpo", "grpo", "softrepa"), default="mapo")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs, or images of GRPO, per pass (default: 4)")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, help="measured turns of each loop (default: 60 for tiny, else 20)")
    parser.add_argument("--warm-up", type=int, default=4, help="steps of the trainer that are not counted")
    parser.add_argument("--workers", type=int, help="loading threads (default: one a core)")
    parser.add_argument(
        "--threads", type=int,
        help="of torch on a CPU (default: 1 for tiny: more make its small tensors slower, and the shell look smaller)",
    )  # fmt: skip
    parser.add_argument(
        "--peak-tflops", type=float, default=790.0,
        help="of the card in dense bfloat16; 790 is about what an H200 reaches in matrix products (data sheet: 989)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write all figures here")
    arguments = parser.parse_args()
    import torch

    from mmalign.device import resolve_device

    arguments.device = resolve_device(None)
    if arguments.model is None:
        arguments.model = "sdxl" if arguments.device.type == "cuda" else "tiny"
    arguments.steps = arguments.steps or (60 if arguments.model == "tiny" else 20)
    if arguments.threads or arguments.model == "tiny":
        torch.set_num_threads(arguments.threads or 1)
    if arguments.method == "grpo":
        report_grpo(arguments, measure_grpo(arguments))
        return
    if arguments.method == "softrepa":
        report_softrepa(arguments, measure_softrepa(arguments))
        return
    with tempfile.TemporaryDirectory() as temporary:
        trainer, data = make_trainer(arguments, Path(temporary))
        figures = describe(arguments, trainer) | measure(arguments, trainer, data)
        figures["tflop_per_pair"] = count_flops(trainer, data)
        if arguments.device.type == "cuda":
            achieved = figures["tflop_per_pair"] * figures["pairs_per_second"]
            figures["model_flop_utilisation"] = achieved / arguments.peak_tflops
            figures["peak_tflops"] = arguments.peak_tflops
    report(arguments, figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


# -- what is measured --------------------------------------------------------------------------------------------------


def make_trainer(arguments: argparse.Namespace, folder: Path) -> tuple[DenoisingTrainer, EncodedSet]:
    """A trainer, ready to step, and pairs that were checked and cached as in any run."""
    from photo_pairs import make_pairs

    from generation.methods import METHODS
    from generation.training.configuration import load_config
    from generation.training.encoding import LatentEncoder, PromptEncoder
    from generation.training.hardware import make_accelerator
    from generation.training.preparation import Encoders, check, encode

    full = arguments.model == "sdxl"
    make_pairs(folder / "pairs", max(24, arguments.batch_size))
    kind = METHODS[arguments.method]
    contrast = arguments.method == "softrepa"
    lora = {"probe_size": 0} if contrast else {"rank": arguments.rank}
    config = load_config(kind.config_class, {
        "data": str(folder / "pairs"), "output": folder / "run", "model": arguments.model, **lora,
        "resolution": (512 if contrast else 1024) if full else 64, "batch_size": arguments.batch_size,
        "accumulation": 1, "steps": 10**6,
        "dtype": "bfloat16" if full else "float32", "gradient_checkpointing": arguments.checkpointing,
        "workers": arguments.workers, "device": str(arguments.device),
    })  # fmt: skip
    config.output.mkdir()
    pipeline = make_pipeline(full, arguments.device)
    trainer = kind(config, pipeline=pipeline)
    trainer.accelerator = make_accelerator(config)
    latents: Any = RandomLatents() if full else LatentEncoder(pipeline.vae, arguments.device)
    prompts: Any = RandomPrompts() if full else PromptEncoder(pipeline, arguments.device)
    report = folder / "left_out_rows.jsonl"
    checked = check(config, trainer.accelerator, config.data, kind.unit, report=report, warn=print)
    encoders = Encoders(pipeline, latents, prompts)
    data: Any = None
    if contrast:
        data = trainer.encode_rows([checked], encoders)
    else:
        data = encode(config, trainer.accelerator, checked, kind.unit, encoders, seed=config.seed)
    trainer.attach(pipeline)
    return trainer, data


def make_pipeline(full: bool, device: torch.device) -> DiffusionPipeline:
    """The tiny SDXL, in it the real UNet if asked for."""
    import torch
    from diffusers import UNet2DConditionModel

    from generation import tiny_pipeline

    pipeline = tiny_pipeline("sdxl")
    if full:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            unet = UNet2DConditionModel(**SDXL_UNET)
        torch.set_default_dtype(torch.float32)
        count = sum(parameter.numel() for parameter in unet.parameters())
        assert count == SDXL_PARAMETERS, f"{count:,} parameters are not SDXL's {SDXL_PARAMETERS:,}"
        pipeline.register_modules(unet=unet)
    return pipeline


class RandomLatents:
    """Stands in for SDXL's VAE."""

    fingerprint = "random latents of SDXL's shape"

    def encode(self, pixels: torch.Tensor, key: str) -> torch.Tensor:
        """4 x height/8 x width/8, a function of the key."""
        import torch

        generator = torch.Generator().manual_seed(int(key[:15], 16))
        return torch.randn(4, pixels.shape[1] // 8, pixels.shape[2] // 8, generator=generator)


class RandomPrompts:
    """Stands in for SDXL's text encoders."""

    fingerprint = "random embeddings of SDXL's shapes"

    def encode(self, caption: str | None) -> dict[str, torch.Tensor]:
        """77 x 2048 and 1280, a function of the caption's length."""
        import torch

        generator = torch.Generator().manual_seed(len(caption or ""))
        shapes = {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, trainer: DenoisingTrainer, data: EncodedSet) -> dict[str, Any]:
    """Median milliseconds of the three loops and of the clocked parts."""
    import torch

    batches = trainer.batches(data, 0)

    def step() -> None:
        trainer.update(next(batches))
        trainer.step += 1

    for _ in range(arguments.warm_up):
        step()
    memory = {}
    if arguments.device.type == "cuda":  # before the bare loop's optimiser takes its share
        memory["peak_memory_gb"] = torch.cuda.max_memory_allocated(arguments.device) / 1e9
    bare = bare_loop(trainer, next(batches)[0])
    bare()
    clocked_step(trainer, batches, arguments.device)
    parts: dict[str, list[float]] = defaultdict(list)
    loops: dict[str, list[float]] = defaultdict(list)
    differences: list[float] = []
    for turn in range(arguments.steps):
        # Either order as often: the second of two is favoured by caches and by a clock speed that has risen.
        order: list[tuple[str, Callable[[], None]]] = [("step", step), ("bare", bare)]
        for name, run in order if turn % 2 else order[::-1]:
            loops[name].append(milliseconds(run, arguments.device))
        differences.append(loops["step"][-1] - loops["bare"][-1])
        for name, value in clocked_step(trainer, batches, arguments.device).items():
            parts[name].append(value)
    medians = {name: statistics.median(values) for name, values in parts.items()}
    step_ms, bare_ms = (statistics.median(loops[name]) for name in ("step", "bare"))
    return memory | {
        "step_ms": step_ms,
        "bare_ms": bare_ms,
        "over_bare_ms": statistics.median(differences),
        "over_bare_share": statistics.median(differences) / step_ms,
        "clocked_step_ms": medians.pop("step"),
        "parts_ms": {name: medians[name] for name in PARTS},
        "shell_share": statistics.median(s / t for s, t in zip(parts["shell"], parts["step"], strict=True)),
        "ms_per_pair": step_ms / arguments.batch_size,
        "pairs_per_second": 1e3 * arguments.batch_size / step_ms,
    }


def clocked_step(trainer: DenoisingTrainer, batches: Iterator[list[Batch]], device: torch.device) -> dict[str, float]:
    """One step of the trainer, split: what is in none of its parts is the shell.

    `forward` is the network alone (for Diffusion-DPO twice), `loss` what else the trainer's `loss` does (adding noise,
    the objective, values to log), `optimiser` the optimiser's own step with clipping and clearing gradients.
    """
    from unittest.mock import patch

    spent: dict[str, float] = defaultdict(float)

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            synchronise(device)
            start = time.perf_counter()
            result = call(*args, **options)
            synchronise(device)
            spent[name] += 1e3 * (time.perf_counter() - start)
            return result

        return timed

    inner = trainer.learner.optimizer.optimizer  # torch's own, inside accelerate's
    wrapped = [
        (trainer.learner.network, "forward", "forward"),
        (trainer, "loss", "loss"),
        (trainer.accelerator, "backward", "backward"),
        (trainer.accelerator, "clip_grad_norm_", "optimiser"),
        (inner, "step", "optimiser"),
        (inner, "zero_grad", "optimiser"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, attribute, name in wrapped:
            stack.enter_context(patch.object(owner, attribute, clocked(name, getattr(owner, attribute))))
        synchronise(device)
        start = time.perf_counter()
        chunk = next(batches)
        synchronise(device)
        spent["data"] = 1e3 * (time.perf_counter() - start)
        trainer.update(chunk)
        synchronise(device)
        spent["step"] = 1e3 * (time.perf_counter() - start)
    trainer.step += 1
    spent["loss"] -= spent["forward"]
    spent["shell"] = spent["step"] - sum(spent[name] for name in PARTS if name != "shell")
    return spent


def bare_loop(trainer: DenoisingTrainer, batch: Batch) -> Callable[[], None]:
    """One whole optimiser step on a batch in memory, as one would write it by hand, with an optimiser of its own."""
    import torch

    from generation.objectives import diffusion_dpo_loss, mapo_loss

    network, schedule, config = trainer.learner.network, trainer.denoiser.schedule, trainer.config
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    conditioning = batch.conditioning

    def predict() -> torch.Tensor:
        assert conditioning.pooled_prompt_embeds is not None
        return network(
            schedule.add_noise(batch.latents, batch.noise, batch.timesteps).to(dtype),
            batch.timesteps,
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            added_cond_kwargs={
                "text_embeds": conditioning.pooled_prompt_embeds.to(dtype),
                "time_ids": conditioning.time_ids,
            },
            return_dict=False,
        )[0]

    def step() -> None:
        if trainer.needs_reference:
            with trainer.reference():
                reference = predict()
            loss = diffusion_dpo_loss(predict(), reference, batch.noise).loss
        else:
            loss = mapo_loss(predict(), batch.noise).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_flops(trainer: DenoisingTrainer, data: EncodedSet) -> float:
    """Teraflops of forward and backward for one pair; recomputing activations is not counted as useful work."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = data.assemble([0], [0]).to(trainer.accelerator.device)
    network: Any = trainer.accelerator.unwrap_model(trainer.learner.network)
    network.disable_gradient_checkpointing()
    with FlopCounterMode(display=False) as counter:
        trainer.loss(batch)[0].backward()
    return counter.get_total_flops() / 1e12


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- GRPO --------------------------------------------------------------------------------------------------------------


def make_grpo_trainer(arguments: argparse.Namespace, folder: Path) -> GRPOTrainer:
    """A trainer, ready to step; the reward costs nothing."""
    import torch

    from generation import GRPOConfig, GRPOTrainer
    from generation.rewards import as_reward
    from generation.training.encoding import PromptEncoder
    from generation.training.hardware import make_accelerator
    from generation.training.prompt_set import PromptSet

    full = arguments.model == "sdxl"
    config = GRPOConfig(
        data="prompts", output=folder / "run", model=arguments.model, rank=arguments.rank, steps=10**6,
        resolution=1024 if full else 64, batch_size=arguments.batch_size, group_size=arguments.batch_size,
        accumulation=2, updates=1, dtype="bfloat16" if full else "float32", probe_size=0, max_grad_norm=1.0,
        gradient_checkpointing=arguments.checkpointing, device=str(arguments.device),
    )  # fmt: skip
    pipeline = make_pipeline(full, arguments.device)
    trainer = GRPOTrainer(config, pipeline=pipeline)
    trainer.accelerator = make_accelerator(config)
    prompts: Any = RandomPrompts() if full else PromptEncoder(pipeline, arguments.device)
    names = [f"photo {number}" for number in range(8)]
    trainer.prompts = PromptSet(
        names, prompts, batch_size=arguments.batch_size, seed=0, store=folder / "cache", dtype=torch.float16
    )
    trainer.prompts.encode_all(progress=False)
    trainer.reward, trainer.held_out, trainer.probe_prompts = as_reward(brightness), {}, []
    trainer.attach(pipeline)
    return trainer


def brightness(images: Any, prompts: Any) -> list[float]:
    return [float(image.mean()) for image in images]


def measure_grpo(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step's parts, and of the same passes of the network alone."""
    import torch

    with tempfile.TemporaryDirectory() as temporary:
        trainer = make_grpo_trainer(arguments, Path(temporary))
        batches = trainer.batches(trainer.prompts, 0)
        config, device = trainer.config, arguments.device
        call: tuple[Any, dict[str, Any]] = ((), {})
        forward = trainer.learner.network.forward

        def listen(*args: Any, **options: Any) -> Any:
            nonlocal call
            call = (args, options)
            return forward(*args, **options)

        trainer.learner.network.forward = listen
        trainer.update(next(batches))
        trainer.learner.network.forward = forward
        passes = config.accumulation * config.sampling_steps
        graded = config.accumulation * (config.sampling_steps - 1)
        parameters = trainer.learner.adaptation.parameters

        def bare_rollout() -> None:
            with torch.no_grad():
                for _ in range(passes):
                    forward(*call[0], **call[1])

        def bare_training() -> None:
            for _ in range(graded):
                torch.autograd.grad(forward(*call[0], **call[1])[0].float().square().mean(), parameters)

        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(max(3, arguments.steps // 10)):
            for name, value in clocked_grpo_step(trainer, next(batches), device).items():
                found[name].append(value)
            found["bare rollout"].append(milliseconds(bare_rollout, device))
            found["bare training"].append(milliseconds(bare_training, device))
        figures: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
        figures |= describe(arguments, trainer) | {"passes": passes, "graded": graded}
        figures["images"] = config.batch_size * config.accumulation
        if device.type == "cuda":
            from torch.utils.flop_counter import FlopCounterMode

            figures["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            network: Any = trainer.learner.network
            network.disable_gradient_checkpointing()
            for name, run in (("rollout_tflop", bare_rollout), ("training_tflop", bare_training)):
                with FlopCounterMode(display=False) as counter:
                    run()
                figures[name] = counter.get_total_flops() / 1e12
    return figures


def clocked_grpo_step(trainer: GRPOTrainer, batches: Any, device: torch.device) -> dict[str, float]:
    """Rollout; decoding and reward; training; and what is left of the step."""
    from unittest.mock import patch

    spent: dict[str, float] = defaultdict(float)

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            result: Any = None

            def run() -> None:
                nonlocal result
                result = call(*args, **options)

            spent[name] += milliseconds(run, device)
            return result

        return timed

    parts = {"_draw": "rollout", "_scores": "decoding and reward", "_step": "training"}
    with contextlib.ExitStack() as stack:
        for attribute, name in parts.items():
            stack.enter_context(patch.object(trainer, attribute, clocked(name, getattr(trainer, attribute))))
        spent["step"] = milliseconds(lambda: trainer.update(batches), device)
    trainer.step += 1
    spent["rest"] = spent["step"] - sum(spent[name] for name in parts.values())
    return spent


def report_grpo(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """For people, then a table row for the README."""
    checkpointing = ", checkpointing" * figures["checkpointing"]
    print(f"{figures['device']}; {figures['model']}, grpo, {figures['images']} images a step{checkpointing}\n")
    for name in ("rollout", "bare rollout", "decoding and reward", "training", "bare training", "rest", "step"):
        print(f"{name:<20}{figures[name]:10.1f} ms")
    over = {name: figures[name] / figures[f"bare {name}"] - 1 for name in ("rollout", "training")}
    print(f"\nover the network alone: rollout {over['rollout']:+.1%}, training {over['training']:+.1%}")
    row = {
        "device": figures["device"], "model": figures["model"], "images": figures["images"],
        "rollout, ms": f"{figures['rollout']:.0f}", "over the network": f"{over['rollout']:+.1%}",
        "training, ms": f"{figures['training']:.0f}", "over it": f"{over['training']:+.1%}",
        "decoding and reward, ms": f"{figures['decoding and reward']:.0f}", "rest, ms": f"{figures['rest']:.0f}",
    }  # fmt: skip
    if arguments.device.type == "cuda":
        for name in ("rollout", "training"):
            least = 1e3 * figures[f"{name}_tflop"] / arguments.peak_tflops
            print(
                f"{name}: {figures[f'{name}_tflop']:.0f} TFLOP, by arithmetic no less than {least:.0f} ms at "
                f"{arguments.peak_tflops:g} TFLOP/s; {least / figures[name]:.0%} of that speed"
            )
        print(f"peak memory {figures['peak_memory_gb']:.1f} GB")
    print()
    for line in (row, ["---"] * len(row), row.values()):
        print("|", " | ".join(map(str, line)), "|")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


# -- SoftREPA ----------------------------------------------------------------------------------------------------------


def measure_softrepa(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step, and of the same passes of the network alone."""
    import torch

    with tempfile.TemporaryDirectory() as temporary:
        trainer, data = make_trainer(arguments, Path(temporary))
        batches, network = trainer.batches(data, 0), trainer.learner.network
        calls: list[tuple[Any, dict[str, Any]]] = []

        def listen(_: Any, args: Any, options: dict[str, Any]) -> None:
            calls.append((args, options))

        hook = network.register_forward_pre_hook(listen, with_kwargs=True)
        trainer.update(next(batches))
        hook.remove()
        trainer.step += 1
        parameters = trainer.learner.adaptation.parameters

        def step() -> None:
            trainer.update(next(batches))
            trainer.step += 1

        def bare() -> None:
            for args, options in calls:
                torch.autograd.grad(network(*args, **options)[0].float().square().mean(), parameters)

        for run in (step, bare):
            run()
        found: dict[str, list[float]] = {"step": [], "bare": []}
        for _ in range(arguments.steps):
            found["step"].append(milliseconds(step, arguments.device))
            found["bare"].append(milliseconds(bare, arguments.device))
        figures: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
        figures |= describe(arguments, trainer) | {"forwards": arguments.batch_size**2}
        if arguments.device.type == "cuda":
            from torch.utils.flop_counter import FlopCounterMode

            figures["peak_memory_gb"] = torch.cuda.max_memory_allocated(arguments.device) / 1e9
            with FlopCounterMode(display=False) as counter:
                bare()
            figures["tflop"] = counter.get_total_flops() / 1e12
    return figures


def report_softrepa(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """For people, then a table row for the README."""
    over = figures["step"] / figures["bare"] - 1
    print(f"{figures['device']}; {figures['model']}, softrepa, {figures['forwards']} denoisings a step")
    print(f"step {figures['step']:.1f} ms, the network alone {figures['bare']:.1f} ms: {over:+.1%}")
    if arguments.device.type == "cuda":
        least = 1e3 * figures["tflop"] / arguments.peak_tflops
        print(
            f"{figures['tflop']:.1f} TFLOP a step (by arithmetic 51 for 4 images of SDXL at 512 px), no less than "
            f"{least:.0f} ms at {arguments.peak_tflops:g} TFLOP/s; peak memory {figures['peak_memory_gb']:.1f} GB"
        )
    row = {
        "device": figures["device"], "model": figures["model"], "denoisings": figures["forwards"],
        "ms/step": f"{figures['step']:.0f}", "over the network alone": f"{over:+.1%}",
    }  # fmt: skip
    for line in (row, ["---"] * len(row), row.values()):
        print("|", " | ".join(map(str, line)), "|")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


# -- telling -----------------------------------------------------------------------------------------------------------


def describe(arguments: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    """What ran on what."""
    import accelerate
    import diffusers
    import peft
    import torch

    name = f"{torch.get_num_threads()} CPU thread(s) ({platform.machine()})"
    if arguments.device.type == "cuda":
        name = torch.cuda.get_device_name(arguments.device)
    modules = {"torch": torch, "diffusers": diffusers, "peft": peft, "accelerate": accelerate}
    return {
        **{name: getattr(arguments, name) for name in ("model", "method", "rank", "checkpointing", "steps")},
        "pairs": arguments.batch_size,
        "trained_parameters": sum(p.numel() for p in trainer.learner.network.parameters() if p.requires_grad),
        "device": name,
        "versions": {"python": platform.python_version()} | {k: m.__version__ for k, m in modules.items()},
    }


def report(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """For people, then a table row for the README."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    print(f"{figures['device']}; {versions}; medians of {figures['steps']} steps")
    print(
        f"{figures['model']}, {figures['method']}, {figures['pairs']} pair(s) a step, LoRA rank {figures['rank']} "
        f"({figures['trained_parameters']:,} parameters){', checkpointing' * figures['checkpointing']}\n"
    )
    total = figures["clocked_step_ms"]
    for name in PARTS:
        value = figures["parts_ms"][name]
        print(f"{name:<12}{value:9.2f} ms {value / total:7.1%}")
    print(f"{'clocked step':<12}{total:9.2f} ms\n")
    print(f"trainer's step        {figures['step_ms']:9.2f} ms   (data wait and all)")
    print(f"bare loop's step      {figures['bare_ms']:9.2f} ms   (batch in memory)")
    print(f"trainer over bare     {figures['over_bare_ms']:9.2f} ms   {figures['over_bare_share']:.1%} of a step")
    print(f"shell                 {figures['parts_ms']['shell']:9.2f} ms   {figures['shell_share']:.1%} of a step")
    row = {
        "device": figures["device"], "model": figures["model"], "method": figures["method"], "pairs": figures["pairs"],
        "checkpointing": "yes" if figures["checkpointing"] else "no", "ms/step": f"{figures['step_ms']:.0f}",
        "ms/pair": f"{figures['ms_per_pair']:.1f}", "pairs/s": f"{figures['pairs_per_second']:.1f}",
        "shell": f"{figures['shell_share']:.1%}", "over bare loop": f"{figures['over_bare_share']:.1%}",
    }  # fmt: skip
    if arguments.device.type == "cuda":
        print(
            f"\n{figures['tflop_per_pair']:.1f} TFLOP a pair; model FLOP utilisation "
            f"{figures['model_flop_utilisation']:.1%} of {arguments.peak_tflops:g} TFLOP/s; peak memory "
            f"{figures['peak_memory_gb']:.1f} GB"
        )
        if arguments.model == "sdxl" and arguments.method == "mapo":
            print(
                f"{figures['ms_per_pair']:.1f} ms a pair; by arithmetic no less than 38 (55 with checkpointing) at "
                "790 TFLOP/s; wanted 80 or less"
            )
        row |= {"MFU": f"{figures['model_flop_utilisation']:.1%}", "GB": f"{figures['peak_memory_gb']:.1f}"}
    print()
    for line in (row, ["---"] * len(row), row.values()):
        print("|", " | ".join(map(str, line)), "|")


if __name__ == "__main__":
    main()
