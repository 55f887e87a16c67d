"""Draw docs/images: every FILE.dot there becomes FILE.svg, by Graphviz, in one style.

    drawings.py [FOLDER]     where the SVGs go; beside their sources by default

The SVG holds a hash of its source: tests/test_drawings.py tells when the two disagree, whatever
version of Graphviz is there. A name in italics in a source is a function of the code, as
[ROOM.]MODULE.FUNCTION or [ROOM.]MODULE.CLASS.FUNCTION; the same test looks for it.
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"

FONT = "DejaVu Sans"
# The same shapes where that font is not there; Graphviz measures with the first.
FONTS = "DejaVu Sans,Verdana,sans-serif"

# On a white ground of its own a drawing can be read on light and on dark pages.
STYLE = f"""
    graph [bgcolor=white, pad=0.3, nodesep=0.35, ranksep=0.4]
    node [shape=box, style="rounded,filled", fillcolor=white, color="#7b8794",
        fontname="{FONT}", fontsize=12, fontcolor="#1f2933", margin="0.16,0.09"]
    edge [color="#52606d", arrowsize=0.8, penwidth=1.5,
        fontname="{FONT}", fontsize=11, fontcolor="#52606d"]
"""


def styled(source: Path) -> str:
    """The source as Graphviz is given it: with the style of all, which it may overrule."""
    return source.read_text(encoding="utf-8").replace("{\n", "{\n" + STYLE, 1)


def stamp(source: Path) -> str:
    """The first line of the SVG: which source, in which style, it shows."""
    digest = hashlib.sha256(styled(source).encode()).hexdigest()
    return f"<!-- {source.name} {digest}: drawn by `make drawings` -->"


def draw(source: Path) -> str:
    """The SVG of a source. Raises CalledProcessError."""
    drawn = subprocess.run(
        ["dot", "-Tsvg"], input=styled(source), check=True, capture_output=True, text=True
    ).stdout
    # Not Graphviz's own version, which would change with the machine and nothing else.
    body = drawn[drawn.index("<svg ") :].replace(f'"{FONT}"', f'"{FONTS}"')
    body = body.replace('stroke="transparent"', 'stroke="none"')  # a colour of CSS, not of SVG 1.1
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL)
    return f"{stamp(source)}\n{body}"


def main(target: Path) -> None:
    """Draw all of them into a folder."""
    for source in sorted(IMAGES.glob("*.dot")):
        path = target / f"{source.stem}.svg"
        path.write_text(draw(source), encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
