"""How the course is taught: everything that is not taught itself."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder of the course
