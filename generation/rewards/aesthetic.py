"""LAION's aesthetic predictors: a linear head, or a stack of linear layers, on the image's CLIP vector.

The head of the standard predictor v2, `sac+logos+ava1-l14-linearMSE` of christophschuhmann/improved-aesthetic-predictor
(Apache-2.0), lies beside this module as aesthetic_v2.safetensors: it has no activation, and in evaluation mode is one
affine map, which is what the file holds. Its gradient with respect to the vector is the same everywhere, so that
training on it moves images in one direction; it is over-optimised soon.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import InputError, reason_of
from mmalign.fingerprint import tensor_digest

from .embedding import EmbeddingReward
from .scores import Activation, Layers, fold_linear_stack, linear_stack

if TYPE_CHECKING:
    from mmalign.encoders import Encoder
    from mmalign.imaging import ImagePreprocessing

__all__ = ["Aesthetic", "AestheticHead", "read_aesthetic_head"]

_BUNDLED = Path(__file__).with_name("aesthetic_v2.safetensors")
_REMEDY = (
    "give a head of LAION-AI/aesthetic-predictor (v1) or christophschuhmann/improved-aesthetic-predictor (v2) on GitHub"
)
_PARAMETER = re.compile(r"(?:module\.)?(?:layers\.(\d+)\.)?(weight|bias)")


class AestheticHead(NamedTuple):
    """Linear layers, first to last, as weight `out in` and bias `out`, and what is between them."""

    layers: Layers
    activation: Activation = None


class Aesthetic(EmbeddingReward):
    """How much people like an image, whatever the prompt: nominally 1 to 10, around 5 for photographs.

    Heads belong to an encoder: v2, and v1 of 768 numbers, to OpenAI's ViT-L/14 (`open_clip:ViT-L-14/openai`, with its
    QuickGELU), whose vectors have the same width as those of other ViT-L/14, where scores mean nothing.

    Attributes:
        head: in float32; without activation, folded to one layer.
    """

    uses_text = False

    def __init__(
        self,
        encoder: Encoder,
        head: AestheticHead | None = None,
        *,
        name: str = "aesthetic-v2",
        preprocessing: ImagePreprocessing | None = None,
    ) -> None:
        """Take an image encoder and a head, of `read_aesthetic_head`; by default the one of v2 that is bundled.

        Raises:
            InputError: the encoder takes no images, or its vectors are of another width than the head's.
        """
        super().__init__(encoder, preprocessing=preprocessing)
        head = head or read_aesthetic_head(_BUNDLED)
        width = head.layers[0][0].shape[1]
        if width != encoder.dim:
            raise InputError(
                f"the head of {name} takes {width} numbers and encoder {encoder.spec!r} gives {encoder.dim}; give the "
                "encoder it was fitted on, open_clip:ViT-L-14/openai for 768"
            )
        layers = [fold_linear_stack(head.layers)] if head.activation is None else head.layers
        head = AestheticHead([(weight.float(), bias.float()) for weight, bias in layers], head.activation)
        self.head, self.name = head, name
        if len(head.layers) == 1:  # |w . i| is at most |w|
            (weight, bias), *_ = head.layers
            middle, reach = float(bias), float(weight.norm())
            self.range = (middle - reach, middle + reach)
        digests = " ".join(tensor_digest(tensor) for layer in head.layers for tensor in layer)
        self.fingerprint = f"{name}, head {digests} {head.activation}, of {self.view}"

    def score_embeds(
        self, image_embeds: Float[Tensor, "n dim"], text_embeds: Float[Tensor, "n dim"] | None
    ) -> Float[Tensor, " n"]:
        """The head's number of each image."""
        layers = [(weight.to(image_embeds), bias.to(image_embeds)) for weight, bias in self.head.layers]
        return linear_stack(image_embeds, layers, activation=self.head.activation)


def read_aesthetic_head(file: str | os.PathLike[str]) -> AestheticHead:
    """A head from the state dict of a linear layer, or of a module with a sequence `layers`; .pth or .safetensors.

    The published heads with and without ReLU have layers of the same shapes. Their names tell: of the last two layers,
    which have no dropout between them, the numbers are next to each other unless there is an activation.

    Raises:
        InputError: no such file, one that holds more than tensors, or other layers than those of such a head.
    """
    path = Path(file)
    name = str(path)
    state = _state_dict(path)
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _PARAMETER.fullmatch(key)
        if not match or not isinstance(tensor, Tensor):
            raise InputError(f"aesthetic head {name!r} has {key!r}, which is no linear layer's; {_REMEDY}")
        layers.setdefault(int(match[1] or 0), {})[match[2]] = tensor
    numbers = sorted(layers)
    width: int | None = None
    for number in numbers:
        shapes = {kind: tuple(tensor.shape) for kind, tensor in layers[number].items()}
        weight = shapes.get("weight", ())
        if len(weight) != 2 or shapes.get("bias") != weight[:1] or width not in (None, weight[1]):
            raise InputError(f"aesthetic head {name!r} has a layer of shapes {shapes} that does not fit; {_REMEDY}")
        width = weight[0]
    if width != 1:
        raise InputError(f"aesthetic head {name!r} ends in {width} numbers, not one; {_REMEDY}")
    adjacent = len(numbers) < 2 or numbers[-1] - numbers[-2] == 1
    stack = [(layers[number]["weight"].double(), layers[number]["bias"].double()) for number in numbers]
    return AestheticHead(stack, None if adjacent else "relu")


def _state_dict(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"aesthetic head {str(path)!r} does not exist; {_REMEDY}") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"aesthetic head {str(path)!r} is damaged, or holds more than tensors and is not read, as it might run "
            f"code; {_REMEDY}"
        ) from None
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise InputError(f"aesthetic head {str(path)!r} cannot be read ({reason_of(error)}); {_REMEDY}") from None
    if not isinstance(state, dict) or not state:
        raise InputError(f"aesthetic head {str(path)!r} is no state dict; {_REMEDY}")
    return state
