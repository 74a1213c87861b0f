"""Scenes of handwritten digits on photographs, and what can be asked about them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SIDE = 64
"""Height and width of a scene in pixels."""
MOST = 4
"""Most digits of a scene."""
DIGIT_PX = (12, 28)
"""Least and greatest longer side of a digit."""
OVERLAP = 0.2
"""Greatest share of the smaller of two digits' boxes that the other one covers."""
INK = 64
"""Grey value from which a pixel belongs to a digit's box."""
PIECE_PX = (64, 140)
"""Side of the piece of a photograph behind a scene, before it is resized."""
BLUR_PX, DIM = 1.5, 0.55
"""Of the background: radius of the blur, and the factor of its brightness."""
MARGIN = 0.2
"""Share of a digit's longer side that a crop of it shows around it."""
SIZE_GAP, CENTRE_GAP = 3, 6
"""Pixels by which sizes, and positions from left to right, must differ to be compared."""
PRESENT = 0.75
"""Probability that something to find or to count is there."""
PLACES = 50
"""Attempts to place a digit before the scene is drawn again."""

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (235, 50, 45),
    "green": (60, 200, 70),
    "blue": (70, 110, 250),
    "yellow": (245, 220, 50),
    "cyan": (60, 220, 225),
    "pink": (245, 120, 200),
}

Rgb = NDArray[np.uint8]
"""Pixels (H, W, 3)."""


class Parts(NamedTuple):
    """What the scenes of a split are made of.

    Attributes:
        images: all digits (n, 28, 28).
        rows: those of the split, by class.
        photos: the photographs, RGB.
        width: the share of their width that pieces are taken from, [from, to).
    """

    images: NDArray[np.uint8]
    rows: Sequence[Sequence[int]]
    photos: Sequence[Image.Image]
    width: tuple[float, float]


class Digit(NamedTuple):
    """A digit of a scene: its class, colour, place in pixels and the row of its image."""

    label: int
    colour: str
    left: int
    top: int
    width: int
    height: int
    row: int

    @property
    def box(self) -> list[float]:
        """Its box as x, y, width, height."""
        return [float(value) for value in (self.left, self.top, self.width, self.height)]

    @property
    def side(self) -> int:
        """Its longer side."""
        return max(self.width, self.height)

    @property
    def middle(self) -> float:
        """Its centre from the left."""
        return self.left + self.width / 2


class Question(NamedTuple):
    """A task on a scene and what is right.

    Attributes:
        text: the task in words.
        answer: the words to write; empty: none.
        boxes: [x, y, width, height] of each digit to find; None: the task is not to find any.
        named: classes of digits that the text or the answer names.
        about: classes of all digits that decide what is right, the named ones included.
        crop: the digit that the image is a crop of; None: all of the scene.
    """

    text: str
    answer: str
    boxes: list[list[float]] | None
    named: frozenset[int]
    about: frozenset[int]
    crop: Digit | None = None


def layout(parts: Parts, rng: Generator) -> list[Digit]:
    """Return one to four digits of random class, colour, size and place."""
    while True:
        digits: list[Digit] = []
        for _ in range(int(rng.integers(1, MOST + 1))):
            digit = _placed(parts, digits, rng)
            if digit is None:
                break
            digits.append(digit)
        else:
            return digits


def _placed(parts: Parts, others: Sequence[Digit], rng: Generator) -> Digit | None:
    """Return one more digit of a scene; None if no place for it was found."""
    label = int(rng.integers(len(NAMES)))
    row = int(rng.choice(parts.rows[label]))
    colour, side = str(rng.choice(list(COLOURS))), int(rng.integers(DIGIT_PX[0], DIGIT_PX[1] + 1))
    shape = glyph(parts.images[row]).shape
    height, width = (max(2, round(length * side / max(shape))) for length in shape)
    for _ in range(PLACES):
        left, top = int(rng.integers(SIDE - width + 1)), int(rng.integers(SIDE - height + 1))
        digit = Digit(label, colour, left, top, width, height, row)
        if all(overlap(digit, other) <= OVERLAP for other in others):
            return digit
    return None


