"""Bad input of every kind: each ends in a typed error or works, and leaves the model and all files as they were.

``python -m benchmarks.robustness_inputs --minutes 20`` draws for so long and merges its counts into
``docs/robustness.json``; the tests draw the same, a few hundred of each kind.
"""

from __future__ import annotations

import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import transformers
import typer
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks.bad_values import JUNK, PLAIN, TEXTS, as_json, changed, damaged
from easyedit_moe import MoEEditor, factworld
from easyedit_moe.commands.app import app
from easyedit_moe.errors import EditingError
from easyedit_moe.facts.records import load_facts, load_records
from easyedit_moe.facts.records.reading import parse_records
from easyedit_moe.hparams import hparams_folder, hyperparams_class, load_hyperparams
from easyedit_moe.hparams.presets import own_methods
from easyedit_moe.moe.loading import load_tokenizer
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.strict_json import read_json, write_json

COUNTS = Path(__file__).parents[1] / "docs" / "robustness.json"
SUCCESS, TYPED, RAW, CHANGED = "success", "typed", "raw", "changed"
KINDS = (SUCCESS, TYPED, RAW, CHANGED)
"""What comes of one input: it works, it is refused by an error of ours, it ends in another error, or it leaves
something behind (weights that differ, files that are new) after an error or a refusal."""


@dataclass(frozen=True)
class Outcome:
    """What came of one input, and for a bad one what it was."""

    kind: str
    detail: str = ""

    @property
    def fine(self) -> bool:
        """Whether it is as it should be."""
        return self.kind in (SUCCESS, TYPED)


