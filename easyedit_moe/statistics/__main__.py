"""Statistics of the critical layers ahead of an edit, alone or shared between processes, such as one per GPU.

``torchrun --nproc-per-node 8 -m easyedit_moe.statistics Global/qwen3-30b-a3b`` fills the cache for later edits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from easyedit_moe.errors import HyperParamsError
from easyedit_moe.hparams import SolverHyperParams, load_hyperparams
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.statistics.distributed import process_group
from easyedit_moe.statistics.gather import layer_statistics


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect the statistics of an hparams file, alone or as one process of ``torchrun``."""
    parser = argparse.ArgumentParser(prog="python -m easyedit_moe.statistics", description=__doc__)
    parser.add_argument("hparams", help="YAML file, or a name that ships with the package such as MoTE/factworld")
    parser.add_argument("--stats-dir", help="folder of cached statistics, instead of the file's")
    options = parser.parse_args(arguments)
    hparams = load_hyperparams(options.hparams, **({"stats_dir": options.stats_dir} if options.stats_dir else {}))
    if not isinstance(hparams, SolverHyperParams):
        raise HyperParamsError(f"{hparams.alg_name} needs no statistics.")
    with process_group() as local_rank:
        on_gpus = torch.device(hparams.device).type == "cuda" if isinstance(hparams.device, str) else True
        device = f"cuda:{local_rank}" if on_gpus and local_rank is not None else hparams.device
        model, tok = load_model(
            hparams.model_name,
            hparams.dtype,
            device,
            hparams.model_parallel,
            trust_remote_code=hparams.trust_remote_code,
        )
        view = MoELayerView(model, site=hparams.site)
        view.require(hparams.layers)
        layer_statistics(view, tok, hparams, hparams.layers, model_fingerprint(view))


if __name__ == "__main__":
    main()
