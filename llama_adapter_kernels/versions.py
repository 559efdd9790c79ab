"""What made a file: versions of the packages that matter, and the commit."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

NAME = "llama-adapter-kernels"


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed versions, None where a package is not installed; Python's and this package's come first."""
    from llama_adapter_kernels import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), NAME: __version__, "commit": commit()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit that this package is of: of the checkout that it is imported from, with "+" when its sources are changed,
    or the one that pip installed. None where neither is known."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    revision = git("rev-parse", "--short=12", "HEAD")
    if not revision or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return _installed_commit()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../csrc")
    return revision + ("+" if changed else "")


def _installed_commit() -> str | None:
    """What pip noted about a package that it took from a repository."""
    try:
        noted = importlib.metadata.distribution(NAME).read_text("direct_url.json")
        found: str | None = json.loads(noted or "{}").get("vcs_info", {}).get("commit_id")
        return found
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
