"""Where what becomes an image's vector attends to its tokens, in each family of models, and how to get in there.

Queries are changed, not keys: of images with objects alone, and of pooled queries alone. The sites are found by the
structure of a model, whatever checkpoint it is of. Methods card "query perturbation", section 6.

BLIP-2 is what the paper has code for, CoCa what it reports besides. SigLIP's pooling, CLIP's class token and that of
timm's transformers are extensions of ours, experimental.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from ..query_perturbation import PatchGrid, mean_projector, perturbed_queries

__all__ = ["SUPPORTED", "AttentionSite", "ImageAttention", "Objects", "image_attention"]

SUPPORTED = (
    "supported are BLIP-2 (Blip2ForImageTextRetrieval), CoCa of open_clip, CLIP and SigLIP of open_clip and "
    "transformers with image transformers, and timm's vision transformers that pool by class token or by attention"
)


class Objects:
    """The objects of a batch, for all sites of one pass, in the thread that this was made in.

    Other threads may run the same model meanwhile: hooks leave their passes alone. One that began before hooks were
    removed calls them still, and by then perhaps without the named arguments they were to be given.

    Attributes:
        batch: images.
        rows: those whose queries are changed.
        plain: change nothing; for measuring.
        masses: where it is a list, each site appends the share of its pooled queries' attention on each object of
            `rows`, mean over heads and queries.
    """

    def __init__(
        self,
        weights: Float[Tensor, "batch objects tokens"],
        strengths: Float[Tensor, "batch objects"],
        *,
        energy: float,
        rank: int | None,
        keep_norm: bool,
        plain: bool = False,
        masses: list[Float[Tensor, "rows objects"]] | None = None,
    ) -> None:
        self.batch, _, self.tokens = weights.shape
        present = (weights > 0).any(dim=-1)
        acting = present if masses is not None else present & (strengths != 0)
        self.rows = acting.any(dim=-1).nonzero().squeeze(1)
        self.plain, self.masses = plain, masses
        self._thread = threading.get_ident()
        self._weights, self._strengths = weights[self.rows], strengths[self.rows]
        self._rule: dict[str, Any] = {"energy": energy, "rank": rank}
        self._keep_norm = keep_norm

    @property
    def elsewhere(self) -> bool:
        """Whether the pass that asks is one of another thread."""
        return threading.get_ident() != self._thread

    def images_of(self, states: Float[Tensor, "images tokens width"], *, repeated: bool = False) -> Tensor | None:
        """States of `rows` out of those of a pass; `None` where there are none.

        Args:
            states: what is attended to.
            repeated: every image may stand there several times in a row, as for several texts.

        Raises:
            InputError: the pass is over another batch than that of the objects, or of other tokens.
        """
        images, tokens = states.shape[:2]
        times = images // self.batch if repeated and self.batch and images % self.batch == 0 else 1
        if times > 1:
            groups = states.unflatten(0, (self.batch, times))
            times = times if bool((groups == groups[:, :1]).all()) else 1
        if images != times * self.batch:
            raise InputError(f"{images} images go through the encoder, and objects were given for {self.batch}")
        if tokens != self.tokens:
            raise InputError(
                f"token weights are of {self.tokens} tokens, and the encoder attends to {tokens}; make them with its "
                "own `grid_of` and give images in its own size"
            )
        if not len(self.rows):
            return None
        self._to(states.device)
        return states[::times][self.rows]

    def turned(
        self,
        queries: Float[Tensor, "rows heads m d"],
        keys: Float[Tensor, "rows heads tokens d"],
        bias: Tensor | None = None,
    ) -> Float[Tensor, "rows heads m d"]:
        """Queries of `rows`, perturbed; `bias` is what is added to their logits (masks)."""
        if not self.plain:
            projector = mean_projector(keys, self._weights, self._strengths, **self._rule)
            queries = perturbed_queries(queries, projector, keep_norm=self._keep_norm)
        if self.masses is not None:
            attention = attended(queries, keys, bias).mean(dim=(1, 2))
            self.masses.append(torch.einsum("rn,ron->ro", attention, self._weights.to(attention)))
        return queries

    def _to(self, device: torch.device) -> None:
        self.rows, self._weights = self.rows.to(device), self._weights.to(device)
        self._strengths = self._strengths.to(device)


def attended(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Float[Tensor, "rows heads m tokens"]:
    """Attention probabilities, in float32 or better."""
    kind = torch.promote_types(queries.dtype, torch.float32)
    logits = queries.to(kind) @ keys.to(kind).mT * queries.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias.to(kind)).softmax(dim=-1)


class AttentionSite(ABC):
    """An attention layer whose queries decide what an image's vector is made of."""

    @abstractmethod
    def attach(self, objects: Objects) -> list[RemovableHandle]:
        """Have the layer attend to the objects until the handles are removed."""