@dataclass(frozen=True)
class Section:
    """Inputs of one kind, and what is done with each."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], Outcome]


def outcome(call: Callable[[], Any], as_before: Callable[[], bool] = lambda: True, anyway: bool = False) -> Outcome:
    """Of one call; ``as_before`` is asked after an error of ours, and with ``anyway`` after a success, too."""
    try:
        call()
        kind = SUCCESS
    except EditingError as error:
        kind, detail = TYPED, f"{type(error).__name__}: {error}"
        if not str(error).strip():
            return Outcome(RAW, f"{type(error).__name__} without a message")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(RAW, f"{type(error).__name__}: {error} at {where.filename}:{where.lineno}")
    if (kind == TYPED or anyway) and not as_before():
        return Outcome(CHANGED, detail if kind == TYPED else "after a success")
    return Outcome(kind)


class Inputs:
    """All sections, on one small model and in one folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runner = CliRunner()
        self.place = folder / "commands"
        (self.place / "empty").mkdir(parents=True, exist_ok=True)
        (self.place / "file").write_text("x", encoding="utf-8")
        text = "prompt,subject,target_new\nAngola is in,Angola,Russia\n"
        (self.place / "facts.csv").write_text(text, encoding="utf-8")

    # ------------------------------------------------------------ requests

    def requests(self) -> Section:
        """EasyEdit's calls of an editor, on requests and on parallel lists."""
        tok = load_tokenizer(factworld.MODEL_NAME)
        model = _small_model(len(tok))
        model.generation_config.eos_token_id = list(range(len(tok)))  # any token ends an answer
        values = {"alg_name": "MoE-FT", "model_name": "m", "layers": [1], "num_steps": 1, "dtype": "float32"}
        editor = MoEEditor(hyperparams_class("MoE-FT").from_dict(values), model, tok)
        before = _checksums(model)

        def check(given_: tuple[str, dict[str, Any]]) -> Outcome:
            name, arguments = given_
            return outcome(
                lambda: getattr(editor, name)(**arguments, **({} if name == "normal_edit" else {"verbose": False})),
                lambda: _checksums(model) == before and not editor.patches,
                anyway=True,
            )

        fact = {"prompt": "Angola is in", "subject": "Angola", "target_new": "Russia", "ground_truth": "Africa"}
        group = {"near": {"prompt": "Kenya is in", "ground_truth": "Africa"}}
        rome = {"requested_rewrite": {"prompt": "{} is in", "subject": "Angola", "target_new": {"str": "Russia"}}}
        full = {**fact, "rephrase_prompt": "Angola lies in", "locality": group, "portability": group}
        listed = changed([[fact], [full], [rome], [fact, {**fact, "prompt": "Angola lies in"}]], JUNK)
        lists = {"prompts": ["Angola is in"], "target_new": ["Russia"], "subject": ["Angola"]}
        columns = {
            **lists, "ground_truth": ["Africa"], "rephrase_prompts": ["Angola lies in"],
            "locality_inputs": {"near": {"prompt": ["Kenya is in"], "ground_truth": ["Africa"]}},
            "portability_inputs": {"far": {"prompt": ["Kenya is in"], "ground_truth": ["Africa"]}},
        }  # fmt: skip
        inputs = st.one_of(
            st.tuples(
                st.sampled_from(["edit", "edit_requests", "batch_edit", "generate_edit"]),
                st.fixed_dictionaries({"requests": listed}),
            ),
            st.tuples(
                st.sampled_from(["edit", "batch_edit", "generate_edit"]),
                changed([lists, columns], JUNK).map(_keywords(columns)),
            ),
            st.tuples(
                st.just("normal_edit"),
                changed([lists], JUNK).map(lambda value: {**dict.fromkeys(lists), **_keywords(lists)(value)}),
            ),
        )
        return Section(inputs, check)

    # ------------------------------------------------------------ hparams

    def hparams(self) -> Section:
        """Values of every field of every class, from a dict and from YAML, and the text of shipped files changed."""
        names = [method.name for method in own_methods()]
        shipped = [path.read_bytes() for path in sorted(hparams_folder().glob("*/factworld.yaml"))]

        @st.composite
        def values(draw: Any) -> tuple[str, Any]:
            name = draw(st.sampled_from(names))
            known = [item.name for item in fields(hyperparams_class(name))]
            found: dict[Any, Any] = {"alg_name": name, "model_name": "m", "layers": [1]}
            for _ in range(draw(st.integers(0, 3))):
                found[draw(st.one_of(st.sampled_from(known), st.text(max_size=4)))] = draw(JUNK)
            return name, found

        texts = st.one_of(damaged(shipped), changed([_values_of(text) for text in shipped], PLAIN).map(_as_yaml))
        path = self.folder / "hparams.yaml"

        def check(given_: tuple[str, Any] | bytes) -> Outcome:
            if isinstance(given_, tuple):
                return outcome(lambda: hyperparams_class(given_[0]).from_dict(given_[1]).to_yaml(path))
            path.write_bytes(given_)
            return outcome(lambda: load_hyperparams(path).to_dict(), lambda: path.read_bytes() == given_, anyway=True)

        return Section(st.one_of(values(), texts), check)

    # ------------------------------------------------------------ files

    def files(self, layouts: Mapping[str, Any], tables: Mapping[str, bytes]) -> Section:
        """Files of records of every layout, their structure or their bytes changed; ``layouts`` are records by name,
        ``tables`` contents by suffix."""
        records = [[item, item] if isinstance(item, dict) else item for item in layouts.values()]
        whole = changed([*records, *[items[0] for items in records]], PLAIN, 3)
        suffixes = st.sampled_from([".json", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ""])
        raw = damaged([*map(as_json, records), *(b"\n".join(map(as_json, items)) for items in records)])
        inputs = st.one_of(
            st.tuples(st.just(".json"), whole.map(as_json)),
            st.tuples(suffixes, raw),
            st.one_of([st.tuples(st.just(suffix), damaged([data])) for suffix, data in tables.items()]),
            st.tuples(st.just("value"), changed(records, JUNK)),
        )

        def check(given_: tuple[str, Any]) -> Outcome:
            suffix, content = given_
            if suffix == "value":
                return outcome(lambda: parse_records(content))
            path = self.folder / f"records{suffix}"
            path.write_bytes(content)
            for read in (load_records, load_facts, lambda path: load_facts(path, strict=True)):
                found = outcome(lambda read=read: read(path), lambda: path.read_bytes() == content, anyway=True)
                if not found.fine:
                    return found
            return found

        return Section(inputs, check)

    # ------------------------------------------------------------ artefacts

    def artefact_bytes(self) -> Section:
        """What the package wrote itself, with bytes flipped, cut off, doubled or put in: see `robustness_artefacts`."""
        from benchmarks import robustness_artefacts as told

        (self.folder.parent / f"{self.folder.name}-artefacts").mkdir(exist_ok=True)
        known = list(told.artefacts(self.folder.parent / f"{self.folder.name}-artefacts"))
        whole = [artefact.path.read_bytes() for artefact in known]
        wanted = [artefact.use() for artefact in known]
        before = [None if artefact.model is None else told.state(artefact.model) for artefact in known]
        kinds = {told.REFUSED: TYPED, told.RECOMPUTED: TYPED, told.SAME: SUCCESS, told.RAW: RAW, told.SILENT: CHANGED}
        inputs = [st.tuples(st.just(number), damaged([data])) for number, data in enumerate(whole)]

        def check(given_: tuple[int, bytes]) -> Outcome:
            number, data = given_
            artefact = known[number]
            artefact.path.write_bytes(data)
            try:
                found, detail = told._outcome(artefact, wanted[number])
                if artefact.model is not None and told.state(artefact.model) != before[number]:
                    return Outcome(CHANGED, f"{artefact.name}: the model was changed")
            finally:
                artefact.path.write_bytes(whole[number])
            return Outcome(kinds[found], f"{artefact.name}: {detail}")

        return Section(st.one_of(inputs), check)

    # ------------------------------------------------------------ command line

    def command_line(self) -> Section:
        """Arguments of every command: exit code 2 and a line for what is refused; nothing is written."""
        inside = sorted(path.name for path in self.place.iterdir())
        known = ["factworld", "MoTE", "Global", "all", "nan", "cpu", "cuda:9", "ROME", *inside]
        numbers = st.one_of(st.integers(-5, 10**40), st.floats()).map(str)
        words = st.one_of(TEXTS, numbers, st.sampled_from(known))
        words = words.filter(lambda word: "\0" not in word)
        needed = st.sampled_from(_COMMANDS)

        @st.composite
        def arguments(draw: Any) -> list[str]:
            name, fixed, free = draw(needed)
            options = _options(name)
            line = [name, *[draw(words) for _ in range(free)], *fixed]
            for _ in range(draw(st.integers(1, 3))):
                option, takes = draw(st.sampled_from(options))
                if option in fixed:
                    continue
                line += [option, draw(words)] if takes else [option]
            return line

        def check(line: list[str]) -> Outcome:
            here = os.getcwd()
            os.chdir(self.place)
            try:
                done = self.runner.invoke(app, line)
            finally:
                os.chdir(here)
            text = " ".join(done.output.split())[-300:]
            foreseen = done.exception is None or isinstance(done.exception, SystemExit)
            if not foreseen or "Traceback" in done.output or "run with -v for the traceback" in done.output:
                return Outcome(RAW, f"{line}: {text or done.exception!r}")
            if done.exit_code == 0:
                self.clean(inside)
                return Outcome(SUCCESS)
            if not text:
                return Outcome(RAW, f"{line}: exit code {done.exit_code} without a message")
            left = sorted(path.name for path in self.place.iterdir()) != inside
            self.clean(inside)
            return Outcome(CHANGED, f"{line}: {text}") if left else Outcome(TYPED)

        return Section(arguments(), check)

    def clean(self, inside: list[str]) -> None:
        """Remove what a command made."""
        import shutil

        for path in self.place.iterdir():
            if path.name not in inside:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


