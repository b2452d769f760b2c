"""Functions on a CPU, recorded once as the operators that they come to, and run again as a flat list of those.

A step of a small UNet is thousands of small operators. To find out in Python which is next, and to note what autograd
wants to know of each, takes a fifth of it. A recording does as a CUDA graph does: the same, on the same memory.
"""

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from weakref import finalize

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .grouping import group
from .onednn_packing import pack_products
from .program import Place, Program, Room, layout_of, written_to
from .simplify import simplify
from .tensor_memory import memory_of

PAID_BACK = 25  # runs in which a recording saves the time that it took
MAX_EXTRA_BYTES = 2**28  # of constants that are laid out otherwise, for all shapes of a batch
FACTORS_STD, PROOFS = 0.1, 8
PAYS_BELOW_S = 3.0  # what takes longer gains little: SD 1.5 at 512 px 1 %, at 256 px 4 %
WRITABLE = bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None)
Run = Callable[[], torch.Tensor]


class RecordingError(RuntimeError):
    """What was done cannot be written down."""


class Recordings:
    """Records functions without arguments that give a result and add to `kept`.

    A run is recorded, of the first function the first one, and in the next, which has other inputs where a batch is
    another, it is seen whether the recording gives the same numbers: of what is no operator it knows nothing. For that
    `factors`, of which half are zero at first and would hide much, are random. Where the numbers are the same, the
    recording runs from then on; where they are not, or a run cannot be recorded or takes long, the function goes on as
    it is. So does one that is not likely to be run often enough to pay for its recording, of the `runs` of all that
    are expected.
    """

    def __init__(self, kept: Sequence[torch.Tensor] = (), factors: Sequence[torch.Tensor] = (), runs: float = math.inf):
        self.kept, self.factors, self.runs = kept, factors, runs
        self.done, self.room = 0, Room(MAX_EXTRA_BYTES)

    def __call__(self, run: Run) -> Run:
        return _Recording(run, self)

    def pays_after(self, times: int) -> bool:
        """Whether it pays to record a function that has run so many times: by its share of the runs until now, which is
        all for the first, it will pay twice over, or it would have paid already."""
        share = times / self.done if self.done else 1.0
        return times >= PAID_BACK or (share > 0 and self.runs * share >= 2 * PAID_BACK)


class _Recording:
    def __init__(self, run: Run, recordings: Recordings):
        self.run, self.recordings, self.kept, self.factors = run, recordings, recordings.kept, recordings.factors
        self.times, self.quickest_s, self.proofs = 0, math.inf, 0
        self.ways = [True, False]  # with products grouped and without: those that are left to try, the quickest first
        self.replay: Run | None = None
        self.is_proven = False

    def __call__(self) -> torch.Tensor:
        is_quick = not self.times or self.quickest_s < PAYS_BELOW_S
        pays = is_quick and self.recordings.pays_after(self.times)
        self.times += 1
        self.recordings.done += 1
        if self.replay is not None:
            return self.replay() if self.is_proven else self._proven(self.replay)
        return self._recorded(grouped=self.ways[0]) if self.ways and pays else self._timed()

    def _timed(self) -> torch.Tensor:
        """Run as it is."""
        began = time.perf_counter()
        result = self.run()
        self.quickest_s = min(self.quickest_s, time.perf_counter() - began)
        return result

    def _recorded(self, grouped: bool) -> torch.Tensor:
        before, room = self._moment(), self.recordings.room
        recorder, left = Recorder(Program(room=room)), room.bytes_left

        def recorded() -> torch.Tensor:
            with recorder:
                result = self._timed()
            if self.quickest_s < PAYS_BELOW_S:
                self.replay = recorder.finished(result, grouped)
            return result

        result = _unless_it_fails(recorded)
        self.free_room = finalize(self, room.gets_back, left - room.bytes_left)
        if result is None:
            self._give_up()
            self._go_to(before)
            return self._timed()
        return result

    def _give_up(self) -> None:
        """The way that was tried leads nowhere."""
        self.replay = None
        self.ways.pop(0)
        self.free_room()

    def _proven(self, replay: Run) -> torch.Tensor:
        """Both on the same random factors, which leaves nothing behind; then what was asked for, by the one proved.

        Numbers that are not finite, or gradients that are all zero, prove nothing; the next run may.
        """
        before = self._moment()
        self.proofs += 1
        try:
            for one in self.kept:
                one.zero_()
            generator = torch.Generator().manual_seed(0)
            for factor in self.factors:
                factor.normal_(0, FACTORS_STD, generator=generator)
            drawn = self._moment()
            again, found = _unless_it_fails(replay), self._moment()
            self._go_to(drawn)
            result, right = self.run(), self._moment()
        finally:
            self._go_to(before)
        says_much = all(bool(one.isfinite().all()) for one in (result, *right)) and all(
            map(torch.any, right[: len(self.kept)])
        )
        self.is_proven = says_much and again is not None and all(map(torch.equal, (again, *found), (result, *right)))
        if not self.is_proven and (says_much or again is None or self.proofs >= PROOFS):
            self._give_up()
        return replay() if self.is_proven else self.run()

    def _moment(self) -> list[torch.Tensor]:
        """Copies of what a run changes and a proof draws, and the state of chance."""
        return [*(one.clone() for one in (*self.kept, *self.factors)), torch.get_rng_state()]

    def _go_to(self, moment: Sequence[torch.Tensor]) -> None:
        *values, chance = moment
        for one, value in zip((*self.kept, *self.factors), values, strict=True):
            one.copy_(value)
        torch.set_rng_state(chance)


