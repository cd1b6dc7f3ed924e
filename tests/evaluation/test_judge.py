"""The judge's endpoint, against a local server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from easyedit_moe.errors import JudgeError
from easyedit_moe.evaluation.judge import EndpointJudge


class Endpoint:
    def __init__(self) -> None:
        self.replies: list[tuple[int, Any]] = []
        self.seen: list[tuple[str, dict[str, Any], str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, body, self.headers.get("Authorization")))
                code, content = outer.replies.pop(0)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def says(self, *texts: str) -> None:
        self.replies += [(200, {"choices": [{"message": {"content": text}}]}) for text in texts]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_it_asks_as_chat_completions_do(endpoint: Endpoint) -> None:
    endpoint.says("CORRECT")
    judge = EndpointJudge(endpoint.url + "/", "m", "secret")
    assert judge("Where is {answer}?", "Rome", "in Rome") is True
    ((path, body, key),) = endpoint.seen
    assert (path, body["model"], body["temperature"], key) == ("/v1/chat/completions", "m", 0, "Bearer secret")
    content = body["messages"][0]["content"]
    assert "Question: Where is {answer}?" in content, "braces of a text are text"
    assert "Wanted answer: Rome\nGiven answer: in Rome" in content
    assert "secret" not in repr(judge)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("CORRECT", True), ("incorrect.", False), ("A", True), (" (B)", False),
        ("It could be CORRECT, but it names two towns: INCORRECT", False), ("The answer is correct.", True),
    ],
)  # fmt: skip
def test_verdicts(endpoint: Endpoint, said: str, right: bool) -> None:
    endpoint.says(said)
    assert EndpointJudge(endpoint.url, "m")("q", "t", "a") is right
    assert endpoint.seen[0][2] is None


def test_an_empty_answer_is_wrong_and_not_sent(endpoint: Endpoint) -> None:
    assert EndpointJudge(endpoint.url, "m")("q", "t", " ") is False
    assert endpoint.seen == []


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.replies += [(503, {}), (429, {})]
    endpoint.says("CORRECT")
    assert EndpointJudge(endpoint.url, "m", pause=0.001)("q", "t", "a")
    assert len(endpoint.seen) == 3


@pytest.mark.parametrize(
    ("code", "content", "match"),
    [
        (401, {"error": "no key"}, "refused with 401.*no key"),
        (503, {}, "refused with 503"),
        (200, b"<html>", "did not reply as chat completions do"),
        (200, {"choices": []}, "base of an OpenAI-compatible endpoint"),
        (200, {"choices": [{"message": {"content": "maybe"}}]}, "neither CORRECT nor INCORRECT: 'maybe'"),
    ],
)
def test_failures_are_told(endpoint: Endpoint, code: int, content: Any, match: str) -> None:
    endpoint.replies.append((code, content))
    with pytest.raises(JudgeError, match=match):
        EndpointJudge(endpoint.url, "m", attempts=1)("q", "t", "a")


def test_no_endpoint() -> None:
    with pytest.raises(JudgeError, match="can't be reached"):
        EndpointJudge("http://127.0.0.1:9", "m", attempts=2, pause=0.001)("q", "t", "a")
    for values in (("ftp://x", "m"), ("file:///etc", "m"), ("http://x", " ")):
        with pytest.raises(JudgeError):
            EndpointJudge(*values)
