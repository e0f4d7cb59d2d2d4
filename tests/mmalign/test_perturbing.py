"""Query perturbation inside models of every family, on photographs with their objects."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mmalign.errors import InputError
from mmalign.object_aware.blip2 import Blip2Matcher
from mmalign.object_aware.perturbing import (
    PerturbationSettings,
    attention_masses,
    grid_of,
    perturb_queries,
    perturbed,
)
from mmalign.object_aware.sites import FusedAttention, Objects
from mmalign.query_perturbation import (
    boxes_to_token_weights,
    mean_projector,
    perturbed_keys,
)
from tests.conftest import TINY_CLIP, spread_weights

IMAGES = 4


class Family(NamedTuple):
    """An encoder, photographs as it takes them, one box of each in pixels, and their sizes."""

    encoder: Any
    pixels: Tensor
    boxes: list[list[list[float]]]
    sizes: list[tuple[int, int]]

    @torch.no_grad()
    def features(self, rows: slice | list[int] = slice(None)) -> Tensor:
        encoder = self.encoder
        run = encoder.image_queries if isinstance(encoder, Blip2Matcher) else encoder.image_features
        return run(self.pixels[rows])

    def weights(self) -> Tensor:
        encoder = self.encoder
        each = zip(self.boxes, self.sizes, strict=True)
        grid = grid_of(encoder)
        return torch.stack(
            [boxes_to_token_weights(torch.tensor(rows), size, encoder.preprocessing, grid) for rows, size in each]
        )


def open_clip_encoder(name: str, config: dict[str, Any], folder: Path) -> Any:
    import open_clip

    from mmalign.encoders.open_clip import OpenCLIPEncoder

    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    model = spread_weights(open_clip.create_model(name))
    return OpenCLIPEncoder(model, open_clip.get_tokenizer(name), open_clip.get_model_config(name), f"open_clip:{name}")


def timm_encoder(name: str, **options: Any) -> Any:
    import timm

    from mmalign.encoders.timm import TimmEncoder

    model = spread_weights(timm.create_model(name, num_classes=0, **options))
    return TimmEncoder(model, name, f"timm:{name}", options={"num_classes": 0, **options})


def coca(folder: Path, **vision: Any) -> Any:
    text = {**TINY_CLIP["text_cfg"], "embed_cls": True, "output_tokens": True}
    pool = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 8, "output_tokens": True}
    config = {
        "embed_dim": 32,
        "vision_cfg": {**TINY_CLIP["vision_cfg"], "image_size": 64, **pool, **vision},
        "text_cfg": text,
        "multimodal_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        "custom_text": True,
    }
    return open_clip_encoder("tiny-coca", config, folder)


def trunk(folder: Path) -> Any:
    vision = {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}
    config = {"embed_dim": 96, "vision_cfg": vision, "text_cfg": TINY_CLIP["text_cfg"], "custom_text": True}
    return open_clip_encoder("tiny-trunk", config, folder)


FAMILIES: dict[str, Callable[[Any, Path], Any]] = {
    "CLIP of open_clip": lambda request, _: request.getfixturevalue("tiny_open_clip"),
    "CoCa": lambda _, folder: coca(folder),
    "SigLIP of open_clip": lambda _, folder: trunk(folder),
    "CLIP of transformers": lambda request, _: request.getfixturevalue("tiny_clip"),
    "SigLIP of transformers": lambda request, _: request.getfixturevalue("tiny_siglip"),
    "timm with a class token": lambda request, _: request.getfixturevalue("tiny_timm"),
    "timm with registers": lambda _, __: timm_encoder("test_vit2", reg_tokens=4, class_token=True, global_pool="token"),
    "timm with attention pooling": lambda _, __: timm_encoder("test_vit", class_token=False, global_pool="map"),
    "BLIP-2": lambda request, _: Blip2Matcher.from_spec(str(request.getfixturevalue("blip2_folder")), device="cpu"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, photos: Path, captions: list[dict], tmp_path_factory: Any) -> Family:
    encoder = FAMILIES[request.param](request, tmp_path_factory.mktemp("models"))
    return on_photographs(redrawn(encoder), photos, captions)


def redrawn(encoder: Any, seed: int = 0) -> Any:
    """The encoder with other weights, the same ones whatever was drawn before."""
    other = copy.copy(encoder)
    other.model = copy.deepcopy(encoder.model)
    for name, parameter in other.model.named_parameters():
        if parameter.ndim:
            parameter.data.fill_(float(parameter.ndim == 1 and name.endswith("weight")))  # 1 in norms
    spread_weights(other.model, seed)
    return other


def on_photographs(encoder: Any, photos: Path, captions: list[dict], count: int = IMAGES) -> Family:
    """Photographs with the largest of their objects that the encoder sees and that is under a third of the image."""
    pixels, boxes, sizes = [], [], []
    for row in captions:
        decoded, values = encoder.load_image(photos / row["file"])
        height, width = decoded.pixels.shape[-2:]
        rows = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in row["objects"])]
        if not rows:
            continue
        shown = encoder.preprocessing.map_boxes(torch.tensor(rows), height, width)
        areas = (shown[:, 2:] - shown[:, :2]).prod(dim=1) / values[0].numel()
        areas[areas > 1 / 3] = 0
        if areas.max() > 0.02:
            pixels.append(values)
            boxes.append([rows[int(areas.argmax())]])
            sizes.append((width, height))
        if len(pixels) == count:
            break
    assert len(pixels) == count
    return Family(encoder, torch.stack(pixels), boxes, sizes)


def hooks(encoder: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in encoder.model.modules())


def same_head_split(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


class KeySide:
    """The equivalent form, by the card's names of modules: keys K + K Pbar for every query; no site of ours in it."""

    def __init__(self, encoder: Any, weights: Tensor, alpha: float) -> None:
        self.weights, self.alpha, self.undo = weights, alpha, []
        model = encoder.model
        if hasattr(model, "qformer"):
            for layer in model.qformer.encoder.layer[::2]:
                attention = layer.crossattention.attention
                self.hook(attention.key, attention.num_attention_heads)
            return
        if hasattr(model, "vision_model"):
            vision = model.vision_model
            if hasattr(vision, "head"):
                self.replace(vision.head.attention)
            else:
                attention = vision.encoder.layers[-1].self_attn
                self.hook(attention.k_proj, attention.num_heads)
            return
        visual = getattr(model, "visual", model)
        inner = getattr(visual, "trunk", visual)
        if hasattr(inner, "blocks"):
            attention = inner.blocks[-1].attn if inner.attn_pool is None else inner.attn_pool
            self.hook(attention.k_norm, None)
        else:
            self.replace(inner.transformer.resblocks[-1].attn if inner.attn_pool is None else inner.attn_pool.attn)

    def keys(self, keys: Tensor) -> Tensor:
        return perturbed_keys(keys, mean_projector(keys, self.weights, self.alpha))

    def hook(self, module: nn.Module, heads: int | None) -> None:
        def behind(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if heads is None:
                return self.keys(output)
            return self.keys(same_head_split(output, heads)).transpose(1, 2).flatten(2)

        self.undo.append(module.register_forward_hook(behind).remove)

    def replace(self, module: nn.MultiheadAttention) -> None:
        def forward(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
            if module.in_proj_weight is not None:
                projections = module.in_proj_weight.chunk(3)
            else:
                projections = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            q, k, v = (
                same_head_split(linear(rows, weight, bias), module.num_heads)
                for rows, weight, bias in zip(
                    (query, key, value), projections, module.in_proj_bias.chunk(3), strict=True
                )
            )
            found = nn.functional.scaled_dot_product_attention(q, self.keys(k), v)
            return module.out_proj(found.transpose(1, 2).flatten(2)), None

        assert module.batch_first
        module.forward = forward  # type: ignore[method-assign]
        self.undo.append(lambda: module.__dict__.pop("forward"))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for undo in self.undo:
            undo()


# -- what holds for every family ---------------------------------------------------------------------------------------


def test_the_grid_is_that_of_the_tokens(family: Family) -> None:
    grid = grid_of(family.encoder)
    height, width = family.pixels.shape[-2:]
    assert grid.rows == height // grid.patch_height
    assert grid.columns == width // grid.patch_width
    assert (family.weights() > 0).any(dim=-1).all()


def test_images_without_objects_are_untouched_in_any_batch(family: Family) -> None:
    plain, weights = family.features(), family.weights()
    with perturbed(family.encoder, torch.zeros_like(weights)):
        assert torch.equal(family.features(), plain)
    with perturbed(family.encoder, weights[:, :0]):
        assert torch.equal(family.features(), plain)
    for alone in range(IMAGES):
        mixed = weights.clone()
        mixed[alone] = 0
        with perturbed(family.encoder, mixed):
            found = family.features()
        assert torch.equal(found[alone], plain[alone])
        others = [place for place in range(IMAGES) if place != alone]
        assert (found[others] != plain[others]).flatten(1).any(dim=1).all()


def test_no_strength_changes_nothing(family: Family) -> None:
    plain, weights = family.features(), family.weights()
    for keep_norm in (False, True):
        with perturbed(family.encoder, weights, PerturbationSettings(alpha=0, keep_norm=keep_norm)):
            assert torch.equal(family.features(), plain)
    strengths = torch.full(weights.shape[:2], 8.0)
    strengths[1] = 0
    with perturbed(family.encoder, weights, strengths=strengths):
        found = family.features()
    assert torch.equal(found[1], plain[1])
    with perturbed(family.encoder, weights):
        usual = family.features()
    torch.testing.assert_close(found[[0, 2, 3]], usual[[0, 2, 3]], rtol=1e-5, atol=2e-6 * plain.abs().max().item())


def test_a_tiny_strength_recomputes_what_the_model_computes(family: Family) -> None:
    plain = family.features()
    with perturbed(family.encoder, family.weights(), PerturbationSettings(alpha=1e-9)):
        torch.testing.assert_close(family.features(), plain, rtol=1e-6, atol=1e-6 * plain.abs().max().item())


def test_queries_and_keys_give_the_same(family: Family) -> None:
    weights = family.weights()
    second = weights.flip(0)  # another image's box as a second object
    second[1] = 0
    weights = torch.cat([weights, second], dim=1)
    plain = family.features()
    with perturbed(family.encoder, weights, PerturbationSettings(alpha=6)):
        found = family.features()
    with KeySide(family.encoder, weights, 6):
        expected = family.features()
    scale = plain.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)
    assert (found - plain).abs().max() > 1e-3 * scale


def test_keeping_the_norm_gives_something_else(family: Family) -> None:
    plain, weights = family.features(), family.weights()
    found = []
    for keep_norm in (False, True):
        with perturbed(family.encoder, weights, PerturbationSettings(keep_norm=keep_norm)):
            found.append(family.features())
    assert not torch.allclose(found[0], found[1], rtol=1e-3)
    assert not torch.allclose(found[1], plain, rtol=1e-3)


def test_the_rest_of_the_batch_changes_nothing(family: Family) -> None:
    weights = family.weights()
    with perturbed(family.encoder, weights):
        together = family.features()
    scale = together.abs().max().item()
    for place in range(IMAGES):
        padded = torch.cat([torch.zeros_like(weights[:1]), weights[place : place + 1]], dim=1)
        with perturbed(family.encoder, padded):
            alone = family.features([place])
        torch.testing.assert_close(alone[0], together[place], rtol=1e-6, atol=2e-6 * scale)


def test_attention_moves_into_the_box(family: Family, photos: Path, captions: list[dict]) -> None:
    """Over heads, photographs and eight sets of random weights; a single query may keep away, and then does more so.

    Strong, as the logits of random weights are near 0; at the usual strength they hardly move.
    """
    several = on_photographs(family.encoder, photos, captions, 8)
    weights = several.weights()
    means = []
    for seed in range(8):
        encoder = redrawn(family.encoder, seed)
        both = attention_masses(encoder, several.pixels, weights, PerturbationSettings(alpha=100))
        means.append([masses.mean().item() for masses in both])
    plain, found = np.mean(means, axis=0)
    assert plain == pytest.approx(weights.sum(dim=-1).mean().item() / grid_of(encoder).tokens, rel=0.3)
    assert found > 1.2 * plain


def test_masses_are_those_of_the_library(family: Family, request: pytest.FixtureRequest) -> None:
    encoder, weights = family.encoder, family.weights()
    weights = torch.cat([torch.zeros_like(weights), weights], dim=1)
    plain, found = attention_masses(encoder, family.pixels, weights)
    assert not plain[:, 0].any()
    assert not found[:, 0].any()
    np.testing.assert_allclose(plain[:, 1], mass_by_the_library(family, weights[:, 1]), rtol=1e-4)
    with perturbed(encoder, weights):
        np.testing.assert_allclose(found[:, 1], mass_by_the_library(family, weights[:, 1]), rtol=1e-4)
    assert (found - plain)[:, 1].abs().max() > 1e-3


def mass_by_the_library(family: Family, weights: Tensor) -> Tensor:
    """From probabilities that the library gives, or of the queries and keys that its fused function gets."""
    probabilities: list[Tensor] = []
    usual = nn.functional.scaled_dot_product_attention

    def kept(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        probabilities.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1))
        return usual(q, k, v, **options)

    def asked(module: nn.Module, _: Any, named: dict[str, Any]) -> dict[str, Any]:
        return {**named, "need_weights": True, "average_attn_weights": False}

    model, handles, picked = family.encoder.model, [], slice(0, 1)
    visual = getattr(model, "visual", model)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(model, "qformer"):
            picked = slice(None)
            patch.setattr(model.qformer.config, "_attn_implementation", "eager")
            for layer in model.qformer.encoder.layer[::2]:
                attention = layer.crossattention.attention
                handles.append(attention.register_forward_hook(lambda _, __, out: probabilities.append(out[1])))
        elif hasattr(model, "vision_model") and not hasattr(model.vision_model, "head"):
            patch.setattr(model.vision_model.config, "_attn_implementation", "eager")
            attention = model.vision_model.encoder.layers[-1].self_attn
            handles.append(attention.register_forward_hook(lambda _, __, out: probabilities.append(out[1])))
        elif hasattr(getattr(visual, "trunk", visual), "blocks"):
            patch.setattr(nn.functional, "scaled_dot_product_attention", kept)
        else:
            if hasattr(model, "vision_model"):
                attention = model.vision_model.head.attention
            else:
                pool = visual.attn_pool
                attention = visual.transformer.resblocks[-1].attn if pool is None else pool.attn
            handles = [
                attention.register_forward_pre_hook(
                    lambda module, args, named: (args, asked(module, args, named)), with_kwargs=True
                ),
            ]
            # Behind ours, which runs first, as it was registered first.
            handles.append(attention.register_forward_hook(lambda _, __, out: probabilities.append(out[1])))
        family.features()
    for handle in handles:
        handle.remove()
    layers = probabilities if hasattr(model, "qformer") else probabilities[-1:]
    masses = [torch.einsum("bhmn,bn->bhm", p[:, :, picked], weights).mean(dim=(1, 2)) for p in layers]
    return torch.stack(masses).mean(dim=0)


