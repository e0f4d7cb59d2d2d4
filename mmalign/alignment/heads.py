"""Heads: what takes the features of one frozen encoder into the joint space.

A head is a `torch.nn.Module` whose state is tensors and whose rest is `settings`, JSON-safe, from which `build_head`
makes it again. All start with a frame, fitted on the training rows: subtract `centre`, multiply by `scale`, and, with
`unit_input`, divide each row by its norm. New rows have to go through the same frame, so it belongs to the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, normalize

from ..checks import at_least
from ..closed_forms import asif_coordinates, csa_coordinates
from ..errors import InputError

__all__ = [
    "AnchorHead",
    "CanonicalHead",
    "FrameHead",
    "Head",
    "LinearHead",
    "MLPHead",
    "ResidualHead",
    "build_head",
    "fitted_linear",
    "frame_of",
    "head_tensors",
    "read_heads",
]


class Head(nn.Module):
    """Base: the frame.

    Attributes:
        kind: name in `settings`.
        settings: all but the tensors, with `kind`, `input_dim` and `dim`.
        dim: width of the joint space.
    """

    kind: ClassVar[str]
    centre: Float[Tensor, " input_dim"]
    scale: Float[Tensor, ""]

    def __init__(self, input_dim: int, dim: int, *, unit_input: bool = False, **own: Any) -> None:
        super().__init__()
        self.settings = {"kind": self.kind, "input_dim": input_dim, "dim": dim, "unit_input": unit_input, **own}
        self.input_dim, self.dim, self.unit_input = input_dim, dim, unit_input
        self.register_buffer("centre", torch.zeros(input_dim))
        self.register_buffer("scale", torch.ones(()))

    def set_frame(self, centre: Float[Tensor, " input_dim"], scale: float | Tensor = 1.0) -> Head:
        """Take the frame; returns itself."""
        self.centre.copy_(centre)
        self.scale.copy_(torch.as_tensor(scale))
        return self

    def frame(self, features: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch input_dim"]:
        """Features as the map takes them."""
        framed = (features - self.centre) * self.scale
        return normalize(framed, dim=-1) if self.unit_input else framed

    def forward(self, features: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch dim"]:
        """Joint coordinates, not normalised."""
        raise NotImplementedError


class FrameHead(Head):
    """The frame alone: a side that the other one is mapped to."""

    kind: ClassVar[str] = "frame"

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The framed features."""
        return self.frame(features)


