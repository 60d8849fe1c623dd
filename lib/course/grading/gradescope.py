"""The zip that Gradescope asks for when an assignment is made.

    python -m lib.course.grading.gradescope 3          chapter 3, or 1,2: gradescope.zip

Gradescope runs setup.sh once, when it builds the container, and run_autograder for each
submission: https://gradescope-autograders.readthedocs.io/en/latest/specs/
"""

import argparse
import secrets
import sys
import zipfile
from pathlib import Path

from lib.course import ROOT
from lib.course.exercises import names_of

SETUP = """#!/usr/bin/env bash
set -e
apt-get update
apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
cd /autograder/source
export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install -r requirements.txt
"""
# The seed is gone before a student's code is there to read it. Each submission has a
# container of its own, made as the zip says.
RUN = """#!/usr/bin/env bash
set -e
cd "${{AUTOGRADER:=/autograder}}/source"
exec < seed
rm seed
"$AUTOGRADER/venv/bin/python" -m lib.course.grading \\
    --gradescope "$AUTOGRADER" --chapters {chapters} --seed -
"""
COURSE = ("LICENSE", "README.md", "requirements.txt", "pyproject.toml", "lib/**/*")


def write_zip(path: Path, chapters: str, seed: str):
    """Pack the course's library, and the two scripts. ValueError for unknown chapters."""
    names_of(chapters)
    scripts = {"setup.sh": SETUP, "run_autograder": RUN.format(chapters=chapters)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, script in scripts.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o755 << 16  # may be executed
            archive.writestr(info, script)
        archive.writestr("seed", seed)
        for pattern in COURSE:
            for file in sorted(ROOT.glob(pattern)):
                if file.is_file() and "__pycache__" not in file.parts:
                    archive.write(file, file.relative_to(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.course.grading.gradescope",
        description="Make the zip of an assignment on Gradescope.",
    )
    parser.add_argument("chapters", help="as 3 or 1,2")
    parser.add_argument("--out", type=Path, default=Path("gradescope.zip"))
    parser.add_argument("--seed", help="of the hidden cases: letters, digits (random)")
    args = parser.parse_args()
    seed = args.seed or secrets.token_hex(8)
    if not seed.isalnum():
        parser.error(f"--seed: expected letters and digits, got {seed!r}")
    try:
        write_zip(args.out, args.chapters, seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: for Configure Autograder; it grades with the seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
