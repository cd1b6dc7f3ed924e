"""Pages whose tables are made of results, between comments that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def filled(text: str, parts: Mapping[str, str]) -> str:
    """The page with each part anew, between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
        ValueError: the page has no place for a part.
    """
    for name, found in parts.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"The page has no place for {name!r}.")
        text = before + start + "\n" + found + "\n" + end + after
    return text


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """In Markdown, the first ``texts`` columns to the left and all else to the right."""
    head = "|" + "---|" * texts + "---:|" * (len(columns) - texts)
    return "\n".join(["| " + " | ".join(columns) + " |", head, *("| " + " | ".join(row) + " |" for row in rows)])
