"""`Blip2Matcher` against transformers' own forward pass, on photographs and their captions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.errors import EncoderUnavailableError, InputError
from mmalign.object_aware.blip2 import Blip2Matcher

PHOTOS = 4


@pytest.fixture(scope="module")
def matcher(blip2_folder: Path) -> Blip2Matcher:
    return Blip2Matcher.from_spec(str(blip2_folder), device="cpu")


@pytest.fixture(scope="module")
def pixels(matcher: Blip2Matcher, photos: Path, captions: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([matcher.load_image(photos / row["file"])[1] for row in captions[:PHOTOS]])


@pytest.fixture(scope="module")
def texts(captions: list[dict[str, Any]]) -> list[str]:
    """Of several lengths, so that there is padding."""
    return ["dog", *(row["captions"][0] for row in captions[:PHOTOS])]


def theirs(folder: Path, photos: Path, names: list[str], texts: list[str], *, image_token: bool, head: bool) -> Any:
    """transformers' own processor and forward pass, every image with every text where it is the head."""
    import transformers

    model = transformers.Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    if image_token:  # as repositories that were written lately
        model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
        processor.num_query_tokens = model.config.num_query_tokens
    images = [Image.open(photos / name).convert("RGB") for name in names]
    if head:
        images, texts = [image for image in images for _ in texts], [*texts] * len(names)
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    else:
        # The processor takes as many images as texts.
        inputs = processor(images=[images[i % len(images)] for i in range(len(texts))], text=texts, padding=True,
                           return_tensors="pt")  # fmt: skip
        inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        return model(**inputs, use_image_text_matching_head=head)


@pytest.mark.parametrize("image_token", [False, True])
def test_both_heads_are_those_of_transformers(
    matcher: Blip2Matcher,
    pixels: torch.Tensor,
    texts: list[str],
    blip2_folder: Path,
    photos: Path,
    captions: list[dict[str, Any]],
    image_token: bool,
) -> None:
    names = [row["file"] for row in captions[:PHOTOS]]
    with torch.inference_mode():
        queries, vectors = matcher.image_queries(pixels), matcher.text_vectors(texts)
        logits = matcher.match_logits(pixels, texts)
    contrast = theirs(blip2_folder, photos, names, texts, image_token=image_token, head=False)
    torch.testing.assert_close(queries, contrast.image_embeds, atol=2e-5, rtol=0)
    torch.testing.assert_close(vectors, contrast.text_embeds, atol=1e-5, rtol=0)
    ours = torch.einsum("bqd,md->bqm", queries, vectors).amax(dim=1)
    torch.testing.assert_close(ours, contrast.logits_per_image, atol=2e-5, rtol=0)
    match = theirs(blip2_folder, photos, names, texts, image_token=image_token, head=True)
    torch.testing.assert_close(logits, match.logits_per_image[:, 1].reshape(PHOTOS, -1), atol=5e-5, rtol=0)


def test_tiny_model_tells_images_and_texts_apart(matcher: Blip2Matcher, pixels: torch.Tensor, texts: list[str]) -> None:
    with torch.inference_mode():
        logits, queries = matcher.match_logits(pixels, texts), matcher.image_queries(pixels)
    assert logits.std(dim=0).min() > 1e-2  # over images
    assert logits.std(dim=1).min() > 1e-2  # over texts
    assert (queries[0] - queries[1]).abs().max() > 1e-2


def test_states_serve_for_all_texts_however_pairs_are_cut(
    matcher: Blip2Matcher, pixels: torch.Tensor, texts: list[str]
) -> None:
    with torch.inference_mode():
        states = matcher.image_states(pixels)
        assert states.shape == (PHOTOS, 17, 32)
        whole = matcher.match_logits(pixels, texts)
        one_by_one = torch.cat(
            [torch.cat([matcher.match_logits(state[None], [text]) for text in texts], dim=1) for state in states]
        )
        torch.testing.assert_close(matcher.match_logits(states, texts, pairs=1), whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(one_by_one, whole, atol=1e-5, rtol=0)
        assert torch.equal(matcher.image_queries(states), matcher.image_queries(pixels))


def test_preprocessing_is_the_processors(matcher: Blip2Matcher, blip2_folder: Path, photos: Path) -> None:
    import transformers

    assert (matcher.preprocessing.size, matcher.preprocessing.resize) == ((32, 32), "squash")
    processor = transformers.BlipImageProcessorPil.from_pretrained(blip2_folder)
    image = Image.open(photos / "000000000790.jpg").convert("RGB")
    ours = matcher.preprocessing(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    expected = torch.as_tensor(processor(image)["pixel_values"][0])
    torch.testing.assert_close(ours, expected, atol=1.01 / 255 / 0.26, rtol=0)  # one level, by the standard deviation


def test_half_precision_is_for_the_image_tower_alone(
    blip2_folder: Path, pixels: torch.Tensor, texts: list[str], matcher: Blip2Matcher
) -> None:
    half = Blip2Matcher.from_spec(f"blip2:{blip2_folder}", device="cpu", dtype="bfloat16")
    kinds = {name.partition(".")[0]: weight.dtype for name, weight in half.model.named_parameters()}
    assert kinds.pop("vision_model") == torch.bfloat16
    assert set(kinds.values()) == {torch.float32}
    with torch.inference_mode():
        logits, whole = half.match_logits(pixels, texts), matcher.match_logits(pixels, texts)
    assert logits.dtype == torch.float32
    assert 0 < (logits - whole).abs().max() < 0.1


def test_gradients_reach_pixels(matcher: Blip2Matcher, pixels: torch.Tensor) -> None:
    leaf = pixels[:1].clone().requires_grad_()
    (matcher.match_logits(leaf, ["a dog"]).sum() + matcher.image_queries(leaf)[..., 0].sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 0


def test_long_text_is_cut(matcher: Blip2Matcher) -> None:
    assert matcher.tokenize(["dog " * 100])["input_ids"].shape == (1, 32)


def test_a_text_that_is_not_unicode(matcher: Blip2Matcher) -> None:
    with pytest.raises(InputError, match=r"text 1 is .*, which is not valid Unicode; give it as UTF-8"):
        matcher.tokenize(["a dog", "caf\udce9"])


def test_what_is_no_blip2_for_retrieval_is_refused(
    clip_folder: Path, blip2_folder: Path, tmp_path: Path, matcher: Blip2Matcher
) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(InputError, match="is a clip model, not a BLIP-2"):
        Blip2Matcher.from_spec(str(clip_folder))
    with pytest.raises(InputError, match="names no model"):
        Blip2Matcher.from_spec("blip2:")
    with pytest.raises(EncoderUnavailableError, match=r"HF_HUB_OFFLINE is set.*give the folder"):
        Blip2Matcher.from_spec("transformers:Salesforce/blip2-itm-vit-g")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot read a BLIP-2"):
        Blip2Matcher.from_spec(str(tmp_path / "empty"))
    headless = shutil.copytree(blip2_folder, tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(("itm_head", "text_projection"))}
    save_file(kept, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="BLIP-2 without itm_head, text_projection"):
        Blip2Matcher.from_spec(str(headless))


@pytest.mark.parametrize("texts", [[], "dog", ["dog", " "], [3]])
def test_bad_texts_are_named(matcher: Blip2Matcher, texts: Any) -> None:
    with pytest.raises(InputError, match="text"):
        matcher.text_vectors(texts)
