"""Which steps of a rollout add noise, and so can be trained: one line of text for each published choice."""

from __future__ import annotations

import torch

from mmalign.errors import InputError

__all__ = ["check_noise_window", "draw_noise_window"]

_FORMS = (
    '"all"; "random:SIZE" or "random:SIZE:LOW:HIGH" (SIZE steps from one drawn anew for each rollout); or '
    '"slide:SIZE:EVERY" (SIZE steps, moved on by one every EVERY rollouts)'
)


def draw_noise_window(form: str, total: int, rollout: int, generator: torch.Generator) -> range:
    """Numbers of the steps that add noise; all others are steps of the deterministic sampler.

    The last step of a run is in no window: what noise it adds stays in the image.

    Args:
        form: "all", every step but the last (Flow-GRPO trains no more, arXiv 2505.05470); "random:SIZE:LOW:HIGH", of
            steps LOW to HIGH - 1 (Flow-GRPO-Fast: random:2 or random:3), by default of the first half; or
            "slide:SIZE:EVERY" (MixGRPO, arXiv 2507.21802: slide:4:25), from step 0, again from there at the end.
        total: steps of a run.
        rollout: its number, from 0.
        generator: of the draw.

    Raises:
        InputError: another form, or one that names steps that a run of `total` does not have.
    """
    kind, numbers = _parsed(form, total)
    if kind == "all":
        return range(total - 1)
    if kind == "random":
        size, low, high = numbers
        first = low + int(torch.randint(high - size - low + 1, (), generator=generator))
        return range(first, first + size)
    size, every = numbers
    first = (rollout // every) % (total - size)
    return range(first, first + size)


def check_noise_window(form: str, total: int) -> None:
    """Raise InputError for a form that `draw_noise_window` refuses."""
    _parsed(form, total)


def _parsed(form: str, total: int) -> tuple[str, list[int]]:
    kind, *given = form.split(":")
    numbers = [int(number) for number in given if number.isdecimal()]
    count = {"all": (0,), "random": (1, 3), "slide": (2,)}.get(kind, ())
    if len(numbers) != len(given) or len(numbers) not in count:
        raise InputError(f"noise_window {form!r} is not known; give {_FORMS}")
    if total < 2:
        raise InputError(f"a rollout of {total} step has nothing to train, as the last adds no noise; take 2 or more")
    if kind == "all":
        return kind, []
    size = numbers[0]
    low, high = numbers[1:] if len(numbers) == 3 else (0, max(total // 2, min(size, total - 1)))
    if kind == "random":
        numbers = [size, low, high]
    if size < 1 or (kind == "slide" and (numbers[1] < 1 or size > total - 1)):
        raise InputError(f"noise_window {form!r} needs SIZE from 1 to {total - 1} and EVERY of at least 1")
    if kind == "random" and not low + size <= high <= total - 1:
        raise InputError(
            f"noise_window {form!r}: {size} steps do not fit in steps {low} to {high - 1} of {total}, of which the "
            "last adds no noise; take fewer, or more sampling_steps"
        )
    return kind, numbers
