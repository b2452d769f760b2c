"""Record a pass on a CPU as a tape of operators, and replay the tape instead of running the pass.

A step of a small UNet is thousands of small operators. Autograd and the model's Python code, which a tape leaves out,
take a fifth to a third of its time. A tape is bound to the memory of the tensors that existed before it was recorded:
parameters, inputs and gradient buffers must be changed in place and never replaced. It contains only what ran as an
operator, so each tape is verified against the pass itself before it is used.
"""

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

PAYS_AFTER = 25  # replays that save as much time as recording and verifying a tape takes
PAYS_BELOW_S = 3.0  # a slower pass gains little: SD 1.5 gains 4 % at 256 px and 1 % at 512 px
MAX_ATTEMPTS = 8  # to verify a tape
FACTORS_STD = 0.1
BINDABLE = bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None)
BINDINGS = torch._C._VariableFunctions, torch._C.TensorBase
Pass = Callable[[], torch.Tensor]


class Recordings:
    """Makes passes (functions without arguments that return a tensor) faster with tapes.

    A pass may change only the `accumulated` tensors (gradient buffers) and the random state. `factors` are the trained
    tensors that it reads. `runs` is the expected number of runs of all passes together.
    """

    def __init__(
        self, accumulated: Sequence[torch.Tensor] = (), factors: Sequence[torch.Tensor] = (), runs: float = math.inf
    ):
        self.accumulated, self.factors, self.runs = accumulated, factors, runs
        self.runs_done = 0

    def __call__(self, run: Pass) -> Pass:
        return _TapedPass(run, self)

    def pays(self, times: int) -> bool:
        """Whether to record a pass that has run `times` times.

        Its share of the runs so far (for the very first pass: all) predicts its share of the expected runs. It is
        recorded if that is twice what pays, or if recording it at the start would have paid by now.
        """
        share = times / self.runs_done if self.runs_done else 1.0
        return times >= PAYS_AFTER or (share > 0 and self.runs * share >= 2 * PAYS_AFTER)


class _TapedPass:
    """Records one run, verifies the tape in a later run, and replays the tape from then on.

    It runs the pass itself until a tape pays, and for good if the pass is slow, cannot be recorded, or the tape gives
    other numbers.
    """

    def __init__(self, run: Pass, recordings: Recordings):
        self.run, self.recordings = run, recordings
        self.times, self.seconds, self.attempts = 0, 0.0, 0
        self.tape: Pass | None = None
        self.is_verified = self.has_given_up = False

    def __call__(self) -> torch.Tensor:
        pays = self.seconds < PAYS_BELOW_S and self.recordings.pays(self.times)
        self.times += 1
        self.recordings.runs_done += 1
        if self.tape is not None:
            return self.tape() if self.is_verified else self._verify(self.tape)
        return self._record() if pays and not self.has_given_up else self._run_timed()

    def _run_timed(self) -> torch.Tensor:
        began = time.perf_counter()
        result = self.run()
        self.seconds = time.perf_counter() - began
        return result

    def _record(self) -> torch.Tensor:
        before = self._state()
        with suppress(Exception):  # such as too little memory; an error of the pass itself occurs again below
            with (recorder := Recorder()):
                result = self._run_timed()
            if self.seconds < PAYS_BELOW_S:
                self.tape = recorder.tape(result)
            return result
        self.has_given_up = True
        self._restore(before)
        return self._run_timed()

    def _verify(self, tape: Pass) -> torch.Tensor:
        """Compare tape and pass on random factors, then do the run that was asked for.

        The factors are random because half of those of a new adapter are zero, which hides what is multiplied by them.
        Numbers that are not finite, or gradients that are all zero, prove nothing; the next run tries again.
        """
        before, replayed = self._state(), None
        try:
            for buffer in self.recordings.accumulated:
                buffer.zero_()
            generator = torch.Generator().manual_seed(0)
            for factor in self.recordings.factors:
                factor.normal_(0, FACTORS_STD, generator=generator)
            start = self._state()
            with suppress(Exception):
                replayed = [tape(), *self._state()]
            self._restore(start)
            expected = [self.run(), *self._state()]
        finally:
            self._restore(before)
        gradients = expected[1 : 1 + len(self.recordings.accumulated)]
        is_conclusive = all(bool(one.isfinite().all()) for one in expected) and all(map(torch.any, gradients))
        self.is_verified = is_conclusive and replayed is not None and all(map(torch.equal, replayed, expected))
        self.attempts += 1
        if self.is_verified:
            return tape()
        if is_conclusive or self.attempts == MAX_ATTEMPTS:
            self.tape, self.has_given_up = None, True
        return self.run()

    def _state(self) -> list[torch.Tensor]:
        """Copies of all that a run or `_verify` changes."""
        copies = [tensor.clone() for tensor in (*self.recordings.accumulated, *self.recordings.factors)]
        return [*copies, torch.get_rng_state()]

    def _restore(self, state: Sequence[torch.Tensor]) -> None:
        *values, random_state = state
        for tensor, value in zip((*self.recordings.accumulated, *self.recordings.factors), values, strict=True):
            tensor.copy_(value)
        torch.set_rng_state(random_state)


