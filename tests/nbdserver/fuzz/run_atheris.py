"""Run a fuzz target for long: `python run_atheris.py handshake|transmission [libFuzzer options]`.

With atheris installed (in a virtualenv of its own; it is no dependency) coverage guides it.
Without it, `--plain SECONDS` mutates the corpus at random. Ends with the number of executions.
"""

import logging
import random
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]


def plain(target, corpus, seconds):
    """Random mutations of the corpus."""
    seeds = [path.read_bytes() for path in sorted(corpus.iterdir())]
    rng = random.Random()
    executions, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data) + 1)
            action = rng.random()
            if action < 0.5 and at < len(data):
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            elif action < 0.7:
                del data[at : at + rng.randrange(1, 30)]
            elif action < 0.9:
                other = rng.choice(seeds)
                cut = rng.randrange(len(other) + 1)
                data[at:at] = other[cut : cut + rng.randrange(1, 60)]
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
        try:
            target(bytes(data))
        except BaseException:
            print("fails:", bytes(data).hex())
            raise
        executions += 1
    print(f"{executions} executions, none failed")


def main():
    logging.disable(logging.CRITICAL)
    name = sys.argv.pop(1)
    corpus = HERE / "corpus" / name
    if "--plain" in sys.argv:
        from kits import nbd_fuzz

        plain(getattr(nbd_fuzz, f"fuzz_{name}"), corpus, float(sys.argv[-1]))
        return
    import atheris

    with atheris.instrument_imports():
        from kits import nbd_fuzz

    target = getattr(nbd_fuzz, f"fuzz_{name}")
    atheris.Setup([*sys.argv, str(corpus)], lambda data: target(data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
