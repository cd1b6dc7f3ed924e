"""The checkpoint that an exported adapter goes on: what its files say, and whether they hold what was edited."""

from __future__ import annotations

from dataclasses import dataclass

from easyedit_moe import factworld
from easyedit_moe.checkpoints.history import read_history
from easyedit_moe.checkpoints.naming import CheckpointNames
from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.checkpoints.saving import source_folder
from easyedit_moe.checkpoints.shards import Checkpoint, read_json
from easyedit_moe.checkpoints.targets import check_applicable, targets_of
from easyedit_moe.errors import DataError
from easyedit_moe.moe.loading import quant_method
from easyedit_moe.patches.inspection import describe
from easyedit_moe.patches.weights import WeightPatch


@dataclass(frozen=True)
class ExportBase:
    """The checkpoint on which a patch was made, as far as it is at hand.

    Attributes:
        name: what others load it by: its hub name or folder; empty where nobody said.
        names: of its tensors; None where it is not at hand.
        architecture: class that its config.json names.
        quantised: as which it is stored; None where its weights are floats.
        compared: whether its weights were compared with those on which the patch was made.
    """

    name: str
    names: CheckpointNames | None = None
    architecture: str = ""
    quantised: str | None = None
    compared: bool = False

    @staticmethod
    def of(patch: WeightPatch, model: str, trust_remote_code: bool = False) -> ExportBase:
        """That which is named, else the one whose name the patch holds, if it is here.

        Raises:
            DataError: the named one can't be read, or has code of its own that is not trusted. PatchError: the patch
            does not fit it, or lies on it.
        """
        recorded = [str(name) for name in describe(patch)["models"]]
        name = model or next(iter(recorded), "")
        try:
            folder = source_folder(name) if name else None
        except DataError:
            if model:
                raise
            folder = None
        if folder is None:
            return ExportBase(name)
        settings = read_json(folder / "config.json")
        names = CheckpointNames(folder, Checkpoint.of_folder(folder), trust_remote_code)
        stored = StoredParameters(names)
        targets = targets_of(patch, names)
        compared = all(stored.dtype(target.parameter) == target.dtype for target in targets)
        if compared:
            check_applicable(patch, stored, targets, read_history(folder))
        if name == factworld.MODEL_NAME:
            name = str(folder)
        architecture = str(next(iter(settings.get("architectures") or []), type(names.model).__name__))
        return ExportBase(name, names, architecture, quant_method(settings), compared)

    def needed(self, why: str) -> CheckpointNames:
        """The names, or a DataError that says why they are needed."""
        if self.names is None:
            found = f"{self.name!r} is not on this machine" if self.name else "the patch names none"
            raise DataError(f"{why}, but {found}. Give --model: the checkpoint on which the patch was made.")
        return self.names
