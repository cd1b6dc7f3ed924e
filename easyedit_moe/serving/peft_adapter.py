"""A patch's factors as an adapter for PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from easyedit_moe.errors import PatchError
from easyedit_moe.serving.adapter_files import adapter_config, is_turned
from easyedit_moe.serving.factors import LayerFactors
from easyedit_moe.serving.forms import PREFIX, ExpertNames, expert_tensors, packed_tensors
from easyedit_moe.serving.naming import model_names
from easyedit_moe.serving.servers import PACKED, PER_EXPERT


@dataclass(frozen=True)
class ServedAdapter:
    """The content of an adapter's folder, and what is known of how it is read.

    Attributes:
        tensors: of adapter_model.safetensors.
        config: adapter_config.json.
        form: "packed" or "per-expert".
        checked: name and version of the loader whose layout it has.
        command: a line that loads it; ``{adapter}`` stands for the folder.
        slot_bytes: GPU memory of a server's slot; None for PEFT.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    form: str
    checked: str
    command: str
    slot_bytes: int | None = None


def for_peft(
    layers: Sequence[LayerFactors],
    rank: int,
    base: str,
    peft_version: str,
    form: str = "",
    names: Sequence[ExpertNames] | None = None,
    model_class: str = "AutoModelForCausalLM",
) -> ServedAdapter:
    """An adapter that `PeftModel.from_pretrained` lays on the model.

    Packed experts (one 3-D parameter) are targeted by ``target_parameters``, experts that are modules by
    ``target_modules``.

    Args:
        layers: the update.
        rank: of every pair.
        base: what the configuration names as the base model.
        peft_version: see `easyedit_moe.serving.adapter_files.is_turned`.
        form: "packed" or "per-expert"; by default as the experts are stored in memory.
        names: what the experts are called; by default as in memory.
        model_class: class of transformers in whose names the patch was made.

    Raises:
        PatchError: a version that reads no such adapter, or the packed form of experts that are modules.
    """
    packed = all(factors.stored.packed for factors in layers)
    form = form or (PACKED if packed else PER_EXPERT)
    command = f'PeftModel.from_pretrained({model_class}.from_pretrained("{base}"), "{{adapter}}")'
    checked = f"PEFT {peft_version}"
    if form == PER_EXPERT:
        single = all(factors.stored.single for factors in layers)
        if single or not names:
            names = [model_names(factors.stored) for factors in layers]
        tensors = expert_tensors(layers, names, rank, whole=False)
        modules = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key]
        config = adapter_config(base, rank, peft_version, modules)
        if single and not is_turned(peft_version):
            # Newer versions take a module called down_proj for the routed experts of some families.
            config = adapter_config(base, rank, peft_version, parameters=[f"{name}.weight" for name in modules])
        return ServedAdapter(tensors, config, form, checked, command)
    if not packed:
        raise PatchError(
            "The experts of this model are modules, so an adapter in the packed form has nothing to lie on. Give "
            "--form per-expert, or no form."
        )
    turned = is_turned(peft_version)
    tensors = packed_tensors(layers, [model_names(factors.stored) for factors in layers], rank, turned)
    parameters = [factors.stored.parameter_of(0) for factors in layers]
    config = adapter_config(base, rank, peft_version, parameters=parameters)
    return ServedAdapter(tensors, config, form, checked, command)
