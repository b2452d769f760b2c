"""Functions on a CPU, recorded once as the operators that they come to, and run again as a flat list of those.

A step of a small UNet is thousands of small operators. To find out in Python which is next, and to note what autograd
wants to know of each, takes a fifth of it. A recording does as a CUDA graph does: the same, on the same memory.
"""

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .memory import is_out_of_memory
from .simplify import Layout, Place, Simplifier

PLAIN_TIMES = 8  # that a function runs first; to record it takes as long as its recording saves in 25 runs
PAYS_BELOW_S = 1.0  # what takes longer gains nothing
WRITABLE = bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None)
BOUND = torch._C._VariableFunctions, torch._C.TensorBase  # operators without torch.ops' own layer of Python
Run = Callable[[], torch.Tensor]


class RecordingError(RuntimeError):
    """What was done cannot be written down."""


class Recordings:
    """Records functions without arguments that give a result and add to `kept`.

    Each is run as it is at first. Then one run is recorded, and in the next, which has other inputs where a batch is
    another, it is seen whether the recording gives the same numbers: of what is no operator it knows nothing. Where it
    does, it runs from then on; where it does not, or a run cannot be recorded, the function goes on as it is.
    """

    def __init__(self, kept: Sequence[torch.Tensor] = ()):
        self.kept = kept

    def __call__(self, run: Run) -> Run:
        return _Recording(run, self.kept)


class _Recording:
    def __init__(self, run: Run, kept: Sequence[torch.Tensor]):
        self.run, self.kept = run, kept
        self.plain_times, self.quickest_s = 0, math.inf
        self.replay: Run | None = None
        self.was_tried = self.is_proven = False

    def __call__(self) -> torch.Tensor:
        if self.replay is not None:
            return self.replay() if self.is_proven else self._proven(self.replay)
        if not self.was_tried and self.plain_times >= PLAIN_TIMES and self.quickest_s < PAYS_BELOW_S:
            return self._recorded()
        began = time.perf_counter()
        result = self.run()
        self.plain_times += 1
        self.quickest_s = min(self.quickest_s, time.perf_counter() - began)
        return result

    def _recorded(self) -> torch.Tensor:
        self.was_tried = True
        before, recorder = self._moment(), Recorder()

        def recorded() -> torch.Tensor:
            with recorder:
                result = self.run()
            self.replay = recorder.finished(result)
            return result

        result = _unless_it_fails(recorded)
        if result is None:
            self._go_to(before)
            return self.run()
        return result

    def _proven(self, replay: Run) -> torch.Tensor:
        """First what is recorded, while nothing of the run itself is there yet; then the run, which counts."""
        before = self._moment()
        again = _unless_it_fails(replay)
        found: list[Any] = [again, *self._moment()]
        self._go_to(before)
        result = self.run()
        right = [result, *self._moment()]
        if again is None:
            self.replay = None
        elif all(bool(one.isfinite().all()) for one in right):  # else nothing is proved; the next run may do it
            self.is_proven = all(map(torch.equal, found, right))
            self.replay = replay if self.is_proven else None
        return result

    def _moment(self) -> list[torch.Tensor]:
        """Copies of what the function changes: `kept`, and the state of chance."""
        return [*(one.clone() for one in self.kept), torch.get_rng_state()]

    def _go_to(self, moment: Sequence[torch.Tensor]) -> None:
        *values, chance = moment
        for one, value in zip(self.kept, values, strict=True):
            one.copy_(value)
        torch.set_rng_state(chance)


class Recorder(TorchDispatchMode):
    """While it is on, writes down the operators that run, below autograd.

    Tensors from before are `constants`, in the order of the graph's placeholders; so are views of them, made but once.
    Raises `RecordingError` for an operator that tells Python a number, since the next run may have another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.constants: list[torch.Tensor] = []
        self.in_memory: dict[int, list[torch.Tensor]] = {}  # constants, by where their memory begins
        self.nodes = WeakIdKeyDictionary()  # by tensor; it keeps none, so that memory is freed as it always is
        self.places: dict[Node, Place] = {}
        self.changed: set[Node] = set()  # roots of what is changed in place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if func.is_view and given and all(map(self.is_constant, given)):
            return made
        written = {name: self.written(value) for name, value in kwargs.items()}
        node = self.graph.call_function(func, tuple(map(self.written, args)), written)
        is_one = not isinstance(made, tuple | list)
        for place, one in enumerate([made] if is_one else made):
            if isinstance(one, torch.Tensor):
                if all(one is not old for old in given):  # else it was changed in place
                    self.nodes[one] = node if is_one else self.graph.call_function(operator.getitem, (node, place))
                    self._note_place(one, given)
            elif one is not None:
                raise RecordingError(f"{func} tells Python a {type(one).__name__}")
        if func._schema.is_mutable:
            self._note_changes(func._schema.arguments, args, kwargs)
        return made

    def is_constant(self, tensor: torch.Tensor) -> bool:
        return tensor not in self.nodes or self.nodes[tensor].op == "placeholder"

    def written(self, value: object) -> Any:
        """An argument as the graph has it."""
        if isinstance(value, torch.Tensor):
            if value not in self.nodes:
                self.nodes[value] = self.graph.placeholder(f"constant_{len(self.constants)}")
                self._note_place(value, self.in_memory.setdefault(_memory(value), []))
                self.in_memory[_memory(value)].append(value)
                self.constants.append(value)
            return self.nodes[value]
        if isinstance(value, tuple | list):
            return [self.written(one) for one in value]
        if isinstance(value, WRITABLE):
            return value
        raise RecordingError(f"an operator takes a {type(value).__name__}")

    def _note_place(self, tensor: torch.Tensor, others: Iterable[torch.Tensor]) -> None:
        """It lies in the memory of one of the others, or in its own."""
        if tensor.layout is torch.strided:
            node, memory = self.nodes[tensor], _memory(tensor)
            roots = (self.places[self.nodes[one]].root for one in others if memory and _memory(one) == memory)
            layout = Layout(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)
            self.places[node] = Place(next(roots, node), layout)

    def _note_changes(self, arguments: Sequence[Any], args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """What an operator of these arguments writes to."""
        for place, argument in enumerate(arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                self.changed |= {self.places[self.nodes[one]].root for one in _tensors([value])}

    def finished(self, result: torch.Tensor) -> Run:
        """Runs what was recorded, up to its `result`."""
        self.graph.output(self.written(result))
        self.graph.eliminate_dead_code()
        Simplifier(self.places, self.changed)(self.graph)
        for node in self.graph.nodes:
            if node.op == "call_function":
                node.target = _bound(node.target)
        module, constants = GraphModule(torch.nn.Module(), self.graph), self.constants

        def replay() -> torch.Tensor:
            with torch.inference_mode():
                return module.forward(*constants)

        return replay


def _bound(target: Any) -> Any:
    """An operator of torch's own as its bindings have it, which choose by arguments what `target` is already."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        name = target.overloadpacket.__name__
        return next((getattr(place, name) for place in BOUND if hasattr(place, name)), target)
    return target


def _memory(tensor: torch.Tensor) -> int:
    """Where its memory begins; 0 where it has none, or hides it."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _unless_it_fails(compute: Run) -> torch.Tensor | None:
    """What `compute` gives; None where it fails other than for too little memory. A fault of the run's comes again."""
    try:
        return compute()
    except Exception as error:
        if is_out_of_memory(error):
            raise
    return None