def test_the_model_is_as_it_was_after_an_error(family: Family) -> None:
    plain, before = family.features(), hooks(family.encoder)

    def fail() -> None:
        with perturbed(family.encoder, family.weights()):
            assert not torch.equal(family.features(), plain)
            assert hooks(family.encoder) > before
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert hooks(family.encoder) == before
    assert torch.equal(family.features(), plain)


def test_other_threads_see_the_plain_model(family: Family) -> None:
    """Of any batch, also in the midst of a perturbed pass; or objects of their own."""
    model, weights, here = family.encoder.model, family.weights(), threading.get_ident()
    plain = family.features([0])
    with perturbed(family.encoder, weights):
        turned = family.features()
    with perturbed(family.encoder, weights[[1]]):
        other = family.features([1])
    meanwhile: list[Tensor] = []

    def interrupt(*_: Any) -> None:
        if threading.get_ident() == here:
            meanwhile.append(pool.submit(family.features, [0]).result())

    def with_other_objects() -> Tensor:
        with perturbed(family.encoder, weights[[1]]):
            return family.features([1])

    with ThreadPoolExecutor(1) as pool, perturbed(family.encoder, weights), contextlib.ExitStack() as handles:
        hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
        for module in hooked:
            # As a pass that was under way when named arguments were taken from the hooks calls them.
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                late = (module, (), plain) if hook in module._forward_hooks.values() else (module, ())
                assert pool.submit(hook, *late).result() is None
            handles.callback(module.register_forward_pre_hook(interrupt).remove)
        assert torch.equal(family.features(), turned)
        assert torch.equal(pool.submit(with_other_objects).result(), other)
        assert torch.equal(family.features(), turned)
    assert meanwhile
    assert all(torch.equal(found, plain) for found in meanwhile)


