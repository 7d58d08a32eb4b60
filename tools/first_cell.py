# Set-up, the same in every chapter: installs the library on Colab, picks a device.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("/content/art"):
    url = "https://github.com/art-diffusion/art"
    clone = ["git", "clone", "--quiet", "--depth", "1", url, "/content/art"]
    subprocess.run(clone, check=True)
    install = ["-m", "pip", "install", "--quiet", "/content/art[notebooks]"]
    subprocess.run([sys.executable, *install], check=True)
    os.chdir("/content/art/notebooks")

from artlib import book

device = book.device()
