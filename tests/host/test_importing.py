"""Finding, importing and registering in EasyEdit, with a stand-in that has only the names that we use of it."""

from __future__ import annotations

import builtins
import importlib
import logging
import os
import random
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import easyedit_moe
from easyedit_moe import host
from easyedit_moe.commands.app import app
from easyedit_moe.editors import method_names
from easyedit_moe.errors import DataError, EditingWarning, HostError, HyperParamsError, MethodError
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.host.baselines import BaselineEditor
from easyedit_moe.host.importing import SYMBOLS, check_symbols
from easyedit_moe.host.placeholders import MissingPackageError, placeholders
from easyedit_moe.host.quality import EasyEditQuality
from easyedit_moe.host.watch import watch
from easyedit_moe.hparams import GlobalHyperParams, presets

OURS = {*method_names(), *presets.ALIASES}
FILES = {
    "__init__.py": """
        import logging
        import random

        import numpy
        import torch

        from .util import *
        from .editors import *

        random.seed(42), numpy.random.seed(42), torch.manual_seed(42)
        logging.basicConfig(level=logging.INFO)
        logging.getLogger().addHandler(logging.NullHandler())
        logging.getLogger().setLevel(logging.INFO)
    """,
    "util/__init__.py": "",
    "util/alg_dict.py": """
        def rome(model, tok, request, hparams, **kwargs):
            return model, {}


        ALG_DICT = {"ROME": rome}
    """,
    "editors/__init__.py": "from .editor import *\nfrom .batch_editor import *\n",
    "editors/utils.py": """
        CALLABLE_RESTORE_ALGS = {"WISE"}


        def _prepare_requests(): ...
        def restore_after_edit(): ...
    """,
    "editors/batch_editor.py": """
        class BatchEditor:
            @staticmethod
            def is_batchable_method(alg_name):
                return alg_name == "MEMIT"
    """,
    "editors/editor.py": """
        import logging

        from ..evaluate import compute_edit_quality
        from ..util.alg_dict import *

        LOG = logging.getLogger(__name__)


        def make_logs(): ...
        def finalize_locality_metrics(): ...


        class BaseEditor:
            def __init__(self, hparams):
                self.hparams, self.apply_algo = hparams, ALG_DICT[hparams.alg_name]

            @classmethod
            def from_hparams(cls, hparams):
                return cls(hparams)
    """,
    "evaluate/__init__.py": "def compute_edit_quality(): ...\n",
}


def _write(folder: Path, changes: dict[str, str] | None = None) -> Path:
    for name, text in (FILES | (changes or {})).items():
        path = folder / "easyeditor" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


def _ours(name: str) -> bool:
    return name.partition(".")[0] == "easyeditor" or name == "easyedit_moe.host.editor"


@pytest.fixture(autouse=True)
def _no_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No EasyEdit is to be found, and whatever was imported of it comes back afterwards."""
    stash = {name: module for name, module in sys.modules.items() if _ours(name)}
    path, finders = list(sys.path), list(sys.meta_path)
    for name in stash:
        del sys.modules[name]
    monkeypatch.delenv("EASYEDIT_HOME", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "easyeditor").is_dir()])
    watch()
    yield
    for name in [name for name in sys.modules if _ours(name)]:
        del sys.modules[name]
    sys.modules.update(stash)
    sys.path[:], sys.meta_path[:] = path, finders


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stand-in for EasyEdit, named by EASYEDIT_HOME."""
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    return _write(tmp_path)


def _table() -> dict[str, object]:
    return importlib.import_module("easyeditor.util.alg_dict").ALG_DICT


# ---------------------------------------------------------------- no host


def test_without_easyedit_an_error_says_how_to_get_it() -> None:
    assert not host.is_available()
    with pytest.raises(HostError, match=r"git clone https://github.com/zjunlp/EasyEdit.*EASYEDIT_HOME"):
        host.load()
    with pytest.raises(HostError, match=r"not imported yet.*host\.load"):
        easyedit_moe.register()
    with pytest.raises(ModuleNotFoundError, match="easyeditor"):
        importlib.import_module("easyeditor")


