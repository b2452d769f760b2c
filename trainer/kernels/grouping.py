"""Small products of a recorded program, computed together: on a CPU each costs more to call than to compute.

A LoRA on a layer is six products more, of a rank's width. Together they give the same as apart to the bit, where the
library adds up in the same order; whoever uses this has to see whether it does.
"""

import operator
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch.fx import Node

from .onednn_packing import can_pack
from .program import ADDMM, AS_STRIDED, MM, Layout, Place, Product, Program, layout_of
from .tensor_memory import memory_of

ATEN = torch.ops.aten
MAX_WAITING_BYTES = 2**26  # of the sides of products that wait for the end


def group(program: Program) -> None:
    """Change a simplified program in place."""
    _join(program)
    _batch(program)


def _join(program: Program) -> None:
    """One matrix times several constants becomes one product with the constants side by side: those of a layer and of
    its factor A, of q, k and v, of all layers that hear the same text."""
    order, changes = _changes(program)
    together: dict[object, list[Product]] = defaultdict(list)
    for product in filter(None, map(Product.of, program.calls)):
        if product.left in program.places and program.has_fixed_sides(product) and _can_be_part(program, product):
            changes_before = bisect_left(changes[program.places[product.left].root], order[product.node])
            right = program.places[product.right].layout
            is_backward = product.node in program.in_backward  # what is recomputed there is not kept from before
            together[product.left, changes_before, right.lies_in_columns, is_backward].append(product)
    copies = []
    parts: dict[Node, Node] = {}  # what stands for the products that are no longer computed
    for products in together.values():
        has_frozen = any(program.is_frozen(product.right) for product in products)  # else it is not worth the copies
        for members in _apart(program, products) if len(products) > 1 and has_frozen else []:
            if program.room.takes(sum(program.constants[product.right].nbytes for product in members)):
                wide, edges = _side_by_side([program.constants[product.right] for product in members])
                left = parts.get(members[0].left, members[0].left)
                parts |= _replaced(program, members, left, wide, edges)
                for product, (start, end) in zip(members, pairwise(edges), strict=True):
                    if not program.is_frozen(product.right):
                        copies.append((program.constant(wide[:, start:end]), product.right))
    if copies:
        targets, sources = zip(*copies, strict=True)
        with program.graph.inserting_before(program.calls[0]):
            program.call(ATEN._foreach_copy_.default, list(targets), list(sources))


def _apart(program: Program, products: Sequence[Product]) -> list[list[Product]]:
    """Several frozen ones go without those that change, which cannot be laid out for oneDNN once and for all."""
    frozen = [product for product in products if program.is_frozen(product.right)]
    if (len(frozen) == 1 and frozen[0].bias is None) or not can_pack(program.places[products[0].right].layout.dtype):
        return [list(products)]
    changing = [product for product in products if product not in frozen]
    return [members for members in (frozen, changing) if len(members) > 1]


def _changes(program: Program) -> tuple[dict[Node, int], dict[Node, list[int]]]:
    """Of each node its number, and of each root the numbers of those that change it in place, in order."""
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    changes: dict[Node, list[int]] = defaultdict(list)
    for node, root in program.changes():
        changes[root].append(order[node])
    return order, changes


def _can_be_part(program: Program, product: Product) -> bool:
    """Whether all views of it can be views of a wider one."""
    width = program.places[product.node].layout.size[1]
    views = [node for node in program.views(product.node) if node is not product.node]
    return all(
        node.target is AS_STRIDED and _widened(program.places[node].layout, width, 2 * width, 0) for node in views
    )


