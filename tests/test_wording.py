"""Numbers and words for people."""

from pathlib import Path

import pytest

from ddnn import wording


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.01234, "0.0123"), (3.21, "3.21"), (999.4, "999"), (999.6, "1000"), (3210.4, "3210"), (1.5e6, "1500000")],
)
def test_a_number_has_no_exponent(number: float, text: str) -> None:
    assert wording.three(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (78_042, "78.0 k"),
        (999_400, "999 k"),
        (999_499.9999999999, "999 k"),
        (999_600, "1.00 M"),
        (11_689_512, "11.7 M"),
        (1_814_073_344, "1.81 G"),
        (999.6e9, "1.00 T"),
        (2.1e12, "2.10 T"),
        (123.4e12, "123 T"),
        (4.5678e15, "4568 T"),
    ],
)
def test_an_amount_has_three_digits_and_a_unit(number: float, text: str) -> None:
    assert wording.amount(number) == text
    assert wording.amount(number, "\N{NO-BREAK SPACE}") == text.replace(" ", "\N{NO-BREAK SPACE}")


def test_words_in_a_row() -> None:
    assert wording.listed(["a"]) == "a"
    assert wording.listed(["a", "b"]) == "a and b"
    assert wording.listed(["a", "b", "c"]) == "a, b and c"


def test_one_and_more() -> None:
    assert wording.counted(1, "core") == "1 core"
    assert wording.threads_and_weights(1, True) == "1 thread, shared weights"
    assert wording.threads_and_weights(2, False) == "2 threads"


def test_a_command_can_be_pasted() -> None:
    assert wording.command("ddnn", "profile", Path("bun dle"), "--batch", 4) == "ddnn profile 'bun dle' --batch 4"
