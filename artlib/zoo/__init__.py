"""Small networks and data to try things on.

Nothing is downloaded on import. Weights and samples that artlib was installed without
are fetched by the first call that asks for them (`artlib.zoo.cache`), data sets only
with ``download=True``.
"""

from .datasets import DATASETS, cifar10, digits, emoji, fashion_mnist, mnist
from .features import FeatureNet, features
from .measures import image_measure
from .networks import ZooDenoiser, available, fully_trained, load, load_autoencoder
from .recipes import RECIPES

__all__ = [
    "DATASETS",
    "RECIPES",
    "FeatureNet",
    "ZooDenoiser",
    "available",
    "cifar10",
    "digits",
    "emoji",
    "fashion_mnist",
    "features",
    "fully_trained",
    "image_measure",
    "load",
    "load_autoencoder",
    "mnist",
]
