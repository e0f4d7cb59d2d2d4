"""A diffusers pipeline, unmodified, run step by step as its caller wants.

The pipeline's own loop stays in charge of guidance, sizes and scheduler, so that whatever it draws is what it always
draws. Around its denoiser and its scheduler's `step`, for the time of one run, stand two functions: steps can be left
out, begun from other latents, run with or without gradient, and looked at.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .noise_levels import Level
from .pipelines import denoiser_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Denoise", "DenoiserStep", "replaced", "run_steered", "scheduler_memory"]

# Called in place of the denoiser: (number of the step, the denoiser, its arguments) -> what the denoiser returns.
Denoise = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class DenoiserStep:
    """One step of a run, as its scheduler saw it: the latents before it and the guided prediction.

    Attributes:
        number: from 0.
        total: steps of a whole run.
        sample: latents before the step, in the scheduler's own scaling.
        prediction: of the network, after guidance.
    """

    number: int
    total: int
    sample: Float[Tensor, "n ..."]
    prediction: Float[Tensor, "n ..."]


def run_steered(
    pipeline: DiffusionPipeline,
    call: Mapping[str, Any],
    *,
    first: int = 0,
    end: int | None = None,
    latents: Float[Tensor, "n ..."] | None = None,
    scheduler_state: Mapping[str, Any] | None = None,
    level: Level | None = None,
    denoise: Denoise | None = None,
    seen: Callable[[DenoiserStep], None] | None = None,
    advance: Callable[[DenoiserStep], Float[Tensor, "n ..."]] | None = None,
) -> Float[Tensor, "n ..."]:
    """Run steps `first` to `end` of a pipeline and return the latents after them, in the pipeline's own layout.

    Gradients flow as the caller's grad mode says: the pipeline's own `no_grad` is not applied.

    Args:
        pipeline: of any family whose pipelines take `callback_on_step_end`; its scheduler is used and left as it is.
        call: the pipeline's arguments; `latents` among them only where nothing else starts the run.
        first: steps before it cost nothing and change nothing.
        end: the step to stop before; all by default.
        latents: what step `first` begins from, as an earlier run returned them or in the scheduler's scaling; the
            pipeline's own noise by default.
        scheduler_state: what the scheduler remembered when `latents` were returned, see `scheduler_memory`.
        level: ask the denoiser at this level instead of that of step `first`, with `latents` at this level. The
            scheduler's own step is then meaningless; only `seen` gets something of use.
        denoise: called in place of the denoiser.
        seen: told each step that was run, before the scheduler takes it.
        advance: takes the steps in place of the scheduler, of a kind without memory: returns the latents after each.
    """
    _, network = denoiser_of(pipeline)
    scheduler = pipeline.scheduler
    given, current = latents, 0
    after: list[Tensor] = []

    def wanted() -> bool:
        return first <= current and (end is None or current < end)

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not wanted():
            return (torch.zeros_like(args[0] if args else kwargs["hidden_states"]),)
        if level is not None:
            args, kwargs = _at_time(args, kwargs, level.time / float(scheduler.timesteps[first]))
        if denoise is None:
            return original(*args, **kwargs)
        return denoise(current, original, args, kwargs)

    def scaled(original: Callable[..., Any], sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = original(sample, *args, **kwargs)  # which also finds the scheduler's place
        # DDIM's kind hands the sample back; Euler's divides it to unit variance, by the sigma of step `first`.
        return own if own is sample or level is None else sample / math.hypot(level.scale, level.noise)

    def step(original: Callable[..., Any], prediction: Tensor, time: Any, sample: Tensor, **more: Any) -> Any:
        if not wanted():
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index = current + 1
            return (sample,)
        reached = DenoiserStep(current, len(scheduler.timesteps), sample, prediction)
        if seen is not None:
            seen(reached)
        if advance is not None:
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index = current + 1
            return (advance(reached),)
        return original(prediction, time, sample, **more)

    def ended(_: Any, number: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal current
        current = number + 1
        if current == first and given is not None:
            tensors["latents"] = given
            if scheduler_state is not None:
                vars(scheduler).update(scheduler_state)
        elif current == end:
            after.append(tensors["latents"])
            pipeline._interrupt = True  # the rest of the loop is left out, where the pipeline looks at this
        return tensors

    arguments = dict(call)
    if first == 0 and given is not None:
        start = float(torch.as_tensor(scheduler.init_noise_sigma)) if hasattr(scheduler, "init_noise_sigma") else 1.0
        arguments["latents"] = given / start
    scales = level is not None and hasattr(scheduler, "scale_model_input")  # those of rectified flows have none
    undecorated = inspect.unwrap(type(pipeline).__call__)
    with (
        replaced(network, "forward", forward),
        replaced(scheduler, "step", step),
        replaced(scheduler, "scale_model_input", scaled) if scales else nullcontext(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # diffusers warns about calls that are its own
        result = undecorated(
            pipeline, **arguments, output_type="latent", return_dict=False, callback_on_step_end=ended
        )[0]
    return after[0] if after else result


def scheduler_memory(scheduler: Any, rows: Tensor | None = None) -> dict[str, Any]:
    """What a scheduler remembers between steps: its place, and for multistep solvers the last predictions.

    Args:
        scheduler: in the middle of a run.
        rows: which of the batch to keep what is remembered of; all by default.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(one) for one in value]
        if isinstance(value, Tensor) and value.ndim > 2:  # latents; sigmas and timesteps have one axis
            return value.clone() if rows is None else value[rows]
        return value

    private = ("_internal_dict", "step")
    return {name: kept(value) for name, value in vars(scheduler).items() if name not in private}


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method of one object replaced by `function(original, ...)`; what was there comes back, whatever happens."""
    before, original = vars(owner).get(name), getattr(owner, name)
    # pipelines read the signature to know what a scheduler takes
    replacement = functools.wraps(original)(functools.partial(function, original))
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _at_time(args: tuple[Any, ...], kwargs: dict[str, Any], factor: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The denoiser's arguments with its timestep times `factor`, whatever unit the pipeline hands it over in."""

    def moved(time: Any) -> Any:
        time = torch.as_tensor(time)
        return time * factor if time.is_floating_point() else (time * factor).round().to(time.dtype)

    if "timestep" in kwargs:
        return args, {**kwargs, "timestep": moved(kwargs["timestep"])}
    return (args[0], moved(args[1]), *args[2:]), kwargs
