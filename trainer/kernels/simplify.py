"""A recorded program with fewer operators, which gives the same to the bit.

A view of a view is taken straight from the memory where it lies; what was computed before is not computed again;
nothing is divided by one; and what lies in order already is not copied to lie so.
"""

import math
from collections.abc import Hashable, Mapping

import torch
from torch.fx import Node

from .program import AS_STRIDED, Place, Program

ATEN = torch.ops.aten
BY_A_NUMBER = {ATEN.div.Tensor, ATEN.mul.Tensor}


def simplify(program: Program) -> None:
    """Change the program in place."""
    simplifier = _Simplifier(program)
    for node in list(program.graph.nodes):
        if node in program.places:
            simplifier.meet(node)
    program.graph.eliminate_dead_code()


class _Simplifier:
    def __init__(self, program: Program):
        self.graph, self.places = program.graph, program.places
        self.constants, self.changed, self.in_backward = program.constants, program.changed, program.in_backward
        self.known: dict[Hashable, Node] = {}
        self.order = {node: number for number, node in enumerate(program.graph.nodes)}
        self.last_change = {root: self.order[node] for node, root in program.changes()}

    def meet(self, node: Node) -> None:
        """The next node in order; it goes if one before can stand for it."""
        other = self._same(node)
        if other is not None:
            self.places[node] = self.places[other]
            node.replace_all_uses_with(other)
            self.graph.erase_node(node)
            self.constants.pop(node, None)

    def _same(self, node: Node) -> Node | None:
        place = self.places[node]
        if node.op == "placeholder":
            first = self.known.setdefault(place, place.root if place.layout == self.places[place.root].layout else node)
            return None if first is node else first
        root = self.places[place.root].root
        if root is not node:
            return self._view(node, Place(root, place.layout))
        if root in self.changed:  # then it is the same as another only for a while
            return None
        return self._unchanged(node) or self._computed_before(node)

    def _view(self, node: Node, place: Place) -> Node | None:
        """Of memory that is there: the root itself or the first such view; else `node` becomes a view of the root."""
        self.places[node] = place
        layout = place.layout
        if self.places[place.root].layout == layout:
            return place.root
        if self.places[place.root].layout.dtype == layout.dtype:
            node.target, node.kwargs = AS_STRIDED, {}
            node.args = place.root, list(layout.size), list(layout.stride), layout.offset
        first = self.known.setdefault(place, node)
        return None if first is node else first

    def _unchanged(self, node: Node) -> Node | None:
        """What is copied, or multiplied or divided by one, only to be as it was."""
        given = node.args[0] if node.args else None
        by_one = node.target in BY_A_NUMBER and type(node.args[1]) in (int, float) and node.args[1] == 1
        if not (by_one or node.target is ATEN.clone.default) or not isinstance(given, Node):
            return None
        place = self.places.get(given)
        if place is None or place.root.op == "placeholder" or not self._is_settled(place.root, node):
            return None
        return given if place.layout == self.places[node].layout else None

    def _computed_before(self, node: Node) -> Node | None:
        """The same operator of the same; what is recomputed in the backward pass is, so that nothing is kept for it."""
        given = node.all_input_nodes
        operator = node.target
        if (
            not isinstance(operator, torch._ops.OpOverload)
            or operator._schema.is_mutable
            or torch.Tag.nondeterministic_seeded in operator.tags
            or not given
            or any(one not in self.places or not self._is_settled(self.places[one].root, node) for one in given)
        ):
            return None
        first = self.known.setdefault(
            (operator, node in self.in_backward, _comparable(node.args), _comparable(node.kwargs)), node
        )
        return None if first is node else first

    def _is_settled(self, root: Node, node: Node) -> bool:
        """Whether nothing changes what lies there from the node on."""
        return root not in self.changed or self.last_change.get(root, math.inf) < self.order[node]


def _comparable(value: object) -> Hashable:
    """An argument, to compare by: numbers of other types, and both zeros, are others."""
    if isinstance(value, Node):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_comparable, value))
    if isinstance(value, Mapping):
        return tuple((name, _comparable(one)) for name, one in value.items())
    return type(value), repr(value)