def glyph(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the part of a digit's image that has ink."""
    ys, xs = np.nonzero(image >= INK)
    return image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def overlap(a: Digit, b: Digit) -> float:
    """Return the share of the smaller box that the other one covers."""
    across = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    down = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    return max(0, across) * max(0, down) / min(a.width * a.height, b.width * b.height)


def render(digits: Sequence[Digit], parts: Parts, rng: Generator) -> Rgb:
    """Return the scene's pixels: tinted digits on a blurred, darkened piece of a photograph."""
    photo = parts.photos[int(rng.integers(len(parts.photos)))]
    side = int(rng.integers(PIECE_PX[0], PIECE_PX[1] + 1))
    first, last = (round(share * photo.width) for share in parts.width)
    left, top = int(rng.integers(first, last - side + 1)), int(rng.integers(photo.height - side + 1))
    piece = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    canvas = np.asarray(piece.filter(ImageFilter.GaussianBlur(BLUR_PX)), np.float64) * DIM
    for digit in digits:
        ink = Image.fromarray(glyph(parts.images[digit.row])).resize(
            (digit.width, digit.height), Image.Resampling.BICUBIC
        )
        opacity = np.asarray(ink, np.float64)[..., None] / 255
        part = canvas[digit.top : digit.top + digit.height, digit.left : digit.left + digit.width]
        part += opacity * (np.array(COLOURS[digit.colour]) - part)
    return np.rint(canvas).astype(np.uint8)


def cropped(scene: Rgb, digit: Digit) -> Rgb:
    """Return a square around a digit, moved into the scene, at the size of a scene."""
    side = min(SIDE, math.ceil(digit.side * (1 + 2 * MARGIN)))
    centre = digit.left + digit.width / 2, digit.top + digit.height / 2
    left, top = (min(max(0, round(place - side / 2)), SIDE - side) for place in centre)
    piece = Image.fromarray(scene[top : top + side, left : left + side])
    return np.asarray(piece.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def classify(digits: Sequence[Digit], rng: Generator) -> Question:
    """Ask what a digit is, on a crop of it."""
    digit = digits[int(rng.integers(len(digits)))]
    known = frozenset({digit.label})
    return Question("what is this?", NAMES[digit.label], None, known, known, digit)


def find_colour(digits: Sequence[Digit], rng: Generator) -> Question:
    """Ask for the digits of a colour."""
    colour = _some([digit.colour for digit in digits], list(COLOURS), PRESENT, rng)
    return _find(f"find every {colour} digit", [digit for digit in digits if digit.colour == colour])


def find_class(digits: Sequence[Digit], rng: Generator) -> Question:
    """Ask for the digits of a class."""
    label = _some([digit.label for digit in digits], range(len(NAMES)), PRESENT, rng)
    return _find(f"find the {PLURALS[label]}", [digit for digit in digits if digit.label == label], label)


def find_largest(digits: Sequence[Digit], rng: Generator) -> Question | None:
    """Ask for the largest digit; None if two are about as large."""
    sides = sorted((digit.side for digit in digits), reverse=True)
    if len(sides) > 1 and sides[0] - sides[1] < SIZE_GAP:
        return None
    return _find("find the largest digit", [digit for digit in digits if digit.side == sides[0]])


def _find(text: str, found: Sequence[Digit], *named: int) -> Question:
    about = frozenset({digit.label for digit in found} | set(named))
    return Question(text, "", [digit.box for digit in found], frozenset(named), about)


def count(digits: Sequence[Digit], rng: Generator) -> Question | None:
    """Ask for a number of digits, of a colour or a class; None above three, so that "four" is only the digit."""
    found, what, named = _kind(digits, PRESENT, rng)
    words = f"{what} digits" if not named else PLURALS[min(named)]
    return None if len(found) > 3 else _asked(f"how many {words} are there?", NAMES[len(found)], found, named)


def presence(digits: Sequence[Digit], rng: Generator) -> Question:
    """Ask whether there is a digit of a colour or a class; half of the answers are yes."""
    found, what, named = _kind(digits, 0.5, rng)
    words = f"a {what} digit" if not named else f"a{'n' * (what == 'eight')} {what}"
    return _asked(f"is there {words}?", "yes" if found else "no", found, named)


def colour_of(digits: Sequence[Digit], rng: Generator) -> Question | None:
    """Ask for the colour of a digit, the only one of its class."""
    alone = _alone(digits)
    if not alone:
        return None
    digit = alone[int(rng.integers(len(alone)))]
    return _asked(f"what colour is the {NAMES[digit.label]}?", digit.colour, [digit], {digit.label})


def larger(digits: Sequence[Digit], rng: Generator) -> Question | None:
    """Ask whether a digit is larger than another one."""
    return _compared(digits, rng, "larger than", lambda digit: digit.side, SIZE_GAP)


def left_of(digits: Sequence[Digit], rng: Generator) -> Question | None:
    """Ask whether a digit is left of another one."""
    return _compared(digits, rng, "left of", lambda digit: -digit.middle, CENTRE_GAP)


def _compared(
    digits: Sequence[Digit], rng: Generator, words: str, value: Callable[[Digit], float], gap: float
) -> Question | None:
    alone = _alone(digits)
    if len(alone) < 2:
        return None
    a, b = (alone[number] for number in rng.choice(len(alone), 2, replace=False))
    if abs(value(a) - value(b)) < gap:
        return None
    text = f"is the {NAMES[a.label]} {words} the {NAMES[b.label]}?"
    return _asked(text, "yes" if value(a) > value(b) else "no", [a, b], {a.label, b.label})


def _asked(text: str, answer: str, found: Sequence[Digit], named: set[int]) -> Question:
    about = frozenset({digit.label for digit in found} | named)
    return Question(text, answer, None, frozenset(named), about)


def _alone(digits: Sequence[Digit]) -> list[Digit]:
    """Return the digits of whose class there is no other one."""
    labels = [digit.label for digit in digits]
    return [digit for digit in digits if labels.count(digit.label) == 1]


def _kind(digits: Sequence[Digit], present: float, rng: Generator) -> tuple[list[Digit], str, set[int]]:
    """Return the digits of a random colour or class, its name, and the class if it is one."""
    if rng.random() < 0.5:
        colour = _some([digit.colour for digit in digits], list(COLOURS), present, rng)
        return [digit for digit in digits if digit.colour == colour], colour, set()
    label = _some([digit.label for digit in digits], range(len(NAMES)), present, rng)
    return [digit for digit in digits if digit.label == label], NAMES[label], {label}


def _some(there: Sequence[Any], every: Sequence[Any], present: float, rng: Generator) -> Any:
    """Return one of the things that are there, with this probability, else one that is not."""
    absent = [one for one in every if one not in there]
    kinds = sorted(set(there), key=list(every).index) if rng.random() < present else absent
    return kinds[int(rng.integers(len(kinds)))]


def describe(digits: Sequence[Digit], most: int) -> Question | None:
    """Ask for all digits from left to right; None if there are too many, or two are one above the other."""
    row = sorted(digits, key=lambda digit: digit.middle)
    if len(row) > most or any(b.middle - a.middle < CENTRE_GAP for a, b in zip(row, row[1:], strict=False)):
        return None
    labels = frozenset(digit.label for digit in row)
    words = ", ".join(f"a {digit.colour} {NAMES[digit.label]}" for digit in row)
    return Question("describe the picture", words, None, labels, labels)


FINDING: Sequence[tuple[Callable[[Sequence[Digit], Generator], Question | None], float]] = (
    (find_colour, 0.4),
    (find_class, 0.4),
    (find_largest, 0.2),
)
"""Tasks of the skill `locate` and their shares."""
ASKING = (count, presence, colour_of, larger, left_of)
"""Tasks of the skill `ask`, equally frequent."""
