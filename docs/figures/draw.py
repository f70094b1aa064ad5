"""Draws the figures of this folder as SVG: the three networks' blocks, the ladder, and the benchmarks' JSON as bars.

    python docs/figures/draw.py

Boxes are light with dark text and everything outside them is of a middle grey, so that a page may be light or dark.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"

PLAIN, NEW, SUM = "#e6ebf1", "#ffd9a8", "#cfe8d5"
INK, LINE = "#1d2733", "#808b98"
BARS = ("#4c86c6", "#d9822b", "#58a27c", "#9b7fc4", "#c0607a", "#8a8f98", "#b59b3b")
FONT = "font-family='system-ui, sans-serif'"


@dataclass
class Drawing:
    """An SVG of a given size in pixels, filled from the top left."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, *lines: str, fill: str = PLAIN) -> None:
        self.parts.append(f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='6' fill='{fill}' stroke='{LINE}'/>")
        for number, line in enumerate(lines):
            weight = " font-weight='600'" if number == 0 else ""
            size = 14 if number == 0 else 12
            below = y + h / 2 + 5 + (number - (len(lines) - 1) / 2) * 17
            self.parts.append(
                f"<text x='{x + w / 2}' y='{below:g}' text-anchor='middle' font-size='{size}'{weight} fill='{INK}'>"
                f"{escape(line)}</text>"
            )

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f"<polyline points='{path}' fill='none' stroke='{LINE}' stroke-width='1.8' marker-end='url(#head)'/>"
        )

    def note(self, x: float, y: float, text: str, anchor: str = "middle", size: int = 12) -> None:
        self.parts.append(
            f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' font-size='{size}' fill='{LINE}'>{escape(text)}</text>"
        )

    def add(self, x: float, y: float, sign: str = "+") -> None:
        self.parts.append(f"<circle cx='{x}' cy='{y}' r='12' fill='{SUM}' stroke='{LINE}'/>")
        self.parts.append(
            f"<text x='{x}' y='{y + 5}' text-anchor='middle' font-size='16' fill='{INK}'>{escape(sign)}</text>"
        )

    def svg(self) -> str:
        head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' width='{self.width}' "
            f"role='img' aria-label={quoteattr(self.title)} {FONT}>\n<title>{escape(self.title)}</title>\n"
            "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
            f"orient='auto-start-reverse'><path d='M0,0 L8,4 L0,8 z' fill='{LINE}'/></marker></defs>\n"
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def deformux_block() -> Drawing:
    d = Drawing(760, 250, "Block of DeformUX-Net: a depthwise deformable convolution and an MLP, both residual")
    y, mid = 120, 145
    d.note(14, mid + 5, "z", size=16)
    d.arrow((24, mid), (60, mid))
    d.box(60, y, 70, 50, "LN")
    d.arrow((130, mid), (278, mid))
    d.box(160, 20, 100, 50, "1 x 1 x 1", "convolution", fill=NEW)
    d.arrow((145, mid), (145, 45), (158, 45))
    d.arrow((260, 45), (360, 45), (360, 118))
    d.note(310, 37, "offsets")
    d.box(280, y, 165, 50, "depthwise 3 x 3 x 3", "taps moved by offsets", fill=NEW)
    d.arrow((445, mid), (462, mid))
    d.add(475, mid)
    d.arrow((40, mid), (40, 215), (475, 215), (475, 159))
    d.arrow((487, mid), (530, mid))
    d.box(530, y, 60, 50, "LN")
    d.arrow((590, mid), (615, mid))
    d.box(615, y, 75, 50, "MLP", "C, 4C, C")
    d.arrow((690, mid), (708, mid))
    d.add(721, mid)
    d.arrow((508, mid), (508, 215), (721, 215), (721, 159))
    d.arrow((733, mid), (757, mid))
    return d


