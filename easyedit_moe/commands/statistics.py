"""``easyedit-moe statistics``."""

from __future__ import annotations

from easyedit_moe.commands import options
from easyedit_moe.commands.printing import say, show_rows
from easyedit_moe.commands.reporting import shows_progress


def statistics(
    model: options.Model = "factworld",
    method: options.Method = "",
    hparams: options.HParams = None,
    settings: options.Settings = None,
    stats_dir: options.StatsDir = "",
    dtype: options.DType = "",
    device: options.Device = "",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Gather and cache what edits need of the unedited model, so that edit starts at once.

    An interrupted run goes on where it was. The plan command says how large and how long. Several GPUs share the work
    with: torchrun --nproc-per-node 8 -m easyedit_moe.statistics HPARAMS
    """
    from easyedit_moe.workflow.statistics import statistics as run

    given = options.settings_of(
        settings, stats_dir=stats_dir, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    found = run(model, method, hparams, given, shows_progress())
    header = ("layer", "tokens per expert: least", "median", "experts unseen", "null space")
    rows = [
        [str(one.layer), f"{one.least:,}", f"{one.median:,.0f}", str(one.unseen),
         "-" if one.null_space is None else f"{one.null_space[0]} to {one.null_space[1]}"]
        for one in found.layers
    ]  # fmt: skip
    show_rows(header, rows)
    size = sum(found.files.values()) / 1e9
    done = "were there already" if found.reused else f"took {found.seconds:.1f} s"
    say(f"Statistics of {found.method} {done}: {found.folder}, {len(found.files)} files, {size:.3f} GB.")