_NO_MODEL = ["--model", "empty"]
_COMMANDS: list[tuple[str, list[str], int]] = [
    ("edit", ["--out", "out", "--dry-run"], 1),
    ("edit", ["--out", "out", *_NO_MODEL], 1),
    ("init", _NO_MODEL, 0),
    ("init", ["--model", "factworld"], 0),
    ("ask", _NO_MODEL, 1),
    ("inspect", [], 1),
    ("apply", ["--model", "factworld", "--out", "out"], 1),
    ("revert", ["--model", "factworld", "--out", "out"], 1),
    ("merge", ["--out", "out"], 2),
    ("export", ["--to", "peft"], 1),
    ("statistics", _NO_MODEL, 0),
    ("locate", _NO_MODEL, 1),
    ("compare", ["--data", "file", "--out", "out"], 0),
    ("tune", ["--out", "out", *_NO_MODEL], 1),
    ("plan", [], 0),
    ("methods", [], 0),
    ("evaluate", _NO_MODEL, 0),
]
"""Commands with what lets them end soon, and how many arguments they get."""


def _options(name: str) -> list[tuple[str, bool]]:
    """A command's options, each with whether a value follows; what names the model is given already, and what measures
    for minutes is left out.
    """
    group: Any = get_command(app)
    found = []
    for parameter in group.commands[name].params:
        if parameter.param_type_name == "option" and parameter.name not in ("model", "locate"):
            found += [(option, not parameter.is_flag) for option in (*parameter.opts, *parameter.secondary_opts)]
    return found