def _side_by_side(matrices: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """One matrix of several, and the columns where each begins and ends. It lies in rows or in columns as they do, but
    for oneDNN, which gives the same to the bit from rows, and sooner."""
    edges = [*accumulate((matrix.shape[1] for matrix in matrices), initial=0)]
    with torch.no_grad():
        if layout_of(matrices[0]).lies_in_columns and not can_pack(matrices[0].dtype):
            return torch.cat([matrix.t() for matrix in matrices]).t(), edges
        return torch.cat(list(matrices), 1), edges


def _side_by_side_biases(biases: Sequence[torch.Tensor | None], edges: Sequence[int]) -> torch.Tensor:
    """Those of products between `edges`, with zeros for what has none."""
    one = next(bias for bias in biases if bias is not None)
    whole = torch.zeros(edges[-1], dtype=one.dtype)
    for bias, (start, end) in zip(biases, pairwise(edges), strict=True):
        if bias is not None:
            whole[start:end] = bias.detach()
    return whole


def _replaced(
    program: Program, products: Sequence[Product], left: Node, wide: torch.Tensor, edges: Sequence[int]
) -> dict[Node, Node]:
    """Let parts of one product stand for products of one left side; which part stands for what of them."""
    one = program.places[products[0].node].layout
    layout = Layout((one.size[0], edges[-1]), (edges[-1], 1), 0, one.dtype)
    parts: dict[Node, Node] = {}
    sides = left, program.constant(wide)
    if all(program.is_frozen(product.right) for product in products):
        program.frozen.add(memory_of(wide))
    biases = [None if product.bias is None else program.constants[product.bias] for product in products]
    if any(bias is not None for bias in biases):
        bias = _side_by_side_biases(biases, edges)
        program.frozen.add(memory_of(bias))
        sides = program.constant(bias), *sides
    with program.graph.inserting_before(products[0].node):
        joint = program.call(ADDMM if len(sides) == 3 else MM, *sides, layout=layout)
        for product, (start, end) in zip(products, pairwise(edges), strict=True):
            if product.node in program.changed:
                program.changed.add(joint)
            for node in program.views(product.node):
                part = _widened(program.places[node].layout, end - start, edges[-1], start)
                assert part is not None
                parts[node] = program.view(Place(joint, part))
                node.replace_all_uses_with(parts[node])
    return parts


def _widened(layout: Layout, width: int, joint_width: int, start: int) -> Layout | None:
    """Of a view of a matrix in rows of `width`, which become columns from `start` on of one of `joint_width`; None
    where the view runs on from one row into the next."""
    last = layout.offset % width + sum(
        (size - 1) * (stride % width) for size, stride in zip(layout.size, layout.stride, strict=True)
    )
    if last >= width:
        return None
    stride = tuple(stride // width * joint_width + stride % width for stride in layout.stride)
    offset = layout.offset // width * joint_width + layout.offset % width + start
    return Layout(layout.size, stride, offset, layout.dtype)


@dataclass(frozen=True)
class _Added:
    """`alpha` times a product, which is used for nothing else, added to the constant `total`."""

    node: Node
    total: Node
    product: Product

    @property
    def alpha(self) -> object:
        return self.node.kwargs.get("alpha", 1)


def _batch(program: Program) -> None:
    """Products that are only added to constants, as gradients of factors are, wait for the end; there those of one
    shape are one batched product."""
    order, changes = _changes(program)
    room = MAX_WAITING_BYTES
    together: dict[object, list[_Added]] = defaultdict(list)
    for added in _added(program):
        sides = [program.places[side] for side in (added.product.left, added.product.right)]
        room -= sum(side.layout.num_bytes for side in sides)
        if room >= 0 and not any(
            bisect_left(changes[side.root], order[added.product.node]) < len(changes[side.root]) for side in sides
        ):
            total = program.places[added.total].layout
            shape = *((side.layout.size, side.layout.stride, side.layout.dtype) for side in sides), total.dtype
            together[*shape, added.alpha].append(added)
    with program.graph.inserting_before(next(node for node in program.graph.nodes if node.op == "output")):
        for members in together.values():
            if len(members) > 1:
                sides = ([one.product.left for one in members], [one.product.right for one in members])
                products = program.call(ATEN.bmm.default, *(_stacked(program, side) for side in sides))
                parts = program.call(ATEN.unbind.int, products)
                each = [program.call(operator.getitem, parts, number) for number in range(len(members))]
                totals = [one.total for one in members]
                program.call(ATEN._foreach_add_.List, totals, each, alpha=members[0].alpha)
                for one in members:
                    program.graph.erase_node(one.node)


def _added(program: Program) -> list[_Added]:
    """Those that may wait: nothing else of the program sees what they are added to, which they are once, nor do they
    overlap."""
    totals: dict[Node, list[Node]] = defaultdict(list)
    for constant in program.constants:
        if constant in program.places and constant.users:
            totals[program.places[constant].root].append(constant)
    found = []
    for root in (one for one in totals if one in program.changed):
        sums = [(total, node) for total in totals[root] for node in total.users]
        are_sums = all(
            node.target is ATEN.add_.Tensor and node.args[0] is total and node.args[1] is not total and not node.users
            for total, node in sums
        )
        if are_sums and _lie_apart([program.places[total].layout for total in totals[root]]):
            for total, node in sums:
                product = Product.of(node.args[1])
                if product and product.bias is None and len(product.node.users) == len(total.users) == 1:
                    found.append(_Added(node, total, product))
    return found


def _lie_apart(layouts: Iterable[Layout]) -> bool:
    """Whether they are whole pieces of memory that do not overlap."""
    pieces = []
    for layout in layouts:
        whole = torch.empty(layout.size, device="meta")
        if layout.stride != whole.stride():
            return False
        pieces.append((layout.offset, layout.offset + whole.numel()))
    return all(end <= start for (_, end), (start, _) in pairwise(sorted(pieces)))


def _stacked(program: Program, matrices: Sequence[Node]) -> Node:
    """(L, m, n) of L matrices (m, n) of one layout; those that lie in columns are stacked as they lie."""
    in_columns = program.places[matrices[0]].layout.lies_in_columns
    if in_columns:
        places = [program.places[matrix] for matrix in matrices]
        matrices = [program.view(Place(place.root, place.layout.transposed)) for place in places]
    stacked = program.call(ATEN.stack.default, list(matrices))
    return program.call(ATEN.transpose.int, stacked, 1, 2) if in_columns else stacked
