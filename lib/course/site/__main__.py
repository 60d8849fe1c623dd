"""`python -m lib.course.site`: make the site, and look whether it holds together."""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from lib.course import ROOT
from lib.course.site.links import faults
from lib.course.site.pages import write_sources


def build(out: Path) -> list[str]:
    """Make the site in `out`, which is replaced; what is wrong with it, line by line."""
    from sphinx.cmd.build import build_main

    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        sources, doctrees = Path(folder, "sources"), Path(folder, "doctrees")
        write_sources(sources)
        here = str(Path(__file__).parent)
        strict = ["-W", "--keep-going", "-q", "-j", "auto"]
        folders = ["-c", here, "-d", str(doctrees), str(sources), str(out)]
        if build_main([*strict, "-b", "html", *folders]):
            return ["Sphinx warned of what is written above"]
    return list(faults(out))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.course.site",
        description="Make the course's site: chapters, pages, reference. Offline; "
        "nothing is executed.",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/site")
    out = parser.parse_args().out
    start = time.perf_counter()
    try:
        found = build(out)
    except ModuleNotFoundError as error:
        print(f"expected {error.name}, found none: pip install -e '.[site]'")
        return 1
    print(*found, sep="\n", end="\n" if found else "")
    if found:
        return 1
    pages = len(list(out.rglob("*.html")))
    print(f"{pages} pages in {time.perf_counter() - start:.0f} s: {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
