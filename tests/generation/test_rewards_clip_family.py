"""Rewards of the CLIP family: against released formulas and torchmetrics, and by finite differences."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad

from generation.rewards import (
    HPS,
    Aesthetic,
    AestheticHead,
    CLIPScore,
    CosineReward,
    EmbeddingReward,
    PickScore,
    Reward,
    WeightedSum,
    load_hps,
    load_pick_score,
    read_aesthetic_head,
)
from generation.rewards.scores import pick_probabilities
from mmalign import Encoder, load_encoder
from mmalign.errors import InputError, ModelUnavailableError
from mmalign.imaging import ImagePreprocessing, read_image
from tests.conftest import spread_weights

# Cosines of the second image and the fourth are well above 0 with it, those of the first and last below.
SEED = 8
PROMPTS = ["a dog on grass", "two bicycles", "an empty street", "a plate of food", "people in a park"]
GOLDEN = Path(__file__).parents[1] / "golden" / "data"


@pytest.fixture(scope="module")
def encoder(open_clip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """As `tiny_open_clip`, with the same weights every time."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    path = tmp_path_factory.mktemp("seeded") / "weights.safetensors"
    save_file(spread_weights(open_clip.create_model("tiny-clip"), SEED).state_dict(), path)
    return load_encoder(f"open_clip:tiny-clip/{path}", device="cpu")


@pytest.fixture(scope="module")
def images(photos: Path) -> list[Tensor]:
    """Parts of five photographs, each of another size, of less contrast: what the kernel overshoots is not clipped."""
    sizes = [(90, 120), (64, 64), (150, 70), (33, 200), (128, 96)]
    files = sorted(photos.glob("*.jpg"))[:5]
    cut = [read_image(file).pixels[:, :h, :w] for file, (h, w) in zip(files, sizes, strict=True)]
    return [0.25 + 0.5 * pixels.float() / 255 for pixels in cut]


def head(dims: Sequence[int], activation: Any = None, seed: int = 0) -> AestheticHead:
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (torch.randn(out, into, generator=generator), torch.rand(out, generator=generator))
        for into, out in pairwise(dims)
    ]
    return AestheticHead(layers, activation)


REWARDS: dict[str, Callable[[Encoder], Reward]] = {
    "cosine": CosineReward,
    "clipscore": CLIPScore,
    "clipscore-percent": lambda encoder: CLIPScore(encoder, convention="percent"),
    "pickscore": PickScore,
    "hps": HPS,
    "hps-crop": lambda encoder: HPS(encoder, version="v2", geometry="crop", antialias=False),
    "aesthetic": lambda encoder: Aesthetic(encoder, head([32, 8, 1])),
    "aesthetic-relu": lambda encoder: Aesthetic(encoder, head([32, 32, 16, 1], "relu")),
    "sum": lambda encoder: WeightedSum({"pick": (0.05, PickScore(encoder)), "hps": (-2.0, HPS(encoder))}),
}


@pytest.mark.parametrize("name", REWARDS)
def test_gradients_are_those_of_the_score(encoder: Encoder, images: list[Tensor], name: str) -> None:
    reward = REWARDS[name](encoder)
    assert reward.differentiable
    pixels = [image.clone().requires_grad_() for image in images]
    scores = torch.as_tensor(reward.score(pixels, PROMPTS))
    assert scores.dtype == torch.float32
    scores.sum().backward()
    seen = 0
    low, high = reward.range
    for image, prompt, score in zip(pixels, PROMPTS, scores.tolist(), strict=True):
        assert low is None or low - 1e-4 <= score
        assert high is None or score <= high + 1e-4
        assert image.grad is not None
        slope = float(image.grad.norm())
        if name == "clipscore" and score == 0:
            assert slope == 0  # the clamp
            continue
        step = 0.03
        with torch.no_grad():
            above, below = (
                float(torch.as_tensor(reward.score([image + sign * step / slope * image.grad], [prompt]))[0])
                for sign in (1, -1)
            )
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=0.05)
        seen += 1
    assert seen >= 2
    assert all(not parameter.requires_grad for parameter in encoder.model.parameters())


