"""The one door from device to host: one packed tensor per step, read now or one step later; a short one if quiet."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Context = TypeVar("Context")


class Mailbox(Generic[Context]):
    """Carries one float32 vector per step to the host, with the host's own note of what it was about.

    With ``lag=0`` the letter just posted is read at once, and the device is waited for. With ``lag=1`` its copy
    is only started, and the letter of the step before is read, which has long arrived.

    Args:
        lag: 0 or 1.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, Context]] = deque()

    def exchange(self, letter: Tensor, context: Context) -> tuple[list[float], Context] | None:
        """Posts a letter and takes out the one that is due, or None.

        Args:
            letter: float32 [N] on any device.
            context: What the host wants back together with the numbers.
        """
        copy, arrived = letter.detach(), None
        if self.lag and letter.is_cuda:
            copy = torch.empty(letter.shape, dtype=letter.dtype, pin_memory=True)
            copy.copy_(letter.detach(), non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._waiting.append((copy, arrived, context))
        return self.take() if len(self._waiting) > self.lag else None

    def waiting(self) -> list[tuple[Tensor, Context]]:
        """The letters under way in the host's memory, oldest first; they stay under way."""
        for _, arrived, _ in self._waiting:
            if arrived is not None:
                arrived.synchronize()
        return [(letter.cpu(), context) for letter, _, context in self._waiting]

    def put_back(self, letter: Tensor, context: Context) -> None:
        """Puts a letter behind those under way, as `waiting` gave it."""
        self._waiting.append((letter, None, context))

    def __getstate__(self) -> dict[str, object]:
        """A copy has the letters themselves."""
        return {
            "lag": self.lag,
            "_waiting": deque((letter, None, context) for letter, context in self.waiting()),
        }

    def take(self) -> tuple[list[float], Context] | None:
        """Takes out the oldest letter, waiting for it if need be; None when there is none."""
        if not self._waiting:
            return None
        letter, arrived, context = self._waiting.popleft()
        if arrived is not None:
            arrived.synchronize()
        return read(letter), context


def read(vector: Tensor) -> list[float]:
    """Reads a vector [N] now, waiting for the device; in the step path only through a `Mailbox`."""
    # NumPy's conversion is ten times as fast as the tensor's own.
    numbers: list[float] = read_array(vector).tolist()
    return numbers


def read_array(vector: Tensor) -> NDArray[Any]:
    """The same as an array, which takes less memory than a list; in the step path a glance at what may be quiet."""
    numbers: NDArray[Any] = vector.detach().cpu().numpy()
    return numbers
