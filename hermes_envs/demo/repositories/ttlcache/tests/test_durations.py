import pytest

from ttlcache import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("250ms", 0.25), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("1M5S", 65), (" 2h ", 7200)],
)
def test_parse(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "h", "10x", "1m 30s", "5m5m", "-1", "1h-5m"], ids=lambda text: f"<{text}>")
def test_no_duration(text):
    with pytest.raises(ValueError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250ms"), (1, "1s"), (59, "59s"), (60, "1m"), (5400, "1h30m"), (3661, "1h1m"), (3605, "1h"), (90061, "1d1h")],
    ids=lambda value: f"{value}",
)
def test_format(seconds, text):
    assert format_duration(seconds) == text