class Recorder(TorchDispatchMode):
    """Records the operators below autograd that run while it is active.

    Tensors that existed before are constants: the tape uses their memory. Views of constants are made only once, while
    recording. Raises `RuntimeError` for what a tape cannot repeat.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.constants: dict[Node, torch.Tensor] = {}
        self.nodes = WeakIdKeyDictionary()  # by tensor; weak, so that recording takes no more memory than the pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if any(tensor.is_complex() or tensor.is_neg() for tensor in given):  # may be conjugated or negated lazily
            raise RuntimeError(f"{func} takes a complex or negated tensor")
        if func.is_view and given and all(map(self._is_constant, given)):
            return result
        bound = {name: self._bind(value) for name, value in kwargs.items()}
        node = self.graph.call_function(func, tuple(map(self._bind, args)), bound)
        is_single = not isinstance(result, tuple | list)
        for index, made in enumerate([result] if is_single else result):
            if isinstance(made, torch.Tensor):
                self.nodes[made] = node if is_single else self.graph.call_function(operator.getitem, (node, index))
            elif made is not None:  # Python code may depend on it, and the next run may return another
                raise RuntimeError(f"{func} returns a Python {type(made).__name__}")
        return result

    def _is_constant(self, tensor: torch.Tensor) -> bool:
        return tensor not in self.nodes or self.nodes[tensor] in self.constants

    def _bind(self, value: object) -> Any:
        """An argument as the graph has it."""
        if isinstance(value, torch.Tensor):
            if value not in self.nodes:
                with self.graph.inserting_before():  # all others
                    node = self.graph.placeholder(f"constant_{len(self.constants)}")
                self.nodes[value], self.constants[node] = node, value
            return self.nodes[value]
        if isinstance(value, tuple | list):
            return [self._bind(item) for item in value]
        if isinstance(value, BINDABLE):
            return value
        raise RuntimeError(f"an operator takes a {type(value).__name__}")

    def tape(self, result: torch.Tensor) -> Pass:
        """What was recorded up to `result`, without operators and constants that nothing uses.

        The code that torch.fx generates frees each tensor after its last use.
        """
        self.graph.output(self._bind(result))
        self.graph.eliminate_dead_code(lambda node: node.op != "placeholder" and node.is_impure())
        for node in self.graph.nodes:
            node.target = _binding(node.target)
        constants = [self.constants[node] for node in self.graph.nodes if node.op == "placeholder"]
        forward = GraphModule(torch.nn.Module(), self.graph).forward

        def replay() -> torch.Tensor:
            with torch.inference_mode():
                replayed = forward(*constants)
            return replayed.clone()  # autograd and in-place operators elsewhere refuse inference tensors

        return replay


def _binding(target: Any) -> Any:
    """torch's own Python binding of an operator, which takes less time to call than the operator in `torch.ops`.

    Not where `torch` has a function of that name in Python, which may take other arguments.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return target
    name = target.overloadpacket.__name__
    binding = next((getattr(place, name) for place in BINDINGS if hasattr(place, name)), target)
    return binding if getattr(torch, name, binding) is binding else target


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
