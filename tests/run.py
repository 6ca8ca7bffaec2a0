#!/usr/bin/env python3
"""Runs test programs and Python tests and ends with the line "N passed, N failed, N skipped".

    tests/run.py --build build/release [--gtest] [--pytest PATH ...]

Counts are single cases, taken from the JUnit files that GoogleTest and pytest write. A program that dies without its file,
or fails beyond what the file says (a crash, a leak report at exit, a timeout), counts as one failure. Every skipped case
is listed with its reason. The exit code is 0 only if nothing failed and something passed.
"""
import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Counts:
    def __init__(self):
        self.passed, self.failed, self.skipped = 0, [], []

    def read(self, path):
        """Adds the cases of one JUnit file; returns how many failed, None without a readable file."""
        try:
            cases = list(ET.parse(path).getroot().iter("testcase"))
        except (OSError, ET.ParseError):
            return None
        failed_before = len(self.failed)
        for case in cases:
            name = f"{case.get('classname')}.{case.get('name')}"
            skip = case.find("skipped")
            if case.get("status") == "notrun":
                continue  # disabled or filtered out
            if case.find("failure") is not None or case.find("error") is not None:
                self.failed.append(name)
            elif skip is not None:
                reason = (skip.get("message") or skip.text or "no reason given").strip()
                self.skipped.append(f"{name}: {reason.splitlines()[-1]}")
            else:
                self.passed += 1
        return len(self.failed) - failed_before


def run_gtests(build, results, counts, parallel):
    listing = results / "ctest.xml"
    # What the program sets for itself (cli/main.cpp), so that tests do not crawl on a busy machine.
    env = {"GOMP_SPINCOUNT": "10000", **os.environ, "GTEST_OUTPUT": f"xml:{results}/", "GTEST_BRIEF": "1",
           "GTEST_COLOR": "no"}
    if parallel > 1:  # they share the machine: together no more threads than cores
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // parallel)))
    code = subprocess.run(["ctest", "--test-dir", build, "--parallel", str(parallel), "--output-on-failure",
                           "--output-junit", listing], env=env, stdin=subprocess.DEVNULL).returncode
    try:
        programs = list(ET.parse(listing).getroot().iter("testcase"))
    except (OSError, ET.ParseError):
        programs = []
    if not programs:
        counts.failed.append(f"ctest in {build} ran nothing (exit code {code})")
    for program in programs:
        name, ok = program.get("name"), program.get("status") == "run"
        failures = counts.read(results / f"{name}_test.xml")
        if failures is None:
            counts.failed.append(f"{name}_test (no result file)")
        elif not ok and failures == 0:
            counts.failed.append(f"{name}_test (failed outside its cases)")


def run_pytest(paths, results, counts, binary):
    listing = results / "pytest.xml"
    env = {**os.environ, "MINIMIND": str(binary), "PYTHONDONTWRITEBYTECODE": "1"}
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-r", "fE",
                           f"--junitxml={listing}", *paths], cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode
    failures = counts.read(listing)
    if failures is None or (code != 0 and failures == 0):
        counts.failed.append(f"pytest (exit code {code})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build/release", help="build folder")
    parser.add_argument("--gtest", action="store_true", help="run the test programs of the build folder")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="test programs at a time (1)")
    parser.add_argument("--pytest", nargs="*", default=[], metavar="PATH", help="Python test files or folders")
    args = parser.parse_args()
    build = (ROOT / args.build).resolve()
    results = build / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    counts = Counts()
    if args.gtest:
        run_gtests(build, results, counts, args.parallel)
    if args.pytest:
        run_pytest(args.pytest, results, counts, build / "minimind")
    for line in counts.skipped:
        print(f"SKIPPED {line}")
    for line in counts.failed:
        print(f"FAILED {line}")
    print(f"{counts.passed} passed, {len(counts.failed)} failed, {len(counts.skipped)} skipped", flush=True)
    return 0 if counts.passed and not counts.failed else 1


if __name__ == "__main__":
    sys.exit(main())
