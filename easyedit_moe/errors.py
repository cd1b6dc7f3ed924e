"""Typed errors and warnings. Each message says what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class EditingError(Exception):
    """Base class of every error that this package raises on purpose."""


class RequestError(EditingError, ValueError):
    """An edit request, or a set of them, that can't be used."""


class KeywordError(EditingError, TypeError):
    """A keyword that a call does not have, or one of EasyEdit's with a value that would be ignored."""


class HyperParamsError(EditingError, ValueError):
    """A hyper-parameter that is unknown, of the wrong type or out of range."""


class MethodError(EditingError, KeyError):
    """An unknown method name, or one that is registered twice."""

    def __str__(self) -> str:
        return str(self.args[0])


class LayoutError(EditingError, TypeError):
    """Experts whose storage this package does not know, so that it refuses to touch them."""


def offloaded(name: str) -> LayoutError:
    """The error for experts on the meta device, where accelerate leaves what it keeps elsewhere."""
    return LayoutError(
        f"{name}: the experts' weights are offloaded (on the meta device), so they can't be read or edited. Load the "
        "model with every layer that is edited on a GPU or on the CPU; other layers may be offloaded."
    )


class QuantizedExpertsError(LayoutError):
    """Experts stored in a quantised format, which can't take a float update."""


class DenseModelError(LayoutError):
    """A model without a single MoE layer."""


class LayerError(EditingError, ValueError):
    """Layers that are out of range, unsorted, repeated or dense."""


class NumericalError(EditingError, ArithmeticError):
    """A system that can't be solved, or a value that is not finite."""


def not_finite(symptom: str) -> NumericalError:
    """The error for a model that computes NaN or infinity; ``symptom`` says where it was seen."""
    return NumericalError(
        f"{symptom}: the model's weights are not finite, or its dtype overflows. Reload it, or load it in "
        "bfloat16 or float32."
    )


class CacheError(EditingError, ValueError):
    """A cached file that is corrupt, or was made for another model or other settings."""


class DamagedCacheError(CacheError):
    """A cached file that is cut off, or does not hold what was written; what it held can be made anew."""


class PatchError(EditingError, ValueError):
    """A patch that does not fit the model, or a file that is not a patch."""


class AlreadyAppliedError(PatchError):
    """A patch that is applied to a model which holds its edit already; nothing was written."""


class AdapterError(PatchError):
    """An adapter that does not fit the model, inputs it can't work on, or files that are no adapter."""


class CheckpointError(EditingError, ValueError):
    """A checkpoint folder that can't be read, edited or saved rightly; nothing was written."""


class DataError(EditingError, ValueError):
    """A data file that is missing or not in the expected layout."""


class HubError(EditingError, ConnectionError):
    """The hub of models and datasets can't be asked: there is no network, it is switched off, or it does not answer."""


class JudgeError(EditingError, OSError):
    """A judge of answers can't be reached, or does not judge."""


class WriteError(EditingError, OSError):
    """A file or folder that can't be written: no space, no permission, something in the way, or an impossible name."""


class HostError(EditingError, ImportError):
    """EasyEdit is not there, or is not the version that this package knows."""


class DependencyError(EditingError, ImportError):
    """An optional package that is missing; the message says how to install it."""


class EditingWarning(UserWarning):
    """Something the user should know, though the edit goes on."""


class KnownFactsWarning(EditingWarning):
    """Facts whose target was the model's answer before the edit."""


class TargetNotReachedWarning(EditingWarning):
    """A target that is not the most likely answer: with its target vector, or after training."""


class NoUpdateWarning(EditingWarning):
    """An edit after which every weight is what it was before."""


class RoundingWarning(NoUpdateWarning):
    """An update that the weights' dtype swallowed."""


class NullSpaceWarning(EditingWarning):
    """Experts that the facts are routed to, but whose null space leaves no direction for an update."""


class ResidualNotReachedWarning(EditingWarning):
    """An update that moved the hidden state less than half of the way that was wanted."""


class RidgeTooLargeWarning(ResidualNotReachedWarning):
    """As `ResidualNotReachedWarning`, because lambda_reg shrank the update."""


class LossUnchangedWarning(EditingWarning):
    """Training that left the loss about where it was."""


class CoverageWarning(EditingWarning):
    """Experts whose statistics rest on too few tokens."""


class CorpusNotComparedWarning(EditingWarning):
    """A dataset by name that could not be compared with the hub; what was found of it before is used."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    known = list(known)
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name[:200].lower(), list(folded), n=1, cutoff=0.5)
    return f" Did you mean '{folded[close[0]]}'?" if close else ""


class _Short(reprlib.Repr):
    """Bounded in length and depth, and without errors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 200, 120, 60

    def repr_int(self, x: int, level: int) -> str:
        """A number, or how long it is: Python refuses to write very long ones."""
        return super().repr_int(x, level) if abs(x) < 10**60 else f"a whole number of {x.bit_length()} bits"


_SHORT = _Short()


def shown(value: Any) -> str:
    """A value as a message has it: its ``repr`` on one line, cut short where it is long, deep, or refers to itself."""
    return " ".join(_SHORT.repr(value).split()) if not isinstance(value, str) else _SHORT.repr(value)
