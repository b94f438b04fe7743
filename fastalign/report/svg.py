"""Draw charts as SVG that follows the page's colours: text, axes and one class for each run.

Marks carry `data-tip`, which the page's script shows on hover and focus, and a `<title>`, which
browsers show without it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from fastalign.output import shown

NUM_COLOURS = 10  # classes run-0 to run-9 of the page's style
CHARACTER = 6.2  # mean width of one in the labels' size, pixels
SHAPES = ("circle", "square", "diamond", "triangle", "down")
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between two, at most `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    by = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    first, last = math.ceil(low / by - 1e-9), math.floor(high / by + 1e-9)
    return [round(by * n, 12) for n in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Return a tick's number, short."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.4g}"


def span(values: Iterable[float], pad: float = 0.05) -> tuple[float, float]:
    """Return the range of the finite ones of some values, padded; never empty."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low == high:
        width = abs(low) * 0.1 or 1.0
        return low - width, high + width
    return low - pad * (high - low), high + pad * (high - low)


def place_labels(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    inside: Box,
    *,
    height: float = 12.0,
    obstacles: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """Return the left bottom corner of a label for each point, so that none covers another.

    Each label takes the first free place around its point, nearer ones first; if there is none, the
    one that covers least. Coordinates grow to the right and downwards.
    """
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    taken: list[Box] = []
    corners = []
    for (x, y), width in zip(points, widths, strict=True):
        places = []
        for away in (6, 14, 24, 36):
            for right, down in (
                *((1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1), (1, 0), (-1, 0)),
            ):
                left = x + right * away - (0 if right > 0 else width if right < 0 else width / 2)
                bottom = y + down * away + (height if down > 0 else 0 if down < 0 else height / 2)
                places.append((left, bottom - height, left + width, bottom))
        cost = [
            sum(covered(place, box) for box in (*taken, *marks))
            + 0.5 * sum(covered(place, box) for box in obstacles)
            + 1e3 * outside(place, inside)
            for place in places
        ]
        best = places[min(range(len(places)), key=lambda number: (cost[number], number))]
        taken.append(best)
        corners.append((best[0], best[3]))
    return corners


def covered(one: Box, other: Box) -> float:
    """Return the area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def outside(box: Box, frame: Box) -> float:
    """Return how far a box reaches out of a frame."""
    return sum(
        max(0.0, distance)
        for distance in (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
    )


@dataclass(frozen=True)
class Axis:
    """A range of values, its name, and its ticks with their words (by default round numbers)."""

    low: float
    high: float
    name: str = ""
    marks: Sequence[tuple[float, str]] | None = None

    def all_ticks(self, most: int) -> Sequence[tuple[float, str]]:
        """Return the ticks."""
        if self.marks is not None:
            return self.marks
        return [(value, tick_text(value)) for value in ticks(self.low, self.high, most)]


class Plot:
    """A picture with two axes; its methods add to it.

    Args:
        size: width and height in pixels, of which the page takes the ratio.
        x: horizontal axis.
        y: vertical axis.
        label: what the picture shows, for who cannot see it.
    """

    def __init__(self, size: tuple[int, int], x: Axis, y: Axis, label: str):
        self.width, self.height = size
        texts = [text for _, text in y.all_ticks(6)]
        left = max((len(text) for text in texts), default=1) * CHARACTER + 14
        left += 16 if y.name else 0
        self.inside: Box = (left, 10, self.width - 12, self.height - (40 if x.name else 24))
        self._x, self._y, self._label = x, y, label
        self._parts: list[str] = []
        self._axes()

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of a point."""
        left, top, right, bottom = self.inside
        across = (x - self._x.low) / (self._x.high - self._x.low)
        up = (y - self._y.low) / (self._y.high - self._y.low)
        return left + across * (right - left), bottom - up * (bottom - top)

    def _axes(self) -> None:
        left, top, right, bottom = self.inside
        for value, words in self._y.all_ticks(6):
            _, y = self.at(self._x.low, value)
            self._parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            self.text(left - 6, y + 4, words, "tick end")
        most = max(2, int((right - left) / 70))
        for value, words in self._x.all_ticks(most):
            x, _ = self.at(value, self._y.low)
            self._parts.append(f'<path class="grid" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
            self.text(x, bottom + 15, words, "tick middle")
        self._parts.append(
            f'<path class="axis" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>'
        )
        if self._x.name:
            self.text((left + right) / 2, self.height - 6, self._x.name, "name middle")
        if self._y.name:
            x, y = 13.0, (top + bottom) / 2
            turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"'
            self.text(x, y, self._y.name, "name middle", turn)

    def text(self, x: float, y: float, words: str, css: str, more: str = "") -> None:
        """Add a text."""
        safe = escape(shown(words))
        self._parts.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}"{more}>{safe}</text>')

    def line(
        self, xs: Sequence[float], ys: Sequence[float], css: str, *, dashed: bool = False
    ) -> None:
        """Add a curve; values that are not finite are gaps, and lonely points are dots."""
        path, lonely = list[str](), list[int]()
        pen = False
        for place, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if not math.isfinite(y):
                pen = False
                continue
            across, down = self.at(x, y)
            path.append(f"{'L' if pen else 'M'}{across:.1f} {down:.1f}")
            if not pen and (place + 1 == len(ys) or not math.isfinite(ys[place + 1])):
                lonely.append(place)
            pen = True
        dashes = " dashed" if dashed else ""
        if path:
            self._parts.append(f'<path class="line {css}{dashes}" d="{"".join(path)}"/>')
        for place in lonely:
            self.dot(xs[place], ys[place], css)

    def dot(self, x: float, y: float, css: str) -> None:
        """Add a small dot of a curve."""
        across, down = self.at(x, y)
        self._parts.append(f'<circle class="dot {css}" cx="{across:.1f}" cy="{down:.1f}" r="2"/>')

    def event(self, x: float, css: str, tip: str, *, whole: bool) -> None:
        """Add a vertical line at something that happened, or a cross at the bottom."""
        across, (_, top, _, bottom) = self.at(x, self._y.low)[0], self.inside
        path = f"M{across:.1f} {top:.1f}V{bottom:.1f}"
        if not whole:
            path = f"M{across - 3:.1f} {bottom - 3:.1f}l6 6m0 -6l-6 6"
        self._parts.append(f'<path class="event {css}" d="{path}"{tipped(tip)}</path>')

    def band(
        self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], css: str
    ) -> None:
        """Add an area between two curves."""
        ends = [*zip(xs, highs, strict=True), *reversed(list(zip(xs, lows, strict=True)))]
        points = " ".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in ends)
        self._parts.append(f'<polygon class="band {css}" points="{points}"/>')

    def bar(self, left: float, right: float, y: float, height: float, css: str, tip: str) -> None:
        """Add a horizontal bar around a height, given in pixels."""
        (x0, middle), (x1, _) = self.at(left, y), self.at(right, y)
        box = f'x="{x0:.1f}" y="{middle - height / 2:.1f}" width="{max(0.0, x1 - x0):.1f}"'
        self._parts.append(
            f'<rect class="bar {css}" {box} height="{height:.1f}"{tipped(tip)}</rect>'
        )

    def point(
        self,
        x: float,
        y: float,
        css: str,
        tip: str,
        *,
        errors: tuple[float, float] = (0.0, 0.0),
        shape: str = "circle",
        hollow: bool = False,
    ) -> None:
        """Add a mark with its error bars, which can be hovered and focused."""
        across, down = self.at(x, y)
        bars = []
        for along, error in zip("xy", errors, strict=True):
            if error:
                first = self.at(x - error, y) if along == "x" else self.at(x, y - error)
                last = self.at(x + error, y) if along == "x" else self.at(x, y + error)
                bars.append("M{:.1f} {:.1f}L{:.1f} {:.1f}".format(*first, *last))
        drawn = f'<path class="error" d="{"".join(bars)}"/>' if bars else ""
        drawn += MARKS[shape](across, down)
        hollow_css = " hollow" if hollow else ""
        self._parts.append(
            f'<g class="mark {css}{hollow_css}"{run_attribute(css)} tabindex="0" role="img" '
            f'aria-label="{escape(shown(tip))}"{tipped(tip)}{drawn}</g>'
        )

    def svg(self) -> Markup:
        """Return the picture."""
        return Markup(
            f'<svg viewBox="0 0 {self.width} {self.height}" role="group" '
            f'aria-label="{escape(shown(self._label))}">{"".join(self._parts)}</svg>'
        )


