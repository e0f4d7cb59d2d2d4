"""Rewards by name, sums of them, JPEG sizes, and tables of scored files."""

from __future__ import annotations

import ast
import io
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor

import generation.rewards
from generation import GeneratedImage
from generation.rewards import (
    HPS,
    Aesthetic,
    CLIPScore,
    CosineReward,
    FCLIPScore,
    JPEGSize,
    PickScore,
    WeightedSum,
    as_reward,
    load_reward,
    load_rewards,
    register_reward,
    score_files,
)
from generation.rewards.registry import REWARDS
from mmalign import Encoder
from mmalign.errors import EncoderUnavailableError, InputError, ModelUnavailableError
from mmalign.imaging import read_image

PROMPTS = ["a dog on grass", "two bicycles", "an empty street"]


@pytest.fixture
def files(photos: Path) -> list[Path]:
    return sorted(photos.glob("*.jpg"))[:3]


@pytest.fixture
def tiny_spec(open_clip_checkpoint: Path) -> str:
    return f"open_clip:tiny-clip/{open_clip_checkpoint}"


# --- The package


def test_names_for_type_checkers_are_the_public_ones() -> None:
    tree = ast.parse(Path(generation.rewards.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = [name.name for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(seen) == sorted(generation.rewards.__all__)
    for name in seen:
        getattr(generation.rewards, name)


def test_importing_the_package_costs_nothing() -> None:
    code = (
        "import sys, generation.rewards; print([m for m in ('torch', 'transformers', 'open_clip') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- Specs


def test_specs_of_the_clip_family(tiny_spec: str, tiny_open_clip: Encoder, files: list[Path]) -> None:
    made: dict[str, Any] = {
        "cosine": CosineReward(tiny_open_clip),
        "clipscore": CLIPScore(tiny_open_clip),
        "clipscore-percent": CLIPScore(tiny_open_clip, convention="percent"),
        "f-clipscore": FCLIPScore(tiny_open_clip),
    }
    for name, reward in made.items():
        loaded = load_reward(f"{name}:{tiny_spec}", device="cpu", dtype="float32")
        assert type(loaded) is type(reward)
        assert (loaded.name, loaded.fingerprint) == (name, reward.fingerprint)
        np.testing.assert_allclose(loaded(files, PROMPTS), reward(files, PROMPTS), rtol=1e-5)


def test_published_weights_go_with_published_encoders(
    tiny_open_clip: Encoder, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any, Any]] = []

    def load(spec: str, *, device: Any = None, dtype: Any = None) -> Encoder:
        asked.append((spec, device, dtype))
        return tiny_open_clip

    monkeypatch.setattr("mmalign.encoders.load_encoder", load)
    checkpoint, head = tmp_path / "weights.pt", tmp_path / "sa_0_4_vit_b_32_linear.pth"
    checkpoint.write_bytes(b"read by the encoder")
    torch.save({"weight": torch.ones(1, 32), "bias": torch.zeros(1)}, head)

    def loaded(spec: str) -> tuple[Any, str]:
        reward = load_reward(spec, device="cpu", dtype="bfloat16")
        assert asked[-1][1:] == ("cpu", "bfloat16")
        return reward, asked[-1][0]

    assert loaded("clipscore")[1] == "open_clip:ViT-B-32/openai"
    assert loaded("clipscore-percent")[1] == "open_clip:ViT-L-14/openai"
    for version in ("v2", "v2.1"):
        reward, encoder = loaded(f"hps-{version}:{checkpoint}")
        assert isinstance(reward, HPS)
        assert (reward.version, reward.geometry, encoder) == (version, "pad", f"open_clip:ViT-H-14/{checkpoint}")
    reward, encoder = loaded(f"aesthetic-v2:{head}")
    assert isinstance(reward, Aesthetic)
    assert (reward.name, encoder) == ("aesthetic-v2", "open_clip:ViT-L-14/openai")
    reward, encoder = loaded(f"aesthetic-v1:{head}@bundled")
    assert (reward.name, encoder) == ("aesthetic-v1", "bundled")
    for width, name, encoder in [
        (512, "sa_0_4_vit_b_32_linear.pth", "open_clip:ViT-B-32/openai"),
        (512, "sa_0_4_vit_b_16_linear.pth", "open_clip:ViT-B-16/openai"),
        (768, "sa_0_4_vit_l_14_linear.pth", "open_clip:ViT-L-14/openai"),
    ]:
        torch.save({"weight": torch.ones(1, width), "bias": torch.zeros(1)}, tmp_path / name)
        with pytest.raises(InputError, match=f"head of aesthetic-v1 takes {width} numbers"):
            loaded(f"aesthetic-v1:{tmp_path / name}")
        assert asked[-1][0] == encoder
    with pytest.raises(InputError, match="head of aesthetic-v2 takes 768 numbers"):  # the bundled one
        loaded("aesthetic-v2@bundled:image")
    assert asked[-1][0] == "bundled:image"

    pick = load_reward(f"pickscore:{clip_folder}", device="cpu")
    assert isinstance(pick, PickScore)


def test_what_is_not_here_is_said_with_a_way_out() -> None:
    for spec, encoder in [("clipscore", "ViT-B-32"), ("aesthetic-v2", "ViT-L-14")]:
        with pytest.raises(
            EncoderUnavailableError, match=f"{encoder}/openai' cannot.*--reward cosine:bundled"
        ) as caught:
            load_reward(spec)
        assert "\n" not in str(caught.value)
    for spec in ("pickscore", "hps-v2.1", "hps-v2"):
        with pytest.raises(ModelUnavailableError, match=f"give .*{spec}:F"):
            load_reward(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clipscor", r"'clipscor' is not known \(did you mean clipscore"),
        ("", "'' is not known; give one of cosine:ENCODER"),
        ("clipscore:", "ends in ':'; say clipscore"),
        ("cosine", "names no encoder; say cosine:ENCODER, for example cosine:bundled"),
        ("cosine:absent", "encoder 'absent' is neither a folder"),
        ("jpeg-compressibility:95", "takes nothing after its name, not '95'"),
        ("aesthetic-v1", "names no head; download sa_0_4_vit_l_14_linear.pth"),
        ("aesthetic-v2:absent.pth", "'absent.pth' does not exist"),
        ("absent_module:f", "cannot be imported .*no reward is called 'absent_module'"),
        ("hsp-v2:file.pt", r"'hsp-v2:file.pt' is not known \(did you mean hps-v2"),
        ("math:absent", "has no attribute 'absent'"),
        ("math:pi", "is no reward; give a Reward, or a callable"),
    ],
)
def test_specs_that_name_nothing(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[Path]) -> None:
    monkeypatch.chdir(tmp_path)
    own = (
        "from own_words_of_test_rewards import LENGTH\n\ndef words(images, prompts):\n    return map(LENGTH, prompts)\n"
    )
    (tmp_path / "own_rewards_of_test.py").write_text(own)
    (tmp_path / "own_words_of_test_rewards.py").write_text("LENGTH = len\n")
    (tmp_path / "bad_rewards_of_test.py").write_text("x = 1\nboom = 1 / 0\n")
    path = list(sys.path)
    for spec in ("own_rewards_of_test:words", "own_rewards_of_test.py:words"):
        reward = load_reward(spec)
        assert reward(files, PROMPTS).tolist() == [14, 12, 15]
        assert reward.name == "words"
    with pytest.raises(InputError, match=r"bad_rewards_of_test.py:2 \(ZeroDivisionError: division by zero\); mend it"):
        load_reward("bad_rewards_of_test:f")
    assert sys.path == path


def test_a_prefix_of_ones_own(monkeypatch: pytest.MonkeyPatch, files: list[Path]) -> None:
    monkeypatch.setattr("generation.rewards.registry.REWARDS", dict(REWARDS))
    asked = []

    def load(rest: str, device: Any, dtype: Any) -> Callable[..., Any]:
        asked.append((rest, device, dtype))
        return lambda images, prompts: [len(rest)] * len(images)

    register_reward("length-of", load, summary="for this test")
    assert load_reward("length-of:some:thing", device="cpu", dtype="float32")(files, "x").tolist() == [10] * 3
    assert load_reward("length-of")(files, "x").tolist() == [0] * 3
    assert asked == [("some:thing", "cpu", "float32"), ("", None, "auto")]
    for prefix in ("clipscore", "f-clipscore", "a:b", "", "a=b", "1a"):
        with pytest.raises(InputError, match="is taken or no name"):
            register_reward(prefix, load)


def test_several_with_weights(tiny_spec: str, files: list[Path]) -> None:
    assert isinstance(load_rewards("jpeg-compressibility"), JPEGSize)
    assert isinstance(load_rewards(["jpeg-compressibility=1"]), JPEGSize)
    both = load_rewards(
        [f"cosine:{tiny_spec}=-2", "jpeg-compressibility=1e-2", "jpeg-incompressibility"], device="cpu", dtype="float32"
    )
    assert isinstance(both, WeightedSum)
    assert {name: weight for name, (weight, _) in both.terms.items()} == {
        "cosine": -2,
        "jpeg-compressibility": 0.01,
        "jpeg-incompressibility": 1,
    }
    assert both.name == "-2 cosine + 0.01 jpeg-compressibility + jpeg-incompressibility"
    cosine, size = load_rewards(f"cosine:{tiny_spec}", device="cpu", dtype="float32"), JPEGSize()
    wanted = -2 * cosine(files, PROMPTS) - 0.99 * size(files, PROMPTS)
    np.testing.assert_allclose(both(files, PROMPTS), wanted, rtol=1e-4)

    other = tiny_spec.replace("tiny-clip/", "tiny-clip-quickgelu/")
    same = load_rewards([f"cosine:{tiny_spec}", f"cosine:{other}=0.5"], device="cpu", dtype="float32")
    assert isinstance(same, WeightedSum)
    assert list(same.terms) == [f"cosine:{tiny_spec}", f"cosine:{other}"]
    assert [weight for weight, _ in same.terms.values()] == [1, 0.5]

    with pytest.raises(InputError, match="'jpeg-compressibility' is given twice"):
        load_rewards(["jpeg-compressibility", "jpeg-compressibility=2"])
    with pytest.raises(InputError, match="has the weight inf"):
        load_rewards(["jpeg-compressibility=inf"])
    with pytest.raises(InputError, match="there is no reward"):
        load_rewards([])
    with pytest.raises(InputError, match="'jpeg-compressibility=x' is not known"):
        load_rewards(["jpeg-compressibility=x"])


# --- JPEG sizes


def test_jpeg_size_is_that_of_pillows_file(files: list[Path]) -> None:
    small, large = JPEGSize(), JPEGSize(incompressible=True)
    sizes = []
    for file in files:
        buffer = io.BytesIO()
        Image.fromarray(read_image(file).pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    np.testing.assert_allclose(small(files, ""), -np.array(sizes), rtol=1e-6)
    np.testing.assert_allclose(large(files, ""), sizes, rtol=1e-6)
    assert (JPEGSize(quality=50)(files, "") > small(files, "")).all()
    noise, flat = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.full((3, 64, 64), 0.5)
    assert np.diff(small([noise, flat], ""))[0] > 1
    assert not small.differentiable
    assert not small.uses_text
    assert (small.range, large.range) == ((None, 0.0), (0.0, None))
    assert len({small.fingerprint, large.fingerprint, JPEGSize(quality=50).fingerprint}) == 3
    with pytest.raises(InputError, match="quality is 0"):
        JPEGSize(quality=0)


# --- Sums


def brightness(images: Sequence[Tensor], prompts: Sequence[str]) -> list[Tensor]:
    return [image.mean() for image in images]


brightness.differentiable = True  # type: ignore[attr-defined]
brightness.uses_text = False  # type: ignore[attr-defined]


def test_a_sum_adds_and_names_its_terms(tiny_open_clip: Encoder, files: list[Path]) -> None:
    hps, pick = HPS(tiny_open_clip), PickScore(tiny_open_clip)
    total = WeightedSum({"hps": (3.0, hps), "pick": (-0.5, pick), "light": (2.0, brightness)})
    images = [(read_image(file).pixels[:, :60, :80].float() / 255).requires_grad_() for file in files]
    scores, terms = total.score_terms(images, PROMPTS)
    assert list(terms) == ["hps", "pick", "light"]
    for name, reward in (("hps", hps), ("pick", pick), ("light", as_reward(brightness))):
        np.testing.assert_allclose(terms[name].detach(), reward([i.detach() for i in images], PROMPTS), atol=1e-5)
    wanted = 3 * terms["hps"] - 0.5 * terms["pick"] + 2 * terms["light"]
    torch.testing.assert_close(scores, wanted)
    torch.testing.assert_close(total.score(images, PROMPTS), wanted, atol=1e-4, rtol=1e-4)

    gradients = {}
    for name, part in terms.items():
        gradients[name] = torch.autograd.grad(part.sum(), images[0], retain_graph=True)[0]
    (whole,) = torch.autograd.grad(scores.sum(), images[0])
    parts = 3 * gradients["hps"] - 0.5 * gradients["pick"] + 2 * gradients["light"]
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-3)

    factor = math.exp(pick.logit_scale)
    assert WeightedSum({"a": (3.0, hps), "b": (-0.5, pick)}).range == pytest.approx((-3 - factor / 2, 3 + factor / 2))
    assert total.range == (None, None)


def test_a_sum_is_what_its_terms_are(tiny_open_clip: Encoder) -> None:
    hps, size = HPS(tiny_open_clip), JPEGSize()
    assert WeightedSum({"a": (1, hps), "b": (1, brightness)}).differentiable
    assert not WeightedSum({"a": (1, hps), "b": (1, size)}).differentiable
    assert WeightedSum({"a": (1, hps), "b": (1, size)}).range == (None, 1.0)
    assert WeightedSum({"a": (1, hps), "b": (-1, size)}).range == (-1.0, None)
    assert WeightedSum({"a": (1, brightness), "b": (1, size)}).uses_text is False
    assert WeightedSum({"a": (1, hps), "b": (1, size)}).uses_text is True
    names = [WeightedSum({"a": (w, hps), "b": (1, size)}).fingerprint for w in (1, 2)]
    assert names[0] != names[1]
    assert WeightedSum({"a": (1, hps), "b": (1, brightness)}).fingerprint is None
    with pytest.raises(InputError, match="there are no rewards to add up"):
        WeightedSum({})
    with pytest.raises(InputError, match="weight of a is nan"):
        WeightedSum({"a": (math.nan, hps)})
    images = [torch.zeros(3, 4, 4)] * 3
    for result in ([1.0], None, torch.zeros(2), ["x", "y", "z"]):
        with pytest.raises(InputError, match=r"reward b returned .* for 3 images"):
            WeightedSum({"a": (1, size), "b": (1, lambda images, prompts, result=result: result)}).score(images, "xyz")
    assert WeightedSum({"b": (2, lambda images, prompts: torch.ones(3, 1))})(images, "x").tolist() == [2, 2, 2]


# --- Files


def test_a_table_of_files(files: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    drawn = GeneratedImage(Image.new("RGB", (8, 8), "white"), "a white wall", 3, {}).save(tmp_path / "drawn.png")
    bare = tmp_path / "bare.png"
    Image.new("RGB", (8, 8)).save(bare)
    seen: list[tuple[str, tuple[int, ...]]] = []

    def words(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        seen.extend((prompt, tuple(image.shape)) for image, prompt in zip(images, prompts, strict=True))
        return [math.nan if prompt == "none" else len(prompt) for prompt in prompts]

    rewards = {"words": words, "light": brightness}
    table = score_files([*files, broken, drawn], rewards, [*PROMPTS, "x", None])
    assert [row.prompt for row in table.images] == [PROMPTS[2], PROMPTS[0], PROMPTS[1], "a white wall"]
    assert table.images[-1].scores == {"words": 12, "light": 1}
    assert seen[0] == (PROMPTS[0], tuple(read_image(files[0]).pixels.shape))
    assert [(path, reason) for path, reason, _ in table.left_out] == [(broken, "not_an_image")]
    assert table.means()["words"] == pytest.approx((15 + 14 + 12 + 12) / 4)

    table = score_files([*files, broken, drawn, bare, tmp_path / "absent.jpg"], rewards)
    assert [row.path for row in table.images] == [drawn]
    # What has no prompt for sure is not decoded, so that it may be broken besides.
    assert [reason for _, reason, _ in table.left_out] == [*["no_prompt"] * 5, "missing"]
    table = score_files([*files, bare], {"light": brightness})  # asks for no prompt
    assert len(table.images) == 4
    assert table.images[-1].path == bare
    assert not table.left_out

    table = score_files(files, rewards, ["long words", "none", "words"])
    assert [row.prompt for row in table.images] == ["long words", "words", "none"]
    assert [row["scores"]["words"] for row in table.rows()] == [10, 5, None]
    assert table.means()["words"] == 7.5

    with pytest.raises(InputError, match="2 prompts for 3 files"):
        score_files(files, rewards, ["a", "b"])
    with pytest.raises(InputError, match="there is no reward"):
        score_files(files, {})
    with pytest.raises(InputError, match=r"ends in .txt; give a name in .csv, .jsonl, .parquet"):
        table.save(tmp_path / "table.txt")
    saved = pyarrow.parquet.read_table(table.save(tmp_path / "table.parquet"))
    assert saved.column_names == ["rank", "words", "light", "path", "prompt"]
    assert saved["words"].to_pylist() == [10, 5, None]


def test_a_large_table_is_asked_in_batches(tmp_path: Path) -> None:
    paths = []
    for number in range(40):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (4 + number, 5), (6 * number,) * 3).save(paths[-1])
    counts: list[int] = []

    def light(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        counts.append(len(images))
        return [float(image.mean()) for image in images]

    table = score_files(paths, {"light": light}, "x")
    assert counts == [16, 16, 8]
    assert [row.path for row in table.images] == paths[::-1]
    np.testing.assert_allclose(
        [row.scores["light"] for row in table.images], np.arange(39, -1, -1) * 6 / 255, atol=1e-6
    )


def test_a_function_of_ones_own_that_fails_is_told_with_its_place() -> None:
    def broken(images: Any, prompts: Any) -> Any:
        return 1 / 0

    with pytest.raises(
        InputError, match=r"reward 'broken' failed at .*test_rewards_registry.py:\d+ \(ZeroDivisionError"
    ):
        as_reward(broken)([torch.zeros(3, 2, 2)], "x")