def test_whatever_needs_the_host_says_so_before_any_work(tmp_path: Path) -> None:
    baseline = BaselineHyperParams.read("ROME", "ROME/factworld")
    with pytest.raises(HostError, match="git clone"):
        BaselineEditor(baseline)
    with pytest.raises(HostError, match="git clone"):
        EasyEditQuality(None, None, [])
    for more in (["--methods", "ROME"], ["--methods", "Global", "--easyedit-metrics"]):
        done = CliRunner().invoke(app, ["compare", "--model", "factworld", *more, "--out", str(tmp_path)])
        assert done.exit_code == 2
        assert "HostError: EasyEdit is not installed" in " ".join(done.output.split())
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [host.load, host.is_available])
def test_a_home_without_the_folder_is_named(call: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    with pytest.raises(HostError, match=rf"EASYEDIT_HOME is '{tmp_path}', which holds no folder 'easyeditor'"):
        call()


def _load() -> ModuleType:
    return importlib.import_module("easyeditor")


def _load_part() -> ModuleType:
    return importlib.import_module("easyeditor.util.alg_dict")


@pytest.mark.parametrize("call", [_load, _load_part, host.load, host.is_available])
@pytest.mark.parametrize("kind", ["missing", "empty", "a file", "inside", "half"])
def test_a_wrong_home_is_our_error_on_a_plain_import_too(
    kind: str, call: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... also where there is another EasyEdit on the path, which the user did not mean."""
    _write(tmp_path / "another")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "another"), *sys.path])
    named = {"inside": tmp_path / "another" / "easyeditor"}.get(kind, tmp_path / "home")
    if kind == "half":
        (named / "easyeditor").mkdir(parents=True)
    elif kind == "empty":
        named.mkdir()
    elif kind == "a file":
        named.write_text("x")
    monkeypatch.setenv("EASYEDIT_HOME", str(named))
    found = "there is no such folder" if kind in ("missing", "a file") else "holds no folder 'easyeditor'"
    with pytest.raises(HostError, match=rf"EASYEDIT_HOME is '{named}'.*{found}.*git clone") as caught:
        call()
    assert isinstance(caught.value, ImportError)
    assert (f"lies in, '{tmp_path / 'another'}'" in str(caught.value)) == (kind == "inside")
    assert not [name for name in sys.modules if name.startswith("easyeditor")]
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "another"))
    assert call() is not None
    assert "Global" in _table()


def test_importing_this_package_and_its_host_part_is_light() -> None:
    code = (
        "import sys, easyedit_moe, easyedit_moe.host; easyedit_moe.host.load; easyedit_moe.host.is_available;"
        "print(sorted({'torch', 'transformers', 'easyeditor'} & set(sys.modules)))"
    )
    assert _python(code).strip() == "[]"


def _python(code: str, **environment: str) -> str:
    root = str(Path(__file__).parents[2])
    kept = {name: value for name, value in os.environ.items() if name not in ("EASYEDIT_HOME", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**kept, "PYTHONPATH": root, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- placeholders

IMAGES = """
import importlib.util
import cv2
import timm.models as models
import torchvision.transforms as T
from timm.layers import *
from omegaconf import OmegaConf, DictConfig
import einops


class Processor(T.Compose, models.Base):
    size: "cv2.Mat" = None

    def __init__(self, x: DictConfig | None = None, y: cv2.Mat[int] = None):
        self.x = x


def resize(image):
    return cv2.resize(image)
"""
ABSENT = ("cv2", "timm", "torchvision", "omegaconf")


@pytest.fixture
def images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in also uses image packages, of which einops alone is there."""
    _write(
        folder, {"images.py": IMAGES, "__init__.py": textwrap.dedent(FILES["__init__.py"]) + "from .images import *\n"}
    )
    (folder / "packages").mkdir()
    (folder / "packages" / "einops.py").write_text("rearrange = 'the real one'\n")
    monkeypatch.syspath_prepend(str(folder / "packages"))
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "einops"}
    for name in ABSENT:
        for loaded in [name, *(m for m in sys.modules if m.startswith(f"{name}."))]:
            monkeypatch.setitem(sys.modules, loaded, None)  # Python then takes it as not installed
    yield folder
    sys.modules.pop("einops", None)
    sys.modules.update(real)


def test_absent_packages_are_named_once_and_fail_when_used(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, original = dict(sys.modules), builtins.__import__
    with caplog.at_level(logging.WARNING):
        module = host.load()
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("easyedit_moe")]
    assert "without omegaconf, opencv-python, timm, torchvision, which text editing does not use" in message
    assert module.images.einops.rearrange == "the real one"
    with pytest.raises(MissingPackageError, match=r"cv2\.resize was used.*pip install opencv-python"):
        module.images.resize(None)
    with pytest.raises(MissingPackageError, match=r"derived from torchvision.*pip install torchvision"):
        module.images.Processor()
    with pytest.raises(MissingPackageError, match=r"pip install omegaconf"):
        module.images.OmegaConf.create({})
    with pytest.raises(MissingPackageError, match=r"pip install timm"):
        module.images.models.create_model("vit")
    new = {name for name, value in sys.modules.items() if value is not None and name not in before}
    assert not [name for name in new if name.partition(".")[0] in ABSENT]
    assert builtins.__import__ is original
    for name in ABSENT:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_packages_that_are_there_are_not_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        host.load()
    assert not [r for r in caplog.records if r.name.startswith("easyedit_moe")]


def test_a_module_put_there_by_hand_is_left_alone(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("torchvision")
    mine.__path__ = []
    mine.transforms = ModuleType("torchvision.transforms")
    mine.transforms.Compose = type("Compose", (), {})
    monkeypatch.setitem(sys.modules, "torchvision", mine)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", mine.transforms)
    assert mine.__spec__ is None
    assert host.load().images.T is mine.transforms


def test_only_the_host_gets_placeholders(images: Path) -> None:
    with placeholders("easyeditor") as used, pytest.raises(ModuleNotFoundError):
        import timm  # noqa: F401
    assert used == set()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("import a_needed_package\n", HostError, r"^EasyEdit can't be imported: No module named 'a_needed_package'"),
        ("import cv2\ncv2.setNumThreads(0)\n", HostError, r"^EasyEdit can't be imported: cv2.*install opencv-python"),
        ("1 / 0\n", ZeroDivisionError, "division"),
    ],
)
@pytest.mark.parametrize("how", ["load", "import"])
def test_a_failed_import_leaves_nothing(
    how: str, text: str, error: type[Exception], message: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(images, {"broken.py": text, "editors/__init__.py": "from .editor import *\nfrom ..broken import *\n"})
    original, path = builtins.__import__, list(sys.path)
    with pytest.raises(error, match=message):
        host.load() if how == "load" else importlib.import_module("easyeditor")
    assert not [name for name in sys.modules if name.partition(".")[0] == "easyeditor"]
    assert builtins.__import__ is original
    assert sys.path == path
    _write(images, {"broken.py": ""})  # and once the package is there, all is well
    importlib.invalidate_caches()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for cached in (images / "easyeditor").rglob("__pycache__/broken*"):
        cached.unlink()
    host.load()
    assert set(_table()) == {"ROME", *OURS}


def test_load_leaves_random_states_and_the_root_logger(folder: Path) -> None:
    for library in (random, np.random, torch):
        library.seed(7) if library is not torch else torch.manual_seed(7)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    host.load()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (root.handlers, root.level) == (handlers, level)
    assert str(folder) not in sys.path


@pytest.mark.parametrize("fails", [False, True])
def test_load_leaves_the_environment(fails: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = "CUDA_LAUNCH_BLOCKING='1', KMP_BLOCKTIME='0', KEPT='theirs'"
    text = f"import os\nos.environ.update({changes})\ndel os.environ['GONE']\n"
    _write(folder, {"util/__init__.py": text + ("import absent_package_of_theirs" if fails else "")})
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    for name in ("KEPT", "GONE"):
        monkeypatch.setenv(name, "ours")
    before = dict(os.environ)
    if fails:
        with pytest.raises(HostError, match="absent_package_of_theirs"):
            host.load()
    else:
        host.load()
    assert dict(os.environ) == before


# ---------------------------------------------------------------- registration


def test_load_registers_and_registering_again_changes_nothing(folder: Path) -> None:
    module = host.load()
    table, rome = _table(), _table()["ROME"]
    assert set(table) == {"ROME", *OURS}
    assert module.BaseEditor.from_hparams is not None
    new, batchable = module.BaseEditor.__new__, module.BatchEditor.is_batchable_method
    assert set(easyedit_moe.register()) == OURS
    assert host.load() is module
    assert set(table) == {"ROME", *OURS}
    assert table["ROME"] is rome
    assert module.BaseEditor.__new__ is new
    assert [batchable(name) for name in ("MEMIT", "ROME", "MoTE", "nonsense")] == [True, False, True, False]
    again = module.BatchEditor.is_batchable_method
    assert [again(name) for name in ("MEMIT", "ROME", "MoTE", "nonsense")] == [True, False, True, False]
    for _ in range(2000):  # wrapped again and again, it would end in a RecursionError
        host.load()
    assert module.BatchEditor.is_batchable_method("MEMIT")


def test_other_hparams_get_the_editor_that_they_had(folder: Path) -> None:
    base = host.load().BaseEditor

    class Theirs:
        alg_name = "ROME"

    editor = base.from_hparams(Theirs())
    assert type(editor) is base
    assert editor.apply_algo is _table()["ROME"]
    assert type(base(hparams=Theirs())) is base


def test_other_hparams_with_one_of_our_names_are_refused(folder: Path) -> None:
    base = host.load().BaseEditor

    class Theirs:
        alg_name = "MoTE"

    with pytest.raises(HyperParamsError, match=r"MoTE is a method of easyedit_moe and needs MoTEHyperParams.*Theirs"):
        base.from_hparams(Theirs())


def test_a_name_that_both_sides_claim_registers_nothing(folder: Path) -> None:
    table = "def theirs(*args, **kwargs): ...\nALG_DICT = {'ROME': theirs, 'MoTE': theirs}\n"
    _write(folder, {"util/alg_dict.py": table})
    with pytest.warns(EditingWarning, match="both claim the method name 'MoTE'"):
        module = importlib.import_module("easyeditor")
    assert set(_table()) == {"ROME", "MoTE"}
    assert not module.BatchEditor.is_batchable_method("MoTE")
    with pytest.raises(MethodError, match=r"both claim the method name 'MoTE'; EasyEdit's is easyeditor\.util"):
        easyedit_moe.register()
    del _table()["MoTE"]
    easyedit_moe.register()
    assert set(_table()) == {"ROME", *OURS}


MISSING = [(module, name) for module, names in SYMBOLS.items() for name in names]


@pytest.mark.parametrize(("module", "name"), MISSING)
def test_a_missing_symbol_is_named(module: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.load()
    owner = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    monkeypatch.delattr(owner, last)
    with pytest.raises(HostError, match=rf"{module}\.{name} is missing.*too old or too new.*14cea82"):
        check_symbols()
    with pytest.raises(HostError, match=rf"{module}\.{name} is missing"):
        host.load()


@pytest.mark.parametrize("gone", ["util/alg_dict.py", "evaluate/__init__.py"])
def test_importing_an_unknown_version_warns_and_goes_on(gone: str, folder: Path) -> None:
    text = FILES["editors/editor.py"].replace("from ..evaluate import compute_edit_quality", "")
    text = text.replace("from ..util.alg_dict import *", "ALG_DICT = {}")
    _write(folder, {"editors/editor.py": text})
    (folder / "easyeditor" / gone).unlink()
    wanted = r"easyeditor\.util\.alg_dict\.ALG_DICT" if "alg" in gone else r"easyeditor\.evaluate\.compute_edit_quality"
    with pytest.warns(EditingWarning, match=rf"not registered: {wanted} is missing"):
        module = importlib.import_module("easyeditor")
    assert module.BaseEditor is not None
    with pytest.raises(HostError, match=wanted):
        easyedit_moe.register()


def test_a_host_on_the_path_is_registered_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EASYEDIT_HOME")
    assert not host.is_available()
    monkeypatch.syspath_prepend(str(folder))
    assert host.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = importlib.import_module("easyeditor")
    assert Path(module.__file__) == folder / "easyeditor" / "__init__.py"
    assert set(_table()) == {"ROME", *OURS}
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == "easyedit_moe.host.watch"]


def test_a_host_imported_before_is_registered_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "easyedit_moe" not in type(f).__module__])
    importlib.import_module("easyeditor")
    assert set(_table()) == {"ROME"}
    watch()
    assert set(_table()) == {"ROME", *OURS}


