"""Rewards of a server: what is sent, what is taken, and what is said of everything that can go wrong."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from generation.rewards import RemoteReward, load_reward, load_rewards
from generation.rewards.registry import REWARDS
from mmalign.errors import InputError, ModelUnavailableError

Answer = tuple[int, bytes]


def brightness(asked: dict[str, Any]) -> dict[str, Any]:
    images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in asked["images"]]
    assert all(image.format == "PNG" and image.mode == "RGB" for image in images)
    return {"scores": [float(np.asarray(image).mean()) / 255 for image in images]}


class Server:
    """A reward server in a thread; `answers` are given in turn, then `rule` answers."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[Answer | Callable[[BaseHTTPRequestHandler], None]] = []
        self.rule: Callable[[dict[str, Any]], dict[str, Any]] = brightness
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(asked)
                outer.headers.append(dict(self.headers))
                answer = outer.answers.pop(0) if outer.answers else (200, json.dumps(outer.rule(asked)).encode())
                if callable(answer):
                    answer(self)
                    return
                self.send_response(answer[0])
                self.end_headers()
                self.wfile.write(answer[1])

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"

    def reward(self, **settings: Any) -> RemoteReward:
        """Made while the server is well; what the probe asked is forgotten."""
        held, self.answers = self.answers, []
        reward = RemoteReward(self.url, **settings)
        self.answers = held
        self.asked.clear()
        return reward


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("generation.rewards.remote._FIRST_WAIT", 0.001)
    running = Server()
    thread = threading.Thread(target=running.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.http.shutdown()
    running.http.server_close()


def images(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 8 + i, 12, generator=generator) for i in range(count)]


def test_images_and_prompts_arrive_and_scores_come_back(server: Server) -> None:
    reward = server.reward(batch_size=2)
    pictures, prompts = images(5), ["a", "b", "ein Bär, 熊", "d", "e"]
    scores = reward.score([picture.requires_grad_() for picture in pictures], prompts)
    assert (scores.dtype, scores.device.type, scores.requires_grad) == (torch.float32, "cpu", False)
    levels = [(picture * 255).round() for picture in pictures]
    torch.testing.assert_close(scores, torch.stack([level.mean() / 255 for level in levels]).detach())
    assert [len(asked["images"]) for asked in server.asked] == [2, 2, 1]
    assert [prompt for asked in server.asked for prompt in asked["prompts"]] == prompts
    sent = Image.open(io.BytesIO(base64.b64decode(server.asked[1]["images"][1])))
    assert np.array_equal(np.asarray(sent), levels[3].permute(1, 2, 0).detach().byte().numpy())
    assert server.headers[-1]["Content-Type"] == "application/json"
    assert not reward.differentiable
    assert reward.uses_text
    assert reward.name == server.url.removeprefix("http://")
    assert reward.score([], []).tolist() == []


def test_a_proxy_of_the_environment_does_not_come_between(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert len(server.reward().score(images(1), ["a"])) == 1


def test_it_is_known_by_its_address_and_by_what_it_says_of_itself(server: Server) -> None:
    assert server.reward().fingerprint == f"reward server {server.url}"
    server.rule = lambda asked: {**brightness(asked), "fingerprint": "judge-7b, step 200"}
    reward = server.reward()
    assert reward.fingerprint == f"reward server {server.url}, judge-7b, step 200"
    assert len(reward.score(images(2), ["a", "b"])) == 2
    server.rule = brightness  # it need not say it again
    assert len(reward.score(images(2), ["a", "b"])) == 2
    server.rule = lambda asked: {**brightness(asked), "fingerprint": "judge-7b, step 400"}
    with pytest.raises(InputError, match="says that it is 'judge-7b, step 400', and was 'judge-7b, step 200' before"):
        reward.score(images(1), ["a"])


# -- what goes wrong -----------------------------------------------------------------------------------------------


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut_short(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [')


@pytest.mark.parametrize("trouble", [(500, b"busy"), (503, b"starting"), hang_up, cut_short])
def test_it_is_asked_again_where_that_helps_and_not_for_ever(server: Server, trouble: Any) -> None:
    reward = server.reward(retries=2)
    server.answers = [trouble] * 2
    assert len(reward.score(images(1), ["a"])) == 1
    assert len(server.asked) == 3
    server.answers = [trouble] * 3
    with pytest.raises(ModelUnavailableError, match=r"see its log|start it") as caught:
        reward.score(images(1), ["a"])
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 6
    reward = server.reward(retries=0)
    server.answers = [trouble]
    with pytest.raises(ModelUnavailableError):
        reward.score(images(1), ["a"])
    assert len(server.asked) == 1


def test_waits_grow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("generation.rewards.remote._FIRST_WAIT", 0.5)
    monkeypatch.setattr("generation.rewards.remote.time.sleep", waits.append)
    reward = server.reward(retries=3)
    server.answers = [(502, b"")] * 4
    with pytest.raises(ModelUnavailableError, match="status 502"):
        reward.score(images(1), ["a"])
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, b"no such\n page"), r"status 404 \(no such page\); mend the address, or what it takes"),
        ((422, b'{"detail": "images is missing"}'), r'status 422 \(\{"detail": "images is missing"\}\)'),
        ((413, b""), "status 413"),
        ((200, b"<html>Welcome"), "answered '<html>Welcome'; it must answer"),
        ((200, b""), "answered 'nothing'"),
        ((200, b"\xff\xfe"), "it must answer"),
        ((200, b"[0.5]"), r"answered '\[0.5\]'"),
        ((200, b'{"scores": 0.5}'), "it must answer"),
        ((200, b'{"rewards": [0.5]}'), "it must answer"),
        ((200, b'{"scores": [0.5, 1]}'), "gave 2 scores for 1 images; it must give one each"),
        ((200, b'{"scores": []}'), "gave 0 scores for 1 images"),
        ((200, b'{"scores": [NaN]}'), "gave the score nan; it must give finite numbers"),
        ((200, b'{"scores": [-Infinity]}'), "gave the score -inf"),
        ((200, b'{"scores": [1e39]}'), "gave the score 1e"),  # not finite in float32
        ((200, b'{"scores": [1' + b"0" * 400 + b"]}"), "finite numbers"),
        ((200, b'{"scores": [null]}'), "gave the score None"),
        ((200, b'{"scores": ["0.5"]}'), "gave the score '0.5'"),
        ((200, b'{"scores": [true]}'), "gave the score True"),
        ((200, b'{"scores": [[0.5]]}'), "gave the score"),
    ],
)
def test_answers_that_are_not_scores_are_refused_at_once(server: Server, answer: Answer, words: str) -> None:
    reward = server.reward()
    server.answers = [answer]
    with pytest.raises(InputError, match=words) as caught:
        reward.score(images(1), ["a"])
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)
    assert len(server.asked) == 1
    server.answers = [answer]
    with pytest.raises(InputError, match=words):  # and before a training run begins
        RemoteReward(server.url)


