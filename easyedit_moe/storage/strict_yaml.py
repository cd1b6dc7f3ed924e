"""YAML as it is meant: no key twice, no tags that make objects, and one error for whatever is wrong with a text."""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 100_000
"""Values and keys that a text may hold, those behind an alias counted wherever it stands."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that is given twice, aliases that make much of little, and values that
    their tag's rule can't read.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML's; counts what is below each node."""
        alias = self.check_event(yaml.AliasEvent)
        node: yaml.Node | None = super().compose_node(parent, index)
        if node is None or node in self.sizes:
            return node
        if alias:
            raise yaml.composer.ComposerError(None, None, "a value contains itself", node.start_mark)
        below = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            below = [one for pair in node.value for one in pair]
        self.sizes[node] = 1 + sum(self.sizes[one] for one in below)
        if self.sizes[node] > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES} values", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As PyYAML's, which lets the last one of equal keys win without a word."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    text = f"the key {key.value[:80]!r} is given twice; keep one of both"
                    raise yaml.composer.ComposerError(None, None, text, key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As PyYAML's, with its type of error for what a tag's rule can't read, such as a date that is none."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
            text = f"{str(node.value)[:80]!r} can't be read as {node.tag}: {error}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from error


def parse_yaml(text: str) -> Any:
    """What a text of YAML says: scalars, lists and dicts whose keys are scalars.

    Raises:
        ValueError: it is no YAML, gives a key twice, has a tag that is not of the standard or a value that its tag
            can't mean, is nested too deeply, or holds more than `MOST_VALUES` values. The message says where.
    """
    try:
        loader = _StrictLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
