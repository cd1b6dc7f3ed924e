"""The small trained Qwen3-MoE that ships with the package, its facts, its records and its corpus."""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "factworld"
"""The ``model_name`` that stands for the bundled model in hparams files and on the command line."""

_HERE = Path(__file__).parent


def model_path() -> Path:
    """Folder of the bundled model: config, tokenizer and bfloat16 safetensors."""
    return _HERE / "model"


def data_path(name: str) -> Path:
    """A bundled data file: ``counterfact.json``, ``easyedit.json``, ``corpus.txt`` or ``facts.json``."""
    return _HERE / "data" / name
