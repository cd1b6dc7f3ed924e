"""A judge of answers behind an OpenAI-compatible endpoint, as EasyEdit's evaluation has one (``LLM-judge``)."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from easyedit_moe.errors import JudgeError

PROMPT = """You grade short answers. Given a question, the answer that is wanted and the answer that was given, decide \
whether the given answer says what the wanted one says. Other wording, case and added detail are fine. It is wrong if \
it says something else, contradicts the wanted answer, offers several answers of which only one is wanted, or rambles.

Question: {question}
Wanted answer: {target}
Given answer: {answer}

Reply with one word: CORRECT or INCORRECT."""
_VERDICT = re.compile(r"\b(in)?correct\b|^\W*([ab])\W*$", re.IGNORECASE)
_AGAIN = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class EndpointJudge:
    """Asks a served model, at temperature 0, whether an answer is right.

    Attributes:
        url: base of the endpoint, such as "http://localhost:8000/v1"; "/chat/completions" is added.
        model: name of the served model.
        api_key: sent as a bearer token where there is one; never shown.
        prompt: with {question}, {target} and {answer}.
        timeout: seconds per request.
        attempts: requests per question before giving up, while the endpoint is busy or not there.
        pause: seconds before the second attempt, doubled for each further one.
    """

    url: str
    model: str
    api_key: str = field(default="", repr=False)
    prompt: str = PROMPT
    timeout: float = 60.0
    attempts: int = 4
    pause: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise JudgeError(f"The judge's address must begin with http:// or https://; found {self.url!r}.")
        if not self.model.strip() or self.attempts < 1:
            raise JudgeError(f"A judge needs a model's name and an attempt; found {self.model!r}, {self.attempts}.")

    def __call__(self, question: str, target: str, answer: str) -> bool:
        """Whether the answer is right; an empty one is wrong, and not sent.

        Raises:
            JudgeError: the endpoint can't be reached, refuses, or gives no verdict.
        """
        if not answer.strip():
            return False
        texts = {"question": question, "target": target, "answer": answer}
        content = re.sub(r"\{(question|target|answer)\}", lambda found: texts[found[1]], self.prompt)
        said = self._ask({
            "model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}],
        })  # fmt: skip
        verdicts = list(_VERDICT.finditer(said))
        if not verdicts:
            raise JudgeError(f"The judge {self.model} answered neither CORRECT nor INCORRECT: {said[:200]!r}.")
        last = verdicts[-1]  # a model that thinks aloud comes to its verdict in the end
        return last[2].lower() == "a" if last[2] else last[1] is None

    def _ask(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        for attempt in range(1, self.attempts + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                if error.code not in _AGAIN or attempt == self.attempts:
                    said = error.read(300).decode("utf-8", "replace")
                    raise JudgeError(f"The judge at {address} refused with {error.code}: {said}") from error
            except (OSError, TimeoutError) as error:
                if attempt == self.attempts:
                    raise JudgeError(f"The judge at {address} can't be reached: {error}.") from error
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise JudgeError(
                    f"The judge at {address} did not reply as chat completions do ({error!r}). Is it the base of an "
                    "OpenAI-compatible endpoint, which mostly ends with /v1?"
                ) from error
            time.sleep(self.pause * 2 ** (attempt - 1))
        raise AssertionError("unreachable")  # the last attempt returns or raises
