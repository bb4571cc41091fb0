"""How long `import lockfree` takes over `import torch`: fresh processes in turn, ratio of medians.

python benchmarks/import_time.py [--out benchmarks/results/import_time.json]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 9


def seconds(module: str) -> float:
    """Times one import in a fresh interpreter, start and end of it included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measures and writes the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "import_time.json")
    arguments = parser.parse_args()
    for module in ("torch", "lockfree"):
        seconds(module)
    pairs = [(seconds("lockfree"), seconds("torch")) for _ in range(ROUNDS)]
    found = {
        "command": "python benchmarks/import_time.py",
        "lockfree_over_torch": statistics.median(a / b for a, b in pairs),
        "lockfree_seconds": statistics.median(a for a, _ in pairs),
        "torch_seconds": statistics.median(b for _, b in pairs),
        "rounds": ROUNDS,
    }
    print(json.dumps(found))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