class Recorder(TorchDispatchMode):
    """While it is on, writes down the operators that run, below autograd.

    Tensors from before are constants of the program; so are views of them, made but once.
    Raises `RecordingError` for an operator that tells Python a number, since the next run may have another.
    """

    def __init__(self, program: Program | None = None) -> None:
        super().__init__()
        self.program = program or Program()
        self.nodes = WeakIdKeyDictionary()  # by tensor; it keeps none, so that memory is freed as it always is
        self.in_memory: dict[int, list[torch.Tensor]] = {}  # constants, by where their memory begins

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        self.program.frozen |= {memory_of(one) for one in given if isinstance(one, Parameter) and not one.requires_grad}
        if any(one.is_complex() or one.is_neg() for one in given):
            raise RecordingError(f"{func} is of numbers that are not in memory as they are")
        if func.is_view and given and all(map(self.is_constant, given)):
            return made
        written = {name: self.written(value) for name, value in kwargs.items()}
        graph, places = self.program.graph, self.program.places
        node = graph.call_function(func, tuple(map(self.written, args)), written)
        if torch._C._current_graph_task_id() >= 0:
            self.program.in_backward.add(node)
        is_one = not isinstance(made, tuple | list)
        for place, one in enumerate([made] if is_one else made):
            if isinstance(one, torch.Tensor):
                if all(one is not old for old in given):  # else it was changed in place
                    self.nodes[one] = node if is_one else graph.call_function(operator.getitem, (node, place))
                    self._note_place(one, given)
            elif one is not None:
                raise RecordingError(f"{func} tells Python a {type(one).__name__}")
        self.program.changed |= {places[self.nodes[one]].root for one in _tensors(written_to(func, args, kwargs))}
        return made

    def is_constant(self, tensor: torch.Tensor) -> bool:
        return tensor not in self.nodes or self.nodes[tensor].op == "placeholder"

    def written(self, value: object) -> Any:
        """An argument as the graph has it."""
        if isinstance(value, torch.Tensor):
            if value not in self.nodes:
                self.nodes[value] = self.program.constant(value)
                self._note_place(value, self.in_memory.setdefault(memory_of(value), []))
                self.in_memory[memory_of(value)].append(value)
            return self.nodes[value]
        if isinstance(value, tuple | list):
            return [self.written(one) for one in value]
        if isinstance(value, WRITABLE):
            return value
        raise RecordingError(f"an operator takes a {type(value).__name__}")

    def _note_place(self, tensor: torch.Tensor, others: Iterable[torch.Tensor]) -> None:
        """It lies in the memory of one of the others, or in its own."""
        if tensor.layout is torch.strided:
            node, places, memory = self.nodes[tensor], self.program.places, memory_of(tensor)
            roots = (places[self.nodes[one]].root for one in others if memory and memory_of(one) == memory)
            places[node] = Place(next(roots, node), layout_of(tensor))

    def finished(self, result: torch.Tensor, grouped: bool = True) -> Run:
        """Runs what was recorded, up to its `result`; its products `grouped`, which may change how they are rounded."""
        self.program.graph.output(self.written(result))
        simplify(self.program)
        if grouped:
            group(self.program)
            simplify(self.program)
            pack_products(self.program)
        return self.program.runnable()


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _unless_it_fails(compute: Run) -> torch.Tensor | None:
    """What `compute` gives; None where it fails, be it for too little memory. A fault of the run's comes again."""
    with suppress(Exception):
        return compute()
    return None