def test_another_batch_is_refused(family: Family) -> None:
    weights, before = family.weights(), hooks(family.encoder)  # transformers leaves some of its own
    for given, rows in ((weights, [0, 1]), (weights[:2], slice(None)), (torch.zeros_like(weights[:1]), slice(None))):
        with pytest.raises(InputError, match="images go through the encoder"), perturbed(family.encoder, given):
            family.features(rows)
    assert hooks(family.encoder) == before


def test_boxes_of_original_images(family: Family) -> None:
    encoder, sizes = family.encoder, family.sizes
    plain = family.features()
    with perturbed(encoder, family.weights()):
        expected = family.features()
    with perturb_queries(encoder, family.boxes, sizes):
        torch.testing.assert_close(family.features(), expected, rtol=1e-6, atol=1e-6)
    boxes = [[], np.array(family.boxes[1]), [[0.0, -50, 90, -1], [5, 5, 5, 9]], torch.tensor(family.boxes[3])]
    with perturb_queries(encoder, boxes, sizes, alpha=8.0, max_objects=2):
        found = family.features()
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(found[[1, 3]], expected[[1, 3]], rtol=1e-6, atol=1e-6)


# -- single families ---------------------------------------------------------------------------------------------------


def test_small_boxes_go_first_and_strengths_take_all(tiny_clip: Any, photos: Path, captions: list[dict]) -> None:
    one = on_photographs(tiny_clip, photos, captions, 2)
    encoder, (width, height) = one.encoder, one.sizes[0]
    whole = [0.0, 0.0, float(width), float(height)]
    left, top = one.boxes[0][0][:2]
    small = [left, top, left + width / 5, top + height / 5]
    boxes = [[whole, small], []]

    def features(boxes: Any, **options: Any) -> Tensor:
        with perturb_queries(encoder, boxes, one.sizes, **options):
            return one.features()

    assert torch.equal(features(boxes, max_objects=1), features([[small], []]))
    both = features(boxes, strengths=[[0.0, 8.0], []])
    assert torch.allclose(both, features([[small], []], alpha=4.0), atol=1e-6)  # half of it each
    assert torch.equal(features([[small, [0, 0, 0, 5]], []], strengths=[[8.0, 3.0], []]), features([[small], []]))


