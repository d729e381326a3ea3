"""Watch memory accesses in Triton's interpreter, and run programs in random order."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rfa_mmdet.ops.receptive_field.triton import launch as backend
from rfa_mmdet.ops.receptive_field.triton import operators

LANES = 2**20  # more than a tile has elements


class OnTriton(TorchDispatchMode):
    """Replaces the device's kernels by Triton's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rfa_mmdet":
            args = [tuple(a) if isinstance(a, list) else a for a in args]
            func = getattr(operators, func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


class Touched(NamedTuple):
    """One load or store of a program, where it is not masked."""

    store: bool
    size: int  # bytes
    addresses: np.ndarray
    lanes: np.ndarray  # number of the program * LANES + element of the tile


class Watch:
    """Runs the programs of launches in random order, and finds faults.

    Args:
        seed (int): Seed for the order.

    Attributes:
        faults (set[str]): Out-of-bounds accesses, and accesses whose result depends on the order of
            programs or lanes.
    """

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.faults: set[str] = set()
        self.touched: list[Touched] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        from triton.runtime.interpreter import interpreter_builder as builder

        run, place = backend.launch, builder.set_grid_idx
        load, store = builder.create_masked_load, builder.create_masked_store

        def watched_launch(kernel, grid, x, arguments, constants):
            self.touched, self.barriers = [], False
            self.order = self.random.permutation(prod(grid))
            run(kernel, grid, x, arguments, constants)
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            self.faults.update(f"{kernel.fn.__name__} {fault}" for fault in self.found(tensors))

        def other_place(*asked):
            """Run another program than the next one."""
            self.program = int(self.order[np.ravel_multi_index(asked, builder.grid_dim)])
            place(*map(int, np.unravel_index(self.program, builder.grid_dim)))

        def watched_load(pointers, mask, *others):
            self.touch(False, pointers, mask)
            return load(pointers, mask, *others)

        def watched_store(pointers, value, mask, *others):
            self.touch(True, pointers, mask)
            return store(pointers, value, mask, *others)

        def barrier():
            self.barriers = True

        with (
            mock.patch.object(backend, "launch", watched_launch),
            mock.patch.multiple(
                builder,
                set_grid_idx=other_place,
                create_masked_load=watched_load,
                create_masked_store=watched_store,
                create_barrier=barrier,
            ),
        ):
            yield

    def touch(self, store: bool, pointers, mask) -> None:
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        lanes = np.flatnonzero(active)
        self.touched.append(
            Touched(
                store,
                pointers.get_element_ty().primitive_bitwidth // 8,
                addresses.ravel()[lanes].astype(np.int64),
                self.program * LANES + lanes,
            )
        )

    def found(self, tensors: list[Tensor]) -> Iterator[str]:
        """Yield the faults of a launch."""
        for store in (False, True):
            sizes = {t.size for t in self.touched if t.store == store}
            if any(self._outside(store, size, tensors) for size in sizes):
                yield f"{'writes' if store else 'reads'} outside its tensors"
        read, readers = self._all(False)
        written, writers = np.unique(self._all(True), axis=1)
        twice = np.flatnonzero(np.diff(written) == 0)
        if len(twice):
            yield f"writes one address from two {self._who(writers[twice], writers[twice + 1])}"
        if not len(written):
            return
        at = np.searchsorted(written, read).clip(max=len(written) - 1)
        shared = (written[at] == read) & (writers[at] != readers)
        if shared.any():
            yield f"reads what another of its {self._who(writers[at], readers, shared)} writes"

    def _all(self, store: bool) -> np.ndarray:
        """Return addresses and their lanes; with barriers, a program counts as a single lane."""
        chosen = [t for t in self.touched if t.store == store]
        none = np.empty(0, np.int64)
        lanes = np.concatenate([none, *(t.lanes for t in chosen)])
        lanes = lanes // LANES * LANES if self.barriers else lanes
        return np.stack([np.concatenate([none, *(t.addresses for t in chosen)]), lanes])

    def _outside(self, store: bool, size: int, tensors: list[Tensor]) -> bool:
        chosen = [t.addresses for t in self.touched if t.store == store and t.size == size]
        addresses = np.concatenate(chosen)
        inside = np.zeros(len(addresses), bool)
        for tensor in tensors:
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            end = tensor.data_ptr() + (last + 1) * tensor.element_size() * (tensor.numel() > 0)
            inside |= (addresses >= tensor.data_ptr()) & (addresses + size <= end)
        return not inside.all()

    @staticmethod
    def _who(one: np.ndarray, other: np.ndarray, where: np.ndarray | slice = np.s_[:]) -> str:
        apart = one[where] // LANES != other[where] // LANES
        return "programs" if apart.any() else "lanes"
