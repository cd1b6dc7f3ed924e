"""Stand-ins for packages that EasyEdit imports and text editing never uses, where they are absent."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OPTIONAL = {
    "av": "av",
    "bitsandbytes": "bitsandbytes",
    "cv2": "opencv-python",
    "einops": "einops",
    "fairscale": "fairscale",
    "gpustat": "gpustat",
    "higher": "higher",
    "hydra": "hydra-core",
    "iopath": "iopath",
    "matplotlib": "matplotlib",
    "nltk": "nltk",
    "omegaconf": "omegaconf",
    "openai": "openai",
    "pandas": "pandas",
    "PIL": "pillow",
    "qwen_vl_utils": "qwen-vl-utils",
    "rouge": "rouge",
    "scipy": "scipy",
    "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn",
    "timm": "timm",
    "torchvision": "torchvision",
    "zhipuai": "zhipuai",
}
"""Import name -> package to install, of everything that may be absent for text editing."""


class MissingPackageError(ImportError):
    """A package was used that is not installed; the message names it."""


class Placeholder:
    """A module, class or function of an absent package: it can be named and subclassed; any use raises.

    Raises:
        MissingPackageError: on a call.
    """

    def __init__(self, name: str, package: str) -> None:
        self.__name__ = name
        self._package = package
        self.__all__: list[str] = []

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Placeholder(f"{self.__name__}.{name}", self._package)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise, naming the package to install."""
        raise MissingPackageError(
            f"{self.__name__} was used, but the package is not installed: pip install {self._package}"
        )

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        message = f"A class derived from {self.__name__} was used, but the package is not installed: "
        message += f"pip install {self._package}"

        def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
            raise MissingPackageError(message)

        return (type(self.__name__.rsplit(".", 1)[-1], (), {"__new__": refuse}),)

    # In annotations, which are evaluated on import.
    def __getitem__(self, item: Any) -> Placeholder:
        return self

    def __or__(self, other: Any) -> Placeholder:
        return self

    __ror__ = __or__

    def __repr__(self) -> str:
        return f"<placeholder for {self.__name__}, which is not installed>"


@contextmanager
def placeholders(importer: str) -> Iterator[set[str]]:
    """Within, import statements of the package ``importer`` get placeholders for absent packages of `OPTIONAL`.

    Nothing is put into ``sys.modules``, so no other library comes to believe that the package exists. Yields the
    import names that were replaced so far.
    """
    used: set[str] = set()
    absent: dict[str, bool] = {}
    original = builtins.__import__

    def is_absent(top: str) -> bool:
        if top not in absent:
            # A module that somebody put there by hand may have no spec, for which find_spec raises.
            absent[top] = sys.modules.get(top) is None and importlib.util.find_spec(top) is None
        return absent[top]

    def importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        caller = (globals or {}).get("__name__") or ""
        top = name.partition(".")[0]
        if level == 0 and top in OPTIONAL and (caller + ".").startswith(importer + ".") and is_absent(top):
            used.add(top)
            return Placeholder(name if fromlist else top, OPTIONAL[top])
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = importing
    try:
        yield used
    finally:
        builtins.__import__ = original