def lightmedseg_block() -> Drawing:
    d = Drawing(860, 300, "Encoder stage of LightMedSeg, steered by anchors and by the texture map")
    mid = 190
    d.box(150, 15, 140, 50, "anchor detector", "8 points of the image", fill=NEW)
    d.box(450, 15, 150, 50, "structural prior", "texture T, once", fill=NEW)
    d.note(22, 45, "image", anchor="start")
    d.arrow((62, 40), (148, 40))
    d.note(392, 45, "F0, level 1", anchor="end")
    d.arrow((398, 40), (448, 40))
    d.note(14, mid + 5, "h", size=16)
    d.arrow((24, mid), (50, mid))
    d.box(50, mid - 25, 80, 50, "ghost", "convolution")
    d.arrow((130, mid), (170, mid))
    d.box(170, mid - 25, 100, 50, "FiLM", "scale and shift", fill=NEW)
    d.arrow((220, 65), (220, mid - 27))
    d.note(228, 110, "A", anchor="start")
    d.arrow((270, mid), (300, mid), (300, 140), (338, 140))
    d.arrow((300, mid), (300, 240), (338, 240))
    d.box(340, 115, 130, 50, "depthwise 3^3", "detail Zd")
    d.box(340, 215, 130, 50, "1 x 1 x 1", "smooth Zs")
    d.arrow((470, 140), (520, 140), (520, mid - 14))
    d.arrow((470, 240), (520, 240), (520, mid + 14))
    d.add(520, mid)
    d.arrow((560, 65), (560, 150), (533, 180))
    d.note(566, 110, "T", anchor="start")
    d.note(530, mid + 60, "T Zd + (1 - T) Zs", anchor="start")
    d.arrow((532, mid), (610, mid))
    d.box(610, mid - 25, 110, 50, "squeeze and", "excite")
    d.arrow((720, mid), (856, mid))
    d.note(786, mid - 8, "to the router", size=11)
    d.note(786, mid + 18, "and the next level", size=11)
    return d


def magic_block() -> Drawing:
    d = Drawing(760, 290, "MAGIC's dynamic convolution: an attention mixes K kernels for each sample")
    mid = 235
    d.note(14, mid + 5, "x", size=16)
    d.arrow((24, mid), (570, mid))
    d.arrow((45, mid), (45, 60), (78, 60))
    for number, name in enumerate(("channel means", "spatial statistics", "global context")):
        d.box(80, 20 + 32 * number, 145, 28, name, fill=NEW)
    d.arrow((225, 66), (238, 66))
    d.add(250, 66)
    d.arrow((262, 66), (285, 66))
    d.box(285, 41, 100, 50, "standardise", "over samples", fill=SUM)
    d.arrow((385, 66), (405, 66))
    d.box(405, 41, 90, 50, "two linear", "layers")
    d.arrow((495, 66), (518, 66))
    d.note(506, 56, "K")
    d.box(520, 41, 90, 50, "softmax", "x gate (KR)", fill=NEW)
    d.arrow((610, 66), (640, 66), (640, 128))
    d.note(650, 100, "a1 ... aK", anchor="start")
    for number in range(4):
        d.box(440 + 34 * number, 140, 28, 28, f"W{number + 1}")
    d.arrow((576, 154), (626, 154))
    d.add(640, 154, "Σ")
    d.arrow((640, 166), (640, 208))
    d.note(650, 192, "sample's kernel", anchor="start")
    d.box(572, 210, 136, 50, "one convolution", "kernel of the sample")
    d.arrow((708, mid), (756, mid))
    return d


# The layers of import-linter's contract in pyproject.toml, topmost first.
LADDER = [
    ("cli", "one file a command"),
    ("demo, deployment, comparison, selftest", "whole tasks"),
    ("inspection", "what a trained network sees and does"),
    ("pages", "style and figures of HTML pages"),
    ("diagnosis", "what is wrong, and what to do"),
    ("trainers", "recipes, nnU-Net's contract; no mathematics"),
    ("plans", "a stock plan and a patch -> our architecture"),
    ("networks, losses", "one network a file; nothing of nnU-Net"),
    ("layers", "modules that wire operators"),
    ("ops", "functions on tensors, backends"),
    ("processes, activation", "nothing of ours"),
]
# An operator's way into nnU-Net.
RUNGS = ("trainers", "plans", "networks", "layers", "ops")


