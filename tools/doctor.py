"""Check this environment, and print the command that fixes each problem."""

import runpy
from pathlib import Path

# Run by path, because the doctor must work even if the package cannot be imported.
DOCTOR = Path(__file__).resolve().parents[1] / "rfa_mmdet" / "cli" / "doctor.py"

if __name__ == "__main__":
    runpy.run_path(str(DOCTOR), run_name="__main__")
