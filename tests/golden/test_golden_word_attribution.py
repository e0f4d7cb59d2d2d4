"""Word attribution of CLIP4DM: a tiny CLIP from its weights, and captions from the scores of their tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.encoders.transformers import TransformersEncoder
from mmalign.word_attribution import (
    WordAttribution,
    WordScore,
    f_clip_score,
    relevance,
    split_words,
    token_attribution,
    word_means,
)


def tensor(array: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(np.array(array)).to(getattr(torch, dtype))


class GivenTokens:
    """A tokenizer that gives the file's ids."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = torch.from_numpy(ids)

    def __call__(self, texts: list[str], **_: object) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}


@pytest.mark.golden("clip4dm_attribution")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_attribution(golden, dtype):
    import transformers

    hyper = golden.hyper
    model = transformers.CLIPModel(transformers.CLIPConfig(**hyper["config"])).to(getattr(torch, dtype))
    names = [name for name in golden.names if name.startswith("param/")]
    state = {name.removeprefix("param/"): tensor(golden[name], dtype) for name in names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "position_ids" not in name]
    # transformers' softmax is float32 there whatever the model; for texts `attend_texts` asks for it by itself.
    model.vision_model.set_attn_implementation(hyper["attn_implementation"])
    encoder = TransformersEncoder(model, GivenTokens(golden["input_ids"]), None, "golden")

    attended = encoder.attend_texts(["as given"])
    assert attended.end.tolist() == [hyper["eos_index"]]
    with torch.no_grad():
        image = normalize(encoder.image_features(tensor(golden["pixel_values"], dtype)), dim=-1)
    cosine = (image * normalize(attended.features, dim=-1)).sum()
    gradients = torch.autograd.grad(cosine, attended.attention)
    golden.assert_close("cosine", cosine, dtype)
    golden.assert_close("attn", torch.cat(attended.attention), dtype)
    golden.assert_close("attn_grad", torch.cat(gradients), dtype)

    start = hyper["start_layer_text"]
    last = len(attended.attention) if start >= 0 else -start
    assert list(range(len(attended.attention)))[-last:] == hyper["layers_used"]
    found = relevance(attended.attention[-last:], gradients[-last:])[0]
    golden.assert_close("relevance", found, dtype)
    golden.assert_close("token_attribution", token_attribution(found, hyper["eos_index"]), dtype)
    # The last layers alone, as they are asked for in practice.
    few = encoder.attend_texts(["as given"], last)
    cosine = (image * normalize(few.features, dim=-1)).sum()
    again = relevance(few.attention, torch.autograd.grad(cosine, few.attention))[0]
    golden.assert_close("relevance", again, dtype)


@pytest.mark.golden("clip4dm_words")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_words(golden, dtype):
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    # float32 is stated nowhere: scores near 1e-4, with its rounding.
    limits = golden.tolerance() if dtype == "float64" else {"rtol": 1e-5, "atol": 1e-10}
    for record in golden.meta["records"]:
        name, expected, eps, mode = record["id"], record["expected"], record["epsilon"], record["mode"]
        words = split_words(record["template"] + record["caption"])
        assert [word.word for word in words] == record["words"]
        counts = [len(tokenizer.encode(word.word)) for word in words]
        assert counts == record["tokens_per_word"]
        skipped = len(split_words(record["template"]))
        assert skipped == record["n_template_words"]

        scores = word_means(tensor(golden[f"tok_{name.partition('_')[0]}"], dtype), counts)[skipped:]
        assert scores.dtype == getattr(torch, dtype)
        scored = [WordScore(w.word, w.start, w.end, float(s)) for w, s in zip(words[skipped:], scores, strict=True)]
        found = WordAttribution(record["caption"], record["cosine"], tuple(scored))

        shown = [word for word in scored if mode != "threshold" or not word.is_punctuation]
        assert [word.word for word in shown] == [word for word, _ in expected["word_attributions"]]
        np.testing.assert_allclose(
            [word.score for word in shown], [score for _, score in expected["word_attributions"]], **limits
        )
        flagged = found.flagged(eps, mode)
        numbered = [f"{shown.index(word)}_{word.word}" if mode == "threshold" else word.word for word in flagged]
        assert " ".join(numbered) == expected["flagged"]
        if mode == "threshold":
            np.testing.assert_allclose([word.score for word in flagged], expected["flagged_scores"], **limits)
        np.testing.assert_allclose(sum(word.score for word in flagged), expected["sum_negative"], **limits)
        np.testing.assert_allclose(found.f_clip_score(eps, mode), expected["f_clip_score"], **limits)
        np.testing.assert_allclose(2.5 * max(record["cosine"], 0), expected["clip_score"], **limits)
        kept = torch.stack([score for score, word in zip(scores, scored, strict=True) if word in shown])
        cosine = torch.tensor(record["cosine"], dtype=scores.dtype)
        direct = f_clip_score(kept, cosine, eps, mode)
        assert direct.dtype == getattr(torch, dtype)
        np.testing.assert_allclose(direct, expected["f_clip_score"], **limits)
        if expected["merged_phrases"] is not None:
            phrases = found.phrases(eps)
            assert [phrase.word for phrase in phrases] == [text for text, _ in expected["merged_phrases"]]
            np.testing.assert_allclose(
                [phrase.score for phrase in phrases], [score for _, score in expected["merged_phrases"]], **limits
            )
