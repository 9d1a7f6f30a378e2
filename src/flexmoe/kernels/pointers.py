"""Device tables of pointers to separately stored tensors, which the kernels read instead of one stacked tensor.

A layer's experts stay where they were loaded, so a kernel takes a table [rows, experts] of addresses. A CUDA graph
reads the tables that it has captured at every replay. When an expert is replaced or removed, `update_pointers` changes
its addresses in place: the graph then runs the new expert, or finds 0 and returns NaN, and never reads freed memory.

Does not cover what the rows of a table mean (`triton_common.py`), or when pointers change (`graphs.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

Addresses = tuple[tuple[int, ...], ...]


class PointerTables:
    """Tables of addresses [rows, experts] on a device, cached by their content."""

    def __init__(self) -> None:
        self._tables: dict[tuple[torch.device, Addresses], Tensor] = {}
        # no longer found by their content, but a CUDA graph may still read them: it holds no reference to a table
        self._unlisted: list[tuple[tuple[torch.device, Addresses], Tensor]] = []
        self._lock = threading.Lock()

    def get(self, rows: Addresses, device: torch.device) -> Tensor:
        """The table int64 [rows, experts] of these numbers.

        Raises:
            RuntimeError: it would have to be made while a CUDA graph is captured.
        """
        key = (device, rows)
        with self._lock:
            table = self._tables.get(key)
            if table is None:
                table = self._tables[key] = _upload(rows, device)
            return table

    def update_pointers(self, moves: Mapping[int, int]) -> None:
        """Replaces old addresses by new ones in every table, in place; 0 marks a tensor that no longer exists.

        What still reads such a table, such as a captured CUDA graph, reads the new addresses from then on.
        """
        with self._lock:
            tables: dict[tuple[torch.device, Addresses], Tensor] = {}
            unlisted: list[tuple[tuple[torch.device, Addresses], Tensor]] = []
            for (device, rows), table in [*self._tables.items(), *self._unlisted]:
                moved = tuple(tuple(moves.get(address, address) for address in row) for row in rows)
                if moved != rows:
                    table.copy_(torch.tensor(moved, dtype=torch.int64, device="cpu"))
                if all(map(all, moved)) and (device, moved) not in tables:
                    tables[device, moved] = table
                else:
                    unlisted.append(((device, moved), table))
            self._tables, self._unlisted = tables, unlisted


TABLES = PointerTables()
"""The tables of this process."""


def update_pointers(moves: Mapping[int, int]) -> None:
    """`PointerTables.update_pointers` for the tables of this process."""
    TABLES.update_pointers(moves)


def _upload(rows: Addresses, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "A CUDA graph is being captured with experts that no kernel has run together yet: run the model once "
            "before, with a mask that allows all of them. flexmoe.CapturedForward does."
        )

    def upload() -> Tensor:
        table = torch.tensor(rows, dtype=torch.int64).to(device)
        torch.cuda.current_stream(device).synchronize()
        return table

    # in another thread, because a graph's warm-up puts what this thread allocates into the graph's memory pool
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(upload).result()


__all__ = ["TABLES", "Addresses", "PointerTables", "update_pointers"]
