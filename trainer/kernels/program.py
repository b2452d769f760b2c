"""A recorded function: its operators in order, as a torch.fx graph, and what is known of the memory that they use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .tensor_memory import memory_of

AS_STRIDED = torch.ops.aten.as_strided.default
MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
BOUND = torch._C._VariableFunctions, torch._C.TensorBase  # operators without torch.ops' own layer of Python


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory; stride and offset in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.size).numel() * self.dtype.itemsize

    @property
    def transposed(self) -> "Layout":
        """Of a matrix, the other way round."""
        return Layout(self.size[::-1], self.stride[::-1], self.offset, self.dtype)

    @property
    def lies_in_columns(self) -> bool:
        """Of a matrix: whether neighbours in a column, not in a row, are neighbours in memory."""
        return self.stride[0] < self.stride[1]

    @property
    def is_in_rows(self) -> bool:
        """Whether it is a matrix in rows, with nothing between them."""
        return len(self.size) == 2 and self.stride == (self.size[1], 1)

    @property
    def is_whole_matrix(self) -> bool:
        """Whether it is a matrix in rows or in columns, with nothing between them."""
        return self.stride in ((self.size[1], 1), (1, self.size[0])) if len(self.size) == 2 else False


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: in the memory that was made for the node `root`."""

    root: Node
    layout: Layout


@dataclass(frozen=True)
class Product:
    """left @ right, matrices, and + bias where there is one."""

    node: Node
    left: Node
    right: Node
    bias: Node | None = None

    @classmethod
    def of(cls, node: object) -> "Product | None":
        if not isinstance(node, Node) or node.kwargs or node.target not in (MM, ADDMM):
            return None
        *bias, left, right = (one for one in node.args if isinstance(one, Node))
        return cls(node, left, right, *bias)


@dataclass
class Room:
    """Bytes of memory that are left for copies of constants that lie otherwise."""

    bytes_left: int

    def takes(self, num_bytes: int) -> bool:
        """Whether so many are left; then they are taken."""
        fits = num_bytes <= self.bytes_left
        self.bytes_left -= num_bytes if fits else 0
        return fits

    def gets_back(self, num_bytes: int) -> None:
        """They are free again."""
        self.bytes_left += num_bytes


@dataclass
class Program:
    """Placeholders of `graph` are `constants`: tensors that are there before, and may have other values in each run.

    `places` tells of every node that is one dense tensor where it lies; `changed` are the roots of what is changed in
    place. `frozen` tells where memory begins that no run changes: that of parameters without gradient. `in_backward`
    are operators that a backward pass runs. `room` is for constants that are laid out otherwise.
    """

    graph: Graph = field(default_factory=Graph)
    constants: dict[Node, torch.Tensor] = field(default_factory=dict)
    places: dict[Node, Place] = field(default_factory=dict)
    changed: set[Node] = field(default_factory=set)
    frozen: set[int] = field(default_factory=set)
    in_backward: set[Node] = field(default_factory=set)
    room: Room = field(default_factory=lambda: Room(2**63))
    numbers: Iterator[int] = field(default_factory=count)

    @property
    def calls(self) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def is_frozen(self, constant: Node) -> bool:
        return memory_of(self.constants[constant]) in self.frozen

    def has_fixed_sides(self, product: Product) -> bool:
        """Whether the right side is a matrix that was there before and is not changed, and so is the bias where there
        is one, a row that no run changes."""
        right, bias = product.right, product.bias
        if right not in self.constants or right not in self.places or self.places[right].root in self.changed:
            return False
        if bias is not None:
            width = self.constants[right].shape[1:]
            if bias not in self.constants or not self.is_frozen(bias) or self.constants[bias].shape != width:
                return False
        return self.places[right].layout.is_whole_matrix

    def changes(self) -> Iterator[tuple[Node, Node]]:
        """Every operator that changes memory in place, in order, with the root of each."""
        for node in self.calls:
            for value in written_to(node.target, node.args, node.kwargs):
                for one in value if isinstance(value, tuple | list) else [value]:
                    if isinstance(one, Node) and one in self.places:
                        yield node, self.places[one].root

    def views(self, root: Node) -> list[Node]:
        """All that lie in the memory of a root, itself first, in a simplified program."""
        return [root, *(node for node in root.users if node in self.places and self.places[node].root is root)]

    def constant(self, tensor: torch.Tensor) -> Node:
        """Add one, before all else."""
        with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            node = self.graph.placeholder(f"constant_{next(self.numbers)}")
        self.constants[node] = tensor
        if tensor.layout is torch.strided:
            self.places[node] = Place(node, layout_of(tensor))
        return node

    def call(self, target: Any, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Node:
        """Add an operator, where the graph inserts; `layout` of what it makes, if that is one dense tensor."""
        node = self.graph.call_function(target, args, kwargs)
        if layout is not None:
            self.places[node] = Place(node, layout)
        return node

    def view(self, place: Place) -> Node:
        """What lies there: the root itself, or a view that is added."""
        if self.places[place.root].layout == place.layout:
            return place.root
        layout = place.layout
        node = self.call(AS_STRIDED, place.root, list(layout.size), list(layout.stride), layout.offset)
        self.places[node] = place
        return node

    def runnable(self) -> Callable[[], torch.Tensor]:
        """Runs it on what the constants are then, without gradients."""
        for node in [node for node in self.constants if not node.users]:
            self.graph.erase_node(node)
        constants = [self.constants[node] for node in self.graph.nodes if node.op == "placeholder"]
        for node in self.calls:
            node.target = _bound(node.target)
        module = GraphModule(torch.nn.Module(), self.graph)

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return module.forward(*constants)

        return run


def layout_of(tensor: torch.Tensor) -> Layout:
    return Layout(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


def written_to(operator: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """Those of its arguments that an operator changes in place."""
    if isinstance(operator, torch._ops.OpOverload) and operator._schema.is_mutable:
        for place, argument in enumerate(operator._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield args[place] if place < len(args) else kwargs.get(argument.name)


def _bound(target: Any) -> Any:
    """An operator of torch's own as its bindings have it, which choose by arguments what `target` is already; not where
    torch gives that name to a function in Python, which takes other arguments."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        name = target.overloadpacket.__name__
        own = next((getattr(place, name) for place in BOUND if hasattr(place, name)), target)
        return target if getattr(torch, name, own) is not own else own
    return target