ORDERS = {
    "plugin first": "import easyedit_moe; from easyeditor import BaseEditor",
    "host first": "from easyeditor import BaseEditor; import easyedit_moe",
}


STAND_ALONE = """
import sys, easyedit_moe.comparison.compare, easyedit_moe.comparison.report, easyedit_moe.editor
import easyedit_moe.commands.app
from easyedit_moe.host import baseline_hparams, baselines, caches, datasets, loading, quality, registration
assert 'easyeditor' not in sys.modules
"""


@pytest.mark.parametrize("order", ORDERS)
def test_in_a_new_process_either_order_registers(order: str, folder: Path) -> None:
    """Where this package comes first, all of it that works stand-alone is imported without the host coming along."""
    code = (
        f"{STAND_ALONE if order == 'plugin first' else ''}{ORDERS[order]}\n"
        "import sys\n"
        "from easyeditor.util.alg_dict import ALG_DICT\n"
        "print(sorted(ALG_DICT), 'easyedit_moe.host.editor' in sys.modules)\n"
    )
    where = {"EASYEDIT_HOME": str(folder)} if order == "plugin first" else {}
    path = f"{Path(__file__).parents[2]}{os.pathsep}{folder}" if order == "host first" else ""
    out = _python(code, **where, **({"PYTHONPATH": path} if path else {}))
    assert out.strip() == f"{sorted(['ROME', *OURS])} False"


def test_our_hparams_get_our_editor(folder: Path) -> None:
    base = host.load().BaseEditor
    hparams = GlobalHyperParams(alg_name="Global", model_name="nowhere/at-all", layers=[1])
    with pytest.raises(DataError, match="'nowhere/at-all' can't be loaded"):
        base.from_hparams(hparams)
