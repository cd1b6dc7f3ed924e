"""What EasyEdit's own methods need of memory, from shapes alone; EasyEdit need not be there.

Counted is what its code keeps: full copies of what is edited, second moments of a dense site's inputs, and activations
of one request (ROME, MEMIT, AlphaEdit) or one batch (FT, LoRA) with gradients down to the lowest edited layer.
"""

from __future__ import annotations

from torch import nn

from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.editors.stages import Stage
from easyedit_moe.errors import LayerError
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.host.dense_statistics import module_of
from easyedit_moe.host.wise import check_site
from easyedit_moe.moe.activations import inference, kept_for_gradient, passing, scored
from easyedit_moe.moe.layers import decoder_stack
from easyedit_moe.moe.shapes import Lengths, Shapes, outline_of

TEMPLATES = 21
"""Sequences in which EasyEdit's ROME, MEMIT and AlphaEdit ask one request: sampled contexts and the bare prompt."""
WISE_TEMPLATES = 11
"""Sequences in which EasyEdit's WISE trains one request, besides the unrelated text."""
CORPUS_TOKENS = 512
"""Tokens at which a text of the statistics corpus is cut."""


def needs_statistics(hparams: BaselineHyperParams) -> bool:
    """Whether the method reads second moments of a dense site's inputs."""
    name = hparams.values["alg_name"]
    return name in ("MEMIT", "AlphaEdit") or (name == "ROME" and bool(hparams.values.get("mom2_adjustment")))


def edited_parameters(model: nn.Module, hparams: BaselineHyperParams) -> dict[str, nn.Parameter]:
    """The parameters that a method writes, by full name; none for LoRA and WISE, which add their own.

    Raises:
        LayerError: there is no such parameter, or it belongs to no linear module.
    """
    if hparams.values["alg_name"] == "WISE":
        check_site(model, hparams)
        return {}
    template, layers = hparams.values.get("rewrite_module_tmp"), hparams.layers
    known = dict(model.named_parameters())
    if template is None:
        return {}
    if hparams.values["alg_name"] != "FT":
        for layer in layers:
            weight = getattr(module_of(model, template.format(layer)), "weight", None)
            if weight is None or weight.dim() != 2:
                raise LayerError(
                    f"{template.format(layer)} is no linear module; EasyEdit's {hparams.values['alg_name']} can't edit "
                    "it. Choose a dense site, such as the attention's o_proj."
                )
        names = [f"{template.format(layer)}.weight" for layer in layers]
        return {name: known[name] for name in names}
    for layer in layers:
        if not any(template.format(layer) in name for name in known):
            raise LayerError(f"The model has no parameter {template.format(layer)}; check rewrite_module_tmp.")
    return {name: p for name, p in known.items() if any(template.format(layer) in name for layer in layers)}


def plan_baseline(hparams: BaselineHyperParams, model: nn.Module, workload: Workload) -> MemoryPlan:
    """The plan of one batch by one of EasyEdit's methods.

    No size can be fitted to a budget, since its code has none to set: the budget is only compared.

    Raises:
        LayerError: a site that the model lacks. HyperParamsError: a budget that is not positive.
    """
    hparams = hparams.named_for(decoder_stack(model)[1])
    shapes, layers = outline_of(model), hparams.layers
    asked = int(hparams.values.get("batch_size", 1)) if workload.edits is None else workload.edits
    name = hparams.values["alg_name"]
    if name == "LoRA":
        stages, settings = _lora_stages(hparams, model, shapes, asked, workload.lengths)
    elif name == "FT":
        stages, settings = _ft_stages(hparams, model, shapes, asked, workload.lengths)
    elif name == "WISE":
        stages, settings = _wise_stages(hparams, model, shapes, asked, workload.lengths), {"templates": WISE_TEMPLATES}
    else:
        stages, settings = _solving_stages(hparams, model, shapes, asked, workload.lengths), {"templates": TEMPLATES}
    return MemoryPlan(shapes, layers, asked, tuple(stages), settings, workload.checked_budget())