@pytest.mark.parametrize(
    ("boxes", "options", "message"),
    [
        ([[[0, 0, 5, float("nan")]], []], {}, "image 0: box 0 .*finite"),
        ([[], [[9, 0, 5, 5]]], {}, "image 1: box 0 "),
        ([[], [[1, 2, 3]]], {}, "image 1: boxes have shape"),
        ([[]], {}, "boxes of 1 images and sizes of 2"),
        ([[], []], {"strength": 3}, "unknown setting 'strength'; known are alpha"),
        ([[], []], {"alpha": -1}, "alpha is -1"),
        ([[], []], {"alpha": float("inf")}, "alpha is inf"),
        ([[], []], {"alpha": 1e300}, r"alpha is 1e\+300; give a number in \[0, 1e\+06\]"),
        ([[], []], {"energy": 1}, "energy is 1"),
        ([[], []], {"rank": 0}, "rank is 0"),
        ([[], []], {"max_objects": 0}, "max_objects is 0"),
        ([[[0, 0, 5, 5]], []], {"strengths": [[], []]}, "a number for each box"),
    ],
)
def test_bad_boxes_and_settings(tiny_clip: Any, boxes: Any, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message), perturb_queries(tiny_clip, boxes, [(60, 40)] * 2, **options):
        pass


