"""Words that an image contradicts: two libraries agree, batches change nothing, what is undefined is refused.

The numbers of the official code are in tests/golden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmalign import Encoder
from mmalign.encoders.transformers import TransformersEncoder
from mmalign.errors import InputError
from mmalign.word_attribution import (
    WordAttribution,
    WordScore,
    attributed_words,
    calibrate_eps,
    f_clip_score,
    relevance,
    split_words,
    word_attribution,
    word_means,
)

CAPTIONS = ["a dog on grass", "Two zebras, one calf standing in the dirt!", 'the "welcome" sign of a café.']


@pytest.fixture(params=["open_clip", "transformers"])
def clip(request: pytest.FixtureRequest) -> Encoder:
    return request.getfixturevalue("tiny_open_clip" if request.param == "open_clip" else "tiny_clip")


@pytest.fixture
def files(photos: Path) -> list[Path]:
    return sorted(photos.glob("*.jpg"))[:3]


def scores_of(found: WordAttribution) -> list[float]:
    return [word.score for word in found.words]


class GivenTokens:
    def __init__(self, tokenize: Any) -> None:
        self.tokenize = tokenize

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Tensor]:
        ids = self.tokenize(texts)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def as_transformers(encoder: Any) -> TransformersEncoder:
    """The text tower of an open_clip model as transformers has it."""
    import transformers

    model, weights = encoder.model, {}
    width, layers = model.ln_final.weight.shape[0], len(model.transformer.resblocks)
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 49408, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": model.transformer.resblocks[0].attn.num_heads, "max_position_embeddings": 77,
            "hidden_act": "gelu", "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 0,
        },
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        projection_dim=encoder.dim,
    )  # fmt: skip
    own = model.state_dict()
    weights["text_model.embeddings.token_embedding.weight"] = own["token_embedding.weight"]
    weights["text_model.embeddings.position_embedding.weight"] = own["positional_embedding"]
    weights["text_projection.weight"] = own["text_projection"].T
    for kind in ("weight", "bias"):
        weights[f"text_model.final_layer_norm.{kind}"] = own[f"ln_final.{kind}"]
        for i in range(layers):
            there, here = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
            for name, other in {**names, "self_attn.out_proj": "attn.out_proj"}.items():
                weights[f"{there}.{name}.{kind}"] = own[f"{here}.{other}.{kind}"]
            for name, part in zip("qkv", own[f"{here}.attn.in_proj_{kind}"].chunk(3), strict=True):
                weights[f"{there}.self_attn.{name}_proj.{kind}"] = part
    built = transformers.CLIPModel(config)
    missing, unexpected = built.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("text_") and "position_ids" not in name]
    return TransformersEncoder(built, GivenTokens(encoder.tokenizer), None, "converted")


def test_both_libraries_give_the_same(tiny_open_clip: Encoder) -> None:
    other = as_transformers(tiny_open_clip)
    image = normalize(torch.randn(len(CAPTIONS), tiny_open_clip.dim, generator=torch.Generator().manual_seed(0)))
    found = []
    for encoder in (tiny_open_clip, other):
        attended = encoder.attend_texts(CAPTIONS)  # type: ignore[attr-defined]
        cosines = (image * normalize(attended.features)).sum()
        gradients = torch.autograd.grad(cosines, attended.attention)
        found.append((attended, gradients, relevance(attended.attention, gradients)))
    (ours, our_gradients, ours_all), (theirs, their_gradients, theirs_all) = found
    assert ours.end.tolist() == theirs.end.tolist()
    torch.testing.assert_close(ours.features, theirs.features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.attention, theirs.attention, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(list(our_gradients), list(their_gradients), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(ours_all, theirs_all, atol=1e-7, rtol=1e-3)
    for row, end in enumerate(ours.end.tolist()):
        last = our_gradients[-1][row].abs().sum(dim=0).sum(dim=-1)  # by query token
        assert last[end] > 0
        assert last.sum() == last[end]
        assert our_gradients[0][row].abs().sum(dim=0).sum(dim=-1)[1] > 0


def test_texts_are_read_as_they_are_encoded(clip: Any) -> None:
    before = clip.text_features(CAPTIONS)
    attended = clip.attend_texts(CAPTIONS)
    torch.testing.assert_close(attended.features, before, atol=1e-5, rtol=1e-4)
    assert len(attended.attention) == clip.layer_count("text") - 1
    for probabilities in attended.attention:
        rows = probabilities.sum(dim=-1)
        torch.testing.assert_close(rows, torch.ones_like(rows))
        assert not probabilities.triu(1).any()
    assert torch.equal(clip.text_features(CAPTIONS), before)
    last = clip.attend_texts(CAPTIONS, 1)
    assert len(last.attention) == 1
    torch.testing.assert_close(last.attention[0], attended.attention[-1])


def test_batches_change_nothing(clip: Encoder, files: list[Path]) -> None:
    together = word_attribution(clip, files, CAPTIONS)
    for row, (caption, file) in enumerate(zip(CAPTIONS, files, strict=True)):
        (alone,) = word_attribution(clip, [file], caption)
        assert alone.caption == together[row].caption == caption
        assert alone.cosine == pytest.approx(together[row].cosine, abs=1e-6)
        np.testing.assert_allclose(scores_of(alone), scores_of(together[row]), rtol=1e-3, atol=1e-8)
        assert np.abs(scores_of(alone)).max() > 1e-5
    in_twos = word_attribution(clip, files, CAPTIONS, batch_size=2)
    np.testing.assert_allclose(scores_of(in_twos[2]), scores_of(together[2]), rtol=1e-3, atol=1e-8)


def test_the_cosine_is_that_of_the_encoder(clip: Encoder, files: list[Path]) -> None:
    images, texts = clip.encode_images(files), clip.encode_texts([f"A photo depicts {caption}" for caption in CAPTIONS])
    found = word_attribution(clip, files, CAPTIONS)
    np.testing.assert_allclose([one.cosine for one in found], (images * texts).sum(1), atol=1e-5)
    bare = word_attribution(clip, files, CAPTIONS, template="")
    np.testing.assert_allclose([one.cosine for one in bare], (images * clip.encode_texts(CAPTIONS)).sum(1), atol=1e-5)


def test_images_or_their_vectors_one_for_all_or_one_each(clip: Encoder, files: list[Path]) -> None:
    rows = clip.encode_images(files)
    wanted = word_attribution(clip, files, CAPTIONS)
    with torch.inference_mode():
        encoded = torch.from_numpy(rows) * 3
    for images in (rows, torch.from_numpy(rows).double(), encoded):
        found = word_attribution(clip, images, CAPTIONS)
        np.testing.assert_allclose(scores_of(found[1]), scores_of(wanted[1]), rtol=1e-3, atol=1e-8)
    with torch.inference_mode():
        found = word_attribution(clip, rows, CAPTIONS)
    np.testing.assert_allclose(scores_of(found[1]), scores_of(wanted[1]), rtol=1e-3, atol=1e-8)
    one = word_attribution(clip, [files[1]], CAPTIONS)
    np.testing.assert_allclose(scores_of(one[1]), scores_of(wanted[1]), rtol=1e-3, atol=1e-8)
    assert np.abs(np.subtract(scores_of(one[0]), scores_of(wanted[0]))).max() > 1e-6
    # The cosine is linear in the image's unit vector, and so are the scores.
    against = word_attribution(clip, -rows, CAPTIONS)
    np.testing.assert_allclose(scores_of(against[0]), np.negative(scores_of(wanted[0])), rtol=1e-3, atol=1e-8)


def test_whether_weights_are_trained_does_not_matter(clip: Encoder, files: list[Path]) -> None:
    other = copy.deepcopy(clip)
    found = []
    for trained in (True, False):
        other.model.requires_grad_(trained)
        found.append(scores_of(word_attribution(other, files[:1], CAPTIONS[0])[0]))
        assert all(parameter.grad is None for parameter in other.model.parameters())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_scores_follow_the_image_vector(clip: Encoder, files: list[Path]) -> None:
    row = torch.from_numpy(clip.encode_images(files[:1])).requires_grad_()
    ((words, scores, cosine),) = attributed_words(clip, row, CAPTIONS[1:2])
    weights = torch.linspace(-1, 1, len(words))
    (slope,) = torch.autograd.grad(scores @ weights, row, retain_graph=True)
    step = 0.03 * torch.nn.functional.normalize(torch.randn(row.shape, generator=torch.Generator().manual_seed(1)))

    def at(vector: Tensor) -> Tensor:
        ((_, scores, _),) = attributed_words(clip, vector.detach(), CAPTIONS[1:2])
        assert not scores.requires_grad
        return scores @ weights

    assert float(at(row + step) - at(row - step)) / 2 == pytest.approx(float((slope * step).sum()), rel=0.05)
    assert torch.autograd.grad(cosine, row)[0].abs().sum() > 0


def test_words_and_their_places(tiny_open_clip: Encoder, files: list[Path]) -> None:
    text = "wait... a 3.5 m  tall naïve_café, e.g. 'x'!"
    (found,) = word_attribution(tiny_open_clip, files[:1], text)
    assert [text[word.start : word.end] for word in found.words] == [word.word for word in found.words]
    # The three dots are one token, and cannot be told from "wait" but by it.
    words = ["wait...", "a", "3", ".", "5", "m", "tall", "naïve_café", ",", "e", ".", "g", ".", "'x'!"]
    assert [word.word for word in found.words] == words
    assert [word.word for word in split_words(text)][:5] == ["wait", ".", ".", ".", "a"]
    assert [word.word for word in found.words if word.is_punctuation] == [".", ",", ".", "."]
    assert found.to_dict()["words"][1] == {"word": "a", "start": 8, "end": 9, "score": found.words[1].score}


def test_a_word_has_the_mean_of_its_tokens() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 4.0, 8.0])
    assert word_means(scores, [1, 2, 2]).tolist() == [1.0, 4.0, 6.0]
    assert word_means(scores, [1, 3, 4, 2]).tolist() == [1.0, 4.0, 8.0]  # cut
    assert word_means(scores[:4], [4, 1]).tolist() == [3.25]


def test_what_lies_beyond_the_window_is_left_out(clip: Encoder, files: list[Path]) -> None:
    text = " ".join(["dog", "grass"] * 60)
    (found,) = word_attribution(clip, files[:1], text)
    window = 77 if clip.source == "open_clip" else 24
    assert len(found.words) == window - 2 - 3
    assert [word.word for word in found.words[:2]] == ["dog", "grass"]
    (short,) = word_attribution(clip, files[:1], "dog")
    assert len(short.words) == 1


def scored(*scores: tuple[str, float], cosine: float = 0.25) -> WordAttribution:
    text, words = "", []
    for word, score in scores:
        words.append(WordScore(word, len(text), len(text) + len(word), score))
        text += f"{word} "
    return WordAttribution(text, cosine, tuple(words))


def test_flags_phrases_and_the_score_in_numbers() -> None:
    found = scored(("a", -0.3), ("red", -0.2), (",", -0.9), ("old", -0.4), ("car", 0.5), ("here", -0.1))
    assert [word.word for word in found.flagged(-0.15)] == ["old", "a", "red"]
    assert [word.word for word in found.flagged(-0.15, "most_negative")] == [","]
    assert [(phrase.word, round(phrase.score, 9)) for phrase in found.phrases(-0.15)] == [("a red old", -0.3)]
    assert found.caption[slice(found.phrases(-0.15)[0].start, found.phrases(-0.15)[0].end)] == "a red , old"
    assert found.f_clip_score(-0.15) == pytest.approx(0.75 * -0.9)
    assert found.f_clip_score(-0.15, "most_negative") == pytest.approx(0.75 * -0.9)
    assert scored(("a", -0.3), cosine=-0.5).f_clip_score(-0.1) == pytest.approx(-0.3)  # not 1.5 times that
    assert scored(("a", 0.3)).f_clip_score() == 0.0
    assert scored(("a", 0.3)).f_clip_score(mode="most_negative") == pytest.approx(0.225)
    assert scored(("a", 0.3)).phrases() == []
    assert float(f_clip_score([], 0.2)) == 0.0
    with pytest.raises(InputError, match="mode is 'lowest'; give one of threshold, most_negative"):
        f_clip_score([0.1], 0.2, mode="lowest")  # type: ignore[arg-type]


def test_eps_by_what_is_known_to_match() -> None:
    rng = np.random.default_rng(0)
    matching = [scored(*[("w", float(s)) for s in rng.normal(0, 1e-4, 20)], (".", -1.0)) for _ in range(50)]
    for share in (0.02, 0.2):
        eps = calibrate_eps(matching, flagged_share=share)
        flagged = sum(len(one.flagged(eps)) for one in matching)
        assert flagged == pytest.approx(share * 1000, abs=1)
    assert calibrate_eps([scored(("a", 0.5), ("b", 0.2))]) == 0.0
    with pytest.raises(InputError, match="no words to calibrate by"):
        calibrate_eps([])
    with pytest.raises(InputError, match="flagged_share is 2"):
        calibrate_eps(matching, flagged_share=2)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_siglip", "tiny_sentence", "tiny_timm", "bundled"])
def test_other_towers(request: pytest.FixtureRequest, name: str) -> None:
    encoder = request.getfixturevalue(name)
    with pytest.raises(
        InputError, match=r"cannot be read word by word: .*; supported are CLIPs .* open_clip:MODEL/TAG"
    ):
        word_attribution(encoder, torch.ones(1, encoder.dim), "a dog")


def with_text_tower(encoder: Any, **changes: Any) -> Any:
    import open_clip

    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    other = copy.copy(encoder)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    other.model = open_clip.CustomTextCLIP(encoder.dim, vision, {**text, **changes}).eval()
    return other


def test_other_text_towers_of_open_clip(tiny_open_clip: Encoder) -> None:
    for changes, why in (
        ({"embed_cls": True}, "appends a class token, as CoCa's does"),
        ({"no_causal_mask": True}, "it is not causal"),
        ({"pool_type": "last"}, "of no end token"),
        ({"qk_norm": True, "block_type": "custom"}, "its attention is of another kind"),
    ):
        with pytest.raises(InputError, match=why):
            word_attribution(with_text_tower(tiny_open_clip, **changes), torch.ones(1, 32), "a dog")
    for changes in ({}, {"pool_type": "eos", "eos_id": 49407}, {"pad_mask": True}):
        padded = changes.pop("pad_mask", False)
        encoder = with_text_tower(tiny_open_clip, **changes)
        encoder.model.text.use_pad_mask = padded
        attended = encoder.attend_texts(CAPTIONS)
        torch.testing.assert_close(attended.features, encoder.text_features(CAPTIONS), atol=1e-6, rtol=1e-5)
        assert attended.end.tolist() == tiny_open_clip.attend_texts(CAPTIONS).end.tolist()  # type: ignore[attr-defined]
        assert np.isfinite(scores_of(word_attribution(encoder, torch.ones(1, 32), CAPTIONS)[0])).all()


def test_no_probabilities_are_an_error(tiny_clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tiny_clip.model.text_model
    usual = tower.config._attn_implementation
    assert usual != "eager"
    tiny_clip.attend_texts(["a dog"])
    assert tower.config._attn_implementation == usual
    monkeypatch.setattr(tower, "set_attn_implementation", lambda name: None)
    with pytest.raises(InputError, match="gave no probabilities though asked for attention 'eager'"):
        word_attribution(tiny_clip, torch.ones(1, tiny_clip.dim), "a dog")


def test_what_is_no_caption_image_or_option(tiny_open_clip: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.ones(1, 32)
    wrong: Sequence[tuple[dict[str, Any], str]] = (
        ({"captions": ["a", " "]}, "caption is ' '"),
        ({"captions": ["a", 3]}, "caption is 3"),
        ({"template": "A photo of"}, "template is 'A photo of'; end it in a space"),
        ({"layers": 0}, "layers is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"images": torch.ones(3, 32)}, "3 images for 1 captions"),
        ({"images": torch.ones(1, 31)}, "31 dimensions and those of .* 32"),
    )
    for changes, message in wrong:
        with pytest.raises(InputError, match=message):
            word_attribution(**{"encoder": tiny_open_clip, "images": rows, "captions": "a dog", **changes})
    monkeypatch.setattr(tiny_open_clip, "count_tokens", lambda text: 3)
    with pytest.raises(InputError, match="makes 5 tokens of 'A photo depicts a dog' and 15 of its words"):
        word_attribution(tiny_open_clip, rows, "a dog")
