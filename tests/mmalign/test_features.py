"""Features extracted layer by layer: equal to a loop by hand, cached by content, the same bits after any stop."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmalign import Encoder
from mmalign.encoders.states import TokenStates
from mmalign.errors import DamagedError, EncoderMismatchError, InputError, LockedError
from mmalign.features import Features, extract_features, extraction, load_features, store
from mmalign.imaging import DecodeSettings, ImagePreprocessing

TEXTS = [" ".join(f"word{(i * j) % 7}" for j in range(1 + (i * 5) % 9)) + f" {i}" for i in range(23)]


class BatchEncoder(Encoder):
    """Its numbers depend on what else is in the batch, so that batches of another composition show."""

    source: ClassVar[str] = "test-batch"

    def __init__(self, seed: int = 0) -> None:
        model = nn.Linear(48, 5)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(model.bias)
        preprocessing = ImagePreprocessing(size=(4, 4), resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
        super().__init__(model, spec=f"test:{seed}", dim=5, preprocessing=preprocessing)
        self.passes: list[int] = []
        self.before: Callable[[], None] = lambda: None

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return self._features(pixel_values.flatten(1))

    def text_features(self, texts: Sequence[str]) -> Tensor:
        bytes_of = [hashlib.sha256(text.encode()).digest() + bytes(16) for text in texts]
        return self._features(torch.tensor([list(data) for data in bytes_of]) / 255)

    def _features(self, inputs: Tensor) -> Tensor:
        self.before()
        self.passes.append(len(inputs))
        return self.model(inputs + inputs.mean(dim=0))

    def layer_count(self, modality: str) -> int:
        return 2

    def tap_images(
        self, pixel_values: Tensor, layers: Sequence[int], *, features: bool
    ) -> tuple[Tensor, list[TokenStates]]:
        return self._tapped(self.image_features(pixel_values), layers)

    def tap_texts(self, texts: Sequence[str], layers: Sequence[int], *, features: bool) -> tuple[Tensor, Any]:
        return self._tapped(self.text_features(texts), layers)

    def _tapped(self, output: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[TokenStates]]:
        tokens = torch.stack([output, 2 * output], dim=1)
        content = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return output, [TokenStates(torch.cat([tokens + layer] * (layer + 1), dim=2), content) for layer in layers]

    def describe(self) -> dict[str, Any]:
        return {}

    def write(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> BatchEncoder:
        raise NotImplementedError


def draw_images(folder: Path, count: int, *, bad: Sequence[int] = ()) -> list[Path]:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for number, path in enumerate(paths):
        if number in bad:
            path.write_bytes(b"no image")
        else:
            Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path)
    return paths


def same(ours: Features, theirs: Features) -> None:
    """Bit for bit."""
    assert list(ours.layers) == list(theirs.layers)
    for layer, rows in theirs.layers.items():
        assert ours[layer].dtype == rows.dtype
        assert ours[layer].tobytes() == np.ascontiguousarray(rows).tobytes()
    assert (ours.content, ours.skipped, ours.encoder) == (theirs.content, theirs.skipped, theirs.encoder)
    assert (ours.modality, ours.pooling) == (theirs.modality, theirs.pooling)
    assert np.array_equal(ours.usable, theirs.usable)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what the numbers are


@torch.inference_mode()
def test_equal_to_a_loop_by_hand(tiny_clip: Encoder, photos: Path) -> None:
    paths = sorted(photos.glob("*.jpg"))[:7]
    features = extract_features(tiny_clip, paths, modality="image", layers=[-1, "output", 0], batch_size=3)
    assert list(features.layers) == [1, "output", 0]
    assert (len(features), features.modality, features.pooling) == (7, "image", "cls")
    assert features.usable.all()
    assert features.content == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    for start in range(0, 7, 3):
        batch = torch.stack([tiny_clip.load_image(path)[1] for path in paths[start : start + 3]])
        model: Any = tiny_clip.model.vision_model
        states = model(pixel_values=batch, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            np.testing.assert_array_equal(features[layer][start : start + 3], states[layer + 1][:, 0].numpy())
        np.testing.assert_array_equal(features["output"][start : start + 3], tiny_clip.image_features(batch).numpy())
    mean = extract_features(tiny_clip, paths[:3], modality="image", layers=1, pooling="mean")
    batch = torch.stack([tiny_clip.load_image(path)[1] for path in paths[:3]])
    states = model(pixel_values=batch, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(mean[1], states[2][:, 1:].mean(dim=1).numpy(), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_texts_of_any_length(tiny_sentence: Any, captions: list[dict[str, Any]]) -> None:
    texts = [text for row in captions[:6] for text in row["captions"]]
    features = extract_features(tiny_sentence, texts, layers="all", batch_size=4)
    assert (features.modality, features.pooling, list(features.layers)) == ("text", "mean", [0, 1, 2])
    assert features.content[3] == hashlib.sha256(texts[3].encode()).hexdigest()
    for row in (0, 11, 29):
        tokens = tiny_sentence.tokenize([texts[row]])
        states = tiny_sentence.model(**tokens, output_hidden_states=True).hidden_states
        for layer in range(3):
            np.testing.assert_allclose(features[layer][row], states[layer][0].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_one_pass_a_batch_and_equal_items_once(tmp_path: Path) -> None:
    encoder, paths = BatchEncoder(), draw_images(tmp_path, 5)
    twice = [paths[0], paths[1], paths[0].read_bytes(), paths[2], paths[1], paths[3], paths[4], paths[0]]
    features = extract_features(encoder, twice, modality="image", layers=["output", 0, 1], batch_size=2)
    assert encoder.passes == [2, 2, 1]
    once = extract_features(encoder, paths, modality="image", layers=["output", 0, 1], batch_size=2)
    for layer in ("output", 0, 1):
        np.testing.assert_array_equal(features[layer], once[layer][[0, 1, 0, 2, 1, 3, 4, 0]])  # type: ignore[index]
    assert features.content[0] == features.content[2] == features.content[7] != features.content[1]
    cached = extract_features(
        encoder, twice, modality="image", layers=["output", 0, 1], batch_size=2, cache=tmp_path / "c"
    )
    same(cached, features)


def test_images_without_files(tmp_path: Path) -> None:
    encoder, (path, other) = BatchEncoder(), draw_images(tmp_path, 2)
    pixels = np.asarray(Image.open(path))
    forms = [Image.open(path), pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1), np.asarray(Image.open(other))]
    features = extract_features(encoder, forms, modality="image")
    assert features.content[0] == features.content[1] == features.content[2] != features.content[3]
    assert encoder.passes == [2]
    wanted = extract_features(encoder, [path, other], modality="image")
    np.testing.assert_array_equal(features["output"], wanted["output"][[0, 0, 0, 1]])
    assert extract_features(encoder, [pixels.reshape(5, 6, 3)], modality="image").content[0] != features.content[0]


@pytest.mark.parametrize("cached", [False, True])
def test_what_cannot_be_read_is_a_row_of_zeros(tmp_path: Path, cached: bool) -> None:
    paths = draw_images(tmp_path / "in", 8, bad=[2, 3, 6])
    paths.insert(5, tmp_path / "gone.png")
    paths.append(paths[2])
    cache = tmp_path / "cache" if cached else None
    encoder = BatchEncoder()
    features = extract_features(encoder, paths, modality="image", layers="all", batch_size=2, cache=cache)
    assert np.flatnonzero(~features.usable).tolist() == [2, 3, 5, 7, 9]
    assert [(entry["row"], entry["reason"]) for entry in features.skipped] == [
        (2, "not_an_image"),
        (3, "not_an_image"),
        (5, "missing"),
        (7, "not_an_image"),
        (9, "not_an_image"),
    ]
    assert features.skipped[2]["name"] == str(tmp_path / "gone.png")
    assert "gone.png" in features.skipped[2]["message"]
    for layer in (0, 1):
        assert not features[layer][~features.usable].any()
        assert features[layer][features.usable].any(axis=1).all()
    # 2, 3, 7 and 9 have the same bytes and are looked at once
    assert encoder.passes == [2, 1, 1, 1]
    with pytest.raises(InputError, match=r"none of the 2 images can be read; the first: .*002"):
        extract_features(BatchEncoder(), paths[2:4], modality="image", cache=cache)


def test_half_precision_on_disk(tmp_path: Path) -> None:
    full = extract_features(BatchEncoder(), TEXTS, modality="text")
    half = extract_features(BatchEncoder(), TEXTS, modality="text", store_dtype="float16", cache=tmp_path)
    assert half["output"].dtype == np.float16
    np.testing.assert_array_equal(half["output"], full["output"].astype(np.float16))
    large = BatchEncoder()
    large.model.weight.data *= 1e6
    with pytest.raises(InputError, match="layer 'output' of text 0 is not finite in float16; store_dtype 'float32'"):
        extract_features(large, TEXTS, modality="text", store_dtype="float16")
    large.model.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="layer 0 of text 0 is not finite in float32"):
        extract_features(large, TEXTS, modality="text", layers=[0])


# --- the cache


def test_what_is_there_is_loaded(tmp_path: Path) -> None:
    paths, cache = draw_images(tmp_path / "in", 9, bad=[4]), tmp_path / "cache"
    wanted = extract_features(BatchEncoder(), paths, modality="image", layers="all", batch_size=4)
    options: dict[str, Any] = {"modality": "image", "layers": "all", "batch_size": 4, "cache": cache}
    first = extract_features(BatchEncoder(), paths, **options)
    same(first, wanted)
    assert isinstance(first[0], np.memmap)
    encoder = BatchEncoder()
    again = extract_features(encoder, paths, **options)
    assert encoder.passes == []
    same(again, wanted)
    assert again.folder == first.folder
    assert again.folder is not None
    same(load_features(again.folder), wanted)
    # The same content elsewhere is the same features; all else is others.
    moved = [path.rename(tmp_path / f"moved-{path.name}") for path in paths]
    assert extract_features(encoder, moved, **options).folder == first.folder
    assert encoder.passes == []
    changes: list[dict[str, Any]] = [
        {"layers": [0]},
        {"batch_size": 3},
        {"store_dtype": "float16"},
        {"decode": DecodeSettings(tolerate_truncation=True)},
    ]
    folders = {extract_features(encoder, moved, **{**options, **change}).folder for change in changes}
    folders.add(extract_features(BatchEncoder(1), moved, **options).folder)
    folders.add(extract_features(encoder, moved[::-1], **options).folder)
    draw_images(tmp_path / "other", 1)[0].rename(moved[4])
    folders.add(extract_features(encoder, moved, **options).folder)
    assert len(folders - {first.folder}) == 7


def test_another_encoder_is_refused() -> None:
    features = extract_features(BatchEncoder(), TEXTS, modality="text")
    features.require_encoder(BatchEncoder())
    with pytest.raises(EncoderMismatchError, match=r"'test:0' \(fingerprint \w{12}\), not of 'test:1' \(fing"):
        features.require_encoder(BatchEncoder(1))
    load_features(features["output"]).require_encoder(BatchEncoder(1))


class Killed(BaseException):
    """Nothing is written once it was raised, as after SIGKILL."""


def killed_at(step: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the durable action number `step`, and all after it, raise; returns the names of those that took place."""
    taken: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def action(*arguments: Any, **named: Any) -> Any:
            if len(taken) == step:
                raise Killed
            taken.append(name)
            return real(*arguments, **named)

        return action

    for name in ("fsync", "replace", "unlink"):
        patch.setattr(os, name, counted(name, getattr(os, name)))
    return taken


