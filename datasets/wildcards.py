"""Wildcards in captions: `a {red|blue} cat` says one of the two each time.

They may be nested, and a place may be empty: `{big |}cat`. Doubled braces are braces: `{{a|b}}` says `{a|b}`.
A pair of braces without `|` in it, and a brace without its pair, stand as they are.
"""

import random
from collections.abc import Mapping


def chosen(text: str, draw: random.Random) -> str:
    """The text with one way taken at each wildcard; all ways are as likely."""
    return _said(text, 0, len(text), pairs(text), draw)


def pairs(text: str) -> dict[int, int]:
    """Where each brace is that has its pair -> where that closes."""
    closing, opened = {}, []
    for at, letter in enumerate(text):
        if letter == "{":
            opened.append(at)
        elif letter == "}" and opened:
            closing[opened.pop()] = at
    return closing


def _said(text: str, start: int, end: int, closing: Mapping[int, int], draw: random.Random) -> str:
    said, at = "", start
    while at < end:
        close = closing.get(at)
        if close is None:
            said += text[at]
            at += 1
            continue
        if _doubled(at, close, closing):
            said += "{" + _said(text, at + 2, close - 1, closing, draw) + "}"
        elif bars := _bars(text, at, close, closing):
            edges = [at, *bars, close]
            way = draw.randrange(len(edges) - 1)
            said += _said(text, edges[way] + 1, edges[way + 1], closing, draw)
        else:
            said += "{" + _said(text, at + 1, close, closing, draw) + "}"
        at = close + 1
    return said


def _doubled(start: int, end: int, closing: Mapping[int, int]) -> bool:
    """Whether a pair holds nothing but another pair."""
    return start in closing and closing[start] == end and closing.get(start + 1) == end - 1


def _bars(text: str, start: int, end: int, closing: Mapping[int, int]) -> list[int]:
    """Where the `|` of a pair are that are not those of a pair within."""
    bars, at = [], start + 1
    while at < end:
        if text[at] == "|":
            bars.append(at)
        at = closing.get(at, at) + 1
    return bars