def ladder() -> Drawing:
    d = Drawing(760, 20 + 51 * len(LADDER), "The ladder: each level imports only the levels below it")
    for number, (name, what) in enumerate(LADDER):
        y = 12 + 51 * number
        d.box(60, y, 340, 38, name, fill=NEW if name.split(",")[0] in RUNGS else PLAIN)
        d.note(410, y + 24, what, anchor="start", size=13)
        if number:
            d.arrow((225, y - 13), (225, y - 1))
    d.arrow((30, 20), (30, 51 * len(LADDER) - 12))
    d.note(30, 51 * len(LADDER) + 6, "imports", size=12)
    return d


def lookup() -> Drawing:
    d = Drawing(760, 170, "How nnU-Net finds a trainer: its own folder first, then the folders of nnUNet_extTrainer")
    d.box(10, 60, 150, 50, "nnU-Net's look-up", "by the name after -tr")
    d.arrow((160, 85), (190, 85), (190, 40), (218, 40))
    d.arrow((190, 85), (190, 130), (218, 130))
    d.note(205, 26, "1", size=12)
    d.note(205, 116, "2", size=12)
    d.box(220, 15, 170, 50, "nnU-Net's own folder", "not found")
    d.box(220, 105, 170, 50, "nnunet_deform/_ext", "nnUNet_extTrainer", fill=NEW)
    d.arrow((390, 130), (428, 130))
    d.box(430, 105, 160, 50, "trainers.variants", "takes suffixes off", fill=NEW)
    d.arrow((590, 130), (628, 130))
    d.box(630, 105, 120, 50, "the class", "cached", fill=SUM)
    return d


def bars(title: str, rows: list[tuple[str, float, str]], unit: str) -> Drawing:
    """One bar a row: its name, its length and what is written at its end."""
    d = Drawing(760, 44 + 30 * len(rows), title)
    d.note(8, 20, f"{title} ({unit})", anchor="start", size=14)
    longest = max(value for _, value, _ in rows)
    for number, (name, value, shown) in enumerate(rows):
        y = 36 + 30 * number
        d.note(275, y + 16, name, anchor="end", size=13)
        width = max(1.0, 390 * value / longest)
        d.parts.append(
            f"<rect x='283' y='{y}' width='{width:.1f}' height='22' rx='3' fill='{BARS[number % len(BARS)]}'/>"
        )
        d.note(291 + width, y + 16, shown, anchor="start", size=13)
    return d


def _results(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text())["results"]


def operator_bars(shape: str, dtype: str) -> Drawing:
    rows = [r for r in _results("deform_conv_cpu_1.json") if (r["shape"], r["dtype"]) == (shape, dtype)]
    shown = [(r["name"], r["forward_backward_ms"], f"{r['forward_backward_ms']:.0f} ms") for r in rows]
    return bars(f"Deformable convolution, {shape}, {dtype}, forward and backward", shown, "one thread, ms")


def network_bars(file: str, key: str, what: str) -> Drawing:
    rows = [r for r in _results(file) if r.get(key)]
    shown = [(r["name"], r[key] / 1000, f"{r[key] / 1000:.2f} s") for r in rows]
    return bars(what, shown, "one thread, s")


FIGURES = {
    "deformux_block": deformux_block,
    "lightmedseg_block": lightmedseg_block,
    "magic_block": magic_block,
    "ladder": ladder,
    "lookup": lookup,
    "operator_times": lambda: operator_bars("1x48x24^3", "float32"),
    "step_times": lambda: network_bars(
        "networks_cpu_1.json", "training_step_ms", "A training step, 40 x 56 x 40, batch 2"
    ),
    "prediction_times": lambda: network_bars(
        "networks_cpu_1_96.json", "prediction_ms", "Prediction of a patch of 96^3"
    ),
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
