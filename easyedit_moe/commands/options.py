"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyedit_moe.errors import HyperParamsError

if TYPE_CHECKING:
    from easyedit_moe.workflow.session import Loading

Model = Annotated[str, typer.Option(help="Hub name or folder; default: the bundled trained model.")]
Method = Annotated[str, typer.Option(help="Method of ours; default: that of the YAML file, or Global.")]
HParams = Annotated[
    str | None,
    typer.Option(help="A YAML file, or a folder of <METHOD>/<model>.yaml; default: those that ship for the model."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter that counts more than the file's; repeatable."),
]
StatsDir = Annotated[str, typer.Option(help="Folder of cached statistics; default: that of the hparams.")]
DType = Annotated[
    str,
    typer.Option(help="float32, bfloat16 or float16; default: that of a file of hparams, else the checkpoint's own."),
]
PatchDType = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16; default: the patch's, else the checkpoint's own.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; default: that of the hparams.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Let code that comes with the checkpoint run.")]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Put each prompt into the model's chat template; default: as the patches."),
]
EditsInChat = Annotated[
    bool,
    typer.Option("--chat", help="Each prompt is the user's turn in the model's chat template."),
]
Patches = Annotated[
    list[str] | None, typer.Option(metavar="PATCH", help="A patch (or MEMoE's adapter); several: laid on in order.")
]
Protocol = Annotated[
    str,
    typer.Option(help="How records are read and judged; default: their layout's own. ZsRE: zsre or zsre-alternative."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def loading_of(dtype: str, device: str, trust_remote_code: bool) -> Loading:
    """How a model is to be loaded; what is empty is chosen later."""
    from easyedit_moe.workflow.session import Loading

    return Loading(dtype, int(device) if device.isdecimal() else device, trust_remote_code=trust_remote_code)


def settings_of(texts: Sequence[str] | None, **named: Any) -> dict[str, Any]:
    """Hyper-parameters from ``NAME=VALUE`` texts, whose values are YAML, and from options of their own.

    Raises:
        HyperParamsError: a text without a name, one that is no YAML, or a setting that is given twice.
    """
    from easyedit_moe.storage.strict_yaml import parse_yaml

    found: dict[str, Any] = {name: value for name, value in named.items() if value not in ("", None, False)}
    if isinstance(found.get("device"), str) and found["device"].isdecimal():
        found["device"] = int(found["device"])
    for text in texts or []:
        name, sign, value = text.partition("=")
        name = name.strip()
        if not sign or not name:
            raise HyperParamsError(f"--set takes NAME=VALUE, such as lambda_reg=10; found {text!r}.")
        if name in found:
            raise HyperParamsError(f"{name} is given twice; keep one of both.")
        try:
            found[name] = parse_yaml(value)
        except ValueError as error:
            raise HyperParamsError(f"--set {name}: {value!r} can't be read: {error}") from error
    return found
