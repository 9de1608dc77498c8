"""Runs the tests that need a GPU (pytest's mark gpu), without those of the backends that are not under test."""

import importlib.util
import subprocess
import sys

import cases
from steps import SKIPPED

NEEDED = ("pytest", "hypothesis", "filelock")


def main(words: list[str] | None = None) -> int:
    given = cases.parser(__doc__).parse_args(words)
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        print(f"missing: {', '.join(missing)}")
        return SKIPPED
    files = [str(path) for path in sorted((cases.ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    others = " and ".join(f"not {name}" for name in ("cuda", "triton") if name != given.backend)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "-m", "gpu", "-k", others, *files]
    print(" ".join(command), flush=True)
    return subprocess.run(command, cwd=cases.ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
