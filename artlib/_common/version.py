"""The version, and where it is published, in the place that the package reads them."""

__version__ = "0.1.0"

REPOSITORY = "https://github.com/art-diffusion/art"
RELEASE = "v0.2.0"
"""The tag in the repository that this state of the library belongs to."""
