"""What people add to the library, each without touching a module of it. README's "How to extend" shows these pieces.

`test_readme_shows_this_code` keeps the two equal.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from generation import generate
from generation.objectives import pair_errors
from generation.rewards import as_reward
from generation.training import DenoisingTrainer, TrainingConfig
from mmalign import Encoder, JoinedEncoder, load_encoder, register_source
from mmalign.encoders import write_weights
from mmalign.imaging import ImagePreprocessing
from retrieval import ImageIndex, register_index_type

if TYPE_CHECKING:
    from generation.rewards import Reward

README = Path(__file__).parents[1] / "README.md"


# --- A new encoder source


class TorchvisionEncoder(Encoder):
    source = "torchvision"

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        preprocessing = ImagePreprocessing(size=(224, 224), resize="shortest", resize_to=256, mean=mean, std=std)
        super().__init__(model, spec=f"torchvision:{name}", dim=1000, preprocessing=preprocessing)
        self.name = name

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}  # what changes the vectors besides weights and preprocessing

    def write(self, folder: Path) -> dict[str, Any]:
        write_weights(self.model.state_dict(), folder / "model.safetensors")
        return {"name": self.name}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Encoder:
        model = torchvision.models.get_model(config["name"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return cls(config["name"], model)


def load_torchvision(name: str) -> TorchvisionEncoder:
    return TorchvisionEncoder(name, torchvision.models.get_model(name, weights="DEFAULT"))


# register_source("torchvision", load_torchvision, summary="MODEL: images only")


def test_a_new_encoder_source(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.encoders import registry

    torch.manual_seed(0)
    model = torchvision.models.get_model("squeezenet1_1")
    monkeypatch.setattr(registry, "SOURCES", dict(registry.SOURCES))
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None: model)
    register_source("torchvision", load_torchvision, summary="MODEL: images only")
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(photos.glob("*.jpg"))[:8]:
        shutil.copy(path, folder)
    index, _ = ImageIndex.build(folder, encoder="torchvision:squeezenet1_1", dtype="float32")
    nearest = index.similar(next(iter(index)).id, k=7)

    # By hand, with torchvision's own transforms.
    transform = torchvision.transforms._presets.ImageClassification(crop_size=224, resize_size=256)
    paths = [item.path for item in index]
    from PIL import Image

    with torch.inference_mode():
        rows = normalize(model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])), dim=-1)
    expected = (rows[1:] @ rows[0]).sort(descending=True).values.numpy()
    np.testing.assert_allclose([hit.score for hit in nearest], expected, atol=2e-2)

    again = load_encoder(index.encoder.save(tmp_path / "saved"), device="cpu")
    assert again.fingerprint == index.encoder.fingerprint
    from mmalign.encoders.catalogue import overview

    assert any(line.startswith("torchvision:") and "images only" in line for line in overview())


# --- A new index type


def careful_graph(dim: int, rows: int) -> faiss.Index:
    index = faiss.IndexHNSWFlat(dim, 24, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200  # no factory string says this
    return index


register_index_type("careful_graph", careful_graph, parameters={"efSearch": 16})


def test_a_new_index_type(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3000, 32), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ImageIndex.from_vectors(vectors, tmp_path / "index", factory="careful_graph", recall=0.9)
    index = ImageIndex.open(tmp_path / "index")
    about = index.info()["faiss"]
    assert about["factory"] == "careful_graph"
    assert isinstance(faiss.downcast_index(index.snapshot.partition.faiss), faiss.IndexHNSW)
    assert about["parameters"]["efSearch"] >= 16
    queries = vectors[:50] + 0.3 * rng.standard_normal((50, 32), np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    _, found = index.search_vectors(queries, 10)
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)]) > 0.85
    index.add_vectors(vectors[:1] * -1)
    assert index.search(-vectors[0], 1)[0].score == pytest.approx(1, abs=1e-5)


# --- A new training objective


class HingeTrainer(DenoisingTrainer):
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        mse_w, mse_l = pair_errors(self.denoiser.predict(batch), self.denoiser.target(batch))
        return (mse_w - mse_l + 1).relu().mean(), {"mse_w": mse_w.detach(), "mse_l": mse_l.detach()}


def test_a_new_objective(photo_pairs: Path, tmp_path: Path) -> None:
    settings = {"resolution": 64, "rank": 4, "batch_size": 2, "accumulation": 1, "probe_size": 0, "device": "cpu"}
    config = TrainingConfig(data=photo_pairs, output=tmp_path / "run", model="tiny:sdxl", steps=2, **settings)
    report = HingeTrainer(config).train()
    assert report.step == 2
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in logged[-2:]:  # near 1 while winners and losers are alike: the hinge is open
        assert row["loss"] == pytest.approx(row["mse_w"] - row["mse_l"] + 1, abs=1e-4)
    drawn = [
        generate("a dog", model="tiny:sdxl", adapter=adapter, steps=1, seed=1, device="cpu")[0].image
        for adapter in (None, report.output / "export")
    ]
    assert np.asarray(drawn[0]).shape == np.asarray(drawn[1]).shape


# --- A new reward, and best of N


def contrast(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
    return [float(image.std()) for image in images]


def best_of(prompt: str, n: int, reward: Reward | Callable[..., Any], **options: Any) -> tuple[Any, np.ndarray]:
    images = generate(prompt, images_per_prompt=n, **options)
    scores = as_reward(reward)(images, prompt)
    return images[int(scores.argmax())], scores


def test_a_new_reward() -> None:
    best, scores = best_of("a dog", 3, contrast, model="tiny:sdxl", steps=1, seed=5, device="cpu")
    drawn = generate("a dog", images_per_prompt=3, model="tiny:sdxl", steps=1, seed=5, device="cpu")
    expected = [np.asarray(image.image, np.float64).std(ddof=1) / 255 for image in drawn]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert best.seed == drawn[int(np.argmax(expected))].seed


# --- Two encoders and a fitted head become one encoder


class LinearHead(JoinedEncoder):
    source = "linear_head"

    def join_images(self, features: Tensor) -> Tensor:
        return normalize(features, dim=-1) @ self.weights["map"]

    def join_texts(self, features: Tensor) -> Tensor:
        return normalize(features, dim=-1) - self.weights["centre"]


def fit_linear_head(
    image_encoder: Encoder, text_encoder: Encoder, images: Sequence[Path], texts: Sequence[str], ridge: float = 0.1
) -> LinearHead:
    x, y = (torch.from_numpy(rows) for rows in (image_encoder.encode_images(images), text_encoder.encode_texts(texts)))
    centre = y.mean(dim=0)
    gram = x.T @ x + ridge * torch.eye(x.shape[1])
    weights = {"map": torch.linalg.solve(gram, x.T @ (y - centre)), "centre": centre}
    return LinearHead(image_encoder, text_encoder, weights, dim=y.shape[1])


@pytest.mark.slow
def test_a_fitted_head_indexes_a_folder(
    bundled: Encoder, photos: Path, captions: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert isinstance(bundled, JoinedEncoder)
    seen, unseen = captions[:56], captions[56:]
    head = fit_linear_head(
        bundled.image_encoder,
        bundled.text_encoder,
        [photos / row["file"] for row in seen],
        [". ".join(row["captions"]) for row in seen],
    )
    folder = tmp_path / "unseen"
    folder.mkdir()
    for row in unseen:
        shutil.copy(photos / row["file"], folder)
    index, _ = ImageIndex.build(folder, encoder=head.save(tmp_path / "head"))
    queries = [(text, row["file"]) for row in unseen for text in row["captions"][:2]]
    found = [index.search(text, k=5) for text, _ in queries]
    recall = np.mean([file in [hit.path.name for hit in hits] for hits, (_, file) in zip(found, queries, strict=True)])
    assert recall > 0.5, "chance is 0.25"
    # In a process that does not know `LinearHead`, the folder says what is missing.
    assert "linear_head" in (tmp_path / "head" / "encoder.json").read_text()


# --- On the command line


def test_a_plugin_is_imported_first(
    command_line: Callable[..., Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.encoders import registry

    monkeypatch.setattr(registry, "SOURCES", dict(registry.SOURCES))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_mine.py").write_text(
        "from mmalign import load_encoder, register_source\n"
        "register_source('mine', lambda rest: load_encoder(rest), summary='NAME: like any other')\n"
    )
    assert "mine:" not in command_line("encoders").out
    shown = command_line("--plugin", "of_mine", "encoders")
    assert (shown.code, "mine:" in shown.out) == (0, True)
    missing = command_line("--plugin", "not_there", "encoders")
    assert missing.code == 1
    assert "'not_there' cannot be imported" in missing.err
    (tmp_path / "broken.py").write_text("import os\nnothing_of_the_kind\n")
    broken = command_line("--plugin", "broken.py", "encoders")
    assert broken.code == 1
    assert re.search(r"'broken.py' failed at .*broken\.py:2 \(NameError: .*nothing_of_the_kind", broken.err)


# --- README


def test_each_takes_less_than_thirty_lines() -> None:
    pieces: list[list[Any]] = [
        [TorchvisionEncoder, load_torchvision],
        [careful_graph],
        [HingeTrainer],
        [contrast, best_of],
        [LinearHead, fit_linear_head],
    ]
    for piece in pieces:
        assert sum(len(inspect.getsource(part).splitlines()) for part in piece) < 30


def test_readme_shows_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.encoders import encoder, registry
    from retrieval import index_types

    for module, table in ((registry, "SOURCES"), (encoder, "encoder_classes"), (index_types, "_REGISTERED")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    section = README.read_text(encoding="utf-8").partition("## How to extend")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 5
    here = inspect.getsource(sys.modules[__name__])
    for block in blocks:
        for piece in re.split(r"\n{2,}(?=class |def |register_)", textwrap.dedent(block).strip()):
            lines = [line for line in piece.splitlines() if not line.startswith(("from ", "import "))]
            assert "\n".join(lines).strip() in here, piece
        exec(block, {"__name__": "pasted"})  # with no more than it imports itself
