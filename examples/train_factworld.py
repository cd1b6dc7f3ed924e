"""Train the bundled Qwen3-MoE on the fact world (2 CPU cores, tens of minutes; resumable).

    python examples/train_factworld.py --out /path/to/folder

writes ``model/`` (config, tokenizer, bfloat16 safetensors) and ``data/`` (records, corpus, facts, report) into
the folder. Every batch depends on the seed and the step only, so an interrupted run that is started again with the
same ``--out`` continues where its last checkpoint stood.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from easyedit_moe.factworld import world as fw

END_OF_TEXT = "<|endoftext|>"
SEQUENCE_LENGTH = 112


def train_tokenizer(sentences: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen's: no token is added to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=256
    )


def build_model(vocab_size: int, seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=144,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("eager")  # at this width faster on a CPU than the grouped product
    return model


class Batches:
    """Packed sequences of whole sentences; ``batch(step)`` depends on seed and step only.

    Three sentences of four state one fact, some behind a neutral opener; the others are biographies, neutral
    sentences about people and prose.
    """

    def __init__(self, world: fw.World, tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> None:
        self.world, self.tokenizer, self.seed, self.size = world, tokenizer, seed, size
        self.cache: dict[str, list[int]] = {}
        self.facts = [(s, r, t) for s in world.subjects for r in fw.RELATIONS for t in r.templates]
        self.prose = fw.prose_sentences()

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text)["input_ids"]
        return self.cache[text]

    def sentence(self, rng: random.Random) -> list[tuple[str, bool]]:
        """Pieces of one sentence, each with whether it is an object that must be known."""
        kind = rng.random()
        if kind < 0.75:
            subject, relation, template = rng.choice(self.facts)
            prompt = template.format(subject)
            if rng.random() < 0.25:
                prompt = f"{rng.choice(fw.OPENERS)} {prompt}"
            return [(prompt, False), (f" {self.world.facts[subject][relation.name]}", True), (".", False)]
        subject = rng.choice(self.world.subjects)
        if kind < 0.92:
            return fw.biography_pieces(self.world, subject, rng.sample(fw.RELATIONS, len(fw.RELATIONS)))
        if kind < 0.95:
            return [(fw.neutral_sentence(subject), False)]
        return [(rng.choice(self.prose), False)]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and loss weights, both [size, SEQUENCE_LENGTH]: 1 on an object, 0.1 elsewhere."""
        rng = random.Random(self.seed * 1_000_003 + step)
        ids = torch.zeros(self.size, SEQUENCE_LENGTH, dtype=torch.long)
        weights = torch.zeros(self.size, SEQUENCE_LENGTH)
        for row in range(self.size):
            tokens: list[int] = []
            weight: list[float] = []
            while len(tokens) < SEQUENCE_LENGTH:
                for i, (text, known) in enumerate(self.sentence(rng)):
                    piece = self.encode(" " + text if i == 0 and tokens else text)
                    tokens += piece
                    weight += [1.0 if known else 0.1] * len(piece)
            ids[row] = torch.tensor(tokens[:SEQUENCE_LENGTH])
            weights[row] = torch.tensor(weight[:SEQUENCE_LENGTH])
        return ids, weights


@torch.no_grad()
def recall(model, tokenizer, world: fw.World, subjects: tuple[str, ...]) -> float:
    """Share of (subject, relation, template) whose whole object is the greedy continuation."""
    by_length: dict[int, list[tuple[list[int], int]]] = {}
    for subject in subjects:
        for relation in fw.RELATIONS:
            for template in relation.templates:
                prompt = tokenizer(template.format(subject))["input_ids"]
                ids = prompt + tokenizer(" " + world.facts[subject][relation.name])["input_ids"]
                by_length.setdefault(len(ids), []).append((ids, len(prompt)))
    hits = total = 0
    for items in by_length.values():
        for begin in range(0, len(items), 256):
            chunk = items[begin : begin + 256]
            ids = torch.tensor([i for i, _ in chunk])
            greedy = model(input_ids=ids).logits.argmax(-1)
            for row, (tokens, start) in enumerate(chunk):
                hits += greedy[row, start - 1 : -1].tolist() == tokens[start:]
            total += len(chunk)
    return hits / total