@pytest.mark.parametrize("size", [(0, 0), (100,), (60, -1), 60, ("60", "40"), (60, float("nan")), None])
def test_sizes_that_are_none(tiny_clip: Any, size: Any) -> None:
    with (
        pytest.raises(InputError, match=r"image 1 has the size .*; give \(width, height\)"),
        perturb_queries(tiny_clip, [[], [[0, 0, 5, 5]]], [(60, 40), size]),
    ):
        pass


@pytest.mark.parametrize(
    ("weights", "strengths", "message"),
    [
        (torch.zeros(2, 1, 16), None, "give images x objects x 17 tokens"),
        (torch.zeros(2, 17), None, "give images x objects x 17 tokens"),
        (torch.full((2, 1, 17), -0.1), None, "fractions"),
        (torch.full((2, 1, 17), 2.0), None, "fractions"),
        (torch.full((2, 1, 17), torch.nan), None, "fractions"),
        (torch.zeros(2, 1, 17), torch.ones(2, 2), "strengths must be finite"),
        (torch.zeros(2, 1, 17), torch.full((2, 1), torch.nan), "strengths must be finite"),
        (torch.zeros(2, 1, 17), torch.full((2, 1), -1e7), r"strengths must be finite, at most 1e\+06"),
    ],
)
def test_bad_weights(tiny_clip: Any, weights: Tensor, strengths: Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message), perturbed(tiny_clip, weights, strengths=strengths):
        pass


