"""Which denoising steps a reward's gradient goes through: one line of text for each published choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

from mmalign.errors import InputError

__all__ = ["check_gradient_steps", "draw_gradient_steps"]

_FORMS = (
    '"all"; "last:K"; "uniform", "uniform:LOW:HIGH" or "normal:MEAN:STD" (the last K, K drawn); "independent" (each '
    'step by itself, late ones more often); "one" or "one:LOW:HIGH" (a single step); or a mask such as "0,1,0,1"'
)


def draw_gradient_steps(form: str, total: int, generator: torch.Generator) -> list[bool]:
    """For each of the steps of a sampling run, from noise to image, whether the gradient goes through it.

    Args:
        form: "all" (DRaFT, arXiv 2309.17400); "last:K" (DRaFT-K); "uniform:LOW:HIGH", the last K with K uniform on
            whole numbers from LOW to HIGH, both included (AlignProp, arXiv 2310.03739), 1 to all of them where no
            numbers are given; "normal:MEAN:STD", the last K
            with K normal, drawn again until it is in [1, total]; "independent", step i by itself with probability
            (i + 1) / (total + 1), which is what AlignProp's released code does, scaled to any number of steps;
            "one:LOW:HIGH", a single step numbered from 0 (ReFL, arXiv 2304.05977), any where no numbers are given; or
            a mask, "0,1,0,1".
        total: steps of a run.
        generator: of the draws; used by the random forms only.

    Raises:
        InputError: another form, or one that leaves no step, or names steps that a run of `total` does not have.
    """
    kind, numbers = _parsed(form, total)
    if kind == "all":
        return [True] * total
    if kind == "mask":
        if len(numbers) != total:
            raise InputError(f"gradient_steps {form!r} has {len(numbers)} entries for {total} steps; give one a step")
        return [bool(number) for number in numbers]
    if kind == "independent":
        mask = [False] * total
        while not any(mask):
            drawn = torch.rand(total, generator=generator)
            mask = [bool(drawn[i] < (i + 1) / (total + 1)) for i in range(total)]
        return mask
    if kind == "one":
        low, high = int(numbers[0]), int(numbers[1])
        _refuse_beyond(form, high + 1, total)
        chosen = low + int(torch.randint(high - low + 1, (), generator=generator))
        return [i == chosen for i in range(total)]
    if kind == "last":
        count = int(numbers[0])
        _refuse_beyond(form, count, total)
    elif kind == "uniform":
        low, high = int(numbers[0]), int(numbers[1])
        _refuse_beyond(form, high, total)
        low = max(low, 1)  # K = 0 would train nothing
        count = low + int(torch.randint(high - low + 1, (), generator=generator))
    else:
        mean, std = numbers
        if _usable(mean, std, total) < 0.01:  # or the loop below would not end
            raise InputError(
                f"gradient_steps {form!r} draws hardly a number from 1 to {total}; give another mean or deviation"
            )
        count = 0
        while not 1 <= count <= total:
            count = round(float(torch.randn((), generator=generator)) * std + mean)
    return [i >= total - count for i in range(total)]


def check_gradient_steps(form: str, total: int) -> None:
    """Refuse a form that `draw_gradient_steps` would refuse.

    Raises:
        InputError: see there.
    """
    draw_gradient_steps(form, total, torch.Generator().manual_seed(0))


def _parsed(form: str, total: int) -> tuple[str, Sequence[float]]:
    """The kind, and its numbers; refused where there are too few, too many, or none that make sense."""
    kind, _, rest = form.partition(":")
    counts = {"all": 0, "independent": 0, "last": 1, "uniform": 2, "normal": 2, "one": 2}
    try:
        if kind not in counts:
            mask = [int(part) for part in form.split(",")]
            if not set(mask) <= {0, 1}:
                raise ValueError(form)
            kind, numbers = "mask", [float(entry) for entry in mask]
            counts["mask"] = len(mask)
        else:
            whole = {"uniform": [1.0, float(total)], "one": [0.0, float(total - 1)]}
            numbers = [float(part) for part in rest.split(":")] if rest else whole.get(kind, [])
        if not all(math.isfinite(number) and (kind == "normal" or number == int(number)) for number in numbers):
            raise ValueError(form)
    except ValueError:
        raise InputError(f"gradient_steps is {form!r}; give one of {_FORMS}") from None
    if len(numbers) != counts[kind]:
        raise InputError(f"gradient_steps is {form!r}; give one of {_FORMS}")
    if (kind == "last" and numbers[0] < 1) or (kind == "mask" and not any(numbers)):
        raise InputError(f"gradient_steps {form!r} leaves no step a gradient, so nothing would be trained")
    if kind in ("uniform", "one") and not 0 <= numbers[0] <= numbers[1]:
        raise InputError(f"gradient_steps {form!r} goes from {numbers[0]:g} to {numbers[1]:g}; give the lower first")
    if kind == "uniform" and numbers[1] < 1:
        raise InputError(f"gradient_steps {form!r} leaves no step a gradient, so nothing would be trained")
    if kind == "normal" and numbers[1] < 0:
        raise InputError(f"gradient_steps {form!r} has a standard deviation below 0; give one of {_FORMS}")
    return kind, numbers


def _usable(mean: float, std: float, total: int) -> float:
    """How likely a normal number is, rounded, one from 1 to `total`."""
    if std == 0:
        return float(1 <= round(mean) <= total)
    normal = NormalDist(mean, std)
    return normal.cdf(total + 0.5) - normal.cdf(0.5)


def _refuse_beyond(form: str, needed: int, total: int) -> None:
    if needed > total:
        raise InputError(f"gradient_steps {form!r} needs {needed} steps and a run has {total}; lower it, or raise them")
