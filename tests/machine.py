"""What the tests need of a machine beside Python packages: a Chromium and a C++ compiler.

Run as `python tests/machine.py` it finds both, installs what is missing, and ends with status 1 and what to do where
that cannot be done. Debian's packages come first; for the browser Playwright's own build is the last resort.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
_COMPILERS = ("g++", "c++", "clang++")
_PLAYWRIGHT_SECONDS = 60


def chromium() -> str | None:
    """Path of a Chromium or Chrome: what CHROMIUM names, what is on PATH, or what Playwright has installed."""
    if named := os.environ.get("CHROMIUM"):
        return shutil.which(named)
    found = next(filter(None, map(shutil.which, (*_BROWSERS, *_APPLICATIONS))), None)
    return found or _playwrights()


def compiler() -> str | None:
    """Path of a C++ compiler: what CXX names, or what is on PATH."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, (named,) if named else _COMPILERS)), None)


def _playwrights() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def _install_packages(*names: str) -> None:
    """Install Debian packages, where that is possible without asking anybody; else do nothing."""
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (root and subprocess.run([*root, "true"], check=False).returncode):
        return
    print(f"installing Debian's {' and '.join(names)}", flush=True)
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    subprocess.run([*root, "apt-get", "update", "-qq"], check=False)
    subprocess.run([*root, *environment, "apt-get", "install", "-qq", "-y", *names], check=False)


def _install_playwrights() -> None:
    print("installing Playwright's Chromium", flush=True)
    command = [sys.executable, "-m", "playwright", "install", "chromium"]
    try:
        subprocess.run(command, check=False, timeout=_PLAYWRIGHT_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"Playwright's download did not end within {_PLAYWRIGHT_SECONDS} s", file=sys.stderr)


def main() -> int:
    """Find or install both; 0 if both are there at the end."""
    if os.environ.get("CHROMIUM") and not chromium():
        print(
            f"CHROMIUM = {os.environ['CHROMIUM']}: there is no such program; correct it, or unset it", file=sys.stderr
        )
        return 1
    missing = [name for name, find in (("chromium", chromium), ("g++", compiler)) if not find()]
    if missing:
        _install_packages(*missing)
    if not chromium():
        _install_playwrights()
    problems = []
    if not chromium():
        problems.append("The browser tests need Chromium or Chrome: install one, or name it: CHROMIUM=/path make test")
    if not compiler():
        problems.append(
            "assistant/test_nf4.py needs a C++ compiler: install g++ or clang, or name it: CXX=/path make test"
        )
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
