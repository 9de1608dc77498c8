"""Fails, with the reason, unless the backend under test serves; the CUDA backend must be that of "auto" too."""

import sys
import time

import cases
import torch

import kdkernels
from kdkernels import backends, info


def reason_against(backend: str, device: str) -> str | None:
    """Why the backend does not serve tensors of the device, or why "auto" passes over the CUDA backend; or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    x = torch.empty(1, 1, device=device)
    reason = backends.refuse(backend, x, x)
    if reason is not None:
        return f"the backend {backend!r} refuses: {reason}"
    chosen = backends.automatic(x, x)
    if (backend, device) == ("cuda", "cuda") and chosen != backend:
        return f"'auto' is {chosen!r} there, although the backend {backend!r} serves"
    return None


def main(words: list[str] | None = None) -> int:
    arguments = cases.parser(__doc__).parse_args(words)
    print(f"kdkernels at {kdkernels.__file__}")
    print(info.report(), flush=True)
    with cases.serving(arguments.backend, arguments.device):
        reason = reason_against(arguments.backend, arguments.device)
        if reason is not None:
            print(reason)
            return 1
        start = time.perf_counter()
        student, teacher = cases.drawn(3, 50, torch.float32, arguments.device)
        cases.loss_and_gradient(student, teacher, "kl", arguments.backend)
        cases.synchronize(arguments.device)
        print(f"the backend {arguments.backend!r} serves; its first call took {time.perf_counter() - start:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
