"""Datasets by name: their rows, streamed by ``datasets``, and the revision that would be read now."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from easyedit_moe.errors import DataError, HubError
from easyedit_moe.moe.hub import PATIENCE, is_switched_on, why_unreachable

logger = logging.getLogger(__name__)

_ALIASES = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}


@dataclass(frozen=True)
class NamedDataset:
    """What ``datasets.load_dataset`` is told of a dataset: where it is, which configuration (None: its own choice), and
    which split.
    """

    path: str
    config: str | None
    split: str = "train"

    @property
    def place(self) -> tuple[str, ...]:
        """All three as texts."""
        return self.path, self.config or "", self.split


def named_dataset(name: str) -> NamedDataset:
    """The dataset that a name means; "wikipedia" and "wikitext" are short for the usual ones."""
    return NamedDataset(*_ALIASES.get(name, (name, None)))


def dataset_rows(name: str) -> Generator[Any]:
    """The rows of a dataset by name, streamed: no more is read than is taken.

    Raises:
        DataError: ``datasets`` is not installed, or knows no such dataset, or breaks off.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"The dataset {name!r} is neither a file nor a folder, and reading it by name needs "
            "`pip install datasets`; 'generated', the model's own samples, needs nothing."
        ) from error
    dataset = named_dataset(name)
    try:
        yield from load_dataset(dataset.path, dataset.config, split=dataset.split, streaming=True)
    except Exception as error:  # datasets raises many types here, from connection errors to its own
        raise DataError(
            f"The dataset {name!r} is neither a file, a folder nor a dataset that could be loaded "
            f"({type(error).__name__}: {error}). Give a text file, a folder or 'generated' "
            "(the model's own samples) instead."
        ) from error


def dataset_revision(dataset: NamedDataset) -> str | None:
    """The commit of a dataset on the hub; where the hub can't be asked, that of what ``datasets`` has prepared of it
    here, which is then what it reads.

    None where the hub answers that it knows no such dataset.

    Raises:
        HubError: the hub can't be asked, and nothing is prepared here.
    """
    reason = "HF_DATASETS_OFFLINE is set" if is_switched_on("HF_DATASETS_OFFLINE") else why_unreachable()
    if reason is None:
        try:
            return HfApi().dataset_info(dataset.path, timeout=PATIENCE).sha
        except (RepositoryNotFoundError, HFValidationError) as error:
            logger.debug("The hub knows no dataset %s: %s", dataset.path, error)
            return None
        except Exception as error:  # its client raises those of several libraries
            reason = f"{type(error).__name__}: {error}"
    prepared = _prepared_revision(dataset)
    if prepared is None:
        raise HubError(f"The hub can't be asked for the revision of the dataset {dataset.path}: {reason}.")
    return prepared


def _prepared_revision(dataset: NamedDataset) -> str | None:
    """The commit that ``datasets`` has whole on this machine, if any: the one that it falls back on."""
    try:
        from datasets.packaged_modules.cache.cache import Cache

        name = dataset.path.rpartition("/")[2]
        found = Cache(
            repo_id=dataset.path, dataset_name=name, config_name=dataset.config, version="auto", hash="auto"
        ).hash
    except Exception as error:  # not installed, nothing prepared, or a version of datasets that has no such class
        logger.debug("Nothing is prepared of the dataset %s: %s", dataset.path, error)
        return None
    return str(found)
