"""Whether this process was forked from one that had several threads: it must start no OpenMP threads then.

OpenMP keeps the threads of a region for later regions. A forked child has only the thread that forked, so a region of
several threads would wait forever for the threads that the parent has kept. The package imports this module first,
because the parent may fork before its first loss.
"""

import os

_parent_has_threads = _has_lost_threads = False


def _before_fork() -> None:
    global _parent_has_threads
    try:
        _parent_has_threads = len(os.listdir("/proc/self/task")) > 1
    except OSError:  # another system than Linux
        _parent_has_threads = True


def _in_child() -> None:
    global _has_lost_threads
    _has_lost_threads = _has_lost_threads or _parent_has_threads


def has_lost_threads() -> bool:
    """Whether this process, or one that it was forked from, was forked while it had several threads."""
    return _has_lost_threads


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
