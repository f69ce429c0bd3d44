import pytest

from intervals import Calendar, ConflictError, Interval, parse_set

DAY = Interval(8 * 60, 18 * 60)


def test_overlapping_booking_is_refused(office):
    with pytest.raises(ConflictError, match="overlaps 'review'"):
        office.book("lunch", Interval(13 * 60, 14 * 60 + 1))
    assert len(office) == 2


def test_back_to_back_bookings(office):
    office.book("coffee", Interval(9 * 60 + 30, 10 * 60))
    assert [name for name, _ in office.agenda()] == ["stand-up", "coffee", "review"]


def test_name_is_taken(office):
    with pytest.raises(ValueError, match="already booked"):
        office.book("review", Interval(0, 1))


def test_move_without_room_changes_nothing(office):
    with pytest.raises(ConflictError):
        office.move("stand-up", 5 * 60)
    assert dict(office.agenda())["stand-up"] == Interval(540, 570)


def test_move(office):
    assert office.move("stand-up", -30) == Interval(510, 540)


def test_free(office):
    assert office.free(DAY) == parse_set("[480, 540) | [570, 840) | [960, 1080)")


def test_free_of_exactly_the_wanted_length(office):
    assert office.free(DAY, at_least=120) == parse_set("[570, 840) | [960, 1080)")


def test_first_free(office):
    assert office.first_free(60, DAY) == Interval(480, 540)
    assert office.first_free(61, DAY) == Interval(570, 631)
    assert office.first_free(24 * 60, DAY) is None


def test_utilisation_counts_what_lies_within(office):
    assert office.utilisation(Interval(15 * 60, 17 * 60)) == 0.5
    assert office.utilisation(DAY) == pytest.approx(0.25)
    assert Calendar().utilisation(DAY) == 0.0


def test_report(office):
    assert office.report(DAY) == ["09:00-09:30 stand-up", "14:00-16:00 review", "booked: 25%"]
