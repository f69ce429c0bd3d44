"""The source distribution of a small package, from which tasks are made."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: Coin_Purse\nVersion: 1.0\nRequires-Dist: sphinx; extra == 'doc'\n",
    # Source distributions hold generated files that their repositories ignore.
    ".gitignore": "coin_purse/words.py\n",
    "setup.py": "raise SystemExit('nothing runs this')\n",
    "coin_purse/__init__.py": "from coin_purse.change import make_change\nfrom coin_purse.words import in_words\n",
    "coin_purse/change.py": '''"""Change."""


def make_change(amount, coins=(50, 20, 10, 5, 2, 1)):
    """The fewest coins that make up an amount, largest first.

    Raises ValueError for a negative amount.
    """
    if amount < 0:
        raise ValueError("no such amount")
    change = []
    for coin in coins:
        count, amount = divmod(amount, coin)
        change.extend([coin] * count)
    return change
''',
    "coin_purse/words.py": '''"""Words."""


def in_words(coins):
    """Coins as text."""
    groups = {}
    for coin in coins:
        groups[coin] = groups.get(coin, 0) + 1
    if not groups:
        return "nothing"
    return ", ".join(f"{count} x {coin}" for coin, count in groups.items())


def never_called(coins):
    total = 0
    for coin in coins:
        total += coin
    return total
''',
    "coin_purse/__pycache__/words.cpython-311.pyc": "stale",
    "tests/test_purse.py": '''import os

import pytest

from coin_purse import in_words, make_change


@pytest.mark.parametrize(
    "amount, expected", [(0, []), (3, [2, 1]), (88, [50, 20, 10, 5, 2, 1])], ids=["0 [none]", "3 ct", "88 ct"]
)
def test_change(amount, expected):
    assert make_change(amount) == expected


def test_negative():
    """Debts."""
    with pytest.raises(ValueError):
        make_change(-1)


@pytest.mark.parametrize("thing", [object()], ids=repr)
def test_name_with_address(thing):
    assert make_change(1) == [1]


@pytest.mark.parametrize("number, letter", enumerate(set("abcdefghijklmnop")))
def test_order_of_a_set(number, letter):
    assert make_change(1) == [1]


def test_words():
    assert in_words([]) == "nothing"
    assert in_words([2, 2, 1]) == "2 x 2, 1 x 1"


def test_fails_always():
    assert False


def test_has_no_network():
    assert os.listdir("/sys/class/net") == ["lo"] if os.path.isdir("/sys/class/net") else True
''',
}


def make_archive(path: Path, files: dict[str, str], extra: Sequence[tarfile.TarInfo] = ()) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"coin_purse-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        for member in extra:
            archive.addfile(member)
    return path
