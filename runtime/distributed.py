"""Several processes that train one model: who they are, what they agree on, and the sums that they exchange.

torchrun starts one process a GPU (NCCL), or a few on a CPU (gloo). Each takes its rows of every batch, and gradients
and statistics are averaged over all, so that N processes compute what one does with the same batch. On a TPU slice
there is one process a host: XLA's own program joins their devices, and only `Processes` is of use there.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import RunError, UserError

T = TypeVar("T")

# A process that dies closes its connections, which the others notice at once. These are for a machine that vanishes.
STEP_TIMEOUT = timedelta(minutes=10)  # for sums within a step
TIMEOUT = timedelta(hours=6)  # for the rest: one process may decode a data set while the others wait

_parts_of_batch = 1  # processes that hold rows of one batch each


class Processes:
    """The processes of a run: this one, alone. What the methods say of several is so in `JoinedProcesses`.

    Attributes:
        index, count: of this process among all.
        local_index: of this process among those of its machine.
    """

    index, count, local_index = 0, 1, 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.index == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` was true in any process at the call before this one; all must call it equally often.

        One call late, so that no process waits for the slowest: the answer travels while a step is computed.
        """
        return flag

    def from_main(self, function: Callable[[], T]) -> T:
        """Calls `function` in the main process; all get what it returns (it must pickle) or an error that it raises."""
        return function()

    def first_on_each_machine(self, function: Callable[[], T]) -> T:
        """Calls `function` in all, in one process of each machine before the others: they find the files it makes."""
        return function()


class JoinedProcesses(Processes):
    """The processes of torch.distributed's default group."""

    def __init__(self, local_index: int):
        self.index, self.count, self.local_index = dist.get_rank(), dist.get_world_size(), local_index
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # on host memory, and with more patience
        self._asked: tuple[Tensor, dist.Work] | None = None

    def any(self, flag: bool) -> bool:
        before = self._asked
        with _peers():
            asked = torch.tensor([flag], dtype=torch.int32)
            self._asked = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, self._group, async_op=True)
            if before is None:
                return False
            before[1].wait()
        return bool(before[0])

    def from_main(self, function: Callable[[], T]) -> T:
        value, error = attempt(function) if self.is_main else (None, None)
        outcome = [(value, message_of(error))]
        with _peers():
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        value, message = outcome[0]
        if message is not None:
            raise error or message  # in the main process with its traceback
        return value

    def first_on_each_machine(self, function: Callable[[], T]) -> T:
        value, error = None, None
        for first in (True, False):
            if (self.local_index == 0) == first:
                value, error = attempt(function)
            messages: list[Any] = [None] * self.count
            with _peers():
                dist.all_gather_object(messages, message_of(error), group=self._group)
            if any(messages):
                raise error or next(filter(None, messages))
        return value


def join_torchrun(backend: str, timeout: timedelta = STEP_TIMEOUT) -> Processes:
    """Joins the processes that torchrun started; each then holds its rows of a batch. Without torchrun: one, alone.

    Raises:
        UserError: `backend` needs a GPU for each process of this machine, and there are fewer.
        RunError: the others cannot be reached.
    """
    if launched_count() == 1:
        return Processes()
    global _parts_of_batch
    local_index, local_count = int(os.environ.get("LOCAL_RANK", 0)), local_process_count()
    device = None
    if "nccl" in backend:
        if local_count > torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node {local_count}, but this machine has {torch.cuda.device_count()} GPUs: "
                "start one process for each, or use --device cpu."
            )
        device = torch.device("cuda", local_index)
    with _peers():
        dist.init_process_group(backend, timeout=timeout, device_id=device)
        _parts_of_batch = dist.get_world_size()
        return _joined(local_index)


def join_hosts() -> Processes:
    """Joins the hosts of a TPU slice, which torch_xla knows."""
    import torch_xla.distributed.xla_backend  # noqa: F401 - it registers the form xla:// of an address

    with _peers():
        dist.init_process_group("gloo", init_method="xla://", timeout=TIMEOUT)
        return _joined(0)


def _joined(local_index: int) -> JoinedProcesses:
    atexit.register(dist.destroy_process_group)
    processes = JoinedProcesses(local_index)
    if not processes.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what commands print is said once
    return processes


def launched_count() -> int:
    """How many processes torchrun started for this run, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def local_process_count() -> int:
    """How many of them are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched_count() > 1 else 1


def parts_of_batch() -> int:
    """How many processes hold rows of one batch; 1 where each sees the whole, on XLA too."""
    return _parts_of_batch


class _Mean(torch.autograd.Function):
    """With the mean over processes as its own gradient: each process differentiates its loss, and the gradients of all
    are averaged in the end, so that the sum over losses and the 1/N of the mean are both in that average."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_mean(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_mean(gradient)


@torch.compiler.disable
def mean_over_parts(x: Tensor) -> Tensor:
    """The mean of x over the processes that hold rows of one batch, differentiable; x itself where one holds all."""
    return x if _parts_of_batch == 1 else _Mean.apply(x)


@torch.no_grad()
def all_mean(x: Tensor) -> Tensor:
    """The mean of x over the processes that hold rows of one batch."""
    x = x.clone(memory_format=torch.contiguous_format)
    with _peers():
        dist.all_reduce(x)
    return x / _parts_of_batch


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its mean over the processes, all in one message a type."""
    tensors = list(tensors)
    for dtype in sorted({x.dtype for x in tensors}, key=str):
        group = [x for x in tensors if x.dtype == dtype]
        means = all_mean(torch.cat([x.flatten() for x in group])).split([x.numel() for x in group])
        torch._foreach_copy_(group, [mean.view(x.shape) for x, mean in zip(group, means, strict=True)])


def all_rows(x: Tensor) -> Tensor:
    """Concatenates the rows of all processes, in their order."""
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_parts_of_batch)]
    with _peers():
        dist.all_gather(rows, x.contiguous())
    return torch.cat(rows)


def attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def message_of(error: Exception | None) -> Exception | None:
    """The error as the other processes raise it."""
    if error is None or isinstance(error, UserError | RunError):
        return error
    return RunError(f"process {dist.get_rank()} failed: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Says what it means when torch.distributed fails: some other process is gone, and that one knows why."""
    try:
        yield
    except RuntimeError as error:
        which = f"process {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "this process"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"{which} lost the others ({reason}). The one that failed first says why. "
            "The same command resumes from the newest checkpoint."
        ) from error
