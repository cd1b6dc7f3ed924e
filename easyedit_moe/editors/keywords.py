"""EasyEdit's further keywords: which are taken, which are refused and why, and what is not a keyword at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from easyedit_moe.errors import KeywordError, did_you_mean

_SCORES = "it is of EasyEdit's own scores, which edit of an editor by EasyEdit's BaseEditor.from_hparams reports"

WITHOUT_EFFECT: Mapping[str, str] = {
    "keep_original_weight": "the original tensors are returned in any case",
    "return_orig_weights": "the original tensors are returned in any case",
}
"""Keywords of EasyEdit that are taken with any value, and why they change nothing."""

REASONS: Mapping[str, tuple[Any, str]] = {
    "copy": (False, "the model is edited in place: give the editor a copy.deepcopy of it instead"),
    "test_generation": (False, f"{_SCORES}; generate_edit reports answers"),
    "eval_metric": ("exact match", _SCORES),
    "metric_kwargs": (None, _SCORES),
    "pre_edit": (None, _SCORES),
    "pre_file": (None, _SCORES),
    "train_ds": (None, "it holds the demonstrations of EasyEdit's IKE"),
    "loc_prompts": (None, "it is of EasyEdit's WISE: give texts to be scored as locality_inputs"),
    "cache_template": (None, "target vectors are cached in the folder target_cache_dir of the hparams"),
    "evaluation_type": (None, f"{_SCORES}; generate_edit reports answers"),
    "api_key": (None, f"{_SCORES}, where evaluation_type='LLM-judge' has a served model judge answers"),
    "use_chat_template": (False, "set chat: true in the hparams, for edits and scores alike"),
}
"""Keywords of EasyEdit that are taken with the value they have by default, and why not with others."""


def check_keywords(call: str, given: Mapping[str, Any], taken: Collection[str], own: Collection[str] = ()) -> None:
    """Refuse keywords that would be ignored.

    Args:
        call: its name, for the message.
        given: what was passed beyond the call's own parameters.
        taken: further keywords that have an effect.
        own: the call's own parameters, which a misspelt name may have meant.

    Raises:
        KeywordError: an unknown keyword, with the nearest known one, or one of EasyEdit's with a value that can't be
            followed, with the reason.
    """
    for name, value in given.items():
        if name in taken or name in WITHOUT_EFFECT:
            continue
        if name not in REASONS:
            nearest = did_you_mean(name, [*own, *taken, *WITHOUT_EFFECT, *REASONS])
            raise KeywordError(f"{call} has no keyword {name!r}.{nearest}")
        default, reason = REASONS[name]
        if value is not None and not (isinstance(value, (bool, int, str)) and value == default):
            raise KeywordError(f"{call} can't take {name}={value!r:.60}: {reason}.")
