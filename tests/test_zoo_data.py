"""The data sets: decoded exactly, found where they are, and never taken unchecked."""

import gzip
import hashlib
import io
import json
import math
import shutil
import struct
import sys
import tarfile
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from artlib.zoo import DATASETS, digits, emoji, fashion_mnist, mnist
from artlib.zoo import cache as _cache
from artlib.zoo.datasets import decode as _decode
from artlib.zoo.datasets import fetch as _fetch
from artlib.zoo.datasets import sources as _sources


def to_idx(values):
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return header + values.tobytes()


def no_network(*_, **__):
    raise urllib.error.URLError("no network in this test")


def test_digits_are_scikit_learns_exactly():
    images, source = digits(), load_digits().images
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    # 17 grey levels, each exact in float32, so that the way back loses nothing.
    assert ((images[:, 0].double() + 1) * 8).tolist() == source.tolist()
    assert float(images.min()) == -1.0
    assert float(images.max()) == 1.0


def test_labels_on_request_are_those_of_the_images():
    images, labels = digits(return_labels=True)
    assert torch.equal(images, digits())
    assert labels.dtype == torch.int64
    assert labels.tolist() == load_digits().target.tolist()


def test_each_call_returns_its_own_memory():
    digits().zero_()
    assert float(digits().abs().sum()) > 0


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install .*art-diffusion\[book\]"):
        digits()


# Images: decoding.


def test_an_idx_file_round_trips_compressed_or_not():
    values = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(_decode.idx(to_idx(values)), values)
    assert np.array_equal(_decode.idx(gzip.compress(to_idx(values))), values)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no IDX file"),
        (b"<html>not found</html>", "no IDX file"),
        (b"\x1f\x8b\x08damaged", "damaged gzip"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "3 bytes for the shape"),
    ],
)
def test_what_is_no_idx_file_is_refused(data, what):
    with pytest.raises(_decode.FormatError, match=what):
        _decode.idx(data)


def test_mnist_is_the_same_from_json_and_from_idx():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = rng.permutation(np.arange(40, dtype=np.uint8) % 10)
    # The package sorts by digit and writes three digits after the point.
    files = [
        json.dumps({"data": (pixels[labels == d] / 255).round(3).ravel().tolist()})
        for d in range(10)
    ]
    from_json = _decode.mnist_json([text.encode() for text in files])
    from_idx = _decode.mnist_idx([to_idx(pixels), to_idx(labels)])
    assert torch.equal(from_json[0], from_idx[0])
    assert torch.equal(from_json[1], from_idx[1])
    # Each image has kept its own label.
    label_of = {
        image.tobytes(): label for image, label in zip(pixels, labels, strict=True)
    }
    for image, label in zip(*from_idx, strict=True):
        assert label_of[image.numpy().tobytes()] == label


def test_pictures_are_averaged_over_the_area_of_the_new_pixels():
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (24, 20, 4)).astype(np.float64)
    square = np.full((24, 24, 3), 255.0)
    opacity = pixels[..., 3:] / 255
    square[:, 2:22] = pixels[..., :3] * opacity + 255 * (1 - opacity)
    # Each old pixel as 32 x 32 small ones, of which a new one covers 24 x 24.
    fine = square.repeat(32, 0).repeat(32, 1)
    expected = fine.reshape(32, 24, 32, 24, 3).mean((1, 3))
    found = _decode._shrink_on_white(pixels)
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


def test_a_transparent_picture_is_white_and_an_opaque_one_keeps_its_colour():
    assert (_decode._shrink_on_white(np.zeros((8, 8, 4))) == 255).all()
    red = np.broadcast_to(np.array([200.0, 10, 3, 255]), (8, 8, 4))
    assert (_decode._shrink_on_white(red) == [200, 10, 3]).all()


def test_the_font_is_found_inside_a_debian_package():
    with io.BytesIO() as raw:
        with tarfile.open(fileobj=raw, mode="w:xz") as archive:
            entry = tarfile.TarInfo("./usr/share/fonts/NotoColorEmoji.ttf")
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"font"))
        content = raw.getvalue()
    package = b"!<arch>\n"
    for name, data in ((b"debian-binary", b"2.0"), (b"data.tar.xz", content)):
        package += name.ljust(48) + str(len(data)).encode().ljust(10) + b"`\n" + data
        package += b"\n" * (len(data) % 2)
    assert _decode._font_in_package(package) == b"font"
    with pytest.raises(_decode.FormatError, match="without NotoColorEmoji"):
        _decode._font_in_package(package[: 8 + 60 + 4])


