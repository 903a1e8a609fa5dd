"""Answers where sharing a teacher cannot pay, and what else keeps a plan from coming true.

Does not plan (`planner` does); every warning is a sentence that says what to do where something can be done.
"""

from __future__ import annotations

from collections.abc import Iterator

from krd_ray.train.plan_work import RunWork
from krd_ray.train.planner import Plan, heaviest, seconds_of

WORTH_SHARING = 1.1


def plan_warnings(work: RunWork, plan: Plan) -> list[str]:
    """Returns what the reader of a plan has to know besides, most important first."""
    return [*_sharing(work), *_store(work), *_limits(work, plan), *_threads(plan)]


def _sharing(work: RunWork) -> Iterator[str]:
    given, placed, taught = work.teacher, work.placed, work.taught
    if given is None or placed is None:
        yield "nothing to share: no student learns from a teacher, and the plan is for the students alone"
        return
    if work.num_taught == 1 and work.uses <= 1:
        remedy = (
            "teacher and student compute on different devices, so it keeps a process of its own"
            if placed.placement == "actors"
            else "teacher.placement=in_process saves the messages between the two"
        )
        yield f"one student that asks for every view once gains nothing from a shared teacher (A* is 1): {remedy}"
        return
    if work.num_taught == 1 and work.cycle is not None:
        yield (
            f"one student: the store pays after the first {work.cycle} epochs only, when it has all answers and the "
            "teacher is idle"
        )
    if given.placement == "in_process" and placed.placement == "actors":
        yield (
            f"teacher.placement=in_process would give each of {len(taught)} processes a teacher of its own; actors "
            f"compute each view once for all of them, and so does in_process with students_per_process="
            f"{work.num_taught}"
        )
    bound = work.a_star
    if bound is not None and bound < WORTH_SHARING:
        yield (
            f"sharing saves {1 - 1 / bound:.1%} at most (A* {bound:.2f}): with the teacher inside each run, its "
            f"forwards would be {work.teacher_frac:.1%} of the cost; shared, an answer is used {work.uses:.2f} times"
        )


def _store(work: RunWork) -> Iterator[str]:
    """Answers that are asked for again much later must still be there: of other epochs, or of students before."""
    teacher = work.placed
    if teacher is None or teacher.store_rows is None or teacher.placement == "stored":
        return
    again = work.cycle is not None and any(student.epochs > work.cycle for student in work.taught)
    waves = work.at_once is not None and work.at_once < len(work.taught)
    if (again or waves) and teacher.store_rows < teacher.unique_views:
        yield (
            f"the store holds {teacher.store_rows:,} of {teacher.unique_views:,} answers that are asked for again "
            f"{'epochs later' if again else 'by students that start later'}: raise teacher.disk_bytes, or the "
            "teacher computes them again and A* is out of reach"
        )


def _limits(work: RunWork, plan: Plan) -> Iterator[str]:
    for student in heaviest(work, plan.machine):
        seconds = seconds_of(student, work.placed, work.views_per_image)
        if student.limit / seconds <= plan.rate * (1 + 1e-9):
            on_gpu = student.cost.device == "cuda"
            what = "GPU(s), one a worker," if on_gpu else "thread(s), by train.num_threads,"
            yield (
                f"{student.name} holds the others back: {student.limit:g} {what} train at most {plan.rate:,.0f} "
                "images/s"
            )


def _threads(plan: Plan) -> Iterator[str]:
    """Threads share work at a loss: what was measured with one is not true of four."""
    other = [
        f"{share.name} ({share.cost.num_threads}, then {share.num_threads})"
        for share in plan.shares
        if share.num_threads != share.cost.num_threads
    ]
    if other:
        yield (
            f"these settings change the number of threads that was measured with: {', '.join(other)}; plan again "
            "with them"
        )