def _keywords(known: Mapping[str, Any]) -> Callable[[Any], dict[str, Any]]:
    """What a call may be given by keyword: a structure that was replaced as a whole is one argument."""
    return lambda value: value if isinstance(value, dict) and value.keys() <= known.keys() else {"prompts": value}


def _values_of(text: bytes) -> Any:
    return yaml.safe_load(text)


def _as_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=False).encode("utf-8", "surrogatepass")


def _small_model(vocabulary: int) -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=16, moe_intermediate_size=12, intermediate_size=16, num_hidden_layers=2,
        num_experts=4, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=512,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _checksums(model: nn.Module) -> list[int]:
    return [checksum(parameter.detach()) for parameter in model.parameters()]


@contextmanager
def quiet() -> Iterator[None]:
    """Within, no warning is shown and no network is asked."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.pop("HF_HUB_OFFLINE") if before is None else os.environ.update(HF_HUB_OFFLINE=before)


@dataclass
class Counts:
    """How many inputs came to what, and the first bad ones."""

    of: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, found: Outcome) -> None:
        """One more."""
        self.of[found.kind] += 1
        if not found.fine and found.detail not in self.bad:
            self.bad.append(found.detail)


def drawn(section: Section, examples: int, number: int | None = None) -> Iterator[Outcome]:
    """Outcomes of so many inputs; the same ones each time, or those of a ``number`` of their own."""
    found: list[Outcome] = []

    def one(value: Any) -> None:
        found.append(section.check(value))

    run = given(section.inputs)(one)
    options: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    options |= {"max_examples": examples, "phases": [Phase.generate], "derandomize": number is None}
    run = settings(**options)(run)
    with quiet():
        (run if number is None else seed(number)(run))()
    yield from found


def main(
    minutes: Annotated[float, typer.Option(help="How long, all sections together.")] = 20.0,
    first: Annotated[int, typer.Option(help="Number of the first series of inputs.")] = 0,
    series: Annotated[int, typer.Option(help="How many series at most; 0: as many as there is time for.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="A section; repeatable. Default: all.")] = None,
    add: Annotated[bool, typer.Option(help="Add to the counts of the file instead of replacing them.")] = False,
    out: Annotated[Path, typer.Option(help="JSON file that gets the counts, beside those of other sections.")] = COUNTS,
) -> None:
    """Draw bad inputs by turns of the sections, and merge the counts into a file."""
    from benchmarks.record_layouts import LAYOUTS, tables

    with TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder))
        sections = {
            "requests": inputs.requests(),
            "hparams": inputs.hparams(),
            "files": inputs.files(LAYOUTS, tables()),
            "artefact bytes": inputs.artefact_bytes(),
            "command line": inputs.command_line(),
        }
        if unknown := sorted(set(only or []) - set(sections)):
            raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(sections)}.", param_hint="--only")
        counts = {name: Counts() for name in only or sections}
        earlier = read_json(out) if out.is_file() else {}
        end, number = time.monotonic() + 60 * minutes, first
        while time.monotonic() < end and not (series and number == first + series):
            for name in counts:
                for found in drawn(sections[name], 100, number):
                    counts[name].add(found)
            number += 1
            write_json(out, merged(earlier, counts, made_by(minutes, first, number), add))
    for name, found in counts.items():
        typer.echo(f"{name}: {dict(found.of)}" + "".join(f"\n  {text}" for text in found.bad[:20]))


def made_by(minutes: float, first: int, end: int) -> str:
    """The command, and which series it drew in its time."""
    return f"python -m benchmarks.robustness_inputs --minutes {minutes:g} --first {first} --series {end - first}"


def merged(earlier: Mapping[str, Any], counts: Mapping[str, Counts], command: str, add: bool = False) -> dict[str, Any]:
    """Content of a file with these counts beside, or with ``add`` on top of, those that it had."""
    kept = dict(earlier)
    for name, found in counts.items():
        before = kept.get(name, {}) if add else {}
        kept[name] = {
            **{kind: before.get(kind, 0) + found.of[kind] for kind in KINDS},
            "bad": [*before.get("bad", []), *found.bad][:20],
            "made by": [*before.get("made by", []), command],
        }
    return kept


if __name__ == "__main__":
    typer.run(main)