@dataclass(frozen=True)
class ProjectedAttention(AttentionSite):
    """Attention with linear layers for queries and keys.

    Attributes:
        module: called with the states.
        query: within it.
        key: within it; runs after `query`, so that keys are computed first, of images with objects alone.
        heads: how many.
        states: the argument that keys are made of.
        pooled: the queries that count.
        repeated: see `Objects.images_of`.
    """

    module: nn.Module
    query: nn.Module
    key: nn.Module
    heads: int
    states: str
    pooled: slice
    repeated: bool = False

    def attach(self, objects: Objects) -> list[RemovableHandle]:
        """By hooks before the layer and behind its query projection."""
        found: list[Tensor] = []

        def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any] | None = None) -> None:
            if objects.elsewhere:
                return
            found.clear()
            bound = inspect.signature(module.forward).bind(*arguments, **(named or {})).arguments
            states = objects.images_of(bound[self.states], repeated=self.repeated)
            if states is not None:
                found.append(self.key(states).unflatten(-1, (self.heads, -1)).transpose(1, 2))

        def behind(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            if objects.elsewhere or not found:
                return None
            grouped = output.clone().unflatten(0, (objects.batch, -1))  # image, how often, query, width
            queries = grouped[objects.rows, :, self.pooled].unflatten(-1, (self.heads, -1))
            times, count = queries.shape[1:3]
            by_head = queries.flatten(1, 2).transpose(1, 2)
            turned = objects.turned(by_head, found.pop()).transpose(1, 2).flatten(2)
            grouped[objects.rows, :, self.pooled] = turned.unflatten(1, (times, count))
            return grouped.flatten(0, 1)

        return [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.query.register_forward_hook(behind),
        ]


@dataclass(frozen=True)
class NormedAttention(AttentionSite):
    """timm's attention: one projection gives keys and values, and queries too or not; then both are normalised.

    Attributes:
        projection: its last third, or half, is values; keys are before them.
        parts: three or two.
        query_norm: called with the queries by head, after `projection`.
        key_norm: called with the keys by head.
        heads: how many.
        pooled: the queries that count.
    """

    projection: nn.Module
    parts: int
    query_norm: nn.Module
    key_norm: nn.Module
    heads: int
    pooled: slice

    def attach(self, objects: Objects) -> list[RemovableHandle]:
        """By hooks behind the projection and behind the norm of the queries, which may be an identity."""
        found: list[Tensor] = []

        def keys(_: nn.Module, __: Any, output: Tensor) -> None:
            if objects.elsewhere:
                return
            found.clear()
            states = objects.images_of(output)
            if states is not None:
                split = states.unflatten(-1, (self.parts, self.heads, -1))
                found.append(self.key_norm(split[:, :, -2].transpose(1, 2)))

        def behind(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            if objects.elsewhere or not found:
                return None
            output = output.clone()
            queries = output[objects.rows][:, :, self.pooled]
            output[objects.rows, :, self.pooled] = objects.turned(queries, found.pop()).to(output.dtype)
            return output

        return [self.projection.register_forward_hook(keys), self.query_norm.register_forward_hook(behind)]


@dataclass(frozen=True)
class FusedAttention(AttentionSite):
    """`nn.MultiheadAttention`, whose projections never run as modules: the output of one query is computed once more.

    Attributes:
        module: the layer.
        query: place of the pooled query.
    """

    module: nn.MultiheadAttention
    query: int = 0

    def attach(self, objects: Objects) -> list[RemovableHandle]:
        """By a hook behind the layer, which writes into a copy of its output."""
        module = self.module
        if module.bias_k is not None or module.add_zero_attn:
            raise InputError("attention with keys of its own (add_bias_kv, add_zero_attn) is not supported")

        def behind(_: nn.Module, arguments: tuple[Any, ...], *rest: Any) -> Any:
            if objects.elsewhere:
                return None
            named, output = rest
            call = inspect.signature(nn.MultiheadAttention.forward).bind(module, *arguments, **named).arguments
            inputs = [call[name] for name in ("query", "key", "value")]
            if not module.batch_first:
                inputs = [states.transpose(0, 1) for states in inputs]
            attended_to = objects.images_of(inputs[1])
            if attended_to is None:
                return None
            asking, values = inputs[0][objects.rows, self.query : self.query + 1], inputs[2][objects.rows]
            queries, keys, values = self._projected(asking, attended_to, values)
            bias = self._bias(call, objects, inputs[0].shape[1])
            queries = objects.turned(queries, keys, bias)
            if objects.plain:
                return None
            probabilities = attended(queries, keys, bias).to(values.dtype)
            together = (probabilities @ values).transpose(1, 2).flatten(2)
            result = output[0].clone()
            place = result if module.batch_first else result.transpose(0, 1)
            place[objects.rows, self.query] = module.out_proj(together)[:, 0].to(result.dtype)
            return result, self._weights(output[1], probabilities, objects)

        return [module.register_forward_hook(behind, with_kwargs=True)]

    def _projected(self, *states: Tensor) -> list[Float[Tensor, "rows heads n d"]]:
        module = self.module
        if module._qkv_same_embed_dim:
            weights = list(module.in_proj_weight.chunk(3))
        else:
            weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        biases = [None] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.chunk(3))
        return [
            linear(rows, weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for rows, weight, bias in zip(states, weights, biases, strict=True)
        ]

    def _bias(self, call: Mapping[str, Any], objects: Objects, queries: int) -> Tensor | None:
        """What the call's masks add to the logits of the pooled query: [rows or 1, heads or 1, 1, tokens]."""
        total = None
        mask, padding = call.get("attn_mask"), call.get("key_padding_mask")
        if mask is not None:
            # For the whole batch, or for every image and head, one after the other.
            by_head = mask[None, None] if mask.ndim == 2 else mask.view(objects.batch, -1, queries, mask.shape[-1])
            chosen = by_head if mask.ndim == 2 else by_head[objects.rows]
            total = _added(chosen[:, :, self.query : self.query + 1])
        if padding is not None:
            padded = _added(padding[objects.rows][:, None, None])
            total = padded if total is None else total + padded
        return total

    def _weights(self, given: Tensor | None, probabilities: Tensor, objects: Objects) -> Tensor | None:
        """The probabilities that the layer returns beside its output, where it was asked for them."""
        if given is None:
            return None
        given = given.clone()
        if given.ndim == 3:
            given[objects.rows, self.query] = probabilities[:, :, 0].mean(dim=1).to(given.dtype)
        else:
            given[objects.rows, :, self.query] = probabilities[:, :, 0].to(given.dtype)
        return given


def _added(mask: Tensor) -> Tensor:
    """A mask as numbers to add; in boolean ones True stands for what must not be seen."""
    return (
        torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
    )


class ImageAttention(NamedTuple):
    """Where a model's images are attended to.

    Attributes:
        sites: the layers.
        grid: tokens that the keys of all of them stand for.
    """

    sites: tuple[AttentionSite, ...]
    grid: PatchGrid


def image_attention(encoder: Any) -> ImageAttention:
    """The sites of an encoder, or of a `Blip2Matcher`.

    Raises:
        InputError: another kind of model.
    """
    inner = encoder
    while hasattr(inner, "image_encoder"):  # of a joined encoder
        inner = inner.image_encoder
    found = _found(getattr(inner, "model", None))
    if found is None:
        spec = getattr(encoder, "spec", type(encoder).__name__)
        raise InputError(f"{spec!r} has no attention of pooled queries to image tokens to perturb; {SUPPORTED}")
    return found


def _found(model: Any) -> ImageAttention | None:
    if hasattr(model, "qformer"):
        return _blip2(model)
    if hasattr(model, "visual"):
        trunk = getattr(model.visual, "trunk", None)
        return _open_clip(model.visual) if trunk is None else _timm(trunk)
    if hasattr(model, "vision_model"):
        return _transformers(model.vision_model)
    return _timm(model)


def _blip2(model: Any) -> ImageAttention | None:
    config = model.config.vision_config
    layers = [
        layer.crossattention.attention for layer in model.qformer.encoder.layer if hasattr(layer, "crossattention")
    ]
    sites = tuple(
        ProjectedAttention(
            layer, layer.query, layer.key, layer.num_attention_heads, "encoder_hidden_states", slice(None), True
        )
        for layer in layers
    )
    return ImageAttention(sites, _square(config.image_size, config.patch_size, 1)) if sites else None


def _open_clip(visual: Any) -> ImageAttention | None:
    if not hasattr(visual, "transformer") or not hasattr(visual, "grid_size"):
        return None
    grid = _grid(visual.grid_size, visual.patch_size, 1)
    pool = getattr(visual, "attn_pool", None)
    if pool is None:
        layer, usual = visual.transformer.resblocks[-1].attn, visual.pool_type == "tok"
    elif getattr(visual, "attn_pool_contrastive", None) is None:
        layer, usual = pool.attn, visual.pool_type == "tok"
    else:  # in a cascade it attends to the other pool's output, which has no places
        layer, usual = visual.attn_pool_contrastive.attn, visual.attn_pool_type == "parallel"
    if not usual or not isinstance(layer, nn.MultiheadAttention):
        return None
    return ImageAttention((FusedAttention(layer),), grid)


def _transformers(vision: Any) -> ImageAttention | None:
    embeddings, head = getattr(vision, "embeddings", None), getattr(vision, "head", None)
    size, patch = getattr(embeddings, "image_size", None), getattr(embeddings, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        return None
    if isinstance(getattr(head, "attention", None), nn.MultiheadAttention):
        return ImageAttention((FusedAttention(head.attention),), _square(size, patch, 0))  # type: ignore[union-attr]
    if not hasattr(embeddings, "class_embedding") or not hasattr(vision, "encoder"):
        return None
    layer = vision.encoder.layers[-1].self_attn
    site = ProjectedAttention(layer, layer.q_proj, layer.k_proj, layer.num_heads, "hidden_states", slice(0, 1))
    return ImageAttention((site,), _square(size, patch, 1))


def _timm(trunk: Any) -> ImageAttention | None:
    from timm.layers import Attention, AttentionPoolLatent
    from timm.models.vision_transformer import VisionTransformer

    # Subclasses pool otherwise (DeiT's distilled ones), or their attention does more (rotary positions, relative ones).
    if type(trunk) is not VisionTransformer:
        return None
    patches = trunk.patch_embed
    grid = _grid(patches.grid_size, patches.patch_size, trunk.num_prefix_tokens)
    pool: Any = trunk.attn_pool
    if type(pool) is AttentionPoolLatent:
        pooled = slice(0, 1) if pool.pool == "token" else slice(None)
        site = NormedAttention(pool.kv, 2, pool.q_norm, pool.k_norm, pool.num_heads, pooled)
        return ImageAttention((site,), grid if trunk.pool_include_prefix else grid._replace(prefix=0))
    layer: Any = getattr(trunk.blocks[-1], "attn", None)
    if pool is not None or trunk.global_pool != "token" or type(layer) is not Attention:
        return None
    site = NormedAttention(layer.qkv, 3, layer.q_norm, layer.k_norm, layer.num_heads, slice(0, 1))
    return ImageAttention((site,), grid)


def _square(size: int, patch: int, prefix: int) -> PatchGrid:
    return _grid((size // patch, size // patch), (patch, patch), prefix)


def _grid(places: tuple[int, int], patch: tuple[int, int], prefix: int) -> PatchGrid:
    return PatchGrid(places[0], places[1], patch[0], patch[1], prefix)
