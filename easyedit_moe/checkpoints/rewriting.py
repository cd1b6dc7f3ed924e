"""Files of a checkpoint written anew where some of its parameters change, and the others left alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from easyedit_moe.checkpoints import mxfp4
from easyedit_moe.checkpoints.naming import Row
from easyedit_moe.checkpoints.parameters import StoredParameters
from easyedit_moe.checkpoints.shards import INDEX, SINGLE, Checkpoint


class Rewriting:
    """Which files change when some parameters do, and their new versions, ready to be written into.

    Args:
        stored: the parameters as they are.
        changing: name and part of what will be written.
    """

    def __init__(self, stored: StoredParameters, changing: Sequence[tuple[str, Row]]) -> None:
        checkpoint = stored.checkpoint
        self.stored = stored
        self.modules = mxfp4.dense_modules(checkpoint, {name for name, _ in changing})
        tensors = {tensor for name, row in changing for tensor in stored.tensors(name, row)}
        shards = {checkpoint.tensors[tensor].file for tensor in tensors}
        self.shards = sorted(shards | mxfp4.changed_files(checkpoint, self.modules))

    @property
    def files(self) -> list[str]:
        """Names of all files that change."""
        if not self.modules:
            return self.shards
        return [*self.shards, "config.json", *([] if SINGLE in self.stored.checkpoint.files else [INDEX])]

    def start(self, source: Path, target: Path) -> StoredParameters:
        """Write the files into the folder ``target``, values as they are, and return the parameters in them.

        Edited MXFP4 layers are dense there. Files that do not change are read where they lie.
        """
        checkpoint = self.stored.checkpoint
        for file in self.shards:
            if self.modules:
                mxfp4.make_dense(checkpoint, self.modules, file, target / file)
            else:
                shutil.copyfile(checkpoint.files[file], target / file)
        if self.modules:
            (target / "config.json").write_text(mxfp4.dense_config(source, self.modules), encoding="utf-8")
        if INDEX in self.files:
            (target / INDEX).write_text(mxfp4.dense_index(source, checkpoint, self.modules), encoding="utf-8")
        new = {file: target / file if file in self.shards else path for file, path in checkpoint.files.items()}
        return StoredParameters(self.stored.names.of(Checkpoint(new)))