def test_a_file_that_is_no_font_is_refused():
    with pytest.raises(_decode.FormatError, match="no font"):
        _decode.emoji([b"<html>not found</html>"])


def member(name, data, length=None):
    size = str(len(data) if length is None else length).encode()
    return name.ljust(48) + size.ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)


@pytest.mark.parametrize("length", [-60, -1, 10**9, "x", "", "+4", "1_0"])
def test_a_member_of_no_possible_length_is_refused(length):
    package = b"!<arch>\n" + member(b"debian-binary", b"2.0", length)
    with pytest.raises(_decode.FormatError, match="damaged Debian package"):
        _decode._font_in_package(package + bytes(200))


def archive(*entries):
    """A Debian package of these (name, attributes of its tar entry, content)."""
    with io.BytesIO() as raw:
        with tarfile.open(fileobj=raw, mode="w:xz") as tar:
            for name, attributes, content in entries:
                entry = tarfile.TarInfo(name)
                for key, value in attributes.items():
                    setattr(entry, key, value)
                tar.addfile(entry, io.BytesIO(content))
        return b"!<arch>\n" + member(b"data.tar.xz", raw.getvalue())


def test_a_font_that_is_a_link_or_too_large_is_not_read():
    name = "./fonts/NotoColorEmoji.ttf"
    link = {"type": tarfile.SYMTYPE, "linkname": "NotoColorEmoji.ttf"}
    with pytest.raises(_decode.FormatError, match="without NotoColorEmoji"):
        _decode._font_in_package(archive((name, link, b"")))
    good = archive((name, {"size": 5}, b"hello"))
    assert _decode._font_in_package(good) == b"hello"
    start = good.index(b"\xfd7zXZ")
    cut = b"!<arch>\n" + member(b"data.tar.xz", good[start:-40])
    with pytest.raises(_decode.FormatError, match=r"damaged .*\(truncated"):
        _decode._font_in_package(cut)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x08",
        b"\x00\x00\x08\x00a",
        b"\x00\x00\x08\xff" + b"\x00\x00\x00\x01" * 255 + b"a",
        b"\x00\x00\x08\x03" + b"\x00\x00\x00\x00" + b"\xff" * 8,
        b"\x00\x00\x08\x04" + b"\x00\x01\x00\x00" * 4,
        gzip.compress(bytes(1000), mtime=0)[:-12] + bytes(12),
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 30,
    ],
)
def test_an_idx_file_of_no_possible_shape_is_refused(data):
    with pytest.raises(_decode.FormatError):
        _decode.idx(data)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"data": [NaN]}',
        '{"data": [1e999]}',
        '{"data": [2.0]}',
        '{"data": [%s]}' % ("9" * 400),
        '{"data": 3}',
        "[]",
        "\xff",
    ],
)
def test_what_is_no_list_of_levels_is_refused(text):
    with pytest.raises(_decode.FormatError):
        _decode.mnist_json([text.encode("latin-1")] * 10)


def test_a_picture_of_any_size_is_not_unpacked(monkeypatch):
    image = pytest.importorskip("PIL.Image")
    with io.BytesIO() as file:
        image.new("RGBA", (4000, 4000)).save(file, "PNG")
        data = file.getvalue()
    glyph = type("Glyph", (), {"imageData": data})

    class Font:
        def __init__(self, *_, **__): ...

        def __getitem__(self, _):
            return type("Table", (), {"strikeData": [{"a": glyph}]})

    monkeypatch.setattr("fontTools.ttLib.TTFont", Font)
    with pytest.raises(_decode.FormatError, match="4000"):
        _decode.emoji([b""])


