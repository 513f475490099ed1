"""Write the tables of docs/faithfulness.md from the golden tests.

    python scripts/faithfulness.py

The exit status is 1 if a quantity disagrees with the golden numbers.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from golden.comparison import run
from golden.table import PAGE, load_comparisons, sections, write


def main() -> int:
    torch.set_num_threads(1)
    rows = load_comparisons()
    page = PAGE.read_text(encoding="utf-8")
    for name, text in sections(rows).items():
        page = write(page, name, text)
    PAGE.write_text(page, encoding="utf-8")
    wrong = [row for row in rows if (run(row).different > 0) != bool(row.deviation)]
    for row in wrong:
        print(f"{row.file}: {row.quantity}: {', '.join(run(row).details) or 'no difference'}")
    print(f"{PAGE}: {len(rows)} quantities, {len(wrong)} unexpected results")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
