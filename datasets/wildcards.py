"""Expands wildcards in captions: `a {red|blue} cat` becomes one of the two at random.

Wildcards can be nested, and an alternative can be empty: `{big |}cat`. Doubled braces are literal braces: `{{a|b}}`
becomes `{a|b}`. A pair of braces without `|`, and an unmatched brace, are kept as they are.
"""

import random
from collections.abc import Mapping


def expand_wildcards(text: str, rng: random.Random) -> str:
    """Return the text with one alternative chosen at each wildcard, all with equal probability."""
    return _expanded(text, 0, len(text), matching_braces(text), rng)


def matching_braces(text: str) -> dict[int, int]:
    """Map the position of each matched opening brace to that of its closing brace."""
    closing, opened = {}, []
    for at, character in enumerate(text):
        if character == "{":
            opened.append(at)
        elif character == "}" and opened:
            closing[opened.pop()] = at
    return closing


def _expanded(text: str, start: int, end: int, closing: Mapping[int, int], rng: random.Random) -> str:
    out, at = "", start
    while at < end:
        close = closing.get(at)
        if close is None:
            out += text[at]
            at += 1
            continue
        if _doubled(at, close, closing):
            out += "{" + _expanded(text, at + 2, close - 1, closing, rng) + "}"
        elif bars := _bars(text, at, close, closing):
            edges = [at, *bars, close]
            choice = rng.randrange(len(edges) - 1)
            out += _expanded(text, edges[choice] + 1, edges[choice + 1], closing, rng)
        else:
            out += "{" + _expanded(text, at + 1, close, closing, rng) + "}"
        at = close + 1
    return out


def _doubled(start: int, end: int, closing: Mapping[int, int]) -> bool:
    """Whether a pair of braces contains exactly one other pair."""
    return start in closing and closing[start] == end and closing.get(start + 1) == end - 1


def _bars(text: str, start: int, end: int, closing: Mapping[int, int]) -> list[int]:
    """Return the positions of each `|` of a pair, without those of nested pairs."""
    bars, at = [], start + 1
    while at < end:
        if text[at] == "|":
            bars.append(at)
        at = closing.get(at, at) + 1
    return bars
