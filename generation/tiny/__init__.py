"""Pipelines of a few hundred thousand random weights with the block layouts of the full models, built without a hub.

For tests and dry runs: what they draw means nothing, but every tensor has the name and the role it has in the full
model, so adapters, caches, checkpoints and exports meet the same keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["TINY_FAMILIES", "tiny_pipeline"]

TINY_FAMILIES = ("sdxl", "sd15", "sd3", "flux")


def tiny_pipeline(family: str = "sdxl", *, seed: int = 0, deep: bool = False) -> DiffusionPipeline:
    """A complete pipeline of about half a million float32 weights on the CPU; it draws 64 x 64 pixels by default.

    Weights are a function of `seed` alone and the global random state is left as it was. They are scaled so that the
    denoiser answers noise with unit variance, latents times the VAE's scaling factor have unit variance, and different
    prompts and seeds give visibly different pictures. Built in under a second.

    Args:
        family: sdxl, sd15, sd3 (3.5 medium's layout, with the T5 encoder) or flux (the guidance-distilled one).
        seed: of the weights.
        deep: for sdxl the full model's number of transformer blocks at each resolution, (1, 2, 10), instead of
            (1, 1, 2); the other families have one size.

    Raises:
        InputError: another family.
    """
    import torch

    if family == "sdxl":
        from .stable_diffusion import build_sdxl as build
    elif family == "sd15":
        from .stable_diffusion import build_sd15 as build
    elif family == "sd3":
        from .transformers import build_sd3 as build
    elif family == "flux":
        from .transformers import build_flux as build
    else:
        raise InputError(f"there is no tiny pipeline {family!r}; there are {', '.join(TINY_FAMILIES)}")
    # The constructors draw weights that are replaced; on the CPU only, so no other generator is touched.
    with torch.random.fork_rng(devices=[]):
        return build(torch.Generator().manual_seed(seed), deep)
