"""Tell whether training can start in this environment, and if not, why and what to do."""

import runpy
from pathlib import Path

# By its path: where the package cannot be imported, this tool says why.
DOCTOR = Path(__file__).resolve().parents[1] / "rfa_mmdet" / "cli" / "doctor.py"

if __name__ == "__main__":
    runpy.run_path(str(DOCTOR), run_name="__main__")