def test_other_models_are_refused(bundled: Any, tiny_sentence: Any, tmp_path: Path) -> None:
    others = [bundled, tiny_sentence, timm_encoder("test_resnet"), timm_encoder("test_vit_relpos")]
    others += [timm_encoder("test_vit", class_token=False, global_pool="avg")]
    others += [coca(tmp_path, attentional_pool="cascade")]
    for encoder in others:
        with pytest.raises(InputError, match="supported are BLIP-2"):
            grid_of(encoder)


def test_joined_encoders_are_perturbed_inside(tiny_clip: Any, photos: Path, captions: list[dict]) -> None:
    from tests.mmalign.test_joined import TwoHeads

    torch.manual_seed(0)
    heads = {"image": torch.randn(24, 8), "text": torch.randn(24, 8), "scale": torch.tensor(1.0)}
    joined = TwoHeads(tiny_clip, tiny_clip, heads, dim=8)
    inside, outside = (on_photographs(encoder, photos, captions) for encoder in (tiny_clip, joined))
    assert grid_of(joined) == grid_of(tiny_clip)
    weights = inside.weights()
    with perturbed(tiny_clip, weights), torch.no_grad():
        expected = joined.join_images(inside.features())
    with perturbed(joined, weights):
        assert torch.equal(outside.features(), expected)
    assert not torch.allclose(outside.features(), expected)


def test_half_precision(family: Family) -> None:
    """Masses are what attention does, seen before later layers round."""
    encoder, weights, strong = family.encoder, family.weights(), PerturbationSettings(alpha=100)
    half = copy.deepcopy(encoder)
    if isinstance(encoder, Blip2Matcher):
        half.to("cpu", "bfloat16")
    else:
        half.image_module.to(torch.bfloat16)
        half.dtype = torch.bfloat16
    plain, expected = attention_masses(encoder, family.pixels, weights, strong)
    _, found = attention_masses(half, family.pixels, weights, strong)
    assert (found - expected).norm() < 0.4 * (expected - plain).norm()


def test_gradients_flow(tiny_open_clip: Any, tiny_clip: Any, photos: Path, captions: list[dict]) -> None:
    for encoder in (tiny_open_clip, tiny_clip):
        one = on_photographs(encoder, photos, captions)
        pixels = one.pixels.clone().requires_grad_()
        with perturbed(encoder, one.weights()):
            encoder.image_features(pixels).square().sum().backward()
        assert torch.isfinite(pixels.grad).all()
        assert pixels.grad.flatten(1).any(dim=1).all()


def test_hooks_inside_multi_head_attention_never_fire(tiny_open_clip: Any) -> None:
    """Why such a layer's output is computed once more: torch's fused function takes weights, and runs no module."""
    layer, fired = tiny_open_clip.model.visual.transformer.resblocks[-1].attn, []
    handles = [part.register_forward_hook(lambda *_: fired.append("inside")) for part in layer.children()]
    handles.append(layer.register_forward_hook(lambda *_: fired.append("around")))
    assert isinstance(layer, nn.MultiheadAttention)
    assert isinstance(layer.out_proj, nn.Linear)
    assert len(handles) == 2
    with torch.no_grad():
        tiny_open_clip.image_features(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    assert fired == ["around"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "by head", "padding", "both"])