@pytest.mark.parametrize("kind", ["image", "text"])
def test_stopped_at_any_action_it_ends_in_the_same_bits(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    data: list[Any] = TEXTS[:11] if kind == "text" else [*draw_images(tmp_path / "in", 10, bad=[4, 7]), tmp_path / "x"]
    data.append(data[1])
    options: dict[str, Any] = {"modality": kind, "layers": [0, "output"], "batch_size": 3}
    wanted = extract_features(BatchEncoder(), data, **options)
    with monkeypatch.context() as patch:
        actions = killed_at(-1, patch)
        same(extract_features(BatchEncoder(), data, cache=tmp_path / "whole", **options), wanted)
    assert len(actions) > 20
    saved = set()
    for step in range(len(actions)):
        cache = tmp_path / str(step)
        with monkeypatch.context() as patch:
            killed_at(step, patch)
            with pytest.raises(Killed):
                extract_features(BatchEncoder(), data, cache=cache, **options)
        (folder,) = cache.iterdir()
        if (folder / store.RECORD).exists():
            record = json.loads((folder / store.RECORD).read_text())
            if record["done"] < record["items"]:
                with pytest.raises(InputError, match=r"has not ended \(\d+ of \d+ items\); run it again"):
                    load_features(folder)
            else:
                same(load_features(folder), wanted)
        encoder = BatchEncoder()
        same(extract_features(encoder, data, cache=cache, **options), wanted)
        assert files_of(folder).keys() == files_of(wanted_folder(tmp_path / "whole")).keys(), "no litter"
        saved.add(len(encoder.passes))
    assert saved >= {0, 1, 2, 3}, "what was recorded is not computed again"


def wanted_folder(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def test_rows_reach_the_disk_before_the_record_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(extraction, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    real_fsync, real_replace = os.fsync, os.replace
    synced: set[str] = set()
    counted: list[int] = []

    def fsync(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == store.RECORD:
            assert synced >= {"layer-0.npy", "output.npy", Path(source).name}
            counted.append(json.loads(Path(source).read_text())["done"])
            rows = np.load(Path(target).parent / "output.npy")
            assert rows[: counted[-1]].any(axis=1).all()
            synced.clear()
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    extract_features(BatchEncoder(), TEXTS, modality="text", layers=[0, "output"], batch_size=5, cache=tmp_path)
    assert counted == [5, 10, 15, 20, 23]


@pytest.mark.parametrize("encoder_name", ["tiny_sentence", "tiny_clip"])
def test_a_stopped_run_of_a_real_encoder(
    encoder_name: str, request: pytest.FixtureRequest, photos: Path, captions: list[dict[str, Any]], tmp_path: Path
) -> None:
    encoder: Encoder = request.getfixturevalue(encoder_name)
    texts = [text for row in captions[:5] for text in row["captions"]]
    data: list[Any] = texts if encoder_name == "tiny_sentence" else sorted(photos.glob("*.jpg"))[:14]
    modality: Any = "text" if encoder_name == "tiny_sentence" else "image"
    options: dict[str, Any] = {"modality": modality, "layers": "all", "batch_size": 4}
    wanted = extract_features(encoder, data, **options)
    tap, calls = encoder.tap_texts if modality == "text" else encoder.tap_images, 0

    def stopping(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return tap(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, f"tap_{modality}s", stopping)
        with pytest.raises(KeyboardInterrupt):
            extract_features(encoder, data, cache=tmp_path, **options)
        assert json.loads((wanted_folder(tmp_path) / "features.json").read_text())["done"] == 8, "Ctrl-C saves"
        same(extract_features(encoder, data, cache=tmp_path, **options), wanted)
    assert calls == 3 + -(-(len(data) - 8) // 4)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    wanted = extract_features(BatchEncoder(), TEXTS, modality="text", batch_size=4)
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"cannot be written .*No space left.*make room .*a rerun continues"):
            extract_features(BatchEncoder(), TEXTS, modality="text", batch_size=4, cache=tmp_path)
    with pytest.raises(InputError, match="has not ended"):
        load_features(wanted_folder(tmp_path))
    encoder = BatchEncoder()
    same(extract_features(encoder, TEXTS, modality="text", batch_size=4, cache=tmp_path), wanted)
    assert 0 < len(encoder.passes) < 6


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """A file size limit: what is written fails, though making the sparse files did not."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "import test_features as t; from mmalign.errors import InputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "encoder = t.BatchEncoder(); real = t.store.FeatureWriter.write\n"
        "def write(*arguments):\n"
        "    real(*arguments); resource.setrlimit(resource.RLIMIT_FSIZE, (1, -1))\n"
        "t.store.FeatureWriter.write = write\n"
        "try: t.extract_features(encoder, t.TEXTS, modality='text', batch_size=4, cache=sys.argv[1])\n"
        "except InputError as error: print(error)\n"
    )
    done = run_python(code, str(tmp_path))
    assert "make room" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(InputError):
        load_features(wanted_folder(tmp_path))
    wanted = extract_features(BatchEncoder(), TEXTS, modality="text", batch_size=4)
    same(extract_features(BatchEncoder(), TEXTS, modality="text", batch_size=4, cache=tmp_path), wanted)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    encoder = BatchEncoder()
    inner: list[str] = []

    def meanwhile() -> None:
        encoder.before = lambda: None
        with pytest.raises(LockedError, match="another process is extracting these features"):
            extract_features(BatchEncoder(), TEXTS, modality="text", cache=tmp_path)
        inner.append("refused")

    encoder.before = meanwhile
    extract_features(encoder, TEXTS, modality="text", cache=tmp_path)
    assert inner == ["refused"]
    with filelock.FileLock(wanted_folder(tmp_path) / store.LOCK, timeout=0):  # it is free, and loading needs none
        extract_features(BatchEncoder(), TEXTS, modality="text", cache=tmp_path)


def test_a_file_that_changes_on_the_way(tmp_path: Path) -> None:
    paths = draw_images(tmp_path / "in", 9)
    encoder = BatchEncoder()

    def once(change: Callable[[], Any]) -> None:
        encoder.before = lambda: None
        change()

    for change, message in ((lambda: paths[8].write_bytes(b"other"), "has changed"), (paths[8].unlink, "run again")):
        encoder.before = lambda change=change: once(change)  # type: ignore[misc]
        with pytest.raises(InputError, match=message):
            extract_features(encoder, paths, modality="image", batch_size=1, workers=1, cache=tmp_path / message)


# --- what is loaded


@pytest.mark.parametrize("victim", ["features.json", "content.txt", "layer-0.npy", "output.npy"])
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_damage_is_named_and_mended_by_a_rerun(tmp_path: Path, victim: str, how: str) -> None:
    options: dict[str, Any] = {"modality": "text", "layers": [0, "output"], "cache": tmp_path}
    extract_features(BatchEncoder(), TEXTS, **options)
    path = wanted_folder(tmp_path) / victim
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    kind = InputError if (victim, how) == ("features.json", "missing") else DamagedError
    with pytest.raises(kind, match=victim):
        load_features(path.parent)
    encoder = BatchEncoder()
    same(
        extract_features(encoder, TEXTS, **options),
        extract_features(BatchEncoder(), TEXTS, modality="text", layers=[0, "output"]),
    )
    assert encoder.passes == [23]


def test_folders_of_other_things(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no features.json; extract features there first"):
        load_features(tmp_path)
    folder = extract_features(BatchEncoder(), TEXTS, modality="text", cache=tmp_path).folder
    assert folder is not None
    with pytest.raises(InputError, match=f"give one of the folders in it: {folder.name}"):
        load_features(tmp_path)
    record = folder / "features.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 99}))
    with pytest.raises(InputError, match=r"format 99.*pip install -U mmalign"):
        load_features(folder)
    record.write_text("[]")
    with pytest.raises(DamagedError, match="remove the folder"):
        load_features(folder)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_table_of_ones_own(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_BLOCK_BYTES", 100)  # several blocks
    table = np.random.default_rng(0).normal(size=(40, 6)).astype(dtype)
    np.save(tmp_path / "x.npy", table)
    for source in (tmp_path / "x.npy", str(tmp_path / "x.npy"), table):
        features = load_features(source)
        np.testing.assert_array_equal(features["output"], table)
        assert features.content == [hashlib.sha256(row.tobytes()).hexdigest() for row in table]
        assert (features.encoder, features.modality, features.pooling) == (None, None, None)
        assert features.usable.all()
        assert len(features) == 40
    assert isinstance(load_features(tmp_path / "x.npy")["output"], np.memmap)
    table[[3, 9, 11, 17, 30, 39], 2] = [np.nan, np.inf, -np.inf, np.nan, np.nan, np.nan]
    with pytest.raises(InputError, match=r"NaN or infinity in 6 of 40 rows \(3, 9, 11, 17, 30, ...\)"):
        load_features(table)
    with pytest.raises(InputError, match="layer is 3; these features hold 'output'"):
        _ = features[3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 4), int), r"\(3, 4\) of int64; give a table of floats"),
        (np.zeros(3), r"\(3,\) of float64"),
        (np.zeros((0, 4)), r"\(0, 4\)"),
        (np.array([{}]), "cannot be read"),
        (b"no array", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_features(path)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (TEXTS, {}, "takes images and texts; give modality"),
        (TEXTS, {"modality": "sound"}, "modality is 'sound'"),
        (TEXTS, {"modality": "text", "layers": 2}, "layer is 2"),
        (TEXTS, {"modality": "text", "layers": ["last"]}, "layer is 'last'"),
        (TEXTS, {"modality": "text", "layers": []}, "layers is empty"),
        (TEXTS, {"modality": "text", "pooling": "mean"}, "'output' is pooled already"),
        (TEXTS, {"modality": "text", "pooling": "max", "layers": [0]}, "pooling is 'max'"),
        (TEXTS, {"modality": "image", "pooling": "cls", "layers": [0]}, "no class token; give 'mean'"),
        (TEXTS, {"modality": "text", "workers": 2}, "decode and workers are for images"),
        (TEXTS, {"modality": "text", "device": "cpu"}, "loaded already, so device would do nothing"),
        (TEXTS, {"modality": "text", "batch_size": 0}, "batch_size is 0"),
        (TEXTS, {"modality": "text", "store_dtype": "int8"}, "store_dtype is 'int8'"),
        (["a", " "], {"modality": "text"}, "text 1 is ' '"),
        ([], {"modality": "text"}, "no items"),
        ("a photo", {"modality": "text"}, "data is one str; give a list"),
    ],
)
def test_arguments_that_do_not_fit(data: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        extract_features(BatchEncoder(), data, cache=tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot be written .*choose another cache"):
        extract_features(BatchEncoder(), TEXTS, modality="text", cache=tmp_path / "file")


def test_one_layer_and_some_rows(tmp_path: Path) -> None:
    paths = draw_images(tmp_path, 6, bad=[4])
    features = extract_features(BatchEncoder(), paths, modality="image", layers=[0, "output"], cache=tmp_path / "c")
    assert list(features.only("output").layers) == ["output"]
    assert (features.only("output").pooling, features.only(0).pooling) == (None, "mean")
    some = features.take(np.array([4, 1]))
    for layer in (0, "output"):
        np.testing.assert_array_equal(some[layer], features[layer][[4, 1]])  # type: ignore[index]
    assert some.content == [features.content[4], features.content[1]]
    assert some.usable.tolist() == [False, True]
    assert [(entry["row"], entry["name"]) for entry in some.skipped] == [(0, str(paths[4]))]
    assert load_features(some) is some


# --- kills of a real process


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2])))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def extract_and_die(folder: Path, cache: Path, step: int) -> int:
    """Extract in a child that kills itself before its durable action number `step`; how it ended."""
    child = os.fork()
    if child == 0:
        taken = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def action(*arguments: Any, **named: Any) -> Any:
                nonlocal taken
                if taken == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                taken += 1
                return real(*arguments, **named)

            return action

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        extraction.SECONDS_BETWEEN_CHECKPOINTS = -1
        code = 1
        try:
            paths = sorted(folder.iterdir())
            extract_features(BatchEncoder(), paths, modality="image", layers="all", batch_size=3, cache=cache)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def extract_and_die_everywhere(folder: Path, caches: Path) -> None:
    """Until a step is beyond the last action. Nothing runs before the forks, so that no thread can be lost by them."""
    for name in ("torch._dynamo", "torchvision.transforms.v2.functional", "PIL.Image", "timm", "open_clip"):
        with contextlib.suppress(ImportError):  # what the children would import one after the other
            import_module(name)
    Image.init()
    for step in itertools.count():
        status = extract_and_die(folder, caches / f"{step:02}", step)
        print(status, flush=True)
        if status != -signal.SIGKILL:
            return


@pytest.mark.slow
def test_killed_before_every_durable_action(tmp_path: Path) -> None:
    paths = draw_images(tmp_path / "in", 13, bad=[5])
    wanted = extract_features(BatchEncoder(), paths, modality="image", layers="all", batch_size=3)
    code = (
        "import sys; from pathlib import Path; import test_features as t\n"
        "t.extract_and_die_everywhere(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    done = run_python(code, str(tmp_path / "in"), str(tmp_path / "caches"))
    *killed, last = done.stdout.split()
    assert (set(killed), last) == ({str(-signal.SIGKILL)}, "0"), done.stderr
    assert len(killed) > 15
    for cache in sorted((tmp_path / "caches").iterdir()):
        features = extract_features(BatchEncoder(), paths, modality="image", layers="all", batch_size=3, cache=cache)
        same(features, wanted)
    same(load_features(wanted_folder(cache)), wanted)