class LinearHead(Head):
    """z = W x + b."""

    kind: ClassVar[str] = "linear"

    def __init__(self, input_dim: int, dim: int, *, bias: bool = True, unit_input: bool = False) -> None:
        super().__init__(input_dim, dim, unit_input=unit_input, bias=bias)
        self.map = nn.Linear(input_dim, dim, bias=bias)

    def forward(self, features: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch dim"]:
        """See the class."""
        return self.map(self.frame(features))


class MLPHead(Head):
    """Linear, then (ReLU, Linear) until `layers` linear maps stand in a row."""

    kind: ClassVar[str] = "mlp"

    def __init__(self, input_dim: int, dim: int, *, layers: int = 2, unit_input: bool = False) -> None:
        at_least("layers", layers)
        super().__init__(input_dim, dim, unit_input=unit_input, layers=layers)
        steps: list[nn.Module] = [nn.Linear(input_dim, dim)]
        for _ in range(layers - 1):
            steps += [nn.ReLU(), nn.Linear(dim, dim)]
        self.map = nn.Sequential(*steps)

    def forward(self, features: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch dim"]:
        """See the class."""
        return self.map(self.frame(features))


class ResidualHead(Head):
    """Orthogonal linear map plus a gated low-rank correction: z = P x + alpha W2 dropout(gelu(W1 x)).

    P and W1 start orthogonal, W2 at zero. STRUCTURE's published configurations start the gate at alpha = 0 behind a
    sigmoid, where it, W1 and W2 never get a gradient; here alpha is a plain number that starts at `gate`, 0.1.
    """

    kind: ClassVar[str] = "residual"

    def __init__(
        self,
        input_dim: int,
        dim: int,
        *,
        rank: int = 64,
        gate: float = 0.1,
        dropout: float = 0.0,
        unit_input: bool = False,
    ) -> None:
        at_least("rank", rank)
        if gate == 0:
            raise InputError("gate is 0, where the residual never gets a gradient; give a small number such as 0.1")
        super().__init__(input_dim, dim, unit_input=unit_input, rank=rank, gate=gate, dropout=dropout)
        self.main = nn.Linear(input_dim, dim, bias=False)
        self.down = nn.Linear(input_dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        self.alpha = nn.Parameter(torch.tensor(float(gate)))
        self.dropout = dropout
        nn.init.orthogonal_(self.main.weight)
        nn.init.orthogonal_(self.down.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch dim"]:
        """See the class."""
        framed = self.frame(features)
        residual = self.up(dropout(gelu(self.down(framed)), self.dropout, self.training))
        return self.main(framed) + self.alpha * residual


class CanonicalHead(Head):
    """Canonical coordinates weighted by the roots of their correlations: the inner product is the CSA score.

    The weighted coordinates a sqrt(rho) have norms below 1, and normalising them would change the score. Two more
    coordinates, one for each `side` (0 or 1), hold what is missing from norm 1, so that rows are unit rows and their
    inner product across the sides is still sum_k rho_k a_k b_k. The correlations must not exceed 1.
    """

    kind: ClassVar[str] = "canonical"
    projection: Float[Tensor, "input_dim canonical"]
    correlations: Float[Tensor, " canonical"]

    def __init__(self, input_dim: int, dim: int, *, side: int, unit_input: bool = False) -> None:
        super().__init__(input_dim, dim, unit_input=unit_input, side=side)
        self.side = side
        self.register_buffer("projection", torch.zeros(input_dim, dim - 2))
        self.register_buffer("correlations", torch.zeros(dim - 2))

    def forward(self, features: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch dim"]:
        """See the class; unit rows."""
        framed = self.frame(features)
        nothing = framed.new_zeros(self.input_dim)
        rows = csa_coordinates(framed, nothing, self.projection, self.correlations, self.dim - 2)
        missing = (1 - rows.square().sum(dim=-1, keepdim=True)).clamp(min=0).sqrt()
        pads = [missing, torch.zeros_like(missing)]
        return torch.cat([rows, *(pads if self.side == 0 else reversed(pads))], dim=-1)


class AnchorHead(Head):
    """ASIF: similarities to the paired anchors of this side; one coordinate an anchor."""

    kind: ClassVar[str] = "anchors"
    anchors: Float[Tensor, "dim input_dim"]

    def __init__(self, input_dim: int, dim: int, *, top: int, power: float, unit_input: bool = False) -> None:
        super().__init__(input_dim, dim, unit_input=unit_input, top=top, power=power)
        self.top, self.power = top, power
        self.register_buffer("anchors", torch.zeros(dim, input_dim))

    def forward(self, features: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch dim"]:
        """See the class; unit rows."""
        return asif_coordinates(self.frame(features), self.anchors, top=self.top, power=self.power)


_HEADS = {head.kind: head for head in (FrameHead, LinearHead, MLPHead, ResidualHead, CanonicalHead, AnchorHead)}


def build_head(settings: Mapping[str, Any]) -> Head:
    """A head from its `settings`; its tensors are to be loaded.

    Raises:
        InputError: a kind that is not known.
    """
    options = dict(settings)
    kind = options.pop("kind")
    if kind not in _HEADS:
        raise InputError(f"head is {kind!r}; give one of {', '.join(_HEADS)}")
    return _HEADS[kind](**options)


def fitted_linear(
    weight: Float[Tensor, "input_dim dim"],
    centre: Float[Tensor, " input_dim"],
    *,
    bias: Float[Tensor, " dim"] | None = None,
    unit_input: bool = False,
) -> LinearHead:
    """A closed form's map, x -> (x - centre) W + bias, as a head."""
    head = LinearHead(*weight.shape, bias=bias is not None, unit_input=unit_input)
    head.set_frame(centre)
    head.map.weight.data.copy_(weight.T)
    if bias is not None:
        head.map.bias.data.copy_(bias)
    return head


def frame_of(features: Float[Tensor, "n dim"]) -> tuple[Float[Tensor, " dim"], float]:
    """Centre and scale that give the rows mean 0 and a root mean square norm of sqrt(dim).

    One scale for all coordinates: angles stay, and a learning rate means the same for any encoder.
    """
    centre = features.mean(dim=0)
    size = (features - centre).square().mean().sqrt()
    return centre, 1 / max(float(size), math.sqrt(torch.finfo(torch.float32).tiny))


def head_tensors(heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """State of several heads under one roof."""
    return {f"{name}.{key}": value for name, head in heads.items() for key, value in head.state_dict().items()}


def read_heads(settings: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Head]:
    """The opposite of `head_tensors`; `KeyError` names a tensor that is not there."""
    heads = {}
    for name, own in settings.items():
        head = build_head(own)
        head.load_state_dict({key: tensors[f"{name}.{key}"] for key in head.state_dict()})
        heads[name] = head.eval().requires_grad_(False)
    return heads
