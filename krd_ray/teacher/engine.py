"""Answers how many students' requests become one forward: single-flight, coalescing, back-pressure.

Does not know Ray, models or rectification; it is given a forward function and a store.

A (view, sample) pair is absent, pending or in the store. Who finds it absent marks it pending and queues the work;
everybody else waits. One thread forwards, one micro-batch at a time, cut from the front of the queue across requests:
while it is busy the queue grows, so micro-batches fill with the load and no timer is needed, and an answer goes out
with its own last row instead of waiting for whatever was queued behind it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from krd_ray.errors import TeacherError
from krd_ray.teacher.pairs import Pairs, distinct, read_pairs
from krd_ray.teacher.store import IntArray, RowArray, TargetStore, copy_rows

Images = npt.NDArray[np.uint8]
Forward = Callable[[Images, IntArray, IntArray], RowArray]
FetchPixels = Callable[[IntArray], Images]


@dataclass
class EngineStats:
    """What the engine has done since it started; counts are rows unless the name says otherwise.

    forwards = rows forwarded; unique_views of them were new, the rest had been computed before and were dropped
    or lost. hits were in the store, joined were being computed for somebody else, or came twice in one request.
    """

    requests: int = 0
    rows: int = 0
    hits: int = 0
    joined: int = 0
    forwards: int = 0
    unique_views: int = 0
    forward_calls: int = 0
    padded_rows: int = 0
    queue_peak_rows: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    busy_s: float = 0.0
    cpu_s: float = 0.0
    process_cpu_s: float = 0.0
    idle_s: float = 0.0
    store_memory_bytes: int = 0
    store_disk_bytes: int = 0


@dataclass
class _Work:
    """Pairs that one request brought and that nobody had computed; `places` are theirs in the request.

    The first `taken` of them have been given to a forward.
    """

    pairs: Pairs
    sample_ids: IntArray
    places: IntArray
    images: Images | None = None
    taken: int = 0
    error: Exception | None = None


@dataclass(frozen=True)
class _Piece:
    """The rows of one work that go into one forward."""

    work: _Work
    rows: slice

    def __len__(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def pairs(self) -> Pairs:
        return Pairs(self.work.pairs.view[self.rows], self.work.pairs.position[self.rows])


class TargetEngine:
    """Serves raw outputs by (view, sample), forwarding each at most once while it is remembered.

    Args:
        forward: (images uint8 [n, H, W, 3], sample ids [n], view index [n]) -> float16 [n, width].
        store: where outputs are kept; used by this engine alone.
        micro_batch: rows of a forward, at most; the forward pads smaller ones.
        queue_rows: rows that may wait for a forward; further requests are held back.
        on_forward: called with the stats after each forward, outside the lock and before its answers are given out.
        cpu_clock: seconds of CPU that a forward takes, read in the forward thread before and after it.
        counts_process: whether the process's CPU time is the teacher's own, and counted from the first request on.
    """

    def __init__(
        self,
        forward: Forward,
        store: TargetStore,
        *,
        width: int,
        micro_batch: int,
        queue_rows: int,
        on_forward: Callable[[EngineStats], None] = lambda _: None,
        cpu_clock: Callable[[], float] = time.process_time,
        counts_process: bool = True,
    ) -> None:
        self._forward, self._store, self._width = forward, store, width
        self._micro_batch, self._queue_rows, self._on_forward = micro_batch, queue_rows, on_forward
        self._cpu_clock, self._counts_process = cpu_clock, counts_process
        self._changed = threading.Condition()
        self._pending: dict[int, npt.NDArray[np.bool_]] = {}
        self._queue: deque[_Work] = deque()
        self._queued_rows = 0
        self._closed = False
        self._why_closed = "the teacher was closed while students were still asking"
        self._stats = EngineStats()
        self._cpu_before = time.process_time()
        self._thread = threading.Thread(target=self._run, name="teacher-forward", daemon=True)
        self._thread.start()

    def serve(self, view: IntArray, sample_ids: IntArray, fetch: FetchPixels) -> RowArray:
        """Returns the raw outputs of (view, sample) pairs, float16 [B, width], forwarding what nobody has asked for.

        Args:
            view: int64 [B], view index of each row.
            sample_ids: int64 [B]; a pair that comes twice is computed once.
            fetch: returns the images at the given places of the batch; called only for absent samples, in the
                caller's thread: a student whose pixels are slow to come does not hold up the forwards.
        Raises:
            TeacherError: the request is too large for the store, or the forward failed.
            Exception: whatever `fetch` raised, in the request that brought it and in no other.
        """
        if len(sample_ids) * 4 > self._store.capacity_rows:
            raise TeacherError(
                f"a request of {len(sample_ids)} samples does not fit a target store of "
                f"{self._store.capacity_rows} rows; raise teacher.memory_bytes or teacher.disk_bytes, "
                "or lower train.batch_size"
            )
        asked = Pairs(view, self._store.index(sample_ids))
        repeated = distinct(asked, self._store.num_samples)
        if repeated is None:
            return self._serve_distinct(asked, sample_ids, fetch, len(sample_ids))
        first, number = repeated
        rows = self._serve_distinct(
            asked.at(first), sample_ids[first], lambda places: fetch(first[places]), len(sample_ids)
        )
        return rows[number]

    def _serve_distinct(
        self, asked: Pairs, sample_ids: IntArray, fetch: FetchPixels, num_rows: int
    ) -> RowArray:
        """`serve` for pairs that all differ; `num_rows` counts repeats too."""
        with self._changed:
            self._count_request(asked, num_rows)
            found = self._wait_for_rows(asked, sample_ids, None)
        while isinstance(found, _Work):
            self._bring(found, fetch)
            with self._changed:
                found = self._wait_for_rows(asked, sample_ids, found)
        return copy_rows(found, len(asked), self._width)

    def stats(self) -> EngineStats:
        """Returns a copy of the counters."""
        with self._changed:
            return self._snapshot()

    def rows_held(self, view: int) -> int:
        """Returns how many samples of a view the store holds now."""
        with self._changed:
            return int((self._store.rows(view, np.arange(self._store.num_samples)) >= 0).sum())

    def add_bytes(self, *, received: int = 0, sent: int = 0) -> None:
        """Counts payload bytes that the owner of this engine moved."""
        with self._changed:
            self._stats.bytes_in += received
            self._stats.bytes_out += sent

    def close(self) -> None:
        """Stops the forward thread; waiting requests fail with a TeacherError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _snapshot(self) -> EngineStats:
        stats = EngineStats(**asdict(self._stats))
        if self._counts_process and stats.requests:
            stats.process_cpu_s = time.process_time() - self._cpu_before
        stats.store_memory_bytes = self._store.memory_bytes
        stats.store_disk_bytes = self._store.disk_bytes
        return stats

    def _count_request(self, asked: Pairs, num_rows: int) -> None:
        pending = read_pairs(asked, self._is_pending, np.bool_)
        live = (read_pairs(asked, self._store.rows, np.int64) >= 0) & ~pending
        if self._stats.requests == 0:
            self._cpu_before = time.process_time()
        self._stats.requests += 1
        self._stats.rows += num_rows
        self._stats.hits += int(live.sum())
        self._stats.joined += int(pending.sum()) + num_rows - len(asked)

    def _wait_for_rows(
        self, asked: Pairs, sample_ids: IntArray, work: _Work | None
    ) -> list[tuple[RowArray, IntArray, IntArray]] | _Work:
        """Waits until all rows are there, or until some are absent and may be claimed, without the lock."""
        while not self._closed:
            if work is not None and work.error is not None:
                raise work.error
            rows = read_pairs(asked, self._store.rows, np.int64)
            pending = read_pairs(asked, self._is_pending, np.bool_)
            if (rows >= 0).all() and not pending.any():  # pending until its forward has been reported
                return self._store.locate(rows)
            absent = np.flatnonzero((rows < 0) & ~pending)
            has_room = self._queued_rows == 0 or self._queued_rows + len(absent) <= self._queue_rows
            if len(absent) and has_room:
                return self._claim(_Work(asked.at(absent), sample_ids[absent], absent))
            self._changed.wait()
        raise TeacherError(self._why_closed)

    def _is_pending(self, view: int, position: IntArray) -> npt.NDArray[np.bool_]:
        flags = self._pending.get(view)
        return np.zeros(len(position), np.bool_) if flags is None else flags[position]

    def _claim(self, work: _Work) -> _Work:
        for view, _, position in work.pairs.samples():
            if view not in self._pending:
                self._pending[view] = np.zeros(self._store.num_samples, np.bool_)
            self._pending[view][position] = True
        self._queued_rows += len(work.pairs)
        self._stats.queue_peak_rows = max(self._stats.queue_peak_rows, self._queued_rows)
        return work

    def _release(self, claims: list[Pairs]) -> None:
        """Ends claims, fulfilled or not; whoever still finds a pair absent may claim it with pixels of its own."""
        for pairs in claims:
            for view, _, position in pairs.samples():
                self._pending[view][position] = False
            self._queued_rows -= len(pairs)
        self._pending = {view: flags for view, flags in self._pending.items() if flags.any()}
        self._changed.notify_all()

    def _bring(self, work: _Work, fetch: FetchPixels) -> None:
        """Fetches the pixels of a claim and queues it."""
        try:
            work.images = fetch(work.places)
        except BaseException:
            with self._changed:
                self._release([work.pairs])
            raise
        with self._changed:
            self._queue.append(work)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            started = time.perf_counter()
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                self._stats.idle_s += time.perf_counter() - started
                if self._closed:
                    return
                pieces = self._take()
            try:
                self._serve_pieces(pieces)
            except BaseException as error:
                self._give_up(error)
                raise

    def _take(self) -> list[_Piece]:
        """The first rows of the queue, one micro-batch at most; the last request of them may be cut."""
        pieces: list[_Piece] = []
        room = self._micro_batch
        while self._queue and room:
            work = self._queue[0]
            piece = _Piece(work, slice(work.taken, min(work.taken + room, len(work.pairs))))
            room -= len(piece)
            work.taken = piece.rows.stop
            pieces.append(piece)
            if work.taken == len(work.pairs):
                self._queue.popleft()
        return pieces

    def _give_up(self, error: BaseException) -> None:
        """Tells everybody who waits that nothing will come any more."""
        with self._changed:
            self._closed = True
            self._why_closed = f"the teacher's forward thread died: {type(error).__name__}: {error}"
            self._changed.notify_all()

    def _serve_pieces(self, pieces: list[_Piece]) -> None:
        started, cpu = time.perf_counter(), self._cpu_clock()
        outputs = self._compute(pieces)
        cpu_s = self._cpu_clock() - cpu
        with self._changed:
            for piece, values in zip(pieces, outputs, strict=True):
                self._remember(piece, values)
            self._stats.busy_s += time.perf_counter() - started
            self._stats.cpu_s += cpu_s
            stats = self._snapshot()
        self._tell(stats, pieces)
        with self._changed:
            self._release([piece.pairs for piece in pieces] + self._drop_failed())

    def _tell(self, stats: EngineStats, pieces: list[_Piece]) -> None:
        """Reports the forward before anybody waiting gets its answers: a process killed then has counted them."""
        try:
            self._on_forward(stats)
        except Exception as error:  # noqa: BLE001 - a full disk, say: an error of these requests, not a hang of all
            for piece in pieces:
                piece.work.error = piece.work.error or error

    def _drop_failed(self) -> list[Pairs]:
        """Takes the rest of a request that has failed off the queue, and returns what it had claimed."""
        dropped = []
        while self._queue and self._queue[0].error is not None:
            work = self._queue.popleft()
            dropped.append(_Piece(work, slice(work.taken, len(work.pairs))).pairs)
        return dropped

    def _compute(self, pieces: list[_Piece]) -> list[RowArray]:
        sizes = [len(piece) for piece in pieces]
        try:
            values = self._forward(
                np.concatenate(
                    [each.work.images[each.rows] for each in pieces if each.work.images is not None]
                ),
                np.concatenate([each.work.sample_ids[each.rows] for each in pieces]),
                np.concatenate([each.work.pairs.view[each.rows] for each in pieces]),
            )
        except Exception as error:  # noqa: BLE001 - told to every request of the batch, then the engine goes on
            for piece in pieces:
                piece.work.error = error
            return [np.empty((0, self._width), np.float16) for _ in pieces]
        self._stats.forward_calls += 1
        self._stats.padded_rows += -sum(sizes) % self._micro_batch
        return np.split(values, np.cumsum(sizes)[:-1])

    def _remember(self, piece: _Piece, values: RowArray) -> None:
        if piece.work.error is not None:
            return
        try:
            self._stats.forwards += len(values)
            for view, places, position in piece.pairs.samples():
                fresh = int((~self._store.was_computed(view, position)).sum())
                self._store.put(view, position, values[places])
                self._stats.unique_views += fresh
        except Exception as error:  # noqa: BLE001 - a full disk, no memory: an error of this request, not a hang of all
            piece.work.error = error