def test_a_server_that_says_nothing_is_given_up(server: Server) -> None:
    reward = server.reward(timeout=0.1)
    release = threading.Event()
    server.answers = [lambda handler: release.wait(5) and None]
    with pytest.raises(ModelUnavailableError, match=r"said nothing for 0\.1 s; raise timeout"):
        reward.score(images(1), ["a"])
    assert len(server.asked) == 1
    release.set()


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generation.rewards.remote._FIRST_WAIT", 0.001)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score"
        with pytest.raises(ModelUnavailableError, match=r"cannot be reached \(Connection refused\); start it"):
            RemoteReward(url)


@pytest.mark.parametrize(
    "url",
    ["http://", "http:score", "ftp://host/score", "http://host:port/", "http://ho st/", "http://höst/", "http://h/\n"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="no address") as caught:
        RemoteReward(url)
    assert "\n" not in str(caught.value)


def test_passwords_are_not_taken_nor_repeated() -> None:
    with pytest.raises(InputError, match="leave it out") as caught:
        RemoteReward("http://me:secret@localhost/score")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"batch_size": 0}, {"retries": -1}])
def test_settings_out_of_range_are_refused(server: Server, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(settings))} is"):
        RemoteReward(server.url, **settings)


# -- by its address ------------------------------------------------------------------------------------------------


def test_an_address_is_a_spec_with_a_weight_or_without(server: Server) -> None:
    assert isinstance(load_reward(server.url), RemoteReward)
    pictures = images(2)
    plain = load_rewards([server.url])(pictures, "a")
    np.testing.assert_allclose(load_rewards([f"{server.url}=0.5"])(pictures, "a"), plain / 2, rtol=1e-6)
    both = load_rewards([f"{server.url}=2", "redness"])
    redness = load_reward("redness")(pictures, "a")
    np.testing.assert_allclose(both(pictures, "a"), 2 * plain + redness, rtol=1e-5)
    assert both.fingerprint is not None
    assert server.url in both.fingerprint
    # The last field of an address keeps its number.
    for spec, weight in (
        (f"{server.url}?model=2", 1),
        (f"{server.url}?a=b&model=2=3", 3),
        (f"{server.url}?x=1=0.5", 0.5),
    ):
        np.testing.assert_allclose(load_rewards([spec])(pictures, "a"), weight * plain, rtol=1e-6)
    assert {"http", "https"} <= set(REWARDS)
    with pytest.raises(ModelUnavailableError, match="cannot be reached"):
        load_reward("https://127.0.0.1:9/score")


def test_the_command_line_scores_by_a_server(server: Server, command_line: Any, photos: Path, tmp_path: Path) -> None:
    files = sorted(photos.glob("*.jpg"))[:3]
    result = command_line("score", *files, "--prompt", "a photo", "--reward", server.url, "--json", "--quiet")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in result.out.splitlines()]
    for row in rows:
        with Image.open(row["path"]) as image:
            expected = np.asarray(image.convert("RGB")).mean() / 255
        assert row["scores"][server.url.removeprefix("http://")] == pytest.approx(expected, abs=1e-3)
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert [asked["prompts"] for asked in server.asked[1:]] == [["a photo"] * 3]
    listed = command_line("score", "--list")
    assert "http://HOST:PORT/PATH" in listed.out
    server.answers = [(500, b"out of memory")] * 6
    failed = command_line("score", *files, "--prompt", "a photo", "--reward", server.url)
    assert failed.code != 0
    assert "status 500 (out of memory)" in " ".join(failed.err.split())