def test_damaged_files_are_refused_or_decoded_but_nothing_else():
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    labels = np.arange(3, dtype=np.uint8)
    digits = [json.dumps({"data": [0.5] * 784}).encode()] * 10
    name = "./fonts/NotoColorEmoji.ttf"
    font = b"\x00\x01\x00\x00\x00\x02" + bytes(60)
    whole = [
        (_decode.mnist_idx, [gzip.compress(to_idx(pixels)), to_idx(labels)]),
        (_decode.fashion, [to_idx(pixels), to_idx(labels)] * 2),
        (_decode.mnist_json, digits),
        (_decode.emoji, [archive((name, {"size": len(font)}, font))]),
        (_decode.emoji, [font]),
    ]
    rng = np.random.default_rng(5)
    for decode, files in whole:
        for _ in range(60):
            broken = list(files)
            which = rng.integers(len(files))
            content = bytearray(files[which])
            for _ in range(rng.integers(1, 4)):
                content[rng.integers(len(content))] = rng.integers(256)
            broken[which] = bytes(content[: rng.integers(1, len(content) + 1)])
            try:
                images, found = decode(broken)
            except _decode.FormatError:
                continue
            assert images.dtype == torch.uint8
            assert found.dtype == torch.int64


# Images: finding them.


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A data set of 4 + 2 images, its files, and an empty cache."""
    rng = np.random.default_rng(2)
    parts = [
        rng.integers(0, 256, (4, 3, 3), dtype=np.uint8),
        np.arange(4, dtype=np.uint8),
        rng.integers(0, 256, (2, 3, 3), dtype=np.uint8),
        np.arange(2, dtype=np.uint8),
    ]
    files = [to_idx(part) for part in parts]
    place = tmp_path / "installed"
    monkeypatch.setenv("ARTLIB_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    data = _fetch.DataSet(
        name="small",
        sha256=_decode.content_hash(*_decode.fashion(files)),
        installed=[
            _fetch.Source(tuple(f"{place}/{k}" for k in range(4)), _decode.fashion)
        ],
        online=_fetch.Source(
            tuple(f"https://example.org/{k}" for k in range(4)), _decode.fashion
        ),
        install="install it",
    )
    return data, files, place, tmp_path / "cache" / "small.safetensors"


def install(place, files):
    place.mkdir()
    for k, content in enumerate(files):
        (place / str(k)).write_bytes(content)


def test_an_installed_set_is_found_and_cached(small):
    data, files, place, cache = small
    install(place, files)
    first = _fetch.find(data, download=False)
    shutil.rmtree(place)
    second = _fetch.find(data, download=False)  # only the cache is left
    assert cache.is_file()
    for one, other, expected in zip(first, second, _decode.fashion(files), strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)


@pytest.mark.parametrize("damage", ["truncated", "other", "foreign"])
def test_a_damaged_cache_is_made_again(small, damage):
    data, files, place, cache = small
    install(place, files)
    good = _fetch.find(data, download=False)
    whole = cache.read_bytes()
    wrong = {
        "truncated": whole[:-7],
        "other": whole[:-1] + bytes([whole[-1] ^ 1]),
        "foreign": b"hello",
    }
    cache.write_bytes(wrong[damage])
    assert torch.equal(_fetch.find(data, download=False)[0], good[0])
    assert cache.read_bytes() == whole


def test_without_a_copy_one_sentence_says_what_to_do_and_nothing_is_fetched(small):
    with pytest.raises(FileNotFoundError, match=r"install it.*download=True.*sample"):
        _fetch.find(small[0], download=False)


def test_another_version_is_not_taken_for_the_set(small):
    data, files, place, cache = small
    install(place, [*files[:2], *files[:2]])
    with pytest.raises(FileNotFoundError, match="another set or version"):
        _fetch.find(data, download=False)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_only_time(small, monkeypatch):
    data, files, place, cache = small
    install(place, files)
    cache.parent.parent.joinpath("cache").write_text("a file, not a folder")
    assert len(_fetch.find(data, download=False)[0]) == 6


def serve(monkeypatch, files):
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        answer = io.BytesIO(files[int(address[-1])])
        answer.headers = {}
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_a_download_on_request_is_checked_and_cached(small, monkeypatch):
    data, files, _, _ = small
    asked = serve(monkeypatch, [gzip.compress(content) for content in files])
    expected = _decode.fashion(files)[0]
    assert torch.equal(_fetch.find(data, download=True)[0], expected)
    assert asked == list(data.online.where)
    assert torch.equal(_fetch.find(data, download=True)[0], expected)
    assert len(asked) == 4  # the second time nothing was fetched


@pytest.mark.parametrize("wrong", ["altered", "page", "long"])
def test_a_wrong_download_is_refused_and_nothing_is_kept(small, monkeypatch, wrong):
    data, files, _, cache = small
    altered = files[0][:-1] + bytes([files[0][-1] ^ 1])
    first = {"altered": altered, "page": b"<html>", "long": files[0]}[wrong]
    if wrong == "long":
        monkeypatch.setattr(_cache, "LARGEST", 10)
    serve(monkeypatch, [first, *files[1:]])
    with pytest.raises(ValueError, match=r"small: https://example.org/0 .*was kept"):
        _fetch.find(data, download=True)
    assert not cache.exists()


def test_a_download_is_not_decoded_before_it_is_known(small, monkeypatch):
    data, files, _, _ = small
    decoded = []

    def decode(contents):
        decoded.append(contents)
        return _decode.fashion(contents)

    published = [hashlib.sha256(content).hexdigest() for content in files[:3]]
    published.append(hashlib.sha1(files[3]).hexdigest())
    online = replace(data.online, decode=decode, files=tuple(published))
    data = replace(data, online=online)
    serve(monkeypatch, [*files[:3], files[3] + b" "])
    with pytest.raises(ValueError, match=r"another file than was published \(3: SHA1"):
        _fetch.find(data, download=True)
    assert not decoded
    serve(monkeypatch, files)
    assert len(_fetch.find(data, download=True)[0]) == 6
    assert len(decoded) == 1


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "emoji"])
def test_every_file_to_download_is_known(name):
    online = _sources.describe(name).online
    assert len(online.files) == len(online.where)
    assert all(len(digest) in (40, 64) for digest in online.files)


def test_an_installed_file_of_any_size_is_not_read(small, monkeypatch):
    data, files, place, _ = small
    install(place, files)
    monkeypatch.setattr(_fetch, "LARGEST", 10)
    with pytest.raises(FileNotFoundError, match="0 is too large"):
        _fetch.find(data, download=False)


def test_a_failed_download_names_the_address(small):
    with pytest.raises(ConnectionError, match=r"https://example.org/0 could not"):
        _fetch.find(small[0], download=True)


# Images: the loaders.

LOADERS = [
    (fashion_mnist, (1, 28, 28), 60_000, 10_000),
    (mnist, (1, 28, 28), 9_000, 1_000),
    (emoji, (3, 32, 32), 3_481, 435),
]


@pytest.mark.parametrize(("loader", "shape", "train", "test"), LOADERS)
def test_the_sample_needs_nothing(loader, shape, train, test, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ARTLIB_DATA", str(tmp_path))
    images = loader("sample")
    assert images.shape == (400, *shape)
    assert images.dtype == torch.float32
    assert images.min() == -1.0
    assert images.max() == 1.0
    levels = (images.double() + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    assert len(images.flatten(1).unique(dim=0)) == 400


@pytest.mark.parametrize("loader", [fashion_mnist, mnist])
def test_labels_of_the_sample_are_those_of_its_images(loader):
    images, labels = loader("sample", return_labels=True)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))
    # The nearest of the class means: 10 % right if the labels were shuffled.
    even, odd = images[::2].flatten(1), images[1::2].flatten(1)
    means = torch.stack([even[labels[::2] == k].mean(0) for k in range(10)])
    right = torch.cdist(odd, means).argmin(1) == labels[1::2]
    assert right.double().mean() > 0.55


@pytest.mark.parametrize(("loader", "shape", "train", "test"), LOADERS)
def test_the_splits_of_the_full_set(loader, shape, train, test):
    try:
        one, other = loader("train"), loader("test")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert one.shape == (train, *shape)
    assert other.shape == (test, *shape)
    assert torch.equal(other[torch.arange(400) * test // 400], loader("sample"))
    seen = {hashlib.sha256(x.numpy()).digest() for x in one.contiguous()}
    shared = sum(hashlib.sha256(x.numpy()).digest() in seen for x in other)
    assert shared == 0


def test_mnist_has_the_class_counts_of_the_first_ten_thousand():
    try:
        parts = [mnist(split, return_labels=True)[1] for split in ("train", "test")]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    counts = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert torch.cat(parts).bincount().tolist() == counts
    # As good as shuffled: each class has its share of the test split.
    shares = parts[1].bincount() / torch.cat(parts).bincount()
    assert (shares - 0.1).abs().max() < 4 * math.sqrt(0.1 * 0.9 / 863)


@pytest.mark.parametrize("loader", DATASETS.values())
def test_an_unknown_split_is_refused(loader):
    with pytest.raises(ValueError, match="split: expected one of 'train', 'test'"):
        loader("validation")
