#!/usr/bin/env python3
"""Writes src/text/unicode_ranges.inc: the class of every code point as HF `tokenizers` sees it in the ByteLevel pattern.

Usage: make_unicode_ranges.py > src/text/unicode_ranges.inc   (needs: pip install tokenizers)

The classes are asked of the library itself, so that our pre-tokenizer follows the Unicode version HF follows.
"""
import sys

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

split = ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str


def joins(left, c):
    return len(split(left + c)) == 1


def class_of(cp):
    if 0xD800 <= cp < 0xE000:
        return "other"
    c = chr(cp)
    if joins("a", c):
        return "letter"
    if joins("1", c):
        return "number"
    return "other" if joins("!", c) else "space"


runs = []
for cp in range(0x110000):
    k = class_of(cp)
    if not runs or runs[-1][1] != k:
        runs.append([cp, k])
print(f"// Made by scripts/make_unicode_ranges.py with tokenizers {tokenizers.__version__}; do not edit.")
print("// First code point of each run of one class.")
line = ""
for cp, k in runs:
    item = f"{{0x{cp:X}, {k[0].upper()}}}, "
    if len(line) + len(item) > 118:
        print(line.rstrip())
        line = ""
    line += item
print(line.rstrip())
print(len(runs), "runs", file=sys.stderr)