def test_masks_of_multi_head_attention_are_kept(batch_first: bool, kind: str) -> None:
    torch.manual_seed(0)
    batch, tokens, heads = 3, 7, 2
    layer = nn.MultiheadAttention(8, heads, batch_first=batch_first).eval()
    nn.init.normal_(layer.in_proj_bias)
    mask, padding = None, None
    if kind in ("boolean", "both"):
        mask = torch.zeros(tokens, tokens, dtype=torch.bool)
        mask[0, 2] = True
    if kind == "additive":
        mask = torch.randn(tokens, tokens)
    if kind == "by head":
        mask = torch.randn(batch * heads, tokens, tokens)
    if kind in ("padding", "both"):
        padding = torch.zeros(batch, tokens, dtype=torch.bool)
        padding[1, 5:] = True
    rows = torch.randn(batch, tokens, 8)
    states = rows if batch_first else rows.transpose(0, 1)
    options = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": True, "average_attn_weights": False}
    weights = torch.zeros(batch, 1, tokens)
    weights[1:, :, 3:5] = 1
    with torch.no_grad():
        plain, plain_weights = layer(states, states, states, **options)
        for alpha in (1e-9, 8.0):
            objects = Objects(weights, torch.full((batch, 1), alpha), energy=0.99, rank=None, keep_norm=False)
            (handle,) = FusedAttention(layer).attach(objects)
            found, found_weights = layer(states, states, states, **options)
            handle.remove()
            if alpha < 1:
                torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(found_weights, plain_weights, rtol=1e-6, atol=1e-6)
    if not batch_first:
        found, plain = found.transpose(0, 1), plain.transpose(0, 1)
    changed = (found != plain).any(dim=-1)
    assert changed.tolist() == [[False] * tokens] + [[True] + [False] * (tokens - 1)] * 2
    assert torch.equal(found_weights == 0, plain_weights == 0)
    torch.testing.assert_close(found_weights.sum(dim=-1), torch.ones(batch, heads, tokens))
    values = linear(rows, layer.in_proj_weight[16:], layer.in_proj_bias[16:])
    together = (found_weights @ same_head_split(values, heads)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.out_proj(together), found, rtol=1e-5, atol=1e-5)


# -- BLIP-2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matcher(blip2_folder: Path) -> Blip2Matcher:
    return Blip2Matcher.from_spec(str(blip2_folder), device="cpu")


@torch.no_grad()
def test_several_texts_for_each_image(matcher: Blip2Matcher, photos: Path, captions: list[dict]) -> None:
    several = on_photographs(matcher, photos, captions, 3)
    texts = [row["captions"][0] for row in captions[:4]]
    weights = several.weights()
    weights[1] = 0
    plain = matcher.match_logits(several.pixels, texts)
    states = matcher.image_states(several.pixels)
    with perturbed(matcher, weights):
        found = matcher.match_logits(several.pixels, texts)
        torch.testing.assert_close(matcher.match_logits(states, texts, pairs=3), found, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], plain[1])
    assert (found[[0, 2]] - plain[[0, 2]]).abs().min() > 1e-4
    with KeySide(matcher, weights.repeat_interleave(4, dim=0), 8.0):
        torch.testing.assert_close(matcher.match_logits(states, texts), found, rtol=1e-4, atol=1e-4)
    for place in (0, 2):
        with perturbed(matcher, weights[place : place + 1]):
            alone = matcher.match_logits(states[place : place + 1], texts)
            with pytest.raises(InputError, match="images go through the encoder, and objects were given for 1"):
                matcher.match_logits(states, texts)
        torch.testing.assert_close(alone[0], found[place], rtol=1e-5, atol=1e-5)
    assert torch.equal(matcher.match_logits(several.pixels, texts), plain)


@torch.no_grad()
def test_texts_are_untouched(matcher: Blip2Matcher, photos: Path, captions: list[dict]) -> None:
    several = on_photographs(matcher, photos, captions, 2)
    plain = matcher.text_vectors(["a dog", "two cats"])
    with perturbed(matcher, several.weights()):
        assert torch.equal(matcher.text_vectors(["a dog", "two cats"]), plain)


@torch.no_grad()
def test_a_tiny_blip2_as_initialised_would_show_nothing(
    matcher: Blip2Matcher, photos: Path, captions: list[dict]
) -> None:
    """Its image tower has weights of 1e-10 and its queries are zeros: why `blip2_folder` fills them."""
    import transformers

    several = on_photographs(matcher, photos, captions)
    weights = several.weights()
    settings = matcher.model.config.to_dict()
    settings["vision_config"].pop("initializer_range")
    asleep = Blip2Matcher(
        transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(**settings)),
        matcher.tokenizer,
        matcher.preprocessing,
    )
    moved = []
    for one in (asleep, matcher):
        plain = one.image_queries(several.pixels)
        with perturbed(one, weights):
            moved.append((one.image_queries(several.pixels) - plain).abs().max().item())
    assert moved[0] < 1e-6
    assert moved[1] > 1e-2
