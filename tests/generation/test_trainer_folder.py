"""What a run folder refuses and survives: other methods, damaged files, a damaged cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from generation import generate, load_pipeline
from generation.methods import MaPOConfig, MaPOTrainer, SupervisedConfig, SupervisedTrainer
from mmalign.errors import InputError
from mmalign.files import sha256_of

SMALL: dict[str, Any] = {
    "model": "tiny:sdxl", "resolution": 64, "steps": 2, "batch_size": 2, "accumulation": 1, "rank": 2,
    "checkpoint_every": 1, "probe_size": 0, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(photo_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of MaPO with a checkpoint after each; the cache lies beside it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    MaPOTrainer(MaPOConfig(**SMALL, data=str(photo_pairs), output=output, beta=0.3)).train()
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def go_on(run: Path, data: Path, **settings: Any) -> Any:
    return MaPOTrainer(
        MaPOConfig(**(SMALL | {"data": str(data), "output": run, "beta": 0.3, "steps": 3} | settings))
    ).train()


def test_another_method_does_not_take_over_a_run(run, photo_pairs):
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(InputError, match="method 'mapo' -> 'sft'"):
        SupervisedTrainer(SupervisedConfig(**SMALL, data=str(photo_pairs), output=run)).train()
    assert (run / "config.yaml").read_bytes() == before


def test_a_refused_run_leaves_settings_and_log_as_they_were(run, photo_pairs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(photo_pairs, other)
    lines = (other / "metadata.jsonl").read_text().splitlines()
    (other / "metadata.jsonl").write_text("\n".join(lines[:4]) + "\n")
    before = [(run / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")]
    with pytest.raises(InputError, match="not those that"):
        go_on(run, other)
    assert [(run / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")] == before


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer.json", "pytorch_lora_weights.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(name, run, photo_pairs):
    newest = run / "checkpoints" / "step-000002"
    for content in (b"", b"{bad", b"{}"):
        (newest / name).write_bytes(content)
        with pytest.raises(InputError, match=r"step-000002' is damaged .*delete it") as caught:
            go_on(run, photo_pairs)
        assert "\n" not in str(caught.value)
    shutil.rmtree(newest)
    assert go_on(run, photo_pairs).resumed_from == 1


def test_broken_settings_and_a_log_that_is_no_text_do_not_end_in_tracebacks(run, photo_pairs):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe{")
    assert go_on(run, photo_pairs).step == 3
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        go_on(run, photo_pairs, steps=4)


@pytest.mark.parametrize("kind", ["latents", "prompts"])
def test_a_cache_file_that_turned_bad_is_named_and_made_anew(kind, run, photo_pairs):
    for path in (run.parent / "cache" / kind).rglob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: torch.full_like(value, float("nan")) for name, value in tensors.items()}, path)
    named: list[str] = []
    while len(named) < 40:  # each run names one, which the next one makes anew
        try:
            report = go_on(run, photo_pairs)
            break
        except InputError as error:
            named.append(str(error))
    assert named
    assert all(f"/{kind}/" in message for message in named)
    assert report.step == 3


def test_a_finished_run_exports_the_same_bytes_again(run, photo_pairs):
    before = {path.name: sha256_of(path) for path in (run / "export").iterdir()}
    assert len(before) == 2
    for path in (run / "export").iterdir():
        path.unlink()
    assert go_on(run, photo_pairs, steps=2).resumed_from == 2
    assert {path.name: sha256_of(path) for path in (run / "export").iterdir()} == before


def test_a_yaml_of_another_method_is_refused(run):
    from generation.training.configuration import load_config

    assert yaml.safe_load((run / "config.yaml").read_text())["method"] == "mapo"
    assert load_config(MaPOConfig, {}, run / "config.yaml").beta == 0.3
    with pytest.raises(InputError, match="settings of 'mapo', not of 'sft'"):
        load_config(SupervisedConfig, {}, run / "config.yaml")


def test_a_full_fine_tune_is_drawn_with(photo_pairs, tmp_path):
    pipeline = load_pipeline("tiny:sdxl", device="cpu")
    settings = SMALL | {
        "adaptation": "full",
        "learning_rate": 1e-2,
        "data": str(photo_pairs),
        "output": tmp_path / "run",
    }
    (unet,) = MaPOTrainer(MaPOConfig(**settings), pipeline=pipeline).train().exported
    how = {"seed": 1, "steps": 2, "device": "cpu"}
    pipeline.unet.eval()
    (own,) = generate("a dog", model=pipeline, seed=1, steps=2)
    (loaded,) = generate("a dog", model="tiny:sdxl", unet=unet, **how)
    (base,) = generate("a dog", model="tiny:sdxl", **how)
    assert loaded.image.tobytes() == own.image.tobytes() != base.image.tobytes()
    with pytest.raises(InputError, match="has no UNet"):
        generate("a dog", model="tiny:sd3", unet=unet, **how)


def test_pictures_of_a_pipeline_that_has_changed_are_drawn_anew(tmp_path):
    pipeline = load_pipeline("tiny:sdxl", device="cpu")
    first, again = (generate("a dog", model=pipeline, seed=1, steps=2, out=tmp_path)[0] for _ in range(2))
    assert first.path == again.path
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(3)
    (changed,) = generate("a dog", model=pipeline, seed=1, steps=2, out=tmp_path)
    assert changed.path != first.path
    assert changed.image.tobytes() != first.image.tobytes()
