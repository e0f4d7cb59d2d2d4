"""One loop for all heads that are trained: contrastive loss, STRUCTURE, and what may be added to them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..checks import at_least, in_range, one_of
from ..contrastive import clip_loss, siglip_loss, softened_targets
from ..dispersion import inter_dispersion, intra_dispersion
from ..errors import InputError, NonFiniteLossError
from ..progress import progress_bar
from ..structure import mean_self_probability, structure_loss, structure_weight, walk_probabilities
from ..threshold_consistency import tcm_pairs
from .heads import Head, build_head, frame_of

__all__ = ["TEXT", "FitOptions", "Fitted", "PairedRows", "fit_heads", "mean_reciprocal_rank", "subset_for_looks"]

TEXT = "text"
_MOST_VALIDATED = 2000  # images that an evaluation during fitting looks at
_NEARLY_IDENTITY = 0.99


@dataclass(frozen=True)
class PairedRows:
    """Features of one modality, and those of the texts that belong to each row.

    Attributes:
        rows: of the modality.
        texts: of its texts.
        owner: the row that each text belongs to; every row has at least one text.
        labels: class of each row, where there are classes.
    """

    rows: Float[Tensor, "n dim"]
    texts: Float[Tensor, "m text_dim"]
    owner: Int[np.ndarray, " m"]
    labels: Int[np.ndarray, " n"] | None = None

    def take(self, chosen: Bool[np.ndarray, " n"] | Int[np.ndarray, " k"]) -> PairedRows:
        """The pairs of some rows."""
        rows = np.arange(len(self.rows))[chosen]
        place = np.full(len(self.rows), -1)
        place[rows] = np.arange(len(rows))
        texts = np.flatnonzero(place[self.owner] >= 0)
        labels = None if self.labels is None else self.labels[rows]
        return PairedRows(self.rows[rows], self.texts[texts], place[self.owner[texts]], labels)

    def first(self) -> Int[np.ndarray, " n"]:
        """Which text is the first of each row."""
        return np.unique(self.owner, return_index=True)[1]

    def first_texts(self) -> Float[Tensor, "n text_dim"]:
        """The first text of each row: one pair a row."""
        return self.texts[self.first()]


@dataclass(frozen=True)
class FitOptions:
    """What is trained, on which loss, and how.

    Attributes:
        loss: "clip" (symmetric cross-entropy over the batch) or "siglip" (sigmoid over all pairs, with a bias).
        head: of every modality but text: linear, mlp, residual, or frame (nothing but the frame).
        text_head: of the texts; as `head` by default.
        dim: width of the joint space.
        layers: linear maps of an mlp head.
        rank: of the residual head's correction.
        dropout: in the residual head's correction.
        temperature: divides cosines, in the contrastive loss and in STRUCTURE.
        learn_temperature: train the one of the contrastive loss.
        bias: SigLIP's, where it starts; it is trained.
        structure: weight of STRUCTURE's regulariser; 0 leaves it out.
        structure_warmup: steps until its full weight.
        levels: steps of the random walk whose probabilities are compared.
        divergence: "reverse", as in the published recipe, or "js", the textbook form.
        soften: share of the contrastive targets that goes to texts alike (by the frozen text features).
        soften_temperature: see `contrastive.softened_targets`.
        inter_dispersion: weight of pushing texts apart.
        intra_dispersion: weight of pulling images of one label together; needs labels.
        tcm: weight of the threshold-consistent margin loss over image-text pairs.
        tcm_margins: (positive, negative) cosines of it; by default the median matching cosine and the 0.99 quantile of
            the others, of every batch.
        steps: optimiser steps at most.
        batch_size: pairs a step, at most the training pairs. STRUCTURE's value depends on it.
        learning_rate: of AdamW, highest.
        schedule: "cosine" falls to zero over `steps`; "constant".
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: norm to which the gradient of each tensor is cut.
        evaluate_every: steps between looks at the validation pairs.
        patience: looks without a better one before it stops.
        select_by: keep the heads of the best mean reciprocal rank ("mrr"; of the lower loss where it is equal), of the
            lowest contrastive loss ("loss"), or the last ones ("last").
    """

    loss: Literal["clip", "siglip"] = "clip"
    head: Literal["linear", "mlp", "residual", "frame"] = "linear"
    text_head: Literal["linear", "mlp", "residual", "frame"] | None = None
    dim: int = 512
    layers: int = 2
    rank: int = 64
    dropout: float = 0.0
    temperature: float = 0.05
    learn_temperature: bool = False
    bias: float = -10.0
    structure: float = 10.0
    structure_warmup: int = 100
    levels: int = 1
    divergence: Literal["reverse", "js"] = "reverse"
    soften: float = 0.0
    soften_temperature: float = 0.1
    inter_dispersion: float = 0.0
    intra_dispersion: float = 0.0
    tcm: float = 0.0
    tcm_margins: tuple[float, float] | None = None
    steps: int = 1000
    batch_size: int = 1024
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    evaluate_every: int = 10
    patience: int = 30
    select_by: Literal["mrr", "loss", "last"] = "mrr"

    def __post_init__(self) -> None:
        one_of("loss", self.loss, ("clip", "siglip"))
        for name in ("head", "text_head"):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), ("linear", "mlp", "residual", "frame"))
        one_of("divergence", self.divergence, ("reverse", "js"))
        one_of("schedule", self.schedule, ("cosine", "constant"))
        one_of("select_by", self.select_by, ("mrr", "loss", "last"))
        for name in ("dim", "layers", "rank", "levels", "steps", "evaluate_every", "patience"):
            at_least(name, getattr(self, name))
        at_least("batch_size", self.batch_size, 2)
        at_least("structure_warmup", self.structure_warmup, 0)
        for name in ("structure", "inter_dispersion", "intra_dispersion", "tcm", "weight_decay"):
            in_range(name, getattr(self, name), 0)
        for name in ("temperature", "soften_temperature", "clip"):
            in_range(name, getattr(self, name), 1e-12)
        in_range("learning_rate", self.learning_rate, 1e-12, 1e6)
        in_range("soften", self.soften, 0, 1)
        in_range("dropout", self.dropout, 0, 1)
        in_range("bias", self.bias)
        _check_two("betas", self.betas, 0, 1 - 1e-9)
        if self.tcm_margins is not None:
            _check_two("tcm_margins", self.tcm_margins, -1, 1)
            if not self.tcm:
                raise InputError("tcm_margins are given and tcm is 0, which leaves that loss out; give tcm")
        if self.loss == "siglip" and self.soften:
            raise InputError(f"soften is {self.soften:g} and loss is 'siglip', which has no soft targets; set it to 0")


def _check_two(name: str, values: Sequence[float], low: float, high: float) -> None:
    if len(values) != 2:
        raise InputError(f"{name} are {values!r}; give two numbers")
    for value in values:
        in_range(name, value, low, high)


@dataclass
class Fitted:
    """What the loop leaves: heads, where they were taken, and what was seen on the way."""

    heads: dict[str, Head]
    step: int
    stopped: int
    history: list[dict[str, float]] = field(default_factory=list)
    learned: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def fit_heads(
    training: Mapping[str, PairedRows],
    validation: Mapping[str, PairedRows] | None,
    options: FitOptions,
    *,
    unpaired: Mapping[str, Float[Tensor, "k dim"]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Fitted:
    """Train one head a modality, and one for all texts.

    Every step draws, for each modality, rows without repetition and one text for each; texts of several modalities
    share one head, so that all modalities meet in the space of the texts.

    Args:
        training: pairs by modality, float32, on the device to train on.
        validation: of the same modalities; `None` trains all steps and keeps the last heads.
        options: see `FitOptions`.
        unpaired: further rows by modality (or "text"), for STRUCTURE's regulariser alone.
        seed: of initial weights, order and choice of texts; the same seed gives the same heads on the same machine.
        progress: show a bar.

    Raises:
        InputError: options that leave nothing to train.
        NonFiniteLossError: the loss, its gradient or a head is not finite; the step is named.
    """
    loop = _Loop(training, options, unpaired or {}, seed)
    fitted = Fitted(loop.heads, 0, 0)
    choose = validation is not None and options.select_by != "last"
    best: tuple[float, ...] = (-math.inf,)
    kept, looks = loop.state(), 0
    fields: dict[str, Any] = {"loss": "-", **({"mrr": "-"} if validation else {})}
    with progress_bar("fitting", options.steps, unit="steps", enabled=progress, **fields) as advance:
        for step in range(options.steps):
            values = loop.step(step)
            fitted.stopped = step + 1
            shown: dict[str, Any] = {"loss": f"{values['loss']:.4f}"}
            if step % options.evaluate_every == options.evaluate_every - 1 or step + 1 == options.steps:
                line = {"step": step + 1, **values}
                loop.require_finite(step)
                if validation is not None:
                    line |= loop.evaluate(validation, step)
                    shown["mrr"] = f"{line['validation_mrr']:.3f}"
                fitted.history.append(line)
                if choose:
                    by = ("validation_mrr",) if options.select_by == "mrr" else ()
                    score = (*(line[name] for name in by), -line["validation_loss"])
                    looks += 1
                    if score > best:
                        best, kept, fitted.step, looks = score, loop.state(), step + 1, 0
                    elif looks >= options.patience:
                        break
            advance(1, **shown)
    if choose:
        loop.load_state(kept)
    else:
        fitted.step = fitted.stopped
    fitted.learned = loop.learned()
    fitted.warnings = loop.warnings
    for head in loop.heads.values():
        head.eval().requires_grad_(False)
    return fitted


class _Loop:
    """Heads, optimiser and order of one fit."""

    def __init__(
        self, training: Mapping[str, PairedRows], options: FitOptions, unpaired: Mapping[str, Tensor], seed: int
    ) -> None:
        self.training, self.options, self.unpaired = training, options, unpaired
        self.warnings: list[str] = []
        device = next(iter(training.values())).rows.device
        self.heads = _fresh_heads(training, options, seed, device)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / options.temperature), device=device))
        self.bias = nn.Parameter(torch.tensor(float(options.bias), device=device))
        parameters = [p for head in self.heads.values() for p in head.parameters()]
        if options.learn_temperature:
            parameters.append(self.log_scale)
        if options.loss == "siglip":
            parameters.append(self.bias)
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay
        )
        self.draws = {name: _Draws(pairs, options.batch_size, seed) for name, pairs in training.items()}
        self.unpaired_draws = {
            name: _Order(len(rows), options.batch_size, (seed, 2, at))
            for at, (name, rows) in enumerate(sorted(unpaired.items()))
        }
        self.dropout_seed = seed
        self.looked: set[str] = set()

    def step(self, step: int) -> dict[str, float]:
        """One update; the loss and its terms before it."""
        options = self.options
        if options.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        devices = [] if self.log_scale.device.type == "cpu" else [self.log_scale.device]
        with torch.random.fork_rng(devices=devices, enabled=options.dropout > 0):
            if options.dropout:
                torch.manual_seed(self.dropout_seed + step)
            terms = self._terms(step)
        loss = torch.stack(list(terms.values())).sum()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._not_finite(f"the loss of step {step} is {value}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = [nn.utils.clip_grad_norm_([parameter], options.clip) for parameter in self.parameters]
        if not torch.stack(norms).isfinite().all():
            raise self._not_finite(f"the gradient of step {step} is not finite")
        self.optimizer.step()
        return {"loss": value, **{name: float(term.detach()) for name, term in terms.items()}}

    def require_finite(self, step: int) -> None:
        """Check the heads after a step."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise self._not_finite(f"the heads are not finite after step {step}")

    def _not_finite(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(f"{what} (learning_rate {self.options.learning_rate:g}); lower the learning rate")

    def _terms(self, step: int) -> dict[str, Tensor]:
        """Weighted terms of the loss, each a mean over the modalities."""
        terms: dict[str, list[Tensor]] = {}
        for name, pairs in self.training.items():
            chosen, texts_chosen = next(self.draws[name])
            rows, texts = pairs.rows[chosen], pairs.texts[texts_chosen]
            z, z_text = self.heads[name](rows), self.heads[TEXT](texts)
            found = {"contrastive": self._contrastive(z, z_text, texts)}
            found |= self._dispersion_and_tcm(z, z_text, pairs.labels, chosen)
            for term, value in found.items():
                terms.setdefault(term, []).append(value)
            if weight := structure_weight(step, self.options.structure, self.options.structure_warmup):
                both = self._structure(name, rows, z) + self._structure(TEXT, texts, z_text)
                terms.setdefault("structure", []).append(weight * both / 2)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def _contrastive(self, z: Tensor, z_text: Tensor, texts: Tensor) -> Tensor:
        options = self.options
        if options.loss == "siglip":
            return siglip_loss(z, z_text, self.log_scale.exp(), self.bias)
        targets = None
        if options.soften:
            targets = softened_targets(texts, weight=options.soften, temperature=options.soften_temperature)
        return clip_loss(z, z_text, self.log_scale.exp(), targets=targets)

    def _dispersion_and_tcm(
        self, z: Tensor, z_text: Tensor, labels: np.ndarray | None, chosen: Tensor
    ) -> dict[str, Tensor]:
        options = self.options
        terms: dict[str, Tensor] = {}
        if options.inter_dispersion:
            terms["inter_dispersion"] = options.inter_dispersion * inter_dispersion(z_text)
        if options.intra_dispersion:
            assert labels is not None
            own = torch.as_tensor(labels, device=z.device)[chosen]
            terms["intra_dispersion"] = options.intra_dispersion * intra_dispersion(z, own)
        if options.tcm:
            cosines = normalize(z, dim=-1) @ normalize(z_text, dim=-1).T
            matching = torch.eye(len(z), dtype=torch.bool, device=z.device)
            positive, negative = options.tcm_margins or _margins(cosines.detach(), matching)
            tcm = tcm_pairs(cosines, matching, positive_margin=positive, negative_margin=negative)
            terms["tcm"] = options.tcm * tcm.loss
        return terms

    def _structure(self, name: str, rows: Tensor, z: Tensor) -> Tensor:
        options = self.options
        if name in self.unpaired:
            more = self.unpaired[name][next(self.unpaired_draws[name])]
            rows, z = torch.cat([rows, more]), torch.cat([z, self.heads[name](more)])
        original = walk_probabilities(rows, temperature=options.temperature)
        if name not in self.looked:
            self.looked.add(name)
            share = float(mean_self_probability(original))
            if share > _NEARLY_IDENTITY:
                self.warnings.append(
                    f"a row of {name} keeps {share:.3f} of the weight of its neighbourhood to itself at temperature "
                    f"{options.temperature:g}, so STRUCTURE has little to hold on to; try a higher temperature"
                )
        return structure_loss(
            None,
            z,
            temperature=options.temperature,
            levels=options.levels,
            divergence=options.divergence,
            original_probabilities=original,
        )

    @torch.no_grad()
    def evaluate(self, validation: Mapping[str, PairedRows], step: int) -> dict[str, float]:
        """Mean reciprocal rank of both directions, and contrastive loss, each a mean over the modalities."""
        for head in self.heads.values():
            head.eval()
        ranks, losses = [], []
        for name, pairs in validation.items():
            z, z_text = self.heads[name](pairs.rows), self.heads[TEXT](pairs.texts)
            ranks.append(mean_reciprocal_rank(z, z_text, pairs.owner))
            first = pairs.first()
            losses.append(self._contrastive(z, z_text[first], pairs.texts[first]))
        for head in self.heads.values():
            head.train()
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise self._not_finite(f"the validation loss after step {step} is {loss}")
        return {"validation_mrr": float(np.mean(ranks)), "validation_loss": loss}

    def state(self) -> dict[str, Any]:
        heads = {name: copy.deepcopy(head.state_dict()) for name, head in self.heads.items()}
        return {"heads": heads, "scale": self.log_scale.detach().clone(), "bias": self.bias.detach().clone()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, head in self.heads.items():
            head.load_state_dict(state["heads"][name])
        self.log_scale.data.copy_(state["scale"])
        self.bias.data.copy_(state["bias"])

    def learned(self) -> dict[str, float]:
        found = {"temperature": float((-self.log_scale.detach()).exp())}
        return found | ({"bias": float(self.bias.detach())} if self.options.loss == "siglip" else {})


def _fresh_heads(
    training: Mapping[str, PairedRows], options: FitOptions, seed: int, device: torch.device
) -> dict[str, Head]:
    kinds = dict.fromkeys(training, options.head) | {TEXT: options.text_head or options.head}
    if set(kinds.values()) == {"frame"}:
        raise InputError("head and text_head are both 'frame', which leaves nothing to train; give one a map")
    texts = torch.cat([pairs.first_texts() for pairs in training.values()])
    rows = {name: pairs.rows for name, pairs in training.items()} | {TEXT: texts}
    # The joint space is as wide as the side that stays as it is.
    fixed = {name: rows[name].shape[1] for name, kind in kinds.items() if kind == "frame"}
    if len(set(fixed.values())) > 1:
        raise InputError(f"heads 'frame' of different widths ({fixed}) cannot share a space; give one of them a map")
    dim = next(iter(fixed.values()), options.dim)
    heads = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, kind in kinds.items():
            own: dict[str, dict[str, Any]] = {
                "mlp": {"layers": options.layers},
                "residual": {"rank": options.rank, "dropout": options.dropout},
            }
            head = build_head({"kind": kind, "input_dim": rows[name].shape[1], "dim": dim, **own.get(kind, {})})
            heads[name] = head.set_frame(*frame_of(rows[name].cpu())).to(device).train()
    return heads


class _Order:
    """Row numbers in random order, without repetition within a batch; a batch never crosses two rounds."""

    def __init__(self, n: int, batch_size: int, seed: tuple[int, ...]) -> None:
        self.n, self.size = n, min(n, batch_size)
        self.random = np.random.default_rng(seed)
        self.left: np.ndarray = np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        # A short last batch would give STRUCTURE another scale: what is left of a round is not used.
        if len(self.left) < self.size:
            self.left = self.random.permutation(self.n)
        batch, self.left = self.left[: self.size], self.left[self.size :]
        return torch.from_numpy(batch)


class _Draws:
    """Rows of pairs, and one text for each."""

    def __init__(self, pairs: PairedRows, batch_size: int, seed: int) -> None:
        self.order = _Order(len(pairs.rows), batch_size, (seed, 0))
        self.random = np.random.default_rng((seed, 1))
        self.texts = np.argsort(pairs.owner, kind="stable")
        self.counts = np.bincount(pairs.owner, minlength=len(pairs.rows))
        self.starts = np.cumsum(self.counts) - self.counts

    def __next__(self) -> tuple[Tensor, Tensor]:
        rows = next(self.order)
        at = rows.numpy()
        which = (self.random.random(len(at)) * self.counts[at]).astype(np.int64)
        return rows, torch.from_numpy(self.texts[self.starts[at] + which])


def _margins(cosines: Float[Tensor, "n n"], matching: Bool[Tensor, "n n"]) -> tuple[float, float]:
    """Half of the matching pairs and one in a hundred of the others are beyond these."""
    others = cosines[~matching]
    at = max(1, math.ceil(0.99 * others.numel()))
    return float(cosines[matching].median()), float(others.kthvalue(at).values)


@torch.no_grad()
def mean_reciprocal_rank(
    z: Float[Tensor, "n dim"], z_text: Float[Tensor, "m dim"], owner: Int[np.ndarray, " m"]
) -> float:
    """Mean over both directions; every row and every text is a query; ties and NaN count against it."""
    scores = normalize(z, dim=-1) @ normalize(z_text, dim=-1).T
    of_text = torch.from_numpy(owner).to(scores.device)
    own = scores.gather(0, of_text[None])[0]
    best = own.new_full((len(z),), -math.inf).scatter_reduce(0, of_text, own, "amax")
    others = of_text != torch.arange(len(z), device=scores.device)[:, None]
    of_rows = 1 + (~(scores < best[:, None]) & others).sum(dim=1)
    of_texts = 1 + (~(scores < own) & others).sum(dim=0)
    return float((1 / of_rows).mean() + (1 / of_texts).mean()) / 2


def subset_for_looks(pairs: PairedRows, seed: int) -> PairedRows:
    """At most `_MOST_VALIDATED` rows, drawn at random, for what is looked at every few steps."""
    if len(pairs.rows) <= _MOST_VALIDATED:
        return pairs
    chosen = np.random.default_rng((seed, 3)).choice(len(pairs.rows), _MOST_VALIDATED, replace=False)
    return pairs.take(np.sort(chosen))
