"""Measures the memory of a call."""

import torch


def peak_bytes(call) -> int:
    """Peak of the bytes that a call allocates, on top of the memory in use before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return peak
