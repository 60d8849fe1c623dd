"""`python -m lib.course.site`: make the site, and look whether it holds together."""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from lib.course import ROOT

try:
    import furo  # noqa: F401  what Sphinx loads by name
    import myst_nb  # noqa: F401
    import sphinx_copybutton  # noqa: F401
    from sphinx.cmd.build import build_main

    from lib.course.build import BuildError
    from lib.course.site.links import faults
    from lib.course.site.pages import write_sources
except ModuleNotFoundError as error:
    sys.exit(f"expected {error.name}, found none: pip install -e '.[site]'")

SITE = ROOT / "build/site"


def build(out: Path):
    """Make the site in `out`, which is replaced, once the new one is whole.

    Raises BuildError where Sphinx warns, and with each fault that links finds.
    """
    with tempfile.TemporaryDirectory() as folder:
        sources, doctrees, made = (Path(folder, name) for name in ("in", "trees", "out"))
        write_sources(sources)
        strict = ["-W", "--keep-going", "-q", "-j", "auto"]
        folders = ["-c", str(Path(__file__).parent), "-d", str(doctrees)]
        if build_main([*strict, "-b", "html", *folders, str(sources), str(made)]):
            raise BuildError("expected no warning from Sphinx, got those above")
        if found := list(faults(made)):
            raise BuildError("\n".join(found))
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(made, out)


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m lib.course.site",
        description=f"Make the course's site, in {SITE.relative_to(ROOT).as_posix()}: "
        "chapters, pages, reference. Offline; no notebook is run.",
    ).parse_args()
    start = time.perf_counter()
    try:
        build(SITE)
    except BuildError as error:
        print(error)
        return 1
    num_pages = len(list(SITE.rglob("*.html")))
    print(f"{num_pages} pages in {time.perf_counter() - start:.0f} s: {SITE}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
