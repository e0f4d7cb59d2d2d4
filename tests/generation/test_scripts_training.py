"""What lies in scripts/ for training: settings that load, launch files that accelerate reads, usable pairs."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize(
    ("preset", "pairs", "checkpointing"), [("24gb", 4, True), ("48gb", 2, False), ("80gb", 4, False)]
)
def test_the_recipe_is_the_published_one_with_every_preset(preset: str, pairs: int, checkpointing: bool) -> None:
    from generation.methods import MaPOConfig
    from generation.training.configuration import load_config

    config = load_config(MaPOConfig, {"preset": preset}, SCRIPTS / "sdxl_mapo.yaml")
    assert (config.batch_size, config.gradient_checkpointing) == (pairs, checkpointing)
    assert config.batch_size * config.accumulation == 16
    # methods/mapo.md section 4
    assert (config.beta, config.snr_value, config.learning_rate, config.lr_schedule) == (0.1, 0.5, 1e-5, "constant")
    assert (config.steps, config.checkpoint_every, config.resolution, config.warmup_steps) == (2000, 500, 1024, 0)
    assert (config.adam_betas, config.weight_decay, config.max_grad_norm) == ((0.9, 0.999), 1e-2, 1.0)
    assert config.targets == ["to_q", "to_k", "to_v", "to_out.0"]
    assert config.alpha in (None, config.rank)
    assert config.validation_prompts


@pytest.mark.parametrize(
    ("name", "kind"), [("multi_gpu", "MULTI_GPU"), ("fsdp", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")]
)
def test_accelerate_reads_the_launch_files(name: str, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = SCRIPTS / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))  # refuses unknown top-level keys
    assert config.distributed_type.value == kind
    assert config.mixed_precision is None  # the trainer's own `dtype` says it
    # Nested keys are options of `accelerate launch`; it ignores those it does not know.
    options = vars(launch_command_parser().parse_args(["script.py"]))
    nested = {**(config.fsdp_config or {}), **(config.deepspeed_config or {})}
    assert set(nested) <= set(options)


def test_no_launch_file_is_left_untested() -> None:
    assert {file.stem for file in (SCRIPTS / "accelerate").iterdir()} == {"multi_gpu", "fsdp", "deepspeed_zero2"}


def test_photo_pairs_pass_the_data_check_and_losers_lack_detail(tmp_path: Path) -> None:
    from generation.data import check_data

    script = runpy.run_path(str(SCRIPTS / "photo_pairs.py"))
    assert script["make_pairs"](tmp_path, 6) == 6
    checked = check_data(tmp_path, progress=False)
    assert len(checked.examples) == 6
    assert not [problem for problem in checked.problems if problem.fatal]
    assert all(example.caption.strip() for example in checked.examples)
    for winner in (tmp_path / "winner").iterdir():
        assert detail(tmp_path / "loser" / winner.name) < 0.5 * detail(winner)


def detail(path: Path) -> float:
    """Mean difference of neighbouring pixels."""
    gray = np.asarray(Image.open(path).convert("L"), float)
    return float(np.abs(np.diff(gray, axis=0)).mean())


def test_the_benchmark_builds_sdxl_itself() -> None:
    import torch
    from diffusers import UNet2DConditionModel

    script: dict[str, Any] = runpy.run_path(str(SCRIPTS / "bench_training.py"))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**script["SDXL_UNET"])
    # methods/sdxl-training.md section 7
    assert sum(parameter.numel() for parameter in unet.parameters()) == script["SDXL_PARAMETERS"] == 2_567_463_684
    attention = [m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert sum(layer.in_features + layer.out_features for layer in attention) == 1_451_520
