"""Where a model's files are: bundled, in a folder, in the hub's cache, or on the hub, which is asked once, briefly."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from easyedit_moe import factworld
from easyedit_moe.errors import DataError
from easyedit_moe.storage.files import is_folder, path_of

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that the hub has to answer."""


@dataclass(frozen=True)
class Source:
    """What transformers is told about a model's place.

    Attributes:
        name: folder or hub name.
        local_files_only: whether the network is left alone.
    """

    name: str
    local_files_only: bool


def find_source(model_name: str) -> Source:
    """Where to read a model from, without waiting for a network that is not there.

    Args:
        model_name: hub name, folder, or "factworld" for the bundled model.

    Raises:
        DataError: no name at all, a folder that does not exist, or a model of the hub that is not in the cache while
            the hub does not answer.
    """
    path = path_of(model_name, "the model", DataError)
    model_name = model_name if isinstance(model_name, str) else str(path)
    if model_name == factworld.MODEL_NAME:
        return Source(str(factworld.model_path()), True)
    if is_folder(model_name):
        return Source(model_name, False)
    if _is_path(model_name):
        raise DataError(f"The model {model_name!r} can't be loaded: there is no such folder.")
    cached = _is_cached(model_name)
    reason = why_unreachable()
    if reason is not None:
        if cached:
            return Source(model_name, True)
        raise DataError(
            f"The model {model_name!r} can't be loaded: it is no folder here, it is not in the hub's cache, and "
            f"{reason}. Give the folder of a downloaded checkpoint."
        )
    return Source(model_name, False)


def why_unreachable() -> str | None:
    """Why the hub can't be asked, in words; None where it answers."""
    if constants.HF_HUB_OFFLINE or is_switched_on("HF_HUB_OFFLINE"):
        return "HF_HUB_OFFLINE is set"
    return None if hub_answers() else f"{constants.ENDPOINT} does not answer"


def is_switched_on(variable: str) -> bool:
    """Whether a variable of the environment says yes, as the hub's client reads it."""
    return os.environ.get(variable, "").upper() in constants.ENV_VARS_TRUE_VALUES


def hub_answers(seconds: float = PATIENCE) -> bool:
    """Whether the hub answers at all within some seconds; one try."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()  # an answer, if no friendly one
        except OSError as error:
            # Certificates of the user's own are transformers' business; somebody did answer.
            if isinstance(getattr(error, "reason", error), ssl.SSLError):
                answered.set()
            logger.debug("The hub does not answer: %s", error)

    # Resolving a name can't be given a time limit, so it is waited for from outside.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _is_cached(model_name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(model_name, "config.json"), str)
    except HFValidationError as error:
        raise DataError(f"The model {model_name!r} can't be loaded: no folder, and no hub name: {error}") from error


def _is_path(model_name: str) -> bool:
    return model_name.startswith((".", "/", "~")) or model_name.count("/") > 1 or "\\" in model_name
