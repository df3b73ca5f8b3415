"""Threads, forks and interrupts: right numbers in each, and the model and the process as before."""

import dis
import functools
import gc
import itertools
import os
import random
import signal
import sys
import threading
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad

import adaptive_tangents as at
from adaptive_tangents.capture import lease
from adaptive_tangents.runtime import recursion
from adaptive_tangents.runtime.cleanup import ensured
from snapshots import Snapshot, contained, shared_state

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:torch"), pytest.mark.xdist_group("threads")]
PACKAGE = os.path.dirname(at.__file__)
# Files of the standard library and of torch whose code runs between our changes and what undoes them.
NEAR = (
    "contextlib.py",
    "grad_mode.py",
    "_contextlib.py",
    "graph.py",
    "forward_ad.py",
    "eager_transforms.py",
    "overrides.py",
)


class Net(nn.Module):
    """Attention, recurrence and a lookup, which need most changes of flags; checkpointing; and state."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 2)
        self.attend = nn.MultiheadAttention(4, 2, bias=False, batch_first=True)
        self.recur = nn.RNN(4, 4, bias=False, batch_first=True)
        self.register_buffer("scale", torch.ones(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        u = self.table(x)
        h: Any = torch.utils.checkpoint.checkpoint(lambda z: self.attend(z, z, z)[0], u, use_reentrant=False)
        out: Tensor = self.last(self.recur(h)[0][:, -1] * self.scale)
        return out


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.kept = nn.Linear(3, 4), nn.Linear(4, 2), [1]

    def forward(self, x: Tensor) -> Tensor:
        h: Any = torch.utils.checkpoint.checkpoint(lambda z: self.first(z).tanh(), x, use_reentrant=False)
        self.kept.append(2)
        out: Tensor = self.last(h)
        return out


def process() -> dict[str, Any]:
    """The shared state, and what only an interrupt could leave."""
    functorch, hooks = torch._C._functorch, torch._C._autograd
    return shared_state() | {
        "loans": (list(lease._loans), lease.LOCK._is_owned()),  # type: ignore[attr-defined]
        "room": (recursion.users_limit(), dict(recursion._rooms)),
        "levels": (forward_ad._current_level, functorch.get_dynamic_layer_stack_depth()),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "saved": hooks._top_saved_tensors_default_hooks(True),
        "backward": (torch._C._is_multithreading_enabled(), torch._C._is_fwd_grad_enabled()),
    }


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [name for name in now if now[name] != before[name]]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch.manual_seed(0)
    with contained():
        yield


def test_four_threads_get_right_numbers_and_leave_all_as_found(tmp_path: Any) -> None:
    model, x = Net().double().eval(), torch.randint(0, 7, (3, 2))
    own = [Net().double().eval() for _ in range(4)]
    states = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2)]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + 0.05 for name, value in start.items() if name != "scale"}
    adaptive = at.TangentModule(model, at.Fixed())
    trained = list(adaptive.parameters())
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.1)

    def step() -> Tensor:
        out = adaptive(x)
        found = torch.autograd.grad(out.square().sum(), trained)
        return torch.cat([out.detach().flatten(), *(part.flatten() for part in found)])

    numbers = itertools.count()

    def stored() -> Tensor:
        path = tmp_path / f"{next(numbers)}.zarr"
        return at.kernel_to_store(model, x, path, params=states[0], outputs="trace", tile=2).read()

    def jobs(thread: int) -> dict[str, Callable[[], Tensor]]:
        return {
            "at θ": lambda: at.tangent_kernel(model, x, params=states[0], outputs="trace"),
            "at another θ, in tiles": lambda: at.tangent_kernel(model, x, params=states[1], outputs="trace", tile=1),
            "where it is": lambda: at.tangent_kernel(model, x, outputs="trace"),
            f"of its own {thread}": lambda: at.tangent_features(own[thread], x).dense(),
            "a step": step,
            "a module": lambda: at.TangentModule(model, at.Fixed(), params=states[0]).initial(x),
            "features at its start": lambda: at.TangentModule(model, at.Fixed()).features(x).kernel(outputs="trace"),
            "along a path": lambda: at.average_features(model, start, end, x, nodes=1).kernel(outputs="trace"),
            "copied": lambda: torch.tensor(at.plan_kernel(model, x[:1], dtype=torch.float32).tiles),
            "stored": stored,
        }

    every = {name: job for thread in range(4) for name, job in jobs(thread).items()}
    truth = {name: job() for name, job in every.items()}
    before, shared, inner = Snapshot(model, *own), process(), Snapshot(adaptive.model)
    wrong: list[str] = []
    calls: Counter[int] = Counter()

    def work(thread: int) -> None:
        draw, mine = random.Random(thread), jobs(thread)
        chosen = draw.choices(list(mine), [8, 8, 8, 8, 8, 2, 2, 1, 1, 1], k=10) + list(mine)
        for name in draw.sample(chosen, 20):
            job = mine[name]
            try:
                made = job()
                if not torch.allclose(made, truth[name], rtol=1e-9, atol=1e-12) or not torch.is_grad_enabled():
                    wrong.append(f"{name}: {made} and not {truth[name]}")
            except BaseException as error:
                wrong.append(f"{name}: {type(error).__name__} {error}")
            calls[thread] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert list(calls.values()) == [20] * 4
    assert before.changes(Snapshot(model, *own)) == []
    assert inner.changes(Snapshot(adaptive.model)) == []
    assert changed(shared, process()) == []


def test_a_process_forked_during_a_pass_of_another_thread_works() -> None:
    model, x = Small().double().eval(), torch.randn(3, 3, dtype=torch.float64)
    state = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected, twin = at.tangent_kernel(model, x, outputs="trace"), model(x).detach()
    inside, leave = threading.Event(), threading.Event()

    def wait(module: nn.Module, given: Any) -> None:
        inside.set()
        assert leave.wait(60)

    handle = model.last.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: at.tangent_kernel(model, x, params=state))
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(60)  # a deadlock would last
            handle.remove()
            right = torch.equal(model(x), twin) and torch.is_grad_enabled() and torch.backends.cuda.flash_sdp_enabled()
            again = torch.allclose(at.tangent_kernel(model, x, outputs="trace"), expected, atol=1e-12)
            limit = sys.getrecursionlimit() == recursion.users_limit()
            code = 0 if right and again and limit and next(model.parameters()) is model.first.weight else 2
        finally:
            os._exit(code)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_forked_by_a_model_goes_on_with_its_loan() -> None:
    class Forks(Small):
        def forward(self, x: Tensor) -> Tensor:
            child = os.fork()
            if not child:
                os._exit(0 if lease.LOCK._is_owned() and lease.current(self) is not None else 1)  # type: ignore[attr-defined]
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            return super().forward(x)

    at.tangent_features(Forks().double().eval(), torch.randn(2, 3, dtype=torch.float64))


class Interrupted:
    """Raises KeyboardInterrupt at the k-th instant, and once more ``again`` instants later, and notes where.

    Instants are where CPython looks for signals: at the entry of a function, after a call, and at a jump back.
    """

    JUMPS = ("CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "POP_JUMP_BACKWARD_IF_TRUE", "POP_JUMP_BACKWARD_IF_FALSE")
    _names: ClassVar[dict[Any, dict[int, str]]] = {}
    _handlers: ClassVar[dict[Any, list[Any]]] = {}

    def __init__(self, k: int | None, again: int = 0) -> None:
        self.k, self.again, self.seen, self.later = k, again, 0, 0
        self.places: dict[tuple[Any, ...], list[int]] = {}
        self._last: dict[int, int] = {}
        self.raised = False

    def run(self, call: Callable[[], Any]) -> BaseException | None:
        """What the call raised; Python only reports what is raised within a destructor."""
        reports, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            if self.again:
                sys.setprofile(self._second)
            sys.settrace(self)
            call()
        except BaseException as error:
            return error
        finally:
            self.again = 0
            sys.settrace(None)
            sys.setprofile(None)
            sys.unraisablehook = reports
        return None

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if event == "call":
            if not self._near(frame):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            self._last.pop(id(frame), None)
            self._instant(frame)
        elif event == "opcode":
            last, self._last[id(frame)] = self._last.get(id(frame)), frame.f_lasti
            if code not in self._names:
                self._names[code] = {i.offset: i.opname for i in dis.get_instructions(code)}
                self._handlers[code] = dis._parse_exception_table(code)  # type: ignore[attr-defined]
            # Where the handlers of both differ, another would see the error than that of the call.
            called = last is not None and self._names[code].get(last) in self.JUMPS
            if last is not None and called and self._handler(code, last) == self._handler(code, frame.f_lasti):
                self._instant(frame)
        return self

    def _handler(self, code: Any, offset: int) -> Any:
        return next((e.target for e in self._handlers[code] if e.start <= offset < e.end), None)

    @staticmethod
    def _near(frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_filename.endswith(NEAR)

    def _instant(self, frame: FrameType) -> None:
        self.seen += 1
        if self.k is None:
            place, above = [(frame.f_code, frame.f_lasti)], frame.f_back
            for _ in range(3):
                if above is not None:
                    place.append((above.f_code, above.f_lasti))
                    above = above.f_back
            self.places.setdefault(tuple(place), []).append(self.seen)
        elif self.seen == self.k:
            self.raised = True
            raise KeyboardInterrupt

    def _second(self, frame: FrameType, event: str, _: Any) -> None:
        if self.again and self.raised and event in ("call", "c_return") and self._near(frame):
            self.later += 1
            if self.later == self.again:
                self.again = 0
                raise KeyboardInterrupt


SMALL = Small().double().eval()
X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def ends() -> list[dict[str, Tensor]]:
    start = {name: value.clone() for name, value in SMALL.state_dict().items()}
    return [start, {name: value + 0.1 for name, value in start.items()}]


def one_step() -> Callable[[], Tensor]:
    adaptive = at.TangentModule(SMALL, at.Fixed())
    trained = list(adaptive.parameters())
    return lambda: torch.cat([g.flatten() for g in torch.autograd.grad(adaptive(X).square().sum(), trained)])


CALLS: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "tangent_kernel": lambda: lambda: at.tangent_kernel(SMALL, X, outputs="trace"),
    "tangent_features": lambda: lambda: at.tangent_features(SMALL, X).dense(),
    "average_features": lambda: lambda: at.average_features(SMALL, *ends(), X, nodes=1).kernel(outputs="trace"),
    "TangentModule, made": lambda: lambda: at.TangentModule(SMALL, at.Fixed()).initial(X),
    "TangentModule, a step": one_step,
}
TRIES = int(os.environ.get("INTERRUPTS", "6"))  # of each call and kind


def check_interrupts(call: Callable[[], Tensor], run: Callable[[int], BaseException | None], tries: int) -> None:
    """Interrupt a call, and find all as before and the next call right, each time."""
    expected = call()
    before, shared = Snapshot(SMALL, X), process()
    came = 0
    for k in range(tries):
        error = run(k)
        assert error is None or isinstance(error, KeyboardInterrupt), repr(error)
        came += error is not None
        assert before.changes(Snapshot(SMALL, X)) == []
        assert changed(shared, process()) == []
        del error
        assert torch.allclose(call(), expected, rtol=1e-10, atol=1e-13)
    assert came  # how many depends on the clock


@functools.cache
def mapped(name: str) -> Interrupted:
    """The instants of a call, by their places."""
    map_of = Interrupted(None)
    map_of.run(CALLS[name]())
    return map_of


@pytest.mark.parametrize("again", [False, True], ids=["one", "two in succession"])
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_instant_leaves_all_as_found(name: str, again: bool) -> None:
    call, draw = CALLS[name](), random.Random(0)
    call()
    map_of = mapped(name)
    instants = [draw.choice(found) for found in map_of.places.values()]
    # Half of them where the loan begins and ends.
    ours = [k for k, place in zip(instants, map_of.places, strict=True) if _begins_or_ends(place)]
    some = draw.sample(ours, min(len(ours), TRIES // 2)) + draw.sample(instants, min(len(instants), TRIES // 2))
    check_interrupts(call, lambda k: Interrupted(some[k], draw.randint(1, 12) if again else 0).run(call), len(some))


def _begins_or_ends(place: tuple[Any, ...]) -> bool:
    return any(code.co_filename.endswith(("lease.py", "cleanup.py", "recursion.py")) for code, _ in place[:2])


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
@pytest.mark.parametrize("name", CALLS)
def test_a_signal_at_any_time_leaves_all_as_found(name: str) -> None:
    call, draw = CALLS[name](), random.Random(1)
    call()
    took = min(timeit.repeat(call, number=1, repeat=5))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def run(k: int) -> BaseException | None:
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.02, 1) * took)
            call()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:
            return error
        return None

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        check_interrupts(call, run, TRIES)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_what_must_be_put_back_is_put_back_after_three_interrupts() -> None:
    done: list[str] = []
    came = iter([KeyboardInterrupt, SystemExit, KeyboardInterrupt])

    def clean() -> None:
        for kind in came:
            raise kind
        done.append("clean")

    with pytest.raises(KeyboardInterrupt):
        ensured(lambda: done.append("body"), clean)
    assert done[:2] == ["body", "clean"]
    gc.collect()