def run_attribute(css: str) -> str:
    """Return the attribute by which what belongs to a run is switched off with it."""
    return f' data-run="{css.split()[0]}"' if css.startswith("run-") else ""


def tipped(tip: str) -> str:
    """Return the end of a tag with a tip, and its title."""
    safe = escape(shown(tip))
    return f' data-tip="{safe}"><title>{safe}</title>'


def polygon(corners: Sequence[tuple[float, float]]) -> Callable[[float, float], str]:
    """Return a function that draws a mark of these corners around a pixel."""

    def draw(x: float, y: float) -> str:
        return f'<path d="M{"L".join(f"{x + a:.1f} {y + b:.1f}" for a, b in corners)}Z"/>'

    return draw


MARKS: dict[str, Callable[[float, float], str]] = {
    "circle": lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
    "square": polygon([(-4, -4), (4, -4), (4, 4), (-4, 4)]),
    "diamond": polygon([(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)]),
    "triangle": polygon([(0, -5.5), (5, 4), (-5, 4)]),
    "down": polygon([(0, 5.5), (5, -4), (-5, -4)]),
    "star": polygon(
        [
            (
                (7 if corner % 2 == 0 else 3) * math.sin(math.pi * corner / 5),
                -(7 if corner % 2 == 0 else 3) * math.cos(math.pi * corner / 5),
            )
            for corner in range(10)
        ]
    ),
    "cross": lambda x, y: f'<path class="cross" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>',
}


def run_class(place: int) -> str:
    """Return the class that gives a run's colour and, past the last one, its dashes."""
    return f"run-{place % NUM_COLOURS}" + (" again" if place >= NUM_COLOURS else "")
