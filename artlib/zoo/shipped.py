"""What the zoo ships beside its code, by check sum: weights, and samples of data.

These files stand in the repository but not in the wheel. ``shipped.sha256`` lists them,
in the form of the program sha256sum: what `artlib.zoo.cache` fetches is compared with
it. ``tools/check_sums.py`` writes it.
"""

from __future__ import annotations

from pathlib import Path

_LIST = Path(__file__).with_name("shipped.sha256")


def shipped() -> dict[str, str]:
    """SHA-256 of each file by its path below ``artlib/zoo``, with slashes."""
    lines = _LIST.read_text("ascii").splitlines()
    return {path: digest for digest, path in (line.split() for line in lines)}


CHECK_SUMS = {
    # cnn-fashion
    "aa39965a7d171966ed0c2a1e7657e586f77230a880ef6270d563518f491665dd": (
        "64eb0418f809c74fb1b6edb36a1bba6e77a70026eead97dfd598e2679bfc37ee"
    ),
    # emoji-base
    "72729fe84ad7722e0e77a0d1b4f17256feeac2d6b7cdbda9ad2a584e15dd302d": (
        "c60ec75570898db6333333d1326bb4a3e03966f87a96788eef4fe954cfb906aa"
    ),
    # fashion-autoencoder
    "2485ce0f2b2178c115f98796d04d6c6707ce29fcc19c1f1abdde2589e7d04920": (
        "1e3b2351c9e21c53788813037adb2577f7f34bbe216777243d59fc0bff0dfc8f"
    ),
    # fashion-base
    "e92fed2761391498448431baf7be15635afe16d258c8c5ea9ed9f090be863c06": (
        "62348ee17645cfb36c9e75e634640057fc5591e98993ebdf22ee36e7a1aaf40e"
    ),
    # fashion-large
    "d23da42f48d6e7f0c50ce48d22e08b24ef813dd55356409567303e521047a910": (
        "cf48db595557764d16ce3263a4b9271516935e415145977403fe5bb1930720a2"
    ),
    # fashion-latent-base
    "1272fb880755102ac9558415bdf6351dc6f0d663783d3ebf447449e10d5f3962": (
        "b0cb65849576c4c1ae213acd2b01c77a8bb6bd69269839985a4218414df1b33a"
    ),
    # fashion-small
    "1d62c15596ba459ea76ae2d4f3d98a7586d964bf3bda272ca84b934a3d00770b": (
        "de764bdb93d0ad8123ed56f2c3113b0d3491d29991ec1ae75cb16bb88a815d23"
    ),
    # lenet-mnist
    "f6dc7dc43df7003d067286871e0c90cdc09a13d56d33e5f0ad770ab0d6b5aade": (
        "654f9a34767f9695aebe574815344d5a12a40ba471aaf148bbd8d0ae2db2ee90"
    ),
    # mnist-base
    "9a669ab20acbb31d1a2ef5592f867b6c0befbb129aee2ac5996737c62b634f8e": (
        "46e19c39a710bf1dbffd660cfefcd84c3c3bc3eecccd75f5cdf6ca252f39fdcd"
    ),
    # rotation-emoji
    "ad3582c6a1884863f42b67d35541a32e67bf4d1b84ba2b60a0779b6caca8f053": (
        "b1bc483ba84e8d60aba86b55a1c080671705da656ddc60b45edd14f276de82b2"
    ),
}
"""SHA-256 of everything in a weight file by that of its tensors.

For the files of artlib 0.1.0, which hold only the latter; later ones carry both
(`artlib._common.tensor_file`). By the tensors, so that a copy under another name is
known too.
"""
