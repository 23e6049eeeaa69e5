"""Fail where a ratio has dropped since the committed results.

.venv/bin/python -m benchmarks.check benchmarks/results/suite.json NEW.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

DROP = 0.15


def drops(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Ratios that are missing, or lower than before by more than DROP."""
    return [
        f"{name}: {before[name]:.3f} before, {after[name]:.3f} now" if name in after else f"{name}: no longer measured"
        for name in before
        if after.get(name, 0.0) < (1 - DROP) * before[name]
    ]


def main() -> int:
    before, after = (json.loads(Path(p).read_text())["ratio to the limit, median"] for p in sys.argv[1:3])
    found = drops(before, after)
    print("\n".join(found) or f"{len(before)} ratios: none has dropped by more than {DROP:.0%}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