@pytest.mark.parametrize("name", REWARDS)
def test_a_batch_of_many_sizes_scores_as_its_images_do(encoder: Encoder, images: list[Tensor], name: str) -> None:
    reward = REWARDS[name](encoder)
    single = np.concatenate([reward([image], prompt) for image, prompt in zip(images, PROMPTS, strict=True)])
    np.testing.assert_allclose(reward(images, PROMPTS), single, rtol=1e-4, atol=1e-5)
    assert np.ptp(single) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_in_half_precision(encoder: Encoder, images: list[Tensor], dtype: torch.dtype) -> None:
    for name in ("hps", "pickscore", "aesthetic-relu"):
        reward = REWARDS[name](encoder)
        half = [image.to(dtype).requires_grad_() for image in images]
        scores = torch.as_tensor(reward.score(half, PROMPTS))
        assert scores.dtype == torch.float32
        in_full = reward([image.detach().float() for image in half], PROMPTS)
        np.testing.assert_allclose(scores.detach().numpy(), in_full, atol=1e-5)  # rounded once, on the way in
        scores.sum().backward()
        for image in half:
            assert image.grad is not None
            assert image.grad.dtype == dtype
            assert image.grad.isfinite().all()
            assert image.grad.abs().sum() > 0


def test_an_image_tower_in_half_precision(open_clip_checkpoint: Path, images: list[Tensor]) -> None:
    spec = f"open_clip:tiny-clip/{open_clip_checkpoint}"
    whole, half = (HPS(load_encoder(spec, device="cpu", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    pixels = images[0].clone().requires_grad_()
    scores = torch.as_tensor(half.score([pixels], PROMPTS[:1]))
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(half(images, PROMPTS), whole(images, PROMPTS), atol=0.02)
    scores.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert half.fingerprint == whole.fingerprint


def test_prompts_are_encoded_once(encoder: Encoder, images: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    features = encoder.text_features

    def counted(texts: Sequence[str]) -> Tensor:
        asked.extend(texts)
        return features(texts)

    monkeypatch.setattr(encoder, "text_features", counted)
    reward = CLIPScore(encoder)
    first = reward(images[:3], ["x", "y", "x"])
    assert asked == ["A photo depicts x", "A photo depicts y"]
    np.testing.assert_array_equal(reward(images[:3], ["x", "y", "x"]), first)
    assert len(asked) == 2
    reward(images[:1], "z")
    assert asked[2:] == ["A photo depicts z"]
    asked.clear()
    Aesthetic(encoder, head([32, 1]))(images, "never asked")
    CLIPScore(encoder, convention="percent")(images[:1], "x")
    assert asked == ["x"]


@pytest.mark.parametrize("name", ["hps", "clipscore-percent"])
def test_a_reward_after_a_decoders_clamp(encoder: Encoder, images: list[Tensor], name: str) -> None:
    reward = REWARDS[name](encoder)
    decoded = (images[0] - 0.5) * 2
    decoded[:, :30] += 1.5  # beyond 1

    def score(raw: Tensor) -> Tensor:
        return torch.as_tensor(reward.score([(raw / 2 + 0.5).clamp(0, 1)], PROMPTS[:1]))[0]

    raw = decoded.clone().requires_grad_()
    score(raw).backward()
    assert raw.grad is not None
    beyond = decoded.abs() > 1
    assert 0.1 < beyond.float().mean() < 0.9
    assert raw.grad[beyond].abs().max() == 0
    direction = raw.grad / raw.grad.norm()
    with torch.no_grad():
        slope = (score(decoded + 0.02 * direction) - score(decoded - 0.02 * direction)) / 0.04
    assert float(slope) == pytest.approx(float(raw.grad.norm()), rel=0.05)


# --- CLIPScore


def test_clip_score_is_the_cosine_in_two_conventions(encoder: Encoder, images: list[Tensor]) -> None:
    cosine = CosineReward(encoder)
    plain = cosine(images, PROMPTS)
    prefixed = cosine(images, [f"A photo depicts {prompt}" for prompt in PROMPTS])
    assert np.abs(plain - prefixed).max() > 0.01
    np.testing.assert_allclose(CLIPScore(encoder)(images, PROMPTS), 2.5 * prefixed.clip(min=0), atol=1e-6)
    percent = CLIPScore(encoder, convention="percent")
    np.testing.assert_allclose(percent(images, PROMPTS), 100 * plain, atol=1e-4)
    assert plain.min() < 0 < plain.max()
    with pytest.raises(InputError, match="convention is 'ten'; give one of hessel, percent"):
        CLIPScore(encoder, convention="ten")  # type: ignore[arg-type]


def test_percent_is_what_torchmetrics_gives(tiny_clip: Encoder, clip_folder: Path, photos: Path) -> None:
    from torchmetrics.multimodal import CLIPScore as Metric
    from transformers import AutoImageProcessor

    processor, tokenizer = AutoImageProcessor.from_pretrained(clip_folder), tiny_clip.tokenizer  # type: ignore[attr-defined]

    class Processor:
        """What torchmetrics asks of transformers' own."""

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def __call__(self, text: Any = None, images: Any = None, **options: Any) -> Any:
            if images is not None:
                return processor(images=images, return_tensors="pt")
            return tokenizer(text, return_tensors="pt", padding=True, truncation=True)

    class Model:
        """The same model; torchmetrics 1.9 takes the features bare, as transformers 4 gave them."""

        config = tiny_clip.model.config

        def to(self, device: Any) -> Model:
            return self

        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return tiny_clip.model.get_image_features(pixel_values).pooler_output

        def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return tiny_clip.model.get_text_features(input_ids, attention_mask).pooler_output

    metric = Metric(model_name_or_path=lambda: (Model(), Processor()))  # type: ignore[arg-type, return-value]
    # Squares of the side that the processor resizes to: nothing is resized, only cropped.
    squares = [read_image(file).pixels[:, 50:90, 60:100] for file in sorted(photos.glob("*.jpg"))[:5]]
    reward = CLIPScore(tiny_clip, convention="percent")
    ours = reward(squares, PROMPTS)
    for square, prompt, score in zip(squares, PROMPTS, ours, strict=True):
        metric.reset()
        metric.update(square, prompt)
        assert max(score, 0) == pytest.approx(float(metric.compute()), abs=1e-3)
        assert score == pytest.approx(float(metric.score), abs=1e-3)
    metric.reset()
    metric.update(squares, PROMPTS)
    assert float(metric.score / metric.n_samples) == pytest.approx(ours.mean(), abs=1e-3)
    assert np.ptp(ours) > 1


# --- PickScore


def test_pick_score_of_a_folder(tiny_clip: Encoder, clip_folder: Path, images: list[Tensor]) -> None:
    reward = load_pick_score(str(clip_folder), device="cpu", dtype="float32")
    factor = math.exp(float(tiny_clip.model.logit_scale))
    wanted = factor * CosineReward(tiny_clip)(images, PROMPTS)
    np.testing.assert_allclose(reward(images, PROMPTS), wanted, rtol=1e-5)
    assert reward.range == pytest.approx((-factor, factor))
    assert reward.encoder.fingerprint == tiny_clip.fingerprint
    # weights that differ in the scale alone are another reward
    assert PickScore(tiny_clip).fingerprint == reward.fingerprint
    assert PickScore(tiny_clip, logit_scale=0.0).fingerprint != reward.fingerprint
    np.testing.assert_allclose(PickScore(tiny_clip, logit_scale=0.0)(images, PROMPTS), wanted / factor, rtol=1e-5)

    with torch.no_grad():
        scores = torch.as_tensor(reward.score(images, ["a dog"] * 5))
        probabilities = pick_probabilities(
            reward.image_embeds(images), reward.text_embeds(["a dog"])[0], torch.tensor(reward.logit_scale)
        )
    torch.testing.assert_close(probabilities, scores.softmax(0))


def test_pick_score_that_cannot_be_loaded(
    clip_folder: Path, bert_folder: Path, tiny_clip: Encoder, tiny_timm: Encoder, bundled: Encoder, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ModelUnavailableError, match="pickscore 'yuvalkirstain/PickScore_v1' cannot be found"):
        load_pick_score()
    with pytest.raises(InputError, match="is a bert model, no CLIP"):
        load_pick_score(str(bert_folder))
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights \(logit_scale"):
        load_pick_score(str(folder))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as a CLIP folder"):
        load_pick_score(str(folder))
    with pytest.raises(InputError, match="no text tower"):
        PickScore(tiny_timm)
    with pytest.raises(InputError, match="has no logit scale"):
        PickScore(bundled)
    assert PickScore(bundled, logit_scale=1.0).range[1] == pytest.approx(math.e)


def test_pick_score_without_a_processor_takes_that_of_its_base(
    clip_folder: Path, tmp_path: Path, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published weights come without one."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, bare)
    with pytest.raises(InputError, match="cannot be read"):  # the base is not on this machine
        load_pick_score(str(bare))
    monkeypatch.setattr("generation.rewards.pick_score._PROCESSOR", str(clip_folder))
    whole = load_pick_score(str(clip_folder), device="cpu", dtype="float32")
    np.testing.assert_array_equal(
        load_pick_score(str(bare), device="cpu", dtype="float32")(images, PROMPTS), whole(images, PROMPTS)
    )


# --- HPS


@pytest.fixture(scope="module")
def hps_file(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the published checkpoints are: half precision, under the key state_dict."""
    path = tmp_path_factory.mktemp("hps") / "HPS_tiny.pt"
    state = {name: tensor.half() for name, tensor in encoder.model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("antialias", [True, False])
def test_hps_is_the_official_score(hps_file: Path, images: list[Tensor], antialias: bool) -> None:
    reward = load_hps(hps_file, model="tiny-clip", antialias=antialias, device="cpu", dtype="float32")
    encoder = reward.encoder
    own = encoder.preprocessing
    assert own is not None
    mean, std = (torch.tensor(values)[:, None, None] for values in (own.mean, own.std))
    for image, prompt in zip(images, PROMPTS, strict=True):
        scale = 32 / max(image.shape[1:])
        size = [round(side * scale) for side in image.shape[1:]]
        small = interpolate(image[None], size, mode="bicubic", antialias=antialias, align_corners=False)[0]
        down, right = 32 - size[0], 32 - size[1]
        square = pad(small, (right // 2, right - right // 2, down // 2, down - down // 2))
        with torch.no_grad():
            i = normalize(encoder.image_features(((square - mean) / std)[None]), dim=-1)
            t = normalize(encoder.text_features([prompt]), dim=-1)
        assert reward([image], prompt)[0] == pytest.approx(float(i @ t.T), abs=1e-5)


def test_geometries_and_versions_of_hps(hps_file: Path, images: list[Tensor]) -> None:
    options: dict[str, Any] = {"model": "tiny-clip", "device": "cpu", "dtype": "float32"}
    padded = load_hps(hps_file, **options)
    cropped = load_hps(hps_file, version="v2", geometry="crop", **options)
    np.testing.assert_allclose(cropped(images, PROMPTS), CosineReward(cropped.encoder)(images, PROMPTS), atol=1e-6)
    off = np.abs(padded(images, PROMPTS) - cropped(images, PROMPTS))
    assert off[1] < 1e-5  # the square one
    assert off[[0, 2, 3, 4]].max() > 0.01
    assert (padded.name, cropped.name) == ("hps-v2.1", "hps-v2")
    names = {padded.fingerprint, cropped.fingerprint, load_hps(hps_file, geometry="crop", **options).fingerprint}
    assert len(names) == 3
    assert load_hps(hps_file, **options).fingerprint == padded.fingerprint
    with pytest.raises(InputError, match="geometry is 'squash'"):
        HPS(padded.encoder, geometry="squash")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="version is 'v3'"):
        load_hps(hps_file, version="v3", **options)  # type: ignore[arg-type]


class Dangerous:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was run",))


def test_hps_files_that_do_not_do(hps_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'absent.pt' is no file; give HPS_v2.1_compressed.pt of hub repository"):
        load_hps("absent.pt", model="tiny-clip")
    with pytest.raises(ModelUnavailableError, match=r"'xswu/HPSv2/HPS_v2_compressed.pt' cannot be found"):
        load_hps(version="v2")
    other = tmp_path / "other.pt"
    torch.save({"state_dict": {"visual.proj": torch.zeros(3, 3)}}, other)
    with pytest.raises(InputError, match="does not fit tiny-clip"):
        load_hps(other, model="tiny-clip")
    torch.save({"state_dict": {}, "about": Dangerous()}, other)
    with pytest.raises(InputError, match="holds more than tensors and is not read"):
        load_hps(other, model="tiny-clip")
    with pytest.raises(InputError, match="has no model 'ViT-Z'"):
        load_hps(hps_file, model="ViT-Z")


def test_hps_is_fetched_by_its_published_name(
    hps_file: Path, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(hps_file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    options: dict[str, Any] = {"model": "tiny-clip", "device": "cpu", "dtype": "float32"}
    scores = [load_hps(version=version, **options)(images, PROMPTS) for version in ("v2", "v2.1")]  # type: ignore[arg-type]
    assert asked == [("xswu/HPSv2", "HPS_v2_compressed.pt"), ("xswu/HPSv2", "HPS_v2.1_compressed.pt")]
    np.testing.assert_array_equal(*scores)


# --- Aesthetics


class WideEncoder(Encoder):
    """768 numbers of an image's colours, in place of OpenAI's ViT-L/14."""

    source = "wide-of-test-rewards"

    def __init__(self) -> None:
        torch.manual_seed(0)
        preprocessing = ImagePreprocessing((8, 8), "shortest", mean=(0.5,) * 3, std=(0.3,) * 3)
        super().__init__(nn.Linear(192, 768), spec="wide", dim=768, preprocessing=preprocessing)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values.flatten(1))

    def describe(self) -> dict[str, Any]:
        return {}

    def write(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Any:
        raise NotImplementedError


def test_the_bundled_head_is_the_published_one(encoder: Encoder, images: list[Tensor]) -> None:
    with np.load(GOLDEN / "rw_scores.npz") as arrays:
        unit, published = arrays["unit768"], arrays["real_sac_logos_ava1_linear"]
    wide, narrow = WideEncoder(), encoder
    reward = Aesthetic(wide)
    scores = reward.score_embeds(torch.from_numpy(unit).float(), None)
    np.testing.assert_allclose(scores.numpy(), published, rtol=1e-6)
    assert reward.name == "aesthetic-v2"
    assert not reward.uses_text
    low, high = reward.range
    assert low is not None
    assert high is not None
    (weight, bias), *_ = reward.head.layers
    best = torch.nn.functional.normalize(weight, dim=1)
    assert float(reward.score_embeds(best, None)[0]) == pytest.approx(high, abs=1e-4)
    assert float(reward.score_embeds(-best, None)[0]) == pytest.approx(low, abs=1e-4)

    assert wide.preprocessing is not None
    seen = torch.stack([wide.preprocessing(image) for image in images])
    vectors = normalize(wide.image_features(seen), dim=1)
    wanted = vectors @ weight[0] + bias
    np.testing.assert_allclose(reward(images, "any"), wanted.detach().numpy(), rtol=1e-5)
    with pytest.raises(InputError, match=r"head of aesthetic-v2 takes 768 numbers and encoder .* gives 32"):
        Aesthetic(narrow)


def published_modules() -> dict[str, nn.Module]:
    """Heads as their authors define them, with narrower layers."""

    def stack(relu: bool) -> nn.Module:
        parts: list[nn.Module] = []
        for into, out, dropout in ((32, 16, 0.2), (16, 8, 0.2), (8, 6, 0.1), (6, 4, 0.0)):
            parts += [nn.Linear(into, out)] + [nn.ReLU()] * relu + [nn.Dropout(dropout)] * (dropout > 0)
        module = nn.Module()
        module.layers = nn.Sequential(*parts, nn.Linear(4, 1))
        module.forward = lambda x: module.layers(x)  # type: ignore[method-assign]
        return module.eval()

    torch.manual_seed(3)
    return {"linear": stack(False), "relu": stack(True), "v1": nn.Linear(32, 1)}


@pytest.mark.parametrize("kind", ["linear", "relu", "v1"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_heads_are_read(
    encoder: Encoder, images: list[Tensor], tmp_path: Path, kind: str, suffix: str
) -> None:
    from safetensors.torch import save_file

    module = published_modules()[kind]
    path = tmp_path / f"head{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(module.state_dict(), path)
    found = read_aesthetic_head(path)
    assert found.activation == ("relu" if kind == "relu" else None)
    reward = Aesthetic(encoder, found)
    assert len(reward.head.layers) == (5 if kind == "relu" else 1)  # folded
    assert (reward.range[0] is None) == (kind == "relu")
    with torch.no_grad():
        wanted = module(reward.image_embeds(images))[:, 0]
    np.testing.assert_allclose(reward(images, ""), wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert np.ptp(wanted.numpy()) > 1e-4
    other = Aesthetic(encoder, head([32, 1]))
    assert reward.fingerprint != other.fingerprint


def test_heads_that_are_none(tmp_path: Path, tiny_sentence: Encoder) -> None:
    path = tmp_path / "head.pth"
    for state, message in [
        ({"layers.0.weight": torch.zeros(4, 8)}, "does not fit"),
        ({"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}, "ends in 2 numbers"),
        ({"conv.kernel": torch.zeros(1)}, "has 'conv.kernel', which is no linear layer's"),
        ({f"layers.{n}.{kind}": torch.zeros(*shape) for n, out, into in ((0, 4, 8), (1, 1, 5))
          for kind, shape in (("weight", (out, into)), ("bias", (out,)))}, "does not fit"),
        (torch.zeros(3), "is no state dict"),
        ({}, "is no state dict"),
        ({"weight": Dangerous()}, "holds more than tensors and is not read"),
    ]:  # fmt: skip
        torch.save(state, path)
        with pytest.raises(InputError, match=message):
            read_aesthetic_head(path)
    with pytest.raises(InputError, match="does not exist"):
        read_aesthetic_head(tmp_path / "absent.pth")
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"cannot be read|is damaged"):
            read_aesthetic_head(tmp_path / name)
    with pytest.raises(InputError, match="no image tower"):
        Aesthetic(tiny_sentence, head([32, 1]))


# --- What identifies them


def test_fingerprints_tell_rewards_apart(encoder: Encoder, tiny_clip: Encoder) -> None:
    assert encoder.preprocessing is not None
    through = ImagePreprocessing((32, 32), "squash", mean=encoder.preprocessing.mean, std=encoder.preprocessing.std)
    made: list[EmbeddingReward] = [
        CosineReward(encoder),
        CosineReward(tiny_clip),
        CosineReward(encoder, preprocessing=through),
        CLIPScore(encoder),
        CLIPScore(encoder, convention="percent"),
        PickScore(encoder),
        HPS(encoder),
        HPS(encoder, antialias=False),
        HPS(encoder, geometry="crop"),
        HPS(encoder, version="v2"),
        Aesthetic(encoder, head([32, 1])),
        Aesthetic(encoder, head([32, 1], seed=1)),
        Aesthetic(encoder, head([32, 4, 1], "relu")),
    ]
    assert len({reward.fingerprint for reward in made}) == len(made)
    assert CosineReward(encoder).fingerprint == f"cosine of encoder {encoder.fingerprint}"
    json.dumps([reward.fingerprint for reward in made])