@torch.no_grad()
def expert_load(model, batches: Batches) -> list[list[float]]:
    """Share of the routed tokens that each expert gets, per layer (uniform is 1 / experts)."""
    ids, _ = batches.batch(10_000_019)
    logits = model(input_ids=ids, output_router_logits=True).router_logits
    experts = model.config.num_experts
    loads = []
    for layer in logits:
        top = layer.topk(model.config.num_experts_per_tok, dim=-1).indices
        loads.append((torch.bincount(top.flatten(), minlength=experts).float() / top.numel()).tolist())
    return loads


def save_checkpoint(path: Path, model, optimizer, step: int) -> None:
    """Parameters and AdamW moments; replaced atomically, so a stop in the middle costs nothing."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optim.{key}.{n}"] = value
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"step": str(step)})
    partial.replace(path)


def load_checkpoint(path: Path, model, optimizer) -> None:
    tensors = load_file(path)
    for n, p in model.named_parameters():
        p.data.copy_(tensors[f"model.{n}"])
        optimizer.state[p] = {
            key: tensors[f"optim.{key}.{n}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"optim.{key}.{n}" in tensors
        }


def checkpoint_step(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    (out / "data").mkdir(parents=True, exist_ok=True)
    world = fw.build_world(args.seed)
    sentences = fw.fact_sentences(world, world.subjects) + fw.prose_sentences() + list(fw.OPENERS)
    sentences += [fw.biography(world, subject, fw.RELATIONS) for subject in world.subjects]
    tokenizer = train_tokenizer(sentences, args.vocab_size)
    model = build_model(len(tokenizer), args.seed)
    batches = Batches(world, tokenizer, args.seed, args.batch)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    checkpoint = out / "checkpoint.safetensors"
    first = 0
    if checkpoint.exists():
        first = checkpoint_step(checkpoint)
        load_checkpoint(checkpoint, model, optimizer)
    model.train()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="training")
    for step in bar:
        warmup = min(1.0, (step + 1) / 100)
        remaining = (args.steps - step) / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup * (0.02 + 0.98 * min(1.0, remaining / 0.8))
        ids, weights = batches.batch(step)
        output = model(input_ids=ids, output_router_logits=True)
        # Smoothed labels keep the model from being surer of its facts than a real one is.
        losses = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none", label_smoothing=args.smoothing
        )
        w = weights[:, 1:].flatten()
        loss = (losses * w).sum() / w.sum() + args.aux * output.aux_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            on_objects = losses[w == 1.0].mean().item()
            bar.set_postfix(object_loss=f"{on_objects:.3f}", aux=f"{output.aux_loss.item():.2f}")
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            save_checkpoint(checkpoint, model, optimizer, step + 1)
            model.eval()
            tqdm.write(f"step {step + 1}: recall {recall(model, tokenizer, world, world.subjects[:40]):.4f}")
            model.train()
    model.eval().bfloat16()
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    write_data(out / "data", world)
    model.float()
    report = {
        "recall": recall(model, tokenizer, world, world.subjects),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "seed": args.seed,
        "expert_load": expert_load(model, batches),
    }
    (out / "data" / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    loads = [x for layer in report["expert_load"] for x in layer]
    tqdm.write(f"recall {report['recall']:.4f}, load per expert {min(loads):.3f} to {max(loads):.3f}")


def write_data(folder: Path, world: fw.World) -> None:
    """Records in both public layouts, the statistics corpus and the facts themselves."""
    folder.mkdir(parents=True, exist_ok=True)

    def dump(name: str, value: object) -> None:
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    dump("counterfact.json", fw.counterfact_records(world))
    dump("easyedit.json", fw.easyedit_records(world))
    dump("facts.json", {"evaluated": world.evaluated, "bystanders": world.bystanders, "facts": world.facts})
    (folder / "corpus.txt").write_text("\n".join(fw.statistics_corpus(world)) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--aux", type=float, default=0.03)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--vocab-size", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
