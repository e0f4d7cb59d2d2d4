"""A reward that a server computes: detectors, OCR, large judges, what does not fit beside the model that is trained."""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmalign.checks import at_least, in_range
from mmalign.errors import InputError, ModelUnavailableError, reason_of

from .reward import Reward

__all__ = ["RemoteReward"]

_FIRST_WAIT = 0.5  # seconds before it is asked again, then twice as many each time
_PROBE = torch.full((3, 64, 64), 0.5), "a gray square"


class RemoteReward(Reward):
    """Scores of a server, which takes `POST {"images": [PNG in base64, ...], "prompts": [...]}`; no gradients.

    Its answer is `{"scores": [...]}`, a finite number for each image, a larger one for a better image. It may also say
    `"fingerprint": "..."`, some words that change with its weights, so that nobody goes on with another reward than
    they began with.

    Attributes:
        url: of the server.
        timeout: seconds without a word from it.
        batch_size: images at a time.
        retries: how often it is asked again where there is no connection, or its answer is a status of 500 or more.
    """

    def __init__(self, url: str, *, timeout: float = 60, batch_size: int = 16, retries: int = 5) -> None:
        """Ask the server to score a gray square, so that what is wrong shows before anything is drawn.

        Raises:
            InputError: no address of a server, or as `score`.
            ModelUnavailableError: as `score`.
        """
        in_range("timeout", timeout, 0.001)
        at_least("batch_size", batch_size)
        at_least("retries", retries, 0)
        self.url, self.timeout, self.batch_size, self.retries = url, timeout, batch_size, retries
        self.name, here = _checked_url(url)
        # A proxy that the environment names does not lead to this machine.
        self._opener = build_opener(ProxyHandler({})) if here else build_opener()
        self._told: Any = None
        self._score([_PROBE[0]], [_PROBE[1]], first=True)
        self.fingerprint = f"reward server {url}" + (f", {self._told}" if self._told else "")

    @torch.no_grad()
    def score(self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """Of each image, rounded to 256 levels; on the CPU.

        Raises:
            InputError: the server refuses what it is sent, its answer is not as it should be, or its fingerprint is
                another than before.
            ModelUnavailableError: it cannot be reached, does not answer in time, or fails.
        """
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            scores += self._score(images[batch], prompts[batch])
        return torch.tensor(scores, dtype=torch.float32)

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str], *, first: bool = False) -> list[float]:
        body = json.dumps({"images": [_png(image) for image in images], "prompts": list(prompts)}).encode()
        answer = self._read(self._ask(body))
        told = answer.get("fingerprint")
        if first:
            self._told = told
        elif None not in (told, self._told) and told != self._told:
            raise InputError(
                f"reward server {self.url} says that it is {told!r}, and was {self._told!r} before; start that again, "
                "or begin anew"
            )
        return self._numbers(answer["scores"], len(images))

    def _ask(self, body: bytes) -> bytes:
        """What the server answers, asked again where that may help."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = Request(self.url, data=body, headers=headers, method="POST")
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return response.read()
            except HTTPError as error:
                problem = self._refusal(error)
            except (URLError, HTTPException, OSError) as error:
                reason = error.reason if isinstance(error, URLError) else error
                if isinstance(reason, TimeoutError):
                    raise ModelUnavailableError(
                        f"reward server {self.url} said nothing for {self.timeout:g} s; raise timeout, lower "
                        "batch_size, or see what keeps it"
                    ) from None
                problem = (
                    f"reward server {self.url} cannot be reached ({reason_of(_exception(reason))}); start it, or mend "
                    "the address"
                )
        raise ModelUnavailableError(problem)

    def _refusal(self, error: HTTPError) -> str:
        """What to say of a status of 500 or more.

        Raises:
            InputError: it is another, and asking again will not help.
        """
        with error:
            try:
                words = reason_of(ValueError(error.read(2000).decode("utf-8", "replace") or str(error.reason)))
            except (OSError, HTTPException):
                words = str(error.reason)
        said = f"reward server {self.url} answered with status {error.code} ({words})"
        if error.code >= 500:
            return f"{said}; see its log, and start it again"
        raise InputError(f"{said}; mend the address, or what it takes") from None

    def _read(self, answer: bytes) -> dict[str, Any]:
        try:
            found = json.loads(answer)
        except ValueError:  # of JSON or of Unicode
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("scores"), list):
            words = reason_of(ValueError(answer[:2000].decode("utf-8", "replace") or "nothing"), 80)
            raise InputError(f'reward server {self.url} answered {words!r}; it must answer {{"scores": [...]}}')
        return found

    def _numbers(self, scores: list[Any], count: int) -> list[float]:
        if len(scores) != count:
            raise InputError(
                f"reward server {self.url} gave {len(scores)} scores for {count} images; it must give one each"
            )
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not _is_finite(score):
                raise InputError(f"reward server {self.url} gave the score {score!r}; it must give finite numbers")
        return [float(score) for score in scores]


def _checked_url(url: str) -> tuple[str, bool]:
    """Host and path for a name, and whether it is this machine."""
    example = "give one such as http://localhost:8080/score"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # the port raises where it is no number
    except ValueError as error:
        raise InputError(f"reward server {url!r} is no address ({reason_of(error)}); {example}") from None
    if parts.username is not None or parts.password is not None:
        raise InputError(f"the address of the reward server {host} has a user's name, which is not sent; leave it out")
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"reward server {url!r} is no address; {example}")
    return f"{parts.netloc}{parts.path}".rstrip("/"), host in ("localhost", "::1") or host.startswith("127.")


def _png(image: Float[Tensor, "3 height width"]) -> str:
    levels = (image.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(levels.cpu().numpy()).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _is_finite(score: float) -> bool:
    """In float32, which scores are kept in; a whole number of JSON can be beyond any float."""
    try:
        return math.isfinite(torch.tensor(float(score), dtype=torch.float32).item())
    except OverflowError:
        return False


def _exception(reason: Any) -> BaseException:
    return reason if isinstance(reason, BaseException) else ValueError(str(reason))
