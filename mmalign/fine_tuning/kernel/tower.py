"""Which weights of an encoder are trained: its image tower, all of it or through a LoRA that is merged in the end."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ...encoders import Encoder
from ...errors import InputError
from .recipe import Recipe

__all__ = ["Tower"]


class Tower:
    """Makes the image tower of an encoder trainable, and nothing else; the text tower keeps its weights bit for bit.

    The encoder stays in evaluation mode: no dropout, and running statistics of batch norms as they are, so that the
    first step starts from the original features.

    Attributes:
        parameters: what is trained, by name.
    """

    def __init__(self, encoder: Encoder, recipe: Recipe) -> None:
        """Takes an encoder on the device to train on, in float32.

        Raises:
            InputError: it has no image tower to train, cannot checkpoint its gradients though asked to, or LoRA finds
                nothing to attach to or peft is not installed.
        """
        self.encoder = encoder
        module = encoder.image_module
        if module is None or not any(True for _ in module.parameters()):
            raise InputError(f"encoder {encoder.spec!r} has no image tower that could be trained; give another")
        encoder.model.requires_grad_(False)
        self._lora: Any = None
        if recipe.adaptation == "lora":
            self._attach(module, recipe)
        else:
            module.requires_grad_(True)
        if recipe.gradient_checkpointing:
            _checkpoint_gradients(encoder, module)
        self.parameters = {name: weight for name, weight in encoder.model.named_parameters() if weight.requires_grad}

    def _attach(self, module: nn.Module, recipe: Recipe) -> None:
        if find_spec("peft") is None:
            raise InputError("peft is not installed; run: pip install 'mmalign[train]', or give adaptation 'full'")
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        inside = {id(part) for part in module.modules()}
        attention = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
        covered = {id(part) for one in attention for part in one.modules()} - {id(one) for one in attention}
        names = [
            name
            for name, part in self.encoder.model.named_modules()
            if id(part) in inside and id(part) not in covered and _takes_lora(part)
        ]
        if not names:
            raise InputError(f"a LoRA finds no layer in the image tower of {self.encoder.spec!r}; give adaptation full")
        rank = recipe.rank or 16
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self._lora = LoraModel(self.encoder.model, config, "default")
        for one in attention:
            _keep_exact(self._lora, one)

    def weights(self) -> dict[str, Tensor]:
        """What training changes."""
        return {name: weight.detach() for name, weight in self.parameters.items()}

    def finish(self) -> None:
        """Merge a LoRA into the weights, and leave an encoder like any other."""
        if self._lora is not None:
            self._lora.merge_and_unload()
        self.encoder.model.requires_grad_(True)
        self.encoder.model.eval()


def _keep_exact(lora: Any, attention: Any) -> None:
    """Give a layer its frozen weights back after each pass.

    peft adds what is trained to them and subtracts it again, which leaves other last bits every time.
    """
    around = next((part for part in lora.modules() if getattr(part, "base_layer", None) is attention), None)
    if around is None:  # of separate projections: not adapted
        return
    kept = [weight.detach().clone() for weight in (attention.in_proj_weight, attention.out_proj.base_layer.weight)]

    def restore(*_: Any) -> None:
        for weight, original in zip(
            (attention.in_proj_weight, attention.out_proj.base_layer.weight), kept, strict=True
        ):
            weight.data.copy_(original)

    around.register_forward_hook(restore)


def _takes_lora(part: nn.Module) -> bool:
    if isinstance(part, nn.MultiheadAttention):
        return part._qkv_same_embed_dim
    if isinstance(part, nn.Conv2d):  # of convolutional networks those that mix channels alone
        return part.kernel_size == (1, 1) and part.groups == 1
    return isinstance(part, nn.Linear)


def _checkpoint_gradients(encoder: Encoder, module: nn.Module) -> None:
    """By the towers' own means; those of transformers ask whether their layers are in training mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import PreTrainedModel

    done = False
    part: Any
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part.supports_gradient_checkpointing:
            # The old name, before transformers 5.23, warns from then on.
            enable = getattr(part, "activation_checkpointing_enable", None) or part.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            for layer in part.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True  # of the layer alone: what is in it stays in evaluation mode
            done = True
        elif hasattr(part, "set_grad_checkpointing") and not done:
            part.set_grad_checkpointing(True)
            done = True
    if not done:
        raise InputError(
            f"the image tower of {encoder.spec!r} cannot checkpoint its gradients; leave out gradient_checkpointing"
        )
