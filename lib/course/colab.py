"""The course on Google Colab, where nobody has installed it.

A student's notebook that was built with an address, `make notebooks REPO=...`, begins
with two cells more: links, and code that fetches the course, on Colab alone. That code
calls `say_what_differs` of what it has fetched.

Elsewhere, and in a grader, the code does nothing. It is one function, whose names are its
own: no answer can need what it binds.
"""

import importlib.metadata
import re
from dataclasses import asdict, dataclass

from lib.course import ROOT

# As GitHub spells them: Colab opens what is there.
REPO = r"https://github\.com/([A-Za-z0-9][A-Za-z0-9-]*)/(\w[\w.-]*?)(?:\.git)?/?"
TAG = r"\w(?:[\w.+-]*\w)?"  # without a slash, which would end it in a link

LINKS = """\
[Open in Colab](https://colab.research.google.com/github/{owner}/{name}/blob/{tag}/{path})
· [{owner}/{name}]({repo}/tree/{tag}) at {tag}

On Colab run the next cell first. Anywhere else it does nothing."""

FETCH = '''\
def fetch_course():
    """On Google Colab get the course, once, and work in its folder."""
    import os, subprocess, sys

    if "google.colab" in sys.modules and not os.path.isdir("../lib/course"):
        repo = "{repo}"
        folder = "{name}-{tag}"
        if not os.path.isdir(folder):
            git = "git -c advice.detachedHead=false clone --quiet --depth 1"
            clone = f"{{git}} --branch {tag} {{repo}} {{folder}}"
            subprocess.run(clone.split(), check=True)
        os.chdir(f"{{folder}}/notebooks")
        sys.path.insert(0, os.path.abspath(".."))
        from lib.course.colab import say_what_differs
        say_what_differs()

fetch_course()'''


@dataclass(frozen=True)
class Address:
    """A copy of the course that everybody can fetch. Raises ValueError for what Colab
    cannot open.

    repo: may end with ".git" or a slash, which are left out. tag: of a version of it.
    """

    repo: str
    tag: str

    def __post_init__(self):
        found = re.fullmatch(REPO, self.repo, re.ASCII)
        if not found:
            words = "expected https://github.com/OWNER/NAME"
            raise ValueError(f"REPO: {words}, got {self.repo!r}")
        if not re.fullmatch(TAG, self.tag, re.ASCII) or ".." in self.tag:
            raise ValueError(f"TAG: expected a tag, as v0.1.0, got {self.tag!r}")
        owner, name = found.groups()
        object.__setattr__(self, "repo", f"https://github.com/{owner}/{name}")

    def first_cells(self, path: str) -> tuple[str, str]:
        """The sources of the two cells, text and code, of the notebook at `path`, in the
        repository."""
        owner, name = self.repo.split("/")[-2:]
        names = {"owner": owner, "name": name, "path": path, **asdict(self)}
        return LINKS.format(**names), FETCH.format(**names)


def say_what_differs():
    """Print what the course needs and this runtime does not have, if anything, in a
    line. Nothing is installed: Colab's torch fits its GPU."""
    if found := differences():
        print(f"This runtime: {'; '.join(found)}. What needs it may fail.")


def differences() -> list[str]:
    """Of each package that is missing, or too old or new: what is expected, what is here.
    The ranges are those of pyproject.toml."""
    import tomllib  # not in Python 3.10, which Colab has left
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = []
    for line in tomllib.loads(text)["project"]["dependencies"]:
        needed = Requirement(line)
        is_elsewhere = needed.marker is not None and not needed.marker.evaluate()
        if is_elsewhere or needed.name == "jupyterlab":  # Colab takes its place
            continue
        expected = line.split(";")[0].strip()
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"expected {expected}, found none")
            continue
        if not needed.specifier.contains(version, prereleases=True):
            found.append(f"expected {expected}, got {version}")
    return found
