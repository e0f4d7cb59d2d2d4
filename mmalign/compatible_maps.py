"""Maps that make a new model searchable in an old model's gallery, and stored vectors ready for the new one.

Both models are frozen, and two maps are trained on stored rows of the same items, after "lambda-Orthogonality
Regularization for Compatible Representation Learning", arXiv 2509.16664: B, from the new space to the old one, for
queries and for everything embedded from now on, and F, from stored old rows to where B puts the new ones.

Choosing: "strict" keeps B orthogonal, so that new rows among themselves are searched exactly as without it; take it
where both models saw data like the gallery. "lambda" lets B leave the rotations a little, for galleries far from what
the models were trained on, and wants labels. Where both encoders can be asked for every query,
`mmalign.spherical_interpolation` needs no training and is the first thing to try. Nothing here helps where the new
model is the worse one on the gallery.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from .checks import at_least, in_range, one_of
from .closed_forms import fit_ridge, procrustes
from .errors import InputError, NonFiniteLossError
from .lambda_orthogonality import CompatibilityObjective, compatibility_objective, relative_threshold
from .orthogonal import OrthogonalLinear
from .progress import progress_bar
from .representation_similarity import check_rows, widened
from .spherical_interpolation import pad_columns, padded_procrustes

__all__ = ["KINDS", "CompatibleMaps", "Kind", "fit_compatible_maps"]

Kind: TypeAlias = Literal["strict", "lambda"]
KINDS = ("strict", "lambda")

COMFORTABLE = 5  # pairs per dimension, the card's rule of thumb
LOOKS = 20  # times the held-out pairs are looked at
PATIENCE = 5  # looks without a better one that end the training


@dataclass(frozen=True, eq=False)
class CompatibleMaps:
    """B and F as `fit_compatible_maps` leaves them; d = max(d_old, d_new).

    What a query by the new model has to go through depends on what it is compared with:

        gallery                                     query
        old rows as they are, d_old columns         `map_queries`
        `map_stored` of old rows, `map_new` of      `map_new`
        items embedded anew, or both mixed, d

    Attributes:
        backward_weight: of B, without the columns that meet padding.
        backward_bias: of B; `None` for kind "strict".
        forward_weight: of F.
        forward_bias: of F.
        history: one line a look at the held-out pairs: step, the parts of the loss on them (without held-out pairs, of
            the last batch), and deviation, ||B B^T - I||_F.
        warnings: what to tell the user.
    """

    backward_weight: Float[Tensor, "d d_new"]
    backward_bias: Float[Tensor, " d"] | None
    forward_weight: Float[Tensor, "d d_old"]
    forward_bias: Float[Tensor, " d"]
    history: tuple[dict[str, float], ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """Which kind of map B is."""
        return "strict" if self.backward_bias is None else "lambda"

    def map_queries(self, new_rows: Float[Tensor, "q d_new"]) -> Float[Tensor, "q d_old"]:
        """Unit rows of the new model as queries to raw rows of the old one: the first d_old coordinates of B.

        Raises:
            InputError: the rows are not of the new model's width, or not finite.
        """
        return normalize(self._backward(new_rows)[:, : self.forward_weight.shape[1]], dim=1)

    def map_new(self, new_rows: Float[Tensor, "n d_new"]) -> Float[Tensor, "n d"]:
        """All coordinates of B as unit rows: what is embedded anew, and queries to a gallery of those and mapped rows.

        Raises:
            InputError: the rows are not of the new model's width, or not finite.
        """
        return normalize(self._backward(new_rows), dim=1)

    def map_stored(self, old_rows: Float[Tensor, "n d_old"]) -> Float[Tensor, "n d"]:
        """F of rows that the old model left, as unit rows in the space of `map_new`.

        Raises:
            InputError: the rows are not of the old model's width, or not finite.
        """
        unit = _unit_rows("old_rows", old_rows, self.forward_weight)
        return normalize(linear(unit, self.forward_weight, self.forward_bias), dim=1)

    def _backward(self, new_rows: Float[Tensor, "n d_new"]) -> Float[Tensor, "n d"]:
        return linear(_unit_rows("new_rows", new_rows, self.backward_weight), self.backward_weight, self.backward_bias)

    def tensors(self) -> dict[str, Tensor]:
        """The maps by name, fit for safetensors."""
        found = {
            "backward.weight": self.backward_weight,
            "backward.bias": self.backward_bias,
            "forward.weight": self.forward_weight,
            "forward.bias": self.forward_bias,
        }
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CompatibleMaps:
        """What `tensors` gave; without history and warnings.

        Raises:
            InputError: a tensor is missing, or the shapes do not fit.
        """
        needed = ("backward.weight", "forward.weight", "forward.bias")
        missing = [name for name in needed if name not in tensors]
        if missing:
            raise InputError(f"the maps lack {', '.join(missing)}; fit them again")
        backward, forward, forward_bias = (tensors[name] for name in needed)
        biases = [forward_bias, *(tensors[name] for name in ("backward.bias",) if name in tensors)]
        matrices = [backward.ndim, forward.ndim] == [2, 2]
        if not matrices or len(forward) != len(backward) or any(b.shape != backward.shape[:1] for b in biases):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise InputError(f"the shapes of the maps do not fit: {shapes}; fit them again")
        return cls(backward, tensors.get("backward.bias"), forward, forward_bias)


def fit_compatible_maps(
    old: Float[Tensor, "n d_old"],
    new: Float[Tensor, "n d_new"],
    *,
    labels: Int[Tensor, " n"] | None = None,
    kind: Kind = "strict",
    lambda_rel: float = 0.53,
    sharpness: float = 10.0,
    temperature: float = 0.07,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    steps: int = 400,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    validation: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> CompatibleMaps:
    """Train B and F on rows of both models for the same items, and keep them where the held-out loss was lowest.

    The objective is `compatibility_objective` with squared errors summed over dimensions. Rows are normalised inside,
    and the narrower side is zero-padded where the paper truncates the wider one. B starts at the orthogonal Procrustes
    solution and F at a ridge regression onto it; that start takes part in the choice, and is often hard to beat by
    much. Adam at a constant rate. 5,000 pairs in 512 dimensions take 15 to 60 seconds on one
    CPU core.

    Args:
        old: rows of the old model.
        new: rows of the new model for the same items, in the same order.
        labels: classes for the contrastive part; without them each item is its own class.
        kind: "strict", B orthogonal and without bias, or "lambda", B affine with the penalty of `lambda_orthogonality`.
        lambda_rel: for "lambda": tolerated ||B B^T - I||_F over sqrt(d); 0.53 is the paper's 12 at 512 dimensions.
        sharpness: for "lambda": alpha; sharpness * lambda_rel * sqrt(d) should be well above 1. The paper's is not
            known.
        temperature: of the contrastive part. The paper's is not known.
        weights: of L_F, L_B and L_C. The paper's are not known.
        steps: at most; a quarter of them without a lower held-out loss ends the training. 0 keeps the start.
        batch_size: pairs a step, all where there are fewer.
        learning_rate: of Adam.
        validation: share of the pairs to choose by, in [0, 0.5]; 0 keeps the last step.
        seed: of split and order. torch's global random numbers are left alone.
        progress: show a bar.

    Returns:
        Maps in the dtype and on the device of `new`.

    Raises:
        InputError: the rows cannot be paired, are fewer than max(d_old, d_new), or an option is out of range.
        NonFiniteLossError: the loss or a gradient is not finite; the step is named.
    """
    one_of("kind", kind, KINDS)
    for name, number, least in (("steps", steps, 0), ("batch_size", batch_size, 2), ("seed", seed, 0)):
        at_least(name, number, least)
    in_range("learning_rate", learning_rate, 1e-12)
    in_range("validation", validation, 0, 0.5)
    warnings = _check_support(old, new, labels)
    dim = max(old.shape[1], new.shape[1])

    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(new), generator=rng)
    held = max(2, round(validation * len(new))) if validation else 0
    pairs = _Pairs.of(old.to(new), new, labels)
    held_out, training = pairs.take(order[:held]), pairs.take(order[held:])
    loop = _Loop(
        training,
        learning_rate,
        kind,
        {
            "threshold": relative_threshold(lambda_rel, dim),
            "sharpness": sharpness,
            "temperature": temperature,
            "weights": weights,
        },
    )
    batches = _batches(len(training.new), batch_size, rng)
    every = max(1, steps // LOOKS)
    history: list[dict[str, float]] = []
    best, kept, stale = math.inf, loop.state(), 0

    def look(step: int, parts: CompatibilityObjective | None) -> None:
        nonlocal best, kept, stale
        found = loop.evaluate(held_out, batch_size) if held else parts
        if found is not None:
            line = {name: float(value.detach()) for name, value in found._asdict().items()}
            history.append({"step": step, **line, "deviation": loop.deviation()})
            stale += 1
            if not held or line["total"] < best:
                best, kept, stale = line["total"], loop.state(), 0

    look(0, None)
    with progress_bar("fitting maps", steps, unit="steps", enabled=progress, loss="-") as advance:
        for step in range(1, steps + 1):
            parts = loop.step(step, training.take(next(batches)))
            if step % every == 0 or step == steps:
                look(step, parts)
            advance(1, loss=f"{history[-1]['total']:.4f}" if history else "-")
            if stale == PATIENCE:
                break
    loop.load_state(kept)
    return loop.maps(new.shape[1], tuple(history), tuple(warnings))


class _Pairs(NamedTuple):
    """Unit rows of the same items: the old ones as they are and padded, the new ones padded."""

    stored: Float[Tensor, "n d_old"]
    old: Float[Tensor, "n d"]
    new: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"] | None

    @classmethod
    def of(cls, old: Tensor, new: Tensor, labels: Tensor | None) -> _Pairs:
        dim = max(old.shape[1], new.shape[1])
        stored = normalize(old, dim=1)
        classes = None if labels is None else labels.to(new.device)
        return cls(stored, pad_columns(stored, dim), pad_columns(normalize(new, dim=1), dim), classes)

    def take(self, rows: Int[Tensor, " m"]) -> _Pairs:
        at = rows.to(self.new.device)
        labels = None if self.labels is None else self.labels[at]
        return _Pairs(self.stored[at], self.old[at], self.new[at], labels)


class _Loop:
    """Both maps and their optimiser."""

    def __init__(self, training: _Pairs, learning_rate: float, kind: Kind, options: dict[str, Any]) -> None:
        self.options, self.learning_rate, self.strict = options, learning_rate, kind == "strict"
        rotation = padded_procrustes(training.new, training.stored)
        start = fit_ridge(training.stored, training.new @ rotation)
        d_old, dim = start.matrix.shape
        # Layers draw weights, which are overwritten, from the global random numbers of the CPU.
        with torch.random.fork_rng(devices=[]):
            self.forward_map = nn.Linear(d_old, dim, dtype=rotation.dtype)
            self.backward_map = (
                OrthogonalLinear(dim, base=rotation.T.cpu(), bias=False)
                if self.strict
                else nn.Linear(dim, dim, dtype=rotation.dtype)
            )
        self.maps_trained = nn.ModuleList([self.backward_map, self.forward_map]).to(rotation.device)
        with torch.no_grad():
            self.forward_map.weight.copy_(start.matrix.T)
            self.forward_map.bias.copy_(start.mean_y - start.mean_x @ start.matrix)
            if not self.strict:
                self.backward_map.weight.copy_(rotation.T)
                self.backward_map.bias.zero_()
        self.parameters = list(self.maps_trained.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)

    def objective(self, pairs: _Pairs) -> CompatibilityObjective:
        weight = None if self.strict else self.backward_map.weight
        mapped = self.backward_map(pairs.new), self.forward_map(pairs.stored)
        return compatibility_objective(pairs.old, *mapped, weight=weight, labels=pairs.labels, **self.options)

    def step(self, step: int, batch: _Pairs) -> CompatibilityObjective:
        """One update; the parts of the loss before it."""
        parts = self.objective(batch)
        self.optimizer.zero_grad(set_to_none=True)
        parts.total.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not parts.total.isfinite() or not torch.stack([g.isfinite().all() for g in gradients]).all():
            raise NonFiniteLossError(
                f"the loss of step {step} is {float(parts.total.detach()):g} or its gradient is not finite "
                f"(learning_rate {self.learning_rate:g}); lower the learning rate"
            )
        self.optimizer.step()
        return parts

    @torch.no_grad()
    def evaluate(self, pairs: _Pairs, batch_size: int) -> CompatibilityObjective:
        """Parts of the loss, averaged over batches of nearly one size: the contrastive part depends on that."""
        n = len(pairs.new)
        chunks = torch.arange(n).tensor_split(-(-n // batch_size))
        found = [(len(chunk) / n, self.objective(pairs.take(chunk))) for chunk in chunks]
        shares = torch.tensor([share for share, _ in found], dtype=pairs.new.dtype, device=pairs.new.device)
        return CompatibilityObjective(
            *(shares @ torch.stack(part) for part in zip(*(f for _, f in found), strict=True))
        )

    @torch.no_grad()
    def deviation(self) -> float:
        """||B B^T - I||_F."""
        weight = widened(self.backward_map.weight)
        return float(torch.linalg.norm(weight @ weight.T - torch.eye(len(weight), device=weight.device)))

    def state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def load_state(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, state, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def maps(self, d_new: int, history: tuple[dict[str, float], ...], warnings: tuple[str, ...]) -> CompatibleMaps:
        weight = self.backward_map.weight.detach()
        if self.strict:
            # The nearest orthogonal matrix: float32 leaves the trained one off by about 1e-4.
            wide = widened(weight)
            weight = procrustes(torch.eye(len(wide), dtype=wide.dtype, device=wide.device), wide).to(weight.dtype)
        bias = None if self.strict else self.backward_map.bias.detach().clone()
        forward = (self.forward_map.weight.detach().clone(), self.forward_map.bias.detach().clone())
        return CompatibleMaps(weight[:, :d_new].clone(), bias, *forward, history, warnings)


def _batches(n: int, batch_size: int, rng: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
    """Without end; each pass in another order, a rest too small for a batch left to the next pass."""
    size = min(batch_size, n)
    while True:
        order = torch.randperm(n, generator=rng)
        for start in range(0, n - size + 1, size):
            yield order[start : start + size]


def _check_support(old: Tensor, new: Tensor, labels: Tensor | None) -> list[str]:
    """Raise where maps cannot be fitted; warn where they will be poor."""
    check_rows("old", old)
    check_rows("new", new)
    if len(old) != len(new):
        raise InputError(f"old has {len(old)} rows, new {len(new)}; row i of both must stand for the same item")
    if labels is not None and labels.shape != (len(new),):
        raise InputError(f"labels have shape {tuple(labels.shape)}; give one class for each of {len(new)} rows")
    n, dim = len(new), max(old.shape[1], new.shape[1])
    if n < dim:
        raise InputError(
            f"{n} pairs in {dim} dimensions do not determine the maps; embed {dim} items or more with both models, "
            f"better {COMFORTABLE * dim:,}"
        )
    if n < COMFORTABLE * dim:
        return [f"{n:,} pairs in {dim:,} dimensions are few; {COMFORTABLE * dim:,} or more make better maps"]
    return []


def _unit_rows(name: str, rows: Tensor, weight: Float[Tensor, "d d_in"]) -> Tensor:
    check_rows(name, rows, least=0)
    if rows.shape[1] != weight.shape[1]:
        raise InputError(f"{name} have {rows.shape[1]} columns; these maps take {weight.shape[1]}")
    return normalize(rows.to(weight), dim=1)