def _held(parameters: dict[str, nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters.values())


def _with_gradient(shapes: Shapes, sequences: int, lowest: int, lengths: Lengths) -> int:
    """Activations of all layers from ``lowest`` up, and the logits, which its code makes of every token."""
    tokens = sequences * lengths.whole
    kept = kept_for_gradient(shapes, tokens, tokens, tokens) * (shapes.num_layers - lowest)
    return kept + max(passing(shapes, tokens), scored(shapes, tokens))


def _solving_stages(
    hparams: BaselineHyperParams, model: nn.Module, shapes: Shapes, edits: int, lengths: Lengths
) -> list[Stage]:
    edited, values = edited_parameters(model, hparams), hparams.values
    widths = [p.shape[1] for p in edited.values()]
    squares, largest = sum(w**2 for w in widths), max(widths) ** 2
    stages = []
    if needs_statistics(hparams):
        read = inference(shapes, CORPUS_TOKENS)
        kept = 4 * squares * (3 if values["alg_name"] == "AlphaEdit" else 1)  # moments, projectors, cache_c
        stages.append(Stage("statistics", kept, 8 * squares + read, "second moments of the sites' inputs"))
    search = _with_gradient(shapes, TEMPLATES, max(values["layers"]), lengths)
    stages.append(Stage("targets", 4 * edits * shapes.d_model, search, f"one request in {TEMPLATES} contexts"))
    keys = 8 * edits * (max(widths) + shapes.d_model)
    stages.append(Stage("solve", 0, 3 * 8 * largest + 2 * keys, f"side {max(widths)}, float64"))
    stages.append(Stage("write", 2 * _held(edited), 0, "full copies of the sites: EasyEdit's and ours"))
    return stages


def _ft_stages(
    hparams: BaselineHyperParams, model: nn.Module, shapes: Shapes, edits: int, lengths: Lengths
) -> tuple[list[Stage], dict[str, int]]:
    edited = edited_parameters(model, hparams)
    numbers, held = sum(p.numel() for p in edited.values()), _held(edited)
    batch = min(edits, int(hparams.values.get("batch_size", 1)))
    # Its Adam keeps two moments and a gradient in the weights' own dtype; copies are EasyEdit's, ours and its deltas.
    working = 3 * held + _with_gradient(shapes, batch, min(hparams.values["layers"]), lengths)
    note = f"{numbers:,} trainable numbers, {3 * held / 1e9:.3f} GB with optimiser state"
    stages = [Stage("train", 2 * held, working, note), Stage("write", held, 0, "EasyEdit's deltas")]
    return stages, {"batch_size": batch}


def _wise_stages(
    hparams: BaselineHyperParams, model: nn.Module, shapes: Shapes, edits: int, lengths: Lengths
) -> list[Stage]:
    site = check_site(model, hparams).weight
    held = site.numel() * site.element_size()
    kept = 2 + edits // int(hparams.values["save_freq"])  # a copy of the site, new weights, and those put away
    sequences = WISE_TEMPLATES + 1
    # A gradient, its mask in int64, and the copy by which a batch is taken back.
    working = (
        held + 8 * site.numel() + (kept + 1) * held + _with_gradient(shapes, sequences, min(hparams.layers), lengths)
    )
    note = f"{site.numel():,} trainable numbers, one request in {WISE_TEMPLATES} contexts"
    return [Stage("train", kept * held, working, note)]


def _lora_stages(
    hparams: BaselineHyperParams, model: nn.Module, shapes: Shapes, edits: int, lengths: Lengths
) -> tuple[list[Stage], dict[str, int]]:
    values, numbers = hparams.values, 0
    names = tuple(values.get("target_modules", ()))
    chosen = set(values["layers"])
    for name, module in model.named_modules():
        parts = name.split(".")
        inside = any(part.isdigit() and int(part) in chosen for part in parts)
        if isinstance(module, nn.Linear) and parts[-1] in names and inside:
            numbers += int(values["rank"]) * (module.in_features + module.out_features)
    if not numbers:
        raise LayerError(f"The model has none of {', '.join(names) or 'no target_modules'} in layers {sorted(chosen)}.")
    batch = min(edits, int(values.get("batch_size", 1)))
    working = 12 * numbers + _with_gradient(shapes, batch, min(chosen), lengths)
    note = f"{numbers:,} trainable numbers, {16 * numbers / 1e9:.3f} GB with optimiser state"
    return [Stage("train", 4 * numbers, working, note)], {"batch_size": batch}
