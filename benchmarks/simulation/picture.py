"""Line charts as SVG, written by hand: no library, small files, readable in dark and light."""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 220  # of one panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 34, 26
HEAD = 52  # title and legend
COLOURS = ("#2563eb", "#d97706", "#6b7280", "#059669")
POINTS = 430  # drawn per line: what one panel can show


@dataclass(frozen=True)
class Line:
    """One curve: (x in hours, y)."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart with its own y axis."""

    title: str
    lines: Sequence[Line]


def draw(title: str, panels: Sequence[Panel]) -> str:
    """The whole picture, panels one below the other over the same hours."""
    height = HEAD + len(panels) * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for place, name in enumerate(dict.fromkeys(line.name for panel in panels for line in panel.lines)):
        x, colour = LEFT + 190 * place, COLOURS[place % len(COLOURS)]
        parts.append(f'<rect x="{x}" y="36" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="42">{escape(name)}</text>')
    for place, panel in enumerate(panels):
        parts += _panel(panel, HEAD + place * HEIGHT)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: float) -> list[str]:
    right = max((x for line in panel.lines for x, _ in line.points), default=1.0) or 1.0
    most = _ceiling(max((y for line in panel.lines for _, y in line.points), default=1.0))
    inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    base = top + TOP + inner_h
    out = [f'<text x="{LEFT}" y="{top + 14}">{escape(panel.title)}</text>']
    for share in (0, 0.5, 1):
        y = base - share * inner_h
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{most * share:,g}</text>')
    for hour in _ticks(right):
        x = LEFT + hour / right * inner_w
        out.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{hour:g} h</text>')
    for place, line in enumerate(panel.lines):
        colour = COLOURS[place % len(COLOURS)]
        path = " ".join(
            f"{LEFT + x / right * inner_w:.1f},{base - y / most * inner_h:.1f}" for x, y in _thin(line.points)
        )
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
    return out


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS, each the highest of its stretch, so that peaks stay."""
    step = max(1, len(points) // POINTS)
    return [max(points[i : i + step], key=lambda point: point[1]) for i in range(0, len(points), step)]


def _ceiling(value: float) -> float:
    """The next of 1, 2, 5 x 10^n."""
    unit = 1.0
    while unit * 10 <= value:
        unit *= 10
    return next((unit * factor for factor in (1, 2, 5, 10) if unit * factor >= value), unit * 10)


def _ticks(right: float) -> list[float]:
    step = next(size for size in (1, 3, 6, 12, 24, 48, 96, 1e9) if right / size <= 9)
    return [step * place for place in range(int(right // step) + 1)]
