# Set-up, the same in every chapter: finds the library and picks a device. On Colab it
# first clones and installs what is not there yet. A fork or another state is taken from
# ARTLIB_REPOSITORY and ARTLIB_REVISION (a tag, a branch, a commit) in os.environ.
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

repository = (
    os.environ.get("ARTLIB_REPOSITORY") or "https://github.com/art-diffusion/art"
)
release = "v0.2.0"  # the one these chapters belong to
revision = os.environ.get("ARTLIB_REVISION") or release
clone = Path("/content/art")
advice = f'"art-diffusion[notebooks] @ git+{repository}@{revision}"'
if revision == release:
    advice += f" (without @{release} as long as there is no such release)"
try:
    from artlib import book
except ImportError:
    book = None

if "google.colab" in sys.modules:
    os.environ.setdefault("GIT_TERMINAL_PROMPT", "0")  # no question that nobody sees
    try:
        os.chdir(clone.parent)  # the folder of before may be gone
        origin = clone.with_name("art.origin")  # what the clone is a clone of
        asked = f"{repository} {revision}"
        other = origin.is_file() and origin.read_text() != asked
        # Of all files this one is among the last to be written.
        if other or not (clone / "tools" / "first_cell.py").is_file():
            print(f"Set-up 1 of 2: cloning {repository}, half a minute ...", flush=True)
            part = clone.with_name("art.part")  # renamed when complete
            shutil.rmtree(part, ignore_errors=True)
            git = ["git", "clone", "--filter=blob:none", "--no-checkout"]
            subprocess.run([*git, repository, str(part)], check=True)
            git = ["git", "-C", str(part), "checkout", "--quiet"]
            try:
                quiet = subprocess.DEVNULL if revision == release else None
                subprocess.run([*git, revision], stderr=quiet, check=True)
            except subprocess.CalledProcessError:
                if revision != release:
                    raise
                print(f"There is no {release} yet: the newest state is taken instead.")
                subprocess.run([*git, "origin/HEAD"], check=True)
            if clone.exists():
                aside = tempfile.mkdtemp(prefix="art-", dir=clone.parent)
                os.replace(clone, aside)
                print(f"{clone} was not complete, or not {asked}: it is {aside} now.")
            os.replace(part, clone)
            origin.write_text(asked)
            book = None  # if there is an older one
        if book is None:
            print("Set-up 2 of 2: installing artlib, a minute or two ...", flush=True)
            pip = [sys.executable, "-m", "pip", "install", "--no-input"]
            subprocess.run([*pip, "--editable", f"{clone}[notebooks]"], check=True)
            sys.path.insert(0, str(clone))  # as it will be after a restart
        os.chdir(clone / "notebooks")
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"the set-up stopped ({error}): read the lines above, check the connection "
            f"and {repository} at {revision}, and run this cell again"
        ) from None
elif book is None:  # a kernel without the library may still be inside a clone
    here = Path(globals().get("__vsc_ipynb_file__", Path.cwd() / "notebook"))
    for folder in here.parents:
        if (folder / "artlib" / "book" / "__init__.py").is_file():
            sys.path.insert(0, str(folder))
            advice = f'--editable "{folder}[notebooks]"'
            break
if book is None:
    for name in [name for name in sys.modules if name.split(".")[0] == "artlib"]:
        del sys.modules[name]  # an older one, or another package of that name
    importlib.invalidate_caches()
    try:
        from artlib import book
    except ImportError as error:
        raise ImportError(
            f"artlib, the library of this book, cannot be used here ({error}): run "
            f"{sys.executable} -m pip install {advice}, restart and run this cell again"
        ) from None

device = book.device()
