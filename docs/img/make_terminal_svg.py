#!/usr/bin/env python3
"""The terminal picture of README: records a real session and draws it as SVG. Standard library only.

    docs/img/make_terminal_svg.py record docs/img/session.json docs/img/terminal.txt  
    docs/img/make_terminal_svg.py draw docs/img/terminal.txt docs/img/terminal.svg

session.json: {"steps": [{"command", "type": [lines]}]}; a typed line is sent when the program shows its prompt "> ".
terminal.txt holds the bytes that the programs wrote; of a line that is redrawn over and over only the last state. Record
in a folder that holds what the commands name (here: after `minimind demo`), with the program on the PATH.
"""
import json
import os
import pty
import re
import select
import sys
import time
import unicodedata
import xml.sax.saxutils as xml

COLUMNS, CELL, LINE, SIZE, MARGIN, TITLE = 122, 8.4, 19, 14, 16, 30
BACKGROUND, TEXT, DIM, PROMPT = "#16181d", "#d7dae0", "#7f8695", "#8fce9b"


def run_step(command, lines):
    """Runs one command on a pseudo-terminal and returns what it wrote."""
    out, lines = b"", list(lines)
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS=str(COLUMNS))
        os.execvp("bash", ["bash", "-c", f"stty rows 50 cols {COLUMNS}; {command}"])
    seen, quiet_since = 0, time.time()
    while True:
        if select.select([fd], [], [], 0.1)[0]:
            try:
                data = os.read(fd, 65536)
            except OSError:  # the program has ended
                data = b""
            if not data:
                break
            out, quiet_since = out + data, time.time()
        elif time.time() - quiet_since > 0.5 and re.search(rb"> (\x1b\[\S+)?$", out[seen:]):
            seen = len(out)
            os.write(fd, (lines.pop(0) + "\r").encode() if lines else b"\x04")
    os.waitpid(pid, 0)
    return re.sub(rb"(\r\x1b\[K[^\r\n]*)+(?=\r\x1b\[K)", b"", out).replace(b"^D\b\b", b"")


def record(session_path, out_path):
    with open(session_path, encoding="utf-8") as f:
        session = json.load(f)
    with open(out_path, "wb") as out:
        for step in session["steps"]:
            out.write(b"$ " + step["command"].replace("\n", "\r\n").encode() + b"\r\n")
            out.write(run_step(step["command"], step.get("type", [])).rstrip() + b"\r\n")


class Screen:
    """Lines of cells (character, dim); a wide character takes two cells, the second one empty."""

    def __init__(self):
        self.rows, self.row, self.col, self.dim = [[]], 0, 0, False

    def put(self, char):
        wide = unicodedata.east_asian_width(char) in "WF"
        if self.col + 1 + wide > COLUMNS:
            self.newline()
            self.col = 0
        line = self.rows[self.row]
        line.extend([(" ", False)] * (self.col + 1 + wide - len(line)))
        line[self.col] = (char, self.dim)
        if wide:
            line[self.col + 1] = ("", self.dim)
        self.col += 1 + wide

    def newline(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def control(self, numbers, kind):
        n = int(numbers or 0) if numbers.isdigit() or not numbers else 0
        if kind == "K":
            del self.rows[self.row][self.col:]
        elif kind == "J":
            del self.rows[self.row][self.col:], self.rows[self.row + 1:]
        elif kind == "m":
            self.dim = "2" in numbers.split(";")
        elif kind == "C":
            self.col += max(n, 1)
        elif kind == "D":
            self.col = max(0, self.col - max(n, 1))
        elif kind == "G":
            self.col = max(n, 1) - 1
        elif kind == "A":
            self.row = max(0, self.row - max(n, 1))

    def feed(self, text):
        for match in re.finditer(r"\x1b\[\??([\d;]*)([A-Za-z])|\x1b[=>78]|([\s\S])", text):
            numbers, kind, char = match.groups()
            if kind:
                self.control(numbers, kind)
            elif char == "\r":
                self.col = 0
            elif char == "\n":
                self.newline()
            elif char == "\b":
                self.col = max(0, self.col - 1)
            elif char and char >= " ":
                self.put(char)


def runs(line):
    """Stretches of one look: (first cell, cells, text, dim, wide)."""
    out = []
    for i, (char, dim) in enumerate(line):
        if not char:
            continue
        wide = i + 1 < len(line) and line[i + 1][0] == ""
        if out and out[-1][3:] == [dim, wide] and out[-1][0] + out[-1][1] == i:
            out[-1][1] += 1 + wide
            out[-1][2] += char
        else:
            out.append([i, 1 + wide, char, dim, wide])
    return [r for r in out if r[2].strip()]


def draw(text, title="minimind"):
    screen = Screen()
    screen.feed(text)
    lines = screen.rows
    while lines and not lines[-1]:
        lines.pop()
    width, height = 2 * MARGIN + COLUMNS * CELL, TITLE + 2 * MARGIN + len(lines) * LINE
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}" '
           f'font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="{SIZE}">',
           f"<title>{xml.escape(title)}</title>",
           f'<rect width="100%" height="100%" rx="10" fill="{BACKGROUND}"/>']
    for i, colour in enumerate(["#ff5f57", "#febc2e", "#28c840"]):
        out.append(f'<circle cx="{MARGIN + 4 + 20 * i}" cy="20" r="6" fill="{colour}"/>')
    for y, line in enumerate(lines):
        command = "".join(c for c, _ in line).startswith("$ ")
        for cell, cells, chars, dim, _ in runs(line):
            colour = PROMPT if command else DIM if dim else TEXT
            out.append(f'<text x="{MARGIN + cell * CELL:.1f}" y="{TITLE + MARGIN + y * LINE + SIZE}" fill="{colour}" '
                       f'textLength="{cells * CELL:.1f}" lengthAdjust="spacingAndGlyphs" xml:space="preserve">'
                       f"{xml.escape(chars)}</text>")
    return "\n".join(out + ["</svg>"]) + "\n"


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in ("record", "draw"):
        sys.exit(__doc__)
    if sys.argv[1] == "record":
        return record(sys.argv[2], sys.argv[3])
    with open(sys.argv[2], encoding="utf-8", newline="") as f:
        text = f.read()
    with open(sys.argv[3], "w", encoding="utf-8") as f:
        f.write(draw(text))


if __name__ == "__main__":
    main()
